"""Cut arrays into pieces, such as a message into the words of each leaf.

XLA for CPUs compiles one kernel for all fusions that are equal. A slice whose start is a constant
becomes part of the fusion that uses the slice, so every leaf would need a kernel of its own. On
CPUs the start is therefore an operand.
"""

import itertools
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
from jax import lax

from signax._wire.types import Array

Cut = Callable[..., list[Array]]


def cut(array: Array, sizes: Iterable[int], axis: int = 0) -> list[Array]:
    """Cut an array along an axis into pieces of the given sizes, from its start on."""
    sizes = tuple(sizes)
    if sizes == (array.shape[axis],):
        return [array]
    on_cpu, elsewhere = (partial(f, sizes=sizes, axis=axis) for f in (cut_alike, cut_apart))
    return lax.platform_dependent(array, cpu=on_cpu, default=elsewhere)


def cut_apart(array: Array, sizes: Iterable[int], axis: int = 0) -> list[Array]:
    """`cut` by slices with constant starts."""
    return [
        lax.slice_in_dim(array, start, start + size, axis=axis)
        for start, size in _starts_and_sizes(sizes)
    ]


def cut_alike(array: Array, sizes: Iterable[int], axis: int = 0) -> list[Array]:
    """`cut` by the same operation for all pieces of one size."""
    places = _starts_and_sizes(sizes)
    # The barrier hides from XLA that the starts are constants.
    starts = lax.optimization_barrier([np.uint32(start) for start, _ in places])
    pieces = []
    for start, (_, size) in zip(starts, places, strict=True):
        origin = [np.uint32(0)] * array.ndim
        origin[axis] = start
        shape = [*array.shape[:axis], size, *array.shape[axis + 1 :]]
        pieces.append(lax.dynamic_slice(array, origin, shape))
    return pieces


def in_rows(array: Array) -> Array:
    """Join an array again from its rows, for an operation that cuts it, such as an `all_to_all`.

    XLA for CPUs then uses these rows, which were cut alike, and takes no slices with constant
    starts.
    """

    def on_cpu(array: Array):
        return lax.concatenate(cut_alike(array, [1] * len(array)), 0)

    return lax.platform_dependent(array, cpu=on_cpu, default=lambda array: array)


def _starts_and_sizes(sizes: Iterable[int]) -> list[tuple[int, int]]:
    sizes = list(sizes)
    return list(zip(itertools.accumulate(sizes[:-1], initial=0), sizes, strict=True))
