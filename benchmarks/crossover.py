"""Where one bit pays: a vote's speed relative to a mean, by link rate, parameters and workers.

This program checks the cost model, `signax.diagnostics.exchange_seconds`, against a sweep of
network.py. Then it applies the model to other machines.

    sudo python benchmarks/network.py --sweep
    python benchmarks/crossover.py
    python benchmarks/crossover.py --workers 64 --latency 20e-6 --memory-bandwidth 3e12

The sweep's steps over unlimited links give the machine's constants for each number of workers: the
time of an empty collective, the bandwidth at which a worker reads, and the rate at which its
processor feeds a link. From these constants the model predicts the steps over limited links, which
were not used in the fit. A step takes the measured time of `none`, which computes
`p - learning_rate * direction`, and the model's time of the exchange. The first table shows
measured and predicted times.

The second table comes from the model alone: the time of a bf16 mean divided by the time of a vote.
Below 1 the mean is faster. Both tables ignore that a mean can overlap the backward pass.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from report import print_table, save

from signax.diagnostics import exchange_seconds, wire_bytes

here = Path(__file__).parent
rates = {
    "100 Mbit/s": 1e8,
    "1 Gbit/s": 1e9,
    "10 Gbit/s": 1e10,
    "100 Gbit/s": 1e11,
    "400 Gbit/s": 4e11,
    "3.6 Tbit/s": 3.6e12,  # an H100 over NVLink
}
sizes = {"100 k": 10**5, "1 M": 10**6, "10 M": 10**7, "100 M": 10**8, "1 G": 10**9}
schemes = {"vote": "vote", "f32 mean": "mean"}  # candidates of network.py


class Machine(NamedTuple):
    """The constants of the model for one number of workers.

    Attributes:
      latency: seconds of an empty collective.
      memory_bandwidth: bytes per second.
      feed_rate: bits per second that a processor sends over an unlimited link.
    """

    latency: float
    memory_bandwidth: float
    feed_rate: float


def main() -> None:
    """Fit the model, predict the steps, and print, save and draw both tables."""
    args = parse_arguments()
    sweep = json.loads(Path(args.sweep).read_text())["results"]
    check_sweep(sweep, args.sweep)
    machines, predictions = predict(sweep)
    print_predictions(predictions)
    by_model = speedups(args.workers, args.latency, args.memory_bandwidth)
    print(
        f"\nTime of a bf16 mean over that of a vote, {args.workers} workers, by the model"
        f"\n(latency {args.latency * 1e6:g} us, memory {args.memory_bandwidth / 1e12:g} TB/s)"
    )
    print_table(
        ("", *sizes),
        [
            (rate, *(f"{ratio:.1f}" for ratio in row))
            for rate, row in zip(rates, by_model, strict=True)
        ],
    )
    results = {
        "machines": {workers: machine._asdict() for workers, machine in machines.items()},
        "predictions": predictions,
        "rates": rates,
        "sizes": sizes,
        "bf16 mean over vote": by_model,
    }
    save(args.json, "crossover", vars(args), results)
    draw(args, predictions)
    print(f"\nResults are in {args.json}, the figure is {args.figure}.")


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, results = parser.add_argument, here / "results"
    add("--sweep", metavar="FILE", default=str(results / "network-sweep.json"))
    add("--workers", type=int, default=8, help="of the model's table (default 8)")
    add("--latency", type=float, default=50e-6, help="seconds, of the same (default 50e-6)")
    add("--memory-bandwidth", type=float, default=1e12, help="bytes/s, of the same (default 1e12)")
    add("--json", metavar="FILE", default=str(results / "crossover.json"))
    add("--figure", metavar="FILE", default=str(results / "crossover.png"))
    args = parser.parse_args()
    if not Path(args.sweep).exists():
        parser.error(f"--sweep {args.sweep} is not there: python benchmarks/network.py --sweep")
    if args.workers < 2 or args.latency < 0 or args.memory_bandwidth <= 0:
        parser.error("--workers must be at least 2, --latency 0, --memory-bandwidth above 0")
    return args


def check_sweep(sweep: Sequence[dict[str, Any]], file: str) -> None:
    """Raise if a sweep has too few settings to fit the model, or none to compare it with."""
    for workers in {setting["workers"] for setting in sweep} or {0}:
        rates = [one["rate_bits_per_second"] for one in sweep if one["workers"] == workers]
        unlimited = rates.count(None)
        if unlimited < 2 or unlimited == len(rates):
            sys.exit(
                f"error: --sweep {file} has {unlimited} settings over unlimited links and "
                f"{len(rates) - unlimited} over others for {workers} workers, at least 2 and 1 are "
                "needed: run network.py --sweep to its end, where there are network namespaces"
            )


def array(parameters: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """The updates that are exchanged."""
    return jax.ShapeDtypeStruct((parameters,), dtype)


def median(setting: dict[str, Any], candidate: str) -> float:
    """The measured seconds of a step."""
    return setting["candidates"][candidate]["median"]


def predict(sweep: Sequence[dict[str, Any]]) -> tuple[dict[int, Machine], list[dict[str, Any]]]:
    """Fit the model to steps over unlimited links, and predict the steps over limited links."""
    numbers = sorted({setting["workers"] for setting in sweep})
    machines = {
        workers: fit(workers, [setting for setting in sweep if setting["workers"] == workers])
        for workers in numbers
    }
    predictions = []
    for setting in sweep:
        rate, workers = setting["rate_bits_per_second"], setting["workers"]
        if rate is None:
            continue
        latency, bandwidth, feed_rate = machines[workers]
        for candidate, scheme in schemes.items():
            exchange = exchange_seconds(
                array(setting["parameters"]),
                workers,
                scheme=scheme,
                link_rate=min(rate, feed_rate),
                latency=latency,
                memory_bandwidth=bandwidth,
            )
            predictions.append(
                {
                    "workers": workers,
                    "rate": setting["rate"],
                    "rate_bits_per_second": rate,
                    "parameters": setting["parameters"],
                    "candidate": candidate,
                    "measured": median(setting, candidate),
                    "predicted": median(setting, "none") + exchange,
                }
            )
    return machines, predictions


def fit(workers: int, sweep: Sequence[dict[str, Any]]) -> Machine:
    """The constants that make the model exact for the smallest vote and the largest vote and mean.

    All are measured over unlimited links, less the time of a step that sends nothing.
    """
    unlimited = [setting for setting in sweep if setting["rate_bits_per_second"] is None]
    small, *_, large = sorted(unlimited, key=lambda setting: setting["parameters"])

    def beyond_none(setting, candidate):
        return max(median(setting, candidate) - median(setting, "none"), 1e-9)

    collectives = exchange_seconds(
        array(small["parameters"]), workers, link_rate=math.inf, latency=1
    )
    latency = beyond_none(small, "vote") / collectives
    sent = wire_bytes(array(large["parameters"]), workers, scheme="mean")
    feed_rate = 8 * sent / max(beyond_none(large, "f32 mean") - latency, 1e-9)
    vote = exchange_seconds(
        array(large["parameters"]), workers, link_rate=feed_rate, latency=latency
    )
    bandwidth = 4 * large["parameters"] / max(beyond_none(large, "vote") - vote, 1e-9)
    return Machine(latency, bandwidth, feed_rate)


def print_predictions(predictions: Sequence[dict[str, Any]]) -> None:
    """Print the measured times beside the model's times."""
    rows = []
    settings = {(p["workers"], p["rate"], p["parameters"]): {} for p in predictions}
    for p in predictions:
        settings[p["workers"], p["rate"], p["parameters"]][p["candidate"]] = p
    for (workers, rate, parameters), by_candidate in settings.items():
        row = [f"{workers} workers, {rate}, {parameters:,}"]
        for candidate in schemes:
            seconds = by_candidate[candidate]
            row += [f"{seconds[key] * 1e3:,.1f}" for key in ("measured", "predicted")]
        for key in ("measured", "predicted"):
            row.append(f"{by_candidate['f32 mean'][key] / by_candidate['vote'][key]:.1f}")
        rows.append(row)
    columns = (f"{what}{unit}" for what in ("vote", "mean", "ratio") for unit in ("", ", model"))
    print("Milliseconds of a step with a vote, with an f32 mean, and their ratio")
    print_table(("", *columns), rows)
    errors = [abs(math.log(p["predicted"] / p["measured"])) for p in predictions]
    typical, worst = (math.exp(error) for error in (statistics.median(errors), max(errors)))
    print(f"The model is off by a factor of {typical:.2f} in the median, {worst:.2f} at worst.")


