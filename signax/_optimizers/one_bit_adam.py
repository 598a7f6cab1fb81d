"""1-bit Adam: Adam on full-precision means at first, later on scaled signs of the momentum."""

from collections.abc import Hashable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from signax._core.checks import check_accumulator_dtype, check_block, check_count, check_number
from signax._core.leaves import (
    axis_names,
    check_alike,
    check_floating,
    common_dtype,
    varies,
    varying_axes,
    wide_dtype,
    worker_index,
)
from signax._optimizers.descend import Mask, descend
from signax._transforms.compressors import scale_by_scaled_sign
from signax._transforms.memory import ErrorFeedbackState, error_feedback
from signax._workers.compressed import MeanScaledSignsState, mean_scaled_signs
from signax._workers.means import AverageUpdatesState, average_updates


class OneBitAdamState(NamedTuple):
    """State of the direction of `one_bit_adam`.

    Attributes:
      count: int32[], the steps in which any worker took part, the same on every worker. It corrects
        the bias of m and v, and ends the warm-up.
      mu: the moving average m of the gradients, the same on every worker: a tree like the
        parameters, in their dtypes or in `mu_dtype`.
      nu: the moving average v of the mean gradient's squares, the same on every worker: a tree like
        the parameters. It is constant after the warm-up.
      mean: the :class:`signax.MeanScaledSignsState` of the compressed momentum, with the number of
        all steps, the memories, which are 0 during the warm-up, and the participation. Without an
        axis it is a :class:`signax.ErrorFeedbackState`.
    """

    count: jax.typing.ArrayLike
    mu: optax.Updates
    nu: optax.Updates
    mean: MeanScaledSignsState | ErrorFeedbackState


