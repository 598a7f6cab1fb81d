"""DiLoCo: local steps across calls, and exchanges of the workers' differences."""

import digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from diloco_references import SGD, AdamW
from diloco_runs import (
    AVERAGE,
    VOTE,
    assert_state,
    batches,
    make,
    reference,
    run,
)
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from least_squares import (
    PARAMS,
    assert_trees_close,
    assert_trees_equal,
    make_mesh,
    squared_error,
)
from workers import assert_same_on_all_devices

import signax
from signax import diagnostics

# The algorithm.

INNER = {
    "sgd": (optax.sgd(1 / 16, momentum=0.5), lambda: SGD(1 / 16, 0.5)),
    "adamw": (
        optax.adamw(0.03, b1=0.8, b2=0.9, weight_decay=0.1),
        lambda: AdamW(0.03, 0.8, 0.9, weight_decay=0.1),
    ),
}
CASES = [(name, h, m) for name in INNER for h in (1, 2, 3) for m in (1, 2, 4)]
QUICK = {("sgd", 2, 4), ("adamw", 3, 2), ("adamw", 1, 1)}


@pytest.mark.parametrize(
    ("name", "num_local_steps", "workers"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.thorough) for case in CASES],
)
def test_rounds_equal_the_reference(name, num_local_steps, workers):
    optimizer, make_inner = INNER[name]
    tx = make(AVERAGE, num_local_steps, workers, optimizer)
    given = batches(2 * num_local_steps + 1, workers)
    expected = reference(
        given, workers, num_local_steps, make_inner, lambda: SGD(0.7, 0.9, nesterov=True)
    )
    state, step = tx.init(PARAMS), tx.train_step(squared_error)
    for batch, wanted in zip(given, expected, strict=True):
        state, loss = step(state, batch)
        assert_state(state, wanted)
        np.testing.assert_allclose(loss, np.mean(wanted[2]), rtol=1e-5)
    assert state.count == 2 * num_local_steps + 1
    if workers > 1:  # along an axis of one device XLA returns other shardings
        assert step._cache_size() == 1
    assert_same_on_all_devices(state.params, workers)


def votes_of(history):
    return {
        name: references.votes(np.stack([rows[name].reshape(4, -1) for rows in history]))
        for name in PARAMS
    }


def means_of(history, bits):
    leaves = [[rows[name] for name in PARAMS] for rows in history]
    found = references.mean_of_scaled_signs(leaves, bits=bits)
    return {name: [step[n][0] for step in found] for n, name in enumerate(PARAMS)}


EXCHANGES = {
    "vote": (VOTE, lambda rows: {n: np.array(v) / 64 for n, v in votes_of(rows).items()}),
    "scaled signs": (signax.mean_scaled_signs("data"), lambda rows: means_of(rows, 1)),
    "2 bits": (signax.mean_quantized("data"), lambda rows: means_of(rows, 2)),
    "4 bits": (signax.mean_quantized("data", bits=4), lambda rows: means_of(rows, 4)),
}


@pytest.mark.parametrize("name", EXCHANGES)
def test_exchanges_by_votes_and_quantized_means_equal_the_reference(name):
    """The reference gets the differences of the run itself, as rounding may turn a sign."""
    exchange, combine = EXCHANGES[name]
    tx = make(exchange, num_local_steps=2)
    local_step, state = jax.jit(tx.local_step(squared_error)), tx.init(PARAMS)
    sync, history, found = jax.jit(tx.sync), [], [PARAMS]
    for number, batch in enumerate(batches(8), start=1):
        _, state = local_step(state, batch)
        if number % 2 == 0:
            history.append(
                jax.tree.map(
                    lambda p, q: np.float64(np.asarray(p) - np.asarray(q)), state.params, state.own
                )
            )
            state = sync(state)
            found.append(state.params)
            assert_trees_equal(state.own, jax.tree.map(lambda p: np.stack([p] * 4), state.params))
    updates = combine(history)
    for leaf, directions in updates.items():
        outer, params = SGD(0.7, 0.9, nesterov=True), np.float64(PARAMS[leaf])
        for direction, after in zip(directions, found[1:], strict=True):
            params = outer.step(params, np.reshape(direction, params.shape))
            np.testing.assert_allclose(after[leaf], params, rtol=1e-4, atol=1e-6)


