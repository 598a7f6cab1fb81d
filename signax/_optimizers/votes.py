"""Optimisers that apply majority votes: signSGD, Signum and Lion, each with a learning rate."""

from collections.abc import Hashable, Mapping
from typing import Any

import optax

from signax._core.checks import check_accumulator_dtype, check_number, renamed
from signax._core.remote import find_workers
from signax._optimizers.descend import Mask, descend
from signax._transforms.memory import checked, scale_by_signum
from signax._wire.ballots import Ties, Zeros
from signax._wire.types import Transport
from signax._wire.weights import Weights
from signax._workers.votes import make_vote, voted


def _voted(
    signs: optax.GradientTransformation, workers: Hashable | None, **options: Any
) -> optax.GradientTransformation:
    """The vote of all workers on their signs. With `None` there is one worker."""
    if workers is not None:
        return voted(signs, make_vote(workers, **options))
    check_no_vote_options(options)
    return signs


def check_no_vote_options(options: Mapping[str, Any]) -> None:
    """Raise if an option of the vote is given to an optimiser without workers."""
    defaults = {
        "zeros": "dither",
        "ties": "dither",
        "transport": "auto",
        "split_over": None,
        "weights": None,
        "agreement": False,
    }
    # Weights may be an array, whose comparison is an array.
    if options["weights"] is not None or {**options, "weights": None} != defaults:
        listed = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise ValueError(
            f"{listed} are options of the vote, which axis_name=None leaves out: pass axis_name, "
            "or drop them"
        )


def sign_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    axis_name: Hashable | None = None,
    exchange: Any = None,
    zeros: Zeros = "dither",
    ties: Ties = "dither",
    transport: Transport = "auto",
    split_over: Hashable | None = None,
    agreement: bool = False,
    weights: Weights = None,
) -> optax.GradientTransformationExtraArgs:
    r"""signSGD by majority vote of the workers along an axis.

    .. math:: x \leftarrow x - \alpha \left( \operatorname{sign} \sum_i \operatorname{sign}(g_i)
      + \lambda x \right)

    A worker whose gradient is not finite is excluded from the vote. Without an axis or an exchange
    there is no vote, and the updates equal `optax.sign_sgd`'s.

    Args:
      learning_rate: the step size :math:`\alpha`, a number or a schedule.
      weight_decay: the decoupled weight decay :math:`\lambda`, times the learning rate, added
        after the vote.
      mask: which leaves decay: a tree of booleans, or a function from parameters to such a tree.
      axis_name: the mapped axis along which the workers lie; `None` for one worker.
      exchange: see :func:`signax.majority_vote`.
      zeros: see :func:`signax.majority_vote`.
      ties: see :func:`signax.majority_vote`.
      transport: see :func:`signax.majority_vote`.
      split_over: see :func:`signax.majority_vote`.
      agreement: see :func:`signax.majority_vote`.
      weights: see :func:`signax.majority_vote`.

    Returns:
      The optimiser.

    Raises:
      ValueError: an option is unknown or out of range, or an option of the vote is given without
        workers; at the update, as in :func:`signax.majority_vote`, or the parameters that decay
        have other shapes than the updates.
      TypeError: an option is of the wrong kind; at the update, a leaf is not floating-point.
      NameError: at the update, the axis is not bound.

    Examples:
      >>> import jax.numpy as jnp, optax, signax
      >>> tx = signax.sign_sgd(0.5)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, state = tx.update(2 * params, tx.init(params))
      >>> print(optax.apply_updates(params, updates))
      [ 0.5 -1.5]

    References:
      Bernstein et al., `signSGD: Compressed Optimisation for Non-Convex Problems
      <https://arxiv.org/abs/1802.04434>`_, 2018; Bernstein et al., `signSGD with Majority Vote is
      Communication Efficient and Fault Tolerant <https://arxiv.org/abs/1810.05291>`_, 2019
    """
    direction = _voted(
        checked(optax.scale_by_sign()),
        find_workers(axis_name, exchange),
        zeros=zeros,
        ties=ties,
        transport=transport,
        split_over=split_over,
        weights=weights,
        agreement=agreement,
    )
    return descend(direction, learning_rate, weight_decay, mask)


