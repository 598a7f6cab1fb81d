"""Transports: the workers' packed messages in, the decision of the majority out, on every worker.

`"packed"`, with three workers (each row is a worker, each letter a part of the packed tree):

    pack          all_to_all      count        all_gather      unpack
    [a1 b1 c1]    [a1 a2 a3]      [A]          [A B C]         +-1 for every leaf
    [a2 b2 c2] -> [b1 b2 b3]  ->  [B]      ->  [A B C]     ->
    [a3 b3 c3]    [c1 c2 c3]      [C]          [A B C]

Worker k counts part k for everybody, a sharded parameter server. The same, as it runs on a list:

    >>> workers = [[-1.0, 3.0, 2.0], [-4.0, -1.0, 1.0], [0.5, -2.0, 7.0]]
    >>> parts = list(zip(*workers))                                  # all_to_all
    >>> [1 if sum(b > 0 for b in part) >= 2 else -1 for part in parts]    # count, all_gather
    [-1, -1, 1]

`"gather"` hands every message to everybody, who all count the whole: one collective instead of two,
and M / 2 times the bytes. `"int8"` sums ballots as small integers in an all-reduce.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from signax import _bits
from signax._agreement import compare
from signax._specs import axis_names, varies

Transport = Literal["auto", "packed", "gather", "int8"]
Planes = Sequence[jax.Array]  # u32[words] each: one for +1, or two, for +1 and for -1


class Settled(NamedTuple):
    """What whoever counts makes of the workers' parts.

    Attributes:
      planes: u32[share] each, of what was decided or counted.
      voters: u32[], how many workers took part.
      dead: u32[] in {0, 1}, the bit that is decided where every ballot is a dithered zero.
      agreed: u32[2, M], on how many coordinates each worker agrees and disagrees with the others,
        see `compare`; `None` where nobody asks.
    """

    planes: Planes
    voters: jax.Array
    dead: jax.Array
    agreed: jax.Array | None = None


# Of M workers' parts, u32[M, part], of so many planes of u32[share].
Settle = Callable[[jax.Array, int, int], Settled]

TRANSPORTS = ("auto", "packed", "gather", "int8")
LANES = 128  # words: parts of this multiple become a true all-gather on TPU, and need no new layout
LARGE_SHARE = 128 * LANES  # words: from here on shares are rounded up to that multiple as well
GATHER_WORDS = 1 << 13  # beyond those of "packed", which the time of a collective is worth


def share_words(words: int, num_workers: int) -> int:
    """The words of one plane that one worker counts."""
    share = -(-words // num_workers)
    return share if share < LARGE_SHARE else -(-share // LANES) * LANES


def part_words(payload: int) -> int:
    """The length in words of a part that carries so many, and a header behind them."""
    return -(-(payload + 1) // LANES) * LANES


def choose_transport(up: int, down: int, num_workers: int) -> Literal["packed", "gather"]:
    """What is faster for a message of `up` words that `down` words answer: fewer bytes or calls.

    For two workers and as many words down as up, both send the same bytes.
    """
    more = (num_workers - 1) * (up * (num_workers - 1) - down) // num_workers
    return "gather" if more <= GATHER_WORDS else "packed"


def send_packed(message: Planes, header: jax.Array, axis_name: Hashable, settle: Settle) -> Settled:
    """Cuts the message into parts, of which each worker counts one.

    Args:
      message: this worker's ballots.
      header: u32[], as `make_header` gives it.
      axis_name: the axis of the workers.
      settle: `decide`, one of its variants that compare, or `tally`.

    Returns:
      What `settle` makes of the whole, the same on every worker.
    """
    num_workers = lax.axis_size(axis_name)
    (words,) = message[0].shape
    share = share_words(words, num_workers)
    rows = [_pad(plane, num_workers * share).reshape(num_workers, share) for plane in message]
    ballot_box = swap(seal(rows, header), axis_name)  # u32[M, part]
    return _share(settle(ballot_box, len(message), share), axis_name, words)


def _share(part: Settled, axis_name: Hashable, words: int) -> Settled:
    """Hands what each has settled of its part to all, who join it to planes of so many words.

    What they read is the same for all by type too, which a part's voters are not.
    """
    rows = [plane[None] for plane in part.planes]
    if part.agreed is not None:
        rows.append(part.agreed.reshape(1, -1))
    sealed = seal(rows, 2 * part.voters + part.dead)  # the header is 0 without voters
    parts = gather(sealed[0], axis_name)  # u32[M, part]
    planes, headers = unseal(parts, [row.shape[1] for row in rows])
    agreed = None
    if part.agreed is not None:
        *planes, counts = planes
        agreed = jnp.sum(counts, axis=0).reshape(part.agreed.shape)
    joined = [plane.reshape(-1)[:words] for plane in planes]
    return Settled(joined, headers[0] >> 1, headers[0] & 1, agreed)


def send_gathered(
    message: Planes, header: jax.Array, axis_name: Hashable, settle: Settle
) -> Settled:
    """Hands the whole message to everybody: arguments and results as in `send_packed`."""
    sealed = seal([plane[None] for plane in message], header)[0]  # u32[part]
    return settle(gather(sealed, axis_name), len(message), message[0].size)


def send_in_parts(
    split_over: Hashable,
    place: jax.Array,
    message: Planes,
    header: jax.Array,
    axis_name: Hashable,
    transport: Transport,
    settle: Settle,
    planes_down: int,
) -> Settled:
    """Shares the exchange among devices that hold the same message, then gathers its result.

    This one takes the part at its place along `split_over`.
    """
    (words,) = message[0].shape
    devices = lax.axis_size(split_over)
    share = share_words(words, devices)
    part = [
        lax.dynamic_slice_in_dim(_pad(plane, devices * share), place * share, share)
        for plane in message
    ]
    settled = send(part, header, axis_name, transport, settle, planes_down)
    return _share(settled, split_over, words)


def _pad(plane: jax.Array, words: int) -> jax.Array:
    return jnp.pad(plane, (0, words - plane.size))


def send(
    message: Planes,
    header: jax.Array,
    axis_name: Hashable,
    transport: Transport,
    settle: Settle,
    planes_down: int,
) -> Settled:
    """Sends a packed message by `"packed"`, `"gather"`, or whichever of them is faster.

    `settle` answers the planes of the message with `planes_down` others.
    """
    if transport == "auto":
        words = message[0].size
        up, down = len(message) * words, planes_down * words
        transport = choose_transport(up, down, lax.axis_size(axis_name))
    sender = send_gathered if transport == "gather" else send_packed
    return sender(message, header, axis_name, settle)


class Sums(NamedTuple):
    """The result of an all-reduce of integers.

    Attributes:
      totals: the sums, of any shapes.
      voters: as in `Settled`.
      dead: as in `Settled`.
      tie: u32[] in {0, 1}, the bit that settles ties.
    """

    totals: list[jax.Array]
    voters: jax.Array
    dead: jax.Array
    tie: jax.Array


def send_summed(ballots: Sequence[jax.Array], header: jax.Array, axis_name: Hashable) -> Sums:
    """Sums integer ballots of -1, 0 and +1 of any shape."""
    counted = [jnp.where(header > 0, ballot, 0) for ballot in ballots]
    totals, (voters, coins, ties) = lax.psum((counted, _flags(header)), axis_name)
    tie = (ties > 0).astype(jnp.uint32)
    return Sums(totals, voters, _dead_bit(coins, voters, tie), tie)


def sum_dtype(num_workers: int) -> np.dtype:
    """The smallest integers that hold a sum of so many ballots."""
    return next(
        np.dtype(dtype)
        for dtype in (jnp.int8, jnp.int16, jnp.int32)
        if num_workers <= jnp.iinfo(dtype).max
    )


def make_header(
    worker: jax.Array, coin: jax.Array, tie: jax.Array, takes_part: jax.Array
) -> jax.Array:
    """What goes with a worker's message: u32[], 0 if the worker does not take part.

    Otherwise the lowest bit settles ties and is the same on every worker, the next one is the
    worker's coin for its zero ballots, and the other bits are its index + 1.
    """
    header = jnp.where(takes_part, 4 * (worker + 1) + 2 * coin + tie, 0)
    return lax.optimization_barrier(header)  # else it is computed anew for every word


def worker_of(header: jax.Array) -> jax.Array:
    """The index of the worker that a header comes from. Meaningless for a header of 0."""
    return (header >> 2) - 1


def _flags(headers: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Whether a worker votes, its coin, and the bit that settles ties: u32[...] in {0, 1} each."""
    return (headers > 0).astype(jnp.uint32), (headers >> 1) & 1, headers & 1


