"""Momentum and error feedback, step by step against their references."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
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


# --- signum ----------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [False, True], ids=["plain", "nesterov"])
@pytest.mark.parametrize("warmup", [False, True], ids=["cold", "warmup"])
def test_signum_equals_its_reference(warmup, nesterov):
    # 54 steps of warm-up, and 54 steps after it.
    gradients = normal((108, 30)).astype(np.float32)
    signs, _ = run(signax.scale_by_signum(0.9, warmup=warmup, nesterov=nesterov), gradients)
    expected = references.signum(gradients.astype(np.float64), 0.9, 54 * warmup, nesterov)
    np.testing.assert_array_equal(signs, expected)
    # The options matter on these gradients.
    plain = references.signum(gradients.astype(np.float64), 0.9)
    assert np.array_equal(expected, plain) == (not warmup and not nesterov)


def test_the_reference_warmup_gives_the_papers_figure():
    assert references.warmup_steps(0.9) == 54


@pytest.mark.parametrize("b1", [0.0, 0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.95, 0.99, 0.999])
def test_warmup_ends_at_the_papers_step(b1):
    steps = references.warmup_steps(b1)
    tx = signax.scale_by_signum(b1, warmup=True)
    # The momentum opposes the gradient, so the sign shows which of the two an update follows.
    state = tx.init(jnp.zeros(1))._replace(momentum=-jnp.full(1, 1e30))

    def follows_gradient(count):
        signs, _ = tx.update(jnp.ones(1), state._replace(count=jnp.int32(count)))
        return signs[0] == 1

    if steps > 0:
        assert follows_gradient(steps - 1)
    assert follows_gradient(steps) == (b1 == 0)  # without momentum nothing has to fill


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_signum_equals_its_reference_in_every_dtype_with_a_wide_momentum(dtype):
    with jax.enable_x64(dtype == "float64"):
        gradients = jnp.asarray(normal((20, 30)), dtype)
        wide = "float64" if dtype == "float64" else "float32"
        signs, states = run(signax.scale_by_signum(0.9, accumulator_dtype=wide), gradients)
        assert (signs.dtype, states.momentum.dtype) == (dtype, wide)
        expected = references.signum(np.asarray(gradients, np.float64), 0.9)
        np.testing.assert_array_equal(np.asarray(signs, np.float64), expected)


def test_momentum_in_f32_keeps_decays_that_bf16_rounds_away():
    # 1 decays by b1 = 511/512 per step: bf16 rounds the product back up to 1.
    gradients = jnp.zeros((50, 1), jnp.bfloat16).at[0].set(512.0)
    kept = {
        dtype: run(signax.scale_by_signum(511 / 512, accumulator_dtype=dtype), gradients)[1]
        for dtype in ("bfloat16", "float32")
    }
    assert kept["bfloat16"].momentum[-1] == 1
    np.testing.assert_allclose(kept["float32"].momentum[-1], (511 / 512) ** 49, rtol=1e-5)


def test_signs_after_a_warmup_follow_a_momentum_below_the_range_of_f16():
    tx = signax.scale_by_signum(0.9, warmup=True, accumulator_dtype=jnp.float32)
    gradient = jnp.zeros(2, jnp.float16)
    momentum = jnp.array([1e-9, -1e-9])
    state = tx.init(gradient)._replace(count=jnp.int32(100), momentum=momentum)
    signs, _ = tx.update(gradient, state)  # outside jit, where XLA may leave the cast out
    assert signs.dtype == jnp.float16
    assert signs.tolist() == [1, -1]


def test_signum_counts_its_steps():
    _, states = run(signax.scale_by_signum(), jnp.ones((4, 2)))
    assert states.count.tolist() == [1, 2, 3, 4]


# --- error feedback --------------------------------------------------------------------------

COMPRESSORS = {
    "scaled sign": (signax.scale_by_scaled_sign(), references.scaled_sign),
    "blocks": (
        signax.scale_by_scaled_sign(block=4),
        partial(references.scaled_sign, block=4),
    ),
    "top-k": (signax.scale_by_top_k(0.3), lambda p: references.top_k(p, math.ceil(0.3 * p.size))),
    "a chain": (
        optax.chain(signax.scale_by_top_k(0.5), signax.scale_by_scaled_sign()),
        lambda p: references.scaled_sign(references.top_k(p, math.ceil(0.5 * p.size))),
    ),
}


@pytest.mark.parametrize("decay", [1.0, 0.8, 0.0])
@pytest.mark.parametrize("name", COMPRESSORS)
def test_error_feedback_equals_its_reference(name, decay):
    compressor, reference = COMPRESSORS[name]
    gradients = normal((50, 11))
    with jax.enable_x64(True):
        tx = signax.error_feedback(compressor, decay=decay)
        emitted, states = run(tx, jnp.asarray(gradients))
        assert emitted.dtype == states.error.dtype == jnp.float64
    expected, memory = references.error_feedback(gradients, reference, decay)
    np.testing.assert_allclose(emitted, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(states.error, memory, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_emitted_updates_and_the_memory_add_up_to_the_gradients(name):
    gradients = jnp.asarray(normal((60, 20)), jnp.float32)
    emitted, states = run(signax.error_feedback(COMPRESSORS[name][0]), gradients)
    found = np.cumsum(np.asarray(emitted, np.float64), 0) + np.asarray(states.error, np.float64)
    total = np.cumsum(np.asarray(gradients, np.float64), 0)
    # Each step rounds p = g + e and e = p - u once: half an ulp of numbers below 64.
    assert np.abs(found - total).max() < 2 * 60 * 64 * 2**-24


def test_random_k_under_error_feedback_loses_nothing():
    gradients = jnp.asarray(normal((60, 20)), jnp.float32)
    tx = signax.error_feedback(signax.scale_by_random_k(0.2, jax.random.key(0)))
    emitted, states = run(tx, gradients)
    assert (np.count_nonzero(emitted, axis=1) == 4).all()
    found = np.asarray(emitted, np.float64).sum(0) + np.asarray(states.error[-1], np.float64)
    total = np.asarray(gradients, np.float64).sum(0)
    np.testing.assert_allclose(found, total, rtol=0, atol=2 * 60 * 64 * 2**-24)


def largest_loss(gradients, accumulator_dtype):
    """The largest gap between the sum of gradients and the sum of updates and memory, in f64."""
    tx = signax.error_feedback(signax.scale_by_top_k(0.05), accumulator_dtype=accumulator_dtype)
    emitted, states = run(tx, gradients)
    assert emitted.dtype == jnp.bfloat16
    kept = np.cumsum(np.asarray(emitted, np.float64), 0) + np.asarray(states.error, np.float64)
    return np.abs(kept - np.cumsum(np.asarray(gradients, np.float64), 0)).max()


def test_bf16_gradients_with_an_f32_memory_lose_nothing():
    # Each coordinate waits for about twenty steps, so the memory grows to several units.
    gradients = jnp.asarray(0.3 + 0.1 * normal((500, 20)), jnp.bfloat16)
    # The roundings of p and e in f32, half an ulp of numbers below 64 each.
    assert largest_loss(gradients, jnp.float32) < 2 * 500 * 64 * 2**-24
    assert largest_loss(gradients, jnp.bfloat16) > 0.1  # a memory in bf16 loses more


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_memory_includes_the_rounding_error_of_the_update(dtype):
    tx = signax.error_feedback(signax.scale_by_scaled_sign(), accumulator_dtype="float32")
    gradient = jnp.asarray(normal(7), dtype)
    emitted, state = tx.update(gradient, tx.init(gradient))
    unrounded = references.scaled_sign(np.asarray(gradient, np.float64))
    assert (np.asarray(emitted, np.float64) != unrounded).all()
    expected = np.asarray(gradient, np.float64) - np.asarray(emitted, np.float64)
    np.testing.assert_array_equal(np.asarray(state.error, np.float64), expected.astype(np.float32))


def test_the_memory_compensates_for_rounding_alone():
    # In bf16 1 + 2**-10 is 1: only the cast to the leaf's dtype loses something.
    tx = signax.error_feedback(optax.scale(1 + 2**-10), accumulator_dtype="float32")
    emitted, states = run(tx, jnp.ones((1, 1), jnp.bfloat16))
    assert (float(emitted[0, 0]), float(states.error[0, 0])) == (1.0, 0.0)


def test_a_later_schedule_does_not_change_the_memory():
    gradients = jnp.asarray(normal((50, 10)), jnp.float32)
    plain = signax.error_feedback(signax.scale_by_scaled_sign())
    schedule = optax.exponential_decay(0.5, 5, 0.5)
    emitted, states = run(plain, gradients)
    stepped, (scheduled, _) = run(
        optax.chain(plain, optax.scale_by_learning_rate(schedule)), gradients
    )
    np.testing.assert_array_equal(states.error, scheduled.error)
    rates = np.array([schedule(t) for t in range(50)])
    np.testing.assert_allclose(stepped, -rates[:, None] * emitted, rtol=1e-6)


def warm_up_then_drop(count):
    """A rate that rises from 0, is constant, and drops to a tenth."""
    return jnp.where(count < 4, 0.125 * count, jnp.where(count < 25, 0.5, 0.05))


def test_a_memory_after_a_learning_rate_is_rescaled():
    """Where the rate is not 0, both orders of rate and error feedback are one algorithm."""
    compressor = signax.scale_by_scaled_sign()
    rate = optax.scale_by_schedule(warm_up_then_drop)
    after_rate = signax.error_feedback(compressor, learning_rate=warm_up_then_drop)
    with jax.enable_x64(True):
        gradients = jnp.asarray(normal((50, 10)))
        found, (_, states) = run(optax.chain(rate, after_rate), gradients)
        # A step of rate 0 passes no gradient on, so the memory begins at the second step.
        emitted, expected = run(signax.error_feedback(compressor), gradients[1:])
        rates = np.array([warm_up_then_drop(t) for t in range(50)])
    np.testing.assert_array_equal(found[0], 0)
    np.testing.assert_array_equal(states.error[0], 0)
    np.testing.assert_allclose(found[1:], rates[1:, None] * np.asarray(emitted), rtol=1e-9)
    np.testing.assert_allclose(states.error[1:], expected.error, rtol=1e-9, atol=1e-12)


def test_without_rescaling_the_memory_outweighs_the_gradient_after_a_drop():
    # The paper's order of rate and error feedback needs the option under a schedule.
    compressor, gradients = signax.scale_by_scaled_sign(), jnp.asarray(normal((30, 10)))
    rate = optax.scale_by_schedule(warm_up_then_drop)
    steps, _ = run(optax.chain(rate, signax.error_feedback(compressor)), gradients)
    after_rate = signax.error_feedback(compressor, learning_rate=warm_up_then_drop)
    rescaled, _ = run(optax.chain(rate, after_rate), gradients)
    assert np.abs(steps[25]).mean() > 5 * np.abs(rescaled[25]).mean()


def test_a_step_of_rate_zero_keeps_the_memory():
    tx = signax.error_feedback(
        signax.scale_by_scaled_sign(), learning_rate=lambda count: jnp.where(count == 2, 0.0, 0.5)
    )
    rates = jnp.array([[0.5], [0.5], [0.0], [0.5]])
    emitted, states = run(tx, rates * jnp.asarray(normal((4, 6)), jnp.float32))
    np.testing.assert_array_equal(emitted[2], 0)
    np.testing.assert_array_equal(states.error[2], states.error[1])
    assert np.any(states.error[1] != 0)


def test_a_constant_rate_changes_only_the_unit_of_the_memory():
    gradients = jnp.asarray(normal((20, 10)), jnp.float32)
    compressor = signax.scale_by_scaled_sign()
    emitted, states = run(signax.error_feedback(compressor), gradients)
    rescaled, (error, *_) = run(signax.error_feedback(compressor, learning_rate=0.25), gradients)
    np.testing.assert_allclose(rescaled, emitted, rtol=1e-5)
    np.testing.assert_allclose(error, 4 * states.error, rtol=1e-4, atol=1e-5)


def squares(rows):
    return np.sum(np.asarray(rows, np.float64) ** 2, axis=1)


def error_bound(delta, gradients):
    """4 (1 - delta) sigma^2 / delta^2, for a memory in units of the gradient."""
    return 4 * (1 - delta) * squares(gradients).max() / delta**2


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_the_memory_of_top_k_stays_within_the_papers_bound(fraction):
    gradients = jnp.asarray(1 + normal((300, 20)), jnp.float32)
    _, states = run(signax.error_feedback(signax.scale_by_top_k(fraction)), gradients)
    assert squares(states.error).max() <= error_bound(fraction, gradients)


def test_the_memory_of_scaled_sign_stays_within_the_papers_bound():
    gradients = jnp.asarray(1 + normal((300, 20)), jnp.float32)
    _, states = run(signax.error_feedback(signax.scale_by_scaled_sign()), gradients)
    corrected = gradients.at[1:].add(states.error[:-1])
    densities = jax.vmap(signax.diagnostics.density)(corrected)
    assert squares(states.error).max() <= error_bound(float(densities.min()), gradients)


def test_a_learning_rate_inside_error_feedback_breaks_the_bound():
    # This is why the docstring forbids it: most of each update counts as an error.
    gradients = jnp.asarray(1 + normal((300, 20)), jnp.float32)
    inside = optax.chain(signax.scale_by_top_k(0.9), optax.scale(0.01))
    _, states = run(signax.error_feedback(inside), gradients)
    assert squares(states.error).max() > 100 * error_bound(0.9, gradients)


@pytest.mark.parametrize("wrap", [signax.error_feedback, signax.hold_if_nonfinite])
def test_extra_arguments_reach_the_inner_transformation(wrap):
    def init_fn(params):
        del params
        return optax.EmptyState()

    def update_fn(updates, state, params=None, *, share, **extra_args):
        del params, extra_args
        return jax.tree.map(lambda p: share * p, updates), state

    half = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    tx = wrap(half)
    assert tx.update(jnp.ones(1), tx.init(jnp.ones(1)), share=0.5)[0].tolist() == [0.5]


# --- the counterexamples of arXiv 1901.09847 -------------------------------------------------

METHODS = {
    "sign": signax.scale_by_sign(),
    "scaled sign": signax.scale_by_scaled_sign(),
    "error feedback": signax.error_feedback(signax.scale_by_scaled_sign()),
}


def minimise(name, gradient, start, rate, steps, project=lambda x: x):
    """The points x_1, x_2, ... from `start` along `gradient(x, t)` with steps `rate(t)`."""
    tx = METHODS[name]

    def step(carry, t):
        x, state = carry
        updates, state = tx.update(gradient(x, t), state)
        x = project(x - rate(t) * updates)
        return (x, state), x

    start = jnp.asarray(start)
    scan = jax.jit(lambda: lax.scan(step, (start, tx.init(start)), jnp.arange(1, steps + 1)))
    return np.asarray(scan()[1], np.float64)


def shrinking(t):
    return 0.05 / jnp.sqrt(t)


@pytest.mark.parametrize(("name", "end"), [("sign", 1.0), ("error feedback", -1.0)])
def test_error_feedback_solves_the_first_counterexample(name, end):
    # x / 4 on [-1, 1]: the gradient is 4 with probability 1/4, else -1. Its mean sign is wrong.
    def gradient(x, t):
        rare = jax.random.bernoulli(jax.random.fold_in(jax.random.key(0), t), 0.25)
        return jnp.where(rare, 4.0, -1.0) * jnp.ones_like(x)

    path = minimise(name, gradient, [0.0], shrinking, 4_000, lambda x: jnp.clip(x, -1, 1))
    assert abs(path[-1, 0] - end) < 0.1


def kinked(x):
    return 0.5 * jnp.abs(x[0] + x[1]) + jnp.abs(x[0] - x[1])


@pytest.mark.parametrize(
    "rate", [shrinking, lambda t: 0.01, lambda t: jnp.abs(jnp.sin(t))], ids=["sqrt", "const", "any"]
)
@pytest.mark.parametrize("name", ["sign", "scaled sign"])
def test_signs_never_leave_a_line_in_the_second_counterexample(name, rate):
    path = minimise(name, lambda x, t: jax.grad(kinked)(x), [1.0, 1.0], rate, 1_000)
    assert len(np.unique(path, axis=0)) > 1
    np.testing.assert_allclose(path.sum(axis=1), 2, atol=1e-4)


def test_error_feedback_leaves_the_line_in_the_second_counterexample():
    path = minimise(
        "error feedback", lambda x, t: jax.grad(kinked)(x), [1.0, 1.0], shrinking, 4_000
    )
    assert kinked(path[-1]) < 0.05 < kinked(np.ones(2))


TERMS = np.array([[1.5, -0.5], [-0.5, 1.5]])  # +-(1, -1) + .5 (1, 1)


def least_squares(x):
    return float(np.sum((TERMS @ x) ** 2))


@pytest.mark.parametrize("name", METHODS)
def test_only_error_feedback_solves_the_third_counterexample(name):
    def gradient(x, t):
        term = jnp.asarray(TERMS, jnp.float32)[t % 2]
        return 2 * jnp.dot(term, x) * term

    path = minimise(name, gradient, [1.0, 1.0], shrinking, 4_000)
    if name == "error feedback":
        assert least_squares(path[-1]) < 1e-4
    else:
        assert min(map(least_squares, path)) > 1


# --- hold if nonfinite -----------------------------------------------------------------------


# --- arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize("b1", [1, 1.0, -0.1, 2.0, math.nan])
def test_rejects_a_beta_outside_the_interval(b1):
    with pytest.raises(ValueError, match=rf"beta={b1!r} is outside \[0, 1\)"):
        signax.scale_by_signum(b1)


@pytest.mark.parametrize("decay", [-0.1, 1.1, math.nan])
def test_rejects_a_decay_outside_the_interval(decay):
    with pytest.raises(ValueError, match=rf"decay={decay!r} is outside \[0, 1\]"):
        signax.error_feedback(signax.scale_by_scaled_sign(), decay=decay)


def test_rejects_a_warmup_with_a_traced_beta():
    tx = optax.inject_hyperparams(signax.scale_by_signum)(beta=0.9, warmup=True)
    with pytest.raises(TypeError, match=r"warmup=True needs a beta [\s\S]*static_args"):
        jax.jit(tx.update)(jnp.ones(2), tx.init(jnp.zeros(2)), jnp.zeros(2))
    tx = optax.inject_hyperparams(signax.scale_by_signum, static_args="beta")(beta=0.9, warmup=True)
    assert tx.update(jnp.ones(2), tx.init(jnp.zeros(2)))[0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("wrap", [signax.error_feedback, signax.hold_if_nonfinite])
@pytest.mark.parametrize("inner", [0.5, None, signax.scale_by_scaled_sign])
def test_rejects_an_invalid_transformation(wrap, inner):
    with pytest.raises(TypeError, match=r"(compressor|inner)="):
        wrap(inner)


@pytest.mark.parametrize(
    ("tx", "field"),
    [
        (signax.scale_by_signum(), "momentum"),
        (signax.error_feedback(signax.scale_by_scaled_sign()), "error"),
    ],
    ids=["signum", "error_feedback"],
)
def test_rejects_a_state_of_another_tree(tx, field):
    state = tx.init({"a": jnp.zeros(2)})
    with pytest.raises(ValueError, match=rf"updates and state.{field} differ in structure"):
        tx.update({"b": jnp.zeros(2)}, state)


@pytest.mark.parametrize(
    "tx",
    [signax.scale_by_signum(), signax.error_feedback(signax.scale_by_scaled_sign())],
    ids=["signum", "error_feedback"],
)
def test_rejects_a_state_of_other_shapes(tx):
    # Broadcasting would change the state's shape silently.
    state = tx.init({"kernel": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"\['kernel'\].*\(2, 3\).*\(3,\)"):
        tx.update({"kernel": jnp.ones((2, 3))}, state)


# --- the end of the range --------------------------------------------------------------------


@pytest.mark.parametrize("accumulator_dtype", [None, jnp.float32])
def test_the_memory_of_a_sparse_f16_gradient_stays_finite(accumulator_dtype):
    """A scaled sign sends a 64th of the one nonzero coordinate, so the memory grows fast."""
    tx = signax.error_feedback(signax.scale_by_scaled_sign(), accumulator_dtype=accumulator_dtype)
    gradient = jnp.zeros(64, jnp.float16).at[5].set(3e4)
    state, update = tx.init(gradient), jax.jit(tx.update)
    before, updates = state.error, gradient
    for _ in range(100):
        before = state.error
        updates, state = update(gradient, state)
        assert np.isfinite(updates).all()
        assert np.isfinite(state.error).all()
    assert updates[5] > 0
    if accumulator_dtype is None:
        assert state.error[5] > 0.9 * jnp.finfo(jnp.float16).max
    else:  # nothing is lost, although the memory exceeds the range of updates
        assert before[5] > jnp.finfo(jnp.float16).max
        sent = state.error + updates.astype(jnp.float32)
        np.testing.assert_allclose(sent, before + gradient.astype(jnp.float32), rtol=1e-6)


def test_an_update_beyond_a_narrow_dtype_is_clipped_and_the_rest_remembered():
    tx = signax.error_feedback(signax.scale_by_top_k(0.5), accumulator_dtype=jnp.float32)
    gradient = jnp.array([5e4, 1.0], jnp.float16)
    state = tx.init(gradient)._replace(error=jnp.array([4e4, 0.0]))
    updates, state = tx.update(gradient, state)
    most = float(jnp.finfo(jnp.float16).max)
    np.testing.assert_array_equal(updates, [most, 0])
    np.testing.assert_array_equal(state.error, [9e4 - most + (float(gradient[0]) - 5e4), 1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_nonfinite_gradients_stay_nonfinite(bad, dtype):
    tx = signax.error_feedback(signax.scale_by_scaled_sign())
    gradient = jnp.array([1.0, bad], dtype)
    updates, state = tx.update(gradient, tx.init(gradient))
    assert not np.isfinite(updates).all()
    assert not np.isfinite(state.error).all()
