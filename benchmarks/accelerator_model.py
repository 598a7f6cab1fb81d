"""The rows of accelerator.py that take whole steps: of optimisers, and of a language model.

Workers are simulated by `jax.vmap`. Parameters, and all state on which the workers agree, have no
axis of workers. A worker's own state, such as its momentum, has one.
"""

import argparse
import importlib
import importlib.util
import math
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import signax

AXIS = "workers"
TINY = {"layers": 1, "heads": 2, "width": 48, "context": 16, "vocabulary": 128}
STEP_SIZE = 1e-4

# What a step does with its carry (parameters and state) and a worker's gradients or batch.
Step = Callable[[Any, Any], tuple[Any, Any]]


class Row(NamedTuple):
    """A program to time.

    Attributes:
      group: the name of its group.
      name: its name within the group.
      init: a function, compiled too, that makes `carry` and `fixed`.
      program: a function of `carry`, which is donated, and `fixed`. It returns the next carry and
        other results.
      moved: the bytes that must move; 0 if other work matters more.
      reference: the name of the row in the same group with which this row is compared.
      tokens: the tokens of a batch.
    """

    group: str
    name: str
    init: Callable[[], tuple[Any, Any]]
    program: Callable[[Any, Any], tuple[Any, Any]]
    moved: float
    reference: str | None = None
    tokens: int | None = None


def noise(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> jax.Array:
    """Numbers in [-1, 1), or random words: a hash of each index, which compiles fast."""
    n = lax.iota(jnp.uint32, math.prod(shape)) + np.uint32(seed * 0x9E3779B9 % 2**32)
    n = (n ^ (n >> 16)) * np.uint32(0x85EBCA6B)
    n = (n ^ (n >> 13)) * np.uint32(0xC2B2AE35)
    n = n ^ (n >> 16)
    if jnp.issubdtype(dtype, jnp.floating):
        n = ((n >> 8).astype(jnp.float32) * np.float32(2**-23) - 1).astype(dtype)
    return n.reshape(shape)


def load_example() -> Any:
    """The module examples/train_language_model.py, even without the packages of its training."""
    for name in ("tqdm", "orbax", "orbax.checkpoint"):
        if name not in sys.modules and importlib.util.find_spec(name.partition(".")[0]) is None:
            stub: Any = types.ModuleType(name)
            stub.tqdm = stub.checkpoint = None
            sys.modules[name] = stub
    folder = str(Path(__file__).parents[1] / "examples")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("train_language_model")


def model_options(args: argparse.Namespace, example: Any, method: str) -> argparse.Namespace:
    """The options of the example for GPT-2 small, or for a tiny model."""
    size = TINY if args.tiny else example.sizes["gpt2"]
    tuned = {"step_size": STEP_SIZE, "momentum": example.momenta[method]}
    return argparse.Namespace(**size, **tuned, method=method, steps=1000, dtype="bfloat16")


def model_parts(example: Any, options: argparse.Namespace) -> tuple[Any, Any]:
    """The graph of the model, and the shapes of its parameters."""
    nnx = example.nnx
    return nnx.split(nnx.eval_shape(lambda: example.GPT(options, nnx.Rngs(0))))


# Simulated workers.


def find_own(step: Step, carry: Any, fixed: Any) -> list[bool]:
    """Whether each leaf of a carry differs between workers, once some steps are taken.

    `carry` has the shapes of one worker, and `fixed` has the shapes of all workers.
    """
    leaves, structure = jax.tree.flatten(carry)
    own = [False] * len(leaves)
    workers = jax.tree.leaves(fixed)[0].shape[0]
    while True:
        found = list(own)

        def traced(leaves: list[Any], fixed: Any, found: list[bool] = found) -> Any:
            carry, out = step(structure.unflatten(leaves), fixed)
            for n, leaf in enumerate(jax.tree.leaves(carry)):
                # `vmap` follows which values it has given an axis.
                found[n] |= isinstance(getattr(leaf, "batch_dim", None), int)
            return out

        mapped = jax.vmap(traced, in_axes=(in_axes(own), 0), axis_name=AXIS)
        jax.eval_shape(mapped, stacked(leaves, own, workers), fixed)
        if found == own:
            return own
        own = found


def in_axes(own: list[bool]) -> list[int | None]:
    return [0 if each else None for each in own]


def stacked(leaves: list[Any], own: list[bool], workers: int) -> list[Any]:
    """The leaves of a carry of all workers: those that differ get an axis."""

    def stack(leaf: Any, each: bool) -> Any:
        shape = (workers, *leaf.shape) if each else leaf.shape
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(shape, leaf.dtype)
        return jnp.broadcast_to(leaf, shape)

    return [stack(leaf, each) for leaf, each in zip(leaves, own, strict=True)]


def simulated(
    step: Step, start: Callable[[], Any], inputs: Callable[[], Any], own: list[bool]
) -> tuple[Callable, Callable]:
    """A row's `init` and `program`, of the steps of all workers."""
    structure = jax.tree.structure(jax.eval_shape(start))

    def one(leaves: list[Any], fixed: Any) -> Any:
        carry, out = step(structure.unflatten(leaves), fixed)
        return jax.tree.leaves(carry), out

    def init() -> Any:
        fixed = inputs()
        workers = jax.tree.leaves(fixed)[0].shape[0]
        return stacked(jax.tree.leaves(start()), own, workers), fixed

    axes = in_axes(own)
    program = jax.vmap(one, in_axes=(axes, 0), out_axes=(axes, 0), axis_name=AXIS)
    return init, program


def carried_bytes(start: Callable[[], Any], own: list[bool], workers: int) -> int:
    """The size of the carry of all workers."""
    leaves = jax.tree.leaves(jax.eval_shape(start))
    whole = stacked(leaves, own, workers)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in whole)


