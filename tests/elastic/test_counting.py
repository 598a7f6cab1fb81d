"""Counting equals the vote of one program with M workers bit for bit, and NumPy."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

import signax
from signax._wire import packing, words
from signax._wire.ballots import Rules, find_worker
from signax._wire.signs import Majority
from signax._wire.types import Leaves
from signax.elastic.counting import Counter
from signax.elastic.plan import Exchange, Plan
from signax.elastic.protocol import ProtocolError

SIZE = 1000
RULES = [Rules("dither", "dither"), Rules("plus", "plus"), Rules("abstain", "dither")]


def ballots_of(values, step, active, *, rules):
    """The sealed messages of workers in one program: f32[M, n] to u32[M, n / 128, 128]."""

    def seal(value, active):
        worker = find_worker("workers", rules, step, None)
        encoded = Majority(rules).encode(Leaves([value], [value]), worker.coin, ())
        header = words.make_header(worker.index, worker.coin, worker.tie, active)
        return words.seal([plane[None] for plane in encoded.message], header)[0]

    return jax.vmap(seal, axis_name="workers")(values, active)


def signs_of(decided, header, *, rules):
    """What a worker makes of a decision."""
    planes, like = jnp.split(decided, rules.planes), [jnp.zeros(SIZE)]
    bits = packing.unpack(planes, like, inverts_odd=rules.relative)
    return rules.signs(bits, jnp.uint32(header >> 1), [jnp.float32])[0]


def make_values(num_workers, seed):
    draw = np.random.default_rng(seed)
    return draw.integers(-1, 2, (num_workers, SIZE)).astype(np.float32)


def make_plan(rules, num_workers, size=SIZE):
    exchange = Exchange((-(-size // 32),) * rules.planes, rules.zeros, rules.ties)
    return Plan("a digest", num_workers, (exchange,))


@pytest.mark.parametrize("num_workers", [1, 4])
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_a_decision_equals_the_vote_of_one_program(rules, num_workers):
    counter = Counter(make_plan(rules, num_workers))
    decode = jax.jit(partial(signs_of, rules=rules))
    seal = jax.jit(partial(ballots_of, rules=rules))
    vote = jax.vmap(
        lambda value, step, active: signax.pvote(
            value, "workers", step=step, active=active, zeros=rules.zeros, ties=rules.ties
        ),
        axis_name="workers",
        in_axes=(0, None, 0),
    )
    vote = jax.jit(vote)
    for step, active in enumerate(itertools.product([False, True], repeat=num_workers)):
        values, active = make_values(num_workers, step), np.array(active)
        sealed = np.asarray(seal(values, step, active))
        for slot, ballot in enumerate(sealed):  # rows of slots that do not vote may hold anything
            counter.put(step, slot, (ballot if active[slot] else ~ballot).tobytes())
        counted = counter.count(step, np.flatnonzero(active).tolist())
        assert counted.header >> 1 == active.sum()
        decided = decode(counted.words, counted.header)
        expected = vote(values, step, active)
        np.testing.assert_array_equal(decided, expected[0])


@pytest.mark.parametrize("num_workers", [3, 8])
def test_a_decision_is_the_majority_of_bits_and_each_voter_has_its_share_of_equal_bits(num_workers):
    draw = np.random.default_rng(num_workers)
    bits = draw.random((num_workers, 4096)) < 0.6
    plan = make_plan(Rules("plus", "plus"), num_workers, size=4096)
    counter = Counter(plan)
    for slot in range(num_workers):
        ballot = np.zeros(plan.exchanges[0].ballot_words, np.uint32)
        ballot[:128] = references.packed(bits[slot])
        ballot[128] = 4 * (slot + 1) + 1
        counter.put(0, slot, ballot.tobytes())
    counted = counter.count(0, range(num_workers))
    decided = 2 * bits.sum(axis=0) >= num_workers  # ties are +1
    assert counted.header >> 1 == num_workers
    np.testing.assert_array_equal(counted.words, references.packed(decided))
    for slot in range(num_workers):
        assert counted.equal_bits[slot] == pytest.approx((bits[slot] == decided).mean())


def test_nobody_decides_nothing():
    counter = Counter(make_plan(Rules("dither", "dither"), 2))
    counted = counter.count(0, [])
    assert counted.header == 0
    assert counted.equal_bits == {}


def test_rejects_a_header_of_another_slot():
    plan = make_plan(Rules("dither", "dither"), 2)
    counter, ballot = Counter(plan), np.zeros(128, np.uint32)
    with pytest.raises(ProtocolError, match="names nobody, and not slot 0"):
        counter.check(0, 0, ballot.tobytes())
    ballot[plan.exchanges[0].widths[0]] = 4 * 2 + 3
    counter.check(0, 1, ballot.tobytes())
    with pytest.raises(ProtocolError, match="names worker 1, and not slot 0"):
        counter.check(0, 0, ballot.tobytes())
