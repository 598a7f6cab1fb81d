"""What a worker votes, and that dithered zeros and ties do not drift."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from workers import AXIS

import signax
from signax import _ballots

STEPS = 2000
PERIODS = range(2, 19)
NOISY = 64


@pytest.mark.parametrize("step", [0, 1, 2, 3, 1000, 2**31 - 2, 2**31 - 1])
def test_coins_follow_the_stated_rule(step):
    h1, h2 = references.hash_bits(step // 2)
    for num_workers in (1, 2, 5):
        for worker in range(num_workers):
            coins = _ballots.toss(jnp.int32(step), jnp.int32(worker), num_workers)
            place = (worker + step // 2) % num_workers
            assert int(coins.zero) == (place + step + h1) % 2
            assert int(coins.tie) == (step + h2) % 2


@pytest.mark.parametrize(
    ("zeros", "coin", "expected"),
    [
        ("dither", 0, [[1, 0, 1, 0, 1, 0]]),  # even coordinates become +1
        ("dither", 1, [[1, 0, 0, 1, 0, 1]]),
        ("plus", 0, [[1, 0, 1, 1, 1, 1]]),
        ("abstain", 0, [[1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]]),
    ],
)
def test_ballots_are_signs_with_zeros_and_nan_as_asked(zeros, coin, expected):
    values, odd = jnp.array([2.0, -2.0, 0.0, -0.0, jnp.nan, 0.0]), jnp.arange(6) % 2 == 1
    found = _ballots.Rules(zeros, "plus")(values, odd, jnp.uint32(coin))
    np.testing.assert_array_equal(np.asarray(found, int), expected)
    np.testing.assert_array_equal(references.ballots(values, zeros, "plus", coin), expected)


@pytest.mark.parametrize("coin", [0, 1])
@pytest.mark.parametrize("zeros", ["dither", "plus"])
def test_with_dithered_ties_a_ballot_is_turned_round_where_it_is_odd(zeros, coin):
    values, odd = jnp.array([2.0, 2.0, -2.0, -2.0, 0.0, 0.0]), jnp.arange(6) % 2 == 1
    (straight,) = _ballots.Rules(zeros, "plus")(values, odd, jnp.uint32(coin))
    (turned,) = _ballots.Rules(zeros, "dither")(values, odd, jnp.uint32(coin))
    np.testing.assert_array_equal(turned, straight != odd)
    np.testing.assert_array_equal(turned, *references.ballots(values, zeros, "dither", coin))


RULES = [
    _ballots.Rules(zeros, ties)
    for zeros in ("dither", "plus", "abstain")
    for ties in ("dither", "plus")
]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_what_one_worker_casts_is_decided_as_it_was_meant(rules, dtype):
    values, odd = jnp.array([2.0, 2.0, -2.0, -2.0]), jnp.arange(4) % 2 == 1
    bits = rules(values, odd, jnp.uint32(0))
    assert len(bits) == rules.planes
    for voters in (1, 3):
        signs = rules.signs(bits, odd, jnp.uint32(voters), dtype)
        assert signs.dtype == dtype
        np.testing.assert_array_equal(signs, [1, 1, -1, -1])


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_without_voters_nothing_is_decided(rules):
    nothing = [jnp.zeros(4, jnp.bool_)] * rules.planes  # as those who are out send
    signs = rules.signs(nothing, jnp.arange(4) % 2 == 1, jnp.uint32(0), jnp.float32)
    np.testing.assert_array_equal(signs, np.zeros(4))


@pytest.mark.parametrize("coin", [0, 1])
def test_a_tie_is_settled_by_its_coin_or_is_plus(coin):
    odd = jnp.arange(6) % 2 == 1
    for zeros in ("dither", "plus"):
        for ties, expected in [("dither", (odd + coin) % 2 == 0), ("plus", True)]:
            rules = _ballots.Rules(zeros, ties)
            bit = jnp.broadcast_to(rules.tie(jnp.uint32(coin)) == 1, odd.shape)
            signs = rules.signs([bit], odd, jnp.uint32(2), jnp.float32)
            np.testing.assert_array_equal(signs > 0, np.broadcast_to(expected, odd.shape))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_tree_is_finite_if_every_floating_leaf_is(dtype):
    good = {"a": jnp.ones(3, dtype), "n": jnp.arange(3), "e": jnp.ones((0, 2), dtype), "x": None}
    assert _ballots.all_finite(good)
    assert _ballots.all_finite({"n": jnp.arange(3)})
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        assert not _ballots.all_finite({**good, "s": jnp.asarray(bad, dtype)})


@pytest.mark.parametrize("finite", [False, True])
def test_what_takes_part_is_finite_and_active(finite):
    finite = jnp.bool_(finite)
    assert _ballots.take_part(finite, None) == finite
    assert _ballots.take_part(finite, True) == finite
    assert not _ballots.take_part(finite, jnp.bool_(False))
    with pytest.raises(TypeError, match=r"active=1\.0 must be one boolean"):
        _ballots.take_part(finite, 1.0)


def drift(num_workers):
    """Sums of decisions over steps, on leaves that show each way to drift."""
    tx = signax.majority_vote(AXIS)
    worker = jnp.arange(num_workers)

    def updates(step, key):
        own = (worker[:, None, None] == worker[None, :, None]).astype(jnp.float32)  # [M, M, 1]
        noise = jax.random.normal(key, (num_workers, NOISY))
        return {
            "dead": jnp.zeros((num_workers, 8)),
            "own": jnp.broadcast_to(own, (num_workers, num_workers, 8)),
            "noise": noise,
        }

    def body(carry, step_and_key):
        states, total, furthest = carry
        step, key = step_and_key
        decided, states = jax.vmap(tx.update, axis_name=AXIS)(updates(step, key), states)
        decided = jax.tree.map(lambda rows: rows[0], decided)
        # Zeros that come or go with a period leave the decisions of some steps only.
        period = jnp.arange(PERIODS.start, PERIODS.stop)[:, None]
        rare = (step % period == 0) * decided["dead"]
        often = (step % period != 0) * decided["dead"]
        decided |= {"rare": rare, "often": often}
        total = jax.tree.map(jnp.add, total, decided)
        return (states, total, jnp.maximum(furthest, jnp.abs(total["dead"]))), None

    shapes = {
        "dead": (8,), "own": (num_workers, 8), "noise": (NOISY,),
        "rare": (len(PERIODS), 8), "often": (len(PERIODS), 8),
    }  # fmt: skip
    total = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    states = jax.vmap(lambda _: tx.init(None))(worker)
    steps = jnp.arange(STEPS), jax.random.split(jax.random.key(num_workers), STEPS)
    (_, total, furthest), _ = jax.lax.scan(body, (states, total, jnp.zeros(8)), steps)
    return total, furthest


@pytest.mark.parametrize("num_workers", range(1, 10))
def test_the_dither_does_not_drift(num_workers):
    total, furthest = jax.device_get(jax.jit(drift, static_argnums=0)(num_workers))
    assert furthest.max() <= 1  # dead coordinates never leave one step
    assert np.abs(total["rare"]).max() <= 0.033 * STEPS
    assert np.abs(total["often"]).max() <= 0.033 * STEPS
    # Ties on noise: each coordinate's mean within 5 standard deviations of 0, and that of all.
    assert np.abs(total["noise"]).max() <= 5 * np.sqrt(STEPS)
    assert abs(total["noise"].sum()) <= 5 * np.sqrt(STEPS * NOISY)
    # A coordinate on which one worker alone votes +1: all workers move it equally, and forwards.
    power = total["own"].mean(axis=1) / STEPS
    assert power.min() > 0
    assert np.ptp(power) <= 0.05


def test_the_compiled_check_of_a_tree_grows_with_its_leaves_not_with_their_square():
    def held(tree):
        finite = _ballots.all_finite(tree)
        return jax.tree.map(lambda leaf: jnp.where(finite, leaf + 1, leaf), tree)

    def length(leaves):
        tree = [jnp.ones(64) for _ in range(leaves)]
        return len(jax.jit(held).lower(tree).compile().as_text())

    assert length(64) < 6 * length(16)
