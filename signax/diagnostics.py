"""Diagnostics: density of gradients, bytes and seconds of a step, and opposing workers."""

import math
import operator
from collections.abc import Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp

from signax._core.checks import check_count, check_mode, check_number
from signax._core.leaves import check_floating, common_dtype, relative_to_peak, wide_dtype
from signax._hlo.collectives import Collective, collective_bytes, collectives
from signax._hlo.flight import Flight, in_flight
from signax._metrics import metrics
from signax._wire.packing import num_words
from signax._wire.parts import part_columns
from signax._wire.words import choose_transport, part_words, sealed_words, words_of
from signax._workers.agreement import Agreement
from signax._workers.votes import THRESHOLD

__all__ = [
    "Collective",
    "Flight",
    "collective_bytes",
    "collectives",
    "density",
    "exchange_seconds",
    "in_flight",
    "metrics",
    "opposes",
    "wire_bytes",
]

_PLANES = {"vote": 1, "abstain": 2, "agreement": 2, "mean_signs": 1}  # of a message
_BITS = {"scaled_signs": 1, "quantized_2_bits": 2, "quantized_4_bits": 4}
_SCHEMES = (*_PLANES, *_BITS, "mean")
_WORD_BYTES = 4


def density(tree: Any) -> Any:
    r"""Measure how evenly each leaf spreads its magnitude over its coordinates.

    .. math:: \phi(v) = \frac{\lVert v \rVert_1^2}{d \lVert v \rVert_2^2}

    for each leaf v of d coordinates. The density lies between :math:`1/d` (one coordinate holds
    everything) and 1 (all magnitudes are equal); Gaussian noise gives :math:`2/\pi`. The scaled
    sign :math:`\frac{\lVert v \rVert_1}{d} \operatorname{sign}(v)` keeps the share
    :math:`\phi(v)` of v's squared norm, or more if v has zeros. A leaf with a small density
    therefore loses most in a one-bit message.

    Args:
      tree: any pytree of floating-point arrays of any shape.

    Returns:
      A tree of the same structure with one scalar per leaf, f64[] for f64 leaves, otherwise f32[].
      An empty or all-zero leaf has density 1. A leaf with a NaN or an infinity has density NaN.

    Raises:
      TypeError: a leaf is not floating-point.

    Examples:
      >>> import jax.numpy as jnp
      >>> from signax import diagnostics
      >>> dense, sparse = jnp.array([1.0, -1.0, 1.0, 1.0]), jnp.array([0.0, 3.0, 0.0, 0.0])
      >>> print(diagnostics.density(dense), diagnostics.density({"w": sparse})["w"])
      1.0 0.25

    References:
      Bernstein et al., `signSGD: Compressed Optimisation for Non-Convex Problems
      <https://arxiv.org/abs/1802.04434>`_, 2018
    """
    check_floating(tree, "tree", only_arrays=False)
    return jax.tree.map(_leaf_density, tree)


def _leaf_density(leaf: Any) -> jax.Array:
    values = jnp.asarray(leaf)
    relative = jnp.abs(relative_to_peak(values.astype(wide_dtype(values.dtype))))
    if values.size == 0:
        return jnp.ones((), relative.dtype)
    square = jnp.mean(relative**2)
    kept = jnp.mean(relative) ** 2 / jnp.where(square == 0, jnp.ones_like(square), square)
    # Rounding may push the density out of the interval of the Cauchy-Schwarz inequality.
    return jnp.where(square == 0, jnp.ones_like(kept), jnp.clip(kept, 1.0 / values.size, 1.0))


