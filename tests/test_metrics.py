"""Metrics of a state against numbers worked out by hand or by NumPy from the gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from workers import AXIS, auto_mesh

import signax
from signax import diagnostics

PARAMS = {"kernel": np.zeros((3, 5), np.float32), "bias": np.zeros(5, np.float32)}


def random_rows(num_workers, seed=0, params=PARAMS):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.standard_normal((num_workers, *leaf.shape)).astype(np.float32), params
    )


def on_mesh(tx, num_workers):
    return signax.DataParallel(tx, auto_mesh({AXIS: num_workers}), AXIS)


def after(tx, steps, params=PARAMS):
    """The state of a `DataParallel` after updates with these rows."""
    state = tx.init(params)
    update = jax.jit(tx.update)
    for rows in steps:
        _, state = update(rows, state, params)
    return state


def norm_over_workers(rows):
    """The root of the mean, over workers, of the squared norm of a worker's rows."""
    rows = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(rows)]
    return np.sqrt(sum(np.sum(leaf**2) for leaf in rows) / len(rows[0]))


def floats(metrics):
    return {name.removeprefix("signax/"): float(value) for name, value in metrics.items()}


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_a_voted_momentum_gives_voters_missed_steps_and_its_norm(jit):
    first, second = random_rows(4), random_rows(4, seed=1)
    second["bias"][2, 1] = np.nan  # the worker is excluded, and keeps its momentum
    state = after(on_mesh(signax.signum(0.1, beta=0.75, axis_name=AXIS), 4), [first, second])

    metrics = jax.jit(diagnostics.metrics) if jit else diagnostics.metrics
    found = metrics(state)

    momentum = jax.tree.map(
        lambda g, h: np.where(
            (np.arange(4) == 2).reshape(4, *[1] * (g.ndim - 1)),
            0.25 * g,
            0.75 * 0.25 * g + 0.25 * h,
        ),
        first,
        second,
    )
    assert all(value.shape == () for value in found.values())
    found = floats(found)
    np.testing.assert_allclose(found.pop("momentum_norm"), norm_over_workers(momentum), rtol=1e-5)
    assert found == {
        "voters": 3,
        "missed": 1,
        "missed_worker": 2,
        "nonfinite_state": 0,
        "nonfinite_state_worker": 0,
    }


def test_one_workers_state_gives_its_own_numbers_without_indices():
    tx = signax.majority_vote(AXIS)
    rows = jnp.array([[1.0, 2.0], [3.0, jnp.inf], [1.0, 1.0]])

    def measure(gradient):
        return diagnostics.metrics(tx.update(gradient, tx.init(gradient))[1])

    found = jax.jit(jax.vmap(measure, axis_name=AXIS))(rows)
    assert set(found) == {"signax/voters", "signax/missed", "signax/nonfinite_state"}
    np.testing.assert_array_equal(found["signax/voters"], [2, 2, 2])
    np.testing.assert_array_equal(found["signax/missed"], [0, 1, 0])


def test_agreement_is_a_mean_and_opposition_names_the_worker_that_inverts():
    # The others of an honest worker add up to 4 - 1 = 3, a clear majority with which it agrees
    # everywhere. The inverter agrees nowhere: its opposition grows by 1/2 - 0 - 0.1 in each step.
    rows = np.ones((6, 16), np.float32)
    rows[4] = -1
    tx = on_mesh(signax.sign_sgd(0.1, axis_name=AXIS, agreement=True), 6)
    found = floats(diagnostics.metrics(after(tx, [rows] * 3, params=np.zeros(16, np.float32))))
    np.testing.assert_allclose(found["agreement"], 5 / 6, rtol=1e-6)
    np.testing.assert_allclose(found["opposition"], 3 * 0.4, rtol=1e-6)
    assert found["opposition_worker"] == 4


def test_a_mean_of_scaled_signs_gives_the_norms_of_both_memories():
    rows = random_rows(3)
    tx = on_mesh(signax.mean_scaled_signs(AXIS), 3)
    updates, state = jax.jit(tx.update)(rows, tx.init(PARAMS), PARAMS)
    found = floats(diagnostics.metrics(state))

    def sent(g):  # C(g) of each worker, and so of each row
        axes = tuple(range(1, g.ndim))
        return np.mean(np.abs(g), axis=axes, keepdims=True) * np.sign(g)

    left = jax.tree.map(lambda g: g - sent(g), rows)
    # The servers keep P - C(P), of which P is the mean of what was sent, and C(P) the update.
    kept = jax.tree.map(lambda g, u: np.mean(sent(g), axis=0) - np.asarray(u), rows, updates)
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(kept)))
    assert norm > 0.1
    np.testing.assert_allclose(found["memory_norm"], norm_over_workers(left), rtol=1e-5)
    np.testing.assert_allclose(found["server_memory_norm"], norm, rtol=1e-5)


