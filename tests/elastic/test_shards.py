"""Servers with shards decide what one server decides, and all of them count the same voters."""

import itertools

import numpy as np
import pytest
from jobs import Job, Server, assert_same, run_together
from sharded_run import ABSTAIN, PLUS, count_alone, make_ballot, make_plan, runs_in, vote_all

from signax.elastic.connection import Connection, VoteServerError


@pytest.fixture
def start(tmp_path):
    with runs_in(tmp_path) as start:
        yield start


@pytest.mark.parametrize("servers", [2, 3])
@pytest.mark.parametrize("exchange", [PLUS, ABSTAIN], ids=["one plane", "two planes"])
def test_decisions_are_those_of_one_server(start, servers, exchange):
    plan = make_plan(3, exchange)
    run = start(servers=servers, plan=plan)
    connections = run.connect_all()
    for sequence, abstains in enumerate(itertools.product([False, True], repeat=3)):
        ballots = [
            None if absent else make_ballot(slot, sequence, exchange)
            for slot, absent in enumerate(abstains)
        ]
        words, header = count_alone(plan, ballots)
        for decision, found in vote_all(connections, sequence, ballots):
            assert (decision.sequence, decision.header) == (sequence, header)
            assert decision.present == (0, 1, 2)
            np.testing.assert_array_equal(np.frombuffer(found, np.uint32), words)
    decisions = [one.decision for one in run.entries(3)]
    assert len({decision[:4] for decision in decisions}) == 1


@pytest.mark.parametrize("name", ["lion", "abstain"])
def test_jobs_train_as_with_one_server_and_replay_what_they_have_missed(start, tmp_path, name):
    run = start(servers=3, quorum=2, deadline=0.3)
    jobs = run_together([Job(run.address, slot, name) for slot in range(2)], 12)
    (tmp_path / "alone").mkdir()
    server = Server(tmp_path / "alone", 3, quorum=2, deadline=0.3)
    alone = run_together([Job(server.address, slot, name) for slot in range(2)], 12)
    late = Job(run.address, 2, name)
    late.catch_up()
    assert late.exchange.step == 12
    for job in (*jobs, late):
        assert_same(job.params, alone[0].params)
    for job in (*jobs, late, *alone):
        job.exchange.close()
    server.stop()


def test_a_job_without_a_history_takes_a_snapshot(start):
    run = start(quorum=2, deadline=0.3, keep=6)
    jobs = run_together([Job(run.address, slot) for slot in range(2)], 15)
    assert 0 < run.shards[0].log.first <= run.log.first
    late = Job(run.address, 2)
    late.catch_up()
    assert late.exchange.step == 15
    assert_same(late.params, jobs[0].params)
    for job in (*jobs, late):
        job.exchange.close()


def test_rejects_more_servers_than_words(start):
    run = start(servers=3, plan=make_plan(3, PLUS._replace(widths=(2,))))
    with pytest.raises(VoteServerError, match="2 words is too short for 3 servers"):
        run.connect(0)


def test_a_client_that_knows_no_shards_is_refused(start):
    run = start()
    connection = Connection(run.address, 0, None, None, 5.0)
    run.connections.append(connection)
    connection.join(run.plan)
    with pytest.raises(VoteServerError, match="the run has shards"):
        connection.vote(0, True, make_ballot(0))


def test_shards_elsewhere_need_credentials(start):
    run = start()
    run.decider._shards.addresses = ("votes.example:7443",)
    with pytest.raises(VoteServerError, match=r"votes\.example:7443 is not on this machine"):
        run.connect(0)


def test_a_second_ballot_with_other_bits_is_an_error(start):
    connections = start().connect_all()
    vote_all(connections, 0, [make_ballot(slot) for slot in range(3)])
    with pytest.raises(ValueError, match="already voted in vote 0"):
        connections[0].vote(0, True, make_ballot(0, seed=1))
