"""State on a mesh, and `resize`: states for another number of workers."""

import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from jax.sharding import AxisType, PartitionSpec
from processes import free_address
from workers import auto_mesh

import signax
from signax._data_parallel.state import resize_rows

PARAMS = {"matrix": jnp.zeros((5, 7)), "number": jnp.zeros(()), "none": jnp.zeros((0, 2))}


def data_parallel(num_workers, tx=None, **options):
    tx = signax.ef_sign_sgd(0.1, 0.9, axis_name="data") if tx is None else tx
    return signax.DataParallel(tx, auto_mesh({"data": num_workers}), **options)


def gradients(num_workers, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.standard_normal((num_workers, *p.shape)), p.dtype), PARAMS
    )


def state_after_steps(tx, steps=3):
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for seed in range(steps):
        _, state = update(gradients(tx.num_workers, seed), state, PARAMS)
    return state


def dealt_out(rows, num_workers):
    """Means over equal parts of a line on which each old row has an equal part."""
    edges = np.linspace(0, len(rows), num_workers + 1)
    new = []
    for start, stop in itertools.pairwise(edges):
        overlap = [max(0, min(stop, i + 1) - max(start, i)) for i in range(len(rows))]
        new.append(np.tensordot(overlap, rows, 1) / (stop - start))
    return np.array(new)


@pytest.mark.parametrize("old", [1, 2, 3, 8])
@pytest.mark.parametrize("new", [1, 4, 6, 16])
def test_resized_numbers_keep_their_mean(old, new):
    rows = np.random.default_rng(old).standard_normal((old, 3, 2))
    found = np.asarray(resize_rows(jnp.asarray(rows, jnp.float32), new), np.float64)
    np.testing.assert_allclose(found, dealt_out(rows, new), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.mean(axis=0), rows.mean(axis=0), rtol=1e-5, atol=1e-6)


