"""Training loops written for Optax work unchanged with `DataParallel` as their optimiser."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType
from least_squares import make_mesh
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


class LinenNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False, momentum=0.5)(nn.Dense(2)(x))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_statistics_of_flax_linen_are_averaged_over_workers(kind):
    network, mesh = LinenNorm(), make_mesh(kind=kind)
    data = np.random.default_rng(0).normal(size=(SIZE, 2)).astype(np.float32)
    variables = network.init(jax.random.key(0), data)
    tx = signax.DataParallel(signax.signum(0.1, axis_name="data"), mesh)

    def loss_fn(params, batch, statistics):
        variables = {"params": params, "batch_stats": statistics}
        outputs, written = network.apply(variables, batch, mutable="batch_stats")
        return jnp.mean(outputs**3), written["batch_stats"]

    bad = data.copy()
    bad[: SIZE // 8] = np.inf  # the first worker's
    gradient = jax.jit(tx.value_and_grad(loss_fn, has_aux=True, aux="mean"))
    (_, found), _ = gradient(variables["params"], bad, variables["batch_stats"])
    dense = variables["params"]["Dense_0"]
    hidden = data.astype(np.float64) @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"])
    kept = hidden.reshape(8, SIZE // 8, 2)[1:]
    np.testing.assert_allclose(
        found["BatchNorm_0"]["mean"], 0.5 * kept.mean(axis=(0, 1)), rtol=1e-4, atol=1e-6
    )
    variance = 0.5 + 0.5 * kept.var(axis=1).mean(axis=0)
    np.testing.assert_allclose(found["BatchNorm_0"]["var"], variance, rtol=1e-4)

    # A variance beyond the range of f32 makes the outputs zero, and leaves the loss finite.
    bad[: SIZE // 8 : 2] = 1e30 * data[: SIZE // 8 : 2]
    bad[1 : SIZE // 8 : 2] = -bad[: SIZE // 8 : 2]
    loss, own = loss_fn(variables["params"], bad[: SIZE // 8], variables["batch_stats"])
    assert np.isfinite(loss)
    assert not np.isfinite(own["BatchNorm_0"]["var"]).any()
    (_, found), _ = gradient(variables["params"], bad, variables["batch_stats"])
    np.testing.assert_allclose(found["BatchNorm_0"]["var"], variance, rtol=1e-4)


def test_a_loss_may_capture_the_rest_of_an_nnx_model_on_an_explicit_mesh():
    mesh = make_mesh(kind=AxisType.Explicit)
    model = nnx.Sequential(NnxNetwork(nnx.Rngs(0)), nnx.BatchNorm(2, rngs=nnx.Rngs(1)))
    model.eval()
    tx, (points, labels) = optimizer(mesh), rings()
    trainer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, trainer, batch):
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def loss_fn(params, batch):
            logits = nnx.merge(graph, params, rest)(batch[0])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

        loss, grads = tx.value_and_grad(loss_fn)(params, batch)
        trainer.update(model, grads)
        return loss

    losses = [step(model, trainer, (points, labels)) for _ in range(20)]
    (statistics, *_) = jax.tree.leaves(nnx.state(model, nnx.BatchStat))
    assert jax.typeof(statistics).sharding.mesh == mesh.abstract_mesh
    assert losses[-1] < 0.8 * losses[0]


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


# Bad input.


def saved_elsewhere(tx, params):
    """States that belong to another trainer, and words of the error that each gives."""
    few = make_mesh(shape=(4,))
    return {
        "Adam": (optax.adam(0.1).init(params), r"lacks '\[0\]\[0\]\.count'"),
        "one worker": (tx.tx.init(params), r"momentum\['w'\] has shape \(3,\).* \(8, 3\).*init"),
        "another shape": (tx.init({"w": jnp.zeros(4)}), r"momentum\['w'\] has shape \(8, 4\)"),
        "another name": (tx.init({"v": jnp.zeros(3)}), r"lacks .*momentum\['w'\]"),
        "another M": (optimizer(few).init(params), r"rows for 4 workers.*DataParallel\.resize"),
        "a dictionary": ({"0": {"momentum": params}}, r"lacks '\[0\]\[0\]\.count'.*init"),
    }


@pytest.mark.parametrize(
    "case", ["Adam", "one worker", "another shape", "another name", "another M", "a dictionary"]
)
def test_a_state_of_another_trainer_is_refused_before_the_step_takes_the_parameters(case, mesh):
    tx, params = optimizer(mesh), {"w": jnp.zeros(3)}
    state, message = saved_elsewhere(tx, params)[case]
    step = tx.train_step(lambda params, batch: jnp.mean((batch - params["w"]) ** 2))
    with pytest.raises(ValueError, match=message):
        step(params, state, jnp.ones((8, 3)))
    with pytest.raises(ValueError, match=message):
        tx.update(jax.tree.map(lambda leaf: jnp.ones((8, *leaf.shape)), params), state, params)
    assert not params["w"].is_deleted()


def test_rejects_aux_that_is_no_array(mesh):
    gradient = optimizer(mesh).value_and_grad(
        lambda params, batch: (jnp.mean(batch * params), {"name": "loss"}), has_aux=True
    )
    with pytest.raises(TypeError, match=r"aux\['name'\]='loss' is no array"):
        gradient(jnp.ones(()), jnp.ones(8))
