"""Arithmetic that survives the ends of the floating-point range."""

from typing import Any

import jax
import jax.numpy as jnp


def common_dtype(dtype: Any, other: Any) -> Any:
    """The dtype that holds values of both, also where JAX is told not to promote by itself."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(dtype, other)


def wide_dtype(dtype: Any) -> Any:
    """The dtype in which sums over values of `dtype` are accumulated: f32, or f64 for f64."""
    return common_dtype(dtype, jnp.float32)


def relative_to_peak(values: jax.Array) -> jax.Array:
    """v / max|v|, whose squares neither overflow nor vanish; 0 if v is, NaN if any is not finite.

    A compiler may divide by multiplying with the reciprocal, which is subnormal, and flushed to
    zero, for the largest floats. A power of two moves the peak to mid-range first, exactly.
    """
    if values.size == 0:
        return values
    half = jnp.finfo(values.dtype).maxexp // 2
    shrinks = jnp.max(jnp.abs(values)) > 1
    values = values * jnp.where(shrinks, 2.0**-half, 2.0**half).astype(values.dtype)
    peak = jnp.max(jnp.abs(values))
    divisor = jnp.where(jnp.isfinite(peak), peak, jnp.nan)
    return values / jnp.where(peak == 0, jnp.ones_like(peak), divisor)
