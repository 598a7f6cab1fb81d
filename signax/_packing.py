"""Arrays to packed words and back: where the bit of each coordinate lies.

CPUs pack neighbours: bit b of word w is coordinate 32 w + b, whatever the shape. That would go
across the lanes of an accelerator. There an array is cut along one axis into 32 blocks of equal
length, and bit b of word w is coordinate w of block b: whole blocks are compared, shifted, OR-ed.

Either way packing is one pass over the array, and unpacking broadcasts the words to its shape, to
be fused with whatever uses the signs. Words never outlive a step, so that nobody reads another
platform's.
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

from signax._bits import WORD_BITS
from signax._numerics import common_dtype

SMALL = 1 << 14  # coordinates: smaller leaves are packed together, which saves compile time
MOST_WASTE = 1 / 64  # of the words: the padding that a better layout may cost


class Ballots(Hashable, Protocol):
    """What coordinates vote: one or two planes of bits, from their values."""

    @property
    def planes(self) -> int: ...

    def __call__(
        self, values: jax.Array, odd: jax.Array, coin: jax.Array
    ) -> tuple[jax.Array, ...]: ...


class Fold(NamedTuple):
    """How accelerators cut an array into 32 blocks.

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
    arrays = [leaves[n] for n in large]
    if small:
        arrays.append(_batch([leaves[n] for n in small]))
    packed, flags = zip(*(_pack_array(array, coin, ballots) for array in arrays), strict=True)
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
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for dimension in reversed(range(len(shape))):
        if stride % 2:
            index += lax.broadcasted_iota(jnp.uint32, shape, dimension)
        stride *= shape[dimension]
    return index % 2 == 1


@partial(jax.jit, static_argnames="ballots")  # one trace for leaves of one shape
def _pack_array(
    array: jax.Array, coin: jax.Array, ballots: Ballots
) -> tuple[list[jax.Array], jax.Array]:
    """Packs one array into planes of u32[words], and finds whether it is finite: bool[]."""
    cpu, default = (partial(pack, ballots=ballots) for pack in (pack_neighbours, pack_blocks))
    return lax.platform_dependent(array, coin, cpu=cpu, default=default)


def pack_neighbours(
    array: jax.Array, coin: jax.Array, *, ballots: Ballots
) -> tuple[list[jax.Array], jax.Array]:
    """Packs for CPUs: bit b of word w is that of coordinate 32 w + b."""
    flat = array.reshape(-1)
    rest = flat.size % WORD_BITS
    rows = flat[: flat.size - rest].reshape(-1, WORD_BITS)
    parts = [_fields(rows, odd(rows.shape), coin, ballots)]
    if rest:  # apart, since a pad does not suit vectors
        fields = _fields(flat[-rest:], odd((rest,)), coin, ballots)
        parts.append([jnp.pad(field, (0, WORD_BITS - rest))[None] for field in fields])
    packed = [join(fields, axis=1) for fields in parts]
    *planes, bad = (jnp.concatenate(part) for part in zip(*packed, strict=True))
    spare = fold(array.shape).words - bad.size
    return [jnp.pad(plane, (0, spare)) for plane in planes], ~jnp.any(bad)


def pack_blocks(
    array: jax.Array, coin: jax.Array, *, ballots: Ballots
) -> tuple[list[jax.Array], jax.Array]:
    """Packs for accelerators: bit b of word w is that of coordinate w of block b.

    What a coordinate says is written as a byte before, so that whatever computes the values is
    fused with that, in any layout. Values that come in blocks can do without.
    """
    cut = fold(array.shape)
    array = array.reshape(cut.shape)
    *planes, bad = join_blocks(_fields(array, odd(array.shape), coin, ballots), cut)
    return [_by_tiles(plane, cut.word_shape) for plane in planes], ~jnp.any(bad)


