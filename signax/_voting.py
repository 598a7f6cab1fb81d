"""The vote as a gradient transformation: updates of one worker in, everybody's update out."""

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from signax._agreement import next_agreement, no_agreement
from signax._ballots import (
    Rules,
    Ties,
    Zeros,
    no_dither_memory,
    take_part,
)
from signax._collectives import (
    Outcome,
    VoteOptions,
    check_votable,
    check_vote_options,
    vote,
)
from signax._exchange import Transport
from signax._packing import in_blocks
from signax._participation import (
    Participation,
    admitted,
    finite_elsewhere,
    next_participation,
    no_participation,
)
from signax._specs import spec_axes, specs_like
from signax._transforms import hold, is_like_tree, mark_nonfinite


class MajorityVoteState(NamedTuple):
    """State of `majority_vote`.

    Attributes:
      count: int32[], the steps taken, the same on every worker; it drives the dither.
      participation: who took part, see `Participation`.
      agreement: how far this worker agrees with the others, `Agreement`; `None` unless asked for.
      dither: what the dither remembers, `DitherMemory`; `None` unless zeros and ties are dithered.
    """

    count: jax.typing.ArrayLike
    participation: Participation
    agreement: Any = None
    dither: Any = None


def majority_vote(
    axis_name: Hashable,
    *,
    zeros: Zeros = "dither",
    ties: Ties = "dither",
    transport: Transport = "auto",
    split_over: Hashable | None = None,
    agreement: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces updates by the majority of the workers' signs, one bit each way.

    .. math:: u = \operatorname{sign} \sum_{i \in S} \operatorname{sign}(u_i)

    over the workers S that take part: those that are `active`, an extra argument of the update
    (bool[], by default true), and whose updates are all finite. See :func:`signax.pvote` for what
    is sent and for the options.

    Coordinates that are zero on all workers stay within one step as long as the same workers vote
    in both steps of each pair (0 and 1, 2 and 3, ...). Where workers come and go, the state
    remembers how far such coordinates have drifted, :class:`signax.DitherMemory`, and ties move
    them back: with up to eight workers, each absent at random from half of the steps, they get at
    most 25 steps away in 2,000. If no step is a tie, as where one of eight workers misses the even
    steps and another one the odd steps, they walk at random. Use `zeros="abstain"` or
    :func:`signax.average_updates` for leaves where that matters.

    Updates that enter must be the worker's own; those that leave are the same on every worker, so
    that everything after the vote in a chain (weight decay, learning rate, freezing) is as well.

    Args:
      axis_name: the mapped axis along which the workers lie, or a tuple of axes.
      zeros: what a zero ballot is: `"dither"`, `"abstain"` (two bits each way) or `"plus"`.
      ties: what a tie gives: `"dither"` or `"plus"`.
      transport: how votes travel: `"packed"`, `"gather"`, `"int8"` or `"auto"`.
      split_over: an axis along which devices hold the same updates, each of which then votes on its
        own part. Under `DataParallel` a further axis of the mesh, over which it averages.
      agreement: whether to measure at every step how far each worker agrees with the others, and
        keep it in the state: see :class:`signax.Agreement` and :func:`signax.diagnostics.opposes`.
        It takes no further collective, but a second bit per coordinate on the way up, which tells
        opinions from dithered zeros (`"abstain"` sends it anyway; `"int8"` a second integer).

    Returns:
      A transformation whose updates are +1 and -1 in each leaf's dtype (with `zeros="abstain"` 0
      too), and 0 everywhere if nobody takes part.

    Raises:
      TypeError: `axis_name` names no axis; at the update, a leaf is not floating-point.
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
    options = VoteOptions(axis_name, Rules(zeros, ties), transport, split_over, agreement=agreement)
    check_vote_options(options)

    def update_fn(
        updates, state, params=None, *, active=None, raw=None, param_specs=None, **extra_args
    ):
        del params, extra_args
        outcome = vote(
            updates,
            options,
            step=state.count,
            active=admitted(active, finite_elsewhere(updates, raw)),
            memory=state.dither,
            param_specs=param_specs,
        )
        return outcome.updates, _next_state(state, outcome)

    def init_fn(params):
        del params
        return _init_vote(options)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _init_vote(options: VoteOptions) -> MajorityVoteState:
    return MajorityVoteState(
        jnp.zeros([], jnp.int32),
        no_participation(),
        no_agreement() if options.agreement else None,
        no_dither_memory() if options.rules.has_memory else None,
    )


def _next_state(state: MajorityVoteState, outcome: Outcome) -> MajorityVoteState:
    agreement = state.agreement
    if agreement is not None:
        agreement = next_agreement(agreement, outcome.agreed, outcome.voters, outcome.takes_part)
    return MajorityVoteState(
        optax.safe_increment(state.count),
        next_participation(state.participation, outcome.voters, outcome.takes_part),
        agreement,
        outcome.memory,
    )


def voted(
    signs: optax.GradientTransformation, options: VoteOptions
) -> optax.GradientTransformationExtraArgs:
    """`chain(hold_if_nonfinite(signs), majority_vote(...))` in fewer passes over memory.

    The signs must be taken coordinate by coordinate. So they can be computed on arrays in blocks
    and packed in the same pass, which also finds what is not finite; the state is held by that.
    """
    check_vote_options(options)

    def init_fn(params):
        return signs.init(params), _init_vote(options)

    def update_fn(
        updates, state, params=None, *, active=None, raw=None, param_specs=None, **extra_args
    ):
        del params, extra_args
        elsewhere = finite_elsewhere(updates, raw)
        check_votable(updates, options.axis_name)  # behind a momentum types would not tell
        old_state, vote_state = state
        _, new_state = signs.update(updates, old_state)
        # The same once more for packing: a momentum that is used twice would be kept in between.
        blocks, old_blocks = _in_blocks(updates, old_state, param_specs)
        new_updates, new_blocks = signs.update(blocks, old_blocks)
        outcome = vote(
            mark_nonfinite(new_updates, blocks, new_blocks),
            options,
            step=vote_state.count,
            active=admitted(active, elsewhere),
            memory=vote_state.dither,
            param_specs=param_specs,
            like=updates,
        )
        new_state = hold(take_part(outcome.finite, elsewhere), old_state, new_state)
        return outcome.updates, (new_state, _next_state(vote_state, outcome))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def own_updates(axis_name: Hashable) -> optax.GradientTransformation:
    """Refuses updates that types know to be equal on all workers, as the vote does.

    For what remembers before a vote, behind which each worker's updates differ in any case.
    """

    def update_fn(updates, state, params=None):
        del params
        check_votable(updates, axis_name)
        return updates, state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


def _in_blocks(updates: Any, state: Any, param_specs: Any) -> tuple[Any, Any]:
    """Updates, and what is laid out like them in a state, in blocks where that costs nothing.

    Barriers keep XLA from seeing that they are the same arrays, and from moving the reshape behind
    what is computed.
    """
    specs = specs_like(updates, param_specs)
    is_like = is_like_tree(updates)

    def blocks(leaf, spec):
        blocked = leaf if spec_axes(spec) else in_blocks(leaf)
        if (
            blocked is leaf
        ):  # with an axis in front, TPUs need not lay rows of DataParallel out anew
            return lax.optimization_barrier(leaf[None])[0]
        return lax.optimization_barrier(blocked)

    def tree_blocks(tree):
        return jax.tree.map(blocks, tree, specs)

    state = jax.tree.map(lambda n: tree_blocks(n) if is_like(n) else n, state, is_leaf=is_like)
    return tree_blocks(updates), state
