"""Means of signs: what the workers' signs add up to, and not only who is in the majority."""

from collections.abc import Hashable
from typing import Any

import jax

from signax._ballots import Rules, Zeros
from signax._collectives import VoteOptions, check_vote_options, vote
from signax._exchange import Transport


def mean_options(
    axis_name: Hashable, zeros: Zeros, transport: Transport, split_over: Hashable | None
) -> VoteOptions:
    """Checked options of a vote that gives means: ballots travel as they are, and none tie."""
    options = VoteOptions(axis_name, Rules(zeros, "plus"), transport, split_over, mean=True)
    check_vote_options(options)
    return options


def pmean_signs(
    tree: Any,
    axis_name: Hashable,
    *,
    step: jax.Array | int | None = None,
    zeros: Zeros = "dither",
    active: jax.Array | bool | None = None,
    transport: Transport = "auto",
    split_over: Hashable | None = None,
) -> Any:
    r"""Averages the signs of every coordinate: one bit up, the count down.

    With :math:`b_i \in \{+1, -1, 0\}` the sign of worker i's value on a coordinate and S the
    workers that take part,

    .. math:: v = \frac{1}{|S|} \sum_{i \in S} b_i

    exactly, but for one rounding to the leaf's dtype. What comes down is the sum, in
    ceil(log2(M + 1)) bits for M workers. It is shaped like :func:`jax.lax.pmean`, runs where
    :func:`signax.pvote` does, and is the same on every worker.

    Args:
      tree: this worker's values, as in :func:`signax.pvote`.
      axis_name: the mapped axis along which the workers lie, or a tuple of axes.
      step: int32[], counts steps from 0 and is the same on every worker. It drives the dither, and
        may be left out only where nothing is dithered.
      zeros: `"dither"` turns a zero ballot into +-1 so that it cancels over workers and steps;
        `"abstain"` lets it count as 0, at two bits up and two counts down; `"plus"` makes it +1.
        Where other workers vote in the second step of a pair than in the first, dithered zeros
        leave a random remainder: up to 1 / |S| per step for each worker that came or went.
      active: bool[], whether this worker takes part; by default it does.
      transport: as in :func:`signax.pvote`. `"packed"` sends (M-1)/M d/8 bytes up and the count's
        bits times that down, `"gather"` (M-1) d/8.
      split_over: as in :func:`signax.pvote`.

    Returns:
      A tree like `tree`, of means between -1 and 1 in each leaf's dtype; 0 if no worker takes part.

    Raises:
      NameError: `axis_name` or `split_over` is not bound.
      TypeError: as in :func:`signax.pvote`.
      ValueError: as in :func:`signax.pvote`.

    Examples:
      >>> import jax, jax.numpy as jnp, signax
      >>> gradients = jnp.array([[-1.0, 3.0], [-4.0, -1.0], [-0.5, 2.0], [0.1, 7.0]])
      >>> mean = lambda g: signax.pmean_signs(g, "workers", step=0)
      >>> print(jax.vmap(mean, axis_name="workers")(gradients)[0])
      [-0.5  0.5]

    References:
      Safaryan and Richtarik, `Stochastic Sign Descent Methods: New Algorithms and Better Theory
      <https://arxiv.org/abs/1905.12938>`_, 2021
    """
    options = mean_options(axis_name, zeros, transport, split_over)
    return vote(tree, options, step=step, active=active, name="tree").updates
