"""Blocks of coordinates that share one scale, the mean of their magnitudes.

Leaves whose parts lie side by side, as the columns of one array, have a block each. Or the part of
one leaf is cut into blocks of so many coordinates, in row-major order.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from signax._packing import WORD_BITS
from signax._parts import matrix, part_columns


class Blocks(NamedTuple):
    """The blocks in parts of some leaves, [n, 32, S] with S columns of all leaves together.

    Attributes:
      shapes: of the leaves; one only if `length` is given.
      num_workers: M.
      length: how many coordinates share a scale at most; `None` for all of a leaf's part.
    """

    shapes: tuple[tuple[int, ...], ...]
    num_workers: int
    length: int | None

    @property
    def columns(self) -> list[int]:
        """How many columns each leaf has."""
        return [part_columns(shape, self.num_workers) for shape in self.shapes]

    @property
    def number(self) -> int:
        """How many blocks the parts of one worker have."""
        if self.length is None:
            return len(self.shapes)
        return -(-WORD_BITS * self.columns[0] // self.length)

    def _runs(self) -> Iterator[tuple[slice, slice, int]]:
        """Yields each run of leaves that have equally many columns.

        A run is given by its blocks, its columns, and the number of columns of one leaf. Programs
        grow with the number of runs, so leaves should come sorted.
        """
        block = column = 0
        for columns, leaves in itertools.groupby(self.columns):
            number = len(list(leaves))
            stop = column + number * columns
            yield slice(block, block + number), slice(column, stop), columns
            block, column = block + number, stop

    def sizes(self) -> np.ndarray:
        """How many coordinates of leaves lie in each block of each worker: i[M, blocks]."""
        each = zip(self.shapes, self.columns, strict=True)
        return np.concatenate([self._sizes(shape, columns) for shape, columns in each], axis=1)

    def _sizes(self, shape: tuple[int, ...], columns: int) -> np.ndarray:
        width, size = matrix(shape).words, WORD_BITS * columns
        first = columns * np.arange(self.num_workers)[:, None]
        left = np.minimum(math.prod(shape) - width * np.arange(WORD_BITS), width)
        real = np.clip(left - first, 0, columns)  # i[M, 32], and these come first in their row
        before = np.pad(np.cumsum(real, axis=1), ((0, 0), (1, 0)))
        edges = np.append(np.arange(0, size, self.length or size), size)
        row, column = np.divmod(edges, columns)
        real = np.pad(real, ((0, 0), (0, 1)))
        return np.diff(before[:, row] + np.minimum(column, real[:, row]), axis=1)

    def means(self, parts: jax.Array, sizes: jax.Array) -> jax.Array:
        """The means over blocks: f[n, 32, S] and i[n, blocks] to f[n, blocks].

        Padding must be 0.
        """
        shares = 1 / jnp.maximum(sizes, 1).astype(parts.dtype)  # a sum might overflow
        if self.length is None:
            sums = jnp.sum(parts * self.spread(shares), axis=1)
            runs = [
                jnp.sum(sums[:, run].reshape(len(sums), -1, columns), axis=2)
                for _, run, columns in self._runs()
            ]
            return jnp.concatenate(runs, axis=1)
        rows = parts.reshape(len(parts), -1)
        rows = jnp.pad(rows, ((0, 0), (0, self.number * self.length - rows.shape[1])))
        return jnp.sum(rows.reshape(*sizes.shape, self.length) * shares[..., None], axis=2)

    def spread(self, scales: jax.Array) -> jax.Array:
        """The scale of each coordinate: f[n, blocks] to what broadcasts to f[n, 32, S]."""
        if self.length is None:
            if len(self.shapes) == 1:
                return scales[:, None]
            # A gather would make TPUs change the layout of the whole message that holds the scales.
            runs = [
                jnp.repeat(scales[:, blocks], columns, axis=1)
                for blocks, _, columns in self._runs()
            ]
            # Without the barrier XLA broadcasts each run before it joins them.
            return lax.optimization_barrier(jnp.concatenate(runs, axis=1))[:, None]
        size = WORD_BITS * self.columns[0]
        scales = jnp.repeat(scales, self.length, axis=1)[:, :size]
        return scales.reshape(len(scales), WORD_BITS, -1)
