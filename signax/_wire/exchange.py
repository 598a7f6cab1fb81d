"""The exchange: every message between workers goes through this file.

The `"packed"` transport with three workers (a row is a worker, a letter is a part of the message):

    encode        all_to_all      combine      all_gather      decode
    [a1 b1 c1]    [a1 a2 a3]      [A]          [A B C]         updates of every leaf
    [a2 b2 c2] -> [b1 b2 b3]  ->  [B]      ->  [A B C]     ->
    [a3 b3 c3]    [c1 c2 c3]      [C]          [A B C]

Worker k combines part k for all workers: the workers together are a sharded parameter server. A
list of lists shows the same for a majority vote:

    >>> workers = [[-1.0, 3.0, 2.0], [-4.0, -1.0, 1.0], [0.5, -2.0, 7.0]]
    >>> parts = list(zip(*workers))                                     # all_to_all
    >>> [1 if sum(b > 0 for b in part) >= 2 else -1 for part in parts]  # combine, all_gather
    [-1, -1, 1]

`"gather"` sends every message to every worker, and each combines the whole: one collective instead
of two, and M / 2 times the bytes. `"sum"` adds ballots up as small integers in an all-reduce.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from signax._core.checks import check_flag
from signax._core.leaves import (
    ShardingGroup,
    axis_names,
    check_votable,
    find_axis,
    sharding_groups,
    typed_spec,
    varies,
)
from signax._core.remote import Remote, axis_size
from signax._wire.pieces import in_rows
from signax._wire.remote import ask_remote, check_groups
from signax._wire.types import (
    Array,
    Bool,
    Codec,
    Context,
    Encoded,
    Leaves,
    Outcome,
    Reply,
    Route,
    Summable,
    Sums,
    UInt32,
    Worker,
)
from signax._wire.words import (
    add_up,
    choose_transport,
    dead_decision,
    header_bits,
    make_header,
    part_words,
    seal,
    unseal,
    worker_of,
)

Combine = Callable[[Array, Sequence[int]], Reply]


def exchange(
    tree: Any,
    codec: Codec,
    route: Route,
    *,
    step: ArrayLike,
    active: Array | bool | None,
    dither: Any = None,
    memory: Sequence[Array] = (),
    specs: Sequence[PartitionSpec] | None = None,
    memory_specs: Sequence[PartitionSpec] = (),
    like: Any = None,
    name: str = "updates",
) -> Outcome:
    """Send a tree of values, and return what the workers make of them together.

    Args:
      tree: this worker's values.
      codec: how the values travel.
      route: the way that they take.
      step: int32[], the number of the step, the same on every worker.
      active: bool[], whether this worker takes part; by default it does if its values are finite.
      dither: the memory of the codec's dither; without one the dither depends on `step` alone.
      memory: the server's memory of its part of each leaf, or nothing.
      specs: how each leaf is sharded over further axes within a worker; by default as its type
        says, which names Explicit axes only.
      memory_specs: how each array of `memory` is sharded over the same axes.
      like: a tree in the shapes of the updates, by default `tree`.
      name: the name of the tree in errors.
    """
    check_votable(tree, route.axis_name, route.split_over, name)
    worker = codec.worker(route.axis_name, step, dither)
    values, structure = jax.tree.flatten(tree)
    like = values if like is None else jax.tree.leaves(like)
    specs = [*map(typed_spec, values)] if specs is None else specs
    groups = sharding_groups(values, specs)
    if isinstance(route.axis_name, Remote):
        check_groups(groups)

    # Two passes over the groups: a worker takes part only if the values of all groups are finite.
    messages, residual, finite = [], list(values), jnp.bool_(True)
    for group in groups:
        encoded = _encode_group(group, _leaves_of(group, values, like), codec, route, worker)
        messages.append(encoded.message)
        assign(residual, group.positions, encoded.residual)
        finite &= jnp.all(encoded.finite)
    if isinstance(route.axis_name, Remote) and route.axis_name.replays:
        finite = jnp.bool_(False)  # XLA then leaves out all that leads to a ballot
    participates = take_part(finite, active)
    header = make_header(worker.index, worker.coin, worker.tie, participates)

    updates = [None if leaf.size else jnp.zeros(leaf.shape, leaf.dtype) for leaf in like]
    verdict = [jnp.uint32(axis_size(route.axis_name)), jnp.uint32(0)]  # if nothing is sent
    counts, kept = [], list(memory)
    for group, message in zip(groups, messages, strict=True):
        own = [memory[n] for n in group.positions] if memory else []
        own_specs = [memory_specs[n] for n in group.positions] if memory else []
        leaves = _leaves_of(group, values, like)
        result = _settle_group(group, leaves, codec, route, worker, message, header, own, own_specs)
        assign(updates, group.positions, result.updates)
        assign(kept, group.positions, result.memory)
        # Every device found the same verdict. Older JAX cannot index one of its rows here.
        verdict = [jnp.max(each) for each in result.verdict]
        counts.extend(map(add_up, result.counts))
    voters, dead = verdict
    counts = [sum(counts[1:], start=counts[0])] if counts else []
    updates, residual = structure.unflatten(updates), residual if codec.has_residual else []
    return Outcome(updates, voters, dead, participates, finite, counts, residual, kept)


def take_part(finite: Bool[Array, ""], active: Array | bool | None) -> Bool[Array, ""]:
    """Whether a worker takes part: it is `active` and its values are all finite."""
    if active is None:
        return finite
    check_flag("active", active)
    return finite & active


def assign(array: list[Any], positions: Sequence[int], values: Sequence[Any]) -> None:
    """Write values to positions of a list. An empty list of values changes nothing."""
    if values:
        for position, value in zip(positions, values, strict=True):
            array[position] = value


def _leaves_of(group: ShardingGroup, values: Sequence[Array], like: Sequence[Array]) -> Leaves:
    return Leaves([values[n] for n in group.positions], [like[n] for n in group.positions])


def _on_blocks(
    function: Callable[..., Any], axes: Sequence[Hashable], in_specs: Any, out_specs: Any
) -> Any:
    """Map a function of one device's blocks over the devices of a worker."""
    if not axes:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes))


