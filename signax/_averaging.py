"""Means as gradient transformations: of signs, of scaled signs with memories, in full precision."""

from collections.abc import Hashable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from signax._ballots import Zeros, all_finite, take_part
from signax._checks import (
    check_accumulator_dtype,
    check_axis_name,
    check_floating,
    check_mode,
    check_number,
)
from signax._collectives import check_votable, mean_active, vote
from signax._error_memory import FEEDBACKS, Feedback, ScaledSignsMemory, scaled_signs_memory
from signax._exchange import Transport
from signax._means import mean_options
from signax._scaled_signs import check_block, mean_scaled
from signax._transforms import check_rate, current_rate, in_gradient_units, in_units_of


class MeanSignsState(NamedTuple):
    """State of `mean_signs`.

    Attributes:
      count: int32[], the steps taken, the same on every worker; it drives the dither.
    """

    count: jax.typing.ArrayLike


def mean_signs(
    axis_name: Hashable,
    *,
    zeros: Zeros = "dither",
    transport: Transport = "auto",
    split_over: Hashable | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces updates by the exact mean of the workers' signs: one bit up, the count down.

    .. math:: u = \frac{1}{|S|} \sum_{i \in S} \operatorname{sign}(u_i)

    with S as in :func:`signax.majority_vote`. See :func:`signax.pmean_signs` for what is sent and
    for the options.

    Args:
      axis_name: the mapped axis along which the workers lie.
      zeros: what a zero ballot is: `"dither"`, `"abstain"` (two bits up) or `"plus"`.
      transport: how ballots travel: `"packed"`, `"gather"`, `"int8"` or `"auto"`.
      split_over: as in :func:`signax.majority_vote`.

    Returns:
      A transformation whose updates are means between -1 and 1 in each leaf's dtype, and 0
      everywhere if nobody takes part.

    Raises:
      TypeError: `axis_name` names no axis; at the update, a leaf is not floating-point.
      ValueError: a mode is unknown; at the update, a leaf does not vary over the axis.
      NameError: at the update, the axis is not bound.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, signax
      >>> tx = signax.mean_signs("workers")
      >>> gradients = jnp.array([[1.0, -3.0], [-2.0, -1.0], [1.0, jnp.nan]])  # the last one is out
      >>> update = lambda g: tx.update(g, tx.init(None))[0]
      >>> print(jax.vmap(update, axis_name="workers")(gradients)[0])
      [ 0. -1.]

    References:
      Safaryan and Richtarik, `Stochastic Sign Descent Methods: New Algorithms and Better Theory
      <https://arxiv.org/abs/1905.12938>`_, 2021
    """
    options = mean_options(axis_name, zeros, transport, split_over)

    def init_fn(params):
        del params
        return MeanSignsState(count=jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None, *, active=None, param_specs=None, **extra_args):
        del params, extra_args
        updates, _ = vote(
            updates, options, step=state.count, active=active, param_specs=param_specs
        )
        return updates, MeanSignsState(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class MeanScaledSignsState(NamedTuple):
    """State of `mean_scaled_signs`.

    Attributes:
      count: int32[], the steps taken, the same on every worker; it drives the dither.
      memory: what compression has left out, this worker's own; see `ScaledSignsMemory`.
    """

    count: jax.typing.ArrayLike
    memory: ScaledSignsMemory


def mean_scaled_signs(
    axis_name: Hashable,
    *,
    feedback: Feedback = "both",
    block: Literal["leaf"] | int = "leaf",
    decay: float = 1.0,
    learning_rate: optax.ScalarOrSchedule | None = None,
    accumulator_dtype: Any = None,
    num_workers: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces updates by the mean of the workers' scaled signs, with error feedback.

    .. math:: p_i = g_i + \lambda e_i, \quad e_i \leftarrow p_i - C(p_i), \quad
      P = \frac{1}{|S|} \sum_{i \in S} C(p_i) + \lambda E, \quad E \leftarrow P - C(P), \quad
      u = C(P), \quad C(p) = \frac{\lVert p \rVert_1}{d} \operatorname{sign}(p)

    with S as in :func:`signax.majority_vote`. See :func:`signax.pmean_scaled_signs` for what is
    sent. The transformation owns both memories, since only it knows what was sent: no
    `error_feedback` belongs around it.

    Args:
      axis_name: the mapped axis along which the workers lie.
      feedback: `"both"`, memories of workers and servers, one bit each way; `"worker"`, of the
        workers, with means sent down in full precision; `"none"`, no memory, means in full.
      block: what shares one scale: `"leaf"` or so many coordinates at most, see
        :func:`signax.pmean_scaled_signs`.
      decay: the share :math:`\lambda` of the memories that is added, in [0, 1].
      learning_rate: where updates are already multiplied by a learning rate, that rate: see
        :func:`signax.error_feedback`.
      accumulator_dtype: the dtype of the memories; by default that of the parameters. Use f32 with
        bf16 gradients.
      num_workers: M, which the servers' memory needs where `init` runs outside of the axis, so not
        under :class:`signax.DataParallel`.

    Returns:
      A transformation with a `MeanScaledSignsState` that keeps shapes and dtypes. Its updates are 0
      everywhere if nobody takes part.

    Raises:
      ValueError: an option is out of range; at the update, the state is that of another tree or of
        another number of workers, a leaf does not vary over the axis, or with `"both"` a leaf is
        sharded within a worker.
      TypeError: `axis_name` names no axis; at the update, a leaf is not floating-point.
      NameError: at the update, the axis is not bound; at `init`, the number of workers is unknown.

    Examples:
      >>> import jax, jax.numpy as jnp, signax
      >>> tx = signax.mean_scaled_signs("workers", num_workers=2)
      >>> gradients = jnp.array([[1.0, -3.0], [2.0, -1.0]])
      >>> update = lambda g: tx.update(g, tx.init(g))
      >>> updates, state = jax.vmap(update, axis_name="workers")(gradients)
      >>> print(updates[0], state.memory.worker[0])
      [ 1.75 -1.75] [-1. -1.]

    References:
      Karimireddy et al., `Error Feedback Fixes SignSGD and other Gradient Compression Schemes
      <https://arxiv.org/abs/1901.09847>`_, 2019; Zheng, Huang and Kwok, `Communication-Efficient
      Distributed Blockwise Momentum SGD with Error-Feedback
      <https://arxiv.org/abs/1905.10936>`_, 2019
    """
    check_axis_name(axis_name)
    check_mode("feedback", feedback, FEEDBACKS)
    check_block(block)
    check_number("decay", decay, low=0, high=1, ends="[]")
    check_rate(learning_rate)
    check_accumulator_dtype(accumulator_dtype)
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"num_workers={num_workers!r} must be at least 1")

    def init_fn(params):
        check_floating(params, "params")
        workers = 1  # without servers' parts of leaves their number does not matter
        if feedback == "both" and jax.tree.leaves(params):
            workers = num_workers or _axis_size(axis_name)
        memory = scaled_signs_memory(params, workers, feedback=feedback, dtype=accumulator_dtype)
        return MeanScaledSignsState(count=jnp.zeros([], jnp.int32), memory=memory)

    def update_fn(updates, state, params=None, *, active=None, param_specs=None, **extra_args):
        del params, extra_args
        rate = current_rate(learning_rate, state.count)
        before = in_units_of(rate, state.memory)
        updates, left = mean_scaled(
            updates,
            axis_name,
            before,
            step=state.count,
            block=block,
            decay=decay,
            active=active,
            param_specs=param_specs,
        )
        memory = in_gradient_units(rate, left, before, state.memory)
        count = optax.safe_increment(state.count)
        return updates, MeanScaledSignsState(count=count, memory=memory)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _axis_size(axis_name: Hashable) -> int:
    try:
        return lax.axis_size(axis_name)
    except NameError:
        raise NameError(
            f"axis_name={axis_name!r} is not bound where the state is made, so that the number of "
            "workers is unknown: pass num_workers, or use signax.DataParallel"
        ) from None


