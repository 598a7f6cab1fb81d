"""Quantised means against their reference, and the compressor's properties."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from workers import AXIS, auto_mesh, rows_of_workers

import signax
from signax import diagnostics
from signax._wire.quantized import SCALES, Quantized

SHAPES = {"matrix": (13, 7), "number": (), "none": (0, 3), "large": (2040, 9)}


def random_values(num_steps, num_workers, seed=0):
    """Rows of values for each step; half of the coordinates of each leaf are often zero."""
    rng = np.random.default_rng(seed)

    def leaf(shape):
        values = rng.standard_normal((num_steps, num_workers, int(np.prod(shape))))
        values[..., ::2] *= rng.choice([0.0, 1.0], size=values[..., ::2].shape)
        return values.reshape(num_steps, num_workers, *shape)

    return {name: leaf(shape) for name, shape in SHAPES.items()}


@pytest.mark.parametrize(
    ("bits", "feedback", "block", "kind", "num_workers"),
    [(2, "both", None, "shard_map", 3), (4, "both", 9, "vmap", 4), (4, "worker", None, "pmap", 2)],
)
def test_follows_the_reference(bits, feedback, block, kind, num_workers):
    num_steps = 12
    values = random_values(num_steps, num_workers)
    active = np.random.default_rng(1).random((num_steps, num_workers)) > 0.2
    values["matrix"][4, -1, 3, 2] = np.nan

    def one_step(tree, memory, step, flag):
        options = {} if block is None else {"block": block}
        return signax.pmean_quantized(
            tree, AXIS, memory, step=step, bits=bits, decay=0.75, active=flag, **options
        )

    with jax.enable_x64(True):
        mapped = rows_of_workers(kind, one_step, num_workers)
        example = jax.tree.map(lambda leaf: leaf[0, 0], values)
        memory = signax.scaled_signs_memory(example, num_workers, feedback=feedback)
        memory = jax.tree.map(lambda leaf: jnp.stack([leaf] * num_workers), memory)
        expected = references.mean_of_scaled_signs(
            [[leaf[t] for leaf in values.values()] for t in range(num_steps)],
            feedback=feedback,
            block=block,
            decay=0.75,
            active=active,
            bits=bits,
        )
        for t in range(num_steps):
            rows = jax.tree.map(lambda leaf, t=t: jnp.asarray(leaf[t]), values)
            flags = jnp.asarray(active[t])
            updates, memory = mapped(rows, memory, jnp.full(num_workers, t), flags)
            for name, (mean, errors, _) in zip(SHAPES, expected[t], strict=True):
                close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11)
                flat = np.reshape(updates[name], (num_workers, -1))
                close(flat, np.broadcast_to(mean, flat.shape), err_msg=f"step {t} {name}")
                kept = np.reshape(memory.worker[name], (num_workers, -1))
                close(kept, errors, err_msg=f"memory at step {t} {name}")


@pytest.mark.parametrize("bits", [2, 4])
def test_an_error_is_bounded_as_the_docstring_says(bits):
    """Whatever the values, compression leaves out less than them, so feedback converges."""
    rng = np.random.default_rng(bits)
    codec = Quantized(1, None, False, 1.0, bits=bits)
    for values in (
        rng.standard_normal(1000),
        rng.standard_cauchy(1000),
        np.eye(1, 1000)[0],
        np.ones(1000),
    ):
        values = jnp.asarray(values, jnp.float32)
        mean = jnp.mean(jnp.abs(values))
        scale = codec.scale(mean, jnp.float32)
        level = codec.magnitude(codec.digits(values, scale), scale)
        error = jnp.sum((jnp.abs(values) - level) ** 2)
        energy = jnp.sum(values**2)
        assert error <= (energy - values.size * scale * (2 * mean - scale)) * (1 + 1e-5)


@pytest.mark.parametrize(("bits", "distortion"), [(2, 0.1188), (4, 0.01154)])
def test_of_gaussian_values_the_published_share_is_left_out(bits, distortion):
    values = jnp.asarray(np.random.default_rng(0).standard_normal(200_000), jnp.float32)
    memory = signax.scaled_signs_memory(values, 1, feedback="worker")
    mean = partial(signax.pmean_quantized, axis_name=AXIS, memory=memory, step=0, bits=bits)
    _, memory = rows_of_workers("vmap", mean, 1)(values[None])
    share = np.sum(np.square(memory.worker)) / np.sum(np.square(values))
    assert share == pytest.approx(distortion, rel=0.03)


@pytest.mark.parametrize("bits", [2, 4])
def test_sends_its_bits_each_way(bits):
    num_workers, size = 4, 1 << 18
    tx = signax.DataParallel(
        signax.mean_quantized("data", bits=bits), auto_mesh({"data": num_workers})
    )
    params = jnp.zeros(size)
    state = tx.init(params)
    update = jax.jit(tx.update).lower(jnp.zeros((num_workers, size)), state).compile()
    expected = 2 * (num_workers - 1) / num_workers * size * bits / 8
    assert diagnostics.collective_bytes(update) == pytest.approx(
        expected, rel=0.04
    )  # parts are padded


@pytest.mark.parametrize(
    ("bits", "error", "message"),
    [
        (1, ValueError, "bits=1 is not built: use 2 or 4"),
        (3, ValueError, "bits=3 is not built: use 2 or 4"),
        ("2", TypeError, "bits='2' must be a whole number"),
        (None, TypeError, "bits=None must be a whole number"),
        (np.float32(2), TypeError, "bits=.* must be a whole number"),
        (jnp.array(2), TypeError, "list 'bits' in the static_args of optax.inject_hyperparams"),
    ],
)
def test_rejects_other_numbers_of_bits(bits, error, message):
    with pytest.raises(error, match=message):
        signax.mean_quantized("data", bits=bits)
    memory = signax.scaled_signs_memory(jnp.zeros(3), 1)
    with pytest.raises(error, match=message):
        signax.pmean_quantized(jnp.zeros(3), "data", memory, step=0, bits=bits)


def test_scales_lie_between_zero_and_twice_the_mean_magnitude():
    assert all(0 < scale < 2 for scale in SCALES.values())


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
@pytest.mark.parametrize("bits", [2, 4])
def test_stays_finite_at_the_end_of_the_range(bits, dtype):
    """Each level is finite, and an infinity still excludes its worker."""
    most = jnp.finfo(dtype).max
    values = jnp.stack([jnp.full(40, -most), jnp.full(40, -most), jnp.full(40, jnp.inf)])
    memory = signax.scaled_signs_memory(values[0].astype(dtype), 3)
    mean = partial(signax.pmean_quantized, axis_name=AXIS, memory=memory, step=0, bits=bits)
    updates, memory = rows_of_workers("vmap", mean, 3)(values.astype(dtype))
    np.testing.assert_allclose(updates, np.full((3, 40), -float(most)), rtol=0.4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(memory))
