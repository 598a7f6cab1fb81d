"""Packing and counting against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from signax import _bits

SIZES = [0, 1, 31, 32, 33, 63, 64, 65, 1000]


def words_of(bits):
    padded = np.pad(bits, (0, -bits.size % 32))
    return np.packbits(padded, bitorder="little").view(np.uint32)


@pytest.mark.parametrize("size", SIZES)
def test_packing_puts_coordinate_j_in_bit_j_of_the_words(size):
    bits = np.random.default_rng(size).random(size) < 0.5
    packed = _bits.pack(jnp.asarray(bits))
    assert packed.dtype == jnp.uint32
    np.testing.assert_array_equal(packed, words_of(bits))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3, 11), (33,)])
def test_unpacking_returns_what_was_packed(shape):
    bits = np.random.default_rng(0).random(shape) < 0.5
    unpacked = _bits.unpack(_bits.pack(jnp.asarray(bits)), shape, bits.size)
    assert unpacked.dtype == jnp.bool_
    np.testing.assert_array_equal(unpacked, bits)


@settings(max_examples=50, deadline=None)
@given(words=st.integers(1, 10**9), num_workers=st.integers(1, 4096), planes=st.integers(1, 2))
def test_a_part_holds_its_share_and_no_more_than_it_must(words, num_workers, planes):
    part = _bits.part_words(words, num_workers, planes)
    share = -(-words // num_workers)
    assert part % 128 == 0
    assert 1 + planes * share <= part < 1 + planes * share + 128


@pytest.mark.parametrize("num_rows", [*range(1, 18), 31, 32, 64])
def test_planes_are_the_binary_digits_of_the_sum(num_rows):
    bits = np.random.default_rng(num_rows).random((num_rows, 64)) < 0.7
    planes = jax.jit(_bits.count)([jnp.asarray(words_of(row)) for row in bits])
    assert len(planes) == num_rows.bit_length()
    digits = [np.unpackbits(np.asarray(p).view(np.uint8), bitorder="little") for p in planes]
    total = sum(digit.astype(int) << weight for weight, digit in enumerate(digits))
    np.testing.assert_array_equal(total, bits.sum(axis=0))


@pytest.mark.parametrize("num_rows", [1, 2, 5, 8])
def test_the_threshold_is_reached_from_itself_on(num_rows):
    bits = np.random.default_rng(num_rows).random((num_rows, 96)) < 0.5
    planes = _bits.count([jnp.asarray(words_of(row)) for row in bits])
    at_least = jax.jit(_bits.at_least)
    for threshold in range(2 ** len(planes)):
        reached = at_least(planes, jnp.uint32(threshold))
        np.testing.assert_array_equal(reached, words_of(bits.sum(axis=0) >= threshold))


def test_only_a_greater_count_exceeds():
    rng = np.random.default_rng(0)
    mine, others = rng.random((2, 6, 256)) < 0.5
    count = [_bits.count([jnp.asarray(words_of(row)) for row in rows]) for rows in (mine, others)]
    expected = mine.sum(axis=0) > others.sum(axis=0)
    np.testing.assert_array_equal(_bits.exceeds(*count), words_of(expected))
