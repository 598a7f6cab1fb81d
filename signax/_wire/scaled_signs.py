"""Scaled signs on the wire: one bit per coordinate, and one scale per leaf or block.

With two workers, each of which serves one part of every leaf (letters are parts):

    p = g + e        signs, scales      mean             signs, scales    update
    [a1 b1]          [a1 a2]            A = mean a       [A B]            +-scale
    [a2 b2]    ->    [b1 b2]      ->    B = mean b  ->   [A B]      ->

The worker keeps what compression leaves out of its p, the server keeps what compression leaves out
of the mean of its part, and each adds it to what it compresses at the next step: see `feedback`.
"""

import dataclasses
import math
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from signax._core.leaves import add_memory, all_flags, narrow, wide_dtype
from signax._wire import slabs
from signax._wire.exchange import assign
from signax._wire.parts import (
    Blocks,
    Bundle,
    cut_columns,
    find_bundles,
    is_real,
    join_columns,
    matrix,
    read_message,
    side_by_side,
    take_apart,
    write_message,
)
from signax._wire.signs import Rules, find_worker
from signax._wire.types import (
    Array,
    Bool,
    Context,
    Encoded,
    Float,
    Int,
    Leaves,
    Reply,
    UInt32,
    Worker,
)
from signax._wire.words import WORD_BITS, count_voters, from_words, to_words, unseal

RULES = Rules("dither", "plus")  # how zeros become signs


