"""A worker's ballots: the bits of its signs, and what becomes of zeros and ties.

The dither turns zero ballots and ties into +-1 that cancel over the workers and over time. A plain
parity of coordinate, worker and step would resonate with periodic zeros. Here each worker has a
rank that rotates every second step, and two hash bits decide each pair of steps. The signs of a
pair are opposite, so a *dead* coordinate, on which every ballot is zero, moves back by the step
that it moved away.

This needs the same voters in both steps of a pair. Where voters change, one parity of ranks may
outnumber the other and decide dead coordinates, in either direction. Two remedies need a memory,
`DitherMemory`. While dead coordinates have drifted, the coin for ties moves them back. And once a
worker has missed a step, ranks are shuffled in every pair: ranks that only rotate would leave out
the same parity in every step, and workers of that parity could never move a coordinate alone.

No one-bit rule bounds the drift for every sequence of voters: the zero of a lone voter decides.
"""

from collections.abc import Hashable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from signax._core.checks import check_mode
from signax._core.leaves import worker_index
from signax._core.remote import axis_size
from signax._wire.types import Array, Worker

Zeros = Literal["dither", "abstain", "plus"]
Ties = Literal["dither", "plus"]


class Rules(NamedTuple):
    """How a vote treats zeros and ties, and so the ballots of a worker.

    With dithered ties a ballot travels relative to its coordinate, inverted where the coordinate is
    odd. All ties of a step then have the same outcome, so servers need not know which coordinates a
    word holds.
    """

    zeros: Zeros
    ties: Ties

    @property
    def planes(self) -> int:
        """The number of bits in a ballot."""
        return 2 if self.zeros == "abstain" else 1

    @property
    def relative(self) -> bool:
        return self.ties == "dither" and self.zeros != "abstain"

    @property
    def has_memory(self) -> bool:
        """Whether a vote keeps a `DitherMemory`: where it dithers dead coordinates."""
        return self.ties == self.zeros == "dither"

    def check(self) -> None:
        """Raise if a mode is unknown."""
        check_mode("zeros", self.zeros, ("dither", "abstain", "plus"))
        check_mode("ties", self.ties, ("dither", "plus"))

    def __call__(self, values: Array, odd: Array, coin: Array) -> tuple[Array, ...]:
        """The bits of a worker's ballots: float[...] and bool[...] to `planes` of bool[...].

        `"abstain"` has one bit for +1 and one for -1; otherwise a set bit is +1. NaN is neither
        above nor below zero, so NaN counts as a zero ballot.
        """
        plus, minus = values > 0, values < 0
        if self.zeros == "abstain":
            return plus, minus
        if self.zeros == "plus":
            zero = ~odd if self.relative else True
        else:
            zero = coin == 0 if self.relative else (coin == 0) ^ odd
        is_zero = ~(plus | minus)
        # `zero` comes first, as the scalar in `signs`.
        return ((zero & is_zero) | ((plus ^ odd if self.relative else plus) & ~is_zero),)

    def tie(self, coin: Array) -> Array:
        """The bit that breaks ties, as it travels: u32[] in {0, 1}."""
        return coin ^ 1 if self.relative else jnp.ones_like(coin)

    def upright(self, bits: Sequence[Array], odd: Array) -> list[Array]:
        """Invert the bits of odd coordinates back, if they travelled inverted."""
        return [plane ^ odd for plane in bits] if self.relative else [*bits]

    def signs(self, bits: list[list[Array]], voters: Array, dtypes: list[Any]) -> list[Array]:
        """The decided signs, +-1, or 0 without voters, from the `planes` of each leaf, upright."""
        if self.zeros == "abstain":
            return [p.astype(d) - m.astype(d) for (p, m), d in zip(bits, dtypes, strict=True)]
        # Without the barrier XLA looks at the number of voters for every coordinate.
        ones = lax.optimization_barrier({dtype: (voters > 0).astype(dtype) for dtype in dtypes})
        signs = []
        for (plus,), dtype in zip(bits, dtypes, strict=True):
            one = np.ones([], dtype)
            # The scalar comes first: XLA then orders the inputs of all leaves' kernels alike, and
            # compiles one kernel for all leaves of a shape.
            signs.append(ones[dtype] * jnp.where(plus, one, -one))
        return signs

    def total(self, digits: Sequence[Array], voters: Array) -> Array:
        """The sum of the voters' ballots, from the digits of their counts: bool[...] to i32[...].

        If a ballot has two planes, the digits of the first come first. `ties` must be `"plus"`.
        """
        length = len(digits) // self.planes

        def count(digits: Sequence[Array]):
            weighted = [digit.astype(jnp.int32) << weight for weight, digit in enumerate(digits)]
            return sum(weighted, start=jnp.int32(0))

        plus = count(digits[:length])
        if self.zeros == "abstain":
            return plus - count(digits[length:])
        return 2 * plus - voters.astype(jnp.int32)


