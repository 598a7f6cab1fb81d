"""Flax NNX modules as they are, against Flax's own gradients of one worker after the other."""

import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from least_squares import SIGNUM, WORKERS, make_mesh, shares
from processes import run_program
from workers import assert_same_on_all_devices

import signax
import signax.flax
from signax import diagnostics

BOTH = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])


class Network(nnx.Module):
    """A dense layer between a dropout with a stream of its own and a BatchNorm."""

    def __init__(self, rngs, rate=0.0):
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.dense = nnx.Linear(4, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.dense(self.dropout(x)))


def squared(model, batch):
    inputs, targets = batch
    return jnp.mean((model(inputs) - targets) ** 2)


def make_batch(size=32, seed=0):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(size, 4)) + 4 * np.arange(size)[:, None] / size  # shares differ
    return np.float32(inputs), np.float32(rng.normal(size=(size, 3)))


def placed(model, mesh):
    nnx.update(model, jax.device_put(nnx.state(model), NamedSharding(mesh, PartitionSpec())))
    return model


def arrays(state):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(nnx.to_pure_dict(state))
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    }


def one_after_the_other(make, loss_fn, batch, pieces=WORKERS, wrt=nnx.Param):
    """Losses, gradients and models of the shares, by Flax."""
    losses, gradients, models = [], [], []
    for share in shares(batch, pieces):
        model = make()
        loss, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, wrt))(model, share)
        losses.append(loss)
        gradients.append(arrays(grads))
        models.append(arrays(nnx.state(model)))
    return losses, gradients, models


def make_step(tx, loss_fn, **options):
    @nnx.jit
    def step(model, batch, *replicated, key=None, active=None):
        return signax.flax.value_and_grad(tx, loss_fn, **options)(
            model, batch, *replicated, key=key, active=active
        )

    return step


# Gradients and statistics.


@BOTH
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_and_statistics_are_those_of_flax(kind, accumulate):
    mesh = make_mesh(kind=kind)
    tx, batch = signax.DataParallel(SIGNUM, mesh), make_batch(128)
    model = placed(Network(nnx.Rngs(0)), mesh)
    losses, gradients, models = one_after_the_other(
        lambda: Network(nnx.Rngs(0)), squared, batch, WORKERS * accumulate
    )
    loss, grads = make_step(tx, squared, accumulate=accumulate)(model, batch)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-4)
    for name, rows in arrays(grads).items():
        each = np.stack([gradient[name] for gradient in gradients])
        expected = each.reshape(WORKERS, accumulate, *each.shape[1:]).mean(axis=1)
        np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=3e-5)
    after = arrays(nnx.state(model, nnx.BatchStat))
    assert set(after) == {"['norm']['mean']", "['norm']['var']"}
    for name, found in after.items():
        each = [model[name] for model in models]
        assert np.ptp(each, axis=0).max() > 0.1
        np.testing.assert_allclose(found, np.mean(each, axis=0), rtol=1e-5, atol=1e-6)
    assert_same_on_all_devices(nnx.state(model, nnx.BatchStat))


@BOTH
def test_a_step_outside_jit_equals_a_jitted_step(kind):
    mesh = make_mesh(kind=kind)
    tx, batch = signax.DataParallel(SIGNUM, mesh), make_batch()
    models = [placed(Network(nnx.Rngs(0), rate=0.5), mesh) for _ in range(2)]
    jitted, plain = make_step(tx, squared), signax.flax.value_and_grad(tx, squared)
    found, expected = plain(models[0], batch), jitted(models[1], batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)
    states = [arrays(nnx.state(model)) for model in models]
    for name, array in states[0].items():
        np.testing.assert_allclose(array, states[1][name], rtol=1e-5)


def lifted(transform, function):
    """A loss whose model runs under a transformation, which returns every variable of it."""

    def loss_fn(model, batch):
        inputs, targets = batch
        return jnp.mean((transform(function)(model, inputs) - targets) ** 2)

    return loss_fn


