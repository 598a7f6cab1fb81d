"""Where the bit of each coordinate lies in packed words, on CPUs, GPUs and TPUs.

CPUs pack consecutive coordinates: bit b of word w is coordinate 32 w + b, for arrays of any shape.
On accelerators that would cross the lanes of a vector. GPUs and TPUs cut an array along one axis
into 32 *slabs* of equal length instead, and bit b of word w is coordinate w of slab b: whole slabs
are compared, shifted and OR-ed. `_pack_array` and `_unpack_array` choose by platform.

Packing is one pass over the array. Unpacking broadcasts words to the array's shape, and XLA fuses
it with the consumer of the signs. Words live for one step, so no platform reads another's words.
"""

import math
import operator
from collections.abc import Hashable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from signax._core.leaves import all_flags, common_dtype
from signax._wire.types import Array, Bool, Float, UInt32
from signax._wire.words import WORD_BITS

SMALL = 1 << 14  # coordinates; smaller leaves are packed as one bundle, which compiles faster
MOST_WASTE = 1 / 64  # the share of padding words that a better layout may cost


@runtime_checkable
class BitRule(Hashable, Protocol):
    """Turn the values of coordinates into bits: one or two planes."""

    @property
    def planes(self) -> int: ...

    def __call__(self, values: Array, odd: Array, coin: Array) -> tuple[Array, ...]: ...


class Fold(NamedTuple):
    """How an accelerator cuts an array into 32 slabs.

    Attributes:
      shape: the array's shape, perhaps with leading axes merged.
      axis: the axis that is cut.
      length: the length of a slab along the axis; the last slabs may be shorter, or empty.
    """

    shape: tuple[int, ...]
    axis: int
    length: int

    @property
    def word_shape(self) -> tuple[int, ...]:
        return (*self.shape[: self.axis], self.length, *self.shape[self.axis + 1 :])

    @property
    def words(self) -> int:
        return math.prod(self.word_shape)


