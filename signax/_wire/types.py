"""The types of the wire: annotated arrays, and the protocol of a codec.

A codec says how a worker's values become words, what a server makes of the words of M workers, and
how the server's reply becomes updates. `exchange` moves the words. To add a codec, write a class
with the methods of `Codec` in a file of its own; `quantized.py` is the shortest example.

Annotations such as `UInt32[Array, "M n"]` are jaxtyping's, which the tests check. They are inert
where jaxtyping is not installed.
"""

import warnings
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

from jax import Array

from signax._core.checks import check_axis_name, check_mode
from signax._core.leaves import axis_names

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Num, UInt32
else:
    try:
        from jaxtyping import Bool, Float, Int, Num, UInt32
    except ImportError:

        class _Inert:
            def __class_getitem__(cls, shape: Any) -> type:
                del shape
                return Array

        Bool = Float = Int = Num = UInt32 = _Inert

__all__ = [
    "TRANSPORTS",
    "Array",
    "Bool",
    "Codec",
    "Context",
    "Encoded",
    "Float",
    "Int",
    "Leaves",
    "Num",
    "Outcome",
    "Reply",
    "Route",
    "Summable",
    "Sums",
    "Transport",
    "UInt32",
    "Worker",
    "make_route",
]


Transport = Literal["auto", "packed", "gather", "sum"]
TRANSPORTS = ("auto", "packed", "gather", "sum")


class Route(NamedTuple):
    """The way that messages take.

    Attributes:
      axis_name: the axis along which the workers lie, or a tuple of axes.
      transport: how messages travel.
      split_over: an axis along which devices hold the same values, and share the exchange.
    """

    axis_name: Hashable
    transport: Transport = "auto"
    split_over: Hashable | None = None


class Outcome(NamedTuple):
    """The result of an exchange.

    Attributes:
      updates: the updates, the same on every worker.
      voters: u32[], the number of workers that took part, the same on every worker.
      dead: u32[] in {0, 1}, the decision where every ballot was a dithered zero.
      participates: bool[], whether this worker took part.
      finite: bool[], whether this worker's values are finite.
      counts: at most one f32[k], of the codec's numbers about this worker.
      residual: what the message did not say of each leaf, or nothing.
      memory: the server's new memory of its part of each leaf, or nothing.
    """

    updates: Any
    voters: Array
    dead: Array
    participates: Array
    finite: Array
    counts: list[Array]
    residual: list[Array]
    memory: list[Array]


def make_route(
    axis_name: Hashable, transport: Transport | Literal["int8"], split_over: Hashable | None
) -> Route:
    """A route; raises if an option is unknown, or if options exclude one another."""
    check_axis_name(axis_name)
    if transport == "int8":
        message = (
            "transport='int8' is deprecated, since it sends int16 above 127 workers: use 'sum'"
        )
        warnings.warn(message, DeprecationWarning, stacklevel=3)
        transport = "sum"
    check_mode("transport", transport, TRANSPORTS)
    if isinstance(split_over, (tuple, list, set)):
        raise TypeError(f"split_over={split_over!r} must name one axis, such as 'chip'")
    if split_over is not None and split_over in axis_names(axis_name):
        raise ValueError(
            f"split_over={split_over!r} is an axis of the workers, axis_name={axis_name!r}: it "
            "must be an axis along which devices hold the same values"
        )
    if split_over is not None and transport == "sum":
        raise ValueError(
            f"transport='sum' cannot be split over {split_over!r}: it sends no packed words; use "
            "'packed' or 'gather'"
        )
    return Route(axis_name, transport, split_over)


class Worker(NamedTuple):
    """A worker at one step.

    Attributes:
      index: u32[], its index along the axis; also the index of the part that it serves.
      coin: u32[] in {0, 1}, which dithers its zero ballots.
      tie: u32[] in {0, 1}, which breaks ties; the same on every worker.
      weights: f32[M], the weights of all workers' ballots, the same on every worker; or `None`.
      step: the number of the step.
    """

    index: UInt32[Array, ""]
    coin: UInt32[Array, ""]
    tie: UInt32[Array, ""]
    weights: Any = None
    step: Any = None


