"""DataParallel on eight simulated devices, against one worker after the other in NumPy."""

import contextlib
import copy
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from workers import auto_mesh

import signax
from signax import diagnostics

WORKERS = 8
PARAMS = {"w": jnp.arange(6.0).reshape(3, 2) / 8 - 0.25, "b": jnp.ones(2)}
VOTE = signax.majority_vote("data")
SIGNUM = signax.signum(0.125, 0.5, axis_name="data")
SIGN_SGD = signax.sign_sgd(0.125, axis_name="data")


def rows_of(params=PARAMS, workers=WORKERS):
    """A gradient for each worker: small whole numbers, zeros among them."""
    return {
        name: jax.random.randint(jax.random.key(i), (workers, *leaf.shape), -2, 3).astype(
            leaf.dtype
        )
        for i, (name, leaf) in enumerate(params.items())
    }


def make_mesh(shape=(WORKERS,), kind=AxisType.Auto):
    kinds = kind if isinstance(kind, tuple) else (kind,) * len(shape)
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, ("data", "model", "fsdp")[: len(shape)], kinds, devices=devices)


def squared_error(params, batch):
    predicted = batch["x"] @ params["w"] + params["b"]
    return jnp.mean((predicted - batch["y"]) ** 2)


def make_batch(size=32):
    x, y = jax.random.normal(jax.random.key(3), (2, size, 3))
    return {"x": x, "y": y[:, :2] + 2 * x[:, 1:]}


def shares(batch, pieces=WORKERS):
    """The batch of each worker, in order."""
    cut = jax.tree.map(lambda leaf: np.split(np.asarray(leaf), pieces), batch)
    return [
        jax.tree.map(lambda split: split[i], cut, is_leaf=lambda node: isinstance(node, list))  # noqa: B023
        for i in range(pieces)
    ]


def assert_trees_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_trees_close(actual, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(e, np.float64), rtol, atol
        ),
        actual,
        expected,
    )


def is_placed_as(leaf, sharding):
    return leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


# What init makes.


@pytest.mark.parametrize("wrap", [lambda init: init, jax.jit], ids=["outside jit", "inside jit"])
def test_init_gives_each_worker_its_row_and_everybody_the_rest(wrap, mesh):
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
def test_state_shardings_are_those_of_init(abstract, kind):
    tx = signax.DataParallel(SCHEDULED, make_mesh(kind=kind))
    params = jax.eval_shape(lambda: PARAMS) if abstract else PARAMS
    shardings = tx.state_shardings(params)
    state = tx.init(PARAMS)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    assert all(jax.tree.leaves(jax.tree.map(is_placed_as, state, shardings)))


def test_state_shardings_serve_as_out_shardings(mesh):
    tx = signax.DataParallel(SCHEDULED, mesh)
    shardings = tx.state_shardings(PARAMS)
    update = jax.jit(tx.update, out_shardings=(None, shardings))
    _, state = update(rows_of(), tx.init(PARAMS), PARAMS)
    assert all(jax.tree.leaves(jax.tree.map(is_placed_as, state, shardings)))


def test_state_keeps_its_shape_dtype_and_place_over_an_update(mesh):
    tx = signax.DataParallel(SCHEDULED, mesh)
    state = tx.init(PARAMS)
    _, updated = jax.jit(tx.update)(rows_of(), state, PARAMS)
    assert jax.tree.map(jax.typeof, updated) == jax.tree.map(jax.typeof, state)
    assert all(
        is_placed_as(new, old.sharding)
        for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(updated), strict=True)
    )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_state_shards_over_further_axes_as_its_parameters_do(kind):
    mesh = make_mesh((4, 2), kind)
    specs = {"w": PartitionSpec(None, "model"), "b": PartitionSpec()}
    state = signax.DataParallel(SIGNUM, mesh, param_specs=specs).init(PARAMS)
    momentum = state[0][0].momentum
    assert is_placed_as(momentum["w"], NamedSharding(mesh, PartitionSpec("data", None, "model")))
    assert is_placed_as(momentum["b"], NamedSharding(mesh, PartitionSpec("data")))


# Gradients.


def test_rows_are_the_gradients_of_each_share_of_the_batch(mesh):
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


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_accumulated_gradients_are_the_mean_over_micro_batches(accumulate, mesh):
    def weighted(params, batch):  # a loss whose gradient depends on how the batch is cut
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


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_local_steps_give_how_far_each_worker_went(steps, mesh):
    rate, b1 = 1 / 16, 0.5
    tx = signax.DataParallel(SIGNUM, mesh, local=signax.signum(rate, b1))
    follow = jax.jit(tx.local_steps(squared_error, accumulate=steps))
    state = tx.init(PARAMS)
    momenta = [jax.tree.map(np.zeros_like, PARAMS)] * WORKERS
    for batch in (make_batch(), make_batch(64)):  # the second time with a momentum
        loss, rows, state = follow(PARAMS, state, batch)
        losses, went = [], []
        for i, share in enumerate(shares(batch)):
            params = jax.tree.map(np.asarray, PARAMS)
            for piece in shares(share, steps):
                value, slope = jax.value_and_grad(squared_error)(params, piece)
                losses.append(value)
                momenta[i] = jax.tree.map(
                    lambda m, g: b1 * m + (1 - b1) * np.asarray(g), momenta[i], slope
                )
                params = jax.tree.map(lambda p, m: p - rate * np.sign(m), params, momenta[i])
            went.append(jax.tree.map(lambda p, q: p - q, PARAMS, params))
        assert_trees_close(rows, jax.tree.map(lambda *leaves: np.stack(leaves), *went))
        assert loss == pytest.approx(np.mean(losses), rel=1e-5)
        found = optax.tree.get(state.local, "momentum")
        assert_trees_close(found, jax.tree.map(lambda *leaves: np.stack(leaves), *momenta))
    np.testing.assert_array_equal(optax.tree.get(state.local, "count"), [2 * steps] * WORKERS)
    updates, after = jax.jit(tx.update)(rows, state, PARAMS)
    plain = signax.DataParallel(SIGNUM, mesh)
    expected, exchanged = jax.jit(plain.update)(rows, plain.init(PARAMS), PARAMS)
    assert_trees_equal(updates, expected)
    assert_trees_equal(after.exchanged, exchanged)
    assert_trees_equal(after.local, state.local)


