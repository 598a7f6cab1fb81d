"""A least-squares problem for eight workers, for the tests of `DataParallel`."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

import signax

WORKERS = 8
PARAMS = {"w": jnp.arange(6.0).reshape(3, 2) / 8 - 0.25, "b": jnp.ones(2)}
VOTE = signax.majority_vote("data")
SIGNUM = signax.signum(0.125, 0.5, axis_name="data")
SIGN_SGD = signax.sign_sgd(0.125, axis_name="data")


def rows_of(params=PARAMS, workers=WORKERS):
    """A gradient for each worker, of small whole numbers and zeros."""
    return {
        name: jax.random.randint(jax.random.key(i), (workers, *leaf.shape), -2, 3).astype(
            leaf.dtype
        )
        for i, (name, leaf) in enumerate(params.items())
    }


def make_mesh(shape=(WORKERS,), kind=AxisType.Auto):
    kinds = kind if isinstance(kind, tuple) else (kind,) * len(shape)
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, ("data", "model", "fsdp")[: len(shape)], kinds, devices=devices)


def squared_error(params, batch):
    predicted = batch["x"] @ params["w"] + params["b"]
    return jnp.mean((predicted - batch["y"]) ** 2)


def make_batch(size=32):
    x, y = jax.random.normal(jax.random.key(3), (2, size, 3))
    return {"x": x, "y": y[:, :2] + 2 * x[:, 1:]}


def shares(batch, pieces=WORKERS):
    """The batch of each worker, in order."""
    cut = jax.tree.map(lambda leaf: np.split(np.asarray(leaf), pieces), batch)
    return [
        jax.tree.map(lambda split: split[i], cut, is_leaf=lambda node: isinstance(node, list))  # noqa: B023
        for i in range(pieces)
    ]


def assert_trees_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_trees_close(actual, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(e, np.float64), rtol, atol
        ),
        actual,
        expected,
    )


def is_placed_as(leaf, sharding):
    return leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
