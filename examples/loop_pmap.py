"""Train in a plain `jax.pmap`: signax's transformations inside a mapped step, without a wrapper.

Under `jax.pmap` every array has a leading axis with one row per worker. Inside the step a worker
sees its own row. The state is Optax's, once for each worker: momenta differ between workers, but
parameters and counts must not differ. `jax.pmap` does not check this, so the program compares the
parameters at the end. In examples/loop_shard_map.py JAX's types prove that they are equal. The
network has two layers, and needs no library.

    python examples/loop_pmap.py
    python examples/loop_pmap.py --workers 4 --steps 100
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import signax

test_images = 400
batch_size = 128  # of all workers together
step_size, weight_decay = 3e-3, 2e-2


def load_data():
    digits: Any = load_digits()  # scikit-learn does not type its result
    images = (digits.data / 16).astype(np.float32)
    labels = digits.target.astype(np.int32)
    return train_test_split(images, labels, test_size=test_images, stratify=labels, random_state=0)


def init_network(rng):
    return [
        {
            "weight": (rng.normal(size=(n, m)) * np.sqrt(2 / n)).astype(np.float32),
            "bias": np.zeros(m, np.float32),
        }
        for n, m in ((64, 128), (128, 10))
    ]


def network(params, images):
    hidden, last = params
    x = jax.nn.relu(images @ hidden["weight"] + hidden["bias"])
    return x @ last["weight"] + last["bias"]


def loss_fn(params, images, labels):
    logits = network(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=8, help="simulated workers (default 8)")
    parser.add_argument("--steps", type=int, default=300, help="training steps (default 300)")
    args = parser.parse_args()
    if min(args.workers, args.steps) < 1:
        parser.error("--workers and --steps must be at least 1")
    if batch_size % args.workers:
        parser.error(f"--workers {args.workers} does not divide the batch of {batch_size} images")

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.workers)

    schedule = optax.warmup_cosine_decay_schedule(0.0, step_size, args.steps // 20, args.steps)
    tx = signax.signum(schedule, axis_name="workers", weight_decay=weight_decay)

    def step(params, state, images, labels):
        # The loss covers this worker's images only. Averaged gradients would leave no vote.
        loss, grads = jax.value_and_grad(loss_fn)(params, images, labels)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, jax.lax.pmean(loss, "workers")

    step = jax.pmap(step, axis_name="workers", donate_argnums=(0, 1))

    def split(array):
        return array.reshape(args.workers, batch_size // args.workers, *array.shape[1:])

    train_images, held_out_images, train_labels, held_out_labels = load_data()
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: np.stack([leaf] * args.workers), init_network(rng))
    # The mapped function places the rows as the step does. Otherwise the step compiles twice.
    place = jax.pmap(lambda params: (params, tx.init(params)), axis_name="workers")
    params, state = place(params)

    losses = []
    progress = tqdm(range(args.steps), unit="step")
    for _ in progress:
        chosen = rng.integers(len(train_images), size=batch_size)
        batch = split(train_images[chosen]), split(train_labels[chosen])
        params, state, loss = step(params, state, *batch)
        losses.append(float(loss[0]))  # waits for the step
        progress.set_postfix(loss=losses[-1], refresh=False)

    params = jax.device_get(params)
    if any((leaf != leaf[0]).any() for leaf in jax.tree.leaves(params)):
        raise RuntimeError("the parameters differ between workers")
    params = jax.tree.map(lambda leaf: leaf[0], params)
    accuracy = jnp.mean(network(params, held_out_images).argmax(axis=-1) == held_out_labels)
    print(f"Loss: {losses[0]:.4f} in the first step, {losses[-1]:.4f} in the last.")
    print(f"Test accuracy: {accuracy:.2%}")


if __name__ == "__main__":
    main()
