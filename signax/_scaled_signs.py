"""Means of scaled signs: one bit and a scale per block, with memories of what was left out.

With two workers, of which each serves one part of every leaf (letters are parts):

    p = g + e        signs, scales      mean             signs, scales    update
    [a1 b1]          [a1 a2]            A = mean a       [A B]            +-scale
    [a2 b2]    ->    [b1 b2]      ->    B = mean b  ->   [A B]      ->

Both times what compression leaves out is kept, by the worker of its own p and by the server of its
part's mean, and added to what is compressed at the next step.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from signax._ballots import take_part
from signax._blocks import find_blocks, locally
from signax._checks import check_axis_name, check_block, check_number
from signax._collectives import Outcome, Worker, check_votable, find_worker
from signax._error_memory import ScaledSignsMemory, check_memory
from signax._exchange import gather, make_header, seal, swap, unseal
from signax._messages import (
    RULES,
    Batch,
    compress_leaf,
    compress_parts,
    expand_leaf,
    expand_parts,
    find_batches,
    mean_magnitude,
    mean_magnitudes,
    mean_over_parts,
    read,
    rounded,
    side_by_side,
    take_apart,
    write,
)
from signax._numerics import add_memory, from_words, narrow, to_words
from signax._parts import is_real


def pmean_scaled_signs(
    tree: Any,
    axis_name: Hashable,
    memory: ScaledSignsMemory,
    *,
    step: jax.Array | int,
    block: Literal["leaf"] | int = "leaf",
    decay: float = 1.0,
    active: jax.Array | bool | None = None,
) -> tuple[Any, ScaledSignsMemory]:
    r"""Averages scaled signs, with error feedback: one bit per coordinate and a scale per block.

    .. math:: p_i = g_i + \lambda e_i, \quad e_i \leftarrow p_i - C(p_i), \quad
      P = \frac{1}{|S|} \sum_{i \in S} C(p_i) + \lambda E, \quad E \leftarrow P - C(P), \quad
      C(p) = \frac{\lVert p \rVert_1}{d} \operatorname{sign}(p)

    over the workers S that take part, and gives :math:`C(P)`. Worker k is the server of the k-th
    part of every leaf, and keeps that part of E. Without E (`memory.server` is `None`) it gives P
    in full precision, and without e it compresses the values as they are. A zero is sent as + or -
    the scale, such that it cancels over workers and steps (without memories only if the same
    workers take part in both steps of each pair), and memories subtract just what was sent.

    It runs where :func:`signax.pvote` does, in one `all_to_all` and one `all_gather`, and the
    result is the same on every worker.

    Args:
      tree: this worker's values, as in :func:`signax.pvote`.
      axis_name: the mapped axis along which the workers lie, or a tuple of axes.
      memory: what this call returned at the step before, at first
        :func:`signax.scaled_signs_memory`.
      step: int32[], counts steps from 0 and is the same on every worker. It drives the dither.
      block: what shares one scale. With `"leaf"` a whole leaf does on the way up, and each server's
        part of it on the way down. With a number, that many coordinates of a part share a scale
        both ways; the last ones of a part may be fewer. In your own `jax.shard_map` over further
        axes, a leaf is this device's block of it.
      decay: the share :math:`\lambda` of the memories that is added, in [0, 1].
      active: bool[], whether this worker takes part; by default it does. One whose values are not
        finite does not. Who does not keeps its own memory as it is.

    Returns:
      A tree like `tree`, which is 0 if nobody takes part, and the new memory.

    Raises:
      NameError: `axis_name` is not bound.
      TypeError: a leaf is not real floating-point, or an argument is of the wrong kind.
      ValueError: an argument is out of range, the memory is that of another tree or of another
        number of workers, or a leaf does not vary over the axis.

    Examples:
      >>> import jax, jax.numpy as jnp, signax
      >>> gradients = jnp.array([[1.0, -3.0, 2.0, 2.0], [2.0, -1.0, 0.5, 0.5]])
      >>> memory = signax.scaled_signs_memory(gradients[0], 2)
      >>> mean = lambda g: signax.pmean_scaled_signs(g, "workers", memory, step=0)
      >>> updates, memory = jax.vmap(mean, axis_name="workers")(gradients)
      >>> print(updates[0])
      [ 1.5 -1.5  1.5  1.5]
      >>> print(memory.worker)
      [[-1.  -1.   0.   0. ]
       [ 1.   0.  -0.5 -0.5]]

    References:
      Karimireddy et al., `Error Feedback Fixes SignSGD and other Gradient Compression Schemes
      <https://arxiv.org/abs/1901.09847>`_, 2019; Zheng, Huang and Kwok, `Communication-Efficient
      Distributed Blockwise Momentum SGD with Error-Feedback
      <https://arxiv.org/abs/1905.10936>`_, 2019
    """
    check_axis_name(axis_name)
    block = check_block(block, ("leaf",))
    check_number("decay", decay, low=0, high=1, ends="[]")
    options = {"step": step, "block": block, "decay": decay, "active": active}
    outcome, memory = mean_scaled(tree, axis_name, memory, **options, name="tree")
    return outcome.updates, memory


FindBatches = Callable[[Sequence[jax.Array]], list[Batch]]


def mean_scaled(
    tree: Any,
    axis_name: Hashable,
    memory: ScaledSignsMemory,
    *,
    step: jax.Array | int,
    block: Literal["leaf"] | int,
    decay: Any,
    active: jax.Array | bool | None,
    param_specs: Any = None,
    name: str = "updates",
) -> tuple[Outcome, ScaledSignsMemory]:
    """`pmean_scaled_signs` with checked options, and with leaves sharded over further axes.

    `name` is what errors call the tree.
    """
    worker = find_worker(axis_name, RULES, step)
    check_votable(tree, axis_name, name=name)
    num_workers, length = lax.axis_size(axis_name), None if block == "leaf" else block
    check_memory(name, tree, memory, num_workers)
    values = tree
    if memory.worker is not None:
        values = jax.tree.map(partial(add_memory, decay=decay), tree, memory.worker)
    groups = find_blocks(tree, param_specs)
    if memory.server is not None and any(group.axes for group in groups):
        raise ValueError(
            "feedback='both' does not take leaves that are sharded within a worker, as "
            f"param_specs={param_specs!r} has it: use feedback='worker'"
        )
    like, structure = jax.tree.flatten(tree)
    leaves = jax.tree.leaves(values)

    # In two passes over the groups: a worker is out if any leaf is not finite.
    whole = PartitionSpec()
    messages, finders, left, finite = [], [], list(leaves), jnp.bool_(True)
    for group in groups:
        flat, rows = PartitionSpec(group.axes or None), PartitionSpec(None, group.axes or None)
        dtypes = [like[n].dtype for n in group.positions]
        finders.append(partial(find_batches, dtypes=dtypes, num_workers=num_workers, length=length))
        cast = partial(_cast, find=finders[-1], axes=group.axes)
        cast = locally(cast, group.axes, (group.specs, whole), (rows, group.specs, flat))
        message, errors, flags = cast([leaves[n] for n in group.positions], worker.coin)
        messages.append(message)
        _put(left, group.positions, errors)
        finite &= jnp.all(flags)
    takes_part = take_part(finite, active)
    header = make_header(worker.index, worker.coin, worker.tie, takes_part)

    means, voters = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in like], jnp.uint32(0)
    server = None if memory.server is None else jax.tree.leaves(memory.server)
    for group, find, message in zip(groups, finders, messages, strict=True):
        own = [leaves[n] for n in group.positions]
        if server is None:
            rows, flat = PartitionSpec(None, group.axes or None), PartitionSpec(group.axes or None)
            settle = partial(_settle_in_full, axis_name=axis_name, find=find)
            specs = (group.specs, rows, whole), (group.specs, flat)
            settled, found = locally(settle, group.axes, *specs)(own, message, header)
        else:
            kept = [server[n] for n in group.positions]
            settled, found, errors = _settle(
                find(own), message, header, kept, worker, decay, axis_name
            )
            _put(server, group.positions, errors)
        _put(means, group.positions, settled)
        voters = jnp.max(found)

    means = [narrow(mean, leaf.dtype) for mean, leaf in zip(means, like, strict=True)]
    if memory.worker is not None:
        kept = jax.tree.leaves(memory.worker)
        left = [jnp.where(takes_part, new, old) for new, old in zip(left, kept, strict=True)]
        memory = memory._replace(worker=structure.unflatten(left))
    if server is not None:
        memory = memory._replace(server=structure.unflatten(server))
    return Outcome(structure.unflatten(means), voters, takes_part, finite), memory


def _put(array: list, positions: Sequence[int], values: Sequence) -> None:
    for position, value in zip(positions, values, strict=True):
        array[position] = value


def _cast(
    leaves: Sequence[jax.Array], coin: jax.Array, find: FindBatches, axes: tuple[Hashable, ...]
) -> tuple[jax.Array, list[jax.Array], jax.Array]:
    """A worker's message to every server, what it leaves out of each leaf, and a flag.

    u32[M, words], and bool[1], whether all values are finite. The leaves are blocks of leaves that
    are sharded over `axes`.
    """
    coin = lax.optimization_barrier(coin)  # else it is computed anew for every coordinate
    batches = find(leaves)
    values = [_values(batch, leaves) for batch in batches]
    magnitudes = [_magnitudes(batch, own) for batch, own in zip(batches, values, strict=True)]
    whole = [n for n, batch in enumerate(batches) if batch.blocks.length is None]
    if axes and whole:  # the blocks of a leaf are of one size, and the leaf has one scale
        share = 1 / math.prod(lax.axis_size(axis) for axis in axes)
        sums = lax.psum([magnitudes[n] * share for n in whole], axes)
        _put(magnitudes, whole, sums)

    words, scales, left = [], [], list(leaves)
    for batch, own, magnitude in zip(batches, values, magnitudes, strict=True):
        blocks, scale = batch.blocks, rounded(magnitude, batch.dtype)
        if batch.in_parts:
            scale = jnp.broadcast_to(scale, (blocks.num_workers, blocks.number))
            word, error = compress_parts(own, scale, coin, blocks)
            errors = take_apart(error, blocks)
        else:
            word, scale, error = compress_leaf(own, scale, coin, blocks.num_workers)
            errors = [error]
        words.append(word)
        scales.append(scale)
        _put(left, batch.positions, errors)
    # A mean of magnitudes is finite if all of them are. As in pack: else a chain of the flags is
    # copied into whatever uses the result.
    flags = jnp.stack([jnp.all(jnp.isfinite(scale)) for scale in scales])
    return write(words, scales), left, jnp.all(lax.optimization_barrier(flags))[None]


def _values(batch: Batch, leaves: Sequence[jax.Array]) -> jax.Array:
    """The values of a batch: one leaf, f[...], or parts side by side, f[M, 32, S]."""
    own = batch.of(leaves)
    return side_by_side(own, batch.blocks.num_workers) if batch.in_parts else own[0]


def _magnitudes(batch: Batch, values: jax.Array) -> jax.Array:
    """The mean magnitude of each block that shares a scale on the way up.

    It is f[] for one leaf, f[blocks] for several leaves, and f[M, blocks] if a block is a number of
    coordinates.
    """
    if not batch.in_parts:
        return mean_magnitude(values)
    sizes = jnp.asarray(batch.blocks.sizes())
    magnitudes = mean_magnitudes(values, sizes, batch.blocks)
    return magnitudes if batch.blocks.length else mean_over_parts(magnitudes, sizes)


def _settle_in_full(
    leaves: Sequence[jax.Array],
    message: jax.Array,
    header: jax.Array,
    axis_name: Hashable,
    find: FindBatches,
) -> tuple[list[jax.Array], jax.Array]:
    """The mean of what was sent, in full precision, like each leaf, and the voters, u32[1]."""
    batches = find(leaves)
    means, voters = _average(batches, message, header, axis_name)
    means = [mean.astype(batch.dtype) for mean, batch in zip(means, batches, strict=True)]
    words = [to_words(mean.reshape(1, -1)) for mean in means]
    down, voters = _share(jnp.concatenate(words, axis=1), voters, axis_name)
    settled, edges = list(leaves), np.cumsum([part.shape[1] for part in words])[:-1]
    for batch, mean, part in zip(batches, means, jnp.split(down, edges, axis=1), strict=True):
        numbers = from_words(part, mean.size, batch.dtype).reshape(-1, *mean.shape)
        _put(settled, batch.positions, take_apart(numbers, batch.blocks))
    return settled, voters


def _settle(
    batches: Sequence[Batch],
    message: jax.Array,
    header: jax.Array,
    kept: Sequence[jax.Array],
    worker: Worker,
    decay: Any,
    axis_name: Hashable,
) -> tuple[list[jax.Array], jax.Array, list[jax.Array]]:
    """The compressed mean of what was sent, for each leaf, the voters, u32[1], and the new memory.

    The memory is that of this server.
    """
    means, voters = _average(batches, message, header, axis_name)
    words, scales, memory = [], [], list(kept)
    for batch, mean in zip(batches, means, strict=True):
        blocks, error = batch.blocks, jnp.concatenate(batch.of(kept), axis=1)
        real = jnp.concatenate(
            [is_real(shape, blocks.num_workers, worker.index) for shape in blocks.shapes], axis=1
        )
        part = jnp.where(real, add_memory(mean, error, decay), 0)[None]
        sizes = jnp.asarray(blocks.sizes())[worker.index][None]
        scale = rounded(mean_magnitudes(part, sizes, blocks), batch.rounds_to)
        word, left = compress_parts(part, scale, worker.coin, blocks)
        words.append(word)
        scales.append(scale)
        error = jnp.where(real & (voters > 0), left[0], error)
        edges = np.cumsum(blocks.columns)[:-1]
        _put(memory, batch.positions, jnp.split(error, edges, axis=1))
    down, voters = _share(write(words, scales), voters, axis_name)
    settled = list(kept)
    for batch, (word, scale) in zip(batches, read(down, batches), strict=True):
        blocks = batch.blocks
        if batch.in_parts:
            updates = take_apart(expand_parts(word, scale, blocks), blocks)
        else:
            updates = [expand_leaf(word, scale, blocks.shapes[0])]
        _put(settled, batch.positions, updates)
    return settled, voters, memory


def _average(
    batches: Sequence[Batch], message: jax.Array, header: jax.Array, axis_name: Hashable
) -> tuple[list[jax.Array], jax.Array]:
    """The means of what the voters sent of this worker's parts, f[32, S], and their number."""
    ballot_box = swap(seal([message], header), axis_name)  # u32[M, part]
    (received,), headers = unseal(ballot_box, [message.shape[1]])
    voters = jnp.sum(headers > 0, dtype=jnp.uint32)
    means = []
    for batch, (words, scales) in zip(batches, read(received, batches), strict=True):
        share = lax.optimization_barrier(scales / jnp.maximum(voters, 1).astype(scales.dtype))
        means.append(jnp.sum(expand_parts(words, share, batch.blocks), axis=0))
    return means, voters


def _share(
    message: jax.Array, voters: jax.Array, axis_name: Hashable
) -> tuple[jax.Array, jax.Array]:
    """Hands everybody what every server made of its part: u32[1, words] to u32[M, words].

    Also the number of voters, u32[1], which is the same on every worker by type too.
    """
    parts = gather(seal([message], voters)[0], axis_name)  # u32[M, part], 0 without voters
    (messages,), found = unseal(parts, [message.shape[1]])
    return messages, found[:1]
