"""How a vote lays out updates for packing: large leaves in slabs, small leaves end to end.

A transformation of signs is elementwise, so it may compute on leaves in another layout. Every leaf
adds operations to the program, so small leaves are joined first, and the program compiles faster.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from signax._core.leaves import is_like_tree, spec_axes, specs_like, typed_spec
from signax._wire.pieces import cut_apart
from signax._wire.slabs import SMALL, in_slabs
from signax._wire.types import Array


class Arrangement:
    """The layout of trees like some updates: first leaves on their own, then runs of joined leaves.

    Small leaves are joined if they have the same dtypes, in the updates and in the state, and are
    whole on each device. If no leaves are joined, the tree keeps its structure.
    """

    def __init__(self, updates: Any, state: Any, param_specs: Any):
        leaves, self._structure = jax.tree.flatten(updates)
        self._shapes = [leaf.shape for leaf in leaves]
        self._specs = jax.tree.leaves(specs_like(updates, param_specs))
        self._is_like = is_like_tree(updates)
        nodes = jax.tree.leaves(state, is_leaf=self._is_like)
        beside = [jax.tree.leaves(node) for node in nodes if self._is_like(node)]
        joined: dict[Any, list[int]] = {}
        for n, (spec, *arrays) in enumerate(zip(self._specs, leaves, *beside, strict=True)):
            is_whole = not spec_axes(spec) and not spec_axes(typed_spec(arrays[0]))
            if is_whole and 0 < arrays[0].size < SMALL:
                joined.setdefault(tuple([array.dtype for array in arrays]), []).append(n)
        self._joined = [run for run in joined.values() if len(run) > 1]
        in_runs = {n for run in self._joined for n in run}
        self._alone = [n for n in range(len(leaves)) if n not in in_runs]

    def arrange(self, tree: Any) -> Any:
        """A tree in this layout.

        The barriers hide from XLA that the tree itself has the same values, and keep the reshape
        before the rest.
        """
        leaves = jax.tree.leaves(tree)
        arrays = [_slabs(leaves[n], self._specs[n]) for n in self._alone]
        for run in self._joined:
            flat = jnp.concatenate([leaves[n].reshape(-1) for n in run])
            arrays.append(lax.optimization_barrier(flat))
        return arrays if self._joined else self._structure.unflatten(arrays)

    def arrange_state(self, state: Any) -> Any:
        """A state whose nodes like the updates are in this layout."""
        return jax.tree.map(
            lambda node: self.arrange(node) if self._is_like(node) else node,
            state,
            is_leaf=self._is_like,
        )

    def restore(self, arranged: Any) -> Any:
        """Invert `arrange`, up to the slabs of large leaves."""
        arrays = jax.tree.leaves(arranged)
        leaves = dict(zip(self._alone, arrays, strict=False))
        for run, flat in zip(self._joined, arrays[len(self._alone) :], strict=True):
            shapes = [self._shapes[n] for n in run]
            for n, piece in zip(run, cut_apart(flat, map(math.prod, shapes)), strict=True):
                leaves[n] = piece.reshape(self._shapes[n])
        return self._structure.unflatten([leaves[n] for n in range(len(self._shapes))])


def _slabs(leaf: Array, spec: PartitionSpec) -> Array:
    slabbed = leaf if spec_axes(spec) else in_slabs(leaf)
    if slabbed is leaf:  # with an axis in front, TPUs need not copy DataParallel's rows
        return lax.optimization_barrier(leaf[None])[0]
    return lax.optimization_barrier(slabbed)
