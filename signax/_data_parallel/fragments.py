"""Fragments of parameters, which the workers exchange in turn: which leaves, and at which steps.

A fragment of a tree has `optax.MaskedNode` in the place of the other fragments' leaves. Masks and
labels of the whole tree therefore also fit a fragment.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Fragment(NamedTuple):
    """Some leaves of the parameters.

    Attributes:
      positions: their positions in the flattened tree.
      outer: the `DataParallel` that exchanges them.
    """

    positions: tuple[int, ...]
    outer: Any

    def select(self, tree: Any) -> Any:
        """The fragment of a tree like the parameters."""
        return select(self.positions, tree)

    def replace(self, tree: Any, fragment: Any) -> Any:
        """A tree with the leaves of a fragment in their places."""
        leaves, structure = jax.tree.flatten(tree)
        for position, leaf in zip(self.positions, jax.tree.leaves(fragment), strict=True):
            leaves[position] = leaf
        return structure.unflatten(leaves)


def select(positions: Sequence[int], tree: Any) -> Any:
    """A tree with masks in the place of the leaves at other positions."""
    leaves, structure = jax.tree.flatten(tree)
    chosen = set(positions)
    return structure.unflatten(
        [leaf if n in chosen else optax.MaskedNode() for n, leaf in enumerate(leaves)]
    )


def deal(params: Any, num_fragments: int) -> list[tuple[int, ...]]:
    """Cut the leaves, in their order, into fragments of about equal numbers of coordinates.

    Each cut falls between the leaves where it is nearest to its share of all coordinates.
    """
    sizes = [math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(params)]
    if num_fragments > len(sizes):
        raise ValueError(
            f"num_fragments={num_fragments} exceeds the number of leaves of params, {len(sizes)}: "
            "a leaf is not cut. Use at most one fragment for each leaf"
        )
    ends = [sum(sizes[:number]) for number in range(len(sizes) + 1)]
    cuts = [0]
    for number in range(1, num_fragments):
        share = number * ends[-1] / num_fragments
        # At least one leaf remains for each fragment on both sides.
        possible = range(cuts[-1] + 1, len(sizes) - num_fragments + number + 1)
        cuts.append(min(possible, key=lambda cut: abs(ends[cut] - share)))
    cuts.append(len(sizes))
    return [tuple(range(start, stop)) for start, stop in pairwise(cuts)]


def schedule(num_local_steps: int, num_fragments: int) -> list[int]:
    """The fragment that is due after each local step of a round; `num_fragments` for none.

    Entry t is for counts of local steps with the remainder t. The last fragment is due at the end
    of the round, whose remainder is 0.
    """
    due = [num_fragments] * num_local_steps
    for fragment in range(num_fragments):
        due[(fragment + 1) * num_local_steps // num_fragments % num_local_steps] = fragment
    return due
