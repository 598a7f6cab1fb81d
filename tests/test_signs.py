"""What a worker votes, and that dithered zeros and ties do not drift."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from workers import AXIS

import signax
from signax._core.leaves import all_finite
from signax._wire import signs as wire
from signax._wire.exchange import take_part
from signax._workers.votes import NEVER

STEPS = 2000
PERIODS = range(2, 19)
NOISY = 64


@pytest.mark.parametrize("step", [0, 1, 2, 3, 1000, 2**31 - 2, 2**31 - 1])
def test_coins_follow_the_stated_rule(step):
    h1, h2 = references.hash_bits(step // 2)
    for num_workers in (1, 2, 5):
        for worker in range(num_workers):
            coin, found_tie = wire.toss(jnp.int32(step), jnp.int32(worker), num_workers)
            place = (worker + step // 2) % num_workers
            assert int(coin) == (place + step + h1) % 2
            assert int(found_tie) == (step + h2) % 2


@pytest.mark.parametrize("step", [4, 5, 1001, 2**31 - 1])
def test_coins_remember_who_was_missing_and_where_dead_coordinates_are(step):
    h1, h2 = references.hash_bits(step // 2)
    for num_workers in (1, 2, 5, 8):
        for first_missed in (0, step // 2 - 1, step // 2, NEVER):
            places = references.places(step, num_workers, first_missed < step // 2)
            assert sorted(places) == list(range(num_workers))
            for drift, tie in [(0, (step + h2) % 2), (1, 1), (3, 1), (-1, 0)]:
                memory = wire.DitherMemory(jnp.int32(drift), jnp.int32(first_missed))
                for worker, place in enumerate(places):
                    coin, found_tie = wire.toss(
                        jnp.int32(step), jnp.int32(worker), num_workers, memory
                    )
                    assert int(coin) == (place + step + h1) % 2
                    assert int(found_tie) == tie


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
    found = wire.Rules(zeros, "plus")(values, odd, jnp.uint32(coin))
    np.testing.assert_array_equal(np.asarray(found, int), expected)
    np.testing.assert_array_equal(references.ballots(values, zeros, "plus", coin), expected)


@pytest.mark.parametrize("coin", [0, 1])
@pytest.mark.parametrize("zeros", ["dither", "plus"])
def test_with_dithered_ties_a_ballot_is_turned_round_where_it_is_odd(zeros, coin):
    values, odd = jnp.array([2.0, 2.0, -2.0, -2.0, 0.0, 0.0]), jnp.arange(6) % 2 == 1
    (straight,) = wire.Rules(zeros, "plus")(values, odd, jnp.uint32(coin))
    (turned,) = wire.Rules(zeros, "dither")(values, odd, jnp.uint32(coin))
    np.testing.assert_array_equal(turned, straight != odd)
    np.testing.assert_array_equal(turned, *references.ballots(values, zeros, "dither", coin))


RULES = [
    wire.Rules(zeros, ties)
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
            rules = wire.Rules(zeros, ties)
            bit = jnp.broadcast_to(rules.tie(jnp.uint32(coin)) == 1, odd.shape)
            found = rules.signs([bit], odd, jnp.uint32(2), jnp.float32)
            np.testing.assert_array_equal(found > 0, np.broadcast_to(expected, odd.shape))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_tree_is_finite_if_every_floating_leaf_is(dtype):
    good = {"a": jnp.ones(3, dtype), "n": jnp.arange(3), "e": jnp.ones((0, 2), dtype), "x": None}
    assert all_finite(good)
    assert all_finite({"n": jnp.arange(3)})
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        assert not all_finite({**good, "s": jnp.asarray(bad, dtype)})


@pytest.mark.parametrize("finite", [False, True])
def test_what_takes_part_is_finite_and_active(finite):
    finite = jnp.bool_(finite)
    assert take_part(finite, None) == finite
    assert take_part(finite, True) == finite
    assert not take_part(finite, jnp.bool_(False))
    with pytest.raises(TypeError, match=r"active=1\.0 must be one boolean"):
        take_part(finite, 1.0)


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


def absences(name, num_workers):
    """Which workers are active at each step: bool[STEPS, M]."""
    active, step = np.ones((STEPS, num_workers), bool), np.arange(STEPS)
    if name == "one at even steps":
        active[:, 0] = step % 2 == 1
    elif name == "one at odd steps":
        active[:, 0] = step % 2 == 0
    elif name == "one at every third step":
        active[:, 0] = step % 3 > 0
    elif name == "one for good":
        active[:, 0] = False
    elif name == "two for good":
        active[:, [0, 2]] = False
    elif name == "two in turn":
        active[:, 0], active[:, 1] = step % 2 == 1, step % 2 == 0
    else:
        share, seed = name.split(" by seed ")
        rng = np.random.default_rng([num_workers, int(seed)])
        active = rng.random(active.shape) > float(share)
    return active


@jax.jit
def walk(active):
    """How far dead coordinates go, and how far those on which one worker votes +1."""
    num_workers = active.shape[1]
    tx = signax.majority_vote(AXIS)
    own = jnp.repeat(jnp.eye(num_workers)[:, :, None], 2, axis=2)  # of even and of odd index
    rows = {"dead": jnp.zeros((num_workers, 2)), "own": own}

    def body(carry, active):
        states, place, farthest = carry
        update = jax.vmap(lambda g, s, a: tx.update(g, s, active=a), axis_name=AXIS)
        decided, states = update(rows, states, active)
        place = jax.tree.map(lambda total, rows: total + rows[0], place, decided)
        return (states, place, jnp.maximum(farthest, jnp.abs(place["dead"]).max())), None

    states = jax.vmap(lambda _: tx.init(None))(jnp.arange(num_workers))
    start = states, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:]), rows), 0.0
    (_, place, farthest), _ = jax.lax.scan(body, start, active)
    return farthest, place["own"].mean(axis=1)


@pytest.mark.parametrize("num_workers", range(2, 9))
@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("one for good", 1),
        ("two for good", 1),
        ("one at even steps", 3),
        ("one at odd steps", 3),
        ("one at every third step", 3),
        *((f"0.01 by seed {seed}", 6) for seed in range(3)),
        *((f"0.1 by seed {seed}", 15) for seed in range(3)),
        *((f"0.5 by seed {seed}", 25) for seed in range(3)),
    ],
)
def test_dead_coordinates_stay_near_while_workers_come_and_go(name, steps, num_workers):
    if num_workers == 2 and name == "two for good":
        num_workers = 5
    active = absences(name, num_workers)
    farthest, own = jax.device_get(walk(active))
    assert farthest <= steps
    # Workers who take part as often as each other have equal power over what they alone vote on,
    # within five standard errors of means over 1,000 pairs of steps.
    share = active[:, 1:].mean(axis=0)
    alike = own[1:][np.abs(share - share[0]) < 0.03] / STEPS
    assert alike.min() > 0
    assert np.ptp(alike) <= 5 * 0.5 / np.sqrt(STEPS / 2)


def test_a_worker_out_at_every_even_step_moves_dead_coordinates_by_one_step_at_most():
    farthest, _ = walk(absences("one at even steps", 8))
    assert farthest <= 1


def test_without_ties_dead_coordinates_walk_at_random():
    """Never as many voters of one parity as of the other: then nothing bounds the drift."""
    farthest, _ = walk(absences("two in turn", 8))
    assert 10 < farthest < 3 * np.sqrt(2 * STEPS)


def test_the_compiled_check_of_a_tree_grows_with_its_leaves_not_with_their_square():
    def held(tree):
        finite = all_finite(tree)
        return jax.tree.map(lambda leaf: jnp.where(finite, leaf + 1, leaf), tree)

    def length(leaves):
        tree = [jnp.ones(64) for _ in range(leaves)]
        return len(jax.jit(held).lower(tree).compile().as_text())

    assert length(64) < 6 * length(16)
