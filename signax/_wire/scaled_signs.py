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

from signax._core.leaves import add_memory, narrow, wide_dtype
from signax._wire import slabs
from signax._wire.ballots import Rules, find_worker
from signax._wire.exchange import assign
from signax._wire.messages import read_message, write_message
from signax._wire.parts import (
    Blocks,
    Bundle,
    cut_columns,
    find_bundles,
    join_columns,
    matrix,
    side_by_side,
    take_apart,
)
from signax._wire.pieces import cut
from signax._wire.types import (
    Array,
    Bool,
    Context,
    Encoded,
    Float,
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
        message, finite = write_message(words, scales)
        return Encoded([message], finite, residual)

    def combine(
        self, sealed: UInt32[Array, "M n 128"], widths: Sequence[int], context: Context
    ) -> Reply:
        bundles = self._bundles(context.leaves)
        (received,), headers = unseal(sealed, widths)
        voters = count_voters(headers)
        means = []
        for bundle, (words, shares) in zip(
            bundles, read_message(received, bundles, self.bits, voters), strict=True
        ):
            means.append(jnp.sum(self._expand_parts(words, shares, bundle.blocks), axis=0))
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
        blocks = bundle.blocks
        magnitudes = _mean_magnitudes(values, blocks)
        return magnitudes if blocks.length else _mean_over_parts(magnitudes, blocks.sizes())

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
            real = blocks.real(worker.index)
            part = add_memory(mean, error, self.decay)
            part = (part if real is None else jnp.where(real, part, 0))[None]
            scale = self.scale(_mean_magnitudes(part, blocks, worker.index), bundle.rounds_to)
            scale = _rounded(scale, bundle.rounds_to)
            word, left = self._compress_parts(part, scale, worker.coin, blocks)
            words.append(word)
            scales.append(scale)
            kept_new = voters > 0 if real is None else real & (voters > 0)
            error = jnp.where(kept_new, left[0], error)
            errors = cut(error, blocks.columns, axis=1)
            errors = [new.reshape(own.shape) for new, own in zip(errors, kept, strict=True)]
            assign(memory, bundle.positions, errors)
        return write_message(words, scales)[0], memory

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
        each = cut(replies, widths, axis=1)
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
        odd = (lax.broadcasted_iota(jnp.uint32, parts.shape, 2) & 1).astype(jnp.bool_)
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
        bits = [(plane[:, None] >> positions) & 1 for plane in planes]
        sign, *digits = (bit.astype(jnp.bool_) for bit in bits)
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
    parts: Float[Array, "n 32 S"], blocks: Blocks, server: UInt32[Array, ""] | None = None
) -> Float[Array, "n blocks"]:
    """The mean magnitude of each block of parts side by side, whose padding is 0.

    The parts are those of all servers, or the part of one server.
    """
    wide = wide_dtype(parts.dtype)
    shares = blocks.shares(wide)  # f[M, blocks]
    if server is not None:
        is_one = (shares == shares[:1]).all()
        shares = shares[:1] if is_one else jnp.asarray(shares)[server][None]
    return blocks.means(jnp.abs(parts).astype(wide), jnp.asarray(shares))


def _mean_over_parts(
    magnitudes: Float[Array, "n blocks"], sizes: np.ndarray
) -> Float[Array, " blocks"]:
    """The mean magnitudes of blocks that all n parts share, by their sizes, i[n, blocks]."""
    dtype = magnitudes.dtype
    shares = sizes.astype(dtype) / np.sum(sizes, axis=0, keepdims=True).astype(dtype)
    return jnp.sum(magnitudes * shares, axis=0)


def _rounded(scales: Array, dtype: Any) -> Array:
    """Round scales to the dtype in which they are sent."""
    # Without the barrier XLA may compute a scale for every coordinate that uses it.
    return lax.optimization_barrier(narrow(scales, dtype).astype(scales.dtype))