class WithOpinions(NamedTuple):
    """Add a second bit to each ballot of one bit: whether the value is not zero."""

    rules: Rules

    @property
    def planes(self) -> int:
        return 2

    def __call__(self, values: Array, odd: Array, coin: Array) -> tuple[Array, ...]:
        return *self.rules(values, odd, coin), (values > 0) | (values < 0)


class DitherMemory(NamedTuple):
    """The memory of a vote's dither, the same on every worker.

    Attributes:
      drift: int32[], the steps that a dead coordinate of even index has moved in total. A dead
        coordinate of odd index has moved as far in the other direction. Indices count a leaf's
        coordinates in row-major order. If the leaf is sharded, each device's block has indices of
        its own.
      first_missed: int32[], the first pair of steps, count // 2, in which a worker did not take
        part; 2^31 - 1 before such a pair.
    """

    drift: jax.typing.ArrayLike
    first_missed: jax.typing.ArrayLike


def toss(
    step: Array, worker: Array, num_workers: int, memory: DitherMemory | None = None
) -> tuple[Array, Array]:
    """A worker's coins at a step, for its zero ballots and for ties: u32[] in {0, 1} each.

    A coin is added to a coordinate's index j; an even sum is +1, an odd sum -1. With t the step, i
    the worker of M, r = (i + t // 2) mod M, and h1, h2 two bits of a hash of t // 2, a zero ballot
    on j has the parity of r + j + t + h1, and a tie the parity of j + t + h2.

    With a memory, r becomes the rank of a hash of i and t // 2 after the first pair in which a
    worker missed a step, and a tie moves dead coordinates back if they have drifted.
    """
    step, worker = step.astype(jnp.uint32), worker.astype(jnp.uint32)
    pair = step // 2
    hashed = _mix(pair)
    rank = (worker + pair) % num_workers
    tie = (step + ((hashed >> 16) & 1)) & 1
    if memory is not None:
        drift, first_missed = map(jnp.asarray, memory)
        is_shuffled = pair > first_missed.astype(jnp.uint32)
        rank = jnp.where(is_shuffled, _shuffled_rank(hashed, worker, num_workers), rank)
        tie = jnp.where(drift == 0, tie, (drift > 0).astype(jnp.uint32))
    return (rank + step + (hashed & 1)) & 1, tie


def _mix(number: Array) -> Array:
    """A hash of u32[]: every output bit depends on every input bit (MurmurHash3's finaliser)."""
    number = (number ^ (number >> 16)) * np.uint32(0x85EBCA6B)
    number = (number ^ (number >> 13)) * np.uint32(0xC2B2AE35)
    return number ^ (number >> 16)


def _shuffled_rank(seed: Array, worker: Array, num_workers: int) -> Array:
    """A worker's rank among hashes of all workers, u32[]: a permutation of 0 to M - 1."""
    # The hashes are distinct, since _mix is one-to-one.
    hashes = _mix(seed + jnp.arange(num_workers, dtype=jnp.uint32))
    return jnp.sum(hashes < _mix(seed + worker), dtype=jnp.uint32)


def find_worker(
    axis_name: Hashable, rules: Rules, step: Array | int, memory: DitherMemory | None
) -> Worker:
    """This worker at a step, given what its dither remembers of earlier steps."""
    if np.shape(step) or not jnp.issubdtype(getattr(step, "dtype", type(step)), jnp.integer):
        raise TypeError(f"step={step!r} must be one integer, the number of the step")
    number = jnp.asarray(np.uint32(step % 2**32) if isinstance(step, int) else step)
    index = worker_index(axis_name).astype(jnp.uint32)
    coin, tie = toss(number, index, axis_size(axis_name), memory)
    return Worker(index, coin, rules.tie(tie), step=number)