@pytest.mark.parametrize(
    ("feedback", "names"), [("worker", {"memory_norm"}), ("none", set())], ids=["worker", "none"]
)
def test_a_memory_that_does_not_exist_has_no_name(feedback, names):
    tx = on_mesh(signax.mean_scaled_signs(AXIS, feedback=feedback), 2)
    found = floats(diagnostics.metrics(tx.init(PARAMS)))
    assert {name for name in found if name.endswith("_norm")} == names


def test_a_momentum_that_all_workers_share_is_not_divided_among_them():
    rows = random_rows(4)
    tx = on_mesh(optax.chain(signax.average_updates(AXIS), optax.trace(0.9)), 4)
    found = floats(diagnostics.metrics(after(tx, [rows])))
    mean = jax.tree.map(lambda g: np.mean(g, axis=0, keepdims=True), rows)
    np.testing.assert_allclose(found["momentum_norm"], norm_over_workers(mean), rtol=1e-5)


@pytest.mark.parametrize(
    ("momentum", "norm"),
    [
        (signax.scale_by_signum(0.75), 0.25 * 5),
        (optax.trace(0.75), 5),
        (optax.ema(0.75, debias=False), 0.25 * 5),
        (optax.scale_by_lion(0.9, 0.75), 0.25 * 5),
        (optax.scale_by_adam(0.75), 0.25 * 5),
    ],
    ids=["signum", "trace", "ema", "lion", "adam"],
)
def test_momenta_of_optax_are_measured(momentum, norm):
    gradient = jnp.array([3.0, -4.0])
    _, state = momentum.update(gradient, momentum.init(gradient), gradient)
    np.testing.assert_allclose(floats(diagnostics.metrics(state))["momentum_norm"], norm, rtol=1e-6)


def test_momenta_of_muon_and_one_bit_adam_are_measured():
    rows = random_rows(4)
    state = after(on_mesh(signax.muon(0.1, 0.75, axis_name=AXIS), 4), [rows])
    found = floats(diagnostics.metrics(state))
    own = sorted(value for name, value in found.items() if name.startswith("momentum_norm/"))
    kernel, bias = {"kernel": 0.25 * rows["kernel"]}, {"bias": 0.01 * rows["bias"]}  # Lion's
    np.testing.assert_allclose(own, sorted(map(norm_over_workers, (kernel, bias))), rtol=1e-5)

    adam = signax.one_bit_adam(0.1, 0.75, warmup_steps=2, axis_name=AXIS)
    found = floats(diagnostics.metrics(after(on_mesh(adam, 4), [rows])))
    shared = jax.tree.map(lambda leaf: 0.25 * leaf.mean(axis=0, keepdims=True), rows)
    assert found["momentum_norm"] == pytest.approx(norm_over_workers(shared), rel=1e-5)
    assert found["memory_norm"] == 0


def test_every_memory_of_nested_error_feedback_has_a_name():
    tx = signax.error_feedback(signax.error_feedback(signax.scale_by_top_k(0.5)))
    gradient = jnp.array([3.0, 1.0])
    _, state = tx.update(gradient, tx.init(gradient))
    found = floats(diagnostics.metrics(state))
    assert found == {"memory_norm/error": 1, "memory_norm/inner_state": 1, "nonfinite_state": 0}


def test_votes_on_several_groups_have_names_from_their_paths():
    tx = optax.partition(
        {
            "matrices": signax.signum(0.1, axis_name=AXIS),
            "others": optax.chain(signax.average_updates(AXIS), optax.adam(1e-3)),
        },
        {"kernel": "matrices", "bias": "others"},
    )
    rows = random_rows(2)
    rows["kernel"][1, 0, 0] = np.nan
    tx = signax.DataParallel(tx, auto_mesh({AXIS: 2}), AXIS)
    found = floats(diagnostics.metrics(after(tx, [rows])))
    bias = rows["bias"][:1]  # of the only worker that takes part
    np.testing.assert_allclose(
        found.pop("momentum_norm/others"), 0.1 * norm_over_workers(bias), rtol=1e-5
    )
    kernel = 0.1 * rows["kernel"] * np.array([1, 0])[:, None, None]
    kernel[1] = 0  # its momentum was held
    np.testing.assert_allclose(
        found.pop("momentum_norm/matrices"), norm_over_workers(kernel), rtol=1e-5
    )
    # DataParallel excludes a worker from every vote of the step.
    assert found == {
        "voters/matrices": 1,
        "voters/others": 1,
        "missed/matrices": 1,
        "missed/others": 1,
        "missed_worker/matrices": 1,
        "missed_worker/others": 1,
        "nonfinite_state": 0,
        "nonfinite_state_worker": 0,
    }


def test_a_name_takes_no_more_of_the_path_than_distinguishes_it():
    vote = signax.majority_vote(AXIS).init(None)
    state = {"model": {"encoder": {"query": vote, "key": vote}, "decoder": (vote,)}}
    found = diagnostics.metrics(state)
    assert {name for name in found if "voters" in name} == {
        "signax/voters/encoder/query",
        "signax/voters/encoder/key",
        "signax/voters/decoder",
    }


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_worker_that_keeps_a_nan_in_its_momentum_is_counted(bad):
    poisoned, clean = random_rows(4), random_rows(4, seed=1)
    poisoned["kernel"][3, 1, 1] = bad
    tx = on_mesh(optax.chain(optax.trace(0.9), signax.majority_vote(AXIS)), 4)
    found = floats(diagnostics.metrics(after(tx, [poisoned, clean, clean])))
    assert (found["nonfinite_state"], found["nonfinite_state_worker"]) == (1, 3)
    assert found["voters"] == 3
    assert (found["missed"], found["missed_worker"]) == (3, 3)
    assert np.isnan(found["momentum_norm"])


