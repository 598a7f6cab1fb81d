"""The collectives as gradient transformations: updates of one worker in, everybody's update out."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from signax._ballots import Ties, Zeros, takes_part
from signax._checks import check_axis_name
from signax._collectives import (
    Transport,
    Voter,
    check_votable,
    check_vote_options,
    exchange_votes,
    find_voter,
    mean_active,
)
from signax._specs import is_masked, spec_axes, spec_unless_masked


class MajorityVoteState(NamedTuple):
    """State of `majority_vote`.

    Attributes:
      count: int32[], the steps taken, the same on every worker; it drives the dither.
    """

    count: jax.typing.ArrayLike


def majority_vote(
    axis_name: Hashable,
    *,
    zeros: Zeros = "dither",
    ties: Ties = "dither",
    transport: Transport = "auto",
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces updates by the majority of the workers' signs, one bit each way.

    .. math:: u = \operatorname{sign} \sum_{i \in S} \operatorname{sign}(u_i)

    over the workers S that take part: those that are `active`, an extra argument of the update
    (bool[], by default true), and whose updates are all finite. See :func:`signax.pvote` for what
    is sent and for the options.

    Updates that enter must be the worker's own; those that leave are the same on every worker, so
    that everything after the vote in a chain (weight decay, learning rate, freezing) is as well.

    Args:
      axis_name: the mapped axis along which the workers lie.
      zeros: what a zero ballot is: `"dither"`, `"abstain"` (two bits each way) or `"plus"`.
      ties: what a tie gives: `"dither"` or `"plus"`.
      transport: `"packed"`, or `"auto"`, which chooses it.

    Returns:
      A transformation whose updates are +1 and -1 in each leaf's dtype (with `zeros="abstain"` 0
      too), and 0 everywhere if nobody takes part.

    Raises:
      TypeError: `axis_name` names no single axis; at the update, a leaf is not floating-point.
      ValueError: a mode is unknown; at the update, a leaf does not vary over the axis.
      NameError: at the update, the axis is not bound.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, signax
      >>> tx = optax.chain(signax.majority_vote("workers"), optax.scale(-0.1))
      >>> params = jnp.zeros(2)
      >>> gradients = jnp.array([[1.0, -3.0], [2.0, -1.0], [-9.0, 5.0]])
      >>> update = lambda g: tx.update(g, tx.init(params))[0]
      >>> print(jax.vmap(update, axis_name="workers")(gradients)[0])
      [-0.1  0.1]

    References:
      Bernstein et al., `signSGD with Majority Vote is Communication Efficient and Fault Tolerant
      <https://arxiv.org/abs/1810.05291>`_, 2019
    """
    check_vote_options(axis_name, zeros, ties, transport)

    def init_fn(params):
        del params
        return MajorityVoteState(count=jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None, *, active=None, param_specs=None, **extra_args):
        del params, extra_args
        check_votable(updates, axis_name)
        voter = find_voter(
            updates, axis_name, step=state.count, zeros=zeros, ties=ties, active=active
        )

        def vote(tree, voter):
            return exchange_votes(tree, axis_name, voter, zeros=zeros, ties=ties)

        updates = _in_blocks(vote, updates, voter, param_specs)
        return updates, MajorityVoteState(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _in_blocks(vote: Callable, updates: Any, voter: Voter, specs: Any) -> Any:
    """Votes on the local block of every leaf that is sharded over further mesh axes.

    Flattening a sharded leaf would gather it in full precision, so the vote runs where the leaf is
    cut: once for each set of axes, since JAX types the result of one exchange as a whole.
    """
    if specs is None:
        return vote(updates, voter)
    leaves, structure = jax.tree.flatten(updates)
    leaf_specs = _specs_like(updates, specs)
    groups: dict[frozenset, list[int]] = {}
    for position, (leaf, spec) in enumerate(zip(leaves, leaf_specs, strict=True)):
        axes = spec_axes(spec) if leaf.size else frozenset()
        groups.setdefault(axes, []).append(position)
    for axes, positions in groups.items():
        local_vote = vote
        if axes:
            blocks = [leaf_specs[position] for position in positions]
            local_vote = jax.shard_map(
                vote, in_specs=(blocks, PartitionSpec()), out_specs=blocks, axis_names=set(axes)
            )
        voted = local_vote([leaves[position] for position in positions], voter)
        for position, leaf in zip(positions, voted, strict=True):
            leaves[position] = leaf
    return structure.unflatten(leaves)


def _specs_like(updates: Any, specs: Any) -> list[PartitionSpec]:
    """The specs of the leaves that `updates` has; masked ones drop out."""
    return jax.tree.leaves(jax.tree.map(spec_unless_masked, updates, specs, is_leaf=is_masked))


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
        return mean_active(updates, axis_name, takes_part(updates, active)), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
