"""Train the GPT of examples/train_language_model.py by AdamW and by votes, and compare the runs.

    python benchmarks/language_model.py tune
    sudo python benchmarks/language_model.py network
    python benchmarks/language_model.py draw

`tune` measures the cost of one bit in loss. All methods share steps, batches and schedule. The step
size and momentum come from one grid: 0.001 times powers of two, by the decays of `--momenta`. For
each decay the search begins with a guess. It tries neighbours of the best step size so far, until
the best step size has a worse neighbour on either side. Further seeds run at the best step size.
Results are saved after every run. The same command continues from saved results.

`network` measures the time that one bit saves. The workers are processes, with one thread of
computation each. Each process has its own link of the given rate (namespaces.py). The workers train
by AdamW on means in full precision, and by votes, with the step sizes and momenta found by `tune`.
`seconds` is the time of all steps until a validation loss is at most AdamW's final validation loss.
It excludes validation and compiling for every method. Votes may take `--voted-steps` steps, which a
further command with other `--methods` can change.

`draw` draws the validation losses over time from the saved results of `network`.

Options that are not listed here are passed to the example: `tune --layers 2 --batch-size 16`.
"""

import argparse
import json
import math
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from namespaces import Links, bits_per_second
from network import join, run_together
from report import print_table, save

here = Path(__file__).parent
program = here.parent / "examples" / "train_language_model.py"
BASELINE = "adamw"

# The search with the first momentum begins at step size 0.001 * 2**exponent. The search with the
# next momentum begins at the best step size of the search before.
first_exponents = {BASELINE: 3, "signum": 2, "lion": 2, "mixed": 2, "ef": 5}
first_exponents |= {"muon": 4, "muon-mean": 4, "ef-muon": 5, "one-bit-adam": 3}

tuned_names = ("step_size", "momentum")

# These entries of the example's report are results. The other entries are settings.
results_of = ("method", *tuned_names, "steps", "seed", "parameters", "bytes_per_step")
results_of += ("step_seconds", "validation_loss", "curve")

Run = dict[str, Any]


def main() -> None:
    """Run one of the three commands."""
    args = parse_arguments()
    if args.command == "draw":
        draw(json.loads(Path(args.json).read_text()), args.figure)
        print(f"The figure is {args.figure}.")
        return
    for number in (signal.SIGINT, signal.SIGTERM):  # exit by an exception, which deletes namespaces
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    runs = finished_runs(args)
    if args.command == "tune":
        tune(args, runs)
    else:
        try:
            network(args, runs)
        except OSError as error:
            sys.exit(f"error: {error}")
    print(f"\nResults are in {args.json}.")


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # the example's --seed is no abbreviation of --seeds
    )
    add = parser.add_argument
    add("command", choices=("tune", "network", "draw"))
    add("--methods", nargs="+", choices=[*first_exponents], default=[*first_exponents])
    add(
        "--momenta",
        type=float,
        nargs="+",
        default=[0.6, 0.8, 0.9],
        metavar="DECAY",
        help="tune: decays (default 0.6 0.8 0.9)",
    )
    add("--steps", type=int, default=300, help="of each run (default 300)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first tunes (default 0 1 2)")
    add("--evaluate-every", type=int, default=100, metavar="STEPS", help="(default 100)")
    add("--workers", type=int, help="(default 8 to tune, 4 processes over the network)")
    add("--rate", default="50mbit", help="network: of each link (default 50mbit)")
    add("--voted-steps", type=int, metavar="STEPS", help="network: of votes (default: --steps)")
    add(
        "--tuned",
        default=str(here / "results" / "language_model.json"),
        metavar="FILE",
        help="network: results of tune to take step sizes from",
    )
    add("--json", metavar="FILE", help="(default benchmarks/results/language_model*.json)")
    add(
        "--figure",
        metavar="FILE",
        default=str(here / "results" / "language_model_network.png"),
        help="draw: the figure (default benchmarks/results/language_model_network.png)",
    )
    args, args.options = parser.parse_known_args()
    tunes = args.command == "tune"
    name = "language_model" if tunes else "language_model_network"
    args.json = args.json or str(here / "results" / f"{name}.json")
    if args.workers is None:
        args.workers = 8 if tunes else 4
    if args.voted_steps is None:
        args.voted_steps = args.steps
    if min(args.workers, args.steps, args.voted_steps, args.evaluate_every) < 1:
        parser.error("--workers, --steps, --voted-steps and --evaluate-every must be at least 1")
    try:
        bits_per_second(args.rate)
    except ValueError as error:
        parser.error(str(error))
    return args


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that a results file belongs to."""
    names = ["command", "steps", "evaluate_every", "workers", "options"]
    names += ["momenta"] if args.command == "tune" else ["rate"]
    return {name: getattr(args, name) for name in names}


def finished_runs(args: argparse.Namespace) -> list[Run]:
    """The runs in the results file, if there is one."""
    if not Path(args.json).exists():
        return []
    found = json.loads(Path(args.json).read_text())
    if found["settings"] != settings_of(args):
        sys.exit(f"error: {args.json} holds results of other settings, {found['settings']}")
    return found["results"]["runs"]


def command_of(args: argparse.Namespace, **options: Any) -> list[str]:
    """The example's command line."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    common = [f"--workers={args.workers}", f"--evaluate-every={args.evaluate_every}"]
    return [sys.executable, str(program), *words, *common, *args.options]


