"""Faulty and adversarial workers, for tests and studies."""

import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax

from signax._core.checks import check_axis_name, check_key
from signax._core.leaves import (
    check_alike,
    check_floating,
    narrow,
    relative_to_peak,
    wide_dtype,
    worker_index,
)

Attack = Literal["invert", "random", "zero", "nan", "inf", "scale", "collude"]


class AdversaryState(NamedTuple):
    """State of `adversary`.

    Attributes:
      key: key[] or a raw uint32 key, the random key of the next step, the same on every worker.
    """

    key: jax.Array


def adversary(
    axis_name: Hashable,
    workers: Sequence[int],
    attack: Attack | Callable[[Any, jax.Array], Any],
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replace some workers' updates by forged updates, and pass on the other workers' updates.

    Put it first in a chain. With g a worker's own updates and S the honest workers:

    ============= ==========================================================================
    `"invert"`    :math:`-g`
    `"random"`    Gaussian noise with the root mean square of each leaf of g
    `"zero"`      0
    `"nan"`       NaN
    `"inf"`       infinity
    `"scale"`     :math:`10^6 g` (in f16, whose range is too small, :math:`256 g`)
    `"collude"`   :math:`-\operatorname{sign} \sum_{i \in S} \operatorname{sign}(g_i)`, the worst
                  case of a vote: attackers see every honest ballot and vote against their
                  majority (+1 if honest ballots cancel)
    ============= ==========================================================================

    Args:
      axis_name: the mapped axis along which the workers lie, or a tuple of axes.
      workers: the indices of the attackers along the axis.
      attack: a name from the table, or a function of a worker's updates and a random key. The key
        differs between workers and steps. A blind multiplicative adversary, for example, is
        `lambda g, key: jax.tree.map(lambda leaf: leaf * jax.random.normal(key, leaf.shape), g)`.
        The result must have the updates' shapes, and is cast to their dtypes.
      key: a random key, which `"random"` and functions need. Equal keys make equal attacks.

    Returns:
      A transformation with an `AdversaryState` that keeps shapes and dtypes. Only `"collude"`
      communicates, in an all-reduce of whole numbers.

    Raises:
      ValueError: `attack` is unknown, or an index in `workers` is repeated or out of range; at the
        update, a function returns other shapes.
      TypeError: `axis_name` names no axis, `workers` are not whole numbers, or `key` is missing or
        is not a random key; at the update, a leaf is not floating-point.
      NameError: at the update, the axis is not bound.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, signax
      >>> attack = signax.testing.adversary("workers", [2], "invert")
      >>> tx = optax.chain(attack, signax.majority_vote("workers"))
      >>> gradients = jnp.array([[1.0, -3.0], [2.0, -1.0], [2.0, -2.0]])
      >>> update = lambda g: tx.update(g, tx.init(g))[0]
      >>> print(jax.vmap(update, axis_name="workers")(gradients)[0])
      [ 1. -1.]

    References:
      Bernstein et al., `signSGD with Majority Vote is Communication Efficient and Fault Tolerant
      <https://arxiv.org/abs/1810.05291>`_, 2019
    """
    check_axis_name(axis_name)
    if not callable(attack) and attack not in get_args(Attack):
        known = ", ".join(map(repr, get_args(Attack)))
        raise ValueError(f"attack={attack!r} is unknown: use one of {known}, or a function")
    attackers = _indices(workers)
    if key is not None:
        check_key(key)
    elif attack == "random" or callable(attack):
        raise TypeError(f"key=None is no random key, which attack={attack!r} needs: pass one")

    def init_fn(params: optax.Params):
        del params
        own = jax.random.key(0) if key is None else jnp.copy(key)  # a step may donate the state
        return AdversaryState(key=own)

    def update_fn(updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any):
        del params, extra_args
        check_floating(updates)
        index, size = worker_index(axis_name), lax.axis_size(axis_name)
        if any(worker >= size for worker in attackers):
            raise ValueError(f"workers={workers!r} names one beyond the {size} of the axis")
        attacks = jnp.any(index == jnp.array(attackers, jnp.int32))
        next_key, drawn = jax.random.split(state.key)
        forged = _forge(attack, updates, jax.random.fold_in(drawn, index), axis_name, attacks)
        check_alike("attack's result", forged, "updates", updates, "it must return their shapes")

        def choose(forged: Any, own: jax.Array):
            return jnp.where(attacks, jnp.asarray(forged).astype(own.dtype), own)

        return jax.tree.map(choose, forged, updates), AdversaryState(key=next_key)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _indices(workers: Any) -> tuple[int, ...]:
    """The indices of the attackers, as Python's integers."""
    try:
        indices = tuple(map(operator.index, workers))
    except TypeError:
        raise TypeError(f"workers={workers!r} must be a list of indices, such as [0, 3]") from None
    if len(set(indices)) < len(indices) or any(index < 0 for index in indices):
        raise ValueError(f"workers={workers!r} must be different indices from 0")
    return indices


def _forge(
    attack: Attack | Callable[..., Any],
    updates: Any,
    key: jax.Array,
    axis_name: Hashable,
    attacks: jax.Array,
) -> Any:
    """The forged updates of this worker, for the case that it attacks."""
    if not isinstance(attack, str):
        return attack(updates, key)
    if attack == "random":
        leaves, structure = jax.tree.flatten(updates)
        keys = jax.random.split(key, max(1, len(leaves)))
        return structure.unflatten(map(_noise, leaves, keys))
    if attack == "collude":
        return jax.tree.map(lambda leaf: _collude(leaf, axis_name, attacks), updates)
    return jax.tree.map(_ALONE[attack], updates)


def _scale(leaf: jax.Array) -> jax.Array:
    factor = min(1e6, float(jnp.finfo(leaf.dtype).max) ** 0.5)
    return (factor * leaf).astype(leaf.dtype)


_ALONE: dict[str, Callable[[jax.Array], jax.Array]] = {
    "invert": jnp.negative,
    "zero": jnp.zeros_like,
    "nan": lambda leaf: jnp.full_like(leaf, jnp.nan),
    "inf": lambda leaf: jnp.full_like(leaf, jnp.inf),
    "scale": _scale,
}


def _noise(leaf: jax.Array, key: jax.Array) -> jax.Array:
    wide = leaf.astype(wide_dtype(leaf.dtype))
    if not leaf.size:
        return leaf
    size = jnp.max(jnp.abs(wide)) * jnp.sqrt(jnp.mean(jnp.square(relative_to_peak(wide))))
    return narrow(size * jax.random.normal(key, leaf.shape, wide.dtype), leaf.dtype)


def _collude(leaf: jax.Array, axis_name: Hashable, attacks: jax.Array) -> jax.Array:
    ballot = (leaf > 0).astype(jnp.int32) - (leaf < 0).astype(jnp.int32)
    honest = lax.psum(jnp.where(attacks, 0, ballot), axis_name)
    return jnp.where(honest > 0, -1, 1).astype(leaf.dtype)
