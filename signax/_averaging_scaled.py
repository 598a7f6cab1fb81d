"""The mean of scaled signs as a gradient transformation, alone or behind a momentum."""

from collections.abc import Hashable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from signax._ballots import take_part
from signax._checks import (
    check_accumulator_dtype,
    check_axis_name,
    check_block,
    check_count,
    check_floating,
    check_mode,
    check_number,
)
from signax._collectives import check_votable
from signax._error_memory import FEEDBACKS, Feedback, ScaledSignsMemory, scaled_signs_memory
from signax._participation import (
    Participation,
    admitted,
    finite_elsewhere,
    next_participation,
    no_participation,
)
from signax._scaled_signs import mean_scaled
from signax._transforms import (
    check_rate,
    current_rate,
    hold,
    in_gradient_units,
    in_units_of,
    mark_nonfinite,
)


class MeanScaledSignsState(NamedTuple):
    """State of `mean_scaled_signs`.

    Attributes:
      count: int32[], the steps taken, the same on every worker; it drives the dither.
      memory: what compression has left out, this worker's own; see `ScaledSignsMemory`.
      participation: who took part, see `Participation`.
    """

    count: jax.typing.ArrayLike
    memory: ScaledSignsMemory
    participation: Participation


class MeanOptions(NamedTuple):
    """The options of `mean_scaled_signs`."""

    axis_name: Hashable
    feedback: Feedback = "both"
    block: Literal["leaf"] | int = "leaf"
    decay: float = 1.0
    learning_rate: optax.ScalarOrSchedule | None = None
    accumulator_dtype: Any = None
    num_workers: int | None = None


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
      axis_name: the mapped axis along which the workers lie, or a tuple of axes.
      feedback: `"both"`, memories of workers and servers, one bit each way; `"worker"`, of the
        workers, with means sent down in full precision; `"none"`, no memory, means in full.
      block: what shares one scale: `"leaf"` or so many coordinates at most, see
        :func:`signax.pmean_scaled_signs`. A leaf that is sharded within a worker, by the
        `param_specs` of :class:`signax.DataParallel`, has one scale too, for one small sum over
        those axes. A number of coordinates is counted in each device's block of the leaf, and so
        are the coordinates whose parity dithers zeros: then results depend on the mesh.
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
    options = MeanOptions(
        axis_name, feedback, block, decay, learning_rate, accumulator_dtype, num_workers
    )
    options = _checked(options)

    def update_fn(
        updates, state, params=None, *, active=None, raw=None, param_specs=None, **extra_args
    ):
        del params, extra_args
        active = admitted(active, finite_elsewhere(updates, raw))
        return _update_mean(updates, state, options, active, param_specs)[:2]

    return optax.GradientTransformationExtraArgs(partial(_init_mean, options=options), update_fn)


def _checked(options: MeanOptions) -> MeanOptions:
    """The options, if they are right, with the block as one of Python's own types."""
    check_axis_name(options.axis_name)
    check_mode("feedback", options.feedback, FEEDBACKS)
    check_number("decay", options.decay, low=0, high=1, ends="[]")
    check_rate(options.learning_rate)
    check_accumulator_dtype(options.accumulator_dtype)
    if options.num_workers is not None:
        check_count("num_workers", options.num_workers)
    return options._replace(block=check_block(options.block, ("leaf",)))


def _init_mean(params: optax.Params, options: MeanOptions) -> MeanScaledSignsState:
    check_floating(params, "params", only_arrays=False)
    workers = 1  # without servers' parts of leaves their number does not matter
    if options.feedback == "both" and jax.tree.leaves(params):
        workers = options.num_workers or _axis_size(options.axis_name)
    memory = scaled_signs_memory(
        params, workers, feedback=options.feedback, dtype=options.accumulator_dtype
    )
    return MeanScaledSignsState(jnp.zeros([], jnp.int32), memory, no_participation())


def _update_mean(
    updates: Any, state: Any, options: MeanOptions, active: Any, param_specs: Any
) -> tuple[Any, MeanScaledSignsState, jax.Array]:
    """Everybody's update, the new state, and whether this worker's updates are finite."""
    rate = current_rate(options.learning_rate, state.count)
    before = in_units_of(rate, state.memory)
    outcome, left = mean_scaled(
        updates,
        options.axis_name,
        before,
        step=state.count,
        block=options.block,
        decay=options.decay,
        active=active,
        param_specs=param_specs,
    )
    state = MeanScaledSignsState(
        optax.safe_increment(state.count),
        in_gradient_units(rate, left, before, state.memory),
        next_participation(state.participation, outcome.voters, outcome.takes_part),
    )
    return outcome.updates, state, outcome.finite


def averaged(
    momentum: optax.GradientTransformation, options: MeanOptions
) -> optax.GradientTransformationExtraArgs:
    """`chain(hold_if_nonfinite(momentum), mean_scaled_signs(...))` in fewer passes over memory.

    What is not finite shows in the scales; the state is held by that.
    """
    options = _checked(options)

    def init_fn(params):
        return momentum.init(params), _init_mean(params, options)

    def update_fn(
        updates, state, params=None, *, active=None, raw=None, param_specs=None, **extra_args
    ):
        del params, extra_args
        elsewhere = finite_elsewhere(updates, raw)
        active = admitted(active, elsewhere)
        check_votable(updates, options.axis_name)  # behind a momentum types would not tell
        old_state, mean_state = state
        directions, new_state = momentum.update(updates, old_state)
        marked = mark_nonfinite(directions, updates, new_state)
        updates, mean_state, finite = _update_mean(marked, mean_state, options, active, param_specs)
        momentum_state = hold(take_part(finite, elsewhere), old_state, new_state)
        return updates, (momentum_state, mean_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _axis_size(axis_name: Hashable) -> int:
    try:
        return lax.axis_size(axis_name)
    except NameError:
        raise NameError(
            f"axis_name={axis_name!r} is not bound where the state is made, so that the number of "
            "workers is unknown: pass num_workers, or use signax.DataParallel"
        ) from None
