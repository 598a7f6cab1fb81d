"""Local steps: each worker follows its own gradients, and the workers vote on the difference."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from least_squares import (
    PARAMS,
    SIGNUM,
    WORKERS,
    assert_trees_close,
    assert_trees_equal,
    make_batch,
    make_mesh,
    shares,
    squared_error,
)

import signax
from signax import diagnostics


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_local_steps_return_each_workers_displacement(steps, mesh):
    rate, b1 = 1 / 16, 0.5
    tx = signax.DataParallel(SIGNUM, mesh, local=signax.signum(rate, b1))
    follow = jax.jit(tx.local_steps(squared_error, accumulate=steps))
    state = tx.init(PARAMS)
    momenta = [jax.tree.map(np.zeros_like, PARAMS)] * WORKERS
    for batch in (make_batch(), make_batch(64)):  # the second pass starts with a momentum
        loss, rows, state = follow(PARAMS, state, batch)
        losses, displacements = [], []
        for i, share in enumerate(shares(batch)):
            params = jax.tree.map(np.asarray, PARAMS)
            for piece in shares(share, steps):
                value, slope = jax.value_and_grad(squared_error)(params, piece)
                losses.append(value)
                momenta[i] = jax.tree.map(
                    lambda m, g: b1 * m + (1 - b1) * np.asarray(g), momenta[i], slope
                )
                params = jax.tree.map(lambda p, m: p - rate * np.sign(m), params, momenta[i])
            displacements.append(jax.tree.map(lambda p, q: p - q, PARAMS, params))
        assert_trees_close(rows, jax.tree.map(lambda *leaves: np.stack(leaves), *displacements))
        assert loss == pytest.approx(np.mean(losses), rel=1e-5)
        found = optax.tree.get(state.local, "momentum")
        assert_trees_close(found, jax.tree.map(lambda *leaves: np.stack(leaves), *momenta))
    np.testing.assert_array_equal(optax.tree.get(state.local, "count"), [2 * steps] * WORKERS)
    updates, after = jax.jit(tx.update)(rows, state, PARAMS)
    plain = signax.DataParallel(SIGNUM, mesh)
    expected, exchanged = jax.jit(plain.update)(rows, plain.init(PARAMS), PARAMS)
    assert_trees_equal(updates, expected)
    assert_trees_equal(after.exchanged, exchanged)
    assert_trees_equal(after.local, state.local)


def test_local_steps_have_aux_and_fold_keys_like_gradients(mesh):
    def loss_fn(params, batch, *, key):
        return squared_error(params, batch), jax.random.uniform(key)

    tx = signax.DataParallel(SIGNUM, mesh, local=signax.sign_sgd(0.1))
    key, state = jax.random.key(1), tx.init(PARAMS)
    gradient = jax.jit(tx.value_and_grad(loss_fn, has_aux=True, accumulate=4))
    (_, expected), _ = gradient(PARAMS, make_batch(), key=key)
    follow = jax.jit(tx.local_steps(loss_fn, has_aux=True, accumulate=4))
    (_, aux), _, _ = follow(PARAMS, state, make_batch(), key=key)
    np.testing.assert_array_equal(aux, expected)
    assert np.unique(aux).size == 4 * WORKERS
    single = jax.jit(tx.local_steps(loss_fn, has_aux=True))
    (_, aux), _, _ = single(PARAMS, state, make_batch(), key=key)
    assert aux.shape == (WORKERS,)


@pytest.mark.parametrize("steps", [1, 2])
def test_local_steps_join_and_average_aux(steps, mesh):
    def loss_fn(params, batch):
        return squared_error(params, batch), (batch["x"], params["b"])

    tx = signax.DataParallel(SIGNUM, mesh, local=signax.sign_sgd(0.5))
    follow = tx.local_steps(loss_fn, has_aux=True, aux=("concat", "mean"), accumulate=steps)
    batch = make_batch()
    (_, (inputs, bias)), *_ = jax.jit(follow)(PARAMS, tx.init(PARAMS), batch)
    np.testing.assert_array_equal(inputs, batch["x"])
    # The last step changes the parameters after aux was taken; two steps start 0 and 1 steps away.
    first = np.float32(PARAMS["b"])
    if steps == 1:
        np.testing.assert_array_equal(bias, first)
    else:
        signs = [
            np.sign(jax.grad(squared_error)(PARAMS, piece)["b"])
            for piece in shares(batch, 2 * WORKERS)[::2]
        ]
        np.testing.assert_allclose(bias, first - 0.25 * np.mean(signs, axis=0), rtol=1e-6)


def test_a_nonfinite_worker_discards_its_local_steps(mesh):
    tx = signax.DataParallel(SIGNUM, mesh, local=signax.signum(0.1))
    batch = make_batch()
    batch["x"] = batch["x"].at[5].set(jnp.inf)  # the second worker's
    follow = jax.jit(tx.local_steps(squared_error, accumulate=2))
    _, rows, state = follow(PARAMS, tx.init(PARAMS), batch)
    momentum = optax.tree.get(state.local, "momentum")["w"]
    np.testing.assert_array_equal(np.any(np.isnan(rows["w"]), axis=(1, 2)), np.arange(8) == 1)
    np.testing.assert_array_equal(np.any(momentum != 0, axis=(1, 2)), np.arange(8) != 1)
    updates, _ = jax.jit(tx.update)(rows, state, PARAMS)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize(
    ("local", "slope", "extra"),
    [
        (signax.signum(0.5), np.inf, 0.0),  # the sign of the gradient is finite
        (optax.adam(0.5), 1.0, np.nan),  # the gradient of the loss is finite
        (optax.adam(0.5), 1e30, 0.0),  # the square of the gradient overflows
    ],
    ids=["gradient", "loss", "state"],
)
def test_nonfinite_values_hidden_by_local_steps_exclude_the_worker(mesh, local, slope, extra):
    """The second of three micro-batches is not finite; the others are."""

    def loss_fn(params, batch):
        return jnp.sum(params * batch["slope"]) + jnp.sum(batch["extra"])

    tx = signax.DataParallel(SIGNUM, mesh, local=local)
    slopes = np.ones((WORKERS, 3, 4), np.float32)
    slopes[1, 1, 2] = slope
    extras = np.zeros((WORKERS, 3), np.float32)
    extras[1, 1] = extra
    batch = {"slope": slopes.reshape(-1, 4), "extra": extras.reshape(-1)}
    params = jnp.zeros(4)
    before = tx.init(params)
    follow = jax.jit(tx.local_steps(loss_fn, accumulate=3))
    _, rows, state = follow(params, before, batch)
    bad = np.arange(WORKERS) == 1
    np.testing.assert_array_equal(np.isnan(rows).all(axis=1), bad)
    np.testing.assert_array_equal(np.isnan(rows).any(axis=1), bad)
    for leaf in jax.tree.leaves(state.local):
        if leaf.ndim > 1:  # a momentum
            np.testing.assert_array_equal(np.any(leaf != 0, axis=1), ~bad)
    _, state = jax.jit(tx.update)(rows, state, params)
    assert optax.tree.get(state, "voters") == WORKERS - 1


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_local_steps_send_no_more_than_one_vote(kind):
    batch, sent = make_batch(64), []
    for options in ({}, {"local": signax.signum(0.1)}):
        tx = signax.DataParallel(SIGNUM, make_mesh(kind=kind), **options)
        step, state = tx.train_step(squared_error, accumulate=8), tx.init(PARAMS)
        sent.append(diagnostics.collective_bytes(step.lower(PARAMS, state, batch).compile()))
        params, state, _ = step(jax.tree.map(jnp.copy, PARAMS), state, batch)
        step(params, state, batch)
    assert sent[0] == sent[1] > 0


def test_local_steps_reject_a_state_that_does_not_fit(mesh):
    batch = make_batch()
    tx = signax.DataParallel(SIGNUM, mesh, local=signax.signum(0.1))
    state = tx.init(PARAMS)
    plain = signax.DataParallel(SIGNUM, mesh).init(PARAMS)
    for follow in (tx.local_steps(squared_error), tx.train_step(squared_error)):
        with pytest.raises(ValueError, match="state and params do not belong together"):
            follow(PARAMS, plain, batch)
        for workers in (4, 16):
            with pytest.raises(ValueError, match="resize"):
                follow(PARAMS, tx.resize(state, PARAMS, workers), batch)


def test_local_steps_require_a_local_optimizer(mesh):
    with pytest.raises(TypeError, match="local="):
        signax.DataParallel(SIGNUM, mesh, local=signax.sign_sgd)
    with pytest.raises(ValueError, match="local=None"):
        signax.DataParallel(SIGNUM, mesh).local_steps(squared_error)
