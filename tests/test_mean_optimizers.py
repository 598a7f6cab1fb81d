"""Optimisers by a mean of compressed updates: EF-signSGD and SSDM, against the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from jax import lax
from scaled_rows import PARAMS, assert_updates, follow, random_rows, reference
from workers import AXIS

import signax

# EF-signSGD of one worker.


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


START = normal(12, seed=1).astype(np.float32)
GRADIENTS = normal((60, 12), seed=2)
RATES = 0.05 / np.sqrt(np.arange(1, 61))


def shrinking(count):
    return 0.05 / jnp.sqrt(jnp.asarray(count + 1, float))


def path_of(tx, gradients):
    """The path of an optimiser from START along given gradients."""

    def step(carry, gradient):
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    params = jnp.asarray(START, gradients.dtype)
    return jax.jit(lambda rows: lax.scan(step, (params, tx.init(params)), rows)[1])(gradients)


@pytest.mark.parametrize("learning_rate", [0.5, 0.01])
def test_ef_sign_sgd_at_a_constant_rate_equals_the_papers_algorithm(learning_rate):
    # The paper's memory is in units of the learning rate, the library's in units of the gradient.
    with jax.enable_x64(True):
        found = path_of(signax.ef_sign_sgd(learning_rate), jnp.asarray(GRADIENTS))
    expected = references.ef_sign_sgd(START.astype(np.float64), GRADIENTS, learning_rate)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_ef_sign_sgd_with_a_schedule_decay_and_blocks_equals_its_reference():
    with jax.enable_x64(True):
        tx = signax.ef_sign_sgd(shrinking, block=5, decay=0.9, weight_decay=0.5)
        found = path_of(tx, jnp.asarray(GRADIENTS))
    emitted, _ = references.error_feedback(
        GRADIENTS, lambda p: references.scaled_sign(p, 5), decay=0.9
    )
    expected = references.descend(START.astype(np.float64), emitted, RATES, 0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_weight_decay_does_not_enter_the_memory():
    decayed, plain = signax.ef_sign_sgd(0.1, weight_decay=0.5), signax.ef_sign_sgd(0.1)
    gradient, params = jnp.asarray(GRADIENTS[0], jnp.float32), jnp.asarray(START)
    _, state = decayed.update(gradient, decayed.init(params), params)
    _, expected = plain.update(gradient, plain.init(params), params)
    np.testing.assert_array_equal(optax.tree.get(state, "error"), optax.tree.get(expected, "error"))


@pytest.mark.parametrize("option", [{"block": "layer"}, {"block": 0}, {"decay": 1.5}])
def test_ef_sign_sgd_rejects_invalid_options(option):
    [(name, value)] = option.items()
    with pytest.raises(ValueError, match=f"{name}={value!r} is"):
        signax.ef_sign_sgd(0.1, **option)


# EF-signSGD over workers.


def test_options_of_ef_sign_sgd_reach_the_collective():
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
def test_ef_sign_sgd_over_workers_compresses_each_workers_momentum(nesterov):
    steps, rate, decay = 15, 0.5, 0.9
    rows = random_rows(steps, 4, seed=2)
    trace, momenta = dict.fromkeys(rows, 0.0), {name: [] for name in rows}
    for name, t in ((name, t) for name in rows for t in range(steps)):
        trace[name] = rows[name][t] + decay * trace[name]
        momenta[name].append(rows[name][t] + decay * trace[name] if nesterov else trace[name])
    tx = signax.ef_sign_sgd(rate, decay, nesterov=nesterov, axis_name="data")
    history = follow(tx, rows, 4)
    assert_updates(history, reference({n: np.array(m) for n, m in momenta.items()}), -rate)


def test_a_nonfinite_worker_keeps_its_momentum_and_memory():
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


def test_ef_sign_sgd_rejects_options_without_effect():
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


# SSDM: Safaryan and Richtarik 2021 (arXiv 1905.12938).


def ssdm_rows(tx, params, gradients):
    """Parameters after each step, from gradients [T, M, d], under vmap."""
    num_workers = gradients.shape[1]

    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(jax.vmap(step, axis_name=AXIS))
    rows = jnp.broadcast_to(params, (num_workers, *params.shape))
    state = jax.vmap(tx.init)(rows)
    steps = []
    for gradient in gradients:
        rows, state = step(rows, state, jnp.asarray(gradient, jnp.float32))
        np.testing.assert_array_equal(rows, np.broadcast_to(rows[:1], rows.shape))
        steps.append(np.asarray(rows[0]))
    return np.array(steps)


def test_ssdm_with_certain_signs_equals_its_reference():
    # If all coordinates share a magnitude, the norm "linf" makes their signs certain.
    b1, rate, decay, steps = 0.75, 0.125, 0.5, 6
    rng = np.random.default_rng(0)
    signs = rng.choice([-1.0, 1.0], size=(1, 3, 8))
    gradients = signs * 2.0 ** rng.integers(-2, 3, size=(steps, 3, 1))
    start = rng.standard_normal(8)
    tx = signax.ssdm(rate, jax.random.key(1), b1, norm="linf", weight_decay=decay, axis_name=AXIS)
    found = ssdm_rows(tx, jnp.asarray(start, jnp.float32), gradients)
    momenta = np.stack([references.momenta(gradients[:, i], b1) for i in range(3)], axis=1)
    directions = [references.mean_of_signs(m, t) for t, m in enumerate(momenta)]
    expected = references.descend(start, directions, [rate] * steps, decay)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_step_of_ssdm_is_unbiased():
    b1, d, num_workers = 0.5, 4, 8
    gradients = np.random.default_rng(3).standard_normal((1, num_workers, d))
    momenta = (1 - b1) * gradients[0]
    expected = (momenta / np.linalg.norm(momenta, axis=1, keepdims=True)).mean(axis=0)
    draws = 4000

    def step(key, gradient):
        tx = signax.ssdm(1.0, key, b1, axis_name=AXIS)
        return tx.update(gradient, tx.init(gradient))[0]

    steps = jax.vmap(jax.vmap(step, in_axes=(None, 0), axis_name=AXIS), in_axes=(0, None))
    keys = jax.random.split(jax.random.key(5), draws)
    found = -np.asarray(steps(keys, jnp.asarray(gradients[0], jnp.float32)))[:, 0]
    # The mean of M signs has a variance of at most 1/M; the bound is five standard errors.
    np.testing.assert_allclose(found.mean(axis=0), expected, atol=5 / np.sqrt(num_workers * draws))


def test_ssdm_of_one_worker_follows_a_stochastic_sign_of_its_momentum():
    tx = signax.ssdm(0.5, jax.random.key(0), 0.0, norm="linf")
    params = jnp.array([1.0, -2.0, 0.0])
    updates, _ = tx.update(jnp.array([3.0, -3.0, 3.0]), tx.init(params))
    np.testing.assert_array_equal(updates, [-0.5, 0.5, -0.5])
    with pytest.raises(ValueError, match="transport='packed'"):
        signax.ssdm(0.5, jax.random.key(0), transport="packed")


def test_a_nonfinite_worker_keeps_its_momentum_in_ssdm():
    tx = signax.ssdm(1.0, jax.random.key(0), 0.5, norm="linf", axis_name=AXIS)
    bad = np.array([[[1.0, -1.0], [1.0, 1.0]], [[np.nan, 1.0], [1.0, 1.0]]])
    found = ssdm_rows(tx, jnp.zeros(2), bad)
    np.testing.assert_array_equal(found[0], -np.array([1.0, 0.0]))
    np.testing.assert_array_equal(
        found[1] - found[0], -np.array([1.0, 1.0])
    )  # only the other worker's


@pytest.mark.parametrize(
    ("option", "kind"),
    [
        ({"beta": 1}, ValueError),
        ({"weight_decay": -0.1}, ValueError),
        ({"norm": "l1"}, ValueError),
        ({"learning_rate": "0.1"}, TypeError),
        ({"key": 3}, TypeError),
    ],
)
def test_ssdm_rejects_invalid_options(option, kind):
    [(name, value)] = option.items()
    options = {"learning_rate": 0.1, "key": jax.random.key(0), **option}
    with pytest.raises(kind, match=f"{name}={value!r} is"):
        signax.ssdm(**options)
