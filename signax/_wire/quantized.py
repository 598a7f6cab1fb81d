"""Quantised values on the wire: two or four bits per coordinate, and one scale per leaf or block.

A value keeps its sign, and its magnitude is rounded to an odd multiple of the scale s:

    2 bits    -3s      -s  |  s       3s
    4 bits    -15s ... -s  |  s  ...  15s

The sign is sent as by scaled signs, whose only levels are -s and s, and the number of steps of 2s
in one or three bits more. This is all that a codec with other levels needs: exchange, blocks and
error memories are those of `ScaledSigns`.
"""

import dataclasses
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from signax._core.checks import check_count
from signax._wire.feedback import ScaledSignsMemory, exchange_with_memory, make_scaled
from signax._wire.scaled_signs import ScaledSigns
from signax._wire.types import Array, Bool

Bits = Literal[2, 4]

# The scale that minimises the squared error of a Gaussian, over its mean magnitude: half of the
# step in table II of Max, Quantizing for Minimum Distortion (1960), over sqrt(2 / pi).
SCALES = {2: 0.9957 / 2 / 0.79788, 4: 0.3352 / 2 / 0.79788}


def check_bits(bits: Bits) -> None:
    """Raise if there is no codec of so many bits."""
    check_count("bits", bits)
    if bits not in SCALES:
        raise ValueError(f"bits={bits!r} is not built: use {' or '.join(map(str, SCALES))}")


@dataclasses.dataclass(frozen=True)
class Quantized(ScaledSigns):
    r"""The codec of `bits` bits.

    With m the mean magnitude of d values p, any scale s between 0 and 2m makes the error smaller
    than the values, which error feedback needs:
    :math:`\lVert p - Q(p) \rVert^2 \le \lVert p \rVert^2 - d s (2 m - s)`.
    """

    bits: Literal[1, 2, 4] = 2

    def scale(self, magnitude: Array, dtype: Any) -> Array:
        # The largest level stays within the dtype, with room for the rounding of the scale. An
        # infinity stays too, for it excludes its worker.
        most = float(jnp.finfo(dtype).max) * (1 - 2.0**-7) / (2**self.bits - 1)
        scale = magnitude * jnp.asarray(SCALES[self.bits], magnitude.dtype)
        return jnp.where(jnp.isfinite(magnitude), jnp.minimum(scale, most), magnitude)

    def digits(self, values: Array, scale: Array) -> list[Bool[Array, "..."]]:
        left, digits = jnp.abs(values).astype(scale.dtype), []
        for digit in reversed(range(self.bits - 1)):
            step = 2.0 ** (digit + 1) * scale
            bit = left >= step
            left = jnp.where(bit, left - step, left)
            digits.append(bit)
        return digits[::-1]

    def magnitude(self, digits: Sequence[Array], scale: Array) -> Array:
        weighted = [digit.astype(scale.dtype) * 2.0**weight for weight, digit in enumerate(digits)]
        return (2 * sum(weighted[1:], start=weighted[0]) + 1) * scale


def pmean_quantized(
    tree: Any,
    axis_name: Hashable,
    memory: ScaledSignsMemory,
    *,
    step: jax.Array | int,
    bits: Bits = 2,
    block: Literal["leaf"] | int = "leaf",
    decay: float = 1.0,
    active: jax.Array | bool | None = None,
) -> tuple[Any, ScaledSignsMemory]:
    r"""Average quantised values, with error feedback: 2 or 4 bits per coordinate each way.

    It is :func:`signax.pmean_scaled_signs` with a finer compressor of b bits,

    .. math:: C(p)_j = \operatorname{sign}(p_j) \left(2 \min\left(\left\lfloor
      \frac{|p_j|}{2 s} \right\rfloor, 2^{b-1} - 1\right) + 1\right) s, \quad
      s = c_b \frac{\lVert p \rVert_1}{d}

    whose levels are the odd multiples of s. A scale is capped so that its largest level is finite.
    The constants :math:`c_2 = 0.62` and :math:`c_4 = 0.21` minimise the squared error of Gaussian
    values. The squared error is 12% and 1.2% of the squared norm (36% for scaled signs).

    Args:
      tree: this worker's values, as in :func:`signax.pvote`.
      axis_name: the mapped axis along which the workers lie, or a tuple of axes.
      memory: as in :func:`signax.pmean_scaled_signs`.
      step: int32[], the number of the step, from 0, the same on every worker. It drives the dither.
      bits: the bits of a coordinate, 2 or 4.
      block: as in :func:`signax.pmean_scaled_signs`.
      decay: as in :func:`signax.pmean_scaled_signs`.
      active: as in :func:`signax.pmean_scaled_signs`.

    Returns:
      A tree like `tree`, which is 0 if no worker takes part, and the new memory.

    Raises:
      NameError: `axis_name` is not bound.
      TypeError: as in :func:`signax.pmean_scaled_signs`.
      ValueError: `bits` is neither 2 nor 4; or as in :func:`signax.pmean_scaled_signs`.

    Examples:
      >>> import jax, jax.numpy as jnp, signax
      >>> gradients = jnp.array([[1.0, -8.0], [1.0, -8.0]])
      >>> memory = signax.scaled_signs_memory(gradients[0], 2, feedback="none")
      >>> mean = lambda g: signax.pmean_quantized(g, "workers", memory, step=0)
      >>> updates, memory = jax.vmap(mean, axis_name="workers")(gradients)
      >>> print(jnp.abs(updates[0] / updates[0, 0]).round())  # odd multiples of one scale
      [1. 3.]

    References:
      Max, `Quantizing for Minimum Distortion <https://doi.org/10.1109/TIT.1960.1057548>`_, 1960
    """
    check_bits(bits)
    codec = make_scaled(partial(Quantized, bits=bits), axis_name, memory, block, decay)
    outcome, memory = exchange_with_memory(
        tree, codec, axis_name, memory, step=step, active=active, name="tree"
    )
    return outcome.updates, memory
