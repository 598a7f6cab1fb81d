"""A job's connection to a vote server that may have shards.

A ballot is cut into a part for each server. The parts travel at once, each to its server, but the
main server gets the last byte of its part only after all shards have said that they hold theirs.
To the main server a ballot is there when it is there everywhere.
"""

import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import grpc
import numpy as np

from signax.elastic.connection import SHORTEST_PAUSE, Connection, VoteServerError
from signax.elastic.credentials import is_loopback, split_address
from signax.elastic.parts import cut, put_together
from signax.elastic.protocol import (
    Ballot,
    Decision,
    Done,
    Joined,
    digest_of,
    from_bytes,
    read_payload,
    to_pieces,
)

Decided = tuple[Decision, memoryview]


class _Vote:
    """One vote of a job in all servers, whose calls end together if one of them fails."""

    def __init__(self, num_shards: int):
        self._has_changed = threading.Condition()
        self._num_shards = num_shards
        self._holders: set[Any] = set()  # calls to shards that hold their parts
        self._calls: set[Any] = set()
        self._error: BaseException | None = None

    @contextlib.contextmanager
    def calling(self, make: Callable[[], Any]) -> Generator[Any]:
        """Make a call, which `end` cancels."""
        with self._has_changed:
            if self._error is not None:
                raise self._error
            call = make()
            self._calls.add(call)
        try:
            yield call
        finally:
            with self._has_changed:
                self._calls.discard(call)
                self._holders.discard(call)
                self._has_changed.notify_all()

    def hold(self, call: Any) -> None:
        """Note that a shard holds its part while a call to it goes on."""
        with self._has_changed:
            self._holders.add(call)
            self._has_changed.notify_all()

    def pieces(self, ballot: Ballot, part: memoryview, is_over: threading.Event) -> Iterator[bytes]:
        """The messages of the main server's part: the last byte waits for the shards."""
        yield from to_pieces(ballot, part[:-1])
        with self._has_changed:
            while len(self._holders) < self._num_shards:
                if is_over.is_set():
                    return
                self._has_changed.wait()
        yield bytes(part[-1:])

    def wake(self) -> None:
        """Have `pieces` find out whether its call is over."""
        with self._has_changed:
            self._has_changed.notify_all()

    def end(self, error: BaseException) -> BaseException:
        """Cancel all calls, allow no more, and return the first error of the vote."""
        with self._has_changed:
            self._error = self._error or error
            for call in self._calls:
                call.cancel()
            self._has_changed.notify_all()
            return self._error


class _Shard(Connection):
    """Calls a shard, for one slot."""

    def _join(self) -> Joined:
        raise VoteServerError(f"{self._address} is a vote server, and no shard: correct --shards")

    def vote_part(self, vote: _Vote, ballot: Ballot, part: memoryview) -> Decided:
        """Send a part, wait for the decision, and return this shard's part of it."""

        def attempt() -> Decided | None:
            pieces = to_pieces(ballot, part)
            with vote.calling(lambda: self._call("Vote", pieces, timeout=None)) as call:
                from_bytes(next(call), Done)
                vote.hold(call)
                try:
                    decision, first = from_bytes(next(call), Decision)
                    return decision, read_payload(decision, first, call)
                except grpc.RpcError as error:
                    self._handle(error)
                    return None  # the shard was there: its silence begins only now

        try:
            while (decided := self._persist(attempt)) is None:
                time.sleep(SHORTEST_PAUSE)
            return decided
        except BaseException as error:
            vote.end(error)
            raise


