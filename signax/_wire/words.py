"""Packed words: how they are counted without unpacking, and how they are sealed into messages.

The sum of M rows of bits is kept as *planes*: arrays of words that hold one binary digit of every
sum, least significant first. One bitwise operation then works on 32 coordinates.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from signax._wire.types import Array, Bool, UInt32

WORD_BITS = 32
ALL_BITS = np.uint32(0xFFFFFFFF)

# The number of rows that are added without a loop: more compile slowly, fewer pass on more carries.
CHUNK = 64


def spread(bit: Array | int) -> Array | np.uint32:
    """A word of 32 copies of one bit: a number in {0, 1} to one in {0, ALL_BITS}."""
    if isinstance(bit, int):
        return ALL_BITS if bit else np.uint32(0)
    return jnp.where(bit.astype(jnp.bool_), ALL_BITS, np.uint32(0))


def count(rows: UInt32[Array, "M *n"], *more: UInt32[Array, "*n"]) -> list[UInt32[Array, "*n"]]:
    """Add M + N rows of bits to the (M + N).bit_length() planes of their sum."""
    unlooped = len(rows) if len(rows) < 2 * CHUNK else len(rows) % CHUNK
    planes = _add([[*more, *rows[:unlooped]]])
    if unlooped == len(rows):
        return planes
    missing = (len(more) + len(rows)).bit_length() - len(planes)
    planes += [jnp.zeros_like(rows[0])] * missing

    def add_chunk(planes: list[Array], chunk: Array):
        first, *heavier = ([plane] for plane in planes)
        # The carry out of the last plane is 0, since the whole sum fits.
        return _add([[*first, *chunk], *heavier])[: len(planes)], None

    chunks = rows[unlooped:].reshape(-1, CHUNK, *rows.shape[1:])
    return lax.scan(add_chunk, planes, chunks)[0]


def _add(columns: list[list[Array]]) -> list[Array]:
    """Add lists of u32[n], of bits that weigh 1, 2, 4, ..., to the planes of the sum.

    A carry-save adder: three planes of one weight become one plane of that weight and one carry of
    the next, in five operations, until one plane of each weight is left.
    """
    planes, carries = [], []
    while columns or carries:
        pending, *columns = columns or [[]]
        pending, carries = [*pending, *carries], []
        while len(pending) > 1:
            a, b = pending.pop(0), pending.pop(0)
            half = a ^ b
            if pending:
                c = pending.pop(0)
                pending.append(half ^ c)
                carries.append((a & b) | (half & c))
            else:
                pending.append(half)
                carries.append(a & b)
        planes += pending
    return planes


def add_number(planes: Sequence[Array], number: int) -> list[Array]:
    """Add a number below 2^len(planes) to every sum; return one more plane."""
    ones = jnp.full_like(planes[0], ALL_BITS)
    columns = [[plane, ones] if number >> n & 1 else [plane] for n, plane in enumerate(planes)]
    added = _add(columns)
    return added + [jnp.zeros_like(ones)] * (len(planes) + 1 - len(added))


def at_least(planes: Sequence[Array], threshold: Array | int) -> Array:
    """The bits at which a sum is at least `threshold`: planes of u32[n] and u32[] to u32[n]."""
    reached = jnp.full_like(planes[0], ALL_BITS)  # as equal numbers do
    for weight, plane in enumerate(planes):
        wanted = spread((threshold >> weight) & 1)
        reached = (plane & reached) | ((plane | reached) & ~wanted)
    return reached


def exceeds(planes: Sequence[Array], others: Sequence[Array]) -> Array:
    """The bits at which one sum exceeds another: planes and planes to u32[n]."""
    above = jnp.zeros_like(planes[0])
    for plane, other in zip(planes, others, strict=True):
        above = (plane & ~other) | (~(plane ^ other) & above)
    return above


# Agreement. A worker's own ballot moves the result, so the worker is compared with the majority of
# the *others*, and only where that majority is clear. There a worker whose ballots are random
# agrees on half of the coordinates, however many workers there are.

MARGIN = 3  # the lead, in ballots, of a clear majority
LEAST_VOTERS = MARGIN + 1


def compare(
    plus: UInt32[Array, "M n"],
    minus: UInt32[Array, "M n"],
    plus_planes: Sequence[Array],
    minus_planes: Sequence[Array],
) -> UInt32[Array, "2 M"]:
    """Count the coordinates on which each worker agrees and disagrees with the others.

    With S the sum of all ballots, the sum of the others' is S - 1 for a worker that voted +1. Such
    a worker agrees where S is at least 4, and disagrees where S is at most -2.

    Args:
      plus: the ballots for +1.
      minus: the ballots for -1.
      plus_planes: the planes of the sum of `plus`.
      minus_planes: the planes of the sum of `minus`.
    """
    up, down = _lead(plus_planes, minus_planes, MARGIN - 1)
    far_up, far_down = _lead(plus_planes, minus_planes, MARGIN + 1)
    agree = (plus & far_up) | (minus & far_down)
    disagree = (minus & up) | (plus & down)
    counts = [lax.population_count(x) for x in (agree, disagree)]
    zeros = [np.uint32(0)] * 2
    # A single reduction of both reads the words once.
    return jnp.stack(lax.reduce(counts, zeros, _add_each, (1,)))


def _add_each(left: Sequence[Array], right: Sequence[Array]) -> list[Array]:
    # Not a lambda: outside `jax.jit`, JAX compiles a reduction again for every new function.
    return list(map(lax.add, left, right))


def _lead(plus: Sequence[Array], minus: Sequence[Array], least: int) -> tuple[Array, Array]:
    """Where votes for +1 lead by at least `least`, and where votes for -1 do: u32[1, n] each."""

    def leads(counted: Sequence[Array], others: Sequence[Array]):
        return exceeds(add_number(counted, 0), add_number(others, least - 1))[None]

    return leads(plus, minus), leads(minus, plus)


def compare_sums(own: Sequence[Array], totals: Sequence[Array]) -> UInt32[Array, "n 2"]:
    """Count the coordinates of each leaf on which this worker agrees and disagrees with the others.

    Args:
      own: this worker's ballots on n leaves, integers of -1, 0 and +1.
      totals: the sums of all workers' ballots, in the same shapes.
    """
    counts = []
    for ballot, total in zip(own, totals, strict=True):
        others = total - ballot
        clear = jnp.abs(others) >= MARGIN
        same, opposite = (ballot * jnp.sign(others) == sign for sign in (1, -1))
        counts.append([jnp.sum(clear & x, dtype=jnp.uint32) for x in (same, opposite)])
    return jnp.stack([jnp.stack(pair) for pair in counts])


def add_up(counts: UInt32[Array, "n k"]) -> Array:
    """The sums, f32[k], of n < 2^16 counts each, which may exceed 32 bits."""
    low, high = (jnp.sum(half, axis=0) for half in (counts & 0xFFFF, counts >> 16))
    high, low = high + (low >> 16), low & 0xFFFF  # so that only the last sum is rounded
    return high.astype(jnp.float32) * 2**16 + low.astype(jnp.float32)


# Messages. A sealed message is u32[n / 128, 128], which TPUs lay out in rows of 128 lanes.

LANES = 128
LARGE_PART = 128 * LANES  # words; from this size on parts are rounded up to a multiple of LANES
GATHER_WORDS = 1 << 13  # the extra words worth sending to save one collective


class Headers(NamedTuple):
    """The headers of all workers, read together.

    Attributes:
      voters: u32[], the number of workers that take part.
      coin: u32[], a word of one bit: one more vote on every coordinate, which breaks ties.
      dead: u32[] in {0, 1}, the decision on a coordinate where every ballot is a dithered zero.
    """

    voters: UInt32[Array, ""]
    coin: UInt32[Array, ""]
    dead: UInt32[Array, ""]


@jax.named_scope("signax.pack")
def make_header(
    worker: UInt32[Array, ""],
    coin: UInt32[Array, ""],
    tie: UInt32[Array, ""],
    participates: Bool[Array, ""],
) -> UInt32[Array, ""]:
    """The header of a worker's message, 0 if the worker does not take part.

    Otherwise bit 0 breaks ties and is the same on every worker, bit 1 is the worker's coin for its
    zero ballots, and the other bits are its index + 1.
    """
    header = jnp.where(participates, 4 * (worker + 1) + 2 * coin + tie, 0)
    return lax.optimization_barrier(header)  # or XLA recomputes the header for every word


def worker_of(header: UInt32[Array, ""]) -> UInt32[Array, ""]:
    """The index of the worker that sent a header; meaningless for a header of 0."""
    return (header >> 2) - 1


def header_bits(headers: UInt32[Array, "*n"]) -> tuple[UInt32[Array, "*n"], ...]:
    """Whether each worker takes part, its coin, and the bit that breaks ties: 0 or 1 each."""
    return (headers > 0).astype(jnp.uint32), (headers >> 1) & 1, headers & 1


def count_voters(headers: UInt32[Array, " M"]) -> UInt32[Array, ""]:
    """The number of workers that take part."""
    return jnp.sum(headers > 0, dtype=jnp.uint32)


def dead_decision(
    coins: UInt32[Array, ""], voters: UInt32[Array, ""], tie: UInt32[Array, ""]
) -> UInt32[Array, ""]:
    """The decision where every ballot is a dithered zero, 0 without voters.

    A worker's dithered bit is 1 if its coin is 0, relative to the coordinate. `coins` is the sum of
    the voters' coins.
    """
    extra = jnp.where(voters % 2 == 0, tie, 0)
    return ((voters - coins + extra >= voters // 2 + 1) & (voters > 0)).astype(jnp.uint32)


def read_headers(headers: UInt32[Array, " M"]) -> Headers:
    """Read the headers of M workers."""
    # A single reduction is one kernel.
    fields = [*header_bits(headers)]
    voters, coins, ties = lax.reduce(fields, [np.uint32(0)] * 3, _add_each, (0,))
    tie = (ties > 0).astype(jnp.uint32)
    dead = dead_decision(coins, voters, tie)
    # Among an even number of voters the coin is one more vote, which breaks ties and only ties.
    coin = jnp.where(voters % 2 == 0, spread(tie), 0)
    # Without the barrier XLA computes both inside the counting loops.
    voters, coin = lax.optimization_barrier((voters, coin))
    return Headers(voters, coin, dead)


def sum_dtype(num_workers: int) -> np.dtype:
    """The smallest integers that hold a sum of M ballots."""
    return next(
        np.dtype(dtype)
        for dtype in (jnp.int8, jnp.int16, jnp.int32)
        if num_workers <= jnp.iinfo(dtype).max
    )


def words_of(count: int, dtype: Any) -> int:
    """The number of 32-bit words that hold `count` numbers of a dtype."""
    return -(-count * np.dtype(dtype).itemsize // 4)


def to_words(numbers: Array) -> Array:
    """Reinterpret the bits of numbers of 2, 4 or 8 bytes: f[n, count] to u32[n, words]."""
    if numbers.dtype.itemsize == 2:
        numbers = jnp.pad(numbers, ((0, 0), (0, numbers.shape[1] % 2)))
        numbers = numbers.reshape(len(numbers), -1, 2)
    words = lax.bitcast_convert_type(numbers, jnp.uint32)
    return words.reshape(len(words), -1)


def from_words(words: Array, count: int, dtype: Any) -> Array:
    """Invert `to_words`."""
    if np.dtype(dtype).itemsize == 8:
        words = words.reshape(len(words), -1, 2)
    numbers = lax.bitcast_convert_type(words, dtype)
    return numbers.reshape(len(numbers), -1)[:, :count]


def sealed_words(payload: int) -> int:
    """The length in words of a sealed message that carries `payload` words and a header."""
    return -(-(payload + 1) // LANES) * LANES


def part_words(words: int, num_workers: int) -> int:
    """The words of one plane that one server combines."""
    part = -(-words // num_workers)
    return part if part < LARGE_PART else -(-part // LANES) * LANES


def choose_transport(up: int, down: int, num_workers: int) -> Literal["packed", "gather"]:
    """The faster transport for a message of `up` words and a reply of `down` words.

    For two workers and as many words down as up, both transports send the same bytes.
    """
    more = (num_workers - 1) * (up * (num_workers - 1) - down) // num_workers
    return "gather" if more <= GATHER_WORDS else "packed"


@jax.named_scope("signax.pack")
def seal(
    planes: Sequence[UInt32[Array, "n _"]], header: UInt32[Array, ""]
) -> UInt32[Array, "n rows 128"]:
    """Lay planes end to end and append the header; a header of 0 blanks the planes."""
    flat = jnp.concatenate(planes, axis=1)
    sealed = lax.platform_dependent(flat, header, cpu=_seal_flat, default=_seal_rows)
    # For an all_to_all, XLA for CPUs and GPUs takes a slice for each worker. Without the barrier
    # it would seal the message again in each slice.
    return lax.optimization_barrier(sealed)


def _seal_flat(flat: UInt32[Array, "n words"], header: Array) -> UInt32[Array, "n rows 128"]:
    """Seal words end to end: XLA for CPUs compiles padding of rows slowly."""
    words = flat.shape[1]
    padded = jnp.pad(flat, ((0, 0), (0, sealed_words(words) - words)))
    is_header = lax.broadcasted_iota(jnp.int32, padded.shape, 1) == words
    sealed = jnp.where(is_header, header, jnp.where(header > 0, padded, 0))
    return sealed.reshape(len(flat), -1, LANES)


def _seal_rows(flat: UInt32[Array, "n words"], header: Array) -> UInt32[Array, "n rows 128"]:
    """Seal words in rows: XLA for TPUs would copy words that lie end to end once more."""
    row, lane = divmod(flat.shape[1], LANES)
    if lane:
        flat = jnp.pad(flat, ((0, 0), (0, LANES - lane)))
    rows = flat.reshape(len(flat), -1, LANES)
    rows = jnp.pad(rows, ((0, 0), (0, row + 1 - rows.shape[1]), (0, 0)))
    row_of, lane_of = (lax.broadcasted_iota(jnp.int32, rows.shape, axis) for axis in (1, 2))
    is_header = (row_of == row) & (lane_of == lane)
    return jnp.where(is_header, header, jnp.where(header > 0, rows, 0))


def unseal(
    sealed: UInt32[Array, "n rows 128"], widths: Sequence[int]
) -> tuple[list[UInt32[Array, "n _"]], UInt32[Array, " n"]]:
    """Invert `seal` for planes of the given widths: return the planes and the headers."""
    stops = np.cumsum(widths).tolist()
    row, lane = divmod(stops[-1], LANES)
    flat = sealed[:, : row + (lane > 0)].reshape(len(sealed), -1)
    planes = [flat[:, stop - width : stop] for width, stop in zip(widths, stops, strict=True)]
    return planes, sealed[:, row, lane]