def test_a_held_momentum_is_finite_again_in_the_next_step():
    poisoned, clean = random_rows(4), random_rows(4, seed=1)
    poisoned["kernel"][3, 1, 1] = np.nan
    held = signax.hold_if_nonfinite(optax.trace(0.9))
    tx = on_mesh(optax.chain(held, signax.majority_vote(AXIS)), 4)
    found = floats(diagnostics.metrics(after(tx, [poisoned, clean, clean])))
    assert (found["nonfinite_state"], found["voters"], found["missed"]) == (0, 4, 1)


def test_workers_with_several_nonfinite_leaves_count_once_and_shared_state_does_not():
    state = on_mesh(optax.chain(optax.trace(0.9), signax.majority_vote(AXIS)), 4).init(PARAMS)
    rows = jax.tree.map(lambda leaf: np.zeros((4, *leaf.shape), np.float32), PARAMS)
    rows["kernel"][1, 0, 0] = rows["bias"][1, 0] = rows["bias"][2, 4] = np.nan
    state = {
        "own": (optax.TraceState(rows), state[1]),
        "shared": jnp.full((3, 4), jnp.nan),
        "count": jnp.int32(4),
    }
    found = floats(diagnostics.metrics(state))
    assert (found["nonfinite_state"], found["nonfinite_state_worker"]) == (2, 1)


def test_one_workers_nonfinite_state_counts_as_one_worker():
    momentum = optax.trace(0.9)
    gradient = jnp.array([jnp.nan, 1.0])
    _, state = momentum.update(gradient, momentum.init(gradient))
    assert floats(diagnostics.metrics(state))["nonfinite_state"] == 1


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_sharded_states_give_the_same_numbers_on_every_kind_of_axis(kind):
    mesh = jax.make_mesh((4, 2), (AXIS, "model"), axis_types=(kind,) * 2, devices=jax.devices()[:8])
    params = {"kernel": np.zeros((3, 6), np.float32), "bias": np.zeros(4, np.float32)}
    specs = {"kernel": PartitionSpec(None, "model"), "bias": PartitionSpec()}
    placed = jax.device_put(params, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))
    groups = {
        "signs": signax.signum(0.1, axis_name=AXIS),
        "mean": optax.chain(signax.average_updates(AXIS), optax.trace(0.9)),
    }
    # The shared momentum of the bias has as many coordinates as there are workers.
    tx = optax.partition(groups, {"kernel": "signs", "bias": "mean"})
    tx = signax.DataParallel(tx, mesh, AXIS, param_specs=specs)
    rows = random_rows(4, params=params)

    def loss(params, batch):  # its gradient is the mean of the batch
        products = jax.tree.map(lambda p, g: jnp.sum(p * jnp.mean(g, axis=0)), params, batch)
        return sum(jax.tree.leaves(products))

    gradients = jax.jit(lambda p, g: tx.value_and_grad(loss)(p, g)[1])(placed, rows)
    _, state = jax.jit(tx.update)(gradients, tx.init(placed), placed)
    found = floats(diagnostics.metrics(state))
    kernel = 0.1 * norm_over_workers(rows["kernel"])
    np.testing.assert_allclose(found["momentum_norm/signs"], kernel, rtol=1e-5)
    assert (found["voters/signs"], found["nonfinite_state"]) == (4, 0)


def test_norms_of_huge_and_tiny_momenta_do_not_overflow_or_vanish():
    for size in (1e-30, 1e30):
        state = optax.TraceState(jnp.array([3.0, -4.0]) * size)
        np.testing.assert_allclose(
            floats(diagnostics.metrics(state))["momentum_norm"], 5 * size, rtol=1e-5
        )


def test_a_flax_train_state_is_read_like_its_optimiser_state():
    train_state = pytest.importorskip("flax.training.train_state")
    tx = on_mesh(signax.signum(0.1, axis_name=AXIS), 2)
    state = train_state.TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    expected = floats(diagnostics.metrics(state.opt_state))
    assert expected["voters"] == 0
    assert floats(diagnostics.metrics(state)) == expected


@pytest.mark.parametrize(
    "state",
    [PARAMS, None, optax.sgd(0.1).init(PARAMS), {"0": {"count": 1, "momentum": PARAMS}}],
    ids=["parameters", "nothing", "plain SGD", "a checkpoint without types"],
)
def test_rejects_a_state_without_anything_to_measure(state):
    with pytest.raises(ValueError, match=r"state of type \w+ holds no vote.*abstract_state"):
        diagnostics.metrics(state)
