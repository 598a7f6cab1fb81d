"""Find the parts of an exchange in a profile, and draw a step's timeline.

    python benchmarks/trace.py
    python benchmarks/trace.py --workers 8 --steps 20 --folder /tmp/profile

A few voted steps run on simulated devices under `jax.profiler.trace`, which writes a Perfetto trace
below the folder. Open the trace, perfetto_trace.json.gz, at https://ui.perfetto.dev.

Operations of an exchange carry the name of their part: `signax.pack`, `signax.exchange`,
`signax.count`, `signax.unpack` or `signax.momentum`. The names are in the metadata of the compiled
program, and traces of GPUs and TPUs show them beside each operation. An event on a CPU has only the
name of an HLO instruction, so this program looks the instruction up in the compiled program. XLA
fuses neighbouring operations, and a fusion has the name of its last operation. Most of unpacking is
fused with the update of the parameters, which belongs to no part.

The table shows how long a device was busy with each part, as a median over the steps. A collective
also waits for the slowest device. Simulated devices share the cores of one machine, and nothing
travels over a network, so the times say nothing about a cluster.
"""

import argparse
import gzip
import json
import re
import statistics
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from report import print_table

import signax

here = Path(__file__).parent
AXIS = "data"
STEP = "voted step"
REST = "gradient, loss, parameters"
PARTS = (
    REST,
    "signax.momentum",
    "signax.pack",
    "signax.exchange",
    "signax.count",
    "signax.unpack",
)

Interval = tuple[float, float]


class Span(NamedTuple):
    """One event of a device: its HLO instruction, the instruction's part, and microseconds."""

    device: int
    operation: str
    part: str
    start: float
    stop: float


def main() -> None:
    """Profile some steps, print the time of each part, and draw the shortest step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=4, help="simulated devices (default 4)")
    parser.add_argument("--steps", type=int, default=10, help="steps to profile (default 10)")
    parser.add_argument("--width", type=int, default=1024, help="of two layers (default 1024)")
    parser.add_argument("--folder", help="where to keep the trace (default: a temporary folder)")
    parser.add_argument("--figure", metavar="FILE", help="the timeline to draw")
    args = parser.parse_args()
    if min(args.workers, args.steps, args.width) < 1:
        parser.error("--workers, --steps and --width must be at least 1")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.workers)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        program = profile_steps(folder, args.workers, args.width, args.steps)
        steps = read_steps(find_events(folder), parts_of(program))
    rows = []
    for part in PARTS:
        times = [busy_milliseconds(spans, part) for spans in steps]
        rows.append([part, *(f"{f(times):.2f}" for f in (statistics.median, min, max))])
    print_table(["ms per step and device", "median", "min", "max"], rows)
    if args.figure:
        draw(args.figure, min(steps, key=length))


def profile_steps(folder: Path, num_workers: int, width: int, num_steps: int) -> str:
    """Profile voted steps of a network with two layers, and return the text of their program."""
    mesh = jax.make_mesh((num_workers,), (AXIS,))
    tx = signax.DataParallel(signax.signum(1e-3, axis_name=AXIS), mesh)
    keys = jax.random.split(jax.random.key(0), 3)
    params = [jax.random.normal(key, (width, width)) / width**0.5 for key in keys[:2]]
    batch = jax.random.normal(keys[2], (16 * num_workers, width))

    def loss_fn(params: Any, batch: jax.Array) -> jax.Array:
        return jnp.mean((jnp.tanh(batch @ params[0]) @ params[1]) ** 2)

    state = tx.init(params)
    compiled = tx.train_step(loss_fn).lower(params, state, batch).compile()
    params, state, _ = jax.block_until_ready(compiled(params, state, batch))  # warms up
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # events of Python functions are not needed
    with jax.profiler.trace(str(folder), create_perfetto_trace=True, profiler_options=options):
        for number in range(num_steps):
            with jax.profiler.StepTraceAnnotation(STEP, step_num=number):
                params, state, _ = jax.block_until_ready(compiled(params, state, batch))
    return compiled.as_text() or ""


def find_events(folder: Path) -> list[dict[str, Any]]:
    """The events of the newest Perfetto trace below a folder."""
    files = sorted(folder.rglob("perfetto_trace.json.gz"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"{folder} holds no perfetto_trace.json.gz")
    with gzip.open(files[-1]) as file:
        return json.load(file)["traceEvents"]


def parts_of(program: str) -> dict[str, str]:
    """The part that each HLO instruction of an exchange belongs to, from the program's metadata."""
    found = {}
    for line in program.splitlines():
        instruction = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
        scopes = re.search(r'op_name="[^"]*?(signax\.\w+)', line)
        if instruction and scopes:
            found[instruction[1]] = scopes[1]
    return found


