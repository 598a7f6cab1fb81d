"""What travels between a worker's job and the vote server: messages, their bytes, and refusals.

The service has seven calls. A *slot* is a worker's number, 0 to M - 1. A *session* is a number
that the server offers a job that joins, to tell it from other jobs in the same slot. Votes are
numbered over all steps: `sequence = step * K + exchange`, if an update has K votes.

    call          request             response
    Join          Join                Joined
    Vote          Ballot, payload     Decision, payload      waits for the decision
    Decisions     Follow              (Decision, payload)*   from a sequence to the newest one
    Leave         Leave               Done
    PutSnapshot   Snapshot, payload   Done
    GetSnapshot   Fetch               Snapshot, payload
    Status        Ask                 Status, payload

A shard counts a part of each ballot, see `parts`. Its service is smaller:

    Vote          Ballot, payload     Done once it holds the part; then Decision, payload
    Decisions     Follow              (Decision, payload)*
    Lead          Lead                Done                   from the main server
    Count         Count               Counted                from the main server
    Status        Ask                 Status, payload

A message is a length (u32, little-endian), a header of that length (JSON, UTF-8), and the beginning
of its payload, if it has one: little-endian u32 words, or the bytes of a snapshot. A payload of
more than `PIECE_BYTES` continues in further gRPC messages, each of which is a bare piece. The
field `size` of the header counts the bytes of the whole payload, and `digest` is their SHA-256.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from signax.elastic.fields import ProtocolError, from_json, parse, shorten, to_json
from signax.elastic.plan import Plan
from signax.elastic.shard_messages import Count, Counted, Lead

VERSION = 1
SERVICE = f"signax.elastic.v{VERSION}.Votes"
CALLS = ("Join", "Vote", "Decisions", "Leave", "PutSnapshot", "GetSnapshot", "Status")
SHARD_CALLS = ("Vote", "Decisions", "Lead", "Count", "Status")

PIECE_BYTES = 1 << 19  # short enough that one is read while the next is on its way
MAX_HEADER_BYTES = 1 << 17
MAX_MESSAGE_BYTES = 4 + MAX_HEADER_BYTES + PIECE_BYTES

_LENGTH = struct.Struct("<I")


class Join(NamedTuple):
    """Ask for a session. The first job of all brings the log its plan."""

    slot: int
    plan: Plan


class Joined(NamedTuple):
    """A session, and the state of the log.

    Attributes:
      session: the session, which begins with its first ballot.
      sequence: the first undecided vote.
      first: the first vote that the log still has.
      snapshot: the number of updates in the snapshot's parameters; `None` without a snapshot.
      quorum: the ballots that a decision needs.
      deadline: the seconds after which a vote with a quorum waits for nobody.
      shards: the addresses of the main server's shards, in their order.
    """

    session: int
    sequence: int
    first: int
    snapshot: int | None
    quorum: int
    deadline: float
    shards: tuple[str, ...] = ()


class Ballot(NamedTuple):
    """A worker's ballot in one vote. Its payload is the sealed message, see `_wire.words.seal`.

    A worker that does not participate sends no payload: size 0, and the digest of no bytes. With
    shards each server gets a part of the sealed message, and all parts have the same `whole`: the
    SHA-256 of the digests of the parts, end to end.
    """

    slot: int
    session: int
    sequence: int
    participates: bool
    size: int
    digest: str
    whole: str = ""

    @property
    def identity(self) -> str:
        """What tells the ballot from other ballots of the slot, on all servers."""
        return self.whole or self.digest


class Decision(NamedTuple):
    """The outcome of one vote. Its payload holds the planes of the decision, end to end.

    Attributes:
      sequence: the number of the vote.
      header: 2 * voters + dead, as in `signax._wire.types.Reply`.
      present: the slots that sent a ballot in time.
      voters: the slots that took part, a subset of `present`.
      wants_snapshot: whether the receiver should upload a snapshot of its parameters.
      size: the number of bytes of the payload.
      digest: their SHA-256.
    """

    sequence: int
    header: int
    present: tuple[int, ...]
    voters: tuple[int, ...]
    wants_snapshot: bool
    size: int
    digest: str


class Follow(NamedTuple):
    """Ask for all decisions from a sequence on."""

    slot: int
    session: int
    sequence: int


class Leave(NamedTuple):
    """End a session: nobody waits for the slot until a new session votes."""

    slot: int
    session: int


class Snapshot(NamedTuple):
    """Parameters after `step` updates. The payload is theirs in the clients' own format."""

    slot: int
    session: int
    step: int
    size: int
    digest: str


