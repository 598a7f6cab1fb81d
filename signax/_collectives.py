"""The exchange: collectives over the workers of one mapped axis.

A vote on a tree, with three workers (each row is a worker, each letter a part of the packed tree):

    pack          all_to_all      count        all_gather      unpack
    [a1 b1 c1]    [a1 a2 a3]      [A]          [A B C]         +-1 for every leaf
    [a2 b2 c2] -> [b1 b2 b3]  ->  [B]      ->  [A B C]     ->
    [a3 b3 c3]    [c1 c2 c3]      [C]          [A B C]

Worker k counts part k for everybody, a sharded parameter server. The same, as it runs on a list:

    >>> workers = [[-1.0, 3.0, 2.0], [-4.0, -1.0, 1.0], [0.5, -2.0, 7.0]]
    >>> parts = list(zip(*workers))                                  # all_to_all
    >>> [1 if sum(b > 0 for b in part) >= 2 else -1 for part in parts]    # count, all_gather
    [-1, -1, 1]
"""

from collections.abc import Hashable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from signax import _bits
from signax._ballots import Coins, Ties, Zeros, ballots, takes_part, toss
from signax._checks import check_axis_name, check_floating, check_mode
from signax._numerics import wide_dtype
from signax._specs import varies

Transport = Literal["auto", "packed"]


def pvote(
    tree: Any,
    axis_name: Hashable,
    *,
    step: jax.Array | int | None = None,
    zeros: Zeros = "dither",
    ties: Ties = "dither",
    active: jax.Array | bool | None = None,
    transport: Transport = "auto",
) -> Any:
    r"""Decides the sign of every coordinate by majority vote, one bit each way.

    With :math:`b_i \in \{+1, -1, 0\}` the sign of worker i's value on a coordinate and S the
    workers that take part,

    .. math:: v = \operatorname{sign} \sum_{i \in S} b_i

    with zero ballots and ties settled as `zeros` and `ties` say. It is shaped like
    :func:`jax.lax.psum` and runs under `jax.shard_map`, `jax.pmap` and `jax.vmap(axis_name=...)`,
    in one `all_to_all` and one `all_gather` of packed 32-bit words for the whole tree. The result
    is the same on every worker, which the types of `jax.shard_map` show.

    Args:
      tree: this worker's values; any pytree of floating-point arrays of any shape. Under
        `jax.shard_map` with `check_vma=True` every leaf must vary over the axis. NaN is no ballot,
        and a worker with a NaN or an infinity anywhere in its tree is out.
      axis_name: the mapped axis along which the workers lie. Leaves that vary over different
        further axes of a `shard_map` want a call each, since JAX types one exchange as a whole.
      step: int32[], counts steps from 0 and is the same on every worker. It drives the dither, and
        may be left out only where nothing is dithered.
      zeros: `"dither"` turns a zero ballot into +-1 so that it cancels over workers and steps;
        `"abstain"` lets it count for nothing, at two bits each way; `"plus"` makes it +1.
      ties: `"dither"` settles a tie by a coin that every worker tosses alike, `"plus"` by +1, which
        drifts. With `zeros="abstain"` a tie is 0 whatever `ties` says.
      active: bool[], whether this worker takes part; by default it does.
      transport: `"packed"`, or `"auto"`, which chooses it.

    Returns:
      A tree like `tree`, of +1 and -1 in each leaf's dtype; with `zeros="abstain"` of 0 too. If no
      worker takes part, every coordinate is 0.

    Raises:
      NameError: `axis_name` is not bound.
      TypeError: a leaf is not real floating-point, or `axis_name`, `step` or `active` is of the
        wrong kind.
      ValueError: a mode is unknown, `step` is missing, or a leaf does not vary over the axis.

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
    check_vote_options(axis_name, zeros, ties, transport)
    check_votable(tree, axis_name)
    voter = find_voter(tree, axis_name, step=step, zeros=zeros, ties=ties, active=active)
    return exchange_votes(tree, axis_name, voter, zeros=zeros, ties=ties)


def check_vote_options(axis_name: Hashable, zeros: str, ties: str, transport: str) -> None:
    """Refuses options that no vote has."""
    check_axis_name(axis_name)
    check_mode("zeros", zeros, ("dither", "abstain", "plus"))
    check_mode("ties", ties, ("dither", "plus"))
    check_mode("transport", transport, ("auto", "packed"))


def check_votable(tree: Any, axis_name: Hashable) -> None:
    """Refuses leaves that are not floating-point, or that are known to be equal on all workers."""
    check_floating(tree)
    if not varies(worker_index(axis_name), axis_name):
        return  # vmap, pmap and check_vma=False type everything as invariant
    for path, leaf in jax.tree.leaves_with_path(tree):
        if leaf.size and not varies(leaf, axis_name):
            raise ValueError(
                f"updates{jax.tree_util.keystr(path)} does not vary over axis {axis_name!r}, so "
                "there is nothing to decide. In jax.shard_map the gradient with respect to "
                "replicated parameters is already summed over the workers: take it with respect to "
                f"jax.lax.pcast(params, {axis_name!r}, to='varying'), or use "
                "signax.DataParallel.value_and_grad. Freeze leaves after the vote, not before."
            )


def worker_index(axis_name: Hashable) -> jax.Array:
    """This worker's index along the axis: i32[]."""
    try:
        return lax.axis_index(axis_name)
    except NameError:
        raise NameError(
            f"axis_name={axis_name!r} is not bound here: bind it with signax.DataParallel(tx, mesh,"
            f" {axis_name!r}), jax.shard_map over a mesh that has it, "
            f"jax.pmap(axis_name={axis_name!r}) or jax.vmap(axis_name={axis_name!r})"
        ) from None


