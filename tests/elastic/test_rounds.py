"""The rules of a round, one by one."""

import pytest

from signax.elastic.refusals import Reason, RefusedError
from signax.elastic.rounds import SESSIONS, Options, begin

DEADLINE = 2.0


def make_rounds(num_workers=3, num_exchanges=1, quorum=2, **kwargs):
    """Rounds in which every slot has joined, so its session is `base + 1`."""
    rounds = begin(Options(num_workers, quorum, DEADLINE), num_exchanges, **kwargs)
    for slot in range(num_workers):
        rounds, _ = rounds.join(slot)
    return rounds


def ballot(rounds, slot, now=0.0, *, sequence=None, session=None, digest=None, participates=True):
    session = rounds.base + 1 if session is None else session
    sequence = rounds.sequence if sequence is None else sequence
    digest = f"bits of {slot}" if digest is None else digest
    return rounds.receive(slot, session, sequence, digest, participates, now)


def ballots(rounds, *slots, **kwargs):
    for slot in slots:
        rounds = ballot(rounds, slot, **kwargs)
    return rounds


def decide(rounds, *slots, now=0.0):
    """The rounds after a decision of some slots."""
    return ballots(rounds, *slots, now=now).close(now + DEADLINE).decide()


def refuses(reason):
    return pytest.raises(RefusedError, check=lambda error: error.reason == reason)


def test_a_round_closes_once_all_expected_slots_have_voted():
    rounds = ballots(make_rounds(), 0, 1)
    assert not rounds.is_due(1.0)
    assert rounds.missing == (2,)
    rounds = ballot(rounds, 2, now=1.0)
    assert rounds.is_due(1.0)
    closed = rounds.close(1.0)
    assert closed.present == closed.voters == (0, 1, 2)
    assert closed.decide().sequence == 1


def test_a_round_with_a_quorum_closes_at_the_deadline_after_its_first_ballot():
    rounds = ballot(ballot(make_rounds(), 0, now=5.0), 1, now=6.0)
    assert rounds.due_at == 5.0 + DEADLINE
    assert not rounds.is_due(5.0 + DEADLINE - 0.01)
    assert rounds.is_due(5.0 + DEADLINE)
    assert rounds.close(5.0 + DEADLINE).voters == (0, 1)


def test_a_round_without_a_quorum_waits():
    rounds = ballot(make_rounds(), 0)
    assert not rounds.is_due(1e9)
    assert ballot(rounds, 2, now=1e9).is_due(1e9)


def test_a_round_that_is_not_due_does_not_close():
    with pytest.raises(ValueError, match="not due"):
        ballot(make_rounds(), 0).close(0.0)
    with pytest.raises(ValueError, match="is open"):
        make_rounds().decide()


@pytest.mark.parametrize("quorum", [0, 4])
def test_rejects_a_quorum_out_of_range(quorum):
    with pytest.raises(ValueError, match=f"quorum={quorum}"):
        begin(Options(3, quorum, DEADLINE), 1)


@pytest.mark.parametrize("deadline", [0.0, -1.0, float("inf"), float("nan")])
def test_rejects_a_deadline_that_never_comes(deadline):
    with pytest.raises(ValueError, match=f"deadline={deadline}"):
        begin(Options(3, 2, deadline), 1)


def test_a_slot_that_a_round_closed_without_is_not_waited_for():
    rounds = ballots(decide(make_rounds(), 0, 1), 0, 1)
    assert rounds.is_due(0.0)


def test_a_slot_that_votes_again_is_waited_for_again():
    rounds = decide(decide(make_rounds(), 0, 1), 0, 1, 2)
    assert rounds.missing == (0, 1, 2)


def test_a_slot_that_is_late_by_one_vote_is_waited_for_again():
    rounds = ballots(decide(make_rounds(), 0, 1), 0, 1)
    assert rounds.is_due(0.0)
    late = ballot(rounds, 2, sequence=0)
    assert late.missing == (2,)
    assert not late.is_due(0.0)
    assert late.is_due(DEADLINE)


def test_a_slot_that_is_late_by_more_is_not_waited_for():
    rounds = ballots(decide(decide(make_rounds(), 0, 1), 0, 1), 0, 1)
    assert ballot(rounds, 2, sequence=0).is_due(0.0)


def rounds_in_vain(show_up, votes):
    """The votes in which others wait until the deadline for slot 2, which only then shows up."""
    rounds, waited = make_rounds(), []
    for sequence in range(votes):
        if 2 in rounds.missing:
            waited.append(sequence)
        rounds = show_up(decide(rounds, 0, 1))
    return waited


def test_a_slot_that_is_late_again_and_again_is_waited_for_less_and_less_often():
    waited = rounds_in_vain(lambda rounds: ballot(rounds, 2, sequence=rounds.sequence - 1), 100)
    assert waited == [0, 1, 4, 11, 26, 57]


def test_a_slot_that_is_in_time_in_every_other_vote_is_waited_for_less_and_less_often():
    waited = rounds_in_vain(lambda rounds: decide(rounds, 0, 1, 2), 50)
    assert waited == [0, 1, 4, 11, 26]


def test_a_slot_makes_up_for_late_ballots_by_others_that_are_in_time():
    late = decide(decide(decide(make_rounds(), 0, 1), 0, 1, 2), 0, 1)
    assert late.slots[2].owed == late.slots[2].debt == 3
    rounds = decide(decide(decide(late, 0, 1, 2), 0, 1, 2), 0, 1, 2)
    assert (rounds.slots[2].owed, rounds.slots[2].debt) == (0, 3)
    for debt in (2, 1, 0, 0):
        rounds = decide(rounds, 0, 1, 2)
        assert rounds.slots[2].debt == debt
    assert decide(rounds, 0, 1).slots[2].owed == 1


