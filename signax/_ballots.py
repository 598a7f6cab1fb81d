"""What a worker votes: its ballot on each coordinate, the coins of the dither, who takes part.

The dither turns zero ballots and ties into +-1 such that they cancel over the workers and over
time. A plain parity of coordinate, worker and step resonates with itself and with gradients that
are zero periodically: parameters drift by whole steps. Here a worker's place rotates every second
step, and two hash bits decide each pair of steps. Within a pair the signs are opposite, so a *dead*
coordinate, on which every ballot is zero, moves back by the step that it moved away.

This needs the same voters in both steps of a pair. Where voters change, one parity of places may
outnumber the other and decide dead coordinates, in either direction. Two remedies take a memory,
`DitherMemory`. While dead coordinates are off their place, the coin for ties moves them back. And
once a worker has missed a step, places are shuffled in every pair: places that only rotate would
leave out the same parity in every step, and the workers of that parity could never move a
coordinate on which they vote alone.

No one-bit rule bounds the drift for every sequence of voters. A single voter decides alone, and its
dithered zero looks like an opinion. So absences alone can choose the direction of every step.
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

    @property
    def has_memory(self) -> bool:
        """Whether the vote keeps a `DitherMemory`: where dead coordinates are dithered."""
        return self.ties == self.zeros == "dither"

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


class WithOpinions(NamedTuple):
    """Rules of one bit, with a second bit for each ballot: whether the value was not zero."""

    rules: Rules

    @property
    def planes(self) -> int:
        return 2

    def __call__(self, values: jax.Array, odd: jax.Array, coin: jax.Array) -> tuple[jax.Array, ...]:
        return *self.rules(values, odd, coin), (values > 0) | (values < 0)


NEVER = np.int32(2**31 - 1)


class DitherMemory(NamedTuple):
    """What a vote remembers of its dither; the same on every worker.

    Attributes:
      drift: int32[], how many steps a dead coordinate of even index has moved in total. One of odd
        index has moved as far in the other direction. Indices count a leaf's coordinates in
        row-major order, or those of a device's block of it.
      first_missed: int32[], the first pair of steps, count // 2, in which a worker did not take
        part; 2^31 - 1 before such a pair.
    """

    drift: jax.typing.ArrayLike
    first_missed: jax.typing.ArrayLike


def no_dither_memory() -> DitherMemory:
    """The memory before the first step."""
    return DitherMemory(jnp.zeros([], jnp.int32), jnp.full([], NEVER, jnp.int32))


def next_dither_memory(
    before: DitherMemory, dead: jax.Array, voters: jax.Array, step: jax.Array, num_workers: int
) -> DitherMemory:
    """The memory after a step.

    Args:
      before: the memory before it.
      dead: u32[] in {0, 1}, whether dead coordinates of even index moved up or down.
      voters: u32[], how many workers took part. Nothing moves without any.
      step: int32[], the number of the step.
      num_workers: M.
    """
    moved = jnp.where(voters > 0, 2 * dead.astype(jnp.int32) - 1, 0)
    pair = jnp.where(voters < num_workers, step // 2, NEVER)
    return DitherMemory(before.drift + moved, jnp.minimum(before.first_missed, pair))


class Coins(NamedTuple):
    """Parities that are added to a coordinate's index j: an even sum is +1, an odd one -1."""

    zero: jax.Array  # u32[] in {0, 1}: this worker's, for its zero ballots
    tie: jax.Array  # u32[] in {0, 1}: everybody's, for ties


def _mix(number: jax.Array) -> jax.Array:
    """A hash of u32[]: every output bit depends on every input bit (MurmurHash3's finaliser)."""
    number = (number ^ (number >> 16)) * np.uint32(0x85EBCA6B)
    number = (number ^ (number >> 13)) * np.uint32(0xC2B2AE35)
    return number ^ (number >> 16)


def toss(
    step: jax.Array, worker: jax.Array, num_workers: int, memory: DitherMemory | None = None
) -> Coins:
    """The coins of one worker at one step.

    With t the step, i the worker of M, r = (i + t // 2) mod M, and h1, h2 two bits of a hash of
    t // 2: a zero ballot on coordinate j has the parity of r + j + t + h1, a tie that of
    j + t + h2.

    With a memory, r becomes the rank of a hash of i and t // 2 after the first pair in which a
    worker missed a step, and a tie moves dead coordinates back if they have drifted.
    """
    step, worker = step.astype(jnp.uint32), worker.astype(jnp.uint32)
    pair = step // 2
    hashed = _mix(pair)
    place = (worker + pair) % num_workers
    tie = (step + ((hashed >> 16) & 1)) & 1
    if memory is not None:
        drift, first_missed = map(jnp.asarray, memory)
        is_shuffled = pair > first_missed.astype(jnp.uint32)
        place = jnp.where(is_shuffled, _shuffled_place(hashed, worker, num_workers), place)
        tie = jnp.where(drift == 0, tie, (drift > 0).astype(jnp.uint32))
    return Coins(zero=(place + step + (hashed & 1)) & 1, tie=tie)


def _shuffled_place(seed: jax.Array, worker: jax.Array, num_workers: int) -> jax.Array:
    """A worker's rank among hashes of all workers: u32[]; all ranks permute 0 to M - 1."""
    # The hashes are distinct, since _mix is one-to-one.
    hashes = _mix(seed + jnp.arange(num_workers, dtype=jnp.uint32))
    return jnp.sum(hashes < _mix(seed + worker), dtype=jnp.uint32)


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
