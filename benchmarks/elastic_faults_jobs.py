"""Jobs of elastic_faults.py: processes that print JSON lines, and the log that they leave."""

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from network import worker_environment
from report import summary

from signax.elastic.log import Log

here = Path(__file__).parent


class Job:
    """A process, and the JSON lines that it has printed so far.

    Args:
      command: its words.
      folder: where its program cache is.
    """

    def __init__(self, command: Sequence[str], folder: Path):
        # Jobs that restart find their compiled programs.
        cache = {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self.started = time.monotonic()
        self.lines: list[dict[str, Any]] = []
        self._errors: list[str] = []
        self.process = subprocess.Popen(
            command,
            env=os.environ | worker_environment | cache,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # hides Ctrl-C: the benchmark ends it
        )
        streams = self.process.stdout, self.process.stderr
        self._readers = [threading.Thread(target=self._read, args=(one,)) for one in streams]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: Any) -> None:
        for line in stream:
            try:
                self.lines.append(json.loads(line))
            except ValueError:  # of gRPC, or of an error
                self._errors.append(line)

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    @property
    def step(self) -> int:
        """The newest step that a worker has reported, or -1."""
        return self.lines[-1]["step"] if self.lines else -1

    @property
    def is_serving(self) -> bool:
        """Whether a server has begun to listen."""
        return any(line.get("event") == "serving" for line in self.lines)

    def end(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, and wait for the end."""
        if self.is_alive:
            self.process.send_signal(number)
        self.wait()

    def wait(self, seconds: float | None = None) -> None:
        """Wait for the end, and for the last line."""
        self.process.wait(seconds)
        for reader in self._readers:
            reader.join()

    def check(self) -> None:
        """Exit if the process has ended by itself with an error."""
        if (self.process.poll() or 0) > 0:
            self.wait()
            sys.exit(f"error: {self.process.args} failed:\n{''.join(self._errors)[-4000:]}")


def start_server(folder: Path, address: str, args: Any, prefix: Sequence[str] = ()) -> Job:
    """Start a vote server on the log of a folder."""
    command = [*prefix, sys.executable, "-m", "signax.elastic", "serve", "--listen", address]
    command += ["--workers", str(args.workers), "--quorum", str(args.quorum), "--insecure"]
    command += ["--deadline", f"{args.deadline}s", "--log", str(folder / "votes.db")]
    return Job(command, folder)


def start_worker(
    folder: Path, address: str, task: dict[str, Any], prefix: Sequence[str] = ()
) -> Job:
    """Start a worker."""
    task = task | {"address": address}
    program = str(here / "elastic_faults_worker.py")
    return Job([*prefix, sys.executable, program, json.dumps(task)], folder)


def steps_of(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """The lines of all steps that some jobs have taken."""
    return [line for job in jobs for line in job.lines if "start" in line]


def ends_of(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """The last lines of jobs; exit unless all have come to the end with the same parameters."""
    ends = [job.lines[-1] if job.lines else {} for job in jobs]
    found = {end.get("parameters") for end in ends}
    if len(found) > 1 or None in found:
        sys.exit(f"error: the jobs hold different parameters: {found}")
    return ends


def spread(times: Sequence[float]) -> dict[str, float]:
    """A summary with the 95th percentile."""
    percentile = statistics.quantiles(times, n=20, method="inclusive")[-1]
    return summary(times) | {"percentile_95": percentile}


def voters_of(folder: Path) -> list[tuple[int, ...]]:
    """The voters of each decision in the log of a server that has ended."""
    log = Log(folder / "votes.db")
    try:
        entries = [log.read(sequence) for sequence in range(log.next)]
    finally:
        log.close()
    return [entry.decision.voters for entry in entries if entry]
