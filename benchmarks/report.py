"""Shared parts of the benchmarks: fair timing, a description of the machine, tables and figures.

Candidates are timed in turns, with one call of each candidate per round. Other work of the machine
therefore affects all candidates alike. Medians are compared. Every median is shown with its spread.
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
    """A description of the machine and the versions, for the head of a results file."""
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
        "idle": idle_share(),
        **versions("jax", "jaxlib", "signax", "torch"),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    }


def idle_share(seconds: float = 1.0) -> float | None:
    """The share of all cores' time in which they are idle, or `None` where Linux cannot tell."""
    counters = Path("/proc/stat")
    if not counters.exists():
        return None

    def read() -> tuple[int, int]:
        ticks = [int(number) for number in counters.read_text().splitlines()[0].split()[1:]]
        return ticks[3] + ticks[4], sum(ticks[:8])  # idle and waiting for disks; all

    idle, total = read()
    time.sleep(seconds)
    idle, total = (after - before for before, after in zip((idle, total), read(), strict=True))
    return round(idle / total, 3)


def versions(*packages: str) -> dict[str, str]:
    """The versions of the installed packages among the given packages."""
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
    """Time one call of each candidate per round, in seconds until its result is ready.

    Args:
      candidates: functions by name, called in this order in every round.
      rounds: the number of times to return for each candidate.
      warmup: the number of first rounds that are not returned.
      before: a function, such as a barrier between workers, that is called and waited for before
        every timed call. By default the candidate itself is called, untimed: the extra call pays
        for memory that the candidate before has yet to free, and for caches that it has filled.

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
    """The median, the quartiles and the range of some times."""
    quartiles = statistics.quantiles(times, method="inclusive") if len(times) > 1 else [*times] * 3
    names = ("lower_quartile", "median", "upper_quartile")
    return {**dict(zip(names, quartiles, strict=True)), "min": min(times), "max": max(times)}


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table. The first column is aligned to the left, other columns to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        print("  ".join(cells).rstrip())


def save(path: str | Path, name: str, settings: Mapping[str, Any], results: Any) -> None:
    """Write results as JSON, with their machine and settings."""
    files = ("json", "figure", "sweep")  # paths do not affect results
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
    """Draw the median time of each candidate as a bar, with a whisker from fastest to slowest.

    Args:
      path: the image to write. The suffix decides the format.
      times: seconds of each candidate, drawn from top to bottom on a logarithmic axis.
      title: the title above the axes.
      mark: a time in seconds for a vertical line, and the line's label.
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
    # A logarithmic axis has no zero: bars start well below the shortest time.
    axes.set_xlim(min(low, mark[0] * 1e3 if mark else low) / 3, high * 3)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
