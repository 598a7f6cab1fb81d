"""Participation in votes and means: workers take part if their updates are finite and `active`.

A vote or mean sees the leaves that it is given. Where `optax.partition` or `optax.masked` hides
leaves of other votes, `leave_out_nonfinite` lets every vote know of them, and `hold_if_nonfinite`
keeps NaN out of the state before a vote. States remember who took part: see `Participation`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from signax._core.checks import check_transformation
from signax._core.leaves import all_finite, is_like_tree, is_masked, specs_like
from signax._wire.exchange import take_part


class Participation(NamedTuple):
    """The number of workers that took part in a step, and this worker's missed steps.

    Attributes:
      voters: int32[], the number of workers that took part in the last step, the same on every
        worker.
      missed: int32[], the number of steps in which this worker did not take part.
    """

    voters: jax.typing.ArrayLike
    missed: jax.typing.ArrayLike


def participation(state: Any) -> Participation:
    """Read from a state how many workers took part, and how many steps each has missed.

    Args:
      state: the state of a transformation or an optimiser with one or more votes or means in it:
        one worker's state or, from :class:`signax.DataParallel`, all workers' state.

    Returns:
      A :class:`signax.Participation`, from `DataParallel` with `missed` as int32[M]. If votes on
      different leaves disagree, it has the fewest voters and the most missed steps.

    Raises:
      ValueError: the state holds no vote and no mean.

    Examples:
      >>> import jax, jax.numpy as jnp, signax
      >>> tx = signax.majority_vote("workers")
      >>> gradients = jnp.array([[1.0, 2.0], [3.0, 2.0], [jnp.nan, 0.0]])  # the last does not vote
      >>> vote = lambda g: signax.participation(tx.update(g, tx.init(g))[1])
      >>> print(jax.vmap(vote, axis_name="workers")(gradients).missed)
      [0 0 1]
    """
    found = jax.tree.leaves(state, is_leaf=_is_participation)
    found = [node for node in found if _is_participation(node)]
    if not found:
        raise ValueError(
            "state holds no vote and no mean over workers: pass the state of a transformation with "
            "signax.majority_vote or a mean in it, such as signax.signum(1e-3, axis_name='data')"
        )
    voters, missed = zip(*found, strict=True)
    return Participation(jnp.min(jnp.stack(voters), axis=0), jnp.max(jnp.stack(missed), axis=0))


def _is_participation(node: Any) -> bool:
    return isinstance(node, Participation)


def no_participation() -> Participation:
    """The participation before the first step."""
    return Participation(voters=jnp.zeros([], jnp.int32), missed=jnp.zeros([], jnp.int32))


def next_participation(
    before: Participation, voters: jax.Array, participates: jax.Array
) -> Participation:
    """The participation after one more step."""
    missed = jnp.where(participates, before.missed, optax.safe_increment(before.missed))
    return Participation(voters=voters.astype(jnp.int32), missed=missed)


class Extras(NamedTuple):
    """The extra argument `signax` of an update, which votes and means read.

    Optax masks an extra argument that has the structure of the updates
    (`mask_compatible_extra_args=True`). A node of another type stays whole.

    Attributes:
      raw: all of a worker's updates before any transformation, or `None`.
      param_specs: the partition specs of all parameters within a worker, or `None`.
    """

    raw: Any = None
    param_specs: Any = None

    def specs(self, updates: Any) -> list[Any] | None:
        """The specs of the leaves of `updates`, some of which may be masked."""
        if self.param_specs is None:
            return None
        return jax.tree.leaves(specs_like(updates, self.param_specs))

    def admit(self, updates: Any, active: Any) -> Any:
        """`active`, of a worker whose masked updates are finite."""
        elsewhere = self.finite_elsewhere(updates)
        return active if elsewhere is None else take_part(elsewhere, active)

    def finite_elsewhere(self, updates: Any) -> jax.Array | None:
        """Whether the raw updates that are masked here are finite; `None` if none are masked.

        Where updates have another structure, as after `optax.flatten`, all raw updates count.
        """
        if self.raw is None:
            return None
        hidden, is_alike = [], True

        def look(node: Any, raw_node: Any):
            nonlocal is_alike
            if is_masked(node):
                hidden.append(raw_node)
            elif jnp.shape(node) != getattr(raw_node, "shape", None):
                is_alike = False

        try:
            jax.tree.map(look, updates, self.raw, is_leaf=is_masked)
        except ValueError:
            is_alike = False
        hidden = hidden if is_alike else [self.raw]
        return all_finite(hidden) if jax.tree.leaves(hidden) else None


NO_EXTRAS = Extras()


def leave_out_nonfinite(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Exclude a worker from every vote and mean in `inner` if any of its updates is not finite.

    By itself each vote and mean judges the leaves that it is given. Under `optax.partition` and
    `optax.masked` these are only some of the leaves. This transformation lets each vote and mean
    know whether the other leaves are finite, as they are before any transformation. All votes and
    means then keep an excluded worker's state as it was, such as its error memory, and
    :func:`signax.hold_if_nonfinite` keeps its momentum.

    A vote does not see a NaN or an infinity that a transformation before the vote makes finite, as
    `optax.clip` does with infinities and `optax.zero_nans` with NaN. Wrap such transformations to
    exclude the worker nevertheless: `signax.hold_if_nonfinite(optax.clip(1.0))`.

    It needs no communication, and reads once more the leaves that a vote would not see.
    :class:`signax.DataParallel` includes it. Add it even there inside `optax.MultiSteps`, which
    passes on means of several steps.

    Args:
      inner: a transformation with votes or means in it, for one worker's updates.

    Returns:
      A transformation with the state of `inner`. It passes extra arguments on. It passes all
      updates in the extra argument `signax`, which is reserved for this library.

    Raises:
      TypeError: `inner` is not a transformation.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, signax
      >>> vote, mean = signax.majority_vote("workers"), signax.average_updates("workers")
      >>> groups = optax.partition({"w": vote, "b": mean}, {"w": "w", "b": "b"})
      >>> tx = signax.leave_out_nonfinite(groups)
      >>> gradients = {"w": jnp.array([1.0, 1.0, -5.0]), "b": jnp.array([2.0, 4.0, jnp.nan])}
      >>> update = lambda g: tx.update(g, tx.init(g))
      >>> updates, state = jax.vmap(update, axis_name="workers")(gradients)
      >>> print(updates["w"], updates["b"])
      [1. 1. 1.] [3. 3. 3.]
    """
    check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: Any = None,
        *,
        signax: Extras = NO_EXTRAS,
        **extra_args: Any,
    ):
        extras = signax._replace(raw=updates)
        return inner.update(updates, state, params, signax=extras, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def hold_if_nonfinite(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Keep NaN and infinity out of a transformation's state.

    If the incoming updates, the updates of `inner` or its new floating-point state hold a NaN or an
    infinity, the floating-point state stays as it was (counts and keys advance, as on every other
    worker), and every update becomes NaN. A vote or mean after this transformation then excludes
    the worker for the step, and the next step has forgotten the bad batch. Masked updates that are
    not finite have this effect too, see :func:`signax.leave_out_nonfinite`.

    Args:
      inner: the transformation to protect, without votes and means in it. Put the vote after it.

    Returns:
      A transformation with the state of `inner`. It passes extra arguments on.

    Raises:
      TypeError: `inner` is not a transformation.

    Examples:
      >>> import jax.numpy as jnp, signax
      >>> tx = signax.hold_if_nonfinite(signax.scale_by_signum())
      >>> state = tx.init(jnp.zeros(2))
      >>> updates, state = tx.update(jnp.array([jnp.inf, 1.0]), state)
      >>> print(updates, state.momentum, state.count)
      [nan nan] [0. 0.] 1
    """
    check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)

    def update_fn(updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any):
        new_updates, new_state = inner.update(updates, state, params, **extra_args)
        marked = mark_nonfinite(new_updates, updates, new_state)
        elsewhere = extra_args.get("signax", NO_EXTRAS).finite_elsewhere(updates)
        finite = take_part(all_finite(marked), elsewhere)
        marked = jax.tree.map(lambda u: jnp.where(finite, u, jnp.nan).astype(u.dtype), marked)
        return marked, hold(finite, state, new_state)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def mark_nonfinite(new_updates: Any, updates: Any, new_state: Any) -> Any:
    """Make at least one new update NaN if the old updates or the new state are not finite.

    State that is laid out like the updates, such as a momentum, is examined coordinate by
    coordinate, in the same pass as the updates.
    """
    is_like_updates = is_like_tree(updates)
    beside, rest = [jax.tree.leaves(updates)], []
    for node in jax.tree.leaves(new_state, is_leaf=is_like_updates):
        if is_like_updates(node):
            beside.append(jax.tree.leaves(node))
        elif jnp.issubdtype(node.dtype, jnp.floating):
            rest.append(node)
    new_leaves, new_structure = jax.tree.flatten(new_updates)
    marked = []
    for new, *others in zip(new_leaves, *beside, strict=True):
        for other in others:
            if jnp.issubdtype(other.dtype, jnp.floating):
                new += (other - other).astype(new.dtype)  # NaN, unless the other is finite
        marked.append(new)
    position = next((n for n, leaf in enumerate(marked) if leaf.size), None)
    if rest and position is not None:
        mark = jnp.where(all_finite(rest), 0, jnp.nan)
        marked[position] += mark.astype(marked[position].dtype)
    return new_structure.unflatten(marked)


def hold(finite: jax.Array, state: Any, new_state: Any) -> Any:
    """The new state if it is finite, else the old state with the new counts and keys."""

    def choose(old: jax.Array, new: jax.Array):
        return jnp.where(finite, new, old) if jnp.issubdtype(new.dtype, jnp.floating) else new

    return jax.tree.map(choose, state, new_state)