def average_updates(axis_name: Hashable) -> optax.GradientTransformationExtraArgs:
    r"""Replaces updates by their full-precision mean over the workers that take part.

    .. math:: u = \frac{1}{|S|} \sum_{i \in S} u_i

    with S as in :func:`signax.majority_vote`. For leaves on which a vote is a poor step (norms,
    biases, embeddings with sparse gradients), through `optax.partition`, and for comparison.

    Args:
      axis_name: the mapped axis along which the workers lie.

    Returns:
      A stateless transformation. The mean is accumulated in at least f32 and rounded to each
      leaf's dtype; it is 0 if nobody takes part. It costs one all-reduce of f32 (or f64) numbers.

    Raises:
      TypeError: `axis_name` names no single axis; at the update, a leaf is not floating-point.
      ValueError: at the update, a leaf does not vary over the axis.
      NameError: at the update, the axis is not bound.

    Examples:
      >>> import jax, jax.numpy as jnp, signax
      >>> tx = signax.average_updates("workers")
      >>> gradients = jnp.array([[1.0, 2.0], [3.0, 2.0], [jnp.nan, 0.0]])  # the last one is out
      >>> update = lambda g: tx.update(g, tx.init(None))[0]
      >>> print(jax.vmap(update, axis_name="workers")(gradients)[0])
      [2. 2.]
    """
    check_axis_name(axis_name)

    def update_fn(updates, state, params=None, *, active=None, **extra_args):
        del params, extra_args
        check_votable(updates, axis_name)
        return mean_active(updates, axis_name, take_part(all_finite(updates), active)), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
