"""Error feedback on the wire: the memories of workers and servers, around an exchange."""

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from signax._core.checks import (
    check_accumulator_dtype,
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
    specs_like,
    typed_spec,
    worker_index,
)
from signax._wire.exchange import exchange
from signax._wire.parts import cut_blocks, device_blocks, join_blocks, server_shape, server_spec
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
        in the dtypes of `worker`, of parts [32, S]. S is an M-th of d / 32, rounded up to an even
        number, and d may be padded by up to a 64th before. `None` if means come down in full
        precision. The layout is the same on every platform. If a leaf is sharded within a worker,
        a server has a part of each device's block, and its memory of the leaf is
        [n1, n2, ..., 32, S] with n1 x n2 x ... blocks along the leaf's dimensions.
    """

    worker: Any
    server: Any

    def resized(
        self, num_workers: int, resize_rows: Any, like: "ScaledSignsMemory | None" = None
    ) -> "ScaledSignsMemory":
        """The memory of another number of workers, from the rows of all workers.

        Workers' rows are dealt out by `resize_rows`; the servers' parts are cut again, from blocks
        as in the shapes of `like`, by default from the same blocks.
        """
        worker = jax.tree.map(lambda rows: resize_rows(rows, num_workers), self.worker)
        if self.server is None:
            return self._replace(worker=worker)

        def cut_again(own: jax.Array, parts: jax.Array, wanted: Any):
            if not parts.size:  # an empty leaf, which has no rows
                return parts
            blocks = parts.shape[1:-2] if like is None else wanted.shape[:-2]
            return cut_blocks(join_blocks(parts, own.shape[1:]), blocks, num_workers)

        wanted = self.server if like is None else like.server
        return ScaledSignsMemory(worker, jax.tree.map(cut_again, self.worker, self.server, wanted))


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
      ValueError: `feedback` is unknown, `num_workers` is below 1, or `dtype` is no floating-point
        dtype.
      TypeError: a leaf is not real floating-point, or `num_workers` is not a whole number.

    Examples:
      >>> import jax.numpy as jnp, signax
      >>> memory = signax.scaled_signs_memory(jnp.zeros((3, 5)), 4)
      >>> print(memory.worker.shape, memory.server.shape)
      (3, 5) (32, 2)
    """
    check_mode("feedback", feedback, FEEDBACKS)
    check_accumulator_dtype(dtype, "dtype")
    check_floating(tree, "tree", only_arrays=False)
    check_count("num_workers", num_workers)

    def zeros(leaf: Any, shape: tuple[int, ...]):
        return jnp.zeros(shape, jnp.result_type(leaf) if dtype is None else dtype)

    worker = server = None
    if feedback != "none":
        worker = jax.tree.map(lambda leaf: zeros(leaf, jnp.shape(leaf)), tree)
    if feedback == "both":
        server = jax.tree.map(
            lambda leaf: zeros(leaf, server_shape(jnp.shape(leaf), (), num_workers)), tree
        )
    return ScaledSignsMemory(worker, server)


class _Sharding(NamedTuple):
    """How parameters are sharded within a worker.

    Attributes:
      structure: the structure of the parameters.
      specs: their partition specs.
      sizes: the names and sizes of the mesh's axes.
    """

    structure: Any
    specs: tuple[PartitionSpec, ...]
    sizes: tuple[tuple[Hashable, int], ...]


# Optax's `init` gets the parameters alone, and their types do not name Auto axes. JAX traces a
# function again where this context has another value.
_sharding = jax.make_user_context(None)


def with_specs(
    init: Callable[[Any], Any], specs: Any, sizes: Mapping[Hashable, int]
) -> Callable[[Any], Any]:
    """Let `init` know how parameters are sharded within a worker, on a mesh of these sizes.

    Servers then have a memory of each device's block.
    """
    leaves, structure = jax.tree.flatten(specs)
    if not any(map(spec_axes, leaves)):
        return init
    sharding = _Sharding(structure, tuple(leaves), tuple(sizes.items()))

    def init_with_specs(params: Any):
        with _sharding(sharding):
            return init(params)

    return init_with_specs


