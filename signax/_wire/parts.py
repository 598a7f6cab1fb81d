"""Parts of a leaf, one for each server, and the blocks of coordinates that share a scale.

A leaf of d coordinates is a matrix of 32 rows and W columns, in row-major order and padded with
zeros at its end. A word holds one column: bit b belongs to row b. Part k of M is a run of S
columns; the last part may be padded too:

    W = 6, M = 3    | 0 1 | 2 3 | 4 5 |      row 0: coordinates 0 to 5
    S = 2           | 6 7 | 8 9 |10 11|      row 1: coordinates 6 to 11, and so on

All this depends on the leaf's shape and on M alone, so a server's memory of its part is the same on
every platform. If a leaf is sharded within a worker, each device's block is cut as a leaf.
"""

import itertools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from signax._core.leaves import entry_axes, spec_axes
from signax._wire.pieces import cut
from signax._wire.slabs import MOST_WASTE, SMALL, Fold
from signax._wire.types import Array, Bool, Float, Leaves, Num, UInt32
from signax._wire.words import WORD_BITS


def matrix(shape: tuple[int, ...]) -> Fold:
    """How a leaf is cut into the 32 rows of its matrix.

    A row is a number of whole slices along the leaf's first axis where that pads little, preferably
    a multiple of 8 slices: accelerators then need not copy the leaf into another layout. W is even,
    so a coordinate is odd exactly if its column is odd.
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
    """S, the number of columns in a part. It is even, so parts begin with even columns."""
    return 2 * -(-matrix(shape).words // (2 * num_workers))


def part_shape(shape: tuple[int, ...], num_workers: int) -> tuple[int, int]:
    """The shape of each of the M parts of a leaf."""
    return WORD_BITS, part_columns(shape, num_workers)


def device_blocks(leaf: Any, spec: PartitionSpec, sizes: Mapping[Hashable, int]) -> tuple[int, ...]:
    """The number of devices' blocks along each dimension of a leaf; () if each device has all."""
    counts = [math.prod([sizes[axis] for axis in entry_axes(entry)]) for entry in spec]
    if math.prod(counts) == 1 or not leaf.size:
        return ()
    return *counts, *[1] * (leaf.ndim - len(counts))


def server_shape(
    shape: tuple[int, ...], blocks: tuple[int, ...], num_workers: int
) -> tuple[int, ...]:
    """The shape of a server's memory of a leaf, whose first dimensions count devices' blocks."""
    return *blocks, *part_shape(_block_shape(shape, blocks), num_workers)


def server_spec(leaf: Any, spec: PartitionSpec, sizes: Mapping[Hashable, int]) -> PartitionSpec:
    """The spec of a server's memory of a leaf, over the axes over which the leaf is sharded."""
    if device_blocks(leaf, spec, sizes):
        return spec
    axes = spec_axes(spec)  # of size 1, but a map over them must find them in the memory's type
    return PartitionSpec(None, axes) if axes else PartitionSpec()