def _dead_bit(coins: jax.Array, voters: jax.Array, tie: jax.Array) -> jax.Array:
    """The bit that is decided where every ballot is a dithered zero: u32[], 0 without voters.

    The dithered bit of a worker is 1 if its coin is 0, relative to the coordinate; see `Rules`.
    """
    settles = jnp.where(voters % 2 == 0, tie, 0)
    return ((voters - coins + settles >= voters // 2 + 1) & (voters > 0)).astype(jnp.uint32)


# A part is kept as u32[part / 128, 128], "u32[part]" for short, which TPUs lay out in rows.


def seal(planes: Planes, header: jax.Array) -> jax.Array:
    """Lays planes end to end and a header behind: u32[n, share] each to u32[n, part].

    A header of 0 blanks the planes: who is out sends zeros.
    """
    flat = jnp.concatenate(planes, axis=1)
    row, lane = divmod(flat.shape[1], LANES)
    if lane:
        flat = jnp.pad(flat, ((0, 0), (0, LANES - lane)))
    parts = flat.reshape(len(flat), -1, LANES)
    parts = jnp.pad(parts, ((0, 0), (0, row + 1 - parts.shape[1]), (0, 0)))
    rows, lanes = (lax.broadcasted_iota(jnp.int32, parts.shape, axis) for axis in (1, 2))
    is_header = (rows == row) & (lanes == lane)
    return jnp.where(is_header, header, jnp.where(header > 0, parts, 0))


def unseal(parts: jax.Array, widths: Sequence[int]) -> tuple[Planes, jax.Array]:
    """What was sealed: u32[n, part] to planes of u32[n, width] each, and the headers, u32[n]."""
    stops = np.cumsum(widths).tolist()
    row, lane = divmod(stops[-1], LANES)
    flat = parts[:, : row + (lane > 0)].reshape(len(parts), -1)
    planes = [flat[:, stop - width : stop] for width, stop in zip(widths, stops, strict=True)]
    return planes, parts[:, row, lane]


class _Votes(NamedTuple):
    """The headers of all workers together, u32[] each.

    Attributes:
      voters: how many workers take part.
      coin: one more ballot on every coordinate, which decides ties.
      dead: as in `Settled`.
    """

    voters: jax.Array
    coin: jax.Array
    dead: jax.Array


def _read_headers(found: jax.Array) -> _Votes:
    """Reads the headers of M workers: u32[M]."""
    votes, coins, ties = _flags(found)
    voters, tie = jnp.sum(votes, dtype=jnp.uint32), jnp.max(ties)
    dead = _dead_bit(jnp.sum(coins, dtype=jnp.uint32), voters, tie)
    # Among an even number of voters the coin is one more vote, which decides ties and only ties.
    coin = jnp.where(voters % 2 == 0, _bits.spread(tie), 0)
    voters, coin = lax.optimization_barrier((voters, coin))  # else they are computed in the loops
    return _Votes(voters, coin, dead)


def decide(parts: jax.Array, planes: int, share: int) -> Settled:
    """Counts what M workers sealed: u32[M, part] to planes of u32[share] of the majority."""
    _, found = unseal(parts, [share] * planes)
    votes = _read_headers(found)
    if planes == 2:
        decided, _ = _decide_two(parts, share)
    else:
        decided = _decide_one(parts, [share], votes)
    return Settled(decided, votes.voters, votes.dead)


def decide_and_compare(parts: jax.Array, planes: int, share: int) -> Settled:
    """Decides from planes for +1 and for -1, and compares each worker with the others."""
    ballots, found = unseal(parts, [share] * planes)
    votes = _read_headers(found)
    decided, (plus, minus) = _decide_two(parts, share)
    return Settled(decided, votes.voters, votes.dead, compare(ballots, partial(_lead, plus, minus)))


def decide_and_compare_opinions(parts: jax.Array, planes: int, share: int) -> Settled:
    """Decides from a plane of ballots, and compares those that a second plane calls opinions."""
    (ballots, opinions), found = unseal(parts, [share] * planes)
    votes = _read_headers(found)
    decided = _decide_one(parts, [share] * planes, votes)
    own = ballots & opinions, opinions & ~ballots  # both 0 for an excluded worker
    plus, minus = (_bits.count(rows) for rows in own)
    return Settled(decided, votes.voters, votes.dead, compare(own, partial(_lead, plus, minus)))


# Whole parts are counted, whose length suits vectors of any processor, headers and all.


def _decide_one(parts: jax.Array, widths: Sequence[int], votes: _Votes) -> Planes:
    """The majority of the first plane: u32[M, part] to one u32[width]."""
    counted = _bits.count(parts, jnp.broadcast_to(votes.coin, parts.shape[1:]))
    result = lax.optimization_barrier(_bits.at_least(counted, votes.voters // 2 + 1))  # u32[part]
    (majority, *_), _ = unseal(result[None], widths)
    return [majority[0]]


def _decide_two(parts: jax.Array, share: int) -> tuple[Planes, tuple[Planes, Planes]]:
    """The planes for a majority of +1 and for one of -1, and the counts of both kinds of votes."""
    counted = lax.optimization_barrier(jnp.stack(_bits.count(parts)))  # u32[digits, part]
    (plus, minus), _ = unseal(counted, [share] * 2)
    plus, minus = list(plus), list(minus)
    return [_bits.exceeds(plus, minus), _bits.exceeds(minus, plus)], (plus, minus)


def _lead(plus: Planes, minus: Planes, least: int) -> tuple[jax.Array, jax.Array]:
    """Where votes for +1 lead by at least a number, and where votes for -1 do: u32[share]."""

    def leads(counted, others):
        return _bits.exceeds(_bits.add_number(counted, 0), _bits.add_number(others, least - 1))

    return leads(plus, minus), leads(minus, plus)


def tally(parts: jax.Array, planes: int, share: int) -> Settled:
    """Counts like `decide`, and gives the counts: the digits of each plane's, the lowest first."""
    _, found = unseal(parts, [share] * planes)
    counted = lax.optimization_barrier(jnp.stack(_bits.count(parts)))  # u32[digits, part]
    counts, _ = unseal(counted, [share] * planes)
    voters = jnp.sum(found > 0, dtype=jnp.uint32)
    return Settled([digit for count in counts for digit in count], voters, jnp.zeros_like(voters))


def swap(parts: jax.Array, axis_name: Hashable) -> jax.Array:
    """all_to_all: row k of every worker to worker k, as [M, ...].

    Under vmap it is right only for a batched operand, which a header with the sender's index makes.
    """
    return lax.all_to_all(parts, axis_name, 0, 0, tiled=True)


def gather(array: jax.Array, axis_name: Hashable) -> jax.Array:
    """all_gather whose result counts as replicated where types can tell: [...] to [M, ...]."""
    if varies(array, axis_name):
        return lax.all_gather(array, axis_name, to="invarying")
    shape = array.shape
    for axis in reversed(axis_names(axis_name)):  # vmap takes one axis at a time
        array = lax.all_gather(array, axis)
    return array.reshape(-1, *shape)
