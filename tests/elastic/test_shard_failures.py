"""Servers of a run with shards die at the worst moments, and logs do not fit together."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from clients import Client, refused
from sharded_run import (
    PLUS,
    ShardHost,
    count_alone,
    make_ballot,
    make_plan,
    runs_in,
    vote,
    vote_all,
    wait_for,
)

from signax.elastic import shard as shard_module
from signax.elastic import shards as shards_module
from signax.elastic.credentials import MAIN, Credentials, hash_token
from signax.elastic.decider import Decider
from signax.elastic.log import Log
from signax.elastic.pages import describe, metrics
from signax.elastic.parts import Part, cut, part_of_plan
from signax.elastic.protocol import Ballot, digest_of, to_bytes, to_pieces
from signax.elastic.refusals import Reason, RefusedError
from signax.elastic.rounds import Options
from signax.elastic.shard import Shard
from signax.elastic.shard_messages import Count, Lead
from signax.elastic.snapshots import Snapshots

PLAN = make_plan()
BALLOTS = [make_ballot(slot) for slot in range(3)]


@pytest.fixture
def start(tmp_path):
    with runs_in(tmp_path) as start:
        yield start


def begin_votes(pool, connections, sequence=0):
    """Let jobs vote, each in a thread."""
    return [
        pool.submit(vote, connection, sequence, make_ballot(connection._slot, sequence))
        for connection in connections
    ]


def check_decision(run, sequence, voters, answers):
    """All servers and jobs have the same decision, which is the decision of one server."""
    ballots = [make_ballot(slot, sequence) if slot in voters else None for slot in range(3)]
    words, header = count_alone(PLAN, ballots)
    for entry in run.entries(sequence):
        assert (entry.decision.voters, entry.decision.header) == (voters, header)
    for decision, found in answers:
        assert (decision.sequence, decision.voters) == (sequence, voters)
        np.testing.assert_array_equal(np.frombuffer(found, np.uint32), words)


def results_of(votes):
    return [one.result(timeout=20) for one in votes]


def is_held(run, *slots):
    return run.shards[0].shard.status()["holds"] == [*slots]


def test_a_slot_whose_part_is_missing_in_one_shard_votes_nowhere(start, monkeypatch):
    monkeypatch.setattr(shard_module, "PATIENCE", 0.1)
    run = start(servers=3, quorum=2, deadline=0.5)
    connections = [run.connect(slot) for slot in range(2)]
    liar = Client(run.address, 2, plan=PLAN)
    liar.join()
    part = memoryview(cut(np.frombuffer(BALLOTS[2], np.uint32), PLUS, 3)[0]).cast("B")
    ballot = Ballot(2, liar.session, 0, True, len(part), digest_of(part), "whole")
    call = liar.call("Vote", to_pieces(ballot, part))
    wait_for(lambda: run.decider.status()["present"] == (2,))
    answers = vote_all(connections, 0, BALLOTS[:2])
    check_decision(run, 0, (0, 1), answers)
    assert answers[0][0].present == (0, 1)
    with pytest.raises(grpc.RpcError, match="open again"):
        next(call)


def test_a_ballot_is_not_there_before_all_its_parts_are(start):
    run = start(quorum=2, deadline=0.2)
    connections = run.connect_all()
    with ThreadPoolExecutor(3) as pool:
        run.shards[0].stop()
        votes = begin_votes(pool, connections[:2])
        time.sleep(0.5)
        status = run.decider.status()
        assert status["present"] == ()
        assert "UNAVAILABLE" in wait_for(lambda: run.decider.status()["shards"][0]["problem"])
        assert "Shard 1, 127.0.0.1:" in describe(run.decider.status())
        assert 'signax_elastic_shard_up{shard="1"} 0' in metrics(run.decider.status())
        run.shards[0].start()
        check_decision(run, 0, (0, 1), results_of(votes))


def test_parts_of_two_ballots_of_a_slot_are_not_mixed(start):
    run = start()
    connections = run.connect_all()
    with ThreadPoolExecutor(3) as pool:
        votes = begin_votes(pool, connections[1:])
        wait_for(lambda: is_held(run, 1, 2))
        part = memoryview(cut(np.frombuffer(make_ballot(2, 9), np.uint32), PLUS, 2)[1]).cast("B")
        ballot = Ballot(2, 0, 0, True, len(part), digest_of(part), "another ballot")
        call = Client(run.shards[0].address, 2).call("Vote", to_pieces(ballot, part))
        assert next(call)
        votes += begin_votes(pool, connections[:1])
        check_decision(run, 0, (0, 1, 2), results_of(votes))


def test_a_main_server_that_dies_between_count_and_write_decides_again(start, monkeypatch):
    run = start(quorum=2, deadline=0.3)
    connections = run.connect_all()

    def die(*args):
        raise KeyboardInterrupt("killed")

    with ThreadPoolExecutor(3) as pool:
        with monkeypatch.context() as patched:
            patched.setattr(run.log, "append", die)
            votes = begin_votes(pool, connections[:2])
            run.decider.wait(10)
        tentative = run.shards[0].log.read(0)
        assert tentative.decision.voters == (0, 1)
        assert run.shards[0].shard.status()["is_tentative"]
        assert run.log.next == 0
        run.stop()
        run.options = Options(3, 3, 20.0)
        run.start()
        votes += begin_votes(pool, connections[2:])
        check_decision(run, 0, (0, 1, 2), results_of(votes))
        check_decision(run, 1, (0, 1, 2), results_of(begin_votes(pool, connections, 1)))


def test_a_shard_that_dies_before_it_counts_gets_the_parts_again(start):
    run = start()
    connections = run.connect_all()
    with ThreadPoolExecutor(3) as pool:
        votes = begin_votes(pool, connections[:2])
        wait_for(lambda: is_held(run, 0, 1))
        run.shards[0].stop()
        run.shards[0].start()
        wait_for(lambda: is_held(run, 0, 1))
        votes += begin_votes(pool, connections[2:])
        check_decision(run, 0, (0, 1, 2), results_of(votes))


def test_a_shard_that_has_lost_parts_waits_for_them(start, monkeypatch):
    run = start()
    connections = run.connect_all()
    forget = run.shards[0].shard.count

    def count(request):
        monkeypatch.undo()
        run.shards[0].shard._held.clear()
        return forget(request)

    monkeypatch.setattr(run.shards[0].shard, "count", count)
    answers = vote_all(connections, 0, BALLOTS)
    check_decision(run, 0, (0, 1, 2), answers)


@pytest.mark.parametrize("is_written", [False, True], ids=["before the write", "after the write"])
def test_a_shard_that_dies_after_it_has_counted_tells_the_decision(start, monkeypatch, is_written):
    run = start()
    connections = run.connect_all()
    may_write, append = threading.Event(), run.log.append
    has_written = threading.Event()

    def wait(*args):
        if not is_written:
            assert may_write.wait(10)
        append(*args)
        has_written.set()

    monkeypatch.setattr(run.log, "append", wait)
    wait_for(lambda: run.shards[0].log.plan)
    if is_written:  # and the shard does not hear of it
        monkeypatch.setattr(run.shards[0].shard, "lead", lambda _: time.sleep(0.1))
    with ThreadPoolExecutor(3) as pool:
        votes = begin_votes(pool, connections)
        wait_for(lambda: run.shards[0].log.next == 1)
        if is_written:
            assert has_written.wait(10)
        assert run.shards[0].shard.status()["is_tentative"]
        run.shards[0].stop()
        run.shards[0].start()
        may_write.set()
        check_decision(run, 0, (0, 1, 2), results_of(votes))
        check_decision(run, 1, (0, 1, 2), results_of(begin_votes(pool, connections, 1)))


def test_a_main_server_stops_although_a_shard_cannot_count(start, monkeypatch):
    run = start()
    connections, shard = run.connect_all(), run.shards[0].shard

    def fail(count):
        raise RefusedError(Reason.UNREADY, "not now")

    monkeypatch.setattr(shard, "count", fail)
    with ThreadPoolExecutor(3) as pool:
        votes = begin_votes(pool, connections)
        wait_for(lambda: "not now" in (run.decider.status()["shards"][0]["problem"] or ""))
        run.stop()
        monkeypatch.undo()
        run.start()
        check_decision(run, 0, (0, 1, 2), results_of(votes))


def test_a_shard_that_hangs_is_named_and_counts_once_it_goes_on(start, monkeypatch):
    monkeypatch.setattr(shards_module, "TIMEOUT", 0.3)
    run = start()
    connections, log, goes_on = run.connect_all(), run.shards[0].log, threading.Event()
    append = log.append

    def hang(*args, **kwargs):
        assert goes_on.wait(20)
        append(*args, **kwargs)

    monkeypatch.setattr(log, "append", hang)
    with ThreadPoolExecutor(3) as pool:
        votes = begin_votes(pool, connections)
        wait_for(lambda: "EXCEEDED" in (run.decider.status()["shards"][0]["problem"] or ""))
        began = time.monotonic()
        run.stop()
        assert time.monotonic() - began < 10
        run.start()
        goes_on.set()
        check_decision(run, 0, (0, 1, 2), results_of(votes))


def test_a_job_replays_parts_that_a_shard_does_not_know_to_be_decided(start):
    run = start()
    connections = run.connect_all()
    for sequence in range(3):
        vote_all(connections, sequence, [make_ballot(slot, sequence) for slot in range(3)])
    run.stop()
    run.shards[0].stop()
    run.shards[0].start()
    run.start()
    reader = run.connect(1)
    answers = [*reader.follow(0)]
    assert len(answers) == 3
    for sequence, answer in enumerate(answers):
        check_decision(run, sequence, (0, 1, 2), [answer])


def make_decider(log):
    return Decider(log, Snapshots(log.path.with_name("other")), Options(3, 2, 1.0))


def test_logs_keep_the_number_and_the_order_of_shards(start, tmp_path):
    run = start(servers=3)
    vote_all(run.connect_all(), 0, BALLOTS)
    run.stop()
    first, second = run.shards
    run.shards = [first]
    with pytest.raises(ValueError, match="run with 2 shards, and --shards names 1"):
        run.start()
    run.log.close()
    for name, make, match in [
        ("votes.db", make_decider, "the main server of a run with 2 shards"),
        ("part1.db", make_decider, "shard 1 of a run with 2 shards"),
        ("votes.db", lambda log: Shard(log, 3), "main server of .* not to a shard"),
        ("part1.db", lambda log: Shard(log, 4), "3 workers, and the server 4"),
    ]:
        with (
            contextlib.closing(Log(tmp_path / name)) as log,
            pytest.raises(ValueError, match=match),
        ):
            make(log)
    for shard in (first, second):  # whose logs were opened by others
        shard.stop()
        shard.start()
    run.shards = [second, first]
    run.start()
    wait_for(lambda: "belongs to shard 2" in run.decider.status()["shards"][0]["problem"])
    run.stop()
    run.shards = [first, second]
    run.start()
    wait_for(lambda: run.decider.status()["shards"][0]["problem"] is None)


def test_a_shard_without_the_decisions_of_the_run_is_refused(start, tmp_path):
    run = start()
    connections = run.connect_all()
    vote_all(connections, 0, BALLOTS)
    run.shards[0].stop()
    run.shards[0].path = tmp_path / "empty.db"
    run.shards[0].start()
    wait_for(lambda: "lacks decisions" in (run.decider.status()["shards"][0]["problem"] or ""))
    run.shards[0].stop()
    run.shards[0].path = tmp_path / "part1.db"
    run.shards[0].start()
    with ThreadPoolExecutor(3) as pool:
        check_decision(run, 1, (0, 1, 2), results_of(begin_votes(pool, connections, 1)))


def test_only_the_main_server_has_a_shard_count(tmp_path):
    tokens = {0: "first", 1: "second", MAIN: "main"}
    hashes = {slot: hash_token(token) for slot, token in tokens.items()}
    host = ShardHost(tmp_path / "part1.db", 3, Credentials(hashes)).start()
    part = Part("run", 1, 2)
    lead, count = Lead(part, part_of_plan(PLAN, 1, 2), None, 0), Count("run", 9, 0, (), (), ())
    callers = {slot: Client(host.address, 0, token=token) for slot, token in tokens.items()}
    for name, message in (("Lead", lead), ("Count", count)):
        stranger = Client(host.address, 0, token="unknown")
        refused("unauthenticated", stranger.call, name, [to_bytes(message)])
        refused("wrong-slot", callers[0].call, name, [to_bytes(message)], match="only the main")
    assert host.log.plan is None
    assert [*callers[MAIN].call("Lead", [to_bytes(lead)])]
    assert [*callers[MAIN].call("Count", [to_bytes(count)])]
    assert host.log.next == 1
    ballot = to_bytes(Ballot(1, 0, 0, False, 0, digest_of(b"")))
    refused("wrong-slot", callers[0].call, "Vote", [ballot])
    refused("wrong-slot", callers[MAIN].call, "Vote", [ballot], match="of the main server")
    older, other = count._replace(turn=8), count._replace(run="other", turn=10)
    refused("repeated", callers[MAIN].call, "Count", [to_bytes(older)], match="newer request")
    refused("unready", callers[MAIN].call, "Count", [to_bytes(other)], match="this run")
    wrong = lead._replace(part=part._replace(run="other"))
    refused("wrong-plan", callers[MAIN].call, "Lead", [to_bytes(wrong)], match="of another run")
    host.stop()