def _message_specs(group: ShardingGroup, codec: Codec, route: Route) -> Any:
    if route.transport == "sum":
        return group.specs * cast(Summable, codec).integers
    flat = group.axes or None
    return PartitionSpec(None, flat) if codec.by_server else PartitionSpec(flat)


@jax.named_scope("signax.pack")
def _encode_group(
    group: ShardingGroup, leaves: Leaves, codec: Codec, route: Route, worker: Worker
) -> Encoded:
    """Encode a group; the flag gets one element for each device."""

    def encode(leaves: Leaves, coin: Array):
        if route.transport == "sum":
            num_workers = axis_size(route.axis_name)
            encoded = cast(Summable, codec).encode_integers(leaves, coin, num_workers)
        else:
            encoded = codec.encode(leaves, coin, group.axes)
        return encoded._replace(finite=encoded.finite[None])

    in_specs = Leaves(group.specs, group.specs), PartitionSpec()
    residual = group.specs if codec.has_residual else []
    message_specs = _message_specs(group, codec, route)
    out_specs = Encoded(message_specs, PartitionSpec(group.axes or None), residual)
    return _on_blocks(encode, group.axes, in_specs, out_specs)(leaves, worker.coin)


class _Result(NamedTuple):
    """The results of a group.

    Attributes:
      updates: the updates of its leaves.
      verdict: u32[devices] each, the number of voters and the decision on dead coordinates.
      counts: at most one u32[n, k], of n addends on each device.
      memory: the server's new memory.
    """

    updates: Any
    verdict: Any
    counts: Any
    memory: Any


def _settle_group(
    group: ShardingGroup,
    leaves: Leaves,
    codec: Codec,
    route: Route,
    worker: Worker,
    message: list[Array],
    header: Array,
    memory: list[Array],
    memory_specs: list[PartitionSpec],
) -> _Result:
    """Send a group's message and decode the reply."""
    whole, flat = PartitionSpec(), PartitionSpec(group.axes or None)
    split, position, position_spec = find_axis(route.split_over)

    def settle(
        leaves: Leaves, message: Any, header: Array, worker: Worker, position: Array, memory: Any
    ):
        if route.transport == "sum":
            sums = _sum(message, header, route.axis_name)
            with jax.named_scope("signax.unpack"):
                updates, counts = cast(Summable, codec).decode_sums(sums, message, leaves)
            verdict = [sums.voters[None], sums.dead[None]]
            return _Result(updates, verdict, counts, memory)
        combine = jax.named_scope("signax.count")(codec.combine)
        combine = partial(combine, context=Context(leaves, worker, memory))
        if isinstance(route.axis_name, Remote):
            reply = ask_remote(message, header, codec, route.axis_name, worker.step, leaves.like)
        else:
            reply = send(message, header, codec, route, combine, position[0])
        # A worker that does not take part reads the counts of another one, and ignores them.
        counts = [count[:, :, worker_of(header)] for count in reply.counts]
        verdict = [(reply.header >> 1)[None], (reply.header & 1)[None]]
        updates = jax.named_scope("signax.unpack")(codec.decode)(reply, leaves)
        return _Result(updates, verdict, counts, reply.memory)

    message_specs = _message_specs(group, codec, route)
    of_leaves = Leaves(group.specs, group.specs)
    in_specs = of_leaves, message_specs, whole, whole, position_spec, memory_specs
    out_specs = _Result(group.specs, [flat, flat], flat, memory_specs)
    function = _on_blocks(settle, (*group.axes, *split), in_specs, out_specs)
    return function(leaves, message, header, worker, position, memory)


