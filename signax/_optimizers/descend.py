"""From a direction to steps: weight decay and the learning rate, the same for every optimiser."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from signax._core.checks import check_number
from signax._transforms.memory import checked

Mask = Any | Callable[[optax.Params], Any] | None


def descend(
    direction: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule,
    mask: Mask,
) -> optax.GradientTransformationExtraArgs:
    """Chain a direction, decoupled weight decay and the learning rate.

    Updates keep the dtypes of their leaves, even if a rate has another dtype.
    """
    if not callable(learning_rate):
        check_number("learning_rate", learning_rate, low=-math.inf, ends="()")
    if isinstance(mask, (bool, jax.Array)):  # A mask function returned it for a step count.
        raise TypeError(
            f"mask={mask!r} must be a tree of booleans like the parameters, or a function: list "
            "'mask' in the static_args of optax.inject_hyperparams, which takes it for a schedule"
        )
    if callable(weight_decay):
        decays = True
    else:
        check_number("weight_decay", weight_decay, low=0)
        decays = not (isinstance(weight_decay, (int, float)) and weight_decay == 0)
    # `optax.add_decayed_weights` raises without parameters, even if the decay is 0.
    decay = checked(_add_decay(weight_decay, mask)) if decays else optax.identity()
    return optax.chain(direction, decay, checked(optax.scale_by_learning_rate(learning_rate)))


def _add_decay(weight_decay: Any, mask: Mask) -> optax.GradientTransformation:
    """`optax.add_decayed_weights` that raises if a parameter would silently broadcast."""
    decay = optax.add_decayed_weights(weight_decay, mask)

    def update_fn(updates: optax.Updates, state: Any, params: Any = None):
        if params is not None:
            check_params(updates, params)
        return decay.update(updates, state, params)

    return optax.GradientTransformation(decay.init, update_fn)


def check_params(updates: Any, params: Any) -> None:
    """Raise if updates and parameters differ in shape or structure. An update may be `None`."""

    def check(path: Any, update: Any, param: Any):
        if update is not None and jnp.shape(update) != jnp.shape(param):
            where = jax.tree_util.keystr(path)
            wrong.append(
                f"updates{where} has shape {jnp.shape(update)}, but params{where} has "
                f"{jnp.shape(param)}"
            )

    wrong = []
    try:
        jax.tree.map_with_path(check, updates, params, is_leaf=lambda node: node is None)
    except (ValueError, TypeError):
        wrong = [
            f"updates and params differ in structure: updates is {jax.tree.structure(updates)}, "
            f"params is {jax.tree.structure(params)}"
        ]
    if wrong:
        raise ValueError(f"{wrong[0]}; pass the parameters that the updates are for")
