"""A worker of elastic_faults.py. The only argument is the worker's task, as JSON.

It begins with the parameters of the seed, replays the server's log, and votes until the run has had
all its steps. It keeps no checkpoint. It prints a JSON line after each step, with times of the
machine's monotonic clock, and a line with its parameters' digest at the end.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import signax.elastic

sys.path.append(str(Path(__file__).parents[1] / "examples"))


class Model(NamedTuple):
    """What a worker trains.

    Attributes:
      params: the first parameters.
      tx: the optimiser, with the exchange in it.
      loss_fn: the loss of a batch.
      batch_of: this worker's share of a step's batch.
      quality: the results of some parameters by name, on data that are held out.
    """

    params: Any
    tx: Any
    loss_fn: Callable[..., jax.Array]
    batch_of: Callable[[int], tuple[Any, ...]]
    quality: Callable[[Any], dict[str, float]]


def main() -> None:
    """Train until the run has had all its steps."""
    task = json.loads(sys.argv[1])
    slot, steps, pause = task["slot"], task["steps"], task["pause"]
    example: Any = importlib.import_module("elastic_worker")
    with signax.elastic.connect(task["address"], slot, insecure=True) as exchange:
        make = make_language_model if task["model"] == "language model" else make_digits
        model = make(task, exchange)
        params, state = model.params, model.tx.init(model.params)

        def update(params, state, grads):
            updates, state = model.tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        # The worker replays most of the log before it compiles the vote, and the rest afterwards,
        # so its first ballot is in time. JAX's compilation cache shortens all of this.
        gradient = jax.jit(jax.value_and_grad(model.loss_fn))
        compute = gradient.lower(params, *model.batch_of(0)).compile()
        params, state = exchange.catch_up(model.tx, params, state)
        vote = jax.jit(update).lower(params, state, params).compile()
        while True:
            time.sleep(task.get("input", 0.0))  # as of a slow disk
            params, state = exchange.catch_up(model.tx, params, state)
            if (step := exchange.step) >= steps:
                break
            batch = model.batch_of(step)
            start = time.monotonic()
            loss, grads = jax.block_until_ready(compute(params, *batch))
            time.sleep(pause)  # as of a larger model
            voted = time.monotonic()
            params, state = jax.block_until_ready(vote(params, state, grads))
            end = time.monotonic()
            voters = int(jnp.asarray(signax.participation(state).voters))
            times = {"start": start, "voted": voted, "end": end}
            report(step=step, loss=float(loss), voters=voters, **times)
        report(step=exchange.step, parameters=example.digest(params), **model.quality(params))


def make_digits(task: dict[str, Any], exchange: Any) -> Model:
    """The network and the optimiser of examples/elastic_worker.py, in the task's widths."""
    example: Any = importlib.import_module("elastic_worker")
    example.WIDTHS = tuple(task["widths"])
    images, held_out_images, labels, held_out_labels = example.load_data()

    def batch_of(step: int) -> tuple[Any, ...]:
        draw = np.random.default_rng((task["seed"], task["slot"], step))
        rows = draw.integers(len(images), size=task["batch_size"] // exchange.num_workers)
        return images[rows], labels[rows]

    def quality(params: Any) -> dict[str, float]:
        return {"accuracy": float(example.accuracy(params, held_out_images, held_out_labels))}

    params = jax.jit(example.init_params)(jax.random.key(task["seed"]))
    tx = signax.signum(1e-3, weight_decay=0.05, exchange=exchange)
    return Model(params, tx, example.loss_fn, batch_of, quality)


def make_language_model(task: dict[str, Any], exchange: Any) -> Model:
    """The GPT of examples/train_language_model.py, small, with its voted Lion and schedule."""
    example: Any = importlib.import_module("train_language_model")
    nnx: Any = importlib.import_module("flax.nnx")
    momentum = example.momenta["lion"]
    names = ("steps", "batch_size", "seed", "validation_windows")
    args = SimpleNamespace(
        **example.sizes["small"],
        **{name: task[name] for name in names},
        dtype="float32",
        step_size=example.step_sizes["lion"],
    )
    text, held_out = example.load_text()
    graph = nnx.split(nnx.eval_shape(lambda: example.GPT(args, nnx.Rngs(args.seed))))[0]
    params = jax.jit(lambda: nnx.split(example.GPT(args, nnx.Rngs(args.seed)))[1])()

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        logits = nnx.merge(graph, params)(batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    def batch_of(step: int) -> tuple[Any, ...]:
        draw = np.random.default_rng((args.seed, step))
        starts = draw.integers(len(text) - args.context, size=args.batch_size)
        return (
            example.windows(text, starts[exchange.index :: exchange.num_workers], args.context),
        )

    def quality(params: Any) -> dict[str, float]:
        starts = np.linspace(0, len(held_out) - args.context - 1, args.validation_windows)
        batch = example.windows(held_out, starts.astype(int), args.context)
        return {"validation_loss": float(jax.jit(loss_fn)(params, batch))}

    tx = signax.lion(
        example.make_schedule(args),
        b1=momentum,
        b2=(1 + momentum) / 2,
        exchange=exchange,
        **example.decay_options(args),
    )
    return Model(params, tx, loss_fn, batch_of, quality)


def report(**fields: Any) -> None:
    """Print a JSON line."""
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    main()
