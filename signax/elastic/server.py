"""The gRPC service: who calls, what the bytes say, and the answers of the `Decider`.

There is no generated code. gRPC's generic handlers pass bytes, and `protocol` reads them. Every
call is served as a stream of requests, even where a client sends one. A handler can then refuse a
caller before it has read anything of the message, so nobody without a credential costs memory.

Health checks follow gRPC's own protocol, `grpc.health.v1.Health`. Its response is two bytes: the
tag of field 1, and the status, 1 for serving or 2 for not serving.
"""

import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import grpc

from signax.elastic.credentials import MAIN, Credentials
from signax.elastic.decider import Decider
from signax.elastic.log import LogError
from signax.elastic.protocol import (
    MAX_MESSAGE_BYTES,
    SERVICE,
    Ask,
    Ballot,
    Done,
    Fetch,
    Follow,
    Join,
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
from signax.elastic.refusals import REASON_KEY, Reason, RefusedError
from signax.elastic.status import log_event, to_text

HEALTH = "grpc.health.v1.Health"
SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"
CALLS_OF_A_SLOT = 4  # at once, each of another kind
OTHER_CALLS = 16  # health, status, and calls without a credential
MAX_WATCHERS = 2
GRACE = 5.0  # seconds in which answers leave a server that stops


class Tls(NamedTuple):
    """The files of TLS, as bytes: the server's, and the authority of the clients' certificates."""

    key: bytes
    certificate: bytes
    clients: bytes | None = None


class VoteServer:
    """Serves votes on an address until it is stopped, or until the log fails.

    Args:
      decider: decides the votes.
      address: where to listen, HOST:PORT; port 0 takes a free one.
      credentials: who may call.
      tls: the files of TLS; without them everything travels in plain text.
    """

    def __init__(
        self, decider: Decider, address: str, credentials: Credentials, tls: Tls | None = None
    ):
        self._decider, self._credentials = decider, credentials
        self._calls: dict[tuple[int, str], Any] = {}  # the newest call of each slot and kind
        self._lock = threading.Lock()
        self._watchers = threading.Semaphore(MAX_WATCHERS)
        self._is_stopping = threading.Event()
        most = CALLS_OF_A_SLOT * decider.num_workers + OTHER_CALLS
        self._server: Any = grpc.server(
            concurrent.futures.ThreadPoolExecutor(most, "call"),
            maximum_concurrent_rpcs=most,
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),
                # A peer that is cut off is noticed, and its calls end.
                ("grpc.keepalive_time_ms", 20_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.http2.max_pings_without_data", 0),  # a vote may wait for hours
            ],
        )
        handlers = {name: partial(self._serve, call) for name, call in self._calls_served().items()}
        health = {"Check": self._check_health, "Watch": self._watch_health}
        for service, methods in ((SERVICE, handlers), (HEALTH, health)):
            streams = {
                name: grpc.stream_stream_rpc_method_handler(method)
                for name, method in methods.items()
            }
            handler = grpc.method_handlers_generic_handler(service, streams)
            self._server.add_generic_rpc_handlers((handler,))
        host = address.rpartition(":")[0]
        if tls is None:
            port = self._server.add_insecure_port(address)
        else:
            pairs, has_clients = [(tls.key, tls.certificate)], tls.clients is not None
            secure = grpc.ssl_server_credentials(pairs, tls.clients, has_clients)
            port = self._server.add_secure_port(address, secure)
        self.address = f"{host}:{port}"

    def _calls_served(self) -> dict[str, Any]:
        return {
            "Join": self._join,
            "Vote": self._vote,
            "Decisions": self._decisions,
            "Leave": self._leave,
            "PutSnapshot": self._put_snapshot,
            "GetSnapshot": self._get_snapshot,
            "Status": self._status,
        }

    def start(self) -> None:
        """Begin to serve."""
        self._server.start()

    def stop(self) -> None:
        """Finish the round in hand, and answer all who wait."""
        self._is_stopping.set()
        self._decider.stop()
        self._server.stop(GRACE).wait()

    # Every call.

    def _serve(self, call: Callable[..., Iterator[bytes]], requests: Any, context: Any) -> Any:
        """Serve one call; turn errors into statuses, and count them."""
        try:
            identity = context.auth_context()
            slot = self._credentials.find_slot(context.invocation_metadata(), identity)
            yield from call(requests, context, slot)
        except RefusedError as error:
            self._refuse(context, error.reason, str(error))
        except ProtocolError as error:
            self._refuse(context, Reason.MALFORMED, str(error))
        except LogError as error:
            self._refuse(context, Reason.STOPPING, f"the server's log fails: {error}")
        except OSError as error:
            self._refuse(context, Reason.STOPPING, f"the server's disk fails: {error}")

    def _refuse(self, context: Any, reason: Reason, message: str) -> None:
        if self._decider.statistics.refuse(reason):
            log_event("refused", reason=reason.value, peer=context.peer(), message=message)
        context.set_trailing_metadata(((REASON_KEY, reason.value),))
        context.abort(getattr(grpc.StatusCode, reason.status), message)

    def _read(self, requests: Any, kind: Any, slot: int | None) -> tuple[Any, memoryview]:
        """Read the message that opens a call; check that it names the caller's own slot."""
        try:
            data = next(requests)
        except StopIteration:
            raise ProtocolError(f"the call ends without a {kind.__name__}") from None
        message, payload = from_bytes(data, kind)
        named, num_workers = getattr(message, "slot", None), self._decider.num_workers
        if named is not None and slot not in (None, named):
            owner = "the main server" if slot == MAIN else f"slot {slot}"
            raise RefusedError(
                Reason.WRONG_SLOT,
                f"slot={named} in a call with the credential of {owner}: each job has the "
                "credential of its own slot",
            )
        if named is not None and named >= num_workers:
            raise RefusedError(Reason.WRONG_SLOT, f"slot={named} is none of 0 to {num_workers - 1}")
        return message, payload

    @contextlib.contextmanager
    def _only_call(self, message: Any, kind: str, context: Any) -> Any:
        """End the slot's older call of the same kind, which a retry has replaced."""
        self._decider.check_session(message.slot, message.session)  # an old job ends no call
        key = message.slot, kind
        with self._lock:
            older, self._calls[key] = self._calls.get(key), context
        if older is not None:
            older.cancel()
        try:
            yield
        finally:
            with self._lock:
                if self._calls.get(key) is context:
                    del self._calls[key]

    # The calls of the service.

    def _join(self, requests: Any, context: Any, slot: int | None) -> Iterator[bytes]:
        del context
        message, _ = self._read(requests, Join, slot)
        yield to_bytes(self._decider.join(message.slot, message.plan))

    def _vote(self, requests: Any, context: Any, slot: int | None) -> Iterator[bytes]:
        ballot, first = self._read(requests, Ballot, slot)
        decider = self._decider
        is_needed = decider.needs_bits(ballot)
        with self._only_call(ballot, "Vote", context):
            bits = read_payload(ballot, first, requests) if is_needed else None
            context.add_callback(decider.wake)
            yield from decider.vote(ballot, bits, context.is_active)

    def _decisions(self, requests: Any, context: Any, slot: int | None) -> Iterator[bytes]:
        message, _ = self._read(requests, Follow, slot)
        with self._only_call(message, "Decisions", context):
            for decision, words in self._decider.follow(message):
                self._decider.statistics.transfer(sent=decision.size)
                yield from to_pieces(decision, words)

    def _leave(self, requests: Any, context: Any, slot: int | None) -> Iterator[bytes]:
        del context
        message, _ = self._read(requests, Leave, slot)
        self._decider.leave(message.slot, message.session)
        yield to_bytes(Done())

    def _put_snapshot(self, requests: Any, context: Any, slot: int | None) -> Iterator[bytes]:
        message, first = self._read(requests, Snapshot, slot)
        with self._only_call(message, "PutSnapshot", context):
            self._decider.put_snapshot(message, first, requests)
        yield to_bytes(Done())

    def _get_snapshot(self, requests: Any, context: Any, slot: int | None) -> Iterator[bytes]:
        message, _ = self._read(requests, Fetch, slot)
        with self._only_call(message, "GetSnapshot", context):
            yield from self._decider.get_snapshot(message)

    def _status(self, requests: Any, context: Any, slot: int | None) -> Iterator[bytes]:
        del context
        self._read(requests, Ask, slot)
        text = to_text(self._decider.status()).encode()
        yield from to_pieces(Status(len(text), digest_of(text)), text)

    # Health.

    def _health(self) -> bytes:
        is_serving = not self._is_stopping.is_set() and self._decider.failure is None
        return SERVING if is_serving else NOT_SERVING

    def _check_health(self, requests: Any, context: Any) -> Iterator[bytes]:
        del requests, context  # the only service is this one
        yield self._health()

    def _watch_health(self, requests: Any, context: Any) -> Iterator[bytes]:
        del requests
        if not self._watchers.acquire(blocking=False):
            message = f"at most {MAX_WATCHERS} calls may watch the health: use Check"
            self._refuse(context, Reason.LIMIT, message)
        try:
            before = None
            while context.is_active():
                is_stopping, now = self._is_stopping.wait(1.0 if before else 0.0), self._health()
                if now != before:
                    yield now
                if is_stopping:
                    return
                before = now
        finally:
            self._watchers.release()
