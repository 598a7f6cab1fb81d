"""Numbers about a state, for a writer of metrics: participation, agreement, momenta, memories."""

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from signax._core.leaves import all_finite
from signax._optimizers.muon import MuonMomentumState
from signax._optimizers.one_bit_adam import OneBitAdamState
from signax._transforms.memory import ErrorFeedbackState, ScaleBySignumState
from signax._transforms.participation import Participation
from signax._transforms.spikes import tree_norm
from signax._wire.feedback import ScaledSignsMemory
from signax._workers.votes import Agreement

_MOMENTA: dict[type, str] = {  # states, and their fields that are momenta
    MuonMomentumState: "momentum",
    ScaleBySignumState: "momentum",
    optax.EmaState: "ema",
    optax.ScaleByAdamState: "mu",
    optax.ScaleByLionState: "mu",
    optax.TraceState: "trace",
}
_MEMORIES = ScaledSignsMemory, ErrorFeedbackState
_KNOWN = (Participation, Agreement, OneBitAdamState, *_MEMORIES, *_MOMENTA)
_NORMS = ("momentum_norm", "memory_norm", "server_memory_norm")


def metrics(state: Any) -> dict[str, jax.Array]:
    r"""Summarise a state in named numbers, for TensorBoard or another writer of metrics.

    The numbers of M workers are

    - `"signax/voters"`: the number of workers that took part in the last step.
    - `"signax/missed"`: the most steps that a worker has missed, and `"signax/missed_worker"`, the
      index of this worker. :func:`signax.participation` has the missed steps of every worker.
    - `"signax/nonfinite_state"`: the number of workers whose own state holds a NaN or an infinity,
      and `"signax/nonfinite_state_worker"`, the index of the first of them. Such a worker is
      excluded from every further step. Its transformation keeps the NaN in a momentum: wrap the
      transformation in :func:`signax.hold_if_nonfinite`.
    - `"signax/agreement"`: the mean of the workers' shares of agreement (only from a vote with
      `agreement=True`, see :class:`signax.Agreement`).
    - `"signax/opposition"`: the largest opposition of a worker, and `"signax/opposition_worker"`,
      the index of this worker (from the same vote). See :func:`signax.diagnostics.opposes`.
    - `"signax/momentum_norm"`: the norm of a worker's momentum, in the state of `scale_by_signum`,
      `optax.trace`, `optax.ema`, `optax.scale_by_lion` or `optax.scale_by_adam`.
    - `"signax/memory_norm"`: the norm of a worker's error memory.
    - `"signax/server_memory_norm"`: the norm of the error memories of all servers together.

    The norm of all coordinates of a worker's momentum or memory is summarised over workers,

    .. math:: \sqrt{\frac{1}{M} \sum_i \lVert m_i \rVert^2}

    It is NaN if a coordinate is not finite. A momentum counts as one for each worker if all its
    leaves have M rows. The state of one worker gives the numbers of this worker, without indices.

    If a state holds one number several times, for example under `optax.partition`, each name ends
    in the part of the path that distinguishes it, such as `"signax/voters/matrices"` and
    `"signax/voters/rest"`.

    Call it under `jax.jit` or outside. With several processes, call it on all of them.

    Args:
      state: the state of a transformation or an optimiser: one worker's state or, from
        :class:`signax.DataParallel`, all workers' state.

    Returns:
      A flat dictionary of names and numbers, i32[] or floating-point scalars.

    Raises:
      ValueError: the state holds no vote, no mean, no momentum and no memory.

    Examples:
      >>> import jax, jax.numpy as jnp, signax
      >>> from signax import diagnostics
      >>> tx = signax.DataParallel(
      ...     signax.signum(0.1, axis_name="data"), jax.make_mesh((1,), ("data",))
      ... )
      >>> state = tx.init(jnp.zeros(2))
      >>> _, state = tx.update(jnp.array([[30.0, -40.0]]), state, jnp.zeros(2))
      >>> for name, value in diagnostics.metrics(state).items():
      ...     print(name, value)
      signax/missed 0
      signax/missed_worker 0
      signax/momentum_norm 5.0
      signax/nonfinite_state 0
      signax/nonfinite_state_worker 0
      signax/voters 1
    """
    found: dict[str, list[_Place]] = {}
    for place in _places(state, ()):
        found.setdefault(place.quantity, []).append(place)
    if not found:
        raise ValueError(
            f"state of type {type(state).__name__} holds no vote, no mean, no momentum and no "
            "memory: pass the state that the optimiser's init or update returned. Restore a "
            "checkpoint into DataParallel.abstract_state, which keeps the types of states."
        )
    values = {
        quantity: {
            label: jax.tree.leaves(place.value)
            for label, place in zip(_labels(places), places, strict=True)
        }
        for quantity, places in found.items()
    }
    return _numbers(values, [leaf for leaf in jax.tree.leaves(state) if _is_floating(leaf)])


