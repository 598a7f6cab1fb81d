"""A thousand steps with an excluded worker in each stay finite, and equal on every worker."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from workers import auto_mesh

import signax

NUM_WORKERS, STEPS = 8, 1000
SHAPES = {"kernel": (5, 3), "bias": (7,), "scale": ()}
BAD = [np.nan, np.inf, -np.inf]
OPTIMISERS = {
    "signum": partial(signax.signum, 0.01),
    "both memories": partial(signax.ef_sign_sgd, 0.01, momentum=0.9),
    "mean of signs": lambda axis_name: optax.chain(
        signax.mean_signs(axis_name), optax.scale_by_learning_rate(0.01)
    ),
}


class Absences:
    """The excluded workers of each step: at least one, and all workers at a hundredth of steps."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        each = np.arange(STEPS)
        self.empty = np.zeros(STEPS, bool)
        self.empty[rng.permutation(STEPS)[: STEPS // 100]] = True
        self.absent = np.zeros((STEPS, NUM_WORKERS), bool)
        self.absent[each, rng.integers(NUM_WORKERS, size=STEPS)] = True
        self.absent[self.empty] = True
        inactive = self.absent & (rng.random(self.absent.shape) < 0.25)
        self.active = ~inactive
        # Absent workers that are not inactive get one nonfinite coordinate.
        size = {name: int(np.prod(shape)) for name, shape in SHAPES.items()}
        place = rng.integers(sum(size.values()), size=self.absent.shape)
        value = rng.choice(BAD, size=self.absent.shape)
        spoilt = np.zeros((*self.absent.shape, sum(size.values())), np.float32)
        step, worker = np.nonzero(self.absent & self.active)
        spoilt[step, worker, place[step, worker]] = value[step, worker]
        starts = np.cumsum([0, *size.values()])
        self.spoilt = {
            name: spoilt[..., start : start + size[name]].reshape(*self.absent.shape, *shape)
            for start, (name, shape) in zip(starts, SHAPES.items(), strict=False)
        }


def train(tx, absences):
    """Scans all steps: the parameters, the state, the parameters and the voters of each step."""
    target = jax.tree.map(lambda s: jnp.ones(s), SHAPES, is_leaf=lambda s: isinstance(s, tuple))

    def step(carry, given):
        params, state, key = carry
        key, drawn = jax.random.split(key)
        rows = {
            name: params[name]
            - target[name]
            + jax.random.normal(jax.random.fold_in(drawn, n), (NUM_WORKERS, *shape))
            + given["spoilt"][name]
            for n, (name, shape) in enumerate(SHAPES.items())
        }
        updates, state = tx.update(rows, state, params, active=given["active"])
        params = optax.apply_updates(params, updates)
        return (params, state, key), (params, optax.tree.get(state, "voters"))

    params = jax.tree.map(jnp.zeros_like, target)
    given = {"spoilt": absences.spoilt, "active": absences.active}
    run = jax.jit(lambda *carry: lax.scan(step, carry, given))
    (params, state, _), (path, voters) = run(params, tx.init(params), jax.random.key(0))
    return params, state, path, np.asarray(voters)


def bits(array):
    return np.asarray(array).reshape(-1).view(np.uint8)


def assert_replicas_are_identical(tree, num_devices):
    """Compares the devices' copies bit for bit, and counts the replicated arrays."""
    replicated = 0
    for leaf in jax.tree.leaves(tree):
        if leaf.is_fully_replicated and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            copies = [shard.data for shard in leaf.addressable_shards]
            assert len(copies) == num_devices
            for copy in copies[1:]:
                np.testing.assert_array_equal(bits(copy), bits(copies[0]))
            replicated += 1
    return replicated


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_thousand_steps_with_an_excluded_worker_in_each(name):
    absences = Absences(seed=len(name))
    mesh = auto_mesh({"data": NUM_WORKERS})
    tx = signax.DataParallel(OPTIMISERS[name](axis_name="data"), mesh)
    params, state, path, voters = train(tx, absences)

    floating = [x for x in jax.tree.leaves((params, state)) if jnp.issubdtype(x.dtype, np.floating)]
    assert all(np.all(np.isfinite(leaf)) for leaf in floating)
    assert assert_replicas_are_identical(params, NUM_WORKERS) == len(SHAPES)
    assert assert_replicas_are_identical(state, NUM_WORKERS) > 0

    np.testing.assert_array_equal(voters, NUM_WORKERS - absences.absent.sum(axis=1))
    assert np.sum(voters == 0) == STEPS // 100
    np.testing.assert_array_equal(optax.tree.get(state, "missed"), absences.absent.sum(axis=0))

    for leaf in jax.tree.leaves(path):
        rows = np.asarray(leaf)
        stayed = (rows[1:] == rows[:-1]).reshape(STEPS - 1, -1).all(axis=1)
        assert np.all(stayed[absences.empty[1:]])  # without voters nothing moves
        if leaf.ndim > 1:
            assert not np.any(stayed[~absences.empty[1:]])
        np.testing.assert_allclose(rows[-1], 1, atol=0.5)  # where the mean gradient is zero
