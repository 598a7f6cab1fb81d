"""Time how long a voted step takes to trace, lower and compile, against a step of the mean.

A step is an update inside `jax.shard_map` over simulated workers, and `optax.apply_updates`. The
parameters are the matrices, biases and norms of a transformer: most leaves share their shape with
others. Programs get shapes, not arrays, and are compiled but not run.

    python benchmarks/compile_time.py
    python benchmarks/compile_time.py --leaves 48 --rounds 1
    python benchmarks/compile_time.py --candidates signum

The candidates take turns, and JAX's caches are cleared before each. Seconds are CPU time of this
process, since XLA compiles in several threads and other work on the machine would prolong a wall
clock; the results file has both. `ratio` divides a candidate's CPU time, tracing and lowering
included, by its reference's in the same round. The reference is `signax.average_updates`, followed
by `optax.lion` for Lion, and by `optax.sgd` with momentum for the others. Goals are not asserted.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, PartitionSpec
from report import print_table, save, summary

import signax

here = Path(__file__).parent
learning_rate = 1e-3
axis = "workers"
width = 256  # of the transformer
PHASES = ("trace", "lower", "compile")


class Candidate(NamedTuple):
    """An optimiser for a number of workers, its reference, and the goal of their ratio."""

    make: Callable[[int], optax.GradientTransformation]
    reference: str
    goal: float | None = None


def after_mean(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimiser of averaged gradients."""
    return optax.chain(signax.average_updates(axis), optimizer)


def error_feedback(momentum: float | None, workers: int) -> optax.GradientTransformation:
    """SignSGD with error feedback."""
    return signax.ef_sign_sgd(learning_rate, momentum, axis_name=axis, num_workers=workers)


MOMENTUM, LION = "mean, sgd with momentum", "mean, lion"
candidates = {
    MOMENTUM: Candidate(lambda _: after_mean(optax.sgd(learning_rate, momentum=0.9)), MOMENTUM),
    LION: Candidate(lambda _: after_mean(optax.lion(learning_rate)), LION),
    "signum": Candidate(lambda _: signax.signum(learning_rate, axis_name=axis), MOMENTUM, 1.5),
    "lion": Candidate(lambda _: signax.lion(learning_rate, axis_name=axis), LION, 1.5),
    "ef_sign_sgd": Candidate(lambda workers: error_feedback(None, workers), MOMENTUM, 2.5),
    "ef_sign_sgd, momentum": Candidate(lambda workers: error_feedback(0.9, workers), MOMENTUM, 2.5),
}


def main() -> None:
    """Time all programs, and print and save the results."""
    args = parse_arguments()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.workers)
    results = []
    for leaves in args.leaves:
        found = measure(transformer(leaves), args.candidates, args.workers, args.rounds)
        results.append({"leaves": leaves, "candidates": found})
        print_result(results[-1], args.rounds)
    save(args.json, "compile_time", vars(args), results)
    print(f"\nResults are in {args.json}.")


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*candidates]
    add = parser.add_argument
    add("--leaves", type=int, nargs="+", default=[48, 200], help="(default 48 200)")
    add("--workers", type=int, default=8, help="to simulate (default 8)")
    add("--rounds", type=int, default=5, help="compilations of each (default 5)")
    add("--candidates", nargs="+", metavar="NAME", choices=names, default=names, help=f"of {names}")
    add("--json", metavar="FILE", default=str(here / "results" / "compile_time.json"))
    args = parser.parse_args()
    if min(args.rounds, *args.leaves) < 1 or args.workers < 2:
        parser.error("--rounds and --leaves must be at least 1, --workers at least 2")
    references = [candidates[name].reference for name in args.candidates]
    args.candidates = list(dict.fromkeys([*references, *args.candidates]))
    return args


