"""Pack the leaves of a tree into words of 32 bits, and unpack them, on CPUs, GPUs and TPUs.

CPUs pack consecutive coordinates: bit b of word w is coordinate 32 w + b, for arrays of any shape.
GPUs and TPUs pack in slabs, see `slabs.py`. `pack` and `unpack` choose by platform.

Packing is one pass over the array. Unpacking broadcasts words to the array's shape, and XLA fuses
it with the consumer of the signs. Words live for one step, so platforms need not agree on them.
Where they have to, words are `portable`: all platforms pack as CPUs do.
"""

import math
from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from signax._core.leaves import common_dtype
from signax._wire.pieces import Cut, cut_alike, cut_apart
from signax._wire.slabs import (
    SMALL,
    BitRule,
    find_fields,
    fold,
    merge_bits,
    odd,
    pack_groups,
    pack_slabs,
    unpack_groups,
    unpack_slabs,
)
from signax._wire.types import Array, Bool, Float, UInt32
from signax._wire.words import WORD_BITS

ODD_BITS = np.uint32(0xAAAAAAAA)


def num_words(leaves: Sequence[Any]) -> int:
    """The number of words that hold one bit for every coordinate of some arrays."""
    large, small = _by_size(leaves)
    shapes = [leaves[n].shape for n in large]
    return sum(fold(shape).words for shape in [*shapes, *_bundle_shapes(leaves, small)])


def pack(
    leaves: Sequence[Array], rule: BitRule, coin: UInt32[Array, ""], *, portable: bool = False
) -> tuple[list[UInt32[Array, " words"]], Bool[Array, ""]]:
    """Pack the bits of all coordinates and find whether all values are finite, in one pass.

    Args:
      leaves: floating-point arrays of any shape, at least one of them not empty.
      rule: makes bits of values, of whether their coordinates are odd, and of `coin`.
      coin: passed to `rule`.
      portable: whether to pack as CPUs do, on every platform.

    Returns:
      `rule.planes` planes of u32[num_words(leaves)], whose spare bits mean nothing, and a flag.
    """
    large, small = _by_size(leaves)
    coin = lax.optimization_barrier(coin)  # or XLA recomputes the coin for every coordinate
    arrays = [leaves[n] for n in large]
    if small:
        arrays.append(_bundle([leaves[n] for n in small]))

    # One branch for all arrays: every branch takes XLA time, even one that is not compiled.
    packers = pack_consecutive, pack_slabs, pack_groups
    cpu, tpu, gpu = (partial(_pack_arrays, packer=packer, rule=rule) for packer in packers)
    if portable:
        return cpu(arrays, coin)
    return lax.platform_dependent(arrays, coin, cpu=cpu, tpu=tpu, default=gpu)


def unpack(
    planes: Sequence[UInt32[Array, " words"]],
    leaves: Sequence[Any],
    *,
    inverts_odd: bool = False,
    portable: bool = False,
) -> list[list[Bool[Array, "..."]]]:
    """Unpack planes of u32[num_words(leaves)]: for each leaf, a bool[shape] from each plane.

    Args:
      planes: planes of words.
      leaves: arrays, or their shapes.
      inverts_odd: whether to invert the bits of odd coordinates.
      portable: whether words were packed as CPUs pack them, on every platform.
    """
    unpack_all = partial(unpack_leaves, leaves=leaves, inverts_odd=inverts_odd)
    cpu = partial(unpack_all, unpacker=unpack_consecutive, cut=cut_alike)
    tpu = partial(unpack_all, unpacker=unpack_slabs, cut=cut_apart)
    gpu = partial(unpack_all, unpacker=unpack_groups, cut=cut_apart)
    if portable:
        bits = [cpu(plane) for plane in planes]
    else:
        bits = [lax.platform_dependent(plane, cpu=cpu, tpu=tpu, default=gpu) for plane in planes]
    return [list(each) for each in zip(*bits, strict=True)]


def _pack_arrays(
    arrays: Sequence[Float[Array, "..."]], coin: UInt32[Array, ""], packer: Any, rule: BitRule
) -> tuple[list[UInt32[Array, " words"]], Bool[Array, ""]]:
    """Pack arrays into planes, and find whether all their values are finite."""
    packed = []
    for array in arrays:
        planes, bad = _pack_array(array, coin, packer, rule)
        if packer is pack_groups:
            # XLA for GPUs would merge the packing of many arrays into a kernel that compiles
            # slowly. It cannot if each array waits for the one before.
            planes, coin = lax.optimization_barrier((planes, coin))
        packed.append([*planes, bad])
    *planes, bad = [_join(field) for field in zip(*packed, strict=True)]
    # Without the barrier XLA copies this reduction into every use of its result.
    return planes, ~jnp.any(lax.optimization_barrier(bad))


