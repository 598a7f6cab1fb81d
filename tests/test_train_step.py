"""The training step that comes with `DataParallel`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from least_squares import (
    PARAMS,
    SIGNUM,
    WORKERS,
    assert_trees_equal,
    make_batch,
    squared_error,
)
from workers import assert_same_on_all_devices, auto_mesh, large_floating

import signax
from signax import diagnostics

STEPS = 200


def linear(params, batch):
    x, y = batch
    return jnp.mean((x @ params - y) ** 2)


def lines():
    x = jax.random.normal(jax.random.key(0), (64, 4))
    return x, x @ jnp.array([1.0, -1.0, 0.5, 0.0])


def optimizer(mesh):
    schedule = optax.linear_schedule(0.03, 0.0, STEPS)
    return signax.DataParallel(signax.signum(schedule, axis_name="data"), mesh)


@pytest.fixture
def placed(mesh):
    """An optimiser, with parameters and a state on the mesh."""
    tx = optimizer(mesh)
    # Made from NumPy, because no other array may share the donated memory.
    params = jax.device_put(np.zeros(4, np.float32), NamedSharding(mesh, PartitionSpec()))
    return tx, params, tx.init(params)


def test_train_step_learns(placed):
    tx, params, state = placed
    step, loss = tx.train_step(linear), jnp.inf
    for _ in range(STEPS):
        params, state, loss = step(params, state, lines())
    assert loss < 1e-3
    assert_same_on_all_devices(params)


def test_train_step_equals_gradient_and_update(placed):
    tx, params, state = placed

    def loss_fn(params, batch, scale, key):
        mask = jax.random.bernoulli(key, 0.5, (4,))
        return scale * linear(params * mask, batch), mask

    options = {"has_aux": True, "accumulate": 2}
    arguments, key = (lines(), jnp.float32(2)), jax.random.key(4)

    @jax.jit
    def by_hand(params, state):
        value, grads = tx.value_and_grad(loss_fn, **options)(params, *arguments, key=key)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    expected = by_hand(params, state)
    actual = tx.train_step(loss_fn, **options)(params, state, *arguments, key=key)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    _, masks = actual[2]
    assert masks.shape == (8, 2, 4)


def test_train_step_returns_aux_in_each_mode(placed):
    tx, params, state = placed

    def loss_fn(params, batch):
        x, y = batch
        errors = (x @ params - y) ** 2
        return errors.mean(), {"errors": errors, "mean": errors.mean(), "number": jnp.int32(1)}

    modes = {"errors": "concat", "mean": "mean", "number": "sum"}
    step = tx.train_step(loss_fn, has_aux=True, aux=modes, accumulate=2)
    x, y = lines()
    errors = (np.asarray(x) @ np.asarray(params) - np.asarray(y)) ** 2
    _, _, (loss, aux) = step(params, state, (x, y))
    np.testing.assert_allclose(aux["errors"], errors, rtol=1e-5)
    np.testing.assert_allclose([loss, aux["mean"]], errors.mean(), rtol=1e-5)
    assert aux["number"] == 2 * WORKERS


def test_scan_runs_steps(placed):
    """A whole epoch is one program, since parameters and state keep their shapes and types."""
    tx, params, state = placed

    def body(carry, batch):
        params, state = carry
        loss, grads = tx.value_and_grad(linear)(params, batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    batches = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (100, *leaf.shape)), lines())
    (params, _), losses = jax.jit(lambda *carry: jax.lax.scan(body, carry, batches))(params, state)
    assert losses[-1] < 0.05 * losses[0]
    assert_same_on_all_devices(params)


def test_train_step_excludes_inactive_workers(mesh):
    tx = signax.DataParallel(SIGNUM, mesh)
    active = np.arange(WORKERS) != 3
    batch = make_batch()
    _, grads = jax.jit(tx.value_and_grad(squared_error))(PARAMS, batch)
    state = tx.init(PARAMS)
    updates, expected_state = jax.jit(tx.update)(grads, state, PARAMS, active=active)
    expected = optax.apply_updates(PARAMS, updates)
    params = jax.tree.map(jnp.copy, PARAMS)
    params, state, _ = tx.train_step(squared_error)(params, state, batch, active=active)
    assert optax.tree.get(state, "voters") == WORKERS - 1
    assert_trees_equal((params, state), (expected, expected_state))


# The program.


def test_train_step_compiles_once(placed):
    tx, params, state = placed
    step = tx.train_step(linear)
    for _ in range(3):
        params, state, _ = step(params, state, lines())
    assert step._cache_size() == 1


def test_train_step_donates_parameters_and_state(placed):
    tx, params, state = placed
    batch = lines()
    tx.train_step(linear)(params, state, batch)
    kept = [p for p, leaf in jax.tree.leaves_with_path((params, state)) if not leaf.is_deleted()]
    # No step reads the number of the last step's voters, so this leaf alone is not donated.
    assert [jax.tree_util.keystr(path)[-7:] for path in kept] == [".voters"]
    assert not any(leaf.is_deleted() for leaf in batch)


def test_train_step_can_be_lowered_and_compiled_first(placed):
    tx, params, state = placed
    compiled = tx.train_step(linear).lower(params, state, lines()).compile()
    assert diagnostics.collective_bytes(compiled) > diagnostics.wire_bytes(params, 8)
    # The compiled program runs.
    _, _, loss = compiled(params, state, lines())
    np.testing.assert_allclose(loss, linear(jnp.zeros(4), lines()), rtol=1e-6)


# Ten million parameters in large and small leaves; packing pads every one of them.
SHAPES = {
    "embedding": (9_001, 700), "kernel": (1_801, 2_003), "bias": (2_003,), "norm": (700,),
    "scale": (), "empty": (0, 4), "filter": (3, 3, 64, 129),
}  # fmt: skip


def loss_of_all_leaves(params, batch):
    return jnp.mean(batch) * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def test_a_step_of_ten_million_parameters_sends_one_bit_each_way(mesh):
    tx = signax.DataParallel(signax.signum(0.1, axis_name="data", weight_decay=0.01), mesh)
    whole, split = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((), ("data",)))
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole)
        for name, shape in SHAPES.items()
    }
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert size > 9_900_000
    state = tx.abstract_state(params)
    batch = jax.ShapeDtypeStruct((WORKERS,), jnp.float32, sharding=split)
    compiled = tx.train_step(loss_of_all_leaves).lower(params, state, batch).compile()

    found = diagnostics.collectives(compiled)
    operations = [record.operation for record in found if not record.is_floating]
    assert sorted(operations) == ["all-gather", "all-to-all"]
    scalars = [record for record in found if record.is_floating]
    assert large_floating(compiled, elements=4) == []
    # The loss is the only addition to the formula.
    sent = diagnostics.collective_bytes(compiled)
    assert sent == diagnostics.wire_bytes(params, WORKERS) + sum(r.bytes_sent for r in scalars)
    assert sum(r.bytes_sent for r in scalars) <= 16
    assert sent <= 1.02 * 2 * (7 / 8) * size / 8
    assert 31 * sent <= 2 * (7 / 8) * 4 * size


def test_boxed_parameters_may_have_plain_param_specs():
    mesh = auto_mesh({"data": 2, "fsdp": 2})
    params = {"w": nn.Partitioned(jnp.zeros((4, 2)), names=("fsdp", None))}
    specs = {"w": PartitionSpec("fsdp")}
    params = jax.device_put(params, NamedSharding(mesh, specs["w"]))

    def loss_fn(params, batch):
        return jnp.mean((batch - batch @ nn.unbox(params)["w"].sum(axis=1, keepdims=True)) ** 2)

    tx = signax.DataParallel(signax.signum(0.5, axis_name="data"), mesh, param_specs=specs)
    step = tx.train_step(loss_fn)
    params, _, _ = step(params, tx.init(params), jnp.ones((4, 4)))
    assert params["w"].value.sharding.spec == specs["w"]
    assert params["w"].value.tolist() == [[0.5, 0.5]] * 4
