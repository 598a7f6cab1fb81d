"""Time how a job catches up that has missed many votes.

A job trains the language model of examples/train_language_model.py by voted Lion, through a vote
server on this machine that makes a decision of each ballot. Another job starts from the first
parameters, and replays all decisions of the server's log. Both times include the compilation of
their programs. At the end both jobs must hold the same parameters, bit for bit.

    python benchmarks/elastic_replay.py
    python benchmarks/elastic_replay.py --steps 20 --layers 2 --heads 2 --width 64

The default model has 10.6 million parameters, so a decision has 1.3 MB. The job's batch is one
worker's share of the example's batch, four windows, which favours training in the comparison: with
larger batches a step takes longer, and a replay does not.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from accelerator_model import load_example
from flax import nnx
from namespaces import loopback
from report import print_table, save
from vote_server import serving

import signax
import signax.elastic

here = Path(__file__).parent
example = load_example()


def main() -> None:
    """Train, replay, compare, and save the times."""
    args = parse_arguments()
    model = Model(args)
    with tempfile.TemporaryDirectory() as folder, loopback(1) as links:
        with serving(links, 2, Path(folder), quorum=1, deadline="100ms") as server:
            trained, training = model.run(server.address, 0, train=True)
            replayed, replaying = model.run(server.address, 1, train=False)
        log_bytes = sum(path.stat().st_size for path in Path(folder).glob("votes*.db*"))
    if not all(jax.tree.leaves(jax.tree.map(np.array_equal, trained, replayed))):
        raise SystemExit("error: the replay has led to other parameters than the training")
    result = {
        "parameters": model.size,
        "steps": args.steps,
        "training_seconds": training,
        "replay_seconds": replaying,
        "share": replaying / training,
        "log_bytes": log_bytes,
    }
    save(args.json, "elastic_replay", vars(args), result)
    head = ("parameters", "steps", "training s", "replay s", "share", "log MB")
    row = [f"{model.size:,}", f"{args.steps}", f"{training:.1f}", f"{replaying:.1f}"]
    print_table(head, [[*row, f"{replaying / training:.1%}", f"{log_bytes / 1e6:.0f}"]])


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=500, help="(default 500)")
    add("--windows", type=int, default=4, help="of the job's batch (default 4)")
    sizes = {"layers": 6, "heads": 6, "width": 384, "context": 64, "vocabulary": 128}
    for name, size in sizes.items():
        add(f"--{name}", type=int, default=size, help=f"(default {size})")
    add("--json", default=str(here / "results" / "elastic_replay.json"), metavar="FILE")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps {args.steps} must be at least 1")
    return args


class Model:
    """The language model, its text and its first parameters."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        settings = argparse.Namespace(**vars(args), dtype=jnp.float32)
        self.graph, self.params = nnx.split(example.GPT(settings, nnx.Rngs(0)))
        self.size = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        self.text, _ = example.load_text()

    def run(self, address: str, slot: int, train: bool) -> tuple[Any, float]:
        """Train a job to the last step, or only catch up; return its parameters, and the time."""
        with signax.elastic.connect(address, slot) as exchange:
            tx = signax.lion(1e-3, 0.6, 0.8, weight_decay=1e-3, exchange=exchange)

            @jax.jit
            def train_step(params, state, batch):
                grads = jax.grad(self.loss)(params, batch)
                updates, state = tx.update(grads, state, params)
                return optax.apply_updates(params, updates), state

            start = time.perf_counter()
            params, state = self.params, tx.init(self.params)
            params, state = exchange.catch_up(tx, params, state)
            while train and exchange.step < self.args.steps:
                params, state = train_step(params, state, self.batch(exchange.step))
                params, state = exchange.catch_up(tx, params, state)
            params = jax.block_until_ready(params)
            return params, time.perf_counter() - start

    def loss(self, params: Any, batch: Any) -> jax.Array:
        """The cross-entropy of a batch."""
        logits = nnx.merge(self.graph, params)(batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    def batch(self, step: int) -> Any:
        """The windows of a step."""
        context = self.args.context
        rng, windows = np.random.default_rng(step), self.args.windows
        starts = rng.integers(len(self.text) - context, size=windows)
        return example.windows(self.text, starts, context)


if __name__ == "__main__":
    main()
