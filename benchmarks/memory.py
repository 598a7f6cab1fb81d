"""Measure what each optimiser keeps on a device, in copies of the parameters.

    python benchmarks/memory.py
    python benchmarks/memory.py --workers 8 --parameters 10_000_000

`state` is the size of a compiled step's parameters and optimiser state on one of several simulated
devices, divided by the size of the parameters. Gradients, one more copy for every optimiser, are
not counted. `temporary` is what the step needs beyond its arguments and results. CPUs and
accelerators keep the same state, but a program for another platform has other temporaries.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from report import print_table, save

import signax

here = Path(__file__).parent
AXIS = "data"

optimizers: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": lambda: optax.chain(signax.average_updates(AXIS), optax.adamw(1e-4)),
    "sgd": lambda: optax.chain(signax.average_updates(AXIS), optax.sgd(1e-4)),
    "sgd, momentum": lambda: optax.chain(signax.average_updates(AXIS), optax.sgd(1e-4, 0.9)),
    "sign_sgd": lambda: signax.sign_sgd(1e-4, axis_name=AXIS),
    "signum": lambda: signax.signum(1e-4, axis_name=AXIS),
    "lion": lambda: signax.lion(1e-4, axis_name=AXIS),
    "muon": lambda: signax.muon(1e-4, axis_name=AXIS),
    "ef_muon": lambda: signax.ef_muon(1e-4, axis_name=AXIS),
    "muon on the mean": lambda: optax.chain(signax.average_updates(AXIS), optax.contrib.muon(1e-4)),
    "one_bit_adam": lambda: signax.one_bit_adam(1e-4, warmup_steps=100, axis_name=AXIS),
    "ssdm": lambda: signax.ssdm(1e-4, key=jax.random.key(0), axis_name=AXIS),
    "ef_sign_sgd": lambda: signax.ef_sign_sgd(1e-4, axis_name=AXIS),
    "ef_sign_sgd, momentum": lambda: signax.ef_sign_sgd(1e-4, momentum=0.9, axis_name=AXIS),
}


def main() -> None:
    """Compile a step of every optimiser, and print and save what it keeps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=4, help="simulated devices (default 4)")
    parser.add_argument(
        "--parameters", type=int, default=1 << 20, help="in one square f32 matrix (default 2^20)"
    )
    parser.add_argument(
        "--json", metavar="FILE", default=str(here / "results" / "memory.json"), help="results"
    )
    args = parser.parse_args()
    if min(args.workers, args.parameters) < 1:
        parser.error("--workers and --parameters must be at least 1")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.workers)
    side = round(args.parameters**0.5)
    found = {name: measure(make(), (side, side)) for name, make in optimizers.items()}
    rows = [
        (name, *(f"{value:.2f}" for value in copies.values())) for name, copies in found.items()
    ]
    print_table(("copies of the parameters", "state", "temporary"), rows)
    save(args.json, "memory", vars(args), found)
    print(f"\nResults are in {args.json}.")


def measure(optimizer: optax.GradientTransformation, shape: tuple[int, ...]) -> dict[str, float]:
    """What a step of an optimiser keeps on each device, in copies of the parameters."""
    mesh = jax.make_mesh((jax.device_count(),), (AXIS,))
    tx = signax.DataParallel(optimizer, mesh)
    params = jax.device_put(jnp.zeros(shape), NamedSharding(mesh, PartitionSpec()))
    rows = jax.device_put(
        jnp.zeros((tx.num_workers, *shape)), NamedSharding(mesh, PartitionSpec(AXIS))
    )

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    program = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), rows).compile()
    memory: Any = program.memory_analysis()
    kept = memory.argument_size_in_bytes - params.nbytes  # without the device's row of gradients
    return {"state": kept / params.nbytes, "temporary": memory.temp_size_in_bytes / params.nbytes}


if __name__ == "__main__":
    main()
