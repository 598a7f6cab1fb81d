"""The codecs of signs: ballots up, and the majority or the mean of the signs down."""

import dataclasses
from collections.abc import Hashable, Sequence

import jax.numpy as jnp
from jax import lax

from signax._core.leaves import all_finite, wide_dtype
from signax._wire import packing, slabs, words
from signax._wire.ballots import DitherMemory, Rules, WithOpinions, find_worker
from signax._wire.types import Array, Context, Encoded, Leaves, Reply, Sums, UInt32, Worker


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
