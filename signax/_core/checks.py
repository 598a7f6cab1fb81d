"""Checks of options: an error names the argument, the value that was passed, and a remedy."""

import functools
import operator
import warnings
from collections.abc import Callable, Hashable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from signax._core.leaves import is_traced

P = ParamSpec("P")
R = TypeVar("R")


def renamed(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function to accept old names of arguments, `old="new"`, with a warning."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            for old, new in names.items():
                if old in kwargs and new in kwargs:
                    raise ValueError(
                        f"{old}={kwargs[old]!r} and {new}={kwargs[new]!r} are one option: pass "
                        f"{new} alone"
                    )
                if old in kwargs:
                    message = f"{function.__name__}({old}=...) is deprecated: use {new}=..."
                    warnings.warn(message, DeprecationWarning, stacklevel=2)
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapper

    return decorate


def check_mode(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise if a mode is not one of the `allowed` strings."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(map(repr, allowed))}")


def check_number(
    name: str, value: Any, *, low: float, high: float = float("inf"), ends: str = "[)"
) -> None:
    """Raise if a concrete number lies outside an interval; traced numbers pass.

    `ends` says which ends belong to the interval, as in `"[)"` or `"(]"`.
    """
    if is_traced(value):
        return
    is_real = hasattr(value, "__float__") and not np.iscomplexobj(value)
    if isinstance(value, str) or not is_real or jnp.ndim(value) != 0:
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
    """Raise if a value is not a whole number of at least 1."""
    if isinstance(value, jax.Array):
        raise TypeError(f"{name} {_STATIC.format(name)}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r} must be a whole number") from None
    if number < 1:
        raise ValueError(f"{name}={value!r} must be at least 1")


def check_block(block: Any, allowed: tuple[str, ...]) -> Any:
    """Return a block size as a Python value; raise if it is neither allowed nor a size."""
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


def check_accumulator_dtype(dtype: Any, name: str = "accumulator_dtype") -> None:
    """Raise if a moving average could not move in a dtype."""
    if dtype is None:
        return
    try:
        # Under inject_hyperparams a dtype is called as a schedule, and returns an array.
        is_array = isinstance(dtype, (jax.Array, np.ndarray, np.generic))
        floating = not is_array and jnp.issubdtype(dtype, jnp.floating)
    except TypeError:
        floating = False
    if not (floating and jnp.finfo(dtype).bits >= 16):
        raise ValueError(
            f"{name}={dtype!r} is no floating-point dtype of at least 16 bits, such as "
            f"jnp.float32; under optax.inject_hyperparams list {name!r} in the static_args"
        )


def check_flag(name: str, value: Any) -> None:
    """Raise if a value is not a single boolean."""
    dtype = getattr(value, "dtype", type(value))
    if dtype not in (bool, jnp.bool_) or jnp.ndim(value) != 0:
        raise TypeError(f"{name}={value!r} must be one boolean for each worker")


def check_axis_name(axis_name: Hashable) -> None:
    """Raise if a value cannot name a mapped axis, or several in a tuple."""
    axes = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if not axes or None in axes or isinstance(axis_name, (list, set)):
        raise TypeError(
            f"axis_name={axis_name!r} must name one mapped axis, such as 'data', or several in a "
            "tuple, such as ('slice', 'data')"
        )
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis_name={axis_name!r} names an axis twice")


def check_learning_rate(learning_rate: Any) -> None:
    """Raise if a learning rate is neither a number nor a schedule, nor `None`."""
    if learning_rate is not None and not callable(learning_rate):
        check_number("learning_rate", learning_rate, low=-float("inf"), ends="()")


def check_transformation(name: str, value: Any) -> None:
    """Raise if a value is not an Optax transformation, for example a function that makes one."""
    if not (hasattr(value, "init") and hasattr(value, "update")):
        raise TypeError(
            f"{name}={value!r} is not a gradient transformation: pass what calling signax.<name>() "
            "or optax.<name>() returns"
        )


def check_key(key: Any) -> None:
    """Raise if a value is not a single JAX random key, typed or raw."""
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    raw = dtype == jnp.uint32 and jnp.ndim(key) == 1
    if not (raw or (typed and jnp.ndim(key) == 0)):
        raise TypeError(f"key={key!r} is not a random key: make one with jax.random.key(seed)")
