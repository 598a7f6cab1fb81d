"""A job's connection to the vote server: the calls, and retries until the server is back."""

import random
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

import grpc

from signax.elastic.plan import Plan
from signax.elastic.protocol import (
    MAX_MESSAGE_BYTES,
    SERVICE,
    Ask,
    Ballot,
    Decision,
    Done,
    Fetch,
    Follow,
    Join,
    Joined,
    Leave,
    ProtocolError,
    Snapshot,
    Status,
    digest_of,
    from_bytes,
    read_payload,
    to_bytes,
    to_pieces,
)
from signax.elastic.refusals import REASON_KEY, Reason
from signax.elastic.status import logger

SHORTEST_PAUSE, LONGEST_PAUSE = 0.05, 0.5  # seconds between attempts
TIMEOUT = 10.0  # seconds of a call that the server answers at once
SILENCE = 60.0  # seconds; a call that lasted longer had a server that answered gRPC's pings
PATIENCE = 5.0  # seconds of attempts before the log mentions them
RETRIED_REASONS = (
    Reason.REPEATED,
    Reason.LIMIT,
    Reason.STOPPING,
    Reason.UNREADY,
    Reason.NO_SNAPSHOT,
)
# Every refusal has a reason. Without one the status is gRPC's own, and these may pass.
RETRIED = (
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.RESOURCE_EXHAUSTED,  # too many calls at once
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNKNOWN,
)

T = TypeVar("T")


class VoteServerError(RuntimeError):
    """The vote server refuses a request, or does not answer.

    Attributes:
      reason: why the server refuses, such as `"wrong-plan"`; `None` if it does not answer.
    """

    def __init__(self, message: str, reason: str | None = None):
        super().__init__(message)
        self.reason = reason