@pytest.mark.parametrize("transform", [nnx.remat, nnx.jit])
def test_a_model_may_run_under_remat_or_jit(transform, mesh):
    loss_fn, batch = lifted(transform, Network.__call__), make_batch(64)
    losses, gradients, models = one_after_the_other(lambda: Network(nnx.Rngs(0)), loss_fn, batch)
    model = Network(nnx.Rngs(0))
    loss, grads = make_step(signax.DataParallel(SIGNUM, mesh), loss_fn)(model, batch)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-4)
    for name, rows in arrays(grads).items():
        each = np.stack([gradient[name] for gradient in gradients])
        np.testing.assert_allclose(rows, each, rtol=1e-4, atol=3e-5)
    for name, found in arrays(nnx.state(model, nnx.BatchStat)).items():
        each = [model[name] for model in models]
        np.testing.assert_allclose(found, np.mean(each, axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transform", [nnx.remat, nnx.jit])
def test_a_parameter_that_is_written_under_remat_or_jit_is_found(transform, mesh):
    def write(model, inputs):
        model.dense.bias[...] = model.dense.bias[...] + 1
        return model(inputs)

    step = make_step(signax.DataParallel(SIGNUM, mesh), lifted(transform, write))
    with pytest.raises(ValueError, match=r"writes the variable \['dense'\]\['bias'\].*, which wrt"):
        step(Network(nnx.Rngs(0)), make_batch())


class Fragile(nnx.Module):
    """A statistic that is the mean of a column, while the loss reads another column."""

    def __init__(self):
        self.scale = nnx.Param(jnp.ones(()))
        self.seen = nnx.BatchStat(jnp.float32(7))

    def __call__(self, x):
        self.seen[...] = x[:, 1].mean()
        return self.scale[...] * x[:, 0]


@pytest.mark.parametrize(
    ("column", "bad"), [(0, [3]), (1, [3]), (1, [0, 5]), (0, range(8)), (1, range(8))]
)
def test_statistics_leave_out_workers_that_are_not_finite(column, bad, mesh):
    rows = np.float32(np.arange(16.0).reshape(8, 2))
    rows[list(bad), column] = np.nan
    model, tx = Fragile(), signax.DataParallel(SIGNUM, mesh)
    make_step(tx, lambda model, batch: model(batch).mean())(model, rows)
    kept = [rows[i, 1] for i in range(8) if i not in bad]
    assert model.seen[...] == pytest.approx(np.mean(kept) if kept else 7)


@BOTH
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_statistics_leave_out_workers_that_do_not_vote(jit, kind):
    mesh = make_mesh(kind=kind)
    rows = np.float32(np.arange(16.0).reshape(8, 2)) + 1
    rows[3, 0] = 0  # the loss is finite, and its gradient is 0 / 0
    model, tx = placed(Fragile(), mesh), signax.DataParallel(SIGNUM, mesh)

    def loss_fn(model, batch):
        return jnp.sqrt(model(batch).mean())

    step = make_step(tx, loss_fn) if jit else signax.flax.value_and_grad(tx, loss_fn)
    active = np.arange(8) != 6
    loss, grads = step(model, rows, active=active)
    assert np.isfinite(loss)
    assert np.isnan(arrays(grads)["['scale']"][3])
    kept = [rows[i, 1] for i in range(8) if i not in (3, 6)]
    assert model.seen[...] == pytest.approx(np.mean(kept))
    params = nnx.state(model, nnx.Param)
    _, state = jax.jit(tx.update)(grads, tx.init(params), params, active=active)
    assert signax.participation(state).voters == len(kept)
    step(model, rows, active=np.arange(8) == 3)
    assert model.seen[...] == pytest.approx(np.mean(kept))  # of nobody: unchanged


def test_statistics_leave_out_micro_batches_with_a_nan_and_all_of_a_worker_without_a_gradient(mesh):
    rows = np.float32(np.arange(32.0).reshape(16, 2)) + 1
    rows[4, 0] = 0  # worker 2 has no finite gradient
    rows[11, 1] = np.inf  # the second micro-batch of worker 5 has no finite statistic
    model, tx = Fragile(), signax.DataParallel(SIGNUM, mesh)

    def loss_fn(model, batch):
        return jnp.sqrt(model(batch).mean())

    make_step(tx, loss_fn, accumulate=2)(model, rows)
    kept = [rows[i, 1] for i in range(16) if i not in (4, 5, 11)]
    assert model.seen[...] == pytest.approx(np.mean(kept))


def test_rejects_active_of_a_wrong_shape(mesh):
    step = make_step(signax.DataParallel(SIGNUM, mesh), lambda model, batch: model(batch).mean())
    with pytest.raises(TypeError, match="must be an array of one boolean for each of 8 workers"):
        step(Counting(), jnp.ones(WORKERS), active=jnp.ones(4, bool))


def test_half_precision_statistics_are_averaged_without_overflow(mesh):
    model, tx = Fragile(), signax.DataParallel(SIGNUM, mesh)
    model.seen.set_value(jnp.float16(0))
    rows = jnp.full((WORKERS, 2), 3e4, jnp.float16)  # the sum overflows f16
    make_step(tx, lambda model, batch: model(batch).mean())(model, rows)
    assert model.seen[...].dtype == jnp.float16
    assert model.seen[...] == jnp.float16(3e4)


class Counting(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.ones(()))
        self.calls = nnx.Variable(jnp.int32(4))
        self.largest = nnx.Variable(jnp.int32(-1))
        self.reached = nnx.Variable(jnp.bool_(False))
        self.constant = nnx.Variable(jnp.float32(1.1))

    def __call__(self, x):
        self.calls[...] += 1
        self.largest[...] = jnp.max(x).astype(jnp.int32)
        self.reached[...] |= jnp.any(x > 6)
        return self.scale[...] * self.constant[...] * x


@pytest.mark.parametrize("accumulate", [1, 2])
def test_integers_and_booleans_become_the_largest_of_all_workers(accumulate, mesh):
    model, tx = Counting(), signax.DataParallel(SIGNUM, mesh)
    step = make_step(tx, lambda model, batch: model(batch).mean(), accumulate=accumulate)
    step(model, np.arange(8.0 * accumulate, dtype=np.float32))
    assert model.calls[...] == 5  # once, whatever the number of workers and micro-batches
    assert model.largest[...] == 8 * accumulate - 1
    assert model.reached[...]
    assert model.calls[...].dtype == jnp.int32
    assert model.reached[...].dtype == jnp.bool_
    assert model.constant[...] == np.float32(1.1)  # a mean of eight would round


# Random streams.


def draw(model, batch):
    """The masks of a dropout of ones, as aux."""
    masks = model.dropout(jnp.ones((len(batch), 64)))
    return jnp.mean(batch * masks[:, 0]) * model.dense.bias[0], masks


def masks_of(model, mesh, accumulate=1, loss_fn=draw, **keyword):
    tx = signax.DataParallel(SIGNUM, mesh)
    step = make_step(tx, loss_fn, has_aux=True, aux="concat", accumulate=accumulate)
    (_, masks), _ = step(model, jnp.ones(WORKERS * accumulate), **keyword)
    return np.asarray(masks)


@BOTH
def test_dropout_draws_another_mask_on_every_worker_micro_batch_and_step(kind):
    mesh = make_mesh(kind=kind)
    model = placed(Network(nnx.Rngs(0), rate=0.5), mesh)
    masks = np.concatenate([masks_of(model, mesh, accumulate=2) for _ in range(3)])
    assert masks.shape == (3 * 2 * WORKERS, 64)
    assert len(np.unique(masks, axis=0)) == len(masks)
    assert model.dropout.rngs.count[...] == 3
    assert 0.4 < np.mean(masks > 0) < 0.6


def test_masks_depend_on_the_seed_the_count_and_the_key_alone(mesh):
    def masks(seed=0, count=0, **keyword):
        model = Network(nnx.Rngs(seed), rate=0.5)
        model.dropout.rngs.count[...] = jnp.uint32(count)
        return masks_of(model, mesh, **keyword)

    every = [
        masks(),
        masks(seed=1),
        masks(count=1),
        masks(key=jax.random.key(0)),
        masks(key=jax.random.key(1)),
    ]
    np.testing.assert_array_equal(masks(), every[0])
    np.testing.assert_array_equal(masks(key=jax.random.key(1)), every[-1])
    every.pop(0)  # the same as of key 0, which is the default
    assert len(np.unique(np.concatenate(every), axis=0)) == 4 * WORKERS


def test_streams_keep_their_keys(mesh):
    model = Network(nnx.Rngs(0), rate=0.5)
    before = jax.random.key_data(model.dropout.rngs.key[...])
    masks_of(model, mesh)
    np.testing.assert_array_equal(jax.random.key_data(model.dropout.rngs.key[...]), before)


def test_a_split_stream_draws_another_mask_on_every_worker(mesh):
    class Ensemble(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.ones(()))
            self.rngs = nnx.Rngs(0).split(3)

        def __call__(self, x):
            keys = self.rngs.default.key[...]
            return jax.vmap(lambda key: jax.random.normal(key))(keys) * self.scale[...] * x.mean()

    def loss_fn(model, batch):
        drawn = model(batch)
        return drawn.mean(), drawn

    tx = signax.DataParallel(SIGNUM, mesh)
    (_, drawn), _ = make_step(tx, loss_fn, has_aux=True)(Ensemble(), jnp.ones(WORKERS))
    assert drawn.shape == (WORKERS, 3)
    assert len(np.unique(drawn)) == 3 * WORKERS


def test_a_loss_with_an_argument_key_gets_the_key_of_its_worker(mesh):
    def loss_fn(model, batch, table, key):
        return jnp.mean(model.scale[...] * batch), (jax.random.bits(key), table)

    tx, model = signax.DataParallel(SIGNUM, mesh), Counting()
    step = make_step(tx, loss_fn, has_aux=True)
    (_, (drawn, tables)), _ = step(model, jnp.ones(WORKERS), jnp.arange(3), key=jax.random.key(5))
    expected = [jax.random.bits(jax.random.fold_in(jax.random.key(5), i)) for i in range(WORKERS)]
    np.testing.assert_array_equal(drawn, expected)
    np.testing.assert_array_equal(tables, np.tile(np.arange(3), (WORKERS, 1)))


# Training.


def test_an_optimizer_of_flax_trains_dropout_and_batchnorm():
    mesh = make_mesh(kind=AxisType.Explicit)
    tx = signax.DataParallel(signax.signum(0.05, axis_name="data"), mesh)
    model = placed(Network(nnx.Rngs(0), rate=0.1), mesh)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.step[...] = jax.device_put(optimizer.step[...], NamedSharding(mesh, PartitionSpec()))
    traced = []

    def loss_fn(model, batch):
        traced.append(1)
        return squared(model, batch)

    @nnx.jit
    def step(model, optimizer, batch):
        loss, grads = signax.flax.value_and_grad(tx, loss_fn)(model, batch)
        optimizer.update(model, grads)
        return loss

    inputs = np.random.default_rng(1).normal(size=(256, 4)).astype(np.float32)
    batch = inputs, inputs[:, :3] - inputs[:, 1:]
    losses = [float(step(model, optimizer, batch))]
    number = len(traced)
    losses += [float(step(model, optimizer, batch)) for _ in range(60)]
    assert len(traced) == number  # the second call compiles nothing
    assert losses[-1] < 0.5 * losses[0]
    assert_same_on_all_devices(nnx.state(model, (nnx.Param, nnx.BatchStat)))


class Adapted(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(64, 64, rngs=rngs)
        self.adapter = nnx.LoRA(64, 2, 64, rngs=rngs)

    def __call__(self, x):
        return self.dense(x) + self.adapter(x)


def test_lora_trains_and_sends_only_what_wrt_selects(mesh):
    tx = signax.DataParallel(signax.sign_sgd(0.5, axis_name="data"), mesh)
    model = Adapted(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    batch = jnp.ones((WORKERS, 64)), jnp.ones((WORKERS, 64))
    before = arrays(nnx.state(model))

    @nnx.jit
    def step(model, optimizer, batch):
        gradient = signax.flax.value_and_grad(tx, squared, wrt=nnx.LoRAParam)
        loss, grads = gradient(model, batch)
        optimizer.update(model, grads)
        return loss, grads

    compiled = step.lower(model, optimizer, batch).compile()
    _, grads = step(model, optimizer, batch)
    assert {name: rows.shape for name, rows in arrays(grads).items()} == {
        "['adapter']['lora_a']": (WORKERS, 64, 2),
        "['adapter']['lora_b']": (WORKERS, 2, 64),
    }
    after = arrays(nnx.state(model))
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed == {"['adapter']['lora_a']", "['adapter']['lora_b']"}
    votes = diagnostics.wire_bytes(nnx.state(model, nnx.LoRAParam), WORKERS)
    assert votes <= diagnostics.collective_bytes(compiled.compiled) <= votes + 64  # the loss


# Errors.


def test_rejects_a_plain_transformation():
    with pytest.raises(TypeError, match=r"is not a signax\.DataParallel"):
        signax.flax.value_and_grad(SIGNUM, squared)


def test_rejects_aux_without_has_aux(mesh):
    with pytest.raises(ValueError, match="aux='mean' needs has_aux=True"):
        signax.flax.value_and_grad(signax.DataParallel(SIGNUM, mesh), squared, aux="mean")


def test_rejects_a_key_that_nothing_uses(mesh):
    step = make_step(signax.DataParallel(SIGNUM, mesh), lambda model, batch: model(batch).mean())
    with pytest.raises(TypeError, match="has no effect"):
        step(Counting(), jnp.ones(WORKERS), key=jax.random.key(0))


def remember(model, batch):
    model.seen = nnx.Intermediate(batch)
    return model.scale[...] * batch.mean()


def grow(model, batch):
    model.constant.set_value(batch)
    return model.scale[...] * batch.mean()


def write_parameter(model, batch):
    model.scale[...] = model.scale[...] / 2
    return model.scale[...] * batch.mean()


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (remember, r"adds the variable \['seen'\].* take it out in loss_fn"),
        (grow, r"\['constant'\].* changes its shape to \(1,\)"),
        (write_parameter, r"writes the variable \['scale'\].*, which wrt selects"),
    ],
)
def test_rejects_writes_that_have_no_mean(loss_fn, message, mesh):
    step = make_step(signax.DataParallel(SIGNUM, mesh), loss_fn)
    with pytest.raises(ValueError, match=message):
        step(Counting(), jnp.ones(WORKERS))


def test_a_variable_that_the_loss_takes_out_again_is_no_error(mesh):
    def loss_fn(model, batch):
        loss = remember(model, batch)
        return loss, nnx.pop(model, nnx.Intermediate)["seen"]

    step = make_step(signax.DataParallel(SIGNUM, mesh), loss_fn, has_aux=True, aux="concat")
    (_, seen), _ = step(Counting(), jnp.arange(8.0))
    np.testing.assert_array_equal(seen, np.arange(8.0))


def test_an_import_without_flax_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "flax", None)
    monkeypatch.delitem(sys.modules, "signax.flax")
    with pytest.raises(ImportError, match="pip install flax"):
        importlib.import_module("signax.flax")


def test_signax_does_not_import_flax(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import sys, signax\nassert 'flax' not in sys.modules\n")
    finished = run_program(program)
    assert finished.returncode == 0, finished.stderr
