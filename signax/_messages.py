"""Messages of one bit for each coordinate of leaves' parts, and one scale for each block of them.

Large leaves are packed and unpacked as they lie. Small ones are compressed together, their parts
side by side, which saves compile time; so are those whose parts are cut into blocks.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from signax import _packing
from signax._ballots import Rules
from signax._numerics import from_words, narrow, to_words, wide_dtype
from signax._parts import cut, cut_columns, join, join_columns, matrix, part_columns
from signax._scales import Blocks

RULES = Rules("dither", "plus")  # what a zero's bit is


class Batch(NamedTuple):
    """Leaves that are compressed together.

    Attributes:
      positions: where they stand among all leaves.
      blocks: which coordinates of their parts share a scale.
      dtype: of their values.
      rounds_to: the dtype of the updates.
    """

    positions: tuple[int, ...]
    blocks: Blocks
    dtype: Any
    rounds_to: Any

    @property
    def in_parts(self) -> bool:
        """Whether a worker, too, cuts the leaves into parts to compress them."""
        [shape, *others] = self.blocks.shapes
        is_small = math.prod(shape) < _packing.SMALL
        return bool(others) or is_small or self.blocks.length is not None

    def of(self, leaves: Sequence[jax.Array]) -> list[jax.Array]:
        """Its leaves among all."""
        return [leaves[n] for n in self.positions]


def find_batches(
    leaves: Sequence[Any], dtypes: Sequence[Any], num_workers: int, length: int | None
) -> list[Batch]:
    """Puts leaves, which make updates of the given dtypes, into batches.

    Their blocks are of so many coordinates, or of a leaf's whole part.
    """
    groups: dict[Any, list[int]] = {}
    for n, (leaf, dtype) in enumerate(zip(leaves, dtypes, strict=True)):
        is_alone = length is not None or leaf.size >= _packing.SMALL
        groups.setdefault((leaf.dtype, dtype, n if is_alone else None), []).append(n)
    batches = []
    # Small leaves last: TPUs move whole rows of words where large ones start at a multiple of 128.
    for (dtype, rounds_to, _), positions in sorted(groups.items(), key=lambda g: g[0][2] is None):
        # Programs are shorter where leaves with equally many columns are neighbours. The widest
        # come first, which moves less on TPUs.
        positions.sort(key=lambda n: -part_columns(leaves[n].shape, num_workers))
        shapes = tuple(leaves[n].shape for n in positions)
        blocks = Blocks(shapes, num_workers, length)
        batches.append(Batch(tuple(positions), blocks, dtype, rounds_to))
    return batches


def side_by_side(leaves: Sequence[jax.Array], num_workers: int) -> jax.Array:
    """The parts of some leaves: [...] each to [M, 32, S]."""
    return jnp.concatenate([cut(leaf, num_workers) for leaf in leaves], axis=2)


def take_apart(parts: jax.Array, blocks: Blocks) -> list[jax.Array]:
    """Undoes `side_by_side`."""
    each = jnp.split(parts, np.cumsum(blocks.columns)[:-1], axis=2)
    return [join(part, shape) for part, shape in zip(each, blocks.shapes, strict=True)]


@jax.jit  # one trace for leaves of one shape
def mean_magnitude(leaf: jax.Array) -> jax.Array:
    """The mean magnitude of a leaf: f[...] to f[]."""
    return jnp.sum(jnp.abs(leaf.astype(wide_dtype(leaf.dtype))) * (1 / leaf.size))


@partial(jax.jit, static_argnames="num_workers")
def compress_leaf(
    leaf: jax.Array, scale: jax.Array, coin: jax.Array, num_workers: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compresses a leaf with one scale, f[].

    Returns:
      The words of its parts, u32[M, S], its scale for each, f[M, 1], and what is left out, [...].
    """
    (bits,) = RULES(leaf, _packing.odd(leaf.shape), coin)
    left = leaf - jnp.where(bits, scale, -scale).astype(leaf.dtype)
    fold = matrix(leaf.shape)
    (words,) = _packing.join_blocks([bits.reshape(fold.shape)], fold, flags=0)
    scales = jnp.broadcast_to(scale, (num_workers, 1))
    return cut_columns(words.reshape(-1), num_workers), scales, left


