"""The heart of a shard: it holds parts of ballots, and counts them when the main server says so.

All state is under one lock. `Commits` says what is allowed, and `Counter` holds the bits. Calls of
workers and of the main server run in threads of their own. One of them counts at a time, and writes
to the log, without the lock. In the meantime no part changes.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from signax.elastic.answers import Answers
from signax.elastic.commits import recover
from signax.elastic.counting import Counter, make_decision
from signax.elastic.log import Entry, Log
from signax.elastic.parts import describe_part
from signax.elastic.protocol import Ballot, Done, Follow, to_bytes
from signax.elastic.refusals import Reason, RefusedError
from signax.elastic.shard_messages import Count, Lead
from signax.elastic.status import Statistics, log_event

PATIENCE = 3.0  # seconds in which workers may send parts again that a restarted shard has lost


class Shard:
    """Counts a part of every ballot. Nobody else writes to its log.

    Args:
      log: the log of the part.
      num_workers: the number of slots, M.

    Attributes:
      failure: the error that has stopped the shard.

    Raises:
      ValueError: the log is no shard's, or belongs to another number of workers.
    """

    def __init__(self, log: Log, num_workers: int):
        if log.plan is not None:
            log.plan.check_workers(num_workers)
            if log.part is None or log.part.server == 0:
                raise ValueError(f"{log.path} belongs to {describe_part(log.part)}, not to a shard")
        self._log, self.num_workers = log, num_workers
        self.statistics = Statistics(num_workers)
        self.failure: BaseException | None = None
        self._lock = threading.Lock()
        self._has_changed = threading.Condition(self._lock)
        self._leading, self._counting = threading.Lock(), threading.Lock()
        self._has_ended = threading.Event()
        self._counter = log.plan and Counter(log.plan)
        self._answers = Answers(log)
        self._commits = recover(log.next, log.turn)
        self._held: dict[int, str] = {}  # the ballots whose parts are here, of the undecided vote
        self._lacking: set[int] = set()  # slots whose parts the main server wants
        self._is_counting = False

    # What workers' calls do.

    def check_session(self, slot: int, session: int) -> None:
        """Take any session: the main server has them, and ballots have their identities."""

    def needs_bits(self, ballot: Ballot) -> bool:
        """Whether the bits of a part must be read; raise if the part must be refused."""
        with self._lock:
            self._check_ready(ballot.sequence)
            is_held = self._held.get(ballot.slot) == ballot.whole
            is_late = ballot.sequence < self._commits.decided
            counter = self._counter
        assert counter is not None  # or the shard is not ready
        exchange = counter.plan.exchange(ballot.sequence)
        expected = exchange.ballot_bytes if ballot.participates else 0
        if ballot.size != expected:
            raise RefusedError(
                Reason.MALFORMED, f"size={ballot.size} must be {expected}, by the plan of this part"
            )
        if ballot.size and not ballot.whole:
            raise RefusedError(Reason.MALFORMED, "a part must name its ballot in `whole`")
        return bool(ballot.size) and not is_held and not is_late

    def vote(
        self, ballot: Ballot, bits: memoryview | None, is_alive: Callable[[], bool]
    ) -> Iterator[bytes]:
        """Hold a part and say so; wait for the decision, and yield it as gRPC messages.

        Args:
          ballot: the ballot.
          bits: the bytes of its part, if `needs_bits`.
          is_alive: whether somebody still waits for the answer; `wake` has it asked again.
        """
        slot, sequence = ballot.slot, ballot.sequence
        if bits is not None:
            assert self._counter is not None
            self._counter.check(sequence, slot, bits)
            self.statistics.transfer(received=ballot.size)
        with self._lock:
            while self._is_counting:
                self._has_changed.wait()
            self._check_ready(sequence)
            if ballot.size and sequence == self._commits.decided:
                self._hold(ballot, bits)
        yield to_bytes(Done())
        with self._lock:
            while self._commits.decided <= sequence:
                self._check_running()
                if not is_alive():
                    raise RefusedError(Reason.REPEATED, "nobody waits for the answer any more")
                is_lost = ballot.size and self._held.get(slot) != ballot.whole
                if is_lost and slot in self._lacking:
                    raise RefusedError(Reason.REPEATED, "the part is lost: send it again")
                self._has_changed.wait()
        decision, messages = self._answers.messages(sequence)
        self.statistics.transfer(sent=decision.size)
        yield from messages

    def _hold(self, ballot: Ballot, bits: memoryview | None) -> None:
        if self._held.get(ballot.slot) == ballot.whole:
            return
        if bits is None:
            raise RefusedError(Reason.REPEATED, "the part is lost: send it again")
        assert self._counter is not None
        self._counter.put(ballot.sequence, ballot.slot, bits)
        self._held[ballot.slot] = ballot.whole
        self._lacking.discard(ballot.slot)
        self._has_changed.notify_all()

    def wake(self) -> None:
        """Have calls that wait find out whether they are alive."""
        with self._lock:
            self._has_changed.notify_all()

    def follow(self, follow: Follow) -> Iterator[Entry]:
        """The decided votes from a sequence on."""
        sequence = follow.sequence
        while sequence < self._commits.decided:
            yield self._answers.read(sequence)
            sequence += 1

    # What the main server's calls do.

    def lead(self, lead: Lead) -> None:
        """Take the plan of the run, and hear which votes are decided."""
        with self._leading:
            with self._lock:
                self._check_running()
                self._commits.learn(lead.sequence)
            if self._log.plan is None:
                self._set_plan(lead)
            elif (self._log.part, self._log.plan) != (lead.part, lead.plan):
                raise RefusedError(
                    Reason.WRONG_PLAN,
                    f"the shard's log belongs to {describe_part(self._log.part)}, and the main "
                    f"server wants {describe_part(lead.part)}, of another run or plan: give "
                    "--shards in the order of the run, and each shard its own log",
                )
            # One step more, since the main server's log may lack the tentative decision.
            self._log.keep = lead.keep and lead.keep + 1
            with self._lock:
                commits = self._commits.learn(lead.sequence)
                self._set_decided(commits.decided)

    def _set_plan(self, lead: Lead) -> None:
        try:
            lead.plan.check()
            lead.plan.check_workers(self.num_workers)
            if not 0 < lead.part.server < lead.part.servers:
                raise ValueError(f"server={lead.part.server} is no shard")
        except ValueError as error:
            raise RefusedError(Reason.WRONG_PLAN, str(error)) from None
        counter = Counter(lead.plan)
        self._log.set_plan(lead.plan, lead.part)
        with self._lock:
            self._counter = counter
        log_event("leads", shard=lead.part.server, servers=lead.part.servers)

    def count(self, count: Count) -> tuple[int, ...]:
        """Write the decision as tentative, or return the voters whose parts are not here."""
        voters = dict(zip(count.voters, count.ballots, strict=False))
        slots = {*range(self.num_workers)}
        if not (
            len(voters) == len(count.voters) == len(count.ballots)
            and {*voters} <= {*count.present} <= slots
        ):
            raise RefusedError(
                Reason.MALFORMED, "each voter must be a slot that is present, with one ballot"
            )
        with self._lock:
            self._check_running()
            if self._log.part is None or self._log.part.run != count.run:
                raise RefusedError(Reason.UNREADY, "the shard does not belong to this run yet")
            commits = self._commits.begin(count.turn, count.sequence)
            self._set_decided(commits.decided)
            self._commits = commits
            self._has_changed.notify_all()  # an older request to count ends
        with self._counting:
            with self._lock:
                if lacking := self._await_parts(voters, count):
                    return lacking
                self._is_counting = True
            try:
                self._write(count)
            finally:
                with self._lock:
                    self._is_counting = False
                    self._has_changed.notify_all()
        return ()

    def _await_parts(self, voters: dict[int, str], count: Count) -> tuple[int, ...]:
        """Wait for parts that are on their way; return the slots whose parts do not come."""
        deadline = time.monotonic() + PATIENCE
        while True:
            self._check_running()
            self._commits.check(count.turn, count.sequence)
            lacking = [slot for slot, ballot in voters.items() if self._held.get(slot) != ballot]
            self._lacking = {*lacking}
            seconds = deadline - time.monotonic()
            if not lacking or seconds <= 0:
                return tuple(lacking)
            self._has_changed.notify_all()  # their calls end, and are repeated with the bits
            self._has_changed.wait(seconds)

    def _write(self, count: Count) -> None:
        assert self._counter is not None
        counted = self._counter.count(count.sequence, count.voters)
        decision, words = make_decision(counted, count.sequence, count.present, count.voters)
        try:
            self._log.append(decision, words, turn=count.turn)
        except BaseException as error:
            log_event("failed", logging.ERROR, error=repr(error))
            self.failure = error
            self.stop()
            raise
        self._answers.set_newest(decision, words)
        with self._lock:
            self._commits = self._commits.write()
            # The counter has dropped the other parts.
            self._held = dict(zip(count.voters, count.ballots, strict=True))

    def _set_decided(self, sequence: int) -> None:
        if sequence > self._commits.decided:
            self._commits = self._commits._replace(decided=sequence)
            self._held, self._lacking = {}, set()
            self._has_changed.notify_all()

    def _check_ready(self, sequence: int) -> None:
        self._check_running()
        if self._counter is None or sequence > self._commits.decided:
            raise RefusedError(
                Reason.UNREADY,
                f"the shard has not heard from the main server that vote {sequence} has begun",
            )

    def _check_running(self) -> None:
        if self._has_ended.is_set():
            raise RefusedError(
                Reason.STOPPING, "the server stops: repeat the request until it is back"
            )

    def stop(self) -> None:
        """Take no more requests, and end all who wait."""
        with self._lock:
            self._has_ended.set()
            self._has_changed.notify_all()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until the shard has stopped or failed; return whether it has."""
        return self._has_ended.wait(seconds)

    def status(self) -> dict[str, Any]:
        """The status of the shard, as values of JSON."""
        part, plan, counts = self._log.part, self._log.plan, self.statistics.to_json()
        names = "uptime_seconds", "bytes_in", "bytes_out", "refusals"
        with self._lock:
            commits, holds, lacks = self._commits, sorted(self._held), sorted(self._lacking)
        return {
            "shard": part and part.server,
            "servers": part and part.servers,
            "num_workers": self.num_workers,
            "plan": plan and plan.digest,
            "first": self._log.first,
            "sequence": commits.decided,
            "is_tentative": commits.next > commits.decided,
            "holds": holds,
            "lacks": lacks,
            **{name: counts[name] for name in names},
        }
