"""Means over workers, of signs and of full-precision updates, against their references."""

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
    """Values that are often zero, of both signs."""
    rng = np.random.default_rng(num_workers)
    return {
        f"{jnp.dtype(dtype).name}{shape}": jnp.asarray(
            rng.choice([-2.0, -1.0, -0.0, 0.0, 1.0, 0.5], size=(num_workers, *shape)), dtype
        )
        for dtype, shape in zip(itertools.cycle(DTYPES), SHAPES, strict=False)
    }


CASES = [("shard_map", 3), ("vmap", 4), ("pmap", 2)]
FURTHER_CASES = [*(("shard_map", m) for m in (1, 2, 4, 7, 8, 9)), ("vmap", 1)]


@pytest.mark.parametrize(
    ("kind", "num_workers"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.thorough) for case in FURTHER_CASES)],
)
def test_means_of_signs_equal_the_reference_with_any_number_of_absent_workers(kind, num_workers):
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
def test_a_mean_of_signs_excludes_a_nonfinite_worker(kind):
    rows = jnp.array([[1.0, -2.0], [jnp.inf, 3.0], [2.0, 5.0]])
    mean = on_workers(kind, lambda row: signax.pmean_signs(row, AXIS, step=0), 3)
    np.testing.assert_array_equal(mean(rows), [1.0, 0.0])


@pytest.mark.parametrize(("zeros", "expected"), [("abstain", [1.0, -0.5]), ("plus", [1.0, 0.0])])
def test_zeros_count_as_their_mode_says_without_a_dither(zeros, expected):
    rows = jnp.array([[1.0, 0.0], [1.0, -1.0]])
    mean = on_workers("vmap", lambda row: signax.pmean_signs(row, AXIS, step=1, zeros=zeros), 2)
    np.testing.assert_array_equal(mean(rows), expected)


def test_a_mean_of_signs_rejects_a_missing_step():
    mean = on_workers("vmap", lambda row: signax.pmean_signs(row, AXIS, step=None), 2)
    with pytest.raises(TypeError, match=r"step=None must be one integer, the number of the step"):
        mean(jnp.ones((2, 3)))


@pytest.mark.parametrize(("num_workers", "digits"), [(2, 2), (3, 2), (4, 3), (7, 3), (8, 4)])
def test_the_count_comes_down_in_the_fewest_bits(num_workers, digits):
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
def test_the_formula_equals_the_bytes_of_the_program(num_workers, size):
    rows = jax.ShapeDtypeStruct((num_workers, size), jnp.float32)
    mean = on_workers("shard_map", lambda row: signax.pmean_signs(row, AXIS, step=0), num_workers)
    tree = jax.ShapeDtypeStruct((size,), jnp.float32)
    sent = diagnostics.collective_bytes(jax.jit(mean).lower(rows).compile())
    assert sent == diagnostics.wire_bytes(tree, num_workers, scheme="mean_signs")


def test_an_exchange_can_be_split_over_devices_with_equal_values():
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
def test_options_of_the_transformation_reach_the_mean(zeros, transport):
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


# Full-precision means.


def apply(tx, **extra):
    """One worker's update from a fresh state."""

    def update(updates, active=None):
        keywords = extra if active is None else {**extra, "active": active}
        return tx.update(updates, tx.init(updates), **keywords)[0]

    return update


@pytest.mark.parametrize(
    ("kind", "num_workers"),
    [*(("vmap", number) for number in range(1, 10)), *itertools.product(MAPS[:2], (1, 2, 7))],
)
def test_a_mean_equals_the_reference_with_any_number_of_absent_workers(kind, num_workers):
    # Sums of whole numbers are exact in any order. XLA may multiply by a reciprocal instead of
    # dividing, which rounds twice.
    rows = np.random.default_rng(num_workers).integers(-99, 100, (num_workers, 33))
    rows = jnp.asarray(rows, jnp.float32)
    mean = on_workers(kind, apply(signax.average_updates(AXIS)), num_workers)
    for out in range(num_workers + 1):
        active = jnp.arange(num_workers) >= out
        expected = references.mean(np.asarray(rows), np.asarray(active))
        np.testing.assert_allclose(mean(rows, active), expected, rtol=2**-22)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_mean_excludes_the_whole_tree_of_a_nonfinite_worker(bad):
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