def fold(shape: tuple[int, ...]) -> Fold:
    """Choose where to cut an array into slabs.

    TPUs store the last two axes in tiles of 8 x 128, in the order that needs less padding. The axis
    to cut lies outside the tiles, or else is the outer axis of a tile, cut into multiples of 8. If
    that pads too much, the flat array is cut, which a TPU has to copy into another layout.
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
    """The number of words that hold one bit for every coordinate of some arrays."""
    large, small = _by_size(leaves)
    shapes = [leaves[n].shape for n in large]
    return sum(fold(shape).words for shape in [*shapes, *_bundle_shapes(leaves, small)])


def pack(
    leaves: Sequence[Array], rule: BitRule, coin: UInt32[Array, ""]
) -> tuple[list[UInt32[Array, " words"]], Bool[Array, ""]]:
    """Pack the bits of all coordinates and find whether all values are finite, in one pass.

    Args:
      leaves: floating-point arrays of any shape, at least one of them not empty.
      rule: makes bits of values, of whether their coordinates are odd, and of `coin`.
      coin: passed to `rule`.

    Returns:
      `rule.planes` planes of u32[num_words(leaves)], whose spare bits mean nothing, and a flag.
    """
    large, small = _by_size(leaves)
    coin = lax.optimization_barrier(coin)  # or XLA recomputes the coin for every coordinate
    arrays = [leaves[n] for n in large]
    if small:
        arrays.append(_bundle([leaves[n] for n in small]))
    packed, flags = zip(*[_pack_array(array, coin, rule) for array in arrays], strict=True)
    return [jnp.concatenate(plane) for plane in zip(*packed, strict=True)], all_flags([*flags])


def unpack(
    planes: Sequence[UInt32[Array, " words"]], leaves: Sequence[Any]
) -> list[list[Bool[Array, "..."]]]:
    """Unpack planes of u32[num_words(leaves)]: for each leaf, a bool[shape] from each plane."""
    large, small = _by_size(leaves)
    planes = lax.optimization_barrier(planes)  # or every coordinate searches for its word
    bits = [[jnp.zeros(leaf.shape, jnp.bool_) for _ in planes] for leaf in leaves]  # if empty
    start = 0
    for n in large:
        stop = start + fold(leaves[n].shape).words
        bits[n] = [_unpack_array(plane[start:stop], leaves[n].shape) for plane in planes]
        start = stop
    for shape in _bundle_shapes(leaves, small):
        bundle = [_unpack_array(plane[start:], shape) for plane in planes]
        start = 0
        for n in small:
            size = math.prod(leaves[n].shape)
            bits[n] = [flat[start : start + size].reshape(leaves[n].shape) for flat in bundle]
            start += _even(size)
    return bits


def odd(shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """Whether the row-major index of each coordinate is odd: bool[shape]."""
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for dimension in reversed(range(len(shape))):
        if stride % 2:
            index += lax.broadcasted_iota(jnp.uint32, shape, dimension)
        stride *= shape[dimension]
    return index % 2 == 1


@partial(jax.jit, static_argnames="rule")  # one trace for all leaves of a shape
def _pack_array(
    array: Float[Array, "..."], coin: UInt32[Array, ""], rule: BitRule
) -> tuple[list[UInt32[Array, " words"]], Bool[Array, ""]]:
    """Pack one array into planes, and find whether it is finite."""
    cpu, default = (partial(pack, rule=rule) for pack in (pack_consecutive, pack_slabs))
    return lax.platform_dependent(array, coin, cpu=cpu, default=default)  # GPU and TPU: slabs


def pack_consecutive(
    array: Float[Array, "..."], coin: UInt32[Array, ""], *, rule: BitRule
) -> tuple[list[UInt32[Array, " words"]], Bool[Array, ""]]:
    """Pack for CPUs: bit b of word w belongs to coordinate 32 w + b."""
    flat = array.reshape(-1)
    rest = flat.size % WORD_BITS
    rows = flat[: flat.size - rest].reshape(-1, WORD_BITS)
    pieces = [_fields(rows, odd(rows.shape), coin, rule)]
    if rest:  # apart, since padding the whole array would cost the vectorised loop
        fields = _fields(flat[-rest:], odd((rest,)), coin, rule)
        pieces.append([jnp.pad(field, (0, WORD_BITS - rest))[None] for field in fields])
    packed = [merge_bits(fields, axis=1) for fields in pieces]
    *planes, bad = (jnp.concatenate(piece) for piece in zip(*packed, strict=True))
    spare = fold(array.shape).words - bad.size
    return [jnp.pad(plane, (0, spare)) for plane in planes], ~jnp.any(bad)


def pack_slabs(
    array: Float[Array, "..."], coin: UInt32[Array, ""], *, rule: BitRule
) -> tuple[list[UInt32[Array, " words"]], Bool[Array, ""]]:
    """Pack for GPUs and TPUs: bit b of word w belongs to coordinate w of slab b.

    The bits of a coordinate are first written as one byte, so XLA fuses the computation of the
    values with that write, in any layout. Values that come in slabs need no such byte.
    """
    cut = fold(array.shape)
    array = array.reshape(cut.shape)
    *planes, bad = join_slabs(_fields(array, odd(array.shape), coin, rule), cut)
    return [_by_tiles(plane, cut.word_shape) for plane in planes], ~jnp.any(bad)


def join_slabs(fields: Sequence[Bool[Array, "..."]], cut: Fold, flags: int = 1) -> Sequence[Array]:
    """Join the bits of an array's slabs, bool[cut.shape] each, as `merge_bits` does."""
    if cut.length > 1:
        padding = [(0, 0)] * len(cut.shape)
        padding[cut.axis] = (0, WORD_BITS * cut.length - cut.shape[cut.axis])
        before, after = cut.shape[: cut.axis], cut.shape[cut.axis + 1 :]
        # Without the barriers XLA moves the reshape, ahead or behind, and writes more.
        codes = lax.optimization_barrier(jnp.pad(_to_bytes(fields), padding))
        codes = codes.reshape(*before, WORD_BITS, cut.length, *after)
        fields = _from_bytes(lax.optimization_barrier(codes), len(fields))
    return merge_bits(fields, cut.axis, flags)


def _fields(values: Array, odd: Array, coin: Array, rule: BitRule) -> list[Array]:
    """The bits of some values, and whether each value is not finite: bool[...] each."""
    return [*rule(values, odd, coin), ~jnp.isfinite(values)]


def _to_bytes(fields: Sequence[Array]) -> Array:
    """Store fields as bits of a byte: bool[...] each to u8[...]."""
    return reduce(operator.or_, [bit.astype(jnp.uint8) << n for n, bit in enumerate(fields)])


def _from_bytes(codes: Array, fields: int) -> list[Array]:
    """Invert `_to_bytes`."""
    return [(codes >> n) & 1 == 1 for n in range(fields)]


def merge_bits(fields: Sequence[Array], axis: int, flags: int = 1) -> Sequence[Array]:
    """Merge an axis of 32: into words for most fields, by OR for the last `flags` fields.

    One reduction reads all fields, and XLA fuses their computation with it.
    """
    positions = lax.broadcasted_iota(jnp.uint32, fields[0].shape, axis)
    planes = len(fields) - flags
    shifted = [bit.astype(jnp.uint32) << positions for bit in fields[:planes]]
    return lax.reduce(
        [*shifted, *fields[planes:]],
        [np.uint32(0)] * planes + [np.bool_(False)] * flags,
        # Bits do not overlap, so a sum joins them. Unlike OR, XLA can reduce it across devices.
        lambda left, right: [
            *map(lax.add, left[:planes], right[:planes]),
            *map(lax.bitwise_or, left[planes:], right[planes:]),
        ],
        (axis,),
    )


