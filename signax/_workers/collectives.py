"""Collectives over the workers along a mapped axis: votes and means, shaped like `lax.psum`."""

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from signax._core.checks import check_axis_name
from signax._core.leaves import check_votable
from signax._wire.ballots import Rules, Ties, Zeros
from signax._wire.exchange import ask_server, exchange, take_part
from signax._wire.feedback import ScaledSignsMemory, exchange_with_memory, make_scaled
from signax._wire.scaled_signs import ScaledSigns
from signax._wire.signs import Majority, MeanOfSigns
from signax._wire.types import Context, Leaves, Transport, make_route
from signax._wire.weights import make_majority
from signax._wire.words import make_header
from signax._workers.cuts import check_whole, cut_shape, scatter_dimensions


def pvote(
    tree: Any,
    axis_name: Hashable,
    *,
    step: jax.Array | int,
    zeros: Zeros = "dither",
    ties: Ties = "dither",
    active: jax.Array | bool | None = None,
    transport: Transport = "auto",
    split_over: Hashable | None = None,
    weights: Sequence[float] | None = None,
) -> Any:
    r"""Decide the sign of every coordinate by majority vote, one bit each way.

    With :math:`b_i \in \{+1, -1, 0\}` the sign of worker i's value on a coordinate, S the workers
    that take part and :math:`w_i` their weights, by default 1,

    .. math:: v = \operatorname{sign} \sum_{i \in S} w_i b_i

    where `zeros` and `ties` say how zero ballots and ties are decided. The vote is shaped like
    `jax.lax.psum` and runs under `jax.shard_map`, `jax.pmap` and `jax.vmap(axis_name=...)`, in one
    `all_to_all` and one `all_gather` of packed 32-bit words for the whole tree. The result is the
    same on every worker, as the types of `jax.shard_map` show.

    Args:
      tree: this worker's values; any pytree of floating-point arrays of any shape. Under
        `jax.shard_map` with `check_vma=True` every leaf must vary over the axis. NaN is no ballot,
        and a worker with a NaN or an infinity anywhere in its tree does not take part.
      axis_name: the mapped axis along which the workers lie, or a tuple of axes. Leaves that vary
        over different further axes of a `shard_map` need a call each, since JAX types one exchange
        as a whole.
      step: int32[], the number of the step, from 0, the same on every worker. It drives the dither.
      zeros: `"dither"` turns a zero ballot into +-1 that cancels over workers and steps;
        `"abstain"` does not count it, at two bits each way; `"plus"` makes it +1. Coordinates that
        are zero on all workers stay within one step if the same workers vote in both steps of each
        pair (0 and 1, 2 and 3, ...), and walk at random otherwise. :func:`signax.majority_vote`
        remembers such walks, and ties move these coordinates back.
      ties: `"dither"` breaks a tie by a coin that is the same on every worker, `"plus"` by +1,
        which drifts. With `zeros="abstain"` a tie is 0 in either mode.
      active: bool[], whether this worker takes part; by default it does.
      transport: how votes travel; the result is the same bit for bit. For M workers and d
        coordinates, `"packed"` sends :math:`2 \frac{M - 1}{M} \frac{d}{8}` bytes per worker in two
        collectives, and `"gather"` :math:`(M - 1) \frac{d}{8}` bytes in one. `"sum"` adds up
        ballots in an all-reduce of integers that are wide enough for M,
        :math:`2 \frac{M - 1}{M} d` bytes or more. `"auto"` takes `"gather"` for two workers and for
        small trees, else `"packed"`.
      split_over: an axis along which devices hold the same values, such as the chips of a slice
        after a mean. Each device then votes on its own part, and the parts are gathered along this
        axis, so the links between workers carry each bit once. Not for `"sum"`.
      weights: one finite number of at least 0 per worker, in the order of `lax.axis_index`, such as
        the sizes of unequal batches. Servers add up weighted ballots as f32 in this order, so sums
        of whole numbers below :math:`2^{24}` are exact. A worker with weight 0 is still counted as
        taking part. Weights change no message. Not for `"sum"`.

    Returns:
      A tree like `tree`, of +1 and -1 in each leaf's dtype; with `zeros="abstain"` of 0 too. If no
      worker takes part, every coordinate is 0.

    Raises:
      NameError: `axis_name` or `split_over` is not bound.
      TypeError: a leaf is not real floating-point, or `axis_name`, `split_over`, `step`, `active`
        or `weights` is of the wrong kind.
      ValueError: a mode is unknown, two options exclude one another, a leaf does not vary over the
        axis or varies over `split_over`, or `weights` are out of range or not one per worker.

    Examples:
      >>> import jax, jax.numpy as jnp, signax
      >>> gradients = jnp.array([[-1.0, 3.0, 2.0], [-4.0, -1.0, 1.0], [0.5, -2.0, 7.0]])
      >>> vote = lambda g: signax.pvote(g, "workers", step=0)
      >>> print(jax.vmap(vote, axis_name="workers")(gradients)[0])
      [-1. -1.  1.]

    References:
      Bernstein et al., `signSGD with Majority Vote is Communication Efficient and Fault Tolerant
      <https://arxiv.org/abs/1810.05291>`_, 2019
    """
    rules, route = Rules(zeros, ties), make_route(axis_name, transport, split_over)
    rules.check()
    if isinstance(weights, str):
        raise ValueError(f"weights={weights!r} needs a state: use signax.majority_vote")
    codec = make_majority(rules, weights, route.transport)
    return exchange(tree, codec, route, step=step, active=active, name="tree").updates


