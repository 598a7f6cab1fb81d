"""Muon by means of scaled signs with error feedback: what signs lose is sent in later steps."""

from collections.abc import Hashable
from typing import Any, Literal

import optax

from signax._optimizers.descend import Mask, descend
from signax._optimizers.muon import muon_momentum, scale_steps
from signax._transforms.compressors import scale_by_scaled_sign
from signax._transforms.memory import error_feedback
from signax._transforms.orthogonal import DimensionNumbers, orthogonalize
from signax._transforms.participation import hold_if_nonfinite
from signax._wire.feedback import Feedback
from signax._workers.compressed import mean_scaled_signs
from signax._workers.votes import own_updates


def ef_muon(
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
    block: Literal["leaf"] | int = "leaf",
    decay: float = 0.5,
    accumulator_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    axis_name: Hashable | None = None,
    feedback: Feedback = "both",
    num_workers: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon with error feedback, by the mean of the workers' scaled signs.

    .. math:: m_i \leftarrow \beta m_i + (1 - \beta) g_i, \quad
      O_i = \operatorname{polar}(\beta m_i + (1 - \beta) g_i), \quad
      x \leftarrow x - \alpha \left( \rho \operatorname{polar}(\operatorname{mean} C(O_i))
      + \lambda x \right)

    for matrices, where :math:`\operatorname{polar}` is :func:`signax.orthogonalize`, of root mean
    square 1, and :math:`\operatorname{mean} C` is :func:`signax.mean_scaled_signs`, with memories
    of workers and servers. The other leaves take the mean of the workers' Lion directions, by the
    same exchange. One bit per coordinate travels each way.

    The polar factor comes twice. The first gives the entries of a matrix one spread, so that a
    scaled sign loses little. The second removes what compressing and remembering added to the
    singular values. Memories should forget, by a `decay` below 1: a memory that keeps everything
    makes steps late, and Muon turns late steps to full length. Parameters then move in directions
    that the gradients no longer have.

    Compared with :func:`signax.muon`, two memories per parameter buy a loss nearer to Muon's in
    full precision. A worker whose gradient is not finite is excluded, and keeps its momentum and
    memory. Without an axis there is one worker, which compresses its own direction and is never
    excluded: a NaN enters its state, as in Optax.

    Args:
      learning_rate: the step size :math:`\alpha`, a number or a schedule. AdamW's is a starting
        point. Try twice and four times that size too.
      beta: the decay :math:`\beta` of the momentum, in [0, 1).
      nesterov: see :func:`signax.muon`.
      mu_dtype: the dtype of the momentum; by default the parameters' dtype.
      weight_dimension_numbers: the leaves that are matrices, and their axes, see
        :func:`signax.orthogonalize`. By default all leaves of two axes.
      others: a transformation of one worker for the other leaves; its updates are compressed. By
        default the signs of `optax.scale_by_lion`. Do not pass an optimiser, whose learning
        rate reverses the sign.
      consistent_rms: see :func:`signax.muon`.
      others_rms: see :func:`signax.muon`.
      ns_steps: the number of Newton-Schulz iterations.
      block: see :func:`signax.mean_scaled_signs`.
      decay: the share of the memories that is added, in [0, 1].
      accumulator_dtype: the dtype of the memories; by default the parameters' dtype.
      weight_decay: the decoupled weight decay :math:`\lambda`, times the learning rate. The decay
        does not enter the memories.
      mask: which leaves decay: a tree of booleans, or a function from parameters to such a tree.
      axis_name: the mapped axis along which the workers lie; `None` for one worker.
      feedback: see :func:`signax.mean_scaled_signs`.
      num_workers: see :func:`signax.mean_scaled_signs`.

    Returns:
      The optimiser.

    Raises:
      ValueError: an option is unknown or out of range, or an option of the mean is given without
        `axis_name`; at `init` and at the update, as in :func:`signax.orthogonalize` and
        :func:`signax.mean_scaled_signs`.
      TypeError: an option is of the wrong kind; at `init` and at the update, a leaf is not
        floating-point.
      NameError: at the update, the axis is not bound; at `init`, the number of workers is unknown.

    Examples:
      >>> import jax.numpy as jnp, optax, signax
      >>> tx = signax.ef_muon(0.5, consistent_rms=1.0, others_rms=1.0)
      >>> params = {"w": jnp.zeros((2, 2)), "b": jnp.zeros(2)}
      >>> gradients = {"w": jnp.array([[3.0, -4.0], [4.0, 3.0]]), "b": jnp.array([2.0, -1.0])}
      >>> updates, state = tx.update(gradients, tx.init(params))
      >>> print(updates["w"].round(1), updates["b"].round(1))  # Newton-Schulz approximates 0.5
      [[-0.6  0.6]
       [-0.6 -0.6]] [-0.5  0.5]

    References:
      Karimireddy et al., `Error Feedback Fixes SignSGD and other Gradient Compression Schemes
      <https://arxiv.org/abs/1901.09847>`_, 2019; Jordan et al., `Muon: An optimizer for hidden
      layers in neural networks <https://kellerjordan.github.io/posts/muon/>`_, 2024; Liu et al.,
      `Muon is Scalable for LLM Training <https://arxiv.org/abs/2502.16982>`_, 2025
    """
    scale = scale_steps(consistent_rms, others_rms, weight_dimension_numbers)
    momentum = muon_momentum(beta, nesterov, mu_dtype, weight_dimension_numbers, others)
    orthogonal = orthogonalize(weight_dimension_numbers=weight_dimension_numbers, ns_steps=ns_steps)
    direction = optax.chain(momentum, orthogonal)

    if axis_name is not None:
        mean = mean_scaled_signs(
            axis_name,
            feedback=feedback,
            block=block,
            decay=decay,
            accumulator_dtype=accumulator_dtype,
            num_workers=num_workers,
        )
        direction = optax.chain(own_updates(axis_name), hold_if_nonfinite(direction), mean)
    elif (feedback, num_workers) != ("both", None):
        raise ValueError(
            f"feedback={feedback!r} and num_workers={num_workers!r} are options of the mean over "
            "workers, which axis_name=None leaves out: pass axis_name, or drop them"
        )
    else:
        compressed = scale_by_scaled_sign(block=block)
        memory = error_feedback(compressed, decay=decay, accumulator_dtype=accumulator_dtype)
        direction = optax.chain(direction, memory)
    direction = optax.chain(direction, orthogonal, scale)
    return descend(direction, learning_rate, weight_decay, mask)