@partial(jax.jit, static_argnums=(2, 3))  # one trace for all arrays of a shape
def _pack_array(
    array: Float[Array, "..."], coin: UInt32[Array, ""], packer: Any, rule: BitRule
) -> tuple[list[UInt32[Array, " words"]], Bool[Array, " flags"]]:
    return packer(array, coin, rule=rule)


def unpack_leaves(
    plane: UInt32[Array, " words"],
    leaves: Sequence[Any],
    inverts_odd: bool,
    unpacker: Any,
    cut: Cut,
) -> list[Bool[Array, "..."]]:
    """Unpack one plane: for each leaf a bool[shape]."""
    if inverts_odd and unpacker is unpack_consecutive:  # where words hold pairs of neighbours
        plane, inverts_odd = plane ^ ODD_BITS, False
    # Without the barrier every coordinate searches for its word.
    plane = lax.optimization_barrier(plane)
    large, small = _by_size(leaves)
    shapes = [leaves[n].shape for n in large] + _bundle_shapes(leaves, small)
    arrays = [
        _unpack_array(words, shape, unpacker)
        for words, shape in zip(cut(plane, [fold(s).words for s in shapes]), shapes, strict=True)
    ]
    if inverts_odd:
        arrays = [_invert_odd(each) for each in arrays]
    bits = dict(zip(large, arrays, strict=False))
    if small:
        sizes = [math.prod(leaves[n].shape) for n in small]
        for n, size, flat in zip(small, sizes, cut(arrays[-1], map(_even, sizes)), strict=True):
            bits[n] = (flat[:size] if size % 2 else flat).reshape(leaves[n].shape)
    return [
        bits[n] if n in bits else jnp.zeros(leaf.shape, jnp.bool_) for n, leaf in enumerate(leaves)
    ]


@jax.jit
def _invert_odd(bits: Bool[Array, "..."]) -> Bool[Array, "..."]:
    return bits ^ odd(bits.shape)


@partial(jax.jit, static_argnums=(1, 2))
def _unpack_array(
    words: UInt32[Array, " words"], shape: tuple[int, ...], unpacker: Any
) -> Bool[Array, "..."]:
    return unpacker(words, shape)


def pack_consecutive(
    array: Float[Array, "..."], coin: UInt32[Array, ""], *, rule: BitRule
) -> tuple[list[UInt32[Array, " words"]], Bool[Array, " flags"]]:
    """Pack for CPUs: bit b of word w belongs to coordinate 32 w + b.

    A flag is set if one of the 32 values of a word is not finite. `_pack_arrays` reduces the flags
    of all arrays at once: XLA would split the reduction of each large array into several kernels.
    """
    flat = array.reshape(-1)
    rest = flat.size % WORD_BITS
    rows = flat[: flat.size - rest].reshape(-1, WORD_BITS)
    pieces = [find_fields(rows, odd(rows.shape), coin, rule)]
    if rest:  # apart, since padding the whole array would cost the vectorised loop
        fields = find_fields(flat[-rest:], odd((rest,)), coin, rule)
        pieces.append([jnp.pad(field, (0, WORD_BITS - rest))[None] for field in fields])
    packed = [merge_bits(fields, axis=1) for fields in pieces]
    *planes, bad = (_join(piece) for piece in zip(*packed, strict=True))
    if spare := fold(array.shape).words - bad.size:
        planes = [jnp.pad(plane, (0, spare)) for plane in planes]
    return planes, bad


def _join(pieces: Sequence[Array]) -> Array:
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)


def unpack_consecutive(
    words: UInt32[Array, " words"], shape: tuple[int, ...]
) -> Bool[Array, "..."]:
    """Invert `pack_consecutive`."""
    size = math.prod(shape)
    words = words[: -(-size // WORD_BITS), None]
    bits = (words >> lax.broadcasted_iota(jnp.uint32, (len(words), WORD_BITS), 1)) & 1
    bits = bits.astype(jnp.bool_).reshape(-1)
    if size % WORD_BITS or (len(shape) > 1 and shape[-1] % 4):
        # Rows or threads would start inside a word, which defeats vectorisation. With the barrier
        # XLA writes the bytes of whole words first.
        bits = lax.optimization_barrier(bits)
    return bits[:size].reshape(shape)


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
    return _join([jnp.pad(leaf, (0, 1)) if leaf.size % 2 else leaf for leaf in flat])
