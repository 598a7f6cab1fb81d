"""Densities against closed forms, and bytes and seconds against longhand counts."""

import contextlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from signax import diagnostics

with contextlib.suppress(RuntimeError):  # conftest may have initialised the backend already
    jax.config.update("jax_num_cpu_devices", 8)

# --- density ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("nonzero", "size"), [(1, 1), (1, 7), (3, 8), (300, 1000), (64, 64)])
def test_density_of_equal_magnitudes_is_their_share(dtype, nonzero, size):
    with jax.enable_x64(True):
        signs = jnp.where(jnp.arange(size) % 2 == 0, 2.5, -2.5)
        leaf = jnp.where(jnp.arange(size) < nonzero, signs, 0.0).astype(dtype)
        found = diagnostics.density(leaf)
    assert found.shape == ()
    assert found.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
    np.testing.assert_allclose(found, nonzero / size, rtol=1e-6)


def test_density_of_a_ramp():
    # Magnitudes 1..d: (d (d+1) / 2)^2 / (d d (d+1) (2d+1) / 6) = 3 (d+1) / (2 (2d+1)).
    leaf = jnp.arange(1.0, 101.0).reshape(4, 25)
    np.testing.assert_allclose(diagnostics.density(leaf), 3 * 101 / (2 * 201), rtol=1e-6)


def test_density_of_gaussian_noise():
    # The estimate's standard deviation is about .6 / sqrt(d) = .0015; the bound is six of them.
    leaf = jax.random.normal(jax.random.key(0), (400, 400))
    assert abs(float(diagnostics.density(leaf)) - 2 / math.pi) < 0.009


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("peak", [1.2e-38, 1e-30, 1.0, 1e20, 3.4e38])
def test_density_does_not_depend_on_scale(peak, jit):
    density = jax.jit(diagnostics.density) if jit else diagnostics.density
    leaf = jnp.asarray(np.array([1.0, -1.0, 1.0, 1.0]) * peak, jnp.float32)
    np.testing.assert_allclose(density(leaf), 1.0, rtol=1e-6)
    mixed = jnp.asarray(np.array([1.0, 0.0, 0.0, 0.0, 0.0]) * peak, jnp.float32)
    np.testing.assert_allclose(density(mixed), 0.2, rtol=1e-6)


@pytest.mark.parametrize("exponent", [-100, -20, 20, 100])
def test_density_is_exactly_invariant_under_powers_of_two(exponent):
    leaf = jax.random.normal(jax.random.key(1), (1000,))
    expected = diagnostics.density(leaf)
    np.testing.assert_allclose(diagnostics.density(leaf * 2.0**exponent), expected, rtol=1e-6)


@pytest.mark.parametrize("peak", [3e-308, 1e-200, 1e200, 1.7e308])
def test_density_of_extreme_doubles(peak):
    with jax.enable_x64(True):
        leaf = jnp.asarray(np.array([peak, -peak, 0.0, 0.0]))
        assert leaf.dtype == jnp.float64
        np.testing.assert_allclose(jax.jit(diagnostics.density)(leaf), 0.5, rtol=1e-14)


def test_density_of_nothing_is_one():
    tree = {"zeros": jnp.zeros((3, 2)), "empty": jnp.zeros((0, 4)), "scalar": jnp.float32(-3)}
    assert jax.tree.map(float, diagnostics.density(tree)) == dict.fromkeys(tree, 1.0)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_density_of_nonfinite_values_is_nan(bad):
    found = diagnostics.density({"bad": jnp.array([1.0, bad, 0.0]), "good": jnp.ones(3)})
    assert math.isnan(found["bad"])
    assert found["good"] == 1.0


def test_density_keeps_structure_under_jit():
    tree = {"a": (jnp.ones(3), None), "b": [jnp.array([[2.0, 0.0]])]}
    eager, jitted = diagnostics.density(tree), jax.jit(diagnostics.density)(tree)
    assert jax.tree.structure(eager) == jax.tree.structure(jitted) == jax.tree.structure(tree)
    assert jax.tree.leaves(eager) == jax.tree.leaves(jitted) == [1.0, 0.5]


