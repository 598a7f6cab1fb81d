"""Train with Flax Linen as in its guide "Scale up Flax Modules on multiple devices", with a vote.

Parameters are sharded over `fsdp`, by the names that the model gives them. The shardings of the
whole state follow from the names, and are pinned.

    python examples/integrations/flax_linen_vote.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from report import report

import signax

jax.config.update("jax_num_cpu_devices", 8)
steps = 100
axes = {"group": 4, "data": 1, "fsdp": 2}
mesh = jax.make_mesh(axes.values(), axes.keys(), axis_types=(AxisType.Auto,) * len(axes))


class Network(nn.Module):
    """Two layers, whose kernels name their axes."""

    width: int

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        column = nn.with_partitioning(init, (None, "fsdp"))
        row = nn.with_partitioning(init, ("fsdp", None))
        x = nn.relu(nn.Dense(2 * self.width, use_bias=False, kernel_init=column)(x))
        x = jax.lax.with_sharding_constraint(x, P("data", "fsdp"))
        return nn.Dense(self.width, use_bias=False, kernel_init=row)(x)


def train_step(state, batch):
    def loss_fn(params, batch):
        x, y = batch
        return jnp.mean((state.apply_fn(params, x) - y) ** 2)

    loss, grads = tx.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads=grads), loss


with jax.set_mesh(mesh):
    keys = jax.random.split(jax.random.key(0), 3)
    batch = jax.random.normal(keys[0], (64, 256)), jax.random.normal(keys[1], (64, 256))
    batch_sharding = NamedSharding(mesh, P(("group", "data")))
    batch = jax.device_put(batch, batch_sharding)
    model = Network(256)
    schedule = optax.cosine_decay_schedule(3e-3, steps)
    vote = signax.lion(schedule, axis_name="group")
    shapes = jax.eval_shape(model.init, keys[2], batch[0])
    specs = nn.get_partition_spec(shapes)
    tx = signax.DataParallel(vote, mesh, "group", param_specs=specs)

    def init(key, x):
        return TrainState.create(apply_fn=model.apply, params=model.init(key, x), tx=tx)

    shapes = jax.eval_shape(init, keys[2], batch[0])
    shardings = nn.get_sharding(shapes, mesh)
    state = jax.jit(init, out_shardings=shardings)(keys[2], batch[0])
    pinned = (shardings, batch_sharding), (shardings, NamedSharding(mesh, P()))
    train_step = jax.jit(train_step, in_shardings=pinned[0], out_shardings=pinned[1])
    compiled = train_step.lower(state, batch).compile()
    for _ in range(steps):
        state, loss = train_step(state, batch)
report(loss, compiled, mesh, "group")
