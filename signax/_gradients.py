"""The gradient of one worker's share of a batch: whole, in micro-batches, or followed by them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from signax._ballots import all_finite
from signax._numerics import wide_dtype
from signax._transforms import hold


def check_batch(batch: Any, num_workers: int, accumulate: int) -> None:
    """Refuses a batch that cannot be cut into equal shares and these into equal micro-batches."""
    for path, leaf in jax.tree.leaves_with_path(batch):
        shape = jnp.shape(leaf)
        if not shape or shape[0] % (num_workers * accumulate):
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} has shape {shape}, whose first axis is not a "
                f"multiple of {num_workers} workers times accumulate={accumulate}: drop or pad "
                "examples, or pass what is not to be split as a further argument"
            )


def local_value_and_grad(
    loss_fn: Callable,
    params: Any,
    batch: Any,
    replicated: tuple,
    key: Any,
    pieces: int,
    local: optax.GradientTransformation | None = None,
    state: Any = None,
) -> tuple[jax.Array, Any, Any, Any]:
    """The loss, aux and gradient of `loss_fn`, which returns a pair of loss and aux.

    With several pieces losses and gradients are averaged over them, aux is stacked. With an
    optimiser `local` each piece's gradient is followed instead, and what comes out in its place is
    how far that went. The optimiser's state comes last.
    """
    gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def of_piece(params, piece, number):
        keyword = {}
        if key is not None:
            keyword["key"] = key if number is None else jax.random.fold_in(key, number)
        (loss, aux), grads = gradient(params, piece, *replicated, **keyword)
        return grads, (loss, aux)

    if pieces == 1 and local is None:
        grads, (loss, aux) = of_piece(params, batch, None)
        return loss, aux, grads, state

    def cut(leaf):
        return leaf.reshape(pieces, leaf.shape[0] // pieces, *leaf.shape[1:])

    stacked = jax.tree.map(cut, batch), jnp.arange(pieces)
    if local is None:
        grads, (losses, aux) = _average(of_piece, params, stacked)
    else:
        grads, state, (losses, aux) = _follow(of_piece, params, stacked, local, state)
    if pieces == 1:
        aux = jax.tree.map(lambda leaf: leaf[0], aux)
    return jnp.mean(losses), aux, grads, state


def _average(of_piece: Callable, params: Any, stacked: Any) -> tuple[Any, Any]:
    """The mean gradient over micro-batches, in at least f32 until the end."""

    def add(total, piece_and_number):
        grads, seen = of_piece(params, *piece_and_number)
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads), seen

    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=wide_dtype(p.dtype)), params)
    total, seen = lax.scan(add, zeros, stacked)
    pieces = len(stacked[1])
    return jax.tree.map(lambda t, p: (t / pieces).astype(p.dtype), total, params), seen


def _follow(
    of_piece: Callable,
    params: Any,
    stacked: Any,
    local: optax.GradientTransformation,
    state: Any,
) -> tuple[Any, Any, Any]:
    """Takes a step for each micro-batch on a copy of the parameters; where from minus where to.

    Once a loss, a gradient or the state is not finite, neither is what comes out (a sign of an
    infinity would be), and the state is the one from before all steps.
    """

    def step(carry, piece_and_number):
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