def record(report: dict[str, Any], command: Sequence[str]) -> Run:
    """The results of the example's report, its settings, and its command."""
    shown = [word for word in command[2:] if not word.startswith("--json")]
    return {
        "command": " ".join(["python examples/train_language_model.py", *shown]),
        **{name: report[name] for name in results_of},
        "settings": {name: value for name, value in report.items() if name not in results_of},
    }


def tune(args: argparse.Namespace, runs: list[Run]) -> None:
    """Search each momentum's best step size with the first seed, and run other seeds there."""
    for method in args.methods:
        first = first_exponents[method]
        for momentum in args.momenta:
            exponent: int | None = first
            losses: dict[int, float] = {}
            while exponent is not None:
                options = {"method": method, "step_size": 1e-3 * 2.0**exponent}
                losses[exponent] = loss_of(args, runs, **options, momentum=momentum)
                exponent = next_exponent(losses)
            first = min(losses, key=losses.__getitem__)
            options = {"method": method, "step_size": 1e-3 * 2.0**first, "momentum": momentum}
            for seed in args.seeds[1:]:
                loss_of(args, runs, **options, seed=seed)
    for shown in (*([r for r in runs if r["momentum"] == m] for m in args.momenta), runs):
        found = tuned(shown)
        if BASELINE in found:
            print_tuned(found)


def next_exponent(losses: Mapping[int, float]) -> int | None:
    """The next exponent to try, or None if the best has a worse neighbour on either side."""
    best = min(losses, key=losses.__getitem__)
    if losses[best] == math.inf:
        return min(losses) - 1  # all step sizes were too large
    for neighbour in (best - 1, best + 1):
        if neighbour not in losses:
            return neighbour
    return None


def loss_of(args: argparse.Namespace, runs: list[Run], **options: Any) -> float:
    """The final validation loss of a run. Trains the run unless it is finished already."""
    options = {"seed": args.seeds[0]} | options
    same = [run for run in runs if all(run[name] == value for name, value in options.items())]
    if not same:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "report.json")
            command = command_of(args, **options, steps=args.steps, json=output)
            # The example's progress is shown, on stderr. Its samples are not.
            if code := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
                sys.exit(f"error: {' '.join(command)} ended with {code}")
            same = [record(json.loads(output.read_text()), command)]
        runs += same
        save(args.json, "language_model", settings_of(args), {"tuned": tuned(runs), "runs": runs})
        print(*(f"{name} {value}" for name, value in options.items()), same[0]["validation_loss"])
    loss = same[0]["validation_loss"]
    return loss if math.isfinite(loss) else math.inf


def tuned(runs: Sequence[Run]) -> dict[str, Any]:
    """Each method's best step size and momentum, losses over all seeds there, and bytes."""
    found = {}
    for method in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == method]
        # Only the first seed ran on the whole grid, so it alone chooses the best run.
        searched = [run for run in own if run["seed"] == own[0]["seed"]]
        finite = [run for run in searched if math.isfinite(run["validation_loss"])]
        if not finite:
            continue  # all step sizes so far were too large
        best = min(finite, key=lambda run: run["validation_loss"])
        chosen = {name: best[name] for name in tuned_names}
        losses = [r["validation_loss"] for r in own if chosen.items() <= r.items()]
        found[method] = {
            **chosen,
            "validation_losses": losses,
            "validation_loss": statistics.mean(losses),
            "bytes_per_step": best["bytes_per_step"],
        }
    baseline = found.get(BASELINE)
    for one in found.values():
        if baseline:
            one["over_adamw"] = one["validation_loss"] / baseline["validation_loss"] - 1
            one["times_fewer_bytes"] = baseline["bytes_per_step"] / one["bytes_per_step"]
    return found


def print_tuned(found: Mapping[str, Any]) -> None:
    """Print the table of `tune`."""
    rows = []
    for method, one in found.items():
        losses = one["validation_losses"]
        row = [method, f"{one['step_size']:g}", f"{one['momentum']:g}"]
        row += [f"{one['validation_loss']:.4f}"]
        row += [f"{min(losses):.4f}..{max(losses):.4f}", f"{one['over_adamw']:+.1%}"]
        rows.append([*row, f"{one['bytes_per_step']:,}", f"{one['times_fewer_bytes']:.1f}"])
    head = ("", "step size", "momentum", "loss", "over seeds", "over AdamW", "bytes", "times fewer")
    print_table(head, rows)


