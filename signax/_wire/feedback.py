"""Error feedback on the wire: the memories of workers and servers, around an exchange."""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from signax._core.checks import (
    check_axis_name,
    check_block,
    check_count,
    check_mode,
    check_number,
)
from signax._core.leaves import (
    add_memory,
    check_alike,
    check_floating,
    check_votable,
    spec_axes,
    worker_index,
)
from signax._wire.exchange import exchange
from signax._wire.parts import cut_leaf, join_leaf, part_shape
from signax._wire.scaled_signs import ScaledSigns
from signax._wire.types import Array, Outcome, Route

Feedback = Literal["both", "worker", "none"]

FEEDBACKS = ("both", "worker", "none")


class ScaledSignsMemory(NamedTuple):
    """The error memories of a worker and of a server, in the units of the values.

    Attributes:
      worker: this worker's own memory, a tree like the values, in their dtypes or in the given one;
        `None` without error feedback.
      server: this worker's memory as the server of its part of each leaf: a tree like the values,
        in the dtypes of `worker`, of parts [32, S] with S an M-th of d / 32, rounded up. `None` if
        means come down in full precision. The layout is the same on every platform.
    """

    worker: Any
    server: Any

    def resized(self, num_workers: int, resize_rows: Any) -> "ScaledSignsMemory":
        """The memory of another number of workers, from the rows of all workers.

        Workers' rows are dealt out by `resize_rows`; the servers' parts are cut afresh.
        """
        worker = jax.tree.map(lambda rows: resize_rows(rows, num_workers), self.worker)
        if self.server is None:
            return self._replace(worker=worker)

        def cut_again(own: jax.Array, parts: jax.Array):
            if not parts.size:  # an empty leaf, which has no rows
                return parts
            return cut_leaf(join_leaf(parts, own.shape[1:]), num_workers)

        return ScaledSignsMemory(worker, jax.tree.map(cut_again, self.worker, self.server))


def scaled_signs_memory(
    tree: Any, num_workers: int, *, feedback: Feedback = "both", dtype: Any = None
) -> ScaledSignsMemory:
    """Make the empty memory of one worker, for `pmean_scaled_signs` and `pmean_quantized`.

    Args:
      tree: the values: any pytree of floating-point arrays, or of `jax.ShapeDtypeStruct`.
      num_workers: M, the number of workers.
      feedback: `"both"`, memories of the workers and of the servers; `"worker"`, of the workers
        only; `"none"`.
      dtype: the dtype of the memories; by default each leaf's own.

    Returns:
      A :class:`signax.ScaledSignsMemory` of zeros, the same for every worker.

    Raises:
      ValueError: `feedback` is unknown or `num_workers` is below 1.
      TypeError: a leaf is not real floating-point, or `num_workers` is not a whole number.

    Examples:
      >>> import jax.numpy as jnp, signax
      >>> memory = signax.scaled_signs_memory(jnp.zeros((3, 5)), 4)
      >>> print(memory.worker.shape, memory.server.shape)
      (3, 5) (32, 2)
    """
    check_mode("feedback", feedback, FEEDBACKS)
    check_floating(tree, "tree", only_arrays=False)
    check_count("num_workers", num_workers)

    def zeros(leaf: Any, shape: tuple[int, ...]):
        return jnp.zeros(shape, jnp.result_type(leaf) if dtype is None else dtype)

    worker = server = None
    if feedback != "none":
        worker = jax.tree.map(lambda leaf: zeros(leaf, jnp.shape(leaf)), tree)
    if feedback == "both":
        server = jax.tree.map(
            lambda leaf: zeros(leaf, part_shape(jnp.shape(leaf), num_workers)), tree
        )
    return ScaledSignsMemory(worker, server)


def check_memory(name: str, tree: Any, memory: Any, num_workers: int) -> None:
    """Raise if a memory belongs to other values, or to another number of workers."""
    if not isinstance(memory, ScaledSignsMemory):
        raise TypeError(
            f"memory is of type {type(memory).__name__}: start with signax.scaled_signs_memory, "
            "then pass the memory that the previous step returned"
        )
    if memory.worker is not None:
        remedy = "it must come from scaled_signs_memory on the same values"
        check_alike(name, tree, "memory.worker", memory.worker, remedy)
    if memory.server is None:
        return
    parts = jax.eval_shape(lambda: scaled_signs_memory(tree, num_workers).server)
    structure, expected = jax.tree.structure(memory.server), jax.tree.structure(parts)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(memory.server)]
    wanted = [leaf.shape for leaf in jax.tree.leaves(parts)]
    if structure != expected or shapes != wanted:
        raise ValueError(
            f"memory.server has leaves of shapes {shapes}, but these values need {wanted} for "
            f"{num_workers} workers: it must come from scaled_signs_memory on the "
            "same values and workers, or through DataParallel.resize"
        )


def make_scaled(
    make: Callable[..., ScaledSigns],
    axis_name: Hashable,
    memory: ScaledSignsMemory,
    block: Literal["leaf"] | int,
    decay: Any,
) -> ScaledSigns:
    """Check the options, and build a codec from them by `make`, such as `ScaledSigns`."""
    check_axis_name(axis_name)
    block = check_block(block, ("leaf",))
    check_number("decay", decay, low=0, high=1, ends="[]")
    worker_index(axis_name)  # raises if the axis is not bound
    return make(
        num_workers=lax.axis_size(axis_name),
        length=None if block == "leaf" else block,
        compresses_reply=getattr(memory, "server", None) is not None,
        decay=decay,
    )


def exchange_with_memory(
    tree: Any,
    codec: ScaledSigns,
    axis_name: Hashable,
    memory: ScaledSignsMemory,
    *,
    step: Array | int,
    active: Array | bool | None,
    specs: Sequence[PartitionSpec] | None = None,
    name: str = "updates",
) -> tuple[Outcome, ScaledSignsMemory]:
    """Exchange values plus memories, and return the outcome and the new memory.

    A worker that does not take part keeps its memory. A server does too, where nobody takes part.
    """
    check_votable(tree, axis_name, name=name)
    check_memory(name, tree, memory, codec.num_workers)
    if memory.server is not None and any(spec_axes(spec) for spec in specs or ()):
        raise ValueError(
            "feedback='both' does not take leaves that are sharded within a worker, as "
            f"param_specs shards them, {specs!r}: use feedback='worker'"
        )
    values = tree
    if memory.worker is not None:
        with jax.named_scope("signax.momentum"):
            values = jax.tree.map(partial(add_memory, decay=codec.decay), tree, memory.worker)
    outcome = exchange(
        values,
        codec,
        Route(axis_name),
        step=step,
        active=active,
        memory=jax.tree.leaves(memory.server),
        specs=specs,
        like=tree,
        name=name,
    )
    structure = jax.tree.structure(tree)
    if memory.worker is not None:
        kept = jax.tree.leaves(memory.worker)
        with jax.named_scope("signax.momentum"):
            left = [
                jnp.where(outcome.participates, new, old)
                for new, old in zip(outcome.residual, kept, strict=True)
            ]
        memory = memory._replace(worker=structure.unflatten(left))
    if memory.server is not None:
        memory = memory._replace(server=structure.unflatten(outcome.memory))
    return outcome, memory
