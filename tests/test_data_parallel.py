"""DataParallel: construction, the state that `init` makes, and the arguments of `update`."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from least_squares import (
    PARAMS,
    SIGN_SGD,
    SIGNUM,
    VOTE,
    WORKERS,
    assert_trees_equal,
    is_placed_as,
    make_mesh,
    rows_of,
)
from workers import auto_mesh

import signax

# Construction.


def test_rejects_a_mesh_without_the_axis(mesh):
    with pytest.raises(ValueError, match=r"axis_name='workers'.*\('data',\)"):
        signax.DataParallel(SIGNUM, mesh, "workers")


@pytest.mark.parametrize("axis_name", [None, (), ["data"]])
def test_rejects_an_invalid_axis_name(axis_name, mesh):
    with pytest.raises(TypeError, match="axis_name=") as error:
        signax.DataParallel(SIGNUM, mesh, axis_name)
    assert repr(axis_name) in str(error.value)


def test_rejects_axes_of_both_types():
    types = (AxisType.Auto, AxisType.Explicit)
    mesh = jax.make_mesh((2, 4), ("host", "chip"), axis_types=types)
    with pytest.raises(ValueError, match="Auto and of type Explicit"):
        signax.DataParallel(SIGNUM, mesh, ("host", "chip"))
    signax.DataParallel(SIGNUM, mesh, "host")


def test_rejects_an_optimizer_of_another_axis(mesh):
    tx = signax.DataParallel(signax.signum(0.1, axis_name="batch"), mesh)
    with pytest.raises(NameError, match="'batch' is not bound") as error:
        tx.init(PARAMS)
    for way in ("DataParallel", "shard_map", "pmap", "vmap"):
        assert way in str(error.value)


def test_rejects_an_invalid_mesh():
    with pytest.raises(TypeError, match="mesh=None"):
        signax.DataParallel(VOTE, None)


def test_rejects_a_required_extra_argument(mesh):
    def update(updates, state, params=None, *, value, **extra_args):
        del params, value, extra_args
        return updates, state

    inner = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    with pytest.raises(TypeError, match=r"'value'.*give every extra argument a default"):
        signax.DataParallel(optax.chain(VOTE, inner), mesh).init(jnp.ones(2))


def test_rejects_a_transformation_that_accepts_only_some_extra_arguments():
    def update_fn(updates, state, params=None, *, value=None):
        del params, value
        return updates, state

    strict = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)
    plain = optax.GradientTransformation(
        strict.init, lambda updates, state, params=None: (updates, state)
    )
    with pytest.raises(TypeError, match=r"unexpected keyword.*by \*\*extra_args"):
        signax.DataParallel(optax.chain(strict, VOTE), auto_mesh({"data": 2})).init(PARAMS)
    signax.DataParallel(optax.chain(plain, VOTE), auto_mesh({"data": 2})).init(PARAMS)


@pytest.mark.parametrize(
    ("tx", "name"), [(VOTE, "majority_vote"), (optax.chain(VOTE, optax.scale(0.1)), "chain")]
)
def test_repr_names_the_transformation_the_axis_and_the_workers(tx, name, mesh):
    text = repr(signax.DataParallel(tx, mesh))
    assert text == f"DataParallel({name}(...), axis_name='data', num_workers=8)"


def test_unpacks_into_init_and_update(mesh):
    tx = signax.DataParallel(SIGN_SGD, mesh)
    init, update = tx
    state = init(PARAMS)
    assert_trees_equal(state, tx.init(PARAMS))
    found = update(rows_of(), state, PARAMS)
    assert_trees_equal(found, tx.update(rows_of(), state, PARAMS))


def test_is_an_aggregator_of_optax(mesh):
    experimental = pytest.importorskip("optax.experimental")
    aggregating = getattr(experimental, "aggregating", None)
    if not hasattr(aggregating, "Aggregator"):
        pytest.skip("this Optax has no aggregators")
    tx = signax.DataParallel(VOTE, mesh)
    assert isinstance(tx, aggregating.Aggregator)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)


def test_rejects_replacing_a_field(mesh):
    tx = signax.DataParallel(VOTE, mesh)
    with pytest.raises(TypeError, match=r"cannot replace update: make another"):
        tx._replace(update=VOTE.update)


def test_copies_return_the_same_transformation(mesh):
    tx = signax.DataParallel(VOTE, mesh)
    assert copy.copy(tx) is tx
    assert copy.deepcopy({"tx": tx})["tx"] is tx


def test_rejects_pickling(mesh):
    with pytest.raises(TypeError, match=r"DataParallel cannot be pickled.*make another one"):
        pickle.dumps(signax.DataParallel(VOTE, mesh))


# The state.


@pytest.mark.parametrize("wrap", [lambda init: init, jax.jit], ids=["outside jit", "inside jit"])
def test_init_gives_each_worker_a_row_and_shares_the_rest(wrap, mesh):
    state = wrap(signax.DataParallel(SIGNUM, mesh).init)(PARAMS)
    direction, vote = state[0]
    row, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data",), ()))
    for name, leaf in direction.momentum.items():
        assert leaf.shape == (WORKERS, *PARAMS[name].shape)
        assert leaf.dtype == PARAMS[name].dtype
        assert is_placed_as(leaf, row)
    for count in (direction.count, vote.count):
        assert count.shape == ()
        assert is_placed_as(count, whole)
    for leaf in jax.tree.leaves(state):
        assert leaf.sharding.device_set == set(mesh.devices.flat)


SCHEDULED = optax.chain(
    optax.trace(0.9),
    SIGNUM,
    optax.trace(0.9),
    optax.scale_by_schedule(lambda count: 1 / (1 + count)),
)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("abstract", [False, True], ids=["parameters", "their shapes"])
def test_state_shardings_match_init(abstract, kind):
    tx = signax.DataParallel(SCHEDULED, make_mesh(kind=kind))
    params = jax.eval_shape(lambda: PARAMS) if abstract else PARAMS
    shardings = tx.state_shardings(params)
    state = tx.init(PARAMS)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    assert all(jax.tree.leaves(jax.tree.map(is_placed_as, state, shardings)))


def test_state_shardings_are_valid_out_shardings(mesh):
    tx = signax.DataParallel(SCHEDULED, mesh)
    shardings = tx.state_shardings(PARAMS)
    update = jax.jit(tx.update, out_shardings=(None, shardings))
    _, state = update(rows_of(), tx.init(PARAMS), PARAMS)
    assert all(jax.tree.leaves(jax.tree.map(is_placed_as, state, shardings)))


def test_an_update_keeps_shapes_dtypes_and_shardings_of_the_state(mesh):
    tx = signax.DataParallel(SCHEDULED, mesh)
    state = tx.init(PARAMS)
    _, updated = jax.jit(tx.update)(rows_of(), state, PARAMS)
    assert jax.tree.map(jax.typeof, updated) == jax.tree.map(jax.typeof, state)
    assert all(
        is_placed_as(new, old.sharding)
        for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(updated), strict=True)
    )


def test_rejects_integer_leaves_by_name(mesh):
    tx = signax.DataParallel(SIGNUM, mesh)
    with pytest.raises(TypeError, match=r"params\['n'\] has dtype int32.*optax.masked"):
        tx.init({"w": jnp.ones(2), "n": jnp.ones(2, int)})
    grads = {**rows_of(), "b": jnp.ones((WORKERS, 2), int)}
    with pytest.raises(TypeError, match=r"updates\['b'\] has dtype int32.*optax.masked"):
        tx.update(grads, tx.init(PARAMS), PARAMS)


# Arguments of an update.


def test_rejects_gradients_without_rows(mesh):
    tx = signax.DataParallel(SIGNUM, mesh)
    with pytest.raises(ValueError, match=r"use the gradients of .*value_and_grad") as error:
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert "updates['b']" in str(error.value)
    assert "(2,)" in str(error.value)
    assert "8 workers" in str(error.value)


def test_rejects_gradients_of_another_number_of_workers(mesh):
    tx = signax.DataParallel(SIGNUM, mesh)
    with pytest.raises(ValueError, match=r"updates\['b'\] has shape \(4, 2\).* 8 workers"):
        tx.update(rows_of(workers=4), tx.init(PARAMS), PARAMS)


def test_rejects_updates_of_another_structure(mesh):
    tx = signax.DataParallel(SIGNUM, mesh)
    with pytest.raises(ValueError, match="updates and params differ in structure"):
        tx.update({"w": rows_of()["w"]}, tx.init(PARAMS), PARAMS)


def test_rejects_a_state_of_another_structure(mesh):
    tx = signax.DataParallel(SIGNUM, mesh)
    state = signax.DataParallel(SIGN_SGD, mesh).init(PARAMS)
    with pytest.raises(ValueError, match="state and params do not belong together"):
        tx.update(rows_of(), state, PARAMS)


def test_rejects_a_state_of_another_number_of_workers(mesh):
    state = signax.DataParallel(SIGNUM, make_mesh((4,))).init(PARAMS)
    with pytest.raises(ValueError, match="rows for 4 workers, but there are 8") as error:
        signax.DataParallel(SIGNUM, mesh).update(rows_of(), state, PARAMS)
    assert "momentum['b']" in str(error.value)


def test_rejects_a_state_of_one_worker(mesh):
    with pytest.raises(ValueError, match=r"momentum\['b'\] has shape \(2,\).* \(8, 2\)"):
        signax.DataParallel(SIGNUM, mesh).update(rows_of(), SIGNUM.init(PARAMS), PARAMS)


def test_rejects_a_state_without_rows_for_scalar_parameters(mesh):
    inner = signax.signum(0.1, axis_name="data")
    params = {"b": jnp.zeros(())}
    with pytest.raises(ValueError, match=r"momentum\['b'\] has shape \(\), but should have \(8,\)"):
        signax.DataParallel(inner, mesh).update({"b": jnp.ones(8)}, inner.init(params), params)


@pytest.mark.parametrize("active", [True, jnp.ones(4, bool), jnp.ones(16, bool)], ids=np.shape)
def test_rejects_active_flags_of_another_shape(active, mesh):
    tx = signax.DataParallel(SIGNUM, mesh)
    with pytest.raises((TypeError, ValueError), match="active") as error:
        tx.update(rows_of(), tx.init(PARAMS), PARAMS, active=active)
    assert repr(active) in str(error.value)
    assert "8 workers" in str(error.value)


@pytest.mark.parametrize("active", [[True] * 8, np.ones(7, bool), np.ones(8), "yes"])
def test_rejects_active_flags_that_are_not_one_boolean_for_each_worker(active, mesh):
    tx = signax.DataParallel(VOTE, mesh)
    params = jnp.ones(2)
    with pytest.raises(TypeError, match=r"active=.*one boolean for each of 8 workers"):
        tx.update(jnp.ones((8, 2)), tx.init(params), params, active=active)
