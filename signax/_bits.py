"""Bits in 32-bit words: packing, unpacking, and arithmetic on packed words.

Coordinate j of an array is bit `j % 32` of word `j // 32`. Counting never unpacks: the sum of M
one-bit rows is kept as *planes*, word arrays that hold one binary digit of every sum, least
significant first, so that one bitwise operation works on 32 coordinates.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

WORD_BITS = 32
PART_MULTIPLE = 128  # words: parts of this multiple become a true all-gather on TPU

ALL_BITS = np.uint32(0xFFFFFFFF)
EVEN_BITS = np.uint32(0x55555555)  # the bits of even coordinates


def num_words(size: int) -> int:
    """The number of words that hold `size` bits."""
    return -(-size // WORD_BITS)


def part_words(words: int, num_workers: int, planes: int) -> int:
    """The length in words of one worker's part: a header, then an equal share of each plane."""
    share = -(-words // num_workers)
    return -(-(1 + planes * share) // PART_MULTIPLE) * PART_MULTIPLE


def pack(bits: jax.Array) -> jax.Array:
    """Packs bool[...] in row-major order into u32[num_words(size)], filled up with zeros."""
    flat = bits.reshape(-1)
    flat = jnp.pad(flat, (0, -flat.size % WORD_BITS))
    octets = jnp.packbits(flat, bitorder="little")  # u8[4 * words]
    return lax.bitcast_convert_type(octets.reshape(-1, 4), jnp.uint32)  # u32[words]


def unpack(words: jax.Array, shape: tuple[int, ...], size: int) -> jax.Array:
    """Unpacks u32[num_words(size)] into bool[shape]."""
    places = lax.broadcasted_iota(jnp.uint32, (1, WORD_BITS), 1)
    bits = (words[:, None] >> places) & 1  # u32[words, 32]
    return bits.reshape(-1)[:size].reshape(shape).astype(jnp.bool_)


def spread(bit: jax.Array) -> jax.Array:
    """A word of 32 copies of one bit: u32[] in {0, 1} to u32[] in {0, ALL_BITS}."""
    return jnp.where(bit.astype(jnp.bool_), ALL_BITS, np.uint32(0))


def count(rows: Sequence[jax.Array]) -> list[jax.Array]:
    """Adds M rows of bits: M times u32[n] to the `M.bit_length()` planes of their sum.

    A carry-save adder: three planes of one weight become one of that weight and a carry of the
    next, five operations on 32 coordinates each, until one plane of each weight is left.
    """
    pending, planes = list(rows), []
    while pending:
        carries = []
        while len(pending) > 1:
            a, b = pending.pop(0), pending.pop(0)
            half = a ^ b
            if pending:
                c = pending.pop(0)
                pending.append(half ^ c)
                carries.append((a & b) | (half & c))
            else:
                pending.append(half)
                carries.append(a & b)
        planes.append(pending[0])
        pending = carries
    return planes


def at_least(planes: Sequence[jax.Array], threshold: jax.Array) -> jax.Array:
    """The bits at which the counted number reaches `threshold`: planes, u32[] to u32[n]."""
    reached = jnp.full_like(planes[0], ALL_BITS)  # equal numbers reach it
    for weight, plane in enumerate(planes):
        wanted = spread((threshold >> weight) & 1)
        reached = (plane & ~wanted) | (~(plane ^ wanted) & reached)
    return reached


def exceeds(planes: Sequence[jax.Array], others: Sequence[jax.Array]) -> jax.Array:
    """The bits at which one counted number is above another: planes, planes to u32[n]."""
    above = jnp.zeros_like(planes[0])
    for plane, other in zip(planes, others, strict=True):
        above = (plane & ~other) | (~(plane ^ other) & above)
    return above
