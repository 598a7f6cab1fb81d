"""Muon with error feedback against NumPy, under NaN, and what it sends."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from workers import AXIS, auto_mesh

import signax
from signax import diagnostics

STEPS = 5


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def along(tx, gradients, params):
    """The updates along gradients [T, ...]."""

    def step(state, gradient):
        updates, state = tx.update(gradient, state, params)
        return state, updates

    return jax.lax.scan(step, tx.init(params), gradients)[1]


@pytest.mark.parametrize(
    ("num_workers", "feedback", "decay"),
    [(3, "both", 0.5), (3, "worker", 0.5), (2, "none", 0.5), (1, "both", 1.0)],
)
def test_steps_are_the_polar_factors_of_mean_scaled_signs(num_workers, feedback, decay):
    shapes = {"b": (7,), "w": (4, 6)}
    rows = {
        name: normal((STEPS, num_workers, *shape), seed=num_workers)
        for name, shape in shapes.items()
    }
    tx = signax.ef_muon(
        0.5,
        0.8,
        consistent_rms=0.25,
        others_rms=0.125,
        others=signax.scale_by_signum(0.6),
        decay=decay,
        feedback=feedback,
        axis_name=AXIS,
        num_workers=num_workers,
    )
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    found = jax.vmap(lambda own: along(tx, own, params), in_axes=1, out_axes=1, axis_name=AXIS)(
        jax.tree.map(jnp.asarray, rows)
    )

    matrices, vectors = (np.moveaxis(rows[name].astype(float), 1, 0) for name in "wb")
    polar = np.stack([references.muon(own, 0.8) for own in matrices], axis=1)
    signs = np.stack([np.sign(references.momenta(own, 0.6)) for own in vectors], axis=1)
    options = {"decay": decay, "feedback": feedback}
    sent = references.mean_of_scaled_signs(list(zip(signs, polar, strict=True)), **options)
    for step, ((b, *_), (w, *_)) in enumerate(sent):
        expected = {"b": -0.5 * 0.125 * b, "w": -0.5 * 0.25 * references.polar(w.reshape(4, 6))}
        for name, update in expected.items():
            for worker in range(num_workers):
                np.testing.assert_allclose(found[name][step, worker], update, atol=1e-4)


def test_without_an_axis_one_worker_compresses_its_own_direction():
    gradients = normal((STEPS, 4, 6))
    tx = signax.ef_muon(0.5, 0.8, nesterov=False, consistent_rms=1.0, decay=0.7)
    found = along(tx, jnp.asarray(gradients), jnp.zeros((4, 6)))
    polar = references.muon(gradients.astype(float), 0.8, nesterov=False)
    sent, _ = references.error_feedback(polar, references.scaled_sign, decay=0.7)
    expected = [-0.5 * references.polar(update) for update in sent]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_worker_with_a_nan_keeps_momentum_and_memory():
    gradients = normal((3, 4, 6))
    gradients[1, 2, 3] = np.nan
    tx = signax.ef_muon(0.1, axis_name=AXIS, num_workers=3)

    def update(gradient):
        state = tx.init(jnp.zeros((4, 6)))
        _, state = tx.update(normal((4, 6), 1) * jnp.ones_like(gradient), state)
        kept = [optax.tree.get(state, name) for name in ("momentum", "worker")]
        updates, state = tx.update(gradient, state)
        changed = [optax.tree.get(state, name) for name in ("momentum", "worker")]
        return updates, kept, changed, signax.participation(state).missed

    updates, before, after, missed = jax.vmap(update, axis_name=AXIS)(jnp.asarray(gradients))
    assert np.isfinite(updates).all()
    for kept, changed in zip(before, after, strict=True):
        np.testing.assert_array_equal(kept[1], changed[1])
        assert (kept[0] != changed[0]).any()
    assert missed.tolist() == [0, 1, 0]


def test_one_bit_per_coordinate_travels_each_way_in_one_exchange():
    mesh = auto_mesh({"data": 8})
    params = {"embedding": jnp.zeros((64, 32)), "kernel": jnp.zeros((32, 96))}
    numbers = {"embedding": None, "kernel": optax.contrib.MuonDimensionNumbers()}
    sent = []
    for optimizer in (
        signax.ef_muon(0.1, weight_dimension_numbers=numbers, axis_name="data"),
        signax.ef_sign_sgd(0.1, axis_name="data"),
    ):
        tx = signax.DataParallel(optimizer, mesh)
        step = tx.train_step(lambda p, b: sum(jnp.sum(x) for x in jax.tree.leaves(p)) * b.sum())
        compiled = step.lower(params, tx.init(params), jnp.ones((8, 1))).compile()
        records = diagnostics.collectives(compiled)
        sent.append(sorted((record.operation, record.bytes_sent) for record in records))
    assert sent[0] == sent[1]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"beta": 1.0}, ValueError, "beta"),
        ({"consistent_rms": -0.1}, ValueError, "consistent_rms"),
        ({"others_rms": -0.1}, ValueError, "others_rms"),
        ({"ns_steps": 0}, ValueError, "ns_steps"),
        ({"decay": 1.5}, ValueError, "decay"),
        ({"others": "adam"}, TypeError, "others"),
        ({"mu_dtype": jnp.int32}, ValueError, "mu_dtype"),
        ({"feedback": "worker"}, ValueError, "axis_name"),
        ({"num_workers": 2}, ValueError, "axis_name"),
        ({"feedback": "server", "axis_name": AXIS}, ValueError, "feedback"),
    ],
)
def test_rejects_options(options, error, words):
    with pytest.raises(error, match=words):
        signax.ef_muon(0.1, **options)
