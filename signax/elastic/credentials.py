"""Who may vote: one credential for each slot, and what may travel in plain text.

A credential is a token, sent as `authorization: Bearer TOKEN`, or a client's certificate with the
common name `worker-SLOT`. The server stores hashes of tokens only.

Shards take requests to count from the main server, whose token has the line `main HASH` in the
file of tokens, and whose certificate has the common name `main`.
"""

import hashlib
import hmac
import ipaddress
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from signax.elastic.refusals import Reason, RefusedError

MAIN = -1  # in the place of a slot, for the main server

_BEARER = "Bearer "
_LINE = re.compile(r"(\d+|main)\s+([0-9a-f]{64})")
_NAME = re.compile(r"worker-(\d+)|main")


class Credentials(NamedTuple):
    """The credentials that a server knows.

    Attributes:
      tokens: the SHA-256 of the token of each slot, and of the main server's as `MAIN`; `None` if
        slots have no tokens.
      by_certificate: whether a slot shows a certificate instead.
    """

    tokens: Mapping[int, str] | None = None
    by_certificate: bool = False

    @property
    def are_required(self) -> bool:
        """Whether a call needs a credential; otherwise messages name their own slot."""
        return self.tokens is not None or self.by_certificate

    def find_slot(self, metadata: Sequence[Any], identity: Mapping[str, Any]) -> int | None:
        """The slot of a call, or `MAIN`; `None` if none is required. Raise if it is unknown.

        Args:
          metadata: the metadata that the call came with.
          identity: what TLS knows about the peer, as gRPC's `auth_context` gives it.
        """
        if self.by_certificate:
            return _find_certificate(identity)
        return None if self.tokens is None else self._find_token(metadata)

    def _find_token(self, metadata: Sequence[Any]) -> int:
        values = [value for key, value in metadata if key == "authorization"]
        value = values[0] if len(values) == 1 else ""
        token = value.removeprefix(_BEARER) if isinstance(value, str) else ""
        found, hashed = None, hash_token(token)
        for slot, known in (self.tokens or {}).items():  # all of them, in constant time
            if hmac.compare_digest(known, hashed):
                found = slot
        if found is None or not value.startswith(_BEARER):
            raise RefusedError(
                Reason.UNAUTHENTICATED,
                "the call needs a known token: send the metadata `authorization: Bearer TOKEN`, "
                "and enter the token's line in the server's file of tokens",
            )
        return found


def _find_certificate(identity: Mapping[str, Any]) -> int:
    names = [name.decode(errors="replace") for name in identity.get("x509_common_name", [])]
    match = _NAME.fullmatch(names[0]) if len(names) == 1 else None
    if match is None:
        raise RefusedError(
            Reason.UNAUTHENTICATED,
            f"the certificate's common name is {names}: it must be worker-SLOT, such as worker-0",
        )
    return MAIN if match[1] is None else int(match[1])


def hash_token(token: str) -> str:
    """The SHA-256 of a token, in hexadecimal digits."""
    return hashlib.sha256(token.encode()).hexdigest()


def make_token(slot: int) -> tuple[str, str]:
    """A new token for a slot or for `MAIN`, and its line in a file of tokens."""
    token = secrets.token_urlsafe(32)
    return token, f"{'main' if slot == MAIN else slot} {hash_token(token)}"


def read_token(path: str | Path) -> str:
    """Read the token from a file of what `make_token` returns, or of a token alone."""
    words = Path(path).read_text().split()
    if not words:
        raise ValueError(
            f"{path} is empty: write the token to it that `python -m signax.elastic token` prints"
        )
    return words[0]


def read_tokens(path: str | Path, num_workers: int) -> dict[int, str]:
    """Read a file of tokens: lines of a slot and the SHA-256 of its token; `#` begins a comment."""
    tokens: dict[int, str] = {}
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match, where = _LINE.fullmatch(text), f"{path}, line {number}"
        if match is None:
            raise ValueError(
                f"{where}: {text[:20]!r}... is no slot and hash: make a line with `python -m "
                "signax.elastic token SLOT`"
            )
        slot, hashed = MAIN if match[1] == "main" else int(match[1]), match[2]
        if slot >= num_workers:
            raise ValueError(f"{where}: slot {slot} is none of 0 to {num_workers - 1}")
        if slot in tokens or hashed in tokens.values():
            raise ValueError(
                f"{where}: slot {match[1]} or its token is there twice; give each one line"
            )
        tokens[slot] = hashed
    if not tokens:
        raise ValueError(
            f"{path} has no line of a token, so nobody could vote: add a line for each slot by "
            "`python -m signax.elastic token SLOT`"
        )
    return tokens


def split_address(address: str) -> tuple[str, int]:
    """The host and the port of `HOST:PORT`, where an IPv6 host is in brackets."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{address!r} is no HOST:PORT, such as 127.0.0.1:7443 or [::1]:7443")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, *, has_tls: bool, credentials: Credentials, insecure: bool) -> None:
    """Raise if a server would be open to others by accident."""
    if insecure or is_loopback(host):
        return
    if not has_tls:
        raise ValueError(
            f"{host} is not a loopback address, and without TLS ballots and tokens travel in plain "
            "text: give --tls-cert and --tls-key, or --insecure if the network is yours alone"
        )
    if not credentials.are_required:
        raise ValueError(
            f"{host} is not a loopback address, and without credentials anybody may vote: give "
            "--tokens or --tls-clients, or --insecure if the network is yours alone"
        )