def one_bit_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    warmup_steps: int,
    block: Literal["leaf"] | int = "leaf",
    decay: float = 1.0,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    axis_name: Hashable | None = None,
    num_workers: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam by full-precision means at first, then 1-bit Adam by means of compressed momenta.

    .. math:: t \le T: \quad m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad
      v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \quad
      g_t = \frac{1}{|S|} \sum_{i \in S} g_{i,t}

    .. math:: t > T: \quad m_t = \operatorname{mean}_{i \in S}
      C \left( \beta_1 m_{t-1} + (1 - \beta_1) g_{i,t} \right), \quad v_t = v_T

    .. math:: x \leftarrow x - \alpha (u_t + \lambda x), \quad
      u_t = \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^{\min(t, T)})} + \epsilon}

    with T the `warmup_steps`, S as in :func:`signax.majority_vote`, and :math:`\operatorname{mean}
    C` is :func:`signax.mean_scaled_signs`, with memories of workers and servers. All workers share
    m and v. The warm-up equals `optax.adamw` on the mean gradient, and costs an all-reduce of f32
    numbers. The compiled program holds both exchanges and runs one of them in each step.

    The paper corrects no bias, which matters little after its thousands of warm-up steps. Here both
    corrections continue after the freeze. The step size then does not jump:
    :math:`v_T / (1 - \beta_2^T)` is the estimate that the last step of the warm-up divides by.
    Without the correction, steps would grow by :math:`(1 - \beta_2^T)^{-1/2}`, which is 3.2 for
    T = 100.

    A scaled sign is never 0. Where v is small, the paper's step is therefore far longer than
    Adam's, and training diverges if v is very small. Two bounds prevent this after the freeze. A
    coordinate with :math:`v_T = 0` (an unused row of an embedding) does not move, and its gradient
    is not sent. On the others :math:`|u_t| \le \max(1, (1 - \beta_1) / \sqrt{1 - \beta_2})`, the
    bound of Adam's own steps, 3.2 by default. With sparse gradients this prevents divergence, but
    does not train well: average such leaves in full precision, by `optax.partition`.

    A worker whose gradient is not finite is excluded: m and v do not contain its gradient, and it
    keeps its memory. If no worker takes part, m and v stay and u is 0. During the warm-up, mean
    gradients are clipped where their square exceeds the dtype of v, from 1.8e19 in f32 and from 254
    in f16. Without an axis there is one worker, which compresses its own momentum and is never
    excluded: a NaN enters its state, as in Optax.

    Args:
      learning_rate: the step size :math:`\alpha`, a number or a schedule. Use AdamW's.
      b1: the decay :math:`\beta_1` of m, in [0, 1).
      b2: the decay :math:`\beta_2` of v, in [0, 1).
      eps: :math:`\epsilon`, above 0.
      warmup_steps: T, the number of steps in full precision, at least 1. A step in which no worker
        takes part does not count. v should be stable by then, so T should exceed the warm-up of the
        learning rate. A fifth of all steps is a start. T must be below the number of all steps, or
        nothing is ever compressed. A schedule does not tell its length, so this is not checked.
      block: the coordinates that share a scale: `"leaf"` or the most in a block, see
        :func:`signax.mean_scaled_signs`.
      decay: the share of the memories that is added, see :func:`signax.mean_scaled_signs`. The
        paper's is 1. For a transformer try 0.9.
      mu_dtype: the dtype of m and of the memories; by default the parameters' dtype.
      weight_decay: the decoupled weight decay :math:`\lambda`, times the learning rate. The decay
        does not enter the memories.
      mask: which leaves decay: a tree of booleans, or a function from parameters to such a tree.
      axis_name: the mapped axis along which the workers lie; `None` for one worker.
      num_workers: see :func:`signax.mean_scaled_signs`.

    Returns:
      The optimiser.

    Raises:
      ValueError: an option is unknown or out of range, or `num_workers` is given without
        `axis_name`; at the update, as in :func:`signax.mean_scaled_signs`, or the parameters that
        decay have other shapes than the updates.
      TypeError: an option is of the wrong kind; at `init` and at the update, a leaf is not
        floating-point.
      NameError: at the update, the axis is not bound; at `init`, the number of workers is unknown.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, signax
      >>> tx = signax.one_bit_adam(4.0, warmup_steps=1, axis_name="workers", num_workers=2)
      >>> params = jnp.array([1.0, -2.0])
      >>> def follow(gradient):
      ...     updates, state = tx.update(gradient, tx.init(params))  # Adam on the mean, [2, -4]
      ...     first = optax.apply_updates(params, updates)
      ...     updates, state = tx.update(gradient, state)  # signs of both workers' momenta
      ...     return first, optax.apply_updates(first, updates)
      >>> gradients = jnp.array([[1.0, -5.0], [3.0, -3.0]])
      >>> for rows in jax.vmap(follow, axis_name="workers")(gradients):
      ...     print(rows[0].round())
      [-3.  2.]
      [-9.  5.]

    References:
      Tang et al., `1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence
      Speed <https://arxiv.org/abs/2102.02888>`_, 2021; Kingma and Ba, `Adam: A Method for
      Stochastic Optimization <https://arxiv.org/abs/1412.6980>`_, 2015
    """
    check_number("b1", b1, low=0, high=1)
    check_number("b2", b2, low=0, high=1)
    check_number("eps", eps, low=0, ends="()")
    check_count("warmup_steps", warmup_steps)
    check_accumulator_dtype(mu_dtype, "mu_dtype")
    block = check_block(block, ("leaf",))
    if axis_name is not None:
        compressed = mean_scaled_signs(
            axis_name,
            block=block,
            decay=decay,
            accumulator_dtype=mu_dtype,
            num_workers=num_workers,
        )
        exchange = _Exchange(average_updates(axis_name), compressed, axis_name)
    elif num_workers is not None:
        raise ValueError(
            f"num_workers={num_workers!r} is an option of the mean over workers, which "
            "axis_name=None leaves out: pass axis_name, or drop it"
        )
    else:
        compressed = error_feedback(
            scale_by_scaled_sign(block=block), decay=decay, accumulator_dtype=mu_dtype
        )
        exchange = _Exchange(None, compressed, None)
    adam = _Adam(b1, b2, eps, warmup_steps)
    return descend(_one_bit_adam(adam, exchange, mu_dtype), learning_rate, weight_decay, mask)


class _Adam(NamedTuple):
    """The arithmetic of Adam, in at least f32. In f16 squares overflow, and epsilon is 0.

    Attributes:
      b1: the decay of m.
      b2: the decay of v.
      eps: the number that is added to the root of v.
      warmup_steps: T.
    """

    b1: Any
    b2: Any
    eps: Any
    warmup_steps: int

    @jax.named_scope("signax.momentum")
    def to_send(self, updates: Any, state: Any) -> Any:
        """A worker's gradient during the warm-up, and its own next m afterwards."""
        warms_up = state.count < self.warmup_steps

        def choose(g: jax.Array, own: jax.Array, m: jax.Array, v: jax.Array):
            own = jnp.where(v > 0, own, 0 * g)  # a NaN, which excludes the worker, stays
            return jnp.where(warms_up, g, own).astype(common_dtype(g.dtype, m.dtype))

        own = self._average(_wide(updates), state.mu)
        return jax.tree.map(choose, updates, own, state.mu, state.nu)

    @jax.named_scope("signax.momentum")
    def step(self, value: Any, state: Any, counts: jax.Array) -> tuple[Any, Any, Any, Any]:
        """The direction, count, m and v, from the mean of what the workers sent.

        If the step does not count, the direction is 0 and the rest stays.
        """
        warms_up, count = state.count < self.warmup_steps, optax.safe_increment(state.count)

        def choose(condition: jax.Array, first: Any, then: Any) -> Any:
            return jax.tree.map(partial(jnp.where, condition), first, then)

        value, old_nu = _wide(value), _wide(state.nu)
        seen = jax.tree.map(lambda m, v: jnp.where(v > 0, m, 0), value, old_nu)
        gradient = jax.tree.map(_with_finite_square, value, state.nu)
        mu = choose(warms_up, self._average(gradient, state.mu), seen)
        squares = optax.tree.update_moment_per_elem_norm(gradient, old_nu, self.b2, 2)
        mu, nu = choose(counts, mu, state.mu), choose(counts & warms_up, squares, old_nu)
        mu_hat = optax.tree.bias_correction(mu, self.b1, count)
        nu_hat = optax.tree.bias_correction(nu, self.b2, jnp.minimum(count, self.warmup_steps))
        bound = jnp.maximum(1.0, (1 - self.b1) / (1 - self.b2) ** 0.5)
        bound = jnp.where(counts, jnp.where(warms_up, jnp.inf, bound), 0)

        def bounded(m: jax.Array, v: jax.Array):
            return jnp.clip(m / (jnp.sqrt(v) + self.eps), -bound, bound)

        direction = jax.tree.map(bounded, mu_hat, nu_hat)
        return direction, jnp.where(counts, count, state.count), mu, nu

    def _average(self, value: Any, mu: Any) -> Any:
        return optax.tree.update_moment(value, mu, self.b1, 1)


