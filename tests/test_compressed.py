"""`mean_scaled_signs`: the transformation, its memories under a schedule, and its arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scaled_rows import PARAMS, assert_updates, follow, random_rows, reference
from workers import AXIS, auto_mesh

import signax
from signax._wire import exchange, messages, parts, pieces, scaled_signs, words


@pytest.mark.parametrize("feedback", ["both", "worker", "none"])
def test_the_transformation_keeps_its_memories_under_data_parallel(feedback):
    rows = random_rows(20, 4)
    active = np.random.default_rng(1).random((20, 4)) > 0.2
    tx = signax.mean_scaled_signs("data", feedback=feedback)
    history = follow(tx, rows, 4, active=jnp.asarray(active))
    assert_updates(history, reference(rows, feedback=feedback, active=active))
    assert optax.tree.get(history[-1][1], "count") == 20


def test_options_of_the_transformation_reach_the_collective():
    rows = random_rows(10, 3)
    history = follow(signax.mean_scaled_signs("data", block=4, decay=0.5), rows, 3)
    assert_updates(history, reference(rows, block=4, decay=0.5))


def warm_up_then_drop(count):
    """A rate that rises from 0, is constant, and drops to a tenth."""
    return jnp.where(count < 4, 0.125 * count, jnp.where(count < 15, 0.5, 0.05))


def test_both_memories_are_rescaled_after_a_learning_rate():
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
    # A step of rate 0 passes no gradient on, so the memory begins at the second step. The number
    # of a step only dithers zeros, and later steps have none.
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
    """For each leaf |e|^2 <= 4 (1 - delta) sigma^2 / delta^2, where sigma^2 bounds |g|^2."""
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


def seal_rows(planes, header):
    """`seal` on TPUs and GPUs."""
    return words._seal_rows(jnp.concatenate(planes, axis=1), header)


def test_memories_do_not_depend_on_the_platform(monkeypatch):
    """A checkpoint from CPUs continues on other platforms.

    These differ in how arrays are cut and messages are sealed only. `test_packing.py` and
    `test_words.py` compare both ways with NumPy.
    """
    for module in (messages, parts, scaled_signs):
        monkeypatch.setattr(module, "cut", pieces.cut_apart)
    monkeypatch.setattr(exchange, "in_rows", lambda array: array)
    monkeypatch.setattr(exchange, "seal", seal_rows)
    tx = signax.DataParallel(signax.mean_scaled_signs("data"), auto_mesh({"data": 4}))
    rows = jax.tree.map(lambda leaf: leaf[0], random_rows(1, 4))
    state = tx.init(PARAMS)
    assert "platform_index" not in str(jax.make_jaxpr(tx.update)(rows, state, PARAMS))
    voted = signax.DataParallel(signax.majority_vote("data"), auto_mesh({"data": 4}))
    program = jax.make_jaxpr(voted.update)(rows, voted.init(PARAMS), PARAMS)
    assert "platform_index" in str(program)  # votes are packed in another order on each platform


def test_init_outside_of_the_axis_needs_num_workers():
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
def test_rejects_invalid_options_at_construction(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name}="):
        signax.mean_scaled_signs(AXIS, **option)
