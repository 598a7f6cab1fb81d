"""Trains the GPT of examples/train_language_model.py by AdamW and by votes, and compares.

    python benchmarks/language_model.py tune
    sudo python benchmarks/language_model.py network

`tune` asks what one bit costs in loss. Every method gets the same steps, batches and schedule, and
its step size and momentum from one grid, 0.001 times powers of two by the decays of `--momenta`:
for each decay, from a first guess on, neighbours of the best step size so far are tried until it
has a worse one on either side. Further seeds run at the best one. Results are saved after every
run, and the same command goes on from there.

`network` asks what that saves in time. The workers are processes, each behind a link of its own of
the given rate (namespaces.py), with one thread of computation each, and train by AdamW on means in
full precision and by votes, with the step size and momentum that `tune` has found. `seconds` is the
time of all steps until a validation loss is seen that is no higher than that of AdamW at its end;
validation itself and compiling are left out on both sides. A vote may take `--voted-steps` for it.

Options that are not listed here go to the example: `tune --layers 2 --batch-size 16`.
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

# Where the search begins with the first momentum, step size 0.001 * 2**exponent; with the next one
# it begins where it ended.
first_exponents = {BASELINE: 3, "signum": 2, "lion": 2, "mixed": 2, "ef": 5}

tuned_names = ("step_size", "momentum")

# What of the example's report differs between runs; the rest is settings.
results_of = ("method", *tuned_names, "steps", "seed", "parameters", "bytes_per_step")
results_of += ("step_seconds", "validation_loss", "curve")

Run = dict[str, Any]


def main() -> None:
    """Runs one of the two commands."""
    args = parse_arguments()
    for number in (signal.SIGINT, signal.SIGTERM):  # so that namespaces are deleted
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
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # the example's --seed is not the start of our --seeds
    )
    add = parser.add_argument
    add("command", choices=("tune", "network"))
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
    add("--figure", metavar="FILE", help="network: draw validation losses over time")
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
    """What results belong to."""
    names = ["command", "steps", "evaluate_every", "workers", "options"]
    names += ["momenta"] if args.command == "tune" else ["rate", "voted_steps"]
    return {name: getattr(args, name) for name in names}


def finished_runs(args: argparse.Namespace) -> list[Run]:
    """The runs that the results file holds already."""
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
    """What is kept of the example's report, and the command that gave it."""
    shown = [word for word in command[2:] if not word.startswith("--json")]
    return {
        "command": " ".join(["python examples/train_language_model.py", *shown]),
        **{name: report[name] for name in results_of},
        "settings": {name: value for name, value in report.items() if name not in results_of},
    }


def tune(args: argparse.Namespace, runs: list[Run]) -> None:
    """Searches the best step size of each momentum by the first seed, and runs the others there."""
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
    """The next one to try, or None if the best has a worse neighbour on either side."""
    best = min(losses, key=losses.__getitem__)
    if losses[best] == math.inf:
        return min(losses) - 1  # all were too large
    for neighbour in (best - 1, best + 1):
        if neighbour not in losses:
            return neighbour
    return None


def loss_of(args: argparse.Namespace, runs: list[Run], **options: Any) -> float:
    """The final validation loss of a run, which is trained unless it is among the finished ones."""
    options = {"seed": args.seeds[0]} | options
    same = [run for run in runs if all(run[name] == value for name, value in options.items())]
    if not same:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "report.json")
            command = command_of(args, **options, steps=args.steps, json=output)
            # Its progress is ours; its samples are not.
            if code := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
                sys.exit(f"error: {' '.join(command)} ended with {code}")
            same = [record(json.loads(output.read_text()), command)]
        runs += same
        save(args.json, "language_model", settings_of(args), {"tuned": tuned(runs), "runs": runs})
        print(*(f"{name} {value}" for name, value in options.items()), same[0]["validation_loss"])
    loss = same[0]["validation_loss"]
    return loss if math.isfinite(loss) else math.inf


def tuned(runs: Sequence[Run]) -> dict[str, Any]:
    """For each method the best of its grid, the loss over all seeds that ran there, and bytes."""
    found = {}
    for method in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == method]
        # The best is chosen by the seed that ran on the whole grid, which is the first one.
        searched = [run for run in own if run["seed"] == own[0]["seed"]]
        finite = [run for run in searched if math.isfinite(run["validation_loss"])]
        if not finite:
            continue  # every step size so far was too large
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
    """Prints the table of `tune`."""
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
    """Trains every method over links of a rate, once per seed."""
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
    if args.figure:
        draw(args, runs)


def is_finished(args: argparse.Namespace, runs: Sequence[Run], wanted: Mapping[str, Any]) -> bool:
    """Whether that run is among those of its method and seed, all of which must be like it."""
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
    """One run, a process per worker."""
    options |= {"coordinator": links.coordinator, "processes": args.workers}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "report.json")  # which the first process writes
        commands = [
            command_of(args, **options, process_id=worker, json=output)
            for worker in range(args.workers)
        ]
        run_together(links, commands, Path(folder))
        run = record(json.loads(output.read_text()), commands[0])
    return run | {"link": links.kind}


def seconds_to(curve: Mapping[str, Sequence[float]], loss: float) -> float | None:
    """When the validation loss was first no higher than that, or None if it never was."""
    points = zip(curve["seconds"], curve["validation_loss"], strict=True)
    return next((seconds for seconds, seen in points if seen <= loss), None)


def times(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each run's time to AdamW's final loss with the same seed, where AdamW has run."""
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
    """Prints the table of `network`."""
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


def draw(args: argparse.Namespace, runs: Sequence[Run]) -> None:
    """Saves the figure: validation losses over the seconds of training, a curve for each seed."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    limited = runs[0]["link"] == "namespaces"
    where = f"behind links of {args.rate}/s" if limited else "on one machine, without links"
    for number, method in enumerate(dict.fromkeys(run["method"] for run in runs)):
        own = [run for run in runs if run["method"] == method]
        for run in own:
            curve = run["curve"]
            axes.plot(curve["seconds"], curve["validation_loss"], color=f"C{number}", alpha=0.7)
        axes.lines[-1].set_label(f"{method}, {own[0]['bytes_per_step']:,} bytes per step")
    axes.set(
        xlabel="time of training (s)",
        ylabel="validation loss (nats per character)",
        title=f"{args.workers} processes {where}",
    )
    axes.legend()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    Path(args.figure).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.figure, dpi=150)


if __name__ == "__main__":
    main()
