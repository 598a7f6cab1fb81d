"""Counting on packed words against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from signax._wire import words

# Rows, and more of them beside: a loop adds groups of 64 rows from two of them on.
ROWS = [(1, 2), (2, 1), (3, 1), (15, 1), (15, 2), *((rows, 0) for rows in range(1, 10))]
AROUND_GROUPS = [(64, 1), (127, 1), (128, 0), (129, 2), (191, 0), (191, 1), (192, 0), (200, 1)]


def random_bits(rows, size, share=0.5):
    return np.random.default_rng(rows).random((rows, size)) < share


def words_of(rows):
    return jnp.asarray([references.packed(row) for row in rows])


@pytest.mark.parametrize("bit", [0, 1])
def test_a_spread_bit_fills_its_word(bit):
    expected = np.uint32(0xFFFFFFFF * bit)
    assert words.spread(bit) == expected
    assert jax.jit(words.spread)(jnp.uint32(bit)) == expected


@pytest.mark.parametrize(("num_rows", "extra"), [*ROWS, *AROUND_GROUPS])
def test_planes_are_the_binary_digits_of_the_sum(num_rows, extra):
    bits = random_bits(num_rows + extra, 64, share=0.7)
    bits[:, 0] = True  # the largest sum there is
    rows, more = words_of(bits[:num_rows]), words_of(bits[num_rows:])
    planes = jax.jit(words.count)(rows, *more)
    assert len(planes) == (num_rows + extra).bit_length()
    total = sum(references.unpacked(p).astype(int) << weight for weight, p in enumerate(planes))
    np.testing.assert_array_equal(total, bits.sum(axis=0))


@pytest.mark.parametrize("num_rows", [1, 2, 5, 8, 128])
def test_the_threshold_is_reached_from_itself_on(num_rows):
    bits = random_bits(num_rows, 96)
    planes = jax.jit(words.count)(words_of(bits))
    at_least = jax.jit(words.at_least)
    for threshold in {*range(16), *range(60, 70), 2 ** len(planes) - 1}:
        if threshold < 2 ** len(planes):
            expected = references.packed(bits.sum(axis=0) >= threshold)
            np.testing.assert_array_equal(at_least(planes, jnp.uint32(threshold)), expected)


@pytest.mark.parametrize("threshold", [0, 1, 3, 5, 7])
def test_a_threshold_may_be_known_when_the_program_is_built(threshold):
    bits = random_bits(7, 96)
    planes = jax.jit(words.count)(words_of(bits))
    expected = references.packed(bits.sum(axis=0) >= threshold)
    np.testing.assert_array_equal(words.at_least(planes, threshold), expected)


@pytest.mark.parametrize("num_rows", [1, 6, 70])
def test_only_a_greater_count_exceeds(num_rows):
    mine, others = np.split(random_bits(2 * num_rows, 256), 2)
    count = [jax.jit(words.count)(words_of(bits)) for bits in (mine, others)]
    expected = references.packed(mine.sum(axis=0) > others.sum(axis=0))
    np.testing.assert_array_equal(words.exceeds(*count), expected)
