"""Gradient spikes: a worker whose gradient is far larger than usual does not take part."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from signax._core.checks import check_count, check_number, check_transformation
from signax._core.leaves import all_finite, check_floating, common_dtype, narrow
from signax._transforms.participation import NO_EXTRAS, Extras, hold, mark_nonfinite
from signax._wire.exchange import take_part


class SkipOnSpikeState(NamedTuple):
    """State of `skip_on_spike`.

    Attributes:
      inner: the state of the inner transformation.
      mean: f32[], the running mean of the norms of accepted steps; f64[] if a parameter is f64.
      weight: the weight of accepted steps in the mean, in its dtype, which corrects its bias. It
        rises from 0 towards 1.
      accepted: int32[], the number of accepted steps since the mean was started.
      in_a_row: int32[], the number of steps that were skipped since the last accepted step.
      skipped: int32[], the number of all skipped steps.
    """

    inner: Any
    mean: jax.typing.ArrayLike
    weight: jax.typing.ArrayLike
    accepted: jax.typing.ArrayLike
    in_a_row: jax.typing.ArrayLike
    skipped: jax.typing.ArrayLike


def skip_on_spike(
    inner: optax.GradientTransformation,
    *,
    factor: jax.typing.ArrayLike = 5.0,
    decay: jax.typing.ArrayLike = 0.99,
    warmup: int = 20,
    max_in_a_row: int = 10,
) -> optax.GradientTransformationExtraArgs:
    r"""Exclude a worker from a step if its gradient's norm is far above the norm's running mean.

    .. math:: \lVert g_t \rVert > \text{factor} \cdot \mu_{t-1}, \qquad
      \mu_t = \frac{\sum_s \text{decay}^{t-s} \lVert g_s \rVert}{\sum_s \text{decay}^{t-s}}

    Here g is all of the worker's incoming updates, and s runs over accepted steps. If the
    inequality holds, the floating-point state of `inner` and the running mean stay as they were
    (counts and keys of `inner` advance, as on every other worker), and every update becomes NaN. A
    vote or mean after this transformation then excludes the worker for the step. Every worker
    judges its own gradient, and nothing is sent.

    - The first `warmup` steps are accepted, whatever their norm. So is every step while the mean
      is 0.
    - A larger gradient may be here to stay. After `max_in_a_row` skipped steps in a row, a further
      spike is accepted, and the running mean starts again from it, with its warm-up.
    - If updates or the state of `inner` are not finite, the step is no spike, and is not counted.
      State and updates are treated as by :func:`signax.hold_if_nonfinite`.

    Put it before the vote. Under `optax.partition` or `optax.masked` it sees only some of the
    leaves. To judge all of them, put it before the partition, around nothing:
    `optax.chain(signax.skip_on_spike(optax.identity()), optax.partition(...))`. In
    :class:`signax.DataParallel`, the norm covers the whole of a leaf that is sharded within a
    worker. In your own `jax.shard_map` over further axes, a leaf is a device's block of it.

    Args:
      inner: the transformation to protect, without votes and means in it.
      factor: how many times its running mean a norm may reach, above 1.
      decay: the decay of the running mean, at least 0 and below 1.
      warmup: the number of steps from which the mean is learned before a step is skipped.
      max_in_a_row: the number of steps in a row that are skipped at most.

    Returns:
      A transformation with a :class:`signax.SkipOnSpikeState`, which differs between workers. It
      passes extra arguments on. Norms are accumulated in at least f32, without overflow.

    Raises:
      ValueError: a number is outside its range.
      TypeError: `inner` is not a transformation, or an option is not a number; at the update, a
        leaf is not floating-point.

    Examples:
      >>> import jax.numpy as jnp, optax, signax
      >>> tx = signax.skip_on_spike(optax.identity(), factor=3.0, warmup=2)
      >>> state = tx.init(jnp.zeros(2))
      >>> for gradient in ([3.0, 4.0], [4.0, 3.0], [90.0, 0.0], [0.0, 5.0]):
      ...     updates, state = tx.update(jnp.array(gradient), state)
      ...     print(updates)
      [3. 4.]
      [4. 3.]
      [nan nan]
      [0. 5.]
      >>> print(state.mean, state.skipped)
      5.0 1
    """
    check_transformation("inner", inner)
    check_number("factor", factor, low=1, ends="()")
    check_number("decay", decay, low=0, high=1)
    check_count("warmup", warmup)
    check_count("max_in_a_row", max_in_a_row)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params):
        dtype = _norm_dtype(params)
        # An array for each field: JAX refuses to donate one array twice.
        mean, weight = (jnp.zeros([], dtype) for _ in range(2))
        counts = (jnp.zeros([], jnp.int32) for _ in range(3))
        return SkipOnSpikeState(inner.init(params), mean, weight, *counts)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: Any = None,
        *,
        signax: Extras = NO_EXTRAS,
        **extra_args: Any,
    ):
        check_floating(updates)
        norm = narrow(tree_norm(updates), state.mean.dtype)
        warm = (state.accepted >= warmup) & (state.mean > 0)
        lasting = state.in_a_row >= max_in_a_row
        spike = warm & (norm > jnp.asarray(factor, norm.dtype) * state.mean)

        new_updates, new_inner = inner.update(
            updates, state.inner, params, signax=signax, **extra_args
        )
        marked = mark_nonfinite(new_updates, updates, new_inner)
        finite = take_part(all_finite(marked), signax.finite_elsewhere(updates))
        accepted, skipped = finite & (~spike | lasting), finite & spike & ~lasting
        marked = jax.tree.map(lambda u: jnp.where(accepted, u, jnp.nan).astype(u.dtype), marked)
        new_state = SkipOnSpikeState(
            hold(accepted, state.inner, new_inner),
            *_learn(state, norm, jnp.asarray(decay, norm.dtype), accepted, spike),
            jnp.where(accepted, 0, jnp.where(skipped, state.in_a_row + 1, state.in_a_row)),
            jnp.where(skipped, optax.safe_increment(state.skipped), state.skipped),
        )
        return marked, new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _learn(
    state: SkipOnSpikeState,
    norm: jax.Array,
    decay: jax.Array,
    accepted: jax.Array,
    restart: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The running mean, its weight and its number of steps after a step, if it is accepted."""
    old_mean, old_weight = jnp.asarray(state.mean), jnp.asarray(state.weight)
    weight = 1 - decay + jnp.where(restart, 0, decay * old_weight)
    # At a weight of 1 - decay the share is exactly 1, so the first norm replaces the old mean.
    share = (1 - decay) / weight
    mean = (1 - share) * old_mean + share * norm
    count = optax.safe_increment(jnp.where(restart, 0, state.accepted))
    return (
        jnp.where(accepted, mean, old_mean),
        jnp.where(accepted, weight, old_weight),
        jnp.where(accepted, count, state.accepted),
    )


def tree_norm(tree: Any) -> jax.Array:
    """The l2 norm of all leaves together: f32[], or f64[] if a leaf is f64.

    It is NaN if a coordinate is not finite. A norm beyond the range of its dtype saturates.
    """
    dtype = _norm_dtype(tree)
    leaves = [leaf.astype(dtype) for leaf in jax.tree.leaves(tree) if leaf.size]
    if not leaves:
        return jnp.zeros([], dtype)
    peak = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in leaves]))
    # Squares of values near the peak neither overflow nor vanish. The reciprocal, with which a
    # compiler may divide, would be subnormal at the ends of the range.
    limits = jnp.finfo(dtype)
    divisor = jnp.clip(peak, 16 * limits.tiny, limits.max / 16)
    squares = [jnp.sum(jnp.square(leaf / divisor)) for leaf in leaves]
    relative = jnp.sqrt(jnp.sum(jnp.stack(squares)))
    norm = jnp.minimum(relative * divisor, limits.max)
    return jnp.where(jnp.isfinite(relative), norm, jnp.nan)


def _norm_dtype(tree: Any) -> Any:
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(tree)]
    floating = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
    return functools.reduce(common_dtype, floating, jnp.dtype(jnp.float32))
