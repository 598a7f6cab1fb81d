"""Runs of DiLoCo on least squares, for its tests, and their reference."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from diloco_references import diloco, least_squares
from least_squares import PARAMS, assert_trees_close, squared_error
from workers import auto_mesh

import signax

AVERAGE = signax.average_updates("data")
VOTE = optax.chain(signax.majority_vote("data"), optax.scale(1 / 64))
NESTEROV = optax.sgd(0.7, momentum=0.9, nesterov=True)
SHARE = 4  # examples of a worker in a step


def make(exchange=AVERAGE, num_local_steps=4, workers=4, inner=None, mesh=None, **options):
    inner = optax.sgd(1 / 16) if inner is None else inner
    mesh = auto_mesh({"data": workers}) if mesh is None else mesh
    outer = optax.chain(exchange, NESTEROV)
    return signax.DiLoCo(inner, outer, mesh, num_local_steps=num_local_steps, **options)


def batches(steps, workers=4, seed=0):
    """A batch for each step; the workers have other distributions."""
    rng = np.random.default_rng(seed)
    shift = np.repeat(rng.normal(size=(workers, 1)), SHARE, axis=0)
    found = []
    for _ in range(steps):
        x = rng.normal(size=(workers * SHARE, 3)) + shift
        y = x[:, :2] + rng.normal(size=(workers * SHARE, 2))
        found.append({"x": np.float32(x), "y": np.float32(y)})
    return found


def reference(given, workers, *arguments, **options):
    gradients = []
    for batch in given:
        x, y = (np.split(np.float64(batch[name]), workers) for name in "xy")
        gradients.append([least_squares(*pair) for pair in zip(x, y, strict=True)])
    return diloco(PARAMS, gradients, *arguments, **options)


def assert_state(state, expected, rtol=1e-4, atol=1e-5):
    common, own, _ = expected
    assert_trees_close(state.params, common, rtol, atol)
    assert_trees_close(state.own, jax.tree.map(lambda *leaves: np.stack(leaves), *own), rtol, atol)


def run(tx, state, given, loss_fn=squared_error, **options):
    step, losses = tx.train_step(loss_fn), []
    state = jax.tree.map(jnp.copy, state)  # a step donates it
    for batch in given:
        state, loss = step(state, batch, **options)
        losses.append(float(loss))
    return state, losses
