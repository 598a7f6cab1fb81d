"""Which leaves go into which bucket, by the order in which the backward pass finishes them."""

import itertools
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
import optax
from jax.extend import core

from signax._core.checks import check_count
from signax._overlap.program import trace

ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
MOST_BUCKETS = 12  # by "auto"


def find_buckets(
    loss_fn: Callable[..., Any],
    params: optax.Params,
    *args: Any,
    number: int | Literal["auto"] = "auto",
    min_bytes: int = 2**20,
    has_aux: bool = False,
    **kwargs: Any,
) -> Any:
    """Cut the parameters into buckets, in the order in which the backward pass finishes gradients.

    The loss is traced, not run. Leaves are sorted by the place of their gradient in the backward
    pass. The last bucket has the leaves whose gradients end it, such as embeddings: no product of
    matrices is left for their exchange to hide behind. The others are cut into buckets of sizes as
    even as whole leaves allow. Gradients that end together share a bucket, so there may be fewer
    buckets than asked for: layers in one `jax.lax.scan`, or under one `jax.checkpoint`, share one.

    Keep the result with the checkpoints: another version of JAX may find another order, another
    platform another number, and the state of :func:`signax.in_buckets` belongs to one assignment.

    Args:
      loss_fn: a function of `(params, *args, **kwargs)`, which returns a scalar loss, or with
        `has_aux` a pair of the loss and anything else.
      params: the parameters, or their shapes.
      *args: the further arguments of `loss_fn`, or their shapes, as one worker gets them.
      number: the largest number of buckets. By default, `"auto"`, as many as leave each message
        but the last at least `min_bytes` long, and twelve at most. On CPUs
        (`jax.default_backend()`) `"auto"` is one bucket: collectives block there, so further
        messages cost time and hide nothing.
      min_bytes: the least bytes of a message that `"auto"` makes, at one bit per parameter. The
        default, 1 MiB, takes about 0.1 ms on a link of 100 Gbit/s, more than a collective takes to
        start. Much shorter messages would take longer to start than to send.
      has_aux: whether `loss_fn` returns such a pair.
      **kwargs: keyword arguments of `loss_fn`.

    Returns:
      A tree like `params` with the number of each leaf's bucket, for :func:`signax.in_buckets`.

    Raises:
      TypeError: `number` is neither a whole number nor `"auto"`, or `min_bytes` is not a whole
        number.
      ValueError: `number` or `min_bytes` is below 1, or `number` exceeds the number of leaves.

    Examples:
      >>> import jax, jax.numpy as jnp, signax
      >>> params = {"embed": jnp.ones((9, 4)), "head": jnp.ones((4, 9)), "layer": jnp.ones((4, 4))}
      >>> def loss_fn(params, tokens):
      ...     hidden = jnp.tanh(params["embed"][tokens] @ params["layer"])
      ...     return jnp.sum(jax.nn.log_softmax(hidden @ params["head"]))
      >>> print(signax.find_buckets(loss_fn, params, jnp.arange(5), number=3))
      {'embed': 2, 'head': 0, 'layer': 1}
    """
    leaves, structure = jax.tree.flatten(params)
    _check_number(number, len(leaves))
    check_count("min_bytes", min_bytes)

    given, others = jax.tree.flatten((args, kwargs))
    arrays = {n: value for n, value in enumerate(given) if isinstance(value, ARRAYS)}

    def loss(params: Any, arrays: dict[int, Any]):
        args, kwargs = others.unflatten([arrays.get(n, value) for n, value in enumerate(given)])
        value = loss_fn(params, *args, **kwargs)
        return value[0] if has_aux else value

    program = trace(jax.grad(loss), params, arrays)
    ready = program.places()
    # A gradient that no operation makes is an input or a constant, and known at the start.
    places = [
        -1 if isinstance(value, core.Literal) else ready.get(value, -1) for value in program.outputs
    ]
    last = max([n for n, one in enumerate(program.operations) if one.multiplies], default=-1)
    order = sorted(range(len(leaves)), key=lambda n: places[n])
    together = [[*run] for _, run in itertools.groupby(order, key=lambda n: min(places[n], last))]
    sizes = [sum(int(np.prod(np.shape(leaves[n]))) for n in run) for run in together]
    runs = _cut_by_size(sizes, 8 * min_bytes) if number == "auto" else _cut(sizes, number)
    buckets = [0] * len(leaves)
    for bucket, (start, stop) in enumerate(runs):
        for n in itertools.chain(*together[start:stop]):
            buckets[n] = bucket
    return structure.unflatten(buckets)


def _check_number(number: Any, leaves: int) -> None:
    if isinstance(number, str) and number == "auto":
        return
    if isinstance(number, str | bool) or not hasattr(number, "__index__"):
        raise TypeError(f'number={number!r} must be a whole number, or "auto"')
    check_count("number", number)
    if number > leaves:
        raise ValueError(
            f"number={number!r} exceeds the {leaves} leaves of params: a leaf is not cut"
        )


def _cut_by_size(sizes: list[int], least: int) -> list[tuple[int, int]]:
    """Cut a sequence into as many runs as leave the sums of all but the last at least `least`."""
    if jax.default_backend() == "cpu":
        return _cut(sizes, 1)
    # Nothing hides the exchange of the last run. Merging that run would only make it longer.
    for number in range(min(MOST_BUCKETS, 1 + sum(sizes[:-1]) // least), 1, -1):
        runs = _cut(sizes, number)
        if all(sum(sizes[start:stop]) >= least for start, stop in runs[:-1]):
            return runs
    return _cut(sizes, 1)


def _cut(sizes: list[int], number: int) -> list[tuple[int, int]]:
    """Cut a sequence into runs: the last entry, and runs of the others of even sums."""
    number = min(number, len(sizes))
    if number <= 1:
        return [(0, len(sizes))]
    return [*_cut_evenly(sizes[:-1], number - 1), (len(sizes) - 1, len(sizes))]


def _cut_evenly(sizes: list[int], number: int) -> list[tuple[int, int]]:
    """Cut a sequence into runs, so that the sum of the squares of their sums is least."""
    edges = np.concatenate([[0], np.cumsum(np.array(sizes, float))])
    # least[n] is the least sum of squares for the first n entries in some number of runs.
    least = edges**2
    least[0] = np.inf  # no run is empty
    cuts = []
    for _ in range(number - 1):
        squares = np.maximum(edges[:, None] - edges[None], 0) ** 2 + least[None]
        squares[np.triu_indices(len(edges))] = np.inf
        cuts.append(len(edges) - 1 - np.argmin(squares[:, ::-1], axis=1))  # small runs come last
        least = np.min(squares, axis=1)
    runs, stop = [], len(sizes)
    for cut in reversed(cuts):
        start = int(cut[stop])
        runs.append((start, stop))
        stop = start
    return [(0, stop), *reversed(runs)]
