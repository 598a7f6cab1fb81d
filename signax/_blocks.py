"""Leaves that are sharded over further mesh axes, and functions of their local blocks.

Flattening a sharded leaf would gather it in full precision, so what flattens runs where the leaf is
cut, in a nested `jax.shard_map`: once for each set of axes, since JAX types one array of words as a
whole.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from signax._specs import spec_axes, specs_like


class Block(NamedTuple):
    """The leaves that are sharded over one set of axes.

    Attributes:
      positions: where they stand in the flattened tree.
      specs: their partition specs.
      axes: the mesh axes in these, in the mesh's order, which is the same in every process.
    """

    positions: list[int]
    specs: list[PartitionSpec]
    axes: tuple[Hashable, ...]


def find_blocks(tree: Any, param_specs: Any) -> list[Block]:
    """Groups the leaves of a tree that are not empty by the axes over which they are sharded."""
    leaves = jax.tree.leaves(tree)
    specs = jax.tree.leaves(specs_like(tree, param_specs))
    mesh_axes = jax.sharding.get_abstract_mesh().axis_names
    groups: dict[tuple, Block] = {}
    for position, (leaf, spec) in enumerate(zip(leaves, specs, strict=True)):
        axes = tuple(sorted(spec_axes(spec), key=mesh_axes.index))
        if leaf.size:
            block = groups.setdefault(axes, Block([], [], axes))
            block.positions.append(position)
            block.specs.append(spec)
    return list(groups.values())


def locally(
    function: Callable, axes: Sequence[Hashable], in_specs: Any, out_specs: Any
) -> Callable:
    """A function of local blocks, as one of global arrays."""
    if not axes:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes))
