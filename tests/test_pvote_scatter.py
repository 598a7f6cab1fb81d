"""`pvote_scatter`: every worker's part of the decision, against the reference."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from jax.sharding import AxisType, PartitionSpec
from workers import AXIS, auto_mesh, rows_of_workers

import signax
from signax import diagnostics

DTYPES = (jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16)
PAIR = {"slice": 2, "chip": 4}


def random_rows(rng, shape, dtype):
    """Values that often tie and are often zero, of both signs."""
    return jnp.asarray(rng.choice([-2.0, -1.0, -0.0, 0.0, 1.0, 0.5], size=shape), dtype)


def assert_parts_equal_the_reference(parts, rows, dimension, step, zeros="dither", ties="dither"):
    """Compares each worker's part with the vote on that piece as a leaf."""
    rows = np.asarray(rows, np.float64)
    good = np.isfinite(rows).reshape(len(rows), -1).all(axis=1)
    pieces = np.split(rows, len(rows), axis=dimension % (rows.ndim - 1) + 1)
    for part, piece in zip(np.asarray(parts, np.float64), pieces, strict=True):
        assert part.shape == piece.shape[1:]
        values = piece.reshape(len(rows), -1)
        expected = references.vote(values, step, zeros, ties, active=good)
        np.testing.assert_array_equal(part.reshape(-1), expected)


@pytest.mark.parametrize(
    ("kind", "num_workers"),
    [
        ("shard_map", 4),
        ("vmap", 3),
        *(pytest.param(*case, marks=pytest.mark.thorough) for case in [("vmap", 1), ("pmap", 2)]),
    ],
)
def test_parts_equal_the_reference_along_every_dimension(kind, num_workers):
    shapes = {"first": (num_workers * 5, 3), "last": (7, num_workers * 2), "flat": (num_workers,)}
    shapes |= {"middle": (3, num_workers * 301, 19), "empty": (0, num_workers)}
    some = [("dither", "dither"), ("plus", "plus"), ("abstain", "dither")]
    dimensions = {"first": 0, "last": -1, "flat": 0, "middle": 1, "empty": 0}

    def vote(tree, step):
        return [
            signax.pvote_scatter(
                tree, AXIS, scatter_dimension=dimensions, step=step, zeros=zeros, ties=ties
            )
            for zeros, ties in some
        ]

    rng = np.random.default_rng(num_workers)
    with jax.enable_x64(True):
        rows = {
            name: random_rows(rng, (num_workers, *shape), dtype)
            for (name, shape), dtype in zip(shapes.items(), itertools.cycle(DTYPES), strict=False)
        }
        voted = rows_of_workers(kind, vote, num_workers)
        for step in (0, 6):
            results = voted(rows, jnp.full(num_workers, step))
            for options, parts in zip(some, results, strict=True):
                for name, leaf in rows.items():
                    assert parts[name].dtype == leaf.dtype
                    args = parts[name], leaf, dimensions[name], step
                    assert_parts_equal_the_reference(*args, *options)


def test_parts_of_workers_along_several_axes_lie_in_tuple_order():
    rows = random_rows(np.random.default_rng(0), (8, 24, 5), jnp.float32)
    axes = tuple(PAIR)
    vote = jax.shard_map(
        lambda row: signax.pvote_scatter(row[0], axes, step=3),
        mesh=auto_mesh(PAIR),
        in_specs=PartitionSpec(axes),
        out_specs=PartitionSpec(axes),
    )
    parts = np.reshape(jax.jit(vote)(rows), (8, 3, 5))
    assert_parts_equal_the_reference(parts, rows, 0, 3)


@pytest.mark.parametrize("zeros", ["dither", "abstain"])
def test_a_nonfinite_or_inactive_worker_is_excluded_from_every_part(zeros):
    rows = random_rows(np.random.default_rng(1), (4, 8, 3), jnp.float32).at[2, 5, 1].set(jnp.nan)
    active = jnp.array([True, False, True, True])

    def vote(row, active):
        return signax.pvote_scatter(row, AXIS, step=1, zeros=zeros, active=active)

    voted = rows_of_workers("vmap", vote, 4)
    spoilt = rows.at[1].set(jnp.nan)  # an inactive worker is excluded like a nonfinite worker
    assert_parts_equal_the_reference(voted(rows, active), spoilt, 0, 1, zeros)
    without_voters = voted(rows, jnp.zeros(4, jnp.bool_))
    np.testing.assert_array_equal(without_voters, np.zeros((4, 2, 3)))


