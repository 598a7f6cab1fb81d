"""Ballots and coins of a vote, and the drift of dithered zeros and ties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from workers import AXIS

import signax
from signax._wire import ballots
from signax._workers.vote_state import NEVER

STEPS = 2000
PERIODS = range(2, 19)
NOISY = 64


@pytest.mark.parametrize("num_workers", [1, 2, 5])
@pytest.mark.parametrize("step", [0, 1, 2, 3, 1000, 2**31 - 2, 2**31 - 1])
def test_coins_follow_the_documented_rule(step, num_workers):
    h1, h2 = references.hash_bits(step // 2)
    for worker in range(num_workers):
        coin, found_tie = ballots.toss(jnp.int32(step), jnp.int32(worker), num_workers)
        place = (worker + step // 2) % num_workers
        assert (int(coin), int(found_tie)) == ((place + step + h1) % 2, (step + h2) % 2), worker


@pytest.mark.parametrize("num_workers", [1, 2, 5, 8])
@pytest.mark.parametrize("step", [4, 5, 1001, 2**31 - 1])
def test_coins_depend_on_absences_and_on_the_drift_of_dead_coordinates(step, num_workers):
    h1, h2 = references.hash_bits(step // 2)
    for first_missed in (0, step // 2 - 1, step // 2, NEVER):
        places = references.places(step, num_workers, first_missed < step // 2)
        assert sorted(places) == list(range(num_workers))
        for drift, tie in [(0, (step + h2) % 2), (1, 1), (3, 1), (-1, 0)]:
            memory = ballots.DitherMemory(jnp.int32(drift), jnp.int32(first_missed))
            for worker, place in enumerate(places):
                found = ballots.toss(jnp.int32(step), jnp.int32(worker), num_workers, memory)
                expected = (place + step + h1) % 2, tie
                assert tuple(map(int, found)) == expected, (first_missed, drift, worker)


@pytest.mark.parametrize(
    ("zeros", "coin", "expected"),
    [
        ("dither", 0, [[1, 0, 1, 0, 1, 0]]),  # even coordinates become +1
        ("dither", 1, [[1, 0, 0, 1, 0, 1]]),
        ("plus", 0, [[1, 0, 1, 1, 1, 1]]),
        ("abstain", 0, [[1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]]),
    ],
)
def test_ballots_are_signs_and_zeros_follow_their_mode(zeros, coin, expected):
    values, odd = jnp.array([2.0, -2.0, 0.0, -0.0, jnp.nan, 0.0]), jnp.arange(6) % 2 == 1
    found = ballots.Rules(zeros, "plus")(values, odd, jnp.uint32(coin))
    np.testing.assert_array_equal(np.asarray(found, int), expected)
    np.testing.assert_array_equal(references.ballots(values, zeros, "plus", coin), expected)


@pytest.mark.parametrize("coin", [0, 1])
@pytest.mark.parametrize("zeros", ["dither", "plus"])
def test_dithered_ties_invert_the_bits_of_odd_coordinates(zeros, coin):
    values, odd = jnp.array([2.0, 2.0, -2.0, -2.0, 0.0, 0.0]), jnp.arange(6) % 2 == 1
    (straight,) = ballots.Rules(zeros, "plus")(values, odd, jnp.uint32(coin))
    (turned,) = ballots.Rules(zeros, "dither")(values, odd, jnp.uint32(coin))
    np.testing.assert_array_equal(turned, straight != odd)
    np.testing.assert_array_equal(turned, *references.ballots(values, zeros, "dither", coin))


RULES = [
    ballots.Rules(zeros, ties)
    for zeros in ("dither", "plus", "abstain")
    for ties in ("dither", "plus")
]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_unanimous_bits_decode_to_their_signs(rules, dtype):
    values, odd = jnp.array([2.0, 2.0, -2.0, -2.0]), jnp.arange(4) % 2 == 1
    bits = rules(values, odd, jnp.uint32(0))
    assert len(bits) == rules.planes
    for voters in (1, 3):
        (signs,) = rules.signs([rules.upright(bits, odd)], jnp.uint32(voters), [dtype])
        assert signs.dtype == dtype
        np.testing.assert_array_equal(signs, [1, 1, -1, -1])


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_without_voters_nothing_is_decided(rules):
    nothing = [jnp.zeros(4, jnp.bool_)] * rules.planes  # the bits of an excluded worker
    upright = rules.upright(nothing, jnp.arange(4) % 2 == 1)
    (signs,) = rules.signs([upright], jnp.uint32(0), [jnp.float32])
    np.testing.assert_array_equal(signs, np.zeros(4))


@pytest.mark.parametrize("coin", [0, 1])
def test_ties_follow_the_coin_or_are_plus(coin):
    odd = jnp.arange(6) % 2 == 1
    for zeros in ("dither", "plus"):
        for ties, expected in [("dither", (odd + coin) % 2 == 0), ("plus", True)]:
            rules = ballots.Rules(zeros, ties)
            bit = jnp.broadcast_to(rules.tie(jnp.uint32(coin)) == 1, odd.shape)
            upright = rules.upright([bit], odd)
            (found,) = rules.signs([upright], jnp.uint32(2), [jnp.float32])
            np.testing.assert_array_equal(found > 0, np.broadcast_to(expected, odd.shape))


def drift(num_workers):
    """Sums of decisions over steps, on leaves that could each drift in another way."""
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
        # Coordinates that are zero periodically are decided by the dither at some steps only.
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
    assert furthest.max() <= 1  # dead coordinates stay within one step
    assert np.abs(total["rare"]).max() <= 0.033 * STEPS
    assert np.abs(total["often"]).max() <= 0.033 * STEPS
    # Ties on noise: each coordinate's sum and the total are within 5 standard deviations of 0.
    assert np.abs(total["noise"]).max() <= 5 * np.sqrt(STEPS)
    assert abs(total["noise"].sum()) <= 5 * np.sqrt(STEPS * NOISY)
    # Coordinates on which only one worker votes +1 move forwards, equally for all workers.
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
    """The range of dead coordinates, and the movement of coordinates with one vote for +1."""
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
def test_dead_coordinates_stay_near_zero_while_workers_come_and_go(name, steps, num_workers):
    if num_workers == 2 and name == "two for good":
        num_workers = 5
    active = absences(name, num_workers)
    farthest, own = jax.device_get(walk(active))
    assert farthest <= steps
    # Workers that take part equally often move their own coordinates equally, within five standard
    # errors of means over 1,000 pairs of steps.
    share = active[:, 1:].mean(axis=0)
    alike = own[1:][np.abs(share - share[0]) < 0.03] / STEPS
    assert alike.min() > 0
    assert np.ptp(alike) <= 5 * 0.5 / np.sqrt(STEPS / 2)


def test_a_worker_absent_at_even_steps_moves_dead_coordinates_by_at_most_one_step():
    farthest, _ = walk(absences("one at even steps", 8))
    assert farthest <= 1


def test_dead_coordinates_walk_at_random_if_no_ties_occur():
    """The voters' parities never balance, so nothing bounds the drift."""
    farthest, _ = walk(absences("two in turn", 8))
    assert 10 < farthest < 3 * np.sqrt(2 * STEPS)
