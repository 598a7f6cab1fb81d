"""The cost of a vote by the numbers of workers and leaves: bytes sent, counting, compiling.

By the number of workers M, in powers of two:

- the bytes that one worker sends per step for `--parameters` f32 numbers, in a vote and in a mean,
  by the formula of `signax.diagnostics.wire_bytes`, and, up to the number of simulated devices, of
  the compiled programs;
- the time to compile, and to run, the count of one server: the count of an M-th of the words of all
  M workers.

By the number of leaves of a transformer, on 8 workers, or fewer if there are fewer devices:

- the time to compile a whole voted update (`signax.signum`), and, for comparison, an update by
  Optax's momentum on averaged gradients.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --most-workers 256 --rounds 5 --compilations 1
    python benchmarks/scaling.py --leaves 50 400

Programs that are only compiled get shapes, not arrays. Tracing counts as compiling. JAX's caches
are cleared before each compilation. Compilations, like runs, take turns. The tables show medians
and ranges.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from kernels import ballot_box, majority
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from report import interleave, print_table, save, summary

import signax
from signax import diagnostics
from signax._wire.words import WORD_BITS, part_words

here = Path(__file__).parent
schemes = ("vote", "mean")
learning_rate = 1e-3
width = 256  # of the transformer


def main() -> None:
    """Measure bytes, counts and compilations, and print, save and draw the results."""
    args = parse_arguments()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.devices)
    workers = powers_of_two(args.most_workers)
    results = {
        "bytes": sent_bytes(args.parameters, workers),
        "counting": counting(args.parameters, workers, args.rounds, args.compilations),
        "updates": compiling_updates(args.leaves, args.compilations),
    }
    print_results(results)
    save(args.json, "scaling", vars(args), results)
    draw(results, args.figure, f"{args.parameters:,} parameters")
    print(f"\nResults are in {args.json}, the figure is {args.figure}.")


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parameters", type=int, default=10_000_000, help="in f32 (default 10_000_000)")
    add("--most-workers", type=int, default=4096, help="(default 4096)")
    add("--devices", type=int, default=16, help="to simulate (default 16)")
    add("--leaves", type=int, nargs="+", default=[25, 50, 100, 200], help="(default 25 50 100 200)")
    add("--rounds", type=int, default=21, help="timed runs of each (default 21)")
    add("--compilations", type=int, default=3, help="of each (default 3)")
    add("--json", metavar="FILE", default=str(here / "results" / "scaling.json"))
    add("--figure", metavar="FILE", default=str(here / "results" / "scaling.png"))
    args = parser.parse_args()
    if min(args.parameters, args.rounds, args.compilations, *args.leaves) < 1:
        parser.error("--parameters, --leaves, --rounds and --compilations must be at least 1")
    if min(args.most_workers, args.devices) < 2:
        parser.error("--most-workers and --devices must be at least 2")
    return args


def powers_of_two(most: int) -> list[int]:
    """The powers of two from 2 to `most`."""
    return [2**n for n in range(1, most.bit_length())]


def sent_bytes(parameters: int, workers: Sequence[int]) -> list[dict[str, Any]]:
    """Bytes per worker, by formula and, if there are enough devices, of compiled programs."""
    tree = jax.ShapeDtypeStruct((parameters,), jnp.float32)
    return [
        {
            "workers": number,
            "scheme": scheme,
            "formula": diagnostics.wire_bytes(tree, number, scheme=scheme),
            "compiled": compiled_bytes(tree, number, scheme)
            if number <= jax.device_count()
            else None,
        }
        for scheme in schemes
        for number in workers
    ]


def compiled_bytes(tree: jax.ShapeDtypeStruct, workers: int, scheme: str) -> int:
    """The bytes that one device sends in a compiled exchange."""
    mesh, split, whole = mesh_of(workers), PartitionSpec("workers"), PartitionSpec()

    def exchange(rows, step):
        if scheme == "vote":
            return signax.pvote(rows[0], "workers", step=step)
        return lax.pmean(rows[0], "workers")

    mapped = jax.shard_map(exchange, mesh=mesh, in_specs=(split, whole), out_specs=whole)
    sharding = NamedSharding(mesh, split)
    rows = jax.ShapeDtypeStruct((workers, *tree.shape), tree.dtype, sharding=sharding)
    return diagnostics.collective_bytes(jax.jit(mapped).lower(rows, jnp.int32(0)).compile())


def mesh_of(workers: int) -> Mesh:
    """A mesh of a number of devices along "workers"."""
    devices = jax.devices()[:workers]
    return jax.make_mesh((workers,), ("workers",), axis_types=(AxisType.Auto,), devices=devices)


def counting(
    parameters: int, workers: Sequence[int], rounds: int, compilations: int
) -> list[dict[str, Any]]:
    """Compile and run the count of one server, for each number of workers."""
    shares = {number: part_words(-(-parameters // WORD_BITS), number) for number in workers}
    boxes = {number: ballot_box(number, share) for number, share in shares.items()}

    def compile_count(number: int) -> Callable:
        program = jax.jit(lambda parts: majority(parts, shares[number]))
        return program.lower(boxes[number]).compile()

    compiling = time_compilations({n: lambda n=n: compile_count(n) for n in workers}, compilations)
    programs = {number: compile_count(number) for number in workers}
    running = interleave(
        {str(n): lambda n=n: programs[n](boxes[n]) for n in workers}, rounds=rounds
    )
    return [
        {
            "workers": number,
            "words": shares[number],
            "compiling": compiling[number],
            "running": spread(running[str(number)]),
        }
        for number in workers
    ]


def compiling_updates(leaves: Sequence[int], compilations: int) -> list[dict[str, Any]]:
    """Compile updates of transformers, voted and averaged."""
    mesh = mesh_of(min(8, jax.device_count()))
    optimizers = {
        "vote": signax.signum(learning_rate, axis_name="workers"),
        "mean": optax.chain(
            signax.average_updates("workers"), optax.sgd(learning_rate, momentum=0.9)
        ),
    }
    programs = {
        (number, scheme): lambda number=number, tx=optimizers[scheme]: compile_update(
            tx, mesh, transformer(number)
        )
        for number in leaves
        for scheme in schemes
    }
    compiling = time_compilations(programs, compilations)
    return [
        {"leaves": number, "scheme": scheme, "workers": mesh.size, "compiling": found}
        for (number, scheme), found in compiling.items()
    ]


def compile_update(
    optimizer: optax.GradientTransformation, mesh: Mesh, params: Any
) -> jax.stages.Compiled:
    """Compile one update for the shapes of parameters."""
    tx = signax.DataParallel(optimizer, mesh, "workers")

    def update(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def placed(leaf, sharding, shape=None):
        return jax.ShapeDtypeStruct(shape or leaf.shape, leaf.dtype, sharding=sharding)

    whole, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("workers",)))
    state = jax.tree.map(placed, jax.eval_shape(tx.init, params), tx.state_shardings(params))
    grads = jax.tree.map(lambda leaf: placed(leaf, split, (mesh.size, *leaf.shape)), params)
    params = jax.tree.map(lambda leaf: placed(leaf, whole), params)
    return jax.jit(update, donate_argnums=(0, 1)).lower(params, state, grads).compile()


def transformer(leaves: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a transformer with a number of leaves: embeddings, then block after block."""
    block = {
        "norm 1 scale": (width,),
        "norm 1 bias": (width,),
        "attention in": (width, 3 * width),
        "attention in bias": (3 * width,),
        "attention out": (width, width),
        "attention out bias": (width,),
        "norm 2 scale": (width,),
        "norm 2 bias": (width,),
        "hidden": (width, 4 * width),
        "hidden bias": (4 * width,),
        "out": (4 * width, width),
        "out bias": (width,),
    }
    shapes: dict[str, tuple[int, ...]] = {"embedding": (8192, width), "positions": (1024, width)}
    number = 0
    while len(shapes) < leaves:
        shapes |= {f"block {number} {name}": shape for name, shape in block.items()}
        number += 1
    kept = list(shapes.items())[:leaves]
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in kept}


