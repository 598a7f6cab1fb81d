"""`hold_if_nonfinite`: NaN and infinity stay out of a transformation's state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import signax

BAD = [jnp.nan, jnp.inf, -jnp.inf]


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def run(tx, gradients):
    """The updates and states of a transformation on gradients [T, d]."""

    def step(state, gradient):
        updates, state = tx.update(gradient, state)
        return state, (updates, state)

    params = jnp.zeros_like(gradients[0])
    return jax.jit(lambda rows: lax.scan(step, tx.init(params), rows)[1])(gradients)


GUARDED = {
    "signum": signax.scale_by_signum(0.5),
    "error feedback": signax.error_feedback(signax.scale_by_top_k(0.4)),
    "lion": optax.scale_by_lion(),
    "adam": optax.scale_by_adam(),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", GUARDED)
def test_one_nonfinite_coordinate_makes_every_update_nan_and_holds_the_state(name, bad):
    tx = signax.hold_if_nonfinite(GUARDED[name])
    params = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2), jnp.bfloat16)}
    good = jax.tree.map(lambda p: jnp.asarray(normal(p.shape), p.dtype), params)
    _, state = tx.update(good, tx.init(params))
    updates, held = tx.update({**good, "a": good["a"].at[1].set(bad)}, state)
    for leaf, param in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        assert leaf.dtype == param.dtype
        assert jnp.isnan(leaf).all()
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(held), strict=True):
        if jnp.issubdtype(before.dtype, jnp.floating):
            np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("name", ["signum", "error feedback", "lion"])
def test_the_next_step_ignores_the_nonfinite_step(name):
    tx = signax.hold_if_nonfinite(GUARDED[name])
    gradients = jnp.asarray(normal((6, 8)), jnp.float32)
    with_bad = jnp.insert(gradients, 3, jnp.nan, axis=0)
    expected, _ = run(tx, gradients)
    found, _ = run(tx, with_bad)
    assert np.isnan(found[3]).all()
    np.testing.assert_array_equal(np.delete(found, 3, axis=0), expected)


@pytest.mark.parametrize("name", GUARDED)
def test_finite_values_are_not_changed(name):
    gradients = jnp.asarray(normal((6, 8)), jnp.float32)
    for found, expected in zip(
        jax.tree.leaves(run(signax.hold_if_nonfinite(GUARDED[name]), gradients)),
        jax.tree.leaves(run(GUARDED[name], gradients)),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_counts_and_keys_advance_over_a_nonfinite_step():
    tx = signax.hold_if_nonfinite(
        optax.chain(signax.scale_by_signum(), signax.scale_by_stochastic_sign(jax.random.key(0)))
    )
    init = tx.init(jnp.zeros(2))
    _, (signum, stochastic) = tx.update(jnp.full(2, jnp.nan), init)
    _, (expected_signum, expected_stochastic) = tx.update(jnp.ones(2), init)
    assert signum.count == expected_signum.count == 1
    assert jnp.array_equal(
        jax.random.key_data(stochastic.key), jax.random.key_data(expected_stochastic.key)
    )


def test_holds_the_state_if_the_output_overflows():
    # 1000 and the trace are finite in f16, and the product is not.
    tx = signax.hold_if_nonfinite(optax.chain(optax.trace(0.5), optax.scale(100.0)))
    updates, state = tx.update(jnp.full(2, 1000.0, jnp.float16), tx.init(jnp.zeros(2, jnp.float16)))
    assert updates.dtype == jnp.float16
    assert jnp.isnan(updates).all()
    assert jnp.array_equal(state[0].trace, jnp.zeros(2, jnp.float16))


def test_holds_the_state_if_the_new_state_overflows():
    # 60,000 + 0.9 * 60,000 overflows f16, but its sign is finite.
    tx = signax.hold_if_nonfinite(optax.chain(optax.trace(0.9), signax.scale_by_sign()))
    gradient = jnp.full(2, 60_000.0, jnp.float16)
    first, state = tx.update(gradient, tx.init(gradient))
    second, held = tx.update(gradient, state)
    assert first.tolist() == [1.0, 1.0]
    assert jnp.isnan(second).all()
    assert jnp.array_equal(held[0].trace, gradient)
