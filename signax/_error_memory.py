"""What compression has left out so far, of workers and of the servers of parts."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from signax._checks import check_alike, check_count, check_floating, check_mode
from signax._parts import cut, join, part_shape
from signax._resize import resize_rows

Feedback = Literal["both", "worker", "none"]

FEEDBACKS = ("both", "worker", "none")


class ScaledSignsMemory(NamedTuple):
    """What compression has left out so far, in the units of the values.

    Attributes:
      worker: this worker's own, a tree like the values; `None` without error feedback.
      server: what this worker keeps as the server of its part of each leaf, a tree like the values
        of such parts, each f[32, S] with S an M-th of d / 32, rounded up; `None` if means come down
        in full precision. It is the same on every platform.
    """

    worker: Any
    server: Any

    def resized(self, num_workers: int) -> "ScaledSignsMemory":
        """The memory of another number of workers, from rows of all: the servers' is cut anew."""
        worker = jax.tree.map(lambda rows: resize_rows(rows, num_workers), self.worker)
        if self.server is None:
            return self._replace(worker=worker)

        def cut_anew(own, parts):
            if not parts.size:  # nothing that workers could differ in, and so without rows
                return parts
            return cut(join(parts, own.shape[1:]), num_workers)

        return ScaledSignsMemory(worker, jax.tree.map(cut_anew, self.worker, self.server))


def scaled_signs_memory(
    tree: Any, num_workers: int, *, feedback: Feedback = "both", dtype: Any = None
) -> ScaledSignsMemory:
    """The empty memory of one worker for `pmean_scaled_signs`.

    Args:
      tree: the values, or anything of their shapes and dtypes.
      num_workers: M, the number of workers.
      feedback: `"both"`, memories of the workers and of the servers; `"worker"`, of the workers
        only; `"none"`.
      dtype: of the memories; by default each leaf's own.

    Returns:
      Zeros, the same for every worker.

    Raises:
      ValueError: `feedback` is unknown or `num_workers` below 1.
      TypeError: a leaf is not real floating-point, or `num_workers` no whole number.

    Examples:
      >>> import jax.numpy as jnp, signax
      >>> memory = signax.scaled_signs_memory(jnp.zeros((3, 5)), 4)
      >>> print(memory.worker.shape, memory.server.shape)
      (3, 5) (32, 2)
    """
    check_mode("feedback", feedback, FEEDBACKS)
    check_floating(tree, "tree", only_arrays=False)
    check_count("num_workers", num_workers)

    def zeros(leaf, shape):
        return jnp.zeros(shape, jnp.result_type(leaf) if dtype is None else dtype)

    worker = server = None
    if feedback != "none":
        worker = jax.tree.map(lambda leaf: zeros(leaf, jnp.shape(leaf)), tree)
    if feedback == "both":
        server = jax.tree.map(
            lambda leaf: zeros(leaf, part_shape(jnp.shape(leaf), num_workers)), tree
        )
    return ScaledSignsMemory(worker, server)


def check_memory(name: str, tree: Any, memory: ScaledSignsMemory, num_workers: int) -> None:
    """Refuses a memory of other values than the tree's or of another number of workers."""
    if not isinstance(memory, ScaledSignsMemory):
        raise TypeError(
            f"memory is of type {type(memory).__name__}: start with signax.scaled_signs_memory, "
            "then pass what the step before returned"
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
            f"memory.server has leaves of shapes {shapes}, but those of these values for "
            f"{num_workers} workers are {wanted}: it must come from scaled_signs_memory on the "
            "same values and workers, or through DataParallel.resize"
        )
