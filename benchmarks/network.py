"""Time the exchange of a training step, between real processes over links of a known rate.

Every worker is a process with one CPU device. `jax.distributed` joins the processes, with gloo
collectives over TCP. Each process has its own network namespace (namespaces.py), on a full-duplex
link of the given rate. Namespaces need Linux, root and iproute2. Without namespaces the workers
share the loopback interface, which has no rate limit, and the table and the JSON say so.

    sudo python benchmarks/network.py
    sudo python benchmarks/network.py --workers 8 --rate 100mbit --rounds 3
    sudo python benchmarks/network.py --candidates vote "f32 mean" --delay 2ms
    sudo python benchmarks/network.py --sweep --rounds 3

The benchmark times a whole update from each worker's own gradient, `p - learning_rate * direction`,
compiled, with donated parameters. A vote's time includes the check for NaN, packing, counting and
unpacking. The candidates take turns, with one step of each candidate per round and a barrier before
each step. The time of a step is its slowest worker's time. `none` applies the worker's own sign and
sends nothing. Its time is the floor of all times; what a step takes beyond it is *exposed*, the
price of the exchange. `unsent vote` packs and unpacks, and sends nothing. All workers share this
machine's cores, with one thread of computation each. Computation therefore weighs more here than on
separate machines.

Some candidates run by themselves after the others. `vote server` is a vote between jobs of their
own through `python -m signax.elastic serve`, if gRPC is installed. The server has a namespace and a
link of the same rate, and so has its shard in the next candidate. A server cannot answer before all
ballots are there. Its `wire ms` is therefore the time of all ballots up, and then of all decisions
down. `torch all_reduce` is PyTorch's, if it is installed.

The table shows the bytes that one worker sends per step: the bytes of the compiled program, and the
bytes that its network interface counts, with headers and acknowledgements. `wire ms` is the
program's bytes divided by the rate. `--sweep` runs a grid of rates, parameters and workers instead
of one setting.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from namespaces import Links, bits_per_second, loopback, milliseconds, namespaces, unavailable
from network_worker import EXCHANGES, SERVERS, TORCH, UNSENT
from report import print_table, save, save_bars, summary
from vote_server import serving

here = Path(__file__).parent
# Candidates that run by themselves: what runs them in network_worker.py, and the module they need.
ALONE = dict.fromkeys(SERVERS, ("elastic", "grpc")) | {TORCH: ("torch", "torch")}
sweep_workers = (2, 4, 8)
sweep_rates = ("100mbit", "1gbit", "10gbit", "unlimited")
sweep_parameters = (100_000, 1_000_000, 10_000_000)

# Every candidate has one thread of computation per worker. More threads would compete for cores,
# and slow down most the programs that wait least for the network.
worker_environment = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "NPROC": "1",
    "PJRT_NPROC": "1",
    "OMP_NUM_THREADS": "1",
}


def main() -> None:
    """Run one setting or the grid, and print, save and draw the results."""
    args = parse_arguments()
    for number in (signal.SIGINT, signal.SIGTERM):  # exit by an exception, which deletes namespaces
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    grid = {"workers": sweep_workers, "rate": sweep_rates, "parameters": sweep_parameters}
    recorded = vars(args) | (grid if args.sweep else {})
    results = []
    for setting in settings(args):
        try:
            results.append(run_setting(setting))
        except OSError as error:
            sys.exit(f"error: {error}")
        print_result(results[-1])
        save(args.json, "network", recorded, results)  # saved early: a sweep takes long
    print(f"\nResults are in {args.json}.")
    if not args.sweep:
        draw(results[0], args.figure)
        print(f"The figure is {args.figure}.")


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    alone = [name for name, (_, module) in ALONE.items() if importlib.util.find_spec(module)]
    names = [*EXCHANGES, *alone]
    add = parser.add_argument
    add("--workers", type=int, default=4, help="processes (default 4)")
    add("--rate", default="1gbit", help="of each link, or unlimited (default 1gbit)")
    add("--delay", default="0ms", help="from each worker to the switch (default 0ms)")
    add("--parameters", type=int, default=10_000_000, help="in f32 (default 10_000_000)")
    add("--leaves", type=int, default=1, help="arrays that hold them (default 1)")
    add("--rounds", type=int, default=7, help="timed steps of each candidate (default 7)")
    add("--candidates", nargs="+", metavar="NAME", choices=names, default=names, help=f"of {names}")
    add("--sweep", action="store_true", help="run the grid")
    add("--json", metavar="FILE", help="(default benchmarks/results/network.json, or -sweep.json)")
    add("--figure", metavar="FILE", help="(default benchmarks/results/network.png)")
    args = parser.parse_args()
    if args.sweep and args.figure:
        parser.error(f"--figure {args.figure}: a sweep is drawn by benchmarks/crossover.py")
    name = "network-sweep" if args.sweep else "network"
    args.json = args.json or str(here / "results" / f"{name}.json")
    args.figure = args.figure or str(here / "results" / f"{name}.png")

    if min(args.parameters, args.leaves, args.rounds) < 1:
        parser.error("--parameters, --leaves and --rounds must be at least 1")
    if not 2 <= args.workers <= 127:
        parser.error(f"--workers {args.workers} must be 2 to 127, which is what int8 can add up")
    try:
        bits_per_second(args.rate)
        milliseconds(args.delay)
    except ValueError as error:
        parser.error(str(error))
    return args


def settings(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The one setting of a run, or the grid of a sweep."""
    grid = [(args.workers, args.rate, args.parameters)]
    if args.sweep:
        rates = sweep_rates if unavailable() is None else ("unlimited",)
        grid = itertools.product(sweep_workers, rates, sweep_parameters)
    for workers, rate, parameters in grid:
        same = {name: getattr(args, name) for name in ("delay", "leaves", "rounds", "candidates")}
        yield {"workers": workers, "rate": rate, "parameters": parameters, **same}


