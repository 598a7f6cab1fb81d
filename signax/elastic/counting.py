"""Counting: the ballots of one vote to its decision, by the library's own counters.

The server does what each worker does in the `"gather"` transport: it stacks the sealed messages of
all workers in a table and calls the codec's `combine`. A slot that does not take part is a row of
zeros, whose header is 0. The decision is therefore the decision of a program with M workers, bit
for bit.
"""

import struct
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from signax._wire import words
from signax._wire.signs import Majority
from signax.elastic.plan import WORD_BYTES, Exchange, Plan
from signax.elastic.protocol import Decision, ProtocolError, digest_of

# Words of each plane that are compared with the decision: all would take as long as the count.
SAMPLE_WORDS = 1 << 16


class Counted(NamedTuple):
    """The result of a vote.

    Attributes:
      header: 2 * voters + dead, as in `signax._wire.types.Reply`.
      words: u32[n], the planes of the decision, end to end.
      equal_bits: the share of each voter's bits that are equal to the decision's, in a sample of
        words. Bits that only fill up a word belong to the share.
    """

    header: int
    words: NDArray[np.uint32]
    equal_bits: dict[int, float]


class Counter:
    """Counts the votes of a plan, on the CPU.

    It has one table of u32[M, n / 128, 128] for each kind of exchange, and compiles its programs at
    once. Callers never `put` while they `count`.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self._tables: dict[Exchange, NDArray[np.uint32]] = {}
        self._filled: dict[Exchange, set[int]] = {}  # rows that are not zero
        self._programs: dict[Exchange, Any] = {}
        for exchange in dict.fromkeys(plan.exchanges):
            table = _make_table(plan.num_workers, exchange.ballot_words)
            self._tables[exchange], self._filled[exchange] = table, set()
            program = jax.jit(partial(_count, exchange=exchange))
            self._programs[exchange] = program.lower(table).compile()

    def put(self, sequence: int, slot: int, ballot: memoryview) -> None:
        """Write the bytes of a slot's sealed message to its row."""
        exchange = self.plan.exchange(sequence)
        row = np.frombuffer(ballot, "<u4").reshape(-1, words.LANES)
        self._tables[exchange][slot] = row
        self._filled[exchange].add(slot)

    def check(self, sequence: int, slot: int, ballot: memoryview) -> None:
        """Raise unless the header of a sealed message names its slot."""
        exchange = self.plan.exchange(sequence)
        (header,) = struct.unpack_from("<I", ballot, WORD_BYTES * sum(exchange.widths))
        if header >> 2 != slot + 1:
            sender = f"worker {(header >> 2) - 1}" if header else "nobody"
            raise ProtocolError(f"the ballot's header names {sender}, and not slot {slot}")

    def count(self, sequence: int, voters: Collection[int]) -> Counted:
        """Count the ballots of the voters. Other rows are ignored."""
        exchange = self.plan.exchange(sequence)
        table, filled = self._tables[exchange], self._filled[exchange]
        for slot in filled - {*voters}:
            table[slot] = 0
        self._filled[exchange] = {*voters}
        decided, header, differing = jax.device_get(self._programs[exchange](table))
        bits = words.WORD_BITS * sum(
            len(range(0, width, _stride(width))) for width in exchange.widths
        )
        equal_bits = {slot: 1 - int(differing[slot]) / bits for slot in voters}
        return Counted(int(header), decided, equal_bits)


def make_decision(
    counted: Counted, sequence: int, present: Sequence[int], voters: Sequence[int]
) -> tuple[Decision, memoryview]:
    """The decision of a vote, and the bytes of its words."""
    words = memoryview(counted.words.astype("<u4", copy=False)).cast("B")
    decision = Decision(
        sequence=sequence,
        header=counted.header,
        present=tuple(present),
        voters=tuple(voters),
        wants_snapshot=False,
        size=len(words),
        digest=digest_of(words),
    )
    return decision, words


def _make_table(num_workers: int, ballot_words: int) -> NDArray[np.uint32]:
    """Zeros in memory that XLA uses without a copy, since it begins at a multiple of 64 bytes."""
    size = num_workers * ballot_words
    memory = np.zeros(size + 16, np.uint32)
    start = -(memory.ctypes.data // 4) % 16
    return memory[start : start + size].reshape(num_workers, -1, words.LANES)


def _count(sealed: Any, *, exchange: Exchange) -> tuple[Any, Any, Any]:
    """A table to u32[n], the header u32[], and u32[M] of differing bits in the sample."""
    context: Any = None  # which the codec does not read
    reply = Majority(exchange.rules).combine(sealed, exchange.widths, context)
    planes = lax.optimization_barrier(reply.planes)  # or XLA counts once more for the comparison
    ballots, _ = words.unseal(sealed, exchange.widths)
    stride = _stride(exchange.widths[0])
    differing = sum(
        jnp.sum(lax.population_count(rows[:, ::stride] ^ plane[::stride]), axis=1, dtype=jnp.uint32)
        for rows, plane in zip(ballots, planes, strict=True)
    )
    return jnp.concatenate(planes), reply.header, differing


def _stride(width: int) -> int:
    return -(-width // SAMPLE_WORDS)
