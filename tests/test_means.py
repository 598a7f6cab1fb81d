"""Means of signs against their reference, the bytes they send, and as a transformation."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from workers import AXIS, MAPS, auto_mesh, on_workers

import signax
from signax import diagnostics

TRANSPORTS = ("packed", "gather", "sum")
ZEROS = ("dither", "plus", "abstain")
DTYPES = (jnp.float32, jnp.float64, jnp.bfloat16, jnp.float16)
SHAPES = ((33,), (), (3, 11), (0, 2), (128, 255))


def random_tree(num_workers):
    """Values that vanish often, a sign of zero included."""
    rng = np.random.default_rng(num_workers)
    return {
        f"{jnp.dtype(dtype).name}{shape}": jnp.asarray(
            rng.choice([-2.0, -1.0, -0.0, 0.0, 1.0, 0.5], size=(num_workers, *shape)), dtype
        )
        for dtype, shape in zip(itertools.cycle(DTYPES), SHAPES, strict=False)
    }


CASES = [("shard_map", 3), ("vmap", 4), ("pmap", 2)]
SLOW = [("shard_map", m) for m in (1, 2, 4, 5, 6, 7, 8, 9)] + [("vmap", 1), ("pmap", 8)]


@pytest.mark.parametrize(
    ("kind", "num_workers"), [*CASES, *(pytest.param(*c, marks=pytest.mark.slow) for c in SLOW)]
)
def test_means_equal_the_reference_with_any_number_of_workers_out(kind, num_workers):
    ways = list(itertools.product(ZEROS, TRANSPORTS))

    def mean_in_all_ways(tree, step, active):
        return [
            signax.pmean_signs(tree, AXIS, step=step, zeros=zeros, active=active, transport=way)
            for zeros, way in ways
        ]

    with jax.enable_x64(True):
        tree = random_tree(num_workers)
        mean = on_workers(kind, mean_in_all_ways, num_workers)
        for out in range(num_workers + 1):
            step, active = 5 * out + num_workers, np.arange(num_workers) >= out
            results = mean(tree, jnp.full(num_workers, step), jnp.asarray(active))
            for ((zeros, way), result), name in itertools.product(
                zip(ways, results, strict=True), tree
            ):
                values = np.asarray(tree[name], np.float64).reshape(num_workers, -1)
                exact = references.mean_of_signs(values, step, zeros, active)
                wide = np.float64 if "64" in name else np.float32
                expected = jnp.asarray(exact, wide).astype(tree[name].dtype)
                message = f"{name} {zeros} {way} {active}"
                assert result[name].dtype == tree[name].dtype
                np.testing.assert_array_equal(
                    np.ravel(result[name]), np.ravel(expected), err_msg=message
                )


@pytest.mark.parametrize("num_workers", [64, 130])
def test_many_workers_are_counted_exactly(num_workers):
    rows = np.random.default_rng(0).standard_normal((num_workers, 96)).astype(np.float32)
    rows[:, 0], rows[:, 1] = 1.0, -1.0
    expected = references.mean_of_signs(rows, 1).astype(np.float32)
    for way in TRANSPORTS:
        mean = on_workers(
            "vmap",
            lambda row, way=way: signax.pmean_signs(row, AXIS, step=1, transport=way),
            num_workers,
        )
        np.testing.assert_array_equal(mean(jnp.asarray(rows)), expected)


@pytest.mark.parametrize("kind", MAPS)
def test_a_worker_that_is_not_finite_is_out_of_the_mean(kind):
    rows = jnp.array([[1.0, -2.0], [jnp.inf, 3.0], [2.0, 5.0]])
    mean = on_workers(kind, lambda row: signax.pmean_signs(row, AXIS, step=0), 3)
    np.testing.assert_array_equal(mean(rows), [1.0, 0.0])


def test_counts_zeros_as_told_without_a_dither():
    rows = jnp.array([[1.0, 0.0], [1.0, -1.0]])
    for zeros, expected in [("abstain", [1.0, -0.5]), ("plus", [1.0, 0.0])]:
        mean = on_workers(
            "vmap", lambda row, z=zeros: signax.pmean_signs(row, AXIS, step=1, zeros=z), 2
        )
        np.testing.assert_array_equal(mean(rows), expected)
    with pytest.raises(ValueError, match="step=None, but zeros='dither' needs it"):
        on_workers("vmap", lambda row: signax.pmean_signs(row, AXIS), 2)(rows)


@pytest.mark.parametrize(("num_workers", "digits"), [(2, 2), (3, 2), (4, 3), (7, 3), (8, 4)])
def test_the_count_comes_down_in_as_many_bits_as_it_takes(num_workers, digits):
    size = 16_000_000
    rows = jax.ShapeDtypeStruct((num_workers, size), jnp.float32)

    def mean(row):
        return signax.pmean_signs(row, AXIS, step=0, transport="packed")

    program = jax.jit(on_workers("shard_map", mean, num_workers)).lower(rows).compile()
    sent = {c.operation: c.bytes_sent for c in diagnostics.collectives(program)}
    one_way = (num_workers - 1) / num_workers * size / 8
    assert sorted(sent) == ["all-gather", "all-to-all"]
    assert sent["all-to-all"] == pytest.approx(one_way, rel=0.01)
    assert sent["all-gather"] == pytest.approx(digits * one_way, rel=0.01)


@pytest.mark.parametrize("size", [100, 100_000, 4_000_000])
@pytest.mark.parametrize("num_workers", [2, 3, 8])
def test_the_formula_for_bytes_is_what_the_program_sends(num_workers, size):
    rows = jax.ShapeDtypeStruct((num_workers, size), jnp.float32)
    mean = on_workers("shard_map", lambda row: signax.pmean_signs(row, AXIS, step=0), num_workers)
    tree = jax.ShapeDtypeStruct((size,), jnp.float32)
    sent = diagnostics.collective_bytes(jax.jit(mean).lower(rows).compile())
    assert sent == diagnostics.wire_bytes(tree, num_workers, scheme="mean_signs")


def test_devices_that_hold_the_same_share_the_exchange():
    mesh = auto_mesh({AXIS: 2, "chip": 4})
    rows = jnp.asarray(np.random.default_rng(1).standard_normal((2, 5000)), jnp.float32)

    def mean(rows):
        return signax.pmean_signs(rows[0], AXIS, step=3, split_over="chip", transport="packed")

    spec = jax.sharding.PartitionSpec
    mapped = jax.jit(jax.shard_map(mean, mesh=mesh, in_specs=spec(AXIS), out_specs=spec()))
    np.testing.assert_array_equal(mapped(rows), references.mean_of_signs(rows, 3))


def test_the_transformation_counts_its_steps_under_data_parallel():
    num_workers, steps = 4, 5
    mesh = auto_mesh({"data": num_workers})
    tx = signax.DataParallel(
        optax.chain(signax.mean_signs("data"), optax.scale(-0.5)), mesh, "data"
    )
    params = {"w": jnp.zeros((3, 7))}
    state, step = tx.init(params), jax.jit(tx.update)
    rng = np.random.default_rng(2)
    for t in range(steps):
        rows = rng.choice([-1.0, 0.0, 1.0], size=(num_workers, 3, 7)).astype(np.float32)
        updates, state = step({"w": jnp.asarray(rows)}, state, params)
        expected = references.mean_of_signs(rows.reshape(num_workers, -1), t)
        np.testing.assert_array_equal(np.ravel(updates["w"]), -0.5 * expected.astype(np.float32))
    assert optax.tree.get(state, "count") == steps


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_options_of_the_transformation_reach_the_mean(zeros, transport):
    rows = np.random.default_rng(5).choice([-1.0, 0.0, 1.0], size=(3, 40)).astype(np.float32)
    tx = signax.mean_signs(AXIS, zeros=zeros, transport=transport)
    mesh = auto_mesh({AXIS: 3})
    parallel = signax.DataParallel(tx, mesh, AXIS)
    params = jnp.zeros(40)
    update = jax.jit(parallel.update).lower(rows, parallel.init(params), params).compile()
    updates, _ = update(rows, parallel.init(params), params)
    expected = references.mean_of_signs(rows, 0, zeros)
    np.testing.assert_allclose(updates, expected, rtol=1e-6)
    sent = {record.operation for record in diagnostics.collectives(update)}
    ways = {"packed": "all-to-all", "gather": "all-gather", "sum": "all-reduce"}
    assert ways[transport] in sent
    assert ("all-to-all" in sent) == (transport == "packed")


# --- SSDM: Safaryan and Richtarik 2021 (arXiv 1905.12938) -------------------------------------


def ssdm_rows(tx, params, gradients):
    """Parameters after each step, from gradients [T, M, d], under vmap."""
    num_workers = gradients.shape[1]

    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(jax.vmap(step, axis_name=AXIS))
    rows = jnp.broadcast_to(params, (num_workers, *params.shape))
    state = jax.vmap(tx.init)(rows)
    steps = []
    for gradient in gradients:
        rows, state = step(rows, state, jnp.asarray(gradient, jnp.float32))
        np.testing.assert_array_equal(rows, np.broadcast_to(rows[:1], rows.shape))
        steps.append(np.asarray(rows[0]))
    return np.array(steps)


def test_ssdm_with_certain_signs_follows_its_reference():
    # Momenta whose coordinates share one magnitude have certain signs under the largest one.
    b1, rate, decay, steps = 0.75, 0.125, 0.5, 6
    rng = np.random.default_rng(0)
    signs = rng.choice([-1.0, 1.0], size=(1, 3, 8))
    gradients = signs * 2.0 ** rng.integers(-2, 3, size=(steps, 3, 1))
    start = rng.standard_normal(8)
    tx = signax.ssdm(rate, jax.random.key(1), b1, norm="linf", weight_decay=decay, axis_name=AXIS)
    found = ssdm_rows(tx, jnp.asarray(start, jnp.float32), gradients)
    momenta = np.stack([references.momenta(gradients[:, i], b1) for i in range(3)], axis=1)
    directions = [references.mean_of_signs(m, t) for t, m in enumerate(momenta)]
    expected = references.descend(start, directions, [rate] * steps, decay)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_step_of_ssdm_is_right_on_average():
    b1, d, num_workers = 0.5, 4, 8
    gradients = np.random.default_rng(3).standard_normal((1, num_workers, d))
    momenta = (1 - b1) * gradients[0]
    expected = (momenta / np.linalg.norm(momenta, axis=1, keepdims=True)).mean(axis=0)
    draws = 4000

    def step(key, gradient):
        tx = signax.ssdm(1.0, key, b1, axis_name=AXIS)
        return tx.update(gradient, tx.init(gradient))[0]

    steps = jax.vmap(jax.vmap(step, in_axes=(None, 0), axis_name=AXIS), in_axes=(0, None))
    keys = jax.random.split(jax.random.key(5), draws)
    found = -np.asarray(steps(keys, jnp.asarray(gradients[0], jnp.float32)))[:, 0]
    # The mean of M signs has a variance of at most 1/M: five standard errors of the mean of draws.
    np.testing.assert_allclose(found.mean(axis=0), expected, atol=5 / np.sqrt(num_workers * draws))


def test_ssdm_of_one_worker_is_a_stochastic_sign_of_its_momentum():
    tx = signax.ssdm(0.5, jax.random.key(0), 0.0, norm="linf")
    params = jnp.array([1.0, -2.0, 0.0])
    updates, _ = tx.update(jnp.array([3.0, -3.0, 3.0]), tx.init(params))
    np.testing.assert_array_equal(updates, [-0.5, 0.5, -0.5])
    with pytest.raises(ValueError, match="transport='packed'"):
        signax.ssdm(0.5, jax.random.key(0), transport="packed")


def test_a_worker_that_is_not_finite_keeps_its_momentum_in_ssdm():
    tx = signax.ssdm(1.0, jax.random.key(0), 0.5, norm="linf", axis_name=AXIS)
    bad = np.array([[[1.0, -1.0], [1.0, 1.0]], [[np.nan, 1.0], [1.0, 1.0]]])
    found = ssdm_rows(tx, jnp.zeros(2), bad)
    np.testing.assert_array_equal(found[0], -np.array([1.0, 0.0]))
    np.testing.assert_array_equal(found[1] - found[0], -np.array([1.0, 1.0]))  # the other's alone