def test_a_repeated_ballot_makes_up_for_nothing():
    late = decide(decide(decide(make_rounds(), 0, 1), 0, 1, 2), 0, 1)
    once = ballot(late, 2)
    assert once.slots[2].owed == 2
    assert ballot(once, 2, now=1.0) == once
    closed = ballots(once, 0, 1).close(DEADLINE)
    assert ballot(closed, 2, now=DEADLINE) == closed


def test_a_ballot_that_comes_while_others_are_counted_is_late():
    closed = ballots(make_rounds(), 0, 1).close(DEADLINE)
    late = ballot(closed, 2, now=DEADLINE)
    assert late.voters == (0, 1)
    assert late.decide().missing == (0, 1, 2)


def test_the_same_ballot_again_changes_nothing():
    rounds = ballot(make_rounds(), 0)
    assert ballot(rounds, 0, now=1.0) == rounds
    assert rounds.check_ballot(0, 1, 0, "bits of 0") is False
    assert rounds.check_ballot(1, 1, 0, "bits of 1") is True


def test_a_second_ballot_with_other_bits_is_refused():
    rounds = ballot(make_rounds(), 0)
    with refuses(Reason.CONFLICT):
        ballot(rounds, 0, digest="other bits")


def test_a_ballot_for_a_later_vote_is_refused():
    with refuses(Reason.FUTURE):
        ballot(make_rounds(), 0, sequence=1)


def test_a_ballot_that_does_not_participate_belongs_to_the_quorum_and_does_not_count():
    rounds = ballot(ballots(make_rounds(), 0, 1), 2, participates=False)
    assert rounds.is_due(0.0)
    closed = rounds.close(0.0)
    assert closed.present == (0, 1, 2)
    assert closed.voters == (0, 1)
    assert closed.decide().missing == (0, 1, 2)


def test_the_voters_of_a_step_never_grow():
    rounds = decide(make_rounds(num_exchanges=3), 0, 1)
    rounds = ballots(rounds, 0, 1, 2)
    assert rounds.voters == (0, 1)
    rounds = decide(rounds, 0, 1, 2)
    rounds = ballots(rounds, 1, 2)
    assert rounds.present == (1, 2)
    assert rounds.voters == (1,)
    rounds = decide(rounds, 1, 2)
    assert ballots(rounds, 0, 1, 2).voters == (0, 1, 2)


def test_a_new_session_begins_with_its_first_ballot_and_withdraws_the_older_one():
    rounds, session = ballots(make_rounds(), 0, 1).join(0)
    assert rounds.present == (0, 1)
    rounds = ballot(rounds, 0, now=1.0, session=session, digest="new bits")
    assert rounds.slots[0].received.digest == "new bits"
    with refuses(Reason.OLD_SESSION):
        ballot(rounds, 0)


def test_a_late_ballot_of_a_new_session_withdraws_too():
    rounds, session = ballots(decide(make_rounds(), 0, 1), 0).join(0)
    assert ballot(rounds, 0, sequence=0, session=session).present == ()


def test_a_ballot_that_is_being_counted_is_not_withdrawn():
    closed, session = ballots(make_rounds(), 0, 1).close(DEADLINE).join(0)
    assert ballot(closed, 0, session=session, digest="new bits").voters == (0, 1)


def test_a_slot_that_has_left_is_not_waited_for_and_its_ballot_is_withdrawn():
    rounds = ballots(make_rounds(), 0, 1, 2)
    left = rounds.leave(2, 1)
    assert left.present == (0, 1)
    assert left.is_due(0.0)
    with refuses(Reason.OLD_SESSION):
        ballot(left, 2)
    left, session = left.join(2)
    assert ballot(left, 2, session=session).missing == ()


def test_the_deadline_of_a_withdrawn_ballot_is_forgotten():
    rounds = ballot(ballot(make_rounds(), 0, now=0.0), 1, now=1.5)
    assert rounds.leave(0, 1).due_at == 1.5 + DEADLINE


def test_an_unknown_session_has_to_join():
    rounds = begin(Options(3, 2, DEADLINE), 1)
    with refuses(Reason.NO_SESSION):
        ballot(rounds, 0)
    with refuses(Reason.WRONG_SLOT):
        ballot(rounds, 3)


def test_sessions_of_a_server_before_its_restart_have_to_join_again():
    rounds = begin(Options(3, 2, DEADLINE), 1, starts=2)
    with refuses(Reason.NO_SESSION):
        ballot(rounds, 0, session=SESSIONS + 1)
    rounds, session = rounds.join(0)
    assert session == 2 * SESSIONS + 1
    rounds = ballot(rounds, 0, session=session)
    with refuses(Reason.OLD_SESSION):
        ballot(rounds, 0, session=SESSIONS + 1)


def test_a_restarted_server_expects_those_that_were_present_in_its_last_decision():
    rounds = make_rounds(4, num_exchanges=2, sequence=5, present=(0, 1, 2), voters=(0, 1))
    assert rounds.missing == (0, 1, 2)
    rounds = ballots(rounds, 0, 1, 2)
    assert rounds.is_due(0.0)
    assert rounds.voters == (0, 1)
    assert ballots(make_rounds(4, sequence=5, present=(0, 1)), 2).voters == (2,)


def test_refusals_say_what_to_do():
    with pytest.raises(RefusedError, match=r"slot 0 .*other bits in vote 0"):
        ballot(ballot(make_rounds(), 0), 0, digest="other bits")
    with pytest.raises(RefusedError, match=r"sequence=7 .* goes on with 0"):
        ballot(make_rounds(), 0, sequence=7)