def test_parts_without_a_dither_are_slices_of_the_whole_vote():
    rows = {"w": random_rows(np.random.default_rng(2), (4, 6, 8), jnp.float32)}

    def vote(tree):
        options = {"zeros": "abstain", "step": 0}
        part = signax.pvote_scatter(tree, AXIS, scatter_dimension=1, **options)
        return part, signax.pvote(tree, AXIS, **options)

    parts, whole = rows_of_workers("vmap", vote, 4)(rows)
    np.testing.assert_array_equal(np.concatenate(parts["w"], axis=1), whole["w"][0])


@pytest.mark.parametrize(("zeros", "planes"), [("dither", 1), ("abstain", 2)])
def test_parts_are_sent_in_one_all_to_all_and_nothing_comes_back(zeros, planes, mesh):
    size = 1 << 20
    vote = jax.shard_map(
        lambda row: signax.pvote_scatter(row[0], "data", step=0, zeros=zeros),
        mesh=mesh,
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec("data"),
    )
    compiled = jax.jit(vote).lower(jax.ShapeDtypeStruct((8, size), jnp.float32)).compile()
    (record,) = diagnostics.collectives(compiled)
    assert (record.operation, record.dtype) == ("all-to-all", "u32")
    least = 7 / 8 * planes * size / 8
    assert least < record.bytes_sent <= least + 7 * 4 * 128


@pytest.mark.parametrize(
    ("shape", "dimension", "said"),
    [
        ((6, 4), 0, r"\['w'\] of shape \(6, 4\) cannot be cut into 4 equal parts"),
        ((8, 4), 2, "along scatter_dimension=2"),
        ((8, 4), -3, "along scatter_dimension=-3"),
        ((), 0, r"\['w'\] of shape \(\) cannot be cut"),
        ((8, 4), {"v": 0}, "a tree of them like the one that is voted on"),
        ((8, 4), {"w": [0, 1]}, "a tree of them like the one that is voted on"),
    ],
)
def test_rejects_a_leaf_that_cannot_be_cut_into_parts(shape, dimension, said):
    def vote(tree):
        return signax.pvote_scatter(tree, AXIS, scatter_dimension=dimension, step=0)

    with pytest.raises(ValueError, match=said):
        jax.vmap(vote, axis_name=AXIS)({"w": jnp.ones((4, *shape))})


@pytest.mark.parametrize("spec", [("model",), (None, "model")])
def test_leaves_that_are_sharded_over_explicit_axes_need_a_map_over_them(spec):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    rows = random_rows(np.random.default_rng(0), (4, 8, 16), jnp.float32)

    def vote_over(*axes):
        def vote(tree):
            part = signax.pvote_scatter({"w": tree["w"][0]}, "data", step=0)
            return jax.tree.map(lambda leaf: leaf[None], part)

        split = PartitionSpec("data", *spec) if "model" in axes else PartitionSpec("data")
        mapped = jax.shard_map(vote, in_specs=split, out_specs=split, axis_names={*axes})
        return jax.jit(mapped)({"w": jax.device_put(rows, PartitionSpec("data", *spec))})

    with jax.set_mesh(mesh):
        said = (
            r"tree\['w'\] is sharded over the Explicit axes \('model',\).*map over these axes too"
        )
        with pytest.raises(ValueError, match=said):
            vote_over("data")
        parts = vote_over("data", "model")["w"]
    blocks = zip(*(np.split(np.asarray(x), 2, len(spec)) for x in (parts, rows)), strict=True)
    for part, block in blocks:
        assert_parts_equal_the_reference(part, block, 0, 0)


def test_parts_of_an_empty_tree_are_empty():
    tree = {"e": jnp.ones((2, 0, 4)), "none": None}
    parts = rows_of_workers(
        "vmap", lambda t: signax.pvote_scatter(t, AXIS, scatter_dimension=1, step=0), 2
    )(tree)
    assert jax.tree.map(jnp.shape, parts) == {"e": (2, 0, 2), "none": None}


@pytest.mark.parametrize("dimension", [0.5, "0"])
def test_rejects_a_scatter_dimension_that_is_not_an_integer(dimension):
    def scatter(g):
        return signax.pvote_scatter(g, AXIS, step=0, scatter_dimension=dimension)

    with pytest.raises(TypeError, match=f"scatter_dimension={dimension!r} is not an integer"):
        jax.vmap(scatter, axis_name=AXIS)(jnp.ones((2, 4)))