class Connection:
    """Calls the vote server for one slot. A call that fails is repeated until `give_up` has passed.

    Args:
      address: the server, HOST:PORT.
      slot: the worker's number.
      token: the slot's token, if the server asks for tokens.
      credentials: gRPC's credentials of the channel; without them everything travels in plain text.
      give_up: the seconds without an answer after which a call raises an error.
    """

    def __init__(
        self, address: str, slot: int, token: str | None, credentials: Any, give_up: float
    ):
        self._address, self._slot, self._give_up = address, slot, give_up
        self._metadata = [("authorization", f"Bearer {token}")] if token else []
        options = [
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            # A server that is cut off is noticed, and the call is repeated.
            ("grpc.keepalive_time_ms", 10_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.max_pings_without_data", 0),  # no limit, since a vote may wait for long
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 500),
        ]
        self._channel: Any = (
            grpc.secure_channel(address, credentials, options)
            if credentials
            else grpc.insecure_channel(address, options)
        )
        self._plan: Plan | None = None
        self._session = 0
        self._is_forgotten = False  # by a server that has restarted
        self._is_closed = False
        self._voted = -1, ""  # the newest vote that was decided, and the digest of its ballot

    def status(self) -> memoryview:
        """The server's status, as JSON text."""
        return self._persist(lambda: self._read("Status", [to_bytes(Ask())], Status)[1])

    def join(self, plan: Plan) -> Joined:
        """Begin a session."""
        self._plan = plan
        return self._persist(self._join)

    def _join(self) -> Joined:
        assert self._plan is not None  # nothing else begins a session
        request = to_bytes(Join(self._slot, self._plan))
        joined, _ = self._read("Join", [request], Joined, timeout=None)
        self._session, self._is_forgotten = joined.session, False
        return joined

    def vote(
        self, sequence: int, participates: bool, bits: memoryview
    ) -> tuple[Decision, memoryview]:
        """Send a ballot, wait for the decision, and return it with its words."""
        digest = digest_of(bits)
        self._check_repeat(sequence, digest)

        def attempt() -> tuple[Decision, memoryview]:
            ballot = Ballot(self._slot, self._session, sequence, participates, len(bits), digest)
            return self._read("Vote", to_pieces(ballot, bits), Decision, timeout=None)

        decided = self._persist(attempt)
        self._voted = sequence, digest
        return decided

    def _check_repeat(self, sequence: int, digest: str) -> None:
        if self._voted[0] == sequence and self._voted[1] != digest:
            raise ValueError(
                f"this job has already voted in vote {sequence}, with other bits: an exchange "
                "belongs to one optimiser, which votes once for each update. Accumulate gradients "
                "before tx.update, not by optax.MultiSteps, and call catch_up after going back to "
                "earlier parameters"
            )

    def follow(
        self, sequence: int, *, has_end: bool = True
    ) -> Generator[tuple[Decision, memoryview]]:
        """The decisions from a sequence on, to the newest, or on and on."""
        pieces: Any = None  # of the call, which goes on from attempt to attempt

        def attempt() -> tuple[Decision, memoryview] | None:
            nonlocal pieces
            try:
                if pieces is None:
                    request = Follow(self._slot, self._session, sequence)
                    pieces = self._call("Decisions", [to_bytes(request)], timeout=None)
                data = next(pieces, None)
                if data is None:
                    pieces = None
                    if has_end:
                        return None
                    raise StopIteration  # and try again, as after a call without an answer
                decision, first = from_bytes(data, Decision)
                return decision, read_payload(decision, first, pieces)
            except grpc.RpcError:
                pieces = None
                raise

        try:
            while (decided := self._persist(attempt)) is not None:
                sequence = decided[0].sequence + 1
                yield decided
        finally:
            if pieces is not None:
                pieces.cancel()  # if nobody reads the rest

    def put_snapshot(self, step: int, payload: memoryview) -> None:
        """Upload parameters after `step` updates. If that fails, the server asks again."""
        snapshot = Snapshot(self._slot, self._session, step, len(payload), digest_of(payload))
        try:
            self._read("PutSnapshot", to_pieces(snapshot, payload), Done, timeout=None)
        except (grpc.RpcError, StopIteration) as error:
            logger.warning("the snapshot of step %d was not uploaded: %s", step, error)

    def get_snapshot(self, step: int) -> tuple[Snapshot, memoryview]:
        """Download parameters after at least `step` updates, once a worker has uploaded them."""

        def attempt() -> tuple[Snapshot, memoryview]:
            fetch = Fetch(self._slot, self._session, step)
            return self._read("GetSnapshot", [to_bytes(fetch)], Snapshot, timeout=None)

        return self._persist(attempt)

    def close(self) -> None:
        """Leave, if the server can be reached, and close the connection."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            if self._session:
                self._read("Leave", [to_bytes(Leave(self._slot, self._session))], Done)
        except (grpc.RpcError, StopIteration, ProtocolError):
            pass  # nobody waits for this slot after a deadline
        finally:
            self._channel.close()

    def _call(self, name: str, requests: Iterable[bytes], timeout: float | None = TIMEOUT) -> Any:
        call = self._channel.stream_stream(f"/{SERVICE}/{name}")
        return call(iter(requests), metadata=self._metadata, timeout=timeout)

    def _read(
        self, name: str, requests: Iterable[bytes], kind: Any, timeout: float | None = TIMEOUT
    ) -> tuple[Any, memoryview]:
        """The answer of a call, and its payload."""
        pieces = self._call(name, requests, timeout)
        message, first = from_bytes(next(pieces), kind)
        if "size" not in kind._fields:
            return message, first
        return message, read_payload(message, first, pieces)

    def _persist(self, attempt: Callable[[], T]) -> T:
        """Repeat an attempt until it succeeds, the server refuses it, or it is time to give up."""
        failed_at, pause, is_reported = None, SHORTEST_PAUSE, False
        while True:
            if self._is_closed:
                raise VoteServerError("this exchange is closed: connect again to vote")
            began = time.monotonic()
            try:
                if self._is_forgotten:
                    self._join()
                return attempt()
            except grpc.RpcError as error:
                problem = self._handle(error)
            except StopIteration:
                problem = "the call ended without an answer"
            except ProtocolError as error:
                raise VoteServerError(
                    f"the vote server {self._address} sends an answer that cannot be read: {error}"
                ) from error
            now = time.monotonic()
            if failed_at is None or now - began > SILENCE:
                failed_at, pause = now, SHORTEST_PAUSE
            if now + pause > failed_at + self._give_up:
                raise VoteServerError(
                    f"the vote server {self._address} has not answered for give_up="
                    f"{self._give_up:g} seconds: {problem}. Restart it on its log, and this job "
                    "from its last checkpoint"
                )
            if now - failed_at > PATIENCE and not is_reported:
                is_reported = True
                logger.warning("waiting for the vote server %s: %s", self._address, problem)
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE)

    def _handle(self, error: Any) -> str:
        """Return if a failed call may be repeated, and raise otherwise."""
        reason = dict(error.trailing_metadata() or ()).get(REASON_KEY)
        if reason == Reason.NO_SESSION:
            self._is_forgotten = True
        elif reason not in RETRIED_REASONS and (reason or error.code() not in RETRIED):
            raise VoteServerError(
                f"the vote server {self._address} refuses: {error.details()}", reason
            ) from error
        return f"{error.code().name}: {error.details()}"
