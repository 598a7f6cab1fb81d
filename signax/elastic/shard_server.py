"""The gRPC service of a shard: a vote server's calls for workers, and two for the main server."""

from collections.abc import Iterator
from typing import Any

from signax.elastic.credentials import MAIN, Credentials
from signax.elastic.protocol import Done, to_bytes
from signax.elastic.refusals import Reason, RefusedError
from signax.elastic.server import Tls, VoteServer
from signax.elastic.shard import Shard
from signax.elastic.shard_messages import Count, Counted, Lead


class ShardServer(VoteServer):
    """Serves a shard on an address until it is stopped, or until the log fails.

    Args:
      shard: counts the parts.
      address: where to listen, HOST:PORT; port 0 takes a free one.
      credentials: who may call.
      tls: the files of TLS; without them everything travels in plain text.
    """

    def __init__(
        self, shard: Shard, address: str, credentials: Credentials, tls: Tls | None = None
    ):
        self._shard = shard
        decider: Any = shard  # which does for the calls below what a decider does
        super().__init__(decider, address, credentials, tls)

    def _calls_served(self) -> dict[str, Any]:
        return {
            "Vote": self._vote,
            "Decisions": self._decisions,
            "Lead": self._lead,
            "Count": self._count,
            "Status": self._status,
        }

    def _lead(self, requests: Any, context: Any, slot: int | None) -> Iterator[bytes]:
        del context
        _check_main(slot)
        message, _ = self._read(requests, Lead, slot)
        self._shard.lead(message)
        yield to_bytes(Done())

    def _count(self, requests: Any, context: Any, slot: int | None) -> Iterator[bytes]:
        del context
        _check_main(slot)
        message, _ = self._read(requests, Count, slot)
        yield to_bytes(Counted(self._shard.count(message)))


def _check_main(slot: int | None) -> None:
    """Raise unless a call comes from the main server, if there are credentials at all."""
    if slot not in (None, MAIN):
        raise RefusedError(
            Reason.WRONG_SLOT,
            f"the credential belongs to slot {slot}, and only the main server may call this",
        )
