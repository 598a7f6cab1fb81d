"""Transformations that remember: momentum, error memory, and keeping both finite."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from signax._ballots import all_finite, take_part
from signax._checks import (
    check_accumulator_dtype,
    check_alike,
    check_floating,
    check_number,
    check_transformation,
    is_traced,
)
from signax._numerics import add_memory, common_dtype, narrow, short_of_infinity
from signax._participation import finite_elsewhere


class ScaleBySignumState(NamedTuple):
    """State of `scale_by_signum`.

    Attributes:
      count: int32[], the steps taken.
      momentum: the moving average m of the updates.
    """

    count: jax.typing.ArrayLike
    momentum: optax.Updates


def scale_by_signum(
    b1: float = 0.9,
    *,
    warmup: bool = False,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces updates by the signs of their moving average.

    .. math:: m_t = \beta m_{t-1} + (1 - \beta) g_t, \quad u_t = \operatorname{sign}(m_t)

    Args:
      b1: the decay :math:`\beta` of the average, in [0, 1).
      warmup: whether the first C steps emit :math:`\operatorname{sign}(g_t)` while m fills, as the
        paper's theory has it. C is the smallest number such that, for every k >= C,
        :math:`\frac{k}{2} \beta^k \le \frac{1}{(1 - \beta^2)(k + 1)}` and
        :math:`\beta^{k + 1} \le \frac{1}{2}`; 54 for 0.9.
      nesterov: whether the sign is taken of :math:`\beta m_t + (1 - \beta) g_t`.
      accumulator_dtype: the dtype of m; by default that of the parameters.

    Returns:
      A transformation with a `ScaleBySignumState` whose updates are +1, -1 and 0 in each leaf's
      dtype.

    Raises:
      ValueError: `b1` is outside [0, 1); at the update, the state is that of another tree.
      TypeError: `warmup` with a `b1` that is traced, so that C is unknown; at the update, a leaf
        is not floating-point.

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
    check_number("b1", b1, low=0, high=1)
    check_accumulator_dtype(accumulator_dtype)
    if warmup and is_traced(b1):
        raise TypeError(
            "warmup=True needs a b1 that is known when the step is built: list 'b1' in "
            "the static_args of optax.inject_hyperparams"
        )
    warmup_steps = _warmup_steps(float(b1)) if warmup else 0

    def init_fn(params):
        check_floating(params, "params", only_arrays=False)
        momentum = optax.tree.zeros_like(params, dtype=accumulator_dtype)
        return ScaleBySignumState(count=jnp.zeros([], jnp.int32), momentum=momentum)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        check_floating(updates)
        check_alike("updates", updates, "state.momentum", state.momentum)

        def average(g, m):
            wide = common_dtype(g.dtype, m.dtype)
            return (((1 - b1) * g).astype(wide) + (b1 * m).astype(wide)).astype(m.dtype)

        momentum = jax.tree.map(average, updates, state.momentum)
        direction = jax.tree.map(average, updates, momentum) if nesterov else momentum
        if warmup_steps:
            filling = state.count < warmup_steps
            direction = jax.tree.map(
                lambda g, m: jnp.where(filling, g, m.astype(g.dtype)), updates, direction
            )
        signs = jax.tree.map(lambda g, m: jnp.sign(m).astype(g.dtype), updates, direction)
        count = optax.safe_increment(state.count)
        return signs, ScaleBySignumState(count=count, momentum=momentum)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _warmup_steps(b1: float) -> int:
    """The paper's C(b1)."""

    def filled(k: int) -> bool:
        return k / 2 * b1**k <= 1 / ((1 - b1**2) * (k + 1)) and b1 ** (k + 1) <= 0.5

    if b1 == 0:
        return 0
    peak = 2 / -math.log(b1)  # of k (k + 1) b1^k: past it, what holds once holds for ever
    steps = k = 0
    while k <= peak or not filled(k):
        k += 1
        if not filled(k - 1):
            steps = k
    return steps


