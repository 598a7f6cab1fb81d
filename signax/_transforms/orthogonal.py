"""Orthogonalisation: matrices become their polar factors, whose singular values are all equal."""

import math
from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from optax.contrib import MuonDimensionNumbers

from signax._core.checks import check_count
from signax._core.leaves import check_floating, is_masked, relative_to_peak, specs_like
from signax._transforms.matrices import given_axes, map_matrices, matrix_axes
from signax._transforms.participation import NO_EXTRAS, Extras

DimensionNumbers = Any | Callable[[optax.Params], Any] | None


def orthogonalize(
    *, weight_dimension_numbers: DimensionNumbers = None, ns_steps: int = 5
) -> optax.GradientTransformationExtraArgs:
    r"""Replace each matrix by its polar factor, scaled to a root mean square of about 1.

    .. math:: G = U \Sigma V^\top, \quad u = \sqrt{\max(m, n)} \, U V^\top

    for a matrix of m rows and n columns. Five Newton-Schulz iterations, Optax's, approximate
    :math:`U V^\top`: they bring the singular values to between about 0.7 and 1.2. The entries of u
    are spread like Gaussian numbers, without the heavy tails of a gradient's entries, so that their
    signs lose less.

    The transformation is stateless. Use it after a momentum and before a vote, or after a vote,
    where the matrix of the majority's signs becomes a matrix of equal singular values again, the
    same on every worker. A matrix with a NaN or an infinity becomes NaN.

    A matrix that is sharded inside a worker, by the `param_specs` of :class:`signax.DataParallel`,
    is orthogonalised as a whole: the devices of the worker gather it, and each keeps its block of
    the result. Nothing travels between workers. Axes that are neither rows nor columns, such as
    stacked layers, are not gathered.

    Args:
      weight_dimension_numbers: a tree like the parameters, or a prefix of it, or a function from
        parameters to such a tree. An `optax.contrib.MuonDimensionNumbers` says which axes of the
        leaf are the rows and which are the columns; further axes count matrices. `None` leaves a
        leaf as it is. By default leaves of two axes are matrices, and leaves of fewer stay as they
        are.
      ns_steps: the number of iterations.

    Returns:
      A stateless transformation that keeps shapes and dtypes.

    Raises:
      ValueError: `ns_steps` is below 1; at the update, a leaf has more than two axes and no
        dimension numbers, or dimension numbers do not fit their leaf.
      TypeError: `ns_steps` is not a whole number; at the update, a leaf is not floating-point, or
        dimension numbers are of the wrong kind.

    Examples:
      >>> import jax.numpy as jnp, signax
      >>> tx = signax.orthogonalize()
      >>> gradients = {"w": jnp.array([[0.3, -40.0], [4.0, 0.03]]), "b": jnp.array([5.0])}
      >>> updates, state = tx.update(gradients, tx.init(gradients))
      >>> print(updates["w"].round(1), updates["b"])
      [[ 0. -1.]
       [ 1.  0.]] [5.]

    References:
      Jordan et al., `Muon: An optimizer for hidden layers in neural networks
      <https://kellerjordan.github.io/posts/muon/>`_, 2024
    """
    check_count("ns_steps", ns_steps)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: Any = None,
        *,
        signax: Extras = NO_EXTRAS,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        del params, extra_args
        check_floating(updates)
        numbers = dimension_numbers(updates, weight_dimension_numbers)
        leaves, structure = jax.tree.flatten(updates)
        specs: list[PartitionSpec] = jax.tree.leaves(specs_like(updates, signax.param_specs))
        polar = partial(_polar, ns_steps=ns_steps)
        return structure.unflatten(map_matrices(polar, leaves, numbers, specs)), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


