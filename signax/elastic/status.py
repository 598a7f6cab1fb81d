"""What an operator sees of a vote server: events, counts since its start, and the last rounds."""

import json
import logging
import math
import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from signax.elastic.refusals import Reason
from signax.elastic.rounds import Rounds

RECENT = 100  # rounds whose times are kept
SMOOTHING = 0.9  # of a slot's share of equal bits


logger = logging.getLogger("signax.elastic")


def log_event(event: str, level: int = logging.INFO, **fields: Any) -> None:
    """Log an event with fields, which the command writes as one line of JSON."""
    logger.log(level, event, extra={"fields": fields})


def describe_rounds(rounds: Rounds, now: float) -> dict[str, Any]:
    """The round in hand as values of JSON."""
    step, exchange = divmod(rounds.sequence, rounds.num_exchanges)
    return {
        "step": step,
        "exchange": exchange,
        "exchanges": rounds.num_exchanges,
        "sequence": rounds.sequence,
        "present": rounds.present,
        "waiting_for": rounds.missing,
        "quorum_lacks": max(0, rounds.quorum - len(rounds.present)),
        "seconds_to_deadline": None if rounds.due_at is None else max(0.0, rounds.due_at - now),
    }


def to_text(status: dict[str, Any]) -> str:
    """A status as JSON text."""
    return json.dumps(status, allow_nan=False)


class RoundTimes(NamedTuple):
    """The seconds of one round.

    Attributes:
      gathering: from the first ballot until the round closed.
      counting: to count it.
      logging: to write the decision.
    """

    gathering: float
    counting: float
    logging: float


class SlotStatus:
    """What a server has seen of one slot since its start."""

    def __init__(self) -> None:
        self.joined = self.voted = self.abstained = self.missed = self.late = 0
        self.equal_bits: float | None = None
        self.last_seen: float | None = None


class Statistics:
    """Counts that threads share."""

    def __init__(self, num_workers: int):
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self.slots = [SlotStatus() for _ in range(num_workers)]
        self.refusals: Counter[Reason] = Counter()
        self._logged: dict[Reason, float] = {}
        self.rounds = self.bytes_in = self.bytes_out = 0
        self._times: deque[RoundTimes] = deque(maxlen=RECENT)

    def see(self, slot: int, *, joined: bool = False, late: bool = False) -> None:
        """Note a sign of life."""
        with self._lock:
            one = self.slots[slot]
            one.last_seen = time.monotonic()
            one.joined += joined
            one.late += late

    def refuse(self, reason: Reason) -> bool:
        """Note a refusal; return whether to log it, at most once a second for each reason."""
        with self._lock:
            self.refusals[reason] += 1
            now = time.monotonic()
            if now - self._logged.get(reason, -math.inf) < 1:
                return False
            self._logged[reason] = now
            return True

    def transfer(self, *, received: int = 0, sent: int = 0) -> None:
        """Note payload that has come or gone."""
        with self._lock:
            self.bytes_in += received
            self.bytes_out += sent

    def decide(
        self,
        present: Collection[int],
        voters: Collection[int],
        equal_bits: Mapping[int, float],
        times: RoundTimes,
    ) -> None:
        """Note a decision."""
        with self._lock:
            self.rounds += 1
            self._times.append(times)
            for n, slot in enumerate(self.slots):
                slot.voted += n in voters
                slot.abstained += n in present and n not in voters
                slot.missed += n not in present
            for n, share in equal_bits.items():
                before = self.slots[n].equal_bits
                mean = share if before is None else SMOOTHING * before + (1 - SMOOTHING) * share
                self.slots[n].equal_bits = mean

    def to_json(self) -> dict[str, Any]:
        """All of it as values of JSON."""
        with self._lock:
            now = time.monotonic()
            slots = [
                {
                    "slot": n,
                    "joined": slot.joined,
                    "voted": slot.voted,
                    "abstained": slot.abstained,
                    "missed": slot.missed,
                    "late": slot.late,
                    "equal_bits": slot.equal_bits,
                    "seconds_since_seen": None if slot.last_seen is None else now - slot.last_seen,
                }
                for n, slot in enumerate(self.slots)
            ]
            return {
                "uptime_seconds": now - self._began,
                "rounds": self.rounds,
                "bytes_in": self.bytes_in,
                "bytes_out": self.bytes_out,
                "refusals": {reason.value: self.refusals[reason] for reason in Reason},
                "median_seconds": {
                    name: statistics.median(getattr(one, name) for one in self._times)
                    if self._times
                    else None
                    for name in RoundTimes._fields
                },
                "slots": slots,
            }
