"""Leaves of a tree of updates: dtypes, checks, arithmetic, and the mesh axes in their types.

The arithmetic survives the ends of the floating-point range.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from signax._core.remote import Remote


def is_traced(value: Any) -> bool:
    """Whether a value is known only once the compiled program runs."""
    return isinstance(value, jax.core.Tracer)


def common_dtype(dtype: Any, other: Any) -> Any:
    """The dtype that holds values of both dtypes, even under strict dtype promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(dtype, other)


def wide_dtype(dtype: Any) -> Any:
    """The dtype in which sums over values of `dtype` are accumulated: f32, or f64 for f64."""
    return common_dtype(dtype, jnp.float32)


def all_finite(tree: Any) -> jax.Array:
    """Whether no floating-point leaf of a tree holds a NaN or an infinity: bool[]."""
    leaves = jax.tree.leaves(tree)
    floating = [x for x in leaves if jnp.issubdtype(getattr(x, "dtype", type(x)), jnp.floating)]
    if not floating:
        return jnp.bool_(True)
    return all_flags([jnp.all(jnp.isfinite(leaf)) for leaf in floating])


def all_flags(flags: list[jax.Array]) -> jax.Array:
    """Whether all flags are set: bool[] each to bool[]."""
    # Without the barrier XLA chains the flags and copies the chain into every use of the result:
    # compile time then grows with the cube of the number of leaves.
    return jnp.all(lax.optimization_barrier(jnp.stack(flags)))


def is_like_tree(tree: Any) -> Callable[[Any], bool]:
    """A predicate: whether a node of another tree has the structure and shapes of this tree."""
    shapes, structure = [leaf.shape for leaf in jax.tree.leaves(tree)], jax.tree.structure(tree)

    def is_like(node: Any) -> bool:
        leaves, found = jax.tree.flatten(node)
        return found == structure and [jnp.shape(leaf) for leaf in leaves] == shapes

    return is_like


def power_below(count: int) -> float:
    """The largest power of two up to 1 / count: `count` numbers times it have a finite sum.

    A product with a power of two is exact. A product with 1 / count would round every number.
    """
    return 2.0 ** -(count - 1).bit_length()


def mean(values: jax.Array, axis: int | None = None, keepdims: bool = False) -> jax.Array:
    """The mean, finite if the values are finite. There must be at least one value."""
    count = values.size if axis is None else values.shape[axis]
    share = power_below(count)
    return jnp.sum(values * share, axis=axis, keepdims=keepdims) / (count * share)


def narrow(values: jax.Array, dtype: Any) -> jax.Array:
    """Cast to another dtype. Finite values beyond its range saturate; infinities stay."""
    most = float(jnp.finfo(dtype).max)
    if float(jnp.finfo(values.dtype).max) > most:
        values = jnp.where(jnp.isfinite(values), jnp.clip(values, -most, most), values)
    return values.astype(dtype)


def short_of_infinity(values: jax.Array, *causes: jax.Array) -> jax.Array:
    """Clip values to the range of their dtype; NaN where one of the causes is not finite.

    The clip leaves room for the rounding of sums over values at the end of the range.
    """
    most = float(jnp.finfo(values.dtype).max) * (1 - 2.0**-7)
    values = jnp.clip(values, -most, most)
    for cause in causes:
        values += (cause - cause).astype(values.dtype)  # NaN, unless the cause is finite
    return values


def add_memory(value: jax.Array, error: jax.Array, decay: Any) -> jax.Array:
    """A value plus a share of an error memory, in the dtype of the memory.

    Errors may add up to more than the dtype holds, as f16 shows soon. An infinity would stay in the
    memory for the rest of the run, so the sum saturates.
    """
    with jax.numpy_dtype_promotion("standard"):  # the decay may have a wider dtype
        corrected = (value.astype(error.dtype) + decay * error).astype(error.dtype)
    return short_of_infinity(corrected, value)


def relative_to_peak(values: jax.Array) -> jax.Array:
    """v / max|v|, whose squares neither overflow nor vanish; 0 if v is, NaN if any is not finite.

    A compiler may divide by multiplying with the reciprocal, which is subnormal for the largest
    floats and may be flushed to zero. A power of two moves the peak to mid-range first, exactly.
    """
    if values.size == 0:
        return values
    half = jnp.finfo(values.dtype).maxexp // 2
    shrinks = jnp.max(jnp.abs(values)) > 1
    values = values * jnp.where(shrinks, 2.0**-half, 2.0**half).astype(values.dtype)
    peak = jnp.max(jnp.abs(values))
    divisor = jnp.where(jnp.isfinite(peak), peak, jnp.nan)
    return values / jnp.where(peak == 0, jnp.ones_like(peak), divisor)


