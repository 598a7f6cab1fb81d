"""Norms of gradients on every worker and of their mean, against NumPy, and their messages."""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from least_squares import make_mesh
from workers import auto_mesh

from signax import diagnostics
from signax._data_parallel.norms import grad_norm
from signax._data_parallel.placement import Workers

A, E = AxisType.Auto, AxisType.Explicit
# The squared norm has a relative standard deviation of at most 2.3%, and the norm of half of that.
DEVIATION = 0.023
BOUND = 4 * DEVIATION / 2


def normal(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


@cache
def compiled(num_workers=4):
    workers = Workers.find(make_mesh((num_workers,)), "data", None)
    return jax.jit(partial(grad_norm, workers))


def own_norms(rows):
    """Each worker's norm, in f64."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(rows)]
    return np.sqrt(sum(np.square(leaf).reshape(len(leaf), -1).sum(axis=1) for leaf in leaves))


def norm_of_mean(rows, workers=slice(None)):
    means = [np.asarray(leaf, np.float64)[workers].mean(0) for leaf in jax.tree.leaves(rows)]
    return np.sqrt(sum(np.sum(np.square(mean)) for mean in means))


def tree_of_rows(num_workers=4, dtype=np.float32):
    """Leaves below and above the sizes at which leaves are sketched alone and cut into rows."""
    shapes = {"large": (300, 500), "middle": (200, 100), "small": (30, 7), "scalar": ()}
    return {
        name: normal((num_workers, *shape), seed, dtype)
        for seed, (name, shape) in enumerate(shapes.items())
    }


# Values.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_norms_agree_with_numpy(dtype):
    with jax.enable_x64(dtype == "float64"):
        rows = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree_of_rows())
        found = compiled()(rows)
    assert found.workers.dtype == found.mean.dtype == jnp.float32
    np.testing.assert_allclose(found.workers, own_norms(rows), rtol=1e-5)
    np.testing.assert_allclose(found.mean, norm_of_mean(rows), rtol=BOUND)


def dense(seed):
    return normal((2, 128, 1024), seed)


def one_column(seed):
    rows = np.zeros((2, 512, 512), np.float32)
    rows[:, :, 7] = normal((2, 512), seed)
    return rows


def one_column_of_4096(seed):
    rows = np.zeros((2, 64, 4096), np.float32)
    rows[:, :, 5] = normal((2, 64), seed)
    return rows


def heavy_tailed(seed):
    return normal((2, 128, 1024), seed) ** 5


@pytest.mark.parametrize("kind", [dense, one_column, one_column_of_4096, heavy_tailed])
def test_the_estimate_is_unbiased_with_the_stated_deviation(kind):
    """Over 60 gradients: the mean error within four standard errors, the deviation below 4/3."""
    errors = []
    for seed in range(60):
        rows = kind(seed)
        errors.append((float(compiled(2)(rows).mean) / norm_of_mean(rows)) ** 2 - 1)
    assert abs(np.mean(errors)) < 4 * DEVIATION / np.sqrt(len(errors))
    assert np.std(errors) < 4 / 3 * DEVIATION


def test_equal_gradients_have_the_norm_of_each():
    """Coordinates of one sign, whose products would add up without random signs."""
    rows = np.ones((4, 256, 1024), np.float32)
    found = compiled()(rows)
    np.testing.assert_allclose(found.workers, np.full(4, 512.0), rtol=1e-5)
    np.testing.assert_allclose(found.mean, 512.0, rtol=BOUND)


def test_leaves_have_buckets_of_their_own():
    """If they had the same, thirty leaves with one coordinate each would meet in one bucket."""
    rows = [np.zeros((4, 20_000), np.float32) for _ in range(30)]
    for leaf in rows:
        leaf[:, 3] = 1
    np.testing.assert_allclose(compiled()(rows).mean, np.sqrt(30), rtol=BOUND)


def test_seeds_give_independent_estimates():
    rows = np.ones((2, 64, 1024), np.float32)
    workers = Workers.find(make_mesh((2,)), "data", None)
    found = [float(jax.jit(partial(grad_norm, workers, seed=seed))(rows).mean) for seed in range(5)]
    assert len(set(found)) == 5
    np.testing.assert_allclose(found, 256.0, rtol=BOUND)


def test_a_gradient_of_few_coordinates_is_exact():
    """A hundred coordinates hardly share a bucket."""
    rows = normal((4, 100))
    np.testing.assert_allclose(compiled()(rows).mean, norm_of_mean(rows), rtol=0.02)
    rows = normal(4)
    np.testing.assert_allclose(compiled()(rows).mean, norm_of_mean(rows), rtol=1e-6)


def test_opposite_gradients_have_a_mean_of_zero():
    half = normal((2, 40, 1000))
    found = compiled()(np.concatenate([half, -half]))
    np.testing.assert_array_less(1, found.workers)
    assert found.mean < 1e-4


# Values that are not finite, or at the ends of the range.


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_mean_leaves_out_workers_whose_gradient_is_not_finite(bad):
    rows = tree_of_rows()
    rows["small"][2, 3, 4] = bad
    found = compiled()(rows)
    assert np.isnan(found.workers).tolist() == [False, False, True, False]
    np.testing.assert_allclose(found.mean, norm_of_mean(rows, [0, 1, 3]), rtol=BOUND)


def test_the_mean_is_nan_without_a_finite_gradient():
    found = compiled()(np.full((4, 3), np.nan, np.float32))
    assert np.isnan(found.workers).all()
    assert np.isnan(found.mean)


@pytest.mark.parametrize(
    ("dtype", "size"), [("float16", 6e4), ("float32", 1e30), ("float32", 1e-30)]
)
def test_squares_neither_overflow_nor_vanish(dtype, size):
    rows = jnp.full((4, 50), size, dtype)
    found = compiled()(rows)
    np.testing.assert_allclose(found.workers, own_norms(rows), rtol=1e-5)
    np.testing.assert_allclose(found.mean, norm_of_mean(rows), rtol=0.05)


def test_a_norm_beyond_the_range_is_no_nan():
    found = compiled()(np.full((4, 50), 3e38, np.float32))
    assert found.workers.tolist() == [float(jnp.finfo(jnp.float32).max)] * 4
    assert found.mean == jnp.inf


def test_zeros_have_norm_zero():
    found = compiled()(np.zeros((4, 5), np.float32))
    assert found.workers.tolist() == [0.0] * 4
    assert found.mean == 0


# Trees and errors.


@pytest.mark.parametrize("rows", [{}, (), np.zeros((4, 0, 3), np.float32)])
def test_empty_trees_have_norm_zero(rows):
    found = compiled()(rows)
    assert found.workers.tolist() == [0.0] * 4
    assert found.mean == 0


def test_rejects_gradients_without_a_row_per_worker():
    with pytest.raises(
        ValueError, match=r"\['w'\] has shape \(3, 5\), but needs one row for each of 4"
    ):
        compiled()({"w": np.ones((3, 5), np.float32)})


def test_rejects_integers_by_name():
    with pytest.raises(TypeError, match=r"rows\['w'\] has dtype int32"):
        compiled()({"w": np.ones((4, 5), np.int32)})


# Meshes.

SPECS = {
    "large": PartitionSpec("fsdp", "model"),
    "middle": PartitionSpec(("model", "fsdp")),
    "small": PartitionSpec(),
    "scalar": PartitionSpec(),
}


def sharded_rows(mesh):
    return {
        name: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec("data", *SPECS[name])))
        for name, leaf in tree_of_rows(2).items()
    }


MESHES = [
    *itertools.product([(A, A, A), (E, E, E), (A, E, A)], [SPECS]),
    ((A, A, A), None),
    ((E, E, E), None),
]


@pytest.mark.parametrize(("kinds", "specs"), MESHES)
def test_norms_of_sharded_leaves_agree_with_numpy(kinds, specs):
    mesh = make_mesh((2, 2, 2), kinds)
    workers = Workers.find(mesh, "data", specs)
    rows = sharded_rows(mesh)
    found = jax.jit(partial(grad_norm, workers))(rows)
    np.testing.assert_allclose(found.workers, own_norms(rows), rtol=1e-5)
    np.testing.assert_allclose(found.mean, norm_of_mean(rows), rtol=BOUND)


def test_blocks_of_one_leaf_have_signs_and_buckets_of_their_own():
    """If they had the same, blocks that are alike would have twice the norm, or cancel."""
    mesh = make_mesh((2, 4))
    workers = Workers.find(mesh, "data", PartitionSpec("model"))
    block = normal((100, 300))
    rows = np.stack([np.concatenate([block] * 4)] * 2)
    rows = jax.device_put(rows, NamedSharding(mesh, PartitionSpec("data", "model")))
    found = jax.jit(partial(grad_norm, workers))(rows)
    np.testing.assert_allclose(found.mean, norm_of_mean(rows), rtol=BOUND)


def test_workers_may_lie_along_two_axes():
    mesh = auto_mesh({"slice": 2, "data": 2, "model": 2})
    specs = {**SPECS, "large": PartitionSpec("model"), "middle": PartitionSpec(None, "model")}
    workers = Workers.find(mesh, ("slice", "data"), specs)
    rows = tree_of_rows()
    found = jax.jit(partial(grad_norm, workers))(rows)
    np.testing.assert_allclose(found.workers, own_norms(rows), rtol=1e-5)
    np.testing.assert_allclose(found.mean, norm_of_mean(rows), rtol=BOUND)


# Messages.


def test_workers_exchange_one_sketch_of_any_model():
    workers = Workers.find(make_mesh((8,)), "data", None)
    sharding = NamedSharding(workers.mesh, PartitionSpec("data"))
    shapes = [(1024, 4096), (4096, 1024), (70_000,), (64,)] + [(100, 100)] * 20
    rows = [jax.ShapeDtypeStruct((8, *s), jnp.float32, sharding=sharding) for s in shapes]
    program = jax.jit(partial(grad_norm, workers)).lower(rows).compile()
    assert 0 < diagnostics.collective_bytes(program) < 40_000
    assert [record.operation for record in diagnostics.collectives(program)] == ["all-reduce"]


@pytest.mark.parametrize(
    ("kinds", "specs"), [((A, A, A), SPECS), ((E, E, E), SPECS), ((E, E, E), None)]
)
def test_sharded_leaves_stay_sharded(kinds, specs):
    """A group of sharded leaves sends another sketch, inside each worker."""
    mesh = make_mesh((2, 2, 2), kinds)
    workers = Workers.find(mesh, "data", specs)
    program = jax.jit(partial(grad_norm, workers)).lower(sharded_rows(mesh)).compile()
    sent = diagnostics.collectives(program)
    assert {record.operation for record in sent} == {"all-reduce"}
    assert max(record.elements for record in sent) <= 4097
    assert sum(record.elements > 8 for record in sent) == 2