def read_steps(events: Iterable[Mapping[str, Any]], parts: Mapping[str, str]) -> list[list[Span]]:
    """The spans of every device, step by step, with times from the start of the step."""
    complete = [event for event in events if event.get("ph") == "X"]
    windows = [
        (event["ts"], event["ts"] + event["dur"]) for event in complete if event.get("name") == STEP
    ]
    operations = [event for event in complete if "hlo_op" in event.get("args", {})]
    steps = []
    for begin, end in sorted(windows):
        spans = [
            Span(
                int(event["args"].get("device_ordinal", 0)),
                event["args"]["hlo_op"],
                parts.get(event["args"]["hlo_op"], REST),
                event["ts"] - begin,
                event["ts"] + event["dur"] - begin,
            )
            for event in operations
            if begin <= event["ts"] < end
        ]
        steps.append(spans)
    return steps


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Intervals that cover the same time without overlapping."""
    joined: list[Interval] = []
    for start, stop in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((start, stop))
    return joined


def intervals_of(spans: Iterable[Span], device: int, part: str) -> list[Interval]:
    """The time that a device was busy with a part, in microseconds."""
    return union((s.start, s.stop) for s in spans if (s.device, s.part) == (device, part))


def busy_milliseconds(spans: list[Span], part: str) -> float:
    """The time that a device was busy with a part, as a mean over devices."""
    devices = sorted({span.device for span in spans})
    times = [
        sum(stop - start for start, stop in intervals_of(spans, device, part)) for device in devices
    ]
    return float(np.mean(times)) / 1e3


def length(spans: list[Span]) -> float:
    """The time from the first event of a step to the last, in microseconds."""
    return max(span.stop for span in spans) - min(span.start for span in spans)


def draw(path: str, spans: list[Span]) -> None:
    """Draw a row for each part, with a lane for each worker and a bar for each time it is busy."""
    devices = sorted({span.device for span in spans})
    begin, height = min(span.start for span in spans), 0.8 / len(devices)
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    for device in devices:
        color, lanes = f"C{device}", -0.4 + height * device
        for row, part in enumerate(PARTS):
            bars = [
                ((start - begin) / 1e3, (stop - start) / 1e3)
                for start, stop in intervals_of(spans, device, part)
            ]
            # The edge keeps short bars visible.
            place = (row + lanes, 0.85 * height)
            axes.broken_barh(bars, place, facecolor=color, edgecolor=color, linewidth=0.7)
    for name in ("all-to-all", "all-gather"):
        found = [span for span in spans if span.operation.replace("_", "-").startswith(name)]
        if found:  # the longest has room for its name
            span = max(found, key=lambda span: span.stop - span.start)
            middle = (span.start + span.stop) / 2 - begin
            lane = PARTS.index(span.part) - 0.4 + height * (span.device + 0.42)
            axes.text(middle / 1e3, lane, name, color="white", size=8, ha="center", va="center")
    axes.set(
        yticks=range(len(PARTS)),
        yticklabels=PARTS,
        xlabel="time (ms)",
        xlim=(0, 1.01 * length(spans) / 1e3),
    )
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    patches = [Patch(color=f"C{device}", label=f"worker {device}") for device in devices]
    figure.legend(handles=patches, loc="outside upper right", ncols=len(devices), frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
