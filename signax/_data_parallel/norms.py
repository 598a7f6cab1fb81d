"""Norms of gradients: each worker's own, and an estimate of the mean gradient's.

The mean gradient would travel in full precision. For its norm, each worker sends a count sketch of
its gradient, k = BUCKETS numbers. The sketch is linear, so that the mean of sketches is the sketch
of the mean:

    (S g)_b = sum of sign(j) g_j over all coordinates j with bucket(j) = b

Products of two coordinates in one bucket have random signs. They vanish from the expectation of
||S g||^2, which is ||g||^2, and make its variance

    2 sum_{i != j} P(bucket(i) = bucket(j)) g_i^2 g_j^2

Coordinates fall into WIDTH columns first, by their index modulo WIDTH, and columns fall into
buckets. Two columns share a bucket with a probability of at most 1 / k. The standard deviation of
||S g||^2 is therefore at most sqrt(2 / k + 2 c) ||g||^2, where c is the share of products of two
coordinates of one column in ||g||^4. If columns hold equal energy, c is 1 / WIDTH, and the standard
deviation is 2.3% (1.1% of the norm). WIDTH is prime, so rows, columns and heads of matrices do not
repeat with this period. A hash of each coordinate's bucket would not need this assumption, but a
scatter of the whole gradient.

Charikar, Chen and Farach-Colton, Finding Frequent Items in Data Streams, 2002, have the sketch;
Alon, Matias and Szegedy, The Space Complexity of Approximating the Frequency Moments, 1996, the
estimate.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from signax._core.leaves import (
    axis_names,
    check_floating,
    narrow,
    sharding_groups,
    spec_axes,
    wide_dtype,
)
from signax._data_parallel.placement import Workers
from signax._transforms.spikes import tree_norm

BUCKETS = 4096
WIDTH = 65_521  # the largest prime below 16 * BUCKETS
SMALL = 16_384  # leaves of fewer coordinates are sketched together


class GradNorm(NamedTuple):
    """Norms of a step's gradients, from `DataParallel.grad_norm`.

    Attributes:
      workers: f32[M], the l2 norm of each worker's gradient; NaN where a coordinate is not finite.
      mean: f32[], an estimate of the l2 norm of the mean of the finite gradients, the same on every
        worker; NaN if no gradient is finite.
    """

    workers: jax.typing.ArrayLike
    mean: jax.typing.ArrayLike


@jax.named_scope("signax.grad_norm")
def grad_norm(workers: Workers, rows: Any, seed: int = 0) -> GradNorm:
    """The norms of rows of gradients, [M, ...] each. The seed chooses the sketch.

    Raises:
      ValueError: a leaf does not have one row per worker.
      TypeError: a leaf is not floating-point.
    """
    check_floating(rows, "rows")
    workers.check_rows(rows, None)
    tree = workers.specs(workers.params_like(rows))
    leaves = jax.tree.leaves(workers.reshard(rows, per_worker=True))
    specs = [PartitionSpec() for _ in leaves] if tree is None else jax.tree.leaves(tree)
    split = PartitionSpec(workers.axis_name)

    def own_norm(leaves: list[jax.Array]):
        return workers.row(narrow(tree_norm(leaves), jnp.float32))

    def mean_norm(blocks: list[jax.Array], norm: jax.Array):
        finite = jnp.isfinite(norm)
        sketch = _sketch_blocks([block.squeeze(0) for block in blocks], specs, seed)
        sent = jnp.append(jnp.where(finite, sketch, 0), finite.astype(jnp.float32))
        total = lax.psum(sent, workers.axis_name)  # f32[BUCKETS + 1]
        number = total[BUCKETS]
        norm = tree_norm(total[:BUCKETS]) / number
        # Only a sum beyond the range of f32 is not finite here.
        norm = jnp.where(jnp.isnan(norm), jnp.inf, norm)
        return jnp.where(number > 0, norm, jnp.nan)

    # The first map sees whole leaves, the second the blocks of leaves that are sharded.
    norms = workers.shard_map(own_norm, (split,), split)(leaves)
    in_specs = [PartitionSpec(workers.axis_name, *spec) for spec in specs], split
    axes = {*axis_names(workers.axis_name), *[axis for spec in specs for axis in spec_axes(spec)]}
    mapped = jax.shard_map(
        mean_norm, mesh=workers.mesh, in_specs=in_specs, out_specs=PartitionSpec(), axis_names=axes
    )
    return GradNorm(norms, mapped(leaves, norms))


def _sketch_blocks(
    blocks: Sequence[jax.Array], specs: Sequence[PartitionSpec], seed: int
) -> jax.Array:
    """The sketch of one worker's leaves, from a device's blocks of them: f32[BUCKETS]."""
    sketch = jnp.zeros(BUCKETS, jnp.float32)
    for number, group in enumerate(sharding_groups(blocks, specs)):
        draws = np.random.default_rng((seed, number))
        device = lax.axis_index(group.axes) if group.axes else 0
        part = _sketch([blocks[n] for n in group.positions], draws, device)
        sketch += lax.psum(part, group.axes) if group.axes else part
    return sketch


def _sketch(blocks: Sequence[jax.Array], draws: np.random.Generator, device: Any) -> jax.Array:
    """The sketch of blocks: f32[BUCKETS]. Devices sketch their blocks with signs of their own."""
    flat = [block.reshape(-1).astype(wide_dtype(block.dtype)) for block in blocks]
    large = [values for values in flat if values.size >= SMALL]
    small = [narrow(values, jnp.float32) for values in flat if values.size < SMALL]
    columns = jnp.zeros(WIDTH, jnp.float32)
    for values in large + ([jnp.concatenate(small)] if small else []):
        first, second, third = draws.integers(2**32, size=3, dtype=np.uint32)
        shift = _mix(jnp.uint32(device) + third)
        signed = _random_signs(values, _mix(shift + first) | 1, _mix(shift + second))
        own = narrow(_sum_rows(signed), jnp.float32)
        columns += jnp.roll(own, (shift % WIDTH).astype(jnp.int32))
    return _fold(columns, draws)


def _random_signs(values: jax.Array, multiplier: jax.Array, offset: jax.Array) -> jax.Array:
    """Values f[n] with a pseudo-random sign for each index."""
    index = lax.iota(jnp.uint32, values.size)
    return jnp.where(_mix(index * multiplier + offset) >> 31 == 0, values, -values)


def _sum_rows(values: jax.Array) -> jax.Array:
    """Sums over coordinates whose index is equal modulo WIDTH: f[n] to f[WIDTH]."""
    size, rest = values.size - values.size % WIDTH, values.size % WIDTH
    whole = jnp.sum(values[:size].reshape(-1, WIDTH), axis=0)
    return whole + jnp.pad(values[size:], (0, WIDTH - rest))


def _mix(bits: jax.Array) -> jax.Array:
    """A hash of 32 bits to 32 bits, in which each bit depends on all (Wellons' lowbias32)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)


def _fold(columns: jax.Array, draws: np.random.Generator) -> jax.Array:
    """Sums of columns, f32[WIDTH] to f32[BUCKETS].

    Halves are added, one of them rotated by a random number of buckets, until one row is left. The
    rotations of two rows differ by a sum of such numbers, so that any two columns of different rows
    meet with probability 1 / BUCKETS. Columns of one row never do.
    """
    rows = jnp.pad(columns, (0, -WIDTH % BUCKETS)).reshape(-1, BUCKETS)
    while len(rows) > 1:
        half = len(rows) // 2
        rows = rows[:half] + jnp.roll(rows[half:], int(draws.integers(BUCKETS)), axis=1)
    return rows[0]
