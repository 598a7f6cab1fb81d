"""Print a digest of the program that signax builds for each of a dozen configurations.

`test_programs.py` runs this file with several values of PYTHONHASHSEED, which sets the order of
Python's sets. All processes of a run must build equal programs. Otherwise the run hangs.
"""

import hashlib
import itertools
import math

import jax
import jax.numpy as jnp
import optax
from jax import ShapeDtypeStruct
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import signax

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
INSIDE = {"data": 2, "fsdp": 2, "model": 2}
EVERY_ORDER = {
    "whole": PartitionSpec(),
    "rows": PartitionSpec("model"),
    "both": PartitionSpec("fsdp", "model"),
    "turned": PartitionSpec("model", "fsdp"),
    "joint": PartitionSpec(None, ("model", "fsdp")),
}


def vote_and_mean(axis_name, **options):
    """An optimiser that votes on some leaves and averages the others."""
    groups = {
        "vote": signax.signum(0.1, axis_name=axis_name, **options),
        "mean": optax.chain(signax.average_updates(axis_name), optax.adam(0.1)),
    }
    return optax.partition(
        groups, {name: "mean" if name in ("whole", "rows") else "vote" for name in EVERY_ORDER}
    )


def voted(axis_name, **options):
    return signax.signum(0.1, axis_name=axis_name, **options)


def scaled(axis_name, **options):
    return signax.ef_sign_sgd(0.1, axis_name=axis_name, **options)


SHARDED = {"param_specs": EVERY_ORDER}
# Each entry: the mesh, the type of its axes, the transformation, and DataParallel's options.
CONFIGURATIONS = {
    "vote": ({"data": 8}, AUTO, voted("data"), {}),
    "vote on blocks": (INSIDE, AUTO, voted("data"), SHARDED),
    "vote on blocks, Explicit axes": (INSIDE, EXPLICIT, voted("data"), SHARDED),
    "sums of blocks": (INSIDE, AUTO, voted("data", transport="sum"), SHARDED),
    "agreement on blocks": (INSIDE | {"data": 4}, AUTO, voted("data", agreement=True), SHARDED),
    "mean of signs of blocks": (INSIDE, AUTO, signax.mean_signs("data"), SHARDED),
    "scaled signs": ({"data": 8}, AUTO, scaled("data"), {}),
    "scaled signs of blocks": (INSIDE, AUTO, scaled("data", feedback="worker"), SHARDED),
    "vote and mean": ({"data": 8}, AUTO, vote_and_mean("data"), {}),
    "vote and mean of blocks": (INSIDE, AUTO, vote_and_mean("data"), SHARDED),
    "split vote": (
        {"data": 4, "chip": 2}, AUTO, voted("data", transport="packed", split_over="chip"), {},
    ),
    "split vote on blocks": (
        INSIDE | {"chip": 2}, AUTO, voted("data", split_over="chip"), SHARDED,
    ),
    "two axes of workers": ({"slice": 2, "data": 4}, AUTO, voted(("slice", "data")), {}),
    "two axes of workers, on blocks": (
        {"slice": 2, **INSIDE}, AUTO, voted(("slice", "data")), SHARDED,
    ),
    "local steps on blocks": (
        INSIDE, AUTO, voted("data"), {**SHARDED, "local": optax.adam(0.01)},
    ),
}  # fmt: skip


def lower(sizes, kind, tx, options):
    """The text of a training step's program."""
    mesh = jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(kind,) * len(sizes),
        devices=jax.devices()[: math.prod(sizes.values())],
    )
    axis_name = ("slice", "data") if "slice" in sizes else "data"
    data_parallel = signax.DataParallel(tx, mesh, axis_name, **options)
    specs = options.get("param_specs") or dict.fromkeys(EVERY_ORDER, PartitionSpec())
    params = {
        name: ShapeDtypeStruct((32, 64), jnp.float32, sharding=NamedSharding(mesh, spec))
        for name, spec in specs.items()
    }

    def loss_fn(params, batch):
        outputs = [batch @ leaf for leaf in params.values()]
        return sum(jnp.mean(jnp.square(output)) for output in outputs)

    number = "num_local_steps" if "local" in options else "accumulate"
    step = data_parallel.train_step(loss_fn, **{number: 2})
    state = data_parallel.abstract_state(params)
    batch = ShapeDtypeStruct((32, 32), jnp.float32)
    return step.lower(params, state, batch).as_text()


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 16)
    pairs = itertools.combinations(("data", "fsdp", "model", "chip", "slice"), 2)
    print("order of sets:", "".join(str([*{*pair}].index(pair[0])) for pair in pairs))
    for name, configuration in CONFIGURATIONS.items():
        text = lower(*configuration)
        print(f"{name}: {hashlib.sha256(text.encode()).hexdigest()}")