def time_compilations(
    programs: dict[Any, Callable[[], Any]], compilations: int
) -> dict[Any, dict[str, Any]]:
    """Time compilations of programs, each without JAX's caches."""
    next(iter(programs.values()))()  # a process's first compilation takes longer
    named = {str(key): program for key, program in programs.items()}
    seconds = interleave(named, compilations, warmup=0, before=jax.clear_caches)
    return {key: spread(seconds[str(key)]) for key in programs}


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """The summary of some times, with the times."""
    return {**summary(seconds), "seconds": list(seconds)}


def print_results(results: dict[str, Any]) -> None:
    """Print the tables of bytes, counts and compilations."""

    def cells(found, scale, form):
        low, median, high = (format(found[key] * scale, form) for key in ("min", "median", "max"))
        return [median, f"{low}..{high}"]

    print("\nbytes that one worker sends per step")
    rows = [
        (
            f"{row['scheme']} of {row['workers']}",
            f"{row['formula']:,}",
            "-" if row["compiled"] is None else f"{row['compiled']:,}",
        )
        for row in results["bytes"]
    ]
    print_table(("", "formula", "compiled"), rows)

    print("\ncounting on one worker")
    rows = [
        (
            f"{row['workers']} workers",
            f"{row['words']:,}",
            *cells(row["compiling"], 1, ".2f"),
            *cells(row["running"], 1e3, ".3f"),
        )
        for row in results["counting"]
    ]
    print_table(("", "words each", "compile s", "range", "run ms", "range"), rows)

    print("\ncompiling an update of a transformer")
    rows = [
        [f"{row['scheme']}, {row['leaves']} leaves", *cells(row["compiling"], 1, ".2f")]
        for row in results["updates"]
    ]
    print_table(("", "compile s", "range"), rows)


