"""All states of a small vote keep the invariants of `signax.elastic.rounds`.

Faults that are built in on purpose show that the search finds them.
"""

import random

import pytest
from rounds_model import (
    Config,
    Job,
    State,
    ViolationError,
    check_state,
    explore,
    go_on,
    successors,
)

# Each configuration asks another question, since all of them at once have too many states.
CONFIGS = {
    "the server dies twice": Config(worker_failures=0, server_failures=2),
    "a job dies or leaves, and comes back": Config(server_failures=0),
    "a job dies or leaves for good, and the server dies": Config(restarts=False),
    "two votes of one step": Config(num_exchanges=2, server_failures=0, restarts=False),
    "two votes of one step, and the server dies": Config(
        num_workers=2, quorum=1, num_exchanges=2, worker_failures=0, abstains=True
    ),
    "late requests to join": Config(sequences=1, late_joins=True),
    "other bits": Config(sequences=1, server_failures=0, conflicts=True),
    "two jobs die": Config(sequences=1, worker_failures=2, server_failures=0),
    "a shard loses a part, and a job dies or leaves": Config(
        sequences=1, server_failures=0, losses=2
    ),
    "a shard loses a part of one of two votes": Config(
        num_workers=2, quorum=1, num_exchanges=2, server_failures=0, losses=1
    ),
    "a lone worker": Config(num_workers=1, quorum=1),
}
FAULTS = {
    "no quorum": "a decision has ballots from a quorum",
    "no withdrawal": "a ballot came from the newest session of its slot",
    "tells first": "a job is told what is logged|a round opens once",
    "forgets voters": "the voters of a step never grow",
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_no_state_breaks_an_invariant_and_each_has_a_way_to_the_end(config):
    states, stuck = explore(config)
    assert states > 10
    assert stuck == 0


def test_a_job_and_the_server_may_die_at_any_moment():
    states, stuck = explore(Config())
    assert states > 100_000
    assert stuck == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_the_search_finds_a_fault(fault):
    forgets = fault == "forgets voters"
    config = Config(num_exchanges=2, worker_failures=not forgets, abstains=forgets, fault=fault)
    with pytest.raises(ViolationError, match=FAULTS[fault]):
        explore(config)


def test_the_search_finds_states_without_a_way_to_the_end():
    config = Config(server_failures=0, restarts=False, fault="no deadline")
    _, stuck = explore(config)
    assert stuck > 0


@pytest.mark.parametrize("seed", range(4))
def test_random_walks_of_more_jobs_break_no_invariant(seed):
    choose = random.Random(seed)
    config = Config(
        5, 3, num_exchanges=2, sequences=6, worker_failures=6, server_failures=3, abstains=True
    )
    decided = 0
    for _ in range(20):
        state = State((go_on(config, Job(), 0, 0),) * config.num_workers, None)
        for _ in range(300):
            check_state(state)
            ways = [new for _, new in successors(config, state)]
            if not ways:
                break
            state = choose.choice(ways)
        decided += state.logged
    assert decided > 20