def test_a_train_step_equals_local_steps_and_a_sync():
    given, tx = batches(5), make(VOTE, num_local_steps=2)
    expected, losses = run(tx, tx.init(PARAMS), given)
    local_step, state = tx.local_step(squared_error), tx.init(PARAMS)  # outside of jax.jit
    for number, batch in enumerate(given, start=1):
        loss, state = local_step(state, batch)
        np.testing.assert_allclose(loss, losses[number - 1], rtol=1e-6)
        if number % 2 == 0:
            state = tx.sync(state)
    assert_trees_close(state, expected, rtol=1e-6)


def test_optimizers_that_multiply_matrices_serve_as_inner_optimizers():
    """Muon's state is computed once, other states twice."""
    params = {"w": jnp.eye(3), "b": jnp.ones(3)}
    inner = signax.muon(0.1)
    tx = make(AVERAGE, 2, 2, inner)

    def loss_fn(params, batch):
        return squared_error(params, {"x": batch["x"], "y": batch["x"]})

    state, step = tx.init(params), tx.train_step(loss_fn)
    (batch,) = batches(1, 2)
    state, _ = step(state, batch)
    for worker in range(2):
        share = jax.tree.map(lambda leaf, i=worker: np.split(leaf, 2)[i], batch)
        grads = jax.grad(loss_fn)(params, share)
        updates, _ = inner.update(grads, inner.init(params), params)
        own = jax.tree.map(lambda leaf, i=worker: leaf[i], state.own)
        assert_trees_close(own, optax.apply_updates(params, updates))


# Loss functions.


def test_a_loss_function_has_aux_keys_and_replicated_arguments():
    def loss_fn(params, batch, scale, *, key):
        loss = scale * squared_error(params, batch)
        seen = {"key": jax.random.uniform(key), "x": batch["x"], "b": params["b"], "one": 1}
        return loss, seen

    tx = make(VOTE, 2)
    modes = {"key": "rows", "x": "concat", "b": "mean", "one": "sum"}
    step = tx.train_step(loss_fn, has_aux=True, aux=modes)
    (batch,), state = batches(1), tx.init(PARAMS)
    scale, key = jnp.float32(2), jax.random.key(1)
    plain, _ = tx.local_step(squared_error)(state, batch)
    state, (loss, aux) = step(state, batch, scale, key=key)
    np.testing.assert_allclose(loss, 2 * plain, rtol=1e-6)
    np.testing.assert_array_equal(aux["x"], batch["x"])
    np.testing.assert_array_equal(aux["b"], PARAMS["b"])
    assert aux["one"] == 4
    expected = [jax.random.uniform(jax.random.fold_in(key, i)) for i in range(4)]
    np.testing.assert_array_equal(aux["key"], expected)
    state, (_, aux) = step(state, batch, scale, key=key)  # aux shows the workers' own parameters
    np.testing.assert_array_equal(aux["key"], expected)
    assert np.any(aux["b"] != PARAMS["b"])


def test_micro_batches_are_averaged_for_a_single_local_step():
    tx, (batch,) = make(), batches(1)
    _, expected = tx.local_step(squared_error)(tx.init(PARAMS), batch)
    _, found = tx.local_step(squared_error, accumulate=2)(tx.init(PARAMS), batch)
    assert_trees_close(found.own, expected.own)
    assert found.count == 1


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("jitted", [True, False])
def test_a_loss_function_may_capture_arrays_of_the_mesh(kind, jitted):
    mesh = make_mesh((4,), kind)
    tx = make(mesh=mesh)
    scale = jax.device_put(jnp.full(2, 2.0), NamedSharding(mesh, PartitionSpec()))

    def loss_fn(params, batch):
        return jnp.sum(scale) / 4 * squared_error(params, batch)

    local_step = tx.local_step(loss_fn)
    (batch,), state = batches(1), tx.init(PARAMS)
    loss, found = (jax.jit(local_step) if jitted else local_step)(state, batch)
    plain, expected = tx.local_step(squared_error)(state, batch)
    np.testing.assert_allclose(loss, plain, rtol=1e-6)
    assert_trees_close(found.own, expected.own)


def test_an_uneven_batch_is_rejected():
    tx = make()
    batch = {"x": np.zeros((6, 3), np.float32), "y": np.zeros((6, 2), np.float32)}
    with pytest.raises(ValueError, match="not a multiple of 4 workers"):
        tx.train_step(squared_error)(tx.init(PARAMS), batch)


# Messages.

LARGE = {"w": jnp.zeros((3, 20_000)), "b": jnp.zeros(20_000)}


