r"""The vote server's command.

    python -m signax.elastic serve --listen 127.0.0.1:7443 --workers 8 --quorum 5 \
        --deadline 2s --log votes.db
    python -m signax.elastic status 127.0.0.1:7443
    python -m signax.elastic token 3

    python -m signax.elastic shard --listen 10.0.0.2:7443 --workers 8 --log part1.db ...
    python -m signax.elastic serve --shards 10.0.0.2:7443 ...

`serve` runs until SIGTERM or SIGINT: it finishes the round in hand and exits with 0. It writes a
JSON line to stderr for each event, and gRPC may write lines of its own. Beyond loopback it needs
TLS (--tls-cert, --tls-key) and a credential for each slot: --tokens FILE, or certificates of an
authority, --tls-clients FILE.

`token` prints a new token for a slot on the first line, and its line for the file of tokens on the
second one. The server reads the file when it starts.

`shard` counts a part of every ballot for the server whose `--shards` names it, the main server. It
runs until a signal, too. Beyond loopback it needs TLS and credentials like `serve`, and further a
credential of the main server: `token main` prints a token for it, which `serve --shards-token`
reads, and its line for the shards' files of tokens. With --tls-clients the main server shows its
own certificate, --tls-cert, whose common name is then `main`.
"""

import argparse
import contextlib
import json
import logging
import re
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import jax

from signax.elastic import pages
from signax.elastic.credentials import (
    MAIN,
    Credentials,
    check_exposure,
    is_loopback,
    make_token,
    read_token,
    read_tokens,
    split_address,
)
from signax.elastic.decider import Decider
from signax.elastic.log import Log, LogError
from signax.elastic.plan import MAX_WORKERS
from signax.elastic.protocol import SERVICE, Ask, Status, from_bytes, read_payload, to_bytes
from signax.elastic.rounds import Options
from signax.elastic.server import Tls, VoteServer
from signax.elastic.shard import Shard
from signax.elastic.shard_server import ShardServer
from signax.elastic.sharded_decider import ShardedDecider
from signax.elastic.shards import Shards
from signax.elastic.snapshots import Snapshots
from signax.elastic.status import log_event, logger

_TIMES = {"ms": 1e-3, "s": 1.0, "min": 60.0}


