"""The service over gRPC on the loopback: votes, refusals, failures and restarts."""

import json
import threading
import time

import grpc
import numpy as np
import pytest
from clients import (
    WORDS,
    majority,
    make_bits,
    make_plan,
    refused,
)

from signax.elastic.protocol import PIECE_BYTES, SERVICE
from signax.elastic.server import HEALTH, NOT_SERVING, SERVING


def vote_all(clients, sequence, seed=0, words=WORDS):
    """All clients vote at once; return their answers."""
    bits = [make_bits(client.slot, seed, words) for client in clients]
    calls = [client.send(sequence, one) for client, one in zip(clients, bits, strict=True)]
    return [client.receive(call) for client, call in zip(clients, calls, strict=True)], bits


def test_all_receive_the_majority(start):
    clients = start().clients()
    for sequence in range(3):
        answers, bits = vote_all(clients, sequence, seed=sequence)
        for answer in answers:
            assert answer.decision.sequence == sequence
            assert answer.decision.voters == answer.decision.present == (0, 1, 2)
            assert answer.decision.header >> 1 == 3
            np.testing.assert_array_equal(answer.words, majority(bits))


def test_a_ballot_of_many_pieces_arrives(start):
    words = PIECE_BYTES // 4 + 5
    plan = make_plan(2, words=words)
    clients = start(plan=plan).clients()
    answers, bits = vote_all(clients, 0, words=words)
    for answer in answers:
        np.testing.assert_array_equal(answer.words, majority(bits, words))


def test_a_vote_closes_at_the_deadline_without_the_absent(start):
    clients = start(deadline=0.2).clients()
    began = time.monotonic()
    answers, bits = vote_all(clients[:2], 0)
    assert 0.2 <= time.monotonic() - began < 2.0
    np.testing.assert_array_equal(answers[0].words, majority(bits))
    assert answers[0].decision.voters == (0, 1)
    began = time.monotonic()
    vote_all(clients[:2], 1)
    assert time.monotonic() - began < 0.2  # slot 2 is not expected any more


def test_a_late_ballot_is_answered_with_the_decision(start):
    clients = start(deadline=0.1).clients()
    answers, _ = vote_all(clients[:2], 0)
    late = clients[2].vote(0, make_bits(2))
    assert late.decision == answers[0].decision
    np.testing.assert_array_equal(late.words, answers[0].words)
    answers, _ = vote_all(clients, 1)
    assert answers[0].decision.voters == (0, 1, 2)


def test_a_worker_may_abstain(start):
    clients = start(deadline=60.0).clients()
    bits = [make_bits(0), make_bits(1), None]
    calls = [client.send(0, one) for client, one in zip(clients, bits, strict=True)]
    answers = [client.receive(call) for client, call in zip(clients, calls, strict=True)]
    assert answers[2].decision.voters == (0, 1)
    assert answers[2].decision.present == (0, 1, 2)
    np.testing.assert_array_equal(answers[2].words, majority(bits[:2]))


def test_a_repeated_ballot_counts_once_and_ends_the_older_call(start):
    clients = start(deadline=60.0).clients()
    older = clients[0].send(0, make_bits(0))
    time.sleep(0.2)
    newer = clients[0].send(0, make_bits(0))
    with pytest.raises(grpc.RpcError):
        next(older)
    rest = [client.send(0, make_bits(client.slot)) for client in clients[1:]]
    answer = clients[0].receive(newer)
    assert answer.decision.header >> 1 == 3
    np.testing.assert_array_equal(answer.words, majority([*map(make_bits, range(3))]))
    for client, call in zip(clients[1:], rest, strict=True):
        client.receive(call)


def test_a_ballot_whose_sender_is_gone_counts(start):
    clients = start(deadline=60.0).clients()
    call = clients[0].send(0, make_bits(0))
    time.sleep(0.2)
    call.cancel()
    clients[0].channel.close()
    answers, _ = vote_all(clients[1:], 0)
    assert answers[0].decision.voters == (0, 1, 2)


def test_other_bits_are_refused_and_the_first_ones_count(start):
    clients = start(deadline=60.0).clients()
    first = clients[0].send(0, make_bits(0))
    time.sleep(0.2)
    refused(
        "conflict",
        lambda: clients[0].send(0, make_bits(0, seed=1)),
        match="other bits",
    )
    del first
    answers, bits = vote_all(clients, 0)
    np.testing.assert_array_equal(answers[0].words, majority(bits))


def test_a_restarted_server_goes_on_with_its_log(start):
    host = start(deadline=0.2)
    clients = host.clients()
    answers, _ = vote_all(clients[:2], 0)
    host.stop()
    host.start()
    client = clients[0]
    refused(
        "no-session",
        lambda: client.send(1, make_bits(0)),
        match="join",
    )
    assert client.join().sequence == 1
    again = client.vote(0, make_bits(0, seed=9))
    assert again.decision == answers[0].decision
    clients[1].join()
    vote_all(clients[:2], 1)
    assert [answer.decision.sequence for answer in client.follow(0)] == [0, 1]