def large_error(params, batch):
    return jnp.mean((batch @ params["w"] + params["b"]) ** 2)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_local_steps_send_the_loss_only_and_an_exchange_one_bit_each_way(kind):
    tx = make(VOTE, num_local_steps=30, mesh=make_mesh((4,), kind), inner=optax.adamw(1e-3))
    state = tx.abstract_state(LARGE)
    split = NamedSharding(tx.mesh, PartitionSpec("data"))
    batch = jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=split)
    local = jax.jit(tx.local_step(large_error)).lower(state, batch).compile()
    records = diagnostics.collectives(local)
    assert sum(record.elements for record in records) == 2  # the finite losses and their number
    sync = jax.jit(tx.sync).lower(state).compile()
    assert diagnostics.collective_bytes(sync) == diagnostics.wire_bytes(LARGE, 4)
    step = tx.train_step(large_error).lower(state, batch).compile()
    sent = [diagnostics.collective_bytes(program) for program in (step, local, sync)]
    assert sent[0] == sent[1] + sent[2]


@pytest.mark.parametrize(
    ("kinds", "with_specs"),
    [
        ((AxisType.Auto, AxisType.Auto), True),
        ((AxisType.Explicit, AxisType.Explicit), False),
        pytest.param((AxisType.Auto, AxisType.Explicit), True, marks=pytest.mark.thorough),
        pytest.param((AxisType.Explicit, AxisType.Explicit), True, marks=pytest.mark.thorough),
    ],
)
def test_parameters_may_be_sharded_within_workers(kinds, with_specs):
    specs = {"w": PartitionSpec(None, "model"), "b": PartitionSpec("model")}
    mesh = make_mesh((4, 2), kinds)
    exchange = signax.mean_quantized("data", feedback="worker")
    tx = make(exchange, 2, mesh=mesh, param_specs=specs if with_specs else None)
    params = {
        name: jax.device_put(leaf, NamedSharding(mesh, specs[name]))
        for name, leaf in PARAMS.items()
    }
    given = batches(5)
    step, state = tx.train_step(squared_error), tx.init(params)
    split = NamedSharding(mesh, PartitionSpec("data"))
    for batch in given:
        state, _ = step(state, jax.device_put(batch, split))
    whole = make(exchange, 2)
    expected, _ = run(whole, whole.init(PARAMS), given)
    assert_trees_close((state.params, state.own), (expected.params, expected.own))
    wanted = tx.state_shardings(params)
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert state.own["w"].sharding.spec == PartitionSpec("data", None, "model")
    if len(set(kinds)) == 1:  # old versions of JAX write shardings on mixed axes in two ways
        assert step._cache_size() == 1


# A claim of the documentation, on scikit-learn's digits.


def recognised(exchange, seed, steps=600):
    """The share of held-out images that DiLoCo's common parameters recognise."""
    graph, params = nnx.split(digits.Network(nnx.Rngs(seed)))

    def loss_fn(params, batch):
        logits = nnx.merge(graph, params)(batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    inner = optax.adamw(digits.warmup_cosine(3e-3, steps))
    tx = make(exchange, num_local_steps=10, workers=8, inner=inner)
    images, others, labels, other_labels = digits.load_data()
    state, step, rng = tx.init(params), tx.train_step(loss_fn), np.random.default_rng(seed)
    for _ in range(steps):
        chosen = rng.integers(len(images), size=64)
        state, _ = step(state, (images[chosen], labels[chosen]))
    predicted = nnx.merge(graph, jax.device_get(state.params))(others).argmax(axis=-1)
    return np.mean(predicted == other_labels)


def test_few_bits_without_feedback_learn_as_well_as_the_mean():
    """Feedback comes a round late, and the outer momentum amplifies it: the losses are higher."""
    exchanges = {
        "mean": AVERAGE,
        "one bit": signax.mean_scaled_signs("data", decay=0.0),
        "two bits": signax.mean_quantized("data", decay=0.0),
        "feedback": signax.mean_quantized("data"),
    }
    shares = {
        name: np.mean([recognised(exchange, seed) for seed in range(3)])
        for name, exchange in exchanges.items()
    }
    assert shares["mean"] >= 0.95, shares
    assert min(shares["one bit"], shares["two bits"]) >= shares["mean"] - 0.01, shares
    assert shares["feedback"] <= shares["mean"] - 0.05, shares
