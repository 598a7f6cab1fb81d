"""A job's connection: which failures it repeats, and when it gives up."""

import time

import grpc
import pytest
from clients import make_bits, make_plan

from signax.elastic import connection as module
from signax.elastic.connection import Connection, VoteServerError
from signax.elastic.plan import Exchange, Plan

PLAN = make_plan(1)


class FailedCall(grpc.RpcError):
    """A status of gRPC's own, without a reason."""

    def __init__(self, code):
        super().__init__()
        self._code = code

    def code(self):
        return self._code

    def details(self):
        return "it failed"

    def trailing_metadata(self):
        return ()


@pytest.fixture
def host(start):
    return start(plan=PLAN, quorum=1)


@pytest.fixture
def connect(host):
    connections = []

    def connect(give_up=5.0):
        connections.append(Connection(host.address, 0, None, None, give_up))
        return connections[-1]

    yield connect
    for connection in connections:
        connection.close()


def fail(connection, monkeypatch, *problems, name="Status"):
    """Let calls of a name fail, one after the other, before they reach the server."""
    call, pending = connection._call, [*problems]

    def failing(called, *args, **kwargs):
        if called == name and pending:
            problem = pending.pop(0)
            if isinstance(problem, Exception):
                raise problem
            problem()
        return call(called, *args, **kwargs)

    monkeypatch.setattr(connection, "_call", failing)
    return pending


def vote(connection, sequence, seed=0):
    bits = memoryview(make_bits(0, seed)).cast("B")
    return connection.vote(sequence, True, bits)


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNAVAILABLE,
    ],
)
def test_repeats_a_call_that_grpc_itself_refuses(connect, monkeypatch, code):
    connection = connect()
    pending = fail(connection, monkeypatch, FailedCall(code))
    assert b'"step": 0' in connection.status().tobytes()
    assert not pending


def test_repeats_a_call_that_ends_without_an_answer(connect, monkeypatch):
    connection = connect()
    fail(connection, monkeypatch, StopIteration())
    assert connection.status()


def test_raises_what_cannot_pass(connect, monkeypatch):
    connection = connect()
    fail(connection, monkeypatch, FailedCall(grpc.StatusCode.UNIMPLEMENTED))
    with pytest.raises(VoteServerError, match="refuses: it failed") as raised:
        connection.status()
    assert raised.value.reason is None
    with pytest.raises(VoteServerError) as raised:
        connection.join(Plan("other", 2, (Exchange((5,), "plus", "plus"),)))
    assert raised.value.reason == "wrong-plan"


@pytest.mark.parametrize(("silence", "failures"), [(60.0, 1), (0.2, 3)])
def test_a_wait_for_the_others_does_not_count_as_silence(connect, monkeypatch, silence, failures):
    monkeypatch.setattr(module, "SILENCE", silence)

    def wait():
        time.sleep(0.5)
        raise FailedCall(grpc.StatusCode.UNAVAILABLE)

    connection = connect(give_up=0.3)
    fail(connection, monkeypatch, *[wait] * failures)
    assert connection.status()


def test_gives_up_if_decisions_never_come(connect, monkeypatch):
    connection = connect(give_up=0.3)
    connection.join(PLAN)
    fail(connection, monkeypatch, *[FailedCall(grpc.StatusCode.UNKNOWN)] * 99, name="Decisions")
    with pytest.raises(VoteServerError, match=r"give_up=0\.3 seconds: UNKNOWN"):
        list(connection.follow(0))


def test_follows_the_log_over_an_interruption(connect, host, monkeypatch):
    connection = connect()
    connection.join(PLAN)
    for sequence in range(4):
        vote(connection, sequence)
    fail(connection, monkeypatch, FailedCall(grpc.StatusCode.CANCELLED), name="Decisions")
    found = []
    for decision, words in connection.follow(1):
        found.append(decision.sequence)
        assert len(words) == decision.size
        if len(found) == 1:
            host.stop()
            host.start()
    assert found == [1, 2, 3]


def test_a_second_ballot_with_other_bits_is_an_error(connect):
    connection = connect()
    connection.join(PLAN)
    first, _ = vote(connection, 0)
    assert vote(connection, 0)[0] == first
    with pytest.raises(ValueError, match=r"already voted in vote 0.*MultiSteps"):
        vote(connection, 0, seed=1)
    assert vote(connection, 1, seed=1)[0].sequence == 1


def test_an_upload_that_fails_ends_no_job(connect, monkeypatch, caplog):
    connection = connect()
    connection.join(PLAN)
    vote(connection, 0)
    problem = FailedCall(grpc.StatusCode.UNKNOWN)
    fail(connection, monkeypatch, problem, name="PutSnapshot")
    connection.put_snapshot(1, memoryview(b"bytes"))
    assert "snapshot of step 1 was not uploaded" in caplog.text
    connection.put_snapshot(1, memoryview(b"bytes"))
    snapshot, payload = connection.get_snapshot(1)
    assert (snapshot.step, payload.tobytes()) == (1, b"bytes")


def test_closes_twice_and_after_the_server_has_forgotten_the_session(connect, host):
    connection = connect()
    connection.join(PLAN)
    host.stop()
    host.start()
    connection.close()
    connection.close()
    with pytest.raises(VoteServerError, match="is closed"):
        vote(connection, 0)


def test_says_that_it_waits(connect, monkeypatch, caplog):
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    connection = connect()
    fail(connection, monkeypatch, *[FailedCall(grpc.StatusCode.UNAVAILABLE)] * 4)
    connection.status()
    waits = [one for one in caplog.messages if "waiting for the vote server" in one]
    assert len(waits) == 1
