"""Maps of a traced program, which run once more with a changed function."""

from collections.abc import Callable, Hashable
from typing import Any

import jax


def mapped_axes(params: dict[str, Any]) -> frozenset[Hashable]:
    """The mesh axes of a `jax.shard_map`, from the parameters of its equation."""
    # JAX 0.12 renamed them.
    name = "newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"
    return frozenset(params[name])


def map_again(
    function: Callable[..., Any], params: dict[str, Any], *, check_vma: bool
) -> Callable[..., Any]:
    """Map a function as an equation with these parameters does, on the mesh of the context."""
    return jax.shard_map(
        function,
        in_specs=tuple(params["in_specs"]),
        out_specs=[*params["out_specs"]],
        axis_names={*mapped_axes(params)},
        check_vma=check_vma,
    )
