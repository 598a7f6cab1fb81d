"""Parts of leaves as messages of one bit for each coordinate and one scale for each block."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from signax import _packing
from signax._ballots import Rules
from signax._numerics import from_words, to_words, wide_dtype, words_of
from signax._parts import block_means, num_blocks, spread

RULES = Rules("dither", "plus")  # what a zero's bit is


def compress(
    parts: Sequence[jax.Array],
    sizes: Sequence[jax.Array],
    dtypes: Sequence[Any],
    coin: jax.Array,
    block: int | None,
    whole: bool,
) -> tuple[jax.Array, list[jax.Array], jax.Array]:
    """One bit for each coordinate and one scale for each block of some parts of each leaf.

    Args:
      parts: for each leaf f[n, *part].
      sizes: for each leaf i[n, blocks], how many coordinates are in a block.
      dtypes: to which scales are rounded before they are sent.
      coin: what settles the bits of zeros.
      block: the size of blocks.
      whole: whether all parts of a leaf share one scale.

    Returns:
      The message, u32[n, words], what it leaves out of each part, and whether all is finite.
    """
    (words,), finite = jax.vmap(partial(_packing.pack, ballots=RULES, coin=coin))(list(parts))
    message, left, flags = [words], [], [jnp.all(finite)]
    for part, size, dtype in zip(parts, sizes, dtypes, strict=True):
        wide = wide_dtype(part.dtype)
        scale = block_means(jnp.abs(part).astype(wide), size, block)
        if whole:
            shares = size.astype(wide) / jnp.sum(size).astype(wide)
            scale = jnp.broadcast_to(jnp.sum(scale * shares), scale.shape)
        # Else whatever uses a scale might compute it anew for every coordinate.
        scale = lax.optimization_barrier(scale.astype(dtype).astype(wide))
        (bits,) = RULES(part, _packing.odd(part.shape[1:]), coin)
        left.append(part - _signed(bits, scale, block).astype(part.dtype))
        message.append(to_words(scale))
        flags.append(jnp.all(jnp.isfinite(scale)))
    # As in pack: else a chain of the flags is copied into whatever uses the result.
    finite = jnp.all(lax.optimization_barrier(jnp.stack(flags)))
    return jnp.concatenate(message, axis=1), left, finite


def expand(
    message: jax.Array, parts: Sequence[Any], block: int | None, divisor: jax.Array | int = 1
) -> list[jax.Array]:
    """What n messages of `compress` say, u32[n, words]: for each leaf f[n, *part]."""
    num_words = _packing.num_words(parts)
    rows = jax.vmap(lambda words: _packing.unpack([words], parts))(message[:, :num_words])
    values, start = [], num_words
    for (bits,), part in zip(rows, parts, strict=True):
        wide, blocks = wide_dtype(part.dtype), num_blocks(part.shape, block)
        stop = start + words_of(blocks, wide)
        scale = from_words(message[:, start:stop], blocks, wide)
        scale = lax.optimization_barrier(scale / jnp.asarray(divisor).astype(wide))
        values.append(_signed(bits, scale, block))
        start = stop
    return values


def _signed(bits: jax.Array, scale: jax.Array, block: int | None) -> jax.Array:
    """+ or - the scale of each coordinate's block: bool[n, *part] and f[n, blocks]."""
    magnitude = spread(scale, bits.shape[1:], block)
    return jnp.where(bits, magnitude, -magnitude)