class Fetch(NamedTuple):
    """Ask for the newest snapshot, of parameters after at least `step` updates.

    If there is none, or the log does not reach back to it, the server refuses and asks a worker to
    upload one.
    """

    slot: int
    session: int
    step: int


class Ask(NamedTuple):
    """Ask for the server's status."""


class Status(NamedTuple):
    """The server's status. Its payload is JSON text."""

    size: int
    digest: str


class Done(NamedTuple):
    """Nothing to report."""


Message = (
    Join
    | Joined
    | Ballot
    | Decision
    | Follow
    | Leave
    | Snapshot
    | Fetch
    | Lead
    | Count
    | Counted
    | Ask
    | Status
    | Done
)
M = TypeVar("M", bound=Message)


def digest_of(payload: Any) -> str:
    """The SHA-256 of some bytes, in hexadecimal digits."""
    return hashlib.sha256(payload).hexdigest()


def to_bytes(message: Message, payload: Any = b"") -> bytes:
    """A message and the beginning of its payload, as bytes."""
    fields = {"type": type(message).__name__, **to_json(message)}
    header = json.dumps(fields, allow_nan=False, separators=(",", ":")).encode()
    return b"".join([_LENGTH.pack(len(header)), header, payload])


def from_bytes(data: bytes, kind: type[M]) -> tuple[M, memoryview]:
    """Read a message of one type, and the beginning of its payload; `ProtocolError` otherwise."""
    if len(data) < _LENGTH.size:
        raise ProtocolError(f"a message of {len(data)} bytes is shorter than its length field")
    (length,) = _LENGTH.unpack_from(data)
    if length > MAX_HEADER_BYTES or length > len(data) - _LENGTH.size:
        raise ProtocolError(
            f"the header's length is {length} bytes, of at most {MAX_HEADER_BYTES} in a message of "
            f"{len(data)} bytes"
        )
    stop = _LENGTH.size + length
    fields, name = parse(data[_LENGTH.size : stop]), kind.__name__
    if not isinstance(fields, dict) or fields.pop("type", None) != name:
        raise ProtocolError(f"the header is no {name}, but {shorten(fields)}")
    payload = memoryview(data)[stop:]
    if payload and "size" not in kind._fields:
        raise ProtocolError(f"a {name} has no payload, but {len(payload)} bytes follow its header")
    return from_json(kind, fields, name), payload


def to_pieces(message: Message, payload: Any) -> Iterator[bytes]:
    """The gRPC messages of a message whose payload may be long."""
    payload = memoryview(payload).cast("B")
    yield to_bytes(message, payload[:PIECE_BYTES])
    for start in range(PIECE_BYTES, len(payload), PIECE_BYTES):
        yield bytes(payload[start : start + PIECE_BYTES])


def read_payload(
    message: Ballot | Decision | Snapshot | Status, first: memoryview, pieces: Iterable[bytes]
) -> memoryview:
    """The whole payload of a message, which began in it; raise unless size and digest fit."""
    size, filled = message.size, len(first)
    payload, hashed = first, hashlib.sha256(first)
    if filled < size:
        payload = memoryview(bytearray(size))
        payload[:filled] = first
    pieces = iter(pieces)
    while filled < size:
        piece = next(pieces, b"")
        if not piece:
            raise ProtocolError(f"the payload ends after {filled} of size={size} bytes")
        if len(piece) > size - filled:
            filled += len(piece)
            break
        payload[filled : filled + len(piece)] = piece
        hashed.update(piece)  # while the next piece is on its way
        filled += len(piece)
    if filled > size:
        raise ProtocolError(f"more than size={size} bytes follow the header")
    if hashed.hexdigest() != message.digest:
        raise ProtocolError(f"digest={message.digest!r} is not the digest of the payload")
    return payload