def draw(results: dict[str, Any], path: str, title: str) -> None:
    """Save a figure with four panels: bytes, compiled counts, timed counts, and updates."""
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    (sent, compiled), (counted, updated) = figure.subplots(2, 2)
    for scheme in schemes:
        rows = [row for row in results["bytes"] if row["scheme"] == scheme]
        (line,) = sent.plot(
            *columns(rows, "workers", "formula"), label=f"{scheme}, by formula", linewidth=1
        )
        rows = [row for row in rows if row["compiled"] is not None]
        color, label = line.get_color(), f"{scheme}, compiled"
        sent.plot(*columns(rows, "workers", "compiled"), "o", color=color, label=label)
        rows = [row for row in results["updates"] if row["scheme"] == scheme]
        error_bars(updated, rows, "leaves", "compiling", 1, scheme)
    error_bars(counted, results["counting"], "workers", "running", 1e3, None)
    error_bars(compiled, results["counting"], "workers", "compiling", 1, None)

    workers = "workers"
    sent.set(xlabel=workers, ylabel="bytes per worker and step", title=f"Sent for {title}")
    compiled.set(xlabel=workers, ylabel="compile time (s)", title="Compiling the count")
    counted.set(xlabel=workers, ylabel="run time (ms)", title=f"Counting one share of {title}")
    updated.set(
        xlabel="leaves", ylabel="compile time (s)", title="Compiling a transformer's update"
    )
    for axes in (sent, compiled, counted, updated):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
    for axes in (sent, updated):
        axes.legend()
    updated.set_xticks([row["leaves"] for row in results["updates"]])
    updated.xaxis.set_major_formatter("{x:g}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def columns(rows: Sequence[dict[str, Any]], *names: str) -> list[list[Any]]:
    """The named columns of a table's rows."""
    return [[row[name] for row in rows] for name in names]


def error_bars(
    axes: Axes,
    rows: Sequence[dict[str, Any]],
    across: str,
    name: str,
    scale: float,
    label: str | None,
) -> None:
    """Draw medians, with whiskers from fastest to slowest."""
    medians, low, high = (
        [row[name][key] * scale for row in rows] for key in ("median", "min", "max")
    )
    below = [median - least for median, least in zip(medians, low, strict=True)]
    above = [most - median for median, most in zip(medians, high, strict=True)]
    (places,) = columns(rows, across)
    axes.errorbar(places, medians, yerr=(below, above), marker="o", capsize=3, label=label)


if __name__ == "__main__":
    main()
