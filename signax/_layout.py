"""How the state of a transformation lies on a mesh: which leaves each worker has of its own."""

import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from signax._specs import axis_names, is_masked, spec_unless_masked
from signax._variance import has_conditional_collective, varying_outputs

PerWorker = Callable[[str, jax.ShapeDtypeStruct], bool | None]


class Leaf(NamedTuple):
    """One leaf of a state.

    Attributes:
      path: its place in the state, for messages.
      shape: its shape on one worker.
      dtype: its dtype.
      per_worker: whether every worker has its own, one row of the global array each.
      sharding: the global array's sharding.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    per_worker: bool
    sharding: NamedSharding


class Layout(NamedTuple):
    """How a state lies on a mesh.

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
    params: Any,
    param_specs: Any,
    mesh: Mesh,
    axis_name: Hashable,
    num_workers: int,
    override: PerWorker | None,
) -> Layout:
    """The layout of the state of `tx` for parameters of the given shapes and specs.

    Rows of another number of workers than the mesh has are sharded where they can be shared out.
    Which leaves are per worker does not depend on that number, so `tx` need not support it.
    """
    sizes = dict(mesh.shape)
    first, *others = axis_names(axis_name)
    on_mesh = math.prod(sizes[axis] for axis in axis_names(axis_name))
    state, found, is_conditional = _find_per_worker(tx, params, axis_name, sizes)
    if num_workers != on_mesh:
        sizes |= {first: num_workers, **dict.fromkeys(others, 1)}
        _, state = _trace_init(tx, params, sizes)
    rows = axis_name if num_workers % on_mesh == 0 else None
    shapes, structure = jax.tree.flatten_with_path(state)
    leaves = []
    for (path, leaf), per_worker, spec in zip(
        shapes, found, _state_specs(tx, state, params, param_specs), strict=True
    ):
        name = jax.tree_util.keystr(path)
        wanted = override(name, leaf) if override is not None else None
        if wanted if wanted is not None else per_worker:
            sharding = NamedSharding(mesh, PartitionSpec(rows, *spec))
            leaves.append(Leaf(name, leaf.shape, leaf.dtype, True, sharding))
        else:
            sharding = NamedSharding(mesh, spec)
            leaves.append(Leaf(name, leaf.shape, leaf.dtype, False, sharding))
    return Layout(structure, leaves, is_conditional)


def _trace_init(tx: Any, params: Any, sizes: dict[Hashable, int]) -> tuple[Any, Any]:
    """The jaxpr of `init` on axes of the given sizes, and the shapes of one worker's state."""
    return jax.make_jaxpr(tx.init, axis_env=list(sizes.items()), return_shape=True)(params)


def _find_per_worker(
    tx: optax.GradientTransformationExtraArgs,
    params: Any,
    axis_name: Hashable,
    sizes: dict[Hashable, int],
) -> tuple[Any, list[bool], bool]:
    """The shapes of one worker's state, and which of its leaves differ between the workers.

    And whether an update has a collective under a condition.
    """
    init, state = _trace_init(tx, params, sizes)
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
            f"tx insists on an extra argument ({error}), but DataParallel must trace it with none "
            "to find out which state is per worker: give the argument a default"
        ) from error
    num_params = len(jax.tree.leaves(params))
    per_worker = [False] * len(jax.tree.leaves(state))
    for axis in axis_names(axis_name):
        varying = varying_outputs(init.jaxpr, [False] * num_params, axis)
        while True:  # until the state that comes out differs nowhere that the one going in does not
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


def _state_specs(tx: Any, state: Any, params: Any, param_specs: Any) -> list[PartitionSpec]:
    """How each state leaf is sharded over further axes: like a parameter of the same shape."""
    whole = PartitionSpec()
    if param_specs is None:
        return [whole for _ in jax.tree.leaves(state)]

    def spec_of(node, param, spec):
        alike = is_masked(node) or node.shape == param.shape
        return spec_unless_masked(node, spec if alike else whole)

    specs = optax.tree.map_params(
        tx,
        spec_of,
        state,
        params,
        param_specs,
        transform_non_params=lambda node: spec_unless_masked(node, whole),
        is_leaf=is_masked,
    )
    return jax.tree.leaves(specs)


def rows_in(state: Any, layout: Layout, num_workers: int) -> int:
    """The number of workers that a state has rows for; `num_workers` if it has none."""
    _check_structure(state, layout)
    for leaf, place in zip(jax.tree.leaves(state), layout.leaves, strict=True):
        if place.per_worker:
            shape = jnp.shape(leaf)
            if not shape or shape[1:] != place.shape:
                raise _wrong_shape(place, shape, (num_workers, *place.shape))
            return shape[0]
    return num_workers


def check_state(state: Any, layout: Layout, num_workers: int) -> None:
    """Refuses a state of other parameters, or of another number of workers."""
    rows = rows_in(state, layout, num_workers)
    if rows != num_workers:
        path = next(place.path for place in layout.leaves if place.per_worker)
        raise ValueError(
            f"state{path} has rows for {rows} workers, but there are {num_workers}: "
            f"DataParallel.resize(state, params) makes a state of {num_workers}"
        )
    for leaf, place in zip(jax.tree.leaves(state), layout.leaves, strict=True):
        expected = (num_workers, *place.shape) if place.per_worker else place.shape
        if jnp.shape(leaf) != expected:
            raise _wrong_shape(place, jnp.shape(leaf), expected)


def _check_structure(state: Any, layout: Layout) -> None:
    structure = jax.tree.structure(state)
    if structure != layout.structure:
        raise ValueError(
            f"state and params do not belong together: state is {structure}, but that of these "
            f"params is {layout.structure}; make it with init on the same parameters"
        )


def _wrong_shape(place: Leaf, shape: Any, expected: Any) -> ValueError:
    return ValueError(
        f"state{place.path} has shape {shape}, but should have {expected}: make the state with "
        "DataParallel.init, on the same parameters"
    )
