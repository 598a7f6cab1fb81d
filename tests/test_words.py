"""Packed words: counting without unpacking, and messages with headers, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from signax._wire import words
from signax._wire.words import LANES, LARGE_PART, part_words, sealed_words

# Rows of one array, and rows of others. From two groups of 64 rows on, a loop adds groups.
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
    bits[:, 0] = True  # the largest possible sum
    rows, more = words_of(bits[:num_rows]), words_of(bits[num_rows:])
    planes = jax.jit(words.count)(rows, *more)
    assert len(planes) == (num_rows + extra).bit_length()
    total = sum(references.unpacked(p).astype(int) << weight for weight, p in enumerate(planes))
    np.testing.assert_array_equal(total, bits.sum(axis=0))


@pytest.mark.parametrize("num_rows", [1, 2, 5, 8, 128])
def test_at_least_includes_the_threshold_itself(num_rows):
    bits = random_bits(num_rows, 96)
    planes = jax.jit(words.count)(words_of(bits))
    at_least = jax.jit(words.at_least)
    for threshold in {*range(16), *range(60, 70), 2 ** len(planes) - 1}:
        if threshold < 2 ** len(planes):
            expected = references.packed(bits.sum(axis=0) >= threshold)
            np.testing.assert_array_equal(at_least(planes, jnp.uint32(threshold)), expected)


@pytest.mark.parametrize("threshold", [0, 1, 3, 5, 7])
def test_at_least_takes_a_static_threshold(threshold):
    bits = random_bits(7, 96)
    planes = jax.jit(words.count)(words_of(bits))
    expected = references.packed(bits.sum(axis=0) >= threshold)
    np.testing.assert_array_equal(words.at_least(planes, threshold), expected)


@pytest.mark.parametrize("num_rows", [1, 6, 70])
def test_exceeds_compares_counts_strictly(num_rows):
    mine, others = np.split(random_bits(2 * num_rows, 256), 2)
    count = [jax.jit(words.count)(words_of(bits)) for bits in (mine, others)]
    expected = references.packed(mine.sum(axis=0) > others.sum(axis=0))
    np.testing.assert_array_equal(words.exceeds(*count), expected)


# Messages.

MANY = st.integers(1, 10**9)
WORKERS = st.integers(1, 4096)


@given(num_words=MANY, num_workers=WORKERS)
def test_parts_hold_every_word_and_large_parts_fill_rows_of_lanes(num_words, num_workers):
    share = words.part_words(num_words, num_workers)
    least = -(-num_words // num_workers)
    if least < LARGE_PART:
        assert share == least
    else:
        assert share % LANES == 0
        assert least <= share < least + LANES


@given(num_words=MANY, num_workers=WORKERS, planes=st.integers(1, 2))
def test_a_sealed_message_has_less_than_one_row_of_padding(num_words, num_workers, planes):
    share = words.part_words(num_words, num_workers)
    part = words.sealed_words(planes * share)
    assert part % LANES == 0
    assert 1 + planes * share <= part < 1 + planes * share + LANES


@pytest.mark.parametrize(("payload", "expected"), [(1, 128), (127, 128), (128, 256), (255, 256)])
def test_sealed_words_include_the_header_and_fill_rows_of_lanes(payload, expected):
    assert sealed_words(payload) == expected


def test_large_parts_are_rounded_up_to_rows_of_lanes():
    assert part_words(8 * (2**14 - 1), 8) == 2**14 - 1
    assert part_words(8 * 2**14 + 1, 8) == 2**14 + 128


@given(up=MANY, down=MANY, num_workers=st.integers(1, 64))
def test_auto_chooses_gather_unless_it_sends_many_more_words(up, down, num_workers):
    gathered = (num_workers - 1) * up
    packed = (num_workers - 1) * (up + down) / num_workers
    chosen = words.choose_transport(up, down, num_workers)
    if gathered - packed <= words.GATHER_WORDS:
        assert chosen == "gather"
    elif gathered - packed >= words.GATHER_WORDS + 1:
        assert chosen == "packed"


@pytest.mark.parametrize(
    ("num_workers", "name"),
    [(1, "int8"), (127, "int8"), (128, "int16"), (32767, "int16"), (32768, "int32")],
)
def test_sums_use_the_smallest_dtype_that_holds_the_number_of_workers(num_workers, name):
    assert words.sum_dtype(num_workers) == jnp.dtype(name)
    assert np.iinfo(name).max >= num_workers


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("share", [1, 63, 64, 65, 127, 128, 129, 256])
def test_unseal_inverts_seal(share, planes):
    rows = np.random.default_rng(share).integers(1, 2**32, (planes, 3, share), dtype=np.uint32)
    sealed = words.seal(list(jnp.asarray(rows)), jnp.uint32(7))
    assert sealed.shape == (3, words.sealed_words(planes * share) // LANES, LANES)
    found, headers = words.unseal(sealed, [share] * planes)
    np.testing.assert_array_equal(found, rows)
    np.testing.assert_array_equal(headers, [7, 7, 7])


@pytest.mark.parametrize("header", [0, 7])
@pytest.mark.parametrize("size", [1, 127, 128, 129, 256])
def test_every_platform_seals_alike(size, header):
    """A header of 0 blanks the message."""
    flat = np.random.default_rng(size).integers(1, 2**32, (3, size), dtype=np.uint32)
    expected = np.zeros((3, sealed_words(size)), np.uint32)
    expected[:, :size], expected[:, size] = flat * np.uint32(header > 0), header
    for seal in (words._seal_flat, words._seal_rows):
        found = seal(jnp.asarray(flat), jnp.uint32(header))
        np.testing.assert_array_equal(found, expected.reshape(3, -1, LANES))


def test_messages_on_explicit_axes_are_sealed_like_others():
    planes = np.random.default_rng(0).integers(1, 2**32, (4, 256), dtype=np.uint32)
    expected = words.seal([jnp.asarray(planes)], jnp.uint32(7))
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sealed = jax.jit(words.seal)(
            [jax.device_put(planes, PartitionSpec("model"))], jnp.uint32(7)
        )
    np.testing.assert_array_equal(sealed, expected)


@pytest.mark.parametrize("share", [64, 127, 128])
def test_a_message_with_a_zero_header_is_blank(share):
    sealed = words.seal([jnp.ones((2, share), jnp.uint32)], jnp.uint32(0))
    assert not np.any(sealed)


def test_a_header_encodes_the_worker_and_its_coins():
    bit, yes = (jnp.uint32(0), jnp.uint32(1)), jnp.bool_(True)
    headers = [
        int(words.make_header(jnp.uint32(worker), coin, tie, yes))
        for worker in range(5)
        for coin in bit
        for tie in bit
    ]
    assert headers == list(range(4, 24))
    assert [int(words.worker_of(jnp.uint32(header))) for header in headers] == [
        n // 4 for n in range(20)
    ]
    assert words.make_header(jnp.uint32(4), bit[1], bit[1], jnp.bool_(False)) == 0