class Voter(NamedTuple):
    """What a vote must know of a worker beside its values.

    Attributes:
      header: u32[], the worker's index + 1, or 0 if it is out.
      coins: for its zero ballots and for ties.
    """

    header: jax.Array
    coins: Coins


def find_voter(
    tree: Any,
    axis_name: Hashable,
    *,
    step: jax.Array | int | None,
    zeros: Zeros,
    ties: Ties,
    active: jax.Array | bool | None,
) -> Voter:
    """This worker as a voter, which is found on the whole tree, not on a block of it."""
    if step is None:
        if zeros == "dither" or (zeros == "plus" and ties == "dither"):
            raise ValueError(
                f"step=None, but zeros={zeros!r} with ties={ties!r} needs it for the dither: pass "
                "the number of the step, the same on every worker"
            )
        step = 0
    step = jnp.asarray(step)
    if step.shape or not jnp.issubdtype(step.dtype, jnp.integer):
        raise TypeError(f"step={step!r} must be one integer")
    worker = worker_index(axis_name).astype(jnp.uint32)
    return Voter(
        header=jnp.where(takes_part(tree, active), worker + 1, 0),
        coins=toss(step, worker, lax.axis_size(axis_name)),
    )


def exchange_votes(
    tree: Any, axis_name: Hashable, voter: Voter, *, zeros: Zeros, ties: Ties
) -> Any:
    """The vote itself, on checked arguments."""
    leaves, structure = jax.tree.flatten(tree)
    if not any(leaf.size for leaf in leaves):
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)
    num_workers = lax.axis_size(axis_name)

    planes = [  # one or two of u32[words]
        jnp.concatenate([_bits.pack(bits) for bits in plane])
        for plane in zip(*(ballots(leaf, zeros, voter.coins.zero) for leaf in leaves), strict=True)
    ]
    share = -(-planes[0].size // num_workers)
    ballot_box = _cut(planes, share, num_workers, voter.header)  # u32[M, part]

    # Under vmap this is right only for a batched operand, which the sender's index makes it.
    received = lax.all_to_all(ballot_box, axis_name, 0, 0, tiled=True)  # u32[M, part]
    voters = jnp.sum(received[:, 0] != 0, dtype=jnp.uint32)
    rows = received[:, 1 : 1 + len(planes) * share].reshape(num_workers, len(planes), share)
    result = _decide(rows, voters, ties, voter.coins.tie)  # u32[planes, share]
    part = jnp.concatenate([voters[None], result.reshape(-1)])
    part = jnp.pad(part, (0, ballot_box.shape[1] - part.size))
    parts = gather(part, axis_name)  # u32[M, part]

    # Read here the voters are the same on every worker, by type too; above they are not.
    voters = parts[0, 0]
    decided = parts[:, 1 : 1 + len(planes) * share].reshape(num_workers, len(planes), share)
    decided = jnp.swapaxes(decided, 0, 1).reshape(len(planes), -1)  # u32[planes, M * share]
    return structure.unflatten(_read_signs(decided, voters, leaves))


def _cut(planes: Sequence[jax.Array], share: int, num_workers: int, header: jax.Array) -> jax.Array:
    """Cuts u32[words] planes into one part per worker: header, shares, padding to u32[M, part]."""
    padding = num_workers * share - planes[0].size
    shares = [jnp.pad(plane, (0, padding)).reshape(num_workers, share) for plane in planes]
    payload = jnp.where(header > 0, jnp.concatenate(shares, axis=1), 0)
    column = jnp.broadcast_to(header, (num_workers, 1))
    part = _bits.part_words(planes[0].size, num_workers, len(planes))
    tail = part - 1 - payload.shape[1]
    return jnp.pad(jnp.concatenate([column, payload], axis=1), ((0, 0), (0, tail)))


def _decide(rows: jax.Array, voters: jax.Array, ties: Ties, tie_coin: jax.Array) -> jax.Array:
    """Counts the ballots of M workers: u32[M, planes, n] to u32[planes, n]."""
    plus = list(rows[:, 0])
    if rows.shape[1] == 2:
        for_plus, for_minus = _bits.count(plus), _bits.count(list(rows[:, 1]))
        return jnp.stack([_bits.exceeds(for_plus, for_minus), _bits.exceeds(for_minus, for_plus)])
    # Among an even number of voters the coin is one more vote, which decides ties and only ties.
    coin = _bits.ALL_BITS if ties == "plus" else _bits.EVEN_BITS ^ _bits.spread(tie_coin)
    coin = jnp.where(voters % 2 == 0, coin, 0)
    counted = _bits.count([*plus, jnp.broadcast_to(coin, plus[0].shape)])
    return _bits.at_least(counted, voters // 2 + 1)[None]


def gather(array: jax.Array, axis_name: Hashable) -> jax.Array:
    """all_gather whose result counts as replicated where types can tell: [...] to [M, ...]."""
    if varies(array, axis_name):
        return lax.all_gather(array, axis_name, to="invarying")
    return lax.all_gather(array, axis_name)


def _read_signs(
    decided: jax.Array, voters: jax.Array, leaves: Sequence[jax.Array]
) -> list[jax.Array]:
    """Unpacks the words of all leaves, laid end to end, to +-1 like each leaf; 0 without voters."""
    signs, start = [], 0
    for leaf in leaves:
        stop = start + _bits.num_words(leaf.size)
        plus, *minus = (_bits.unpack(plane[start:stop], leaf.shape, leaf.size) for plane in decided)
        if minus:
            sign = plus.astype(leaf.dtype) - minus[0].astype(leaf.dtype)
        else:
            one = (voters > 0).astype(leaf.dtype)
            sign = jnp.where(plus, one, -one)
        signs.append(sign)
        start = stop
    return signs


def mean_active(tree: Any, axis_name: Hashable, active: jax.Array) -> Any:
    """The mean over the workers that are active, accumulated in at least f32; 0 if none is."""
    leaves, structure = jax.tree.flatten(tree)
    wide = [leaf.astype(wide_dtype(leaf.dtype)) for leaf in leaves]
    # Not a product: an infinity times zero is NaN.
    counted = [jnp.where(active, leaf, 0) for leaf in wide]
    sums, voters = lax.psum((counted, active.astype(jnp.float32)), axis_name)
    means = [total / jnp.maximum(voters, 1).astype(total.dtype) for total in sums]
    return structure.unflatten(
        [mean.astype(leaf.dtype) for mean, leaf in zip(means, leaves, strict=True)]
    )
