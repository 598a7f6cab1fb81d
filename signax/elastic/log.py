"""The log of decisions: an SQLite file that is the history of the model.

A decision is durable when `append` returns: SQLite's journal is a WAL with `synchronous=FULL`, so
each append is one fsync. A sequence number is written once. Nothing in the log ever changes; with
`keep`, the oldest steps are dropped.

Every start of a server is counted in the log. A server whose count is no longer the newest has been
replaced by another one on the same log, and its next write fails instead of mixing two histories.

In the log of a shard the last decision may be tentative, and is then written again, see `commits`.
"""

import contextlib
import json
import sqlite3
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

from signax.elastic.fields import ProtocolError, from_json, to_json
from signax.elastic.parts import Part
from signax.elastic.plan import Plan
from signax.elastic.protocol import Decision, digest_of

VERSION = 1  # of the tables
APPLICATION_ID = 0x5349474E  # "SIGN", which tells this file from other databases
PAGE_BYTES = 1 << 16  # the largest: decisions are long
WAL_PAGES = 256  # 16 MiB, then SQLite moves them to the file itself

_TABLES = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE decisions (
    sequence INTEGER PRIMARY KEY,
    header INTEGER NOT NULL,
    present TEXT NOT NULL,
    voters TEXT NOT NULL,
    digest TEXT NOT NULL,
    words BLOB NOT NULL
);
"""


class LogError(Exception):
    """A log that cannot be used, or that did not take a decision."""


class Entry(NamedTuple):
    """A decision in the log, and its words."""

    decision: Decision
    words: bytes


class Log:
    """The log in one file. Threads may share it.

    Args:
      path: the file, which is created if it does not exist.
      keep: the number of newest steps that are kept; by default all.

    Attributes:
      plan: the plan of the run; `None` before the first job has joined.
      part: which part of the run the log has; `None` without shards.
      turn: in a shard's log, the main server's turn at its last decision.
      starts: how often a server had started on this log before.
      first: the first vote that the log has.
      next: the first vote that is not decided.

    Raises:
      LogError: the file is no log, it is damaged, or it lacks a decision.
    """

    def __init__(self, path: str | Path, *, keep: int | None = None):
        if keep is not None and keep < 1:
            raise ValueError(f"keep={keep} must be at least 1 step")
        self.path, self.keep = Path(path), keep
        self._lock, self._reader_lock = threading.Lock(), threading.Lock()
        with self._explains():
            self._db = self._connect()
            try:
                self._open()
                self._reader = self._connect()  # reads while `_db` writes
            except BaseException:
                self._db.close()
                raise

    def _connect(self) -> sqlite3.Connection:
        # Transactions begin and end where the code says so, and locks keep threads apart.
        return sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)

    def _open(self) -> None:
        (pages,) = self._row("PRAGMA page_count")
        self._db.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        if pages:
            self._check_kind()
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute(f"PRAGMA wal_autocheckpoint = {WAL_PAGES}")
        with self._transaction():
            if not pages:
                for statement in filter(str.strip, _TABLES.split(";")):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                self._db.execute(f"PRAGMA user_version = {VERSION}")
            plan = self._about("plan")
            self.plan = None if plan is None else from_json(Plan, json.loads(plan), "plan")
            part, self.turn = self._about("part"), int(self._about("turn") or 0)
            self.part = None if part is None else from_json(Part, json.loads(part), "part")
            self.starts = int(self._about("starts") or 0)
            self._set_about("starts", str(self.starts + 1))
            self._find_ends()

    def _check_kind(self) -> None:
        (kind,), (version,) = self._row("PRAGMA application_id"), self._row("PRAGMA user_version")
        if kind != APPLICATION_ID:
            raise LogError(f"{self.path} is a database, but no log of votes: name another file")
        if version != VERSION:
            raise LogError(
                f"{self.path} is a log of version {version}, and this server reads version "
                f"{VERSION}: start the server with the version of signax that wrote the log"
            )

    def _find_ends(self) -> None:
        """Find the first and the last decision; raise if one is missing between them."""
        first, last, count = self._row(
            "SELECT min(sequence), max(sequence), count(*) FROM decisions"
        )
        self.first, self.next = (first, last + 1) if count else (0, 0)
        if self.next - self.first != count:
            raise LogError(
                f"{self.path} lacks {self.next - self.first - count} of the decisions {first} to "
                f"{last}: restore the file from a backup"
            )
        if count and self.plan is None:
            raise LogError(f"{self.path} has decisions but no plan: restore it from a backup")

    def set_plan(self, plan: Plan, part: Part | None = None) -> None:
        """Write the plan of a run that begins, and which part of it the log has."""
        with self._lock, self._explains(), self._transaction():
            self._check_newest()
            self._set_about("plan", json.dumps(to_json(plan)))
            if part is not None:
                self._set_about("part", json.dumps(to_json(part)))
        self.plan, self.part = plan, part

    def append(self, decision: Decision, words: Any, *, turn: int | None = None) -> None:
        """Write a decision, durably. Its sequence must be `next`.

        With a turn the decision is tentative, and replaces the last one if it has its sequence.
        """
        replaces = turn is not None and decision.sequence == self.next - 1
        if decision.sequence != self.next and not replaces:
            raise LogError(
                f"decision {decision.sequence} does not follow on {self.next - 1}, the last one in "
                f"{self.path}"
            )
        assert self.plan is not None
        first = self.first
        if self.keep is not None:
            step, _ = self.plan.locate(decision.sequence)
            first = max(first, (step + 1 - self.keep) * len(self.plan.exchanges))
        with self._lock, self._explains(), self._transaction():
            self._check_newest()
            present, voters = json.dumps(decision.present), json.dumps(decision.voters)
            row = decision.sequence, decision.header, present, voters, decision.digest, words
            if replaces:
                self._db.execute("DELETE FROM decisions WHERE sequence = ?", (decision.sequence,))
            self._db.execute("INSERT INTO decisions VALUES (?, ?, ?, ?, ?, ?)", row)
            if turn is not None:
                self._set_about("turn", str(turn))
            if first > self.first:
                self._db.execute("DELETE FROM decisions WHERE sequence < ?", (first,))
        self.first, self.next = first, decision.sequence + 1

    def _check_newest(self) -> None:
        if self._about("starts") != str(self.starts + 1):
            raise LogError(f"another server has started on {self.path}: this one has to stop")

    def read(self, sequence: int) -> Entry | None:
        """A decision; `None` if the log does not have it, or has dropped it."""
        with self._reader_lock, self._explains():
            row = self._reader.execute(
                "SELECT header, present, voters, digest, words FROM decisions WHERE sequence = ?",
                (sequence,),
            ).fetchone()
        if row is None:
            return None
        header, present, voters, digest, words = row
        if digest_of(words) != digest:
            raise LogError(
                f"decision {sequence} in {self.path} is damaged: its words do not have the digest "
                "that was written with them. Restore the file from a backup"
            )
        decision = Decision(
            sequence=sequence,
            header=header,
            present=tuple(json.loads(present)),
            voters=tuple(json.loads(voters)),
            wants_snapshot=False,
            size=len(words),
            digest=digest,
        )
        return Entry(decision, words)

    def close(self) -> None:
        """Close the file."""
        with self._lock, self._reader_lock:
            self._reader.close()
            self._db.close()

    def _row(self, statement: str, values: tuple[Any, ...] = ()) -> tuple[Any, ...]:
        return self._db.execute(statement, values).fetchone()

    def _about(self, name: str) -> str | None:
        row = self._row("SELECT max(value) FROM about WHERE name = ?", (name,))
        return row[0]

    def _set_about(self, name: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO about VALUES (?, ?)", (name, value))

    @contextlib.contextmanager
    def _transaction(self) -> Generator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # after some errors SQLite has rolled back by itself
                self._db.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _explains(self) -> Generator[None]:
        """Turn errors of SQLite into errors that name the file."""
        try:
            yield
        except (sqlite3.Error, ProtocolError, ValueError) as error:
            raise LogError(f"{self.path} cannot be used as a log of votes: {error}") from error
