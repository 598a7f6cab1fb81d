"""The part `kills` of elastic_faults.py: jobs and the server die at random steps, and restart."""

import argparse
import random
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from elastic_faults_jobs import (
    Job,
    ends_of,
    spread,
    start_server,
    start_worker,
    steps_of,
    voters_of,
)

# For each model the steps of a run, and the pause of a worker in each step.
RUNS: dict[str, dict[str, Any]] = {
    "digits": {"steps": 300, "pause": 1.0, "batch_size": 64, "widths": (64, 128, 10)},
    "language model": {"steps": 240, "pause": 2.0, "batch_size": 32, "validation_windows": 512},
}
WORKER_PAUSE = 0.5, 3.0  # seconds from a kill to the start of the next job, from and to
SERVER_PAUSE = 0.5, 2.0


class Kill(NamedTuple):
    """A kill, drawn before the run.

    Attributes:
      step: when the run has reached this step, the kill is due.
      slot: the worker; `None` for the server.
      pause: the seconds until the next job starts.
    """

    step: int
    slot: int | None
    pause: float


def draw_kills(args: argparse.Namespace, steps: int) -> list[Kill]:
    """The kills of a run, by step. The first and the last steps of the run are quiet."""
    draw = random.Random(args.seed)

    def at_a_step(slot: int | None, pauses: tuple[float, float]) -> Kill:
        return Kill(draw.randrange(steps // 20, steps * 17 // 20), slot, draw.uniform(*pauses))

    kills = [at_a_step(draw.randrange(args.workers), WORKER_PAUSE) for _ in range(args.kills)]
    kills += [at_a_step(None, SERVER_PAUSE) for _ in range(args.server_kills)]
    return sorted(kills, key=lambda kill: kill.step)


class Run:
    """A server and its workers, until the workers have had all steps.

    Args:
      args: the command line.
      folder: for the log and for compiled programs.
      task: what all workers are told.
      kills: the kills that are not done yet, in their order.
    """

    def __init__(
        self, args: argparse.Namespace, folder: Path, task: dict[str, Any], kills: list[Kill]
    ):
        self.args, self.folder, self.task, self.kills = args, folder, task, kills
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.killed: list[dict[str, Any]] = []
        self.waiting: list[tuple[float, int | None]] = []  # jobs that start again, and when
        self.outages: list[list[float]] = []  # when the server died, and when it served again
        self.server = start_server(folder, self.address, args)
        self.jobs = [[self.start(slot)] for slot in range(args.workers)]  # of each slot, in order

    def start(self, slot: int) -> Job:
        return start_worker(self.folder, self.address, self.task | {"slot": slot})

    @property
    def newest(self) -> list[Job]:
        """The newest job of each slot."""
        return [jobs[-1] for jobs in self.jobs]

    def run(self) -> None:
        """Kill and restart until all workers have ended."""
        while self.waiting or any(job.is_alive for job in self.newest):
            time.sleep(0.02)
            now, step = time.monotonic(), max(job.step for job in self.newest)
            for job in (self.server, *self.newest):
                job.check()
            is_served = self.server.is_alive and self.server.is_serving
            if is_served and self.outages and len(self.outages[-1]) == 1:
                self.outages[-1].append(now)
            for restart in [*self.waiting]:
                if now >= restart[0]:
                    self.waiting.remove(restart)
                    self.restart(restart[1])
            due = [kill for kill in self.kills if kill.step <= step]
            allowed = [kill for kill in due if self.may(kill, step)]
            if allowed:
                self.kills.remove(allowed[0])
                self.kill(allowed[0], now, step)

    def may(self, kill: Kill, step: int) -> bool:
        """Whether a kill hits a job at work, and leaves a quorum."""
        if kill.slot is None:
            return self.server.is_alive and self.has_decided_since_outage()
        voting = [job.is_alive and is_in_step(job, step) for job in self.newest]
        return voting[kill.slot] and sum(voting) > self.args.quorum

    def has_decided_since_outage(self) -> bool:
        """Whether a worker has ended a step that began after the newest outage."""
        over = self.outages[-1][-1] if self.outages else 0.0
        return any(line["start"] > over for line in steps_of(self.newest))

    def kill(self, kill: Kill, now: float, step: int) -> None:
        job = self.server if kill.slot is None else self.newest[kill.slot]
        job.end()
        self.waiting.append((now + kill.pause, kill.slot))
        if kill.slot is None:
            self.outages.append([now])
        self.killed.append({"slot": kill.slot, "step": step, "pause": kill.pause})
        print(f"  step {step}: kill {'server' if kill.slot is None else kill.slot}", flush=True)

    def restart(self, slot: int | None) -> None:
        if slot is None:
            self.server = start_server(self.folder, self.address, self.args)
        else:
            self.jobs[slot].append(self.start(slot))

    def end(self) -> None:
        """End all processes."""
        for job in (self.server, *self.newest):
            job.end()


def is_in_step(job: Job, step: int) -> bool:
    """Whether a worker has voted in the newest step or the one before it, and in the one before."""
    last = [line["step"] for line in job.lines[-2:]]
    return len(last) == 2 and last[0] + 1 == last[1] >= step - 1


def run_model(args: argparse.Namespace, name: str, kills: Sequence[Kill]) -> dict[str, Any]:
    """Train a model with some kills, and measure."""
    task = RUNS[name] | {"model": name, "seed": args.seed}
    task["steps"] = args.steps or task["steps"]
    with tempfile.TemporaryDirectory() as folder:
        run = Run(args, Path(folder), task, [*kills])
        began = time.monotonic()
        try:
            run.run()
            seconds = time.monotonic() - began
            replay = run.start(0)
            replay.wait()
            replay.check()
            ends = ends_of([*run.newest, replay])
            if steps_of([replay]):
                sys.exit("error: the replay has voted")
        finally:
            run.end()
        voters = voters_of(Path(folder))
    (quality,) = set(ends[-1]) - {"step", "parameters"}
    return {
        "steps": len(voters),
        "pause": task["pause"],
        "seconds": seconds,
        "killed": run.killed,
        "kills_left": len(run.kills),
        "parameters": ends[-1]["parameters"],
        "jobs_with_these_parameters": len(ends),
        "quality": {quality: ends[-1][quality]},
        "mean_voters": statistics.mean(map(len, voters)),
        **waits_of(run),
    }


def waits_of(run: Run) -> dict[str, Any]:
    """How long workers waited for votes outside of outages, and how long outages were.

    An outage begins with the kill of the server. It is over with the first decision after that.
    """
    steps = [line for jobs in run.jobs for line in steps_of(jobs)]
    ends = sorted(line["end"] for line in steps)
    outages = [(died, next(end for end in ends if end > served)) for died, served in run.outages]

    def is_outside(line: dict[str, Any]) -> bool:
        return all(line["end"] < died or line["voted"] > over for died, over in outages)

    def wait_of(line: dict[str, Any]) -> float:
        return line["end"] - line["voted"]

    outside = [*filter(is_outside, steps)]
    starts = [
        job.lines[0]["end"] - job.started
        for jobs in run.jobs
        for job in jobs[1:]
        if steps_of([job])
    ]
    return {
        "waits": spread([*map(wait_of, outside)]),
        "num_waits": len(outside),
        "longest_waits": sorted(map(wait_of, outside))[:-21:-1],
        "outages": [over - died for died, over in outages],
        "server_away": [served - died for died, served in run.outages],
        "seconds_to_first_vote": spread(starts) if len(starts) > 1 else None,
    }
