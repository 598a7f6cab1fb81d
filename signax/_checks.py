"""Checks of arguments: each error names the argument, the value it got, and what to do."""

import operator
from collections.abc import Hashable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np


def check_mode(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Refuses a mode that is none of the `allowed` strings."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(map(repr, allowed))}")


def is_traced(value: Any) -> bool:
    """Whether a value is known only once the compiled program runs."""
    return isinstance(value, jax.core.Tracer)


def check_number(
    name: str, value: Any, *, low: float, high: float = float("inf"), ends: str = "[)"
) -> None:
    """Refuses a concrete number outside the interval; a traced one is let through.

    `ends` says which ends of the interval belong to it, as in `"[)"` or `"(]"`.
    """
    if is_traced(value):
        return
    if isinstance(value, str) or not hasattr(value, "__float__") or jnp.ndim(value) != 0:
        raise TypeError(f"{name}={value!r} is not a number")
    number = float(value)
    above = number >= low if ends[0] == "[" else number > low
    below = number <= high if ends[1] == "]" else number < high
    if not (above and below):
        interval = f"{ends[0]}{low:g}, {high:g}{ends[1]}"
        raise ValueError(f"{name}={value!r} is outside {interval}")


_STATIC = (
    "must be known when the step is built: list {!r} in the static_args of optax.inject_hyperparams"
)


def check_count(name: str, value: Any) -> None:
    """Refuses what is no whole number from 1 on."""
    if isinstance(value, jax.Array):
        raise TypeError(f"{name} {_STATIC.format(name)}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r} must be a whole number") from None
    if number < 1:
        raise ValueError(f"{name}={value!r} must be at least 1")


def check_block(block: Any, allowed: tuple[str, ...]) -> Any:
    """The block, of Python's own types; refuses what is neither allowed nor a size."""
    if isinstance(block, jax.Array):
        raise TypeError(f"block {_STATIC.format('block')}")
    if isinstance(block, np.integer):
        block = int(block)
    is_size = isinstance(block, int) and not isinstance(block, bool) and block > 0
    if not is_size and block not in allowed:
        raise ValueError(
            f"block={block!r} is unknown: use {', '.join(map(repr, allowed))} or a positive number "
            "of coordinates"
        )
    return block


def check_accumulator_dtype(dtype: Any) -> None:
    """Refuses a dtype in which a moving average would not move."""
    if dtype is None:
        return
    try:
        floating = jnp.issubdtype(dtype, jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise ValueError(
            f"accumulator_dtype={dtype!r} is no floating-point dtype, such as jnp.float32; under "
            "optax.inject_hyperparams list 'accumulator_dtype' in the static_args"
        )


def check_flag(name: str, value: Any) -> None:
    """Refuses what is not one boolean."""
    dtype = getattr(value, "dtype", type(value))
    if dtype not in (bool, jnp.bool_) or jnp.ndim(value) != 0:
        raise TypeError(f"{name}={value!r} must be one boolean for each worker")


def check_axis_name(axis_name: Hashable) -> None:
    """Refuses what cannot name a mapped axis, or several in a tuple."""
    axes = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if not axes or None in axes or isinstance(axis_name, (list, set)):
        raise TypeError(
            f"axis_name={axis_name!r} must name one mapped axis, such as 'data', or several in a "
            "tuple, such as ('slice', 'data')"
        )
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis_name={axis_name!r} names an axis twice")


def check_floating(tree: Any, name: str = "updates", *, only_arrays: bool = True) -> None:
    """Refuses leaves that are not arrays of real floating-point numbers of 16 bits or more.

    What is looked at for its shape and dtype only may be a number of Python's.
    """
    for path, leaf in jax.tree.leaves_with_path(tree):
        place = f"{name}{jax.tree_util.keystr(path)}"
        if not hasattr(leaf, "dtype"):
            if not only_arrays and isinstance(leaf, float):
                continue
            raise TypeError(f"{place}={leaf!r} is not an array: make one with jnp.asarray")
        dtype = leaf.dtype
        if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 16:
            raise TypeError(
                f"{place} has dtype {dtype}: signs are taken of real floating-point leaves of 16, "
                "32 or 64 bits only; leave other leaves out with optax.masked"
            )


def check_alike(
    name: str,
    tree: Any,
    other_name: str,
    other: Any,
    remedy: str = "the state must come from init on the same parameters",
) -> None:
    """Refuses two trees of different structure, or with leaves of different shapes."""
    structure, expected = jax.tree.structure(tree), jax.tree.structure(other)
    if structure != expected:
        raise ValueError(
            f"{name} and {other_name} differ in structure: {name} is {structure}, "
            f"{other_name} is {expected}; {remedy}"
        )
    for (path, leaf), other_leaf in zip(
        jax.tree.leaves_with_path(tree), jax.tree.leaves(other), strict=True
    ):
        if jnp.shape(leaf) != jnp.shape(other_leaf):
            place = jax.tree_util.keystr(path)
            raise ValueError(
                f"{name}{place} has shape {jnp.shape(leaf)}, but {other_name}{place} has "
                f"{jnp.shape(other_leaf)}; {remedy}"
            )


def check_params(updates: Any, params: Any) -> None:
    """Refuses parameters that are not like the updates; an update may be `None`, as for Optax."""

    def check(path, update, param):
        if update is not None and jnp.shape(update) != jnp.shape(param):
            place = jax.tree_util.keystr(path)
            wrong.append(
                f"updates{place} has shape {jnp.shape(update)}, but params{place} has "
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


def check_transformation(name: str, value: Any) -> None:
    """Refuses what is not an Optax transformation, such as the function that makes one."""
    if not (hasattr(value, "init") and hasattr(value, "update")):
        raise TypeError(
            f"{name}={value!r} is not a gradient transformation: pass what calling signax.<name>() "
            "or optax.<name>() returns"
        )


def check_key(key: Any) -> None:
    """Refuses what is not one JAX random key, typed or raw."""
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    raw = dtype == jnp.uint32 and jnp.ndim(key) == 1
    if not (raw or (typed and jnp.ndim(key) == 0)):
        raise TypeError(f"key={key!r} is not a random key: make one with jax.random.key(seed)")