def wire_bytes(tree: Any, num_workers: int, *, scheme: str = "vote") -> int:
    r"""The bytes that one worker sends per step, by formula.

    - A vote sends :math:`M - 1` parts of P words in its `all_to_all`, and forwards :math:`M - 1`
      parts in its `all_gather`: :math:`2 (M - 1) \cdot 4 P` bytes. P is an M-th of the packed bits
      and a header word, rounded up to 128 words. From 16,384 words on the bits are rounded up, too.
    - A small vote, or a vote of two workers, sends whole messages in one `all_gather`:
      :math:`(M - 1) \cdot 4 P` bytes, with all the bits in P.
    - A one-bit vote with `agreement=True` sends twice as many words up.
    - A mean of signs has :math:`\lceil \log_2(M + 1) \rceil` times as many words in its
      `all_gather`.
    - A mean of scaled signs sends like a vote, with each leaf cut into M parts and one scale per
      part. A mean of quantised values sends 2 or 4 times as many bits.
    - A ring all-reduce of B bytes sends :math:`2 \frac{M - 1}{M} B`.

    A program may differ: :func:`signax.average_updates` sends f32 for bf16 and f16, XLA on CPUs
    does so for any bf16 mean, and large pods forward packed words in an all-reduce.
    :func:`collective_bytes` reads the program.

    Args:
      tree: one worker's updates, a pytree of floating-point arrays or `jax.ShapeDtypeStruct`.
      num_workers: M, the number of workers.
      scheme: `"vote"` (one bit each way), `"abstain"` (two bits each way), `"agreement"` (two bits
        up, one down), `"mean_signs"` (one bit up, the count down), `"scaled_signs"` (one bit and a
        scale per leaf each way, feedback in both directions), `"quantized_2_bits"` and
        `"quantized_4_bits"` (likewise) or `"mean"` (a full-precision mean, with each leaf in its
        own dtype).

    Returns:
      Bytes per worker and step, rounded up; 0 for a single worker.

    Raises:
      ValueError: `scheme` is unknown, or `num_workers` is below 1.
      TypeError: a leaf is not floating-point, or `num_workers` is not a whole number.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from signax import diagnostics
      >>> params = jax.ShapeDtypeStruct((10_000_000,), jnp.float32)
      >>> diagnostics.wire_bytes(params, 8), diagnostics.wire_bytes(params, 8, scheme="mean")
      (2200576, 70000000)
    """
    check_mode("scheme", scheme, _SCHEMES)
    check_count("num_workers", num_workers)
    check_floating(tree, "tree", only_arrays=False)
    num_workers = operator.index(num_workers)  # NumPy's whole numbers overflow
    leaves = jax.tree.leaves(jax.eval_shape(lambda arrays: arrays, tree))
    if scheme == "mean":
        total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        return -(-2 * (num_workers - 1) * total // num_workers)
    sent, _ = _exchanged(leaves, num_workers, scheme)
    return sent * _WORD_BYTES


def _exchanged(leaves: Sequence[Any], num_workers: int, scheme: str) -> tuple[int, int]:
    """The words that a worker sends in an exchange of packed bits, and the collectives it takes."""
    leaves = [leaf for leaf in leaves if leaf.size]
    if not leaves:
        return 0, 0
    if scheme in _BITS:
        columns = sum(part_columns(leaf.shape, num_workers) for leaf in leaves)
        widest = reduce(common_dtype, (wide_dtype(leaf.dtype) for leaf in leaves))
        scales = words_of(len(leaves), widest)  # All scales are sent in one dtype.
        return 2 * (num_workers - 1) * sealed_words(_BITS[scheme] * columns + scales), 2
    words, up = num_words(leaves), _PLANES[scheme]
    down = {"abstain": 2, "mean_signs": num_workers.bit_length()}.get(scheme, 1)
    if choose_transport(up * words, down * words, num_workers) == "gather":
        return (num_workers - 1) * sealed_words(up * words), 1
    part = part_words(words, num_workers)
    return (num_workers - 1) * (sealed_words(up * part) + sealed_words(down * part)), 2


def exchange_seconds(
    tree: Any,
    num_workers: int,
    *,
    link_rate: float,
    scheme: str = "vote",
    latency: float = 0.0,
    memory_bandwidth: float = math.inf,
) -> float:
    r"""The seconds of an exchange, by a simple model.

    .. math:: T = \frac{8 b}{r} + n \ell + \frac{a}{w}

    b is the bytes that a worker sends (:func:`wire_bytes`), and r is the rate of its link. n is the
    number of collectives: a mean has one, a vote two, or one if it gathers. :math:`\ell` is the
    time of an almost empty collective. a is the bytes of the updates: a vote reads the updates once
    more to pack them, and a mean does not (a = 0). w is the bandwidth of a worker's memory.

    One bit pays if the vote takes less time than the mean. The model ignores counting and
    unpacking: the words are a 32nd of the bytes that the update of the parameters reads and writes.
    In the mean's favour the model ignores the sums inside an all-reduce. It ignores overlapping
    computation.

    Args:
      tree: see :func:`wire_bytes`. For a bf16 mean pass a tree of bf16.
      num_workers: M, the number of workers.
      link_rate: bits per second that a worker can send while it receives at the same rate.
      scheme: see :func:`wire_bytes`.
      latency: seconds of an empty collective among M workers.
      memory_bandwidth: bytes per second that a worker can read.

    Returns:
      Seconds, as a float; 0 for a single worker or an empty tree.

    Raises:
      ValueError: a rate is not above 0, or `latency` is below 0; or as in :func:`wire_bytes`.
      TypeError: as in :func:`wire_bytes`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from signax.diagnostics import exchange_seconds
      >>> params = jax.ShapeDtypeStruct((10_000_000,), jnp.bfloat16)
      >>> machine = dict(latency=50e-6, memory_bandwidth=1e12)
      >>> for link_rate in (1e9, 3.6e12):  # an office's network, and NVLink
      ...     vote = exchange_seconds(params, 8, link_rate=link_rate, **machine)
      ...     mean = exchange_seconds(params, 8, link_rate=link_rate, scheme="mean", **machine)
      ...     print(f"{mean / vote:.1f}")
      15.8
      1.0
    """
    if not (link_rate > 0 and memory_bandwidth > 0 and latency >= 0):
        raise ValueError(
            f"link_rate={link_rate!r} and memory_bandwidth={memory_bandwidth!r} must be above 0, "
            f"latency={latency!r} at least 0: bits, bytes per second, and seconds"
        )
    wire = 8 * wire_bytes(tree, num_workers, scheme=scheme) / link_rate
    leaves = jax.tree.leaves(jax.eval_shape(lambda arrays: arrays, tree))
    if num_workers == 1 or not sum(leaf.size for leaf in leaves):
        return 0.0
    if scheme == "mean":
        return wire + latency
    _, number = _exchanged(leaves, operator.index(num_workers), scheme)
    read = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / memory_bandwidth
    return wire + number * latency + read


def opposes(state: Any, *, threshold: float = THRESHOLD) -> jax.Array:
    r"""Test which workers have opposed the others' majority for longer than chance explains.

    Let :math:`a_t` be the share of a step's coordinates on which the worker agrees with a clear
    majority of the others (:class:`signax.Agreement`). A vote with `agreement=True` keeps

    .. math:: s_t = \max\left(0,\ s_{t-1} + w_t (\tfrac{1}{2} - a_t - 0.1)\right)

    (Page's test for a mean of a below 0.4). A worker opposes the others once s is above the
    threshold. The weight w is 1. If a is the share of only :math:`n < 16` coordinates, it varies
    more, and the weight is :math:`n / 16`. Coordinates on which the worker's value is zero do not
    count. A worker whose updates are pure noise agrees on half at best. If a worker's shares are
    independent with mean 1/2 and standard deviation :math:`\sigma`, s exceeds 1.25 in a step with a
    chance of about :math:`\exp(-0.2 \cdot 1.25 / \sigma^2)`. The chance is 3e-8 at
    :math:`\sigma = 0.12`, a value that small batches reach at the end of training. Momentum makes
    successive shares alike, and raises the chance.

    Runs on scikit-learn's digits had 8 workers with 16 images each. In six clean runs of 1,000
    steps (48,000 shares, with and without momentum) s stayed at 0.78 or below on every worker. On a
    worker that inverts its gradient s was above 1.25 after 8 steps with momentum, after 16 without.

    If three of eight workers invert gradients and go on voting, honest workers eventually exceed
    the threshold, too. Exclude flagged workers: pass `active=~opposes(state)` to the next update.
    An excluded worker is not measured, and stays excluded. Synthetic gradients flagged no honest
    worker in 1,000 steps, with up to three of eight workers excluded and up to 90% of coordinates
    zero, on the same coordinates on all workers or on different coordinates.

    Args:
      state: the state of a transformation or an optimiser with one or more votes that have
        `agreement=True`: one worker's state or, from :class:`signax.DataParallel`, all workers'.
      threshold: the bound that s must exceed, above 0.

    Returns:
      bool[] for one worker's state, bool[M] for all workers' state; true for a worker if any vote
      finds opposition.

    Raises:
      ValueError: no vote in the state measures agreement, or `threshold` is not above 0.
      TypeError: `threshold` is not a number.

    Examples:
      >>> import jax, jax.numpy as jnp, signax
      >>> tx = signax.sign_sgd(0.1, axis_name="workers", agreement=True)
      >>> def opposes_after_four_steps(gradient):
      ...     step = lambda _, state: tx.update(gradient, state)[1]
      ...     state = jax.lax.fori_loop(0, 4, step, tx.init(gradient))
      ...     return signax.diagnostics.opposes(state)
      >>> gradients = jnp.ones((6, 16)).at[5].set(-1.0)  # one of six workers inverts
      >>> print(jax.vmap(opposes_after_four_steps, axis_name="workers")(gradients))
      [False False False False False  True]

    References:
      Page, `Continuous Inspection Schemes <https://doi.org/10.1093/biomet/41.1-2.100>`_,
      Biometrika 41, 1954
    """
    check_number("threshold", threshold, low=0, ends="()")
    nodes = jax.tree.leaves(state, is_leaf=_is_agreement)
    found = [node.opposition for node in nodes if _is_agreement(node)]
    if not found:
        raise ValueError(
            "state holds no agreement: make its vote with agreement=True, as in "
            "signax.signum(1e-3, axis_name='data', agreement=True)"
        )
    return jnp.any(jnp.stack(found) > threshold, axis=0)


def _is_agreement(node: Any) -> bool:
    return isinstance(node, Agreement)
