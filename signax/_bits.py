"""Arithmetic on packed words: counting the votes on 32 coordinates at once.

Nothing is unpacked to be counted. The sum of M one-bit rows is kept as *planes*, word arrays that
hold one binary digit of every sum, least significant first, so that one bitwise operation works on
32 coordinates.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

WORD_BITS = 32
ALL_BITS = np.uint32(0xFFFFFFFF)

# Rows that are added without a loop: more of them compile slowly, fewer pass on more carries.
GROUP = 64


def spread(bit: jax.Array | int) -> jax.Array | np.uint32:
    """A word of 32 copies of one bit: a number in {0, 1} to one in {0, ALL_BITS}."""
    if isinstance(bit, int):
        return ALL_BITS if bit else np.uint32(0)
    return jnp.where(bit.astype(jnp.bool_), ALL_BITS, np.uint32(0))


def count(rows: jax.Array, *more: jax.Array) -> list[jax.Array]:
    """Adds rows of bits, u32[M, n] and N times u32[n], to the planes of their sum.

    Returns:
      `(M + N).bit_length()` times u32[n].
    """
    unlooped = len(rows) if len(rows) < 2 * GROUP else len(rows) % GROUP
    planes = _add([[*more, *rows[:unlooped]]])
    if unlooped == len(rows):
        return planes
    missing = (len(more) + len(rows)).bit_length() - len(planes)
    planes += [jnp.zeros_like(rows[0])] * missing

    def add_group(planes, group):
        first, *heavier = ([plane] for plane in planes)
        # What the last plane carries over is 0, since the whole sum fits.
        return _add([[*first, *group], *heavier])[: len(planes)], None

    groups = rows[unlooped:].reshape(-1, GROUP, *rows.shape[1:])
    return lax.scan(add_group, planes, groups)[0]


def _add(columns: list[list[jax.Array]]) -> list[jax.Array]:
    """Adds bits of the weights 1, 2, 4, ..., a list of u32[n] for each, to the planes of the sum.

    A carry-save adder: three planes of one weight become one of that weight and a carry of the
    next, five operations on 32 coordinates each, until one plane of each weight is left.
    """
    planes, carries = [], []
    while columns or carries:
        pending, *columns = columns or [[]]
        pending, carries = [*pending, *carries], []
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
        planes += pending
    return planes


def add_number(planes: Sequence[jax.Array], number: int) -> list[jax.Array]:
    """Adds a number below 2^len(planes) to every counted one: one more plane comes out."""
    ones = jnp.full_like(planes[0], ALL_BITS)
    columns = [[plane, ones] if number >> n & 1 else [plane] for n, plane in enumerate(planes)]
    added = _add(columns)
    return added + [jnp.zeros_like(ones)] * (len(planes) + 1 - len(added))


def at_least(planes: Sequence[jax.Array], threshold: jax.Array | int) -> jax.Array:
    """The bits at which the counted number reaches `threshold`: planes, u32[] to u32[n]."""
    reached = jnp.full_like(planes[0], ALL_BITS)  # equal numbers reach it
    for weight, plane in enumerate(planes):
        wanted = spread((threshold >> weight) & 1)
        reached = (plane & reached) | ((plane | reached) & ~wanted)
    return reached


def exceeds(planes: Sequence[jax.Array], others: Sequence[jax.Array]) -> jax.Array:
    """The bits at which one counted number is above another: planes, planes to u32[n]."""
    above = jnp.zeros_like(planes[0])
    for plane, other in zip(planes, others, strict=True):
        above = (plane & ~other) | (~(plane ^ other) & above)
    return above