class _JsonLines(logging.Formatter):
    """One JSON object a line: the time, the event and its fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _seconds(text: str) -> float:
    match = re.fullmatch(r"([\d.]+)(ms|s|min)", text)
    try:
        seconds = float(match[1]) * _TIMES[match[2]] if match else 0.0
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no time: write a number above 0 and ms, s or min, such as 2s"
        )
    return seconds


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m signax.elastic", description=__doc__, formatter_class=about
    )
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="decide votes until stopped")
    _add_server_options(serve)
    serve.add_argument(
        "--quorum", type=int, help="ballots that a decision needs; by default more than half"
    )
    serve.add_argument(
        "--deadline", type=_seconds, default=2.0, help="from the first ballot on, such as 2s"
    )
    serve.add_argument("--keep", type=int, metavar="STEPS", help="steps to keep; by default all")
    serve.add_argument("--status", metavar="HOST:PORT", help="where to serve the status page")
    serve.add_argument("--shards", metavar="HOST:PORT,...", help="the shards, in the run's order")
    serve.add_argument("--shards-ca", type=Path, help="the authority of the shards' certificates")
    serve.add_argument("--shards-token", type=Path, help="a file with the token for the shards")
    _add_server_options(commands.add_parser("shard", help="count a part of every ballot"))
    status = commands.add_parser("status", help="print the status of a server as JSON")
    status.add_argument("address", metavar="HOST:PORT")
    status.add_argument("--token-file", type=Path, help="a file with a token")
    status.add_argument("--tls-ca", type=Path, help="the authority of the server's certificate")
    status.add_argument("--tls-cert", type=Path, help="the client's certificate, PEM")
    status.add_argument("--tls-key", type=Path, help="its key, PEM")
    token = commands.add_parser("token", help="make a token for a slot, or for the main server")
    token.add_argument("slot", type=_slot, metavar="SLOT|main")
    return parser.parse_args(arguments)


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--listen", required=True, metavar="HOST:PORT", help="where jobs connect")
    parser.add_argument("--workers", required=True, type=int, help="the number of slots")
    parser.add_argument("--log", required=True, type=Path, help="the file of decisions")
    parser.add_argument("--tls-cert", type=Path, help="the server's certificate, PEM")
    parser.add_argument("--tls-key", type=Path, help="its key, PEM")
    parser.add_argument("--tls-clients", type=Path, help="the authority of clients' certificates")
    parser.add_argument("--tokens", type=Path, help="the file of hashes of tokens")
    parser.add_argument("--insecure", action="store_true", help="allow what is unsafe elsewhere")


def _slot(text: str) -> int:
    if text == "main":
        return MAIN
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no slot: write a worker's number, from 0, or main"
        )
    return int(text)


def _read_tls(options: argparse.Namespace) -> Tls | None:
    if (options.tls_cert is None) != (options.tls_key is None):
        raise ValueError("--tls-cert and --tls-key belong together: give both or neither")
    if options.tls_cert is None:
        if options.tls_clients is not None:
            raise ValueError("--tls-clients needs --tls-cert and --tls-key")
        return None
    clients = options.tls_clients and options.tls_clients.read_bytes()
    return Tls(options.tls_key.read_bytes(), options.tls_cert.read_bytes(), clients)


def _prepare(options: argparse.Namespace) -> tuple[Credentials, Tls | None]:
    """Check and read who may call, and the files of TLS."""
    if not 1 <= options.workers <= MAX_WORKERS:
        raise ValueError(f"--workers {options.workers} must be from 1 to {MAX_WORKERS}")
    if options.tokens and options.tls_clients:
        raise ValueError(
            "--tokens and --tls-clients exclude one another: a slot has one credential"
        )
    jax.config.update("jax_platforms", "cpu")  # leave accelerators to the jobs
    host, _ = split_address(options.listen)
    tls = _read_tls(options)
    tokens = options.tokens and read_tokens(options.tokens, options.workers)
    credentials = Credentials(tokens, by_certificate=options.tls_clients is not None)
    check_exposure(
        host, has_tls=tls is not None, credentials=credentials, insecure=options.insecure
    )
    return credentials, tls


def _read_shards(options: argparse.Namespace, log: Log, tls: Tls | None) -> Shards:
    """The shards that `--shards` names."""
    addresses = options.shards.split(",")
    hosts = [split_address(address)[0] for address in addresses]
    if tls is None and not (options.insecure or all(map(is_loopback, hosts))):
        raise ValueError(
            f"--shards {options.shards} is beyond this machine, and without TLS requests travel in "
            "plain text: give --tls-cert and --tls-key, or --insecure if the network is yours alone"
        )
    if tls is None and options.shards_ca is not None:
        raise ValueError(
            "--shards-ca needs --tls-cert and --tls-key: without them shards are called in plain "
            "text"
        )
    token = options.shards_token and read_token(options.shards_token)
    credentials = None
    if tls is not None:
        authority = options.shards_ca and options.shards_ca.read_bytes()
        own = (tls.key, tls.certificate) if tls.clients else (None, None)
        credentials = grpc.ssl_channel_credentials(authority, *own)
    return Shards(addresses, log, credentials, token)


def serve(options: argparse.Namespace) -> int:
    """Serve until a signal; return the exit status."""
    credentials, tls = _prepare(options)
    quorum = options.workers // 2 + 1 if options.quorum is None else options.quorum
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(contextlib.closing(Log(options.log, keep=options.keep)))
        snapshots = Snapshots(options.log.with_name(f"{options.log.name}.snapshot"))
        rules = Options(options.workers, quorum, options.deadline)
        if options.shards is None:
            decider = Decider(log, snapshots, rules)
        else:
            decider = ShardedDecider(log, snapshots, rules, _read_shards(options, log, tls))
        stack.callback(decider.stop)
        server = VoteServer(decider, options.listen, credentials, tls)
        status = None
        if options.status:
            status = pages.Pages(options.status, decider.status, lambda: not decider.wait(0))
            stack.callback(status.stop)
        _run(server, decider, status)
    log_event("stopped", failed=decider.failure is not None)
    return 0 if decider.failure is None else 1


def serve_shard(options: argparse.Namespace) -> int:
    """Serve as a shard until a signal; return the exit status."""
    credentials, tls = _prepare(options)
    with contextlib.closing(Log(options.log)) as log:
        shard = Shard(log, options.workers)
        _run(ShardServer(shard, options.listen, credentials, tls), shard, None)
    log_event("stopped", failed=shard.failure is not None)
    return 0 if shard.failure is None else 1


def _run(server: VoteServer, decider: Decider | Shard, status: pages.Pages | None) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    server.start()
    log_event("serving", address=server.address, status=status and status.address)
    while not stopped.wait(0.2) and not decider.wait(0):
        pass
    log_event("stopping")
    server.stop()


def fetch_status(options: argparse.Namespace) -> dict[str, Any]:
    """The status of a running server."""
    host, _ = split_address(options.address)
    metadata = []
    if options.token_file:
        metadata = [("authorization", f"Bearer {read_token(options.token_file)}")]
    if is_loopback(host) and options.tls_ca is None:
        channel: Any = grpc.insecure_channel(options.address)
    else:
        files = (options.tls_ca, options.tls_key, options.tls_cert)
        read = [path and path.read_bytes() for path in files]
        channel = grpc.secure_channel(options.address, grpc.ssl_channel_credentials(*read))
    with channel:
        call = channel.stream_stream(f"/{SERVICE}/Status")
        pieces = call(iter([to_bytes(Ask())]), metadata=metadata, timeout=10)
        message, first = from_bytes(next(pieces), Status)
        text = read_payload(message, first, pieces)
    return json.loads(text.tobytes())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status."""
    options = parse_arguments(arguments)
    try:
        if options.command == "serve":
            return serve(options)
        if options.command == "shard":
            return serve_shard(options)
        if options.command == "token":
            print(*make_token(options.slot), sep="\n")
            return 0
        print(json.dumps(fetch_status(options), indent=2))
        return 0
    except (ValueError, OSError, LogError, RuntimeError) as error:
        print(f"python -m signax.elastic {options.command}: {error}", file=sys.stderr)
        return 2
    except grpc.RpcError as error:
        print(f"{options.address}: {error.code().name}: {error.details()}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
