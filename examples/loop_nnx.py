"""Train with Flax NNX: BatchNorm, dropout, clipping, votes on kernels, and means of other leaves.

An unmodified `nnx.Optimizer` takes `signax.DataParallel` as its transformation, and
`signax.flax.value_and_grad` takes the place of `nnx.value_and_grad`: each worker draws its own
dropout masks, and running statistics are averaged over the workers. Each worker clips its gradient
by its own norm. Kernels are voted on, with one bit per parameter. Biases and norm scales are few
and noisy, and are averaged for Adam. Only kernels decay.

    python examples/loop_nnx.py
    python examples/loop_nnx.py --workers 4 --steps 100
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import signax
import signax.flax

test_images = 400
batch_size = 128  # of all workers together
step_size, weight_decay = 2e-3, 5e-2
averaged_step = 5.0  # Adam's step size on averaged leaves, relative to a vote's
largest_norm = 1.0
dropout_rate = 0.2


class Network(nnx.Module):
    """A convolution and two dense layers, with BatchNorm and dropout."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 32, kernel_size=(3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.dense1 = nnx.Linear(4 * 4 * 32, 64, rngs=rngs)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)
        self.dense2 = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images):
        x = nnx.relu(self.norm(self.conv(images)))
        x = nnx.max_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = nnx.relu(self.dense1(x.reshape(len(x), -1)))
        return self.dense2(self.dropout(x))


def is_kernel(params):
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def group(params):
    return jax.tree.map(lambda kernel: "vote" if kernel else "mean", is_kernel(params))


def make_optimizer(steps):
    # A worker whose gradient is not finite keeps its momentum, and is excluded from the vote.
    momentum = signax.hold_if_nonfinite(signax.scale_by_signum())
    vote = optax.chain(momentum, signax.majority_vote("data"))
    adam = optax.chain(optax.scale_by_adam(), optax.scale(averaged_step))
    mean = optax.chain(signax.average_updates("data"), adam)
    schedule = optax.warmup_cosine_decay_schedule(0.0, step_size, steps // 20, steps)
    return optax.chain(
        # A sign has no scale. Clipping only changes the gradient's weight in the momentum.
        optax.clip_by_global_norm(largest_norm),
        optax.partition({"vote": vote, "mean": mean}, group),
        # From here on updates are equal on all workers.
        optax.add_decayed_weights(weight_decay, mask=is_kernel),
        optax.scale_by_learning_rate(schedule),
    )


def loss_fn(model, batch):
    images, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


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
    args = parser.parse_args()
    if min(args.workers, args.steps) < 1:
        parser.error("--workers and --steps must be at least 1")
    if batch_size % args.workers:
        parser.error(f"--workers {args.workers} does not divide the batch of {batch_size} images")

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.workers)
    mesh = jax.make_mesh((args.workers,), ("data",))
    tx = signax.DataParallel(make_optimizer(args.steps), mesh)

    # The model and the step count start on all workers. Otherwise the first step moves them there,
    # and the second step compiles again for their new sharding.
    everywhere = NamedSharding(mesh, PartitionSpec())
    model = Network(nnx.Rngs(0))
    nnx.update(model, jax.device_put(nnx.state(model), everywhere))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.step[...] = jax.device_put(optimizer.step[...], everywhere)

    @nnx.jit
    def step(model, optimizer, batch):
        loss, grads = signax.flax.value_and_grad(tx, loss_fn)(model, batch)
        optimizer.update(model, grads)
        return loss

    @nnx.jit
    def accuracy(model, images, labels):
        return jnp.mean(model(images).argmax(axis=-1) == labels)

    train_images, held_out_images, train_labels, held_out_labels = load_data()
    rng, losses = np.random.default_rng(0), []
    model.train()
    progress = tqdm(range(args.steps), unit="step")
    for _ in progress:
        chosen = rng.integers(len(train_images), size=batch_size)
        batch = train_images[chosen], train_labels[chosen]
        loss = step(model, optimizer, batch)
        losses.append(float(loss))  # waits for the step
        progress.set_postfix(loss=losses[-1], refresh=False)

    model.eval()
    # All workers hold an equal model: one copy is enough for the evaluation.
    nnx.update(model, jax.device_get(nnx.state(model)))
    correct = accuracy(model, held_out_images, held_out_labels)
    print(f"Loss: {losses[0]:.4f} in the first step, {losses[-1]:.4f} in the last.")
    print(f"Test accuracy: {correct:.2%}")


if __name__ == "__main__":
    main()
