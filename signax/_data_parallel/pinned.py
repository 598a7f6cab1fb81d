"""Find out, while a step is compiled, whether a state's rows are pinned to a wrong sharding.

A training stack may infer the shardings of the optimiser state from the parameters and pin them.
Rows then lie on every device, and XLA gathers them in full precision at every step. Under Explicit
axes the type of an array shows its sharding. Under Auto axes only the arguments of the compiled
program do, so a primitive that returns its operand looks at them while it is lowered. It leaves no
trace in the program.
"""

import re
import warnings
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec

from signax._core.leaves import axis_names, entry_axes, spec_axes
from signax._data_parallel.layout import Layout, Leaf
from signax._data_parallel.placement import Layouts, Workers, state_leaves

OnWrongSharding = Literal["raise", "warn"]

Spec = Sequence[tuple[Hashable, ...]]
Check = Callable[[Spec], None]

_watch_p = Primitive("signax_watch_sharding")


def watch(array: jax.Array, check: Check) -> jax.Array:
    """Return an array, and call `check` with its spec if it is an argument of a jitted function.

    `check` is called when the function is lowered. It gets the mesh axes of each dimension. It is
    not called for arguments whose sharding XLA may choose, nor for results of other operations.
    """
    return _watch_p.bind(array, check=check)


def _lower(context: mlir.LoweringRuleContext, value: Any, *, check: Check) -> list[Any]:
    del context
    spec = _argument_spec(value)
    if spec is not None:
        check(spec)
    return [value]


def _argument_spec(value: Any) -> Spec | None:
    """The spec of an argument of the compiled program, from its attribute of Shardy's dialect."""
    if not isinstance(value, ir.BlockArgument):
        return None
    attributes = getattr(value.owner.owner, "arg_attrs", None)
    if attributes is None or "sdy.sharding" not in attributes[value.arg_number]:
        return None
    text = str(attributes[value.arg_number]["sdy.sharding"])
    dimensions = re.search(r">?, \[(.*?)\]", text)
    if dimensions is None or "?" in dimensions[1]:
        return None  # XLA may shard it further
    return [tuple(re.findall(r'"([^"]+)"', axes)) for axes in re.findall(r"{(.*?)}", dimensions[1])]


def watch_update(
    update: Callable[..., Any], workers: Workers, layout_of: Layouts, mode: OnWrongSharding
) -> Callable[..., Any]:
    """Let an update of rows report wrong shardings over Auto axes."""

    def watched(updates: Any, state: Any, params: Any, *arguments: Any) -> tuple[Any, Any]:
        layout = layout_of(workers.params_like(updates) if params is None else params)
        leaves = _watch_rows(state_leaves(state, layout), layout, workers, mode)
        state = jax.tree.structure(state).unflatten(leaves)
        return update(updates, state, watch_params(params, workers, mode), *arguments)

    return watched if has_auto_axes(workers) else update


def _watch_rows(
    leaves: Sequence[Any], layout: Layout, workers: Workers, mode: OnWrongSharding
) -> list[Any]:
    """Return a state's leaves, and report rows that are pinned to a wrong sharding."""

    def watched(array: Any, leaf: Leaf):
        if not leaf.per_worker or not array.size:
            return array
        return _watch(array, partial(report_rows, workers, mode, leaf))

    return [watched(*both) for both in zip(leaves, layout.leaves, strict=True)]


def watch_params(params: Any, workers: Workers, mode: OnWrongSharding) -> Any:
    """Return parameters, and report shardings that `param_specs` should name."""
    if params is None or workers.param_specs is not None:
        return params

    def watched(path: Any, array: Any):
        name = f"params{jax.tree_util.keystr(path)}"
        return _watch(array, partial(_check_param, name, workers, mode))

    return jax.tree.map_with_path(watched, params)


def _watch(array: Any, check: Check) -> Any:
    return watch(array, check) if isinstance(array, jax.Array) else array


def has_auto_axes(workers: Workers) -> bool:
    """Whether the sharding of rows is not part of their types, and there are rows to gather."""
    return workers.num_workers > 1 and not workers.explicit.issuperset(
        axis_names(workers.axis_name)
    )


def report_rows(workers: Workers, mode: OnWrongSharding, leaf: Leaf, spec: Spec) -> None:
    """Report rows that do not lie along the workers' axis, or not like the parameter inside."""
    cut = {axis for axis, size in workers.mesh.shape.items() if size > 1}
    wanted = [cut & {*entry_axes(entry)} for entry in leaf.sharding.spec]
    wanted += [set[Hashable]()] * (len(spec) - len(wanted))
    found = [cut & {*axes} for axes in spec]
    rows = cut & {*axis_names(workers.axis_name)} <= found[0]
    if rows and (workers.param_specs is None or found[1:] == wanted[1:]):
        return
    size = (workers.num_workers - 1) * int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize
    moved = "reshard the rows" if rows else f"gather the rows of all workers, {size:,} bytes,"
    _report(
        mode,
        f"state{leaf.path} is pinned to {_written(spec)}, but its rows lie as "
        f"{leaf.sharding.spec}: XLA would {moved} at every step. Pin the state to "
        "DataParallel.state_shardings(params)",
    )


def _check_param(name: str, workers: Workers, mode: OnWrongSharding, spec: Spec) -> None:
    """Report a parameter that is sharded, though `param_specs` does not say so."""
    shape = workers.mesh.shape
    hidden = [axis for axis in spec_axes(PartitionSpec(*spec)) if axis not in workers.inside]
    if any(shape.get(axis, 1) > 1 for axis in hidden):
        _report(
            mode,
            f"{name} is sharded as {_written(spec)}, but param_specs is not given: XLA would "
            "gather it, and its state would lie whole on every device. Pass param_specs, such as "
            "jax.tree.map(lambda p: p.sharding.spec, params)",
        )


def _written(spec: Spec) -> PartitionSpec:
    entries = [axes[0] if len(axes) == 1 else axes or None for axes in spec]
    return PartitionSpec(*entries)


def _report(mode: OnWrongSharding, message: str) -> None:
    if mode == "raise":
        raise ValueError(message)
    warnings.warn(message, stacklevel=2)


_watch_p.def_impl(lambda array, *, check: array)
_watch_p.def_abstract_eval(lambda array, *, check: array)
mlir.register_lowering(_watch_p, _lower, cacheable=False)
ad.deflinear2(_watch_p, lambda cotangent, *_, check: [cotangent])
batching.primitive_batchers[_watch_p] = lambda arrays, axes, *, check: (arrays[0], axes[0])
