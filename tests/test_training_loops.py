"""Training loops written for Optax work unchanged with `DataParallel` as their optimiser."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.train_state import TrainState
from workers import assert_same_on_all_devices

import signax

SIZE, STEPS = 256, 200


def sine():
    """A regression on which the best straight line leaves a mean squared error above 0.4."""
    # The shuffled order gives every worker values from the whole range.
    x = jnp.linspace(-2, 2, SIZE)[jax.random.permutation(jax.random.key(9), SIZE), None]
    return x, jnp.sin(3 * x)


def rings():
    """Two classes, one around the other, which no line separates."""
    angle = jax.random.uniform(jax.random.key(0), (SIZE,), maxval=2 * np.pi)
    label = jnp.arange(SIZE) % 2
    points = (1.0 + label)[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
    return points + 0.1 * jax.random.normal(jax.random.key(1), points.shape), label


def optimizer(mesh):
    schedule = optax.linear_schedule(0.03, 0.0, STEPS)
    return signax.DataParallel(signax.signum(schedule, axis_name="data"), mesh)


class LinenNetwork(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.tanh(nn.Dense(32)(x)))


def test_train_state_of_flax_linen_learns(mesh):
    network, tx, data = LinenNetwork(), optimizer(mesh), sine()
    params = network.init(jax.random.key(0), data[0])
    state = TrainState.create(apply_fn=network.apply, params=params, tx=tx)

    def loss_fn(params, batch):
        x, y = batch
        return jnp.mean((state.apply_fn(params, x) - y) ** 2)

    def step(state, batch):
        loss, grads = tx.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads=grads), loss

    step, loss = jax.jit(step, donate_argnums=0), jnp.inf
    for _ in range(STEPS):
        state, loss = step(state, data)
    assert state.step == STEPS
    assert loss < 0.05
    assert_same_on_all_devices(state.params)


class NnxNetwork(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(2, 16, rngs=rngs)
        self.out = nnx.Linear(16, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


def test_optimizer_of_flax_nnx_learns(mesh):
    model, tx, data = NnxNetwork(nnx.Rngs(0)), optimizer(mesh), rings()
    trainer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, trainer, batch):
        network, params = nnx.split(model)

        def loss_fn(params, batch):
            points, labels = batch
            logits = nnx.merge(network, params)(points)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, grads = tx.value_and_grad(loss_fn)(params, batch)
        trainer.update(model, grads)
        return loss

    loss = jnp.inf
    for _ in range(STEPS):
        loss = step(model, trainer, data)
    assert loss < 0.05
    points, labels = data
    assert jnp.all(jnp.argmax(model(points), axis=1) == labels)
    assert_same_on_all_devices(nnx.state(model, nnx.Param))


def test_active_reaches_the_vote_through_flax_nnx(mesh):
    """`nnx.Optimizer.update` passes keyword arguments on to the transformation."""
    model, tx = (
        NnxNetwork(nnx.Rngs(0)),
        signax.DataParallel(signax.sign_sgd(0.5, axis_name="data"), mesh),
    )
    trainer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def update(model, trainer, grads, active):
        trainer.update(model, grads, active=active)

    before = jax.tree.map(np.asarray, nnx.state(model, nnx.Param))
    # Seven workers oppose one, and only the one takes part.
    grads = jax.tree.map(lambda p: jnp.ones((8, *p.shape)).at[2].set(-1), before)
    update(model, trainer, grads, jnp.arange(8) == 2)
    after = nnx.state(model, nnx.Param)
    jax.tree.map(
        lambda new, old: np.testing.assert_array_equal(new, old + np.float32(0.5)), after, before
    )