def _block_shape(shape: tuple[int, ...], blocks: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a device's block. JAX shards even divisions only."""
    return tuple([n // count for n, count in zip(shape, blocks, strict=True)]) if blocks else shape


def cut_leaf(leaf: Num[Array, "..."], num_workers: int) -> Num[Array, "M 32 S"]:
    """Cut a leaf into its parts."""
    return _cut_stack(leaf[None], num_workers)


def join_leaf(parts: Num[Array, "M 32 S"], shape: tuple[int, ...]) -> Num[Array, "..."]:
    """Invert `cut_leaf`."""
    return _join_stack(parts, shape).reshape(shape)


def _cut_stack(stack: Num[Array, "k ..."], num_workers: int) -> Num[Array, "M 32 _"]:
    """Cut k leaves of one shape into their parts, side by side."""
    size, columns = math.prod(stack.shape[1:]), matrix(stack.shape[1:]).words
    rows = jnp.pad(stack.reshape(len(stack), -1), ((0, 0), (0, WORD_BITS * columns - size)))
    parts = cut_columns(rows.reshape(-1, WORD_BITS, columns), num_workers)  # [k, 32, M, S]
    return parts.transpose(2, 1, 0, 3).reshape(num_workers, WORD_BITS, -1)


def _join_stack(parts: Num[Array, "M 32 _"], shape: tuple[int, ...]) -> Num[Array, "k size"]:
    """Invert `_cut_stack`, to flat leaves."""
    num_workers, columns = len(parts), part_columns(shape, len(parts))
    parts = parts.reshape(num_workers, WORD_BITS, -1, columns).transpose(2, 1, 0, 3)
    rows = join_columns(parts, matrix(shape).words)
    return rows.reshape(len(rows), -1)[:, : math.prod(shape)]


def cut_blocks(
    leaf: Num[Array, "..."], blocks: tuple[int, ...], num_workers: int
) -> Num[Array, "M *blocks 32 S"]:
    """Cut each device's block of a leaf into its parts."""
    if not blocks:
        return cut_leaf(leaf, num_workers)
    cut = partial(cut_leaf, num_workers=num_workers)
    for _ in blocks:
        cut = jax.vmap(cut, out_axes=1)
    pairs = zip(blocks, _block_shape(leaf.shape, blocks), strict=True)
    apart = leaf.reshape([n for pair in pairs for n in pair])
    return cut(apart.transpose(*range(0, apart.ndim, 2), *range(1, apart.ndim, 2)))


def join_blocks(parts: Num[Array, "M *blocks 32 S"], shape: tuple[int, ...]) -> Num[Array, "..."]:
    """Invert `cut_blocks`."""
    blocks = parts.shape[1:-2]
    if not blocks:
        return join_leaf(parts, shape)
    join = partial(join_leaf, shape=_block_shape(shape, blocks))
    for _ in blocks:
        join = jax.vmap(join, in_axes=1)
    order = [n for pair in enumerate(range(len(blocks), 2 * len(blocks))) for n in pair]
    return join(parts).transpose(order).reshape(shape)


def cut_columns(columns: Num[Array, "*others W"], num_workers: int) -> Num[Array, "*others M S"]:
    """Cut one entry per column of a leaf, such as its word, into the parts' entries."""
    *others, length = columns.shape
    part = 2 * -(-length // (2 * num_workers))
    padding = [(0, 0) for _ in others] + [(0, num_workers * part - length)]
    return jnp.pad(columns, padding).reshape(*others, num_workers, part)


def join_columns(parts: Num[Array, "*others M S"], length: int) -> Num[Array, "*others W"]:
    """Invert `cut_columns` for `length` columns."""
    return parts.reshape(*parts.shape[:-2], -1)[..., :length]


def is_real(
    shape: tuple[int, ...], num_workers: int, server: UInt32[Array, ""]
) -> Bool[Array, "32 S"]:
    """Whether each coordinate of a server's part belongs to the leaf, not to the padding."""
    columns, part = matrix(shape).words, part_columns(shape, num_workers)
    left = math.prod(shape) - columns * np.arange(WORD_BITS)  # of the leaf, from a row's start
    stops = np.clip(left, 0, columns).astype(np.int32)
    column = server.astype(jnp.int32) * part + lax.iota(jnp.int32, part)
    return column[None] < stops[:, None]


def _shape_runs(shapes: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, ...], int]]:
    """Each run of equal shapes, and the number of shapes in the run."""
    return [(shape, len(list(run))) for shape, run in itertools.groupby(shapes)]


class Blocks(NamedTuple):
    """The blocks in parts of some leaves, [n, 32, S] with the S columns of all leaves together.

    Leaves side by side, as columns of one array, have one block each. Or the part of one leaf is
    cut into blocks of `length` coordinates, in row-major order.

    Attributes:
      shapes: the leaves' shapes; a single one if `length` is given.
      num_workers: M.
      length: the most coordinates that share a scale; `None` for a leaf's whole part.
    """

    shapes: tuple[tuple[int, ...], ...]
    num_workers: int
    length: int | None

    @property
    def columns(self) -> list[int]:
        """The number of columns of each leaf."""
        return [part_columns(shape, self.num_workers) for shape in self.shapes]

    @property
    def number(self) -> int:
        """The number of blocks in one part of every leaf."""
        if self.length is None:
            return len(self.shapes)
        return -(-WORD_BITS * self.columns[0] // self.length)

    def _runs(self) -> Iterator[tuple[slice, slice, int]]:
        """Yield each run of leaves with equally many columns: its blocks, columns, and a leaf's.

        Programs grow with the number of runs, so leaves should come sorted.
        """
        block = column = 0
        for columns, leaves in itertools.groupby(self.columns):
            number = len(list(leaves))
            stop = column + number * columns
            yield slice(block, block + number), slice(column, stop), columns
            block, column = block + number, stop

    def sizes(self) -> np.ndarray:
        """The number of coordinates of leaves in each block of each worker: i[M, blocks]."""
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

    def shares(self, dtype: Any) -> np.ndarray:
        """The share of a coordinate in the mean of its block: f[M, blocks]."""
        return 1 / np.maximum(self.sizes(), 1).astype(dtype)

    def real(self, server: UInt32[Array, ""]) -> Bool[Array, "32 S"] | None:
        """Whether each coordinate of a server's part belongs to a leaf; `None` if all do."""
        if self.num_workers * WORD_BITS * sum(self.columns) == sum(map(math.prod, self.shapes)):
            return None
        each = [
            jnp.tile(is_real(shape, self.num_workers, server), number)
            for shape, number in _shape_runs(self.shapes)
        ]
        return jnp.concatenate(each, axis=1)

    def means(
        self, parts: Float[Array, "n 32 S"], shares: Float[Array, "n blocks"]
    ) -> Float[Array, "n blocks"]:
        """The mean over each block, from `shares`; a sum might overflow. Padding must be 0."""
        if self.length is None:
            sums = jnp.sum(parts * self.spread(shares), axis=1)
            runs = [
                jnp.sum(sums[:, run].reshape(len(sums), -1, columns), axis=2)
                for _, run, columns in self._runs()
            ]
            return jnp.concatenate(runs, axis=1)
        rows = parts.reshape(len(parts), -1)
        rows = jnp.pad(rows, ((0, 0), (0, self.number * self.length - rows.shape[1])))
        return jnp.sum(rows.reshape(*shares.shape, self.length) * shares[..., None], axis=2)

    def spread(self, scales: Float[Array, "n blocks"]) -> Float[Array, "n _ _"]:
        """The scale of each coordinate, in a shape that broadcasts to [n, 32, S]."""
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


class Bundle(NamedTuple):
    """Leaves that are compressed together.

    Large leaves are compressed alone, as they lie in memory. Small leaves are compressed with their
    parts side by side, which compiles faster; so are leaves whose parts are cut into blocks.

    Attributes:
      positions: the positions of the leaves in their sharding group.
      blocks: the blocks of coordinates that share a scale.
      dtype: the dtype of the values.
      rounds_to: the dtype of the updates.
    """

    positions: tuple[int, ...]
    blocks: Blocks
    dtype: Any
    rounds_to: Any

    @property
    def in_parts(self) -> bool:
        """Whether a worker, like a server, compresses the leaves in parts."""
        [shape, *others] = self.blocks.shapes
        return bool(others) or math.prod(shape) < SMALL or self.blocks.length is not None

    def of(self, leaves: Sequence[Array]) -> list[Array]:
        """The leaves of this bundle."""
        return [leaves[n] for n in self.positions]


def find_bundles(leaves: Leaves, num_workers: int, length: int | None) -> list[Bundle]:
    """Sort leaves into bundles, for blocks of `length` coordinates or of a leaf's whole part."""
    groups: dict[Any, list[int]] = {}
    for n, (leaf, like) in enumerate(zip(*leaves, strict=True)):
        is_alone = length is not None or leaf.size >= SMALL
        groups.setdefault((leaf.dtype, like.dtype, n if is_alone else None), []).append(n)
    bundles = []
    # Small leaves last: TPUs move whole rows of words if large leaves start at a multiple of 128.
    for (dtype, rounds_to, _), positions in sorted(groups.items(), key=lambda g: g[0][2] is None):
        # Programs are shorter where leaves with equally many columns are neighbours. With the
        # widest leaves first, TPUs move less.
        positions.sort(key=lambda n: -part_columns(leaves.values[n].shape, num_workers))
        shapes = tuple(leaves.values[n].shape for n in positions)
        # Parts are padded to whole blocks: a block larger than a part would cost time and memory.
        most = WORD_BITS * part_columns(shapes[0], num_workers)
        blocks = Blocks(shapes, num_workers, length and min(length, most))
        bundles.append(Bundle(tuple(positions), blocks, dtype, rounds_to))
    return bundles


def side_by_side(leaves: Sequence[Array], num_workers: int) -> Float[Array, "M 32 S"]:
    """The parts of some leaves as columns of one array."""
    runs = [jnp.stack([*run]) for _, run in itertools.groupby(leaves, key=jnp.shape)]
    return jnp.concatenate([_cut_stack(run, num_workers) for run in runs], axis=2)


def take_apart(parts: Float[Array, "M 32 S"], blocks: Blocks) -> list[Array]:
    """Invert `side_by_side`."""
    runs = _shape_runs(blocks.shapes)
    widths = [number * part_columns(shape, len(parts)) for shape, number in runs]
    leaves = []
    for (shape, number), run in zip(runs, cut(parts, widths, axis=2), strict=True):
        flat = _join_stack(run, shape).reshape(-1)
        leaves += [leaf.reshape(shape) for leaf in cut(flat, [math.prod(shape)] * number)]
    return leaves
