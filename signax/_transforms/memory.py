"""Transformations with a memory: momentum and error feedback."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from signax._core.checks import (
    check_accumulator_dtype,
    check_learning_rate,
    check_number,
    check_transformation,
    renamed,
)
from signax._core.leaves import (
    add_memory,
    check_alike,
    check_floating,
    common_dtype,
    is_traced,
    narrow,
    short_of_infinity,
)


class ScaleBySignumState(NamedTuple):
    """State of `scale_by_signum`.

    Attributes:
      count: int32[], the steps taken.
      momentum: the moving average m of the updates, a tree like the parameters, in their dtypes or
        in `accumulator_dtype`.
    """

    count: jax.typing.ArrayLike
    momentum: optax.Updates


@renamed(b1="beta")
def scale_by_signum(
    beta: float = 0.9,
    *,
    warmup: bool = False,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replace updates by the signs of their moving average.

    .. math:: m_t = \beta m_{t-1} + (1 - \beta) g_t, \quad u_t = \operatorname{sign}(m_t)

    Args:
      beta: the decay :math:`\beta` of the average, in [0, 1).
      warmup: whether the first C steps emit :math:`\operatorname{sign}(g_t)` while m fills, as in
        the paper's theory. C is the smallest number such that, for every :math:`k \ge C`,
        :math:`\frac{k}{2} \beta^k \le \frac{1}{(1 - \beta^2)(k + 1)}` and
        :math:`\beta^{k + 1} \le \frac{1}{2}`; 54 for 0.9.
      nesterov: whether to take the sign of :math:`\beta m_t + (1 - \beta) g_t`.
      accumulator_dtype: the dtype of m; by default the dtype of the parameters.

    Returns:
      A transformation with a `ScaleBySignumState` whose updates are +1, -1 and 0 in each leaf's
      dtype.

    Raises:
      ValueError: `beta` is outside [0, 1), or `accumulator_dtype` is no floating-point dtype; at
        the update, the state belongs to another tree.
      TypeError: `beta` is not a number, or is traced while `warmup` is set; at `init` and at the
        update, a leaf is not floating-point.

    Examples:
      >>> import jax.numpy as jnp, signax
      >>> tx = signax.scale_by_signum(0.5)
      >>> state = tx.init(jnp.zeros(2))
      >>> _, state = tx.update(jnp.array([4.0, -4.0]), state)
      >>> updates, state = tx.update(jnp.array([-1.0, 8.0]), state)
      >>> print(updates, state.momentum)
      [1. 1.] [0.5 3. ]

    References:
      Bernstein et al., `signSGD: Compressed Optimisation for Non-Convex Problems
      <https://arxiv.org/abs/1802.04434>`_, 2018
    """
    check_number("beta", beta, low=0, high=1)
    check_accumulator_dtype(accumulator_dtype)
    if warmup and is_traced(beta):
        raise TypeError(
            "warmup=True needs a beta that is known when the step is built: list 'beta' in "
            "the static_args of optax.inject_hyperparams"
        )
    warmup_steps = _warmup_steps(float(beta)) if warmup else 0

    def init_fn(params: optax.Params):
        check_floating(params, "params", only_arrays=False)
        momentum = optax.tree.zeros_like(params, dtype=accumulator_dtype)
        return ScaleBySignumState(count=jnp.zeros([], jnp.int32), momentum=momentum)

    def update_fn(updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any):
        del params, extra_args
        check_floating(updates)
        check_alike("updates", updates, "state.momentum", state.momentum)

        def average(g: jax.Array, m: jax.Array):
            wide = common_dtype(g.dtype, m.dtype)
            return (((1 - beta) * g).astype(wide) + (beta * m).astype(wide)).astype(m.dtype)

        # Beta may have a wider dtype than the leaves.
        with jax.named_scope("signax.momentum"), jax.numpy_dtype_promotion("standard"):
            momentum = jax.tree.map(average, updates, state.momentum)
            direction = jax.tree.map(average, updates, momentum) if nesterov else momentum
        signs = jax.tree.map(lambda g, m: jnp.sign(m).astype(g.dtype), updates, direction)
        if warmup_steps:
            filling = state.count < warmup_steps
            signs = jax.tree.map(lambda g, s: jnp.where(filling, jnp.sign(g), s), updates, signs)
        count = optax.safe_increment(state.count)
        return signs, ScaleBySignumState(count=count, momentum=momentum)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _warmup_steps(beta: float) -> int:
    """The paper's C(beta)."""

    def filled(k: int) -> bool:
        return k / 2 * beta**k <= 1 / ((1 - beta**2) * (k + 1)) and beta ** (k + 1) <= 0.5

    if beta == 0:
        return 0
    peak = 2 / -math.log(beta)  # of k (k + 1) beta^k; past it, a k that is filled stays filled
    steps = k = 0
    while k <= peak or not filled(k):
        k += 1
        if not filled(k - 1):
            steps = k
    return steps