def test_local_steps_have_aux_and_keys_of_their_own(mesh):
    def loss_fn(params, batch, *, key):
        return squared_error(params, batch), jax.random.uniform(key)

    tx = signax.DataParallel(SIGNUM, mesh, local=signax.sign_sgd(0.1))
    key, state = jax.random.key(1), tx.init(PARAMS)
    gradient = jax.jit(tx.value_and_grad(loss_fn, has_aux=True, accumulate=4))
    (_, expected), _ = gradient(PARAMS, make_batch(), key=key)
    follow = jax.jit(tx.local_steps(loss_fn, has_aux=True, accumulate=4))
    (_, aux), _, _ = follow(PARAMS, state, make_batch(), key=key)
    np.testing.assert_array_equal(aux, expected)
    assert np.unique(aux).size == 4 * WORKERS
    single = jax.jit(tx.local_steps(loss_fn, has_aux=True))
    (_, aux), _, _ = single(PARAMS, state, make_batch(), key=key)
    assert aux.shape == (WORKERS,)


def test_a_worker_that_is_not_finite_forgets_its_local_steps(mesh):
    tx = signax.DataParallel(SIGNUM, mesh, local=signax.signum(0.1))
    batch = make_batch()
    batch["x"] = batch["x"].at[5].set(jnp.inf)  # the second worker's
    follow = jax.jit(tx.local_steps(squared_error, accumulate=2))
    _, rows, state = follow(PARAMS, tx.init(PARAMS), batch)
    momentum = optax.tree.get(state.local, "momentum")["w"]
    np.testing.assert_array_equal(np.any(np.isnan(rows["w"]), axis=(1, 2)), np.arange(8) == 1)
    np.testing.assert_array_equal(np.any(momentum != 0, axis=(1, 2)), np.arange(8) != 1)
    updates, _ = jax.jit(tx.update)(rows, state, PARAMS)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize(
    ("local", "slope", "extra"),
    [
        (signax.signum(0.5), np.inf, 0.0),  # whose sign is finite
        (optax.adam(0.5), 1.0, np.nan),  # a loss without consequences
        (optax.adam(0.5), 1e30, 0.0),  # whose square is not
    ],
    ids=["gradient", "loss", "state"],
)
def test_a_worker_whose_local_steps_hide_that_they_are_not_finite_is_out(mesh, local, slope, extra):
    """Its second micro-batch is the bad one; the third is as good as the first."""

    def loss_fn(params, batch):
        return jnp.sum(params * batch["slope"]) + jnp.sum(batch["extra"])

    tx = signax.DataParallel(SIGNUM, mesh, local=local)
    slopes = np.ones((WORKERS, 3, 4), np.float32)
    slopes[1, 1, 2] = slope
    extras = np.zeros((WORKERS, 3), np.float32)
    extras[1, 1] = extra
    batch = {"slope": slopes.reshape(-1, 4), "extra": extras.reshape(-1)}
    params = jnp.zeros(4)
    before = tx.init(params)
    follow = jax.jit(tx.local_steps(loss_fn, accumulate=3))
    _, rows, state = follow(params, before, batch)
    bad = np.arange(WORKERS) == 1
    np.testing.assert_array_equal(np.isnan(rows).all(axis=1), bad)
    np.testing.assert_array_equal(np.isnan(rows).any(axis=1), bad)
    for leaf in jax.tree.leaves(state.local):
        if leaf.ndim > 1:  # a momentum
            np.testing.assert_array_equal(np.any(leaf != 0, axis=1), ~bad)
    _, state = jax.jit(tx.update)(rows, state, params)
    assert optax.tree.get(state, "voters") == WORKERS - 1


def test_a_state_that_local_steps_do_not_fit_is_refused(mesh):
    batch = make_batch()
    tx = signax.DataParallel(SIGNUM, mesh, local=signax.signum(0.1))
    state = tx.init(PARAMS)
    plain = signax.DataParallel(SIGNUM, mesh).init(PARAMS)
    for follow in (tx.local_steps(squared_error), tx.train_step(squared_error)):
        with pytest.raises(ValueError, match="state and params do not belong together"):
            follow(PARAMS, plain, batch)
        for workers in (4, 16):
            with pytest.raises(ValueError, match="resize"):
                follow(PARAMS, tx.resize(state, PARAMS, workers), batch)


def test_a_training_step_leaves_out_who_is_not_active(mesh):
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


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_local_steps_send_as_much_as_one_vote(kind):
    batch, sent = make_batch(64), []
    for options in ({}, {"local": signax.signum(0.1)}):
        tx = signax.DataParallel(SIGNUM, make_mesh(kind=kind), **options)
        step, state = tx.train_step(squared_error, accumulate=8), tx.init(PARAMS)
        sent.append(diagnostics.collective_bytes(step.lower(PARAMS, state, batch).compile()))
        params, state, _ = step(jax.tree.map(jnp.copy, PARAMS), state, batch)
        step(params, state, batch)
    assert sent[0] == sent[1] > 0


def test_local_steps_need_an_optimiser(mesh):
    with pytest.raises(TypeError, match="local="):
        signax.DataParallel(SIGNUM, mesh, local=signax.sign_sgd)
    with pytest.raises(ValueError, match="local=None"):
        signax.DataParallel(SIGNUM, mesh).local_steps(squared_error)


def test_bf16_gradients_accumulate_in_f32(mesh):
    """In bf16 256 + 1 is 256: eight small micro-batches after a large one would count nothing."""
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
    # Eight bits of each product and sum.
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *exact)
    assert_trees_close(grads, expected, rtol=0.05, atol=0.05)


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
    # The gradient is that of the mask which was drawn, for each worker.
    np.testing.assert_allclose(grads, masks.mean(axis=1) / 64, rtol=1e-6)


