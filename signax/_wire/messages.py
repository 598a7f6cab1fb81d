"""Messages of scaled signs: the words of all bundles, and then their scales."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from signax._core.leaves import wide_dtype
from signax._wire.parts import Bundle
from signax._wire.pieces import cut
from signax._wire.types import Array, Bool, Float, UInt32
from signax._wire.words import from_words, to_words


def write_message(
    words: Sequence[UInt32[Array, "n _"]], scales: Sequence[Float[Array, "n _"]]
) -> tuple[UInt32[Array, "n words"], Bool[Array, ""]]:
    """A message of the words and scales of all bundles, and whether all scales are finite."""
    dtype = _widest([scale.dtype for scale in scales])
    numbers = jnp.concatenate([scale.astype(dtype) for scale in scales], axis=1)
    message = jnp.concatenate([*words, to_words(numbers)], axis=1)
    return message, jnp.all(jnp.isfinite(numbers))


def read_message(
    message: UInt32[Array, "n words"],
    bundles: Sequence[Bundle],
    planes: int,
    voters: UInt32[Array, ""] | None = None,
) -> list[tuple[UInt32[Array, "n _"], Float[Array, "n _"]]]:
    """Invert `write_message` for words of `planes` bits per coordinate.

    With `voters`, scales are divided by their number.
    """
    dtypes = [np.dtype(wide_dtype(bundle.dtype)) for bundle in bundles]
    widths = [planes * sum(bundle.blocks.columns) for bundle in bundles]
    *words, last = cut(message, [*widths, message.shape[1] - sum(widths)], axis=1)
    # Without the barrier TPUs lay out the whole message as suits a column of scales.
    last = lax.optimization_barrier(last)
    numbers = [bundle.blocks.number for bundle in bundles]
    sent = from_words(last, sum(numbers), _widest(dtypes))
    pieces = {}
    for dtype in dict.fromkeys(dtypes):
        scales = sent.astype(dtype)
        if voters is not None:
            # Without the barrier XLA divides for every coordinate.
            divided = scales / jnp.maximum(voters, 1).astype(dtype)
            scales = lax.optimization_barrier(divided)
        pieces[dtype] = cut(scales, numbers, axis=1)
    return [
        (word, pieces[dtype][n]) for n, (word, dtype) in enumerate(zip(words, dtypes, strict=True))
    ]


def _widest(dtypes: Sequence[Any]) -> Any:
    return max(dtypes, key=lambda dtype: np.dtype(dtype).itemsize)
