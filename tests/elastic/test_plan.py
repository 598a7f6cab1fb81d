"""What a plan must be."""

import pytest

from signax._wire.words import sealed_words
from signax.elastic.plan import MAX_WORKERS, Exchange, Plan

ONE = Exchange((100,), "dither", "dither")
TWO = Exchange((50, 50), "abstain", "plus")


def test_a_plan_knows_the_step_and_the_sizes_of_a_vote():
    plan = Plan("digest", 3, (ONE, TWO, ONE))
    plan.check()
    assert plan.locate(7) == (2, 1)
    assert plan.exchange(7) == TWO
    assert ONE.ballot_bytes == 4 * sealed_words(100)
    assert TWO.decision_words == 100


@pytest.mark.parametrize(
    ("plan", "match"),
    [
        (Plan("d", 0, (ONE,)), "num_workers=0"),
        (Plan("d", MAX_WORKERS + 1, (ONE,)), "exceeds the limit"),
        (Plan("d", 2, ()), "0 exchanges"),
        (Plan("d", 2, (ONE,) * 1025), "1025 exchanges"),
        (Plan("d", 2, (ONE, ONE._replace(zeros="none"))), r"exchanges\[1\]: zeros='none'"),
        (Plan("d", 2, (ONE._replace(ties="none"),)), "ties='none'"),
        (Plan("d", 2, (ONE._replace(widths=()),)), "widths="),
        (Plan("d", 2, (ONE._replace(widths=(0,)),)), "widths="),
        (Plan("d", 2, (ONE._replace(widths=(5, 5)),)), "give 1 equal numbers"),
        (Plan("d", 2, (TWO._replace(widths=(5, 6)),)), "give 2 equal numbers"),
        (Plan("d", 2, (ONE._replace(widths=(1 << 26,)),)), "exceeds the limit"),
        (Plan("d", 1000, (ONE._replace(widths=(1 << 25,)),)), "the limit is"),
    ],
)
def test_rejects_a_plan_out_of_range(plan, match):
    with pytest.raises(ValueError, match=match):
        plan.check()


def test_rejects_another_number_of_workers():
    with pytest.raises(ValueError, match="--workers 3"):
        Plan("d", 3, (ONE,)).check_workers(4)
