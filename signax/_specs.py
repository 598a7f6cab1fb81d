"""Partition specs and what JAX's types say of an array: over which axes it is cut, or varies."""

from collections.abc import Hashable
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec


def entry_axes(entry: Any) -> tuple[Hashable, ...]:
    """The mesh axes in one entry of a spec."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def spec_axes(spec: PartitionSpec) -> tuple[Hashable, ...]:
    """The mesh axes in a spec, in its order."""
    return tuple(axis for entry in spec for axis in entry_axes(entry))


def keep_axes(spec: PartitionSpec, axes: frozenset[Hashable]) -> PartitionSpec:
    """A spec without the axes that are not among `axes`."""
    return PartitionSpec(
        *(tuple(axis for axis in entry_axes(entry) if axis in axes) or None for entry in spec)
    )


def typed_spec(array: Any) -> PartitionSpec:
    """The spec in an array's type, which names Explicit axes only."""
    return jax.typeof(array).sharding.spec


def axis_names(axis_name: Hashable) -> tuple[Hashable, ...]:
    """The axes in an axis name, which may be one or a tuple of several."""
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)


def varying_axes(array: Any, axis_name: Hashable) -> tuple[Hashable, ...]:
    """Those axes of a name over which JAX's types say that an array differs."""
    varying = jax.typeof(array).manual_axis_type.varying
    return tuple(axis for axis in axis_names(axis_name) if axis in varying)


def varies(array: Any, axis_name: Hashable) -> bool:
    """Whether JAX's types say that an array differs over an axis, or over each of several."""
    return varying_axes(array, axis_name) == axis_names(axis_name)


def explicit_axes(mesh: Mesh | AbstractMesh) -> frozenset[Hashable]:
    """The axes of type Explicit, over which JAX's types track the sharding of arrays."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return frozenset(axis for axis, kind in kinds if kind == AxisType.Explicit)


def auto_axes(mesh: Mesh) -> Mesh:
    """The same mesh with axes of type Auto."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)


def reshard(array: jax.Array, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    """Lays an array out over a mesh's Explicit axes as `spec` says; Auto axes take any array."""
    explicit = explicit_axes(mesh)
    if not explicit:
        return array
    return jax.sharding.reshard(array, NamedSharding(mesh, keep_axes(spec, explicit)))


def is_masked(node: Any) -> bool:
    """Whether a node stands for leaves that `optax.masked` or `optax.partition` left out."""
    return isinstance(node, optax.MaskedNode)


def specs_like(tree: Any, specs: Any) -> Any:
    """The specs of the leaves of a tree, of which masks leave some out; `None` shards nothing."""
    if specs is None:
        return jax.tree.map(lambda _: PartitionSpec(), tree)
    return jax.tree.map(spec_unless_masked, tree, specs, is_leaf=is_masked)


def spec_unless_masked(node: Any, spec: PartitionSpec) -> Any:
    """The spec of a leaf, or the mask in its place."""
    return node if is_masked(node) else spec
