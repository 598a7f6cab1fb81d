"""When a job should begin a step, so that its ballot comes in time.

Workers begin a step with a decision. A job that begins later by more than the deadline is late with
every ballot, if it computes as long as the others, and no round waits long enough to let it catch
up. Such a job should begin with the next decision instead:

    decision              decision              decision
    |  others compute     |  others compute     |
    |          job comes, |  computes, and      |
    |          and waits  |  votes in time      |
"""

from collections.abc import Iterable

SPARE = 1  # workers that may die unnoticed before the others need the job that waits


class Phase:
    """Who computes for the round in hand since it was opened.

    Args:
      quorum: the number of ballots that a decision needs.
      deadline: the seconds from a round's first ballot, after which it waits for a quorum only.
    """

    def __init__(self, quorum: int, deadline: float):
        self._quorum, self._deadline = quorum, deadline
        self._together: set[int] = set()
        self._opened_at: float | None = None
        self._length = 0.0  # of the round before

    def open(self, present: Iterable[int], now: float) -> None:
        """A round is opened for slots that sent a ballot in the round before it."""
        if self._opened_at is not None:
            self._length = now - self._opened_at
        self._together, self._opened_at = set(present), now

    def drop(self, slot: int) -> None:
        """A slot's job has left, or comes from elsewhere."""
        self._together.discard(slot)

    def wait(self, now: float) -> float:
        """The seconds that a job should wait for the next decision, at most; 0 if it may begin.

        It waits only if a quorum and a spare compute, for twice the time of the round before.
        """
        if self._opened_at is None or len(self._together) < self._quorum + SPARE:
            return 0.0
        age = now - self._opened_at
        return max(0.0, 2 * self._length - age) if age > self._deadline else 0.0
