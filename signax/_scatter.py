"""The vote of which each worker gets its own part: one bit up, nothing down."""

from collections.abc import Hashable
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from signax import _packing
from signax._ballots import Rules, Ties, Zeros, take_part
from signax._collectives import VoteOptions, check_votable, check_vote_options, find_worker
from signax._exchange import decide, make_header, seal, swap


def pvote_scatter(
    tree: Any,
    axis_name: Hashable,
    *,
    scatter_dimension: Any = 0,
    step: jax.Array | int | None = None,
    zeros: Zeros = "dither",
    ties: Ties = "dither",
    active: jax.Array | bool | None = None,
) -> Any:
    r"""Votes like `pvote`, but each worker gets only its own part of the result.

    For workers that each keep a part of the parameters (fully sharded data parallelism): gradients
    go up in one bit per coordinate, in one `all_to_all` of packed words, and nothing comes down.
    The parameters themselves, which such workers gather before the forward pass, still travel in
    full precision. It is shaped like a tiled :func:`jax.lax.psum_scatter`.

    Args:
      tree: this worker's values, as in :func:`pvote`.
      axis_name: the mapped axis along which the workers lie, or a tuple of axes.
      scatter_dimension: the dimension along which a leaf is cut into M equal parts, of which
        worker k gets the k-th: one integer, or a tree of them like `tree`.
      step: see :func:`pvote`.
      zeros: see :func:`pvote`.
      ties: see :func:`pvote`.
      active: see :func:`pvote`.

    Returns:
      A tree like `tree` with dimensions cut: what :func:`pvote` gives for this worker's part as a
      leaf of its own, so that the dither counts coordinates within the part.

    Raises:
      NameError: `axis_name` is not bound.
      TypeError: as in :func:`pvote`.
      ValueError: as in :func:`pvote`, or a leaf cannot be cut into equal parts.

    Examples:
      >>> import jax, jax.numpy as jnp, signax
      >>> gradients = jnp.array([[-1.0, 3.0, 2.0], [-4.0, -1.0, 1.0], [0.5, -2.0, 7.0]])
      >>> vote = lambda g: signax.pvote_scatter(g, "workers", step=0)
      >>> print(jax.vmap(vote, axis_name="workers")(gradients))
      [[-1.]
       [-1.]
       [ 1.]]

    References:
      Bernstein et al., `signSGD with Majority Vote is Communication Efficient and Fault Tolerant
      <https://arxiv.org/abs/1810.05291>`_, 2019
    """
    rules = Rules(zeros, ties)
    check_vote_options(VoteOptions(axis_name, rules, "auto", None))
    check_votable(tree, axis_name, name="tree")
    num_workers = lax.axis_size(axis_name)
    dimensions = _scatter_dimensions(tree, scatter_dimension, num_workers)
    leaves, structure = jax.tree.flatten(tree)
    parts = [
        jax.ShapeDtypeStruct(_cut_shape(leaf, dimension, num_workers)[1], leaf.dtype)
        for leaf, dimension in zip(leaves, dimensions, strict=True)
    ]
    if not any(part.size for part in parts):
        return structure.unflatten(jnp.zeros(part.shape, part.dtype) for part in parts)
    worker = find_worker(axis_name, rules, step)

    rows = [
        leaf.reshape(_cut_shape(leaf, dimension, num_workers)[0])
        for leaf, dimension in zip(leaves, dimensions, strict=True)
    ]
    nonempty = [n for n, part in enumerate(parts) if part.size]
    messages, finite = jax.vmap(
        lambda parts: _packing.pack(parts, rules, worker.coin),
        in_axes=([dimensions[n] for n in nonempty],),
    )([rows[n] for n in nonempty])  # planes of u32[M, words], bool[M]
    header = make_header(worker.index, worker.coin, worker.tie, take_part(jnp.all(finite), active))
    ballot_box = swap(seal(messages, header), axis_name)  # u32[M, part]
    settled = decide(ballot_box, rules.planes, messages[0].shape[1])
    bits = _packing.unpack(settled.planes, parts)
    return structure.unflatten(
        rules.signs(planes, _packing.odd(part.shape), settled.voters, part.dtype)
        for planes, part in zip(bits, parts, strict=True)
    )


def _scatter_dimensions(tree: Any, scatter_dimension: Any, num_workers: int) -> list[int]:
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
                f"updates{jax.tree_util.keystr(path)} of shape {leaf.shape} cannot be cut into "
                f"{num_workers} equal parts along scatter_dimension={dimension}: choose one that "
                f"is a multiple of {num_workers}, or use pvote for this leaf"
            )
    return [d % leaf.ndim for d, leaf in zip(dimensions, jax.tree.leaves(tree), strict=True)]


def _cut_shape(
    leaf: jax.Array, dimension: int, num_workers: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of a leaf with an axis of M parts put in, and that of one part."""
    before, after = leaf.shape[:dimension], leaf.shape[dimension + 1 :]
    length = leaf.shape[dimension] // num_workers
    return (*before, num_workers, length, *after), (*before, length, *after)