# Steps of optimisers.


def optimizers(example: Any, workers: int) -> dict[str, Any]:
    """The optimisers by name, the reference first."""
    mean = signax.average_updates(AXIS)
    voted: dict[str, Any] = {"axis_name": AXIS}
    return {
        "sgd": optax.chain(mean, optax.sgd(STEP_SIZE, momentum=0.9)),
        "adamw": optax.chain(mean, optax.adamw(STEP_SIZE)),
        "signum": signax.signum(STEP_SIZE, **voted),
        "lion": signax.lion(STEP_SIZE, **voted),
        "muon": signax.muon(STEP_SIZE, weight_dimension_numbers=example.matrices, **voted),
        "ef_sign_sgd": signax.ef_sign_sgd(STEP_SIZE, num_workers=workers, **voted),
    }


def steps(args: argparse.Namespace) -> Iterator[Row]:
    """Steps of optimisers, on fixed gradients of the model's shapes."""
    example = load_example()
    _, params = model_parts(example, model_options(args, example, "lion"))
    # Names tell the embeddings, which Muon does not orthogonalise.
    shapes = {
        jax.tree_util.keystr(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    own: dict[str, list[bool]] = {}
    for workers in [args.voters] if args.tiny else dict.fromkeys((args.voters, 1)):
        for dtype in (jnp.float32, jnp.bfloat16):
            suffix = f"{workers} voter{'s' if workers > 1 else ''}, {np.dtype(dtype).name}"
            for name, tx in optimizers(example, workers).items():
                reference = None if name == "sgd" else f"sgd, {suffix}"
                yield step_row(f"{name}, {suffix}", tx, shapes, workers, dtype, reference, own)


def step_row(
    name: str,
    tx: Any,
    shapes: dict[str, tuple[int, ...]],
    workers: int,
    dtype: Any,
    reference: str | None,
    known: dict[str, list[bool]],
) -> Row:
    """The step of one optimiser, in parameters of f32 and with gradients of `dtype`."""

    def start() -> Any:
        params = {key: 0.02 * noise(shape, jnp.float32) for key, shape in shapes.items()}
        return params, tx.init(params)

    def gradients() -> Any:
        return {key: noise((workers, *shape), dtype, 1) for key, shape in shapes.items()}

    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), ()

    optimizer, size = name.partition(",")[0], sum(map(math.prod, shapes.values()))
    if optimizer not in known:
        shape = jax.eval_shape(start), jax.eval_shape(gradients)
        known[optimizer] = find_own(step, *shape)
    own = known[optimizer]
    init, program = simulated(step, start, gradients, own)
    moved = 2 * carried_bytes(start, own, workers) + workers * size * np.dtype(dtype).itemsize
    if optimizer not in ("sgd", "adamw"):
        moved += (workers + 1) * size / 4  # messages, written and read, and the reply
    return Row("step", name, init, program, moved, reference)


# Steps of the language model.


def models(args: argparse.Namespace) -> Iterator[Row]:
    """Training steps of the language model, with gradients."""
    example = load_example()
    reference = "adamw on the mean"
    names = {reference: "adamw", "lion, voted": "lion", "muon, voted": "muon"}
    for name, method in names.items():
        options = model_options(args, example, method)
        yield model_row(name, options, example, args, None if name == reference else reference)


def model_row(
    name: str,
    options: argparse.Namespace,
    example: Any,
    args: argparse.Namespace,
    reference: str | None,
) -> Row:
    """The training step of one optimiser."""
    graph, shapes = model_parts(example, options)
    tx = example.make_optimizer(options, AXIS)

    def start() -> Any:
        params = jax.tree.map(lambda leaf: 0.02 * noise(leaf.shape, leaf.dtype), shapes)
        return params, tx.init(params)

    def batch() -> Any:
        tokens = noise((args.voters, args.rows, options.context + 1), jnp.uint32)
        return (tokens % options.vocabulary).astype(jnp.int32)

    def loss_fn(params: Any, batch: jax.Array) -> jax.Array:
        logits = example.nnx.merge(graph, params)(batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    def step(carry: Any, batch: jax.Array) -> Any:
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    own = find_own(step, jax.eval_shape(start), jax.eval_shape(batch))
    init, program = simulated(step, start, batch, own)
    tokens = args.voters * args.rows * options.context
    return Row("model", name, init, program, 0, reference, tokens)
