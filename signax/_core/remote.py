"""Workers that are jobs of their own, and vote through an exchange in place of a mapped axis."""

import abc
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
from jax import lax


class VoteFormat(NamedTuple):
    """What jobs that vote together have in common.

    Attributes:
      zeros: how zero ballots count.
      ties: how ties are decided.
      words: the words of each plane.
      up: the planes of a worker's message.
      down: the planes of the decision.
      leaves: the shape and dtype of each leaf, in order.
    """

    zeros: str
    ties: str
    words: int
    up: int
    down: int
    leaves: tuple[tuple[tuple[int, ...], str], ...]


class Remote(abc.ABC):
    """The other workers of a job, reached from its compiled program.

    Attributes:
      num_workers: the number of workers, those that are away included.
      index: the number of this worker among them, from 0.
      replays: whether programs that are traced now take past decisions, and this worker's values
        count for nothing.
    """

    num_workers: int
    index: int
    replays: bool = False

    @abc.abstractmethod
    def vote(self, sealed: jax.Array, step: jax.Array, form: VoteFormat) -> jax.Array:
        """Send a sealed message, u32[n, 128], at a step, and return the sealed decision."""


def axis_size(axis_name: Hashable) -> int:
    """The number of workers along an axis, or of the jobs behind an exchange."""
    return axis_name.num_workers if isinstance(axis_name, Remote) else lax.axis_size(axis_name)


def find_workers(axis_name: Hashable | None, exchange: Any) -> Hashable | None:
    """The axis along which the workers lie, or the exchange with them in its place."""
    if exchange is None:
        return axis_name
    if not isinstance(exchange, Remote):
        raise TypeError(f"exchange={exchange!r} must be what signax.elastic.connect returns")
    if axis_name is not None:
        raise ValueError(
            f"axis_name={axis_name!r} and exchange={exchange!r} both say where the workers are: "
            "pass one of them"
        )
    return exchange
