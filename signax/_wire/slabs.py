"""Packed words of GPUs and TPUs: bit b of word w is coordinate w of slab b.

Vectors of an accelerator run along the last axes of an array, so bits of one word cannot lie side
by side. An array is cut along one axis into 32 *slabs* of equal length instead, and whole slabs are
compared, shifted and OR-ed. TPUs and GPUs share this order, and `pack_slabs` and `pack_groups` are
the programs that each of them runs in one pass over memory.
"""

import math
import operator
from collections.abc import Hashable, Sequence
from functools import partial, reduce
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import lax

from signax._wire.types import Array, Bool, Float, UInt32
from signax._wire.words import WORD_BITS

SMALL = 1 << 14  # coordinates; smaller leaves are packed as one bundle, which compiles faster
MOST_WASTE = 1 / 64  # the share of padding words that a better layout may cost
GROUP = 8  # slabs that a GPU packs together: it is as fast with 4, and compiles slower


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


def odd(shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """Whether the row-major index of each coordinate is odd: bool[shape]."""
    indices, stride = [], 1  # even multiples of an index leave the parity alone
    for dimension in reversed(range(len(shape))):
        if stride % 2:
            indices.append(lax.broadcasted_iota(jnp.uint32, shape, dimension))
        stride *= shape[dimension]
    index = reduce(operator.xor, indices) if indices else jnp.zeros(shape, jnp.uint32)
    return (index & 1).astype(jnp.bool_)


def pack_slabs(
    array: Float[Array, "..."], coin: UInt32[Array, ""], *, rule: BitRule
) -> tuple[list[UInt32[Array, " words"]], Bool[Array, "1"]]:
    """Pack for TPUs: bit b of word w belongs to coordinate w of slab b.

    The bits of a coordinate are first written as one byte, so XLA fuses the computation of the
    values with that write, in any layout. Values that come in slabs need no such byte. The flag is
    set if a value is not finite.
    """
    cut = fold(array.shape)
    array = array.reshape(cut.shape)
    *planes, bad = join_slabs(find_fields(array, odd(array.shape), coin, rule), cut)
    return [_by_tiles(plane, cut.word_shape) for plane in planes], jnp.any(bad)[None]


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


def pack_groups(
    array: Float[Array, "..."], coin: UInt32[Array, ""], *, rule: BitRule
) -> tuple[list[UInt32[Array, " words"]], Bool[Array, "1"]]:
    """Pack for GPUs: the words of `pack_slabs`, by ORs of groups of slabs.

    A reduction over slabs would first write every bit as a byte. XLA for GPUs makes one kernel of
    elementwise operations instead, which reads each value once and writes words and flags. The flag
    returned is set if a value is not finite.
    """
    cut = fold(array.shape)
    axis, length, size = cut.axis, cut.length, cut.shape[cut.axis]
    before, after = cut.shape[:axis], cut.shape[axis + 1 :]
    array = array.reshape(cut.shape)
    parity = odd(array.shape)

    def pack_from(first: int, count: int) -> list[Array]:
        """The fields of some slabs, with bits shifted as if the first of them were all."""
        start, stop = first * length, min((first + count) * length, size)
        values, odds = (lax.slice_in_dim(x, start, stop, axis=axis) for x in (array, parity))
        if count > 1:
            values, odds = (x.reshape(*before, count, length, *after) for x in (values, odds))
        *planes, bad = find_fields(values, odds, coin, rule)
        fields = [*(plane.astype(jnp.uint32) << np.uint32(first) for plane in planes), bad]
        missing = [(0, 0)] * values.ndim
        missing[axis] = (0, 0 if count > 1 else length - (stop - start))
        return [jnp.pad(field, missing) for field in fields]

    def join(rows: list[list[Array]]) -> list[Array]:
        return [reduce(operator.or_, column) for column in zip(*rows, strict=True)]

    grouped = min(size // length, WORD_BITS) // GROUP * GROUP
    rows = []
    if grouped:
        *planes, bad = join([pack_from(n, GROUP) for n in range(0, grouped, GROUP)])
        for n in range(GROUP):
            take = partial(lax.index_in_dim, index=n, axis=axis, keepdims=False)
            rows.append([*(take(plane) << np.uint32(n) for plane in planes), take(bad)])
    rows += [pack_from(n, 1) for n in range(grouped, WORD_BITS) if n * length < size]
    # Flags take the order of the words, and pass the barrier with them: or XLA finds them in
    # another pass over the array.
    fields = [_by_tiles(field, cut.word_shape) for field in join(rows)]
    *planes, bad = lax.optimization_barrier(fields)
    return planes, jnp.any(bad)[None]


def find_fields(values: Array, odd: Array, coin: Array, rule: BitRule) -> list[Array]:
    """The bits of some values, and whether each value is not finite: bool[...] each."""
    return [*rule(values, odd, coin), ~jnp.isfinite(values)]


def _to_bytes(fields: Sequence[Array]) -> Array:
    """Store fields as bits of a byte: bool[...] each to u8[...]; one field is stored as it is."""
    if len(fields) == 1:
        return fields[0]
    return reduce(operator.or_, [bit.astype(jnp.uint8) << n for n, bit in enumerate(fields)])


def _from_bytes(codes: Array, fields: int) -> list[Array]:
    """Invert `_to_bytes`."""
    if fields == 1:
        return [codes]
    return [((codes >> n) & 1).astype(jnp.bool_) for n in range(fields)]


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
        _merge_two,
        (axis,),
    )


def _merge_two(left: Sequence[Array], right: Sequence[Array]) -> list[Array]:
    """Merge words and flags."""
    # Not a lambda: outside `jax.jit`, JAX compiles a reduction again for every new function.
    # Bits do not overlap, so a sum joins words. Unlike OR, XLA can reduce it across devices.
    return [
        lax.add(x, y) if x.dtype == jnp.uint32 else lax.bitwise_or(x, y)
        for x, y in zip(left, right, strict=True)
    ]


def _is_tiled(shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and shape[-2] % 8 == 0 and shape[-1] % 128 == 0


def _by_tiles(words: Array, shape: tuple[int, ...]) -> Array:
    """Flatten words, or their flags, in the order of a TPU's memory, where that is a no-op."""
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


def unpack_slabs(words: UInt32[Array, " words"], shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """Invert `pack_slabs`."""
    cut = fold(shape)
    return split_slabs(_from_tiles(words, cut.word_shape), cut).reshape(shape)


def unpack_groups(words: UInt32[Array, " words"], shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """Invert `pack_groups`: XLA for GPUs fuses any reshape with the consumer of the bits."""
    cut = fold(shape)
    return _split(_from_tiles(words, cut.word_shape), cut, hold=False).reshape(shape)


def split_slabs(words: UInt32[Array, "..."], cut: Fold) -> Bool[Array, "..."]:
    """Invert `join_slabs` for one plane: u32[cut.word_shape] to bool[cut.shape]."""
    # XLA for TPUs cannot fuse through such a reshape. With a barrier it writes bytes, not numbers.
    uneven = len(cut.shape) == 1 or cut.length * WORD_BITS != cut.shape[cut.axis]
    return _split(words, cut, hold=uneven)


def _split(words: UInt32[Array, "..."], cut: Fold, hold: bool) -> Bool[Array, "..."]:
    before, after = cut.shape[: cut.axis], cut.shape[cut.axis + 1 :]
    slabs = jnp.expand_dims(words, cut.axis)
    in_slabs = (*before, WORD_BITS, cut.length, *after)
    bits = (slabs >> lax.broadcasted_iota(jnp.uint32, in_slabs, cut.axis)) & 1
    bits = bits.astype(jnp.bool_)
    bits = lax.optimization_barrier(bits) if hold else bits
    bits = bits.reshape(*before, WORD_BITS * cut.length, *after)
    return lax.slice_in_dim(bits, 0, cut.shape[cut.axis], axis=cut.axis)
