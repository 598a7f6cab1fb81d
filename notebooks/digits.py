"""The small task of these notebooks: scikit-learn's handwritten digits, which ship in its package.

1,797 images of 8x8 pixels, of which 400 are held out, and a network of 26,122 parameters.
"""

import functools
import itertools

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import signax


class Network(nnx.Module):
    """Two hidden layers."""

    def __init__(self, rngs):
        widths = (64, 128, 128, 10)
        self.layers = nnx.List([nnx.Linear(n, m, rngs=rngs) for n, m in itertools.pairwise(widths)])

    def __call__(self, x):
        *hidden, last = self.layers
        for layer in hidden:
            x = nnx.relu(layer(x))
        return last(x)


@functools.cache
def load_data():
    """Images to learn from, images held out, and the labels of both."""
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    return train_test_split(images, labels, test_size=400, stratify=labels, random_state=0)


@functools.cache
def make_trainer(tx, num_workers, local=None, **options):
    """The workers, a loss function and their training step, which every seed shares."""
    graph, _ = nnx.split(Network(nnx.Rngs(0)))

    def loss_fn(params, batch):
        inputs, targets = batch
        logits = nnx.merge(graph, params)(inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    devices = jax.devices()[:num_workers]
    mesh = jax.make_mesh((num_workers,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    parallel = signax.DataParallel(tx, mesh, local=local)
    return parallel, loss_fn, parallel.train_step(loss_fn, **options)


def learn(tx, num_workers, steps, batch_size, seed, local=None, **options):
    """Train, and return the loss on held-out images and the share of them that is recognised.

    `batch_size` counts the images of all workers together. `DataParallel` takes `local`, and its
    `train_step` takes `options`.
    """
    parallel, loss_fn, step = make_trainer(tx, num_workers, local, **options)
    images, others, labels, other_labels = load_data()
    graph, params = nnx.split(Network(nnx.Rngs(seed)))
    state, rng = parallel.init(params), np.random.default_rng(seed)
    for _ in range(steps):
        chosen = rng.integers(len(images), size=batch_size)
        params, state, _ = step(params, state, (images[chosen], labels[chosen]))
    params = jax.device_get(params)
    predicted = nnx.merge(graph, params)(others).argmax(axis=-1)
    return float(loss_fn(params, (others, other_labels))), float(np.mean(predicted == other_labels))


def warmup_cosine(peak, steps):
    """A learning rate that rises over a twentieth of the steps and falls to 0 at the last."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, steps // 20, steps)