def _is_tiled(shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and shape[-2] % 8 == 0 and shape[-1] % 128 == 0


def _by_tiles(words: UInt32[Array, "..."], shape: tuple[int, ...]) -> UInt32[Array, " words"]:
    """Flatten words in the order of a TPU's memory, where that is a no-op."""
    if not _is_tiled(shape):
        return words.reshape(-1)
    tiles = words.reshape(-1, shape[-2] // 8, 8, shape[-1] // 128, 128)
    return jnp.swapaxes(tiles, 2, 3).reshape(-1)


def _from_tiles(words: UInt32[Array, " words"], shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Invert `_by_tiles`."""
    if not _is_tiled(shape):
        return words.reshape(shape)
    tiles = words.reshape(-1, shape[-2] // 8, shape[-1] // 128, 8, 128)
    return jnp.swapaxes(tiles, 2, 3).reshape(shape)


def in_slabs(array: Float[Array, "..."]) -> Float[Array, "..."]:
    """View an array as its 32 slabs along a new first axis, where the view costs nothing.

    XLA packs elementwise results of arrays in slabs in the pass that computes them.
    """
    cut = fold(array.shape)
    length = cut.shape[cut.axis]
    if array.size < SMALL or array.ndim < 2 or cut.axis > 0 or length != WORD_BITS * cut.length:
        return array
    return array.reshape(WORD_BITS, cut.length, *cut.shape[1:])


def _unpack_array(words: UInt32[Array, " words"], shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """Unpack words into bool[shape]."""
    cpu, default = (partial(unpack, shape=shape) for unpack in (unpack_consecutive, unpack_slabs))
    return lax.platform_dependent(words, cpu=cpu, default=default)  # GPU and TPU: slabs


def unpack_consecutive(
    words: UInt32[Array, " words"], shape: tuple[int, ...]
) -> Bool[Array, "..."]:
    """Invert `pack_consecutive`."""
    size = math.prod(shape)
    words = words[: -(-size // WORD_BITS), None]
    bits = (words >> lax.broadcasted_iota(jnp.uint32, (len(words), WORD_BITS), 1)) & 1 == 1
    bits = bits.reshape(-1)
    if size % WORD_BITS or (len(shape) > 1 and shape[-1] % 4):
        # Rows or threads would start inside a word, which defeats vectorisation. With the barrier
        # XLA writes the bytes of whole words first.
        bits = lax.optimization_barrier(bits)
    return bits[:size].reshape(shape)


def unpack_slabs(words: UInt32[Array, " words"], shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """Invert `pack_slabs`."""
    cut = fold(shape)
    return split_slabs(_from_tiles(words, cut.word_shape), cut).reshape(shape)


def split_slabs(words: UInt32[Array, "..."], cut: Fold) -> Bool[Array, "..."]:
    """Invert `join_slabs` for one plane: u32[cut.word_shape] to bool[cut.shape]."""
    before, after = cut.shape[: cut.axis], cut.shape[cut.axis + 1 :]
    slabs = jnp.expand_dims(words, cut.axis)
    in_slabs = (*before, WORD_BITS, cut.length, *after)
    bits = (slabs >> lax.broadcasted_iota(jnp.uint32, in_slabs, cut.axis)) & 1 == 1
    if len(cut.shape) == 1 or cut.length * WORD_BITS != cut.shape[cut.axis]:
        # XLA cannot fuse through this reshape. With the barrier it writes bytes, not numbers.
        bits = lax.optimization_barrier(bits)
    bits = bits.reshape(*before, WORD_BITS * cut.length, *after)
    return lax.slice_in_dim(bits, 0, cut.shape[cut.axis], axis=cut.axis)


def _by_size(leaves: Sequence[Any]) -> tuple[list[int], list[int]]:
    """The positions of the leaves that are packed alone, and of those in the bundle."""
    sizes = [math.prod(leaf.shape) for leaf in leaves]
    large = [n for n, size in enumerate(sizes) if size >= SMALL]
    return large, [n for n, size in enumerate(sizes) if 0 < size < SMALL]


def _even(size: int) -> int:
    return size + size % 2


def _bundle_shapes(leaves: Sequence[Any], small: Sequence[int]) -> list[tuple[int]]:
    """The shape of the bundle of small leaves, if there are any."""
    return [(sum([_even(math.prod(leaves[n].shape)) for n in small]),)] if small else []


def _bundle(small: Sequence[Float[Array, "..."]]) -> Float[Array, " n"]:
    """Small leaves end to end, in a dtype that holds the values of all.

    Each leaf takes an even number of coordinates, so that a coordinate is odd in the bundle exactly
    if it is odd in its leaf.
    """
    dtype = reduce(common_dtype, [leaf.dtype for leaf in small])
    flat = [leaf.astype(dtype).reshape(-1) for leaf in small]
    return jnp.concatenate([jnp.pad(leaf, (0, leaf.size % 2)) for leaf in flat])
