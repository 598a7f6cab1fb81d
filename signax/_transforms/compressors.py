"""Compressors: transformations that keep a small part of each update, without any memory."""

import functools
import math
from collections.abc import Hashable
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from signax._core.checks import check_axis_name, check_block, check_key, check_number
from signax._core.leaves import (
    check_floating,
    common_dtype,
    mean,
    narrow,
    power_below,
    relative_to_peak,
    wide_dtype,
    worker_index,
)

Block = Literal["leaf", "tree", "row"] | int


def scale_by_scaled_sign(*, block: Block = "leaf") -> optax.GradientTransformationExtraArgs:
    r"""Replace updates by their signs times their mean magnitude.

    .. math:: u = \frac{\lVert p \rVert_1}{d} \operatorname{sign}(p)

    for each block p of d coordinates. With the density of :func:`signax.diagnostics.density`, the
    error :math:`\lVert u - p \rVert^2` is :math:`1 - \phi(p)` of :math:`\lVert p \rVert^2`, or
    less if coordinates are zero.

    Args:
      block: the coordinates that share a scale: `"leaf"`, an array (the paper's layers); `"tree"`,
        all arrays; `"row"`, the last axis of an array; or a number of consecutive coordinates in
        row-major order. The last block of an array may have fewer coordinates.

    Returns:
      A stateless transformation that keeps shapes and dtypes. Means are accumulated in at least
      f32. Leaves of size 0 pass through. The sign of 0 is 0.

    Raises:
      ValueError: `block` has another value.
      TypeError: `block` is traced; at the update, a leaf is not floating-point.

    Examples:
      >>> import jax.numpy as jnp, signax
      >>> tx = signax.scale_by_scaled_sign()
      >>> updates, _ = tx.update(jnp.array([1.0, -2.0, 6.0]), tx.init(None))
      >>> print(updates)
      [ 3. -3.  3.]

    References:
      Karimireddy et al., `Error Feedback Fixes SignSGD and other Gradient Compression Schemes
      <https://arxiv.org/abs/1901.09847>`_, 2019
    """
    block = check_block(block, ("leaf", "tree", "row"))

    def update_fn(updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any):
        del params, extra_args
        check_floating(updates)
        if block == "tree":
            scale = _tree_mean_magnitude(updates)
            return jax.tree.map(lambda p: _signed(scale, p), updates), state
        return jax.tree.map(lambda p: _scaled_sign(p, block), updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


def _tree_mean_magnitude(tree: Any) -> jax.Array:
    leaves = jax.tree.leaves(tree)
    dtype = functools.reduce(common_dtype, (leaf.dtype for leaf in leaves), jnp.float32)
    count = max(1, sum(leaf.size for leaf in leaves))
    share = power_below(count)
    sums = [jnp.zeros([], dtype)]  # if there are no leaves
    sums += [jnp.sum(jnp.abs(leaf).astype(dtype) * share) for leaf in leaves]
    # Without the barrier XLA copies the sums of all leaves into the program of every leaf.
    return jnp.sum(lax.optimization_barrier(jnp.stack(sums))) / (count * share)


def _scaled_sign(p: jax.Array, block: Block) -> jax.Array:
    if p.size == 0:
        return p
    magnitude = jnp.abs(p).astype(wide_dtype(p.dtype))
    if isinstance(block, int):
        scale = _block_means(magnitude.reshape(-1), min(block, p.size)).reshape(p.shape)
    elif block == "row" and p.ndim:
        scale = mean(magnitude, axis=-1, keepdims=True)
    else:
        scale = mean(magnitude)
    return _signed(scale, p)


def _signed(scale: jax.Array, p: jax.Array) -> jax.Array:
    # The scale of a tree may exceed the range of a leaf's dtype.
    return narrow(scale * jnp.sign(p).astype(scale.dtype), p.dtype)


def _block_means(values: jax.Array, block: int) -> jax.Array:
    """The mean of each coordinate's block, f[n] to f[n]. The last block may be short."""
    blocks = math.ceil(values.size / block)
    padded = jnp.pad(values, (0, blocks * block - values.size))
    sizes = jnp.minimum(block, values.size - block * jnp.arange(blocks))
    share = power_below(block)
    totals = jnp.sum(padded.reshape(blocks, block) * share, axis=1)
    means = totals / (sizes.astype(values.dtype) * share)
    return jnp.repeat(means, block)[: values.size]


class ScaleByStochasticSignState(NamedTuple):
    """State of `scale_by_stochastic_sign`.

    Attributes:
      key: key[] or a raw uint32 key, the random key of the next step, the same on every worker.
    """

    key: jax.Array


def scale_by_stochastic_sign(
    key: jax.Array,
    *,
    norm: Literal["l2", "linf"] | float = "l2",
    axis_name: Hashable | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replace updates by random signs that are unbiased up to the norm.

    .. math:: P(u_j = +1) = \frac{1}{2} + \frac{g_j}{2 \lVert g \rVert}, \quad u_j = -1
      \text{ otherwise}, \quad \text{so that} \quad E[u] = \frac{g}{\lVert g \rVert}

    for each array g. The signs are less noisy with :math:`\ell_\infty` or a bound than with the
    :math:`\ell_2` norm.

    Args:
      key: a random key, the same on every worker.
      norm: `"l2"`, `"linf"`, or a positive bound B on the magnitudes. A coordinate beyond the
        bound is clipped: its sign is certain, and biased, since the mean cannot be g/B.
      axis_name: the mapped axis along which the workers lie. A worker's index along the axis is
        folded into the key: draws are independent, and the state is the same on all workers.
        Without an axis, workers with equal keys draw equal numbers.

    Returns:
      A transformation with a `ScaleByStochasticSignState`. An all-zero leaf gives 0. A coordinate
      that is not finite gives NaN, with `"l2"` or `"linf"` on its whole leaf.

    Raises:
      ValueError: `norm` is unknown or not positive.
      TypeError: `key` is not a random key, `norm` is not a number, or `axis_name` names no axis; at
        the update, a leaf is not floating-point.
      NameError: at the update, the axis is not bound.

    Examples:
      >>> import jax, jax.numpy as jnp, signax
      >>> tx = signax.scale_by_stochastic_sign(jax.random.key(0), norm="linf")
      >>> gradient = jnp.array([4.0, -4.0])  # the magnitude of the norm: certain signs
      >>> updates, _ = tx.update(gradient, tx.init(gradient))
      >>> print(updates)
      [ 1. -1.]

    References:
      Safaryan and Richtarik, `Stochastic Sign Descent Methods: New Algorithms and Better Theory
      <https://arxiv.org/abs/1905.12938>`_, 2021
    """
    check_key(key)
    if axis_name is not None:
        check_axis_name(axis_name)
    if isinstance(norm, str) and norm not in ("l2", "linf"):
        raise ValueError(f"norm={norm!r} is unknown: use 'l2', 'linf' or a positive bound")
    if not isinstance(norm, str):
        check_number("norm", norm, low=0, ends="()")

    def init_fn(params: optax.Params):
        del params
        return ScaleByStochasticSignState(key=jnp.copy(key))  # a step may donate the state

    def update_fn(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, ScaleByStochasticSignState]:
        del params, extra_args
        check_floating(updates)
        next_key, drawn = jax.random.split(state.key)
        if axis_name is not None:
            drawn = jax.random.fold_in(drawn, worker_index(axis_name))
        leaves, structure = jax.tree.flatten(updates)
        keys = jax.random.split(drawn, max(1, len(leaves)))
        signs = [_stochastic_sign(leaf, keys[i], norm) for i, leaf in enumerate(leaves)]
        return structure.unflatten(signs), ScaleByStochasticSignState(key=next_key)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _stochastic_sign(g: jax.Array, key: jax.Array, norm: str | float) -> jax.Array:
    if g.size == 0:
        return g
    wide = g.astype(wide_dtype(g.dtype))
    if isinstance(norm, str):
        mean = relative_to_peak(wide)  # the mean of the sign
        if norm == "l2":
            length = jnp.sqrt(jnp.sum(jnp.square(mean)))
            mean = mean / jnp.where(length == 0, jnp.ones_like(length), length)
        finite = jnp.isfinite(mean)
    else:
        mean = wide / jnp.asarray(norm, wide.dtype)
        finite = jnp.isfinite(wide)
    drawn = jax.random.uniform(key, g.shape, wide.dtype, minval=-1, maxval=1)
    sign = jnp.where(drawn < mean, jnp.ones_like(g), -1)
    sign = jnp.where(jnp.any(wide != 0), sign, 0)
    return jnp.where(finite, sign, jnp.nan)


def scale_by_top_k(fraction: float) -> optax.GradientTransformationExtraArgs:
    r"""Keep the largest coordinates of each leaf and set the others to zero.

    Of d coordinates, the :math:`k = \lceil \text{fraction} \cdot d \rceil` of largest magnitude
    stay; of equal magnitudes the first. The squared error is at most :math:`1 - k/d` of the squared
    norm. This bound lets :func:`signax.error_feedback` correct the error.

    Args:
      fraction: the share of each leaf's coordinates to keep, above 0 and at most 1. A JAX
        array, as with `optax.inject_hyperparams`, is as exact as its dtype: six digits in f32.

    Returns:
      A stateless transformation that keeps shapes and dtypes.

    Raises:
      ValueError: `fraction` is outside (0, 1].
      TypeError: `fraction` is not a number; at the update, a leaf is not floating-point.

    Examples:
      >>> import jax.numpy as jnp, signax
      >>> tx = signax.scale_by_top_k(0.5)
      >>> updates, _ = tx.update(jnp.array([1.0, -5.0, 2.0, 3.0]), tx.init(None))
      >>> print(updates)
      [ 0. -5.  0.  3.]

    References:
      Karimireddy et al., `Error Feedback Fixes SignSGD and other Gradient Compression Schemes
      <https://arxiv.org/abs/1901.09847>`_, 2019
    """
    check_number("fraction", fraction, low=0, high=1, ends="(]")

    def update_fn(updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any):
        del params, extra_args
        check_floating(updates)

        def keep_largest(leaf: jax.Array):
            is_array = isinstance(fraction, jax.Array)
            most = leaf.size if is_array else _num_kept(fraction, leaf.size)
            _, order = lax.top_k(jnp.abs(leaf).reshape(-1), most)
            return _keep_first(leaf, order, fraction)

        return jax.tree.map(keep_largest, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


class ScaleByRandomKState(NamedTuple):
    """State of `scale_by_random_k`.

    Attributes:
      key: key[] or a raw uint32 key, the random key of the next step.
    """

    key: jax.Array


def scale_by_random_k(fraction: float, key: jax.Array) -> optax.GradientTransformationExtraArgs:
    r"""Keep random coordinates of each leaf and set the others to zero.

    Every step draws :math:`k = \lceil \text{fraction} \cdot d \rceil` of d coordinates. On average
    the bound of :func:`signax.scale_by_top_k` holds. Updates are not scaled by :math:`d/k`: scaling
    would make them unbiased, but break the bound.

    Args:
      fraction: the share of each leaf's coordinates to keep, above 0 and at most 1. A JAX
        array, as with `optax.inject_hyperparams`, is as exact as its dtype: six digits in f32.
      key: a random key. Workers with equal keys keep the same coordinates.

    Returns:
      A transformation with a `ScaleByRandomKState` that keeps shapes and dtypes.

    Raises:
      ValueError: `fraction` is outside (0, 1].
      TypeError: `fraction` is no number, or `key` no random key; at the update, a leaf is not
        floating-point.

    Examples:
      >>> import jax, jax.numpy as jnp, signax
      >>> tx = signax.scale_by_random_k(0.25, jax.random.key(0))
      >>> updates, _ = tx.update(jnp.ones(8), tx.init(None))
      >>> print(jnp.sum(updates))
      2.0

    References:
      Karimireddy et al., `Error Feedback Fixes SignSGD and other Gradient Compression Schemes
      <https://arxiv.org/abs/1901.09847>`_, 2019
    """
    check_number("fraction", fraction, low=0, high=1, ends="(]")
    check_key(key)

    def init_fn(params: optax.Params):
        del params
        return ScaleByRandomKState(key=jnp.copy(key))  # a step may donate the state

    def update_fn(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, ScaleByRandomKState]:
        del params, extra_args
        check_floating(updates)
        next_key, drawn = jax.random.split(state.key)
        leaves, structure = jax.tree.flatten(updates)
        keys = jax.random.split(drawn, max(1, len(leaves)))
        kept = [
            _keep_first(leaf, jax.random.permutation(keys[i], leaf.size), fraction)
            for i, leaf in enumerate(leaves)
        ]
        return structure.unflatten(kept), ScaleByRandomKState(key=next_key)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _num_kept(fraction: Any, size: int) -> Any:
    """ceil(fraction * size), where `fraction` is taken as the decimal number in the user's code.

    A JAX array is as exact as its dtype: in f32 up to 3 coordinates in ten million are missing.
    """
    if isinstance(fraction, jax.Array):
        if not jnp.issubdtype(fraction.dtype, jnp.floating):
            fraction = fraction.astype(jnp.float32)
        exact = 1 - 2 * float(jnp.finfo(fraction.dtype).eps)  # keeps whole numbers from rounding up
        wide = fraction.astype(wide_dtype(fraction.dtype))  # f16 ends below the size of many leaves
        kept = jnp.ceil(wide * size * exact).astype(jnp.int32)
        return jnp.where(wide >= 1, size, kept)
    number = np.asarray(fraction)[()]
    if not np.issubdtype(number.dtype, np.floating):
        number = float(number)
    # NumPy prints the shortest decimal that rounds to the number in its own dtype.
    return math.ceil(Fraction(str(number)) * size)


def _keep_first(leaf: jax.Array, order: jax.Array, fraction: Any) -> jax.Array:
    """Keep the coordinates at the front of `order`, a fraction of all, and zero the others."""
    first = jnp.arange(order.size) < _num_kept(fraction, leaf.size)
    kept = jnp.zeros(leaf.size, jnp.bool_).at[order].set(first)
    return jnp.where(kept.reshape(leaf.shape), leaf, 0)
