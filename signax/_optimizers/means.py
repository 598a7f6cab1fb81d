"""Optimisers that apply means over workers: SSDM, and signSGD with error feedback."""

from collections.abc import Hashable
from typing import Any, Literal, cast

import jax
import optax

from signax._core.checks import check_accumulator_dtype, check_number, renamed
from signax._optimizers.descend import Mask, descend
from signax._transforms.compressors import Block, scale_by_scaled_sign, scale_by_stochastic_sign
from signax._transforms.memory import checked, error_feedback
from signax._transforms.participation import hold_if_nonfinite
from signax._wire.ballots import Zeros
from signax._wire.feedback import Feedback
from signax._wire.types import Transport
from signax._workers.compressed import MeanOptions, averaged
from signax._workers.means import mean_signs
from signax._workers.votes import own_updates


@renamed(b1="beta")
def ssdm(
    learning_rate: optax.ScalarOrSchedule,
    key: jax.Array,
    beta: float = 0.9,
    *,
    norm: Literal["l2", "linf"] | float = "l2",
    accumulator_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    axis_name: Hashable | None = None,
    zeros: Zeros = "dither",
    transport: Transport = "auto",
    split_over: Hashable | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Stochastic sign descent with momentum (SSDM), by the mean of the workers' signs.

    .. math:: m_i \leftarrow \beta m_i + (1 - \beta) g_i, \quad
      x \leftarrow x - \alpha \left( \frac{1}{|S|} \sum_{i \in S} s_i + \lambda x \right), \quad
      E[s_i] = \frac{m_i}{\lVert m_i \rVert}

    Each worker draws random signs :math:`s_i` from its own momentum. Their mean is unbiased. The
    norm is taken over a leaf. A worker whose gradient is not finite is excluded from S, and keeps
    its momentum. Without an axis there is one worker, which is never excluded: a NaN enters its
    state, as in Optax. The paper's revised analysis requires that all workers' gradients are
    unbiased for one objective.

    Args:
      learning_rate: the step size :math:`\alpha`, a number or a schedule.
      key: a random key, the same on every worker.
      beta: the decay :math:`\beta` of the momentum, in [0, 1). For K steps the paper takes
        :math:`1 - K^{-1/2}`, and the step size :math:`K^{-3/4}`.
      norm: see :func:`signax.scale_by_stochastic_sign`.
      accumulator_dtype: the dtype of the momentum; by default the parameters' dtype.
      weight_decay: the decoupled weight decay :math:`\lambda`, times the learning rate, added
        after the mean.
      mask: which leaves decay: a tree of booleans, or a function from parameters to such a tree.
      axis_name: the mapped axis along which the workers lie; `None` for one worker.
      zeros: see :func:`signax.mean_signs`. Only an all-zero leaf has zero ballots.
      transport: see :func:`signax.mean_signs`.
      split_over: see :func:`signax.mean_signs`.

    Returns:
      The optimiser.

    Raises:
      ValueError: an option is unknown or out of range, or an option of the mean is given without
        `axis_name`; at the update, as in :func:`signax.mean_signs`, or the parameters that decay
        have other shapes than the updates.
      TypeError: `key` is not a random key, or an option is of the wrong kind; at the update, a leaf
        is not floating-point.
      NameError: at the update, the axis is not bound.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, signax
      >>> tx = signax.ssdm(0.5, jax.random.key(0), beta=0.0, norm="linf", axis_name="workers")
      >>> params = jnp.array([1.0, -2.0])
      >>> gradients = jnp.array([[2.0, -2.0], [1.0, 1.0]])  # magnitudes equal the norm
      >>> update = lambda g: tx.update(g, tx.init(params))[0]
      >>> updates = jax.vmap(update, axis_name="workers")(gradients)
      >>> print(optax.apply_updates(params, updates[0]))
      [ 0.5 -2. ]

    References:
      Safaryan and Richtarik, `Stochastic Sign Descent Methods: New Algorithms and Better Theory
      <https://arxiv.org/abs/1905.12938>`_, 2021
    """
    check_number("beta", beta, low=0, high=1)
    check_accumulator_dtype(accumulator_dtype)
    ema = optax.ema(beta, debias=False, accumulator_dtype=accumulator_dtype)
    signs = optax.chain(
        checked(ema, memory="ema"),
        scale_by_stochastic_sign(key, norm=norm, axis_name=axis_name),
    )
    if axis_name is not None:
        mean = mean_signs(axis_name, zeros=zeros, transport=transport, split_over=split_over)
        signs = optax.chain(own_updates(axis_name), hold_if_nonfinite(signs), mean)
    elif (zeros, transport, split_over) != ("dither", "auto", None):
        raise ValueError(
            f"zeros={zeros!r}, transport={transport!r} and split_over={split_over!r} are options "
            "of the mean, which axis_name=None leaves out: pass axis_name, or drop them"
        )
    return descend(signs, learning_rate, weight_decay, mask)


def ef_sign_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float | None = None,
    *,
    nesterov: bool = False,
    block: Block = "leaf",
    decay: float = 1.0,
    accumulator_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    axis_name: Hashable | None = None,
    feedback: Feedback = "both",
    num_workers: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""signSGD with error feedback, for one worker or for the mean of the workers along an axis.

    .. math:: m \leftarrow g + \mu m, \quad p = m + e, \quad
      u = \frac{\lVert p \rVert_1}{d} \operatorname{sign}(p), \quad
      e \leftarrow p - u, \quad x \leftarrow x - \alpha (u + \lambda x)

    The formulas are for one worker, which is never excluded: a NaN enters its state, as in Optax.
    With an axis each worker compresses its own p. Servers have memories too, and compress the mean
    of the messages: see :func:`signax.mean_scaled_signs`. A worker whose gradient is not finite is
    then excluded, and keeps its momentum and memory.

    Unlike signs alone, signs with feedback converge like gradient descent. Use learning rates of
    gradient descent, not of signSGD. The paper's memory contains the learning rate. Here the memory
    is in units of the gradient: both agree for a constant learning rate, and this is also right
    under a schedule.

    Args:
      learning_rate: the step size :math:`\alpha`, a number or a schedule.
      momentum: the decay :math:`\mu` of the momentum, as in `optax.sgd`; `None` keeps none.
      nesterov: whether :math:`g + \mu m` replaces m in p.
      block: the coordinates that share a scale, see :func:`signax.scale_by_scaled_sign`; with an
        axis `"leaf"` or a number, see :func:`signax.mean_scaled_signs`.
      decay: see :func:`signax.error_feedback`.
      accumulator_dtype: the dtype of momentum and memories; by default the parameters' dtype.
      weight_decay: the decoupled weight decay :math:`\lambda`, times the learning rate. The decay
        does not enter the memory.
      mask: which leaves decay: a tree of booleans, or a function from parameters to such a tree.
      axis_name: the mapped axis along which the workers lie; `None` for one worker.
      feedback: see :func:`signax.mean_scaled_signs`.
      num_workers: see :func:`signax.mean_scaled_signs`.

    Returns:
      The optimiser.

    Raises:
      ValueError: an option is unknown or out of range, `nesterov` is set without a momentum, or an
        option of the mean is given without `axis_name`; at the update, as in
        :func:`signax.mean_scaled_signs`, or the parameters that decay have other shapes than the
        updates.
      TypeError: an option is of the wrong kind; at the update, a leaf is not floating-point.
      NameError: at the update, the axis is not bound; at `init`, the number of workers is unknown.

    Examples:
      >>> import jax.numpy as jnp, optax, signax
      >>> tx = signax.ef_sign_sgd(0.5)
      >>> params = jnp.array([1.0, -3.0])
      >>> updates, state = tx.update(params, tx.init(params))
      >>> print(optax.apply_updates(params, updates))
      [ 0. -2.]

    References:
      Karimireddy et al., `Error Feedback Fixes SignSGD and other Gradient Compression Schemes
      <https://arxiv.org/abs/1901.09847>`_, 2019; Zheng, Huang and Kwok, `Communication-Efficient
      Distributed Blockwise Momentum SGD with Error-Feedback
      <https://arxiv.org/abs/1905.10936>`_, 2019
    """
    check_accumulator_dtype(accumulator_dtype)
    trace = None
    if momentum is not None:
        check_number("momentum", momentum, low=0, high=1)
        trace = checked(optax.trace(momentum, nesterov, accumulator_dtype), memory="trace")
    elif nesterov:
        raise ValueError("nesterov=True needs a momentum: pass one, such as momentum=0.9")
    if axis_name is not None:
        options = MeanOptions(
            axis_name,
            feedback,
            cast(Any, block),  # `averaged` raises for a block that needs one worker.
            decay,
            accumulator_dtype=accumulator_dtype,
            num_workers=num_workers,
        )
        direction = averaged(trace or optax.identity(), options)
    elif (feedback, num_workers) != ("both", None):
        raise ValueError(
            f"feedback={feedback!r} and num_workers={num_workers!r} are options of the mean over "
            "workers, which axis_name=None leaves out: pass axis_name, or drop them"
        )
    else:
        direction = error_feedback(
            scale_by_scaled_sign(block=block), decay=decay, accumulator_dtype=accumulator_dtype
        )
        if trace is not None:
            direction = optax.chain(trace, direction)
    return descend(direction, learning_rate, weight_decay, mask)
