"""Kill jobs that vote through a server, and cut and slow their links, and measure the others.

    python benchmarks/elastic_faults.py kills
    python benchmarks/elastic_faults.py kills --models digits --kills 10
    sudo python benchmarks/elastic_faults.py links
    sudo python benchmarks/elastic_faults.py links --cases "2% of packets lost"

`kills` trains the digits of examples/elastic_worker.py and the language model of
examples/train_language_model.py with eight jobs, undisturbed and with kills. `kill -9` hits workers
and the server at random steps, drawn before the run. A kill waits until its victim votes and until
a quorum would be left. After a random pause the job starts again: the server on its log, a worker
from the first parameters, with a replay of the log. Nobody keeps checkpoints. In each step a worker
sleeps a while before its vote, as a larger model computes, since all jobs share this machine's
cores. A *wait* is the time from a worker's gradient to its updated parameters: ballot, decision and
update. All waits of all jobs count, except in an *outage*, from the kill of the server to the first
decision after it. The longest wait is compared with the deadline plus the 95th percentile of the
undisturbed run's waits, which contain the round trip. At the end all workers and a job that only
replays the log must hold the same parameters, bit for bit.

`links` gives four workers and the server a network namespace each (namespaces.py), on links of 100
Mbit/s: undisturbed, with losses, with delays, with one worker that is cut off for 10 s, and with
one worker that is slow. It needs Linux, root and iproute2. Without `netem` in the kernel a program
forwards the packets between tap devices (forwarder.py). The step times are the other workers', from
one step's begin to the next one's.

Results are saved after each run. The same command continues from saved results.
"""

import argparse
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from elastic_faults_kills import RUNS, draw_kills, run_model
from elastic_faults_links import CASES, run_case
from report import print_table, save

here = Path(__file__).parent


def main() -> None:
    """Run one of the parts, and print and save its results."""
    args = parse_arguments()
    for number in (signal.SIGINT, signal.SIGTERM):  # exit by an exception, which ends all jobs
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    results, settings = load(args)
    found = results[args.part]

    def keep(name: str, measure: Callable[[], dict[str, Any]]) -> None:
        if name not in found:
            print(f"\n{name}", flush=True)
            found[name] = measure()
            save(args.json, "elastic_faults", settings, results)

    try:
        if args.part == "links":
            for case in args.cases:
                keep(case, lambda case=case: run_case(args, case))
            print_links(found)
        else:
            for model in args.models:
                kills = draw_kills(args, args.steps or RUNS[model]["steps"])
                keep(f"{model}, undisturbed", lambda model=model: run_model(args, model, []))
                keep(f"{model}, killed", lambda model=model, k=kills: run_model(args, model, k))
            print_kills(args, found)
    except OSError as error:
        sys.exit(f"error: {error}")
    print(f"\nResults are in {args.json}.")


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("part", choices=("kills", "links"))
    add("--models", nargs="+", choices=RUNS, default=[*RUNS], help="kills: (default both)")
    add("--cases", nargs="+", choices=CASES, default=[*CASES], help="links: (default all)")
    add("--workers", type=int, help="(default 8 for kills, 4 for links)")
    add("--kills", type=int, default=30, help="kills: of workers (default 30)")
    add("--server-kills", type=int, default=5, help="kills: of the server (default 5)")
    add("--steps", type=int, help="of each run (default: as each model and case has it)")
    add("--deadline", type=float, default=1.0, help="of a vote, in seconds (default 1)")
    add("--seed", type=int, default=0, help="of kills, batches and parameters (default 0)")
    add(
        "--json",
        metavar="FILE",
        default=str(here / "results" / "elastic_faults.json"),
        help="(default benchmarks/results/elastic_faults.json)",
    )
    args = parser.parse_args()
    if args.workers is None:
        args.workers = 8 if args.part == "kills" else 4
    if args.workers < 3:
        parser.error(f"--workers {args.workers} must be at least 3, so that a quorum survives one")
    if args.steps is not None and args.steps < 20:
        parser.error(f"--steps {args.steps} must be at least 20")
    if min(args.kills, args.server_kills) < 0 or not args.deadline > 0:
        parser.error("--kills and --server-kills must not be negative, and --deadline above 0")
    args.quorum = args.workers // 2 + 1
    return args


def load(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The results of both parts so far, and their settings."""
    names = ["workers", "quorum", "deadline", "seed", "steps"]
    names += ["kills", "server_kills"] if args.part == "kills" else []
    own = {args.part: {name: getattr(args, name) for name in names}}
    path = Path(args.json)
    earlier = json.loads(path.read_text()) if path.exists() else {"results": {}, "settings": {}}
    if earlier["settings"].get(args.part, own[args.part]) != own[args.part]:
        sys.exit(f"error: {args.json} holds results of other settings, {earlier['settings']}")
    return {"kills": {}, "links": {}} | earlier["results"], earlier["settings"] | own


def print_kills(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Print the table of `kills`."""
    rows = []
    for name, run in found.items():
        usual = found[f"{name.rpartition(',')[0]}, undisturbed"]["waits"]["percentile_95"]
        workers = sum(kill["slot"] is not None for kill in run["killed"])
        row = [name, str(workers), str(len(run["killed"]) - workers)]
        row += [f"{run['waits'][key] * 1e3:,.0f}" for key in ("median", "max")]
        row += [f"{(args.deadline * bool(run['killed']) + usual) * 1e3:,.0f}"]
        row += [f"{max(run['outages'], default=0):.1f}", f"{run['mean_voters']:.2f}"]
        rows.append([*row, *(f"{value:.4f}" for value in run["quality"].values())])
    waits = ("wait ms", "longest", "bound")
    print_table(("", "killed", "servers", *waits, "outage s", "voters", "result"), rows)


def print_links(found: dict[str, Any]) -> None:
    """Print the table of `links`."""
    rows = []
    for name, case in found.items():
        times = case["steps_of_others"]
        row = [name, *(f"{times[key] * 1e3:,.0f}" for key in ("median", "percentile_95", "max"))]
        row += [f"{case['deadline_waits']} of {case['steps']}"]
        row += [str(case["missed"]), f"{case['accuracy']:.1%}"]
        back = case.get("seconds_to_return")
        rows.append([*row, "-" if back is None else f"{back:.1f} s"])
    times = ("step ms", "95%", "longest", "deadlines")
    print_table(("", *times, "missed", "accuracy", "back after"), rows)


if __name__ == "__main__":
    main()
