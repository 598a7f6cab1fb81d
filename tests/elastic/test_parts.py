"""Parts of plans, ballots and decisions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from signax._wire.words import LANES, unseal
from signax.elastic.parts import bounds, cut, part_of_plan, put_together
from signax.elastic.plan import Exchange, Plan


@given(st.integers(1, 500), st.integers(1, 9))
def test_servers_share_a_plane_as_evenly_as_possible(width, servers):
    ends = [bounds(width, server, servers) for server in range(servers)]
    assert [start for start, _ in ends] == [0, *[stop for _, stop in ends[:-1]]]
    assert ends[-1][1] == width
    sizes = {stop - start for start, stop in ends}
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("servers", [1, 2, 3, 5])
@pytest.mark.parametrize("widths", [(5,), (5, 5), (127,), (300, 300)], ids=str)
def test_parts_are_sealed_and_come_together_again(widths, servers):
    exchange = Exchange(widths, "plus" if len(widths) == 1 else "abstain", "plus")
    draw = np.random.default_rng(0)
    message = np.zeros(exchange.ballot_words, np.uint32)
    stop = sum(widths)
    message[:stop], message[stop] = draw.integers(0, 2**32, stop, np.uint32), 9
    parts, payloads = cut(message, exchange, servers), []
    for server, part in enumerate(parts):
        own = part_of_plan(Plan("digest", 2, (exchange,)), server, servers).exchange(0)
        assert part.size == own.ballot_words
        planes, header = unseal(part.reshape(1, -1, LANES), own.widths)
        assert header == 9
        assert not part[sum(own.widths) + 1 :].any()
        payloads.append(np.concatenate(planes, axis=1)[0])
    np.testing.assert_array_equal(put_together(payloads, exchange), message[:stop])


def test_rejects_planes_of_fewer_words_than_servers():
    plan = Plan("digest", 2, (Exchange((2,), "plus", "plus"),))
    with pytest.raises(ValueError, match="2 words is too short for 3 servers"):
        part_of_plan(plan, 0, 3)
