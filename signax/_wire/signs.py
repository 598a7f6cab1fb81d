"""Signs on the wire: ballots, zeros and ties, and the codecs of the majority and the mean.

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

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from signax._core.checks import check_mode
from signax._core.leaves import all_finite, wide_dtype, worker_index
from signax._core.remote import axis_size
from signax._wire import packing, slabs, words
from signax._wire.types import Array, Context, Encoded, Leaves, Reply, Sums, UInt32, Worker

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

        The digits of a second plane follow those of the first. Ties must be `"plus"`.
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
        coordinates in row-major order, or those of a device's block of the leaf.
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


@dataclasses.dataclass(frozen=True)
class _Signs:
    """Ballots on the way up, in one bit, or two where zeros abstain."""

    rules: Rules

    by_server = False
    has_residual = False
    portable = False

    @property
    def bits(self) -> slabs.BitRule:
        """The bits of packed ballots."""
        return self.rules

    @property
    def ballots(self) -> list[Rules]:
        """The rule of each ballot that is sent as an integer."""
        return [self.rules]

    @property
    def integers(self) -> int:
        return len(self.ballots)

    def worker(self, axis_name: Hashable, step: Array | int, dither: DitherMemory | None) -> Worker:
        return find_worker(axis_name, self.rules, step, dither)

    def encode(self, leaves: Leaves, coin: Array, axes: tuple[Hashable, ...]) -> Encoded:
        del axes
        planes, finite = packing.pack(leaves.values, self.bits, coin, portable=self.portable)
        return Encoded(planes, finite, [])

    def encode_integers(self, leaves: Leaves, coin: Array, num_workers: int) -> Encoded:
        dtype = words.sum_dtype(num_workers)

        def ballot(leaf: Array, rules: Rules):
            plus, *minus = rules(leaf, slabs.odd(leaf.shape), coin)
            against = minus[0] if minus else ~plus
            return plus.astype(dtype) - against.astype(dtype)

        integers = [ballot(leaf, rules) for rules in self.ballots for leaf in leaves.values]
        return Encoded(integers, all_finite(leaves.values), [])


@dataclasses.dataclass(frozen=True)
class Majority(_Signs):
    """The codec of the majority vote: ballots up, the decision down.

    With `agreement`, servers also count how far each worker agrees with the others. Dithered zeros
    are no opinions: they count neither for nor against a worker, nor for a majority. So a second
    bit then tells opinions from dithered zeros on the way up. `portable` words mean the same on
    every platform.
    """

    agreement: bool = False
    portable: bool = False

    @property
    def _sends_opinions(self) -> bool:
        return self.agreement and self.rules.planes == 1

    @property
    def bits(self) -> slabs.BitRule:
        return WithOpinions(self.rules) if self._sends_opinions else self.rules

    @property
    def ballots(self) -> list[Rules]:
        opinions = [Rules("abstain", self.rules.ties)] if self._sends_opinions else []
        return [self.rules, *opinions]

    def planes(self, num_workers: int) -> tuple[int, int]:
        del num_workers
        return self.bits.planes, self.rules.planes

    # Whole sealed messages are counted, header and all: their length suits any vector unit.

    def combine(
        self, sealed: UInt32[Array, "M n 128"], widths: Sequence[int], context: Context
    ) -> Reply:
        del context
        ballots, found = words.unseal(sealed, widths)
        headers = words.read_headers(found)
        if self.rules.planes == 2:
            plus, minus = _count(sealed, widths)
            decided = [words.exceeds(plus, minus), words.exceeds(minus, plus)]
        else:
            tiebreaker = jnp.broadcast_to(headers.coin, sealed.shape[1:])
            counted = words.at_least(words.count(sealed, tiebreaker), headers.voters // 2 + 1)
            (majority, *_), _ = words.unseal(lax.optimization_barrier(counted)[None], widths)
            decided, plus, minus = [majority[0]], [], []
        counts = []
        if self._sends_opinions:
            signs, opinions = ballots
            ballots = [signs & opinions, opinions & ~signs]  # both 0 for an excluded worker
            plus, minus = (words.count(rows) for rows in ballots)
        if self.agreement:
            counts = [words.compare(ballots[0], ballots[1], plus, minus)[None]]
        return Reply(decided, 2 * headers.voters + headers.dead, counts, [])

    def decode(self, reply: Reply, leaves: Leaves) -> list[Array]:
        layout = {"inverts_odd": self.rules.relative, "portable": self.portable}
        bits = packing.unpack(reply.planes, leaves.like, **layout)
        return self.rules.signs(bits, reply.header >> 1, [leaf.dtype for leaf in leaves.like])

    def decode_sums(
        self, sums: Sums, integers: Sequence[Array], leaves: Leaves
    ) -> tuple[list[Array], list[Array]]:
        totals = [n.reshape(like.shape) for n, like in zip(sums.totals, leaves.like, strict=False)]
        if self.rules.planes == 2:
            bits = [[total > 0, total < 0] for total in totals]
        else:
            bits = [[(total > 0) | ((total == 0) & (sums.tie == 1))] for total in totals]
        bits = [self.rules.upright(planes, slabs.odd(planes[0].shape)) for planes in bits]
        counts = []
        if self.agreement:
            opinions, all_opinions = integers[-len(totals) :], sums.totals[-len(totals) :]
            counts = [words.compare_sums(opinions, all_opinions)]
        return self.rules.signs(bits, sums.voters, [leaf.dtype for leaf in leaves.like]), counts


@dataclasses.dataclass(frozen=True)
class MeanOfSigns(_Signs):
    """The codec of the mean of signs: ballots up, their count down. Its ties must be `"plus"`."""

    def planes(self, num_workers: int) -> tuple[int, int]:
        return self.rules.planes, self.rules.planes * num_workers.bit_length()

    def combine(
        self, sealed: UInt32[Array, "M n 128"], widths: Sequence[int], context: Context
    ) -> Reply:
        del context
        _, headers = words.unseal(sealed, widths)
        digits = [digit for planes in _count(sealed, widths) for digit in planes]
        return Reply(digits, 2 * words.count_voters(headers), [], [])

    def decode(self, reply: Reply, leaves: Leaves) -> list[Array]:
        voters = reply.header >> 1
        digits = packing.unpack(reply.planes, leaves.like)
        return self._means([self.rules.total(each, voters) for each in digits], leaves, voters)

    def decode_sums(
        self, sums: Sums, integers: Sequence[Array], leaves: Leaves
    ) -> tuple[list[Array], list[Array]]:
        del integers
        return self._means(sums.totals, leaves, sums.voters), []

    def _means(self, totals: list[Array], leaves: Leaves, voters: Array) -> list[Array]:
        """The means of the voters' ballots, each rounded once, to its leaf's dtype."""

        def mean(total: Array, leaf: Array):
            wide = wide_dtype(leaf.dtype)
            return (total.astype(wide) / jnp.maximum(voters, 1).astype(wide)).astype(leaf.dtype)

        return [mean(total, leaf) for total, leaf in zip(totals, leaves.like, strict=True)]


def _count(sealed: UInt32[Array, "M n 128"], widths: Sequence[int]) -> list[list[Array]]:
    """The planes of the sum of each message plane, lowest digit first."""
    counted = lax.optimization_barrier(jnp.stack(words.count(sealed)))  # u32[digits, n, 128]
    counts, _ = words.unseal(counted, widths)
    return [list(count) for count in counts]