@renamed(b1="beta")
def signum(
    learning_rate: optax.ScalarOrSchedule,
    beta: float = 0.9,
    *,
    warmup: bool = False,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    axis_name: Hashable | None = None,
    exchange: Any = None,
    zeros: Zeros = "dither",
    ties: Ties = "dither",
    transport: Transport = "auto",
    split_over: Hashable | None = None,
    agreement: bool = False,
    weights: Weights = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Signum, signSGD with momentum, by majority vote of the workers along an axis.

    .. math:: m_i \leftarrow \beta m_i + (1 - \beta) g_i, \quad
      x \leftarrow x - \alpha \left( \operatorname{sign} \sum_i \operatorname{sign}(m_i)
      + \lambda x \right)

    Each worker keeps its own momentum. A worker whose gradient is not finite is excluded from the
    vote, and keeps its momentum. Without an axis or an exchange there is no vote, and the updates
    equal `optax.signum`'s.

    Args:
      learning_rate: the step size :math:`\alpha`, a number or a schedule.
      beta: the decay :math:`\beta` of the momentum, in [0, 1).
      warmup: see :func:`signax.scale_by_signum`.
      nesterov: see :func:`signax.scale_by_signum`.
      accumulator_dtype: the dtype of the momentum; by default the parameters' dtype.
      weight_decay: the decoupled weight decay :math:`\lambda`, times the learning rate, added
        after the vote.
      mask: which leaves decay: a tree of booleans, or a function from parameters to such a tree.
      axis_name: the mapped axis along which the workers lie; `None` for one worker.
      exchange: see :func:`signax.majority_vote`.
      zeros: see :func:`signax.majority_vote`.
      ties: see :func:`signax.majority_vote`.
      transport: see :func:`signax.majority_vote`.
      split_over: see :func:`signax.majority_vote`.
      agreement: see :func:`signax.majority_vote`.
      weights: see :func:`signax.majority_vote`.

    Returns:
      The optimiser.

    Raises:
      ValueError: an option is unknown or out of range, or an option of the vote is given without
        workers; at the update, as in :func:`signax.majority_vote`, or the parameters that decay
        have other shapes than the updates.
      TypeError: an option is of the wrong kind, or `warmup` is set and `beta` is traced; at the
        update, a leaf is not floating-point.
      NameError: at the update, the axis is not bound.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, signax
      >>> tx = signax.signum(0.5, axis_name="workers")
      >>> params = jnp.array([1.0, -2.0])
      >>> gradients = jnp.array([[2.0, -4.0], [1.0, 3.0], [5.0, -1.0]])
      >>> update = lambda g: tx.update(g, tx.init(params))[0]
      >>> updates = jax.vmap(update, axis_name="workers")(gradients)
      >>> print(optax.apply_updates(params, updates[0]))
      [ 0.5 -1.5]

    References:
      Bernstein et al., `signSGD: Compressed Optimisation for Non-Convex Problems
      <https://arxiv.org/abs/1802.04434>`_, 2018; Bernstein et al., `signSGD with Majority Vote is
      Communication Efficient and Fault Tolerant <https://arxiv.org/abs/1810.05291>`_, 2019
    """
    signs = scale_by_signum(
        beta, warmup=warmup, nesterov=nesterov, accumulator_dtype=accumulator_dtype
    )
    direction = _voted(
        signs,
        find_workers(axis_name, exchange),
        zeros=zeros,
        ties=ties,
        transport=transport,
        split_over=split_over,
        weights=weights,
        agreement=agreement,
    )
    return descend(direction, learning_rate, weight_decay, mask)


@renamed(accumulator_dtype="mu_dtype")
def lion(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.99,
    *,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: Mask = None,
    axis_name: Hashable | None = None,
    exchange: Any = None,
    zeros: Zeros = "dither",
    ties: Ties = "dither",
    transport: Transport = "auto",
    split_over: Hashable | None = None,
    agreement: bool = False,
    weights: Weights = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Lion by majority vote of the workers along an axis.

    .. math:: c_i = \beta_1 m_i + (1 - \beta_1) g_i, \quad
      m_i \leftarrow \beta_2 m_i + (1 - \beta_2) g_i, \quad
      x \leftarrow x - \alpha \left( \operatorname{sign} \sum_i \operatorname{sign}(c_i)
      + \lambda x \right)

    Each worker keeps its own momentum. A worker whose gradient is not finite is excluded from the
    vote, and keeps its momentum. Without an axis or an exchange there is no vote, and the updates
    equal `optax.lion`'s.

    Args:
      learning_rate: the step size :math:`\alpha`, a number or a schedule.
      b1: the weight :math:`\beta_1` of the momentum in the direction, in [0, 1).
      b2: the decay :math:`\beta_2` of the momentum, in [0, 1).
      mu_dtype: the dtype of the momentum; by default the parameters' dtype.
      weight_decay: the decoupled weight decay :math:`\lambda`, times the learning rate, added
        after the vote.
      mask: which leaves decay: a tree of booleans, or a function from parameters to such a tree.
      axis_name: the mapped axis along which the workers lie; `None` for one worker.
      exchange: see :func:`signax.majority_vote`.
      zeros: see :func:`signax.majority_vote`.
      ties: see :func:`signax.majority_vote`.
      transport: see :func:`signax.majority_vote`.
      split_over: see :func:`signax.majority_vote`.
      agreement: see :func:`signax.majority_vote`.
      weights: see :func:`signax.majority_vote`.

    Returns:
      The optimiser.

    Raises:
      ValueError: an option is unknown or out of range, or an option of the vote is given without
        workers; at the update, as in :func:`signax.majority_vote`, or the parameters that decay
        have other shapes than the updates.
      TypeError: an option is of the wrong kind; at the update, a leaf is not floating-point.
      NameError: at the update, the axis is not bound.

    Examples:
      >>> import jax.numpy as jnp, optax, signax
      >>> tx = signax.lion(0.5, weight_decay=0.0)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, state = tx.update(2 * params, tx.init(params))
      >>> print(optax.apply_updates(params, updates))
      [ 0.5 -1.5]

    References:
      Chen et al., `Symbolic Discovery of Optimization Algorithms
      <https://arxiv.org/abs/2302.06675>`_, 2023
    """
    check_number("b1", b1, low=0, high=1)
    check_number("b2", b2, low=0, high=1)
    check_accumulator_dtype(mu_dtype, "mu_dtype")
    signs = checked(optax.scale_by_lion(b1=b1, b2=b2, mu_dtype=mu_dtype), memory="mu")
    direction = _voted(
        signs,
        find_workers(axis_name, exchange),
        zeros=zeros,
        ties=ties,
        transport=transport,
        split_over=split_over,
        weights=weights,
        agreement=agreement,
    )
    return descend(direction, learning_rate, weight_decay, mask)