def _with_finite_square(gradient: jax.Array, nu: jax.Array) -> jax.Array:
    """Clip a gradient so that its square is finite in the dtype of v."""
    most = float(jnp.finfo(nu.dtype).max) ** 0.5 * (1 - 2.0**-7)
    return jnp.clip(gradient, -most, most)


def _wide(tree: Any) -> Any:
    return jax.tree.map(lambda array: array.astype(wide_dtype(array.dtype)), tree)


class _Exchange(NamedTuple):
    """The two means over workers.

    Attributes:
      exact: `average_updates`; `None` for one worker without an axis.
      compressed: `mean_scaled_signs`, or for one worker `error_feedback`.
      axis_name: the axis of the workers, if any.
    """

    exact: Any
    compressed: Any
    axis_name: Hashable | None

    def average(self, values: Any, state: Any, extra_args: Any) -> tuple[Any, Any]:
        """The mean in full precision, and the state of `compressed` after a step without it."""
        if self.exact is None:
            return values, state
        before = AverageUpdatesState(state.participation)
        mean, after = self.exact.update(values, before, **extra_args)
        memory = self._typed_as_varying(state.memory)
        count = optax.safe_increment(state.count)
        return mean, MeanScaledSignsState(count, memory, after.participation)

    def compress(self, values: Any, state: Any, extra_args: Any) -> tuple[Any, Any]:
        """The mean of compressed values, and the new state of `compressed`."""
        return self.compressed.update(values, state, **extra_args)

    def _typed_as_varying(self, tree: Any) -> Any:
        """Type arrays as different on every worker, as those are that `compressed` returns."""
        axis_name: Any = self.axis_name
        if not varies(worker_index(axis_name), axis_name):
            return tree  # vmap, pmap and check_vma=False type everything as invariant

        def cast(array: jax.Array) -> Any:
            varying = varying_axes(array, axis_name)
            missing = tuple([axis for axis in axis_names(axis_name) if axis not in varying])
            return lax.pcast(array, missing, to="varying") if missing else array

        return jax.tree.map(cast, tree)

    def any_participant(self, state: Any) -> jax.Array:
        """Whether any worker took part in the step that left the state."""
        return jnp.bool_(True) if self.exact is None else state.participation.voters > 0


def _one_bit_adam(
    adam: _Adam, exchange: _Exchange, mu_dtype: Any
) -> optax.GradientTransformationExtraArgs:
    """The direction of 1-bit Adam."""

    def init_fn(params: optax.Params) -> OneBitAdamState:
        mean: Any = exchange.compressed.init(params)
        mu, nu = optax.tree.zeros_like(params, dtype=mu_dtype), optax.tree.zeros_like(params)
        return OneBitAdamState(jnp.zeros([], jnp.int32), mu, nu, mean)

    def update_fn(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, OneBitAdamState]:
        del params
        check_floating(updates)
        check_alike("updates", updates, "state.mu", state.mu)

        with jax.numpy_dtype_promotion("standard"):  # Optax lets JAX promote
            # Only the exchange is under the condition: XLA copies what branches read and pass on.
            value, mean = lax.cond(
                state.count < adam.warmup_steps,
                partial(exchange.average, extra_args=extra_args),
                partial(exchange.compress, extra_args=extra_args),
                adam.to_send(updates, state),
                state.mean,
            )
            counts = exchange.any_participant(mean)
            direction, count, *moments = adam.step(value, state, counts)
            mu, nu = optax.tree.cast_like(moments, [state.mu, state.nu])
        return optax.tree.cast_like(direction, updates), OneBitAdamState(count, mu, nu, mean)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
