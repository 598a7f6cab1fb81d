"""Workers along an axis of a mesh: which arrays are rows of theirs, and where arrays lie."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from signax._numerics import wide_dtype
from signax._specs import (
    axis_names,
    entry_axes,
    explicit_axes,
    keep_axes,
    reshard,
    spec_axes,
    typed_spec,
    varying_axes,
)


class Workers(NamedTuple):
    """The workers of a mesh.

    Attributes:
      mesh: a mesh that has their axis.
      axis_name: the axis along which they lie, or a tuple of axes.
      num_workers: their number.
      inside: the further axes that are of type Explicit, which types know.
      param_specs: how parameters are sharded over further axes, where types do not say it.
    """

    mesh: Mesh
    axis_name: Hashable
    num_workers: int
    inside: frozenset[Hashable]
    param_specs: Any

    def shard_map(
        self, function: Callable, in_specs: Any, out_specs: Any, check_vma: bool = True
    ) -> Callable:
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=set(axis_names(self.axis_name)),
            check_vma=check_vma,
        )

    def mean_of_finite(self, loss: jax.Array) -> jax.Array:
        """The mean over the workers without those that their loss shows to be in trouble."""
        finite = jnp.isfinite(loss)
        wide = wide_dtype(loss.dtype)  # a sum in f16 overflows, and a count in bf16 ends at 256
        counted = jnp.where(finite, loss, 0).astype(wide), finite.astype(wide)
        total, number = lax.psum(counted, self.axis_name)
        return (total / number).astype(loss.dtype)

    def row(self, array: Any) -> jax.Array:
        """One worker's row of a global array, typed as varying: [...] to [1, ...]."""
        array = jnp.asarray(array)
        varying = varying_axes(array, self.axis_name)
        missing = tuple(axis for axis in axis_names(self.axis_name) if axis not in varying)
        return add_axis(lax.pcast(array, missing, to="varying") if missing else array)

    def specs(self, params: Any) -> Any:
        """The parameters' specs over the axes inside a worker: as given, or as their types say."""
        if self.param_specs is None:
            if not self.inside:
                return None
            return jax.tree.map(lambda leaf: keep_axes(typed_spec(leaf), self.inside), params)
        structure, expected = jax.tree.structure(self.param_specs), jax.tree.structure(params)
        if structure != expected:
            raise ValueError(
                f"param_specs and params differ in structure: param_specs is {structure}, "
                f"params is {expected}"
            )
        return self.param_specs

    def one_worker(self, updates: Any) -> Any:
        """The shapes of the parameters, where only rows of updates are known."""

        def without_row(row):
            sharding = NamedSharding(self.mesh, PartitionSpec(*typed_spec(row)[1:]))
            return jax.ShapeDtypeStruct(row.shape[1:], row.dtype, sharding=sharding)

        return jax.tree.map(without_row, updates)

    def place(self, tree: Any, *, per_worker: bool = False) -> Any:
        """Lays arrays out as a mesh of Explicit axes demands, rows over the workers' axis."""

        def place(leaf):
            leaf = jnp.asarray(leaf)
            spec = keep_axes(typed_spec(leaf), self.inside)
            if per_worker:
                rows = *axis_names(self.axis_name), *entry_axes(spec[0])
                spec = PartitionSpec(rows, *spec[1:])
            return reshard(leaf, self.mesh, spec)

        return jax.tree.map(place, tree)

    def place_params(self, params: Any) -> Any:
        """The same for parameters, which lie as `param_specs` say if it is given."""
        if params is None or self.param_specs is None:
            return self.place(params)
        return jax.tree.map(
            lambda leaf, spec: reshard(leaf, self.mesh, spec), params, self.param_specs
        )

    def keep(self, leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
        """Has XLA leave a result of a step as the next one takes it, where no types say so."""
        if self.param_specs is None or explicit_axes(self.mesh):
            return leaf
        return lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, spec))

    def check_rows(self, updates: Any, params: Any) -> None:
        """Refuses updates that have not one row like the parameters for each worker."""
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
        """Refuses what is not one boolean for each worker."""
        if active is None:
            return
        right_dtype = getattr(active, "dtype", None) == jnp.bool_
        if not right_dtype or active.shape != (self.num_workers,):
            raise TypeError(
                f"active={active!r} must be an array of one boolean for each of "
                f"{self.num_workers} workers"
            )

    def check_settled(self, updates: Any) -> None:
        """Refuses updates that types know to differ between the workers."""
        for path, leaf in jax.tree.leaves_with_path(updates):
            if varying_axes(leaf, self.axis_name):
                raise ValueError(
                    f"updates{jax.tree_util.keystr(path)} is neither voted nor averaged over "
                    f"{self.axis_name!r}, so that its parameters would differ between workers: put "
                    f"signax.majority_vote({self.axis_name!r}) or "
                    f"signax.average_updates({self.axis_name!r}) into tx. To freeze leaves, chain "
                    "the freezing after the vote"
                )


def conditional_vote(axis_name: Hashable) -> ValueError:
    """The error for a vote or mean on one side of a condition that all workers share."""
    return ValueError(
        f"tx votes or averages over {axis_name!r} on one side of a condition only, as in "
        "optax.conditionally_mask(vote, ...). On the other side nothing is exchanged, so updates "
        "may differ between workers. Put the condition after the vote, as in optax.chain("
        f"signax.majority_vote({axis_name!r}), optax.conditionally_mask(inner, ...))"
    )


def add_axis(array: Any) -> jax.Array:
    """A row of one worker: [...] to [1, ...]."""
    return jnp.asarray(array)[None]


def check_param_specs(specs: Any, mesh: Mesh, axis_name: Hashable) -> None:
    """Refuses what names no spec of parameters that every worker holds whole."""
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
