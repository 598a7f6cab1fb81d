"""Arrays to packed words and back: where the bit of each coordinate lies.

An array is cut along one axis into 32 blocks of equal length, and coordinate w of block b is bit b
of word w. So 32 neighbours go to 32 neighbouring words: blocks are compared, shifted and OR-ed
whole, in one pass over the array, which suits CPUs, GPUs and TPUs alike. Packing neighbours into
one word would cross a TPU's lanes. Unpacking broadcasts the words to the array's shape, to be fused
with whatever uses the signs.
"""

import math
import operator
from collections.abc import Hashable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

WORD_BITS = 32
SMALL = 1 << 14  # coordinates: smaller leaves are packed together, which saves compile time
MOST_WASTE = 1 / 64  # of the words: the padding that a better layout may cost

_STREAMS = 16


class Ballots(Hashable, Protocol):
    """What coordinates vote: one or two planes of bits, from their values."""

    @property
    def planes(self) -> int: ...

    def __call__(
        self, values: jax.Array, odd: jax.Array, coin: jax.Array
    ) -> tuple[jax.Array, ...]: ...


class Fold(NamedTuple):
    """How an array is cut into 32 blocks.

    Attributes:
      shape: the array's, or with leading axes merged.
      axis: the axis that is cut.
      rows: the length of a block along it; the last ones may be shorter, or empty.
    """

    shape: tuple[int, ...]
    axis: int
    rows: int

    @property
    def word_shape(self) -> tuple[int, ...]:
        return (*self.shape[: self.axis], self.rows, *self.shape[self.axis + 1 :])

    @property
    def words(self) -> int:
        return math.prod(self.word_shape)


