"""Updates under `DataParallel`, against a simulation in NumPy of one worker after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from least_squares import (
    PARAMS,
    SIGN_SGD,
    SIGNUM,
    VOTE,
    WORKERS,
    assert_trees_close,
    assert_trees_equal,
    make_batch,
    make_mesh,
    rows_of,
    squared_error,
)
from workers import assert_same_on_all_devices, auto_mesh

import signax


class Simulation:
    """Signum on every worker in NumPy, with the reference vote.

    Gradients are small whole numbers and the decay is 1/2, so momenta are exact in f32.
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
            rows = np.where(finite)[0]  # a nonfinite gradient does not change the momentum
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
    # All workers in one step, none in another, a random share otherwise.
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
        if "weight_decay" in options:  # decay rounds
            assert_trees_close(params, simulation.params)
        else:
            assert_trees_equal(params, simulation.params)


def test_an_update_without_parameters_is_the_same(mesh):
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


def test_an_extra_argument_named_raw_reaches_the_transformation(mesh):
    """The library's own extra argument is `signax`; every other name belongs to the caller."""

    def add_raw(updates, state, params=None, *, raw=None, **extra_args):
        del params, extra_args
        shift = 0 if raw is None else raw["shift"]
        return jax.tree.map(lambda u: u + shift, updates), state

    shift = optax.GradientTransformationExtraArgs(optax.init_empty_state, add_raw)
    tx = signax.DataParallel(optax.chain(SIGN_SGD, shift), mesh)
    state = tx.init(PARAMS)
    plain, _ = tx.update(rows_of(), state, PARAMS)
    shifted, _ = tx.update(rows_of(), state, PARAMS, raw={"shift": jnp.float32(3.0)})
    assert_trees_equal(shifted, jax.tree.map(lambda u: u + 3, plain))


def test_leaves_frozen_after_the_vote_do_not_move(mesh):
    frozen = optax.masked(optax.set_to_zero(), {"w": False, "b": True})
    tx = signax.DataParallel(optax.chain(SIGNUM, frozen), mesh)
    update = jax.jit(tx.update)
    state = tx.init(PARAMS)
    for _ in range(3):
        updates, state = update(rows_of(), state, PARAMS)
        assert not np.any(updates["b"])
        assert np.all(np.abs(updates["w"]) == 0.125)


@pytest.mark.parametrize(
    "params", [{"e": jnp.ones((0, 4))}, {"e": jnp.ones((0, 4)), "w": jnp.ones(2)}]
)
def test_accepts_leaves_without_coordinates(params, mesh):
    tx = signax.DataParallel(VOTE, mesh)
    rows = jax.tree.map(lambda leaf: jnp.ones((8, *leaf.shape)), params)
    updates, _ = jax.jit(tx.update)(rows, tx.init(params), params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


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
def test_active_reaches_a_vote_inside_wrappers(wrap, mesh):
    tx = signax.DataParallel(wrap(SIGN_SGD), mesh)
    # Seven workers oppose one, and only the one takes part.
    grads = jax.tree.map(lambda p: jnp.ones((WORKERS, *p.shape)).at[3].set(-1.0), PARAMS)
    updates, _ = jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS, active=jnp.arange(WORKERS) == 3)
    assert_trees_equal(updates, jax.tree.map(lambda p: np.full(p.shape, 0.125), PARAMS))


def test_averaged_updates_equal_one_worker_on_the_mean_gradient(mesh):
    inner = optax.adamw(0.1)
    tx = signax.DataParallel(optax.chain(signax.average_updates("data"), inner), mesh)
    grads = rows_of()
    updates, _ = jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS)
    mean = jax.tree.map(lambda rows: rows.mean(axis=0), grads)
    assert_trees_close(updates, inner.update(mean, inner.init(PARAMS), PARAMS)[0])


def test_clipping_by_global_norm_uses_each_workers_own_norm(mesh):
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


def test_workers_draw_different_stochastic_signs_from_a_shared_key(mesh):
    """Eight independent fair coins seldom agree, so the mean of the drawn signs is seldom +-1."""
    drawn = signax.scale_by_stochastic_sign(jax.random.key(0), norm=1e6, axis_name="data")
    tx = signax.DataParallel(optax.chain(drawn, signax.average_updates("data")), mesh)
    params = jnp.zeros(256)
    updates, _ = jax.jit(tx.update)(jnp.ones((WORKERS, 256)), tx.init(params), params)
    assert np.mean(np.abs(updates) == 1) < 0.05  # 2 / 2^8 expected


@pytest.mark.parametrize("axes", [("slice", "chip"), ("chip", "slice")])
def test_workers_may_lie_along_several_axes(axes):
    """Workers are numbered in the order of the tuple; the last axis varies fastest."""
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


def test_an_update_outside_jit_compiles_once(mesh, caplog):
    tx = signax.DataParallel(SIGNUM, mesh)
    grads, state = rows_of(), tx.init(PARAMS)
    expected = jax.jit(tx.update)(grads, state, PARAMS)

    def count(*args, **extra_args):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level("WARNING"):
            result = tx.update(*args, **extra_args)
        return result, sum("XLA compilation" in record.message for record in caplog.records)

    found, programs = count(grads, state, PARAMS)
    assert_trees_equal(found, expected)
    assert programs == 1
    (_, state), programs = count(grads, found[1], PARAMS)
    assert programs == 0
    extra_args = {"active": np.ones(WORKERS, bool), "value": 0.5, "name": "a", "sizes": [1]}
    extra_args["value_fn"] = jnp.sum
    for names, most in [
        (["active", "value"], 1),
        (["name"], 1),
        (["name"], 0),
        (["value"], 1),
        (["sizes"], 1),
        (["sizes"], 0),
        (["value_fn", "value"], 1),
        (["value_fn", "value"], 0),
    ]:
        _, programs = count(grads, state, PARAMS, **{name: extra_args[name] for name in names})
        assert programs <= most


