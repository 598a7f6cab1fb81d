"""Packing and unpacking, in the order of CPUs and in the order of accelerators, against NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from hypothesis import given
from hypothesis import strategies as st

from signax._wire import packing, pieces, slabs
from signax._wire.ballots import Rules

RULES = [Rules("dither", "dither"), Rules("dither", "plus"), Rules("plus", "dither"),
         Rules("abstain", "dither")]  # fmt: skip
PACKERS = [packing.pack_consecutive, slabs.pack_slabs, slabs.pack_groups]
DTYPES = ("float64", "float32", "bfloat16", "float16")
COIN = 1

# Each shape with its expected cut: the folded shape, the axis, and the rows of a block.
CUTS = {
    (): ((1,), 0, 1),
    (1,): ((1,), 0, 1),
    (33,): ((33,), 0, 2),
    (1000,): ((1000,), 0, 32),
    (3, 11): ((33,), 0, 2),
    (45, 367): ((45 * 367,), 0, 517),
    (256, 128): ((256, 128), 0, 8),
    (512, 5): ((512, 5), 0, 16),
    (12700, 2): ((12700, 2), 0, 400),
    (5003, 4): ((5003, 4), 0, 157),
    (96, 40): ((96, 40), 0, 3),
    (128, 255): ((128, 255), 1, 8),
    (256, 127): ((256, 127), 1, 4),
    (64, 16, 17): ((64, 16, 17), 0, 2),
    (64, 8, 128): ((64, 8, 128), 0, 2),
    (33, 31, 17): ((33 * 31, 17), 0, 32),
    (4, 128, 384): ((512, 384), 0, 16),
    (2, 3, 64, 47): ((384, 47), 0, 12),
}
every_cut = pytest.mark.parametrize("shape", CUTS, ids=str)


def random_values(shape, seed=0, dtype=np.float64):
    values = np.random.default_rng(seed).choice([-2.0, -1.0, -0.0, 0.0, 1.0, 0.5], size=shape)
    return np.asarray(values, dtype)


def expected_words(values, rules, packer):
    """The planes of an array, in the order of a packer."""
    bits = references.ballots(values, *rules, COIN)
    shape, axis, rows = CUTS[values.shape]
    word_shape = (*shape[:axis], rows, *shape[axis + 1 :])
    if packer is packing.pack_consecutive:  # the cut may have more words
        words = [references.packed_consecutive(plane.ravel()) for plane in bits]
        return [np.pad(plane, (0, math.prod(word_shape) - plane.size)) for plane in words]
    words = [references.packed(plane.reshape(shape), axis, rows) for plane in bits]
    tiled = len(shape) > 1 and word_shape[-2] % 8 == 0 and word_shape[-1] % 128 == 0
    if not tiled:
        return words
    return [references.by_tiles(plane, word_shape) for plane in words]


@functools.partial(jax.jit, static_argnames=("packer", "rules"))
def packed_by(array, packer, rules):
    planes, bad = packer(array, jnp.uint32(COIN), rule=rules)
    return planes, ~jnp.any(bad)


@every_cut
def test_fold_cuts_arrays_without_a_new_layout_on_tpus(shape):
    assert slabs.fold(shape) == CUTS[shape]


@given(st.lists(st.integers(1, 3000) | st.sampled_from([32, 128, 256, 8192]), max_size=4))
def test_blocks_cover_an_array_and_waste_little(shape):
    cut, size = slabs.fold(tuple(shape)), math.prod(shape)
    flat = -(-size // 32)
    assert flat <= cut.words <= flat * 33 / 32
    assert math.prod(cut.shape) == size
    assert 32 * cut.length >= cut.shape[cut.axis]
    merged = len(shape) - len(cut.shape) + 1  # leading axes that have become one
    assert len(shape) < 2 or cut.shape == (math.prod(shape[:merged]), *shape[merged:])


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize(
    ("shape", "rules"),
    [
        *((shape, RULES[0]) for shape in CUTS),
        *((shape, RULES[3]) for shape in [(1000,), (5003, 4), (128, 255), (64, 8, 128)]),
    ],
    ids=str,
)
def test_words_hold_consecutive_coordinates_or_blocks(shape, rules, packer):
    values = random_values(shape)
    planes, finite = packed_by(jnp.asarray(values, jnp.float32), packer, rules)
    assert finite
    for plane, expected in zip(planes, expected_words(values, rules, packer), strict=True):
        assert plane.dtype == jnp.uint32
        np.testing.assert_array_equal(plane, expected)


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize(("dtype", "rules"), list(zip(DTYPES, RULES, strict=True)), ids=str)
def test_every_dtype_packs_to_the_same_words(dtype, rules, packer):
    values = random_values((5003, 4))
    values[17, 3] = np.nan
    with jax.enable_x64(True):
        planes, finite = packed_by(jnp.asarray(values, dtype), packer, rules)
    assert not finite
    np.testing.assert_array_equal(planes, expected_words(values, rules, packer))


@pytest.mark.parametrize("packer", PACKERS)
@every_cut
def test_packing_finds_a_nonfinite_value_anywhere(shape, packer):
    values = random_values(shape, dtype=np.float32)
    _, axis, rows = CUTS[shape]
    last_of_block = min(rows, values.size) * (values.size // max(shape, default=1)) - 1
    for place in {0, values.size // 2, min(last_of_block, values.size - 1), values.size - 1}:
        for bad in (np.nan, -np.inf):
            spoilt = values.copy()
            spoilt.flat[place] = bad
            assert not packed_by(jnp.asarray(spoilt), packer, RULES[0])[1], (axis, place)


@pytest.mark.parametrize(
    ("packer", "unpacker"),
    [
        (packing.pack_consecutive, packing.unpack_consecutive),
        (slabs.pack_slabs, slabs.unpack_slabs),
        (slabs.pack_groups, slabs.unpack_groups),
    ],
)
@every_cut
def test_unpacking_inverts_packing(shape, packer, unpacker):
    values = random_values(shape)
    (plane,), _ = packed_by(jnp.asarray(values, jnp.float32), packer, RULES[0])
    bits = jax.jit(lambda words: unpacker(words, shape))(plane)
    (expected,) = references.ballots(values, *RULES[0], COIN)
    np.testing.assert_array_equal(bits, expected)


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("shape", [(256, 128), (512, 40), (64, 16, 17), (4, 128, 384)], ids=str)
def test_an_array_in_slabs_packs_to_the_same_words(shape, packer):
    values = jnp.asarray(random_values(shape), jnp.float32)
    blocks = slabs.in_slabs(values)
    assert blocks.shape[0] == 32
    np.testing.assert_array_equal(np.ravel(blocks), np.ravel(values))
    for rules in (RULES[0], RULES[3]):
        found, finite = packed_by(blocks, packer, rules)
        assert finite
        np.testing.assert_array_equal(found, packed_by(values, packer, rules)[0])
    assert not packed_by(blocks.at[(-1,) * blocks.ndim].set(jnp.nan), packer, RULES[0])[1]


def test_arrays_in_slabs_and_whole_arrays_make_the_same_message():
    shapes = [(512, 40), (3,), (64, 16, 17), (128, 255)]
    leaves = [jnp.asarray(random_values(shape), jnp.float32) for shape in shapes]
    pack = jax.jit(lambda leaves: packing.pack(leaves, RULES[0], jnp.uint32(COIN)))
    (found,), finite = pack([slabs.in_slabs(leaf) for leaf in leaves])
    (expected,), _ = pack(leaves)
    assert finite
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shape", [(), (1 << 14,), (128, 127), (5003, 4), (128, 255), (45, 367)])
def test_small_or_padded_arrays_are_not_put_in_slabs(shape):
    assert slabs.in_slabs(jnp.zeros(shape)).shape == shape


SMALL = slabs.SMALL
TREES = {
    "scalar": [()],
    "odd": [(1,), (31,), (3, 11), (), (7,), (2, 3, 5)],
    "empty between": [(0,), (5,), (3, 0), (2, 2)],
    "around the limit": [(SMALL - 1,), (SMALL,), (SMALL + 1,)],
    "mixed": [(3,), (128, 255), (1,), (5003, 4), (), (0, 4), (45, 367), (33,)],
}


def as_arrays(values):
    """Arrays of values, with the dtypes in turn."""
    return [jnp.asarray(v, DTYPES[n % len(DTYPES)]) for n, v in enumerate(values)]


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        *((name, RULES[0]) for name in TREES),
        *(("odd", rules) for rules in RULES[1:]),
        ("mixed", RULES[3]),
    ],
    ids=str,
)
def test_unpacking_a_message_inverts_packing_a_tree(name, rules):
    values = [random_values(shape, seed=n) for n, shape in enumerate(TREES[name])]

    @jax.jit
    def there_and_back(leaves):
        planes, finite = packing.pack(leaves, rules, jnp.uint32(COIN))
        return planes, finite, packing.unpack(planes, leaves)

    with jax.enable_x64(True):
        leaves = as_arrays(values)
        planes, finite, bits = there_and_back(leaves)
    assert finite
    assert [plane.shape for plane in planes] == [(packing.num_words(leaves),)] * rules.planes
    for found, leaf in zip(bits, values, strict=True):
        expected = references.ballots(leaf, *rules, COIN)
        assert len(found) == rules.planes
        for plane, wanted in zip(found, expected, strict=True):
            assert (plane.dtype, plane.shape) == (jnp.bool_, leaf.shape)
            np.testing.assert_array_equal(plane, wanted)


@pytest.mark.parametrize(
    ("packer", "unpacker", "cut"),
    [
        (packing.pack_consecutive, packing.unpack_consecutive, pieces.cut_alike),
        (slabs.pack_slabs, slabs.unpack_slabs, pieces.cut_apart),
        (slabs.pack_groups, slabs.unpack_groups, pieces.cut_apart),
    ],
)
@pytest.mark.parametrize("inverts_odd", [False, True])
def test_every_platform_unpacks_its_own_words_and_inverts_odd_coordinates(
    packer, unpacker, cut, inverts_odd
):
    values = [random_values(shape, seed=n) for n, shape in enumerate(TREES["mixed"])]

    @jax.jit
    def there_and_back(leaves):
        large = [leaf for leaf in leaves if leaf.size >= SMALL]
        small = [leaf.ravel() for leaf in leaves if 0 < leaf.size < SMALL]
        bundle = [jnp.pad(leaf, (0, leaf.size % 2)) for leaf in small]
        arrays = [*large, jnp.concatenate(bundle)]
        words = [packer(array, jnp.uint32(COIN), rule=RULES[1])[0][0] for array in arrays]
        return packing.unpack_leaves(jnp.concatenate(words), leaves, inverts_odd, unpacker, cut)

    found = there_and_back([jnp.asarray(leaf, jnp.float32) for leaf in values])
    for bits, leaf in zip(found, values, strict=True):
        (expected,) = references.ballots(leaf, *RULES[1], COIN)
        odd = np.arange(leaf.size).reshape(leaf.shape) % 2 == 1
        np.testing.assert_array_equal(bits, expected ^ (odd & inverts_odd))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(0, 2))
def test_both_ways_to_cut_agree_with_numpy(sizes, axis):
    shape = [2, 3, 4]
    shape[axis] = sum(sizes)
    array = np.arange(math.prod(shape)).reshape(shape)
    expected = np.split(array, np.cumsum(sizes)[:-1], axis=axis)
    for cut in (pieces.cut, pieces.cut_alike, pieces.cut_apart):
        found = cut(jnp.asarray(array), sizes, axis)
        assert len(found) == len(sizes)
        for piece, part in zip(found, expected, strict=True):
            np.testing.assert_array_equal(piece, part)


def test_packing_finds_a_nonfinite_value_in_every_leaf():
    values = [random_values(shape) for shape in TREES["mixed"]]
    pack = jax.jit(lambda leaves: packing.pack(leaves, RULES[0], jnp.uint32(0))[1])
    for n, leaf in enumerate(values):
        for place, bad in [(0, np.nan), (-1, np.inf), (0, -np.inf)] if leaf.size else ():
            spoilt = leaf.copy()
            spoilt.flat[place] = bad
            with jax.enable_x64(True):
                assert not pack(as_arrays([*values[:n], spoilt, *values[n + 1 :]])), (n, place)


def test_the_largest_and_the_smallest_numbers_have_a_ballot():
    values = np.array([np.finfo(np.float32).max, -np.finfo(np.float32).tiny], np.float32)
    (plane,), finite = packing.pack([jnp.asarray(values)], Rules("plus", "plus"), jnp.uint32(0))
    assert finite
    np.testing.assert_array_equal(plane, [1])


@given(st.lists(st.integers(0, 70) | st.integers(SMALL - 3, SMALL + 70), min_size=1, max_size=6))
def test_a_message_pads_each_small_leaf_by_at_most_one_coordinate(sizes):
    leaves = [jax.ShapeDtypeStruct((size,), jnp.float32) for size in sizes]
    small = [size for size in sizes if size < SMALL]
    large = sum(-(-size // 32) for size in sizes if size >= SMALL)
    words = packing.num_words(leaves)
    assert large + -(-sum(small) // 32) <= words <= large + -(-(sum(small) + len(small)) // 32)


@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5), (4, 6), (5, 4, 3), (3, 5, 7, 9)])
def test_odd_coordinates_have_an_odd_row_major_index(shape):
    expected = np.arange(math.prod(shape)).reshape(shape) % 2 == 1
    np.testing.assert_array_equal(slabs.odd(shape), expected)