def test_further_arguments_reach_every_worker_whole(mesh):
    def scaled(params, batch, table, factors):
        return jnp.mean(params * batch) * factors["f"], (table, factors)

    table, factors = jnp.arange(5), {"f": 2.0, "none": None}  # 5 rows for 8 workers
    gradient = signax.DataParallel(SIGNUM, mesh).value_and_grad(scaled, has_aux=True)
    (_, (tables, _)), grads = jax.jit(gradient)(jnp.ones(()), jnp.ones(WORKERS), table, factors)
    np.testing.assert_array_equal(tables, np.tile(table, (WORKERS, 1)))
    np.testing.assert_array_equal(grads, np.full(WORKERS, 2.0))


@pytest.mark.parametrize(
    ("batch", "accumulate", "said"),
    [
        ({"x": jnp.ones((16, 3)), "y": jnp.ones(12)}, 1, [r"batch['y']", "(12,)", "8 workers"]),
        (jnp.ones((24, 3)), 2, ["batch", "(24, 3)", "8 workers", "accumulate=2"]),
        ((jnp.ones(()),), 1, ["batch[0]", "()", "8 workers"]),
    ],
    ids=["not divisible", "not divisible by micro-batches", "scalar"],
)
def test_batch_that_cannot_be_cut_evenly_is_refused(batch, accumulate, said, mesh):
    gradient = signax.DataParallel(SIGNUM, mesh).value_and_grad(
        squared_error, accumulate=accumulate
    )
    with pytest.raises(ValueError, match="batch") as error:
        gradient(PARAMS, batch)
    assert all(words in str(error.value) for words in said)


@pytest.mark.parametrize(
    ("accumulate", "kind"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("2", TypeError)]
)
def test_number_of_micro_batches_must_be_positive(accumulate, kind, mesh):
    with pytest.raises(kind, match=f"accumulate={accumulate!r} must be"):
        signax.DataParallel(SIGNUM, mesh).value_and_grad(squared_error, accumulate=accumulate)


def test_a_number_of_micro_batches_of_numpy_will_do(mesh):
    tx = signax.DataParallel(SIGNUM, mesh)
    found, expected = (
        jax.jit(tx.value_and_grad(squared_error, accumulate=number))(PARAMS, make_batch())
        for number in (np.int64(2), 2)
    )
    assert_trees_equal(found, expected)


# Updates, against a simulation of signum with majority vote.


class Simulation:
    """signum on every worker in NumPy, with the vote of the references.

    Gradients are small whole numbers and the decay is 1/2, so that momenta are exact in f32.
    """

    def __init__(self, params, workers, **options):
        self.params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
        self.momenta = jax.tree.map(lambda p: np.zeros((workers, *p.shape)), self.params)
        self.weight_decay = options.pop("weight_decay", 0.0)
        self.options = options
        self.memory = references.DitherMemory()
        self.step = 0

    def __call__(self, grads, active=None):
        flat = np.concatenate([np.reshape(g, (len(g), -1)) for g in grads.values()], axis=1)
        finite = np.isfinite(flat).all(axis=1)
        counted = finite if active is None else finite & active
        options = {**self.options, **self.memory.at(self.step), "active": counted}
        for name, grad in grads.items():
            rows = np.where(finite)[0]  # a bad gradient leaves the momentum as it was
            momenta = self.momenta[name]
            momenta[rows] = 0.5 * momenta[rows] + 0.5 * np.asarray(grad, np.float64)[rows]
            voted = references.vote(momenta.reshape(len(momenta), -1), self.step, **options)
            param = self.params[name]
            param -= 0.125 * (voted.reshape(param.shape) + self.weight_decay * param)
        self.memory.advance(self.step, counted)
        self.step += 1


def no_change(step, grads, rng):
    return grads, None


def one_bad(step, grads, rng):
    grads["w"][step % WORKERS, 1, 1] = (np.nan, np.inf, -np.inf)[step % 3]
    return grads, None


def some_absent(step, grads, rng):
    # Everybody in one step, nobody in another, any of them otherwise.
    return grads, (rng.random(WORKERS) < (1.0, 0.0, 0.6, 0.4)[step % 4])


def one_bad_and_some_absent(step, grads, rng):
    return some_absent(step, *one_bad(step, grads, rng)[:1], rng)


@pytest.mark.parametrize(
    ("disturb", "options"),
    [
        (no_change, {}),
        (one_bad, {}),
        (some_absent, {}),
        (one_bad_and_some_absent, {"zeros": "abstain"}),
        (one_bad_and_some_absent, {"weight_decay": 0.25}),
    ],
)
def test_twenty_steps_equal_the_simulation(disturb, options, mesh):
    rng = np.random.default_rng(0)
    tx = signax.DataParallel(signax.signum(0.125, 0.5, axis_name="data", **options), mesh)
    simulation = Simulation(PARAMS, WORKERS, **options)
    params, state = PARAMS, tx.init(PARAMS)
    takes_active = disturb(0, {"w": np.zeros((WORKERS, 3, 2))}, rng)[1] is not None

    @jax.jit
    def step(params, state, grads, active):
        chosen = {"active": active} if takes_active else {}
        updates, state = tx.update(grads, state, params, **chosen)
        return optax.apply_updates(params, updates), state

    for number in range(20):
        grads = {
            name: rng.integers(-2, 3, (WORKERS, *leaf.shape)).astype(np.float32)
            for name, leaf in PARAMS.items()
        }
        grads, active = disturb(number, grads, rng)
        params, state = step(params, state, grads, active)
        simulation(grads, active)
        assert_trees_equal(state[0][0].momentum, simulation.momenta)
        if "weight_decay" in options:  # which rounds
            assert_trees_close(params, simulation.params)
        else:
            assert_trees_equal(params, simulation.params)