@dataclasses.dataclass(frozen=True)
class ScaledSigns:
    """The codec of scaled signs.

    Attributes:
      num_workers: M.
      length: the most coordinates that share a scale; `None` for a whole leaf, or a server's part.
      compresses_reply: whether servers compress the means, with memories; else they send them in
        full precision.
      decay: the share of a server's memory that is added.
    """

    num_workers: int
    length: int | None
    compresses_reply: bool
    decay: Any

    by_server = True
    has_residual = True
    bits = 1

    def scale(self, magnitude: Array, dtype: Any) -> Array:
        """The scale of a block of values of `dtype`, from their mean magnitude."""
        del dtype
        return magnitude

    def digits(self, values: Array, scale: Array) -> list[Bool[Array, "..."]]:
        """The further bits of each value, beside its sign."""
        del values, scale
        return []

    def magnitude(self, digits: Sequence[Array], scale: Array) -> Array:
        """The magnitude of each coordinate, from the further bits and the scale."""
        del digits
        return scale

    def planes(self, num_workers: int) -> tuple[int, int]:
        del num_workers
        return self.bits, self.bits

    def worker(self, axis_name: Hashable, step: Any, dither: Any) -> Worker:
        return find_worker(axis_name, RULES, step, dither)

    def encode(self, leaves: Leaves, coin: Array, axes: tuple[Hashable, ...]) -> Encoded:
        coin = lax.optimization_barrier(coin)  # or XLA recomputes the coin for every coordinate
        bundles = self._bundles(leaves)
        values = [self._values(bundle, leaves.values) for bundle in bundles]
        magnitudes = [
            self._magnitudes(bundle, own) for bundle, own in zip(bundles, values, strict=True)
        ]
        whole = [n for n, bundle in enumerate(bundles) if bundle.blocks.length is None]
        if axes and whole:  # devices hold equal shares of a leaf, which has one scale
            share = 1 / math.prod(lax.axis_size(axis) for axis in axes)
            assign(magnitudes, whole, lax.psum([magnitudes[n] * share for n in whole], axes))

        codec = dataclasses.replace(self, decay=None)  # jit hashes it, and decay may be an array
        words, scales, residual = [], [], list(leaves.values)
        for bundle, own, magnitude in zip(bundles, values, magnitudes, strict=True):
            blocks = bundle.blocks
            scale = _rounded(self.scale(magnitude, bundle.dtype), bundle.dtype)
            if bundle.in_parts:
                scale = jnp.broadcast_to(scale, (blocks.num_workers, blocks.number))
                word, error = self._compress_parts(own, scale, coin, blocks)
                errors = take_apart(error, blocks)
            else:
                word, scale, error = _compress_leaf(codec, own, scale, coin)
                errors = [error]
            words.append(word)
            scales.append(scale)
            assign(residual, bundle.positions, errors)
        # A mean of magnitudes is finite exactly if all of them are.
        finite = all_flags([jnp.all(jnp.isfinite(scale)) for scale in scales])
        return Encoded([write_message(words, scales)], finite, residual)

    def combine(
        self, sealed: UInt32[Array, "M n 128"], widths: Sequence[int], context: Context
    ) -> Reply:
        bundles = self._bundles(context.leaves)
        (received,), headers = unseal(sealed, widths)
        voters = count_voters(headers)
        means = []
        for bundle, (words, scales) in zip(
            bundles, read_message(received, bundles, self.bits), strict=True
        ):
            share = lax.optimization_barrier(scales / jnp.maximum(voters, 1).astype(scales.dtype))
            means.append(jnp.sum(self._expand_parts(words, share, bundle.blocks), axis=0))
        if self.compresses_reply:
            message, memory = self._compress_means(bundles, means, voters, context)
        else:
            means = [mean.astype(bundle.dtype) for mean, bundle in zip(means, bundles, strict=True)]
            message = jnp.concatenate([to_words(mean.reshape(1, -1)) for mean in means], axis=1)
            memory = context.memory
        return Reply([message[0]], 2 * voters, [], memory)

    def decode(self, reply: Reply, leaves: Leaves) -> list[Array]:
        bundles, updates = self._bundles(leaves), list(leaves.like)
        for bundle, means in zip(bundles, self._read_reply(reply.planes[0], bundles), strict=True):
            assign(updates, bundle.positions, means)
        return [narrow(mean, leaf.dtype) for mean, leaf in zip(updates, leaves.like, strict=True)]

    def _bundles(self, leaves: Leaves) -> list[Bundle]:
        return find_bundles(leaves, self.num_workers, self.length)

    def _values(self, bundle: Bundle, leaves: Sequence[Array]) -> Array:
        """The values of a bundle: one leaf, f[...], or parts side by side, f[M, 32, S]."""
        own = bundle.of(leaves)
        return side_by_side(own, self.num_workers) if bundle.in_parts else own[0]

    def _magnitudes(self, bundle: Bundle, values: Array) -> Array:
        """The mean magnitude of each block that shares a scale on the way up.

        The shape is f[] for one leaf, f[blocks] for several leaves, and f[M, blocks] for blocks of
        a number of coordinates.
        """
        if not bundle.in_parts:
            return _mean_magnitude(values)
        sizes = jnp.asarray(bundle.blocks.sizes())
        magnitudes = _mean_magnitudes(values, sizes, bundle.blocks)
        return magnitudes if bundle.blocks.length else _mean_over_parts(magnitudes, sizes)

    def _compress_means(
        self, bundles: Sequence[Bundle], means: Sequence[Array], voters: Array, context: Context
    ) -> tuple[UInt32[Array, "1 words"], list[Array]]:
        """Compress the means of this server's parts, and return its new memory of them."""
        words, scales, memory, worker = [], [], list(context.memory), context.worker
        for bundle, mean in zip(bundles, means, strict=True):
            blocks = bundle.blocks
            kept = bundle.of(context.memory)
            # Of a sharded leaf, the memory has a leading 1 for each dimension of the leaf.
            error = jnp.concatenate([own.reshape(own.shape[-2:]) for own in kept], axis=1)
            real = [is_real(shape, self.num_workers, worker.index) for shape in blocks.shapes]
            real = jnp.concatenate(real, axis=1)
            part = jnp.where(real, add_memory(mean, error, self.decay), 0)[None]
            sizes = jnp.asarray(blocks.sizes())[worker.index][None]
            scale = self.scale(_mean_magnitudes(part, sizes, blocks), bundle.rounds_to)
            scale = _rounded(scale, bundle.rounds_to)
            word, left = self._compress_parts(part, scale, worker.coin, blocks)
            words.append(word)
            scales.append(scale)
            error = jnp.where(real & (voters > 0), left[0], error)
            errors = jnp.split(error, np.cumsum(blocks.columns)[:-1], axis=1)
            errors = [new.reshape(own.shape) for new, own in zip(errors, kept, strict=True)]
            assign(memory, bundle.positions, errors)
        return write_message(words, scales), memory

    def _read_reply(
        self, replies: UInt32[Array, "M words"], bundles: Sequence[Bundle]
    ) -> list[list[Array]]:
        """The updates of each bundle's leaves."""
        if self.compresses_reply:
            return [
                take_apart(self._expand_parts(words, scales, bundle.blocks), bundle.blocks)
                if bundle.in_parts
                else [self._expand_leaf(words, scales, bundle.blocks.shapes[0])]
                for bundle, (words, scales) in zip(
                    bundles, read_message(replies, bundles, self.bits), strict=True
                )
            ]
        sizes = [WORD_BITS * sum(bundle.blocks.columns) for bundle in bundles]
        widths = [
            size * np.dtype(b.dtype).itemsize // 4 for size, b in zip(sizes, bundles, strict=True)
        ]
        each = jnp.split(replies, np.cumsum(widths)[:-1], axis=1)
        return [
            take_apart(
                from_words(part, size, bundle.dtype).reshape(len(part), WORD_BITS, -1),
                bundle.blocks,
            )
            for part, size, bundle in zip(each, sizes, bundles, strict=True)
        ]

    def _expand_leaf(
        self, words: UInt32[Array, "M _"], scales: Float[Array, "M 1"], shape: tuple[int, ...]
    ) -> Float[Array, "..."]:
        """The leaf that the words and scales of all its parts stand for."""
        fold = matrix(shape)
        planes = jnp.split(words, self.bits, axis=1)
        columns = [*planes, jnp.broadcast_to(scales, planes[0].shape)]
        columns = [join_columns(each, fold.words).reshape(fold.word_shape) for each in columns]
        sign, *digits = (slabs.split_slabs(plane, fold) for plane in columns[:-1])
        scale = jnp.broadcast_to(columns[-1][None], (WORD_BITS, *fold.word_shape))
        scale = scale.reshape(-1, *fold.shape[1:])[: fold.shape[0]]
        magnitude = self.magnitude(digits, scale)
        return jnp.where(sign, magnitude, -magnitude).reshape(shape)

    def _compress_parts(
        self,
        parts: Float[Array, "n 32 S"],
        scales: Float[Array, "n blocks"],
        coin: Array,
        blocks: Blocks,
    ) -> tuple[UInt32[Array, "n _"], Float[Array, "n 32 S"]]:
        """Compress parts side by side: return their words and the residual."""
        odd = lax.broadcasted_iota(jnp.int32, parts.shape, 2) % 2 == 1
        (sign,) = RULES(parts, odd, coin)
        scale = blocks.spread(scales)
        digits = self.digits(parts, scale)
        magnitude = self.magnitude(digits, scale)
        left = parts - jnp.where(sign, magnitude, -magnitude).astype(parts.dtype)
        return _concatenate(slabs.merge_bits([sign, *digits], axis=1, flags=0)), left

    def _expand_parts(
        self, words: UInt32[Array, "n _"], scales: Float[Array, "n blocks"], blocks: Blocks
    ) -> Float[Array, "n 32 S"]:
        """The parts side by side that words and scales stand for."""
        positions = jnp.arange(WORD_BITS, dtype=jnp.uint32)[None, :, None]
        planes = jnp.split(words, self.bits, axis=1)
        sign, *digits = ((plane[:, None] >> positions) & 1 == 1 for plane in planes)
        magnitude = self.magnitude(digits, blocks.spread(scales))
        return jnp.where(sign, magnitude, -magnitude)


