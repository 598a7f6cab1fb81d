"""The state of M workers made into that of another number of workers.

Each leaf that a worker has of its own is an array of M rows. Rows are dealt out in order, as if
each stood for an M-th of a line that is cut anew:

    3 workers    [ a  a | b  b | c  c ]
    2 workers    [ a  a   b | b  c  c ]    means of what falls to each

so that the mean over workers is kept, doubled workers start as copies, and halved ones as means of
two. State for which that is wrong says by a method `resized` how it is to be done.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from signax._numerics import mean, wide_dtype


def resize_state(state: Any, per_worker: Any, num_workers: int) -> Any:
    """A state with rows for another number of workers.

    Args:
      state: a tree in which each leaf that is per worker has one row for each.
      per_worker: a tree of booleans like it.
      num_workers: the new number.

    Returns:
      The new state, of the same structure.
    """

    def resize(node, flags):
        if _has_a_way(node):
            return node.resized(num_workers)
        return resize_rows(node, num_workers) if flags else node

    return jax.tree.map(resize, state, per_worker, is_leaf=_has_a_way)


def _has_a_way(node: Any) -> bool:
    return hasattr(node, "resized")


def resize_rows(rows: jax.Array, num_workers: int) -> jax.Array:
    """Rows of M workers, [M, ...], dealt out to others.

    Numbers are averaged. A key is that of the worker who was there, with the new index folded in,
    and so is u32 of the shape of a raw key; what else cannot be averaged (integers, booleans) is
    taken over from that worker.
    """
    old = len(rows)
    if jnp.issubdtype(rows.dtype, jnp.floating):
        each = math.lcm(old, num_workers)
        shares = jnp.repeat(rows, each // old, axis=0)
        shares = shares.reshape(num_workers, each // num_workers, *rows.shape[1:])
        return mean(shares.astype(wide_dtype(rows.dtype)), axis=1).astype(rows.dtype)
    workers = jnp.arange(num_workers)
    taken = rows[workers * old // num_workers]
    if jnp.issubdtype(rows.dtype, jax.dtypes.prng_key):
        return _fold(taken, workers)
    raw_key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    if (rows.dtype, rows.shape[1:]) == (raw_key.dtype, raw_key.shape):
        return jax.random.key_data(_fold(jax.random.wrap_key_data(taken), workers))
    return taken


def _fold(keys: jax.Array, workers: jax.Array) -> jax.Array:
    """Folds each worker's index into its keys: key[M, ...]."""
    flat = keys.reshape(len(keys), -1)
    folded = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(0, None)))(flat, workers)
    return folded.reshape(keys.shape)