def test_without_parameters_the_update_is_the_same(mesh):
    tx = signax.DataParallel(SIGNUM, mesh)
    grads, state = rows_of(), tx.init(PARAMS)
    assert_trees_equal(jax.jit(tx.update)(grads, state), jax.jit(tx.update)(grads, state, PARAMS))


def test_extra_arguments_reach_the_transformation(mesh):
    def scale_by_factor(updates, state, params=None, *, factor=1.0, **extra_args):
        del params, extra_args
        return jax.tree.map(lambda u: u * factor, updates), state

    scale = optax.GradientTransformationExtraArgs(optax.init_empty_state, scale_by_factor)
    tx = signax.DataParallel(optax.chain(SIGN_SGD, scale), mesh)
    state = tx.init(PARAMS)

    @jax.jit
    def both(grads, factor):
        return tx.update(grads, state, PARAMS)[0], tx.update(grads, state, PARAMS, factor=factor)[0]

    plain, scaled = both(rows_of(), jnp.float32(3.0))
    assert_trees_equal(scaled, jax.tree.map(lambda u: 3 * u, plain))


def test_leaves_frozen_after_the_vote_never_move(mesh):
    frozen = optax.masked(optax.set_to_zero(), {"w": False, "b": True})
    tx = signax.DataParallel(optax.chain(SIGNUM, frozen), mesh)
    update = jax.jit(tx.update)
    state = tx.init(PARAMS)
    for _ in range(3):
        updates, state = update(rows_of(), state, PARAMS)
        assert not np.any(updates["b"])
        assert np.all(np.abs(updates["w"]) == 0.125)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.MultiSteps(tx, 1),
        lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
        lambda tx: optax.inject_hyperparams(lambda rate: optax.chain(tx, optax.scale(rate)))(1.0),
        lambda tx: optax.masked(tx, {"w": True, "b": True}),
        lambda tx: optax.partition({"all": tx}, {"w": "all", "b": "all"}),
    ],
    ids=["MultiSteps", "MultiSteps as transformation", "inject_hyperparams", "masked", "partition"],
)
def test_who_takes_part_is_heard_inside_wrappers(wrap, mesh):
    tx = signax.DataParallel(wrap(SIGN_SGD), mesh)
    # Seven workers against one, and only that one takes part.
    grads = jax.tree.map(lambda p: jnp.ones((WORKERS, *p.shape)).at[3].set(-1.0), PARAMS)
    updates, _ = jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS, active=jnp.arange(WORKERS) == 3)
    assert_trees_equal(updates, jax.tree.map(lambda p: np.full(p.shape, 0.125), PARAMS))


def test_averaged_updates_are_those_of_one_worker_on_the_mean(mesh):
    inner = optax.adamw(0.1)
    tx = signax.DataParallel(optax.chain(signax.average_updates("data"), inner), mesh)
    grads = rows_of()
    updates, _ = jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS)
    mean = jax.tree.map(lambda rows: rows.mean(axis=0), grads)
    assert_trees_close(updates, inner.update(mean, inner.init(PARAMS), PARAMS)[0])


def test_clipping_by_global_norm_is_by_the_norm_of_each_worker(mesh):
    clipped = optax.chain(optax.clip_by_global_norm(1.0), signax.average_updates("data"))
    tx = signax.DataParallel(clipped, mesh)
    grads = rows_of()
    updates, _ = jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS)
    norms = np.sqrt(
        sum((np.asarray(rows) ** 2).reshape(WORKERS, -1).sum(1) for rows in grads.values())
    )
    assert norms.min() > 1
    expected = {
        name: np.mean(
            [row / norm for row, norm in zip(np.asarray(rows), norms, strict=True)], axis=0
        )
        for name, rows in grads.items()
    }
    assert_trees_close(updates, expected)


def test_stochastic_signs_are_drawn_apart_from_a_shared_key(mesh):
    """Of 8 equal gradients whose sign is a fair coin, the mean of the drawn signs is seldom +-1."""
    drawn = signax.scale_by_stochastic_sign(jax.random.key(0), norm=1e6, axis_name="data")
    tx = signax.DataParallel(optax.chain(drawn, signax.average_updates("data")), mesh)
    params = jnp.zeros(256)
    updates, _ = jax.jit(tx.update)(jnp.ones((WORKERS, 256)), tx.init(params), params)
    assert np.mean(np.abs(updates) == 1) < 0.05  # 2 / 2^8 expected


# The parameters are the same everywhere: by type, and bit for bit.


def shard_maps(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "shard_map":
            yield equation
        else:
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from shard_maps(getattr(inner, "jaxpr", inner))


def test_types_prove_that_updates_do_not_vary(mesh):
    tx = signax.DataParallel(SIGNUM, mesh)
    jaxpr = jax.make_jaxpr(lambda *args: tx.update(*args)[0])(rows_of(), tx.init(PARAMS), PARAMS)
    (equation,) = shard_maps(jaxpr.jaxpr)
    assert equation.params["check_vma"] is True
    updates = [atom.aval for atom in equation.params["jaxpr"].outvars][: len(PARAMS)]
    assert all("data" not in aval.manual_axis_type.varying for aval in updates)
    rows = [atom.aval for atom in equation.params["jaxpr"].invars][: len(PARAMS)]
    assert all("data" in aval.manual_axis_type.varying for aval in rows)


def copies(array):
    """The bytes that devices hold, each once."""
    return {np.asarray(shard.data).tobytes() for shard in array.addressable_shards}


@pytest.mark.parametrize(
    "optimizer", [signax.sign_sgd, signax.signum, signax.lion], ids=lambda f: f.__name__
)
def test_parameters_stay_identical_on_all_devices_with_one_bad_worker_in_each_step(optimizer, mesh):
    tx = signax.DataParallel(optimizer(0.01, weight_decay=0.1, axis_name="data"), mesh)
    params = jax.device_put(jax.tree.map(np.asarray, PARAMS), NamedSharding(mesh, PartitionSpec()))
    state, step = tx.init(params), tx.train_step(squared_error)
    for number in range(100):
        batch = jax.tree.map(np.array, make_batch(16))
        batch["x"][2 * (number % WORKERS), 0] = (np.nan, np.inf)[number % 2]
        params, state, _ = step(params, state, batch)
    for leaf in jax.tree.leaves(params):
        assert len(leaf.addressable_shards) == WORKERS
        assert len(copies(leaf)) == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((params, state)))
    assert squared_error(params, make_batch(16)) < squared_error(PARAMS, make_batch(16)) / 2