def fold(shape: tuple[int, ...]) -> Fold:
    """Chooses where to cut an array.

    TPUs keep the last two axes in tiles of 8 x 128, in the order that needs less padding. So the
    axis to cut is one outside of the tiles, or else the outer one, in blocks of a multiple of 8;
    where that pads too much, a flat array is cut, which has to be laid out anew there.
    """
    size = math.prod(shape)
    flat = Fold((size,), 0, -(-size // WORD_BITS))
    if len(shape) < 2:
        return flat
    cuts = []
    if len(shape) > 2:
        cuts.append(Fold(shape, 0, -(-shape[0] // WORD_BITS)))
        shape = (size // shape[-1], shape[-1])
    axes = (1, 0) if shape[1] % 128 and shape[0] % 128 == 0 else (0, 1)
    for axis in axes:
        for tile in (8, 1):
            cuts.append(Fold(shape, axis, -(-shape[axis] // (WORD_BITS * tile)) * tile))
    most = (1 + MOST_WASTE) * flat.words
    return next((cut for cut in cuts if cut.words <= most), flat)


def fold_flat(shape: tuple[int, ...]) -> Fold:
    """The same for CPUs, whose memory has no tiles: a flat array is cut."""
    size = math.prod(shape)
    return Fold((size,), 0, -(-size // WORD_BITS))


def num_words(leaves: Sequence[Any]) -> int:
    """The number of words that hold one bit of every coordinate of some arrays."""
    large, small = _by_size(leaves)
    shapes = [leaves[n].shape for n in large]
    return sum(fold(shape).words for shape in [*shapes, *_batch_shapes(leaves, small)])


def pack(
    leaves: Sequence[jax.Array], ballots: Ballots, coin: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    """Packs what each coordinate votes, and finds whether all values are finite, in one pass.

    Args:
      leaves: floating-point arrays of any shape, at least one of them not empty.
      ballots: a function of values, of whether their coordinates are odd, and of `coin`.
      coin: passed to `ballots`.

    Returns:
      `ballots.planes` times u32[num_words(leaves)], with bits to spare that mean nothing, and
      bool[].
    """
    large, small = _by_size(leaves)
    coin = lax.optimization_barrier(coin)  # else it is computed anew for every coordinate
    parts = [_pack_array(leaves[n], coin, ballots) for n in large]
    if small:
        parts.append(_pack_batch([leaves[n] for n in small], coin, ballots))
    packed, flags = zip(*parts, strict=True)
    # Else XLA makes a chain of the flags and copies it into whatever uses the result, so that
    # compile time grows with the cube of the number of leaves.
    finite = jnp.all(lax.optimization_barrier(jnp.stack(flags)))
    return [jnp.concatenate(plane) for plane in zip(*packed, strict=True)], finite


def unpack(planes: Sequence[jax.Array], leaves: Sequence[Any]) -> list[list[jax.Array]]:
    """Unpacks planes of u32[num_words(leaves)]: for each leaf a bool[shape] from each plane."""
    large, small = _by_size(leaves)
    planes = lax.optimization_barrier(planes)  # else each coordinate looks for its word's part
    bits = [[jnp.zeros(leaf.shape, jnp.bool_) for _ in planes] for leaf in leaves]  # if empty
    start = 0
    for n in large:
        stop = start + fold(leaves[n].shape).words
        bits[n] = [_unpack_array(plane[start:stop], leaves[n].shape) for plane in planes]
        start = stop
    for shape in _batch_shapes(leaves, small):
        batch = [_unpack_array(plane[start:], shape) for plane in planes]
        start = 0
        for n in small:
            size = math.prod(leaves[n].shape)
            bits[n] = [flat[start : start + size].reshape(leaves[n].shape) for flat in batch]
            start += _even(size)
    return bits


def odd(shape: tuple[int, ...]) -> jax.Array:
    """Whether the row-major index of each coordinate is odd: bool[shape]."""
    return _odd_block(shape, shape, 0)


def _odd_block(block: tuple[int, ...], shape: tuple[int, ...], start: int) -> jax.Array:
    """The same for a block of an array that starts at some row: bool[block]."""
    index, stride = jnp.full(block, start * math.prod(shape[1:]) % 2, jnp.uint32), 1
    for dimension in reversed(range(len(shape))):
        if stride % 2:
            index += lax.broadcasted_iota(jnp.uint32, block, dimension)
        stride *= shape[dimension]
    return index % 2 == 1


@partial(jax.jit, static_argnames="ballots")  # one trace for leaves of one shape
def _pack_array(
    array: jax.Array, coin: jax.Array, ballots: Ballots
) -> tuple[list[jax.Array], jax.Array]:
    """Packs one array into planes of u32[words], and finds whether it is finite: bool[]."""
    computed = fold(array.shape).rows == 1  # it comes in blocks
    on_cpu = partial(pack_by_reduction, in_tiles=False) if computed else pack_by_streams
    elsewhere = partial(pack_by_reduction, through_bytes=not computed)
    return lax.platform_dependent(
        array,
        coin,
        cpu=partial(on_cpu, ballots=ballots),
        default=partial(elsewhere, ballots=ballots),
    )


def pack_by_streams(
    array: jax.Array, coin: jax.Array, *, ballots: Ballots
) -> tuple[list[jax.Array], jax.Array]:
    """Packs for CPUs, where reading 16 blocks side by side is as fast as reading the array.

    32 streams would be more than a prefetcher follows. So one word is made of 16 bits and one for
    finiteness, and two of these make one of 32 bits.
    """
    cut, words = fold_flat(array.shape), fold(array.shape).words
    array = array.reshape(cut.shape)
    share = _STREAMS // ballots.planes

    def block(place):
        start, stop = (min(n * cut.rows, array.size) for n in (place, place + 1))
        values = array[start:stop]
        bits = ballots(values, _odd_block(values.shape, cut.shape, start), coin)
        padding = (0, cut.rows - values.size)
        bits = [jnp.pad(bit.astype(jnp.uint32), padding) for bit in bits]
        return bits, jnp.pad(jnp.isfinite(values), padding, constant_values=True)

    def group(first):
        fields = [block(first + shift) for shift in range(share)]
        words = [
            bit << np.uint32(plane * share + shift)
            for shift, (bits, _) in enumerate(fields)
            for plane, bit in enumerate(bits)
        ]
        finite = reduce(operator.and_, [finite for _, finite in fields])
        return reduce(operator.or_, words, finite.astype(jnp.uint32) << np.uint32(_STREAMS))

    # Without the barrier the groups would be one fusion again.
    groups = lax.optimization_barrier([group(first) for first in range(0, WORD_BITS, share)])

    def join(plane):
        bits = [(word >> np.uint32(plane * share)) & np.uint32((1 << share) - 1) for word in groups]
        return reduce(operator.or_, [part << np.uint32(n * share) for n, part in enumerate(bits)])

    planes = [jnp.pad(join(plane), (0, words - cut.words)) for plane in range(ballots.planes)]
    return planes, jnp.all(reduce(operator.and_, groups) >> np.uint32(_STREAMS) == 1)


def pack_by_reduction(
    array: jax.Array,
    coin: jax.Array,
    *,
    ballots: Ballots,
    through_bytes: bool = True,
    in_tiles: bool = True,
) -> tuple[list[jax.Array], jax.Array]:
    """Packs by one OR over the 32 blocks, which finds words and finiteness together.

    What a coordinate says is written as a byte before, so that whatever computes the values is
    fused with that, in any layout. TPUs can do without where values come in blocks; there
    `through_bytes` is false.
    """
    cut = fold(array.shape)
    array = array.reshape(cut.shape)
    fields = [*ballots(array, odd(array.shape), coin), ~jnp.isfinite(array)]  # bool[cut.shape] each
    if through_bytes:
        code = sum(field.astype(jnp.uint8) << np.uint8(n) for n, field in enumerate(fields))
        padding = [(0, 0)] * array.ndim
        padding[cut.axis] = (0, WORD_BITS * cut.rows - cut.shape[cut.axis])
        before, after = cut.shape[: cut.axis], cut.shape[cut.axis + 1 :]
        code = jnp.pad(code, padding).reshape(*before, WORD_BITS, cut.rows, *after)
        code = lax.optimization_barrier(code)
        fields = [(code >> np.uint8(n)) & 1 == 1 for n in range(len(fields))]
    *bits, bad = fields
    places = lax.broadcasted_iota(jnp.uint32, bad.shape, cut.axis)
    *planes, bad = lax.reduce(
        (*(bit.astype(jnp.uint32) << places for bit in bits), bad),
        (*(np.uint32(0) for _ in bits), np.bool_(False)),
        lambda left, right: tuple(map(lax.bitwise_or, left, right)),
        (cut.axis,),
    )
    flatten = partial(_by_tiles, shape=cut.word_shape) if in_tiles else jnp.ravel
    return [flatten(plane) for plane in planes], ~jnp.any(bad)


def _is_tiled(shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and shape[-2] % 8 == 0 and shape[-1] % 128 == 0


def _by_tiles(words: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Flattens words in the order of a TPU's memory, which moves none of them there."""
    if not _is_tiled(shape):
        return words.reshape(-1)
    tiles = words.reshape(-1, shape[-2] // 8, 8, shape[-1] // 128, 128)
    return jnp.swapaxes(tiles, 2, 3).reshape(-1)


def _from_tiles(words: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undoes `_by_tiles`."""
    if not _is_tiled(shape):
        return words.reshape(shape)
    tiles = words.reshape(-1, shape[-2] // 8, shape[-1] // 128, 8, 128)
    return jnp.swapaxes(tiles, 2, 3).reshape(shape)


def in_blocks(array: jax.Array) -> jax.Array:
    """The same array as its 32 blocks along a new first axis, where that costs nothing.

    What is computed coordinate by coordinate from arrays in blocks is packed in the same pass.
    """
    cut = fold(array.shape)
    length = cut.shape[cut.axis]
    if array.size < SMALL or array.ndim < 2 or cut.axis > 0 or length != WORD_BITS * cut.rows:
        return array
    return array.reshape(WORD_BITS, cut.rows, *cut.shape[1:])


def _unpack_array(words: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Unpacks u32[words] into bool[shape]."""
    cut = fold(shape)
    # Rows that are cut evenly are cut where the flat array is, and CPUs unpack rows faster.
    even = cut.axis == 0 and cut.rows * WORD_BITS == cut.shape[0]
    cpu_cut = cut if even else fold_flat(shape)

    def on_cpu(words):
        return _unpack_blocks(words[: cpu_cut.words].reshape(cpu_cut.word_shape), cpu_cut)

    def elsewhere(words):
        return _unpack_blocks(_from_tiles(words, cut.word_shape), cut)

    return lax.platform_dependent(
        words,
        cpu=lambda words: on_cpu(words).reshape(shape),
        default=lambda words: elsewhere(words).reshape(shape),
    )


def _unpack_blocks(words: jax.Array, cut: Fold) -> jax.Array:
    """Unpacks u32[cut.word_shape] into bool[cut.shape]."""
    before, after = cut.shape[: cut.axis], cut.shape[cut.axis + 1 :]
    blocks = jnp.expand_dims(words, cut.axis)
    shape = (*before, WORD_BITS, cut.rows, *after)
    bits = (blocks >> lax.broadcasted_iota(jnp.uint32, shape, cut.axis)) & 1 == 1  # bool[shape]
    if len(cut.shape) == 1 or cut.rows * WORD_BITS != cut.shape[cut.axis]:
        # XLA does not fuse through the reshape then: let it write bytes, not numbers.
        bits = lax.optimization_barrier(bits)
    bits = bits.reshape(*before, WORD_BITS * cut.rows, *after)
    return lax.slice_in_dim(bits, 0, cut.shape[cut.axis], axis=cut.axis)


def _by_size(leaves: Sequence[Any]) -> tuple[list[int], list[int]]:
    """The positions of the leaves that are packed alone and of those that are packed together."""
    sizes = [math.prod(leaf.shape) for leaf in leaves]
    large = [n for n, size in enumerate(sizes) if size >= SMALL]
    return large, [n for n, size in enumerate(sizes) if 0 < size < SMALL]


def _even(size: int) -> int:
    return size + size % 2


def _batch_shapes(leaves: Sequence[Any], small: Sequence[int]) -> list[tuple[int]]:
    """The shape of the batch of small leaves, if there are any."""
    return [(sum(_even(math.prod(leaves[n].shape)) for n in small),)] if small else []


def _pack_batch(
    small: Sequence[jax.Array], coin: jax.Array, ballots: Ballots
) -> tuple[list[jax.Array], jax.Array]:
    """Packs small leaves, laid end to end, into planes of u32[words]; whether they are finite.

    Each takes an even number of coordinates: one that is odd in its leaf is odd in the batch.
    """

    def signs(leaf):
        sign = jnp.where(jnp.isfinite(leaf), jnp.sign(leaf), jnp.nan).astype(jnp.bfloat16)
        return jnp.pad(sign.reshape(-1), (0, leaf.size % 2))

    batch = jnp.concatenate([signs(leaf) for leaf in small])
    places = lax.broadcasted_iota(jnp.uint32, (WORD_BITS, 1), 0)

    def words(bits):
        bits = jnp.pad(bits, (0, -bits.size % WORD_BITS)).reshape(WORD_BITS, -1)
        return jnp.sum(bits.astype(jnp.uint32) << places, axis=0, dtype=jnp.uint32)

    planes = [words(bits) for bits in ballots(batch, odd(batch.shape), coin)]
    return planes, jnp.all(jnp.isfinite(batch))
