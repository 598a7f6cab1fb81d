"""Parts of a leaf: runs of its coordinates, in row-major order, of which each worker serves one.

They depend on the leaf's shape and on the number of workers alone, so that what a server keeps of
its part is the same on every platform, however bits are packed there. Blocks, which share a scale,
lie within parts.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def part_shape(shape: tuple[int, ...], num_workers: int) -> tuple[int, ...]:
    """The shape of each of M equal parts, the last of which may be padded.

    It is a slab of rows, which an accelerator need not lay out anew, where these can be shared out;
    else flat. A part has an even number of coordinates: one that is odd in it is odd in the leaf.
    """
    size = math.prod(shape)
    run = 2 * -(-size // (2 * num_workers))
    if shape and shape[0] % num_workers == 0 and run * num_workers == size:
        return (shape[0] // num_workers, *shape[1:])
    return (run,)


def cut(leaf: jax.Array, num_workers: int) -> jax.Array:
    """Cuts a leaf into its parts, padded with zeros: [...] to [M, *part]."""
    part = part_shape(leaf.shape, num_workers)
    padding = num_workers * math.prod(part) - leaf.size
    if padding:
        leaf = jnp.pad(leaf.reshape(-1), (0, padding))
    return leaf.reshape(num_workers, *part)


def join(parts: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undoes `cut`."""
    size = math.prod(shape)
    return (parts if parts.size == size else parts.reshape(-1)[:size]).reshape(shape)


def is_real(shape: tuple[int, ...], num_workers: int, place: jax.Array) -> jax.Array:
    """Whether each coordinate of the part at a place is one of the leaf, and not padding."""
    part, size = part_shape(shape, num_workers), math.prod(shape)
    if num_workers * math.prod(part) == size:
        return jnp.ones(part, jnp.bool_)
    index = jnp.arange(*part, dtype=jnp.uint32)
    return index < size - jnp.minimum(size, place.astype(jnp.uint32) * part[0])


def num_blocks(part: tuple[int, ...], block: int | None) -> int:
    """The number of blocks in a part of a shape."""
    return 1 if block is None else -(-math.prod(part) // block)


def block_sizes(shape: tuple[int, ...], num_workers: int, block: int | None) -> np.ndarray:
    """How many coordinates of a leaf lie in each block of each part: i[M, blocks].

    A part is one block, or is cut into blocks of a given number of coordinates, the last of which
    may have fewer.
    """
    run = math.prod(part_shape(shape, num_workers))
    length = run if block is None else block
    starts = np.arange(0, run, length)
    lengths = np.minimum(length, run - starts)
    return np.clip(math.prod(shape) - run * np.arange(num_workers)[:, None] - starts, 0, lengths)


def block_means(parts: jax.Array, sizes: jax.Array, block: int | None) -> jax.Array:
    """The means over blocks of so many coordinates: f[n, *part], i[n, blocks] to f[n, blocks]."""
    rows = parts.reshape(len(parts), -1)
    shares = 1 / jnp.maximum(sizes, 1).astype(rows.dtype)  # a sum might overflow
    if block is None:
        return jnp.sum(rows * shares, axis=1, keepdims=True)
    block = min(block, rows.shape[1])
    rows = jnp.pad(rows, ((0, 0), (0, sizes.shape[1] * block - rows.shape[1])))
    return jnp.sum(rows.reshape(*sizes.shape, block) * shares[..., None], axis=2)


def spread(scales: jax.Array, part: tuple[int, ...], block: int | None) -> jax.Array:
    """The scale of each coordinate: f[n, blocks] to f[n, *part], or what broadcasts to that."""
    if block is None:
        return scales.reshape(len(scales), *(1 for _ in part))
    size = math.prod(part)
    return jnp.repeat(scales, min(block, size), axis=1)[:, :size].reshape(len(scales), *part)