# Errors.


def test_gradients_without_the_workers_axis_are_refused(mesh):
    tx = signax.DataParallel(SIGNUM, mesh)
    with pytest.raises(ValueError, match=r"use the gradients of .*value_and_grad") as error:
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert "updates['b']" in str(error.value)
    assert "(2,)" in str(error.value)
    assert "8 workers" in str(error.value)


def test_gradients_of_another_number_of_workers_are_refused(mesh):
    tx = signax.DataParallel(SIGNUM, mesh)
    with pytest.raises(ValueError, match=r"updates\['b'\] has shape \(4, 2\).* 8 workers"):
        tx.update(rows_of(workers=4), tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    "tx",
    [
        optax.sgd(0.1),
        signax.scale_by_signum(),
        optax.chain(SIGNUM, optax.GradientTransformation(
            optax.init_empty_state,
            lambda u, s, p=None: (jax.tree.map(lambda x: x + jax.lax.axis_index("data"), u), s),
        )),
        optax.masked(VOTE, {"w": True, "b": False}),
    ],
    ids=["sgd", "no vote", "worker's index after the vote", "vote on some leaves"],
)  # fmt: skip
def test_updates_that_differ_between_workers_are_refused(tx, mesh):
    tx = signax.DataParallel(tx, mesh)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"updates\['b'\] is neither voted nor averaged") as error:
        jax.eval_shape(tx.update, rows_of(), state, PARAMS)
    assert "'data'" in str(error.value)


def test_updates_that_are_known_to_be_equal_are_not_voted_on(mesh):
    def replace(updates, params):
        del params
        return {**updates, "b": jnp.ones(2)}

    tx = signax.DataParallel(optax.chain(optax.stateless(replace), VOTE), mesh)
    with pytest.raises(ValueError, match=r"updates\['b'\] does not vary over axis 'data'.*after"):
        jax.eval_shape(tx.update, rows_of(), tx.init(PARAMS), PARAMS)


def test_optimizer_of_another_axis_is_refused(mesh):
    tx = signax.DataParallel(signax.signum(0.1, axis_name="batch"), mesh)
    with pytest.raises(NameError, match="'batch' is not bound") as error:
        tx.init(PARAMS)
    for way in ("DataParallel", "shard_map", "pmap", "vmap"):
        assert way in str(error.value)


def test_mesh_without_the_axis_is_refused(mesh):
    with pytest.raises(ValueError, match=r"axis_name='workers'.*\('data',\)"):
        signax.DataParallel(SIGNUM, mesh, "workers")


@pytest.mark.parametrize("axis_name", [None, (), ["data"]])
def test_what_names_no_axis_is_refused(axis_name, mesh):
    with pytest.raises(TypeError, match="axis_name=") as error:
        signax.DataParallel(SIGNUM, mesh, axis_name)
    assert repr(axis_name) in str(error.value)


def test_state_of_another_number_of_workers_is_refused(mesh):
    state = signax.DataParallel(SIGNUM, make_mesh((4,))).init(PARAMS)
    with pytest.raises(ValueError, match="rows for 4 workers, but there are 8") as error:
        signax.DataParallel(SIGNUM, mesh).update(rows_of(), state, PARAMS)
    assert "momentum['b']" in str(error.value)


def test_state_of_one_worker_is_refused(mesh):
    with pytest.raises(ValueError, match=r"momentum\['b'\] has shape \(2,\).* \(8, 2\)"):
        signax.DataParallel(SIGNUM, mesh).update(rows_of(), SIGNUM.init(PARAMS), PARAMS)


def test_updates_of_another_structure_are_refused(mesh):
    tx = signax.DataParallel(SIGNUM, mesh)
    with pytest.raises(ValueError, match="updates and params differ in structure"):
        tx.update({"w": rows_of()["w"]}, tx.init(PARAMS), PARAMS)


def test_state_of_another_structure_is_refused(mesh):
    tx = signax.DataParallel(SIGNUM, mesh)
    state = signax.DataParallel(SIGN_SGD, mesh).init(PARAMS)
    with pytest.raises(ValueError, match="state and params do not belong together"):
        tx.update(rows_of(), state, PARAMS)


@pytest.mark.parametrize("active", [True, jnp.ones(4, bool), jnp.ones(16, bool)], ids=np.shape)
def test_who_takes_part_must_be_said_for_each_worker(active, mesh):
    tx = signax.DataParallel(SIGNUM, mesh)
    with pytest.raises((TypeError, ValueError), match="active") as error:
        tx.update(rows_of(), tx.init(PARAMS), PARAMS, active=active)
    assert repr(active) in str(error.value)
    assert "8 workers" in str(error.value)


@pytest.mark.parametrize(
    ("spec", "kind", "said"),
    [
        (PartitionSpec("data"), ValueError, "the workers' own axis"),
        (PartitionSpec(None, ("model", "data")), ValueError, "the workers' own axis"),
        (PartitionSpec("pipe"), ValueError, r"names 'pipe'; the mesh has \('data', 'model'\)"),
        ("model", TypeError, "'model' is not a jax.sharding.PartitionSpec"),
    ],
)
def test_specs_that_no_parameter_can_have_are_refused(spec, kind, said):
    with pytest.raises(kind, match=rf"param_specs\['w'\].*{said}"):
        signax.DataParallel(
            SIGNUM, make_mesh((4, 2)), param_specs={"w": spec, "b": PartitionSpec()}
        )


