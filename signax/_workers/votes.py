"""Votes as gradient transformations: a worker's own updates in, the workers' common update out."""

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from signax._core.leaves import check_votable
from signax._core.remote import Remote, axis_size, find_workers
from signax._transforms.participation import (
    NO_EXTRAS,
    Extras,
    hold,
    mark_nonfinite,
    next_participation,
    no_participation,
)
from signax._wire.ballots import DitherMemory, Rules, Ties, Zeros
from signax._wire.exchange import exchange, take_part
from signax._wire.signs import Majority
from signax._wire.types import Outcome, Route, Transport, make_route
from signax._wire.weights import Weighing, Weights, is_by_agreement, make_majority
from signax._wire.words import LEAST_VOTERS
from signax._workers.agreement import (
    Agreement,
    first_reputation,
    next_agreement,
    next_reputation,
)
from signax._workers.arrangement import Arrangement
from signax._workers.vote_state import (
    NEVER,
    MajorityVoteState,
    VoteState,
    WeightedVoteState,
    next_dither_memory,
)

THRESHOLD = 1.25  # of opposition, see `signax.diagnostics.opposes`


def majority_vote(
    axis_name: Hashable | None = None,
    *,
    exchange: Any = None,
    zeros: Zeros = "dither",
    ties: Ties = "dither",
    transport: Transport = "auto",
    split_over: Hashable | None = None,
    agreement: bool = False,
    weights: Weights = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replace updates by the majority of the workers' signs, one bit each way.

    .. math:: u = \operatorname{sign} \sum_{i \in S} w_i \operatorname{sign}(u_i)

    over the workers S that take part, with weights :math:`w_i`, by default 1. A worker takes part
    if it is `active`, an extra argument of the update (bool[], by default true), and if all its
    updates are finite. :func:`signax.pvote` says what is sent and explains the options.

    Coordinates that are zero on all workers stay within one step as long as the same workers vote
    in both steps of each pair (0 and 1, 2 and 3, ...). Where workers come and go, the state
    remembers how far such coordinates have drifted, :class:`signax.DitherMemory`, and ties move
    them back: with up to eight workers, each absent at random from half of the steps, such
    coordinates get at most 25 steps away in 2,000. If no step is a tie, as when one of eight
    workers misses the even steps and another the odd steps, such coordinates walk at random. Use
    `zeros="abstain"` or :func:`signax.average_updates` for leaves where the drift matters.

    Updates that enter must be the worker's own. Updates that leave are the same on every worker.

    Args:
      axis_name: the mapped axis along which the workers lie, or a tuple of axes.
      exchange: a :class:`signax.elastic.Exchange`, for workers that are jobs of their own, instead
        of `axis_name`. The other options but `zeros` and `ties` are for workers along an axis.
      zeros: the value of a zero ballot: `"dither"`, `"abstain"` (two bits each way) or `"plus"`.
      ties: the result of a tie: `"dither"` or `"plus"`.
      transport: how votes travel: `"packed"`, `"gather"`, `"sum"` or `"auto"`.
      split_over: an axis along which devices hold the same updates; each then votes on its own
        part. Under :class:`signax.DataParallel`, a further axis of the mesh, over which gradients
        are already averaged.
      agreement: whether to measure at every step how far each worker agrees with the others, and
        keep the result in the state: see :class:`signax.Agreement` and
        :func:`signax.diagnostics.opposes`. Needs four workers. Agreement takes no further
        collective, but a second bit per coordinate on the way up, which tells opinions from
        dithered zeros (`zeros="abstain"` sends it anyway, `transport="sum"` a second integer).
      weights: how much each worker's ballots count, see :func:`signax.pvote`. `"agreement"` gives
        more weight to workers that agreed with the others in earlier steps, by their log-odds: see
        :class:`signax.Reputation`. It needs the second bit of `agreement=True`, and an `all_gather`
        of 4 bytes per worker. Where `init` is called, the axis must be bound, as under
        :class:`signax.DataParallel`.

    Returns:
      A transformation whose updates are +1 and -1 in each leaf's dtype (with `zeros="abstain"` 0
      too), and 0 everywhere if no worker takes part.

    Raises:
      TypeError: neither `axis_name` nor `exchange` is given or one is of the wrong kind,
        `split_over` names no axis, `agreement` is not a boolean, or `weights` are not numbers; at
        the update, a leaf is not floating-point.
      ValueError: a mode is unknown, `weights` are out of range, or two options exclude one another;
        at the update, a leaf does not vary over the axis or varies over `split_over`, `agreement`
        has too few workers, or `weights` has another length than the axis.
      NameError: at the update, and with `weights="agreement"` at `init`, the axis is not bound.

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
      <https://arxiv.org/abs/1810.05291>`_, 2019; Nitzan and Paroush, `Optimal Decision Rules in
      Uncertain Dichotomous Choice Situations <https://doi.org/10.2307/2526438>`_, 1982
    """
    workers = find_workers(axis_name, exchange)
    vote = make_vote(workers, zeros, ties, transport, split_over, agreement, weights)

    def init_fn(params: optax.Params):
        return _init_vote(params, vote)

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
        outcome = _exchange(updates, state, vote, active, signax.specs(updates))
        return outcome.updates, _next_state(state, outcome, vote)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class Vote(NamedTuple):
    """A vote by checked options: how ballots are encoded, and the way that they take."""

    codec: Majority
    route: Route


def make_vote(
    workers: Hashable | None,
    zeros: Zeros = "dither",
    ties: Ties = "dither",
    transport: Transport = "auto",
    split_over: Hashable | None = None,
    agreement: Any = False,
    weights: Weights = None,
) -> Vote:
    """A vote; raises if an option is unknown."""
    rules = Rules(zeros, ties)
    rules.check()
    if not isinstance(agreement, bool):
        raise TypeError(f"agreement={agreement!r} must be True or False")
    if isinstance(workers, Remote):
        _check_remote_options(transport, split_over, agreement, weights)
        return Vote(Majority(rules, portable=True), Route(workers))
    route = make_route(workers, transport, split_over)
    return Vote(make_majority(rules, weights, route.transport, agreement=agreement), route)


def _check_remote_options(
    transport: Transport, split_over: Hashable | None, agreement: bool, weights: Weights
) -> None:
    """Raise if an option is given that the vote server does not know."""
    given = {
        "transport": None if transport == "auto" else transport,
        "split_over": split_over,
        "agreement": agreement or None,
        "weights": weights,
    }
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{name}={value!r} is for workers along an axis, not for exchange=: leave it out"
            )


def _init_vote(params: Any, vote: Vote) -> VoteState:
    agreement = dither = None
    if vote.codec.agreement:
        agreement = Agreement(jnp.full([], 0.5, jnp.float32), jnp.zeros([], jnp.float32))
    if vote.codec.rules.has_memory:
        dither = DitherMemory(jnp.zeros([], jnp.int32), jnp.full([], NEVER, jnp.int32))
    state = MajorityVoteState(jnp.zeros([], jnp.int32), no_participation(), agreement, dither)
    if is_by_agreement(vote.codec):  # a state of its own: others keep the structure of checkpoints
        return WeightedVoteState(*state, first_reputation(params, vote.route.axis_name))
    return state


def _exchange(
    updates: Any,
    state: Any,
    vote: Vote,
    active: Any,
    specs: list[Any] | None,
    like: Any = None,
) -> Outcome:
    if vote.codec.agreement:
        _check_enough_workers(updates, vote.route)
    dither = state.dither
    if is_by_agreement(vote.codec):
        dither = Weighing(dither, state.reputation.weights)
    return exchange(
        updates,
        vote.codec,
        vote.route,
        step=state.count,
        active=active,
        dither=dither,
        specs=specs,
        like=like,
    )


def _check_enough_workers(updates: optax.Updates, route: Route) -> None:
    """Raise if there are too few workers for a clear majority of the others."""
    check_votable(updates, route.axis_name, route.split_over)
    if lax.axis_size(route.axis_name) < LEAST_VOTERS:
        raise ValueError(
            f"agreement=True compares each worker with a clear majority of the others, which takes "
            f"{LEAST_VOTERS} workers; {route.axis_name!r} has {lax.axis_size(route.axis_name)}: "
            "leave it out"
        )


def _next_state(state: Any, outcome: Outcome, vote: Vote) -> VoteState:
    agreement, dither = state.agreement, state.dither
    counts = outcome.counts[0] if outcome.counts else None  # as in a tree without coordinates
    if agreement is not None and counts is not None:
        agreement = next_agreement(agreement, counts[:2], outcome.voters, outcome.participates)
    if dither is not None:
        num_workers = axis_size(vote.route.axis_name)
        dither = next_dither_memory(
            dither, outcome.dead, outcome.voters, jnp.asarray(state.count), num_workers
        )
    after = MajorityVoteState(
        optax.safe_increment(state.count),
        next_participation(state.participation, outcome.voters, outcome.participates),
        agreement,
        dither,
    )
    if not is_by_agreement(vote.codec):
        return after
    reputation = state.reputation
    if counts is not None:
        reputation = next_reputation(
            reputation, counts[-2:], outcome.participates, state.count, vote.route.axis_name
        )
    return WeightedVoteState(*after, reputation)


def voted(signs: optax.GradientTransformation, vote: Vote) -> optax.GradientTransformationExtraArgs:
    """`chain(hold_if_nonfinite(signs), majority_vote(...))` in fewer passes over memory.

    The signs must be elementwise. They are computed a second time, in the layout of `Arrangement`,
    and packed in the same pass. That pass also finds values that are not finite, and so decides
    whether the state is held.
    """

    def init_fn(params: optax.Params):
        return signs.init(params), _init_vote(params, vote)

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
        # After a momentum, varying types can no longer reveal a reduced gradient, and joined leaves
        # have one type.
        check_votable(updates, vote.route.axis_name, vote.route.split_over)
        old_state, vote_state = state
        _, new_state = signs.update(updates, old_state)
        # The same computation again for packing: XLA would store a momentum with two uses.
        layout = Arrangement(updates, old_state, signax.param_specs)
        arranged = layout.arrange(updates)
        new_arranged, arranged_state = signs.update(arranged, layout.arrange_state(old_state))
        outcome = _exchange(
            layout.restore(mark_nonfinite(new_arranged, arranged, arranged_state)),
            vote_state,
            vote,
            active if elsewhere is None else take_part(elsewhere, active),
            signax.specs(updates),
            like=updates,
        )
        with jax.named_scope("signax.momentum"):
            new_state = hold(take_part(outcome.finite, elsewhere), old_state, new_state)
        return outcome.updates, (new_state, _next_state(vote_state, outcome, vote))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def own_updates(axis_name: Hashable) -> optax.GradientTransformation:
    """Raise if types know that updates are equal on all workers, as a vote does.

    It belongs before a memory: after one, every worker's updates differ in any case.
    """

    def update_fn(updates: optax.Updates, state: Any, params: Any = None):
        del params
        check_votable(updates, axis_name)
        return updates, state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)
