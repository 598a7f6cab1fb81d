"""Compressors against their references, and random compressors against stated bounds."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import signax
from signax import diagnostics

DTYPES = ["float16", "bfloat16", "float32", "float64"]
# Relative to a value: the rounding to the dtype, plus the rounding of a mean in f32 or f64.
TOLERANCE = {"float16": 1.1e-3, "bfloat16": 8e-3, "float32": 1e-6, "float64": 1e-14}


def compress(tx, updates):
    """One update of a transformation without parameters."""
    return jax.jit(lambda tree: tx.update(tree, tx.init(tree))[0])(updates)


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


# --- scaled sign -----------------------------------------------------------------------------


@pytest.mark.parametrize("block", ["leaf", "row", 1, 2, 20, 21, 22, 100])
def test_scaled_sign_equals_its_reference_in_every_dtype(block):
    with jax.enable_x64(True):
        tree = {dtype: jnp.asarray(normal((3, 7)), dtype) for dtype in DTYPES}
        found = compress(signax.scale_by_scaled_sign(block=block), tree)
    for dtype in DTYPES:
        assert found[dtype].dtype == dtype
        expected = references.scaled_sign(np.asarray(tree[dtype], np.float64), block)
        np.testing.assert_allclose(
            np.asarray(found[dtype], np.float64), expected, rtol=TOLERANCE[dtype]
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaled_sign_of_a_tree_shares_one_scale(dtype):
    with jax.enable_x64(dtype == "float64"):
        tree = [jnp.asarray(normal(shape), dtype) for shape in [(4, 3), (), (0, 2), (5,)]]
        found = compress(signax.scale_by_scaled_sign(block="tree"), tree)
    expected = references.scaled_sign([np.asarray(leaf, np.float64) for leaf in tree], "tree")
    for leaf, reference in zip(found, expected, strict=True):
        assert leaf.dtype == dtype
        np.testing.assert_allclose(np.asarray(leaf, np.float64), reference, rtol=TOLERANCE[dtype])


def test_a_program_adds_up_the_scale_of_a_tree_once():
    tx = signax.scale_by_scaled_sign(block="tree")

    def count_additions(num_leaves):
        tree = [jnp.ones(3)] * num_leaves
        program = jax.jit(tx.update).lower(tree, tx.init(tree)).compile()
        return program.as_text().count(" add(")

    assert count_additions(40) < 3 * count_additions(20)  # not 4, the square of 2


def test_scaled_sign_of_a_tree_of_several_dtypes_keeps_each():
    tree = [jnp.full(3, 2.0, jnp.bfloat16), jnp.full(1, -6.0, jnp.float32)]
    found = compress(signax.scale_by_scaled_sign(block="tree"), tree)
    assert [leaf.dtype for leaf in found] == [jnp.bfloat16, jnp.float32]
    assert [leaf.tolist() for leaf in found] == [[3.0, 3.0, 3.0], [-3.0]]


@settings(deadline=None, max_examples=10, derandomize=True)
@given(size=st.integers(1, 9), blocks=st.integers(1, 3), beyond=st.integers(-1, 1))
def test_padding_never_enters_the_scale_of_a_short_block(size, blocks, beyond):
    values = normal(max(0, size * blocks + beyond)).astype(np.float32)
    found = compress(signax.scale_by_scaled_sign(block=size), jnp.asarray(values))
    expected = references.scaled_sign(values.astype(np.float64), size)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("block", ["leaf", "tree", "row", 3])
@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (0, 2)])
def test_scaled_sign_passes_scalars_and_empty_leaves(block, shape):
    leaf = jnp.full(shape, -2.5)
    found = signax.scale_by_scaled_sign(block=block).update(leaf, ())[0]
    assert found.shape == shape
    np.testing.assert_array_equal(found, leaf)


@pytest.mark.parametrize("block", ["leaf", "tree", "row", 3])
def test_scaled_sign_of_zeros_is_zero(block):
    found = signax.scale_by_scaled_sign(block=block).update(jnp.zeros((2, 4)), ())[0]
    np.testing.assert_array_equal(found, np.zeros((2, 4)))


@pytest.mark.parametrize(
    ("block", "spoilt"),
    [("leaf", [0, 1, 2, 3, 4, 5]), ("tree", [0, 1, 2, 3, 4, 5]), ("row", [0, 1, 2]), (2, [0, 1])],
)
def test_nan_spreads_to_its_block_only(block, spoilt):
    leaf = jnp.ones((2, 3)).at[0, 1].set(jnp.nan)
    found = signax.scale_by_scaled_sign(block=block).update(leaf, ())[0]
    assert np.flatnonzero(np.isnan(found)).tolist() == spoilt


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scaled_sign_sums_many_half_precision_magnitudes(dtype):
    # In f16 the sum would overflow; in bf16 the sum would stop growing at 256.
    found = compress(signax.scale_by_scaled_sign(), jnp.full(10_000, -10.0, dtype))
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.full(10_000, -10.0))


def test_a_block_larger_than_the_leaf_costs_no_memory():
    leaf = jax.ShapeDtypeStruct((10,), jnp.float32)
    tx = signax.scale_by_scaled_sign(block=2**26)
    program = jax.jit(lambda p: tx.update(p, ())[0]).lower(leaf).compile()
    assert program.memory_analysis().temp_size_in_bytes < 10_000


@pytest.mark.parametrize("seed", range(5))
def test_the_error_of_scaled_sign_follows_the_density(seed):
    p = jnp.asarray(normal(50, seed) ** 3, jnp.float32)
    lost = float(jnp.sum((compress(signax.scale_by_scaled_sign(), p) - p) ** 2))
    expected = (1 - float(diagnostics.density(p))) * float(jnp.sum(p**2))
    np.testing.assert_allclose(lost, expected, rtol=1e-5)


# --- stochastic sign -------------------------------------------------------------------------


def draw(tx, gradient, steps):
    """The updates of successive steps on one gradient."""

    def step(state, _):
        updates, state = tx.update(gradient, state)
        return state, updates

    return jax.jit(lambda: lax.scan(step, tx.init(gradient), length=steps)[1])()


def assert_mean(signs, expected):
    """The mean of independent signs is within five standard deviations of the expected mean."""
    deviation = np.sqrt((1 - expected**2) / len(signs))
    found = np.asarray(signs, np.float64).mean(axis=0)
    assert (np.abs(found - expected) <= 5 * deviation + 1e-6).all(), (found, expected)


# The squares overflow for 1e30, and underflow for 1e-30; near 3e38 a sum of two overflows.
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30, 0.7e38])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_mean_of_stochastic_signs_is_the_normalised_gradient(norm, scale):
    gradient = np.array([3.0, -4.0, 1.0, 0.0, 4.0]) * scale
    tx = signax.scale_by_stochastic_sign(jax.random.key(1), norm=norm)
    signs = draw(tx, jnp.asarray(gradient, jnp.float32), 4_000)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert_mean(signs, references.stochastic_sign_mean(gradient, norm))


def test_a_bound_replaces_the_norm_and_clips():
    gradient = np.array([1.0, -2.0, 8.0, -5.0, 0.0])
    tx = signax.scale_by_stochastic_sign(jax.random.key(2), norm=4.0)
    signs = draw(tx, jnp.asarray(gradient, jnp.float32), 4_000)
    assert_mean(signs, references.stochastic_sign_mean(gradient, 4.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_stochastic_signs_are_unbiased_in_every_dtype(dtype):
    with jax.enable_x64(dtype == "float64"):
        gradient = jnp.asarray([0.01, -0.5, 1.0], dtype)
        tx = signax.scale_by_stochastic_sign(jax.random.key(3))
        signs = draw(tx, gradient, 4_000)
    assert signs.dtype == dtype
    expected = references.stochastic_sign_mean(np.asarray(gradient, np.float64))
    assert_mean(signs, expected)


def test_each_leaf_has_its_own_norm_and_draws():
    gradient = {"small": jnp.full(1_000, 1e-9), "large": jnp.full(1_000, 1e9)}
    signs = compress(signax.scale_by_stochastic_sign(jax.random.key(4)), gradient)
    # Each mean is 1/sqrt(1000) = .03. Leaves with the same draws would agree everywhere;
    # independent leaves agree on half, with a standard deviation of .016.
    agreement = float(jnp.mean(signs["small"] == signs["large"]))
    assert abs(agreement - 0.5) < 0.08


@pytest.mark.parametrize("norm", ["l2", "linf", 2.0])
@pytest.mark.parametrize("shape", [(), (0,), (3, 2)])
def test_a_leaf_of_zeros_gives_zeros(norm, shape):
    tx = signax.scale_by_stochastic_sign(jax.random.key(5), norm=norm)
    found = tx.update(jnp.zeros(shape), tx.init(None))[0]
    assert found.shape == shape
    np.testing.assert_array_equal(found, np.zeros(shape))


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_with_a_norm_one_nonfinite_coordinate_makes_its_leaf_nan(norm, bad):
    tx = signax.scale_by_stochastic_sign(jax.random.key(6), norm=norm)
    gradient = {"bad": jnp.array([1.0, bad, -2.0]), "good": jnp.array([1.0, -1.0])}
    found = tx.update(gradient, tx.init(None))[0]
    assert np.isnan(found["bad"]).all()
    assert np.isfinite(found["good"]).all()


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_with_a_bound_a_nonfinite_coordinate_becomes_nan_alone(bad):
    tx = signax.scale_by_stochastic_sign(jax.random.key(7), norm=1.0)
    found = tx.update(jnp.array([2.0, bad, -2.0]), tx.init(None))[0]
    np.testing.assert_array_equal(found, [1.0, np.nan, -1.0])


def over_workers(tx, gradient, num_workers):
    """One update on every worker of an axis, from one shared state: signs and keys by worker."""
    gradients = jnp.broadcast_to(gradient, (num_workers, *gradient.shape))
    mapped = jax.vmap(lambda g: tx.update(g, tx.init(g)), axis_name="workers")
    signs, state = jax.jit(mapped)(gradients)
    return np.asarray(signs), jax.random.key_data(state.key)


def test_workers_of_an_axis_draw_independently_from_a_shared_state():
    tx = signax.scale_by_stochastic_sign(jax.random.key(8), norm=1.0, axis_name="workers")
    signs, keys = over_workers(tx, jnp.full(10_000, 0.0).at[0].set(1.0), 4)
    # Fair coins: the correlation of two workers over 10,000 has a standard deviation of .01.
    correlations = np.corrcoef(signs[:, 1:])[np.triu_indices(4, k=1)]
    assert np.abs(correlations).max() < 0.05
    assert (signs[:, 0] == 1).all()
    assert (keys == keys[0]).all()


def test_workers_without_an_axis_draw_alike():
    tx = signax.scale_by_stochastic_sign(jax.random.key(8), norm="linf")
    signs, _ = over_workers(tx, jnp.asarray(normal(200), jnp.float32), 3)
    assert (signs == signs[0]).all()
    assert set(np.unique(signs)) == {-1.0, 1.0}


def test_raw_and_typed_keys_draw_the_same():
    gradient = jnp.asarray(normal(100), jnp.float32)
    typed, raw = (
        compress(signax.scale_by_stochastic_sign(key), gradient)
        for key in (jax.random.key(9), jax.random.PRNGKey(9))
    )
    np.testing.assert_array_equal(typed, raw)


# --- top-k -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("fraction", "k"), [(0.01, 1), (0.5, 11), (0.51, 11), (0.9, 19), (1, 21)])
def test_top_k_equals_its_reference(dtype, fraction, k):
    with jax.enable_x64(dtype == "float64"):
        leaf = jnp.asarray(normal((3, 7)), dtype)
        found = signax.scale_by_top_k(fraction).update(leaf, ())[0]
    assert found.dtype == dtype
    expected = references.top_k(np.asarray(leaf, np.float64), k)
    np.testing.assert_array_equal(np.asarray(found, np.float64), expected)


def test_top_k_keeps_exactly_k_of_equals():
    leaf = jnp.array([2.0, -1.0, 1.0, -1.0, 1.0, 1.0])
    found = signax.scale_by_top_k(0.5).update(leaf, ())[0]
    assert found.tolist() == [2.0, -1.0, 1.0, 0.0, 0.0, 0.0]


# Products of decimal fractions with a size lie a little above or below the integer.
COUNTS = [
    (0.07, 100, 7),
    (0.29, 100, 29),
    (0.57, 100, 57),
    (0.701, 10, 8),
    (1e-9, 10, 1),
    (1.0, 1_500_000, 1_500_000),
]


@pytest.mark.parametrize(("fraction", "size", "k"), COUNTS)
def test_top_k_rounds_its_count_up(fraction, size, k):
    found = compress(signax.scale_by_top_k(fraction), jnp.ones(size))
    assert int(jnp.sum(found)) == k


@settings(deadline=None, max_examples=10, derandomize=True)
@given(size=st.integers(1, 12), k=st.integers(1, 12), nudge=st.sampled_from([-1e-3, 0, 1e-3]))
def test_top_k_keeps_the_least_count_that_reaches_the_fraction(size, k, nudge):
    fraction = min(1.0, min(k, size) / size + nudge)
    kept = int(jnp.sum(compress(signax.scale_by_top_k(fraction), jnp.ones(size))))
    assert kept == math.ceil(round(fraction * size, 9))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0)])
@pytest.mark.parametrize(
    "tx", [signax.scale_by_top_k(0.1), signax.scale_by_random_k(0.1, jax.random.key(0))]
)
def test_sparsifiers_pass_scalars_and_empty_leaves(tx, shape):
    leaf = jnp.full(shape, -3.0)
    found = tx.update(leaf, tx.init(leaf))[0]
    assert found.shape == shape
    np.testing.assert_array_equal(found, leaf)


def test_top_k_keeps_nan():
    found = signax.scale_by_top_k(0.3).update(jnp.array([9.0, jnp.nan, 8.0]), ())[0]
    np.testing.assert_array_equal(found, [0.0, np.nan, 0.0])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.9])
def test_top_k_contracts_by_its_fraction(fraction, seed):
    p = jnp.asarray(normal(50, seed), jnp.float32)
    lost = jnp.sum((signax.scale_by_top_k(fraction).update(p, ())[0] - p) ** 2)
    assert lost <= (1 - fraction) * jnp.sum(p**2) * (1 + 1e-6)


# --- random-k --------------------------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "size", "k"), COUNTS[-3:-1])
def test_random_k_rounds_its_count_up(fraction, size, k):
    tx = signax.scale_by_random_k(fraction, jax.random.key(0))
    found = draw(tx, jnp.ones(size), 3)
    assert jnp.sum(found, axis=1).tolist() == [k, k, k]


def test_random_k_keeps_values_unchanged():
    leaf = jnp.asarray(normal((4, 5)), jnp.float32)
    found = compress(signax.scale_by_random_k(0.5, jax.random.key(1)), leaf)
    assert ((found == leaf) | (found == 0)).all()
    assert jnp.count_nonzero(found) == 10


def test_random_k_draws_other_coordinates_for_each_step_and_leaf():
    tx = signax.scale_by_random_k(0.5, jax.random.key(2))
    tree = [jnp.ones(100), jnp.ones(100)]

    def step(state, _):
        updates, state = tx.update(tree, state)
        return state, updates

    first, second = lax.scan(step, tx.init(tree), length=2)[1]
    draws = [*np.asarray(first), *np.asarray(second)]
    # Two draws of 50 of 100 have 25 in common, with a standard deviation of 2.5.
    common = [float(draws[i] @ draws[j]) for i in range(4) for j in range(i)]
    assert max(common) < 40
    assert min(common) > 10


def test_random_k_keeps_every_coordinate_equally_often():
    kept = draw(signax.scale_by_random_k(0.3, jax.random.key(3)), jnp.ones(10), 4_000)
    deviation = math.sqrt(0.3 * 0.7 / 4_000)
    assert np.abs(np.asarray(kept).mean(axis=0) - 0.3).max() < 5 * deviation


def test_random_k_contracts_by_its_fraction_on_average():
    p = jnp.asarray(normal(10) ** 3, jnp.float32)
    lost = np.sum((draw(signax.scale_by_random_k(0.3, jax.random.key(4)), p, 4_000) - p) ** 2, 1)
    expected = 0.7 * float(jnp.sum(p**2))
    assert abs(lost.mean() - expected) < 5 * lost.std() / math.sqrt(4_000)


def test_workers_with_one_key_keep_the_same_coordinates():
    tx = signax.scale_by_random_k(0.2, jax.random.key(5))
    gradients = jnp.asarray(1 + np.abs(normal((3, 50))), jnp.float32)
    kept = jax.jit(jax.vmap(lambda g: tx.update(g, tx.init(g))[0]))(gradients) != 0
    assert (kept == kept[0]).all()


# --- arguments -------------------------------------------------------------------------------

KEY = jax.random.key(0)


@pytest.mark.parametrize("block", ["layer", "", 0, -3, 2.5, True, None])
def test_rejects_an_unknown_block(block):
    with pytest.raises(ValueError, match=rf"block={block!r} is unknown.*'leaf', 'tree', 'row'"):
        signax.scale_by_scaled_sign(block=block)


@pytest.mark.parametrize("size", [np.int64(3), np.int32(3)])
def test_accepts_a_numpy_integer_as_block_size(size):
    found = signax.scale_by_scaled_sign(block=size).update(jnp.arange(1.0, 6.0), ())[0]
    np.testing.assert_allclose(found, [2, 2, 2, 4.5, 4.5])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    "make",
    [signax.scale_by_top_k, lambda fraction: signax.scale_by_random_k(fraction, KEY)],
    ids=["top-k", "random-k"],
)
def test_a_fraction_in_an_array_keeps_the_same_count_compiled_and_eagerly(make, dtype):
    for fraction in (0.1, 0.35, 1):
        tx = optax.inject_hyperparams(make)(fraction=jnp.asarray(fraction, dtype))
        for size in (10, 30, 100_000):
            leaf = jnp.arange(1.0, size + 1)
            eagerly, compiled = (
                int(jnp.sum(update(leaf, tx.init(leaf))[0] != 0))
                for update in (tx.update, jax.jit(tx.update))
            )
            assert eagerly == compiled, (fraction, size)
            # A fraction is off by half a unit in its last place, which must not round the count up.
            exact = dtype == "float32" or fraction == 1
            lost = 0 if exact else 3 * float(jnp.finfo(dtype).eps) * size
            most = math.ceil(round(fraction * size, 6))
            assert most - lost <= compiled <= most, (fraction, size)


@pytest.mark.parametrize("one", [1, True, np.int32(1), jnp.int32(1), jnp.bool_(True)], ids=repr)
def test_accepts_a_whole_number_or_a_flag_as_fraction(one):
    assert int(jnp.sum(compress(signax.scale_by_top_k(one), jnp.ones(10)))) == 10


@pytest.mark.parametrize(
    "fraction", [np.float32(0.1), np.float16(0.1), np.array(0.1, np.float32)], ids=repr
)
def test_a_numpy_fraction_counts_as_its_printed_decimal(fraction):
    assert int(jnp.sum(compress(signax.scale_by_top_k(fraction), jnp.ones(10)))) == 1


@pytest.mark.parametrize("fraction", [0, 0.0, -0.1, 1.5, math.nan, math.inf])
@pytest.mark.parametrize(
    "make",
    [signax.scale_by_top_k, lambda fraction: signax.scale_by_random_k(fraction, KEY)],
    ids=["top_k", "random_k"],
)
def test_rejects_a_fraction_outside_the_interval(make, fraction):
    with pytest.raises(ValueError, match=rf"fraction={fraction!r} is outside \(0, 1\]"):
        make(fraction)


@pytest.mark.parametrize("fraction", ["half", None])
def test_rejects_a_fraction_that_is_not_a_number(fraction):
    with pytest.raises(TypeError, match=f"fraction={fraction!r} is not a number"):
        signax.scale_by_top_k(fraction)


@pytest.mark.parametrize("norm", ["l1", "L2", 0.0, -1.0, math.inf, math.nan])
def test_rejects_an_unknown_norm(norm):
    with pytest.raises(ValueError, match=f"norm={norm!r} is"):
        signax.scale_by_stochastic_sign(KEY, norm=norm)


@pytest.mark.parametrize("key", [0, 1.5, None, "seed", jnp.zeros(2), jax.random.split(KEY, 2)])
@pytest.mark.parametrize(
    "make",
    [signax.scale_by_stochastic_sign, lambda key: signax.scale_by_random_k(0.5, key)],
    ids=["stochastic_sign", "random_k"],
)
def test_rejects_an_invalid_key(make, key):
    with pytest.raises(TypeError, match=r"key=[\s\S]*is not a random key"):
        make(key)


def test_rejects_an_unbound_axis():
    tx = signax.scale_by_stochastic_sign(KEY, axis_name="pods")
    with pytest.raises(NameError, match=r"axis_name='pods' is not bound"):
        tx.update(jnp.ones(2), tx.init(None))


@pytest.mark.parametrize("axis_name", [(), ["data"]])
def test_rejects_an_invalid_axis_name(axis_name):
    with pytest.raises(TypeError, match="must name one mapped axis"):
        signax.scale_by_stochastic_sign(KEY, axis_name=axis_name)


def test_compressors_can_be_chained():
    tx = optax.chain(signax.scale_by_top_k(0.5), signax.scale_by_scaled_sign())
    found = compress(tx, jnp.array([1.0, -5.0, 3.0, 0.5]))
    assert found.tolist() == [0.0, -2.0, 2.0, 0.0]


def test_a_gradient_far_beyond_the_bound_has_a_certain_sign():
    tx = signax.scale_by_stochastic_sign(jax.random.key(0), norm=1e-10)
    found, _ = tx.update(jnp.array([1e30, -1e30]), tx.init(None))
    np.testing.assert_array_equal(found, [1.0, -1.0])
