"""All states of a main server and a shard keep the invariants of `signax.elastic.commits`.

Faults that are built in on purpose show that the search finds them.
"""

import pytest
from commits_model import Config, ViolationError, explore

CONFIGS = {
    "two votes": Config(turns=1),
    "a main server asks again": Config(sequences=1, shard_failures=0),
    "two votes, and one main server": Config(starts=1, shard_failures=2),
    "three main servers": Config(sequences=1, starts=3, turns=1, shard_failures=0),
}
FAULTS = {
    "forgets turns": "all servers have the same voters|the shard knows its log",
    "no turns": "all servers have the same voters|the shard knows its log",
    "believes in its log": "the shard tells what is decided",
    "does not wait": "the shard's log lacks no decision",
    "answers first": "the shard's log lacks no decision",
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_no_state_breaks_an_invariant_and_each_has_a_way_to_the_end(config):
    assert explore(config) > 1000


def test_main_servers_and_a_shard_may_die_at_any_moment():
    assert explore(Config(sequences=1)) > 200_000


@pytest.mark.parametrize("fault", FAULTS)
def test_the_search_finds_a_fault_of_a_shard(fault):
    with pytest.raises(ViolationError, match=FAULTS[fault]):
        explore(Config(sequences=1, fault=fault))
