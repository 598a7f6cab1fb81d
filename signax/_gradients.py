"""The gradient of one worker's share of a batch, whole or in micro-batches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from signax._numerics import wide_dtype


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
    loss_fn: Callable, params: Any, batch: Any, replicated: tuple, key: Any, pieces: int
) -> tuple[jax.Array, Any, Any]:
    """The loss, aux and gradient of `loss_fn`, which returns a pair of loss and aux.

    With several pieces losses and gradients are averaged over them, aux is stacked.
    """
    gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def of_piece(piece, piece_key):
        keyword = {} if piece_key is None else {"key": piece_key}
        (loss, aux), grads = gradient(params, piece, *replicated, **keyword)
        return loss, aux, grads

    if pieces == 1:
        return of_piece(batch, key)

    def add(total, piece_and_number):
        piece, number = piece_and_number
        loss, aux, grads = of_piece(piece, None if key is None else jax.random.fold_in(key, number))
        total = jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads)
        return total, (loss, aux)

    def cut(leaf):
        return leaf.reshape(pieces, leaf.shape[0] // pieces, *leaf.shape[1:])

    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=wide_dtype(p.dtype)), params)
    stacked = jax.tree.map(cut, batch), jnp.arange(pieces)
    total, (losses, aux) = lax.scan(add, zeros, stacked)
    grads = jax.tree.map(lambda t, p: (t / pieces).astype(p.dtype), total, params)
    return jnp.mean(losses), aux, grads
