"""Train a small convolutional network on eight simulated workers, once by means, once by votes.

The data are scikit-learn's 1,797 handwritten digits of 8x8 pixels, part of its package. The first
run is AdamW on gradients averaged in full precision. The second run is signum with a majority vote,
one bit per parameter in each direction. At the end the program shows a table and a figure of both.

    python examples/train_digits.py
    python examples/train_digits.py --seed 1 --json digits.json --figure digits.png
    python examples/train_digits.py --workers 4 --steps 200

The workers are threads of this machine. The step time therefore contains no time of a network. The
table shows the bytes that each worker would send, read from the compiled program.
"""

import argparse
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import signax

test_images = 400
evaluate_every = 10

# A vote moves every parameter by the whole step size, and needs a smaller step size than AdamW.
# Both runs shrink weights by the same share per step, step size times decay.
adamw_step_size, adamw_decay = 5e-3, 1e-2
signum_step_size, signum_decay = 1e-3, 5e-2


class Network(nnx.Module):
    """Two convolutions and two dense layers, 60,522 parameters."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 24, kernel_size=(3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(24, 48, kernel_size=(3, 3), rngs=rngs)
        self.dense1 = nnx.Linear(4 * 4 * 48, 64, rngs=rngs)
        self.dense2 = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images):
        x = nnx.relu(self.conv1(images))
        x = nnx.relu(self.conv2(x))
        x = nnx.max_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = x.reshape(len(x), -1)
        return self.dense2(nnx.relu(self.dense1(x)))


def load_data():
    digits: Any = load_digits()  # scikit-learn does not type its result
    images = (digits.images[..., None] / 16).astype(np.float32)
    labels = digits.target.astype(np.int32)
    return train_test_split(images, labels, test_size=test_images, stratify=labels, random_state=0)


def batches(images, labels, batch_size, seed):
    rng = np.random.default_rng(seed)
    while True:
        chosen = rng.integers(len(images), size=batch_size)
        yield {"image": images[chosen], "label": labels[chosen]}


def train(name, optimizer, mesh, args):
    train_images, held_out_images, train_labels, held_out_labels = load_data()
    stream = batches(train_images, train_labels, args.batch_size, args.seed)
    graph, params = nnx.split(Network(nnx.Rngs(args.seed)))

    def loss_fn(params, batch):
        logits = nnx.merge(graph, params)(batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    @jax.jit
    def accuracy(params):
        predicted = nnx.merge(graph, params)(held_out_images).argmax(axis=-1)
        return jnp.mean(predicted == held_out_labels)

    tx = signax.DataParallel(optimizer, mesh)
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    state = tx.init(params)
    step = tx.train_step(loss_fn).lower(params, state, next(stream)).compile()

    curve = {"step": [], "loss": [], "test_accuracy": []}
    losses, seconds = [], []
    progress = tqdm(range(1, args.steps + 1), desc=name, unit="step")
    for number in progress:
        batch = next(stream)
        start = time.perf_counter()
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))  # waits for the step
        seconds.append(time.perf_counter() - start)
        if number % evaluate_every == 0 or number == args.steps:
            curve["step"].append(number)
            curve["loss"].append(float(np.mean(losses)))
            curve["test_accuracy"].append(float(accuracy(jax.device_get(params))))
            progress.set_postfix(loss=curve["loss"][-1], accuracy=curve["test_accuracy"][-1])
            losses = []

    return {
        "name": name,
        "test_accuracy": curve["test_accuracy"][-1],
        "bytes_per_step": signax.diagnostics.collective_bytes(step),
        "step_milliseconds": 1e3 * float(np.median(seconds)),
        "curve": curve,
    }


def print_table(averaged, voted):
    print(f"\n{'':24}{'test accuracy':>15}{'bytes per step':>16}{'step time':>13}")
    for run in (averaged, voted):
        print(
            f"{run['name']:24}{run['test_accuracy']:>15.2%}{run['bytes_per_step']:>16,}"
            f"{run['step_milliseconds']:>10.1f} ms"
        )
    if voted["bytes_per_step"]:  # a single worker sends nothing
        ratio = averaged["bytes_per_step"] / voted["bytes_per_step"]
        print(f"Bytes are what one worker sends. The vote sends {ratio:.1f} times fewer.")


def save_figure(runs, filename):
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for run in runs:
        steps, accuracies = run["curve"]["step"], np.multiply(run["curve"]["test_accuracy"], 100)
        sent = np.multiply(steps, run["bytes_per_step"]) / 1e6
        label = f"{run['name']}: {run['bytes_per_step'] / 1000:,.0f} kB per step"
        left.plot(steps, accuracies, linewidth=2)
        right.plot(sent, accuracies, linewidth=2, label=label)
    # The axis shows the runs' final accuracies in detail, unless the runs are too short.
    lowest = 85 if all(run["test_accuracy"] > 0.9 for run in runs) else 0
    left.set(xlabel="steps", ylabel="test accuracy (%)", ylim=(lowest, 100))
    left.set_title("Test accuracy by steps")
    scale = "log" if all(run["bytes_per_step"] for run in runs) else "linear"
    right.set(xlabel="megabytes sent by each worker", xscale=scale)
    right.set_title("Test accuracy by megabytes sent")
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(filename, dpi=150)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=8, help="simulated workers (default 8)")
    parser.add_argument("--steps", type=int, default=400, help="steps of each run (default 400)")
    parser.add_argument(
        "--batch-size", type=int, default=128, help="images per step, all workers' (default 128)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default 0)")
    parser.add_argument("--json", metavar="FILE", help="write the table and the curves to FILE")
    parser.add_argument(
        "--figure", metavar="FILE", default="digits.png", help="(default digits.png)"
    )
    args = parser.parse_args()
    if min(args.workers, args.steps, args.batch_size) < 1:
        parser.error("--workers, --steps and --batch-size must be at least 1")
    if args.batch_size % args.workers:
        parser.error(f"--batch-size {args.batch_size} is no multiple of --workers {args.workers}")

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.workers)
    mesh = jax.make_mesh((args.workers,), ("data",))

    def schedule(peak):
        return optax.warmup_cosine_decay_schedule(0.0, peak, args.steps // 20, args.steps)

    adamw = optax.adamw(schedule(adamw_step_size), weight_decay=adamw_decay)
    averaged = train(
        "AdamW, averaged", optax.chain(signax.average_updates("data"), adamw), mesh, args
    )
    signum = signax.signum(schedule(signum_step_size), axis_name="data", weight_decay=signum_decay)
    voted = train("signum, majority vote", signum, mesh, args)

    print_table(averaged, voted)
    save_figure([averaged, voted], args.figure)
    print(f"Both curves are in {args.figure}.")
    if args.json:
        settings = {
            name: getattr(args, name) for name in ("workers", "steps", "batch_size", "seed")
        }
        with open(args.json, "w") as file:
            json.dump({**settings, "averaged": averaged, "voted": voted}, file, indent=2)


if __name__ == "__main__":
    main()
