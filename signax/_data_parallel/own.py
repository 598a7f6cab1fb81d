"""The workers' own parameters between two exchanges: a step on them, and their differences."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.extend import core
from jax.sharding import PartitionSpec

from signax._core.leaves import all_finite
from signax._data_parallel.pieces import local_value_and_grad
from signax._data_parallel.placement import Workers, add_axis
from signax._transforms.participation import hold


class OwnRows(NamedTuple):
    """What each worker has of its own between two exchanges, with one row per worker.

    Attributes:
      own: the parameters.
      inner: the state of the inner optimiser.
    """

    own: Any
    inner: Any


def with_own_params(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """A transformation whose state is one worker's `OwnRows`, to lay them out and resize them."""

    def init_fn(params: optax.Params):
        return OwnRows(params, inner.init(params))

    def update_fn(updates: optax.Updates, state: Any, params: Any = None):
        updates, inner_state = inner.update(updates, state.inner, params)
        return updates, OwnRows(state.own, inner_state)

    return optax.GradientTransformation(init_fn, update_fn)


def check_own_optimizer(inner: optax.GradientTransformation, params: Any) -> None:
    """Raise if an optimiser exchanges something between workers."""
    try:  # no axis is bound here
        jax.eval_shape(lambda p: inner.update(p, inner.init(p), p), params)
    except NameError as error:
        raise ValueError(
            f"inner exchanges values between workers ({error}). It should be an optimiser of one "
            "worker, such as optax.adamw(3e-4). Put votes and means into outer"
        ) from error


def step_on_own(
    differentiate: Callable[..., Any],
    params: None,
    batch: Any,
    replicated: tuple[Any, ...],
    key: Any,
    pieces: int,
    own: tuple[Any, Any],
    *,
    inner: optax.GradientTransformation,
) -> tuple[jax.Array, Any, Any, Any]:
    """One worker's step on its own parameters: the loss, aux, and both parts of its state.

    If the loss, the gradient or the new state is not finite, parameters and floating-point state
    stay as they were.
    """
    del params
    before, old_state = own
    loss, aux, grads, _ = local_value_and_grad(
        differentiate, before, batch, replicated, key, pieces
    )

    def step(grads: Any) -> tuple[Any, Any]:
        updates, state = inner.update(grads, old_state, before)
        return optax.apply_updates(before, updates), state

    new = step(grads)
    finite = all_finite((loss, grads, new))
    if not _has_products(step, grads):
        # New values would wait in memory until all of them are known to be finite. It takes less
        # memory and less traffic to compute them again, and the barrier lets XLA do so.
        new = step(jax.tree.map(lambda g: lax.optimization_barrier((finite, g))[1], grads))
    after, new_state = new
    return loss, aux, hold(finite, before, after), hold(finite, old_state, new_state)


def _has_products(function: Callable[..., Any], *arguments: Any) -> bool:
    """Whether a function multiplies matrices, as Muon does, which is too much to do twice."""
    pending = [jax.make_jaxpr(function)(*arguments).jaxpr]
    while pending:
        for eqn in pending.pop().eqns:
            if eqn.primitive.name == "dot_general":
                return True
            pending += [
                getattr(jaxpr, "jaxpr", jaxpr) for jaxpr in core.jaxprs_in_params(eqn.params)
            ]
    return False


def differences(
    workers: Workers,
    common: Sequence[jax.Array],
    own: Sequence[jax.Array],
    positions: Sequence[int],
    active: Any,
) -> tuple[list[jax.Array], jax.Array]:
    """The common parameters minus each worker's own, in rows, and which workers take part.

    Leaves at the given positions are subtracted. A worker takes part if it is active, and if its
    own parameters are finite and differ from the common parameters somewhere.
    """

    def of_worker(common: list[Any], own: list[Any], active: Any):
        own = [row.squeeze(0) for row in own]
        moved = [jnp.any(p != q) for p, q in zip(common, own, strict=True)]
        takes_part = all_finite(own) & jnp.any(jnp.stack(moved))
        if active is not None:
            takes_part &= active.squeeze(0)
        rows = [common[n] - own[n] for n in positions]
        return jax.tree.map(add_axis, (rows, takes_part))

    whole, split = PartitionSpec(), PartitionSpec(workers.axis_name)
    mapped = workers.shard_map(of_worker, (whole, split, split), split, check_vma=False)
    return mapped([*common], [*own], workers.reshard(active, per_worker=True))


def rows_of(workers: Workers, common: Any) -> Any:
    """A row of the common parameters for each worker."""
    whole, split = PartitionSpec(), PartitionSpec(workers.axis_name)
    # A row that XLA takes for a view of the common array would be copied in the next step.
    mapped = workers.shard_map(
        lambda tree: jax.tree.map(add_axis, lax.optimization_barrier(tree)), whole, split, False
    )
    return mapped(common)
