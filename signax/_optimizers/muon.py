"""Muon by majority vote: each worker's momentum is orthogonalised before its signs are voted on."""

from collections.abc import Hashable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from signax._core.checks import (
    check_accumulator_dtype,
    check_mode,
    check_number,
    check_transformation,
)
from signax._core.leaves import check_alike, check_floating
from signax._core.remote import find_workers
from signax._optimizers.descend import Mask, check_params, descend
from signax._optimizers.votes import check_no_vote_options
from signax._transforms.memory import checked
from signax._transforms.orthogonal import DimensionNumbers, dimension_numbers, orthogonalize
from signax._transforms.participation import hold_if_nonfinite
from signax._wire.ballots import Ties, Zeros
from signax._wire.types import Transport
from signax._wire.weights import Weights
from signax._workers.votes import majority_vote, own_updates

MATRIX, OTHER = "matrix", "other"


class MuonMomentumState(NamedTuple):
    """State of the momentum of `muon`.

    Attributes:
      count: int32[], the steps taken.
      momentum: the moving average m of the gradients, a tree like the parameters, in their dtypes
        or in `mu_dtype`.
    """

    count: jax.typing.ArrayLike
    momentum: optax.Updates


def muon(
    learning_rate: optax.ScalarOrSchedule,
    beta: float = 0.95,
    *,
    nesterov: bool = True,
    mu_dtype: Any = None,
    weight_dimension_numbers: DimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
    consistent_rms: float = 0.2,
    others_rms: float = 0.1,
    ns_steps: int = 5,
    after_vote: Literal["signs", "orthogonalize"] = "signs",
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
    r"""Muon by majority vote of the workers along an axis.

    .. math:: m_i \leftarrow \beta m_i + (1 - \beta) g_i, \quad
      O_i = \operatorname{polar}(\beta m_i + (1 - \beta) g_i), \quad
      x \leftarrow x - \alpha \left( \rho \operatorname{sign} \sum_i \operatorname{sign}(O_i)
      + \lambda x \right)

    for matrices, where :math:`\operatorname{polar}(U \Sigma V^\top) = U V^\top`. Each worker keeps
    its own momentum and orthogonalises it by itself; :func:`signax.orthogonalize` explains how. The
    other leaves are voted on by Lion, in the same exchange. One bit per coordinate travels each
    way.

    A vote moves every coordinate of a matrix by :math:`\alpha \rho`. With :math:`\rho = 0.2` that
    is about as far as a step of AdamW does, so AdamW's step size is a starting point. Try twice and
    four times that size too. The other leaves move half as far by default, which ended lower in a
    language model than the same distance or a quarter of it. Embeddings have two axes but train
    better as other leaves: give them `None` in `weight_dimension_numbers`.

    A worker whose gradient is not finite is excluded from the vote, and keeps its momentum. Without
    an axis or an exchange there is no vote, and matrices take the steps of `optax.contrib.muon`
    with this `consistent_rms`.

    Args:
      learning_rate: the step size :math:`\alpha`, a number or a schedule.
      beta: the decay :math:`\beta` of the momentum, in [0, 1).
      nesterov: whether to orthogonalise :math:`\beta m_i + (1 - \beta) g_i`, with the bias of both
        terms corrected as Optax does, and not :math:`m_i`.
      mu_dtype: the dtype of the momentum; by default the parameters' dtype.
      weight_dimension_numbers: the leaves that are matrices, and their axes, see
        :func:`signax.orthogonalize`. By default all leaves of two axes.
      others: a transformation of one worker for the other leaves; the signs of its updates are
        voted on. By default `optax.scale_by_lion`. Do not pass an optimiser, whose learning rate
        reverses the sign.
      consistent_rms: the root mean square :math:`\rho` of a matrix's step, relative to the step
        size.
      others_rms: the same for the other leaves.
      ns_steps: the number of Newton-Schulz iterations.
      after_vote: `"signs"` applies the majority's signs. `"orthogonalize"` applies their polar
        factor, :math:`\sqrt{\max(m, n)} \operatorname{polar}(\cdot)`, without any further
        communication.
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
        workers; at `init` and at the update, as in :func:`signax.orthogonalize` and
        :func:`signax.majority_vote`.
      TypeError: an option is of the wrong kind; at `init` and at the update, a leaf is not
        floating-point.
      NameError: at the update, the axis is not bound.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, signax
      >>> tx = signax.muon(0.5, axis_name="workers", consistent_rms=1.0, others_rms=0.5)
      >>> params = {"w": jnp.zeros((2, 2)), "b": jnp.zeros(2)}
      >>> scales = jnp.array([1.0, 3.0, -2.0])  # of the gradients of three workers
      >>> rotation, ones = jnp.array([[3.0, -4.0], [4.0, 3.0]]), jnp.ones(2)
      >>> gradients = jax.vmap(lambda scale: {"w": scale * rotation, "b": scale * ones})(scales)
      >>> update = lambda g: tx.update(g, tx.init(params))[0]
      >>> updates = jax.vmap(update, axis_name="workers")(gradients)
      >>> print(updates["w"][0], updates["b"][0])
      [[-0.5  0.5]
       [-0.5 -0.5]] [-0.25 -0.25]

    References:
      Mishra, Trivedi and Kumar, `SignMuon <https://arxiv.org/abs/2605.16311>`_, 2026; Jordan et
      al., `Muon: An optimizer for hidden layers in neural networks
      <https://kellerjordan.github.io/posts/muon/>`_, 2024; Liu et al., `Muon is Scalable for LLM
      Training <https://arxiv.org/abs/2502.16982>`_, 2025
    """
    scale = scale_steps(consistent_rms, others_rms, weight_dimension_numbers)
    check_mode("after_vote", after_vote, ("signs", "orthogonalize"))
    if others is not None:
        check_transformation("others", others)
        others = optax.chain(others, optax.scale_by_sign())
    momentum = muon_momentum(beta, nesterov, mu_dtype, weight_dimension_numbers, others)
    orthogonal = orthogonalize(weight_dimension_numbers=weight_dimension_numbers, ns_steps=ns_steps)
    direction = optax.chain(momentum, orthogonal)
    options: dict[str, Any] = {
        "zeros": zeros,
        "ties": ties,
        "transport": transport,
        "split_over": split_over,
        "weights": weights,
        "agreement": agreement,
    }
    workers = find_workers(axis_name, exchange)
    if workers is None:
        check_no_vote_options(options)
        if after_vote != "signs":
            raise ValueError(
                f"after_vote={after_vote!r} is an option of the vote, which axis_name=None leaves "
                "out: pass axis_name, or drop it"
            )
    else:
        vote = majority_vote(axis_name, exchange=exchange, **options)
        behind = orthogonal if after_vote == "orthogonalize" else optax.identity()
        direction = optax.chain(own_updates(workers), hold_if_nonfinite(direction), vote, behind)
    return descend(optax.chain(direction, scale), learning_rate, weight_decay, mask)


def muon_momentum(
    beta: float,
    nesterov: bool,
    dtype: Any,
    weight_dimension_numbers: DimensionNumbers,
    others: optax.GradientTransformation | None,
) -> optax.GradientTransformationExtraArgs:
    """Muon's momentum for matrices, not yet orthogonalised, and `others` for the other leaves.

    By default the other leaves take the signs of Lion.
    """
    check_number("beta", beta, low=0, high=1)
    check_accumulator_dtype(dtype, "mu_dtype")
    if others is None:
        lion = checked(optax.scale_by_lion(mu_dtype=dtype), memory="mu")
        others = optax.chain(lion, optax.scale_by_sign())
    check_transformation("others", others)

    def label(params: optax.Params) -> Any:
        numbers = dimension_numbers(params, weight_dimension_numbers)
        labels = [OTHER if entry is None else MATRIX for entry in numbers]
        return jax.tree.structure(params).unflatten(labels)

    of_matrices = _momentum(beta, nesterov, dtype)
    return optax.chain(
        _check_inputs(), optax.partition({MATRIX: of_matrices, OTHER: others}, label)
    )


def scale_steps(
    consistent_rms: float, others_rms: float, weight_dimension_numbers: DimensionNumbers
) -> optax.GradientTransformation:
    """Multiply the directions of matrices by one number, and all other directions by another."""
    check_number("consistent_rms", consistent_rms, low=0)
    check_number("others_rms", others_rms, low=0)

    def scale(updates: optax.Updates, params: Any) -> optax.Updates:
        del params
        numbers = dimension_numbers(updates, weight_dimension_numbers)
        scaled = [
            leaf * (others_rms if entry is None else consistent_rms)
            for leaf, entry in zip(jax.tree.leaves(updates), numbers, strict=True)
        ]
        return jax.tree.structure(updates).unflatten(scaled)

    return checked(optax.stateless(scale))


def _check_inputs() -> optax.GradientTransformation:
    """Raise if a leaf is no gradient of its parameter, before the leaves are dealt into groups."""

    def update_fn(updates: optax.Updates, state: Any, params: Any = None):
        check_floating(updates)
        if params is not None:
            check_params(updates, params)
        return updates, state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


def _momentum(beta: float, nesterov: bool, dtype: Any) -> optax.GradientTransformation:
    """The momentum of `optax.contrib.scale_by_muon`, whose updates are not orthogonalised yet."""

    def init_fn(params: optax.Params):
        check_floating(params, "params", only_arrays=False)
        momentum = optax.tree.zeros_like(params, dtype=dtype)
        return MuonMomentumState(jnp.zeros([], jnp.int32), momentum)

    def update_fn(updates: optax.Updates, state: Any, params: Any = None):
        del params
        check_floating(updates)
        check_alike("updates", updates, "state.momentum", state.momentum)
        count = optax.safe_increment(state.count)
        with jax.numpy_dtype_promotion("standard"), jax.named_scope("signax.momentum"):
            momentum = optax.tree.update_moment(updates, state.momentum, beta, 1)
            direction = momentum
            if nesterov:
                # Optax's direction times 1 - beta, so that large gradients do not overflow.
                ahead = beta * (1 - beta) / (1 - beta ** (count + 1))
                own = (1 - beta) ** 2 / (1 - beta**count)
                direction = jax.tree.map(lambda m, g: ahead * m + own * g, momentum, updates)
            direction = optax.tree.cast_like(direction, updates)
            momentum = optax.tree.cast_like(momentum, state.momentum)
        return direction, MuonMomentumState(count, momentum)

    return optax.GradientTransformation(init_fn, update_fn)
