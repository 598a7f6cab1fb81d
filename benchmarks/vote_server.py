"""Vote servers, `python -m signax.elastic serve` and `shard`, on hosts behind the workers'."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from namespaces import Links

SIGNAX_ELASTIC = (sys.executable, "-m", "signax.elastic")


class VoteServer:
    """The main server, which runs.

    Attributes:
      address: where the workers find it.
    """

    def __init__(self, links: Links, host: int):
        self._prefix, self._port = links.prefixes[host], _port_of(links, host)
        self.address = f"{links.addresses[host]}:{self._port}"

    def status(self) -> dict[str, Any]:
        """What the server says of itself."""
        command = [*self._prefix, *SIGNAX_ELASTIC, "status", f"127.0.0.1:{self._port}"]
        return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


@contextlib.contextmanager
def serving(
    links: Links,
    workers: int,
    folder: Path,
    *,
    shards: int = 0,
    quorum: int | None = None,
    deadline: str = "2s",
) -> Iterator[VoteServer]:
    """Run a server with its log in a folder, and shards. By default it waits for all workers."""
    first = len(links.prefixes) - 1 - shards
    with contextlib.ExitStack() as stack:

        def start(host: int, command: str, *options: Any) -> None:
            listen = f"0.0.0.0:{_port_of(links, host)}"
            words = [command, "--listen", listen, "--workers", workers, "--insecure", *options]
            words += ["--log", folder / f"votes{host}.db"]
            log = stack.enter_context(open(folder / f"server{host}.log", "w"))
            full = [*links.prefixes[host], *SIGNAX_ELASTIC, *map(str, words)]
            process = subprocess.Popen(full, stdout=log, stderr=log, start_new_session=True)
            stack.callback(process.wait)
            stack.callback(process.terminate)

        hosts = range(first + 1, first + 1 + shards)
        for host in hosts:
            start(host, "shard")
        others = ",".join(f"{links.addresses[host]}:{_port_of(links, host)}" for host in hosts)
        options = ["--quorum", quorum or workers, "--deadline", deadline]
        start(first, "serve", *options, *(["--shards", others] if shards else []))
        yield VoteServer(links, first)


def _port_of(links: Links, host: int) -> int:
    """A port that is free: the coordinator's, or one behind it for each server."""
    return int(links.coordinator.rpartition(":")[2]) + len(links.prefixes) - 1 - host