@pytest.mark.parametrize("seed", range(5))
def test_density_stays_between_its_bounds(seed):
    # Nearly equal and nearly one-hot leaves, where rounding could step over the bounds.
    noise = jax.random.uniform(jax.random.key(seed), (2, 33), minval=0.9999999, maxval=1.0)
    flat, spike = noise[0], noise[1].at[1:].multiply(1e-9)
    assert 1 / 33 <= diagnostics.density(spike) < 1 / 33 + 1e-6
    assert 1 - 1e-6 < diagnostics.density(flat) <= 1


@pytest.mark.parametrize("dtype", ["int32", "complex64", "bool"])
def test_rejects_leaves_that_are_not_floating(dtype):
    tree = {"w": jnp.ones(3), "b": jnp.ones(3, dtype)}
    with pytest.raises(TypeError, match=rf"tree\['b'\] has dtype {dtype}"):
        diagnostics.density(tree)
    with pytest.raises(TypeError, match=rf"tree\['b'\] has dtype {dtype}"):
        diagnostics.wire_bytes(tree, 8)


# --- wire_bytes ------------------------------------------------------------------------------


def _shapes(*sizes, dtype="float32"):
    return [jax.ShapeDtypeStruct((size,), dtype) for size in sizes]


def _longhand_vote_bytes(sizes, num_workers, planes):
    small = sum(
        size + size % 2 for size in sizes if size < 2**14
    )  # small leaves are packed together
    large = [size for size in sizes if size >= 2**14]
    words = sum(len(range(0, size, 32)) for size in [small, *large])
    if words == 0 or num_workers == 1:
        return 0
    per_plane = next(q for q in range(words + 1) if q * num_workers >= words)
    if (num_workers - 1) * planes * words * (num_workers - 2) // num_workers <= 2**13:
        part = next(p for p in range(128, 10**9, 128) if p >= 1 + planes * words)
        return 4 * part * (num_workers - 1)  # the whole message goes to each other worker
    if per_plane >= 2**14:
        per_plane = next(q for q in range(0, 10**9, 128) if q >= per_plane)
    part = next(p for p in range(128, 10**9, 128) if p >= 1 + planes * per_plane)
    sent = 0
    for _ in range(num_workers - 1):  # one part to, and one result to, each other worker
        sent += 4 * part + 4 * part
    return sent


@pytest.mark.parametrize(("scheme", "planes"), [("vote", 1), ("abstain", 2)])
@pytest.mark.parametrize("num_workers", range(1, 10))
@pytest.mark.parametrize(
    "sizes",
    [
        (),
        (0,),
        (1,),
        (1, 1, 0, 33),
        (32 * 127 * 8,),
        (32 * 127 * 8 + 1,),
        (32 * 127 * 4,),
        (32 * 64 * 6, 1),
        (100_000, 31, 10),
        (5_000_000, 31, 10),
    ],
)
def test_vote_bytes_equal_a_longhand_count(sizes, num_workers, scheme, planes):
    found = diagnostics.wire_bytes(_shapes(*sizes), num_workers, scheme=scheme)
    assert found == _longhand_vote_bytes(sizes, num_workers, planes)


def test_mean_bytes_depend_on_each_leafs_dtype():
    tree = [*_shapes(1000), *_shapes(10, dtype="bfloat16"), *_shapes(0), None]
    assert diagnostics.wire_bytes(tree, 8, scheme="mean") == 2 * 7 * 4020 // 8
    assert diagnostics.wire_bytes(tree, 1, scheme="mean") == 0
    # 2 (2/3) 4 = 5.33 bytes are not a whole number.
    assert diagnostics.wire_bytes(_shapes(1), 3, scheme="mean") == 6


@pytest.mark.parametrize("scheme", ["vote", "abstain", "mean"])
def test_wire_bytes_accepts_arrays_and_shapes(scheme):
    tree = {"w": jnp.ones((33, 5)), "b": jnp.float32(1), "h": jnp.ones(7, jnp.bfloat16)}
    shapes = jax.eval_shape(lambda arrays: arrays, tree)
    sent = diagnostics.wire_bytes(tree, 4, scheme=scheme)
    assert sent == diagnostics.wire_bytes(shapes, 4, scheme=scheme) > 0


