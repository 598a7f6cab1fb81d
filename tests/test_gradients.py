"""Gradients of each worker's share of the batch, against one worker after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from least_squares import (
    PARAMS,
    SIGNUM,
    VOTE,
    WORKERS,
    assert_trees_close,
    assert_trees_equal,
    is_placed_as,
    make_batch,
    shares,
    squared_error,
)
from workers import auto_mesh

import signax


def test_rows_are_gradients_of_the_shares_of_the_batch(mesh):
    batch = make_batch()
    loss, grads = jax.jit(signax.DataParallel(SIGNUM, mesh).value_and_grad(squared_error))(
        PARAMS, batch
    )
    losses, expected = zip(
        *(jax.value_and_grad(squared_error)(PARAMS, share) for share in shares(batch)), strict=True
    )
    assert_trees_close(grads, jax.tree.map(lambda *leaves: np.stack(leaves), *expected))
    assert loss == pytest.approx(np.mean(losses), rel=1e-6)
    row = NamedSharding(mesh, PartitionSpec("data"))
    assert all(is_placed_as(leaf, row) for leaf in jax.tree.leaves(grads))


def test_a_loss_may_scan_from_a_constant_carry(mesh):
    tx = signax.DataParallel(VOTE, mesh)

    def recurrent(params, batch):
        def cell(hidden, column):
            return jnp.tanh(column[:, None] * params["w"] + hidden), None

        hidden, _ = jax.lax.scan(cell, jnp.zeros((len(batch), 1)), batch.T)
        return jnp.mean(hidden)

    params, batch = {"w": jnp.ones(3)}, jax.random.normal(jax.random.key(0), (16, 4))

    def widened(params, batch):
        return recurrent({"w": params["w"][:1]}, batch)

    _, grads = jax.jit(tx.value_and_grad(widened))(params, batch)
    for row, share in zip(grads["w"], batch.reshape(8, 2, 4), strict=True):
        np.testing.assert_allclose(row, jax.grad(widened)(params, share)["w"], rtol=1e-5)


def test_replicated_arguments_reach_every_worker_whole(mesh):
    def scaled(params, batch, table, factors):
        return jnp.mean(params * batch) * factors["f"], (table, factors)

    table, factors = jnp.arange(5), {"f": 2.0, "none": None}  # 5 rows for 8 workers
    gradient = signax.DataParallel(SIGNUM, mesh).value_and_grad(scaled, has_aux=True)
    (_, (tables, _)), grads = jax.jit(gradient)(jnp.ones(()), jnp.ones(WORKERS), table, factors)
    np.testing.assert_array_equal(tables, np.tile(table, (WORKERS, 1)))
    np.testing.assert_array_equal(grads, np.full(WORKERS, 2.0))


# Losses.


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_the_loss_is_the_mean_of_finite_losses(bad, mesh):
    tx = signax.DataParallel(VOTE, mesh)
    gradient = jax.jit(tx.value_and_grad(lambda params, batch: jnp.sum(batch * params)))
    loss, _ = gradient(jnp.ones(()), jnp.arange(8.0).at[3].set(bad))
    assert loss == (28 - 3) / 7
    assert jnp.isnan(gradient(jnp.ones(()), jnp.full(8, bad))[0])


def test_half_precision_losses_are_averaged_without_overflow():
    tx = signax.DataParallel(VOTE, auto_mesh({"data": WORKERS}))
    batch = jnp.full((WORKERS, 1), 3e4, jnp.float16)  # the sum overflows f16
    loss, _ = tx.value_and_grad(lambda p, b: jnp.sum(p * b))(jnp.ones(1, jnp.float16), batch)
    assert loss.dtype == jnp.float16
    assert loss == jnp.float16(3e4)


# Micro-batches.


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_accumulated_gradients_are_the_mean_over_micro_batches(accumulate, mesh):
    def weighted(params, batch):  # the gradient depends on how the batch is cut
        error = batch["x"] @ params["w"] + params["b"] - batch["y"]
        return jnp.max(error**2)

    batch = make_batch()
    tx = signax.DataParallel(SIGNUM, mesh)
    loss, grads = jax.jit(tx.value_and_grad(weighted, accumulate=accumulate))(PARAMS, batch)
    gradient = jax.jit(jax.value_and_grad(weighted))
    pieces = [gradient(PARAMS, piece) for piece in shares(batch, WORKERS * accumulate)]
    expected = jax.tree.map(
        lambda *leaves: np.stack(leaves).reshape(WORKERS, accumulate, *leaves[0].shape).mean(1),
        *(grads for _, grads in pieces),
    )
    assert_trees_close(grads, expected)
    assert loss == pytest.approx(np.mean([loss for loss, _ in pieces]), rel=1e-6)


def test_bf16_gradients_accumulate_in_f32(mesh):
    """In bf16 256 + 1 is 256: eight small micro-batches after a large one would not count."""
    batch = jnp.tile(jnp.array([256.0] + [1.0] * 8, jnp.bfloat16), WORKERS)
    tx = signax.DataParallel(SIGNUM, mesh)
    gradient = tx.value_and_grad(lambda p, x: jnp.mean(p * x), accumulate=9)
    _, grads = jax.jit(gradient)(jnp.bfloat16(1), batch)
    assert grads.dtype == jnp.bfloat16
    np.testing.assert_array_equal(grads, np.full(WORKERS, jnp.bfloat16(264 / 9)))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_bf16_parameters_have_bf16_gradients(accumulate, mesh):
    params, batch = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (PARAMS, make_batch()))
    tx = signax.DataParallel(SIGNUM, mesh)
    _, grads = jax.jit(tx.value_and_grad(squared_error, accumulate=accumulate))(params, batch)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(grads))
    exact = [
        jax.grad(squared_error)(*jax.tree.map(lambda x: x.astype(jnp.float32), (params, share)))
        for share in shares(batch)
    ]
    # Each product and sum is rounded to eight bits.
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *exact)
    assert_trees_close(grads, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("accumulate", "kind"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("2", TypeError)]
)
def test_rejects_an_invalid_number_of_micro_batches(accumulate, kind, mesh):
    with pytest.raises(kind, match=f"accumulate={accumulate!r} must be"):
        signax.DataParallel(SIGNUM, mesh).value_and_grad(squared_error, accumulate=accumulate)


def test_accepts_a_numpy_number_of_micro_batches(mesh):
    tx = signax.DataParallel(SIGNUM, mesh)
    found, expected = (
        jax.jit(tx.value_and_grad(squared_error, accumulate=number))(PARAMS, make_batch())
        for number in (np.int64(2), 2)
    )
    assert_trees_equal(found, expected)


@pytest.mark.parametrize(
    ("batch", "accumulate", "said"),
    [
        ({"x": jnp.ones((16, 3)), "y": jnp.ones(12)}, 1, [r"batch['y']", "(12,)", "8 workers"]),
        (jnp.ones((24, 3)), 2, ["batch", "(24, 3)", "8 workers", "accumulate=2"]),
        ((jnp.ones(()),), 1, ["batch[0]", "()", "8 workers"]),
    ],
    ids=["not divisible", "not divisible by micro-batches", "scalar"],
)
def test_rejects_a_batch_that_cannot_be_cut_evenly(batch, accumulate, said, mesh):
    gradient = signax.DataParallel(SIGNUM, mesh).value_and_grad(
        squared_error, accumulate=accumulate
    )
    with pytest.raises(ValueError, match="batch") as error:
        gradient(PARAMS, batch)
    assert all(words in str(error.value) for words in said)


# Auxiliary outputs and random keys.


@pytest.mark.parametrize("accumulate", [1, 2])
def test_aux_has_a_row_for_each_worker_and_micro_batch(accumulate, mesh):
    def loss_and_aux(params, batch):
        return squared_error(params, batch), {"first": batch["x"][0], "size": len(batch["x"])}

    batch = make_batch()
    gradient = signax.DataParallel(SIGNUM, mesh).value_and_grad(
        loss_and_aux, has_aux=True, accumulate=accumulate
    )
    (loss, aux), _ = jax.jit(gradient)(PARAMS, batch)
    rows = (WORKERS,) if accumulate == 1 else (WORKERS, accumulate)
    size = 32 // (WORKERS * accumulate)
    assert loss.shape == ()
    np.testing.assert_array_equal(aux["first"], batch["x"][::size].reshape(*rows, 3))
    np.testing.assert_array_equal(aux["size"], np.full(rows, size))
    assert is_placed_as(aux["first"], NamedSharding(mesh, PartitionSpec("data")))


def test_rejects_an_invalid_key(mesh):
    gradient = signax.DataParallel(VOTE, mesh).value_and_grad(jnp.sum)
    with pytest.raises(TypeError, match="key=0 is not a random key"):
        gradient(jnp.ones(2), jnp.ones(WORKERS), key=0)


def drawing(params, batch, key):
    return jnp.mean(params * batch), jax.random.bits(key)


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey], ids=["typed", "raw"])
def test_key_has_the_worker_folded_in(make_key, mesh):
    gradient = signax.DataParallel(SIGNUM, mesh).value_and_grad(drawing, has_aux=True)
    (_, drawn), _ = jax.jit(gradient)(jnp.ones(()), jnp.ones(WORKERS), key=make_key(5))
    expected = [jax.random.bits(jax.random.fold_in(make_key(5), i)) for i in range(WORKERS)]
    np.testing.assert_array_equal(drawn, expected)


def test_every_micro_batch_of_every_worker_draws_a_different_mask(mesh):
    def dropped(params, batch, key):
        mask = jax.random.bernoulli(key, 0.5, (64,))
        return jnp.mean(params * mask * batch[:, None]), mask

    tx = signax.DataParallel(SIGNUM, mesh)
    gradient = jax.jit(tx.value_and_grad(dropped, has_aux=True, accumulate=2))
    (_, masks), grads = gradient(jnp.ones(64), jnp.ones(2 * WORKERS), key=jax.random.key(0))
    assert len(np.unique(masks.reshape(-1, 64), axis=0)) == 2 * WORKERS
    # Each worker's gradient uses the mask that it drew.
    np.testing.assert_allclose(grads, masks.mean(axis=1) / 64, rtol=1e-6)