@partial(jax.jit, static_argnums=0)  # one trace for all leaves of a shape
def _compress_leaf(
    codec: ScaledSigns, leaf: Float[Array, "..."], scale: Float[Array, ""], coin: Array
) -> tuple[UInt32[Array, "M _"], Float[Array, "M 1"], Float[Array, "..."]]:
    """Compress a leaf: return its parts' words and scales, and the residual."""
    (sign,) = RULES(leaf, slabs.odd(leaf.shape), coin)
    digits = codec.digits(leaf, scale)
    magnitude = codec.magnitude(digits, scale)
    left = leaf - jnp.where(sign, magnitude, -magnitude).astype(leaf.dtype)
    fold = matrix(leaf.shape)
    fields = [bit.reshape(fold.shape) for bit in (sign, *digits)]
    planes = slabs.join_slabs(fields, fold, flags=0)
    words = [cut_columns(plane.reshape(-1), codec.num_workers) for plane in planes]
    scales = jnp.broadcast_to(scale, (codec.num_workers, 1))
    return _concatenate(words), scales, left


def _concatenate(planes: Sequence[Array]) -> Array:
    return planes[0] if len(planes) == 1 else jnp.concatenate(planes, axis=1)


@jax.jit  # one trace for all leaves of a shape
def _mean_magnitude(leaf: Float[Array, "..."]) -> Float[Array, ""]:
    return jnp.sum(jnp.abs(leaf.astype(wide_dtype(leaf.dtype))) * (1 / leaf.size))


def _mean_magnitudes(
    parts: Float[Array, "n 32 S"], sizes: Int[Array, "n blocks"], blocks: Blocks
) -> Float[Array, "n blocks"]:
    """The mean magnitude of each block of parts side by side, whose padding is 0."""
    return blocks.means(jnp.abs(parts).astype(wide_dtype(parts.dtype)), sizes)


def _mean_over_parts(
    magnitudes: Float[Array, "n blocks"], sizes: Int[Array, "n blocks"]
) -> Float[Array, " blocks"]:
    """The mean magnitudes of blocks that all n parts share."""
    dtype = magnitudes.dtype
    shares = sizes.astype(dtype) / jnp.sum(sizes, axis=0, keepdims=True).astype(dtype)
    return jnp.sum(magnitudes * shares, axis=0)


def _rounded(scales: Array, dtype: Any) -> Array:
    """Round scales to the dtype in which they are sent."""
    # Without the barrier XLA may compute a scale for every coordinate that uses it.
    return lax.optimization_barrier(narrow(scales, dtype).astype(scales.dtype))