def test_stopping_finishes_the_round_in_hand(start):
    host = start(deadline=0.5)
    clients = host.clients()
    calls = [client.send(0, make_bits(client.slot)) for client in clients[:2]]
    time.sleep(0.1)
    stopping = threading.Thread(target=host.stop)
    stopping.start()
    answers = [client.receive(call) for client, call in zip(clients, calls, strict=False)]
    assert answers[0].decision.voters == (0, 1)
    stopping.join()
    host.start()


def test_stopping_does_not_wait_for_a_quorum(start):
    host = start(deadline=0.2)
    client, *_ = host.clients()
    call = client.send(0, make_bits(0))
    time.sleep(0.1)
    began = time.monotonic()
    host.stop()
    assert time.monotonic() - began < 5.0
    refused("stopping", lambda: call)
    host.start()


def test_decisions_are_followed_from_any_vote(start):
    clients = start(keep=2).clients()
    everything = [vote_all(clients, sequence, seed=sequence)[0][0] for sequence in range(4)]
    followed = clients[1].follow(2)
    assert [answer.decision for answer in followed] == [a.decision for a in everything[2:]]
    assert clients[1].follow(4) == []
    refused("too-old", clients[1].follow, 1, match="snapshot")
    refused("too-old", clients[1].vote, 0, make_bits(1))


def test_a_slot_that_leaves_is_not_waited_for(start):
    clients = start(deadline=60.0).clients()
    calls = [client.send(0, make_bits(client.slot)) for client in clients[:2]]
    clients[2].leave()
    assert clients[0].receive(calls[0]).decision.voters == (0, 1)
    refused(
        "old-session",
        clients[2].vote,
        0,
        make_bits(2),
    )


def test_another_job_takes_the_slot_over(start):
    host = start(deadline=60.0)
    clients = host.clients()
    waiting = clients[0].send(0, make_bits(0))
    time.sleep(0.1)
    other = host.client(0)
    other.join()
    answers, bits = vote_all([other, *clients[1:]], 0, seed=7)
    np.testing.assert_array_equal(answers[0].words, majority(bits))
    with pytest.raises(grpc.RpcError):
        next(waiting)
    refused("old-session", clients[0].vote, 1, make_bits(0))


def test_a_member_is_asked_for_a_snapshot(start):
    host = start()
    clients = host.clients()
    vote_all(clients, 0)
    refused("no-snapshot", clients[2].get_snapshot)
    answers, _ = vote_all(clients, 1)
    assert sum(answer.decision.wants_snapshot for answer in answers) == 1
    answers, _ = vote_all(clients, 2)
    assert not any(answer.decision.wants_snapshot for answer in answers)
    payload = np.random.default_rng(0).bytes(2 * PIECE_BYTES + 1)
    clients[0].put_snapshot(2, payload)
    snapshot, received = clients[2].get_snapshot()
    assert (snapshot.step, received) == (2, payload)
    refused("no-snapshot", clients[2].get_snapshot, 3)
    refused("future", clients[0].put_snapshot, 4, b"later")
    host.stop()
    host.start()
    assert clients[2].join().snapshot == 2
    assert clients[2].get_snapshot()[1] == payload


def test_a_snapshot_of_another_run_is_forgotten(start):
    host = start()
    clients = host.clients()
    for sequence in range(3):
        vote_all(clients, sequence)
    clients[0].put_snapshot(3, b"of a run whose log is deleted")
    host.stop()
    for path in host.folder.glob("votes.db*"):
        path.unlink()
    host.start()
    assert clients[0].join().snapshot is None
    refused("no-snapshot", clients[0].get_snapshot)
    clients = host.clients()
    for sequence in range(4):  # the log has as many steps as the snapshot now
        vote_all(clients, sequence)
    host.stop()
    host.start()
    assert clients[0].join().snapshot is None
    assert (host.folder / "snapshot.unused").exists()


def test_the_status_counts_refusals_votes_and_bytes(start):
    host = start()
    clients = host.clients()
    answers, _ = vote_all(clients, 0)
    refused("future", clients[0].vote, 2, make_bits(0))
    status = json.loads(clients[0].status())
    assert status["step"] == status["rounds"] == 1
    assert status["refusals"]["future"] == 1
    assert status["bytes_in"] == 3 * make_bits(0).nbytes
    assert status["bytes_out"] == 3 * answers[0].words.nbytes
    assert [slot["voted"] for slot in status["slots"]] == [1, 1, 1]
    assert all(slot["equal_bits"] > 0.6 for slot in status["slots"])


def test_health_is_checked_by_grpcs_own_protocol(start):
    host = start()
    channel = grpc.insecure_channel(host.address)
    check = channel.unary_unary(f"/{HEALTH}/Check")
    assert check(b"", timeout=10) == SERVING
    watch = channel.unary_stream(f"/{HEALTH}/Watch")(b"", timeout=20)
    assert next(watch) == SERVING
    stopping = threading.Thread(target=host.stop)
    stopping.start()
    assert [*watch] == [NOT_SERVING]
    stopping.join()
    host.start()


def test_calls_of_another_version_are_unknown(start):
    host = start()
    call = grpc.insecure_channel(host.address).unary_unary(f"/{SERVICE.replace('v1', 'v2')}/Join")
    with pytest.raises(grpc.RpcError) as raised:
        call(b"", timeout=10)
    assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED
