"""The newest snapshot of the parameters, in a file beside the log.

When it is missing or too old, voters are asked for one in turn, with a decision. Where the log
drops old steps, that is every `keep` / 2 steps, so a job that comes late need not wait for an
upload.

The file holds the message `Snapshot` of its upload, and then the payload. It is replaced as a whole
once an upload is complete and has the digest that it claims. Until then an upload has a file of its
own, which the next start removes if a server dies in the meantime.
"""

import contextlib
import glob
import hashlib
import itertools
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from signax.elastic.protocol import (
    MAX_HEADER_BYTES,
    PIECE_BYTES,
    ProtocolError,
    Snapshot,
    from_bytes,
    to_bytes,
)
from signax.elastic.refusals import Reason, RefusedError
from signax.elastic.status import log_event

MAX_BYTES = 1 << 36
PATIENCE = 30.0  # seconds without a piece of an upload, after which another worker is asked

_UPLOAD = ".upload"  # ends the names of files of uploads


class Snapshots:
    """The newest snapshot.

    Args:
      path: its file, which need not exist.

    Attributes:
      newest: its message; `None` without a snapshot.

    Raises:
      ValueError: the file holds something else.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        for upload in self.path.parent.glob(f"{glob.escape(self.path.name)}.*{_UPLOAD}"):
            upload.unlink(missing_ok=True)
        self.newest = self._find_newest()
        self._lock = threading.Lock()
        self._is_wanted, self._asked, self._asked_at = False, -1, -PATIENCE

    def _find_newest(self) -> Snapshot | None:
        try:
            with self.path.open("rb") as file:
                return _read_message(file)
        except FileNotFoundError:
            return None
        except ProtocolError as error:
            raise ValueError(
                f"{self.path} holds no snapshot: {error}. Move the file away, and a worker will "
                "upload another snapshot"
            ) from error

    def drop_beyond(self, step: int) -> None:
        """Put a snapshot of steps that the log does not have aside: it belongs to another run.

        In its place it would look like this run's snapshot once the log has as many steps.
        """
        if self.newest is not None and self.newest.step > step:
            aside = self.path.with_name(f"{self.path.name}.unused")
            os.replace(self.path, aside)
            log_event("snapshot unused", step=self.newest.step, log_steps=step, file=str(aside))
            self.newest = None

    def check(self, step: int) -> None:
        """Raise, and ask for one, unless there is a snapshot of at least `step` updates."""
        if self.newest is not None and self.newest.step >= step:
            return
        self.want()
        raise RefusedError(
            Reason.NO_SNAPSHOT,
            f"there is no snapshot of at least {step} updates yet: a worker is asked for one with "
            "its next decision, so try again in a while",
        )

    def want(self) -> None:
        """Ask the next voter that is told a decision."""
        self._is_wanted = True

    def asks(self, slot: int, voters: Sequence[int]) -> bool:
        """Whether to ask a slot for a snapshot, with a decision of these voters."""
        if not self._is_wanted or slot not in voters:
            return False
        with self._lock:
            now = time.monotonic()
            is_next = slot != self._asked or len(voters) == 1
            if not is_next or now - self._asked_at < PATIENCE:
                return False
            self._asked, self._asked_at = slot, now
            return True

    def write(self, snapshot: Snapshot, first: Any, pieces: Iterable[bytes]) -> None:
        """Store an upload; raise `ProtocolError` if it is not what its message says."""
        if snapshot.size > MAX_BYTES:
            raise ProtocolError(f"size={snapshot.size} exceeds the limit, {MAX_BYTES} bytes")
        hashed, size = hashlib.sha256(), 0
        with tempfile.NamedTemporaryFile(
            dir=self.path.parent, prefix=f"{self.path.name}.", suffix=_UPLOAD, delete=False
        ) as file:
            try:
                file.write(to_bytes(snapshot))
                for piece in itertools.chain([first], pieces):
                    self._asked_at = time.monotonic()  # the upload goes on: ask nobody else
                    size += len(piece)
                    if size > snapshot.size:
                        raise ProtocolError(f"more than size={snapshot.size} bytes follow")
                    hashed.update(piece)
                    file.write(piece)
                if size < snapshot.size or hashed.hexdigest() != snapshot.digest:
                    raise ProtocolError(
                        f"the snapshot has {size} bytes of size={snapshot.size}, or another digest "
                        "than it claims: upload it again"
                    )
                file.flush()
                os.fsync(file.fileno())
                self._replace(snapshot, file.name)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(file.name)

    def _replace(self, snapshot: Snapshot, path: str) -> None:
        with self._lock:
            if self.newest is None or snapshot.step >= self.newest.step:
                os.replace(path, self.path)
                self.newest, self._is_wanted, self._asked_at = snapshot, False, -PATIENCE

    def read(self) -> Iterator[bytes]:
        """The gRPC messages of the newest snapshot. A later upload does not disturb them."""
        with self.path.open("rb") as file:
            snapshot = _read_message(file)
            yield to_bytes(snapshot, file.read(PIECE_BYTES))
            while piece := file.read(PIECE_BYTES):
                yield piece


def _read_message(file: Any) -> Snapshot:
    length = file.read(4)
    header = file.read(min(int.from_bytes(length, "little"), MAX_HEADER_BYTES))
    snapshot, _ = from_bytes(length + header, Snapshot)
    return snapshot