def dimension_numbers(tree: Any, wanted: DimensionNumbers) -> list[MuonDimensionNumbers | None]:
    """The dimension numbers of the leaves of a tree; `None` for leaves that are not matrices."""
    if not jax.tree.leaves(tree):
        return []  # optax.tree.map_params asks for the structure of a state
    resolved = wanted(tree) if callable(wanted) else wanted
    if wanted is None:
        return [_by_rank(path, leaf) for path, leaf in jax.tree.leaves_with_path(tree)]

    def is_entry(node: Any) -> bool:
        return node is None or isinstance(node, MuonDimensionNumbers) or is_masked(node)

    found: list[MuonDimensionNumbers | None] = []

    def spread(entry: Any, subtree: Any):
        if entry is not None and not isinstance(entry, MuonDimensionNumbers):
            if is_masked(entry):
                return
            raise TypeError(
                f"weight_dimension_numbers has {entry!r} for a leaf: give it an "
                "optax.contrib.MuonDimensionNumbers, or None"
            )
        found.extend([entry] * len(jax.tree.leaves(subtree)))

    try:
        jax.tree.map(spread, resolved, tree, is_leaf=is_entry)
    except ValueError as error:
        raise ValueError(
            "weight_dimension_numbers and the parameters differ in structure: "
            f"{jax.tree.structure(resolved, is_leaf=is_entry)} is no prefix of "
            f"{jax.tree.structure(tree)}"
        ) from error
    for (path, leaf), numbers in zip(jax.tree.leaves_with_path(tree), found, strict=True):
        if numbers is not None:
            _check_numbers(jax.tree_util.keystr(path), leaf, numbers)
    return found


def _by_rank(path: Any, leaf: Any) -> MuonDimensionNumbers | None:
    """The dimension numbers of a leaf for which none are given."""
    rank = jnp.ndim(leaf)
    if rank > 2:
        raise ValueError(
            f"params{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}, so its rows and "
            "columns are unknown: pass weight_dimension_numbers, with an "
            "optax.contrib.MuonDimensionNumbers for this leaf, or None to treat it as no matrix"
        )
    return MuonDimensionNumbers() if rank == 2 else None


def _check_numbers(where: str, leaf: Any, numbers: MuonDimensionNumbers) -> None:
    rank = jnp.ndim(leaf)
    axes = [axis for entry in numbers for axis in given_axes(entry)]
    if not all(isinstance(axis, Integral) for axis in axes):
        raise TypeError(
            f"params{where} has {numbers} in weight_dimension_numbers: axes must be integers, or "
            "tuples of integers"
        )
    if not all(-rank <= axis < rank for axis in axes):
        raise ValueError(
            f"params{where} has shape {jnp.shape(leaf)}, which does not have the axes of {numbers}:"
            " give a leaf that is no matrix None in weight_dimension_numbers"
        )
    if len({axis % rank for axis in axes}) < len(axes) or not all(map(given_axes, numbers)):
        raise ValueError(
            f"params{where} has {numbers} in weight_dimension_numbers: rows and columns need at "
            "least one axis each, and no axis may be both"
        )


def _polar(matrix: jax.Array, numbers: MuonDimensionNumbers, ns_steps: int) -> jax.Array:
    """The polar factor of a matrix, scaled to a root mean square of about 1."""
    # Without a momentum (beta=0) Optax's Muon is its Newton-Schulz iteration alone.
    iteration = optax.contrib.scale_by_muon(
        ns_steps=ns_steps, beta=0.0, nesterov=False, weight_dimension_numbers=numbers
    )
    sides = [math.prod(matrix.shape[n] for n in axes) for axes in matrix_axes(matrix.ndim, numbers)]
    with jax.numpy_dtype_promotion("standard"), jax.named_scope("signax.orthogonalize"):
        # Norms must not overflow. In f16 even the norm of a matrix of ones may.
        unit = relative_to_peak(matrix)
        unit = unit.astype(jnp.float32) if unit.dtype == jnp.float16 else unit
        factor: Any = iteration.update(unit, iteration.init(unit))[0]
        return (factor * math.sqrt(max(sides))).astype(matrix.dtype)
