"""The decider of a main server: its shards count before it writes a decision.

If a shard lacks parts of voters, perhaps since it has restarted, the round opens again without
their ballots, and their senders repeat them.
"""

import secrets
from typing import Any

from signax.elastic.counting import Counted, Counter
from signax.elastic.decider import Decider
from signax.elastic.log import Log
from signax.elastic.parts import Part, describe_part, part_of_plan
from signax.elastic.plan import Plan
from signax.elastic.protocol import Ballot, Joined
from signax.elastic.refusals import Reason, RefusedError
from signax.elastic.rounds import Options, Rounds
from signax.elastic.shards import Shards
from signax.elastic.snapshots import Snapshots


def reopen(rounds: Rounds, lacking: set[int]) -> Rounds:
    """Open a closed round again, without the ballots of some slots and of sessions that are over.

    The slots that lose their ballots stay expected, unless they have left.
    """

    def is_over(slot: int) -> bool:
        received = rounds.slots[slot].received
        return received is None or received.session != rounds.slots[slot].oldest

    slots = [
        one._replace(received=None) if n in lacking or is_over(n) else one
        for n, one in enumerate(rounds.slots)
    ]
    return rounds._replace(slots=tuple(slots), closed=False)


class ShardedDecider(Decider):
    """Decides the votes of a run with shards, until it is stopped.

    Args:
      log: the main server's log.
      snapshots: the newest snapshot.
      options: how to decide.
      shards: the shards, on the same log.

    Raises:
      ValueError: as in `Decider`.
    """

    def __init__(self, log: Log, snapshots: Snapshots, options: Options, shards: Shards):
        self._shards = shards
        super().__init__(log, snapshots, options)
        shards.start()

    def _choose_part(self) -> Part:
        log, servers = self._log, self._shards.servers
        if log.plan is None:
            return Part(secrets.token_hex(16), 0, servers)
        if log.part is None or log.part[1:] != (0, servers):
            raise ValueError(
                f"{log.path} belongs to {describe_part(log.part)}, and --shards names "
                f"{servers - 1}: the number of shards of a run never changes"
            )
        return log.part

    def _own_plan(self, plan: Plan) -> Plan:
        servers = self._shards.servers
        own, *_ = [part_of_plan(plan, server, servers) for server in range(servers)]
        return own

    def _set_plan(self, plan: Plan) -> None:
        super()._set_plan(plan)
        self._shards.tell()

    def join(self, slot: int, plan: Plan) -> Joined:
        """Offer a session to a job whose plan is the run's, and name the shards."""
        return super().join(slot, plan)._replace(shards=self._shards.addresses)

    def needs_bits(self, ballot: Ballot) -> bool:
        """Whether the bits of a ballot must be read; raise if the ballot must be refused."""
        if ballot.participates and not ballot.whole:
            raise RefusedError(
                Reason.MALFORMED,
                "the run has shards: send each server its part, with `whole` in each part",
            )
        return super().needs_bits(ballot)

    def _count(self, counter: Counter, rounds: Rounds) -> Counted | None:
        answers = self._shards.begin(rounds)
        counted = super()._count(counter, rounds)
        found = [answer.result() for answer in answers]
        if None in found:
            return None  # the server stops
        lacking = {slot for slots in found for slot in slots or ()}
        if not lacking:
            return counted
        with self._lock:
            self._rounds = reopen(self._rounds, lacking)
            self._has_changed.notify_all()
        return None

    def _decide(self) -> None:
        super()._decide()
        self._shards.tell()

    def stop(self) -> None:
        """Finish the round in hand, if it can be finished by its deadline."""
        self._shards.stop_waiting()
        super().stop()
        self._shards.close()

    def status(self) -> dict[str, Any]:
        """The status of the run, of the round in hand and of the shards, as values of JSON."""
        return {**super().status(), "shards": self._shards.status()}
