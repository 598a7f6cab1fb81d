"""What a worker votes: its ballot on each coordinate, the coins of the dither, who takes part.

The dither turns what is undecided, a zero ballot or a tie, into +-1 so that it cancels over the
workers and over time. A plain parity of coordinate, worker and step resonates with itself and
with gradients that are zero periodically: parameters drift by whole steps. Here the worker's
place rotates every second step, and two hash bits decide each pair of steps anew; within a pair
the signs are opposite, so that a coordinate nobody votes on stays within one step for ever.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from signax._checks import check_flag

Zeros = Literal["dither", "abstain", "plus"]
Ties = Literal["dither", "plus"]


class Rules(NamedTuple):
    """How a vote settles what is undecided, and so what one worker's ballots are.

    With dithered ties a ballot travels relative to its coordinate, turned round where the
    coordinate is odd. There every tie of a step has the same outcome, so that whoever counts need
    not know which coordinates are in a word.
    """

    zeros: Zeros
    ties: Ties

    @property
    def planes(self) -> int:
        """The bits that one ballot takes."""
        return 2 if self.zeros == "abstain" else 1

    @property
    def relative(self) -> bool:
        return self.ties == "dither" and self.zeros != "abstain"

    def __call__(self, values: jax.Array, odd: jax.Array, coin: jax.Array) -> tuple[jax.Array, ...]:
        """The bits of a worker's ballots: float[...] and bool[...] to `planes` times bool[...].

        `"abstain"` has one bit for +1 and one for -1; otherwise a bit is set for +1. NaN is
        neither above nor below zero, so that it counts as a zero ballot.
        """
        plus, minus = values > 0, values < 0
        if self.zeros == "abstain":
            return plus, minus
        # What travels for +1, for -1 and for a zero ballot.
        one = ~odd if self.relative else jnp.ones_like(odd)
        zero = one if self.zeros == "plus" else (one ^ odd) == (coin == 0)
        return (jnp.where(plus, one, jnp.where(minus, ~one, zero)),)

    def tie(self, coin: jax.Array) -> jax.Array:
        """The bit that settles a tie, as it travels: u32[] in {0, 1}."""
        return coin ^ 1 if self.relative else jnp.ones_like(coin)

    def signs(
        self, bits: Sequence[jax.Array], odd: jax.Array, voters: jax.Array, dtype: Any
    ) -> jax.Array:
        """What was decided: `planes` times bool[...] to +-1, or 0, in `dtype`; 0 without voters."""
        if self.zeros == "abstain":
            plus, minus = bits
            return plus.astype(dtype) - minus.astype(dtype)
        (plus,) = bits
        one = lax.optimization_barrier((voters > 0).astype(dtype))
        return jnp.where(plus ^ odd if self.relative else plus, one, -one)

    def total(self, digits: Sequence[jax.Array], voters: jax.Array) -> jax.Array:
        """The sum of the voters' ballots from the digits of their counts: bool[...] to i32[...].

        With two planes those of one come behind those of the other. Ballots must not have travelled
        relative to their coordinates.
        """
        length = len(digits) // self.planes

        def count(digits):
            weighted = [digit.astype(jnp.int32) << place for place, digit in enumerate(digits)]
            return sum(weighted, start=jnp.int32(0))

        plus = count(digits[:length])
        if self.zeros == "abstain":
            return plus - count(digits[length:])
        return 2 * plus - voters.astype(jnp.int32)


class Coins(NamedTuple):
    """Parities that are added to a coordinate's index j: an even sum is +1, an odd one -1."""

    zero: jax.Array  # u32[] in {0, 1}: this worker's, for its zero ballots
    tie: jax.Array  # u32[] in {0, 1}: everybody's, for ties


def _mix(number: jax.Array) -> jax.Array:
    """A hash of u32[]: every output bit depends on every input bit (MurmurHash3's finaliser)."""
    number = (number ^ (number >> 16)) * np.uint32(0x85EBCA6B)
    number = (number ^ (number >> 13)) * np.uint32(0xC2B2AE35)
    return number ^ (number >> 16)


def toss(step: jax.Array, worker: jax.Array, num_workers: int) -> Coins:
    """The coins of one worker at one step.

    With t the step, i the worker of M, r = (i + t // 2) mod M, and h1, h2 two bits of a hash of
    t // 2: a zero ballot on coordinate j has the parity of r + j + t + h1, a tie that of
    j + t + h2.
    """
    step = step.astype(jnp.uint32)
    pair = step // 2
    hashed = _mix(pair)
    place = (worker.astype(jnp.uint32) + pair) % num_workers
    return Coins(
        zero=(place + step + (hashed & 1)) & 1,
        tie=(step + ((hashed >> 16) & 1)) & 1,
    )


def all_finite(tree: Any) -> jax.Array:
    """Whether no floating leaf holds a NaN or an infinity: a tree to bool[]."""
    leaves = jax.tree.leaves(tree)
    floating = [x for x in leaves if jnp.issubdtype(getattr(x, "dtype", type(x)), jnp.floating)]
    if not floating:
        return jnp.bool_(True)
    flags = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in floating])
    # Else XLA makes a chain of the flags and copies it into whatever uses the result, so that
    # compile time grows with the cube of the number of leaves.
    return jnp.all(lax.optimization_barrier(flags))


def take_part(finite: jax.Array, active: jax.Array | bool | None) -> jax.Array:
    """Whether a worker's updates count: it is `active` and all of them are finite."""
    if active is None:
        return finite
    check_flag("active", active)
    return finite & active