def join_blocks(fields: Sequence[jax.Array], cut: Fold, flags: int = 1) -> Sequence[jax.Array]:
    """Joins the bits of an array's blocks, bool[cut.shape] each, as `join` does."""
    if cut.rows > 1:
        padding = [(0, 0)] * len(cut.shape)
        padding[cut.axis] = (0, WORD_BITS * cut.rows - cut.shape[cut.axis])
        before, after = cut.shape[: cut.axis], cut.shape[cut.axis + 1 :]
        # The barriers keep XLA from moving the reshape, ahead or behind, which would write more.
        codes = lax.optimization_barrier(jnp.pad(_encode(fields), padding))
        codes = codes.reshape(*before, WORD_BITS, cut.rows, *after)
        fields = _decode(lax.optimization_barrier(codes), len(fields))
    return join(fields, cut.axis, flags)


def _fields(
    values: jax.Array, odd: jax.Array, coin: jax.Array, ballots: Ballots
) -> list[jax.Array]:
    """The bits of the ballots on some values, and whether these are not finite: bool[...] each."""
    return [*ballots(values, odd, coin), ~jnp.isfinite(values)]


def _encode(fields: Sequence[jax.Array]) -> jax.Array:
    """Bits of a byte: bool[...] each to u8[...]."""
    return reduce(operator.or_, [bit.astype(jnp.uint8) << n for n, bit in enumerate(fields)])


def _decode(codes: jax.Array, fields: int) -> list[jax.Array]:
    """Undoes `_encode`."""
    return [(codes >> n) & 1 == 1 for n in range(fields)]


def join(fields: Sequence[jax.Array], axis: int, flags: int = 1) -> Sequence[jax.Array]:
    """Makes words of the bits along an axis of 32, but flags of so many of the last fields.

    One reduction does it all, and with it whatever computes the fields.
    """
    places = lax.broadcasted_iota(jnp.uint32, fields[0].shape, axis)
    planes = len(fields) - flags
    shifted = [bit.astype(jnp.uint32) << places for bit in fields[:planes]]
    return lax.reduce(
        (*shifted, *fields[planes:]),
        (*(np.uint32(0) for _ in range(planes)), *(np.bool_(False) for _ in range(flags))),
        lambda left, right: tuple(map(lax.bitwise_or, left, right)),
        (axis,),
    )


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
    cpu, default = (partial(unpack, shape=shape) for unpack in (unpack_neighbours, unpack_blocks))
    return lax.platform_dependent(words, cpu=cpu, default=default)


def unpack_neighbours(words: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undoes `pack_neighbours`."""
    size = math.prod(shape)
    words = words[: -(-size // WORD_BITS), None]
    bits = (words >> lax.broadcasted_iota(jnp.uint32, (len(words), WORD_BITS), 1)) & 1 == 1
    bits = bits.reshape(-1)
    if size % WORD_BITS or (len(shape) > 1 and shape[-1] % 4):
        # Rows or threads would start anywhere in a word, which does not suit vectors: let XLA
        # write whole words' bytes first.
        bits = lax.optimization_barrier(bits)
    return bits[:size].reshape(shape)


def unpack_blocks(words: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undoes `pack_blocks`."""
    cut = fold(shape)
    return split_blocks(_from_tiles(words, cut.word_shape), cut).reshape(shape)


def split_blocks(words: jax.Array, cut: Fold) -> jax.Array:
    """Undoes `join_blocks` for one plane: u32[cut.word_shape] to bool[cut.shape]."""
    before, after = cut.shape[: cut.axis], cut.shape[cut.axis + 1 :]
    blocks = jnp.expand_dims(words, cut.axis)
    in_blocks = (*before, WORD_BITS, cut.rows, *after)
    bits = (blocks >> lax.broadcasted_iota(jnp.uint32, in_blocks, cut.axis)) & 1 == 1
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


def _batch(small: Sequence[jax.Array]) -> jax.Array:
    """Small leaves end to end, in a dtype that holds the values of all.

    Each takes an even number of coordinates: one that is odd in its leaf is odd in the batch.
    """
    dtype = reduce(common_dtype, (leaf.dtype for leaf in small))
    flat = [leaf.astype(dtype).reshape(-1) for leaf in small]
    return jnp.concatenate([jnp.pad(leaf, (0, leaf.size % 2)) for leaf in flat])
