"""Aux of a loss function: one row per worker, examples end to end, or a mean or sum of workers."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from signax._core.leaves import wide_dtype
from signax._data_parallel.placement import Workers, add_axis

MODES = "rows", "concat", "mean", "sum"


def check_aux(aux: Any, has_aux: bool) -> None:
    """Raise if a value is neither a mode of aux nor a tree of modes, or if there is no aux."""
    modes = jax.tree.leaves(aux, is_leaf=lambda node: node is None)
    if not modes or not all(isinstance(mode, str) and mode in MODES for mode in modes):
        raise ValueError(
            f"aux={aux!r} is unknown: use one of {', '.join(map(repr, MODES))}, or a tree of these "
            "with the outer structure of aux"
        )
    if not has_aux and aux != "rows":
        raise ValueError(f"aux={aux!r} needs has_aux=True, and a loss_fn that returns (loss, aux)")


def aux_specs(aux: Any, workers: Workers) -> Any:
    """How aux of each mode lies over the workers' axis."""
    row, whole = PartitionSpec(workers.axis_name), PartitionSpec()
    return jax.tree.map(lambda mode: whole if mode in ("mean", "sum") else row, aux)


def combine_aux(values: Any, aux: Any, loss: jax.Array, pieces: int, workers: Workers) -> Any:
    """One worker's part of aux, from its values for each piece, [...] or [pieces, ...]."""
    structure = jax.tree.structure(aux)
    try:
        parts = structure.flatten_up_to(values)
    except ValueError as error:
        raise ValueError(
            f"aux={aux!r} does not have the outer structure of the aux of loss_fn, "
            f"{jax.tree.structure(values)}: {error}"
        ) from None
    modes = structure.unflatten(
        [
            jax.tree.map(lambda _: mode, part)  # noqa: B023
            for mode, part in zip(jax.tree.leaves(aux), parts, strict=True)
        ]
    )

    def combine(path: Any, value: Any, mode: str):
        name = f"aux{jax.tree_util.keystr(path)}"
        try:
            value = jnp.asarray(value)
        except TypeError:
            raise TypeError(
                f"{name}={value!r} is no array: loss_fn may return arrays and numbers only"
            ) from None
        if mode == "rows":
            return add_axis(value)
        if mode == "concat":
            return _concatenate(name, value, pieces)
        return _reduce(name, value, mode, loss, pieces, workers)

    return jax.tree.map_with_path(combine, values, modes)


def _concatenate(name: str, value: jax.Array, pieces: int) -> jax.Array:
    """A worker's examples in order: [b, ...] as they are, and [pieces, b, ...] end to end."""
    if value.ndim < (1 if pieces == 1 else 2):
        raise ValueError(
            f"{name} is a scalar, and aux='concat' needs an axis of examples: use 'mean', 'sum' or "
            "'rows' for it, in a tree of modes if other leaves are to be concatenated"
        )
    return value if pieces == 1 else value.reshape(-1, *value.shape[2:])


def _reduce(
    name: str, value: jax.Array, mode: str, loss: jax.Array, pieces: int, workers: Workers
) -> jax.Array:
    """The mean or sum over pieces, and over workers with a finite loss and, for a mean, value."""
    dtype = value.dtype
    inexact = jnp.issubdtype(dtype, jnp.inexact)
    if not inexact and not jnp.issubdtype(dtype, jnp.integer) and dtype != jnp.bool_:
        raise TypeError(f"{name} has dtype {dtype}, which has no {mode}: use 'rows' for it")
    if mode == "mean" and not inexact:
        raise TypeError(
            f"{name} has dtype {dtype}, and a mean of integers is no integer: use aux='sum', or "
            "cast it to float32 in loss_fn"
        )
    if inexact:
        value = value.astype(wide_dtype(dtype))  # sums in f16 overflow
    elif dtype.itemsize < 4:
        unsigned = jnp.issubdtype(dtype, jnp.unsignedinteger)
        value = value.astype(jnp.uint32 if unsigned else jnp.int32)
    if pieces > 1:
        reduce = jnp.mean if mode == "mean" else jnp.sum
        value = reduce(value, axis=0, dtype=value.dtype)  # sums of i32 would be i64 under x64
    finite = jnp.isfinite(loss)
    if mode == "mean":  # a variance of BatchNorm may overflow while the loss stays finite
        finite &= jnp.all(jnp.isfinite(value))
    total = lax.psum(jnp.where(finite, value, jnp.zeros_like(value)), workers.axis_name)
    if mode == "sum":
        return total
    return total / lax.psum(finite.astype(value.dtype), workers.axis_name)
