"""Means of compressed values as gradient transformations, alone or after a momentum."""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from signax._core.checks import (
    check_accumulator_dtype,
    check_axis_name,
    check_block,
    check_count,
    check_learning_rate,
    check_mode,
    check_number,
)
from signax._core.leaves import check_floating, check_votable
from signax._transforms.memory import current_rate, in_gradient_units, in_units_of
from signax._transforms.participation import (
    NO_EXTRAS,
    Extras,
    Participation,
    hold,
    mark_nonfinite,
    next_participation,
    no_participation,
)
from signax._wire.exchange import take_part
from signax._wire.feedback import (
    FEEDBACKS,
    Feedback,
    ScaledSignsMemory,
    exchange_with_memory,
    init_memory,
    make_scaled,
)
from signax._wire.quantized import Bits, Quantized, check_bits
from signax._wire.scaled_signs import ScaledSigns


class MeanScaledSignsState(NamedTuple):
    """State of `mean_scaled_signs` and `mean_quantized`.

    Attributes:
      count: int32[], the steps taken, the same on every worker; it drives the dither.
      memory: this worker's :class:`signax.ScaledSignsMemory`.
      participation: a :class:`signax.Participation`.
    """

    count: jax.typing.ArrayLike
    memory: ScaledSignsMemory
    participation: Participation


class MeanOptions(NamedTuple):
    """The options of a mean of compressed values; `make` builds the codec."""

    axis_name: Hashable
    feedback: Feedback = "both"
    block: Literal["leaf"] | int = "leaf"
    decay: float = 1.0
    learning_rate: optax.ScalarOrSchedule | None = None
    accumulator_dtype: Any = None
    num_workers: int | None = None
    make: Callable[..., ScaledSigns] = ScaledSigns


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
    r"""Replace updates by the mean of the workers' scaled signs, with error feedback.

    .. math:: p_i = g_i + \lambda e_i, \quad e_i \leftarrow p_i - C(p_i), \quad
      P = \frac{1}{|S|} \sum_{i \in S} C(p_i) + \lambda E, \quad E \leftarrow P - C(P), \quad
      u = C(P), \quad C(p) = \frac{\lVert p \rVert_1}{d} \operatorname{sign}(p)

    with S as in :func:`signax.majority_vote`. :func:`signax.pmean_scaled_signs` says what is sent.
    The transformation owns both memories, since only it knows what was sent: do not wrap it in
    `error_feedback`.

    Args:
      axis_name: the mapped axis along which the workers lie, or a tuple of axes.
      feedback: `"both"`, memories of workers and servers, one bit each way; `"worker"`, of the
        workers, with means sent down in full precision; `"none"`, no memories, with means sent down
        in full precision.
      block: the coordinates that share a scale: `"leaf"` or the most in a block, see
        :func:`signax.pmean_scaled_signs`. A leaf that is sharded within a worker, by the
        `param_specs` of :class:`signax.DataParallel`, has one scale on the way up too, which takes
        one small sum over those axes. Servers' parts, a number of coordinates, and the coordinates
        whose parity dithers zeros are counted in each device's block of the leaf: results then
        depend on the mesh.
      decay: the share :math:`\lambda` of the memories that is added, in [0, 1].
      learning_rate: if updates are already scaled by a learning rate, that rate: see
        :func:`signax.error_feedback`.
      accumulator_dtype: the dtype of the memories; by default the dtype of the parameters. Use f32
        with bf16 gradients.
      num_workers: M, which the servers' memory needs where `init` runs outside the axis. Where the
        axis is bound, as under :class:`signax.DataParallel`, its size counts.

    Returns:
      A transformation with a `MeanScaledSignsState` that keeps shapes and dtypes. Its updates are 0
      everywhere if no worker takes part.

    Raises:
      ValueError: an option is unknown or out of range; at the update, the state belongs to another
        tree, number of workers or sharding within a worker, or a leaf does not vary over the axis.
      TypeError: `axis_name` names no axis, or an option is of the wrong kind; at `init` and at the
        update, a leaf is not floating-point.
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
    return _mean_of_compressed(
        MeanOptions(
            axis_name, feedback, block, decay, learning_rate, accumulator_dtype, num_workers
        )
    )


def mean_quantized(
    axis_name: Hashable,
    *,
    bits: Bits = 2,
    feedback: Feedback = "both",
    block: Literal["leaf"] | int = "leaf",
    decay: float = 1.0,
    learning_rate: optax.ScalarOrSchedule | None = None,
    accumulator_dtype: Any = None,
    num_workers: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replace updates by the mean of the workers' quantised values, with error feedback.

    It is :func:`signax.mean_scaled_signs` with a finer compressor of b bits,

    .. math:: C(p)_j = \operatorname{sign}(p_j) \left(2 \min\left(\left\lfloor
      \frac{|p_j|}{2 s} \right\rfloor, 2^{b-1} - 1\right) + 1\right) s, \quad
      s = c_b \frac{\lVert p \rVert_1}{d}

    so 2 or 4 bits per coordinate travel each way, and a scale per leaf or block.
    :func:`signax.pmean_quantized` explains the constants :math:`c_b`.

    Args:
      axis_name: the mapped axis along which the workers lie, or a tuple of axes.
      bits: the bits of a coordinate, 2 or 4.
      feedback: see :func:`signax.mean_scaled_signs`.
      block: see :func:`signax.mean_scaled_signs`.
      decay: see :func:`signax.mean_scaled_signs`.
      learning_rate: see :func:`signax.mean_scaled_signs`.
      accumulator_dtype: see :func:`signax.mean_scaled_signs`.
      num_workers: see :func:`signax.mean_scaled_signs`.

    Returns:
      A transformation with a `MeanScaledSignsState` that keeps shapes and dtypes. Its updates are 0
      everywhere if no worker takes part.

    Raises:
      ValueError: `bits` is neither 2 nor 4; or as in :func:`signax.mean_scaled_signs`.
      TypeError: as in :func:`signax.mean_scaled_signs`.
      NameError: as in :func:`signax.mean_scaled_signs`.

    Examples:
      >>> import jax, jax.numpy as jnp, signax
      >>> tx = signax.mean_quantized("workers", feedback="worker")
      >>> gradients = jnp.array([[1.0, -8.0], [1.0, -8.0]])
      >>> update = lambda g: tx.update(g, tx.init(g))
      >>> updates, state = jax.vmap(update, axis_name="workers")(gradients)
      >>> print(jnp.abs(updates[0] / updates[0, 0]).round())  # odd multiples of one scale
      [1. 3.]

    References:
      Max, `Quantizing for Minimum Distortion <https://doi.org/10.1109/TIT.1960.1057548>`_, 1960
    """
    check_bits(bits)
    make = partial(Quantized, bits=bits)
    return _mean_of_compressed(
        MeanOptions(
            axis_name, feedback, block, decay, learning_rate, accumulator_dtype, num_workers, make
        )
    )


