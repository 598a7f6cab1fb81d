"""The heart of the server: it takes ballots from many threads and decides one vote after the other.

All state is under one lock: `Rounds` says what is allowed, `Counter` holds the ballots' bits. One
thread closes rounds. It counts and writes to the log without the lock, since the ballots of a
closed round are fixed, and only then opens the next round and wakes those who wait. Nobody hears of
a decision that is not in the log.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from signax.elastic.answers import Answers
from signax.elastic.counting import Counted, Counter, make_decision
from signax.elastic.log import Entry, Log
from signax.elastic.parts import Part, describe_part
from signax.elastic.phase import Phase
from signax.elastic.plan import Plan
from signax.elastic.protocol import Ballot, Decision, Fetch, Follow, Joined, Snapshot, to_pieces
from signax.elastic.refusals import Reason, RefusedError
from signax.elastic.rounds import Options, Rounds, begin
from signax.elastic.snapshots import Snapshots
from signax.elastic.status import RoundTimes, Statistics, describe_rounds, log_event


class Decider:
    """Decides the votes of a run, until it is stopped. Nobody else writes to its log.

    Args:
      log: the log.
      snapshots: the newest snapshot.
      options: how to decide.

    Raises:
      ValueError: an option is out of range, or the log names another number of workers or
        servers than the options.
    """

    def __init__(self, log: Log, snapshots: Snapshots, options: Options):
        self._log, self.snapshots, self.options = log, snapshots, options
        self.num_workers = options.num_workers
        self.statistics = Statistics(options.num_workers)
        self._lock = threading.Lock()
        self._may_be_due = threading.Condition(self._lock)
        self._has_changed = threading.Condition(self._lock)
        self._joining = threading.Lock()
        self._phase = Phase(options.quorum, options.deadline)
        self._counter: Counter | None = None  # until a job has brought the plan
        self._answers = Answers(log)
        self._is_stopping = self._has_stopped = False
        self.failure: BaseException | None = None
        plan = log.plan
        # Without a plan, rounds of one exchange check the options.
        self._rounds = self._begin_rounds(1 if plan is None else len(plan.exchanges))
        self.snapshots.drop_beyond(log.next // self._rounds.num_exchanges)
        self._part = self._choose_part()
        if plan is not None:
            plan.check_workers(options.num_workers)
            self._counter = Counter(self._own_plan(plan))
        self._thread = threading.Thread(target=self._work, name="decider", daemon=True)
        self._thread.start()

    def _begin_rounds(self, num_exchanges: int) -> Rounds:
        log = self._log
        entry = log.read(log.next - 1) if log.next else None
        last = entry and entry.decision
        return begin(
            self.options,
            num_exchanges,
            starts=log.starts,
            sequence=log.next,
            present=last.present if last else None,
            voters=last.voters if last else (),
        )

    # What a server with shards does in another way.

    def _choose_part(self) -> Part | None:
        """The part of the run that the log has."""
        if self._log.part is not None:
            raise ValueError(f"{self._log.path} belongs to {describe_part(self._log.part)}")
        return None

    def _own_plan(self, plan: Plan) -> Plan:
        """Return the part of a plan that this server counts.

        Raise `ValueError` if the plan exceeds a limit.
        """
        plan.check()
        return plan

    def _count(self, counter: Counter, rounds: Rounds) -> Counted | None:
        """Count the closed round; `None` if it is not to be decided now."""
        return counter.count(rounds.sequence, rounds.voters)

    # What calls of the service do.

    def check_session(self, slot: int, session: int) -> None:
        """Raise if a session is over, or unknown."""
        with self._lock:
            self._rounds.check_session(slot, session)

    def join(self, slot: int, plan: Plan) -> Joined:
        """Offer a session to a job whose plan is the run's, once it should begin a step."""
        self._check_plan(plan)
        with self._lock:
            self._phase.drop(slot)
            self._has_changed.notify_all()
            self._wait_to_begin()
            self._rounds, session = self._rounds.join(slot)
            newest = self.snapshots.newest
            joined = Joined(
                session=session,
                sequence=self._rounds.sequence,
                first=self._log.first,
                snapshot=newest and newest.step,
                quorum=self.options.quorum,
                deadline=self.options.deadline,
            )
        self.statistics.see(slot, joined=True)
        log_event("joined", slot=slot, sequence=joined.sequence)
        return joined

    def _wait_to_begin(self) -> None:
        """Wait for the next decision, if a job that began a step now would vote too late."""
        sequence = self._rounds.sequence
        while self._rounds.sequence == sequence:
            self._check_running()
            now = time.monotonic()
            wait = self._phase.wait(now)
            if not wait or self._rounds.lacks_quorum(now):
                return
            self._has_changed.wait(min(wait, self.options.deadline))

    def _check_plan(self, plan: Plan) -> None:
        with self._joining:  # one job brings the plan, and the others wait until it is compiled
            run = self._log.plan
            if run is None:
                self._set_plan(plan)
            elif plan != run:
                raise RefusedError(
                    Reason.WRONG_PLAN,
                    f"the job's plan has the digest {plan.digest}, and the run's {run.digest}: "
                    "shapes and dtypes of the parameters, zeros, ties, what follows the vote (such "
                    "as learning rate and decay), the number of workers, and the versions of jax "
                    "and signax must equal the run's",
                )

    def _set_plan(self, plan: Plan) -> None:
        try:
            own = self._own_plan(plan)
            plan.check_workers(self.options.num_workers)
        except ValueError as error:
            raise RefusedError(Reason.WRONG_PLAN, str(error)) from None
        counter = Counter(own)
        self._log.set_plan(plan, self._part)
        with self._lock:
            self._rounds, self._counter = self._begin_rounds(len(plan.exchanges)), counter

    def leave(self, slot: int, session: int) -> None:
        """End a session."""
        with self._lock:
            self._rounds = self._rounds.leave(slot, session)
            self._phase.drop(slot)
            self._may_be_due.notify()
            self._has_changed.notify_all()
        log_event("left", slot=slot)

    def needs_bits(self, ballot: Ballot) -> bool:
        """Whether the bits of a ballot must be read; raise if the ballot must be refused."""
        with self._lock:
            self._check_running()
            needed = self._rounds.check_ballot(
                ballot.slot, ballot.session, ballot.sequence, ballot.identity
            )
            counter = self._counter
        assert counter is not None  # somebody has joined
        exchange = counter.plan.exchange(ballot.sequence)
        expected = exchange.ballot_bytes if ballot.participates else 0
        if ballot.size != expected:
            raise RefusedError(
                Reason.MALFORMED, f"size={ballot.size} must be {expected}, by the plan of the run"
            )
        return needed and ballot.size > 0

    def vote(
        self, ballot: Ballot, bits: memoryview | None, is_alive: Callable[[], bool]
    ) -> list[bytes]:
        """Take a ballot, wait for the decision, and return it as gRPC messages.

        Args:
          ballot: the ballot.
          bits: the bytes of its sealed message, if `needs_bits`.
          is_alive: whether somebody still waits for the answer; `wake` has it asked again.
        """
        if bits is not None:
            assert self._counter is not None
            self._counter.check(ballot.sequence, ballot.slot, bits)
            self.statistics.transfer(received=ballot.size)
        with self._lock:
            self._check_running()
            slot, session, sequence = ballot.slot, ballot.session, ballot.sequence
            is_new = self._rounds.check_ballot(slot, session, sequence, ballot.identity)
            if is_new and ballot.size and bits is None:
                raise RefusedError(Reason.REPEATED, "the ballot was withdrawn: send it again")
            now = time.monotonic()
            self._rounds = self._rounds.receive(
                slot, session, sequence, ballot.identity, ballot.participates, now
            )
            if is_new and bits is not None:
                assert self._counter is not None
                self._counter.put(sequence, slot, bits)
            received = self._rounds.slots[slot].received
            is_late = received is None or received.session != session
            self._may_be_due.notify()
            self.statistics.see(slot, late=is_late)
            while self._rounds.sequence <= sequence:
                self._check_running()
                self._rounds.check_session(slot, session)
                if not self._rounds.closed and self._rounds.slots[slot].received is None:
                    raise RefusedError(Reason.REPEATED, "the round is open again: vote again")
                if not is_alive():
                    raise RefusedError(Reason.REPEATED, "nobody waits for the answer any more")
                self._has_changed.wait()
        return self._answer(slot, sequence)

    def wake(self) -> None:
        """Have calls that wait find out whether they are alive."""
        with self._lock:
            self._has_changed.notify_all()

    def follow(self, follow: Follow) -> Iterator[Entry]:
        """The decisions from a sequence on, to the one that is the newest at the end."""
        sequence = follow.sequence
        while sequence < self._rounds.sequence:
            yield self._answers.read(sequence)
            sequence += 1

    def put_snapshot(self, snapshot: Snapshot, first: Any, pieces: Iterable[bytes]) -> None:
        """Store the upload of a snapshot."""
        step = self._rounds.sequence // self._rounds.num_exchanges
        if snapshot.step > step:
            raise RefusedError(
                Reason.FUTURE, f"step={snapshot.step} is not over: the log has {step} steps"
            )
        self.snapshots.write(snapshot, first, pieces)
        log_event("snapshot", slot=snapshot.slot, step=snapshot.step)

    def get_snapshot(self, fetch: Fetch) -> Iterator[bytes]:
        """The gRPC messages of a snapshot; raise, and ask a worker, if there is none."""
        log, num_exchanges = self._log, self._rounds.num_exchanges
        least = max(min(fetch.step, log.next // num_exchanges), -(-log.first // num_exchanges))
        self.snapshots.check(least)
        return self.snapshots.read()

    def _answer(self, slot: int, sequence: int) -> list[bytes]:
        decision, messages = self._answers.messages(sequence)
        if self.snapshots.asks(slot, decision.voters):
            decision, words = self._answers.read(sequence)
            messages = [*to_pieces(decision._replace(wants_snapshot=True), words)]
        self.statistics.transfer(sent=decision.size)
        return messages

    # The thread that decides.

    def _work(self) -> None:
        try:
            while self._wait_for_round():
                self._decide()
        except BaseException as error:
            log_event("failed", logging.ERROR, error=repr(error))
            self.failure = error
        with self._lock:
            self._has_stopped = True
            self._has_changed.notify_all()

    def _wait_for_round(self) -> bool:
        """Close the next round; return false if the server stops first."""
        with self._lock:
            while True:
                now, rounds = time.monotonic(), self._rounds
                due_at = rounds.due_at
                if rounds.is_due(now):
                    self._rounds = rounds.close(now)
                    return True
                if self._is_stopping and (rounds.closed or due_at is None or now >= due_at):
                    return False
                self._may_be_due.wait(None if due_at is None or now >= due_at else due_at - now)

    def _decide(self) -> None:
        """Count the closed round, write the decision to the log, and open the next round."""
        rounds, counter = self._rounds, self._counter
        assert counter is not None
        assert rounds.due_at is not None
        closed_at = time.monotonic()
        counted = self._count(counter, rounds)
        if counted is None:
            return
        counted_at = time.monotonic()
        decision, words = make_decision(counted, rounds.sequence, rounds.present, rounds.voters)
        self._log.append(decision, words)
        self._want_snapshot(rounds.sequence)
        logged_at = time.monotonic()
        self._answers.set_newest(decision, words)
        with self._lock:
            self._rounds = self._rounds.decide()
            self._phase.open(decision.present, time.monotonic())
            self._has_changed.notify_all()
        gathering = closed_at - rounds.due_at + rounds.deadline
        times = RoundTimes(gathering, counted_at - closed_at, logged_at - counted_at)
        self.statistics.decide(decision.present, decision.voters, counted.equal_bits, times)
        self._report(decision, times)

    def _want_snapshot(self, sequence: int) -> None:
        """Ask for a snapshot before the log drops the steps after the newest one."""
        keep, newest = self._log.keep, self.snapshots.newest
        age = (sequence + 1) // self._rounds.num_exchanges - (newest.step if newest else 0)
        if keep and age > keep // 2:
            self.snapshots.want()

    def _report(self, decision: Decision, times: RoundTimes) -> None:
        absent = self.options.num_workers - len(decision.present)
        log_event(
            "decided",
            logging.INFO if absent else logging.DEBUG,
            sequence=decision.sequence,
            voters=len(decision.voters),
            absent=absent,
            **{f"{name}_seconds": round(value, 6) for name, value in times._asdict().items()},
        )

    def _check_running(self) -> None:
        if self._has_stopped or (self._is_stopping and not self._rounds.present):
            raise RefusedError(
                Reason.STOPPING, "the server stops: repeat the request until it is back"
            )

    def stop(self) -> None:
        """Finish the round in hand, if it can be finished by its deadline."""
        with self._lock:
            self._is_stopping = True
            self._may_be_due.notify()
        self._thread.join()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until the server has stopped or failed; return whether it has."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def status(self) -> dict[str, Any]:
        """The status of the run and of the round in hand, as values of JSON."""
        with self._lock:
            rounds, plan, newest = self._rounds, self._log.plan, self.snapshots.newest
        return {
            "plan": plan and plan.digest,
            "first": self._log.first,
            "snapshot": newest and newest.step,
            **self.options._asdict(),
            **describe_rounds(rounds, time.monotonic()),
            **self.statistics.to_json(),
        }
