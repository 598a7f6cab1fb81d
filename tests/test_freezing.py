"""`freeze`: leaves without updates, state and messages, beside leaves that are voted on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from least_squares import make_mesh

import signax
from signax import diagnostics

PLACES = {"base": PartitionSpec(None, "model"), "lora": PartitionSpec("model")}
LABELS = {"base": "freeze", "lora": "vote"}
SHAPES = {"base": (256, 128), "lora": (128,)}
OPTIMIZER = optax.partition(
    {"vote": signax.signum(0.125, axis_name="data"), "freeze": signax.freeze()}, LABELS
)


def make_params(mesh=None):
    params = {
        name: np.random.default_rng(seed).normal(size=shape).astype(np.float32)
        for seed, (name, shape) in enumerate(SHAPES.items())
    }
    if mesh is None:
        return jax.tree.map(jnp.asarray, params)
    places = {name: NamedSharding(mesh, spec) for name, spec in PLACES.items()}
    return jax.device_put(params, places)


def squared_error(params, batch):
    return jnp.mean((batch @ params["base"] * params["lora"] - 1) ** 2)


def make_batch():
    return jax.random.normal(jax.random.key(0), (16, 256))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("specs", [PLACES, None], ids=["param_specs", "no specs"])
def test_frozen_parameters_stay_bit_for_bit(kind, specs):
    mesh = make_mesh((4, 2), kind)
    tx = signax.DataParallel(OPTIMIZER, mesh, param_specs=specs)
    # Without specs, Auto axes hide the sharding from DataParallel.
    params = make_params(mesh if specs or kind == AxisType.Explicit else None)
    before = jax.tree.map(np.asarray, params)
    step, state = tx.train_step(squared_error), tx.init(params)
    for _ in range(2):
        params, state, _ = step(params, state, make_batch())
    np.testing.assert_array_equal(params["base"], before["base"])
    np.testing.assert_array_less(0.1, np.abs(params["lora"] - before["lora"]).max())


def test_frozen_leaves_have_no_state():
    tx = signax.DataParallel(OPTIMIZER, make_mesh((4,)))
    state = tx.init(make_params())
    large = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.size > 8]
    assert large == [(4, *SHAPES["lora"])]  # the momentum of the voted leaf


def compile_update(tx, mesh):
    def described(leaf, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    params = jax.tree.map(described, make_params(), PLACES)
    rows = {
        name: jax.ShapeDtypeStruct(
            (4, *SHAPES[name]),
            jnp.float32,
            sharding=NamedSharding(mesh, PartitionSpec("data", *PLACES[name])),
        )
        for name in SHAPES
    }
    return jax.jit(tx.update).lower(rows, tx.abstract_state(params), params).compile()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_no_bit_is_sent_for_frozen_leaves(kind):
    mesh = make_mesh((4, 2), kind)
    partly = compile_update(signax.DataParallel(OPTIMIZER, mesh, param_specs=PLACES), mesh)
    whole = signax.signum(0.125, axis_name="data")
    everything = compile_update(signax.DataParallel(whole, mesh, param_specs=PLACES), mesh)
    block = jax.ShapeDtypeStruct((64,), jnp.float32)  # of lora, on one of two devices
    words = diagnostics.wire_bytes(block, 4)
    sent = diagnostics.collective_bytes(partly)
    # Each worker's devices exchange flags besides the words.
    assert words <= sent <= words + 64
    assert diagnostics.collective_bytes(everything) > 2 * sent


@pytest.mark.parametrize("leaf", ["base", "lora"])
def test_a_nan_in_any_gradient_excludes_the_worker(leaf):
    tx = signax.DataParallel(OPTIMIZER, make_mesh((4,)))
    params = make_params()
    rows = jax.tree.map(lambda p: jnp.ones((4, *p.shape)), params)
    rows[leaf] = rows[leaf].at[1, 0].set(jnp.nan)
    updates, state = jax.jit(tx.update)(rows, tx.init(params), params)
    assert signax.participation(state).missed.tolist() == [0, 1, 0, 0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert not updates["base"].any()


def test_stop_gradient_spares_the_gradient_of_frozen_leaves():
    """The largest product of the backward pass, of shape [256, 128], is not computed."""

    def frozen_error(params, batch):
        return squared_error({**params, "base": jax.lax.stop_gradient(params["base"])}, batch)

    tx = signax.DataParallel(OPTIMIZER, make_mesh((4,)))
    params = make_params()
    arguments = params, tx.init(params), make_batch()

    def flops(loss_fn):
        costs = tx.train_step(loss_fn).lower(*arguments).compile().cost_analysis()
        assert costs is not None
        return costs["flops"]

    product = 2 * 4 * 256 * 128  # of the four examples of a worker
    assert flops(squared_error) - flops(frozen_error) > 0.9 * product


def test_zeros_keep_shapes_dtypes_and_structure():
    updates = {
        "a": jnp.full((2, 3), jnp.nan),
        "b": (jnp.ones((), jnp.bfloat16), None, optax.MaskedNode()),
    }
    tx = signax.freeze()
    found, state = tx.update(updates, tx.init(updates))
    assert jax.tree.structure(found) == jax.tree.structure(updates)
    assert state == optax.EmptyState()
    for zero, leaf in zip(jax.tree.leaves(found), jax.tree.leaves(updates), strict=True):
        assert (zero.shape, zero.dtype) == (leaf.shape, leaf.dtype)
        assert not zero.any()


def test_zeros_do_not_vary_and_keep_explicit_shardings():
    mesh = make_mesh((4, 2), AxisType.Explicit)
    spec = PartitionSpec(None, "model")

    def of_worker(row):
        updates, _ = signax.freeze().update(row, optax.EmptyState())
        assert jax.typeof(updates).manual_axis_type.varying == frozenset()
        return updates

    rows = jax.device_put(jnp.ones((4, 6)), NamedSharding(mesh, PartitionSpec("data", "model")))
    mapped = jax.shard_map(
        of_worker,
        mesh=mesh,
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec(),
        axis_names={"data"},
    )
    assert jax.jit(mapped)(rows).sharding.spec == spec