class _Place(NamedTuple):
    """A quantity in a state: its name, its path and its value."""

    quantity: str
    path: tuple[Any, ...]
    value: Any


def _places(state: Any, above: tuple[Any, ...]) -> Iterator[_Place]:
    for below, node in jax.tree.leaves_with_path(state, is_leaf=_is_known):
        path = (*above, *below)
        match node:
            case Participation(voters, missed):
                yield _Place("voters", path, voters)
                yield _Place("missed", path, missed)
            case Agreement(share, opposition):
                yield _Place("agreement", path, share)
                yield _Place("opposition", path, opposition)
            case ScaledSignsMemory(worker, server):
                if worker is not None:
                    yield _Place("memory_norm", path, worker)
                if server is not None:
                    yield _Place("server_memory_norm", path, server)
            case ErrorFeedbackState(error, inner_state):
                # No path to this memory is the start of a path to a memory of the compressor.
                yield _Place("memory_norm", (*path, jax.tree_util.GetAttrKey("error")), error)
                inner = (*path, jax.tree_util.GetAttrKey("inner_state"))
                yield from _places(inner_state, inner)
            case OneBitAdamState():
                yield _Place("momentum_norm", path, node.mu)
                yield from _places(node.mean, (*path, jax.tree_util.GetAttrKey("mean")))
            case _ if type(node) in _MOMENTA:
                yield _Place("momentum_norm", path, getattr(node, _MOMENTA[type(node)]))
            case _:
                pass


def _is_known(node: Any) -> bool:
    return isinstance(node, _KNOWN)


def _is_floating(leaf: Any) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.floating)


def _labels(places: Sequence[_Place]) -> list[str]:
    """The ends of the names of one quantity's places: nothing, or what distinguishes the paths."""
    if len(places) == 1:
        return [""]
    paths = [[jax.tree_util.keystr((key,), simple=True) for key in place.path] for place in places]
    start = next(n for n, keys in enumerate(zip(*paths, strict=False)) if len(set(keys)) > 1)
    labels: list[str] = []
    for path in paths:
        stop = start + 1
        while sum(other[:stop] == path[:stop] for other in paths) > 1:
            stop += 1
        labels.append("/" + "/".join(path[start:stop]))
    return labels


@jax.jit
def _numbers(found: dict[str, dict[str, list[Any]]], floating: list[Any]) -> dict[str, jax.Array]:
    """The numbers of all quantities, from the leaves of each, and from all floating-point state."""
    numbers: dict[str, jax.Array] = {}
    missed = [leaves[0] for leaves in found.get("missed", {}).values()]
    num_workers = missed[0].size if missed and missed[0].ndim else None
    for quantity, by_label in found.items():
        for label, leaves in by_label.items():
            name = f"signax/{quantity}{label}"
            if quantity in _NORMS:
                shared = quantity == "server_memory_norm" or not _have_rows(leaves, num_workers)
                norm = tree_norm(leaves)
                numbers[name] = norm if shared else norm / math.sqrt(num_workers or 1)
            elif quantity == "voters":
                numbers[name] = jnp.min(leaves[0])
            elif quantity == "agreement":
                numbers[name] = jnp.mean(leaves[0])
            else:
                numbers[name] = jnp.max(leaves[0])
                if leaves[0].ndim:
                    worst = jnp.argmax(leaves[0]).astype(jnp.int32)
                    numbers[f"signax/{quantity}_worker{label}"] = worst
    nonfinite = _nonfinite(floating, num_workers)
    numbers["signax/nonfinite_state"] = jnp.sum(nonfinite, dtype=jnp.int32)
    if nonfinite.ndim:
        worker = jnp.argmax(nonfinite).astype(jnp.int32)
        numbers["signax/nonfinite_state_worker"] = worker
    return numbers


def _have_rows(leaves: Sequence[Any], num_workers: int | None) -> bool:
    """Whether every leaf has a row for each worker."""
    return num_workers is not None and all(jnp.shape(leaf)[:1] == (num_workers,) for leaf in leaves)


def _nonfinite(leaves: Sequence[Any], num_workers: int | None) -> jax.Array:
    """Which workers have a NaN or an infinity in their own rows: bool[M].

    Without `num_workers` the leaves are one worker's: bool[].
    """
    if num_workers is None:
        return ~all_finite(leaves)
    flags = [
        jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim)))
        for leaf in leaves
        if _have_rows([leaf], num_workers)
    ]
    if not flags:
        return jnp.zeros([num_workers], jnp.bool_)
    # Under Explicit axes JAX does not stack flags of different shardings.
    return ~reduce(jnp.logical_and, jax.lax.optimization_barrier(flags))
