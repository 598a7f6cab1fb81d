"""Floating-point numbers at the ends of the range, and numbers as the platform sees them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def special_values(dtype):
    """Zeros of both signs, the ends of the normal range, subnormals, infinities and NaNs."""
    info = jnp.finfo(dtype)
    ends = [info.max, info.tiny, info.smallest_subnormal, info.tiny / 2, 1.0, np.inf]
    words = {2: np.uint16, 4: np.uint32}[jnp.dtype(dtype).itemsize]
    infinity = int(np.array(np.inf, dtype).view(words))
    quiet = 1 << (info.nmant - 1)
    # NaNs with payloads; one is signalling, and one is negative.
    nans = [infinity | quiet | 1, infinity | 1, infinity | quiet | 1 << (info.bits - 1)]
    numbers = np.array([0.0, *ends], dtype)
    return np.concatenate([numbers, -numbers, np.array(nans, words).view(dtype)])


@functools.cache
def is_flushed(dtype):
    """Whether the platform flushes subnormal numbers of a dtype to zero."""
    least = jnp.asarray(jnp.finfo(dtype).smallest_subnormal, dtype)
    return not jax.jit(lambda x: x > 0)(least)


def as_seen(values):
    """The values in f64, with zeros where the platform flushes them."""
    if is_flushed(values.dtype):
        tiny = jnp.finfo(values.dtype).tiny
        values = np.where(np.abs(values) < tiny, np.array(0, values.dtype), values)
    return values.astype(np.float64)