def speedups(workers: int, latency: float, memory_bandwidth: float) -> list[list[float]]:
    """The speed-ups of a vote over a bf16 mean: a row for each rate, a column for each size."""
    return [
        [speedup(size, workers, rate, latency, memory_bandwidth) for size in sizes.values()]
        for rate in rates.values()
    ]


def speedup(
    parameters: int, workers: int, link_rate: float, latency: float, memory_bandwidth: float
) -> float:
    """The time of a bf16 mean divided by the time of a vote on f32."""
    seconds = partial(
        exchange_seconds,
        num_workers=workers,
        link_rate=link_rate,
        latency=latency,
        memory_bandwidth=memory_bandwidth,
    )
    return seconds(array(parameters, jnp.bfloat16), scheme="mean") / seconds(array(parameters))


def draw(args: argparse.Namespace, predictions: Sequence[dict[str, Any]]) -> None:
    """Save the figure: the sweep with its predictions, and the model's map."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    measured, by_model = figure.subplots(1, 2)
    workers = sorted({p["workers"] for p in predictions})[-1]
    shown = [p for p in predictions if p["workers"] == workers]
    for number, parameters in enumerate(sorted({p["parameters"] for p in shown})):
        mine = [p for p in shown if p["parameters"] == parameters]
        votes, means = ([p for p in mine if p["candidate"] == name] for name in schemes)
        bits = [p["rate_bits_per_second"] for p in votes]
        for key, style in (("measured", "o"), ("predicted", "--")):
            ratios = [mean[key] / vote[key] for mean, vote in zip(means, votes, strict=True)]
            label = f"{parameters:,} parameters" if key == "measured" else None
            measured.plot(bits, ratios, style, color=f"C{number}", label=label)
    measured.axhline(1, color="black", linewidth=0.8)
    measured.set(
        xscale="log",
        yscale="log",
        xlabel="rate of each link",
        ylabel="step with an f32 mean / step with a vote",
        title=f"Measured, {workers} processes (dashes: model)",
    )
    ratios = [1, 2, 5, 10, 20]
    measured.set_yticks(ratios, [f"{ratio}x" for ratio in ratios])
    measured.yaxis.set_minor_formatter(NullFormatter())
    for text, side in (("the vote is faster", "bottom"), ("the mean is faster", "top")):
        where = {"va": side, "transform": measured.get_yaxis_transform()}
        measured.text(0.02, 1, text, size="small", **where)
    label_rates(measured, 8, 10)
    measured.legend()

    x, y = np.logspace(8, 13, 60), np.logspace(4, 10, 60)
    machine = args.latency, args.memory_bandwidth
    ratios = [[speedup(round(d), args.workers, rate, *machine) for rate in x] for d in y]
    doublings, levels = np.log2(ratios), [-1, -0.5, -0.1, 0.1, 0.5, 1, 2, 3, 4]
    colors = {"cmap": "RdBu", "norm": TwoSlopeNorm(0, -2, 4)}  # white means equal times
    filled = by_model.contourf(x, y, doublings, levels, **colors, extend="both")
    bar = figure.colorbar(filled, label="exchange of a bf16 mean / of a vote", ticks=levels)
    bar.set_ticklabels([f"{2.0**level:.2g}x" for level in levels])
    by_model.set(
        xscale="log",
        yscale="log",
        xlabel="rate of each link",
        ylabel="parameters",
        title=f"Model, {args.workers} workers ({args.latency * 1e6:g} us per collective, "
        f"{args.memory_bandwidth / 1e12:g} TB/s)",
    )
    label_rates(by_model, 8, 13)
    by_model.set_yticks([1e4, 1e6, 1e8, 1e10], ["10 k", "1 M", "100 M", "10 B"])
    for place, text in (((0.25, 0.75), "vote"), ((0.72, 0.2), "average")):
        color = "white" if text == "vote" else "black"
        by_model.text(*place, text, transform=by_model.transAxes, color=color, size="x-large")
    Path(args.figure).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.figure, dpi=120)


def label_rates(axes: Axes, first: int, last: int) -> None:
    """Label powers of ten on the axis of rates."""
    units = {"Mbit/s": 1e6, "Gbit/s": 1e9, "Tbit/s": 1e12}
    ticks, labels = [10.0**power for power in range(first, last + 1)], []
    for tick in ticks:
        unit = max((unit for unit in units if units[unit] <= tick), key=units.__getitem__)
        labels.append(f"{tick / units[unit]:g}\n{unit}")
    axes.set_xticks(ticks, labels)


if __name__ == "__main__":
    main()
