"""Means as gradient transformations: of signs, and in full precision."""

from collections.abc import Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from signax._ballots import Zeros, all_finite, take_part
from signax._checks import check_axis_name
from signax._collectives import check_votable, mean_active, vote
from signax._exchange import Transport
from signax._means import mean_options
from signax._participation import (
    Participation,
    admitted,
    finite_elsewhere,
    next_participation,
    no_participation,
)


class MeanSignsState(NamedTuple):
    """State of `mean_signs`.

    Attributes:
      count: int32[], the steps taken, the same on every worker; it drives the dither.
      participation: who took part, see `Participation`.
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
    r"""Replaces updates by the exact mean of the workers' signs: one bit up, the count down.

    .. math:: u = \frac{1}{|S|} \sum_{i \in S} \operatorname{sign}(u_i)

    with S as in :func:`signax.majority_vote`. See :func:`signax.pmean_signs` for what is sent and
    for the options.

    Args:
      axis_name: the mapped axis along which the workers lie, or a tuple of axes.
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
        return MeanSignsState(jnp.zeros([], jnp.int32), no_participation())

    def update_fn(
        updates, state, params=None, *, active=None, raw=None, param_specs=None, **extra_args
    ):
        del params, extra_args
        active = admitted(active, finite_elsewhere(updates, raw))
        outcome = vote(updates, options, step=state.count, active=active, param_specs=param_specs)
        return outcome.updates, MeanSignsState(
            optax.safe_increment(state.count),
            next_participation(state.participation, outcome.voters, outcome.takes_part),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class AverageUpdatesState(NamedTuple):
    """State of `average_updates`.

    Attributes:
      participation: who took part, see `Participation`.
    """

    participation: Participation


def average_updates(axis_name: Hashable) -> optax.GradientTransformationExtraArgs:
    r"""Replaces updates by their full-precision mean over the workers that take part.

    .. math:: u = \frac{1}{|S|} \sum_{i \in S} u_i

    with S as in :func:`signax.majority_vote`. For leaves on which a vote is a poor step (norms,
    biases, embeddings with sparse gradients), through `optax.partition`, and for comparison.

    Args:
      axis_name: the mapped axis along which the workers lie, or a tuple of axes.

    Returns:
      A transformation with an `AverageUpdatesState`. The mean is accumulated in at least f32 and
      rounded to each leaf's dtype; it is 0 if nobody takes part. It costs one all-reduce of f32 (or
      f64) numbers.

    Raises:
      TypeError: `axis_name` names no axis; at the update, a leaf is not floating-point.
      ValueError: at the update, a leaf does not vary over the axis.
      NameError: at the update, the axis is not bound.

    Examples:
      >>> import jax, jax.numpy as jnp, signax
      >>> tx = signax.average_updates("workers")
      >>> gradients = jnp.array([[1.0, 2.0], [3.0, 2.0], [jnp.nan, 0.0]])  # the last one is out
      >>> update = lambda g: tx.update(g, tx.init(None))
      >>> updates, state = jax.vmap(update, axis_name="workers")(gradients)
      >>> print(updates[0], state.participation.voters[0], state.participation.missed)
      [2. 2.] 2 [0 0 1]
    """
    check_axis_name(axis_name)

    def init_fn(params):
        del params
        return AverageUpdatesState(no_participation())

    def update_fn(updates, state, params=None, *, active=None, raw=None, **extra_args):
        del params, extra_args
        check_votable(updates, axis_name)
        active = admitted(active, finite_elsewhere(updates, raw))
        takes_part = take_part(all_finite(updates), active)
        updates, voters = mean_active(updates, axis_name, takes_part)
        participation = next_participation(state.participation, voters, takes_part)
        return updates, AverageUpdatesState(participation)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
