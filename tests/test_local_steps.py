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
    follow = jax.jit(tx.local_steps(squared_error, num_local_steps=steps))
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
    follow = jax.jit(tx.local_steps(loss_fn, has_aux=True, num_local_steps=4))
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
    follow = tx.local_steps(loss_fn, has_aux=True, aux=("concat", "mean"), num_local_steps=steps)
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
    follow = jax.jit(tx.local_steps(squared_error, num_local_steps=2))
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
    follow = jax.jit(tx.local_steps(loss_fn, num_local_steps=3))
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
    for local, number in ((None, "accumulate"), (signax.signum(0.1), "num_local_steps")):
        tx = signax.DataParallel(SIGNUM, make_mesh(kind=kind), local=local)
        step, state = tx.train_step(squared_error, **{number: 8}), tx.init(PARAMS)
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


# The number of local steps.


@pytest.fixture
def local_signum(mesh):
    return signax.DataParallel(SIGNUM, mesh, local=signax.signum(0.1))


def test_train_step_takes_local_steps_and_votes(local_signum):
    tx, batch = local_signum, make_batch()

    @jax.jit
    def by_hand(params, state):
        follow = tx.local_steps(squared_error, num_local_steps=4)
        loss, rows, state = follow(params, state, batch)
        updates, state = tx.update(rows, state, params)
        return optax.apply_updates(params, updates), state, loss

    expected = by_hand(PARAMS, tx.init(PARAMS))
    step = tx.train_step(squared_error, num_local_steps=4)
    found = step(jax.tree.map(jnp.copy, PARAMS), tx.init(PARAMS), batch)
    assert_trees_equal(found, expected)
    np.testing.assert_array_equal(optax.tree.get(found[1].local, "count"), [4] * WORKERS)


@pytest.mark.parametrize("method", ["local_steps", "train_step"])
def test_one_local_step_is_the_default(method, local_signum):
    tx, batch = local_signum, make_batch()
    found, expected = (
        getattr(tx, method)(squared_error, **options)(
            jax.tree.map(jnp.copy, PARAMS), tx.init(PARAMS), batch
        )
        for options in ({}, {"num_local_steps": 1})
    )
    assert_trees_equal(found, expected)


@pytest.mark.parametrize("method", ["local_steps", "train_step"])
def test_the_old_name_of_the_number_warns_and_equals_the_new_name(method, local_signum):
    tx, batch = local_signum, make_batch()
    make = getattr(tx, method)
    said = rf"{method}\(accumulate=\.\.\.\).* is deprecated: use num_local_steps=\.\.\."
    with pytest.warns(DeprecationWarning, match=said) as warned:
        old = make(squared_error, accumulate=2)
    assert [warning.filename for warning in warned] == [__file__]
    found, expected = (
        step(jax.tree.map(jnp.copy, PARAMS), tx.init(PARAMS), batch)
        for step in (old, make(squared_error, num_local_steps=2))
    )
    assert_trees_equal(found, expected)
    state = found[2] if method == "local_steps" else found[1]
    np.testing.assert_array_equal(optax.tree.get(state.local, "count"), [2] * WORKERS)


@pytest.mark.parametrize(
    ("number", "kind", "said"),
    [
        (0, ValueError, "num_local_steps=0 must be at least 1"),
        (1.5, TypeError, r"num_local_steps=1\.5 must be a whole number"),
    ],
)
@pytest.mark.parametrize("method", ["local_steps", "train_step"])
def test_rejects_an_invalid_number_of_local_steps(method, number, kind, said, local_signum):
    with pytest.raises(kind, match=said):
        getattr(local_signum, method)(squared_error, num_local_steps=number)


@pytest.mark.parametrize("method", ["local_steps", "train_step"])
def test_rejects_a_batch_that_local_steps_cannot_cut_evenly(method, local_signum):
    follow = getattr(local_signum, method)(squared_error, num_local_steps=3)
    said = r"batch\['x'\] has shape \(32, 3\).* multiple of 8 workers times num_local_steps=3: drop"
    with pytest.raises(ValueError, match=said):
        follow(PARAMS, local_signum.init(PARAMS), make_batch())


def test_a_number_of_local_steps_requires_a_local_optimizer(mesh):
    said = r"num_local_steps=4 needs DataParallel\(\.\.\., local=optimizer\).* use accumulate="
    with pytest.raises(ValueError, match=said):
        signax.DataParallel(SIGNUM, mesh).train_step(squared_error, num_local_steps=4)


def test_rejects_two_numbers_of_local_steps(local_signum):
    said = r"accumulate=2 and num_local_steps=4 are both given.* use num_local_steps= alone"
    with pytest.raises(ValueError, match=said):
        local_signum.train_step(squared_error, accumulate=2, num_local_steps=4)