def expand_leaf(words: jax.Array, scales: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """What the parts of a leaf say: u32[M, S] and f[M, 1] to [...]."""
    fold = matrix(shape)
    columns = [words, jnp.broadcast_to(scales, words.shape)]
    columns = [join_columns(each, fold.words).reshape(fold.word_shape) for each in columns]
    bits = _packing.split_blocks(columns[0], fold)
    scale = jnp.broadcast_to(columns[1][None], (_packing.WORD_BITS, *fold.word_shape))
    scale = scale.reshape(-1, *fold.shape[1:])[: fold.shape[0]]
    return jnp.where(bits, scale, -scale).reshape(shape)


def mean_magnitudes(parts: jax.Array, sizes: jax.Array, blocks: Blocks) -> jax.Array:
    """The mean magnitude of each block of parts that lie side by side.

    Args:
      parts: f[n, 32, S], whose padding is 0.
      sizes: i[n, blocks], how many coordinates are in a block.
      blocks: what shares a scale.

    Returns:
      f[n, blocks], in the dtype in which scales are computed.
    """
    return blocks.means(jnp.abs(parts).astype(wide_dtype(parts.dtype)), sizes)


def mean_over_parts(magnitudes: jax.Array, sizes: jax.Array) -> jax.Array:
    """The mean magnitudes of blocks that all n parts share: f[n, blocks] to f[blocks]."""
    dtype = magnitudes.dtype
    shares = sizes.astype(dtype) / jnp.sum(sizes, axis=0, keepdims=True).astype(dtype)
    return jnp.sum(magnitudes * shares, axis=0)


def compress_parts(
    parts: jax.Array, scales: jax.Array, coin: jax.Array, blocks: Blocks
) -> tuple[jax.Array, jax.Array]:
    """Compresses parts that lie side by side, f[n, 32, S], with scales f[n, blocks].

    `coin` settles the bits of zeros.

    Returns:
      Words, u32[n, S], and what is left out, f[n, 32, S].
    """
    odd = lax.broadcasted_iota(jnp.int32, parts.shape, 2) % 2 == 1
    (bits,) = RULES(parts, odd, coin)
    left = parts - _signed(bits, scales, blocks).astype(parts.dtype)
    (words,) = _packing.join([bits], axis=1, flags=0)
    return words, left


def expand_parts(words: jax.Array, scales: jax.Array, blocks: Blocks) -> jax.Array:
    """What parts that lie side by side say: u32[n, S] and f[n, blocks] to f[n, 32, S]."""
    places = jnp.arange(_packing.WORD_BITS, dtype=jnp.uint32)[None, :, None]
    bits = (words[:, None] >> places) & 1 == 1
    return _signed(bits, scales, blocks)


def _signed(bits: jax.Array, scales: jax.Array, blocks: Blocks) -> jax.Array:
    magnitude = blocks.spread(scales)
    return jnp.where(bits, magnitude, -magnitude)


def rounded(scales: jax.Array, dtype: Any) -> jax.Array:
    """Rounds scales to the dtype in which they are sent.

    Without the barrier XLA might compute a scale for every coordinate that uses it.
    """
    return lax.optimization_barrier(narrow(scales, dtype).astype(scales.dtype))


def write(words: Sequence[jax.Array], scales: Sequence[jax.Array]) -> jax.Array:
    """A message of the words and scales of batches: u32[n, S] and f[n, blocks] to u32[n, words]."""
    dtype = _widest([scale.dtype for scale in scales])
    numbers = jnp.concatenate([scale.astype(dtype) for scale in scales], axis=1)
    return jnp.concatenate([*words, to_words(numbers)], axis=1)


def read(message: jax.Array, batches: Sequence[Batch]) -> list[tuple[jax.Array, jax.Array]]:
    """Undoes `write`: the words and scales of each batch."""
    dtypes = [wide_dtype(batch.dtype) for batch in batches]
    edges = np.cumsum([sum(batch.blocks.columns) for batch in batches])
    *words, last = jnp.split(message, edges, axis=1)
    # Else TPUs lay out the whole message as suits a column of scales.
    last = lax.optimization_barrier(last)
    numbers = [batch.blocks.number for batch in batches]
    scales = from_words(last, sum(numbers), _widest(dtypes))
    scales = jnp.split(scales, np.cumsum(numbers)[:-1], axis=1)
    scales = [scale.astype(dtype) for scale, dtype in zip(scales, dtypes, strict=True)]
    return list(zip(words, scales, strict=True))


def _widest(dtypes: Sequence[Any]) -> Any:
    return max(dtypes, key=lambda dtype: np.dtype(dtype).itemsize)