def check_floating(tree: Any, name: str = "updates", *, only_arrays: bool = True) -> None:
    """Raise if a leaf is not an array of real floating-point numbers of at least 16 bits.

    With `only_arrays=False`, where shapes and dtypes alone matter, Python floats pass too.
    """
    for path, leaf in jax.tree.leaves_with_path(tree):
        where = f"{name}{jax.tree_util.keystr(path)}"
        if not hasattr(leaf, "dtype"):
            if not only_arrays and isinstance(leaf, float):
                continue
            raise TypeError(f"{where}={leaf!r} is not an array: make one with jnp.asarray")
        dtype = leaf.dtype
        if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 16:
            raise TypeError(
                f"{where} has dtype {dtype}: signs are taken of real floating-point leaves of 16, "
                "32 or 64 bits only; leave other leaves out with optax.masked"
            )


def check_alike(
    name: str,
    tree: Any,
    other_name: str,
    other: Any,
    remedy: str = "the state must come from init on the same parameters",
) -> None:
    """Raise if two trees differ in structure, or in the shape of a leaf."""
    structure, expected = jax.tree.structure(tree), jax.tree.structure(other)
    if structure != expected:
        raise ValueError(
            f"{name} and {other_name} differ in structure: {name} is {structure}, "
            f"{other_name} is {expected}; {remedy}"
        )
    for (path, leaf), other_leaf in zip(
        jax.tree.leaves_with_path(tree), jax.tree.leaves(other), strict=True
    ):
        if jnp.shape(leaf) != jnp.shape(other_leaf):
            where = jax.tree_util.keystr(path)
            raise ValueError(
                f"{name}{where} has shape {jnp.shape(leaf)}, but {other_name}{where} has "
                f"{jnp.shape(other_leaf)}; {remedy}"
            )


def is_masked(node: Any) -> bool:
    """Whether a node is an empty named tuple, such as the `optax.MaskedNode` of a masked leaf."""
    return isinstance(node, tuple) and not node and hasattr(node, "_fields")


def axis_names(axis_name: Hashable) -> tuple[Hashable, ...]:
    """The axes in an axis name, which is one axis or a tuple of several."""
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)


def varying_axes(array: Any, axis_name: Hashable) -> tuple[Hashable, ...]:
    """The axes of a name over which JAX's types let an array differ."""
    varying = jax.typeof(array).manual_axis_type.varying
    return tuple([axis for axis in axis_names(axis_name) if axis in varying])


def varies(array: Any, axis_name: Hashable) -> bool:
    """Whether JAX's types let an array differ over an axis, or over each of several axes."""
    return set(axis_names(axis_name)) <= jax.typeof(array).manual_axis_type.varying


def worker_index(axis_name: Hashable) -> jax.Array:
    """This worker's index along the axis, or among the jobs behind an exchange: i32[]."""
    if isinstance(axis_name, Remote):
        return jnp.int32(axis_name.index)
    try:
        return lax.axis_index(axis_name)
    except NameError:
        raise NameError(
            f"axis_name={axis_name!r} is not bound here: bind it with signax.DataParallel(tx, mesh,"
            f" {axis_name!r}), jax.shard_map over a mesh that has it, "
            f"jax.pmap(axis_name={axis_name!r}) or jax.vmap(axis_name={axis_name!r})"
        ) from None


def check_votable(
    tree: Any, axis_name: Hashable, split_over: Hashable | None = None, name: str = "updates"
) -> None:
    """Raise if a leaf is not floating-point, or is known to be equal on all workers."""
    check_floating(tree, name)
    if not varies(worker_index(axis_name), axis_name):
        return  # vmap, pmap and check_vma=False type everything as invariant
    for path, leaf in jax.tree.leaves_with_path(tree):
        where = f"{name}{jax.tree_util.keystr(path)}"
        for axis in axis_names(axis_name):
            if leaf.size and not varies(leaf, axis):
                raise ValueError(
                    f"{where} does not vary over axis {axis!r}, so there is nothing to decide. In "
                    "jax.shard_map the gradient with respect to replicated parameters is already "
                    "summed over the workers: take it with respect to "
                    f"jax.lax.pcast(params, {axis!r}, to='varying'), or use "
                    "signax.DataParallel.value_and_grad. Freeze leaves after the vote, not before."
                )
        if split_over is not None and leaf.size and varies(leaf, split_over):
            raise ValueError(
                f"{where} varies over split_over={split_over!r}, along which devices must "
                f"hold the same values: average it first, jax.lax.pmean({name}, "
                f"{split_over!r})"
            )


