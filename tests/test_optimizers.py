"""Optimisers against Optax, against the papers, and over workers against one worker."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from jax import lax
from workers import auto_mesh

import signax
from signax import diagnostics

STEPS = 100
CURVATURE = np.linspace(0.1, 3.0, 12).astype(np.float32)

# The dtype of a momentum has the same argument name as in Optax.
DTYPE_OPTIONS = [("signum", "accumulator_dtype"), ("lion", "mu_dtype")]


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


NOISE = normal((STEPS, 12)).astype(np.float32)
START = normal(12, seed=1).astype(np.float32)


def descend(tx, noise=NOISE, dtype=jnp.float32):
    """The path of an optimiser from START on a quadratic with gradient noise."""

    def step(carry, shock):
        params, state = carry
        gradient = jnp.asarray(CURVATURE, dtype) * params + shock.astype(dtype)
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    params = jnp.asarray(START, dtype)
    return lax.scan(step, (params, tx.init(params)), jnp.asarray(noise))[1]


def follow(tx, gradients):
    """The path of an optimiser from START along given gradients."""

    def step(carry, gradient):
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    params = jnp.asarray(START, gradients.dtype)
    return jax.jit(lambda rows: lax.scan(step, (params, tx.init(params)), rows)[1])(gradients)


def nothing(params):
    """A mask that excludes every leaf from weight decay."""
    return jax.tree.map(lambda _: False, params)


SCHEDULE = optax.cosine_decay_schedule(0.1, STEPS)

# --- one worker: Optax's optimisers ----------------------------------------------------------

PAIRS = {
    "sign_sgd": (signax.sign_sgd(0.01), optax.sign_sgd(0.01)),
    "sign_sgd, schedule": (signax.sign_sgd(SCHEDULE), optax.sign_sgd(SCHEDULE)),
    "signum": (signax.signum(0.01), optax.signum(0.01)),
    "signum, b1": (signax.signum(0.01, 0.5), optax.signum(0.01, 0.5)),
    "signum, schedule": (signax.signum(SCHEDULE), optax.signum(SCHEDULE)),
    "lion": (signax.lion(0.01), optax.lion(0.01)),
    "lion, schedule": (signax.lion(SCHEDULE), optax.lion(SCHEDULE)),
    "lion, all options": (
        signax.lion(SCHEDULE, 0.8, 0.95, weight_decay=0.1, mask=nothing),
        optax.lion(SCHEDULE, 0.8, 0.95, weight_decay=0.1, mask=nothing),
    ),
    "lion, no decay": (signax.lion(0.01, weight_decay=0.0), optax.lion(0.01, weight_decay=0.0)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_without_an_axis_an_optimizer_equals_optax_bit_for_bit(name):
    ours, theirs = (jax.jit(lambda tx=tx: descend(tx))() for tx in PAIRS[name])
    np.testing.assert_array_equal(ours, theirs)
    assert np.unique(ours, axis=0).shape[0] > STEPS // 2  # the parameters move


@pytest.mark.parametrize("accumulator_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            lambda dtype: signax.signum(0.01, accumulator_dtype=dtype),
            lambda dtype: optax.signum(0.01, accumulator_dtype=dtype),
        ),
        (
            lambda dtype: signax.lion(0.01, mu_dtype=dtype),
            lambda dtype: optax.lion(0.01, mu_dtype=dtype),
        ),
    ],
    ids=["signum", "lion"],
)
def test_momentum_in_another_dtype_equals_optax_bit_for_bit(ours, theirs, accumulator_dtype):
    found, expected = (
        jax.jit(lambda make=make: descend(make(accumulator_dtype)))() for make in (ours, theirs)
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    ("name", "option"), [("signum", "accumulator_dtype"), ("lion", "mu_dtype")]
)
def test_updates_keep_the_gradients_dtype_when_the_momentum_is_wider(name, option, dtype):
    tx = getattr(signax, name)(0.5, weight_decay=0.0, **{option: jnp.float32})
    gradient = jnp.asarray(NOISE[0], dtype)
    updates, _ = tx.update(gradient, tx.init(gradient))
    assert updates.dtype == dtype
    np.testing.assert_array_equal(updates, -0.5 * jnp.sign(gradient))


NUMBERS = {
    "NumPy": np.float32(0.5),
    "JAX": jnp.float32(0.5),
    "schedule": lambda _: jnp.float32(0.5),
}
USES = [("signum", "learning_rate"), ("signum", "weight_decay")]
USES_OF_CONSTANTS = [("muon", "others_rms"), ("ef_muon", "others_rms")]


@pytest.mark.parametrize(
    ("kind", "name", "option"),
    [
        (kind, *use)
        for kind in NUMBERS
        for use in (USES if kind == "schedule" else USES + USES_OF_CONSTANTS)
    ],
)
def test_numbers_of_any_dtype_leave_updates_their_dtype(kind, name, option):
    tx = getattr(signax, name)(**{"learning_rate": 1.0, option: NUMBERS[kind]})
    params = {"half": jnp.full(2, 4.0, jnp.bfloat16), "full": jnp.full(2, 4.0)}
    with jax.numpy_dtype_promotion("strict"):
        updates, _ = tx.update(params, tx.init(params), params)
    expected = -3.0 if option == "weight_decay" else -0.5  # -(1 + 0.5 * 4), or half a sign
    for leaf, dtype in (("half", jnp.bfloat16), ("full", jnp.float32)):
        assert updates[leaf].dtype == dtype
        np.testing.assert_array_equal(updates[leaf].astype(jnp.float32), expected)


@pytest.mark.parametrize("rms", [np.float64(0.5), jnp.float32(0.5)], ids=["NumPy", "JAX"])
@pytest.mark.parametrize("name", ["muon", "ef_muon"])
def test_steps_of_matrices_keep_their_dtype_whatever_that_of_their_size(name, rms):
    tx = getattr(signax, name)(1.0, consistent_rms=rms)
    params = jnp.eye(2, dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        updates, _ = tx.update(params, tx.init(params), params)
    assert updates.dtype == jnp.bfloat16


# --- one worker: the papers ------------------------------------------------------------------

GRADIENTS = normal((60, 12), seed=2)
RATES = 0.05 / np.sqrt(np.arange(1, 61))


def shrinking(count):
    return 0.05 / jnp.sqrt(jnp.asarray(count + 1, float))


SIGNS = {
    "sign_sgd": np.sign(GRADIENTS),
    "signum": references.signum(GRADIENTS, 0.9),
    "lion": references.lion(GRADIENTS, 0.9, 0.99),
}


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("name", SIGNS)
def test_an_optimizer_with_decoupled_weight_decay_equals_its_reference(name, weight_decay):
    with jax.enable_x64(True):
        tx = getattr(signax, name)(shrinking, weight_decay=weight_decay)
        found = follow(tx, jnp.asarray(GRADIENTS))
    expected = references.descend(START.astype(np.float64), SIGNS[name], RATES, weight_decay)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["sign_sgd", "signum", "lion", "ef_sign_sgd"])
def test_a_mask_selects_the_leaves_that_decay(name):
    params = {"kernel": jnp.full(2, 4.0), "bias": jnp.full(2, 4.0)}
    gradients = jax.tree.map(jnp.ones_like, params)

    def moved(**options):
        tx = getattr(signax, name)(0.5, **options)
        return tx.update(gradients, tx.init(params), params)[0]

    plain = moved(weight_decay=0.0)
    for mask in ({"kernel": True, "bias": False}, lambda p: {"kernel": True, "bias": False}):
        masked = moved(weight_decay=0.25, mask=mask)
        np.testing.assert_array_equal(masked["bias"], plain["bias"])
        np.testing.assert_array_equal(masked["kernel"], plain["kernel"] - 0.5 * 0.25 * 4.0)


@pytest.mark.parametrize("name", ["sign_sgd", "signum", "lion", "ef_sign_sgd"])
def test_weight_decay_takes_a_schedule(name):
    params = jnp.full(1, 4.0)
    tx = getattr(signax, name)(1.0, weight_decay=lambda count: 0.25 * count)
    state = tx.init(params)
    first, state = tx.update(jnp.ones(1), state, params)
    second, state = tx.update(jnp.ones(1), state, params)
    assert [float(first[0]), float(second[0])] == [-1.0, -2.0]


@pytest.mark.parametrize("name", ["sign_sgd", "signum", "lion", "ef_sign_sgd"])
def test_without_weight_decay_no_parameters_are_needed(name):
    tx = getattr(signax, name)(0.5, weight_decay=0.0)
    updates, _ = tx.update(jnp.full(3, 2.0), tx.init(jnp.zeros(3)))
    assert (updates < 0).all()


@pytest.mark.parametrize("name", ["sign_sgd", "signum", "lion", "ef_sign_sgd"])
def test_weight_decay_without_parameters_is_an_error(name):
    tx = getattr(signax, name)(0.5, weight_decay=0.1)
    with pytest.raises(ValueError, match="params"):
        tx.update(jnp.ones(3), tx.init(jnp.zeros(3)))


# --- several workers -------------------------------------------------------------------------

VOTED = {
    "sign_sgd": lambda **axis: signax.sign_sgd(SCHEDULE, weight_decay=0.1, **axis),
    "signum": lambda **axis: signax.signum(SCHEDULE, nesterov=True, **axis),
    "lion": lambda **axis: signax.lion(SCHEDULE, **axis),
}


@pytest.mark.parametrize("num_workers", [1, 2, 3, 8])
@pytest.mark.parametrize("name", VOTED)
def test_workers_with_equal_gradients_act_as_one_worker(name, num_workers):
    rows = jnp.broadcast_to(NOISE, (num_workers, *NOISE.shape))
    voted = VOTED[name](axis_name="workers")
    every = jax.jit(jax.vmap(lambda noise: descend(voted, noise), axis_name="workers"))(rows)
    alone = jax.jit(lambda noise: descend(VOTED[name](), noise))(NOISE)
    np.testing.assert_array_equal(every, np.broadcast_to(alone, every.shape))


def signs_over_workers(tx, gradients):
    """The updates, over their size, that all workers share on [M, T, d] gradients."""

    def worker(rows):
        def step(state, gradient):
            updates, state = tx.update(gradient, state)
            return state, updates

        return lax.scan(step, tx.init(rows[0]), rows)[1]

    updates = np.asarray(jax.jit(jax.vmap(worker, axis_name="workers"))(gradients))
    np.testing.assert_array_equal(updates, np.broadcast_to(updates[:1], updates.shape))
    return -updates[0]


PER_WORKER = {
    "sign_sgd": (signax.sign_sgd, np.sign),
    "signum": (signax.signum, lambda rows: references.signum(rows, 0.9)),
    "lion": (signax.lion, lambda rows: references.lion(rows, 0.9, 0.99)),
}


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("name", PER_WORKER)
def test_a_nonfinite_worker_votes_again_on_its_next_batch(name, bad):
    factory, reference = PER_WORKER[name]
    rows = normal((3, 8, 40), seed=3)
    poisoned = rows.copy()
    poisoned[1, 4, 7] = bad
    tx = factory(1.0, weight_decay=0.0, axis_name="workers")
    found = signs_over_workers(tx, jnp.asarray(poisoned, jnp.float32))

    # Worker 1 is excluded at step 4, and its momentum ignores that batch.
    ballots = np.stack([reference(worker) for worker in rows])
    forgotten = reference(np.delete(rows[1], 4, axis=0))
    ballots[1] = np.insert(forgotten, 4, np.nan, axis=0)
    expected = [references.vote(ballots[:, t], t) for t in range(8)]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", PER_WORKER)
def test_with_all_workers_nonfinite_only_weight_decay_moves(name):
    tx = PER_WORKER[name][0](0.5, weight_decay=0.25, axis_name="workers")
    params = jnp.full(3, 8.0)

    def update(gradient):
        return tx.update(gradient, tx.init(params), params)[0]

    mapped = jax.jit(jax.vmap(update, axis_name="workers"))
    updates = mapped(jnp.full((2, 3), jnp.nan))
    np.testing.assert_array_equal(updates, np.full((2, 3), -1.0))


@pytest.mark.parametrize("name", PER_WORKER)
@pytest.mark.parametrize("zeros", ["dither", "abstain", "plus"])
def test_options_of_the_vote_reach_the_vote(name, zeros):
    # Half of the coordinates have zero gradients, so their momentum stays zero.
    rows = normal((2, 3, 10), seed=4)
    rows[:, :, ::2] = 0
    tx = PER_WORKER[name][0](
        1.0, weight_decay=0.0, axis_name="workers", zeros=zeros, ties="plus", transport="packed"
    )
    found = signs_over_workers(tx, jnp.asarray(rows, jnp.float32))
    ballots = np.stack([PER_WORKER[name][1](worker) for worker in rows])
    expected = [references.vote(ballots[:, t], t, zeros, "plus") for t in range(3)]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", VOTED)
def test_a_vote_may_be_split_and_measure_agreement(name):
    mesh = auto_mesh({"data": 4, "chip": 2})
    factory = getattr(signax, name)
    options = {"axis_name": "data", "split_over": "chip", "agreement": True, "transport": "packed"}
    tx = signax.DataParallel(factory(1.0, **options), mesh)
    params = jnp.zeros(5000)
    rows = jnp.asarray(normal((4, 5000)), jnp.float32)
    state = tx.init(params)
    program = jax.jit(tx.update).lower(rows, state, params).compile()
    _, state = program(rows, state, params)
    share = optax.tree.get(state, "share")
    assert share.shape == (4,)
    assert np.all(share != 0.5)
    sizes = {record.group_size for record in diagnostics.collectives(program)}
    assert {2, 4} <= sizes  # inside a worker and between workers


@pytest.mark.parametrize("name", PER_WORKER)
def test_active_reaches_the_vote(name):
    tx = PER_WORKER[name][0](1.0, weight_decay=0.0, axis_name="workers")

    def update(gradient, active):
        return tx.update(gradient, tx.init(gradient), active=active)[0]

    gradients = jnp.array([[1.0], [-1.0], [1.0]])
    mapped = jax.jit(jax.vmap(update, axis_name="workers"))
    updates = mapped(gradients, jnp.array([False, True, False]))
    np.testing.assert_array_equal(updates, np.ones((3, 1)))


# --- arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", [signax.sign_sgd, signax.signum, signax.lion])
@pytest.mark.parametrize(
    "option", [{"zeros": "abstain"}, {"ties": "plus"}, {"transport": "packed"}]
)
def test_rejects_an_option_of_the_vote_without_an_axis(factory, option):
    [(name, value)] = option.items()
    with pytest.raises(ValueError, match=rf"{name}={value!r}.*axis_name=None"):
        factory(0.1, **{name: value})


@pytest.mark.parametrize("factory", [signax.sign_sgd, signax.signum, signax.lion])
@pytest.mark.parametrize("name", ["zeros", "ties", "transport"])
def test_rejects_an_unknown_mode_of_the_vote(factory, name):
    with pytest.raises(ValueError, match=f"{name}='random' is unknown: use one of '"):
        factory(0.1, axis_name="workers", **{name: "random"})


@pytest.mark.parametrize("b1", [1, 1.0, -0.1, math.nan])
@pytest.mark.parametrize(("factory", "name"), [(signax.signum, "beta"), (signax.lion, "b1")])
def test_rejects_a_decay_outside_the_interval(factory, name, b1):
    with pytest.raises(ValueError, match=rf"{name}={b1!r} is outside \[0, 1\)"):
        factory(0.1, b1)


@pytest.mark.parametrize("b2", [1, -0.1])
def test_rejects_a_b2_outside_the_interval(b2):
    with pytest.raises(ValueError, match=rf"b2={b2!r} is outside \[0, 1\)"):
        signax.lion(0.1, 0.9, b2)


@pytest.mark.parametrize("weight_decay", [-0.1, math.inf, math.nan])
@pytest.mark.parametrize("name", ["sign_sgd", "signum", "lion", "ef_sign_sgd"])
def test_rejects_an_invalid_weight_decay(name, weight_decay):
    with pytest.raises(ValueError, match=rf"weight_decay={weight_decay!r} is outside \[0, inf\)"):
        getattr(signax, name)(0.1, weight_decay=weight_decay)


@pytest.mark.parametrize("name", ["sign_sgd", "signum", "lion", "ef_sign_sgd"])
def test_rejects_a_learning_rate_that_is_not_a_number(name):
    # Python multiplies strings by -1 silently.
    with pytest.raises(TypeError, match=r"learning_rate='0\.1' is"):
        getattr(signax, name)("0.1")
    with pytest.raises(TypeError, match=r"learning_rate=.*0\.1.* is not a number"):
        getattr(signax, name)(np.complex64(0.1))
    for learning_rate in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=rf"learning_rate={learning_rate!r} is outside"):
            getattr(signax, name)(learning_rate)


@pytest.mark.parametrize("factory", [signax.sign_sgd, signax.signum, signax.lion])
def test_an_unbound_axis_error_lists_the_ways_to_bind_it(factory):
    tx = factory(0.1, weight_decay=0.0, axis_name="pods")
    with pytest.raises(NameError, match=r"axis_name='pods' is not bound here.*DataParallel.*vmap"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


@pytest.mark.parametrize(
    ("name", "option"), [("signum", "accumulator_dtype"), ("lion", "mu_dtype")]
)
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn, "nonsense"])
def test_rejects_a_momentum_that_cannot_move(name, option, dtype):
    with pytest.raises(ValueError, match=f"{option}=.*{getattr(dtype, '__name__', dtype)}"):
        getattr(signax, name)(0.1, **{option: dtype})


@pytest.mark.parametrize(("name", "option"), DTYPE_OPTIONS)
def test_rejects_a_dtype_that_optax_takes_for_a_schedule(name, option):
    tx = optax.inject_hyperparams(getattr(signax, name))(0.1, **{option: jnp.float32})
    with pytest.raises(ValueError, match=f"'{option}' in the static_args"):
        tx.init(jnp.ones(2))


def test_rejects_a_mask_that_optax_takes_for_a_schedule():
    def matrices(params):
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    tx = optax.inject_hyperparams(signax.signum)(0.1, weight_decay=0.5, mask=matrices)
    with pytest.raises(TypeError, match="'mask' in the static_args"):
        tx.init({"w": jnp.ones((2, 2))})


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(signax.sign_sgd, 0.1),
        functools.partial(signax.signum, 0.1),
        functools.partial(signax.lion, 0.1, weight_decay=0.0),
        functools.partial(signax.ssdm, 0.1, jax.random.key(0)),
        functools.partial(signax.ef_sign_sgd, 0.1),
        functools.partial(signax.ef_sign_sgd, 0.1, 0.9),
    ],
    ids=["sign_sgd", "signum", "lion", "ssdm", "ef_sign_sgd", "ef_sign_sgd with momentum"],
)
def test_rejects_gradients_that_are_replicated_by_type(make, mesh):
    tx = make(axis_name="data")

    def step(params):
        state = tx.init(params)  # the state varies by type, as a worker's own
        state = jax.tree.map(
            lambda leaf: (
                jax.lax.pcast(leaf, "data", to="varying")
                if jnp.issubdtype(leaf.dtype, jnp.floating)
                else leaf
            ),
            state,
        )
        grads = jax.grad(lambda p: jnp.sum(p**2))(params)
        return tx.update(grads, state, params)[0]

    whole = jax.sharding.PartitionSpec()
    mapped = jax.shard_map(step, mesh=mesh, in_specs=whole, out_specs=whole)
    with pytest.raises(ValueError, match="does not vary over axis 'data'"):
        jax.eval_shape(mapped, jnp.ones(3))
