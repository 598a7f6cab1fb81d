"""Exchanges in flight while the backward pass goes on.

A compiler is free to put off an exchange until the end of the backward pass, and XLA does: packing
waits, and so do the exchanges. Barriers leave no choice. With three buckets, where `a` is the
`all_to_all` and `g` the `all_gather` of a bucket, a step runs in this order:

    backward of bucket 0                        pack 0     send a0
    half of the backward pass of bucket 1       a0 arrives, count 0, send g0
    the other half           g0 arrives         pack 1     send a1
    half of the backward pass of bucket 2       a1 arrives, count 1, send g1
    the other half           g1 arrives         pack 2     send a2, then g2
"""

import collections
import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from signax._overlap.graph import Graph
from signax._overlap.joined import find_joined, run_joined
from signax._overlap.program import Evaluation, Operation, Program, trace

SCOPE = "signax.exchange"  # the name scope of the collectives of votes and means
COLLECTIVES = ("all_to_all", "all_gather", "all_gather_invariant", "psum", "psum_invariant")
OPTIONS: dict[str, dict[str, Any]] = {"tpu": {"xla_tpu_enable_async_all_to_all": "true"}}


def compiler_options(mesh: Mesh) -> dict[str, Any]:
    """XLA's options for asynchronous exchanges on a mesh, where they are not the default."""
    devices = [*mesh.devices.flat]
    in_slice = max(collections.Counter(getattr(d, "slice_index", 0) for d in devices).values())
    if devices[0].device_kind == "TPU v5 lite" and in_slice > 16:
        return {}  # its compiler rejects them: "not supported on limited ICI"
    return OPTIONS.get(devices[0].platform, {})


def overlap(step: Callable[..., Any]) -> Callable[..., Any]:
    """Let the exchanges of a step run beside its backward pass.

    The step computes what it computed before. Barriers in its program make every message ready
    before the backward pass goes on, and every exchange end before the next message is sent, so a
    compiler with asynchronous collectives has each of them in flight meanwhile.

    It needs exchanges that do not wait for all gradients: see :func:`signax.in_buckets`. Without
    two such exchanges the step stays as it is. `train_step` of :class:`signax.DataParallel` does
    this by itself. Call the result under `jax.jit`: outside, its operations are compiled one by one
    in every call.

    Args:
      step: a training step, with gradients and an update in it, of trees of arrays. It is a
        function of one worker, for `jax.shard_map`, or calls `value_and_grad` and `update` of
        :class:`signax.DataParallel`.

    Returns:
      The same function, with barriers.

    Raises:
      TypeError: `step` is not a function.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, signax
      >>> from jax.sharding import PartitionSpec as P
      >>> params = {"first": jnp.ones((2, 2)), "last": jnp.ones((2, 2))}
      >>> loss_fn = lambda p, x: jnp.sum(jnp.tanh(x @ p["first"]) @ p["last"])
      >>> lion = signax.lion(0.5, axis_name="data", weight_decay=0.0)
      >>> tx = signax.in_buckets(lion, {"first": 1, "last": 0})
      >>> def step(params, x):
      ...     own = jax.lax.pcast(params, "data", to="varying")
      ...     updates, _ = tx.update(jax.grad(loss_fn)(own, x), tx.init(params), params)
      ...     return optax.apply_updates(params, updates)
      >>> auto = {"axis_types": (jax.sharding.AxisType.Auto,)}
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",), **auto)
      >>> specs = {"in_specs": (P(), P("data")), "out_specs": P()}
      >>> mapped = jax.jit(jax.shard_map(signax.overlap(step), mesh=mesh, **specs))
      >>> print(mapped(params, jnp.ones((jax.device_count(), 2)))["last"])
      [[0.5 0.5]
       [0.5 0.5]]
    """
    if not callable(step):
        raise TypeError(f"step={step!r} is not a function: pass the training step")

    @functools.wraps(step)
    def overlapped(*args: Any, **kwargs: Any):
        leaves, structure = jax.tree.flatten((args, kwargs))

        def flat(*leaves: Any):
            args, kwargs = structure.unflatten(leaves)
            return step(*args, **kwargs)

        program = trace(flat, *leaves)
        values = program.evaluate(leaves)
        joined = find_joined(program, has_exchange)
        if joined is None:
            _run(program, values)
        else:
            run_joined(program, joined, values, overlap)
        return program.structure.unflatten([*map(values.read, program.outputs)])

    return overlapped


