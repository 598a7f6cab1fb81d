"""The layout of a state on a mesh: which leaves every worker has of its own."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from signax._core.checks import check_axis_name, check_transformation
from signax._core.leaves import axis_names
from signax._data_parallel.varying import has_conditional_collective, varying_outputs
from signax._wire.feedback import found_memories, memory_specs, with_specs

PerWorker = Callable[[str, jax.ShapeDtypeStruct], bool | None]


class Leaf(NamedTuple):
    """One leaf of a state.

    Attributes:
      path: its path in the state, as `jax.tree_util.keystr` writes it.
      shape: its shape on one worker.
      dtype: its dtype.
      per_worker: whether every worker has its own, a row of the global array.
      sharding: the global array's sharding.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    per_worker: bool
    sharding: NamedSharding


class Layout(NamedTuple):
    """The layout of a state on a mesh.

    Attributes:
      structure: the structure of the state.
      leaves: its leaves.
      is_conditional: whether an update votes or averages under a condition.
    """

    structure: Any
    leaves: list[Leaf]
    is_conditional: bool


def find_layout(
    tx: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
    axis_name: Hashable,
    override: PerWorker | None,
    structure: Any,
    shapes: Sequence[tuple[tuple[int, ...], Any]],
    specs: Sequence[PartitionSpec] | None,
    num_workers: int,
) -> Layout:
    """The layout of the state of `tx` for a number of workers.

    Parameters have the given structure, and their leaves the given shapes, dtypes and specs. Rows
    of another number of workers are sharded if the mesh's workers can share them evenly. Which
    leaves are per worker does not depend on that number, so `tx` need not support it.
    """
    params = structure.unflatten([jax.ShapeDtypeStruct(*shape) for shape in shapes])
    param_specs = None if specs is None else structure.unflatten(specs)
    sizes = dict(mesh.shape)
    first, *others = axis_names(axis_name)
    on_mesh = math.prod(sizes[axis] for axis in axis_names(axis_name))
    state, found, is_conditional = _find_per_worker(tx, params, axis_name, sizes)
    if num_workers != on_mesh:
        sizes |= {first: num_workers, **dict.fromkeys(others, 1)}
    init = with_specs(tx.init, param_specs, sizes)
    if num_workers != on_mesh or init is not tx.init:
        _, state = _trace_init(init, params, sizes)
    rows = axis_name if num_workers % on_mesh == 0 else None
    paths, state_structure = jax.tree.flatten_with_path(state)
    leaves = []
    for (path, leaf), per_worker, spec in zip(
        paths, found, _state_specs(state, params, param_specs, sizes), strict=True
    ):
        name = jax.tree_util.keystr(path)
        wanted = None if override is None else override(name, leaf)
        per_worker = bool(per_worker if wanted is None else wanted)
        sharding = NamedSharding(mesh, PartitionSpec(rows, *spec) if per_worker else spec)
        leaves.append(Leaf(name, leaf.shape, leaf.dtype, per_worker, sharding))
    return Layout(state_structure, leaves, is_conditional)


def found_layout(layout: Layout, rows: list[Any], num_workers: int) -> Layout:
    """The layout that the leaves of a state have, with this number of rows.

    It differs from `layout` in servers' memories of parameters that were sharded otherwise.
    """
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in layout.leaves]
    tree = layout.structure.unflatten
    found = jax.tree.leaves(found_memories(tree(shapes), tree(rows), num_workers))

    def as_found(leaf: Leaf, shape: tuple[int, ...]):
        if shape == leaf.shape:
            return leaf
        over_rows = PartitionSpec(*leaf.sharding.spec[:1])
        return leaf._replace(shape=shape, sharding=NamedSharding(leaf.sharding.mesh, over_rows))

    pairs = zip(layout.leaves, found, strict=True)
    leaves = [as_found(leaf, other.shape) for leaf, other in pairs]
    return layout if leaves == layout.leaves else layout._replace(leaves=leaves)


