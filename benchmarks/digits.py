"""Train the network of examples/train_digits.py with every optimiser, and compare accuracies.

    python benchmarks/digits.py
    python benchmarks/digits.py --methods muon ef_muon --steps 400

Eight simulated workers, and a step size that falls to zero as a cosine. Every method's step size is
searched among powers of two, times 0.001, with the first seed: the search tries neighbours of the
best until both are worse. Further seeds run there. Muon orthogonalises the kernels of convolutions
as matrices from all inputs of a pixel to its outputs. Results are saved after each run.
"""

import argparse
import importlib
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import optax
from language_model import next_exponent
from optax.contrib import MuonDimensionNumbers
from report import print_table, save

import signax

here = Path(__file__).parent
AXIS = "data"
VOTE: dict[str, Any] = {"axis_name": AXIS}
mean = signax.average_updates(AXIS)


def matrices(params: Any) -> Any:
    """Kernels as matrices: their last axis is the output, all others are the input."""

    def of_leaf(leaf: Any):
        inputs = tuple(range(leaf.ndim - 1))
        return MuonDimensionNumbers(inputs, (leaf.ndim - 1,)) if inputs else None

    return jax.tree.map(of_leaf, params)


def muon_on_mean(rate: Any) -> Any:
    muon = optax.contrib.muon(
        rate, beta=0.9, consistent_rms=0.2, muon_weight_dimension_numbers=matrices
    )
    return optax.chain(mean, muon)


# Each method with the exponent at which the search begins.
METHODS: dict[str, tuple[int, Callable[[Any], Any]]] = {
    "adamw": (2, lambda rate: optax.chain(mean, optax.adamw(rate))),
    "sgd": (7, lambda rate: optax.chain(mean, optax.sgd(rate, momentum=0.9))),
    "muon-mean": (4, muon_on_mean),
    "sign_sgd": (1, lambda rate: signax.sign_sgd(rate, **VOTE)),
    "signum": (0, lambda rate: signax.signum(rate, **VOTE)),
    "lion": (0, lambda rate: signax.lion(rate, weight_decay=0.0, **VOTE)),
    "muon": (4, lambda rate: signax.muon(rate, 0.9, weight_dimension_numbers=matrices, **VOTE)),
    "ef_muon": (
        4,
        lambda rate: signax.ef_muon(rate, 0.9, weight_dimension_numbers=matrices, **VOTE),
    ),
    "ssdm": (7, lambda rate: signax.ssdm(rate, jax.random.key(0), **VOTE)),
    "ef_sign_sgd": (7, lambda rate: signax.ef_sign_sgd(rate, momentum=0.9, **VOTE)),
    "one_bit_adam": (2, lambda rate: signax.one_bit_adam(rate, warmup_steps=40, **VOTE)),
}


def main() -> None:
    """Search every method's step size, run further seeds there, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    add("--steps", type=int, default=200, help="(default 200)")
    add("--batch-size", type=int, default=128, help="images of all workers (default 128)")
    add("--workers", type=int, default=8, help="(default 8)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default 0 1 2)")
    add("--json", metavar="FILE", default=str(here / "results" / "digits.json"))
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.workers)
    sys.path.append(str(here.parent / "examples"))
    example = importlib.import_module("train_digits")
    mesh = jax.make_mesh((args.workers,), (AXIS,))
    results = {}

    def error(method: str, exponent: int, seed: int) -> float:
        rate = optax.cosine_decay_schedule(1e-3 * 2.0**exponent, args.steps)
        settings = SimpleNamespace(batch_size=args.batch_size, seed=seed, steps=args.steps)
        run = example.train(method, METHODS[method][1](rate), mesh, settings)
        results[method]["bytes_per_step"] = run["bytes_per_step"]
        return 1 - run["test_accuracy"]

    for method in args.methods:
        exponent: int | None = METHODS[method][0]
        found: dict[int, float] = {}
        results[method] = {}
        while exponent is not None:
            found[exponent] = error(method, exponent, args.seeds[0])
            exponent = next_exponent(found)
        best = min(found, key=found.__getitem__)
        errors = [found[best]] + [error(method, best, seed) for seed in args.seeds[1:]]
        results[method] |= {"step_size": 1e-3 * 2.0**best, "errors": errors}
        save(args.json, "digits", vars(args), results)
    rows = [
        [
            method,
            f"{one['step_size']:g}",
            f"{1 - statistics.mean(one['errors']):.2%}",
            f"{1 - max(one['errors']):.2%} to {1 - min(one['errors']):.2%}",
            f"{one['bytes_per_step']:,}",
        ]
        for method, one in results.items()
    ]
    print_table(("", "step size", "accuracy", "by seed", "bytes per step"), rows)


if __name__ == "__main__":
    main()
