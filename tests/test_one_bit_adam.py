"""1-bit Adam against NumPy and Optax: both phases, participation, layout, and what is sent."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from jax.sharding import AxisType, PartitionSpec
from scaled_rows import (
    PARAMS,
    SHARDED,
    block_counts,
    follow,
    follow_sharded,
    served,
    sharded_rows,
)
from workers import AXIS, auto_mesh

import signax
from signax import diagnostics

STEPS, WARMUP = 10, 4
DECAYS = {"b1": 0.8, "b2": 0.9, "eps": 1e-3}


def random_rows(num_workers, seed=0, steps=STEPS):
    """Gradients [T, M, ...] of the leaves of PARAMS.

    One coordinate's gradients are 0 until the freeze, and another's are tiny.
    """
    rng = np.random.default_rng(seed)
    rows = {
        name: 0.3 + rng.standard_normal((steps, num_workers, *leaf.shape))
        for name, leaf in PARAMS.items()
    }
    rows["vector"][:WARMUP, :, 3] = 0
    rows["matrix"][:WARMUP, :, 1, 2] *= 1e-3
    return rows


def reference(rows, **options):
    leaves = [[leaf[t] for leaf in rows.values()] for t in range(len(rows["matrix"]))]
    options = {"warmup_steps": WARMUP, **DECAYS, **options}
    return references.one_bit_adam(leaves, **options)


def along(tx, rows):
    """The updates and states [T, M, ...] of workers along gradients, by vmap."""

    def worker(gradients):
        def step(state, gradient):
            updates, state = tx.update(gradient, state, like)
            return state, (updates, state)

        like = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), gradients)
        return jax.lax.scan(step, tx.init(like), gradients)[1]

    rows = jax.tree.map(jnp.asarray, rows)
    return jax.jit(jax.vmap(worker, in_axes=1, out_axes=1, axis_name=AXIS))(rows)


def by_vmap(num_workers, rows, **options):
    """Updates and states of all workers after each step, laid out as DataParallel does."""
    tx = signax.one_bit_adam(1.0, **options, axis_name=AXIS, num_workers=num_workers)
    updates, (state, *_) = along(tx, rows)
    memory = state.mean.memory
    for leaf in jax.tree.leaves((updates, state._replace(mean=None))):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:, :1], leaf.shape))
    updates, mu, nu = jax.tree.map(lambda leaf: leaf[:, 0], (updates, state.mu, state.nu))
    history = updates, mu, nu, memory, state.mean.participation.missed
    return [jax.tree.map(lambda leaf, t=t: leaf[t], history) for t in range(len(rows["matrix"]))]


def by_shard_map(num_workers, rows, **options):
    tx = signax.one_bit_adam(1.0, **options, axis_name="data")
    dtype = jnp.result_type(float)
    history = follow(tx, rows, num_workers, dtype)
    return [
        (updates, state.mu, state.nu, state.mean.memory, state.mean.participation.missed)
        for updates, (state, *_) in history
    ]


MAPS = {"vmap": by_vmap, "shard_map": by_shard_map}


@pytest.mark.parametrize("num_workers", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", MAPS)
def test_both_phases_equal_the_reference_with_a_worker_excluded_in_each(kind, num_workers):
    rows = random_rows(num_workers, seed=num_workers)
    last = num_workers - 1
    rows["vector"][1, last, 0] = np.nan  # in the warm-up; the only worker of one
    rows["matrix"][7, last, 2, 3] = np.inf  # and after the freeze
    rows["vector"][8, 0, 3] = np.nan  # on the coordinate that does not move
    block = 4 if num_workers == 3 else "leaf"
    decay = 0.75 if num_workers == 2 else 1.0
    options = {"warmup_steps": WARMUP, "decay": decay, **DECAYS}
    with jax.enable_x64(True):
        found = MAPS[kind](num_workers, rows, block=block, **options)
    expected = reference(rows, block=None if block == "leaf" else block, decay=decay)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
    for t, (updates, mu, nu, memory, missed) in enumerate(jax.device_get(found)):
        for n, name in enumerate(PARAMS):
            direction, m, v, (own, server) = expected[t][n]
            close(-np.ravel(updates[name]), direction, err_msg=f"step {t} {name}")
            close(np.ravel(mu[name]), m, err_msg=f"m at step {t} {name}")
            close(np.ravel(nu[name]), v, err_msg=f"v at step {t} {name}")
            close(memory.worker[name].reshape(own.shape), own, err_msg=f"step {t} {name}")
            kept, places = served(memory.server[name], PARAMS[name].shape, ())
            close(kept[places], server, err_msg=f"server at step {t} {name}")
        absent = np.zeros(num_workers)
        absent[last] = (t >= 1) + (t >= 7)
        absent[0] += t >= 8
        np.testing.assert_array_equal(missed, absent)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("mu_dtype", [None, jnp.bfloat16])
def test_the_warm_up_equals_adamw_on_the_mean_gradient(mu_dtype, weight_decay):
    rows = {name: np.float32(leaf) for name, leaf in random_rows(3).items()}
    schedule = optax.linear_schedule(0.1, 0.01, STEPS)
    options = {"mu_dtype": mu_dtype, "weight_decay": weight_decay, **DECAYS}
    options["mask"] = {"matrix": True, "vector": False}
    params = {name: 1.0 + jnp.asarray(leaf[0, 0]) for name, leaf in rows.items()}
    ours = signax.one_bit_adam(
        schedule, warmup_steps=STEPS, axis_name=AXIS, num_workers=3, **options
    )
    theirs = optax.adamw(schedule, **options)

    def path(tx, gradients):
        def step(carry, gradient):
            params, state = carry
            updates, state = tx.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, (params, tx.init(params)), gradients)[1]

    found = jax.vmap(functools.partial(path, ours), in_axes=1, axis_name=AXIS)(rows)
    expected = path(theirs, {name: leaf.mean(axis=1) for name, leaf in rows.items()})
    for name in PARAMS:
        each = np.broadcast_to(expected[name], found[name].shape)
        np.testing.assert_allclose(found[name], each, rtol=1e-5, atol=1e-6)


def test_the_step_size_does_not_jump_at_the_freeze():
    # With equal magnitudes a scaled sign loses nothing, and the first frozen step is Adam's step.
    rows = {name: np.ones((8, 2, *leaf.shape)) for name, leaf in PARAMS.items()}
    for warmup_steps in (1, 4):
        options = {"b1": 0.9, "b2": 0.999, "warmup_steps": warmup_steps}
        updates = [updates["vector"] for updates, *_ in by_vmap(2, rows, **options)]
        np.testing.assert_allclose(updates, -np.ones((8, 9)), rtol=1e-4)


# What does not move, or not far.


def test_a_coordinate_without_gradients_before_the_freeze_does_not_move():
    rows = random_rows(4, seed=5)
    rows["vector"][WARMUP:, :, 3] = 100.0
    found = by_vmap(4, rows, warmup_steps=WARMUP, **DECAYS)
    assert {float(updates["vector"][3]) for updates, *_ in found} == {0.0}
    _, mu, _, memory, _ = found[-1]
    assert mu["vector"][3] == 0
    assert np.abs(memory.worker["vector"]).max() < 10  # the large gradient is not in it


@pytest.mark.parametrize(("b1", "b2", "bound"), [(0.9, 0.999, 10**0.5), (0.8, 0.9, 1.0)])
def test_no_step_after_the_freeze_exceeds_the_bound_of_adam(b1, b2, bound):
    rows = random_rows(4, seed=6)
    rows["matrix"][:WARMUP, :, 1, 2] *= 1e-12
    found = by_vmap(4, rows, warmup_steps=WARMUP, b1=b1, b2=b2)
    steps = [np.abs(updates["matrix"][1, 2]) for updates, *_ in found[WARMUP:]]
    np.testing.assert_allclose(steps, bound, rtol=1e-6)
    largest = max(np.abs(leaf).max() for updates, *_ in found[WARMUP:] for leaf in updates.values())
    assert largest <= bound * (1 + 1e-6)


# Participation.


@pytest.mark.parametrize("in_warmup", [True, False])
def test_a_step_without_workers_keeps_m_and_v_and_memories(in_warmup):
    rows = {name: np.float32(leaf) for name, leaf in random_rows(2, seed=7).items()}
    tx = signax.DataParallel(
        signax.one_bit_adam(
            0.1, warmup_steps=3 if in_warmup else 1, axis_name="data", weight_decay=0.5
        ),
        auto_mesh({"data": 2}),
    )
    params = jax.tree.map(jnp.ones_like, PARAMS)
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(2):
        gradients = {name: leaf[t + WARMUP] for name, leaf in rows.items()}
        _, state = update(gradients, state, params, active=jnp.array([True, True]))
    before = jax.device_get(state[0])
    gradients = {name: leaf[-1] for name, leaf in rows.items()}
    updates, state = update(gradients, state, params, active=jnp.array([False, False]))
    after = jax.device_get(state[0])
    for leaf in jax.tree.leaves(updates):
        np.testing.assert_allclose(leaf, -0.1 * 0.5)  # the decay of weights, all of them 1
    kept = after._replace(mean=after.mean._replace(**before.mean._asdict()))
    jax.tree.map(np.testing.assert_array_equal, kept, before)
    jax.tree.map(np.testing.assert_array_equal, after.mean.memory, before.mean.memory)
    assert after.mean.count == before.mean.count + 1
    seen = signax.participation(state)
    assert seen.voters == 0
    assert seen.missed.tolist() == [1, 1]


def test_a_step_without_workers_does_not_end_the_warm_up():
    rows = random_rows(3, seed=8)
    rows["vector"][0] = np.nan
    found = by_vmap(3, rows, warmup_steps=1, b2=0.9)
    first, second = (updates["matrix"] for updates, *_ in found[:2])
    np.testing.assert_array_equal(first, np.zeros((5, 7)))
    np.testing.assert_allclose(second, -np.sign(rows["matrix"][1].mean(axis=0)), rtol=1e-4)


@pytest.mark.parametrize("warmup_steps", [1, 5])
def test_a_nan_in_leaves_of_another_mean_excludes_a_worker(warmup_steps):
    groups = {
        "adam": signax.one_bit_adam(0.1, warmup_steps=warmup_steps, axis_name=AXIS, num_workers=3),
        "mean": signax.average_updates(AXIS),
    }
    labels = {"matrix": "adam", "vector": "mean"}
    tx = signax.leave_out_nonfinite(optax.partition(groups, labels))
    rows = random_rows(3, seed=9, steps=3)
    _, expected = along(tx, {name: leaf[:, :2] for name, leaf in rows.items()})
    rows["vector"][:, 2, 0] = np.nan
    _, state = along(tx, rows)
    assert signax.participation(state).missed[-1].tolist() == [0, 0, 3]
    found, expected = (optax.tree.get(each, "mu") for each in (state, expected))
    if warmup_steps > 3:  # later servers of another number have other parts
        np.testing.assert_allclose(found["matrix"][:, 0], expected["matrix"][:, 0], rtol=1e-5)
    worker = optax.tree.get(state, "worker")["matrix"]
    assert not np.any(worker[:, 2])
    assert np.any(worker[:, 0]) == (warmup_steps == 1)


# What is sent, and where the state lies.


def compiled_update(tx, params, num_workers):
    tx = signax.DataParallel(tx, auto_mesh({"data": num_workers}))
    rows = jax.tree.map(lambda p: jnp.zeros((num_workers, *p.shape), p.dtype), params)
    return jax.jit(tx.update).lower(rows, tx.init(params), params).compile()


@pytest.mark.parametrize("num_workers", [2, 8])
def test_one_condition_holds_an_all_reduce_and_a_packed_exchange(num_workers):
    params = {"matrix": jnp.zeros((96, 50)), "vector": jnp.zeros(70)}
    size = 96 * 50 + 70
    compiled = compiled_update(
        signax.one_bit_adam(0.1, warmup_steps=2, axis_name="data"), params, num_workers
    )
    assert len(re.findall(r" conditional\(", compiled.as_text())) == 1
    records = diagnostics.collectives(compiled)
    mean = [record for record in records if record.count]
    packed = [record for record in records if not record.count]
    # The branch that sends more counts as run, and the other does not. Neither holds anything else.
    assert [(record.operation, record.dtype) for record in mean] == [("all-reduce", "f32")]
    assert mean[0].elements == size + 1  # and the number of workers
    assert mean[0].bytes_sent == -(-2 * (num_workers - 1) * 4 * (size + 1) // num_workers)
    kinds = sorted((record.operation, record.dtype) for record in packed)
    assert kinds == [("all-gather", "u32"), ("all-to-all", "u32")]
    sent = sum(record.bytes_sent for record in packed)
    assert sent == diagnostics.wire_bytes(params, num_workers, scheme="scaled_signs")
    assert sent < mean[0].bytes_sent / 3
    assert diagnostics.collective_bytes(compiled) == mean[0].bytes_sent


def test_workers_share_the_moments_and_have_rows_of_memories():
    tx = signax.DataParallel(
        signax.one_bit_adam(0.1, warmup_steps=2, axis_name="data"), auto_mesh({"data": 4})
    )
    state = tx.abstract_state(PARAMS)[0]
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, state)
    shared = state.count, state.mu, state.nu, state.mean.count
    assert jax.tree.map(jnp.shape, shared[1]) == jax.tree.map(jnp.shape, PARAMS)
    assert jax.tree.map(jnp.shape, shared[2]) == jax.tree.map(jnp.shape, PARAMS)
    rows, whole = PartitionSpec(("data",)), PartitionSpec()
    expected = jax.tree.map(lambda _: whole, state)._replace(
        mean=jax.tree.map(lambda _: rows, state.mean)
    )
    mean, participation = expected.mean, expected.mean.participation
    expected = expected._replace(
        mean=mean._replace(count=whole, participation=participation._replace(voters=whole))
    )
    assert specs == expected
    assert state.mean.memory.worker["matrix"].shape == (4, 5, 7)
    assert state.mean.memory.server["vector"].shape == (4, 32, 2)


def test_half_as_many_workers_keep_the_moments_and_the_sums_of_memories():
    rows = random_rows(4, seed=3)
    with jax.enable_x64(True):
        tx = signax.one_bit_adam(1.0, warmup_steps=WARMUP, axis_name="data", **DECAYS)
        _, state = follow(tx, rows, 4, jnp.float64)[-1]
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), PARAMS)
        two = signax.DataParallel(tx, auto_mesh({"data": 2}))
        resized = two.resize(state, params)
        before, after = jax.device_get((state[0], resized[0]))
        jax.tree.map(np.testing.assert_array_equal, before[:3], after[:3])
        for name, leaf in PARAMS.items():
            own, new = before.mean.memory.worker[name], after.mean.memory.worker[name]
            np.testing.assert_allclose(new, own.reshape(2, 2, *leaf.shape).mean(axis=1))
            old, new = (
                kept[places]
                for kept, places in (
                    served(each.mean.memory.server[name], leaf.shape, ())
                    for each in (before, after)
                )
            )
            np.testing.assert_array_equal(old, new)
            assert np.any(new)
        gradients = {name: jnp.asarray(leaf[0, :2]) for name, leaf in rows.items()}
        _, state = jax.jit(two.update)(gradients, resized, params)
    assert signax.participation(state).voters == 2


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
def test_leaves_that_are_sharded_within_a_worker_equal_the_reference(kind):
    mesh = jax.make_mesh(
        (2, 4), ("data", "fsdp"), axis_types=(kind, kind), devices=jax.devices()[:8]
    )
    cuts = dict.fromkeys(SHARDED, PartitionSpec("fsdp")) | {"whole": PartitionSpec()}
    cuts["small"] = PartitionSpec(None, "fsdp")
    rows = sharded_rows(5, 2)
    rows["small"][1, 1, 2, 3] = np.nan
    rows["cube"][3, 1, 1, 2, 3] = np.nan
    with jax.enable_x64(True):
        tx = signax.one_bit_adam(1.0, warmup_steps=2, axis_name="data", **DECAYS)
        history = follow_sharded(tx, mesh, cuts, rows)
    counts = block_counts(mesh, cuts)
    steps = [[leaf[t] for leaf in rows.values()] for t in range(5)]
    expected = references.one_bit_adam(steps, 2, **DECAYS, counts=counts)
    for (updates, (state, *_)), step in zip(jax.device_get(history), expected, strict=True):
        for (name, shape), counted, leaf in zip(SHARDED.items(), counts, step, strict=True):
            direction, m, v, (own, server) = leaf
            found = -updates[name], state.mu[name], state.nu[name], state.mean.memory.worker[name]
            for array, each in zip(found, (direction, m, v, own), strict=True):
                np.testing.assert_allclose(np.ravel(array), np.ravel(each), rtol=1e-9, atol=1e-11)
            kept, places = served(state.mean.memory.server[name], shape, counted)
            np.testing.assert_allclose(kept[places], server, rtol=1e-9, atol=1e-11)


def test_types_prove_results_equal_if_the_state_is_made_within_a_map():
    rows = jnp.asarray(random_rows(4, steps=2)["matrix"], jnp.float32)
    tx = signax.one_bit_adam(0.1, warmup_steps=1, axis_name=AXIS)

    def worker(gradients):
        first, second = gradients[:, 0]
        _, state = tx.update(first, tx.init(jnp.zeros((5, 7))))
        updates, state = tx.update(second, state)
        return updates, state[0].mu, state[0].nu

    split, whole = PartitionSpec(None, AXIS), PartitionSpec()
    mesh = auto_mesh({AXIS: 4})
    mapped = jax.jit(jax.shard_map(worker, mesh=mesh, in_specs=split, out_specs=whole))
    expected, (state, *_) = along(tx, rows)
    for found, each in zip(mapped(rows), (expected, state.mu, state.nu), strict=True):
        np.testing.assert_allclose(found, each[-1, 0], rtol=1e-5)


# One worker, dtypes, options, and convergence.


def test_without_an_axis_one_worker_compresses_its_own_momentum():
    rows = random_rows(1, seed=4)
    rows["vector"][:WARMUP, :, 3] = 1.0  # without a message, the sign of 0 is 0
    with jax.enable_x64(True):
        tx = signax.one_bit_adam(1.0, warmup_steps=WARMUP, **DECAYS)
        own = {name: jnp.asarray(leaf[:, 0]) for name, leaf in rows.items()}
        state, updates = tx.init({name: leaf[0] for name, leaf in own.items()}), []
        for t in range(STEPS):
            gradient = {name: leaf[t] for name, leaf in own.items()}
            update, state = tx.update(gradient, state)
            updates.append(update)
    for update, leaves in zip(updates, reference(rows), strict=True):
        for name, (direction, *_) in zip(PARAMS, leaves, strict=True):
            np.testing.assert_allclose(-np.ravel(update[name]), direction, rtol=1e-6)


def test_moments_and_memories_have_the_dtypes_that_optax_gives_them():
    rows = random_rows(2)
    tx = signax.one_bit_adam(0.1, warmup_steps=2, axis_name="data", mu_dtype=jnp.float32)
    updates, (state, *_) = follow(tx, rows, 2, jnp.bfloat16)[-1]

    def dtypes(tree):
        return {leaf.dtype for leaf in jax.tree.leaves(tree)}

    assert dtypes((updates, state.nu)) == {jnp.dtype(jnp.bfloat16)}
    assert dtypes((state.mu, state.mean.memory)) == {jnp.dtype(jnp.float32)}


def test_a_wide_momentum_of_narrow_gradients_is_not_rounded():
    first, second = np.random.default_rng(0).standard_normal((2, 50))
    first, second = (jnp.asarray(each, jnp.bfloat16) for each in (first, second))
    tx = signax.one_bit_adam(0.1, warmup_steps=1, mu_dtype=jnp.float32)
    _, state = tx.update(first, tx.init(first))
    before = np.asarray(state[0].mu, np.float64)
    _, (state, *_) = tx.update(second, state)
    expected = 0.9 * before + 0.1 * np.asarray(second, np.float64)
    np.testing.assert_allclose(state.mu + state.mean.error, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"warmup_steps": 0}, ValueError, "warmup_steps=0 must be at least 1"),
        ({"warmup_steps": 2.5}, TypeError, r"warmup_steps=2\.5"),
        ({"warmup_steps": jnp.int32(3)}, TypeError, "warmup_steps must be known"),
        ({"b1": 1.0}, ValueError, r"b1=1\.0"),
        ({"b2": -0.1}, ValueError, r"b2=-0\.1"),
        ({"eps": 0.0}, ValueError, r"eps=0\.0"),
        ({"mu_dtype": jnp.int32}, ValueError, "mu_dtype"),
        ({"block": "tree"}, ValueError, "block='tree'"),
        ({"weight_decay": -1.0}, ValueError, r"weight_decay=-1\.0"),
        ({"num_workers": 2}, ValueError, "num_workers=2 .* pass axis_name"),
        ({"num_workers": 0, "axis_name": AXIS}, ValueError, "num_workers=0"),
    ],
)
def test_rejects_options(options, error, words):
    with pytest.raises(error, match=words):
        signax.one_bit_adam(0.1, **{"warmup_steps": 3, **options})


def test_the_number_of_workers_must_be_known_where_the_state_is_made():
    tx = signax.one_bit_adam(0.1, warmup_steps=1, axis_name=AXIS)
    with pytest.raises(NameError, match="pass num_workers"):
        tx.init(PARAMS)
    tx = signax.one_bit_adam(0.1, warmup_steps=1, axis_name=AXIS, num_workers=3)
    expected = signax.scaled_signs_memory(PARAMS, 3)
    jax.tree.map(np.testing.assert_array_equal, tx.init(PARAMS)[0].mean.memory, expected)


def test_least_squares_with_badly_scaled_columns_converges_as_by_adamw():
    rng, num_workers, dimension, steps = np.random.default_rng(1), 4, 40, 400
    scales = np.logspace(-2, 0, dimension)
    target = rng.standard_normal(dimension) / scales
    schedule = optax.cosine_decay_schedule(0.3, steps)
    ours = signax.one_bit_adam(
        schedule, b2=0.99, warmup_steps=80, axis_name=AXIS, num_workers=num_workers
    )
    theirs = optax.chain(signax.average_updates(AXIS), optax.adamw(schedule, b2=0.99))
    inputs = rng.standard_normal((steps, num_workers, 16, dimension)) * scales
    outputs = inputs @ target + 0.1 * rng.standard_normal(inputs.shape[:-1])
    batches = jnp.asarray(inputs, jnp.float32), jnp.asarray(outputs, jnp.float32)

    def final_loss(tx):
        def worker(batches):
            def step(carry, batch):
                params, state = carry
                gradient = jax.grad(lambda p: jnp.mean((batch[0] @ p - batch[1]) ** 2))(params)
                updates, state = tx.update(gradient, state, params)
                return (optax.apply_updates(params, updates), state), None

            params = jnp.zeros(dimension)
            return jax.lax.scan(step, (params, tx.init(params)), batches)[0][0]

        params = jax.jit(jax.vmap(worker, in_axes=1, axis_name=AXIS))(batches)[0]
        return np.sum((scales * (np.asarray(params) - target)) ** 2)  # above the noise

    assert final_loss(ours) < 2 * final_loss(theirs) < np.sum((scales * target) ** 2) / 20