def state_specs(
    tx: optax.GradientTransformation,
    params: optax.Params,
    axis_name: Hashable,
    axis_sizes: Mapping[Hashable, int],
) -> Any:
    """Find the partition specs of a state, for a `jax.shard_map` of your own.

    A leaf needs one row per worker if an update makes the leaf differ between workers.
    :class:`signax.DataParallel` lays out its state by this rule too.

    Args:
      tx: a transformation with a vote or a mean over `axis_name` in it.
      params: the parameters, a tree of arrays or of `jax.ShapeDtypeStruct`.
      axis_name: the mapped axis along which the workers lie, or a tuple of axes.
      axis_sizes: the sizes of all mapped axes, such as `dict(mesh.shape)`.

    Returns:
      A tree of `jax.sharding.PartitionSpec` with the structure of the state. Leaves that need one
      row per worker have `PartitionSpec(axis_name)`, and leaves that all workers share have
      `PartitionSpec()`.

    Raises:
      ValueError: `axis_sizes` lacks the axis, or a vote runs under a condition that differs between
        workers.
      TypeError: `tx` is not a transformation or requires an extra argument, or `axis_name` names no
        axis.

    Examples:
      >>> import jax, jax.numpy as jnp, signax
      >>> tx = signax.scale_by_signum()
      >>> specs = signax.state_specs(tx, jnp.zeros(3), "data", {"data": 8})
      >>> print(specs.momentum == jax.P("data"), specs.count == jax.P())
      True True
    """
    check_transformation("tx", tx)
    check_axis_name(axis_name)
    for axis in axis_names(axis_name):
        if axis not in axis_sizes:
            raise ValueError(f"axis_sizes={axis_sizes!r} lacks {axis!r}: pass dict(mesh.shape)")
    tx = optax.with_extra_args_support(tx)
    state, found, _ = _find_per_worker(tx, params, axis_name, dict(axis_sizes))
    rows, whole = PartitionSpec(axis_name), PartitionSpec()
    return jax.tree.structure(state).unflatten([rows if own else whole for own in found])


def _trace_init(
    init: Callable[[Any], Any], params: Any, sizes: dict[Hashable, int]
) -> tuple[Any, Any]:
    """The jaxpr of `init` on axes of the given sizes, and the shapes of one worker's state."""
    return jax.make_jaxpr(init, axis_env=list(sizes.items()), return_shape=True)(params)


def _find_per_worker(
    tx: optax.GradientTransformationExtraArgs,
    params: Any,
    axis_name: Hashable,
    sizes: dict[Hashable, int],
) -> tuple[Any, list[bool], bool]:
    """The shapes of one worker's state, and which of its leaves differ between workers.

    The last result says whether an update has a collective under a condition.
    """
    init, state = _trace_init(tx.init, params, sizes)
    try:
        update = jax.make_jaxpr(tx.update, axis_env=list(sizes.items()))(params, state, params)
    except TypeError as error:
        if "unexpected keyword argument" in str(error):
            raise TypeError(
                f"a part of tx takes extra arguments, but not all of them ({error}): Optax wants a "
                "GradientTransformationExtraArgs to accept any, by **extra_args"
            ) from error
        if "required keyword-only argument" not in str(error):
            raise
        raise TypeError(
            f"tx requires an extra argument ({error}), but DataParallel traces it without any, to "
            "find the state that is per worker: give every extra argument a default"
        ) from error
    num_params = len(jax.tree.leaves(params))
    per_worker = [False] * len(jax.tree.leaves(state))
    for axis in axis_names(axis_name):
        varying = varying_outputs(init.jaxpr, [False] * num_params, axis)
        while True:  # iterate to a fixed point
            inputs = [True] * num_params + varying + [False] * num_params
            outputs = varying_outputs(update.jaxpr, inputs, axis)[num_params:]
            grown = [old or new for old, new in zip(varying, outputs, strict=True)]
            if grown == varying:
                break
            varying = grown
        per_worker = [known or found for known, found in zip(per_worker, varying, strict=True)]
    is_conditional = any(
        has_conditional_collective(update.jaxpr, axis) for axis in axis_names(axis_name)
    )
    return state, per_worker, is_conditional


def _state_specs(
    state: Any, params: Any, param_specs: Any, sizes: Mapping[Hashable, int]
) -> list[PartitionSpec]:
    """Shard each state leaf over further axes like the parameter of the same path and shape.

    A momentum's path ends with its parameter's path. `optax.tree.map_params` would not do: it calls
    `init` with a placeholder, which functions of parameters, as for `optax.partition`, cannot take
    apart. A server's memory of a sharded parameter has parts of each device's block.
    """
    whole = PartitionSpec()
    if param_specs is None:
        return [whole for _ in jax.tree.leaves(state)]
    paths = jax.tree.leaves_with_path(params)
    by_path = {
        _names(path): (leaf.shape, spec)
        for (path, leaf), spec in zip(paths, jax.tree.leaves(param_specs), strict=True)
    }

    def spec_of(path: Any, leaf: Any) -> PartitionSpec:
        names = _names(path)
        ends = (names[start:] for start in range(len(names) + 1))
        shape, spec = next((by_path[end] for end in ends if end in by_path), (None, whole))
        return spec if leaf.shape == shape else whole

    specs = jax.tree.map_with_path(spec_of, state)
    return jax.tree.leaves(memory_specs(state, specs, param_specs, sizes))


def _names(path: Any) -> tuple[str, ...]:
    return tuple([str(key) for key in path])
