"""How far each worker agrees with the others, measured where ballots are counted.

A worker's own ballot moves the result, so it is compared with the majority of the *others*, and
only where that is clear, by three ballots or more. There a worker whose ballots are random agrees
on half of the coordinates, however many workers there are.

A dithered zero is no opinion. It must count neither for nor against its worker, nor for a majority:
where workers of one parity are excluded, the dither of the others leans to one side. So a second
bit per coordinate goes up with a dithered ballot, which says whether it is an opinion.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

MARGIN = 3  # ballots by which the others' majority is clear
LEAST_VOTERS = MARGIN + 1

# Of the rule for who opposes the others, see `signax.diagnostics.opposes`.
SLACK = 0.1
THRESHOLD = 1.25
ENOUGH = 16  # coordinates: a share of fewer weighs less

# The bits at which the sum of all opinions is at least a number, and at most its negative.
Lead = Callable[[int], tuple[jax.Array, jax.Array]]


class Agreement(NamedTuple):
    """How far a worker agrees with the others, in the state of a vote with `agreement=True`.

    Attributes:
      share: float32[], the share of coordinates on which this worker had the sign of the majority,
        of those on which its value was not zero and the signs of the other voters added up to 3 or
        more, or -3 or less. It comes from the last step with such coordinates in which the worker
        took part, and is a half before that.
      opposition: float32[], how far this share has been below a half, summed up: see
        :func:`signax.diagnostics.opposes`.
    """

    share: jax.typing.ArrayLike
    opposition: jax.typing.ArrayLike


def no_agreement() -> Agreement:
    """That of a run that has not begun."""
    return Agreement(share=jnp.full([], 0.5, jnp.float32), opposition=jnp.zeros([], jnp.float32))


def next_agreement(
    before: Agreement, agreed: Any, voters: jax.Array, takes_part: jax.Array
) -> Agreement:
    """That after a step on which `agreed` says what `compare` has counted: f32[2]."""
    agree, disagree = agreed
    compared = agree + disagree
    share = agree / jnp.maximum(compared, 1)
    measured = takes_part & (voters >= LEAST_VOTERS) & (compared > 0)
    # A share of few coordinates varies much: it counts for less, in proportion.
    weight = jnp.minimum(compared / ENOUGH, 1)
    opposition = before.opposition + 0.5 * weight - share * weight - SLACK * weight
    return Agreement(
        share=jnp.where(measured, share, before.share),
        opposition=jnp.where(measured, jnp.maximum(opposition, 0), before.opposition),
    )


def compare(opinions: Sequence[jax.Array], lead: Lead) -> jax.Array:
    """Counts for each worker the coordinates on which it is with the others, and against them.

    With S the sum of all opinions, the others' is S - 1 for a worker with +1: it agrees where S is
    4 or more, and disagrees where S is -2 or less.

    Args:
      opinions: u32[M, n] for +1 and for -1.
      lead: where S is how large, in words of n.

    Returns:
      u32[2, M].
    """
    plus, minus = opinions
    up, down = (words[None] for words in lead(MARGIN - 1))
    far_up, far_down = (words[None] for words in lead(MARGIN + 1))
    agree = (plus & far_up) | (minus & far_down)
    disagree = (minus & up) | (plus & down)
    counts = [lax.population_count(x) for x in (agree, disagree)]
    zeros = [np.uint32(0)] * 2
    # One reduction of both reads the words once.
    return jnp.stack(lax.reduce(counts, zeros, lambda x, y: list(map(lax.add, x, y)), (1,)))


def compare_sums(opinions: Sequence[jax.Array], totals: Sequence[jax.Array]) -> jax.Array:
    """Counts the coordinates on which this worker is with the others, and against them: u32[2].

    Args:
      opinions: this worker's, integers of -1, 0 and +1.
      totals: the sums of all workers' opinions, in the same shapes.
    """
    agreed = jnp.zeros(2, jnp.uint32)
    for opinion, total in zip(opinions, totals, strict=True):
        others = total - opinion
        clear = jnp.abs(others) >= MARGIN
        same, opposite = (opinion * jnp.sign(others) == sign for sign in (1, -1))
        agreed += jnp.stack([jnp.sum(clear & x, dtype=jnp.uint32) for x in (same, opposite)])
    return agreed


def add_up(counts: jax.Array) -> jax.Array:
    """The sum over devices, u32[n, 2] to f32[2], of what may come to more than 32 bits hold."""
    low, high = (jnp.sum(half, axis=0) for half in (counts & 0xFFFF, counts >> 16))
    return high.astype(jnp.float32) * 2**16 + low.astype(jnp.float32)
