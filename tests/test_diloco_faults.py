"""Faults under DiLoCo: steps that are not finite, excluded workers, and rounds without a step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from diloco_references import SGD
from diloco_runs import AVERAGE, SHARE, VOTE, batches, make, run
from jax.sharding import AxisType
from least_squares import PARAMS, assert_trees_equal, make_mesh, squared_error

import signax
from signax import diagnostics


def poisoned(batch, worker):
    """The batch with an infinity in one worker's share."""
    x = batch["x"].copy()
    x[worker * SHARE] = np.inf
    return {**batch, "x": x}


def row(tree, worker):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[worker], tree)


def test_a_nonfinite_local_step_changes_nothing_on_its_worker():
    tx = make(inner=optax.adamw(0.1))
    local_step = jax.jit(tx.local_step(squared_error))
    first, second = batches(2)
    _, before = local_step(tx.init(PARAMS), first)
    loss, after = local_step(before, poisoned(second, 1))
    clean, expected = local_step(before, second)
    assert_trees_equal(row(after.own, 1), row(before.own, 1))
    moments = [(s.inner[0].mu, s.inner[0].nu) for s in (before, after, expected)]
    assert_trees_equal(row(moments[1], 1), row(moments[0], 1))
    for worker in (0, 2, 3):
        assert_trees_equal(row(after.own, worker), row(expected.own, worker))
        assert_trees_equal(row(moments[1], worker), row(moments[2], worker))
    assert np.isfinite(loss)
    assert loss != clean
    assert after.count == 2


@pytest.mark.parametrize(
    ("slope", "extra"),
    [(np.inf, 0.0), (1.0, np.nan), (1e30, 0.0)],
    ids=["gradient", "loss", "state"],
)
def test_values_that_the_inner_optimizer_hides_hold_the_worker(slope, extra):
    """Adam's direction is finite for a large gradient, though its square is not."""

    def loss_fn(params, batch):
        return jnp.sum(params["b"] * batch["slope"]) + jnp.sum(batch["extra"])

    tx = make(inner=optax.chain(optax.adam(0.5), optax.clip(1.0)))
    batch = {"slope": np.ones((4, 2), np.float32), "extra": np.zeros(4, np.float32)}
    batch["slope"][1, 0], batch["extra"][1] = slope, extra
    _, state = tx.local_step(loss_fn)(tx.init(PARAMS), batch)
    np.testing.assert_array_equal(np.any(state.own["b"] != PARAMS["b"], axis=1), np.arange(4) != 1)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("exchange", [AVERAGE, signax.mean_quantized("data")], ids=["mean", "bits"])
@pytest.mark.parametrize("fault", ["inactive", "NaN", "infinity", "no finite step"])
def test_an_excluded_worker_does_not_count_and_restarts(exchange, fault):
    tx, given = make(exchange, 2), batches(2)
    state, local_step = tx.init(PARAMS), jax.jit(tx.local_step(squared_error))
    for batch in given:
        _, state = local_step(state, poisoned(batch, 1) if fault == "no finite step" else batch)
    if fault in ("NaN", "infinity"):
        bad = np.nan if fault == "NaN" else np.inf
        own = state.own["w"].at[1, 0, 0].set(bad)
        state = state._replace(own={**state.own, "w": own})
    active = np.arange(4) != 1
    sync = jax.jit(tx.sync)
    found = sync(state, active) if fault == "inactive" else sync(state)
    differences = {n: np.asarray(PARAMS[n]) - np.asarray(state.own[n]) for n in PARAMS}
    if exchange is AVERAGE:
        means = {n: references.mean(d.reshape(4, -1), active) for n, d in differences.items()}
    else:
        leaves = [[differences[n] for n in PARAMS]]
        (step,) = references.mean_of_scaled_signs(leaves, active=[active], bits=2)
        means = {n: step[k][0] for k, n in enumerate(PARAMS)}
    for name, leaf in PARAMS.items():
        expected = SGD(0.7, 0.9, nesterov=True).step(leaf, means[name].reshape(leaf.shape))
        np.testing.assert_allclose(found.params[name], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found.own[name], np.stack([found.params[name]] * 4))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    took_part = signax.participation(found)
    assert took_part.voters == 3
    np.testing.assert_array_equal(took_part.missed, ~active)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_train_step_passes_active_to_the_exchange(kind):
    tx = make(num_local_steps=2, mesh=make_mesh((4,), kind))
    given, active = batches(2), np.arange(4) > 1
    state, _ = run(tx, tx.init(PARAMS), given, active=active)
    assert signax.participation(state).voters == 2
    with pytest.raises(TypeError, match="active="):
        tx.train_step(squared_error)(state, given[0], active=np.ones(3, bool))


def test_a_round_without_a_finite_step_on_any_worker_leaves_finite_parameters():
    tx = make(VOTE, num_local_steps=2)
    (batch,) = batches(1)
    for worker in range(4):
        batch = poisoned(batch, worker)
    state, losses = run(tx, tx.init(PARAMS), [batch] * 2)
    assert np.isnan(losses).all()
    assert_trees_equal(state.params, PARAMS)
    assert signax.participation(state).voters == 0


def test_a_sync_without_local_steps_is_an_error_or_changes_nothing():
    tx = make(VOTE, num_local_steps=2)
    with pytest.raises(ValueError, match="no local step since the last exchange, at count=0"):
        tx.sync(tx.init(PARAMS))
    state, _ = run(tx, tx.init(PARAMS), batches(4))  # the outer momentum is not zero
    with pytest.raises(ValueError, match="at count=4"):
        tx.sync(state)
    assert_trees_equal(jax.jit(tx.sync)(state), state)


def test_metrics_read_the_state():
    tx = make(VOTE, num_local_steps=2, inner=optax.adamw(0.1))
    state, _ = run(tx, tx.init(PARAMS), batches(2))
    numbers = diagnostics.metrics(state)
    assert numbers["signax/voters"] == 4
    assert {"signax/momentum_norm/inner", "signax/momentum_norm/outer"} <= set(numbers)
