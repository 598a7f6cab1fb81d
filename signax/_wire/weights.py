"""Votes with weights: how much each worker's ballot counts.

A server unpacks the ballots and adds up f32, in the order of the workers. The sum of a coordinate
is therefore NumPy's, bit for bit, and exact for whole numbers whose sum is below 2^24. XLA fuses
unpacking, sums and packing of the decisions into one pass, which stores no sums.

Without weights none of this runs: `Majority` counts packed words.
"""

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence, Set
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from signax._core.leaves import is_traced
from signax._wire import slabs, words
from signax._wire.ballots import DitherMemory, Rules, find_worker
from signax._wire.signs import Majority
from signax._wire.types import Array, Bool, Context, Float, Reply, Transport, UInt32, Worker

Weights = Sequence[float] | Literal["agreement"] | None


class Weighing(NamedTuple):
    """What a vote by agreement knows at a step.

    Attributes:
      dither: the memory of the dither, or `None`.
      weights: f32[M], the weights of the workers, the same on every worker.
    """

    dither: DitherMemory | None
    weights: Float[Array, " M"]


def make_majority(
    rules: Rules, weights: Any, transport: Transport, *, agreement: bool = False
) -> Majority:
    """The codec of a vote; raises if the weights cannot be weights, or travel as sums."""
    if weights is None:
        return Majority(rules, agreement)
    numbers = None if _is_mode(weights) else _check_numbers(weights)
    if transport == "sum":
        raise ValueError(
            f"transport='sum' has no place for weights={weights!r}: an all-reduce adds up floats "
            "in any order. Use 'packed' or 'gather'"
        )
    return WeightedMajority(rules, agreement, weights=numbers)


def is_by_agreement(codec: Majority) -> bool:
    """Whether a vote's weights come from its state."""
    return isinstance(codec, WeightedMajority) and codec.by_agreement


def _is_mode(weights: Any) -> bool:
    if isinstance(weights, str) and weights != "agreement":
        raise ValueError(
            f"weights={weights!r} is unknown: use 'agreement', or one number for each worker"
        )
    return isinstance(weights, str)


def _check_numbers(weights: Any) -> tuple[float, ...]:
    """Weights as Python's floats; raises if they cannot be weights."""
    if any(map(is_traced, jax.tree.leaves(weights))):
        raise TypeError(
            "weights must be known when the step is built: list 'weights' in the static_args of "
            "optax.inject_hyperparams"
        )
    if isinstance(weights, jax.Array):
        weights = np.asarray(weights)  # under jit the numbers of a JAX array would be traced
    try:
        # The numbers of a mapping are its keys, and a set has no order.
        given = None if isinstance(weights, (Mapping, Set, bytes)) else [*weights]
    except TypeError:
        given = None
    if given is None or not all(_is_number(weight) for weight in given):
        raise TypeError(
            f"weights={weights!r} must be 'agreement', or one number for each worker, such as "
            "(2.0, 1.0, 1.0)"
        )
    numbers = tuple([float(weight) for weight in given])
    if not all(weight >= 0 and math.isfinite(weight) for weight in numbers):
        raise ValueError(f"weights={weights!r} must be finite numbers of at least 0")
    if not any(numbers):
        raise ValueError(f"weights={weights!r} are all 0: give at least one worker a weight")
    return numbers


def _scaled(weights: Sequence[float]) -> Float[Array, " M"]:
    """Weights in f32, times a power of two that puts the largest between 1/2 and 1.

    The factor is exact, and keeps sums of large weights finite.
    """
    _, exponent = math.frexp(max(weights))
    return jnp.array([math.ldexp(weight, -exponent) for weight in weights], jnp.float32)


def _is_number(weight: Any) -> bool:
    is_real = hasattr(weight, "__float__") and not np.iscomplexobj(weight)
    return is_real and not isinstance(weight, str) and not np.ndim(weight)


