"""Boxes around arrays: trees that differ only in boxes match, and boxes learn of the axis of rows.

Flax wraps arrays in boxes that hold the names of their axes: Linen's `Partitioned`, NNX's
variables. A loop may pass parameters with boxes to `init` and without boxes to `update`. Leaves are
therefore matched by path. This module knows boxes by their methods, and imports no Flax.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import jax


def plain_path(path: str) -> str:
    """A leaf's path, as `jax.tree_util.keystr` writes it, without the box around the leaf."""
    return path.removesuffix(".value")


def leaves_by_path(tree: Any, paths: Sequence[str]) -> list[Any] | None:
    """The leaves of a tree whose leaves lie at these paths, in this order; `None` otherwise."""
    found = jax.tree.leaves_with_path(tree)
    same = [plain_path(jax.tree_util.keystr(path)) for path, _ in found]
    if same != [plain_path(path) for path in paths]:
        return None
    return [leaf for _, leaf in found]


def first_difference(tree: Any, paths: Sequence[str]) -> str:
    """The first path that a tree lacks or has beyond the given paths, for an error."""
    found = [plain_path(jax.tree_util.keystr(path)) for path, _ in jax.tree.leaves_with_path(tree)]
    wanted = [plain_path(path) for path in paths]
    for path in wanted:
        if path not in found:
            return f"it lacks {path!r}"
    for path in found:
        if path not in wanted:
            return f"it has {path!r}"
    return "its leaves are in another order"


def add_row_axis(state: Any, per_worker: Sequence[bool], axis_name: Hashable) -> Any:
    """Add the workers' axis to the boxes of rows, if boxes of the state name axes.

    Rows without a box get a box like the others. Tools that read shardings from boxes then know
    where all rows lie.
    """
    nodes, structure = jax.tree.flatten(state, is_leaf=_is_box)
    prototype = next((node for node in nodes if _names_axes(node)), None)
    if prototype is None:
        return state
    flags = iter(per_worker)
    boxed = []
    for node in nodes:
        rows = [next(flags) for _ in jax.tree.leaves(node)]
        boxed.append(_with_rows(node, prototype, axis_name) if any(rows) else node)
    return structure.unflatten(boxed)


def _is_box(node: Any) -> bool:
    return hasattr(node, "replace_boxed") or _is_variable(node)


def _is_variable(node: Any) -> bool:
    """Whether a node is a variable of Flax NNX."""
    return hasattr(node, "set_metadata") and hasattr(node, "get_metadata")


def _names_axes(node: Any) -> bool:
    if _is_variable(node):
        return bool(node.get_metadata().get("out_sharding"))
    return hasattr(node, "add_axis") and hasattr(node, "names")


def _with_rows(node: Any, prototype: Any, axis_name: Hashable) -> Any:
    """The box of rows, with the workers' axis before the other axes."""
    if _is_variable(prototype):
        names = node.get_metadata().get("out_sharding") if _is_variable(node) else None
        variable = node if _is_variable(node) else prototype.replace(node)
        variable.set_metadata(out_sharding=(axis_name, *(names or ())))
        return variable
    if not _is_box(node):
        node = prototype.replace_boxed(node).replace(names=())
    return node.add_axis(0, {"partition_name": axis_name})