class ErrorFeedbackState(NamedTuple):
    """State of `error_feedback`.

    Attributes:
      error: the memory e, what was not emitted so far.
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
    r"""Adds to each update what compression has left out so far.

    .. math:: p_t = g_t + \lambda e_t, \quad u_t = C(p_t), \quad e_{t+1} = p_t - u_t

    with :math:`u_t` exactly as emitted, after rounding to the leaf's dtype, so that nothing is
    lost. Any transformation that compresses may stand inside: :func:`signax.scale_by_scaled_sign`,
    :func:`signax.scale_by_top_k`, :func:`signax.scale_by_random_k`, or a chain of them.

    What does not compress must stay outside. A learning rate inside makes the memory grow without
    bound, since most of every update is taken for an error; weight decay inside is cancelled by the
    memory; a vote inside subtracts what others have sent.

    The memory is in the units of the gradient, so that a schedule of learning rates after it
    changes nothing about it. Where the rate :math:`\gamma_t` is already in the updates that come
    in, as in the paper, give it as `learning_rate`; then

    .. math:: p_t = \gamma_t g_t + \lambda \gamma_t e_t, \quad
      e_{t+1} = \frac{p_t - u_t}{\gamma_t}

    so that what is left over from larger steps does not outweigh the smaller ones that follow. A
    step of rate 0 leaves the memory as it is.

    Args:
      compressor: the transformation C.
      decay: the share :math:`\lambda` of the memory that is added, in [0, 1].
      learning_rate: the rate by which the updates that come in are already multiplied, a number or
        a schedule of the steps of this transformation. A constant changes nothing.
      accumulator_dtype: the dtype of e and p; by default that of the parameters. Use f32 with bf16
        gradients.

    Returns:
      A transformation with an `ErrorFeedbackState`; extra arguments are passed to the compressor.

    Raises:
      ValueError: `decay` is outside [0, 1]; at the update, the state is that of another tree.
      TypeError: at the update, a leaf is not floating-point.

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
    check_rate(learning_rate)
    check_accumulator_dtype(accumulator_dtype)
    compressor = optax.with_extra_args_support(compressor)

    def init_fn(params):
        check_floating(params, "params", only_arrays=False)
        error = optax.tree.zeros_like(params, dtype=accumulator_dtype)
        count = jnp.zeros([], jnp.int32)
        return ErrorFeedbackState(error=error, inner_state=compressor.init(error), count=count)

    def update_fn(updates, state, params=None, **extra_args):
        check_floating(updates)
        check_alike("updates", updates, "state.error", state.error)
        rate = current_rate(learning_rate, state.count)
        memory = in_units_of(rate, state.error)
        corrected = jax.tree.map(partial(add_memory, decay=decay), updates, memory)
        compressed, inner_state = compressor.update(
            corrected, state.inner_state, params, **extra_args
        )
        emitted = jax.tree.map(lambda g, u: narrow(u, g.dtype), updates, compressed)
        left = jax.tree.map(lambda p, u: p - u.astype(p.dtype), corrected, emitted)
        error = in_gradient_units(rate, left, memory, state.error)
        count = optax.safe_increment(state.count)
        return emitted, ErrorFeedbackState(error=error, inner_state=inner_state, count=count)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def check_rate(learning_rate: Any) -> None:
    """Refuses what is neither a number nor a schedule, nor `None`."""
    if learning_rate is not None and not callable(learning_rate):
        check_number("learning_rate", learning_rate, low=-math.inf)


def current_rate(learning_rate: optax.ScalarOrSchedule | None, count: Any) -> Any:
    """The rate at a step, or `None` where memories need none."""
    return learning_rate(count) if callable(learning_rate) else learning_rate


def in_units_of(rate: Any, memory: Any) -> Any:
    """A memory in units of the gradient, times the rate that updates are multiplied by."""
    if rate is None:
        return memory
    return jax.tree.map(lambda e: e * jnp.asarray(rate, e.dtype), memory)


def in_gradient_units(rate: Any, left: Any, scaled: Any, memory: Any) -> Any:
    """What is left after a step, over its rate; the memory as it was where the step kept it."""
    if rate is None:
        return left

    def divide(new, before, old):
        divisor = jnp.asarray(rate, new.dtype)
        kept = (divisor == 0) | (new == before)
        quotient = new / jnp.where(divisor == 0, jnp.ones_like(divisor), divisor)
        return jnp.where(kept, old, short_of_infinity(quotient, new))

    return jax.tree.map(divide, left, scaled, memory)


