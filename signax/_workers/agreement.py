"""The agreement of workers with the others: what a vote's state keeps of it, and its weights."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from signax._wire.exchange import gather
from signax._wire.words import LEAST_VOTERS

SLACK = 0.1  # of the test for opposition, see `signax.diagnostics.opposes`
ENOUGH = 16  # coordinates; a share of fewer weighs less


class Agreement(NamedTuple):
    """A worker's agreement with the others, in the state of a vote with `agreement=True`.

    Attributes:
      share: float32[], the share of coordinates on which this worker had the sign of the majority,
        among the coordinates on which its value was not zero and the signs of the other voters
        added up to 3 or more, or -3 or less. It comes from the last step with such coordinates in
        which the worker took part, and is a half before that.
      opposition: float32[], the sum of the distances of this share below a half: see
        :func:`signax.diagnostics.opposes`.
    """

    share: jax.typing.ArrayLike
    opposition: jax.typing.ArrayLike


def next_agreement(
    before: Agreement, counts: jax.Array, voters: jax.Array, participates: jax.Array
) -> Agreement:
    """The agreement after a step with f32[2] coordinates of agreement and of disagreement."""
    agree, disagree = counts
    compared = agree + disagree
    share = agree / jnp.maximum(compared, 1)
    measured = participates & (voters >= LEAST_VOTERS) & (compared > 0)
    # A share of few coordinates varies much, so it counts for less, in proportion.
    weight = jnp.minimum(compared / ENOUGH, 1)
    opposition = before.opposition + 0.5 * weight - share * weight - SLACK * weight
    return Agreement(
        share=jnp.where(measured, share, before.share),
        opposition=jnp.where(measured, jnp.maximum(opposition, 0), before.opposition),
    )


# Reputations, from which a vote's weights follow.

DECAY = 0.99
PRIOR = 0.51  # almost no opinion: a few steps outweigh it
RANGE = 0.01, 0.99
STEPS = 2**8  # weights are multiples of the largest / STEPS, so that their sums are exact


class Reputation(NamedTuple):
    r"""The workers' reputations, in the state of a vote with `weights="agreement"`.

    In a step, let :math:`a_i` be the share of coordinates on which worker i has the sign of the
    weighted vote of the *other* workers, among the coordinates where its value is not zero and the
    others' vote is no tie. A worker's own ballot would speak for itself: with it, one worker could
    outweigh the others by agreeing with itself. The state keeps

    .. math:: p_i \leftarrow 0.99\, p_i + 0.01\, a_i, \quad
      w_i \propto \max\left(0, \log \frac{p_i}{1 - p_i}\right),

    from :math:`p_i = 0.51` and equal weights. For the weights :math:`p_i` is clipped to
    [0.01, 0.99]; they are rounded to multiples of a 256th of the largest, so that their sums are
    exact. They change after each pair of steps (0 and 1, 2 and 3, ...), so that dithered zeros
    cancel within a pair. Where all voters have weight 0, they vote with equal weights. A worker
    that does not take part keeps its :math:`p_i`.

    Attributes:
      average_agreement: float32[M], the moving averages :math:`p_i`, the same on every worker.
      weights: float32[M], the weights of the next step relative to the largest, the same on every
        worker.
    """

    average_agreement: jax.typing.ArrayLike
    weights: jax.typing.ArrayLike

    def resized(
        self, num_workers: int, resize_rows: Callable[..., Any], like: Any = None
    ) -> "Reputation":
        """The reputations of another number of workers, each by its index.

        A worker whose index is new starts as at first.
        """
        del resize_rows, like
        old = jnp.asarray(self.average_agreement)[:num_workers]
        average = jnp.pad(old, (0, num_workers - len(old)), constant_values=PRIOR)
        return Reputation(average, find_weights(average))


def first_reputation(params: Any, axis_name: Hashable) -> Reputation:
    """The reputations before the first step. The axis must be bound."""
    try:
        num_workers = lax.axis_size(axis_name)
    except NameError:
        if jax.tree.leaves(params):
            raise NameError(
                f"axis_name={axis_name!r} is not bound where the state is made, so the number of "
                "weights is unknown: use signax.DataParallel, or call init where update is called, "
                "inside jax.shard_map, jax.pmap or jax.vmap"
            ) from None
        num_workers = 1  # optax.tree.map_params asks for the structure of a state
    ones = jnp.ones([num_workers], jnp.float32)
    return Reputation(PRIOR * ones, ones)


def find_weights(average: jax.Array) -> jax.Array:
    """The weights of all workers, f32[M] from 0 to 1: log-odds relative to the largest."""
    average = jnp.clip(average, *RANGE)
    odds = jnp.maximum(jnp.log(average) - jnp.log1p(-average), 0)
    largest = jnp.max(odds)
    return jnp.round(STEPS * odds / jnp.where(largest > 0, largest, 1)) / STEPS


def next_reputation(
    before: Reputation,
    counts: jax.Array,
    participates: jax.Array,
    step: jax.typing.ArrayLike,
    axis_name: Hashable,
) -> Reputation:
    """The reputations after a step with f32[2] coordinates of agreement and of disagreement."""
    agree, disagree = counts
    compared = agree + disagree
    share = jnp.where(participates & (compared > 0), agree / jnp.maximum(compared, 1), -1)
    shares = gather(share, axis_name)  # f32[] to f32[M]
    old = jnp.asarray(before.average_agreement)
    average = jnp.where(shares < 0, old, DECAY * old + (1 - DECAY) * shares)
    return Reputation(
        average, jnp.where(jnp.asarray(step) % 2 == 1, find_weights(average), before.weights)
    )