@dataclasses.dataclass(frozen=True)
class WeightedMajority(Majority):
    """The codec of a vote with weights: ballots up, the decision down.

    Without `weights` a vote's state has them, see `Weighing`. Servers then also count how far each
    worker agrees with the weighted vote of the others, on its opinions and theirs.
    """

    weights: tuple[float, ...] | None = None

    @property
    def by_agreement(self) -> bool:
        """Whether weights come from the agreement of each worker with the others."""
        return self.weights is None

    @property
    def _sends_opinions(self) -> bool:
        return (self.agreement or self.by_agreement) and self.rules.planes == 1

    def worker(self, axis_name: Hashable, step: Any, dither: Any) -> Worker:
        dither, weights = dither if self.weights is None else (dither, _scaled(self.weights))
        worker = find_worker(axis_name, self.rules, step, dither)
        if len(weights) == lax.axis_size(axis_name):
            return worker._replace(weights=weights)
        found, remedy = "the state's reputation", "use DataParallel.resize for another number"
        if self.weights is not None:
            found, remedy = f"weights={self.weights!r}", "pass one number for each worker"
        raise ValueError(
            f"{found} has {len(weights)} numbers, but axis_name={axis_name!r} has "
            f"{lax.axis_size(axis_name)} workers: {remedy}"
        )

    def combine(
        self, sealed: UInt32[Array, "M n 128"], widths: Sequence[int], context: Context
    ) -> Reply:
        planes, found = words.unseal(sealed, widths)
        headers = words.read_headers(found)
        votes, coins, ties = words.header_bits(found)
        weights = jnp.where(votes == 1, context.worker.weights, 0)
        if self.by_agreement:  # if all voters have weight 0, they vote with equal weights
            weights = jnp.where(jnp.any(weights > 0), weights, votes.astype(weights.dtype))
        # Without the barrier XLA computes both for every word.
        weights, tie = lax.optimization_barrier((weights, jnp.max(ties) == 1))
        if self.rules.planes == 2:
            total = _total(planes[0], planes[1], weights)
            decided = slabs.merge_bits([total > 0, total < 0], axis=0, flags=0)
        else:
            total = _total(planes[0], None, weights)
            decided = slabs.merge_bits([_is_plus(total, tie)], axis=0, flags=0)
        # A dithered zero has one bit on all coordinates, relative to the coordinate.
        zeros = jnp.asarray(words.spread(1 - coins))[:, None]
        dead = _is_plus(_total(zeros, None, weights)[0, 0], tie) & (headers.voters > 0)
        counts = self._counts(planes, weights)
        return Reply([*decided], 2 * headers.voters + dead.astype(jnp.uint32), counts, [])

    def _counts(self, planes: Sequence[Array], weights: Array) -> list[Array]:
        """The counts of agreement with the majority of the others, and with their weighted vote."""
        if not (self.agreement or self.by_agreement):
            return []
        plus, minus = planes
        if self._sends_opinions:
            signs, opinions = planes
            plus, minus = signs & opinions, opinions & ~signs
        counts = []
        if self.agreement:
            counts.append(words.compare(plus, minus, words.count(plus), words.count(minus)))
        if self.by_agreement:
            counts.append(_compare(plus, minus, weights))
        return [jnp.concatenate(counts)[None]]


def _is_plus(total: Array, tie: Array) -> Array:
    return (total > 0) | ((total == 0) & tie)


def _bits(packed: UInt32[Array, " n"]) -> Bool[Array, "32 n"]:
    shape = words.WORD_BITS, packed.size
    return (packed[None] >> lax.broadcasted_iota(jnp.uint32, shape, 0)) & 1 == 1


def _total(
    plus: UInt32[Array, "M n"], minus: UInt32[Array, "M n"] | None, weights: Float[Array, " M"]
) -> Float[Array, "32 n"]:
    """The sum of weighted ballots for +1 and for -1, in the order of the workers.

    Without `minus` every ballot that is not for +1 is for -1.
    """

    def add(total: Array | None, rows: tuple[Array, Array | None, Array]):
        plus, minus, weight = rows
        against = -weight if minus is None else jnp.where(_bits(minus), -weight, 0)
        ballots = jnp.where(_bits(plus), weight, against)
        return ballots if total is None else total + ballots, None

    rows = plus, minus, weights
    total, _ = add(None, jax.tree.map(lambda row: row[0], rows))
    if len(weights) > words.CHUNK:  # the unrolled sum would compile slowly
        return lax.scan(add, total, jax.tree.map(lambda row: row[1:], rows))[0]
    for n in range(1, len(weights)):
        total, _ = add(total, jax.tree.map(lambda row, n=n: row[n], rows))
    return total


def _compare(
    plus: UInt32[Array, "M n"], minus: UInt32[Array, "M n"], weights: Float[Array, " M"]
) -> UInt32[Array, "2 M"]:
    """Count the coordinates on which each worker agrees and disagrees with the others' vote.

    With T the weighted sum of all ballots, the others' sum is T - w for a worker that voted +1.
    Such a worker agrees where T is above w, and disagrees where T is below w.
    """
    total = lax.optimization_barrier(_total(plus, minus, weights))  # or every worker adds it up

    def of_worker(worker: tuple[Array, Array, Array]):
        plus, minus, weight = worker
        own = jnp.where(_bits(plus), total, -total)
        votes = _bits(plus | minus)
        sides = votes & (own > weight), votes & (own < weight)
        return jnp.stack([jnp.sum(side, dtype=jnp.uint32) for side in sides])

    return lax.map(of_worker, (plus, minus, weights)).T
