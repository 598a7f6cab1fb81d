"""The rules of a shard: what it may write, and which of its decisions it may tell.

A decision is made once for all servers, in two steps. The main server first has every shard count
its part and write it to the shard's log, as *tentative*. Then it writes its own part to its own
log, and this write is the decision. The main server's log alone says what is decided.

`Commits` is a value without threads or input and output, like `Rounds`.
`tests/elastic/test_commits_model.py` explores it beside a main server that dies and is replaced.

Rules:

1. Only the last decision in a shard's log may be tentative. A shard that starts takes it for
   tentative, until the main server says otherwise.
2. All requests of the main server say which vote is the first undecided one in its log. All votes
   before it are decided.
3. A tentative decision may be written again, with other voters. A decided one stays.
4. Requests to count have *turns*, which grow: from request to request, and from start to start of
   the main server. A shard remembers the newest turn in its log, and refuses older ones. So a main
   server that was replaced can change nothing after the first request of its successor.
5. A shard tells a decision to workers once it is decided.
"""

from typing import NamedTuple

from signax.elastic.refusals import Reason, RefusedError

TURNS = 1 << 32  # of one start of the main server


class Commits(NamedTuple):
    """What a shard knows of its votes.

    Attributes:
      next: the first vote that is not in the shard's log.
      decided: the first vote that is not decided, as far as the shard knows: `next`, or the vote
        before it.
      turn: the newest turn.
    """

    next: int = 0
    decided: int = 0
    turn: int = 0

    def learn(self, sequence: int) -> "Commits":
        """Hear that `sequence` is the first undecided vote in the main server's log (rule 2)."""
        if sequence > self.next:
            raise RefusedError(
                Reason.FUTURE,
                f"the main server's log goes on with vote {sequence}, and this shard's with "
                f"{self.next}: it lacks decisions of the run. Restore its log from a backup",
            )
        return self._replace(decided=max(self.decided, sequence))

    def begin(self, turn: int, sequence: int) -> "Commits":
        """Take a request to count the first undecided vote (rules 3 and 4)."""
        self.check(turn - 1, sequence)
        return self.learn(sequence)._replace(turn=turn)

    def check(self, turn: int, sequence: int) -> None:
        """Raise if a vote may not be counted in this turn, or not any more."""
        if turn < self.turn:
            raise RefusedError(
                Reason.REPEATED, "a newer request of the main server has replaced this one"
            )
        if sequence < self.decided:
            raise RefusedError(
                Reason.FUTURE,
                f"vote {sequence} cannot be counted again, since vote {self.decided - 1} is "
                "decided: the main server's log is an old copy. Start it on its newest log",
            )

    def write(self) -> "Commits":
        """Note that the count is in the log, as tentative."""
        return self._replace(next=self.decided + 1)


def recover(after: int, turn: int) -> Commits:
    """What a shard knows when it starts on a log that goes on with vote `after` (rule 1)."""
    return Commits(after, max(after - 1, 0), turn)