def init_memory(
    params: Any, num_workers: int, *, feedback: Feedback, dtype: Any
) -> ScaledSignsMemory:
    """`scaled_signs_memory` in `init`, which `with_specs` lets know of sharded parameters."""
    memory = scaled_signs_memory(params, num_workers, feedback=feedback, dtype=dtype)
    sharding = _sharding.value
    if sharding is None or memory.server is None:
        return memory
    specs = specs_like(params, sharding.structure.unflatten(sharding.specs))

    def zeros(own: jax.Array, spec: PartitionSpec):
        blocks = device_blocks(own, spec, dict(sharding.sizes))
        return jnp.zeros(server_shape(own.shape, blocks, num_workers), own.dtype)

    return memory._replace(server=jax.tree.map(zeros, memory.worker, specs))


def memory_specs(state: Any, state_specs: Any, specs: Any, sizes: Mapping[Hashable, int]) -> Any:
    """The specs of a state's leaves, with the specs of servers' memories put right.

    `specs` shards the parameters within a worker, on a mesh of these sizes.
    """

    def put_right(node: Any, found: Any):
        if not _is_memory(node) or node.server is None:
            return found
        own_specs = specs_like(node.worker, specs)
        of_server = partial(server_spec, sizes=sizes)
        return found._replace(server=jax.tree.map(of_server, node.worker, own_specs))

    return jax.tree.map(put_right, state, state_specs, is_leaf=_is_memory)


def found_memories(state: Any, rows: Any, num_workers: int) -> Any:
    """A state's shapes, but with servers' memories as in `rows`, which has M rows of each.

    Those may be of other devices' blocks. Any other shape stays as it is.
    """

    def of_server(own: Any, part: Any, found: Any):
        blocks = jnp.shape(found)[1:-2]
        if len(blocks) not in (0, own.ndim) or any(map(operator.mod, own.shape, blocks)):
            return part
        shape = server_shape(own.shape, blocks, num_workers)
        return jax.ShapeDtypeStruct(shape if own.size else part.shape, part.dtype)

    def replace(node: Any, found: Any):
        if not _is_memory(node) or node.server is None:
            return node
        server = jax.tree.map(of_server, node.worker, node.server, found.server)
        return node._replace(server=server)

    return jax.tree.map(replace, state, rows, is_leaf=_is_memory)


def _is_memory(node: Any) -> bool:
    return isinstance(node, ScaledSignsMemory)


def check_memory(
    name: str, tree: Any, memory: Any, num_workers: int, specs: Sequence[PartitionSpec]
) -> None:
    """Raise if a memory belongs to other values, number of workers, or specs of the values."""
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
    leaves, sizes = jax.tree.leaves(tree), jax.sharding.get_abstract_mesh().shape
    blocks = [device_blocks(*both, sizes) for both in zip(leaves, specs, strict=True)]
    structure, expected = jax.tree.structure(memory.server), jax.tree.structure(tree)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(memory.server)]
    wanted = [
        server_shape(leaf.shape, counts, num_workers)
        for leaf, counts in zip(leaves, blocks, strict=True)
    ]
    if structure == expected and shapes == wanted:
        return
    remedy = (
        "it must come from scaled_signs_memory on the same values and workers, or through "
        "DataParallel.resize"
    )
    if any(blocks):
        remedy = (
            f"the values are sharded within a worker, as {[*specs]}. DataParallel.init makes such "
            "a memory. In your own shard_map map over these axes too"
        )
    raise ValueError(
        f"memory.server has leaves of shapes {shapes}, but these values need {wanted} for "
        f"{num_workers} workers: {remedy}"
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
    leaves, sizes = jax.tree.leaves(tree), jax.sharding.get_abstract_mesh().shape
    specs = [*map(typed_spec, leaves)] if specs is None else specs
    check_memory(name, tree, memory, codec.num_workers, specs)
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
        memory_specs=[server_spec(*both, sizes) for both in zip(leaves, specs, strict=True)],
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