def transformer(leaves: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the first `leaves` leaves of a transformer."""
    kernels = dict.fromkeys(["query", "key", "value", "out"], (width, width))
    kernels |= {"up": (width, 4 * width), "down": (4 * width, width)}
    block = {}
    for name, shape in kernels.items():
        block[f"{name} kernel"], block[f"{name} bias"] = shape, shape[1:]
    for norm in ("norm 1", "norm 2"):
        block[f"{norm} scale"] = block[f"{norm} bias"] = (width,)
    shapes = {}
    for number in range(leaves // len(block) + 1):
        shapes |= {f"{number} {name}": shape for name, shape in block.items()}
    return dict([*shapes.items()][:leaves])


def measure(
    shapes: Mapping[str, tuple[int, ...]], names: Sequence[str], workers: int, rounds: int
) -> dict[str, Any]:
    """Time the candidates in turns, and take the ratios within each round."""
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(1 + rounds):  # the first round imports and warms up
        for name in names:
            tx, is_mean = candidates[name].make(workers), name == candidates[name].reference
            row = stages(*step(tx, params, workers, averages=is_mean))
            if number:
                rows[name].append(row)
    found = {}
    for name, times in rows.items():
        totals, references = (
            [sum(row["cpu"].values()) for row in rows[which]]
            for which in (name, candidates[name].reference)
        )
        ratios = [own / other for own, other in zip(totals, references, strict=True)]
        found[name] = {
            "reference": candidates[name].reference,
            "goal": candidates[name].goal,
            "ratio": summary(ratios),
            "cpu": phases([row["cpu"] for row in times]),
            "wall": phases([row["wall"] for row in times]),
        }
    return found


def phases(times: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The summaries of each phase, and of all phases together."""
    totals = [sum(row.values()) for row in times]
    return {phase: summary([row[phase] for row in times]) for phase in PHASES} | {
        "total": summary(totals)
    }


def step(
    tx: optax.GradientTransformation, params: Any, workers: int, averages: bool
) -> tuple[jax.stages.Wrapped, tuple[Any, ...]]:
    """A step of all workers, and the shapes of its arguments."""
    mesh = jax.make_mesh((workers,), (axis,), axis_types=(AxisType.Auto,))

    def of_worker(params: Any, state: Any, grads: Any):
        grads = jax.tree.map(lambda row: row[0], grads)
        state = jax.tree.map(lambda array, varies: array[0] if varies else array, state, is_row)
        updates, state = tx.update(grads, state, params)
        state = jax.tree.map(lambda x, varies: as_row(x) if varies else x, state, is_row)
        return optax.apply_updates(params, updates), state

    def as_row(array: jax.Array):
        varies = axis in jax.typeof(array).manual_axis_type.varying
        return (array if varies else jax.lax.pcast(array, axis, to="varying"))[None]

    def rows(tree: Any):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((workers, *x.shape), x.dtype), tree)

    state = jax.eval_shape(tx.init, params)
    # A momentum of averaged gradients is the same on every worker. Other state is a worker's own.
    is_row = jax.tree.map(lambda array: not (averages and array.ndim), state)
    whole, row = PartitionSpec(), PartitionSpec(axis)
    specs = jax.tree.map(lambda varies: row if varies else whole, is_row)
    mapped = jax.shard_map(
        of_worker, mesh=mesh, in_specs=(whole, specs, row), out_specs=(whole, specs)
    )
    states = jax.tree.map(lambda array, varies: rows(array) if varies else array, state, is_row)
    return jax.jit(mapped, donate_argnums=(0, 1)), (params, states, rows(params))


def stages(program: jax.stages.Wrapped, arguments: Sequence[Any]) -> dict[str, dict[str, float]]:
    """The seconds that each phase takes, of CPU time and of wall time."""
    jax.clear_caches()
    wall, cpu = [time.perf_counter()], [time.process_time()]

    def stop():
        wall.append(time.perf_counter())
        cpu.append(time.process_time())

    traced = program.trace(*arguments)
    stop()
    lowered = traced.lower()
    stop()
    lowered.compile()
    stop()
    return {
        name: {
            phase: stop - start
            for phase, start, stop in zip(PHASES, clock, clock[1:], strict=False)
        }
        for name, clock in (("cpu", cpu), ("wall", wall))
    }


def print_result(result: dict[str, Any], rounds: int) -> None:
    """Print the table of one tree."""
    rows = []
    for name, found in result["candidates"].items():
        cpu, ratio, goal = found["cpu"], found["ratio"], found["goal"]
        seconds = [cpu[phase] for phase in (*PHASES, "total")] + [found["wall"]["total"]]
        row = [name, *[f"{each['median']:.2f}" for each in seconds], f"{ratio['median']:.2f}"]
        row += [f"{ratio['min']:.2f}..{ratio['max']:.2f}", f"<= {goal:g}" if goal else ""]
        rows.append(row)
    print(f"\n{result['leaves']} leaves, medians of {rounds} rounds, CPU seconds")
    print_table(("", *PHASES, "total", "total, wall", "ratio", "range", "goal"), rows)


if __name__ == "__main__":
    main()
