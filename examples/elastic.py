"""Kill workers of a run, and the vote server, and watch the others go on.

Workers are JAX jobs of their own, elastic_worker.py, which vote through a server. Each line shows
the step, the loss, and who is alive. A worker that was killed starts again after a random pause,
replays the server's log, and votes again. At the end all workers must hold the same parameters, bit
for bit, and so must a job that only replays the log. A run takes a few minutes.

    pip install '.[elastic]' scikit-learn  # from a checkout
    python examples/elastic.py
    python examples/elastic.py --workers 8 --kill-every 5s --kill-server-every 30s --steps 3000
"""

import argparse
import json
import math
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("elastic_worker.py")


def main() -> None:
    """Run, kill, watch, and compare."""
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(args, Path(folder))
        try:
            run.watch()
            run.compare()
        finally:
            run.end()


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workers", type=int, default=4, help="at least 2 (default 4)")
    add("--steps", type=int, default=1000, help="(default 1000)")
    add("--kill-every", type=seconds, default=20.0, help="such as 20s, the default")
    add("--kill-server-every", type=seconds, default=60.0, help="such as 60s, the default")
    add("--deadline", default="1s", help="of a vote (default 1s)")
    add("--pause", type=seconds, default=0.05, help="of a worker after each step (default 50ms)")
    add("--seed", type=int, default=0, help="(default 0)")
    add("--json", type=Path, metavar="FILE", help="write what happened to FILE")
    args = parser.parse_args()
    if args.workers < 2:
        parser.error(f"--workers {args.workers} must be at least 2, so that one may die")
    return args


def seconds(text: str) -> float:
    """The seconds in `20s` or `50ms`."""
    match = re.fullmatch(r"([\d.]+)(ms|s)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time, such as 20s or 50ms")
    return float(match[1]) * {"s": 1.0, "ms": 1e-3}[match[2]]


class Job:
    """A process, and the last JSON line that it has printed."""

    def __init__(self, errors: Path, *command: Any):
        # One thread for each worker's arithmetic: they all share this machine.
        flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
        self.errors = errors
        with errors.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                stdout=subprocess.PIPE,
                stderr=file,
                env=os.environ | flags,
                text=True,
            )
        self.last: dict[str, Any] = {}
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.last = json.loads(line)

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def wait(self) -> dict[str, Any]:
        """Wait for the end, and return the last line."""
        self.process.wait()
        self.reader.join()
        return self.last

    def check(self) -> None:
        """Raise if the process has ended by itself with an error."""
        if (self.process.poll() or 0) > 0:
            raise SystemExit(f"{self.process.args} failed:\n{self.errors.read_text()[-3000:]}")


class Run:
    """The server and the workers of a run."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder = args, folder
        self.random = random.Random(args.seed)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.server = self.start_server()
        self.workers = [self.start_worker(slot) for slot in range(args.workers)]
        self.killed = {"workers": 0, "server": 0}
        self.restarts: dict[int, float] = {}  # when a killed worker starts again

    def start_server(self) -> Job:
        args = self.args
        return Job(
            self.folder / "errors of the server",
            *("-m", "signax.elastic", "serve", "--listen", self.address),
            *("--workers", args.workers, "--deadline", args.deadline),
            *("--quorum", args.workers // 2, "--log", self.folder / "votes.db"),
        )

    def start_worker(self, slot: int) -> Job:
        args = self.args
        return Job(
            self.folder / f"errors of worker {slot}",
            *(WORKER, "--address", self.address, "--slot", slot, "--steps", args.steps),
            *("--seed", args.seed, "--pause", args.pause),
        )

    def watch(self) -> None:
        """Print a line each second, kill and restart, until all workers have ended."""
        start = time.monotonic()
        kill_at = kill_server_at = math.inf  # until training has begun
        while self.restarts or any(worker.is_alive for worker in self.workers):
            time.sleep(1.0)
            now = time.monotonic()
            for job in (self.server, *self.workers):
                job.check()
            alive = [slot for slot, worker in enumerate(self.workers) if worker.is_alive]
            self.show(now - start, alive)
            if kill_at == math.inf and any(worker.last for worker in self.workers):
                kill_at = now + self.args.kill_every
                kill_server_at = now + self.args.kill_server_every
            if now >= kill_at and len(alive) > self.args.workers // 2:
                slot = self.random.choice(alive)
                self.workers[slot].kill()
                self.restarts[slot] = now + self.random.uniform(1, self.args.kill_every)
                self.killed["workers"] += 1
                kill_at = now + self.args.kill_every
            if now >= kill_server_at and alive:
                self.server.kill()
                self.server = self.start_server()
                self.killed["server"] += 1
                kill_server_at = now + self.args.kill_server_every
            for slot, restart_at in [*self.restarts.items()]:
                if now >= restart_at:
                    del self.restarts[slot]
                    self.workers[slot] = self.start_worker(slot)

    def show(self, elapsed: float, alive: list[int]) -> None:
        """Print who is alive, and how far training is."""
        newest = max((worker.last for worker in self.workers), key=lambda last: last.get("step", 0))
        slots = " ".join(str(n) if n in alive else "-" for n in range(len(self.workers)))
        found = f"loss {newest['loss']:.3f}  voters {newest['voters']}" if "loss" in newest else ""
        step = newest.get("step", 0)
        print(f"{elapsed:5.0f} s  step {step:5}  alive {slots}  {found}", flush=True)

    def compare(self) -> None:
        """Compare all workers with one that replays the log, and raise if they differ."""
        replay = self.start_worker(0)
        ends = [job.wait() for job in (*self.workers, replay)]
        replay.check()
        found = {end.get("parameters") for end in ends}
        print(
            f"killed: {self.killed['workers']} workers, {self.killed['server']} servers; "
            f"accuracy {replay.last.get('accuracy', 0):.2%}"
        )
        if self.args.json:
            self.args.json.write_text(json.dumps({"killed": self.killed, "ends": ends}) + "\n")
        if len(found) > 1 or None in found:
            raise SystemExit(f"the workers hold different parameters: {found}")
        print("All workers, and a replay of the log, hold the same parameters.")

    def end(self) -> None:
        """End all processes."""
        for job in (*self.workers, self.server):
            job.kill()


if __name__ == "__main__":
    main()
