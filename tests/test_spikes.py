"""`skip_on_spike`: a worker with an unusually large gradient is left out of a step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from least_squares import make_mesh
from workers import large_floating

import signax
from signax._transforms.spikes import tree_norm

OPTIONS = {"factor": 3.0, "decay": 0.75, "warmup": 3, "max_in_a_row": 2}


def reference(norms, *, factor, decay, warmup, max_in_a_row):
    """Which steps are accepted, and the running mean after each, in f64."""
    learned, in_a_row, accepted, means = [], 0, [], []
    for norm in norms:

        def mean(seen=tuple(learned)):
            weights = decay ** np.arange(len(seen))[::-1]
            return np.sum(weights * seen) / np.sum(weights) if seen else 0.0

        finite, restart = np.isfinite(norm), False
        spike = finite and len(learned) >= warmup and mean() > 0 and norm > factor * mean()
        if spike and in_a_row >= max_in_a_row:
            spike, restart = False, True
        if finite and not spike:
            learned, in_a_row = ([] if restart else learned) + [norm], 0
        elif spike:
            in_a_row += 1
        accepted.append(bool(finite and not spike))
        means.append(mean(tuple(learned)))
    return np.array(accepted), np.array(means)


def run(tx, gradients):
    """Updates and states after each of some gradients [T, d]."""

    def step(state, gradient):
        updates, state = tx.update(gradient, state)
        return state, (updates, state)

    params = jnp.zeros_like(gradients[0])
    return jax.jit(lambda rows: lax.scan(step, tx.init(params), rows)[1])(gradients)


def directed(norms, dtype=jnp.float32):
    """Gradients [T, 5] of given norms."""
    directions = np.random.default_rng(0).normal(size=(len(norms), 5))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return jnp.asarray(directions * np.asarray(norms)[:, None], dtype)


NORMS = {
    "one spike": [1, 1.5, 0.5, 1, 50, 1, 1.2, 0.8],
    "spikes in warm-up": [1, 60, 1, 30, 500, 1, 1],
    "a lasting change": [1, 1, 1, 1, 100, 110, 90, 100, 95, 105, 1000, 100],
    "spikes one by one": [1, 1, 1, 9, 1, 9, 1, 9, 9, 1, 9, 9, 1],
    "a NaN is no spike": [1, 1, 1, 9, np.nan, 9, 9, 1, np.inf, 1],
    "zeros first": [0, 0, 0, 0, 5, 5, 90, 5],
    "a NaN first": [np.nan, 1, 1, 1, 20, 1],
    "at the bound": [1, 1, 1, 2.999, 1, 1, 1],
}


@pytest.mark.parametrize("name", NORMS)
def test_accepts_and_learns_like_the_reference(name):
    norms = NORMS[name]
    gradients = directed(norms)
    updates, state = run(signax.skip_on_spike(optax.identity(), **OPTIONS), gradients)
    accepted, means = reference(norms, **OPTIONS)
    np.testing.assert_array_equal(np.isfinite(updates).all(axis=1), accepted)
    np.testing.assert_array_equal(updates[accepted], gradients[accepted])
    assert np.isnan(updates[~accepted]).all()
    np.testing.assert_allclose(state.mean, means, rtol=1e-5)
    assert state.skipped[-1] == np.sum(~accepted & np.isfinite(norms))


def test_random_norms_are_judged_like_the_reference():
    norms = np.exp(np.random.default_rng(1).normal(size=400) * 1.5)
    updates, state = run(signax.skip_on_spike(optax.identity(), **OPTIONS), directed(norms))
    accepted, means = reference(norms, **OPTIONS)
    assert 20 < np.sum(~accepted) < 200
    np.testing.assert_array_equal(np.isfinite(updates).all(axis=1), accepted)
    np.testing.assert_allclose(state.mean, means, rtol=1e-4)


def test_a_skipped_step_is_forgotten():
    """The steps after it go on as if there had been no spike; counts advance."""
    tx = signax.skip_on_spike(optax.trace(0.9), **OPTIONS)
    gradients = directed([1.0] * 8)
    with_spike = jnp.insert(gradients, 5, directed([100.0])[0], axis=0)
    expected, _ = run(tx, gradients)
    found, _ = run(tx, with_spike)
    np.testing.assert_array_equal(np.delete(found, 5, axis=0), expected)

    counting = signax.skip_on_spike(signax.scale_by_signum(), **OPTIONS)
    _, state = run(counting, with_spike)
    assert state.inner.count.tolist() == list(range(1, 10))
    np.testing.assert_array_equal(state.inner.momentum[5], state.inner.momentum[4])


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_nonfinite_updates_are_held_as_by_hold_if_nonfinite(bad):
    inner = signax.scale_by_signum(0.5)
    gradients = directed([1.0] * 6).at[3, 2].set(bad)
    found, state = run(signax.skip_on_spike(inner, **OPTIONS), gradients)
    expected, held = run(signax.hold_if_nonfinite(inner), gradients)
    np.testing.assert_array_equal(found, expected)
    jax.tree.map(np.testing.assert_array_equal, state.inner, held)
    assert state.skipped[-1] == 0
    np.testing.assert_array_equal(state.mean[3], state.mean[2])


def test_an_overflow_of_the_inner_state_is_held_and_not_learned():
    # 60,000 + 0.9 * 60,000 overflows f16, but its sign is finite.
    inner = optax.chain(optax.trace(0.9), signax.scale_by_sign())
    gradient = jnp.full((2, 2), 60_000.0, jnp.float16)
    updates, state = run(signax.skip_on_spike(inner), gradient)
    assert np.isfinite(updates[0]).all()
    assert np.isnan(updates[1]).all()
    assert state.accepted.tolist() == [1, 1]
    np.testing.assert_array_equal(state.inner[0].trace[1], gradient[0])


def test_the_first_step_after_the_last_allowed_skip_restarts_the_mean():
    _, state = run(signax.skip_on_spike(optax.identity(), **OPTIONS), directed([1] * 4 + [80] * 5))
    assert state.in_a_row.tolist() == [0, 0, 0, 0, 1, 2, 0, 0, 0]
    assert state.accepted.tolist() == [1, 2, 3, 4, 4, 4, 1, 2, 3]
    np.testing.assert_allclose(state.mean[-3:], 80, rtol=1e-6)


def test_does_not_learn_from_a_step_in_which_another_group_is_not_finite():
    guarded = optax.chain(signax.skip_on_spike(optax.trace(0.9)), signax.majority_vote("data"))
    groups = {"vote": guarded, "average": signax.average_updates("data")}
    tx = signax.DataParallel(
        optax.partition(groups, {"w": "vote", "b": "average"}), make_mesh((2,))
    )
    rows = {"w": jnp.ones((2, 4)), "b": jnp.ones((2, 3)).at[1, 0].set(jnp.nan)}
    params = jax.tree.map(lambda leaf: leaf[0], rows)
    _, state = jax.jit(tx.update)(rows, tx.init(params))
    np.testing.assert_allclose(optax.tree.get(state, "mean"), [2, 0], rtol=1e-6)
    assert optax.tree.get(state, "accepted").tolist() == [1, 0]
    np.testing.assert_array_equal(
        optax.tree.get(state, "trace")["w"], np.repeat([[1.0], [0.0]], 4, axis=1)
    )


# Norms.


def test_the_norm_is_of_all_leaves_together():
    tx = signax.skip_on_spike(optax.identity(), **OPTIONS)
    tree = {"a": jnp.ones((2, 3)), "b": (jnp.asarray(2.0), jnp.ones((0, 4)), None)}
    _, state = tx.update(tree, tx.init(tree))
    np.testing.assert_allclose(state.mean, np.sqrt(6 + 4), rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        ("float16", 6e4),
        ("float16", 1e-7),
        ("float32", 1e30),
        ("float32", 1e-30),
        ("bfloat16", 1e25),
    ],
)
def test_squares_neither_overflow_nor_vanish(dtype, size):
    gradients = jnp.full((5, 40), size, dtype).at[4].multiply(4 if size < 1e4 else 0.25)
    norms = np.linalg.norm(np.asarray(gradients, np.float64), axis=1)
    _, state = run(signax.skip_on_spike(optax.identity(), **OPTIONS), gradients)
    assert state.mean.dtype == jnp.float32
    np.testing.assert_allclose(state.mean, reference(norms, **OPTIONS)[1], rtol=1e-5)
    assert state.skipped[-1] == (size < 1e4)


def test_norms_of_f64_leaves_are_f64():
    with jax.enable_x64(True):
        tree = {"a": jnp.full(3, 1e200), "b": jnp.ones(2, jnp.float16)}
        norm = tree_norm(tree)
        assert norm.dtype == signax.skip_on_spike(optax.identity()).init(tree).mean.dtype
        np.testing.assert_allclose(norm, np.sqrt(3) * 1e200, rtol=1e-12)


@pytest.mark.parametrize("size", [3e38, 1.2e-38])
def test_norms_at_the_ends_of_the_range_are_finite(size):
    values = jnp.full(9, size, jnp.float32)
    expected = min(3 * size, float(jnp.finfo(jnp.float32).max))
    for norm in (tree_norm, jax.jit(tree_norm)):
        np.testing.assert_allclose(norm(values), expected, rtol=1e-6)


def test_a_norm_is_nan_if_a_value_is_not_finite():
    for bad in (jnp.nan, jnp.inf):
        assert jnp.isnan(tree_norm([jnp.ones(3), jnp.array([1.0, bad])]))


# Over workers.


def spiky_rows(spikes, size=6, workers=4):
    """Rows of gradients for each step; `spikes` names a worker for some of the steps."""
    rows = np.random.default_rng(2).normal(size=(10, workers, size)).astype(np.float32)
    for step, worker in spikes.items():
        rows[step, worker] *= -1000
    return rows


def test_a_vote_leaves_out_the_worker_with_a_spike():
    rows = spiky_rows({7: 2})
    tx = signax.DataParallel(
        optax.chain(
            signax.skip_on_spike(optax.identity(), warmup=5),
            signax.majority_vote("data", zeros="abstain"),
        ),
        make_mesh((4,)),
    )
    params = jnp.zeros(6)
    state, update = tx.init(params), jax.jit(tx.update)
    for step, gradients in enumerate(rows):
        updates, state = update(jnp.asarray(gradients), state, params)
        voters = [i for i in range(4) if (step, i) != (7, 2)]
        ballots = np.sign(gradients[voters]).sum(axis=0)
        np.testing.assert_array_equal(updates, np.sign(ballots))
    assert signax.participation(state).missed.tolist() == [0, 0, 1, 0]
    assert state[0].skipped.tolist() == [0, 0, 1, 0]
    assert state[0].mean.shape == (4,)


def test_a_spike_excludes_the_worker_from_all_groups_of_a_partition():
    groups = {"vote": signax.majority_vote("data"), "mean": signax.average_updates("data")}
    tx = signax.DataParallel(
        optax.chain(
            signax.skip_on_spike(optax.identity(), warmup=5),
            optax.partition(groups, {"w": "vote", "b": "mean"}),
        ),
        make_mesh((4,)),
    )
    params = {"w": jnp.zeros(6), "b": jnp.zeros(6)}
    state, update = tx.init(params), jax.jit(tx.update)
    calm = spiky_rows({})
    for step, rows in enumerate(spiky_rows({7: 2})):
        updates, state = update({"w": jnp.asarray(rows), "b": jnp.asarray(calm[step])}, state)
        voters = [0, 1, 3] if step == 7 else [0, 1, 2, 3]
        np.testing.assert_allclose(updates["b"], calm[step][voters].mean(axis=0), rtol=1e-5)
    assert signax.participation(state).missed.tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("specs", [True, False], ids=["param_specs", "no specs"])
def test_the_norm_of_a_sharded_leaf_is_of_the_whole_leaf(kind, specs):
    mesh = make_mesh((4, 2), kind)
    places = {"w": PartitionSpec(None, "model"), "b": PartitionSpec()}
    if not specs and kind == AxisType.Auto:  # sharded parameters need specs over Auto axes
        places = dict.fromkeys(places, PartitionSpec())
    chain = optax.chain(
        signax.skip_on_spike(signax.scale_by_signum()), signax.majority_vote("data")
    )
    tx = signax.DataParallel(chain, mesh, param_specs=places if specs else None)
    generator = np.random.default_rng(3)
    rows = {
        "w": generator.normal(size=(4, 128, 64)).astype(np.float32),
        "b": generator.normal(size=(4, 64)).astype(np.float32),
    }
    squares = [np.square(row).reshape(4, -1).sum(axis=1) for row in rows.values()]
    rows = {
        name: jax.device_put(row, NamedSharding(mesh, PartitionSpec("data", *places[name])))
        for name, row in rows.items()
    }
    params = {
        name: jax.device_put(row[0] * 0, NamedSharding(mesh, places[name]))
        for name, row in ((name, np.asarray(row)) for name, row in rows.items())
    }
    state = tx.init(params)
    update = jax.jit(tx.update).lower(rows, state, params).compile()
    _, state = update(rows, state, params)
    np.testing.assert_allclose(state[0].mean, np.sqrt(np.sum(squares, axis=0)), rtol=1e-5)
    assert large_floating(update) == []


def test_a_resized_state_goes_on():
    tx = signax.DataParallel(
        optax.chain(signax.skip_on_spike(optax.identity()), signax.majority_vote("data")),
        make_mesh((4,)),
    )
    params = jnp.zeros(6)
    _, state = jax.jit(tx.update)(jnp.ones((4, 6)), tx.init(params), params)
    halved = tx.resize(state, params, 2)
    np.testing.assert_allclose(halved[0].mean, [np.sqrt(6)] * 2, rtol=1e-6)
    assert halved[0].accepted.tolist() == [1, 1]


# Options.


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"factor": 1.0}, ValueError, r"factor=1.0 is outside \(1, inf\)"),
        ({"decay": 1.0}, ValueError, r"decay=1.0 is outside \[0, 1\)"),
        ({"decay": "high"}, TypeError, "decay='high' is not a number"),
        ({"warmup": 0}, ValueError, "warmup=0 must be at least 1"),
        ({"max_in_a_row": 1.5}, TypeError, "max_in_a_row=1.5 must be a whole number"),
        ({"inner": optax.trace}, TypeError, "is not a gradient transformation"),
    ],
)
def test_rejects_invalid_options(options, error, said):
    with pytest.raises(error, match=said):
        signax.skip_on_spike(**{"inner": optax.identity(), **options})


def test_a_vote_inside_is_refused():
    """Its result would be NaN on some workers only, and parameters would differ."""
    inside = signax.skip_on_spike(signax.majority_vote("data"))
    tx = signax.DataParallel(inside, make_mesh((4,)))
    params = jnp.zeros(3)
    state = tx.init(params)
    with pytest.raises(ValueError, match="neither voted nor averaged over 'data'"):
        tx.update(jnp.ones((4, 3)), state, params)
