"""How leaves are cut into equal parts, one for each worker, for `pvote_scatter`."""

from numbers import Integral
from typing import Any

import jax

from signax._core.leaves import spec_axes, typed_spec


def check_whole(tree: Any) -> None:
    """Raise if a leaf is sharded over Explicit axes: JAX cannot cut it into parts."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        if axes := spec_axes(typed_spec(leaf)):
            raise ValueError(
                f"tree{jax.tree_util.keystr(path)} is sharded over the Explicit axes {axes}, and "
                "pvote_scatter cuts whole leaves: let your jax.shard_map map over these axes too, "
                "or make them of type Auto"
            )


def scatter_dimensions(tree: Any, scatter_dimension: Any, num_workers: int) -> list[int]:
    """One dimension for each leaf, which M divides."""
    if isinstance(scatter_dimension, Integral):
        scatter_dimension = jax.tree.map(lambda _: scatter_dimension, tree)
    if jax.tree.structure(scatter_dimension) != jax.tree.structure(tree):
        raise ValueError(
            f"scatter_dimension={scatter_dimension!r} must be an integer, or a tree of them like "
            f"the one that is voted on, {jax.tree.structure(tree)}"
        )
    dimensions = jax.tree.leaves(scatter_dimension)
    for (path, leaf), dimension in zip(jax.tree.leaves_with_path(tree), dimensions, strict=True):
        if not isinstance(dimension, Integral):
            raise TypeError(f"scatter_dimension={dimension!r} is not an integer")
        if not -leaf.ndim <= dimension < leaf.ndim or leaf.shape[dimension] % num_workers:
            raise ValueError(
                f"tree{jax.tree_util.keystr(path)} of shape {leaf.shape} cannot be cut into "
                f"{num_workers} equal parts along scatter_dimension={dimension}: choose one that "
                f"is a multiple of {num_workers}, or use pvote for this leaf"
            )
    return [d % leaf.ndim for d, leaf in zip(dimensions, jax.tree.leaves(tree), strict=True)]


def cut_shape(
    leaf: jax.Array, dimension: int, num_workers: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of a leaf that is cut into M parts along a new axis, and the shape of a part."""
    before, after = leaf.shape[:dimension], leaf.shape[dimension + 1 :]
    length = leaf.shape[dimension] // num_workers
    return (*before, num_workers, length, *after), (*before, length, *after)
