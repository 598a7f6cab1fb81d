"""Where arrays lie on a mesh: rows of workers, parameters, and the states of a transformation."""

import math
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from signax._core.checks import check_axis_name
from signax._core.leaves import (
    axis_names,
    entry_axes,
    explicit_axes,
    spec_axes,
    varying_axes,
    wide_dtype,
)
from signax._data_parallel.boxes import first_difference, leaves_by_path
from signax._data_parallel.layout import Layout, Leaf

# Gets a leaf, and the mesh axes of each dimension of its array.
Report = Callable[[Leaf, Sequence[tuple[Hashable, ...]]], None]


class Workers(NamedTuple):
    """The workers of a mesh.

    Attributes:
      mesh: a mesh that has their axis.
      axis_name: the axis along which they lie, or a tuple of axes.
      num_workers: their number.
      explicit: the axes of type Explicit, over which types track the sharding of arrays.
      inside: the Explicit axes within a worker.
      param_specs: how parameters are sharded over further axes, where types do not say it.
    """

    mesh: Mesh
    axis_name: Hashable
    num_workers: int
    explicit: frozenset[Hashable]
    inside: frozenset[Hashable]
    param_specs: Any

    @classmethod
    def find(cls, mesh: Any, axis_name: Hashable, param_specs: Any) -> "Workers":
        """The workers along an axis of a mesh; raises if the mesh has no such axis."""
        check_axis_name(axis_name)
        if not isinstance(mesh, Mesh):
            raise TypeError(f"mesh={mesh!r} is not a jax.sharding.Mesh: jax.make_mesh makes one")
        for axis in axis_names(axis_name):
            if axis not in mesh.axis_names:
                raise ValueError(
                    f"axis_name={axis_name!r}: {axis!r} is not an axis of the mesh, which has "
                    f"{mesh.axis_names}"
                )
        _check_param_specs(param_specs, mesh, axis_name)
        num_workers = math.prod([mesh.shape[axis] for axis in axis_names(axis_name)])
        explicit = explicit_axes(mesh)
        if 0 < len(explicit & {*axis_names(axis_name)}) < len(axis_names(axis_name)):
            raise ValueError(
                f"axis_name={axis_name!r} has axes of type Auto and of type Explicit, on a mesh "
                f"with axis_types={mesh.axis_types}: give all axes of the workers one type"
            )
        inside = explicit - {*axis_names(axis_name)}
        return cls(mesh, axis_name, num_workers, explicit, inside, param_specs)

    def shard_map(
        self, function: Callable[..., Any], in_specs: Any, out_specs: Any, check_vma: bool = True
    ) -> Callable[..., Any]:
        """Map a function of one worker over all workers."""
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names={*axis_names(self.axis_name)},
            check_vma=check_vma,
        )

    def mean_of_finite(self, loss: jax.Array) -> jax.Array:
        """The mean over the workers whose loss is finite."""
        finite = jnp.isfinite(loss)
        wide = wide_dtype(loss.dtype)  # a sum in f16 overflows, and a count in bf16 ends at 256
        counted = jnp.where(finite, loss, 0).astype(wide), finite.astype(wide)
        total, number = lax.psum(counted, self.axis_name)
        return (total / number).astype(loss.dtype)

    def row(self, array: Any) -> jax.Array:
        """One worker's row of a global array, typed as varying: [...] to [1, ...]."""
        array = jnp.asarray(array)
        varying = varying_axes(array, self.axis_name)
        missing = tuple([axis for axis in axis_names(self.axis_name) if axis not in varying])
        return add_axis(lax.pcast(array, missing, to="varying") if missing else array)

    def specs(self, params: Any) -> Any:
        """The parameters' specs over the axes within a worker, as given, or else from types."""
        if self.param_specs is None:
            if not self.inside:
                return None
            return jax.tree.map(lambda leaf: _keep_axes(_typed_spec(leaf), self.inside), params)
        structure = jax.tree.structure(params)
        if jax.tree.structure(self.param_specs) == structure:
            return self.param_specs
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
        specs = leaves_by_path(self.param_specs, paths)
        if specs is None:
            raise ValueError(
                "param_specs and params differ in structure: of param_specs, "
                f"{first_difference(self.param_specs, paths)}, unlike params"
            )
        return structure.unflatten(specs)

    def params_like(self, updates: Any) -> Any:
        """The shapes of the parameters, from rows of updates."""

        def without_row(row: Any):
            sharding = NamedSharding(self.mesh, PartitionSpec(*_typed_spec(row)[1:]))
            return jax.ShapeDtypeStruct(row.shape[1:], row.dtype, sharding=sharding)

        return jax.tree.map(without_row, updates)

    def reshard(self, tree: Any, *, per_worker: bool = False) -> Any:
        """Lay arrays out as Explicit axes demand, with rows over the workers' axis."""
        if not self.explicit:
            return jax.tree.map(jnp.asarray, tree)

        axes = axis_names(self.axis_name) if per_worker else ()
        rows = tuple([axis for axis in axes if axis in self.explicit])

        def reshard_leaf(leaf: Any):
            leaf = jnp.asarray(leaf)
            spec = PartitionSpec(*[None] * leaf.ndim)
            if self.inside:
                spec = _keep_axes(jax.typeof(leaf).sharding.spec, self.inside)
            if rows:
                spec = PartitionSpec((*rows, *entry_axes(spec[0])), *spec[1:])
            return jax.sharding.reshard(leaf, NamedSharding(self.mesh, spec))

        return jax.tree.map(reshard_leaf, tree)

    def reshard_state(self, leaves: list[Any], layout: Layout, report: Report) -> list[Any]:
        """Lay a state's leaves out; report rows whose types show that they lie elsewhere."""
        axes = {*axis_names(self.axis_name)}
        if self.num_workers > 1 and axes <= self.explicit:
            for array, leaf in zip(leaves, layout.leaves, strict=True):
                sharding = jax.typeof(array).sharding
                if not (leaf.per_worker and array.size) or sharding.mesh.empty:
                    continue
                if not axes <= {*entry_axes(sharding.spec[0])}:
                    report(leaf, [entry_axes(entry) for entry in sharding.spec])
        return [
            self.reshard(array, per_worker=leaf.per_worker)
            for array, leaf in zip(leaves, layout.leaves, strict=True)
        ]

    def reshard_params(self, params: Any) -> Any:
        """Lay parameters out as `param_specs` says, if it is given."""
        if params is None or self.param_specs is None or not self.explicit:
            return self.reshard(params)

        def reshard_leaf(leaf: Any, spec: PartitionSpec):
            sharding = NamedSharding(self.mesh, _keep_axes(spec, self.explicit))
            return jax.sharding.reshard(leaf, sharding)

        return jax.tree.map(reshard_leaf, params, self.specs(params))

    def constrain(self, tree: Any, specs: Any) -> Any:
        """Constrain the output of a step to the next step's input shardings."""
        if self.param_specs is None or self.explicit:
            return tree

        def constrain_leaf(leaf: Any, spec: PartitionSpec):
            return lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, spec))

        return jax.tree.map(constrain_leaf, tree, specs)

    def check_rows(self, updates: Any, params: Any) -> None:
        """Raise if updates do not have one row like the parameters for each worker."""
        expected = None if params is None else jax.tree.leaves(params)
        if expected is not None and jax.tree.structure(updates) != jax.tree.structure(params):
            raise ValueError(
                f"updates and params differ in structure: updates is {jax.tree.structure(updates)},"
                f" params is {jax.tree.structure(params)}"
            )
        for position, (path, leaf) in enumerate(jax.tree.leaves_with_path(updates)):
            shape = jnp.shape(leaf)
            rest = shape[1:] if expected is None else jnp.shape(expected[position])
            if shape != (self.num_workers, *rest):
                raise ValueError(
                    f"updates{jax.tree_util.keystr(path)} has shape {shape}, but needs one row for "
                    f"each of {self.num_workers} workers, {(self.num_workers, *rest)}: use the "
                    "gradients of DataParallel.value_and_grad, which are not yet averaged"
                )

    def check_active(self, active: Any) -> None:
        """Raise if a value is not one boolean for each worker."""
        if active is None:
            return
        right_dtype = getattr(active, "dtype", None) == jnp.bool_
        if not right_dtype or active.shape != (self.num_workers,):
            raise TypeError(
                f"active={active!r} must be an array of one boolean for each of "
                f"{self.num_workers} workers"
            )

    def check_replicated(self, updates: Any) -> None:
        """Raise if types know that updates differ between the workers."""
        for path, leaf in jax.tree.leaves_with_path(updates):
            if varying_axes(leaf, self.axis_name):
                raise ValueError(
                    f"updates{jax.tree_util.keystr(path)} is neither voted nor averaged over "
                    f"{self.axis_name!r}, so its parameters would differ between workers: put "
                    f"signax.majority_vote({self.axis_name!r}) or "
                    f"signax.average_updates({self.axis_name!r}) into tx. To freeze leaves, use "
                    "signax.freeze() instead of optax.set_to_zero(), or freeze after the vote"
                )