def test_specs_of_another_structure_are_refused(mesh):
    tx = signax.DataParallel(SIGNUM, mesh, param_specs={"w": PartitionSpec()})
    with pytest.raises(ValueError, match="param_specs and params differ in structure"):
        tx.init(PARAMS)


def test_integer_leaves_are_refused_by_name(mesh):
    tx = signax.DataParallel(SIGNUM, mesh)
    with pytest.raises(TypeError, match=r"params\['n'\] has dtype int32.*optax.masked"):
        tx.init({"w": jnp.ones(2), "n": jnp.ones(2, int)})
    grads = {**rows_of(), "b": jnp.ones((WORKERS, 2), int)}
    with pytest.raises(TypeError, match=r"updates\['b'\] has dtype int32.*optax.masked"):
        tx.update(grads, tx.init(PARAMS), PARAMS)


# Meshes.


def two_steps(tx, params, batch):
    """The parameters after two steps of a jitted loop."""

    @jax.jit
    def step(params, state, batch):
        loss, grads = tx.value_and_grad(squared_error)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state = tx.init(params)
    for _ in range(2):
        params, state, _ = step(params, state, batch)
    return params


@pytest.fixture(scope="module")
def stepped():
    """The same steps with four workers on a mesh of one Auto axis, nothing placed."""
    mesh = make_mesh((4,))
    tx = signax.DataParallel(signax.signum(0.125, axis_name="data", zeros="abstain"), mesh)
    return jax.tree.map(np.asarray, two_steps(tx, PARAMS, make_batch()))


A, E = AxisType.Auto, AxisType.Explicit
SPECS = {"w": PartitionSpec(None, "model"), "b": PartitionSpec("model")}
ONE_AXIS = [
    ((4,), A, None, False, False),
    ((4,), A, None, True, True),
    *(((4,), E, None, *there) for there in itertools.product((False, True), (False, True))),
]
TWO_AXES = [
    ((4, 2), kinds, specs, there, there)
    for kinds, specs, there in itertools.product(
        ((A, A), (E, E), (A, E)), (None, SPECS), (False, True)
    )
]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "kind", "specs", "placed", "context"), ONE_AXIS + TWO_AXES)
def test_parameters_are_the_same_on_every_mesh(shape, kind, specs, placed, context, stepped):
    """Everything placed or nothing, inside `jax.set_mesh` or not: bit for bit the same."""
    mesh = make_mesh(shape, kind)
    optimizer = signax.signum(0.125, axis_name="data", zeros="abstain")
    params, batch = PARAMS, make_batch()
    if placed:
        places = specs or {name: PartitionSpec() for name in PARAMS}
        params = {
            name: jax.device_put(leaf, NamedSharding(mesh, places[name]))
            for name, leaf in PARAMS.items()
        }
        batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    tx = signax.DataParallel(optimizer, mesh, param_specs=specs)
    with jax.set_mesh(mesh) if context else contextlib.nullcontext():
        actual = two_steps(tx, params, batch)
    assert_trees_equal(actual, stepped)


def test_a_compiled_step_gives_sharded_parameters_as_it_takes_them():
    """Scales, which no axis cuts, are where XLA would cut a step's results in other ways."""
    mesh = make_mesh((2, 2, 2))
    specs = {"up": PartitionSpec("fsdp", "model"), "scale": PartitionSpec()}

    def loss_fn(params, batch):
        return jnp.mean(((batch @ params["up"]) * params["scale"]) ** 2)

    params = {
        "up": jax.device_put(jnp.ones((16, 16)), NamedSharding(mesh, specs["up"])),
        "scale": jax.device_put(jnp.ones(16), NamedSharding(mesh, specs["scale"])),
    }
    batch = jax.device_put(jnp.ones((8, 16)), NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    tx = signax.DataParallel(SIGNUM, mesh, param_specs=specs)
    state = tx.init(params)
    step = tx.train_step(loss_fn).lower(params, state, batch).compile()
    for _ in range(2):
        params, state, _ = step(params, state, batch)
    for name, leaf in params.items():
        assert leaf.sharding.spec == specs[name]


def test_one_device_is_a_mesh_of_one_worker():
    mesh = make_mesh((1,))
    tx = signax.DataParallel(signax.signum(0.125, axis_name="data"), mesh)
    actual = two_steps(tx, PARAMS, make_batch())

    single = signax.signum(0.125)
    params, state = PARAMS, single.init(PARAMS)
    for _ in range(2):
        updates, state = single.update(jax.grad(squared_error)(params, make_batch()), state, params)
        params = optax.apply_updates(params, updates)
    assert_trees_equal(actual, params)


@pytest.mark.parametrize("axes", [("slice", "chip"), ("chip", "slice")])
def test_workers_may_lie_along_several_axes(axes):
    """In the order in which the tuple names them, the last one running fastest."""
    mesh = auto_mesh({"slice": 2, "chip": 4})
    optimizer = signax.ef_sign_sgd(0.1, 0.9, axis_name=axes)
    tx = signax.DataParallel(optimizer, mesh, axes)
    plain = signax.DataParallel(signax.ef_sign_sgd(0.1, 0.9, axis_name="data"), make_mesh())
    assert tx.num_workers == plain.num_workers == WORKERS
    results = []
    for parallel in (tx, plain):
        _, grads = jax.jit(parallel.value_and_grad(squared_error))(PARAMS, make_batch())
        update = jax.jit(parallel.update)
        _, state = update(grads, parallel.init(PARAMS), PARAMS)
        updates, state = update(grads, state, PARAMS)
        there = parallel.resize(state, PARAMS, 4)
        back = parallel.resize(there, PARAMS)
        results.append(jax.device_get((grads, updates, state, there, back)))
    jax.tree.map(np.testing.assert_array_equal, *results)


# What is sent.


def abstract(tree, shardings):
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def large_floating(compiled, elements=8):
    return [
        record
        for record in diagnostics.collectives(compiled)
        if record.is_floating and record.elements > elements
    ]


@pytest.mark.parametrize(
    ("kind", "specs"),
    [(A, True), (E, True), (E, False)],
    ids=["Auto with specs", "Explicit with specs", "Explicit, known by type"],
)
@pytest.mark.parametrize(
    "optimizer",
    [
        signax.signum(0.1, axis_name="data", weight_decay=0.1),
        signax.lion(0.1, axis_name="data", weight_decay=0.1),
        signax.sign_sgd(0.1, axis_name="data", weight_decay=0.1),
        signax.ssdm(0.1, jax.random.key(0), axis_name="data", weight_decay=0.1),
        signax.mean_signs("data"),
    ],
    ids=["signum", "lion", "sign_sgd", "ssdm", "mean_signs"],
)
def test_update_of_sharded_parameters_sends_no_floating_point_array(kind, specs, optimizer):
    mesh = make_mesh((4, 2), kind)
    places = {"w": PartitionSpec(None, "model"), "b": PartitionSpec()}
    tx = signax.DataParallel(optimizer, mesh, param_specs=places if specs else None)
    shapes = {"w": (256, 128), "b": (128,)}
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, places[name]))
        for name, shape in shapes.items()
    }
    grads = {
        name: jax.ShapeDtypeStruct(
            (4, *shape),
            jnp.float32,
            sharding=NamedSharding(mesh, PartitionSpec("data", *places[name])),
        )
        for name, shape in shapes.items()
    }
    state = abstract(jax.eval_shape(tx.init, params), tx.state_shardings(params))
    compiled = jax.jit(tx.update).lower(grads, state, params).compile()
    assert large_floating(compiled) == []
    assert diagnostics.collective_bytes(compiled) > 0


