"""Parts of a leaf, of which each worker serves one, and the words that hold their bits.

A leaf of d coordinates is a matrix of 32 rows and W columns, in row-major order and padded with
zeros at its end. A word holds one column, bit b that of row b, and part k of M is a run of S
columns, the last of which may be padded too:

    W = 6, M = 3    | 0 1 | 2 3 | 4 5 |      row 0: coordinates 0 to 5
    S = 2           | 6 7 | 8 9 |10 11|      row 1: coordinates 6 to 11, and so on

All this depends on the leaf's shape and on M alone, so that what a server keeps of its part is the
same on every platform.
"""

import math

import jax
import jax.numpy as jnp

from signax._packing import MOST_WASTE, WORD_BITS, Fold


def matrix(shape: tuple[int, ...]) -> Fold:
    """How a leaf is cut into the 32 rows of its matrix.

    A row is a number of whole slices along the leaf's first axis where that pads little, preferably
    a multiple of 8 of them: then accelerators need not lay out anything anew. W is even: a
    coordinate is odd if its column is.
    """
    size = math.prod(shape)
    if len(shape) > 1 and size:
        unit = size // shape[0]
        for slices in (8, 1 + unit % 2):
            length = slices * -(-shape[0] // (WORD_BITS * slices))
            if WORD_BITS * length <= (1 + MOST_WASTE) * shape[0]:
                return Fold(shape, 0, length)
    return Fold((size,), 0, 2 * -(-size // (2 * WORD_BITS)))


def part_columns(shape: tuple[int, ...], num_workers: int) -> int:
    """S, the number of columns in a part of a leaf: even, that a column is odd if it is in it."""
    return 2 * -(-matrix(shape).words // (2 * num_workers))


def part_shape(shape: tuple[int, ...], num_workers: int) -> tuple[int, int]:
    """The shape of each of the M parts of a leaf."""
    return WORD_BITS, part_columns(shape, num_workers)


def cut(leaf: jax.Array, num_workers: int) -> jax.Array:
    """Cuts a leaf into its parts: [...] to [M, 32, S]."""
    columns = matrix(leaf.shape).words
    rows = jnp.pad(leaf.reshape(-1), (0, WORD_BITS * columns - leaf.size))
    return jnp.swapaxes(cut_columns(rows.reshape(WORD_BITS, columns), num_workers), 0, 1)


def join(parts: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undoes `cut`."""
    rows = join_columns(jnp.swapaxes(parts, 0, 1), matrix(shape).words)
    return rows.reshape(-1)[: math.prod(shape)].reshape(shape)


def cut_columns(columns: jax.Array, num_workers: int) -> jax.Array:
    """Cuts what there is for each column of a leaf, such as its word: [..., W] to [..., M, S]."""
    *others, length = columns.shape
    share = 2 * -(-length // (2 * num_workers))
    padding = [(0, 0) for _ in others] + [(0, num_workers * share - length)]
    return jnp.pad(columns, padding).reshape(*others, num_workers, share)


def join_columns(parts: jax.Array, length: int) -> jax.Array:
    """Undoes `cut_columns` for so many columns."""
    return parts.reshape(*parts.shape[:-2], -1)[..., :length]


def is_real(shape: tuple[int, ...], num_workers: int, place: jax.Array) -> jax.Array:
    """Whether each coordinate of the part at a place is one of the leaf, and not padding."""
    columns, (rows, share) = matrix(shape).words, part_shape(shape, num_workers)
    if num_workers * rows * share == math.prod(shape):
        return jnp.ones((rows, share), jnp.bool_)
    column = place.astype(jnp.int32) * share + jnp.arange(share)
    left = math.prod(shape) - columns * jnp.arange(rows)  # of the leaf, from a row's start
    return column[None] < jnp.minimum(left, columns)[:, None]