def test_a_function_among_the_extra_arguments_sees_changed_values(mesh):
    def shift(updates, state, params=None, *, value_fn=jnp.sum, **extra_args):
        return jax.tree.map(lambda u: u + value_fn(params), updates), state

    shifted = optax.GradientTransformationExtraArgs(optax.init_empty_state, shift)
    tx = signax.DataParallel(optax.chain(signax.average_updates("data"), shifted), mesh)
    params, rows, factor = jnp.full(3, 2.0), jnp.ones((WORKERS, 3)), 1.0

    def value_fn(params):
        return factor * jnp.sum(params)

    for factor in (1.0, 10.0):
        updates, _ = tx.update(rows, tx.init(params), params, value_fn=value_fn)
        np.testing.assert_array_equal(updates, np.full(3, 1 + 6 * factor))


# Updates are the same on every worker: by type, and bit for bit.


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


@pytest.mark.parametrize(
    "optimizer", [signax.sign_sgd, signax.signum, signax.lion], ids=lambda f: f.__name__
)
def test_parameters_stay_identical_on_all_devices_with_a_nonfinite_worker_in_each_step(
    optimizer, mesh
):
    tx = signax.DataParallel(optimizer(0.01, weight_decay=0.1, axis_name="data"), mesh)
    params = jax.device_put(jax.tree.map(np.asarray, PARAMS), NamedSharding(mesh, PartitionSpec()))
    state, step = tx.init(params), tx.train_step(squared_error)
    for number in range(100):
        batch = jax.tree.map(np.array, make_batch(16))
        batch["x"][2 * (number % WORKERS), 0] = (np.nan, np.inf)[number % 2]
        params, state, _ = step(params, state, batch)
    assert_same_on_all_devices(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((params, state)))
    assert squared_error(params, make_batch(16)) < squared_error(PARAMS, make_batch(16)) / 2


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
def test_rejects_updates_that_differ_between_workers(tx, mesh):
    tx = signax.DataParallel(tx, mesh)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"updates\['b'\] is neither voted nor averaged") as error:
        jax.eval_shape(tx.update, rows_of(), state, PARAMS)
    assert "'data'" in str(error.value)


def test_rejects_a_vote_on_updates_that_are_replicated_by_type(mesh):
    def replace(updates, params):
        del params
        return {**updates, "b": jnp.ones(2)}

    tx = signax.DataParallel(optax.chain(optax.stateless(replace), VOTE), mesh)
    with pytest.raises(ValueError, match=r"updates\['b'\] does not vary over axis 'data'.*after"):
        jax.eval_shape(tx.update, rows_of(), tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("conditional", [optax.conditionally_mask, optax.conditionally_transform])
def test_rejects_a_vote_under_a_shared_condition(conditional, mesh):
    def even(step):
        return step % 2 == 0

    tx = signax.DataParallel(conditional(SIGNUM, even), mesh)
    with pytest.raises(ValueError, match=r"one side of a condition.*condition after the vote"):
        tx.update(rows_of(), tx.init(PARAMS), PARAMS)
    remedy = optax.chain(VOTE, conditional(optax.scale(-0.5), even))
    tx = signax.DataParallel(remedy, mesh)
    state = tx.init(PARAMS)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(tx.update(rows_of(), state, PARAMS)[0]))


def test_unrelated_errors_of_jax_pass_through(mesh):
    def wrong(updates, state, params=None):
        del params
        mean = jax.lax.cond(jnp.bool_(True), lambda: jnp.mean(updates["w"]), lambda: jnp.float32(0))
        return jax.tree.map(lambda u: u - mean, updates), state

    tx = signax.DataParallel(
        optax.chain(optax.GradientTransformation(optax.init_empty_state, wrong), VOTE), mesh
    )
    with pytest.raises(TypeError, match="cond branches"):
        tx.update(rows_of(), tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
@pytest.mark.parametrize("is_jitted", [True, False], ids=["jitted", "eager"])
def test_a_transformation_may_use_arrays_among_the_extra_arguments(kind, is_jitted):
    mesh = jax.make_mesh((WORKERS,), ("data",), axis_types=(kind,))

    def scale(updates, state, params=None, *, value=1.0, **extra_args):
        return jax.tree.map(lambda u: u * value, updates), state

    scaled = optax.GradientTransformationExtraArgs(optax.init_empty_state, scale)
    tx = signax.DataParallel(optax.chain(SIGN_SGD, scaled), mesh)
    params, batch = jax.device_put((PARAMS, make_batch()), NamedSharding(mesh, PartitionSpec()))
    state = tx.init(params)

    def step(params, state, batch):
        loss, grads = tx.value_and_grad(squared_error)(params, batch)
        updates, _ = tx.update(grads, state, params, value=loss)
        return loss, grads, updates

    loss, grads, updates = (jax.jit(step) if is_jitted else step)(params, state, batch)
    plain = signax.DataParallel(SIGN_SGD, mesh)
    expected, _ = plain.update(grads, plain.init(params), params)
    assert_trees_close(updates, jax.tree.map(lambda u: u * loss, expected))