def test_doubled_workers_start_as_copies():
    rows = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5)), jnp.float32)
    np.testing.assert_array_equal(resize_rows(rows, 6), np.repeat(rows, 2, axis=0))


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("new", [2, 4, 9])
def test_resized_keys_are_distinct(raw, new):
    keys = jax.random.split(jax.random.key(0), 4)
    rows = jax.random.key_data(keys) if raw else keys
    found = resize_rows(rows, new)
    data = np.asarray(found if raw else jax.random.key_data(found))
    assert data.shape == (new, 2)
    assert found.dtype == rows.dtype
    for worker, key in enumerate(data):
        expected = jax.random.fold_in(keys[worker * 4 // new], worker)
        np.testing.assert_array_equal(key, jax.random.key_data(expected))
    together = np.concatenate([data, np.asarray(jax.random.key_data(keys))])
    assert len(np.unique(together, axis=0)) == new + 4


def test_two_uint32_counters_do_not_count_as_a_key():
    """u32[2] holds two numbers of two workers, not one raw key."""
    np.testing.assert_array_equal(resize_rows(jnp.array([3, 5], jnp.uint32), 4), [3, 3, 5, 5])


def test_resized_integers_are_copied():
    np.testing.assert_array_equal(resize_rows(jnp.array([3, 5]), 4), [3, 3, 5, 5])
    np.testing.assert_array_equal(resize_rows(jnp.array([True, False, False, True]), 2), [1, 0])


@pytest.mark.parametrize("new", [1, 4, 6, 9])
def test_resize_keeps_momentum_and_the_memories_of_workers_and_servers(new):
    old = data_parallel(8)
    state = state_after_steps(old)
    tx = data_parallel(new)
    resized = tx.resize(state, PARAMS)
    expected = tx.init(PARAMS)
    assert jax.tree.map(jnp.shape, resized) == jax.tree.map(jnp.shape, expected)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, resized)
    assert shardings == jax.tree.map(lambda leaf: leaf.sharding, expected)
    for field in ("trace", "worker"):
        before, after = optax.tree.get(state, field), optax.tree.get(resized, field)
        for name in PARAMS:
            rows = np.asarray(before[name], np.float64)
            np.testing.assert_allclose(after[name], dealt_out(rows, new), rtol=1e-5, atol=1e-6)
    before, after = optax.tree.get(state, "server"), optax.tree.get(resized, "server")
    for name, leaf in PARAMS.items():
        if not leaf.size:
            continue
        kept = np.reshape(before[name], (8, -1))[references.servers(leaf.shape, 8)]
        found, places = np.reshape(after[name], (new, -1)), references.servers(leaf.shape, new)
        np.testing.assert_array_equal(found[places], kept)
        assert np.count_nonzero(found) == np.count_nonzero(kept)
        assert leaf.size == 1 or np.any(kept)
    assert int(optax.tree.get(resized, "count")) == int(optax.tree.get(state, "count")) == 3
    jax.jit(tx.update)(gradients(new, 5), resized, PARAMS)


@pytest.mark.parametrize(("new", "columns"), [(2, 20), (4, 10)])
def test_memories_of_servers_fit_the_mesh_whatever_num_workers_says(new, columns):
    params = {"w": jnp.zeros((40, 30))}  # 38 columns of 32, an even number of them for each server
    optimizer = signax.ef_sign_sgd(0.1, axis_name="data", num_workers=8)
    old, tx = data_parallel(8, optimizer), data_parallel(new, optimizer)
    resized = tx.resize(old.init(params), params)
    for state in (resized, tx.init(params), old.abstract_state(params, new)):
        assert optax.tree.get(state, "server")["w"].shape == (new, 32, columns)
    jax.jit(tx.update)({"w": jnp.ones((new, 40, 30))}, resized, params)


def test_resize_works_without_memories_of_servers():
    optimizer = signax.ef_sign_sgd(0.1, axis_name="data", feedback="worker")
    old, tx = data_parallel(8, optimizer), data_parallel(4, optimizer)
    state = state_after_steps(old)
    resized = tx.resize(state, PARAMS)
    before, after = optax.tree.get(state, "worker"), optax.tree.get(resized, "worker")
    for name in PARAMS:
        rows = np.asarray(before[name], np.float64)
        np.testing.assert_allclose(after[name], dealt_out(rows, 4), rtol=1e-5, atol=1e-6)
    assert optax.tree.get(resized, "server") is None
    jax.jit(tx.update)(gradients(4, 5), resized, PARAMS)


def test_resize_to_the_same_number_changes_nothing():
    tx = data_parallel(4)
    state = state_after_steps(tx)
    jax.tree.map(np.testing.assert_array_equal, tx.resize(state, PARAMS), state)


def test_resize_to_one_row_and_back_keeps_the_mean():
    tx = data_parallel(4, signax.signum(0.1, axis_name="data"))
    state = state_after_steps(tx)
    small = tx.resize(state, PARAMS, 1)
    assert optax.tree.get(small, "momentum")["matrix"].shape == (1, 5, 7)
    back = optax.tree.get(tx.resize(small, PARAMS), "momentum")["matrix"]
    mean = np.mean(optax.tree.get(state, "momentum")["matrix"], axis=0)
    np.testing.assert_allclose(back, np.broadcast_to(mean, (4, 5, 7)), rtol=1e-6)


def test_resize_leaves_shared_state_unchanged():
    tx = data_parallel(2, signax.ssdm(0.1, jax.random.key(3), axis_name="data"))
    state = tx.init(PARAMS)
    resized = data_parallel(5, signax.ssdm(0.1, jax.random.key(3), axis_name="data")).resize(
        state, PARAMS
    )
    key, same = optax.tree.get(state, "key"), optax.tree.get(resized, "key")
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(same))
    plain = data_parallel(3, signax.sign_sgd(0.1, axis_name="data"))
    state = plain.init(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, plain.resize(state, PARAMS), state)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_resize_keeps_parameters_sharded(kind):
    def make(num_workers):
        mesh = jax.make_mesh(
            (num_workers, 2),
            ("data", "model"),
            axis_types=(kind, kind),
            devices=jax.devices()[: 2 * num_workers],
        )
        specs = {"kernel": PartitionSpec(None, "model")}
        return signax.DataParallel(signax.signum(0.1, axis_name="data"), mesh, param_specs=specs)

    params = {"kernel": jnp.zeros((3, 4))}
    old, tx = make(4), make(2)
    resized = tx.resize(old.init(params), params)
    assert jax.tree.map(lambda leaf: leaf.sharding, resized) == tx.state_shardings(params)


