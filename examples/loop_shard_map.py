"""Train in a hand-written `jax.shard_map`, whose types prove that workers' parameters stay equal.

With `check_vma=True` JAX records in each array's type whether the array may vary between workers.
JAX sums a gradient with respect to non-varying parameters over the workers, in full precision and
before any vote. The step therefore casts the parameters to varying for the gradient. The result of
the vote does not vary, and neither do the new parameters. `out_specs` states this, and JAX raises
if it is wrong. Each worker's momentum is a row of one global array. `signax.DataParallel` does all
of this.

    python examples/loop_shard_map.py
    python examples/loop_shard_map.py --workers 4 --steps 100
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
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
    mesh = jax.make_mesh((args.workers,), ("data",))
    whole, rows = PartitionSpec(), PartitionSpec("data")

    schedule = optax.warmup_cosine_decay_schedule(0.0, step_size, args.steps // 20, args.steps)
    tx = signax.signum(schedule, axis_name="data", weight_decay=weight_decay)

    train_images, held_out_images, train_labels, held_out_labels = load_data()
    rng = np.random.default_rng(0)
    params = jax.device_put(init_network(rng), NamedSharding(mesh, whole))

    # Each worker has a row of momenta and missed steps. All workers share the counts.
    state_specs = signax.state_specs(tx, params, "data", dict(mesh.shape))

    def add_axis(state):
        return jax.tree.map(
            lambda leaf, spec: leaf[None] if spec == rows else leaf, state, state_specs
        )

    def drop_axis(state):
        return jax.tree.map(
            lambda leaf, spec: leaf.squeeze(0) if spec == rows else leaf, state, state_specs
        )

    def init(params):
        return add_axis(tx.init(params))

    def step(params, state, images, labels):
        # Without the cast JAX would sum the gradients over the workers, and signum would raise.
        own = jax.lax.pcast(params, "data", to="varying")
        loss, grads = jax.value_and_grad(loss_fn)(own, images, labels)
        updates, state = tx.update(grads, drop_axis(state), params)
        params = optax.apply_updates(params, updates)
        return params, add_axis(state), jax.lax.pmean(loss, "data")

    init = jax.shard_map(init, mesh=mesh, in_specs=whole, out_specs=state_specs, check_vma=True)
    step = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(whole, state_specs, rows, rows),
        out_specs=(whole, state_specs, whole),
        check_vma=True,
    )
    step = jax.jit(step, donate_argnums=(0, 1))
    state = jax.jit(init)(params)

    losses = []
    progress = tqdm(range(args.steps), unit="step")
    for _ in progress:
        chosen = rng.integers(len(train_images), size=batch_size)
        batch = train_images[chosen], train_labels[chosen]
        params, state, loss = step(params, state, *jax.device_put(batch, NamedSharding(mesh, rows)))
        losses.append(float(loss))  # waits for the step
        progress.set_postfix(loss=losses[-1], refresh=False)

    params = jax.device_get(params)
    accuracy = jnp.mean(network(params, held_out_images).argmax(axis=-1) == held_out_labels)
    print(f"Loss: {losses[0]:.4f} in the first step, {losses[-1]:.4f} in the last.")
    print(f"Test accuracy: {accuracy:.2%}")


if __name__ == "__main__":
    main()
