"""The rules of a round: who is waited for, when it closes, and whose ballots count.

`Rounds` is a value without clock, threads or input and output. A request is a method that returns
the next value, or raises `RefusedError`; then nothing has changed. Times are seconds of a clock
that never goes back. The server keeps one `Rounds` and asks it, and
`tests/elastic/test_rounds_model.py` explores all of its states for a few workers.

A *round* is the gathering of ballots for one vote. Rounds follow one another in the order of their
sequence numbers, `step * K + exchange`, and the sequence in hand is the first undecided one.

    open      ballots come in
    closed    the ballots are fixed; the server counts them and writes the decision to the log
    decided   the next round is open

Rules:

1. A ballot for the round in hand is accepted while the round is open. The same ballot again changes
   nothing. Another ballot of the same session is refused, and the first one stays.
2. A ballot that comes too late changes no decision: its sender is answered with the decision. A
   ballot for a later round is refused: its sender knows a decision that the log does not have.
3. A round closes once it is *due*: it has ballots from a quorum, and either all expected slots have
   sent one, or the deadline has passed since the first of them came. Without a quorum it waits.
4. Expected are at first all slots. A slot that a round waited for in vain is expected no longer,
   until it sends a ballot again: for the round in hand, or for the one before it. Without the
   second case a worker that is always a moment too late would never come back in. A slot that is
   waited for in vain again and again has to send more ballots each time, 1, 3, 7 and so on, so
   the others wait less and less often. Each later ballot that comes in time makes up for one.
5. A ballot may say that its worker does not participate, since its gradient is not finite. It
   belongs to the quorum and nobody waits for its slot, but it does not count in the vote.
6. The voters of a step never grow: a slot that did not count in one exchange of a step counts in no
   later exchange of it. Until the next step, rule 5 holds for its ballots.
7. `join` offers a slot the next session number, and changes nothing else. The first ballot with a
   new number begins the session: it ends the older one, whose ballot is withdrawn if the round is
   open, and whose requests are refused from then on. A late `join` of a dead job therefore does no
   harm, since nobody uses its number. `leave` ends a session too, and the slot is not expected any
   more. Numbers of a restarted server are higher than all numbers before.

Invariants, in every order of requests, times and failures:

- each sequence number is decided once, in order;
- every decision has ballots from a quorum;
- each counted ballot came from the newest session of its slot when the round closed;
- the voters of an exchange have voted in the exchange before it of the same step;
- the rounds after a restart follow from the last decision in the log.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from signax.elastic.refusals import Reason, RefusedError

SESSIONS = 1 << 32  # the numbers that one start of the server may offer


class Options(NamedTuple):
    """The options of the rules.

    Attributes:
      num_workers: the number of slots, M.
      quorum: the number of ballots that a decision needs.
      deadline: the seconds from a round's first ballot, after which it waits for a quorum only.
    """

    num_workers: int
    quorum: int
    deadline: float


class Received(NamedTuple):
    """A ballot as the rules see it.

    Attributes:
      session: its session.
      digest: the digest of its bits; with shards, of the digests of all its parts.
      participates: whether its worker wants to take part.
      time: when it came.
    """

    session: int
    digest: str
    participates: bool
    time: float


class Slot(NamedTuple):
    """One slot.

    Attributes:
      offered: the newest session number that `join` has offered.
      oldest: the oldest session that is not over; `base` before the first ballot of this start.
      received: its ballot in the round in hand, if there is one.
      eligible: whether its ballot may count in this step.
      owed: the ballots that it has to send before it is expected; 0 if it is expected.
      debt: the ballots that it owed when a round last waited for it in vain, less those that it
        has made up for.
    """

    offered: int
    oldest: int
    received: Received | None = None
    eligible: bool = True
    owed: int = 0
    debt: int = 0

    @property
    def expected(self) -> bool:
        """Whether the round waits for it."""
        return self.owed == 0

    def show_up(self, *, is_in_time: bool) -> "Slot":
        """The slot after a ballot for the round in hand, or for the one before it (rule 4)."""
        if self.owed:
            return self._replace(owed=self.owed - 1)
        return self._replace(debt=max(0, self.debt - is_in_time))

    def miss(self) -> "Slot":
        """The slot after a round that closed without its ballot (rule 4)."""
        if self.owed:
            return self
        debt = 2 * self.debt + 1
        return self._replace(owed=debt, debt=debt)


class Rounds(NamedTuple):
    """The round in hand.

    Attributes:
      slots: the M slots.
      num_exchanges: the votes of one step, K.
      quorum: the number of ballots that a decision needs.
      deadline: the seconds from a round's first ballot, after which it waits for a quorum only.
      base: the newest session number before this start of the server.
      sequence: the number of the round.
      closed: whether its ballots are fixed.
    """

    slots: tuple[Slot, ...]
    num_exchanges: int
    quorum: int
    deadline: float
    base: int
    sequence: int
    closed: bool = False

    @property
    def present(self) -> tuple[int, ...]:
        """The slots that have sent a ballot."""
        return tuple([n for n, slot in enumerate(self.slots) if slot.received])

    @property
    def voters(self) -> tuple[int, ...]:
        """The slots whose ballots count."""
        return tuple(
            [
                n
                for n, one in enumerate(self.slots)
                if one.received and one.received.participates and one.eligible
            ]
        )

    @property
    def missing(self) -> tuple[int, ...]:
        """The slots that the round waits for."""
        return tuple(
            [n for n, slot in enumerate(self.slots) if slot.expected and not slot.received]
        )

    @property
    def due_at(self) -> float | None:
        """When the round waits for a quorum only; `None` before the first ballot."""
        times = [slot.received.time for slot in self.slots if slot.received]
        return min(times) + self.deadline if times else None

    def is_due(self, now: float) -> bool:
        """Whether the round may close (rule 3)."""
        due_at = self.due_at
        if self.closed or due_at is None or len(self.present) < self.quorum:
            return False
        return not self.missing or now >= due_at

    def lacks_quorum(self, now: float) -> bool:
        """Whether the deadline has passed, and the round waits for a quorum."""
        due_at = self.due_at
        return due_at is not None and now >= due_at and len(self.present) < self.quorum

    def join(self, slot: int) -> tuple["Rounds", int]:
        """Offer a session number (rule 7)."""
        one = self._slot(slot)
        session = one.offered + 1
        return self._replace_slot(slot, one._replace(offered=session)), session

    def leave(self, slot: int, session: int) -> "Rounds":
        """End a session (rule 7)."""
        self.check_session(slot, session)
        one = self._begin(slot, session + 1)
        return self._replace_slot(slot, one._replace(owed=max(1, one.owed)))

    def check_ballot(self, slot: int, session: int, sequence: int, digest: str) -> bool:
        """Raise if a ballot must be refused; return whether its bits are needed."""
        self.check_session(slot, session)
        if sequence > self.sequence:
            raise RefusedError(
                Reason.FUTURE,
                f"sequence={sequence} cannot have begun: the log goes on with {self.sequence}. The "
                "server has another log than the one that the job has seen; restart the server on "
                "that log, or the job from a checkpoint of this one",
            )
        if sequence < self.sequence or self.closed:
            return False
        received = self.slots[slot].received
        if received is None or received.session < session:
            return True
        if received.digest != digest:
            raise RefusedError(
                Reason.CONFLICT,
                f"slot {slot} has already sent a ballot with other bits in vote {sequence}: "
                "the first one counts, and a job must repeat its ballot bit for bit",
            )
        return False

    def receive(
        self, slot: int, session: int, sequence: int, digest: str, participates: bool, now: float
    ) -> "Rounds":
        """Take a ballot (rules 1, 2 and 4). It is answered once its sequence is decided."""
        is_new = self.check_ballot(slot, session, sequence, digest)
        one = self._begin(slot, session)
        if is_new:
            received = Received(session, digest, participates, now)
            one = one.show_up(is_in_time=True)._replace(received=received)
        elif one.received is None and sequence >= self.sequence - 1:
            one = one.show_up(is_in_time=False)
        return self._replace_slot(slot, one)

    def close(self, now: float) -> "Rounds":
        """Fix the ballots of a round that is due. From now on, all others are late."""
        if not self.is_due(now):
            raise ValueError(f"round {self.sequence} is not due at {now}")
        slots = [slot if slot.received else slot.miss() for slot in self.slots]
        return self._replace(slots=tuple(slots), closed=True)

    def decide(self) -> "Rounds":
        """Open the next round, once the decision of the closed one is in the log."""
        if not self.closed:
            raise ValueError(f"round {self.sequence} is open: close it first")
        sequence, voters = self.sequence + 1, self.voters
        is_first = sequence % self.num_exchanges == 0
        slots = [
            slot._replace(received=None, eligible=is_first or n in voters)
            for n, slot in enumerate(self.slots)
        ]
        return self._replace(slots=tuple(slots), sequence=sequence, closed=False)

    def check_session(self, slot: int, session: int) -> None:
        """Raise if a session is over, or unknown."""
        one = self._slot(slot)
        if session > one.offered or session <= self.base == one.oldest:
            raise RefusedError(
                Reason.NO_SESSION,
                f"session={session} of slot {slot} is unknown, perhaps since the server has "
                "restarted: join, and repeat the request",
            )
        if session < one.oldest:
            raise RefusedError(
                Reason.OLD_SESSION,
                f"session={session} of slot {slot} is over: the job has left, or another job votes "
                "with the same credential. Give each job a slot and a credential of its own",
            )

    def _slot(self, slot: int) -> Slot:
        if not 0 <= slot < len(self.slots):
            raise RefusedError(
                Reason.WRONG_SLOT, f"slot={slot} is none of 0 to {len(self.slots) - 1}"
            )
        return self.slots[slot]

    def _begin(self, slot: int, session: int) -> Slot:
        """A slot whose older sessions are over."""
        one = self.slots[slot]
        if session > one.oldest and not self.closed:
            one = one._replace(received=None)
        return one._replace(oldest=session)

    def _replace_slot(self, slot: int, new: Slot) -> "Rounds":
        return self._replace(slots=(*self.slots[:slot], new, *self.slots[slot + 1 :]))


def begin(
    options: Options,
    num_exchanges: int,
    *,
    starts: int = 0,
    sequence: int = 0,
    present: Iterable[int] | None = None,
    voters: Iterable[int] = (),
) -> Rounds:
    """The rounds of a server that starts, with an empty log or after the last decision in it.

    Args:
      options: the options of the rules.
      num_exchanges: the votes of one step, K.
      starts: how often a server has started on this log before.
      sequence: the first undecided vote.
      present: the slots that were present in the vote before it; by default all slots.
      voters: the slots that took part in the vote before it.
    """
    num_workers, quorum, deadline = options
    if num_workers < 1:
        raise ValueError(f"num_workers={num_workers} must be at least 1")
    if not 1 <= quorum <= num_workers:
        raise ValueError(f"quorum={quorum} must be from 1 to the number of workers, {num_workers}")
    if not 0 < deadline < math.inf:
        raise ValueError(f"deadline={deadline} must be a number of seconds above 0")
    every = range(num_workers)
    expected = set(every if present is None else present)
    eligible = set(voters if sequence % num_exchanges else every)
    base = starts * SESSIONS
    slots = [Slot(base, base, None, n in eligible, owed=int(n not in expected)) for n in every]
    return Rounds(tuple(slots), num_exchanges, quorum, deadline, base, sequence)
