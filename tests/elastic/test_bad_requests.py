"""Requests that are malformed, stale, oversized, unauthenticated or conflicting change nothing."""

import json
import pathlib
import random
import signal

import grpc
import numpy as np
import pytest
from clients import Client, make_bits, make_plan
from sharded_run import wait_for

from signax.elastic.credentials import make_token
from signax.elastic.protocol import (
    CALLS,
    MAX_MESSAGE_BYTES,
    Fetch,
    Follow,
    Join,
    Leave,
    Snapshot,
    to_bytes,
)

PLAN = make_plan(2)
EXPECTED = (
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAUTHENTICATED,
)


def bad_requests(client, count):
    """Calls that must all be refused, as names and bytes: ballots are for vote 2, which is open."""
    draw = random.Random(0)
    bits = make_bits(1)
    ballot, payload = client.ballot(2, bits)
    whole = to_bytes(ballot, payload)
    other = bits.copy()
    other[0] += 1

    def any_bytes():
        return draw.choice(CALLS), draw.randbytes(draw.randrange(200))

    def cut():
        # The whole header is a retry of the ballot that is there, even without its payload.
        return "Vote", whole[: draw.randrange(len(whole) - len(payload))]

    def with_fields():
        name, low, high = draw.choice(
            [
                ("slot", 0, 9),
                ("session", 0, client.session - 1),
                ("session", client.session + 9, 1 << 63),
                ("sequence", 3, 1 << 62),
                ("size", 0, 1 << 40),
            ]
        )
        value = draw.randint(low, high)
        if getattr(ballot, name) == value:
            return any_bytes()
        return "Vote", to_bytes(ballot._replace(**{name: value}), payload)

    def conflicting():
        return "Vote", to_bytes(*client.ballot(2, other))

    def oversized():
        return draw.choice(CALLS), bytes(MAX_MESSAGE_BYTES + 1)

    def others():
        message = draw.choice(
            [
                Join(0, PLAN),
                Join(1, PLAN._replace(digest=f"digest {draw.random()}")),
                Leave(1, client.session + 9),
                Leave(0, 1),
                Follow(1, client.session + 9, draw.randrange(99)),
                Fetch(1, client.session + 9, 0),
                Snapshot(1, client.session, 1, 5, "digest"),
                Snapshot(1, client.session, 77, 0, "digest"),
            ]
        )
        names = {Join: "Join", Leave: "Leave", Follow: "Decisions", Fetch: "GetSnapshot"}
        return names.get(type(message), "PutSnapshot"), to_bytes(message)

    kinds = [any_bytes, cut, with_fields, conflicting, others]
    for n in range(count):
        yield (oversized if n % 500 == 499 else draw.choice(kinds))()


def memory_of(process):
    """The resident bytes of a process."""
    text = pathlib.Path(f"/proc/{process.pid}/statm").read_text()
    return 4096 * int(text.split()[1])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("votes.db*")}


def test_bad_requests_change_nothing(serve, tmp_path):
    send_bad_requests(serve, tmp_path, 400)


def test_ten_thousand_bad_requests_change_nothing(serve, tmp_path):
    send_bad_requests(serve, tmp_path, 10_000)


def send_bad_requests(serve, tmp_path, count):
    if not pathlib.Path("/proc/self/statm").exists():
        pytest.skip("reads the memory of a process from /proc")
    tokens, lines = zip(*map(make_token, range(2)), strict=True)
    (tmp_path / "tokens").write_text("\n".join(lines))
    server = serve("--tokens", str(tmp_path / "tokens"), "--deadline", "1min")
    clients = [Client(server.address, n, plan=PLAN, token=tokens[n]) for n in range(2)]
    for client in clients:
        client.join()
    for sequence in range(2):
        calls = [client.send(sequence, make_bits(client.slot)) for client in clients]
        for client, call in zip(clients, calls, strict=True):
            client.receive(call)
    honest = clients[1]
    pending = honest.send(2, make_bits(1), timeout=600)
    wait_for(lambda: json.loads(honest.status())["present"] == [1])
    stranger = Client(server.address, 1, plan=PLAN, token="unknown")
    draw = random.Random(1)
    memory, before = [], None
    for number, (name, data) in enumerate(bad_requests(honest, count)):
        if number in (count // 5, count - 1):
            memory.append(memory_of(server.process))
        if number == 1:
            before = contents(tmp_path)
        caller = stranger if draw.random() < 0.1 else honest
        with pytest.raises(grpc.RpcError) as raised:
            list(caller.call(name, [data]))
        assert raised.value.code() in EXPECTED, (name, data, raised.value)
    assert contents(tmp_path) == before
    assert memory[1] - memory[0] < 16e6
    status = json.loads(honest.status())
    assert sum(status["refusals"].values()) >= 0.9 * count
    assert (status["sequence"], status["present"]) == (2, [1])
    answer = clients[0].vote(2, make_bits(0))
    assert answer.decision.voters == (0, 1)
    assert honest.receive(pending).decision == answer.decision
    np.testing.assert_array_equal(answer.words, clients[0].follow(2)[0].words)
    assert server.end(signal.SIGTERM) == 0
