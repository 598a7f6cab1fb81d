"""Means of scaled signs under `DataParallel`, step by step: their run and their reference."""

import jax
import jax.numpy as jnp
import numpy as np
import references
from workers import auto_mesh

import signax

PARAMS = {"matrix": jnp.zeros((5, 7)), "vector": jnp.zeros(9)}


def random_rows(num_steps, num_workers, seed=0, mean=0.0):
    rng = np.random.default_rng(seed)
    return {
        name: mean + rng.standard_normal((num_steps, num_workers, *leaf.shape))
        for name, leaf in PARAMS.items()
    }


def follow(tx, rows, num_workers, dtype=jnp.float32, **extra):
    """Updates and states after each step under DataParallel."""
    tx = signax.DataParallel(tx, auto_mesh({"data": num_workers}))
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    state, update = tx.init(params), jax.jit(tx.update)
    history = []
    for t in range(len(rows["matrix"])):
        grads = jax.tree.map(lambda leaf, t=t: jnp.asarray(leaf[t], dtype), rows)
        updates, state = update(grads, state, params, **{k: v[t] for k, v in extra.items()})
        history.append((updates, state))
    return history


def reference(rows, **options):
    leaves = [[leaf[t] for leaf in rows.values()] for t in range(len(rows["matrix"]))]
    return references.mean_of_scaled_signs(leaves, **options)


def assert_updates(history, expected, scale=1.0):
    for t, (updates, _) in enumerate(history):
        for n, name in enumerate(PARAMS):
            np.testing.assert_allclose(
                np.ravel(updates[name]), scale * expected[t][n][0], rtol=1e-4, atol=1e-5
            )
