r"""Programs compiled for absent TPU pods and GPUs, without running them.

A topology describes devices to XLA's compilers, which libtpu and JAX's CUDA plugin include. The
compiled program shows the messages, the memory and the memory traffic of a step.

    JAX_PLATFORMS=cpu .venv-accelerators/bin/python tests/accelerators.py \
        --json benchmarks/results/accelerators.json

prints these numbers for every target, and the time of compilation.
"""

import argparse
import functools
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import re
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers

import signax
from signax import diagnostics
from signax._hlo.program import Computation, Instruction, called, operands, parse, trip_count

# Compiling takes minutes and large packages, so it runs only on request.
REQUESTED = "SIGNAX_ACCELERATORS" in os.environ

# Without the first three variables libtpu asks a cloud's metadata server. Without the last one the
# CUDA plugin needs a driver.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}

_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Target(NamedTuple):
    """Devices to compile for; the workers lie along the first axis of the mesh."""

    topology: dict[str, Any]
    axes: dict[str, int]


def _tpu(name: str, **options: Any) -> dict[str, Any]:
    return {"platform": "tpu", "topology_name": name, **options}


def _h100(number: int) -> dict[str, Any]:
    return {"platform": "cuda", "topology": f"1x{number}x1", "target_config": _H100}


TARGETS = {
    "v5e-8": Target(_tpu("v5e:2x4"), {"data": 8}),
    "v5e-256": Target(_tpu("v5e:16x16"), {"data": 256}),
    "v5p-512": Target(_tpu("v5p:8x8x8"), {"data": 512}),
    "v5e-4x16": Target(_tpu("v5e:4x4", num_slices=4), {"slice": 4, "chip": 16}),
    "h100-8": Target(_h100(8), {"data": 8}),
}


def _gpt2_small() -> dict[str, tuple[int, ...]]:
    """124.5 M parameters in 196 leaves: separate queries, keys and values, and a tied embedding.

    The vocabulary is padded to a multiple of 64, as is usual for accelerators.
    """
    width, wide = 768, 3072
    shapes = {"wte": (50304, width), "wpe": (1024, width)}
    for layer in range(12):
        kernels = dict.fromkeys(["query", "key", "value", "out"], (width, width))
        kernels |= {"up": (width, wide), "down": (wide, width)}
        for name, shape in kernels.items():
            shapes[f"{layer}.{name}.kernel"] = shape
            shapes[f"{layer}.{name}.bias"] = shape[1:]
        for name in "norm_1", "norm_2":
            shapes[f"{layer}.{name}.scale"] = shapes[f"{layer}.{name}.bias"] = (width,)
    return shapes | {"norm.scale": (width,), "norm.bias": (width,)}


TREES = {"leaf": {"kernel": (8192, 8192)}, "gpt2": _gpt2_small()}


class Program(NamedTuple):
    """The costs of a compiled program.

    Attributes:
      collectives: the collectives of one device, with the mesh axes that they cross.
      num_partitions: the number of devices of the program; for a pod of slices, of one slice. Only
        "megascale" operations leave a slice.
      temporary_bytes: the memory besides arguments and results.
      bytes_accessed: reads and writes of memory by the compiler's cost model, NaN without one.
      seconds: the time to lower and compile.
      text: the compiled HLO.
    """

    collectives: list[diagnostics.Collective]
    num_partitions: int
    temporary_bytes: int
    bytes_accessed: float
    seconds: float
    text: str


@functools.cache
def mesh_of(target: str) -> Mesh:
    topology, axes = TARGETS[target]
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)  # compilers read the environment when they are loaded
    described = topologies.get_topology_desc(**topology)
    devices = np.array(described.devices).reshape(tuple(axes.values()))
    return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def num_parameters(tree: str) -> int:
    return sum(int(np.prod(shape)) for shape in TREES[tree].values())


@functools.cache
def vote_program(target: str, tree: str) -> Program:
    """A step of voted signum, from gradients to new parameters."""
    return _update_program(_voted_signum(mesh_of(target)), tree)


@functools.cache
def feedback_program(target: str, tree: str) -> Program:
    """A step of signSGD with momentum and error feedback in both directions."""
    optimizer = signax.ef_sign_sgd(1e-3, 0.9, axis_name="data")
    return _update_program(signax.DataParallel(optimizer, mesh_of(target)), tree)


@functools.cache
def muon_program(target: str, tree: str) -> Program:
    """A step of voted Muon. Kernels are its matrices, embeddings are not."""
    optimizer = signax.muon(1e-3, weight_dimension_numbers=_kernels, axis_name="data")
    return _update_program(signax.DataParallel(optimizer, mesh_of(target)), tree)


def _kernels(params: dict[str, Any]) -> dict[str, MuonDimensionNumbers | None]:
    return {name: MuonDimensionNumbers() if name.endswith("kernel") else None for name in params}


def _update_program(tx: signax.DataParallel, tree: str) -> Program:
    params, grads = {}, {}
    for name, shape in TREES[tree].items():
        params[name] = _array(shape, tx.mesh)
        grads[name] = _array((tx.num_workers, *shape), tx.mesh, tx.axis_name)
    return _compile(_step(tx), params, tx.abstract_state(params), grads)