class Layouts:
    """The layouts of a transformation's states, found once for parameters of the same shapes."""

    def __init__(self, workers: Workers, find: Callable[..., Layout]):
        self._workers = workers
        self._find = cache(find)

    def __call__(self, params: Any, num_workers: int | None = None) -> Layout:
        """The layout of the state of some parameters, for some number of workers."""
        specs = self._workers.specs(params)
        leaves, structure = jax.tree.flatten(params)
        shapes = tuple([(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves])
        specs = None if specs is None else tuple(jax.tree.leaves(specs))
        return self._find(structure, shapes, specs, num_workers or self._workers.num_workers)


def add_axis(array: Any) -> jax.Array:
    """A row of one worker: [...] to [1, ...]."""
    return jnp.asarray(array)[None]


def _keep_axes(spec: PartitionSpec, axes: frozenset[Hashable]) -> PartitionSpec:
    """A spec without the axes that are not in `axes`."""
    entries = [tuple([axis for axis in entry_axes(entry) if axis in axes]) for entry in spec]
    return PartitionSpec(*[entry or None for entry in entries])


def _typed_spec(array: Any) -> PartitionSpec:
    """The spec in an array's type, which names Explicit axes only."""
    return jax.typeof(array).sharding.spec


def _check_param_specs(specs: Any, mesh: Mesh, axis_name: Hashable) -> None:
    """Raise if a spec is not a `PartitionSpec`, or shards a parameter over the workers' axis."""
    for path, spec in jax.tree.leaves_with_path(specs):
        name = f"param_specs{jax.tree_util.keystr(path)}"
        if not isinstance(spec, PartitionSpec):
            raise TypeError(f"{name}={spec!r} is not a jax.sharding.PartitionSpec")
        for axis in spec_axes(spec):
            if axis in axis_names(axis_name):
                raise ValueError(
                    f"{name}={spec} shards a parameter over {axis_name!r}, the workers' own axis: "
                    "every worker holds all the parameters that it votes on"
                )
            if axis not in mesh.axis_names:
                raise ValueError(f"{name}={spec} names {axis!r}; the mesh has {mesh.axis_names}")


def state_leaves(state: Any, layout: Layout) -> list[Any]:
    """The leaves of a state. Raises if the state belongs to other parameters."""
    if jax.tree.structure(state) == layout.structure:
        return jax.tree.leaves(state)
    paths = [leaf.path for leaf in layout.leaves]
    leaves = leaves_by_path(state, paths)
    if leaves is None:
        raise ValueError(
            "state and params do not belong together: of the state, "
            f"{first_difference(state, paths)}. Make it with DataParallel.init on the same "
            "parameters, or restore a checkpoint into DataParallel.abstract_state(params)"
        )
    return leaves


def rows_in(state: Any, layout: Layout, num_workers: int) -> int:
    """The number of workers that a state has rows for; `num_workers` if it has no rows."""
    for array, leaf in zip(state_leaves(state, layout), layout.leaves, strict=True):
        if leaf.per_worker:
            shape = jnp.shape(array)
            if not shape or shape[1:] != leaf.shape:
                raise _wrong_shape(leaf, shape, (num_workers, *leaf.shape))
            return shape[0]
    return num_workers


def check_state(state: Any, layout: Layout, num_workers: int) -> None:
    """Raise if a state belongs to other parameters, or to another number of workers."""
    rows = rows_in(state, layout, num_workers)
    if rows != num_workers:
        path = next(leaf.path for leaf in layout.leaves if leaf.per_worker)
        raise ValueError(
            f"state{path} has rows for {rows} workers, but there are {num_workers}: "
            f"DataParallel.resize (or DiLoCo.resize) makes a state of {num_workers}"
        )
    for array, leaf in zip(state_leaves(state, layout), layout.leaves, strict=True):
        expected = (num_workers, *leaf.shape) if leaf.per_worker else leaf.shape
        if jnp.shape(array) != expected:
            raise _wrong_shape(leaf, jnp.shape(array), expected)


def _wrong_shape(leaf: Leaf, shape: Any, expected: Any) -> ValueError:
    return ValueError(
        f"state{leaf.path} has shape {shape}, but should have {expected}: make the state with "
        "DataParallel.init, on the same parameters"
    )
