"""One worker of an elastic run: a JAX job of its own, which trains on scikit-learn's digits.

    python examples/elastic_worker.py --address 127.0.0.1:7443 --slot 0

elastic.py starts a vote server and several of these, and kills them. A worker keeps no checkpoint:
it begins with the parameters of the seed, replays the decisions in the server's log, and goes on
from there with the others. It prints a JSON line after each step, and at the end.
"""

import argparse
import hashlib
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import signax.elastic

WIDTHS = (64, 128, 10)


def main() -> None:
    """Train until the run has had all its steps."""
    args = parse_arguments()
    images, held_out_images, labels, held_out_labels = load_data()
    with signax.elastic.connect(args.address, args.slot) as exchange:
        tx = signax.signum(1e-3, weight_decay=0.05, exchange=exchange)
        params = init_params(jax.random.key(args.seed))
        state = tx.init(params)

        @jax.jit
        def train_step(params, state, images, labels):
            loss, grads = jax.value_and_grad(loss_fn)(params, images, labels)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        while True:
            params, state = exchange.catch_up(tx, params, state)
            if exchange.step >= args.steps:
                break
            step = exchange.step
            rows = np.random.default_rng((args.seed, args.slot, step)).integers(len(images), size=8)
            params, state, loss = train_step(params, state, images[rows], labels[rows])
            voters = jnp.asarray(signax.participation(state).voters)
            report(step=step, loss=float(loss), voters=int(voters))
            time.sleep(args.pause)
        found = accuracy(params, held_out_images, held_out_labels)
        report(step=exchange.step, accuracy=float(found), parameters=digest(params))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--address", default="127.0.0.1:7443", help="of the vote server (default 127.0.0.1:7443)")
    add("--slot", type=int, required=True, help="the number of this worker, from 0")
    add("--steps", type=int, default=1000, help="of the whole run (default 1000)")
    add("--seed", type=int, default=0, help="(default 0)")
    add("--pause", type=float, default=0.0, help="seconds after each step, as of a larger model")
    return parser.parse_args()


def load_data() -> Any:
    """Images and labels to train on, and 400 that are held out."""
    digits: Any = load_digits()  # scikit-learn does not type its result
    images, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    train, test, train_labels, test_labels = train_test_split(
        images, labels, test_size=400, stratify=labels, random_state=0
    )
    return train, test, train_labels, test_labels


def init_params(key: jax.Array) -> Any:
    """Draw the first parameters, which are the same on every worker."""
    keys = jax.random.split(key, len(WIDTHS))
    sizes = zip((64, *WIDTHS[:-1]), WIDTHS, keys, strict=True)
    return [
        {"w": jax.random.normal(key, (rows, columns)) / rows**0.5, "b": jnp.zeros(columns)}
        for rows, columns, key in sizes
    ]


def logits_of(params: Any, images: Any) -> jax.Array:
    """The network: dense layers."""
    *hidden, last = params
    for layer in hidden:
        images = jax.nn.relu(images @ layer["w"] + layer["b"])
    return images @ last["w"] + last["b"]


def loss_fn(params: Any, images: Any, labels: Any) -> jax.Array:
    """The cross-entropy of a batch."""
    logits = logits_of(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def accuracy(params: Any, images: Any, labels: Any) -> jax.Array:
    """The share of digits that are recognised."""
    return jnp.mean(logits_of(params, images).argmax(axis=-1) == labels)


def digest(params: Any) -> str:
    """The hash of all parameters."""
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]
    return hashlib.sha256(b"".join(leaves)).hexdigest()


def report(**fields: Any) -> None:
    """Print a JSON line."""
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    main()
