"""Who takes part in votes and means: judged on all updates at once, remembered in their states."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from signax._ballots import all_finite, take_part
from signax._checks import check_transformation
from signax._specs import is_masked


class Participation(NamedTuple):
    """Who took part.

    Attributes:
      voters: int32[], how many workers did in the last step, the same on every worker.
      missed: int32[], how many steps this worker has been out of.
    """

    voters: jax.typing.ArrayLike
    missed: jax.typing.ArrayLike


def no_participation() -> Participation:
    """That of a run that has not begun."""
    return Participation(voters=jnp.zeros([], jnp.int32), missed=jnp.zeros([], jnp.int32))


def next_participation(
    before: Participation, voters: jax.Array, takes_part: jax.Array
) -> Participation:
    """That after one more step."""
    missed = jnp.where(takes_part, before.missed, optax.safe_increment(before.missed))
    return Participation(voters=voters.astype(jnp.int32), missed=missed)


class RawUpdates(NamedTuple):
    """A worker's updates before any transformation, on their way to votes as an extra argument.

    Optax masks an extra argument that has the structure of the updates
    (`mask_compatible_extra_args=True`). A node of another type keeps the raw updates whole.
    """

    tree: Any


def leave_out_nonfinite(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Leaves a worker out of every vote and mean in `inner` if any of its updates is not finite.

    By itself each vote and mean judges the leaves that it is given. Under `optax.partition` and
    `optax.masked` that is a group of them: this lets all groups know of the leaves of the others,
    as they are before any transformation. A worker that is out for them keeps what votes and means
    have remembered of it in every group, and what :func:`signax.hold_if_nonfinite` holds.

    What a transformation before a vote makes finite in its own group, as `optax.clip` does with
    infinities and `optax.zero_nans` with NaN, that group's vote does not see. To leave the worker
    out for it all the same: `signax.hold_if_nonfinite(optax.clip(1.0))`.

    It needs no communication, and reads those leaves once more that a group would not see.
    :class:`signax.DataParallel` does this by itself; inside of `optax.MultiSteps`, which hands on
    means of several steps, it is still of use.

    Args:
      inner: a transformation with votes or means in it, for one worker's updates.

    Returns:
      A transformation with the inner one's state. Extra arguments are passed on, and with them
      `raw`, a node that holds all the updates and that masks leave whole.

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

    def update_fn(updates, state, params=None, **extra_args):
        extra_args = {**extra_args, "raw": RawUpdates(updates)}
        return inner.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def finite_elsewhere(updates: Any, raw: RawUpdates | None) -> jax.Array | None:
    """Whether those of the raw updates that are masked here are finite; `None` if there are none.

    Where updates are laid out in another way, as by `optax.flatten`, all raw ones are looked at.
    """
    if raw is None:
        return None
    hidden, is_alike = [], True

    def look(node, raw_node):
        nonlocal is_alike
        if is_masked(node):
            hidden.append(raw_node)
        elif jnp.shape(node) != getattr(raw_node, "shape", None):
            is_alike = False

    try:
        jax.tree.map(look, updates, raw.tree, is_leaf=is_masked)
    except ValueError:
        is_alike = False
    hidden = hidden if is_alike else [raw.tree]
    return all_finite(hidden) if jax.tree.leaves(hidden) else None


def admitted(active: Any, elsewhere: jax.Array | None) -> Any:
    """`active`, of a worker whose updates are finite elsewhere."""
    return active if elsewhere is None else take_part(elsewhere, active)
