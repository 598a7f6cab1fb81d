"""Where arrays lie on a mesh: rows of workers, parameters, and states of any number of workers.

A leaf that every worker has of its own is an array of M rows. To resize, rows are dealt out in
order, as if each filled an M-th of a line that is cut into new parts:

    3 workers    [ a  a | b  b | c  c ]
    2 workers    [ a  a   b | b  c  c ]    each row is the mean of its part

The mean over workers stays the same, doubled workers start as copies, and halved workers as means
of two. State for which that is wrong has a method `resized`.
"""

import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from signax._core.checks import check_axis_name
from signax._core.leaves import (
    axis_names,
    entry_axes,
    explicit_axes,
    mean,
    spec_axes,
    varying_axes,
    wide_dtype,
)
from signax._data_parallel.layout import Layout, Leaf


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
        structure, expected = jax.tree.structure(self.param_specs), jax.tree.structure(params)
        if structure != expected:
            raise ValueError(
                f"param_specs and params differ in structure: param_specs is {structure}, "
                f"params is {expected}"
            )
        return self.param_specs

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

        def reshard_leaf(leaf: Any):
            leaf = jnp.asarray(leaf)
            spec = _keep_axes(jax.typeof(leaf).sharding.spec, self.inside)
            if per_worker:
                rows = *axis_names(self.axis_name), *entry_axes(spec[0])
                spec = PartitionSpec(rows, *spec[1:])
            return self._reshard(leaf, spec)

        return jax.tree.map(reshard_leaf, tree)

    def reshard_params(self, params: Any) -> Any:
        """Lay parameters out as `param_specs` says, if it is given."""
        if params is None or self.param_specs is None or not self.explicit:
            return self.reshard(params)

        return jax.tree.map(self._reshard, params, self.param_specs)

    def _reshard(self, leaf: Any, spec: PartitionSpec) -> jax.Array:
        sharding = NamedSharding(self.mesh, _keep_axes(spec, self.explicit))
        return jax.sharding.reshard(leaf, sharding)

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
                    f"signax.average_updates({self.axis_name!r}) into tx. To freeze leaves, chain "
                    "the freezing after the vote"
                )


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


def rows_in(state: Any, layout: Layout, num_workers: int) -> int:
    """The number of workers that a state has rows for; `num_workers` if it has no rows."""
    structure = jax.tree.structure(state)
    if structure != layout.structure:
        raise ValueError(
            f"state and params do not belong together: state is {structure}, but these params have "
            f"the state {layout.structure}; make it with init on the same parameters"
        )
    for array, leaf in zip(jax.tree.leaves(state), layout.leaves, strict=True):
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
            f"DataParallel.resize(state, params) makes a state of {num_workers}"
        )
    for array, leaf in zip(jax.tree.leaves(state), layout.leaves, strict=True):
        expected = (num_workers, *leaf.shape) if leaf.per_worker else leaf.shape
        if jnp.shape(array) != expected:
            raise _wrong_shape(leaf, jnp.shape(array), expected)


def _wrong_shape(leaf: Leaf, shape: Any, expected: Any) -> ValueError:
    return ValueError(
        f"state{leaf.path} has shape {shape}, but should have {expected}: make the state with "
        "DataParallel.init, on the same parameters"
    )


def resize_state(state: Any, before: Layout, after: Layout, mesh: Mesh, num_workers: int) -> Any:
    """A state laid out as `after` says, from a state laid out as `before` says."""
    flags = before.structure.unflatten([leaf.per_worker for leaf in before.leaves])

    def resize(node: Any, flags: Any):
        if _has_a_way(node):
            return node.resized(num_workers, resize_rows)
        return resize_rows(node, num_workers) if flags else node

    def resized(leaves: list[Any]):
        state = before.structure.unflatten(leaves)
        return jax.tree.leaves(jax.tree.map(resize, state, flags, is_leaf=_has_a_way))

    leaves = _device_put(jax.tree.leaves(state), _auto_shardings(before, mesh))
    if before is not after:
        leaves = jax.jit(resized, out_shardings=_auto_shardings(after, mesh))(leaves)
    return after.structure.unflatten(_device_put(leaves, [leaf.sharding for leaf in after.leaves]))


def _has_a_way(node: Any) -> bool:
    return hasattr(node, "resized")


def resize_rows(rows: jax.Array, num_workers: int) -> jax.Array:
    """Deal the rows of M workers, [M, ...], out to another number of workers.

    Each new row is the mean of floating-point rows. Each worker takes over keys, integers and
    booleans from the worker who was there before, and folds its index into keys. An array of uint32
    in the shape of a raw key counts as a key.
    """
    old = len(rows)
    if jnp.issubdtype(rows.dtype, jnp.floating):
        each = math.lcm(old, num_workers)
        shares = jnp.repeat(rows, each // old, axis=0)
        shares = shares.reshape(num_workers, each // num_workers, *rows.shape[1:])
        return mean(shares.astype(wide_dtype(rows.dtype)), axis=1).astype(rows.dtype)
    workers = jnp.arange(num_workers)
    taken = rows[workers * old // num_workers]
    if jnp.issubdtype(rows.dtype, jax.dtypes.prng_key):
        return _fold(taken, workers)
    raw_key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    if (rows.dtype, rows.shape[1:]) == (raw_key.dtype, raw_key.shape):
        return jax.random.key_data(_fold(jax.random.wrap_key_data(taken), workers))
    return taken


def _fold(keys: jax.Array, workers: jax.Array) -> jax.Array:
    """Fold each worker's index into its keys: key[M, ...]."""
    flat = keys.reshape(len(keys), -1)
    folded = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(0, None)))(flat, workers)
    return folded.reshape(keys.shape)


def _device_put(leaves: list[Any], shardings: list[NamedSharding]) -> list[jax.Array]:
    """`jax.device_put`, which accepts keys that lie in several processes only as their data."""
    is_key = [jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key) for leaf in leaves]
    data = [jax.random.key_data(x) if key else x for x, key in zip(leaves, is_key, strict=True)]
    data = jax.device_put(data, shardings)
    return [
        jax.random.wrap_key_data(new, impl=jax.random.key_impl(old)) if key else new
        for old, new, key in zip(leaves, data, is_key, strict=True)
    ]


def _auto_shardings(layout: Layout, mesh: Mesh) -> list[NamedSharding]:
    """A layout's shardings over axes of type Auto, where any array may be cut again."""
    types = (AxisType.Auto,) * mesh.devices.ndim
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=types)
    return [NamedSharding(auto, leaf.sharding.spec) for leaf in layout.leaves]
