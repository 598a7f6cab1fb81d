"""Functions that are called outside `jax.jit`, compiled once for each program."""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

_LARGEST_NUMBER = 64


class Programs:
    """Compiled programs of functions of arrays, found by their text.

    A function is traced at every call, which takes milliseconds, so it may read other Python values
    than before. `jax.jit` would go on with the old values.
    """

    def __init__(self):
        self._compiled: dict[Any, Any] = {}

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function, and compile it if no earlier call had the same program."""

        def of_all_workers(*arguments: Any):  # jax.jit knows no other call of this function
            return function(*arguments)

        jitted = jax.jit(of_all_workers)
        if jax.config.jax_disable_jit or jax.config.jax_debug_nans or jax.config.jax_debug_infs:
            return jitted(*arguments)  # it runs operations one by one, which a program cannot
        lowered = jitted.lower(*arguments)
        text = lowered.as_text()
        if "callback" in text:  # the text does not say which function it calls
            return lowered.compile()(*arguments)
        key = hashlib.sha256(text.encode()).digest(), lowered.in_tree, lowered.out_tree
        compiled = self._compiled.pop(key, None)
        if compiled is None:
            compiled = lowered.compile()
        self._compiled[key] = compiled  # the last used program comes last
        if len(self._compiled) > _LARGEST_NUMBER:
            del self._compiled[next(iter(self._compiled))]
        return compiled(*arguments)


def split_arrays(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments that are trees of arrays, and the others."""

    def are_arrays(value: Any) -> bool:
        leaves = jax.tree.leaves(value)
        return bool(leaves) and all(isinstance(leaf, jax.Array) for leaf in leaves)

    arrays = {name: value for name, value in arguments.items() if are_arrays(value)}
    return arrays, {name: arguments[name] for name in arguments.keys() - arrays.keys()}


def static_arguments(extra_args: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The arguments that stay Python values: functions, names and whole numbers, for example."""
    kinds = jax.Array, np.ndarray, np.number, np.bool_, float
    return tuple(
        [
            (name, value)
            for name, value in extra_args.items()
            if not all(isinstance(leaf, kinds) for leaf in jax.tree.leaves(value))
        ]
    )


def are_constant(arguments: tuple[tuple[str, Any], ...]) -> bool:
    """Whether static arguments can be hashed and never change.

    A function is equal to itself even if the values that it reads have changed.
    """
    leaves = jax.tree.leaves(arguments)
    if not all(isinstance(leaf, (str, bytes, int, complex)) for leaf in leaves):
        return False
    try:
        hash(arguments)
    except TypeError:
        return False
    return True