# Transports.


def send(
    message: list[Array],
    header: Array,
    codec: Codec,
    route: Route,
    combine: Combine,
    position: Array,
) -> Reply:
    """Send a message, and return the reply of all servers together.

    `position` is this device's along the axis over which the exchange is split, if there is one.
    """
    if codec.by_server:
        reply = ask_server(message, header, route.axis_name, combine)
        return _collect(reply, route.axis_name)
    (words,) = message[0].shape
    if route.split_over is not None:
        # Each device of a worker sends a part of the message; then they share their replies.
        devices = lax.axis_size(route.split_over)
        part = part_words(words, devices)
        message = [
            lax.dynamic_slice_in_dim(_pad(plane, devices * part), position * part, part)
            for plane in message
        ]
        inner = route._replace(split_over=None)
        reply = send(message, header, codec, inner, combine, position)
        return _collect(reply, route.split_over, words)
    num_workers, transport = axis_size(route.axis_name), route.transport
    if transport == "auto":
        up, down = codec.planes(num_workers)
        transport = choose_transport(up * words, down * words, num_workers)
    if transport == "gather":
        sealed = seal([plane[None] for plane in message], header)[0]
        return combine(gather(sealed, route.axis_name), [words] * len(message))
    part = part_words(words, num_workers)
    rows = [_pad(plane, num_workers * part).reshape(num_workers, part) for plane in message]
    return _collect(ask_server(rows, header, route.axis_name, combine), route.axis_name, words)


@jax.named_scope("signax.pack")
def _pad(plane: Array, words: int) -> Array:
    return jnp.pad(plane, (0, words - plane.size))


def ask_server(
    rows: Sequence[UInt32[Array, "M _"]], header: Array, axis_name: Hashable, combine: Combine
) -> Reply:
    """Send row k to server k, and return the reply of this worker as a server."""
    sealed = seal(rows, header)
    with jax.named_scope("signax.exchange"):
        # Under vmap a tiled all_to_all needs a batched operand: the sender's header makes it one.
        received = lax.all_to_all(in_rows(sealed), axis_name, 0, 0, tiled=True)
    return combine(received, [row.shape[1] for row in rows])


def _collect(reply: Reply, axis_name: Hashable, words: int | None = None) -> Reply:
    """Send every server's reply to all, and join planes end to end to `words` words if given.

    JAX types the result as the same on every worker, which the reply of one server is not.
    """
    rows = [plane[None] for plane in reply.planes] + [n.reshape(1, -1) for n in reply.counts]
    sealed = seal(rows, reply.header)  # the header is 0 without voters
    received = gather(sealed[0], axis_name)
    with jax.named_scope("signax.unpack"):
        fields, headers = unseal(received, [row.shape[1] for row in rows])
        planes, counted = fields[: len(reply.planes)], fields[len(reply.planes) :]
        if words is not None:
            planes = [plane.reshape(-1)[:words] for plane in planes]
        counts = [
            count.reshape(-1, *one.shape[1:])
            for count, one in zip(counted, reply.counts, strict=True)
        ]
    return Reply(planes, headers[0], counts, reply.memory)


@jax.named_scope("signax.exchange")
def gather(array: Array, axis_name: Hashable) -> Array:
    """Stack the workers' arrays, [...] to [M, ...]; replicated by type where types can tell."""
    if varies(array, axis_name):
        return lax.all_gather(array, axis_name, to="invarying")
    shape = array.shape
    for axis in reversed(axis_names(axis_name)):  # vmap takes one axis at a time
        array = lax.all_gather(array, axis)
    return array.reshape(-1, *shape)


@jax.named_scope("signax.exchange")
def _sum(integers: Sequence[Array], header: Array, axis_name: Hashable) -> Sums:
    """Sum integer ballots of -1, 0 and +1 of any shape."""
    counted = [jnp.where(header > 0, integer, 0) for integer in integers]
    totals, (voters, coins, ties) = lax.psum((counted, header_bits(header)), axis_name)
    tie = (ties > 0).astype(jnp.uint32)
    return Sums(totals, voters, dead_decision(coins, voters, tie), tie)