def network(args: argparse.Namespace, runs: list[Run]) -> None:
    """Train every method over links of a rate, once per seed."""
    found = json.loads(Path(args.tuned).read_text())["results"]["tuned"]
    setting = {"workers": args.workers, "rate": args.rate, "delay": "0ms"}
    for seed in args.seeds:
        for method in args.methods:
            steps = args.steps if method == BASELINE else args.voted_steps
            options = {"method": method, **{name: found[method][name] for name in tuned_names}}
            options |= {"steps": steps, "seed": seed}
            with join(setting) as links:
                if not is_finished(args, runs, {**options, "link": links.kind}):
                    runs.append(train_together(args, links, **options))
            results = {"times": times(runs), "runs": runs}
            save(args.json, "language_model_network", settings_of(args), results)
    print_times(times(runs))


def is_finished(args: argparse.Namespace, runs: Sequence[Run], wanted: Mapping[str, Any]) -> bool:
    """Whether the wanted run is finished. Raises if a run of its method and seed differs."""
    own = [run for run in runs if all(run[name] == wanted[name] for name in ("method", "seed"))]
    for run in own:
        for name, value in wanted.items():
            if run[name] != value:
                sys.exit(
                    f"error: {args.json} holds a run of {wanted['method']} with {name} = "
                    f"{run[name]}, this one has {value}: write to another --json FILE"
                )
    return bool(own)


def train_together(args: argparse.Namespace, links: Links, **options: Any) -> Run:
    """Train one run with a process per worker."""
    options |= {"coordinator": links.coordinator, "processes": args.workers}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "report.json")  # the first process writes it
        commands = [
            command_of(args, **options, process_id=worker, json=output)
            for worker in range(args.workers)
        ]
        run_together(links, commands, Path(folder))
        run = record(json.loads(output.read_text()), commands[0])
    return run | {"link": links.kind}


def seconds_to(curve: Mapping[str, Sequence[float]], loss: float) -> float | None:
    """The time at which a curve first reached a validation loss, or None if it never did."""
    points = zip(curve["seconds"], curve["validation_loss"], strict=True)
    return next((seconds for seconds, seen in points if seen <= loss), None)


def times(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each run's time to AdamW's final loss with an equal seed, for seeds with an AdamW run."""
    baselines = {run["seed"]: run for run in runs if run["method"] == BASELINE}
    rows = []
    for run in runs:
        if (baseline := baselines.get(run["seed"])) is None:
            continue
        target = baseline["validation_loss"]
        seconds = seconds_to(run["curve"], target)
        baseline_seconds = seconds_to(baseline["curve"], target)
        rows.append(
            {
                **{
                    name: run[name] for name in ("method", "seed", "step_seconds", "bytes_per_step")
                },
                "validation_loss": run["validation_loss"],
                "target": target,
                "seconds": seconds,
                "times_faster": seconds and baseline_seconds and baseline_seconds / seconds,
            }
        )
    return rows


def print_times(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of `network`."""
    head = ("", "seed", "loss", "AdamW's", "ms per step", "bytes", "seconds to it", "times faster")
    table = []
    for row in rows:
        cells = [row["method"], str(row["seed"])]
        cells += [f"{row[name]:.4f}" for name in ("validation_loss", "target")]
        cells += [f"{1e3 * row['step_seconds']:,.0f}", f"{row['bytes_per_step']:,}"]
        reached = row["seconds"] is not None
        cells += [f"{row['seconds']:,.0f}", f"{row['times_faster']:.1f}"] if reached else ["-", "-"]
        table.append(cells)
    print_table(head, table)


def draw(report: dict[str, Any], path: str) -> None:
    """Save the figure: validation losses over the seconds of training, a curve for each seed."""
    runs, rows, settings = report["results"]["runs"], report["results"]["times"], report["settings"]
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    methods = dict.fromkeys(run["method"] for run in runs)
    for number, method in enumerate(methods):
        own = [run for run in runs if run["method"] == method]
        for run in own:
            curve = run["curve"]
            axes.plot(curve["seconds"], curve["validation_loss"], color=f"C{number}", alpha=0.7)
        seconds = [row["seconds"] for row in rows if row["method"] == method]
        name = "AdamW on averaged gradients" if method == BASELINE else f"{method.title()}, voted"
        label = f"{name}: {own[0]['bytes_per_step'] / 1e6:.2g} MB per step"
        last = axes.lines[-1]
        if all(seconds):
            mean = statistics.mean(seconds)
            label += f", {mean:.0f} s"
            axes.axvline(mean, color=f"C{number}", linestyle=":", linewidth=1)
        last.set_label(label)
    axes.axhline(
        statistics.mean(row["target"] for row in rows), color="gray", linestyle=":", linewidth=1
    )
    limited = runs[0]["link"] == "namespaces"
    rate = bits_per_second(settings["rate"]) / 1e6
    where = f"links of {rate:g} Mbit/s" if limited else "one machine, without links"
    axes.set(
        xlabel="seconds of training",
        ylabel="validation loss (nats per character)",
        title=f"{settings['workers']} processes, {where}: time to AdamW's loss (dotted)",
    )
    axes.margins(x=0.07)
    axes.legend(loc="upper right")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
