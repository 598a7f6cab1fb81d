"""The main server's calls to its shards.

A thread for each shard tells it at once which votes are decided, and once a second whether or not
there is news: a shard that has restarted must hear it. Further threads have the shards count.
"""

import concurrent.futures
import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import grpc

from signax.elastic.commits import TURNS
from signax.elastic.log import Log
from signax.elastic.parts import part_of_plan
from signax.elastic.plan import Plan
from signax.elastic.protocol import (
    MAX_MESSAGE_BYTES,
    SERVICE,
    Done,
    ProtocolError,
    from_bytes,
    to_bytes,
)
from signax.elastic.rounds import Rounds
from signax.elastic.shard_messages import Count, Counted, Lead
from signax.elastic.status import log_event

INTERVAL = 1.0  # seconds between calls that ask whether a shard is there
TIMEOUT = 60.0  # seconds of a call; after them the shard hangs, as on a disk that does not write
SHORTEST_PAUSE, LONGEST_PAUSE = 0.05, 1.0  # seconds between attempts to have a shard count

Counts = concurrent.futures.Future[tuple[int, ...] | None]


def open_channel(address: str, credentials: Any = None) -> Any:
    """A channel to a shard; without credentials everything travels in plain text."""
    options = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", 10_000),  # a shard that is cut off is noticed
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
    ]
    if credentials is None:
        return grpc.insecure_channel(address, options)
    return grpc.secure_channel(address, credentials, options)


class Link:
    """The way to one shard.

    Args:
      server: the shard's number, from 1.
      address: its address.
      credentials: gRPC's credentials of the channel, or `None`.
      token: the main server's token, or `None`.
    """

    def __init__(self, server: int, address: str, credentials: Any, token: str | None):
        self.server, self.address = server, address
        self._problems: dict[str, str | None] = {"Lead": "the shard has not answered yet"}
        self.wake = threading.Event()
        self._channel: Any = open_channel(address, credentials)
        self._metadata = [("authorization", f"Bearer {token}")] if token else []

    @property
    def problem(self) -> str | None:
        """Why the last call of a kind failed; `None` if none did."""
        return next(filter(None, self._problems.values()), None)

    def call(self, name: str, message: Any, kind: Any) -> Any:
        """The answer to a message, or `None` if the call fails."""
        call = self._channel.stream_stream(f"/{SERVICE}/{name}")
        answer, problem = None, None
        try:
            pieces = call(iter([to_bytes(message)]), metadata=self._metadata, timeout=TIMEOUT)
            answer, _ = from_bytes(next(pieces), kind)
        except grpc.RpcError as error:
            status: Any = error
            problem = f"{status.code().name}: {status.details()}"
        except (StopIteration, ProtocolError) as error:
            problem = f"the answer cannot be read: {error}"
        if problem != self._problems.get(name):
            level = logging.WARNING if problem else logging.INFO
            log_event("shard", level, shard=self.server, address=self.address, problem=problem)
        self._problems[name] = problem
        return answer

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()


class Shards:
    """All shards of a run.

    Args:
      addresses: their addresses, HOST:PORT, in the order of the run.
      log: the main server's log.
      credentials: gRPC's credentials of the channels, or `None`.
      token: the main server's token, or `None`.
    """

    def __init__(
        self, addresses: Sequence[str], log: Log, credentials: Any = None, token: str | None = None
    ):
        self.addresses, self.servers, self._log = tuple(addresses), 1 + len(addresses), log
        self.links = [
            Link(server, address, credentials, token) for server, address in enumerate(addresses, 1)
        ]
        self._turns = itertools.count((log.starts + 1) * TURNS + 1)
        self._is_stopping, self._is_closing = threading.Event(), threading.Event()
        self._pool = concurrent.futures.ThreadPoolExecutor(len(addresses), "count")
        self._threads = [
            threading.Thread(target=self._lead, args=(link,), name="lead", daemon=True)
            for link in self.links
        ]

    def start(self) -> None:
        """Begin to lead the shards."""
        for thread in self._threads:
            thread.start()

    def tell(self) -> None:
        """Tell the shards that a decision, or the plan, is in the log."""
        for link in self.links:
            link.wake.set()

    def _lead(self, link: Link) -> None:
        cut: Plan | None = None
        while True:
            is_last, log = self._is_closing.is_set(), self._log
            if log.plan is not None and log.part is not None:
                cut = cut or part_of_plan(log.plan, link.server, self.servers)
                part = log.part._replace(server=link.server)
                link.call("Lead", Lead(part, cut, log.keep, log.next), Done)
            if is_last:
                return
            link.wake.wait(INTERVAL)
            link.wake.clear()

    def begin(self, rounds: Rounds) -> list[Counts]:
        """Have all shards count a closed round.

        Returns:
          For each shard, when it answers: the voters whose parts it lacks, or `None` if the main
          server stops before.
        """
        assert self._log.part is not None
        received = [rounds.slots[slot].received for slot in rounds.voters]
        make = partial(
            Count,
            run=self._log.part.run,
            sequence=rounds.sequence,
            present=rounds.present,
            voters=rounds.voters,
            ballots=tuple([one.digest for one in received if one is not None]),
        )
        return [self._pool.submit(self._count, link, make) for link in self.links]

    def _count(self, link: Link, make: Callable[..., Count]) -> tuple[int, ...] | None:
        pause = SHORTEST_PAUSE
        while True:
            counted = link.call("Count", make(turn=next(self._turns)), Counted)
            if counted is not None:
                return counted.lacking
            if self._is_stopping.wait(pause):
                return None
            pause = min(2 * pause, LONGEST_PAUSE)

    def stop_waiting(self) -> None:
        """Give up what shards do not answer."""
        self._is_stopping.set()

    def close(self) -> None:
        """Tell the shards the last decision, if they can be reached, and call them no more."""
        self._is_closing.set()
        self.tell()
        for thread in self._threads:
            thread.join()
        self._pool.shutdown()
        for link in self.links:
            link.close()

    def status(self) -> list[dict[str, Any]]:
        """The shards and their problems, as values of JSON."""
        return [{"address": link.address, "problem": link.problem} for link in self.links]
