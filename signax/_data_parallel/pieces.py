"""One worker's pieces of a batch: the mean of their gradients, or a local step for each."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from signax._core.leaves import all_finite, wide_dtype
from signax._transforms.participation import hold


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
