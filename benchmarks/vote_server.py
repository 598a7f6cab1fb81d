"""The vote server, `python -m signax.elastic serve`, on the last host of some links."""

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
    """A server that runs.

    Attributes:
      address: where the workers find it.
    """

    def __init__(self, links: Links):
        self._prefix = links.prefixes[-1]
        self._port = links.coordinator.rpartition(":")[2]  # which is free
        self.address = f"{links.addresses[-1]}:{self._port}"

    @property
    def command(self) -> list[str]:
        """The words that start it, to which options are added."""
        return [*self._prefix, *SIGNAX_ELASTIC, "serve", "--listen", f"0.0.0.0:{self._port}"]

    def status(self) -> dict[str, Any]:
        """What the server says of itself."""
        command = [*self._prefix, *SIGNAX_ELASTIC, "status", f"127.0.0.1:{self._port}"]
        return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


@contextlib.contextmanager
def serving(
    links: Links, workers: int, folder: Path, *, quorum: int | None = None, deadline: str = "2s"
) -> Iterator[VoteServer]:
    """Run a server with its log in a folder. By default it waits for all workers."""
    server = VoteServer(links)
    options = {"--workers": workers, "--quorum": quorum or workers, "--deadline": deadline}
    options |= {"--log": folder / "votes.db"}
    words = [str(word) for option in options.items() for word in option]
    with open(folder / "server.log", "w") as log:
        command = [*server.command, *words, "--insecure"]
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        yield server
    finally:
        process.terminate()
        process.wait()