class ShardedConnection(Connection):
    """A `Connection` that knows shards, if the server names any.

    Args:
      address: the server, HOST:PORT.
      slot: the worker's number.
      token: the slot's token, if the server asks for tokens.
      credentials: gRPC's credentials of the channel; without them everything travels in plain text.
      give_up: the seconds without an answer after which a call raises an error.
      insecure: whether everything may travel in plain text beyond this machine.
    """

    def __init__(
        self,
        address: str,
        slot: int,
        token: str | None,
        credentials: Any,
        give_up: float,
        *,
        insecure: bool = False,
    ):
        super().__init__(address, slot, token, credentials, give_up)
        self._may_be_plain = insecure or credentials is not None
        self._open_shard: Callable[[str], _Shard] = lambda address: _Shard(
            address, slot, token, credentials, give_up
        )
        self._addresses: tuple[str, ...] = ()
        self._shards: list[_Shard] = []
        self._pool: Any = None

    def _join(self) -> Joined:
        joined = super()._join()
        if joined.shards != self._addresses:
            self._open_shards(joined.shards)
        return joined

    def _open_shards(self, addresses: tuple[str, ...]) -> None:
        if self._addresses:
            raise VoteServerError(
                f"the vote server {self._address} names the shards {', '.join(addresses)}, and "
                f"before it named {', '.join(self._addresses)}: connect again"
            )
        for address in addresses:
            host, _ = split_address(address)
            if not (self._may_be_plain or is_loopback(host)):
                raise VoteServerError(
                    f"the shard {address} is not on this machine, and without credentials ballots "
                    "travel in plain text: pass credentials=grpc.ssl_channel_credentials(), or "
                    "insecure=True if the network is yours alone"
                )
        self._addresses, self._shards = addresses, [*map(self._open_shard, addresses)]
        self._pool = concurrent.futures.ThreadPoolExecutor(len(addresses), "shard")

    def vote(self, sequence: int, participates: bool, bits: memoryview) -> Decided:
        """Send a ballot, wait for the decision, and return it with its words.

        With shards the words are whole, but the decision is the main server's: its `size` and
        `digest` describe the main server's part.
        """
        if not self._shards:
            return super().vote(sequence, participates, bits)
        assert self._plan is not None
        exchange, servers = self._plan.exchange(sequence), 1 + len(self._shards)
        parts = [memoryview(b"")] * servers
        if participates:
            arrays = cut(np.frombuffer(bits, "<u4"), exchange, servers)
            parts = [memoryview(array).cast("B") for array in arrays]
        digests = [*self._pool.map(digest_of, parts)]
        whole = digest_of("".join(digests).encode())
        self._check_repeat(sequence, whole)
        vote = _Vote(len(self._shards))

        def make_ballot(server: int) -> Ballot:
            size, digest = len(parts[server]), digests[server]
            return Ballot(self._slot, self._session, sequence, participates, size, digest, whole)

        answers = [
            self._pool.submit(shard.vote_part, vote, make_ballot(server), parts[server])
            for server, shard in enumerate(self._shards, 1)
        ]
        try:
            decided = self._persist(lambda: self._vote_main(vote, make_ballot(0), parts[0]))
            words = self._join_words(decided, [answer.result() for answer in answers])
        except BaseException as error:
            first = vote.end(error)
            if first is not error:
                raise first from error
            raise
        self._voted = sequence, whole
        return decided[0], words

    def _vote_main(self, vote: _Vote, ballot: Ballot, part: memoryview) -> Decided:
        is_over = threading.Event()
        pieces = vote.pieces(ballot, part, is_over) if part else to_pieces(ballot, part)
        try:
            with vote.calling(lambda: self._call("Vote", pieces, timeout=None)) as call:
                decision, first = from_bytes(next(call), Decision)
                return decision, read_payload(decision, first, call)
        finally:
            is_over.set()
            vote.wake()

    def follow(self, sequence: int, *, has_end: bool = True) -> Generator[Decided]:
        """The decisions from a sequence on, to the newest."""
        whole = super().follow(sequence, has_end=has_end)
        # A shard may hear of the newest decision later than the main server's workers.
        parts = [shard.follow(sequence, has_end=False) for shard in self._shards]
        with contextlib.ExitStack() as stack:
            for stream in (whole, *parts):
                stack.enter_context(contextlib.closing(stream))
            for decided in whole:
                others = [next(stream) for stream in parts]
                yield (decided[0], self._join_words(decided, others)) if others else decided

    def _join_words(self, decided: Decided, others: list[Decided]) -> memoryview:
        """The words of a decision, from all its parts."""
        assert self._plan is not None
        decision, _ = decided
        for address, (other, _) in zip(self._addresses, others, strict=True):
            if other[:4] != decision[:4]:
                raise VoteServerError(
                    f"the shard {address} has another decision than the vote server "
                    f"{self._address}: its log is not of this run"
                )
        words = [np.frombuffer(words, "<u4") for _, words in (decided, *others)]
        whole = put_together(words, self._plan.exchange(decision.sequence))
        return memoryview(whole).cast("B")

    def close(self) -> None:
        """Leave, if the server can be reached, and close the connections."""
        super().close()
        for shard in self._shards:
            shard.close()
        if self._pool is not None:
            self._pool.shutdown(wait=False)
