"""The rules of a shard, one by one."""

import pytest

from signax.elastic.commits import Commits, recover
from signax.elastic.refusals import Reason, RefusedError


def refused(reason, method, *args):
    with pytest.raises(RefusedError) as raised:
        method(*args)
    assert raised.value.reason == reason


def test_a_vote_is_tentative_until_the_main_server_goes_on():
    commits = Commits().begin(1, 0).write()
    assert (commits.next, commits.decided) == (1, 0)
    assert commits.learn(1).decided == 1
    assert commits.begin(2, 1).decided == 1


def test_a_tentative_vote_is_counted_again_and_a_decided_one_is_not():
    commits = Commits().begin(1, 0).write()
    assert commits.begin(2, 0).write() == Commits(1, 0, 2)
    refused(Reason.FUTURE, commits.learn(1).begin, 2, 0)


def test_news_that_is_old_changes_nothing():
    commits = Commits(5, 5, 9)
    assert commits.learn(3) == commits


def test_older_turns_are_refused():
    commits = Commits().begin(7, 0)
    for turn in (6, 7):
        refused(Reason.REPEATED, commits.begin, turn, 0)
    refused(Reason.REPEATED, commits.begin(8, 0).check, 7, 0)


def test_a_log_that_lacks_decisions_is_refused():
    refused(Reason.FUTURE, Commits(3, 2, 1).learn, 4)
    refused(Reason.FUTURE, recover(0, 0).begin, 1, 1)


@pytest.mark.parametrize(("after", "decided"), [(0, 0), (1, 0), (5, 4)])
def test_the_last_vote_of_a_log_is_tentative_after_a_restart(after, decided):
    assert recover(after, 3) == Commits(after, decided, 3)