class Leaves(NamedTuple):
    """The leaves of one sharding group, as blocks of one device.

    Attributes:
      values: a worker's values, which are encoded.
      like: leaves in the shapes and dtypes of the updates; their values are not used.
    """

    values: Sequence[Any]
    like: Sequence[Any]


class Encoded(NamedTuple):
    """What a worker makes of its values.

    Attributes:
      message: planes of u32[n], which any cut divides among servers; or, of a codec that is
        `by_server`, one u32[M, n] with a row for each server.
      finite: bool[], whether all values are finite.
      residual: what the message does not say of each leaf, for an error memory; or nothing.
    """

    message: Any
    finite: Any
    residual: Any


class Context(NamedTuple):
    """What a server knows beside the messages.

    Attributes:
      leaves: the leaves that were encoded.
      worker: this worker, which serves the part of its index.
      memory: the server's memory of its part of each leaf, or nothing.
    """

    leaves: Leaves
    worker: Worker
    memory: list[Array]


class Reply(NamedTuple):
    """What servers make of the workers' messages.

    Attributes:
      planes: u32[n] each, of one server; u32[M, n] once the replies of all servers are together, or
        end to end where messages were planes.
      header: u32[], 2 * voters + dead, with the number of workers that took part, and the decision
        where every ballot was a dithered zero.
      counts: at most one u32[n, k, M]: k numbers about each worker, in n addends each, since their
        sum might exceed 32 bits. A server's reply has one addend. The replies of all servers
        together have one for each server.
      memory: the server's memory of its part of each leaf, or nothing.
    """

    planes: list[Array]
    header: Array
    counts: list[Array]
    memory: list[Array]


@runtime_checkable
class Codec(Protocol):
    """How values travel. A codec is a value, made of options."""

    @property
    def by_server(self) -> bool:
        """Whether a message has a row for each server."""
        ...

    @property
    def has_residual(self) -> bool:
        """Whether encoding returns residuals."""
        ...

    def planes(self, num_workers: int) -> tuple[int, int]:
        """The bits of one coordinate on the way up, and on the way down."""
        ...

    def worker(self, axis_name: Hashable, step: Any, dither: Any) -> Worker:
        """This worker at a step, given the memory of its dither."""
        ...

    def encode(self, leaves: Leaves, coin: Array, axes: tuple[Hashable, ...]) -> Encoded:
        """Encode blocks of leaves that are sharded over `axes`."""
        ...

    def combine(self, sealed: Array, widths: Sequence[int], context: Context) -> Reply:
        """Combine M sealed messages, u32[M, n / 128, 128], of planes of the given widths."""
        ...

    def decode(self, reply: Reply, leaves: Leaves) -> list[Array]:
        """Decode the replies of all servers into updates like `leaves.like`."""
        ...


class Sums(NamedTuple):
    """The result of an all-reduce of integers.

    Attributes:
      totals: the sums, in the shapes of what was summed.
      voters: u32[], the number of workers that took part.
      dead: u32[] in {0, 1}, the decision where every ballot was a dithered zero.
      tie: u32[] in {0, 1}, which breaks ties.
    """

    totals: list[Array]
    voters: Array
    dead: Array
    tie: Array


@runtime_checkable
class Summable(Codec, Protocol):
    """A codec whose messages may also be sums of small integers."""

    @property
    def integers(self) -> int:
        """The number of integers for each coordinate."""
        ...

    def encode_integers(self, leaves: Leaves, coin: Array, num_workers: int) -> Encoded:
        """Encode leaves as integers of -1, 0 and +1, wide enough for sums over M workers."""
        ...

    def decode_sums(
        self, sums: Sums, integers: Sequence[Array], leaves: Leaves
    ) -> tuple[list[Array], list[Array]]:
        """Updates like `leaves.like`, and at most one u32[n, k] of counts about this worker.

        `integers` are this worker's own. Counts have n addends.
        """
        ...