@pytest.mark.parametrize("scheme", ["vote", "mean_signs", "scaled_signs", "mean"])
def test_the_number_of_workers_may_be_a_numpy_number(scheme):
    tree = _shapes(3_000_000_000)  # twelve gigabytes, beyond an int32
    found = diagnostics.wire_bytes(tree, np.int32(8), scheme=scheme)
    assert found == diagnostics.wire_bytes(tree, 8, scheme=scheme)
    seconds = diagnostics.exchange_seconds(tree, np.int32(8), link_rate=1e9, scheme=scheme)
    assert seconds >= 8 * found / 1e9


def test_a_vote_sends_31_times_fewer_bytes_than_a_mean():
    tree = _shapes(9_900_000, 99_000, 999, 1)
    size = 10_000_000
    assert diagnostics.wire_bytes(tree, 8) <= 1.02 * 2 * 7 / 8 * size / 8
    assert 31 * diagnostics.wire_bytes(tree, 8) <= diagnostics.wire_bytes(tree, 8, scheme="mean")


def test_wire_bytes_rejects_invalid_arguments():
    with pytest.raises(ValueError, match="scheme='sum'"):
        diagnostics.wire_bytes(_shapes(3), 8, scheme="sum")
    for num_workers in (0, -2):
        with pytest.raises(ValueError, match=f"num_workers={num_workers} must be"):
            diagnostics.wire_bytes(_shapes(3), num_workers)


# --- exchange_seconds ------------------------------------------------------------------------


def test_exchange_seconds_add_up_links_latency_and_memory():
    tree, machine = _shapes(10_000_000), {"latency": 1e-3, "memory_bandwidth": 1e10}
    vote = diagnostics.exchange_seconds(tree, 8, link_rate=1e9, **machine)
    assert vote == pytest.approx(8 * 2_200_576 / 1e9 + 2 * 1e-3 + 4e7 / 1e10)
    abstain = diagnostics.exchange_seconds(tree, 8, scheme="abstain", link_rate=1e9, **machine)
    two_bits = diagnostics.wire_bytes(tree, 8, scheme="abstain")
    assert abstain == pytest.approx(8 * two_bits / 1e9 + 2 * 1e-3 + 4e7 / 1e10)
    mean = diagnostics.exchange_seconds(tree, 8, scheme="mean", link_rate=1e9, **machine)
    assert mean == pytest.approx(8 * 70e6 / 1e9 + 1e-3)
    gathered = diagnostics.exchange_seconds(
        tree, 2, link_rate=1e9, **machine
    )  # a gather is one collective
    assert gathered == pytest.approx(8 * 1_250_304 / 1e9 + 1e-3 + 4e7 / 1e10, rel=1e-3)


def test_latency_and_memory_are_free_by_default():
    tree = _shapes(1_000_000, dtype="bfloat16")
    for scheme in ("vote", "mean"):
        sent = diagnostics.wire_bytes(tree, 8, scheme=scheme)
        seconds = diagnostics.exchange_seconds(tree, 8, scheme=scheme, link_rate=2.0)
        assert seconds == 4.0 * sent


@pytest.mark.parametrize(("sizes", "num_workers"), [((100,), 1), ((), 8), ((0,), 8)])
@pytest.mark.parametrize("scheme", ["vote", "abstain", "mean"])
def test_nothing_to_exchange_takes_no_time(sizes, num_workers, scheme):
    seconds = diagnostics.exchange_seconds(
        _shapes(*sizes), num_workers, scheme=scheme, link_rate=1e9, latency=1.0
    )
    assert seconds == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"link_rate": 0.0},
        {"link_rate": -1.0},
        {"link_rate": float("nan")},
        {"latency": -1e-6},
        {"memory_bandwidth": 0.0},
    ],
)
def test_exchange_seconds_rejects_an_impossible_machine(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        diagnostics.exchange_seconds(_shapes(10), 8, **{"link_rate": 1e9, **wrong})


# --- collectives of compiled programs --------------------------------------------------------


# --- HLO of other platforms, written by hand -------------------------------------------------
