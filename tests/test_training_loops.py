"""Training loops that were written for Optax, unmodified, with DataParallel as their optimiser."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec

import signax
from signax import diagnostics

SIZE, STEPS = 256, 200


def sine():
    """A regression on which the best straight line leaves a mean squared error above 0.4."""
    # In an order that gives every worker values from everywhere.
    x = jnp.linspace(-2, 2, SIZE)[jax.random.permutation(jax.random.key(9), SIZE), None]
    return x, jnp.sin(3 * x)


def rings():
    """Two classes, one around the other, that no line parts."""
    angle = jax.random.uniform(jax.random.key(0), (SIZE,), maxval=2 * np.pi)
    label = jnp.arange(SIZE) % 2
    points = (1.0 + label)[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
    return points + 0.1 * jax.random.normal(jax.random.key(1), points.shape), label


def optimizer(mesh):
    schedule = optax.linear_schedule(0.03, 0.0, STEPS)
    return signax.DataParallel(signax.signum(schedule, axis_name="data"), mesh)


def assert_same_on_all_devices(tree):
    for leaf in jax.tree.leaves(tree):
        assert len(leaf.addressable_shards) == 8
        assert len({np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards}) == 1


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


def test_who_takes_part_goes_through_the_optimizer_of_flax_nnx(mesh):
    """`nnx.Optimizer.update` hands keywords on to the transformation."""
    model, tx = (
        NnxNetwork(nnx.Rngs(0)),
        signax.DataParallel(signax.sign_sgd(0.5, axis_name="data"), mesh),
    )
    trainer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def update(model, trainer, grads, active):
        trainer.update(model, grads, active=active)

    before = jax.tree.map(np.asarray, nnx.state(model, nnx.Param))
    # Seven against one, and only the one takes part.
    grads = jax.tree.map(lambda p: jnp.ones((8, *p.shape)).at[2].set(-1), before)
    update(model, trainer, grads, jnp.arange(8) == 2)
    after = nnx.state(model, nnx.Param)
    jax.tree.map(
        lambda new, old: np.testing.assert_array_equal(new, old + np.float32(0.5)), after, before
    )


# The step that comes with DataParallel.


def linear(params, batch):
    x, y = batch
    return jnp.mean((x @ params - y) ** 2)


def lines():
    x = jax.random.normal(jax.random.key(0), (64, 4))
    return x, x @ jnp.array([1.0, -1.0, 0.5, 0.0])


@pytest.fixture
def placed(mesh):
    """An optimiser, and parameters and a state of it that lie on the mesh."""
    tx = optimizer(mesh)
    # From NumPy, so that no other array shares the memory that is given away.
    params = jax.device_put(np.zeros(4, np.float32), NamedSharding(mesh, PartitionSpec()))
    return tx, params, tx.init(params)


def test_train_step_learns(placed):
    tx, params, state = placed
    step, loss = tx.train_step(linear), jnp.inf
    for _ in range(STEPS):
        params, state, loss = step(params, state, lines())
    assert loss < 1e-3
    assert_same_on_all_devices(params)


def test_train_step_takes_over_the_memory_of_parameters_and_state(placed):
    tx, params, state = placed
    batch = lines()
    tx.train_step(linear)(params, state, batch)
    kept = [p for p, leaf in jax.tree.leaves_with_path((params, state)) if not leaf.is_deleted()]
    # Nothing but the number of the last step's voters, which no step reads.
    assert [jax.tree_util.keystr(path)[-7:] for path in kept] == [".voters"]
    assert not any(leaf.is_deleted() for leaf in batch)


def test_train_step_shows_its_program_before_it_runs(placed):
    tx, params, state = placed
    compiled = tx.train_step(linear).lower(params, state, lines()).compile()
    assert diagnostics.collective_bytes(compiled) > diagnostics.wire_bytes(params, 8)
    # What has been compiled is what runs.
    _, _, loss = compiled(params, state, lines())
    np.testing.assert_allclose(loss, linear(jnp.zeros(4), lines()), rtol=1e-6)


def test_train_step_compiles_once_for_what_init_made(placed):
    tx, params, state = placed
    step = tx.train_step(linear)
    for _ in range(3):
        params, state, _ = step(params, state, lines())
    assert step._cache_size() == 1


def test_train_step_is_the_gradient_and_the_update(placed):
    tx, params, state = placed

    def loss_fn(params, batch, scale, key):
        mask = jax.random.bernoulli(key, 0.5, (4,))
        return scale * linear(params * mask, batch), mask

    options = {"has_aux": True, "accumulate": 2}
    arguments, key = (lines(), jnp.float32(2)), jax.random.key(4)

    @jax.jit
    def by_hand(params, state):
        value, grads = tx.value_and_grad(loss_fn, **options)(params, *arguments, key=key)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    expected = by_hand(params, state)
    actual = tx.train_step(loss_fn, **options)(params, state, *arguments, key=key)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    _, masks = actual[2]
    assert masks.shape == (8, 2, 4)


def test_steps_scan(placed):
    """A whole epoch in one program: parameters and state keep their shapes and types."""
    tx, params, state = placed

    def body(carry, batch):
        params, state = carry
        loss, grads = tx.value_and_grad(linear)(params, batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    batches = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (100, *leaf.shape)), lines())
    (params, _), losses = jax.jit(lambda *carry: jax.lax.scan(body, carry, batches))(params, state)
    assert losses[-1] < 0.05 * losses[0]
    assert_same_on_all_devices(params)
