"""Means of scaled signs under `DataParallel`, step by step: their run and their reference."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import references
from jax.sharding import NamedSharding, PartitionSpec
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


# Parameters that are sharded within a worker. `cuts` has the spec of each.

SHARDED = {"large": (1024, 36), "small": (12, 8), "cube": (4, 6, 10), "whole": (7,)}


def shard(tree, mesh, cuts, *rows):
    """Arrays on a mesh, cut by `cuts`, with rows of workers along the axes `rows`."""
    return {
        name: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*rows, *cuts[name])))
        for name, leaf in tree.items()
    }


def sharded_rows(num_steps, num_workers, seed=0):
    """Rows of gradients for each step. Columns of a leaf differ in magnitude, half are often 0."""
    rng = np.random.default_rng(seed)

    def leaf(shape):
        rows = rng.standard_normal((num_steps, num_workers, *shape)) * np.linspace(1, 9, shape[-1])
        rows[..., ::2] *= rng.choice([0.0, 1.0], size=rows[..., ::2].shape)
        return rows

    return {name: leaf(shape) for name, shape in SHARDED.items()}


def block_counts(mesh, cuts):
    """The number of devices' blocks along each dimension of each leaf; () for whole leaves."""
    counts = []
    for name, shape in SHARDED.items():
        entries = [*cuts[name], *[None] * (len(shape) - len(cuts[name]))]
        axes = [entry if isinstance(entry, tuple) else (entry,) for entry in entries]
        each = tuple(math.prod(mesh.shape[a] for a in names if a) for names in axes)
        counts.append(each if math.prod(each) > 1 else ())
    return counts


def follow_sharded(tx, mesh, cuts, rows, active=None, state=None, *, with_specs=True):
    """Updates and states after each step, from gradients that are sharded within workers."""
    tx = signax.DataParallel(tx, mesh, param_specs=cuts if with_specs else None)
    num_steps, dtype = len(rows["whole"]), jnp.result_type(float)
    params = {name: jnp.zeros(shape, dtype) for name, shape in SHARDED.items()}
    params = shard(params, mesh, cuts)
    state, update = tx.init(params) if state is None else state, jax.jit(tx.update)
    history = []
    for t in range(num_steps):
        grads = {name: np.asarray(leaf[t], dtype) for name, leaf in rows.items()}
        extra = {} if active is None else {"active": jnp.asarray(active[t])}
        updates, state = update(shard(grads, mesh, cuts, "data"), state, params, **extra)
        history.append((updates, state))
    return history


def assert_follows_blocks(history, expected, counts, rtol=1e-9, atol=1e-11):
    """Compare updates and both memories with the reference; padding must stay 0."""
    close = partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    for t, (updates, state) in enumerate(history):
        updates, memory = jax.device_get((updates, optax.tree.get(state, "memory")))
        for n, (name, shape) in enumerate(SHARDED.items()):
            mean, errors, server = expected[t][n]
            close(np.ravel(updates[name]), mean, err_msg=f"step {t} {name}")
            close(np.reshape(memory.worker[name], errors.shape), errors, err_msg=name)
            if memory.server is not None:
                kept, places = served(memory.server[name], shape, counts[n])
                close(kept[places], server, err_msg=f"server at step {t} {name}")
                kept[places] = 0
                np.testing.assert_array_equal(kept, 0)


def served(rows, shape, counts):
    """Servers' memories as an array [M, blocks, 32 S], and each coordinate's place there."""
    device, index, block = references.device_blocks(shape, counts)
    server, place = references.servers(block, len(rows))
    assert rows.shape[1:-2] == counts
    kept = np.array(rows).reshape(len(rows), math.prod(counts), -1)
    return kept, (server[index], device, place[index])
