"""What every benchmark shares: fair timing, a description of the machine, tables, files, figures.

Candidates are timed in turns, one call of each per round, so that whatever else the machine does
meets all of them alike. Medians are compared, and the spread is shown beside every median.
"""

import contextlib
import datetime as dt
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure


def machine() -> dict[str, Any]:
    """Describes the machine and the versions, for the head of a results file."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    algorithm = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "tcp_congestion_control": algorithm.read_text().strip() if algorithm.exists() else None,
        "python": platform.python_version(),
        **versions("jax", "jaxlib", "signax", "torch"),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    }


def versions(*packages: str) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def interleave(
    candidates: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 2,
    *,
    before: Callable[[], Any] | None = None,
) -> dict[str, list[float]]:
    """Times one call of each candidate per round, in seconds until its result is ready.

    Args:
      candidates: what to time by name, called in this order in every round.
      rounds: how many times of each to return.
      warmup: rounds that run first and are not returned.
      before: called ahead of every timed call, and waited for: a barrier between workers. By
        default it is the same call, untimed, which meets the memory that the last candidate has
        yet to give back and the caches that it has filled.

    Returns:
      For each candidate one time per round.
    """
    seconds = {name: [] for name in candidates}
    for number in range(warmup + rounds):
        for name, call in candidates.items():
            jax.block_until_ready((before or call)())
            start = time.perf_counter()
            jax.block_until_ready(call())
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(times: Sequence[float]) -> dict[str, float]:
    """The median of some times and how far they spread."""
    quartiles = statistics.quantiles(times, method="inclusive") if len(times) > 1 else [*times] * 3
    names = ("lower_quartile", "median", "upper_quartile")
    return {**dict(zip(names, quartiles, strict=True)), "min": min(times), "max": max(times)}


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints columns as wide as they need to be, the first to the left and numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        print("  ".join(cells).rstrip())


def save(path: str | Path, name: str, settings: Mapping[str, Any], results: Any) -> None:
    """Writes results as JSON, with the machine and the settings that they belong to."""
    files = ("json", "figure", "sweep")  # where they lie says nothing of the results
    settings = {key: value for key, value in settings.items() if key not in files}
    report = {"benchmark": name, "machine": machine(), "settings": settings, "results": results}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(report, indent=1) + "\n")


def save_bars(
    path: str | Path,
    times: Mapping[str, Sequence[float]],
    *,
    title: str,
    mark: tuple[float, str] | None = None,
) -> None:
    """Draws the median time of each candidate as a bar, with a whisker from fastest to slowest.

    Args:
      path: the image to write; its suffix decides the format.
      times: seconds of each candidate, drawn from top to bottom on a logarithmic axis.
      title: above the axes.
      mark: a time in seconds at which to draw a vertical line, and what it is.
    """
    spreads = [summary(seconds) for seconds in times.values()]
    milliseconds = [spread["median"] * 1e3 for spread in spreads]
    below = [(spread["median"] - spread["min"]) * 1e3 for spread in spreads]
    above = [(spread["max"] - spread["median"]) * 1e3 for spread in spreads]

    figure = Figure(figsize=(8, 1.2 + 0.5 * len(times)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(times), milliseconds, xerr=(below, above), color="tab:blue", capsize=3)
    axes.bar_label(bars, [f"{value:,.3g} ms" for value in milliseconds], padding=6)
    if mark is not None:
        axes.axvline(mark[0] * 1e3, color="black", linestyle="--", label=mark[1])
        axes.legend(loc="lower right")
    axes.set(xscale="log", xlabel="time per step (ms), median and range", title=title)
    low, high = min(milliseconds), max(m + a for m, a in zip(milliseconds, above, strict=True))
    # A bar on a logarithmic axis has no foot: start it well below the shortest.
    axes.set_xlim(min(low, mark[0] * 1e3 if mark else low) / 3, high * 3)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
