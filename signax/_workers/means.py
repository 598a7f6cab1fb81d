"""Means over workers as gradient transformations: of signs, and in full precision."""

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from signax._core.checks import check_axis_name
from signax._core.leaves import all_finite, check_votable, power_below, wide_dtype
from signax._transforms.participation import (
    NO_EXTRAS,
    Extras,
    Participation,
    next_participation,
    no_participation,
)
from signax._wire.ballots import Rules, Zeros
from signax._wire.exchange import exchange, take_part
from signax._wire.signs import MeanOfSigns
from signax._wire.types import Transport, make_route


class MeanSignsState(NamedTuple):
    """State of `mean_signs`.

    Attributes:
      count: int32[], the steps taken, the same on every worker; it drives the dither.
      participation: a :class:`signax.Participation`.
    """

    count: jax.typing.ArrayLike
    participation: Participation


def mean_signs(
    axis_name: Hashable,
    *,
    zeros: Zeros = "dither",
    transport: Transport = "auto",
    split_over: Hashable | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replace updates by the exact mean of the workers' signs: one bit up, the count down.

    .. math:: u = \frac{1}{|S|} \sum_{i \in S} \operatorname{sign}(u_i)

    with S as in :func:`signax.majority_vote`. :func:`signax.pmean_signs` says what is sent and
    explains the options.

    Args:
      axis_name: the mapped axis along which the workers lie, or a tuple of axes.
      zeros: the value of a zero ballot: `"dither"`, `"abstain"` (two bits up) or `"plus"`.
      transport: how ballots travel: `"packed"`, `"gather"`, `"sum"` or `"auto"`.
      split_over: see :func:`signax.majority_vote`.

    Returns:
      A transformation whose updates are means between -1 and 1 in each leaf's dtype, and 0
      everywhere if no worker takes part.

    Raises:
      TypeError: `axis_name` or `split_over` names no axis; at the update, a leaf is not
        floating-point.
      ValueError: a mode is unknown, or two options exclude one another; at the update, a leaf does
        not vary over the axis or varies over `split_over`.
      NameError: at the update, the axis is not bound.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, signax
      >>> tx = signax.mean_signs("workers")
      >>> gradients = jnp.array([[1.0, -3.0], [-2.0, -1.0], [1.0, jnp.nan]])  # the last is excluded
      >>> update = lambda g: tx.update(g, tx.init(None))[0]
      >>> print(jax.vmap(update, axis_name="workers")(gradients)[0])
      [ 0. -1.]

    References:
      Safaryan and Richtarik, `Stochastic Sign Descent Methods: New Algorithms and Better Theory
      <https://arxiv.org/abs/1905.12938>`_, 2021
    """
    codec, route = MeanOfSigns(Rules(zeros, "plus")), make_route(axis_name, transport, split_over)
    codec.rules.check()

    def init_fn(params: optax.Params):
        del params
        return MeanSignsState(jnp.zeros([], jnp.int32), no_participation())

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
        active = signax.admit(updates, active)
        specs = signax.specs(updates)
        outcome = exchange(updates, codec, route, step=state.count, active=active, specs=specs)
        return outcome.updates, MeanSignsState(
            optax.safe_increment(state.count),
            next_participation(state.participation, outcome.voters, outcome.participates),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class AverageUpdatesState(NamedTuple):
    """State of `average_updates`.

    Attributes:
      participation: a :class:`signax.Participation`.
    """

    participation: Participation


def average_updates(axis_name: Hashable) -> optax.GradientTransformationExtraArgs:
    r"""Replace updates by their full-precision mean over the workers that take part.

    .. math:: u = \frac{1}{|S|} \sum_{i \in S} u_i

    with S as in :func:`signax.majority_vote`. Use it through `optax.partition` for leaves on which
    a vote is a poor step (norms, biases, embeddings with sparse gradients), and for comparison.

    Args:
      axis_name: the mapped axis along which the workers lie, or a tuple of axes.

    Returns:
      A transformation with an `AverageUpdatesState`. The mean is accumulated in at least f32 and
      rounded to each leaf's dtype; it is 0 if no worker takes part. It costs one all-reduce of f32
      (or f64) numbers.

    Raises:
      TypeError: `axis_name` names no axis; at the update, a leaf is not floating-point.
      ValueError: at the update, a leaf does not vary over the axis.
      NameError: at the update, the axis is not bound.

    Examples:
      >>> import jax, jax.numpy as jnp, signax
      >>> tx = signax.average_updates("workers")
      >>> gradients = jnp.array([[1.0, 2.0], [3.0, 2.0], [jnp.nan, 0.0]])  # the last is excluded
      >>> update = lambda g: tx.update(g, tx.init(None))
      >>> updates, state = jax.vmap(update, axis_name="workers")(gradients)
      >>> print(updates[0], state.participation.voters[0], state.participation.missed)
      [2. 2.] 2 [0 0 1]
    """
    check_axis_name(axis_name)

    def init_fn(params: optax.Params):
        del params
        return AverageUpdatesState(no_participation())

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
        check_votable(updates, axis_name)
        participates = take_part(all_finite(updates), signax.admit(updates, active))
        updates, voters = _mean_of_participants(updates, axis_name, participates)
        participation = next_participation(state.participation, voters, participates)
        return updates, AverageUpdatesState(participation)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _mean_of_participants(
    tree: Any, axis_name: Hashable, participates: jax.Array
) -> tuple[Any, jax.Array]:
    """The mean over the workers that take part, accumulated in at least f32, and their number."""
    leaves, structure = jax.tree.flatten(tree)
    wide = [leaf.astype(wide_dtype(leaf.dtype)) for leaf in leaves]
    share = power_below(lax.axis_size(axis_name))
    # A select, since the product of an infinity and zero is NaN.
    counted = [jnp.where(participates, leaf * share, 0) for leaf in wide]
    with jax.named_scope("signax.exchange"):
        sums, voters = lax.psum((counted, participates.astype(jnp.float32)), axis_name)
    divisor = jnp.maximum(voters, 1) * share
    means = [total / divisor.astype(total.dtype) for total in sums]
    means = [mean.astype(leaf.dtype) for mean, leaf in zip(means, leaves, strict=True)]
    return structure.unflatten(means), voters.astype(jnp.uint32)
