"""Steps whose exchanges run beside the backward pass: the same results, with barriers."""

import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from optax.contrib import MuonDimensionNumbers
from workers import auto_mesh

import signax
from signax._overlap.overlap import compiler_options
from signax._wire import words
from signax._wire.words import CHUNK

thorough = pytest.mark.thorough
NUM_WORKERS, WIDTH = 8, 6
BY_WORKER, SHARED = PartitionSpec("data"), PartitionSpec()
PARAMS = {
    "first": jnp.asarray(np.random.default_rng(0).standard_normal((WIDTH, WIDTH)), jnp.float32),
    "layers": jnp.asarray(np.random.default_rng(1).standard_normal((3, WIDTH, WIDTH)), jnp.float32),
    "last": {"w": jnp.ones((WIDTH, 3)), "b": jnp.zeros(3)},
}
BUCKETS = {"first": 2, "layers": 1, "last": {"w": 0, "b": 0}}
ONE = jax.tree.map(lambda _: 0, BUCKETS)


def unrolled(params, batch, key):
    del key
    hidden = batch["x"] @ params["first"]
    for n in range(3):
        hidden = jnp.tanh(hidden @ params["layers"][n])
    return head(params, hidden, batch)


def head(params, hidden, batch):
    logits = hidden @ params["last"]["w"] + params["last"]["b"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return jnp.mean(losses.astype(jnp.float32))


def scanned(params, batch, key):
    del key
    layer = lambda hidden, own: (jnp.tanh(hidden @ own), None)  # noqa: E731
    hidden, _ = lax.scan(layer, batch["x"] @ params["first"], params["layers"])
    return head(params, hidden, batch)


def checkpointed(params, batch, key):
    del key
    hidden = batch["x"] @ params["first"]
    for n in range(3):
        hidden = jax.checkpoint(lambda h, w: jnp.tanh(h @ w))(hidden, params["layers"][n])
    return head(params, hidden, batch)


def dropped(params, batch, key):
    hidden = batch["x"] @ params["first"]
    for n in range(3):
        kept = jax.random.bernoulli(jax.random.fold_in(key, n), 0.5, hidden.shape)
        hidden = jnp.where(kept, jnp.tanh(hidden @ params["layers"][n]), 0)
    return head(params, hidden, batch)


def compiled(params, batch, key):
    return jax.jit(unrolled)(params, batch, key)


def half(params, batch, key):
    """Parameters are cast at the start, so casts of gradients end the backward pass."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    return unrolled(params, {**batch, "x": batch["x"].astype(jnp.bfloat16)}, key)


LOSSES = {f.__name__: f for f in (unrolled, scanned, checkpointed, dropped, compiled, half)}


def optimizer(name):
    if name == "signum":
        return signax.signum(0.1, axis_name="data", weight_decay=0.1, transport="packed")
    if name == "sums":
        return signax.signum(0.1, axis_name="data", transport="sum")
    if name == "mean":
        return optax.chain(signax.average_updates("data"), optax.sgd(0.1))
    return signax.ef_sign_sgd(0.1, 0.9, axis_name="data", num_workers=NUM_WORKERS)


def make_batch(seed=0, rows=2):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows * NUM_WORKERS, WIDTH)).astype(np.float32)
    return {"x": jnp.asarray(x), "y": jnp.asarray(rng.integers(0, 3, len(x)))}


def make_step(tx, loss_fn, has_aux=False):
    """A step of one worker, with arguments and results in several kinds of trees."""

    def step(training, batch, *, key):
        params, state = training["params"], jax.tree.map(lambda row: row[0], training["state"])
        own = lax.pcast(params, "data", to="varying")
        gradient = jax.value_and_grad(loss_fn, has_aux=has_aux)
        value, grads = gradient(own, batch, jax.random.fold_in(key, lax.axis_index("data")))
        updates, state = tx.update(grads, state, params)
        training = {
            "params": optax.apply_updates(params, updates),
            "state": jax.tree.map(lambda leaf: as_row(leaf), state),
        }
        return training, jax.tree.map(lambda leaf: leaf[None], value)

    return step


def as_row(leaf):
    varies = "data" in jax.typeof(leaf).manual_axis_type.varying
    return (leaf if varies else lax.pcast(leaf, "data", to="varying"))[None]


def on_mesh(step):
    training = {"params": SHARED, "state": BY_WORKER}
    mesh = auto_mesh({"data": NUM_WORKERS})

    def mapped(training_now, batch, key):
        return jax.shard_map(
            lambda training, batch, key: step(training, batch, key=key),
            mesh=mesh,
            in_specs=(training, BY_WORKER, SHARED),
            out_specs=(training, BY_WORKER),
        )(training_now, batch, key)

    return mapped


def start(tx, params=PARAMS):
    rows = jax.tree.map(lambda leaf: jnp.stack([leaf] * NUM_WORKERS), tx.init(params))
    return {"params": params, "state": rows}


def run(step, training, steps=3):
    results, compiled = [], jax.jit(on_mesh(step))
    for n in range(steps):
        training, values = compiled(training, make_batch(n), jax.random.key(n))
        results.append((training, values))
    return results


def program(step, training):
    return jax.make_jaxpr(on_mesh(step))(training, make_batch(), jax.random.key(0))


def operations(jaxpr):
    """Name all operations in a jaxpr and in the jaxprs that it calls."""
    names = []
    for equation in jaxpr.eqns:
        names.append(equation.primitive.name)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda node: hasattr(node, "eqns")
        ):
            if hasattr(inner, "eqns"):
                names += operations(getattr(inner, "jaxpr", inner))
    return names


def collectives(jaxpr):
    words = ("all_to_all", "all_gather", "psum", "ppermute", "reduce_scatter")
    return sorted(name for name in operations(jaxpr) if name.startswith(words))


def assert_equal(found, expected):
    def equal(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64))

    jax.tree.map(equal, found, expected)


CASES = [
    ("signum", "unrolled"),
    ("ef_sign_sgd", "scanned"),
    pytest.param("signum", "checkpointed", marks=thorough),
    pytest.param("ef_sign_sgd", "dropped", marks=thorough),
    pytest.param("signum", "compiled", marks=thorough),
    pytest.param("signum", "half", marks=thorough),
]


@pytest.mark.parametrize(("name", "loss"), CASES)
def test_results_are_those_of_the_step_bit_for_bit(name, loss):
    tx = signax.in_buckets(optimizer(name), BUCKETS)
    step = make_step(tx, LOSSES[loss])
    expected, found = run(step, start(tx)), run(signax.overlap(step), start(tx))
    assert_equal(found, expected)
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), found[-1][0]["params"], PARAMS)
    assert all(jax.tree.leaves(changed))


@pytest.mark.parametrize(("name", "loss"), CASES)
def test_the_program_has_the_same_collectives_and_barriers_beside(name, loss):
    tx = signax.in_buckets(optimizer(name), BUCKETS)
    step = make_step(tx, LOSSES[loss])
    plain, ordered = (program(each, start(tx)).jaxpr for each in (step, signax.overlap(step)))
    assert collectives(plain) == collectives(ordered)
    assert collectives(plain).count("all_to_all") == 3
    count = functools.partial(list.count, operations(ordered))
    assert count("optimization_barrier") > operations(plain).count("optimization_barrier")
    assert count("dot_general") == operations(plain).count("dot_general")


@pytest.mark.parametrize("buckets", ["one", "none"])
def test_without_two_exchanges_the_step_has_no_further_barrier(buckets):
    tx = optimizer("signum")
    tx = signax.in_buckets(tx, ONE) if buckets == "one" else tx
    step = make_step(tx, unrolled)
    plain, ordered = (program(each, start(tx)).jaxpr for each in (step, signax.overlap(step)))
    barriers = [operations(p).count("optimization_barrier") for p in (plain, ordered)]
    assert barriers[0] == barriers[1]
    assert_equal(run(signax.overlap(step), start(tx), 1), run(step, start(tx), 1))


def test_a_loss_may_have_auxiliary_results():
    def loss(params, batch, key):
        return unrolled(params, batch, key), {"rows": batch["x"].sum(), "y": batch["y"][:1]}

    tx = signax.in_buckets(optimizer("signum"), BUCKETS)
    step = make_step(tx, loss, has_aux=True)
    assert_equal(run(signax.overlap(step), start(tx)), run(step, start(tx)))


def test_parameters_may_be_in_half_precision():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)

    def loss(params, batch, key):
        return unrolled(params, {**batch, "x": batch["x"].astype(jnp.bfloat16)}, key)

    tx = signax.in_buckets(optimizer("ef_sign_sgd"), BUCKETS)
    step = make_step(tx, loss)
    assert_equal(run(signax.overlap(step), start(tx, params)), run(step, start(tx, params)))


def test_faults_exclude_the_same_workers():
    tx = signax.in_buckets(optimizer("signum"), BUCKETS)

    def loss(params, batch, key):
        del key
        hidden = batch["x"] @ params["first"]
        # Worker 3's gradient has a NaN in the first layer alone.
        bad = jnp.where(lax.axis_index("data") == 3, jnp.nan, 0.0) * params["first"][0, 0]
        hidden = hidden @ params["layers"][0]
        return head(params, hidden, batch) + jnp.where(jnp.isnan(bad), 0.0, bad)

    step = make_step(tx, loss)
    found = run(signax.overlap(step), start(tx), 2)
    assert_equal(found, run(step, start(tx), 2))
    for training, _ in found:
        voters = [rows[0] for _, rows in optax.tree.get_all_with_path(training["state"], "voters")]
        assert [*map(int, voters)] == [8, 8, 7]


def check_train_step(tx):
    """Assert that a step in one map equals a gradient and an update in a map each."""
    gradient, step = tx.value_and_grad(dropped), tx.train_step(dropped)
    batch = [make_batch(n) for n in range(3)]

    @jax.jit
    def plain(params, state, batch, key):
        loss, rows = gradient(params, batch, key=key)
        updates, state = tx.update(rows, state, params)
        return optax.apply_updates(params, updates), state, loss

    keys = [jax.random.key(n) for n in range(3)]
    expected = PARAMS, tx.init(PARAMS), None
    found = jax.tree.map(jnp.copy, expected)  # a step donates its arguments
    for own, key in zip(batch, keys, strict=True):
        expected = plain(*expected[:2], own, key)
        found = step(*found[:2], own, key=key)
    assert_equal(found, expected)


def one_step(tx, params, batch, loss_fn=unrolled):
    """Parameters after a step of `train_step`, and the rows of gradients before it."""
    key = jax.random.key(0)
    _, rows = jax.jit(tx.value_and_grad(loss_fn))(params, batch, key=key)
    step, arguments = tx.train_step(loss_fn), (jax.tree.map(jnp.copy, params), tx.init(params))
    names = operations(step.trace(*arguments, batch, key=key).jaxpr.jaxpr)
    return step(*arguments, batch, key=key)[0], rows, names


def test_train_step_averages_in_buckets():
    mean = optax.chain(signax.average_updates("data"), optax.sgd(0.1))
    mesh, batch = auto_mesh({"data": NUM_WORKERS}), make_batch()
    found, _, names = one_step(
        signax.DataParallel(signax.in_buckets(mean, BUCKETS), mesh), PARAMS, batch
    )
    _, _, plain = one_step(signax.DataParallel(mean, mesh), PARAMS, batch)
    assert names.count("optimization_barrier") > plain.count("optimization_barrier")
    gradient = jax.grad(unrolled)(PARAMS, batch, None)  # the shares of the workers are equal
    for after, before, g in zip(*map(jax.tree.leaves, (found, PARAMS, gradient)), strict=True):
        np.testing.assert_allclose(after, before - 0.1 * g, rtol=1e-5, atol=1e-6)


def test_train_step_votes_by_sums_in_buckets():
    vote = signax.sign_sgd(
        0.5, axis_name="data", transport="sum", zeros="plus", ties="plus", weight_decay=0.0
    )
    tx = signax.DataParallel(signax.in_buckets(vote, BUCKETS), auto_mesh({"data": NUM_WORKERS}))
    found, rows, _ = one_step(tx, PARAMS, make_batch())
    for after, before, g in zip(*map(jax.tree.leaves, (found, PARAMS, rows)), strict=True):
        votes = np.where(np.where(np.asarray(g) >= 0, 1, -1).sum(axis=0) >= 0, 1, -1)
        np.testing.assert_allclose(after, before - 0.5 * votes, rtol=1e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["ef_sign_sgd", "sum"])
def test_train_step_takes_sharded_parameters_in_buckets(name, kind):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)
    specs = {"up": PartitionSpec(None, "model"), "down": PartitionSpec()}
    params = {"up": jnp.ones((WIDTH, 4)), "down": jnp.ones((WIDTH, WIDTH))}
    place = {key: jax.NamedSharding(mesh, spec) for key, spec in specs.items()}
    params = jax.device_put(params, place)
    if name == "sum":
        each = signax.signum(0.1, axis_name="data", transport="sum")
    else:
        each = signax.ef_sign_sgd(0.1, axis_name="data", num_workers=2)
    tx = signax.in_buckets(each, {"up": 0, "down": 1})
    tx = signax.DataParallel(tx, mesh, param_specs=specs if kind == AxisType.Auto else None)

    def loss_fn(params, batch, key):
        del key
        return jnp.mean((batch @ params["down"] @ params["up"]) ** 2)

    batch = jnp.asarray(np.random.default_rng(0).standard_normal((8, WIDTH)), jnp.float32)
    found, rows, _ = one_step(tx, params, batch, loss_fn)
    updates, _ = jax.jit(tx.update)(rows, tx.init(params), params)
    expected = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


@pytest.mark.parametrize(
    ("name", "chunk"),
    [
        pytest.param("signum", CHUNK, marks=thorough),
        ("signum", 2),
        ("ef_sign_sgd", CHUNK),
        ("mean", CHUNK),
        pytest.param("sums", CHUNK, marks=thorough),
    ],
)
def test_train_step_equals_a_gradient_and_an_update_bit_for_bit(name, chunk, monkeypatch):
    monkeypatch.setattr(words, "CHUNK", chunk)  # with more workers than 2 * CHUNK a loop counts
    mesh = auto_mesh({"data": NUM_WORKERS})
    tx = signax.DataParallel(signax.in_buckets(optimizer(name), BUCKETS), mesh)
    check_train_step(tx)


def test_train_step_takes_matrices_that_are_sharded_within_a_worker():
    matrices = {"first": MuonDimensionNumbers(), "layers": MuonDimensionNumbers(1, 2), "last": None}
    specs = {
        "first": PartitionSpec("model"),
        "layers": PartitionSpec(None, None, "model"),
        "last": {"w": SHARED, "b": SHARED},
    }
    muon = signax.muon(0.1, axis_name="data", weight_dimension_numbers=matrices)
    mesh = auto_mesh({"data": 4, "model": 2})
    tx = signax.DataParallel(signax.in_buckets(muon, BUCKETS), mesh, param_specs=specs)
    check_train_step(tx)


@pytest.mark.parametrize(
    ("kind", "slices", "is_async"),
    [
        ("TPU v5 lite", [0] * 16, True),
        ("TPU v5 lite", [0] * 32, False),  # XLA rejects the option
        ("TPU v5 lite", [0] * 16 + [1] * 16, True),
        ("TPU v4", [0] * 32, True),
    ],
)
def test_compiler_options_depend_on_the_slice(kind, slices, is_async):
    devices = [SimpleNamespace(device_kind=kind, platform="tpu", slice_index=n) for n in slices]
    options = compiler_options(SimpleNamespace(devices=np.array(devices)))
    assert options == ({"xla_tpu_enable_async_all_to_all": "true"} if is_async else {})


def test_the_step_keeps_its_name():
    def step(params):
        """Its documentation."""
        return params

    assert signax.overlap(step).__name__ == "step"
    assert signax.overlap(step).__doc__ == "Its documentation."


@pytest.mark.parametrize("loss", ["unrolled", "checkpointed", "half"])
def test_every_message_but_the_last_precedes_a_part_of_the_backward_pass(loss):
    """Where an operation waits for a barrier, operations keep the order of the program."""
    tx = signax.in_buckets(optimizer("signum"), BUCKETS)
    step = signax.overlap(make_step(tx, LOSSES[loss]))
    names = operations(program(step, start(tx)).jaxpr)
    sent = [n for n, name in enumerate(names) if name == "all_to_all"]
    products = [n for n, name in enumerate(names) if name == "dot_general"]
    barriers = [n for n, name in enumerate(names) if name == "optimization_barrier"]
    assert len(sent) == 3
    for earlier, later in itertools.pairwise(sent):
        between = [n for n in products if earlier < n < later]
        assert between
        assert any(between[-1] < n < later for n in barriers)