class ErrorFeedbackState(NamedTuple):
    """State of `error_feedback`.

    Attributes:
      error: the memory e, everything that compression has left out so far: a tree like the
        parameters, in their dtypes or in `accumulator_dtype`.
      inner_state: the compressor's state.
      count: int32[], the steps taken.
    """

    error: optax.Updates
    inner_state: optax.OptState
    count: jax.typing.ArrayLike


def error_feedback(
    compressor: optax.GradientTransformation,
    *,
    decay: float = 1.0,
    learning_rate: optax.ScalarOrSchedule | None = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Add to each update what compression has left out so far.

    .. math:: p_t = g_t + \lambda e_t, \quad u_t = C(p_t), \quad e_{t+1} = p_t - u_t

    with :math:`u_t` exactly as emitted, after rounding to the leaf's dtype, so nothing is lost. The
    compressor may be :func:`signax.scale_by_scaled_sign`, :func:`signax.scale_by_top_k`,
    :func:`signax.scale_by_random_k`, a chain of them, or any transformation that compresses.

    A transformation that does not compress must stay outside. With a learning rate inside, the
    memory grows without bound, since it takes most of every update for an error. Weight decay
    inside is cancelled by the memory. With a vote inside, the memory subtracts other workers'
    messages.

    The memory is in the units of the gradient, so a schedule of learning rates after the
    transformation does not affect it. If updates are already scaled by a learning rate
    :math:`\gamma_t`, as in the paper, pass it as `learning_rate`. Then

    .. math:: p_t = \gamma_t g_t + \lambda \gamma_t e_t, \quad
      e_{t+1} = \frac{p_t - u_t}{\gamma_t}

    and the remainders of larger steps do not outweigh the smaller steps that follow. A step of rate
    0 leaves the memory as it is.

    Args:
      compressor: the transformation C.
      decay: the share :math:`\lambda` of the memory that is added, in [0, 1].
      learning_rate: the rate by which incoming updates are already multiplied, a number or a
        schedule of this transformation's steps. A constant changes nothing.
      accumulator_dtype: the dtype of e and p; by default the dtype of the parameters. Use f32 with
        bf16 gradients.

    Returns:
      A transformation with an `ErrorFeedbackState`; extra arguments are passed to the compressor.

    Raises:
      ValueError: `decay` is outside [0, 1], or `accumulator_dtype` is no floating-point dtype; at
        the update, the state belongs to another tree.
      TypeError: `compressor` is not a transformation, or a number is of the wrong kind; at `init`
        and at the update, a leaf is not floating-point.

    Examples:
      >>> import jax.numpy as jnp, signax
      >>> tx = signax.error_feedback(signax.scale_by_top_k(0.5))
      >>> state = tx.init(jnp.zeros(2))
      >>> updates, state = tx.update(jnp.array([2.0, 3.0]), state)
      >>> print(updates, state.error)
      [0. 3.] [2. 0.]
      >>> updates, state = tx.update(jnp.array([2.0, 3.0]), state)
      >>> print(updates, state.error)
      [4. 0.] [0. 3.]

    References:
      Karimireddy et al., `Error Feedback Fixes SignSGD and other Gradient Compression Schemes
      <https://arxiv.org/abs/1901.09847>`_, 2019
    """
    check_transformation("compressor", compressor)
    check_number("decay", decay, low=0, high=1, ends="[]")
    check_learning_rate(learning_rate)
    check_accumulator_dtype(accumulator_dtype)
    compressor = optax.with_extra_args_support(compressor)

    def init_fn(params: optax.Params):
        check_floating(params, "params", only_arrays=False)
        error = optax.tree.zeros_like(params, dtype=accumulator_dtype)
        count = jnp.zeros([], jnp.int32)
        return ErrorFeedbackState(error=error, inner_state=compressor.init(error), count=count)

    def update_fn(updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any):
        check_floating(updates)
        check_alike("updates", updates, "state.error", state.error)
        rate = current_rate(learning_rate, state.count)
        with jax.named_scope("signax.momentum"):
            memory = in_units_of(rate, state.error)
            corrected = jax.tree.map(partial(add_memory, decay=decay), updates, memory)
        compressed, inner_state = compressor.update(
            corrected, state.inner_state, params, **extra_args
        )
        emitted = jax.tree.map(lambda g, u: narrow(u, g.dtype), updates, compressed)
        with jax.named_scope("signax.momentum"):
            left = jax.tree.map(lambda p, u: p - u.astype(p.dtype), corrected, emitted)
            error = in_gradient_units(rate, left, memory, state.error)
        count = optax.safe_increment(state.count)
        return emitted, ErrorFeedbackState(error=error, inner_state=inner_state, count=count)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def current_rate(learning_rate: optax.ScalarOrSchedule | None, count: Any) -> Any:
    """The rate at a step; `None` if memories need no rate."""
    return learning_rate(count) if callable(learning_rate) else learning_rate


def in_units_of(rate: Any, memory: Any) -> Any:
    """Scale a memory in units of the gradient by the rate of the updates."""
    if rate is None:
        return memory
    return jax.tree.map(lambda e: e * jnp.asarray(rate, e.dtype), memory)


def in_gradient_units(rate: Any, left: Any, scaled: Any, memory: Any) -> Any:
    """Divide the residual of a step by its rate; keep the old memory where the step did."""
    if rate is None:
        return left

    def divide(new: jax.Array, before: jax.Array, old: jax.Array):
        divisor = jnp.asarray(rate, new.dtype)
        kept = (divisor == 0) | (new == before)
        quotient = new / jnp.where(divisor == 0, jnp.ones_like(divisor), divisor)
        return jnp.where(kept, old, short_of_infinity(quotient, new))

    return jax.tree.map(divide, left, scaled, memory)


def checked(
    inner: optax.GradientTransformation, memory: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Hold an Optax transformation to this library's contract.

    Leaves must be floating-point, the state's field `memory` must be a tree like the updates, and
    updates and memory keep their dtypes.
    """
    update = inner.update if memory is None else jax.named_scope("signax.momentum")(inner.update)

    def init_fn(params: optax.Params):
        if memory is not None:
            check_floating(params, "params", only_arrays=False)
        return inner.init(params)

    def update_fn(updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any):
        del extra_args
        check_floating(updates)
        if memory is not None:
            check_alike("updates", updates, f"state.{memory}", getattr(state, memory))
        with jax.numpy_dtype_promotion("standard"):  # Optax lets JAX promote
            result: Any = update(updates, state, params)
        new_updates, new_state = result
        if memory is not None:  # a decay of a wider dtype would widen it
            kept = optax.tree.cast_like(getattr(new_state, memory), getattr(state, memory))
            new_state = new_state._replace(**{memory: kept})
        return optax.tree.cast_like(new_updates, updates), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
