"""Parts: how ballots and decisions are cut for several servers, and put together.

Of S servers, server s has the words [s n / S, (s + 1) n / S) of each plane of n words. A part of a
ballot is a sealed message of its own with the ballot's header, so each server counts its part as if
there were no other. Server 0 is the main server, and the others are its shards.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from signax._wire.words import sealed_words
from signax.elastic.plan import Exchange, Plan


class Part(NamedTuple):
    """Which part of a run a log has.

    Attributes:
      run: a random text that all logs of the run have in common.
      server: the number of the server, 0 for the main server.
      servers: how many servers there are, S.
    """

    run: str
    server: int
    servers: int


def describe_part(part: Part | None) -> str:
    """A part in words, for errors."""
    if part is None:
        return "a run without shards"
    name = "the main server" if part.server == 0 else f"shard {part.server}"
    return f"{name} of a run with {part.servers - 1} shards"


def bounds(width: int, server: int, servers: int) -> tuple[int, int]:
    """The first word of a plane that a server has, and the end of its words."""
    return server * width // servers, (server + 1) * width // servers


def part_of_exchange(exchange: Exchange, server: int, servers: int) -> Exchange:
    """The exchange as one server sees it."""
    ends = [bounds(width, server, servers) for width in exchange.widths]
    return exchange._replace(widths=tuple([stop - start for start, stop in ends]))


def part_of_plan(plan: Plan, server: int, servers: int) -> Plan:
    """The plan as one server sees it; raise `ValueError` if it has too few words, or too many."""
    for exchange in plan.exchanges:
        narrowest = min(exchange.widths, default=0)
        if narrowest < servers:
            raise ValueError(
                f"a plane of {narrowest} words is too short for {servers} servers: use fewer shards"
            )
    exchanges = [part_of_exchange(one, server, servers) for one in plan.exchanges]
    part = plan._replace(exchanges=tuple(exchanges))
    part.check()
    return part


def cut(message: NDArray[np.uint32], exchange: Exchange, servers: int) -> list[NDArray[np.uint32]]:
    """Cut a sealed message, u32[n], into the sealed messages of all servers."""
    stop = sum(exchange.widths)
    planes = np.split(message[:stop], np.cumsum(exchange.widths)[:-1])
    parts = []
    for server in range(servers):
        pieces = [plane[slice(*bounds(plane.size, server, servers))] for plane in planes]
        words = sum([piece.size for piece in pieces])
        part = np.zeros(sealed_words(words), np.uint32)
        np.concatenate(pieces, out=part[:words])
        part[words] = message[stop]
        parts.append(part)
    return parts


def put_together(decisions: Sequence[NDArray[np.uint32]], exchange: Exchange) -> NDArray[np.uint32]:
    """The planes of a decision, end to end, from the planes of its parts."""
    servers = len(decisions)
    whole = np.empty(exchange.decision_words, np.uint32)
    planes = np.split(whole, np.cumsum(exchange.widths)[:-1])
    for server, words in enumerate(decisions):
        start = 0
        for plane in planes:
            place = plane[slice(*bounds(plane.size, server, servers))]
            place[:] = words[start : start + place.size]
            start += place.size
    return whole
