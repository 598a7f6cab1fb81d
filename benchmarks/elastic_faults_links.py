"""The part `links` of elastic_faults.py: workers and the server on links of their own."""

import argparse
import contextlib
import itertools
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from elastic_faults_jobs import (
    Job,
    ends_of,
    spread,
    start_server,
    start_worker,
    steps_of,
    voters_of,
)
from namespaces import Links, has_netem, namespaces, unavailable

RATE = "100mbit"
PORT = 7443
WARMUP = 10  # first steps, in which workers are still starting, are not measured
CUT_AT, CUT_SECONDS = 60, 10.0  # the step, and how long the link is cut
TASK = {"model": "digits", "batch_size": 32, "widths": (256, 310, 10)}  # 99,420 parameters

# A step has two parts: `input` seconds before the worker catches up, as of a slow disk, and `pause`
# seconds from there to its ballot, as of a larger model. `bad` is for the last worker. Late by a
# moment is a worker that takes a little longer than the others together with the deadline.
CASES: dict[str, dict[str, Any]] = {
    "undisturbed": {"steps": 300},
    "2% of packets lost": {"steps": 300, "loss": 0.02},
    "50 ms delay each way": {"steps": 200, "delay": "50ms"},
    "one worker cut off for 10 s": {"steps": 400, "cut": True},
    "one worker 20 times slower": {"steps": 300, "bad": {"pause": 2.0}},
    "one worker late by a moment": {"steps": 60, "pause": 0.5, "bad": {"pause": 1.52}},
    "one worker with input 20 times slower": {
        "steps": 300,
        "pause": 0.0,
        "input": 0.1,
        "bad": {"input": 2.0},
    },
}


@contextlib.contextmanager
def join(args: argparse.Namespace, case: dict[str, Any]) -> Iterator[Links]:
    """Links for the workers, and as the last one the server's."""
    if reason := unavailable():
        sys.exit(f"error: no network namespaces here: {reason}")
    taps = not has_netem()
    if taps:
        print(
            "WARNING: the kernel has NO NETEM. A program forwards all packets between tap devices, "
            "and delays and loses them."
        )
    delay, loss = case.get("delay", "0ms"), case.get("loss", 0.0)
    with namespaces(args.workers + 1, RATE, delay, loss, taps=taps) as links:
        yield links


def run_case(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Train over the links of one case, and measure."""
    case = CASES[name]
    bad = args.workers - 1 if "cut" in case or "bad" in case else None
    pause = case.get("pause", 0.1)
    with tempfile.TemporaryDirectory() as name_of_folder, join(args, case) as links:
        folder = Path(name_of_folder)
        address = f"{links.addresses[-1]}:{PORT}"
        server = start_server(folder, address, args, links.prefixes[-1])
        jobs: list[Job] = []
        try:
            for slot in range(args.workers):
                task = TASK | {"slot": slot, "seed": args.seed, "pause": pause}
                task |= {"steps": args.steps or case["steps"], "input": case.get("input", 0.0)}
                if slot == bad:
                    task |= case.get("bad", {})
                jobs.append(start_worker(folder, address, task, links.prefixes[slot]))
            cut = watch(server, jobs, links, bad if "cut" in case else None)
            ends = ends_of(jobs)
        finally:
            for job in jobs:
                job.end()
            server.end(signal.SIGTERM)
        voters = voters_of(folder)
    others = [steps_of([job])[WARMUP:] for slot, job in enumerate(jobs) if slot != bad]
    missed = [sum(slot not in one for one in voters) for slot in range(args.workers)]
    result = {
        **case,
        "steps": len(voters),
        "link": links.kind,
        "rate": RATE,
        "parameters": ends[0]["parameters"],
        "accuracy": ends[0]["accuracy"],
        **times_of(others, args.deadline),
        "missed_by_others": sum(missed[slot] for slot in range(args.workers) if slot != bad),
        "missed": 0 if bad is None else missed[bad],
    }
    if cut:
        result |= return_of(bad, cut, voters, others)
    return result


def watch(
    server: Job, jobs: Sequence[Job], links: Links, cut_off: int | None
) -> tuple[float, float] | None:
    """Wait until all jobs have ended. Cut a worker off, and return when that began and ended."""
    times: list[float] = []
    while any(job.is_alive for job in jobs):
        time.sleep(0.02)
        for job in (server, *jobs):
            job.check()
        now = time.monotonic()
        if cut_off is None:
            continue
        if not times and max(job.step for job in jobs) >= CUT_AT:
            links.unplug(cut_off)
            times.append(now)
        elif len(times) == 1 and now >= times[0] + CUT_SECONDS:
            links.plug(cut_off)
            times.append(now)
    for job in jobs:
        job.wait()
    return (times[0], times[1]) if cut_off is not None else None


def times_of(others: Sequence[Sequence[dict[str, Any]]], deadline: float) -> dict[str, Any]:
    """The times from each step of some workers to their next step, and of votes alone."""
    periods = [
        after["start"] - line["start"]
        for lines in others
        for line, after in itertools.pairwise(lines)
    ]
    votes = [(line["step"], line["end"] - line["voted"]) for lines in others for line in lines]
    return {
        "steps_of_others": spread(periods),
        "votes_of_others": spread([seconds for _, seconds in votes]),
        # Somebody's ballot comes first, and its worker waits for all of the deadline.
        "deadline_waits": len({step for step, seconds in votes if seconds >= deadline}),
    }


def return_of(
    slot: int | None,
    cut: tuple[float, float],
    voters: Sequence[tuple[int, ...]],
    others: Sequence[Sequence[dict[str, Any]]],
) -> dict[str, Any]:
    """How long a worker that was cut off took to be back among the voters.

    A decision's time is when the first of the other workers had it.
    """
    began, ended = cut
    times: dict[int, float] = {}
    for line in (line for lines in others for line in lines):
        times[line["step"]] = min(line["end"], times.get(line["step"], line["end"]))
    absent = [step for step, time in times.items() if time > began and slot not in voters[step]]
    back = min(step for step, time in times.items() if time > ended and slot in voters[step])
    return {
        "cut_seconds": ended - began,
        "first_missed": min(absent),
        "first_step_back": back,
        "seconds_to_return": times[back] - ended,
    }
