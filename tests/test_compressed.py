"""Means of scaled signs as a transformation, and the optimiser that follows them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from workers import AXIS, auto_mesh

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


@pytest.mark.parametrize("feedback", ["both", "worker", "none"])
def test_the_transformation_remembers_under_data_parallel(feedback):
    rows = random_rows(20, 4)
    active = np.random.default_rng(1).random((20, 4)) > 0.2
    tx = signax.mean_scaled_signs("data", feedback=feedback)
    history = follow(tx, rows, 4, active=jnp.asarray(active))
    assert_updates(history, reference(rows, feedback=feedback, active=active))
    assert optax.tree.get(history[-1][1], "count") == 20


def test_options_reach_the_mean():
    rows = random_rows(10, 3)
    history = follow(signax.mean_scaled_signs("data", block=4, decay=0.5), rows, 3)
    assert_updates(history, reference(rows, block=4, decay=0.5))


def test_options_of_ef_sign_sgd_reach_the_mean():
    rows = random_rows(10, 3)
    options = {"block": 4, "decay": 0.5, "feedback": "worker"}
    tx = signax.ef_sign_sgd(1.0, axis_name="data", **options)
    assert_updates(follow(tx, rows, 3), reference(rows, **options), -1.0)
    tx = signax.ef_sign_sgd(1.0, 0.9, axis_name="data", accumulator_dtype=jnp.float32)
    _, state = follow(tx, random_rows(1, 3), 3, jnp.bfloat16)[0]
    for field in ("trace", "worker", "server"):
        for leaf in jax.tree.leaves(optax.tree.get(state, field)):
            assert leaf.dtype == jnp.float32


@pytest.mark.parametrize("nesterov", [False, True])
def test_ef_sign_sgd_over_workers_compresses_each_ones_momentum(nesterov):
    steps, rate, decay = 15, 0.5, 0.9
    rows = random_rows(steps, 4, seed=2)
    trace, momenta = dict.fromkeys(rows, 0.0), {name: [] for name in rows}
    for name, t in ((name, t) for name in rows for t in range(steps)):
        trace[name] = rows[name][t] + decay * trace[name]
        momenta[name].append(rows[name][t] + decay * trace[name] if nesterov else trace[name])
    tx = signax.ef_sign_sgd(rate, decay, nesterov=nesterov, axis_name="data")
    history = follow(tx, rows, 4)
    assert_updates(history, reference({n: np.array(m) for n, m in momenta.items()}), -rate)


def test_a_worker_that_is_not_finite_keeps_momentum_and_memory():
    rows = random_rows(6, 3, seed=4)
    rows["vector"][4, 1, 2] = np.inf
    history = follow(signax.ef_sign_sgd(0.1, 0.9, axis_name="data"), rows, 3)
    (_, before), (updates, after) = history[3], history[4]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
    for field in ("trace", "worker"):
        old, new = optax.tree.get(before, field), optax.tree.get(after, field)
        for name in PARAMS:
            np.testing.assert_array_equal(old[name][1], new[name][1])
            assert np.any(old[name][0] != new[name][0])


def warm_up_then_drop(count):
    """A rate that starts from 0, stays, and drops to a tenth."""
    return jnp.where(count < 4, 0.125 * count, jnp.where(count < 15, 0.5, 0.05))


def test_both_memories_are_rescaled_behind_the_learning_rate():
    steps = 30
    rows = random_rows(steps, 4, seed=5)
    with jax.enable_x64(True):
        rates = np.array([warm_up_then_drop(t) for t in range(steps)])
    scaled = {
        name: leaf * rates.reshape(steps, *[1] * (leaf.ndim - 1)) for name, leaf in rows.items()
    }
    active = np.ones((steps, 4), bool)
    active[7:9, 2] = False
    with jax.enable_x64(True):
        tx = signax.mean_scaled_signs("data", learning_rate=warm_up_then_drop)
        history = follow(tx, scaled, 4, jnp.float64, active=jnp.asarray(active))
    # A step of rate 0 hands on nothing of its gradient, and memory begins with the second; zeros
    # apart, of which there are none then, what a step's number is does not matter.
    later = {name: leaf[1:] for name, leaf in rows.items()}
    expected = reference(later, active=active[1:])
    for updates in jax.tree.leaves(history[0][0]):
        np.testing.assert_array_equal(updates, 0)
    for t, (updates, state) in enumerate(history[1:]):
        for n, name in enumerate(PARAMS):
            mean, errors, server = expected[t][n]
            np.testing.assert_allclose(np.ravel(updates[name]), rates[t + 1] * mean, rtol=1e-9)
            found = np.asarray(state.memory.worker[name]).reshape(errors.shape)
            np.testing.assert_allclose(found, errors, rtol=1e-9, atol=1e-11)
            kept = np.ravel(state.memory.server[name])[: server.size]
            np.testing.assert_allclose(kept, server, rtol=1e-9, atol=1e-11)
    kept = [state.memory.worker["matrix"][2] for _, state in history[6:9]]
    np.testing.assert_array_equal(kept[0], kept[1])
    np.testing.assert_array_equal(kept[1], kept[2])


def test_the_workers_memory_stays_within_the_papers_bound():
    """|e|^2 <= 4 (1 - delta) sigma^2 / delta^2, of each leaf, sigma^2 bounding |g|^2."""
    rows = random_rows(300, 4, seed=6, mean=1.0)
    history = follow(signax.mean_scaled_signs("data"), rows, 4)
    for name, leaf in PARAMS.items():
        errors = np.stack([state.memory.worker[name] for _, state in history])
        errors = errors.reshape(300, 4, leaf.size)
        gradients = rows[name].reshape(300, 4, leaf.size)
        corrected = gradients[1:] + errors[:-1]
        energy = (corrected**2).sum(axis=-1)
        density = np.abs(corrected).sum(axis=-1) ** 2 / (leaf.size * energy)
        delta, sigma = density.min(), (gradients**2).sum(axis=-1).max()
        largest = (errors**2).sum(axis=-1).max()
        assert 0 < largest <= 4 * (1 - delta) * sigma / delta**2


def test_memories_are_the_same_on_every_platform():
    """A checkpoint from CPUs goes on elsewhere: no primitive asks where it runs."""
    tx = signax.DataParallel(signax.mean_scaled_signs("data"), auto_mesh({"data": 4}))
    rows = jax.tree.map(lambda leaf: leaf[0], random_rows(1, 4))
    state = tx.init(PARAMS)
    assert "platform_index" not in str(jax.make_jaxpr(tx.update)(rows, state, PARAMS))
    voted = signax.DataParallel(signax.majority_vote("data"), auto_mesh({"data": 4}))
    program = jax.make_jaxpr(voted.update)(rows, voted.init(PARAMS), PARAMS)
    assert "platform_index" in str(program)  # votes are packed in different ways


def test_the_number_of_workers_is_asked_for_where_no_axis_tells():
    with pytest.raises(NameError, match="pass num_workers"):
        signax.mean_scaled_signs(AXIS).init(PARAMS)
    state = signax.mean_scaled_signs(AXIS, num_workers=2).init(PARAMS)
    assert state.memory.server["matrix"].shape == (32, 2)
    state = signax.mean_scaled_signs(AXIS, feedback="worker").init(PARAMS)
    assert state.memory.server is None


@pytest.mark.parametrize(
    "option",
    [
        {"feedback": "server"},
        {"block": "row"},
        {"block": True},
        {"decay": -0.1},
        {"num_workers": 0},
        {"accumulator_dtype": jnp.int32},
    ],
)
def test_wrong_options_are_refused_when_the_mean_is_made(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name}="):
        signax.mean_scaled_signs(AXIS, **option)


def test_ef_sign_sgd_refuses_options_without_effect():
    with pytest.raises(ValueError, match="feedback='worker'"):
        signax.ef_sign_sgd(0.1, feedback="worker")
    with pytest.raises(ValueError, match="num_workers=3"):
        signax.ef_sign_sgd(0.1, num_workers=3)
    with pytest.raises(ValueError, match="nesterov=True needs a momentum"):
        signax.ef_sign_sgd(0.1, nesterov=True)
    with pytest.raises(ValueError, match="block='tree'"):
        signax.ef_sign_sgd(0.1, block="tree", axis_name="data")
    with pytest.raises(ValueError, match=r"momentum=1\.5"):
        signax.ef_sign_sgd(0.1, 1.5)
