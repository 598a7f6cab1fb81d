"""Train the language model with many settings at once, on one accelerator.

    python benchmarks/sweep.py --methods adamw muon ef-muon --exponents 3 4 5 --seeds 0 1 2
    python benchmarks/sweep.py --methods muon/gradient/1 --exponents 4 5 --decays 0 0.5 0.9 1
    python benchmarks/sweep.py --methods diloco/adamw/30/2 --steps 480 --exponents 2 3 --decays 0

This program takes the model, data, schedule and batches from examples/train_language_model.py.
Workers and settings are axes of `jax.vmap`: one program trains one model for each step size, 0.001
times a power of two, momentum, decay of error memories and seed. Workers on a mesh reach the same
losses, up to rounding. An H100 trains a grid of twelve runs for 300 steps in about ten seconds, and
a CPU one run in a minute. sweep_methods.py says how methods are named.

Methods are compiled side by side and trained one after the other. Results are added to --json after
each method. Runs that it already holds are left out.
"""

import argparse
import functools
import itertools
import json
import math
import statistics
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from report import print_table, save
from sweep_methods import AXIS, example, make

here = Path(__file__).parent

GRID = ("step_size", "momentum", "decay", "outer_step_size", "outer_momentum", "seed")
MODEL = ("layers", "heads", "width", "context", "vocabulary")
PIECE = 64  # windows that are validated at once

Run = dict[str, Any]
lock = threading.Lock()  # one method trains at a time