def run_setting(setting: dict[str, Any]) -> dict[str, Any]:
    """Run all workers of one setting, and combine their measurements."""
    together = [name for name in setting["candidates"] if name not in ALONE]
    runs = [(ALONE[name][0], [name]) for name in ALONE if name in setting["candidates"]]
    if together:
        runs.insert(0, ("jax", together))
    reports: list[dict[str, Any]] = [{} for _ in range(setting["workers"])]
    servers = [1 + shards for name, shards in SERVERS.items() if name in setting["candidates"]]
    with join(setting, max(servers, default=0)) as links:
        for library, names in runs:
            found = launch(library, links, setting | {"candidates": names})
            reports = [report | more for report, more in zip(reports, found, strict=True)]

    limited = links.kind == "namespaces"
    rate = bits_per_second(setting["rate"]) if limited else math.inf
    candidates = {name: combine(name, [report[name] for report in reports]) for name in reports[0]}
    for name, candidate in candidates.items():
        sent = candidate["hlo_bytes"]
        if name in SERVERS:  # all ballots, and then all decisions, over the links of all servers
            sent = 2 * setting["workers"] * setting["parameters"] / 8 / (1 + SERVERS[name])
        candidate["wire_seconds"] = sent * 8 / rate if sent and rate < math.inf else None
        if "none" in candidates:
            candidate["exposed_seconds"] = candidate["median"] - candidates["none"]["median"]
        if "vote" in candidates:
            candidate["times_the_vote"] = candidate["median"] / candidates["vote"]["median"]
        if not limited:
            candidate["counted_bytes"] = None  # all processes share the counter
    return {
        **{name: setting[name] for name in ("workers", "parameters", "leaves", "rounds")},
        "link": links.kind,
        "rate": setting["rate"] if limited else None,
        "rate_bits_per_second": rate if rate < math.inf else None,
        "delay": setting["delay"] if limited else None,
        "burst_bytes": links.burst_bytes,
        "candidates": candidates,
    }


def join(setting: dict[str, Any], servers: int = 0) -> contextlib.AbstractContextManager[Links]:
    """The links of workers and server, in namespaces if possible, otherwise over loopback."""
    reason, hosts = unavailable(), setting["workers"] + servers
    if reason is None:
        return namespaces(hosts, setting["rate"], setting["delay"])
    print(
        f"WARNING: no network namespaces here: {reason}.\n"
        "The workers share the loopback interface, which has NO RATE LIMIT and NO DELAY."
    )
    return loopback(hosts)