def _run(program: Program, values: Evaluation) -> None:
    """Run a program, with barriers where the backward pass stops for exchanges."""
    graph = Graph.of(program)
    messages, replies = _exchanges(graph)
    everything = {*range(len(graph.operations))}
    finished: set[int] = set()

    def run(wanted: Collection[int]) -> None:
        for n in sorted({*wanted} - finished):
            values.run(graph.operations[n])
        finished.update(wanted)

    in_flight: list[int] = []
    stops = _find_stops(graph, messages, replies) if len(messages) > 1 else []
    for stop, message in stops:
        backward = graph.backward_between(-1, stop) - finished
        run(graph.before(backward) | backward)
        # The backward pass stops here, until what is in flight has arrived.
        _tie(values, [*graph.made(in_flight), *graph.made_by(backward, everything - finished)])
        in_flight = [n for n in replies if n not in finished and replies[n] <= finished]
        in_flight += [] if message is None else [message]
        run(graph.before(in_flight))
        if stop != stops[-1].place:
            # What is sent here is ready before the backward pass goes on.
            following = graph.before(messages) - finished - {*messages}
            after = graph.on_critical_path(finished, following)
            _tie(values, [*graph.read(in_flight), *after])
        run(in_flight)
    run(everything)


class _Stop(NamedTuple):
    """Where the backward pass stops.

    Attributes:
      place: the last operation of the backward pass before the stop.
      message: the exchange that begins a bucket here, if any.
    """

    place: int
    message: int | None


def _find_stops(graph: Graph, messages: list[int], replies: dict[int, set[int]]) -> list[_Stop]:
    """A stop where each bucket's gradients are ready, and one half-way to the next, for replies."""
    stops: list[_Stop] = []
    done = -1
    answered = set().union(*replies.values())
    for message in messages:
        place = max([done, *(graph.place[n] for n in graph.before([message]) & graph.backward)])
        between = graph.backward_between(done, place)
        if stops and stops[-1].message in answered and len(between) > 1:
            stops.append(_Stop(graph.narrowest(between), None))
        stops.append(_Stop(place, message))
        done = place
    return stops


def _tie(values: Evaluation, tied: list[int]) -> None:
    """Make each value wait for all of them."""
    tied = [value for value in dict.fromkeys(tied) if _is_floating_or_word(values.values[value])]
    # Older JAX types the results of a barrier alike: a reply would no longer be replicated.
    varying = {value: _varying(values.values[value]) for value in tied}
    tied = [value for value in tied if varying[value] == max(varying.values(), key=len)]
    after = lax.optimization_barrier([values.values[value] for value in tied])
    values.values.update(zip(tied, after, strict=True))


def _is_floating_or_word(value: Any) -> bool:
    dtype = jax.typeof(value).dtype  # random keys and gradients of integers have others
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def _varying(value: Any) -> frozenset[Any]:
    return jax.typeof(value).manual_axis_type.varying


def _exchanges(graph: Graph) -> tuple[list[int], dict[int, set[int]]]:
    """The exchanges that begin a bucket, and the others with those that they wait for."""
    messages: list[int] = []
    replies: dict[int, set[int]] = {}
    for n, operation in enumerate(graph.operations):
        if has_exchange(operation):
            awaited = graph.before([n]) & {*messages, *replies}
            if awaited:
                replies[n] = awaited
            else:
                messages.append(n)
    return messages, replies


def _is_exchange(name: str, params: dict[str, Any], scope: str) -> bool:
    if name in COLLECTIVES:
        return SCOPE in scope
    return name == "shard_map" and any(  # of leaves that are sharded within a worker
        _is_exchange(e.primitive.name, e.params, str(e.source_info.name_stack))
        for e in params["jaxpr"].eqns
    )


def has_exchange(operation: Operation) -> bool:
    """Whether an operation sends votes or means."""
    return _is_exchange(operation.name, operation.params, operation.scope)