def pmean_signs(
    tree: Any,
    axis_name: Hashable,
    *,
    step: jax.Array | int,
    zeros: Zeros = "dither",
    active: jax.Array | bool | None = None,
    transport: Transport = "auto",
    split_over: Hashable | None = None,
) -> Any:
    r"""Average the signs of every coordinate: one bit up, the count down.

    With :math:`b_i \in \{+1, -1, 0\}` the sign of worker i's value on a coordinate and S the
    workers that take part,

    .. math:: v = \frac{1}{|S|} \sum_{i \in S} b_i

    exactly, except for one rounding to the leaf's dtype. The sum comes down in
    :math:`\lceil \log_2(M + 1) \rceil` bits for M workers. The mean is shaped like
    `jax.lax.pmean`, runs where :func:`signax.pvote` does, and is the same on every worker.

    Args:
      tree: this worker's values, as in :func:`signax.pvote`.
      axis_name: the mapped axis along which the workers lie, or a tuple of axes.
      step: int32[], the number of the step, from 0, the same on every worker. It drives the dither.
      zeros: `"dither"` turns a zero ballot into +-1 that cancels over workers and steps;
        `"abstain"` counts it as 0, at two bits up and two counts down; `"plus"` makes it +1. If
        voters change between the two steps of a pair, dithered zeros leave a random remainder: up
        to :math:`1 / |S|` per step for each worker that came or went.
      active: bool[], whether this worker takes part; by default it does.
      transport: as in :func:`signax.pvote`. `"packed"` sends :math:`\frac{M - 1}{M} \frac{d}{8}`
        bytes up, and this number times the bits of the count down. `"gather"` sends
        :math:`(M - 1) \frac{d}{8}` bytes.
      split_over: as in :func:`signax.pvote`.

    Returns:
      A tree like `tree`, of means between -1 and 1 in each leaf's dtype; 0 if no worker takes part.

    Raises:
      NameError: `axis_name` or `split_over` is not bound.
      TypeError: as in :func:`signax.pvote`.
      ValueError: as in :func:`signax.pvote`.

    Examples:
      >>> import jax, jax.numpy as jnp, signax
      >>> gradients = jnp.array([[-1.0, 3.0], [-4.0, -1.0], [-0.5, 2.0], [0.1, 7.0]])
      >>> mean = lambda g: signax.pmean_signs(g, "workers", step=0)
      >>> print(jax.vmap(mean, axis_name="workers")(gradients)[0])
      [-0.5  0.5]

    References:
      Safaryan and Richtarik, `Stochastic Sign Descent Methods: New Algorithms and Better Theory
      <https://arxiv.org/abs/1905.12938>`_, 2021
    """
    rules, route = Rules(zeros, "plus"), make_route(axis_name, transport, split_over)
    rules.check()
    return exchange(tree, MeanOfSigns(rules), route, step=step, active=active, name="tree").updates


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
    r"""Average scaled signs, with error feedback: one bit per coordinate and a scale per block.

    .. math:: p_i = g_i + \lambda e_i, \quad e_i \leftarrow p_i - C(p_i), \quad
      P = \frac{1}{|S|} \sum_{i \in S} C(p_i) + \lambda E, \quad E \leftarrow P - C(P), \quad
      C(p) = \frac{\lVert p \rVert_1}{d} \operatorname{sign}(p)

    over the workers S that take part. The result is :math:`C(P)`. Worker k is the server of the
    k-th part of every leaf, and keeps this part of E. Without E (`memory.server` is `None`) the
    result is P in full precision, and without e values are compressed as they are. A zero is sent
    as + or - the scale, so that it cancels over workers and steps (without memories only if the
    same workers take part in both steps of each pair). Memories subtract exactly what was sent.

    It runs where :func:`signax.pvote` does, in one `all_to_all` and one `all_gather`, and the
    result is the same on every worker.

    Args:
      tree: this worker's values, as in :func:`signax.pvote`.
      axis_name: the mapped axis along which the workers lie, or a tuple of axes.
      memory: the memory that the previous step returned, at first
        :func:`signax.scaled_signs_memory`.
      step: int32[], the number of the step, from 0, the same on every worker. It drives the dither.
      block: the coordinates that share a scale. With `"leaf"` a whole leaf shares one on the way
        up, and each server's part of a leaf on the way down. With a number, blocks of so many
        coordinates of a part have a scale each, both ways; the last block of a part may be smaller.
        In your own `jax.shard_map` over further axes, a leaf is this device's block of it.
      decay: the share :math:`\lambda` of the memories that is added, in [0, 1].
      active: bool[], whether this worker takes part; by default it does. A worker whose values are
        not finite does not. A worker that does not take part keeps its memory.

    Returns:
      A tree like `tree`, which is 0 if no worker takes part, and the new memory.

    Raises:
      NameError: `axis_name` is not bound.
      TypeError: a leaf is not real floating-point, or an argument is of the wrong kind.
      ValueError: an argument is out of range, the memory belongs to another tree or number of
        workers, or a leaf does not vary over the axis.

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
    codec = make_scaled(ScaledSigns, axis_name, memory, block, decay)
    outcome, memory = exchange_with_memory(
        tree, codec, axis_name, memory, step=step, active=active, name="tree"
    )
    return outcome.updates, memory


def pvote_scatter(
    tree: Any,
    axis_name: Hashable,
    *,
    scatter_dimension: Any = 0,
    step: jax.Array | int,
    zeros: Zeros = "dither",
    ties: Ties = "dither",
    active: jax.Array | bool | None = None,
) -> Any:
    r"""Decide signs by majority vote, and give each worker its own part of the result only.

    .. math:: v_k = \left( \operatorname{sign} \sum_{i \in S} b_i \right)_{\text{part } k}

    on worker k, with b and S as in :func:`signax.pvote`. The vote is for workers that each keep a
    part of the parameters (fully sharded data parallelism). Gradients go up in one bit per
    coordinate, in one `all_to_all` of packed words, and nothing comes down. The parameters
    themselves, which such workers gather before the forward pass, still travel in full precision.
    The vote is shaped like a tiled `jax.lax.psum_scatter`.

    Args:
      tree: this worker's values, as in :func:`signax.pvote`.
      axis_name: the mapped axis along which the workers lie, or a tuple of axes.
      scatter_dimension: the dimension along which a leaf is cut into M equal parts; worker k gets
        the k-th part. One integer, or a tree of integers like `tree`.
      step: see :func:`signax.pvote`.
      zeros: see :func:`signax.pvote`.
      ties: see :func:`signax.pvote`.
      active: see :func:`signax.pvote`.

    Returns:
      A tree like `tree` with shorter dimensions. It holds the result of :func:`signax.pvote` for
      this worker's part as a leaf of its own: the dither counts coordinates within the part.

    Raises:
      NameError: `axis_name` is not bound.
      TypeError: as in :func:`signax.pvote`, or a dimension is not an integer.
      ValueError: as in :func:`signax.pvote`, or a leaf cannot be cut into equal parts or is sharded
        over Explicit axes within a worker.

    Examples:
      >>> import jax, jax.numpy as jnp, signax
      >>> gradients = jnp.array([[-1.0, 3.0, 2.0], [-4.0, -1.0, 1.0], [0.5, -2.0, 7.0]])
      >>> vote = lambda g: signax.pvote_scatter(g, "workers", step=0)
      >>> print(jax.vmap(vote, axis_name="workers")(gradients))
      [[-1.]
       [-1.]
       [ 1.]]

    References:
      Bernstein et al., `signSGD with Majority Vote is Communication Efficient and Fault Tolerant
      <https://arxiv.org/abs/1810.05291>`_, 2019
    """
    codec = Majority(Rules(zeros, ties))
    codec.rules.check()
    check_axis_name(axis_name)
    check_votable(tree, axis_name, name="tree")
    check_whole(tree)
    num_workers = lax.axis_size(axis_name)
    dimensions = scatter_dimensions(tree, scatter_dimension, num_workers)
    leaves, structure = jax.tree.flatten(tree)
    shapes = [
        cut_shape(leaf, dimension, num_workers)
        for leaf, dimension in zip(leaves, dimensions, strict=True)
    ]
    parts = [
        jax.ShapeDtypeStruct(part, leaf.dtype)
        for leaf, (_, part) in zip(leaves, shapes, strict=True)
    ]
    nonempty = [n for n, part in enumerate(parts) if part.size]
    if not nonempty:
        return structure.unflatten([jnp.zeros(part.shape, part.dtype) for part in parts])
    worker = codec.worker(axis_name, step, None)
    rows = [leaf.reshape(shape) for leaf, (shape, _) in zip(leaves, shapes, strict=True)]
    with jax.named_scope("signax.pack"):
        encoded = jax.vmap(
            lambda values: codec.encode(Leaves(values, values), worker.coin, ()),
            in_axes=([dimensions[n] for n in nonempty],),
        )([rows[n] for n in nonempty])  # planes of u32[M, words], bool[M]
    participates = take_part(jnp.all(encoded.finite), active)
    header = make_header(worker.index, worker.coin, worker.tie, participates)
    combine = jax.named_scope("signax.count")(codec.combine)
    combine = partial(combine, context=Context(Leaves([], []), worker, []))
    reply = ask_server(encoded.message, header, axis_name, combine)
    with jax.named_scope("signax.unpack"):
        return structure.unflatten(codec.decode(reply, Leaves([], parts)))
