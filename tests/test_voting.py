"""The vote and the mean as transformations."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from workers import AXIS, MAPS, on_workers

import signax


def apply(tx, **extra):
    """One worker's update from a fresh state."""

    def update(updates, active=None):
        keywords = extra if active is None else {**extra, "active": active}
        return tx.update(updates, tx.init(updates), **keywords)[0]

    return update


@pytest.mark.parametrize("zeros", ["dither", "abstain", "plus"])
@pytest.mark.parametrize("num_workers", [1, 4, 5])
def test_a_vote_counts_its_own_steps(num_workers, zeros):
    tx = signax.majority_vote(AXIS, zeros=zeros)
    rng = np.random.default_rng(0)
    update = jax.jit(jax.vmap(tx.update, axis_name=AXIS))
    states = jax.vmap(lambda _: tx.init(None))(jnp.arange(num_workers))
    for step in range(20):
        rows = rng.choice([-1.0, 0.0, 1.0], size=(num_workers, 40)).astype(np.float32)
        decided, states = update(jnp.asarray(rows), states)
        expected = references.vote(rows, step, zeros)
        np.testing.assert_array_equal(decided, np.broadcast_to(expected, rows.shape))
    np.testing.assert_array_equal(states.count, 20)


def test_the_active_argument_reaches_a_vote_inside_a_chain():
    tx = optax.chain(optax.clip(1.0), signax.majority_vote(AXIS), optax.scale(2.0))
    rows = jnp.array([[1.0], [-1.0], [-1.0]])
    decided = on_workers("vmap", apply(tx), 3)(rows, jnp.array([True, False, False]))
    np.testing.assert_array_equal(decided, [2.0])


@pytest.mark.parametrize(
    ("kind", "num_workers"),
    [*(("vmap", number) for number in range(1, 10)), *itertools.product(MAPS[:2], (1, 2, 7))],
)
def test_a_mean_equals_the_reference_with_any_number_of_workers_out(kind, num_workers):
    # Sums of whole numbers are exact in any order. XLA may divide by multiplying with the
    # reciprocal, which rounds twice.
    rows = np.random.default_rng(num_workers).integers(-99, 100, (num_workers, 33))
    rows = jnp.asarray(rows, jnp.float32)
    mean = on_workers(kind, apply(signax.average_updates(AXIS)), num_workers)
    for out in range(num_workers + 1):
        active = jnp.arange(num_workers) >= out
        expected = references.mean(np.asarray(rows), np.asarray(active))
        np.testing.assert_allclose(mean(rows, active), expected, rtol=2**-22)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_mean_leaves_out_the_whole_tree_of_a_worker_that_is_not_finite(bad):
    rows = {"a": jnp.array([[1.0], [3.0], [100.0]]), "b": jnp.array([1.0, 3.0, bad])}
    mean = on_workers("vmap", apply(signax.average_updates(AXIS)), 3)(rows)
    np.testing.assert_array_equal(mean["a"], [2.0])
    np.testing.assert_array_equal(mean["b"], 2.0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_mean_of_narrow_numbers_is_rounded_once(dtype):
    # Sums of 1 + 1/128 would be rounded to even in bf16, and 8 times 60000 overflows f16.
    rows = jnp.full((8, 2), 60000.0 if dtype == jnp.float16 else 1 + 1 / 128, dtype)
    mean = on_workers("vmap", apply(signax.average_updates(AXIS)), 8)(rows)
    assert mean.dtype == dtype
    np.testing.assert_array_equal(mean, rows[0])


def test_leaves_of_different_kinds_are_voted_or_averaged():
    tx = optax.partition(
        {"vote": signax.majority_vote(AXIS), "mean": signax.average_updates(AXIS)},
        {"kernel": "vote", "bias": "mean"},
    )
    rows = {"kernel": jnp.array([[1.0], [2.0], [-9.0]]), "bias": jnp.array([[1.0], [2.0], [-9.0]])}
    updates = on_workers("vmap", apply(tx), 3)(rows)
    np.testing.assert_array_equal(updates["kernel"], [1.0])
    np.testing.assert_array_equal(updates["bias"], [-2.0])


@pytest.mark.parametrize("make", [signax.majority_vote, signax.average_updates])
def test_updates_that_types_know_to_be_equal_are_refused(make, mesh):
    whole = jax.sharding.PartitionSpec()
    update = jax.shard_map(apply(make("data")), mesh=mesh, in_specs=whole, out_specs=whole)
    with pytest.raises(ValueError, match=r"updates\['w'\] does not vary over axis 'data'"):
        jax.eval_shape(update, {"w": jnp.ones(3)})


@pytest.mark.parametrize("option", ["zeros", "ties", "transport"])
def test_unknown_modes_are_refused_when_the_vote_is_made(option):
    with pytest.raises(ValueError, match=f"{option}='often'"):
        signax.majority_vote(AXIS, **{option: "often"})


@pytest.mark.parametrize("make", [signax.majority_vote, signax.average_updates])
@pytest.mark.parametrize("axis_name", [None, ("data", "model")])
def test_what_names_no_single_axis_is_refused_when_it_is_made(make, axis_name):
    with pytest.raises(TypeError, match="axis_name="):
        make(axis_name)
