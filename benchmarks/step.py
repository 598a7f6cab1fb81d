"""Time whole optimiser steps on one device, against Optax's optimisers.

A step is `tx.update` and `optax.apply_updates` in one compiled program, with a fixed gradient and
donated parameters and state. `signum` and `lion` are the optimisers without an axis, and do not
vote. `signum, voted` shows a vote's cost on a worker without the wire: `signax.DataParallel` on a
mesh of one device, with the check for NaN, packing, counting and unpacking.

    python benchmarks/step.py
    python benchmarks/step.py --parameters 1_000_000 --rounds 5
    python benchmarks/step.py --candidates "sgd, momentum" adamw signum

The `--parameters` numbers lie once in the matrices, norms and biases of a transformer, and once in
one flat array. The candidates take turns. `ratio` is a step's time divided by the time of SGD with
momentum in the same round. The table also shows the goal of `signum`, which is not asserted: a
ratio of at most 1.1, below the ratio of `adamw`. `passes` is the compiler's count of reads and
writes of arrays as large as the parameters. SGD with momentum has 6 passes: one loop updates the
momentum, and another loop reads the momentum again and updates the parameters. `temporary` is the
memory that the program needs beyond its arguments and results.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType
from report import interleave, print_table, save, save_bars, summary

import signax

here = Path(__file__).parent
learning_rate = 1e-4
REFERENCE = "sgd, momentum"
goals = {"signum": 1.1}


def voted(optimizer: optax.GradientTransformation) -> signax.DataParallel:
    """An optimiser with a vote, on a mesh with one worker."""
    devices = jax.devices()[:1]
    mesh = jax.make_mesh((1,), ("workers",), axis_types=(AxisType.Auto,), devices=devices)
    return signax.DataParallel(optimizer, mesh, "workers")


optimizers: dict[str, Callable[[], optax.GradientTransformation]] = {
    REFERENCE: lambda: optax.sgd(learning_rate, momentum=0.9),
    "adamw": lambda: optax.adamw(learning_rate),
    "optax lion": lambda: optax.lion(learning_rate),
    "signum": lambda: signax.signum(learning_rate),
    "signum, voted": lambda: voted(signax.signum(learning_rate, axis_name="workers")),
    "lion": lambda: signax.lion(learning_rate),
    "ef_sign_sgd": lambda: signax.ef_sign_sgd(learning_rate),
}


class Stepper:
    """A training loop without a model. Each step donates the result of the step before."""

    def __init__(self, tx: optax.GradientTransformation, params: Any, grads: Any):
        self.params = jax.tree.map(jnp.array, params)  # a copy, since steps donate it
        self.grads = grads
        if isinstance(tx, signax.DataParallel):
            self.grads = jax.tree.map(lambda g: g[None], grads)
        self.state = tx.init(self.params)

        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        program = jax.jit(step, donate_argnums=(0, 1))
        self.program = program.lower(self.params, self.state, self.grads).compile()

    def __call__(self) -> Any:
        """Take one step and return the new parameters and state."""
        self.params, self.state = self.program(self.params, self.state, self.grads)
        return self.params, self.state


def main() -> None:
    """Time all steps, and print, save and draw the results."""
    args = parse_arguments()
    trees = {"transformer": transformer(args.parameters), "flat": {"all": (args.parameters,)}}
    results = []
    for name, shapes in trees.items():
        results.append({"tree": name, **measure(shapes, args.candidates, args.rounds)})
        print_result(results[-1], args.rounds)
    save(args.json, "step", vars(args), results)
    seconds = {
        f"{name}: {result['tree']}": found["seconds"]
        for result in results
        for name, found in result["candidates"].items()
    }
    save_bars(args.figure, seconds, title=f"{args.parameters:,} parameters, one worker")
    print(f"\nResults are in {args.json}, the figure is {args.figure}.")


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*optimizers]
    add = parser.add_argument
    add("--parameters", type=int, default=10_000_000, help="in f32 (default 10_000_000)")
    add("--rounds", type=int, default=21, help="timed steps of each (default 21)")
    add("--candidates", nargs="+", metavar="NAME", choices=names, default=names, help=f"of {names}")
    add("--json", metavar="FILE", default=str(here / "results" / "step.json"))
    add("--figure", metavar="FILE", default=str(here / "results" / "step.png"))
    args = parser.parse_args()
    if min(args.parameters, args.rounds) < 1:
        parser.error("--parameters and --rounds must be at least 1")
    if REFERENCE not in args.candidates:
        args.candidates = [REFERENCE, *args.candidates]
    return args


def transformer(parameters: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a transformer's leaves: blocks of one width, and an embedding for the rest."""
    width = next(
        width for width in (512, 256, 128, 64, 32) if width == 32 or parameters >= 30 * width**2
    )
    block = {
        "norm": (width,),
        "attention in": (width, 3 * width),
        "attention out": (width, width),
        "hidden": (width, 4 * width),
        "hidden bias": (4 * width,),
        "out": (4 * width, width),
        "out bias": (width,),
    }
    blocks = max(1, parameters * 2 // 3 // count(block))
    shapes = {f"block {n} {name}": shape for n in range(blocks) for name, shape in block.items()}
    words = max(1, (parameters - count(shapes)) // width)
    return {"embedding": (words, width), **shapes}


def count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The number of parameters in leaves of the given shapes."""
    return sum(int(np.prod(shape)) for shape in shapes.values())


def measure(
    shapes: Mapping[str, tuple[int, ...]], candidates: Sequence[str], rounds: int
) -> dict[str, Any]:
    """Time the candidates on one tree, and take the ratios within each round."""
    rng = np.random.default_rng(0)
    params, grads = (
        {
            name: jnp.asarray(rng.standard_normal(shape, np.float32))
            for name, shape in shapes.items()
        }
        for _ in range(2)
    )
    steps = {name: Stepper(optimizers[name](), params, grads) for name in candidates}
    seconds = interleave(steps, rounds)
    size = 4 * count(shapes)
    found = {}
    for name, step in steps.items():
        pairs = zip(seconds[name], seconds[REFERENCE], strict=True)
        cost: Any = step.program.cost_analysis()
        memory: Any = step.program.memory_analysis()
        found[name] = {
            **summary(seconds[name]),
            "seconds": seconds[name],
            "ratio": summary([own / other for own, other in pairs]),
            "goal": goals.get(name),
            "passes": cost["bytes accessed"] / size,
            "temporary_bytes": memory.temp_size_in_bytes,
        }
    return {"parameters": count(shapes), "leaves": len(shapes), "candidates": found}


def print_result(result: dict[str, Any], rounds: int) -> None:
    """Print the table of one tree."""
    rows = []
    for name, found in result["candidates"].items():
        low, median, high = (found[key] * 1e3 for key in ("min", "median", "max"))
        ratio, goal = found["ratio"], found["goal"]
        row = [name, f"{median:,.2f}", f"{low:,.2f}..{high:,.2f}", f"{ratio['median']:.2f}"]
        row += [f"{ratio['min']:.2f}..{ratio['max']:.2f}", f"<= {goal:g}" if goal else ""]
        rows.append([*row, f"{found['passes']:.1f}", f"{found['temporary_bytes'] / 1e6:,.1f}"])
    parameters, leaves = result["parameters"], result["leaves"]
    print(f"\n{result['tree']}: {parameters:,} parameters in {leaves} leaf(s), {rounds} rounds")
    ratio = ("ratio", "range", "goal")
    print_table(("", "median ms", "range", *ratio, "passes", "temporary MB"), rows)


if __name__ == "__main__":
    main()
