"""The messages between the main server and a shard."""

from typing import NamedTuple

from signax.elastic.parts import Part
from signax.elastic.plan import Plan


class Lead(NamedTuple):
    """The main server tells a shard which run it belongs to, and which votes are decided.

    Attributes:
      part: the run, and the shard's number.
      plan: the plan of the shard's part.
      keep: the steps that the main server's log keeps; `None` for all.
      sequence: the first undecided vote.
    """

    part: Part
    plan: Plan
    keep: int | None
    sequence: int


class Count(NamedTuple):
    """The main server has closed a round: count the part, and write it as tentative.

    Attributes:
      run: the run.
      turn: a number that grows from request to request.
      sequence: the first undecided vote.
      present: the slots that sent a ballot in time.
      voters: the slots whose ballots count.
      ballots: the field `whole` of each voter's ballot.
    """

    run: str
    turn: int
    sequence: int
    present: tuple[int, ...]
    voters: tuple[int, ...]
    ballots: tuple[str, ...]


class Counted(NamedTuple):
    """The count is in the shard's log, or the shard lacks parts and has written nothing.

    Attributes:
      lacking: the voters whose parts the shard does not hold.
    """

    lacking: tuple[int, ...]