PARTLY_AVERAGED = optax.partition(
    {"vote": SIGNUM, "mean": optax.chain(signax.average_updates("data"), optax.adam(0.1))},
    {"w": "vote", "b": "mean"},
)
WRAPPERS = {
    "MultiSteps": optax.MultiSteps(SIGNUM, 2),
    "MultiSteps as transformation": optax.MultiSteps(SIGNUM, 2).gradient_transformation(),
    "inject_hyperparams": optax.inject_hyperparams(
        lambda rate: signax.signum(rate, axis_name="data")
    )(0.1),
    "masked": optax.chain(optax.masked(optax.trace(0.9), {"w": True, "b": False}), SIGN_SGD),
    "partition": PARTLY_AVERAGED,
}


FORGETFUL = pytest.mark.xfail(
    raises=TypeError, reason="zeros_like forgets a sharding over Explicit axes inside shard_map"
)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=FORGETFUL if kind == E and "MultiSteps" in name else ())
        for name, kind in itertools.product(WRAPPERS, (A, E))
    ],
)
def test_wrappers_vote_on_the_blocks_of_sharded_parameters(name, kind):
    """The layout and the types of the exchange: no vote sees more than a device's own block."""
    mesh = make_mesh((4, 2), kind)
    places = {"w": PartitionSpec(None, "model"), "b": PartitionSpec()}
    tx = signax.DataParallel(WRAPPERS[name], mesh, param_specs=places)
    params = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, places[name])
        )
        for name, leaf in PARAMS.items()
    }
    for path, sharding in jax.tree.leaves_with_path(tx.state_shardings(params)):
        of_w = jax.tree_util.keystr(path).endswith("['w']")
        assert ("model" in str(sharding.spec)) == of_w
    grads = {
        name: jax.ShapeDtypeStruct(
            (4, *leaf.shape),
            leaf.dtype,
            sharding=NamedSharding(mesh, PartitionSpec("data", *places[name])),
        )
        for name, leaf in PARAMS.items()
    }
    state = abstract(jax.eval_shape(tx.init, params), tx.state_shardings(params))
    jaxpr = str(jax.make_jaxpr(tx.update)(grads, state, params))
    # Inside the map over workers another runs the vote on blocks: 3 x 1 of w's 3 x 2.
    assert "f32[3,1]" in jaxpr


# 10 M numbers in large and small leaves, none a multiple of what packing rounds to.
SHAPES = {
    "embedding": (9_001, 700), "kernel": (1_801, 2_003), "bias": (2_003,), "norm": (700,),
    "scale": (), "empty": (0, 4), "filter": (3, 3, 64, 129),
}  # fmt: skip


def touching_everything(params, batch):
    return jnp.mean(batch) * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def test_step_of_ten_million_parameters_sends_one_bit_each_way(mesh):
    tx = signax.DataParallel(signax.signum(0.1, axis_name="data", weight_decay=0.01), mesh)
    whole, split = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((), ("data",)))
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole)
        for name, shape in SHAPES.items()
    }
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert size > 9_900_000
    state = abstract(jax.eval_shape(tx.init, params), tx.state_shardings(params))
    batch = jax.ShapeDtypeStruct((WORKERS,), jnp.float32, sharding=split)
    compiled = tx.train_step(touching_everything).lower(params, state, batch).compile()

    found = diagnostics.collectives(compiled)
    operations = [record.operation for record in found if not record.is_floating]
    assert sorted(operations) == ["all-gather", "all-to-all"]
    scalars = [record for record in found if record.is_floating]
    assert large_floating(compiled, elements=4) == []
    # Nothing but the loss is added to what the formula says.
    sent = diagnostics.collective_bytes(compiled)
    assert sent == diagnostics.wire_bytes(params, WORKERS) + sum(r.bytes_sent for r in scalars)
    assert sum(r.bytes_sent for r in scalars) <= 16
    assert sent <= 1.02 * 2 * (7 / 8) * size / 8
    assert 31 * sent <= 2 * (7 / 8) * 4 * size


