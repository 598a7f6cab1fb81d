"""Arithmetic that survives the ends of the floating-point range."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def common_dtype(dtype: Any, other: Any) -> Any:
    """The dtype that holds values of both, also where JAX is told not to promote by itself."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(dtype, other)


def wide_dtype(dtype: Any) -> Any:
    """The dtype in which sums over values of `dtype` are accumulated: f32, or f64 for f64."""
    return common_dtype(dtype, jnp.float32)


def power_below(count: int) -> float:
    """A power of two, 1 / count or less: so many numbers times it have a sum that is finite.

    Nothing is rounded by it, where 1 / count would round every number.
    """
    return 2.0 ** -(count - 1).bit_length()


def mean(values: jax.Array, axis: int | None = None, keepdims: bool = False) -> jax.Array:
    """The mean, which is finite if the values are; their number along the axis is not 0."""
    count = values.size if axis is None else values.shape[axis]
    share = power_below(count)
    return jnp.sum(values * share, axis=axis, keepdims=keepdims) / (count * share)


def narrow(values: jax.Array, dtype: Any) -> jax.Array:
    """Values in another dtype; those beyond its ends come to lie at them, but infinity stays."""
    most = float(jnp.finfo(dtype).max)
    if float(jnp.finfo(values.dtype).max) > most:
        values = jnp.where(jnp.isfinite(values), jnp.clip(values, -most, most), values)
    return values.astype(dtype)


def short_of_infinity(values: jax.Array, *causes: jax.Array) -> jax.Array:
    """Values moved into the range of their dtype; NaN where one of the causes is not finite.

    It leaves room for the rounding of sums over values at the end of the range.
    """
    most = float(jnp.finfo(values.dtype).max) * (1 - 2.0**-7)
    values = jnp.clip(values, -most, most)
    for cause in causes:
        values += (0 * cause).astype(values.dtype)  # NaN, unless it is finite
    return values


def add_memory(value: jax.Array, error: jax.Array, decay: Any) -> jax.Array:
    """A value and a share of what was left out before, in the dtype of that memory.

    What was left out may have added up to more than the dtype holds, as with f16 it soon does. An
    infinity would stay in the memory for ever, so that the sum ends at the range's end instead.
    """
    corrected = (value.astype(error.dtype) + decay * error).astype(error.dtype)
    return short_of_infinity(corrected, value)


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


def words_of(count: int, dtype: Any) -> int:
    """How many words hold so many numbers."""
    return -(-count * np.dtype(dtype).itemsize // 4)


def to_words(numbers: jax.Array) -> jax.Array:
    """The bits of numbers of 2, 4 or 8 bytes each, as they are: f[n, count] to u32[n, words]."""
    if numbers.dtype.itemsize == 2:
        numbers = jnp.pad(numbers, ((0, 0), (0, numbers.shape[1] % 2)))
        numbers = numbers.reshape(len(numbers), -1, 2)
    words = lax.bitcast_convert_type(numbers, jnp.uint32)
    return words.reshape(len(words), -1)


def from_words(words: jax.Array, count: int, dtype: Any) -> jax.Array:
    """Undoes `to_words`."""
    if np.dtype(dtype).itemsize == 8:
        words = words.reshape(len(words), -1, 2)
    numbers = lax.bitcast_convert_type(words, dtype)
    return numbers.reshape(len(numbers), -1)[:, :count]
