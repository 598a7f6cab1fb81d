"""Orthogonalisation against NumPy and singular values, and of matrices that lie on many devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers

import signax
from signax import diagnostics


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def orthogonalized(updates, numbers=None, **kwargs):
    tx = signax.orthogonalize(weight_dimension_numbers=numbers, **kwargs)
    return tx.update(updates, tx.init(updates))[0]


@pytest.mark.parametrize("shape", [(4, 4), (3, 9), (9, 3), (1, 5), (5, 1)], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_a_matrix_becomes_the_papers_polar_factor(shape, scale):
    matrix = scale * normal(shape)
    found = orthogonalized(jnp.asarray(matrix))
    np.testing.assert_allclose(found, references.polar(matrix.astype(np.float64)), atol=1e-4)


def test_singular_values_become_about_equal_and_vectors_stay():
    u, _, v = np.linalg.svd(normal((8, 24)), full_matrices=False)
    matrix = u * np.geomspace(0.05, 1, 8) @ v
    found = orthogonalized(jnp.asarray(matrix, jnp.float32))
    values = np.diag(u.T @ np.asarray(found) @ v.T) / np.sqrt(24)
    assert np.all((values > 0.6) & (values < 1.25))
    np.testing.assert_allclose(u.T @ found @ v.T, np.diag(values * np.sqrt(24)), atol=1e-3)


def test_more_steps_raise_small_singular_values():
    matrix = jnp.diag(jnp.array([1.0, 1e-4]))
    few, many = (orthogonalized(matrix, ns_steps=steps)[1, 1] for steps in (2, 10))
    assert few < 0.01 < 0.9 < many


def test_leaves_of_fewer_axes_stay():
    leaves = {"scalar": jnp.float32(3.0), "vector": jnp.arange(3.0), "empty": jnp.zeros((0, 4))}
    found = orthogonalized(leaves)
    assert all(found[name] is leaf for name, leaf in leaves.items())


def test_dimension_numbers_name_rows_columns_and_stacks():
    kernel = normal((3, 3, 4, 6))  # height, width, inputs, outputs
    numbers = MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)
    found = orthogonalized(jnp.asarray(kernel), numbers)
    expected = references.polar(kernel.reshape(36, 6).astype(np.float64)).reshape(kernel.shape)
    np.testing.assert_allclose(found, expected, atol=1e-4)

    stack = normal((5, 4, 6))
    found = orthogonalized(jnp.asarray(stack), MuonDimensionNumbers(1, -1))
    expected = [references.polar(layer.astype(np.float64)) for layer in stack]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_prefix_or_a_function_may_give_dimension_numbers():
    updates = {"embedding": jnp.eye(3) * 5, "block": {"up": jnp.eye(3) * 5, "bias": jnp.ones(3)}}
    tree = {"embedding": None, "block": {"up": MuonDimensionNumbers(), "bias": None}}
    found = orthogonalized(updates, tree)
    assert found["embedding"] is updates["embedding"]
    assert found["block"]["bias"] is updates["block"]["bias"]
    assert abs(found["block"]["up"][0, 0]) < 3

    assert found["block"]["up"].tolist() == (
        orthogonalized(updates, lambda params: {**tree, "embedding": None})["block"]["up"].tolist()
    )
    whole = {"a": jnp.eye(2), "b": jnp.eye(3)}
    by_prefix = orthogonalized({"matrices": whole}, {"matrices": MuonDimensionNumbers()})
    jax.tree.map(np.testing.assert_array_equal, by_prefix, orthogonalized({"matrices": whole}))


def test_masked_leaves_stay_masked():
    tx = optax.masked(signax.orthogonalize(), {"w": True, "e": False})
    updates = {"w": jnp.eye(2) * 4, "e": jnp.eye(2) * 4}
    found, _ = tx.update(updates, tx.init(updates))
    assert found["e"] is updates["e"]
    assert abs(found["w"][0, 0]) < 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_keeps_dtypes(dtype):
    assert orthogonalized(jnp.asarray(normal((4, 4)), dtype)).dtype == dtype


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_matrix_that_is_not_finite_becomes_nan(bad):
    found = orthogonalized(jnp.eye(3).at[0, 1].set(bad))
    assert jnp.isnan(found).all()


@pytest.mark.parametrize(
    ("shape", "numbers", "words"),
    [
        ((2, 3, 4), None, ["params['w']", "(2, 3, 4)", "weight_dimension_numbers"]),
        ((3,), MuonDimensionNumbers(), ["params['w']", "(3,)", "None"]),
        ((3, 4), MuonDimensionNumbers(0, 2), ["params['w']", "(3, 4)"]),
        ((3, 4), MuonDimensionNumbers(1, -1), ["params['w']", "both"]),
        ((3, 4), MuonDimensionNumbers((), (0, 1)), ["params['w']", "at least one"]),
    ],
    ids=["rank 3", "a vector", "no such axis", "one axis twice", "no rows"],
)
def test_rejects_dimension_numbers_that_do_not_fit(shape, numbers, words):
    tree = None if numbers is None else {"w": numbers}
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        orthogonalized({"w": jnp.ones(shape)}, tree)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("axes", [(np.int64(1), np.int64(2)), ([1], [2]), (-2, (-1,))])
def test_axes_may_be_any_integers(axes):
    stack = normal((2, 3, 4))
    found = orthogonalized({"w": jnp.asarray(stack)}, {"w": MuonDimensionNumbers(*axes)})["w"]
    expected = [references.polar(matrix.astype(np.float64)) for matrix in stack]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_rejects_other_trees_and_entries():
    with pytest.raises(ValueError, match="differ in structure"):
        orthogonalized({"w": jnp.eye(2)}, {"v": MuonDimensionNumbers()})
    with pytest.raises(TypeError, match="'rows'"):
        orthogonalized({"w": jnp.eye(2)}, {"w": "rows"})
    for axis in (1.0, "1"):
        with pytest.raises(TypeError, match=r"params\['w'\] has .* axes must be integers"):
            orthogonalized({"w": jnp.eye(2)}, {"w": MuonDimensionNumbers(0, axis)})
    with pytest.raises(ValueError, match="ns_steps"):
        signax.orthogonalize(ns_steps=0)


SPECS = {
    "rows": PartitionSpec("fsdp"),
    "columns": PartitionSpec(None, "model"),
    "both": PartitionSpec("model", "fsdp"),
    "one axis by two": PartitionSpec(("fsdp", "model")),
}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_sharded_matrices_are_orthogonalized_as_a_whole(spec, kind):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "model"), axis_types=(kind,) * 3)
    matrices = normal((2, 8, 16))
    tx = signax.DataParallel(
        optax.chain(signax.orthogonalize(), signax.average_updates("data")),
        mesh,
        param_specs=spec,
    )
    rows = jax.device_put(matrices, NamedSharding(mesh, PartitionSpec("data", *spec)))
    params = jax.device_put(jnp.zeros((8, 16)), NamedSharding(mesh, spec))
    state = tx.init(params)
    update = jax.jit(tx.update).lower(rows, state, params).compile()
    found, _ = update(rows, state, params)
    expected = np.mean([references.polar(m.astype(np.float64)) for m in matrices], axis=0)
    np.testing.assert_allclose(found, expected, atol=1e-4)

    gathered = [
        record
        for record in diagnostics.collectives(update, mesh=mesh)
        if record.is_floating and record.elements > 8 and "data" not in record.axes
    ]
    assert gathered  # only devices of one worker exchange the matrix
    blocks = 2 if len(jax.tree.leaves(tuple(spec))) == 1 else 4
    assert sum(record.bytes_sent for record in gathered) <= 4 * 8 * 16 * (blocks - 1) / blocks * 1.5


def test_stacks_that_are_sharded_over_layers_are_not_gathered():
    mesh = jax.make_mesh((2, 4), ("data", "stage"), axis_types=(AxisType.Auto,) * 2)
    stacks, spec = normal((2, 4, 6, 8)), PartitionSpec("stage")
    tx = signax.DataParallel(
        optax.chain(
            signax.orthogonalize(weight_dimension_numbers=MuonDimensionNumbers(1, 2)),
            signax.average_updates("data"),
        ),
        mesh,
        param_specs=spec,
    )
    rows = jax.device_put(stacks, NamedSharding(mesh, PartitionSpec("data", "stage")))
    params = jax.device_put(jnp.zeros((4, 6, 8)), NamedSharding(mesh, spec))
    update = jax.jit(tx.update).lower(rows, tx.init(params), params).compile()
    found, _ = update(rows, tx.init(params), params)
    expected = np.mean(
        [[references.polar(m.astype(np.float64)) for m in stack] for stack in stacks], axis=0
    )
    np.testing.assert_allclose(found, expected, atol=1e-4)
    for record in diagnostics.collectives(update, mesh=mesh):
        assert record.elements <= 8 or record.axes == ("data",)
