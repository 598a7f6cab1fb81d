"""Refusals: why the server refuses a request, and the gRPC status that says so."""

import enum


class Reason(enum.StrEnum):
    """Why the server refused a request.

    Clients read the reason from the trailing metadata, under the key `REASON_KEY`.
    """

    UNAUTHENTICATED = "unauthenticated"  # no credential, or an unknown one
    WRONG_SLOT = "wrong-slot"  # the credential belongs to another slot
    MALFORMED = "malformed"  # not a message, or of the wrong size
    WRONG_PLAN = "wrong-plan"  # another model, other options or another version
    NO_SESSION = "no-session"  # the server has restarted: join again and repeat the request
    OLD_SESSION = "old-session"  # another job has taken the slot, or the job has left
    FUTURE = "future"  # a vote that cannot have begun: the log is another one
    CONFLICT = "conflict"  # a second ballot with other bits
    LIMIT = "limit"  # too many calls at once
    TOO_OLD = "too-old"  # dropped from the log: take a snapshot
    NO_SNAPSHOT = "no-snapshot"  # nobody has uploaded one yet: ask again later
    REPEATED = "repeated"  # the slot repeats the call, and this one need not go on
    STOPPING = "stopping"  # try again, the server may come back
    UNREADY = "unready"  # a shard has not heard from the main server yet: try again

    @property
    def status(self) -> str:
        """The name of the gRPC status."""
        return _STATUSES[self]


_STATUSES = {
    Reason.UNAUTHENTICATED: "UNAUTHENTICATED",
    Reason.WRONG_SLOT: "PERMISSION_DENIED",
    Reason.MALFORMED: "INVALID_ARGUMENT",
    Reason.WRONG_PLAN: "FAILED_PRECONDITION",
    Reason.NO_SESSION: "FAILED_PRECONDITION",
    Reason.OLD_SESSION: "FAILED_PRECONDITION",
    Reason.FUTURE: "FAILED_PRECONDITION",
    Reason.CONFLICT: "ALREADY_EXISTS",
    Reason.LIMIT: "RESOURCE_EXHAUSTED",
    Reason.TOO_OLD: "OUT_OF_RANGE",
    Reason.NO_SNAPSHOT: "NOT_FOUND",
    Reason.REPEATED: "ABORTED",
    Reason.STOPPING: "UNAVAILABLE",
    Reason.UNREADY: "UNAVAILABLE",
}
REASON_KEY = "signax-reason"


class RefusedError(Exception):
    """A request that the server refuses. Nothing has changed by it."""

    def __init__(self, reason: Reason, message: str):
        super().__init__(message)
        self.reason = reason