def test_abstract_state_has_the_shapes_and_shardings_of_the_state():
    tx = data_parallel(4)
    state = tx.init(PARAMS)
    abstract = tx.abstract_state(PARAMS)
    same = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )
    assert jax.tree.leaves(abstract) == jax.tree.leaves(same)
    assert jax.tree.structure(abstract) == jax.tree.structure(same)
    other = tx.abstract_state(PARAMS, 6)
    shapes = jax.tree.map(jnp.shape, data_parallel(6).init(PARAMS))
    assert jax.tree.map(lambda leaf: leaf.shape, other) == shapes


def test_rejects_a_state_that_does_not_fit():
    tx = data_parallel(4)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="num_workers=0 must be at least 1"):
        tx.resize(state, PARAMS, 0)
    with pytest.raises(ValueError, match="num_workers=-1 must be at least 1"):
        tx.abstract_state(PARAMS, -1)
    with pytest.raises(TypeError, match=r"num_workers=4\.0 must be a whole number"):
        tx.abstract_state(PARAMS, 4.0)
    with pytest.raises(ValueError, match="do not belong together"):
        tx.resize(state, {"other": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"has shape \(4, 5, 7\), but should have \(4, 7, 5\)"):
        tx.resize(state, {**PARAMS, "matrix": jnp.zeros((7, 5))})
    with pytest.raises(ValueError, match=r"rows for 4 workers.*DataParallel\.resize"):
        data_parallel(2).update(gradients(2, 0), state, PARAMS)


ONE_OF_TWO_PROCESSES = """
import sys
import jax, jax.numpy as jnp, numpy as np, optax, signax

jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
tx = signax.DataParallel(signax.ssdm(0.1, jax.random.key(7), axis_name="data"), mesh)
params = jax.jit(lambda: jnp.zeros(3), out_shardings=jax.NamedSharding(mesh, jax.P()))()
for num_workers in (8, 2):
    state = tx.resize(tx.init(params), params, num_workers)
    assert {leaf.shape for leaf in jax.tree.leaves(state)} >= {(), (num_workers, 3)}
    key = jax.random.key_data(optax.tree.get(state, "key"))
    np.testing.assert_array_equal(key, jax.random.key_data(jax.random.key(7)))
    assert key.sharding.num_devices == 4
"""


def test_resize_works_across_processes():
    coordinator = free_address()
    processes = [
        subprocess.Popen([sys.executable, "-c", ONE_OF_TWO_PROCESSES, coordinator, index])
        for index in "01"
    ]
    try:
        assert [process.wait(300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("num_workers", [1, 2, 3, 16])
def test_resize_works_for_numbers_that_the_transformation_does_not_support(num_workers):
    attack = signax.testing.adversary("data", [7], "invert")
    tx = data_parallel(8, optax.chain(attack, signax.signum(0.1, axis_name="data", agreement=True)))
    state = state_after_steps(tx)
    found = tx.resize(state, PARAMS, num_workers)
    abstract = tx.abstract_state(PARAMS, num_workers)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, abstract)
    for field in ("share", "opposition"):
        before, after = (np.asarray(optax.tree.get(tree, field)) for tree in (state, found))
        np.testing.assert_allclose(after, dealt_out(before, num_workers), rtol=1e-6)
