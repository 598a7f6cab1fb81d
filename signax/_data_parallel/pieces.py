"""One worker's pieces of a batch: the mean of their gradients, or a local step for each."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from signax._core.leaves import all_finite, wide_dtype
from signax._transforms.participation import hold

# Of parameters, a piece of the batch, replicated arguments and a key: the loss, aux and gradient.
Differentiate = Callable[..., tuple[tuple[jax.Array, Any], Any]]

# Like `local_value_and_grad`: the loss, aux, a row and the own state of one worker. Where the
# workers share no parameters, they get `None`, and have parameters as the first part of the state.
OfShare = Callable[..., tuple[jax.Array, Any, Any, Any]]


def local_value_and_grad(
    differentiate: Differentiate,
    params: Any,
    batch: Any,
    replicated: tuple[Any, ...],
    key: Any,
    pieces: int,
    state: Any = None,
    *,
    local: optax.GradientTransformation | None = None,
) -> tuple[jax.Array, Any, Any, Any]:
    """The loss, aux and gradient of one worker, and the state of `local`.

    Losses and gradients are averaged over several pieces, and aux is stacked. With an optimiser
    `local`, the worker takes a step for each piece instead, and the parameters before minus the
    parameters after take the gradient's place.
    """

    def of_piece(params: Any, piece: Any, number: Any):
        own = key if key is None or number is None else jax.random.fold_in(key, number)
        seen, grads = differentiate(params, piece, replicated, own)
        return grads, seen

    if pieces == 1 and local is None:
        grads, (loss, aux) = of_piece(params, batch, None)
        return loss, aux, grads, state

    def cut(leaf: Any):
        return leaf.reshape(pieces, leaf.shape[0] // pieces, *leaf.shape[1:])

    stacked = jax.tree.map(cut, batch), jnp.arange(pieces)
    if local is None:
        grads, (losses, aux) = average_pieces(of_piece, params, stacked)
    else:
        grads, state, (losses, aux) = follow_pieces(of_piece, params, stacked, local, state)
    if pieces == 1:
        aux = jax.tree.map(lambda leaf: leaf[0], aux)
    return jnp.mean(losses), aux, grads, state


def average_pieces(of_piece: Callable[..., Any], params: Any, stacked: Any) -> tuple[Any, Any]:
    """The mean gradient over micro-batches, in at least f32 until the end."""

    def add(total: Any, piece_and_number: Any):
        grads, seen = of_piece(params, *piece_and_number)
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads), seen

    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=wide_dtype(p.dtype)), params)
    total, seen = lax.scan(add, zeros, stacked)
    pieces = len(stacked[1])
    return jax.tree.map(lambda t, p: (t / pieces).astype(p.dtype), total, params), seen


def follow_pieces(
    of_piece: Callable[..., Any],
    params: Any,
    stacked: Any,
    local: optax.GradientTransformation,
    state: Any,
) -> tuple[Any, Any, Any]:
    """Take a step for each micro-batch on a copy of the parameters: the start minus the end.

    If a loss, a gradient or the state is not finite at any step, the difference is NaN (the sign of
    an infinity would be finite), and the state is the state before all steps.
    """

    def step(carry: Any, piece_and_number: Any):
        own, state, finite = carry
        grads, (loss, aux) = of_piece(own, *piece_and_number)
        updates, state = local.update(grads, state, own)
        finite &= all_finite((loss, grads, state))
        return (optax.apply_updates(own, updates), state, finite), (loss, aux)

    carry = params, state, jnp.bool_(True)
    (own, new_state, finite), seen = lax.scan(step, carry, stacked)
    differences = jax.tree.map(lambda p, q: p - q, params, own)
    finite &= all_finite(differences)
    differences = jax.tree.map(lambda d: jnp.where(finite, d, jnp.nan), differences)
    return differences, hold(finite, state, new_state), seen
