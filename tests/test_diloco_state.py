"""States of DiLoCo: how they begin, checkpoints, other numbers of workers, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from diloco_runs import AVERAGE, NESTEROV, VOTE, batches, make, run
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from least_squares import (
    PARAMS,
    assert_trees_close,
    assert_trees_equal,
    make_mesh,
    squared_error,
)
from workers import auto_mesh

import signax

# States: how they begin, checkpoints, and other numbers of workers.


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_state_lies_as_state_shardings_say_before_and_after_a_step(kind):
    tx = make(signax.mean_quantized("data"), mesh=make_mesh((4,), kind), num_fragments=2)
    state, like = tx.init(PARAMS), tx.abstract_state(PARAMS)
    assert jax.tree.structure(state) == jax.tree.structure(like)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
        assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
        assert leaf.sharding == wanted.sharding
    step = tx.train_step(squared_error)
    for batch in batches(5):
        state, _ = step(state, batch)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
        assert leaf.sharding == wanted.sharding
    assert step._cache_size() == 1


def test_a_state_can_be_made_in_a_compiled_program():
    tx = make(VOTE, inner=optax.adamw(0.1))
    made = jax.jit(tx.init, out_shardings=tx.state_shardings(PARAMS))(PARAMS)
    assert_trees_equal(made, tx.init(PARAMS))


def test_a_step_donates_the_state_and_not_the_initial_parameters():
    tx = make()
    params = jax.device_put(PARAMS, NamedSharding(tx.mesh, PartitionSpec()))
    state = tx.init(params)
    tx.train_step(squared_error)(state, batches(1)[0])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.own, state.params)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("num_fragments", [1, 2])
def test_a_run_restored_in_the_middle_of_a_round_continues_bit_for_bit(num_fragments, tmp_path):
    options = {"inner": optax.adamw(0.1), "num_fragments": num_fragments}
    tx, given = make(signax.mean_quantized("data"), 4, **options), batches(12)
    saved, _ = run(tx, tx.init(PARAMS), given[:5])
    expected, losses = run(tx, saved, given[5:])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", saved)
    tx = make(signax.mean_quantized("data"), 4, **options)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "state", tx.abstract_state(PARAMS))
    assert_trees_equal(restored, saved)
    found, again = run(tx, restored, given[5:])
    assert_trees_equal(found, expected)
    assert losses == again


def test_a_resize_in_the_middle_of_a_round_deals_out_the_workers_progress():
    options = {"num_local_steps": 4, "inner": optax.sgd(1 / 16, momentum=0.5)}
    four, two = (make(signax.mean_quantized("data"), workers=m, **options) for m in (4, 2))
    state, _ = run(four, four.init(PARAMS), batches(6))
    assert state.count % 4 == 2
    halved = two.resize(state)

    def pairs(leaf):
        return np.asarray(leaf).reshape(2, 2, *leaf.shape[1:]).mean(axis=1)

    assert_trees_close(halved.own, jax.tree.map(pairs, state.own))
    assert_trees_close(halved.inner[0].trace, jax.tree.map(pairs, state.inner[0].trace))
    memories = [optax.tree.get(s.outer, "memory").worker for s in (state, halved)]
    assert_trees_close(memories[1], jax.tree.map(pairs, memories[0]))
    assert_trees_equal(
        (halved.params, halved.count, halved.synced), (state.params, state.count, state.synced)
    )
    with pytest.raises(ValueError, match="rows for 4 workers, but there are 2"):
        two.train_step(squared_error)(state, batches(1, 2)[0])
    step = two.train_step(squared_error)
    moved, _ = step(jax.tree.map(jnp.copy, halved), batches(1, 2)[0])
    assert moved.count % 4 == 3
    again = four.resize(moved)
    assert_trees_equal(again.own, jax.tree.map(lambda leaf: np.repeat(leaf, 2, 0), moved.own))
    state, losses = run(four, again, batches(20, seed=1))
    assert signax.participation(state).voters == 4
    assert losses[-1] < losses[0]
    like = two.abstract_state(PARAMS, 4)
    assert jax.tree.map(jnp.shape, like) == jax.tree.map(jnp.shape, state)


def test_a_mean_over_workers_is_not_changed_by_a_resize():
    """Two workers with the mean of two progresses each send the mean that four would send."""
    four, two = (make(AVERAGE, workers=m) for m in (4, 2))
    local_step, state = four.local_step(squared_error), four.init(PARAMS)
    for batch in batches(3):
        _, state = local_step(state, batch)
    assert_trees_close(two.sync(two.resize(state)).params, four.sync(state).params)


# Errors.


def test_rejects_numbers_of_steps_and_fragments_that_do_not_fit():
    with pytest.raises(ValueError, match=r"num_local_steps=0 must be at least 1"):
        make(num_local_steps=0)
    with pytest.raises(TypeError, match=r"num_local_steps=2\.5 must be a whole number"):
        make(num_local_steps=2.5)
    with pytest.raises(ValueError, match=r"num_fragments=0 must be at least 1"):
        make(num_fragments=0)
    with pytest.raises(ValueError, match=r"num_fragments=3 exceeds num_local_steps=2"):
        make(num_local_steps=2, num_fragments=3)
    with pytest.raises(ValueError, match=r"num_fragments=3 exceeds the number of leaves.* 2"):
        make(num_fragments=3).init(PARAMS)


@pytest.mark.parametrize("name", ["inner", "outer"])
def test_rejects_values_that_are_no_transformation_of_one_worker(name, mesh):
    options = {"inner": optax.sgd(0.1), "outer": VOTE, "mesh": mesh, "num_local_steps": 2}
    with pytest.raises(TypeError, match=f"{name}=.*is not a gradient transformation"):
        signax.DiLoCo(**{**options, name: optax.sgd})
    wrapped = signax.DataParallel(VOTE, mesh)
    with pytest.raises(TypeError, match=f"{name}=.*is a DataParallel itself"):
        signax.DiLoCo(**{**options, name: wrapped})


def test_an_outer_optimizer_without_an_exchange_is_rejected_at_init(mesh):
    tx = signax.DiLoCo(optax.sgd(0.1), NESTEROV, mesh, num_local_steps=500)
    with pytest.raises(ValueError, match=r"outer neither votes nor averages over 'data'.*Put"):
        tx.init(PARAMS)
    one_leaf = optax.masked(AVERAGE, {"w": True, "b": False})
    tx = signax.DiLoCo(optax.sgd(0.1), one_leaf, mesh, num_local_steps=500)
    with pytest.raises(ValueError, match="at least for one leaf"):
        tx.init(PARAMS)


def test_an_inner_optimizer_with_an_exchange_is_rejected_at_init(mesh):
    for inner in (signax.signum(0.1, axis_name="data"), optax.chain(AVERAGE, optax.adam(0.1))):
        tx = signax.DiLoCo(inner, VOTE, mesh, num_local_steps=500)
        with pytest.raises(ValueError, match=r"inner exchanges values between workers.*into outer"):
            tx.init(PARAMS)


def test_rejects_parameters_that_are_not_floating_point():
    with pytest.raises(TypeError, match=r"params\['n'\] has dtype int32"):
        make().init({"n": jnp.zeros(3, jnp.int32)})


def test_rejects_a_mesh_without_the_axis():
    with pytest.raises(ValueError, match="'data' is not an axis of the mesh"):
        make(mesh=auto_mesh({"model": 2}))


def test_rejects_rows_that_are_pinned_to_another_sharding():
    tx = make()
    state, (batch,) = tx.init(PARAMS), batches(1)
    whole = jax.tree.map(lambda _: NamedSharding(tx.mesh, PartitionSpec()), state)
    pinned = jax.jit(tx.local_step(squared_error), in_shardings=(whole, None))
    with pytest.raises(ValueError, match=r"state\.own\['b'\] is pinned to"):
        pinned(jax.device_put(state, whole), batch)
