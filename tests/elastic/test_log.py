"""The log: durable, gapless, written once, and clear about files that it cannot use."""

import os
import signal
import sqlite3
import subprocess
import sys

import pytest

from signax.elastic.log import Entry, Log, LogError
from signax.elastic.plan import Exchange, Plan
from signax.elastic.protocol import Decision, digest_of

PLAN = Plan(
    "a digest", 3, (Exchange((5,), "dither", "dither"), Exchange((2, 2), "abstain", "plus"))
)


def make_entry(sequence, words=b"words"):
    words = words + bytes([sequence % 256])
    decision = Decision(sequence, 5, (0, 1, 2), (0, 2), False, len(words), digest_of(words))
    return Entry(decision, words)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "votes.db"


def open_log(path, *, decisions=0, **kwargs):
    log = Log(path, **kwargs)
    if log.plan is None:
        log.set_plan(PLAN)
    for sequence in range(log.next, decisions):
        log.append(*make_entry(sequence))
    return log


def test_a_new_log_is_empty(path):
    log = Log(path)
    assert (log.plan, log.first, log.next, log.starts) == (None, 0, 0, 0)
    assert log.read(0) is None
    log.close()


def test_decisions_are_read_back_after_a_restart(path):
    open_log(path, decisions=3).close()
    log = Log(path)
    assert (log.plan, log.first, log.next, log.starts) == (PLAN, 0, 3, 1)
    assert [log.read(n) for n in range(4)] == [*map(make_entry, range(3)), None]
    log.close()


@pytest.mark.parametrize("sequence", [1, 4])
def test_a_decision_is_written_once_and_in_order(path, sequence):
    log = open_log(path, decisions=3)
    with pytest.raises(LogError, match=f"decision {sequence} does not follow on 2"):
        log.append(*make_entry(sequence, b"other words"))
    assert log.read(1) == make_entry(1)
    log.close()


def test_the_newest_steps_are_kept_whole(path):
    log = open_log(path, decisions=9, keep=2)  # steps of two votes
    assert (log.first, log.next) == (6, 9)
    assert log.read(5) is None
    assert log.read(6) == make_entry(6)
    log.close()
    log = Log(path, keep=2)
    assert (log.first, log.next) == (6, 9)
    log.close()


def test_a_server_that_was_replaced_writes_nothing(path):
    old = open_log(path, decisions=1)
    new = Log(path)
    with pytest.raises(LogError, match="another server has started"):
        old.append(*make_entry(1))
    new.append(*make_entry(1))
    old.close()
    new.close()


class FullDisk:
    """A database whose next commit fails."""

    def __init__(self, db, *, rolls_back):
        self._db, self._rolls_back, self._is_full = db, rolls_back, True

    def __getattr__(self, name):
        return getattr(self._db, name)

    def execute(self, statement, *values):
        if statement == "COMMIT" and self._is_full:
            self._is_full = False
            if self._rolls_back:
                self._db.execute("ROLLBACK")
            raise sqlite3.OperationalError("database or disk is full")
        return self._db.execute(statement, *values)


@pytest.mark.parametrize("rolls_back", [False, True])
def test_a_write_that_fails_as_it_is_committed_changes_nothing(path, rolls_back):
    log = Log(path)
    db = log._db
    log._db = FullDisk(db, rolls_back=rolls_back)
    with pytest.raises(LogError, match=r"votes\.db.*disk is full"):
        log.set_plan(PLAN)
    assert log.plan is None
    log.set_plan(PLAN)
    log._db = FullDisk(db, rolls_back=rolls_back)
    with pytest.raises(LogError, match="disk is full"):
        log.append(*make_entry(0))
    assert (log.next, log.read(0)) == (0, None)
    log.append(*make_entry(0))
    assert (log.plan, log.read(0)) == (PLAN, make_entry(0))
    log.close()


def test_a_server_that_was_replaced_before_its_first_job_writes_no_plan(path):
    old, new = Log(path), Log(path)
    new.set_plan(PLAN)
    with pytest.raises(LogError, match="another server has started"):
        old.set_plan(PLAN._replace(digest="another digest"))
    assert old.plan is None
    old.close()
    new.close()
    log = Log(path)
    assert log.plan == PLAN
    log.close()


def test_rejects_a_log_with_a_gap(path):
    open_log(path, decisions=4).close()
    with sqlite3.connect(path) as db:
        db.execute("DELETE FROM decisions WHERE sequence = 2")
    db.close()
    with pytest.raises(LogError, match="lacks 1 of the decisions 0 to 3"):
        Log(path)


def test_rejects_a_decision_whose_words_have_changed(path):
    open_log(path, decisions=2).close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE decisions SET words = ? WHERE sequence = 1", (b"other",))
    db.close()
    log = Log(path)
    assert log.read(0) == make_entry(0)
    with pytest.raises(LogError, match=r"decision 1 .* is damaged"):
        log.read(1)
    log.close()


def test_rejects_other_databases_other_files_and_later_versions(path, tmp_path):
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE other (name TEXT)")
    db.close()
    with pytest.raises(LogError, match="no log of votes"):
        Log(path)
    text = tmp_path / "notes.txt"
    text.write_text("not a database, but a text of some length" * 99)
    with pytest.raises(LogError, match=r"notes\.txt cannot be used as a log"):
        Log(text)
    with pytest.raises(LogError, match="cannot be used as a log"):
        Log(tmp_path / "no such folder" / "votes.db")
    later = tmp_path / "later.db"
    Log(later).close()
    with sqlite3.connect(later) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(LogError, match="version 99"):
        Log(later)


def test_rejects_a_damaged_file(path):
    open_log(path, decisions=40).close()
    with path.open("r+b") as file:
        file.seek(100)
        file.write(os.urandom(60_000))
    with pytest.raises(LogError, match="cannot be used as a log"):
        Log(path)


@pytest.mark.parametrize("keep", [0, -1])
def test_rejects_keeping_no_step(path, keep):
    with pytest.raises(ValueError, match=f"keep={keep}"):
        Log(path, keep=keep)


WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from test_log import make_entry, open_log
log = open_log(sys.argv[1])
while True:
    log.append(*make_entry(log.next, bytes(200_000)))
    print(log.next, flush=True)
"""


def test_no_decision_is_lost_when_the_writer_is_killed(path):
    decided = 0
    for appends in (2, 5):
        command = [sys.executable, "-c", WRITER, str(path), os.path.dirname(__file__)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            for _ in range(appends):
                decided = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
            *_, last = [decided, *map(int, writer.stdout.read().split())]
        log = Log(path)
        assert log.next >= last >= decided > 0
        assert [log.read(n) == make_entry(n, bytes(200_000)) for n in range(log.next)] == (
            [True] * log.next
        )
        log.close()
