"""Gradients of each worker's share of the batch, against one worker after the other."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from least_squares import (
    PARAMS,
    SIGNUM,
    VOTE,
    WORKERS,
    assert_trees_close,
    assert_trees_equal,
    is_placed_as,
    make_batch,
    make_mesh,
    shares,
    squared_error,
)
from workers import auto_mesh

import signax


@pytest.fixture
def compilations():
    """The names of all programs that XLA compiles, as they come."""
    names = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


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


# Modes of aux.


def seen(params, batch):
    """Outputs per example, a float and a count."""
    predicted = batch["x"] @ params["w"] + params["b"]
    error = jnp.mean((predicted - batch["y"]) ** 2)
    large = jnp.sum(batch["x"] > 1)
    return error, {"outputs": predicted, "error": error, "large": large}


MODES = {"outputs": "concat", "error": "mean", "large": "sum"}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_aux_is_joined_averaged_and_added_as_the_whole_batch_has_it(accumulate, kind):
    mesh, batch = make_mesh(kind=kind), make_batch()
    tx = signax.DataParallel(SIGNUM, mesh)
    gradient = tx.value_and_grad(seen, has_aux=True, aux=MODES, accumulate=accumulate)
    (loss, aux), _ = jax.jit(gradient)(PARAMS, batch)
    x, y = np.float64(batch["x"]), np.float64(batch["y"])
    outputs = x @ np.asarray(PARAMS["w"]) + np.asarray(PARAMS["b"])
    np.testing.assert_allclose(aux["outputs"], outputs, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(aux["error"], np.mean((outputs - y) ** 2), rtol=1e-5)
    np.testing.assert_allclose(aux["error"], loss, rtol=1e-6)
    assert aux["large"] == np.sum(x > 1)
    assert aux["large"].dtype == jnp.int32
    assert is_placed_as(aux["outputs"], NamedSharding(mesh, PartitionSpec("data")))
    assert all(leaf.sharding.is_fully_replicated for leaf in (aux["error"], aux["large"]))


@pytest.mark.parametrize("mode", ["mean", "sum"])
@pytest.mark.parametrize("bad", [[2], [0, 7], range(8)])
def test_means_and_sums_of_aux_leave_out_workers_without_a_finite_loss(mode, bad, mesh):
    losses = np.arange(8, dtype=np.float32)
    losses[list(bad)] = np.nan
    gradient = signax.DataParallel(VOTE, mesh).value_and_grad(
        lambda params, batch: (jnp.sum(batch[:, 0] * params), batch[0, 1]), has_aux=True, aux=mode
    )
    batch = np.stack([losses, np.where(np.isnan(losses), np.inf, 2.0**losses)], axis=1)
    (_, aux), _ = jax.jit(gradient)(jnp.float32(1), np.float32(batch))
    kept = [2.0**i for i in range(8) if i not in bad]
    expected = sum(kept) if mode == "sum" else np.mean(kept) if kept else np.nan
    np.testing.assert_array_equal(aux, np.float32(expected))


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("mean", jnp.float16(60000), np.float32(60000)),
        ("sum", jnp.float16(60000), np.float32(480000)),
        ("sum", jnp.bfloat16(258), np.float32(8 * 258)),
        ("sum", jnp.int8(100), np.int32(800)),
        ("sum", jnp.bool_(True), np.int32(8)),
        ("sum", jnp.uint8(200), np.uint32(1600)),
        ("sum", jnp.uint32(2**28), np.uint32(2**31)),
    ],
)
def test_means_and_sums_of_aux_neither_overflow_nor_round(mode, value, expected, mesh):
    gradient = signax.DataParallel(VOTE, mesh).value_and_grad(
        lambda params, batch: (jnp.sum(batch * params), value), has_aux=True, aux=mode
    )
    (_, aux), _ = jax.jit(gradient)(jnp.float32(1), jnp.ones(WORKERS))
    assert aux.dtype == expected.dtype
    assert aux == expected


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_dtype_of_a_sum_depends_on_no_number_of_micro_batches(accumulate, mesh):
    with jax.enable_x64(True):
        gradient = signax.DataParallel(VOTE, mesh).value_and_grad(
            lambda params, batch: (jnp.sum(batch * params), jnp.int32(1)),
            has_aux=True, aux="sum", accumulate=accumulate,
        )  # fmt: skip
        (_, aux), _ = jax.jit(gradient)(jnp.float32(1), jnp.ones(2 * WORKERS, jnp.float32))
    assert aux.dtype == jnp.int32
    assert aux == WORKERS * accumulate


@pytest.mark.parametrize(
    ("aux", "leaf", "kind", "message"),
    [
        ("concat", jnp.ones(()), ValueError, r"aux\['out'\] is a scalar.*'mean', 'sum' or 'rows'"),
        ("mean", jnp.int32(1), TypeError, r"aux\['out'\] has dtype int32.*aux='sum', or cast"),
        ("mean", jnp.bool_(True), TypeError, r"aux\['out'\] has dtype bool.*aux='sum', or cast"),
        ("sum", jax.random.key(0), TypeError, r"aux\['out'\] has dtype key<fry>.* use 'rows'"),
        ({"in": "sum"}, jnp.ones(()), ValueError, r"aux=\{'in': 'sum'\} does not have the outer"),
    ],
    ids=["scalar", "integer", "boolean", "key", "structure"],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_rejects_aux_without_such_a_result(aux, leaf, kind, message, accumulate, mesh):
    gradient = signax.DataParallel(VOTE, mesh).value_and_grad(
        lambda params, batch: (jnp.sum(batch * params), {"out": leaf}),
        has_aux=True, aux=aux, accumulate=accumulate,
    )  # fmt: skip
    with pytest.raises(kind, match=message):
        jax.jit(gradient)(jnp.float32(1), jnp.ones(2 * WORKERS))


def test_rejects_unknown_modes_of_aux_and_modes_without_aux(mesh):
    tx = signax.DataParallel(SIGNUM, mesh, local=signax.sign_sgd(0.1))
    for method in (tx.value_and_grad, tx.local_steps, tx.train_step):
        for aux in ("average", None, {}, {"a": "mean", "b": None}, 3):
            with pytest.raises(ValueError, match="is unknown: use one of 'rows', 'concat'"):
                method(seen, has_aux=True, aux=aux)
        with pytest.raises(ValueError, match="aux='sum' needs has_aux=True"):
            method(squared_error, aux="sum")


# Captured arrays.

EXPLICIT = AxisType.Explicit


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))


def in_scan(table, p, b):
    return jax.lax.scan(lambda c, x: (jnp.tanh(c * p + x * table), None), jnp.zeros(4), b)[0].sum()


def in_while_loop(table, p, b):
    end = jax.lax.while_loop(lambda c: c.sum() < 5, lambda c: c + table, jnp.zeros(4))
    return (end * p * b).sum()


def in_cond(table, p, b):
    return jax.lax.cond(b.sum() > 0, lambda: (p * table).sum(), lambda: (p * 2).sum())


def in_jit(table, p, b):
    inner = jax.jit(lambda x: jax.jit(lambda y: y * table)(x) + table)
    return jax.jit(lambda q: inner(b * q).sum())(p)


def in_custom_rules(table, p, b):
    return (doubled(table) * doubled(jax.nn.relu(jax.nn.silu(table - 0.5) * p)) * b).sum()


def in_remat(table, p, b):
    return jax.checkpoint(lambda q: jnp.sin(jnp.cos(q * table) * b).sum())(p)


def in_linear_solve(table, p, b):
    solved, _ = jax.scipy.sparse.linalg.cg(lambda x: x * (2 + table), b.sum(0) * p)
    return solved.sum()


def in_collectives(table, p, b):
    return (jax.lax.pmean(b.mean(0), "data") * p * table).sum() * (1 + jax.lax.axis_index("data"))


def as_indexed(table, p, b):
    return (table[jnp.argmax(b, axis=1)] * (b @ p)).sum() + jnp.sort(table)[::-1] @ p


def as_random_key(table, p, b):
    key = jax.random.wrap_key_data((table * 1000).astype(jnp.uint32)[:2])
    return (p * b * jax.random.bernoulli(key, 0.5, b.shape)).sum()


CAPTURING = [
    in_scan, in_while_loop, in_cond, in_jit, in_custom_rules, in_remat, in_linear_solve,
    in_collectives, as_indexed, as_random_key,
]  # fmt: skip
TABLE = np.linspace(0.1, 1, 4, dtype=np.float32)
SLOPES = np.linspace(-1, 1, 4, dtype=np.float32)


def on_mesh(array, mesh, spec=()):
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))


@pytest.mark.parametrize("function", CAPTURING)
def test_a_loss_may_capture_arrays_on_an_explicit_mesh(function):
    mesh = make_mesh(kind=EXPLICIT)
    batch = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
    tx = signax.DataParallel(SIGNUM, mesh)
    given = tx.value_and_grad(lambda p, b, table: function(table, p, b))
    expected = jax.jit(given)(SLOPES, batch, TABLE)  # as an argument after the batch
    table, slopes = on_mesh(TABLE, mesh), on_mesh(SLOPES, mesh)

    @jax.jit
    def of_tracer(slopes, table):
        return tx.value_and_grad(lambda p, b: function(table, p, b))(slopes, batch)

    @jax.jit
    def of_array(slopes):
        return tx.value_and_grad(lambda p, b: function(table, p, b))(slopes, batch)

    for found in (of_tracer(slopes, table), of_array(slopes)):
        assert_trees_close(found, expected)


def test_captured_arrays_may_be_sharded_within_a_worker():
    mesh = make_mesh((4, 2), EXPLICIT)
    tx, batch = signax.DataParallel(SIGNUM, mesh), np.ones((16, 4), np.float32)
    table = on_mesh(TABLE, mesh, ("model",))

    @jax.jit
    def step(slopes, table):
        return tx.value_and_grad(lambda p, b: jnp.sum(b * p * table))(slopes, batch)

    loss, rows = step(on_mesh(SLOPES, mesh), table)
    assert loss == pytest.approx(4 * TABLE @ SLOPES, rel=1e-5)
    np.testing.assert_allclose(rows, np.tile(4 * TABLE, (4, 1)), rtol=1e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, EXPLICIT])
@pytest.mark.parametrize("jit", [False, True])
def test_a_loss_with_a_map_over_axes_within_a_worker_may_capture_arrays(kind, jit):
    mesh = make_mesh((4, 2), kind)
    tx = signax.DataParallel(SIGNUM, mesh)
    batch = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    table = on_mesh(TABLE, mesh)
    specs = PartitionSpec(None, "model"), PartitionSpec("model")

    @partial(jax.shard_map, in_specs=specs, out_specs=PartitionSpec(), axis_names={"model"})
    def inner(columns, slopes):
        return jax.lax.psum(jnp.sum(jnp.tanh(columns * slopes)), "model")

    def loss_fn(slopes, batch):
        arrays = batch * table, slopes
        return inner(*(map(jax.sharding.reshard, arrays, specs) if kind == EXPLICIT else arrays))

    gradient = tx.value_and_grad(loss_fn)
    loss, rows = (jax.jit(gradient) if jit else gradient)(SLOPES, batch)
    values = batch * TABLE
    tanh = np.tanh(values * SLOPES)
    assert loss == pytest.approx(tanh.sum() / 4, abs=1e-5)
    expected = (values * (1 - tanh**2)).reshape(4, 2, 4).sum(axis=1)
    np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, EXPLICIT])
@pytest.mark.parametrize("context", [False, True])
def test_every_step_of_a_loop_may_capture_what_the_last_step_returned(kind, context):
    mesh, batch = make_mesh(kind=kind), make_batch()
    tx = signax.DataParallel(SIGNUM, mesh)
    traced = []

    @jax.jit
    def step(params, state, key, scale):
        def loss_fn(params, batch):
            traced.append(1)
            kept = jax.random.bernoulli(key, 0.5, batch["x"].shape)
            kept = {"x": batch["x"] * kept, "y": batch["y"]}
            return scale * squared_error(params, kept)

        loss, grads = tx.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, jax.random.split(key)[0], scale, loss

    def run():
        carry = (*on_mesh((PARAMS, tx.init(PARAMS), jax.random.key(0), jnp.float32(2)), mesh),)
        carry = carry[0], tx.init(PARAMS), *carry[2:]
        losses, numbers = [], []
        for _ in range(3):
            *carry, loss = step(*carry)
            losses.append(float(loss))
            numbers.append(len(traced))
        return losses, numbers

    if context:
        with jax.set_mesh(mesh):
            losses, numbers = run()
    else:
        losses, numbers = run()
    assert len(set(losses)) == 3
    assert numbers[0] == numbers[2]  # one compilation


@pytest.mark.parametrize("steps", [1, 2])
def test_local_steps_may_capture_arrays(steps):
    mesh, batch = make_mesh(kind=EXPLICIT), make_batch()
    tx = signax.DataParallel(SIGNUM, mesh, local=signax.signum(0.1))
    scale = on_mesh(np.float32(2), mesh)
    found = tx.local_steps(
        lambda params, batch: scale * squared_error(params, batch), num_local_steps=steps
    )
    given = tx.local_steps(
        lambda params, batch, scale: scale * squared_error(params, batch), num_local_steps=steps
    )
    state = tx.init(PARAMS)
    assert_trees_close(found(PARAMS, state, batch), given(PARAMS, state, batch, 2.0))


def test_captured_arrays_that_cannot_be_hoisted_are_named(mesh):
    mesh = make_mesh(kind=EXPLICIT)
    rows = on_mesh(np.ones(WORKERS, np.float32), mesh, ("data",))
    tx = signax.DataParallel(SIGNUM, mesh)

    @jax.jit
    def step(slopes, rows):  # no part of a sharded array has a sharding of its own
        return tx.value_and_grad(lambda p, b: jnp.sum(b * p * rows[:4]))(slopes, np.ones((8, 4)))

    with pytest.raises(ValueError, match=r"not its arguments: .*f32\[8.*pass them after the batch"):
        step(on_mesh(SLOPES, mesh), rows)


def test_errors_of_a_loss_function_reach_the_caller():
    mesh = make_mesh(kind=EXPLICIT)
    tx, scale = signax.DataParallel(SIGNUM, mesh), on_mesh(np.float32(2), mesh)

    def loss_fn(params, batch):
        raise ValueError(f"of the loss function: {squared_error(params, batch) * scale}")

    def counting(params, batch):
        return scale * squared_error(params, batch), len(batch["x"])

    averaging = tx.value_and_grad(counting, has_aux=True, aux="mean")
    for jit in (jax.jit, lambda function: function):
        with pytest.raises(ValueError, match="of the loss function"):
            jit(tx.value_and_grad(loss_fn))(PARAMS, make_batch())
        with pytest.raises(TypeError, match="a mean of integers is no integer"):
            jit(averaging)(PARAMS, make_batch())


# Outside jax.jit.


@pytest.mark.parametrize("kind", [AxisType.Auto, EXPLICIT])
def test_calls_outside_jit_compile_once_and_see_changed_values(kind, compilations):
    tx, batch = signax.DataParallel(SIGNUM, make_mesh(kind=kind)), make_batch()
    keys = jax.random.split(jax.random.key(0), 3)
    table = jnp.zeros(3)

    def loss_fn(params, batch):
        return squared_error(params, {"x": batch["x"] * table, "y": batch["y"]})

    expected = [
        jax.jit(
            tx.value_and_grad(
                lambda params, batch, table: squared_error(
                    params, {"x": batch["x"] * table, "y": batch["y"]}
                )
            )
        )(PARAMS, batch, jax.random.normal(key, (3,)))
        for key in keys
    ]
    numbers = []
    for key, wanted in zip(keys, expected, strict=True):
        table = jax.random.normal(key, (3,))
        before = len(compilations)
        found = tx.value_and_grad(loss_fn)(PARAMS, batch)
        numbers.append(len(compilations) - before)
        assert_trees_close(found, wanted)
    assert numbers[0] >= 1
    assert numbers[1:] == [0, 0]


def test_calls_outside_jit_see_changed_numbers(mesh):
    tx, factor = signax.DataParallel(SIGNUM, mesh), 1.0

    def loss_fn(params, batch):
        return factor * jnp.sum(params * batch)

    gradient = tx.value_and_grad(loss_fn)
    for factor in (1.0, 2.0, 1.0):
        _, rows = gradient(jnp.float32(1), jnp.ones(WORKERS))
        np.testing.assert_array_equal(rows, np.full(WORKERS, factor))


def test_calls_outside_jit_can_be_debugged(mesh):
    tx = signax.DataParallel(SIGNUM, mesh)
    gradient = tx.value_and_grad(lambda p, b: jnp.sum(jnp.log(p * b)))
    with jax.disable_jit():
        loss, _ = gradient(jnp.float32(1), jnp.ones(WORKERS))
    assert loss == 0
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        gradient(jnp.float32(-1), jnp.ones(WORKERS))


def test_host_callbacks_outside_jit_are_those_of_the_call(mesh):
    tx = signax.DataParallel(SIGNUM, mesh)
    for number in (3.0, 4.0):

        def loss_fn(params, batch):
            host = jax.pure_callback(
                lambda: np.float32(number),  # noqa: B023
                jax.ShapeDtypeStruct((), jnp.float32),
            )
            return host * jnp.sum(params * batch)

        loss, _ = tx.value_and_grad(loss_fn)(jnp.float32(1), jnp.ones(WORKERS))
        assert loss == number


def test_a_gradient_of_the_gradient_of_captured_arrays_stays_possible(mesh):
    """Penalties on gradients differentiate through it."""
    tx = signax.DataParallel(SIGNUM, mesh)

    def penalty(scale):
        _, rows = tx.value_and_grad(lambda p, b: jnp.sum(scale * p * b))(
            jnp.float32(1), jnp.ones(WORKERS)
        )
        return jnp.sum(rows**2)

    assert jax.grad(penalty)(jnp.float32(3)) == 2 * 3 * WORKERS