def main() -> None:
    """Train all methods, and print the best setting of each."""
    args = parse_arguments()
    with ThreadPoolExecutor(args.threads) as pool:
        for finished in pool.map(functools.partial(train_method, args=args), args.methods):
            print(finished, flush=True)
    print_best(load(args))


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--methods", nargs="+", required=True, help="see sweep_methods.py")
    add("--exponents", type=float, nargs="+", required=True, help="step sizes are 0.001 * 2**N")
    add("--momenta", type=float, nargs="+", default=[0.6, 0.8, 0.9], help="(default 0.6 0.8 0.9)")
    add("--decays", type=float, nargs="+", default=[1.0], help="of error memories (default 1)")
    add("--outer-step-sizes", type=float, nargs="+", default=[0.7], help="DiLoCo's (default 0.7)")
    add("--outer-momenta", type=float, nargs="+", default=[0.9], help="DiLoCo's (default 0.9)")
    add("--seeds", type=int, nargs="+", default=[0], help="(default 0)")
    add("--steps", type=int, default=300, help="(default 300)")
    add("--evaluate-every", type=int, help="steps (default: at the end)")
    add("--workers", type=int, default=8, help="(default 8)")
    add("--batch-size", type=int, default=32, help="rows of all workers (default 32)")
    add("--validation-windows", type=int, default=512, help="(default 512)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="to compute in")
    for name in MODEL:
        add(
            f"--{name}",
            type=int,
            default=example.sizes["small"][name],
            help="(default %(default)s)",
        )
    add("--together", type=int, default=12, help="runs in one program (default 12)")
    add("--threads", type=int, default=1, help="methods compiled side by side (default 1)")
    add("--json", default=str(here / "results" / "sweep.json"), metavar="FILE")
    args = parser.parse_args()
    args.evaluate_every = args.evaluate_every or args.steps
    if args.steps % args.evaluate_every:
        parser.error(f"--evaluate-every {args.evaluate_every} must divide --steps {args.steps}")
    return args


def load(args: argparse.Namespace) -> list[Run]:
    """The finished runs."""
    path = Path(args.json)
    return json.loads(path.read_text())["results"] if path.exists() else []


def common(method: str, args: argparse.Namespace) -> Run:
    """The settings that all runs of a method share."""
    names = ("steps", "workers", "batch_size", "dtype", "validation_windows", *MODEL)
    precision = jax.config.jax_default_matmul_precision or "default"
    return {
        "method": method,
        "matmul_precision": precision,
        **{name: getattr(args, name) for name in names},
    }


def grid(method: str, args: argparse.Namespace) -> list[Run]:
    """The settings of a method that have not run yet."""
    shared, finished = common(method, args), load(args)
    sizes = [1e-3 * 2.0**exponent for exponent in args.exponents]
    # A method without such memories or without outer steps has no use for their settings.
    forgets = "/" not in method or method.endswith("/f32") or "/ef21/" in method
    forgets |= method.startswith(("others", "delay", "fault"))
    decays = [1.0] if forgets else args.decays
    outer = (args.outer_step_sizes, args.outer_momenta)
    if "diloco" not in method:
        outer = ([0.7], [0.9])
    found = []
    for values in itertools.product(sizes, args.momenta, decays, *outer, args.seeds):
        run = shared | dict(zip(GRID, values, strict=True))
        if not any(run.items() <= other.items() for other in finished):
            found.append(run)
    return found


def train_method(method: str, args: argparse.Namespace) -> str:
    """Train a method with all its settings, and save the results."""
    runs = grid(method, args)
    together = min(args.together, len(runs))
    if not runs:
        return f"{method}: finished before"
    programs = Programs(common(method, args), args, together)
    for start in range(0, len(runs), together):
        part = runs[start : start + together]
        padded = part + part[-1:] * (together - len(part))
        with lock:
            curves = programs.train(padded)
            results = load(args)
            found = {"parameters": programs.parameters, "device": jax.devices()[0].device_kind}
            for run, curve in zip(part, curves, strict=False):
                results.append(run | found | {"validation_losses": curve})
            save(args.json, "sweep", {}, results)
    return f"{method}: {len(runs)} runs"


class Programs:
    """The compiled programs that train a method with some settings together."""

    def __init__(self, shared: Run, args: argparse.Namespace, together: int):
        self.shared, self.args = SimpleNamespace(**shared), args
        self.delayed = self.shared.method.startswith("delayed")
        training, validation = example.load_text()
        context = args.context
        self.text, self.places = jnp.asarray(training), len(training) - context
        starts = np.linspace(0, len(validation) - context - 1, args.validation_windows)
        rows = example.windows(validation, starts.astype(int), context)
        self.held_out = jnp.asarray(rows).reshape(-1, math.gcd(PIECE, len(rows)), context + 1)
        self.graph, shapes = nnx.split(nnx.eval_shape(lambda: self._model(0)))
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))

        settings = {name: jax.ShapeDtypeStruct((together,), jnp.float32) for name in GRID[:-1]}
        models = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((together, *leaf.shape), leaf.dtype), shapes
        )
        start = jax.jit(jax.vmap(self._start))
        carry = jax.eval_shape(start, settings, models)
        batches = (together, args.evaluate_every, args.batch_size)
        batches = jax.ShapeDtypeStruct(batches, jnp.int32)
        steps = jax.jit(jax.vmap(self._steps), donate_argnums=1)
        self.start = start.lower(settings, models).compile()
        self.steps = steps.lower(settings, carry, batches).compile()
        self.evaluate = jax.jit(jax.vmap(self._evaluate)).lower(carry).compile()

    def train(self, runs: list[Run]) -> list[list[float]]:
        """The validation losses of each run, every `evaluate_every` steps."""
        models = {seed: nnx.split(self._model(seed))[1] for seed in {run["seed"] for run in runs}}
        stacked = jax.tree.map(
            lambda *rows: jnp.stack(rows), *[models[run["seed"]] for run in runs]
        )
        settings = {name: jnp.array([run[name] for run in runs], jnp.float32) for name in GRID[:-1]}
        batches = np.stack([self._batches(run["seed"]) for run in runs])
        carry, curves = self.start(settings, stacked), []
        for step in range(0, self.args.steps, self.args.evaluate_every):
            part = batches[:, step : step + self.args.evaluate_every]
            carry = self.steps(settings, carry, jnp.asarray(part))
            curves.append(np.asarray(self.evaluate(carry)))
        return np.transpose(curves).tolist()

    def _model(self, seed: int) -> Any:
        return example.GPT(self.shared, nnx.Rngs(seed))

    def _batches(self, seed: int) -> np.ndarray:
        """The example's windows of every step: int32[steps, batch_size]."""
        rngs = [np.random.default_rng((seed, step)) for step in range(1, self.args.steps + 1)]
        size = self.args.batch_size
        return np.stack([rng.integers(self.places, size=size) for rng in rngs]).astype(np.int32)

    def _optimizers(self, settings: Any) -> Any:
        return make(SimpleNamespace(**vars(self.shared), **settings))

    def _loss(self, params: Any, windows: Any) -> Any:
        logits = nnx.merge(self.graph, params)(windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    def _start(self, settings: Any, params: Any) -> Any:
        """All workers' parameters and state, and for DiLoCo the outer parameters and state."""
        tx, outer, _ = self._optimizers(settings)

        def worker(_: Any):
            kept = (params, outer.init(params)) if outer else ()
            if self.delayed:  # where the round began, and the differences on their way
                kept += params, optax.tree.zeros_like(params)
            return params, tx.init(params), *kept

        return jax.vmap(worker, axis_name=AXIS)(jnp.arange(self.args.workers))

    def _steps(self, settings: Any, carry: Any, batches: Any) -> Any:
        """Training steps of all workers, with an outer step after every H for DiLoCo."""
        tx, outer, local_steps = self._optimizers(settings)
        characters = np.arange(self.args.context + 1)

        def step(carry: Any, batch: Any):
            def worker(carry: Any, starts: Any):
                params, state, *kept = carry
                windows = self.text[starts[:, None] + characters].astype(jnp.int32)
                gradients = jax.grad(self._loss)(params, windows)
                updates, state = tx.update(gradients, state, params)
                return optax.apply_updates(params, updates), state, *kept

            starts = batch.reshape(self.args.workers, -1)
            return jax.vmap(worker, axis_name=AXIS)(carry, starts), None

        def meet(carry: Any):
            params, state, anchor, kept = carry
            difference = jax.tree.map(jnp.subtract, anchor, params)
            updates, kept = outer.update(difference, kept, anchor)
            anchor = optax.apply_updates(anchor, updates)
            return anchor, state, anchor, kept

        def meet_later(carry: Any):
            params, state, anchor, kept, start, sent = carry
            difference = jax.tree.map(jnp.subtract, start, params)
            updates, kept = outer.update(sent, kept, anchor)
            anchor = optax.apply_updates(anchor, updates)
            params = jax.tree.map(jnp.subtract, anchor, difference)
            return params, state, anchor, kept, params, difference

        def one_round(carry: Any, batches: Any):
            carry, _ = lax.scan(step, carry, batches)
            return jax.vmap(exchange, axis_name=AXIS)(carry), None

        exchange = meet_later if self.delayed else meet
        if outer is None:
            return lax.scan(step, carry, batches)[0]
        rounds = batches.reshape(-1, local_steps, batches.shape[-1])
        return lax.scan(one_round, carry, rounds)[0]

    def _evaluate(self, carry: Any) -> Any:
        params = carry[2] if len(carry) > 2 else carry[0]
        first = jax.tree.map(lambda rows: rows[0], params)
        return lax.map(functools.partial(self._loss, first), self.held_out).mean()


def print_best(runs: list[Run]) -> None:
    """Print the best setting of each method, model and number of steps, by the first seed."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault((run["method"], run["parameters"], run["steps"]), []).append(run)
    rows = []
    for (method, parameters, steps), own in groups.items():
        searched = [run for run in own if run["seed"] == own[0]["seed"]]
        finite = [run for run in searched if math.isfinite(run["validation_losses"][-1])]
        if not finite:
            continue  # all step sizes were too large
        best = min(finite, key=lambda run: run["validation_losses"][-1])
        chosen = {name: best[name] for name in GRID[:-1]}
        losses = [run["validation_losses"][-1] for run in own if chosen.items() <= run.items()]
        row = [method, f"{parameters:,}", str(steps), *(f"{value:g}" for value in chosen.values())]
        rows.append([*row, f"{statistics.mean(losses):.4f}", str(len(losses))])
    settings = [name.replace("_", " ") for name in GRID[:-1]]
    print_table(("", "parameters", "steps", *settings, "loss", "seeds"), rows)


if __name__ == "__main__":
    main()