def test_a_loss_may_start_a_scan_from_a_constant(mesh):
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


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_the_loss_is_the_mean_of_the_finite_ones(bad, mesh):
    tx = signax.DataParallel(VOTE, mesh)
    gradient = jax.jit(tx.value_and_grad(lambda params, batch: jnp.sum(batch * params)))
    loss, _ = gradient(jnp.ones(()), jnp.arange(8.0).at[3].set(bad))
    assert loss == (28 - 3) / 7
    assert jnp.isnan(gradient(jnp.ones(()), jnp.full(8, bad))[0])


@pytest.mark.parametrize(
    "params", [{"e": jnp.ones((0, 4))}, {"e": jnp.ones((0, 4)), "w": jnp.ones(2)}]
)
def test_leaves_without_coordinates_are_settled(params, mesh):
    tx = signax.DataParallel(VOTE, mesh)
    rows = jax.tree.map(lambda leaf: jnp.ones((8, *leaf.shape)), params)
    updates, _ = jax.jit(tx.update)(rows, tx.init(params), params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


def test_a_state_without_rows_is_refused_for_scalar_parameters_too(mesh):
    inner = signax.signum(0.1, axis_name="data")
    params = {"b": jnp.zeros(())}
    with pytest.raises(ValueError, match=r"momentum\['b'\] has shape \(\), but should have \(8,\)"):
        signax.DataParallel(inner, mesh).update({"b": jnp.ones(8)}, inner.init(params), params)


def test_an_extra_argument_that_is_insisted_on_is_named(mesh):
    def update(updates, state, params=None, *, value, **extra_args):
        del params, value, extra_args
        return updates, state

    inner = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    with pytest.raises(TypeError, match=r"'value'.*give every extra argument a default"):
        signax.DataParallel(optax.chain(VOTE, inner), mesh).init(jnp.ones(2))


def test_copies_are_the_same_transformation(mesh):
    tx = signax.DataParallel(VOTE, mesh)
    assert copy.copy(tx) is tx
    assert copy.deepcopy({"tx": tx})["tx"] is tx


def test_a_mesh_of_this_process_is_not_pickled(mesh):
    with pytest.raises(TypeError, match=r"DataParallel cannot be pickled.*make another one"):
        pickle.dumps(signax.DataParallel(VOTE, mesh))


def test_an_update_outside_of_jit_compiles_once(mesh, caplog):
    tx = signax.DataParallel(SIGNUM, mesh)
    grads, state = rows_of(), tx.init(PARAMS)
    expected = jax.jit(tx.update)(grads, state, PARAMS)

    def count(*args, **extra_args):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level("WARNING"):
            result = tx.update(*args, **extra_args)
        return result, sum("Compiling" in record.message for record in caplog.records)

    found, programs = count(grads, state, PARAMS)
    assert_trees_equal(found, expected)
    assert programs == 1
    (_, state), programs = count(grads, found[1], PARAMS)
    assert programs == 0
    extra_args = {"active": np.ones(WORKERS, bool), "value": 0.5, "name": "a", "sizes": [1]}
    for names, most in [(["active", "value"], 1), (["name"], 1), (["name"], 0), (["value"], 1)]:
        _, programs = count(grads, state, PARAMS, **{name: extra_args[name] for name in names})
        assert programs <= most
    tx.update(grads, state, PARAMS, sizes=[1])  # cannot be hashed, and is passed on all the same


def test_an_error_under_another_condition_stays_jaxs_own(mesh):
    def wrong(updates, state, params=None):
        del params
        mean = jax.lax.cond(jnp.bool_(True), lambda: jnp.mean(updates["w"]), lambda: jnp.float32(0))
        return jax.tree.map(lambda u: u - mean, updates), state

    tx = signax.DataParallel(
        optax.chain(optax.GradientTransformation(optax.init_empty_state, wrong), VOTE), mesh
    )
    with pytest.raises(TypeError, match="cond branches"):
        tx.update(rows_of(), tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("conditional", [optax.conditionally_mask, optax.conditionally_transform])
def test_a_vote_under_a_shared_condition_is_refused_with_its_remedy(conditional, mesh):
    def even(step):
        return step % 2 == 0

    tx = signax.DataParallel(conditional(SIGNUM, even), mesh)
    with pytest.raises(ValueError, match=r"one side of a condition.*condition after the vote"):
        tx.update(rows_of(), tx.init(PARAMS), PARAMS)
    remedy = optax.chain(VOTE, conditional(optax.scale(-0.5), even))
    tx = signax.DataParallel(remedy, mesh)
    state = tx.init(PARAMS)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(tx.update(rows_of(), state, PARAMS)[0]))


@pytest.mark.parametrize("active", [[True] * 8, np.ones(7, bool), np.ones(8), "yes"])
def test_active_flags_that_are_not_one_boolean_for_each_worker_are_refused(active, mesh):
    tx = signax.DataParallel(VOTE, mesh)
    params = jnp.ones(2)
    with pytest.raises(TypeError, match=r"active=.*one boolean for each of 8 workers"):
        tx.update(jnp.ones((8, 2)), tx.init(params), params, active=active)


def test_what_is_no_mesh_or_no_key_is_named(mesh):
    with pytest.raises(TypeError, match="mesh=None"):
        signax.DataParallel(VOTE, None)
    with pytest.raises(TypeError, match="key=0 is not a random key"):
        signax.DataParallel(VOTE, mesh).value_and_grad(jnp.sum)(jnp.ones(2), jnp.ones(8), key=0)


def test_a_transformation_that_takes_only_some_extra_arguments_is_named():
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


def test_losses_in_half_precision_are_averaged_beyond_it():
    tx = signax.DataParallel(VOTE, auto_mesh({"data": WORKERS}))
    batch = jnp.full((WORKERS, 1), 3e4, jnp.float16)  # the sum is beyond the range
    loss, _ = tx.value_and_grad(lambda p, b: jnp.sum(p * b))(jnp.ones(1, jnp.float16), batch)
    assert loss.dtype == jnp.float16
    assert loss == jnp.float16(3e4)