def entry_axes(entry: Any) -> tuple[Hashable, ...]:
    """The mesh axes in one entry of a partition spec."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def spec_axes(spec: PartitionSpec) -> tuple[Hashable, ...]:
    """The mesh axes in a partition spec, in its order."""
    return tuple([axis for entry in spec for axis in entry_axes(entry)])


def typed_spec(array: Any) -> PartitionSpec:
    """The spec in the type of an array, which names Explicit axes only."""
    spec = jax.typeof(array).sharding.spec
    return spec if spec_axes(spec) else PartitionSpec()


def specs_like(tree: Any, specs: Any) -> Any:
    """The specs of a tree's leaves, without those that a mask removed; `None` shards nothing."""
    if specs is None:
        whole = PartitionSpec()
        return jax.tree.map(lambda _: whole, tree)
    return jax.tree.map(spec_unless_masked, tree, specs, is_leaf=is_masked)


def spec_unless_masked(node: Any, spec: PartitionSpec) -> Any:
    """The spec of a leaf, or the mask that replaces the leaf."""
    return node if is_masked(node) else spec


def explicit_axes(mesh: Mesh | AbstractMesh) -> frozenset[Hashable]:
    """The axes of type Explicit, over which JAX's types track the sharding of arrays."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return frozenset([axis for axis, kind in kinds if kind == AxisType.Explicit])


class ShardingGroup(NamedTuple):
    """The leaves that are sharded over one set of axes within a worker.

    Attributes:
      positions: their positions in the flattened tree.
      specs: their partition specs.
      axes: the mesh axes in these, in the order of the mesh, which all processes share.
    """

    positions: list[int]
    specs: list[PartitionSpec]
    axes: tuple[Hashable, ...]


def sharding_groups(
    leaves: Sequence[jax.Array], specs: Sequence[PartitionSpec] | None
) -> list[ShardingGroup]:
    """Group leaves that are not empty by the axes over which they are sharded."""
    specs = [PartitionSpec()] * len(leaves) if specs is None else specs
    mesh_axes = jax.sharding.get_abstract_mesh().axis_names
    groups: dict[tuple[Hashable, ...], ShardingGroup] = {}
    for position, (leaf, spec) in enumerate(zip(leaves, specs, strict=True)):
        axes = tuple(sorted(spec_axes(spec), key=mesh_axes.index))
        if leaf.size:
            group = groups.setdefault(axes, ShardingGroup([], [], axes))
            group.positions.append(position)
            group.specs.append(spec)
    return list(groups.values())


def find_axis(
    split_over: Hashable | None,
) -> tuple[tuple[Hashable, ...], jax.Array, PartitionSpec]:
    """The axis that has yet to be mapped, if any; a device's position along it, and its spec.

    The position, i32[1], is an argument since older versions of JAX cannot ask for it in a nested
    `shard_map`.
    """
    if split_over is None:
        return (), jnp.zeros(1, jnp.int32), PartitionSpec()
    try:
        return (), lax.axis_index(split_over)[None], PartitionSpec()
    except NameError:
        pass
    mesh = jax.sharding.get_abstract_mesh()
    if split_over not in mesh.axis_names:
        raise NameError(
            f"split_over={split_over!r} is neither a mapped axis here nor an axis of the mesh: "
            "name the axis along which devices hold the same values"
        )
    spec = PartitionSpec(split_over)
    positions = jnp.arange(mesh.shape[split_over], dtype=jnp.int32)
    if split_over in explicit_axes(mesh):
        positions = jax.sharding.reshard(positions, spec)
    return (split_over,), positions, spec


def is_traced_call(arguments: Any) -> bool:
    """Whether a call is part of a program that is being traced, by its arguments or around it."""
    return any(map(is_traced, [*jax.tree.leaves(arguments), jnp.zeros(())]))