def launch(library: str, links: Links, setting: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a process per worker, and the server if they need it; return each one's measurements."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = None
        if library == "elastic":
            shards = SERVERS[setting["candidates"][0]]
            server = stack.enter_context(serving(links, setting["workers"], folder, shards=shards))
        outputs = [folder / f"{worker}.json" for worker in range(setting["workers"])]
        commands = []
        for worker, output in enumerate(outputs):
            task = setting | {
                "library": library,
                "worker": worker,
                "coordinator": links.coordinator,
                "server": server and server.address,
                "interface": links.interface,
                "output": str(output),
            }
            program = str(here / "network_worker.py")
            commands.append([sys.executable, program, json.dumps(task)])
        run_together(links, commands, folder)
        reports = [json.loads(output.read_text()) for output in outputs]
        if server:
            reports[0][setting["candidates"][0]]["server_seconds"] = server.status()[
                "median_seconds"
            ]
        return reports


def run_together(links: Links, commands: Sequence[Sequence[str]], folder: Path) -> None:
    """Run a command per worker on its link, with logs in the folder, until all commands ended."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("JAX", "XLA"))}
    processes: list[subprocess.Popen] = []
    logs = [folder / f"{worker}.log" for worker in range(len(commands))]
    try:
        for prefix, command, path in zip(links.prefixes, commands, logs, strict=False):
            with open(path, "w") as log:
                processes.append(
                    subprocess.Popen(
                        [*prefix, *command],
                        env=kept | worker_environment,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,  # hides Ctrl-C: this process ends it
                    )
                )
        wait(processes, logs)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait(processes: Sequence[subprocess.Popen], logs: Sequence[Path]) -> None:
    """Wait until all workers ended, or until one failed: the others would wait for it."""
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            break
        time.sleep(0.05)
    for worker, (process, log) in enumerate(zip(processes, logs, strict=True)):
        if process.poll():
            end = log.read_text()[-4000:]
            sys.exit(f"error: worker {worker} ended with {process.returncode}:\n{end}")


def combine(name: str, reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One candidate's results over all workers. The time of a step is its slowest worker's time."""
    if name not in UNSENT and len({report.get("parameters") for report in reports}) > 1:
        sys.exit(f"error: {name} has left the workers with different parameters")
    seconds = [max(times) for times in zip(*(r["seconds"] for r in reports), strict=True)]
    return {
        **summary(seconds),
        "seconds": seconds,
        "hlo_bytes": reports[0].get("hlo_bytes"),  # PyTorch has no HLO
        "server_seconds": reports[0].get("server_seconds"),
        "counted_bytes": round(statistics.mean(report["counted_bytes"] for report in reports)),
    }


def title(result: dict[str, Any]) -> str:
    """The title of one setting, on one line."""
    link = f"links: {result['rate']}" if result["rate"] else "loopback, NO RATE LIMIT"
    delay = f" + {result['delay']}" if result["delay"] not in (None, "0ms") else ""
    return f"{result['workers']} workers, {link}{delay}, {result['parameters']:,} parameters"


def print_result(result: dict[str, Any]) -> None:
    """Print the table of one setting."""

    def text(value, form):
        return "-" if value is None else format(value, form)

    rows = []
    for name, candidate in result["candidates"].items():
        wire = candidate["wire_seconds"]
        fastest, median, slowest = (candidate[key] * 1e3 for key in ("min", "median", "max"))
        row = [name, f"{median:,.1f}", f"{fastest:,.1f}..{slowest:,.1f}"]
        exposed = candidate.get("exposed_seconds")
        row.append(text(exposed and exposed * 1e3, ",.1f"))
        row += [text(candidate[key], ",") for key in ("hlo_bytes", "counted_bytes")]
        row += [text(wire and wire * 1e3, ",.1f"), text(wire and median / wire / 1e3, ".2f")]
        rows.append([*row, text(candidate.get("times_the_vote"), ".2f")])
    print(f"\n{title(result)} in {result['leaves']} leaf(s), {result['rounds']} rounds")
    bytes_sent = ("bytes (HLO)", "bytes (counted)")
    print_table(
        ("", "median ms", "range", "exposed ms", *bytes_sent, "wire ms", "/ wire", "/ vote"), rows
    )
    vote = result["candidates"].get("vote")
    if vote and result["burst_bytes"]:
        burst, sent = result["burst_bytes"], vote["hlo_bytes"]
        print(f"An idle link lets {burst:,} bytes pass at once, {burst / sent:.1%} of a vote.")


def draw(result: dict[str, Any], path: str) -> None:
    """Save the figure of one setting."""
    wire = result["candidates"].get("vote", {}).get("wire_seconds")
    times = {name: candidate["seconds"] for name, candidate in result["candidates"].items()}
    mark = (wire, "the vote's bytes at the link's rate") if wire else None
    save_bars(path, times, title=title(result), mark=mark)


if __name__ == "__main__":
    main()
