"""When a job that comes in the middle of a round should begin."""

import time
from concurrent.futures import ThreadPoolExecutor

from clients import make_bits, make_plan

from signax.elastic.phase import Phase

LENGTH, DEADLINE, QUORUM = 4.0, 1.0, 2


def in_step():
    """Four slots have voted at 10 s, and in the round before it."""
    phase = Phase(QUORUM, DEADLINE)
    phase.open((0, 1, 2, 3), 10 - LENGTH)
    phase.open((0, 1, 2, 3), 10.0)
    return phase


def test_a_job_begins_at_once_while_the_deadline_would_wait_for_it():
    phase = in_step()
    assert phase.wait(10.0) == phase.wait(10 + DEADLINE) == 0


def test_a_later_job_waits_for_the_next_decision():
    phase = in_step()
    assert phase.wait(10 + 1.5 * DEADLINE) == 2 * LENGTH - 1.5 * DEADLINE
    phase.open((0, 1, 2), 14.0)
    assert phase.wait(14.0) == 0


def test_nobody_waits_for_longer_than_two_rounds_take():
    phase = in_step()
    assert phase.wait(10 + 2 * LENGTH) == phase.wait(1000.0) == 0


def test_nobody_waits_unless_a_quorum_and_a_spare_compute():
    """As after an evaluation in which all workers pause."""
    phase = in_step()
    for _ in range(2):
        phase.drop(2)
        assert phase.wait(12.0) > 0
    phase.drop(0)
    assert phase.wait(12.0) == 0


def test_nobody_waits_before_two_decisions():
    phase = Phase(QUORUM, DEADLINE)
    assert phase.wait(5.0) == 0
    phase.open((0, 1, 2), 10.0)
    assert phase.wait(12.0) == 0


def vote_all(pool, clients, sequence):
    """All clients vote at once."""
    calls = [pool.submit(one.vote, sequence, make_bits(one.slot)) for one in clients]
    return [call.result(20) for call in calls]


def start_with_long_rounds(start):
    """Four clients, and a server that has decided two votes and expects rounds of a minute."""
    host = start(plan=make_plan(4), deadline=0.1)
    clients = host.clients()
    with ThreadPoolExecutor(4) as pool:
        for sequence in range(2):
            vote_all(pool, clients, sequence)
    host.decider._phase._length = 60.0
    time.sleep(0.2)  # the workers compute
    return clients


def test_a_late_job_joins_with_the_next_decision(start):
    clients = start_with_long_rounds(start)
    with ThreadPoolExecutor(4) as pool:
        joining = pool.submit(clients[3].join)
        time.sleep(0.3)
        assert not joining.done()
        vote_all(pool, clients[:3], 2)
        assert joining.result(10).sequence == 3


def test_a_late_job_joins_at_once_if_a_quorum_is_missing(start):
    clients = start_with_long_rounds(start)
    with ThreadPoolExecutor(4) as pool:
        joining = pool.submit(clients[3].join)
        first = pool.submit(clients[0].vote, 2, make_bits(0))
        assert joining.result(10).sequence == 2
        clients[3].vote(2, make_bits(3))
        first.result(10)


def test_jobs_that_all_come_late_begin_at_once(start):
    clients = start_with_long_rounds(start)
    with ThreadPoolExecutor(4) as pool:
        joined = [*pool.map(lambda one: one.join(), clients)]
    assert {one.sequence for one in joined} == {2}