def _mean_of_compressed(options: MeanOptions) -> optax.GradientTransformationExtraArgs:
    options = _checked(options)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: Any = None,
        *,
        active: Any = None,
        signax: Extras = NO_EXTRAS,
        **extra_args: Any,
    ):
        del params, extra_args
        return _update_mean(updates, state, options, signax.admit(updates, active), signax)[:2]

    return optax.GradientTransformationExtraArgs(partial(_init_mean, options=options), update_fn)


def _checked(options: MeanOptions) -> MeanOptions:
    """The options, with the block as a Python value; raises if an option is out of range."""
    check_axis_name(options.axis_name)
    check_mode("feedback", options.feedback, FEEDBACKS)
    check_number("decay", options.decay, low=0, high=1, ends="[]")
    check_learning_rate(options.learning_rate)
    check_accumulator_dtype(options.accumulator_dtype)
    if options.num_workers is not None:
        check_count("num_workers", options.num_workers)
    return options._replace(block=check_block(options.block, ("leaf",)))


def _init_mean(params: optax.Params, options: MeanOptions) -> MeanScaledSignsState:
    check_floating(params, "params", only_arrays=False)
    workers = 1  # any number will do where servers keep no memory
    if options.feedback == "both" and jax.tree.leaves(params):
        workers = _num_workers(options)
    memory = init_memory(
        params, workers, feedback=options.feedback, dtype=options.accumulator_dtype
    )
    return MeanScaledSignsState(jnp.zeros([], jnp.int32), memory, no_participation())


def _update_mean(
    updates: Any, state: Any, options: MeanOptions, active: Any, extras: Extras
) -> tuple[Any, MeanScaledSignsState, jax.Array]:
    """The common update, the new state, and whether this worker's updates are finite."""
    rate = current_rate(options.learning_rate, state.count)
    with jax.named_scope("signax.momentum"):
        before = in_units_of(rate, state.memory)
    codec = make_scaled(options.make, options.axis_name, before, options.block, options.decay)
    specs = extras.specs(updates)
    outcome, left = exchange_with_memory(
        updates, codec, options.axis_name, before, step=state.count, active=active, specs=specs
    )
    with jax.named_scope("signax.momentum"):
        memory = in_gradient_units(rate, left, before, state.memory)
    state = MeanScaledSignsState(
        optax.safe_increment(state.count),
        memory,
        next_participation(state.participation, outcome.voters, outcome.participates),
    )
    return outcome.updates, state, outcome.finite


def averaged(
    momentum: optax.GradientTransformation, options: MeanOptions
) -> optax.GradientTransformationExtraArgs:
    """`chain(hold_if_nonfinite(momentum), mean_scaled_signs(...))` in fewer passes over memory.

    Values that are not finite show in the scales, which decide whether the state is held.
    """
    options = _checked(options)

    def init_fn(params: optax.Params):
        return momentum.init(params), _init_mean(params, options)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: Any = None,
        *,
        active: Any = None,
        signax: Extras = NO_EXTRAS,
        **extra_args: Any,
    ):
        del params, extra_args
        elsewhere = signax.finite_elsewhere(updates)
        active = active if elsewhere is None else take_part(elsewhere, active)
        # After a momentum, varying types can no longer reveal a reduced gradient.
        check_votable(updates, options.axis_name)
        old_state, mean_state = state
        directions, new_state = momentum.update(updates, old_state)
        marked = mark_nonfinite(directions, updates, new_state)
        updates, mean_state, finite = _update_mean(marked, mean_state, options, active, signax)
        with jax.named_scope("signax.momentum"):
            momentum_state = hold(take_part(finite, elsewhere), old_state, new_state)
        return updates, (momentum_state, mean_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _num_workers(options: MeanOptions) -> int:
    """The size of the axis. Where it is not bound, the option says it."""
    try:
        return lax.axis_size(options.axis_name)
    except NameError:
        if options.num_workers is not None:
            return options.num_workers
        raise NameError(
            f"axis_name={options.axis_name!r} is not bound where the state is made, so the number "
            "of workers is unknown: pass num_workers, or use signax.DataParallel"
        ) from None
