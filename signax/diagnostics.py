"""When one bit pays: how dense gradients are, and what a step sends."""

from typing import Any

import jax
import jax.numpy as jnp

from signax import _packing
from signax._checks import check_floating, check_mode
from signax._exchange import choose_transport, part_words, share_words
from signax._hlo import Collective, collective_bytes, collectives
from signax._numerics import relative_to_peak, wide_dtype

__all__ = ["Collective", "collective_bytes", "collectives", "density", "wire_bytes"]

_PLANES = {"vote": 1, "abstain": 2}
_WORD_BYTES = 4


def density(tree: Any) -> Any:
    """How evenly each leaf spreads its magnitude over its coordinates.

    phi(v) = (sum_j |v_j|)^2 / (d sum_j v_j^2), between 1/d (one coordinate holds everything)
    and 1 (all magnitudes equal; Gaussian noise gives 2/pi). It is the share of v's energy that
    mean(|v|) sign(v) keeps, so a leaf with a small density loses most in a one-bit message.

    Args:
      tree: pytree of floating-point leaves of any shape.

    Returns:
      The same structure with one scalar per leaf, in f32 or, for f64 leaves, f64. A leaf that is
      empty or all zeros has density 1; one that holds a NaN or an infinity has density NaN.

    Raises:
      TypeError: a leaf is not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> from signax import diagnostics
      >>> grads = {"dense": jnp.array([1.0, -1.0, 1.0, 1.0]), "sparse": jnp.array([0.0, 3, 0, 0])}
      >>> {name: float(value) for name, value in diagnostics.density(grads).items()}
      {'dense': 1.0, 'sparse': 0.25}

    Reference:
      Bernstein et al., signSGD: Compressed Optimisation for Non-Convex Problems, 2018,
      https://arxiv.org/abs/1802.04434
    """
    check_floating(tree, "tree")
    return jax.tree.map(_leaf_density, tree)


def _leaf_density(leaf: Any) -> jax.Array:
    values = jnp.asarray(leaf)
    relative = jnp.abs(relative_to_peak(values.astype(wide_dtype(values.dtype))))
    if values.size == 0:
        return jnp.ones((), relative.dtype)
    square = jnp.mean(relative**2)
    kept = jnp.mean(relative) ** 2 / jnp.where(square == 0, jnp.ones_like(square), square)
    # Rounding must not leave the interval that Cauchy and Schwarz promise.
    return jnp.where(square == 0, jnp.ones_like(kept), jnp.clip(kept, 1.0 / values.size, 1.0))


def wire_bytes(tree: Any, num_workers: int, *, scheme: str = "vote") -> int:
    """Bytes that one worker sends per step, by formula.

    A vote sends M - 1 parts of P words in its all_to_all and forwards M - 1 of them in its
    all_gather, 2 (M-1) 4 P bytes. P is an M-th of the packed bits and a header word, rounded up to
    128 words (from 16,384 words on the bits are, too). A small vote, or of two workers, sends whole
    messages in one all_gather instead, (M-1) 4 P bytes with all the bits in P. A ring all-reduce of
    B bytes sends 2 (M-1)/M B. A compiler may choose otherwise (on CPU the mean of bf16 travels as
    f32): :func:`collective_bytes` reads what a program does.

    Args:
      tree: pytree of floating-point arrays or `jax.ShapeDtypeStruct`, one worker's updates.
      num_workers: M, the number of workers.
      scheme: `"vote"` (one bit each way), `"abstain"` (two bits each way) or `"mean"` (the
        full-precision mean, each leaf in its own dtype).

    Returns:
      Bytes per worker and step, rounded up; 0 for a single worker.

    Raises:
      ValueError: `scheme` is unknown or `num_workers` below 1.
      TypeError: a leaf is not floating point.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from signax import diagnostics
      >>> params = jax.ShapeDtypeStruct((10_000_000,), jnp.float32)
      >>> diagnostics.wire_bytes(params, 8), diagnostics.wire_bytes(params, 8, scheme="mean")
      (2200576, 70000000)
    """
    check_mode("scheme", scheme, ("vote", "abstain", "mean"))
    if num_workers < 1:
        raise ValueError(f"num_workers={num_workers!r} must be at least 1")
    check_floating(tree, "tree")
    leaves = jax.tree.leaves(jax.eval_shape(lambda arrays: arrays, tree))
    if scheme == "mean":
        total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        return -(-2 * (num_workers - 1) * total // num_workers)
    planes, words = _PLANES[scheme], _packing.num_words(leaves)
    if not words:
        return 0
    if choose_transport(planes * words, num_workers) == "gather":
        return (num_workers - 1) * part_words(planes * words) * _WORD_BYTES
    part = part_words(planes * share_words(words, num_workers))
    return 2 * (num_workers - 1) * part * _WORD_BYTES
