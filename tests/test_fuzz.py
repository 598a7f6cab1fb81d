"""Ten thousand random cases each of packing, counting, sealing and voting, against NumPy.

One compiled call runs many cases of one shape, and every case is compared.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from special_values import as_seen, special_values

from signax._wire import packing, slabs
from signax._wire import words as wire
from signax._wire.ballots import Rules, toss

# NumPy warns of signalling NaNs.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

CASES = 10_000
RULES = [
    Rules(zeros, ties) for zeros in ("dither", "plus", "abstain") for ties in ("dither", "plus")
]
LAYOUTS = {
    "consecutive": (packing.pack_consecutive, packing.unpack_consecutive),
    "slabs": (slabs.pack_slabs, slabs.unpack_slabs),
    "groups": (slabs.pack_groups, slabs.unpack_groups),
}
DTYPES = ["float32", "bfloat16", "float16"]


def random_values(rng, shape, dtype):
    """Random and special numbers; every other row of the first axis is finite."""
    values = rng.standard_normal(shape).astype(dtype)
    special = special_values(dtype)
    share = rng.choice([0.0, 0.05, 0.7], size=(shape[0], *[1] * (len(shape) - 1)))
    values = np.where(rng.random(shape) < share, rng.choice(special, shape), values)
    values[::2] = np.where(np.isfinite(values[::2]), values[::2], np.array(-0.0, dtype))
    return values


def random_shape(rng):
    """A shape of at most two thousand coordinates, with lengths on boundaries or beside them."""

    def length(boundaries):
        return max(1, rng.choice(boundaries) + rng.choice([-1, 0, 0, 1]))

    kind = rng.integers(4)
    if kind == 0:
        return (int(length([1, 32, 64, 96, 1024])),)
    if kind == 1:
        return int(length([8, 32, 64, 256])), int(length([1, 4, 8]))
    if kind == 2:
        return int(length([2, 8, 16])), int(length([32, 128]))
    return int(length([2, 32])), int(length([1, 8])), int(length([4, 16]))


SHAPES = [(), (1,), (33,), (256, 128), (64, 256), (8, 32, 16)]


def test_packing_and_unpacking_of_ten_thousand_arrays():
    rng, seen, each = np.random.default_rng(0), 0, 320
    while seen < CASES:
        shape = (
            SHAPES[seen // (2 * each)] if seen // (2 * each) < len(SHAPES) else random_shape(rng)
        )
        number = seen // (2 * each)
        rules, dtype = RULES[number % len(RULES)], DTYPES[number % len(DTYPES)]
        sets = each if math.prod(shape) < 8192 else each // 4
        values, coins = random_values(rng, (sets, *shape), dtype), rng.integers(2, size=sets)
        seen_values = as_seen(values)
        ballots = [
            references.ballots(v, *rules, c) for v, c in zip(seen_values, coins, strict=True)
        ]
        bits = np.stack(ballots, axis=1)  # bool[planes, sets, ...]
        finite = np.isfinite(seen_values).reshape(sets, -1).all(axis=1)
        cut = slabs.fold(shape)

        for layout, (packer, unpacker) in LAYOUTS.items():

            @jax.jit
            def there_and_back(values, coins, packer=packer, unpacker=unpacker, rules=rules):
                planes, bad = jax.vmap(partial(packer, rule=rules))(values, coins)
                unpack = jax.vmap(partial(unpacker, shape=values.shape[1:]))
                return planes, ~jnp.any(bad, axis=1), [unpack(plane) for plane in planes]

            found = there_and_back(jnp.asarray(values), jnp.asarray(coins, jnp.uint32))
            planes, found_finite, found_bits = jax.tree.map(np.asarray, found)
            message = f"{layout} {shape} {rules} {dtype}"
            np.testing.assert_array_equal(found_finite, finite, err_msg=message)
            for plane, wanted, back in zip(planes, bits, found_bits, strict=True):
                np.testing.assert_array_equal(back, wanted, err_msg=message)
                words = expected_words(wanted, cut, layout)
                np.testing.assert_array_equal(plane, words, err_msg=message)
            seen += sets
    assert seen >= CASES


def expected_words(bits, cut, layout):
    """The words of some arrays, bool[sets, ...] to u32[sets, words]."""
    sets = len(bits)
    if layout == "consecutive":
        rows = np.stack([references.packed_consecutive(row.ravel()) for row in bits])
        return np.pad(rows, ((0, 0), (0, cut.words - rows.shape[1])))
    words = references.packed(bits.reshape(sets, *cut.shape), cut.axis + 1, cut.length)
    shape = cut.word_shape
    if len(shape) > 1 and shape[-2] % 8 == 0 and shape[-1] % 128 == 0:
        words = references.by_tiles(words, (sets, *shape))
    return words.reshape(sets, -1)


def test_packing_and_unpacking_of_ten_thousand_trees():
    rng, seen, each = np.random.default_rng(1), 0, 1700
    while seen < CASES:
        rules = RULES[seen // each % len(RULES)]
        shapes = [random_shape(rng) for _ in range(rng.integers(1, 4))]
        shapes = [s if math.prod(s) < 600 else (math.prod(s) % 67,) for s in shapes]
        shapes = [*shapes, (), (0,)[: rng.integers(2)], (3, 0), (5,)]
        order = rng.permutation(len(shapes))
        leaves = [random_values(rng, (each, *shapes[n]), DTYPES[n % len(DTYPES)]) for n in order]
        coins = rng.integers(2, size=each)

        @jax.jit
        def there_and_back(leaves, coins, rules=rules):
            def one(leaves, coin):
                planes, finite = packing.pack(leaves, rules, coin)
                return finite, packing.unpack(planes, leaves)

            return jax.vmap(one)(leaves, coins)

        finite, bits = there_and_back(leaves, jnp.asarray(coins, jnp.uint32))
        seen_leaves = [as_seen(leaf) for leaf in leaves]
        flags = [np.isfinite(leaf).reshape(each, -1).all(axis=1) for leaf in seen_leaves]
        np.testing.assert_array_equal(finite, np.all(flags, axis=0))
        for leaf, found in zip(seen_leaves, bits, strict=True):
            sets = zip(leaf, coins, strict=True)
            expected = np.stack([references.ballots(v, *rules, c) for v, c in sets], axis=1)
            np.testing.assert_array_equal(found, expected)
        seen += each
    assert seen >= CASES


def bits_of(words):
    """Bits of words in their last axis: u32[..., n] to bool[..., 32 n]."""
    return np.unpackbits(words.astype("<u4").view(np.uint8), axis=-1, bitorder="little") == 1


def test_counting_and_comparing_of_ten_thousand_sums():
    rng, seen, each = np.random.default_rng(2), 0, 2000
    workers = [1, 3, 8, 33, 129]
    for num_workers in workers:
        words = rng.integers(0, 2**32, (2, each, num_workers, 2), dtype=np.uint32)
        # Shares of set bits from few to nearly all.
        more = rng.integers(0, 2**32, words.shape, dtype=np.uint32)
        kind = rng.integers(3, size=(2, each, 1, 1))
        words = np.select([kind == 0, kind == 1], [words & more, words | more], words)
        counts = bits_of(words).sum(axis=2)
        thresholds = rng.integers(0, 2 ** num_workers.bit_length(), each)

        @jax.jit
        def compare(words, thresholds):
            def one(mine, others, threshold):
                planes, other_planes = wire.count(mine), wire.count(others)
                reached = wire.at_least(planes, threshold)
                return jnp.stack(planes), reached, wire.exceeds(planes, other_planes)

            return jax.vmap(one)(*words, thresholds)

        found = compare(jnp.asarray(words), jnp.asarray(thresholds, jnp.uint32))
        planes, reached, above = jax.tree.map(np.asarray, found)
        weights = 1 << np.arange(planes.shape[1])
        total = (bits_of(planes) * weights[:, None]).sum(axis=1)
        np.testing.assert_array_equal(total, counts[0])
        np.testing.assert_array_equal(bits_of(reached), counts[0] >= thresholds[:, None])
        np.testing.assert_array_equal(bits_of(above), counts[0] > counts[1])
        seen += each
    assert seen >= CASES


def test_sealing_and_unsealing_of_ten_thousand_messages():
    rng, seen, each = np.random.default_rng(3), 0, 2000
    while seen < CASES:
        planes, rows = int(rng.integers(1, 9)), int(rng.integers(1, 4))
        share = max(1, int(rng.choice([1, 32, 64, 128, 256]) + rng.integers(-2, 3)))
        words = rng.integers(0, 2**32, (planes, each, rows, share), dtype=np.uint32)
        headers = rng.choice([0, 1, 2, 7, 2**31, 2**32 - 1], each).astype(np.uint32)

        @partial(jax.jit, static_argnames=("planes", "share"))
        def there_and_back(words, headers, planes, share):
            sealed = jax.vmap(wire.seal)(list(words), headers)
            return sealed, jax.vmap(lambda part: wire.unseal(part, [share] * planes))(sealed)

        sealed, (found, marks) = there_and_back(words, headers, planes, share)
        length = -(-(planes * share + 1) // 128) * 128  # whole rows of lanes, with the header
        expected = np.zeros((each, rows, length), np.uint32)
        expected[..., : planes * share] = np.concatenate(words, axis=-1)
        expected[..., planes * share] = headers[:, None]
        expected[headers == 0] = 0
        np.testing.assert_array_equal(sealed.reshape(expected.shape), expected)
        np.testing.assert_array_equal(found, np.where(headers[:, None, None], words, 0))
        np.testing.assert_array_equal(marks, np.broadcast_to(headers[:, None], (each, rows)))
        seen += each
    assert seen >= CASES


def test_decisions_of_ten_thousand_votes():
    rng, seen, each, size = np.random.default_rng(4), 0, 1700, 23
    number = 0
    while seen < CASES:
        rules, dtype = RULES[number % len(RULES)], DTYPES[number % len(DTYPES)]
        num_workers = int(rng.integers(1, 10))
        values = random_values(rng, (each, num_workers, size), dtype)
        values = np.where(rng.random(values.shape) < 0.3, np.array(0, dtype), values)
        steps = np.where(rng.random(each) < 0.5, rng.integers(9, size=each), rng.integers(2**31))
        votes = np.isfinite(values).all(axis=2)

        @jax.jit
        def decide(values, steps, votes, rules=rules, num_workers=num_workers):
            def one(values, step, votes):
                odd = slabs.odd(values.shape[1:])
                coins = [toss(step, jnp.uint32(i), num_workers) for i in range(num_workers)]
                voters = jnp.sum(votes, dtype=jnp.uint32)
                cast = [rules(v, odd, coin) for v, (coin, _) in zip(values, coins, strict=True)]
                counts = [
                    jnp.sum(jnp.stack(plane) & votes[:, None], axis=0, dtype=jnp.uint32)
                    for plane in zip(*cast, strict=True)
                ]
                tie = (voters % 2 == 0) * rules.tie(coins[0][1])
                if rules.planes == 2:
                    decided = [counts[0] > counts[1], counts[1] > counts[0]]
                else:
                    decided = [counts[0] + tie >= voters // 2 + 1]
                return rules.signs([rules.upright(decided, odd)], voters, [values.dtype])[0]

            return jax.vmap(one)(values, steps, votes)

        found = decide(jnp.asarray(values), jnp.asarray(steps, jnp.int32), jnp.asarray(votes))
        assert found.dtype == values.dtype
        cases = zip(as_seen(values), steps, strict=True)
        expected = [references.vote(v, int(t), rules.zeros, rules.ties) for v, t in cases]
        np.testing.assert_array_equal(np.asarray(found, np.float64), expected)
        seen, number = seen + each, number + 1
    assert seen >= CASES


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_include_zeros_infinities_subnormals_and_nans(dtype):
    special = special_values(dtype)
    assert np.isnan(special).sum() == 3
    assert np.isinf(special).sum() == 2
    assert (special == 0).sum() == 2
    below = (np.abs(special) < jnp.finfo(dtype).tiny) & (special != 0)
    assert below.sum() == 4