def hold_if_nonfinite(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Keeps NaN and infinity out of a transformation's state.

    If the incoming updates, the inner transformation's output or its new floating-point state hold
    a NaN or an infinity, its floating-point state stays as it was (counts and keys advance, so that
    they stay the same on every worker), and every update that comes out is NaN: a vote or a mean
    that follows leaves this worker out for the step, and a bad batch is forgotten by the next.
    The same if updates of another group are not finite, see :func:`signax.leave_out_nonfinite`.

    Args:
      inner: the transformation to protect; put the vote after this, not into it.

    Returns:
      A transformation with the inner one's state; extra arguments are passed on.

    Examples:
      >>> import jax.numpy as jnp, signax
      >>> tx = signax.hold_if_nonfinite(signax.scale_by_signum())
      >>> state = tx.init(jnp.zeros(2))
      >>> updates, state = tx.update(jnp.array([jnp.inf, 1.0]), state)
      >>> print(updates, state.momentum, state.count)
      [nan nan] [0. 0.] 1
    """
    check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)

    def update_fn(updates, state, params=None, **extra_args):
        new_updates, new_state = inner.update(updates, state, params, **extra_args)
        marked = mark_nonfinite(new_updates, updates, new_state)
        elsewhere = finite_elsewhere(updates, extra_args.get("raw"))
        finite = take_part(all_finite(marked), elsewhere)
        marked = jax.tree.map(lambda u: jnp.where(finite, u, jnp.nan).astype(u.dtype), marked)
        return marked, hold(finite, state, new_state)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def mark_nonfinite(new_updates: Any, updates: Any, new_state: Any) -> Any:
    """Makes new updates NaN at one coordinate at least if anything beside them is not finite.

    State that is laid out like the updates, such as a momentum, is looked at coordinate by
    coordinate, in the same pass as the updates.
    """
    is_like_updates = is_like_tree(updates)
    beside, rest = [jax.tree.leaves(updates)], []
    for node in jax.tree.leaves(new_state, is_leaf=is_like_updates):
        if is_like_updates(node):
            beside.append(jax.tree.leaves(node))
        else:
            rest.append(node)
    rest_finite = jnp.where(all_finite(rest), 0.0, jnp.nan)

    def mark(new, *others):
        floating = [other for other in others if jnp.issubdtype(other.dtype, jnp.floating)]
        for other in (rest_finite, *floating):
            new += (0 * other).astype(new.dtype)  # NaN, unless it is finite
        return new

    new_leaves, new_structure = jax.tree.flatten(new_updates)
    return new_structure.unflatten(
        mark(new, *others) for new, *others in zip(new_leaves, *beside, strict=True)
    )


def is_like_tree(tree: Any) -> Callable[[Any], bool]:
    """Tells whether a node of another tree has the structure and the shapes of this one."""
    shapes, structure = [leaf.shape for leaf in jax.tree.leaves(tree)], jax.tree.structure(tree)

    def is_like(node):
        leaves, found = jax.tree.flatten(node)
        return found == structure and [jnp.shape(leaf) for leaf in leaves] == shapes

    return is_like


def hold(finite: jax.Array, state: Any, new_state: Any) -> Any:
    """The new state if it is finite, else the old one with counts and keys that have advanced."""

    def choose(old, new):
        return jnp.where(finite, new, old) if jnp.issubdtype(new.dtype, jnp.floating) else new

    return jax.tree.map(choose, state, new_state)


def checked(
    inner: optax.GradientTransformation, memory: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Holds one of Optax's transformations to the contract of those here.

    Leaves must be floating-point, the field `memory` of the state must be a tree like the updates,
    and updates keep their dtypes.
    """

    def init_fn(params):
        if memory is not None:
            check_floating(params, "params", only_arrays=False)
        return inner.init(params)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        check_floating(updates)
        if memory is not None:
            check_alike("updates", updates, f"state.{memory}", getattr(state, memory))
        with jax.numpy_dtype_promotion("standard"):  # Optax lets JAX promote
            new_updates, state = inner.update(updates, state, params)
        return optax.tree.cast_like(new_updates, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
