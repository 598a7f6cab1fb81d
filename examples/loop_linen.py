"""Train with Flax Linen: an unmodified `TrainState`, and one bit per parameter between workers.

The network is a small convolutional network, and the data are scikit-learn's 8x8 digits. The eight
workers are simulated on the CPU. `signax.DataParallel` is an ordinary Optax transformation: the
train state takes it as `tx`, and `apply_gradients` is unchanged. Only one line of a loop for a
single device changes: `tx.value_and_grad` computes the gradient, with one row per worker.

    python examples/loop_linen.py
    python examples/loop_linen.py --workers 4 --steps 100
    python examples/loop_linen.py --tensorboard runs/linen
"""

import argparse
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import signax

test_images = 400
batch_size = 128  # of all workers together
step_size, weight_decay = 2e-3, 5e-2


class Network(nn.Module):
    """A convolution and two dense layers."""

    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Conv(32, kernel_size=(3, 3))(images))
        x = nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = x.reshape(len(x), -1)
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x)))


def load_data():
    digits: Any = load_digits()  # scikit-learn does not type its result
    images = (digits.images[..., None] / 16).astype(np.float32)
    labels = digits.target.astype(np.int32)
    return train_test_split(images, labels, test_size=test_images, stratify=labels, random_state=0)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=8, help="simulated workers (default 8)")
    parser.add_argument("--steps", type=int, default=200, help="training steps (default 200)")
    parser.add_argument("--tensorboard", metavar="FOLDER", help="write metrics for TensorBoard")
    args = parser.parse_args()
    if min(args.workers, args.steps) < 1:
        parser.error("--workers and --steps must be at least 1")
    if batch_size % args.workers:
        parser.error(f"--workers {args.workers} does not divide the batch of {batch_size} images")

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.workers)
    mesh = jax.make_mesh((args.workers,), ("data",))

    schedule = optax.warmup_cosine_decay_schedule(0.0, step_size, args.steps // 20, args.steps)
    signum = signax.signum(schedule, axis_name="data", weight_decay=weight_decay)
    tx = signax.DataParallel(signum, mesh)

    train_images, held_out_images, train_labels, held_out_labels = load_data()
    network = Network()
    params = jax.jit(network.init)(jax.random.key(0), train_images[:1])
    # Parameters and step count start on all workers. Otherwise the first step moves them there,
    # and the second step compiles again for their new sharding.
    params, count = jax.device_put((params, 0), NamedSharding(mesh, PartitionSpec()))
    state = TrainState.create(apply_fn=network.apply, params=params, tx=tx).replace(step=count)

    def loss_fn(params, batch):
        images, labels = batch
        logits = state.apply_fn(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(state, batch):
        loss, grads = tx.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads=grads), loss

    step = jax.jit(step, donate_argnums=0)

    writer = None
    if args.tensorboard:
        from tensorboardX import SummaryWriter

        writer = SummaryWriter(args.tensorboard)

    rng = np.random.default_rng(0)
    losses = []
    progress = tqdm(range(args.steps), unit="step")
    for number in progress:
        chosen = rng.integers(len(train_images), size=batch_size)
        state, loss = step(state, (train_images[chosen], train_labels[chosen]))
        losses.append(float(loss))  # waits for the step
        progress.set_postfix(loss=losses[-1], refresh=False)
        if writer is not None:
            metrics = signax.diagnostics.metrics(state.opt_state)
            for name, value in {"loss": loss, **metrics}.items():
                writer.add_scalar(name, float(value), number)
    if writer is not None:
        writer.close()

    # All workers hold equal parameters: one copy is enough for the evaluation.
    logits = jax.jit(state.apply_fn)(jax.device_get(state.params), held_out_images)
    accuracy = jnp.mean(logits.argmax(axis=-1) == held_out_labels)
    print(f"Loss: {losses[0]:.4f} in the first step, {losses[-1]:.4f} in the last.")
    print(f"Test accuracy: {accuracy:.2%}")


if __name__ == "__main__":
    main()
