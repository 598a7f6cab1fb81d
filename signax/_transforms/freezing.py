"""Frozen leaves: updates of zero, which every worker knows without a message."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from signax._core.leaves import check_floating


def freeze() -> optax.GradientTransformationExtraArgs:
    """Replace updates by zeros that are the same on every worker.

    Use it in `optax.partition` for leaves that do not train, such as the base weights under LoRA.
    Nothing is kept for these leaves and nothing is sent. In :class:`signax.DataParallel` it takes
    the place of `optax.set_to_zero`, whose zeros JAX's types derive from a worker's own gradient:
    the types cannot know that they are equal on all workers.

    A NaN or an infinity in the gradient of a frozen leaf excludes the worker from the step, as in
    any other leaf, where :func:`signax.leave_out_nonfinite` looks at all leaves; `DataParallel`
    includes it. Apply `jax.lax.stop_gradient` to frozen leaves in the loss function: XLA then does
    not compute their gradients, which are zeros.

    Returns:
      A stateless transformation that keeps shapes, dtypes and, over Explicit mesh axes, the
      sharding of each leaf.

    Raises:
      TypeError: at the update, a leaf is not floating-point.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, signax
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> groups = {"train": signax.signum(0.5, axis_name="data"), "freeze": signax.freeze()}
      >>> optimizer = optax.partition(groups, {"base": "freeze", "lora": "train"})
      >>> tx = signax.DataParallel(optimizer, mesh)
      >>> loss_fn = lambda params, batch: jnp.mean((batch - params["base"] - params["lora"]) ** 2)
      >>> params = {"base": jnp.ones(3), "lora": jnp.zeros(3)}
      >>> batch = jnp.full((tx.num_workers, 3), 2.0)
      >>> params, state, loss = tx.train_step(loss_fn)(params, tx.init(params), batch)
      >>> print(params["base"], params["lora"])
      [1. 1. 1.] [0.5 0.5 0.5]
    """

    def update_fn(updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any):
        del params, extra_args
        check_floating(updates)
        return jax.tree.map(_unvarying_zeros, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


def _unvarying_zeros(leaf: jax.Array) -> jax.Array:
    """Zeros in the shape and sharding of a leaf, which JAX's types know to be equal everywhere."""
    kind = jax.typeof(leaf)
    if not kind.manual_axis_type.varying:
        return jnp.zeros_like(leaf)
    return jnp.zeros(leaf.shape, leaf.dtype, out_sharding=kind.sharding)
