"""Answers: the decisions of a log, as messages to workers."""

from typing import Any

from signax.elastic.log import Entry, Log
from signax.elastic.protocol import Decision, to_pieces
from signax.elastic.refusals import Reason, RefusedError


class Answers:
    """Reads decisions. The newest one stays in memory, as messages that all slots share."""

    def __init__(self, log: Log):
        self._log = log
        self._newest: tuple[Decision, list[bytes]] | None = None

    def set_newest(self, decision: Decision, words: Any) -> None:
        """Hold the messages of a decision that is in the log."""
        self._newest = decision, [*to_pieces(decision, words)]

    def messages(self, sequence: int) -> tuple[Decision, list[bytes]]:
        """A decision, and its gRPC messages."""
        newest = self._newest
        if newest is None or newest[0].sequence != sequence:
            decision, words = self.read(sequence)
            newest = decision, [*to_pieces(decision, words)]
        return newest

    def read(self, sequence: int) -> Entry:
        """A decision and its words; raise if the log has dropped it."""
        entry = self._log.read(sequence)
        if entry is None:
            raise RefusedError(
                Reason.TOO_OLD,
                f"sequence={sequence} is no longer in the log, which begins with "
                f"{self._log.first}: take a snapshot",
            )
        return entry