@functools.cache
def sgd_program(target: str, tree: str) -> Program:
    """A step of SGD with momentum on one of the target's devices."""
    mesh = Mesh(mesh_of(target).devices.flat[:1], ("one",))
    params = {name: _array(shape, mesh) for name, shape in TREES[tree].items()}
    tx = optax.sgd(1e-3, momentum=0.9)
    state = jax.tree.map(lambda leaf: _array(leaf.shape, mesh), jax.eval_shape(tx.init, params))
    return _compile(_step(tx), params, state, params)


@functools.cache
def train_program(target: str, width: int) -> Program:
    """A whole training step of a network of 8 width^2 weights, 8 samples on every device."""
    mesh = mesh_of(target)
    tx = _voted_signum(mesh)
    params = {"up": _array((width, 4 * width), mesh), "down": _array((4 * width, width), mesh)}
    batch = _array((8 * mesh.size, width), mesh, tuple(mesh.axis_names))

    def loss_fn(params, batch):
        return jax.numpy.mean((jax.nn.relu(batch @ params["up"]) @ params["down"] - batch) ** 2)

    return _compile(tx.train_step(loss_fn), params, tx.abstract_state(params), batch)


def _voted_signum(mesh: Mesh) -> signax.DataParallel:
    workers, *inside = mesh.axis_names
    options = {"split_over": inside[0]} if inside else {}
    return signax.DataParallel(signax.signum(1e-3, axis_name=workers, **options), mesh, workers)


def _array(shape: tuple[int, ...], mesh: Mesh, *spec: Any) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, "float32", sharding=sharding)


def _step(tx: optax.GradientTransformation) -> jax.stages.Wrapped:
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def _compile(function: jax.stages.Wrapped, *args: Any) -> Program:
    start = time.perf_counter()
    compiled = function.lower(*args).compile()
    seconds = time.perf_counter() - start
    text, costs = compiled.as_text() or "", compiled.cost_analysis() or {}
    [num_partitions] = re.findall(r"^HloModule .*\bnum_partitions=(\d+)", text) or [1]
    mesh = jax.tree.leaves(args)[0].sharding.mesh
    return Program(
        collectives=diagnostics.collectives(compiled, mesh=mesh),
        num_partitions=int(num_partitions),
        temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
        bytes_accessed=costs.get("bytes accessed", math.nan),
        seconds=seconds,
        text=text,
    )


def product_operations(program: Program) -> int:
    """The additions and multiplications in a program's products of matrices.

    The compilers' cost models count the body of a loop once, and a GPU's is missing.
    """
    parsed = parse(program.text)
    computations = parsed.computations

    @functools.cache
    def count(name: str) -> int:
        scope = computations[name]
        return sum(_product(each, scope) + nested(each) for each in scope.values())

    def nested(instruction: Instruction) -> int:
        found = sum(map(count, called(instruction, "calls|body|to_apply|branch_computations")))
        return found and found * repetitions(instruction)

    def repetitions(instruction: Instruction) -> int:
        if instruction.opcode != "while":
            return 1
        # TPU compilers do not write the trip count, but the condition compares with it.
        [condition] = called(instruction, "condition")
        scope = computations[condition].values()
        limits = [int(each.rest.split(")")[0]) for each in scope if each.opcode == "constant"]
        return trip_count(instruction, limits[0] if len(limits) == 1 else None)

    return count(parsed.entry)


def _product(instruction: Instruction, scope: Computation) -> int:
    """The operations of an instruction: two for each summand of each element of a product."""
    if instruction.opcode == "dot":
        [summed] = re.findall(r"lhs_contracting_dims=\{([\d,]+)\}", instruction.rest)
        axes = [int(axis) for axis in summed.split(",")]
    elif instruction.opcode == "convolution":  # how TPUs multiply; b and f are rows and columns
        [labels] = re.findall(r"dim_labels=([bf]{2})_", instruction.rest)
        axes = [labels.index("f")]
    else:
        return 0
    left = _sizes(scope[operands(instruction.rest)[0]])
    return 2 * math.prod(_sizes(instruction)) * math.prod(left[axis] for axis in axes)


def _sizes(instruction: Instruction) -> list[int]:
    [sizes] = re.findall(r"^\w+\[([\d,]+)\]", instruction.shape)
    return [int(size) for size in sizes.split(",")]


def main() -> None:
    """Print a line for each target and tree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="write the same to FILE")
    args = parser.parse_args()
    results = []
    print("target    tree   sent (d/8 bytes)  temporary (4d)  traffic (d bytes)  compiled in")
    for target, tree in itertools.product(TARGETS, TREES):
        program, d = vote_program(target, tree), num_parameters(tree)
        sent = sum(record.bytes_sent * record.count for record in program.collectives)
        print(
            f"{target:9} {tree:5} {8 * sent / d:17.3f} {program.temporary_bytes / 4 / d:15.2%} "
            f"{program.bytes_accessed / d:18.1f} {program.seconds:9.1f} s",
            flush=True,
        )
        shared = {"target": target, "devices": math.prod(TARGETS[target].axes.values())}
        operations = [
            {
                "operation": one.operation,
                "dtype": one.dtype,
                "bytes_sent": one.bytes_sent * one.count,
            }
            for one in program.collectives
        ]
        results.append({**shared, "tree": tree, "parameters": d, "collectives": operations})
    if args.json:
        packages = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
        report = {"versions": packages, "results": results}
        pathlib.Path(args.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
