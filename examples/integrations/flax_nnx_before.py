"""Train with Flax NNX as in its guide "Scale up on multiple devices".

Parameters are sharded over `fsdp`, by the names that the model gives them.

    python examples/integrations/flax_nnx_before.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from report import report

jax.config.update("jax_num_cpu_devices", 8)
steps = 100
axes = {"data": 4, "fsdp": 2}
mesh = jax.make_mesh(axes.values(), axes.keys(), axis_types=(AxisType.Auto,) * len(axes))


class Network(nnx.Module):
    """Two layers, whose kernels name their axes."""

    def __init__(self, width, rngs):
        init = nnx.initializers.lecun_normal()
        column = nnx.with_partitioning(init, (None, "fsdp"))
        self.inner = nnx.Linear(width, 2 * width, use_bias=False, kernel_init=column, rngs=rngs)
        row = init(rngs.params(), (2 * width, width))
        self.outer = nnx.Param(row, sharding_names=("fsdp", None))

    def __call__(self, x):
        x = jax.nn.relu(self.inner(x))
        x = jax.lax.with_sharding_constraint(x, P("data", "fsdp"))
        return x @ self.outer[...]


@jax.jit
def train_step(model, optimizer, batch):
    def loss_fn(model, batch):
        x, y = batch
        return jnp.mean((model(x) - y) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(model, batch)
    optimizer.update(model, grads)
    return model, optimizer, loss


with jax.set_mesh(mesh):
    rngs = nnx.Rngs(0)
    batch = rngs.normal((64, 256)), rngs.normal((64, 256))
    batch = jax.device_put(batch, P("data"))
    model = Network(256, rngs)
    schedule = optax.cosine_decay_schedule(3e-3, steps)
    tx = optax.adamw(schedule)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    compiled = train_step.lower(model, optimizer, batch).compile()
    for _ in range(steps):
        model, optimizer, loss = train_step(model, optimizer, batch)
report(loss, compiled, mesh, "data")
