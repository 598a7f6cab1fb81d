"""Pack the leaves of a tree into words of 32 bits, and unpack them, on CPUs, GPUs and TPUs.

CPUs pack consecutive coordinates: bit b of word w is coordinate 32 w + b, for arrays of any shape.
GPUs and TPUs pack in slabs, see `slabs.py`. `_pack_array` and `_unpack_array` choose by platform.

Packing is one pass over the array. Unpacking broadcasts words to the array's shape, and XLA fuses
it with the consumer of the signs. Words live for one step, so no platform reads another's words.
"""

import math
from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from signax._core.leaves import all_flags, common_dtype
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


@partial(jax.jit, static_argnames="rule")  # one trace for all leaves of a shape
def _pack_array(
    array: Float[Array, "..."], coin: UInt32[Array, ""], rule: BitRule
) -> tuple[list[UInt32[Array, " words"]], Bool[Array, ""]]:
    """Pack one array into planes, and find whether it is finite."""
    packers = pack_consecutive, pack_slabs, pack_groups
    cpu, tpu, gpu = (partial(packer, rule=rule) for packer in packers)
    return lax.platform_dependent(array, coin, cpu=cpu, tpu=tpu, default=gpu)


def pack_consecutive(
    array: Float[Array, "..."], coin: UInt32[Array, ""], *, rule: BitRule
) -> tuple[list[UInt32[Array, " words"]], Bool[Array, ""]]:
    """Pack for CPUs: bit b of word w belongs to coordinate 32 w + b."""
    flat = array.reshape(-1)
    rest = flat.size % WORD_BITS
    rows = flat[: flat.size - rest].reshape(-1, WORD_BITS)
    pieces = [find_fields(rows, odd(rows.shape), coin, rule)]
    if rest:  # apart, since padding the whole array would cost the vectorised loop
        fields = find_fields(flat[-rest:], odd((rest,)), coin, rule)
        pieces.append([jnp.pad(field, (0, WORD_BITS - rest))[None] for field in fields])
    packed = [merge_bits(fields, axis=1) for fields in pieces]
    *planes, bad = (jnp.concatenate(piece) for piece in zip(*packed, strict=True))
    spare = fold(array.shape).words - bad.size
    return [jnp.pad(plane, (0, spare)) for plane in planes], ~jnp.any(bad)


def _unpack_array(words: UInt32[Array, " words"], shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """Unpack words into bool[shape]."""
    unpackers = unpack_consecutive, unpack_slabs, unpack_groups
    cpu, tpu, gpu = (partial(unpacker, shape=shape) for unpacker in unpackers)
    return lax.platform_dependent(words, cpu=cpu, tpu=tpu, default=gpu)


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
