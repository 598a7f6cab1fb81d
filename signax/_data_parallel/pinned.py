"""Find out, while a step is compiled, whether a state's rows are pinned to a wrong sharding.

A training stack may infer the shardings of the optimiser state from the parameters and pin them.
Rows then lie on every device, and XLA gathers them in full precision at every step. Under Explicit
axes the types of old rows show their shardings. The shardings of new rows, and of all rows under
Auto axes, show only in the lowered program.
"""

import warnings
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import PartitionSpec

from signax._core.leaves import axis_names, entry_axes, spec_axes
from signax._data_parallel.layout import Leaf
from signax._data_parallel.placement import Layouts, Workers, state_leaves
from signax._data_parallel.watching import End, Spec, watch

OnWrongSharding = Literal["raise", "warn"]

Pins = Sequence[Spec | None]


def watch_update(
    update: Callable[..., Any], workers: Workers, layout_of: Layouts, mode: OnWrongSharding
) -> Callable[..., Any]:
    """Let an update report wrong shardings of its rows, old and new."""

    def watched(updates: Any, state: Any, params: Any, *arguments: Any) -> tuple[Any, Any]:
        layout = layout_of(workers.params_like(updates) if params is None else params)

        def watch_rows(state: Any, end: End, check: Callable[..., None]) -> Any:
            leaves = [
                watch(array, end, partial(check, workers, mode, leaf))
                if leaf.per_worker and isinstance(array, jax.Array) and array.size
                else array
                for array, leaf in zip(state_leaves(state, layout), layout.leaves, strict=True)
            ]
            return jax.tree.structure(state).unflatten(leaves)

        if has_auto_axes(workers):  # otherwise types show it
            state = watch_rows(state, "argument", _check_rows)
            params = watch_params(params, workers, mode)
        updates, state = update(updates, state, params, *arguments)
        return updates, watch_rows(state, "result", _check_new_rows)

    return watched if workers.num_workers > 1 else update


def watch_params(params: Any, workers: Workers, mode: OnWrongSharding) -> Any:
    """Return parameters, and report shardings that `param_specs` should name."""
    if params is None or workers.param_specs is not None:
        return params

    def watched(path: Any, array: Any):
        name = f"params{jax.tree_util.keystr(path)}"
        check = partial(_check_param, name, workers, mode)
        return watch(array, "argument", check) if isinstance(array, jax.Array) else array

    return jax.tree.map_with_path(watched, params)


def has_auto_axes(workers: Workers) -> bool:
    """Whether the sharding of rows is not part of their types, and there are rows to gather."""
    return workers.num_workers > 1 and not workers.explicit.issuperset(
        axis_names(workers.axis_name)
    )


def report_rows(
    workers: Workers, mode: OnWrongSharding, leaf: Leaf, spec: Spec, name: str = "state"
) -> None:
    """Report rows that do not lie along the workers' axis, or not like the parameter inside."""
    have_rows, right = _compare(workers, leaf, spec)
    if right:
        return
    size = (workers.num_workers - 1) * int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize
    moved = "reshard the rows" if have_rows else f"gather the rows of all workers, {size:,} bytes,"
    _report(
        mode,
        f"{name}{leaf.path} is pinned to {_written(spec)}, but its rows lie as "
        f"{leaf.sharding.spec}: XLA would {moved} at every step. Pin the state to "
        "DataParallel.state_shardings(params)",
    )


def _compare(workers: Workers, leaf: Leaf, spec: Spec) -> tuple[bool, bool]:
    """Whether rows lie along the workers' axis, and whether they lie right inside too."""
    cut = {axis for axis, size in workers.mesh.shape.items() if size > 1}
    wanted = [cut & {*entry_axes(entry)} for entry in leaf.sharding.spec]
    wanted += [set[Hashable]()] * (len(spec) - len(wanted))
    found = [cut & {*axes} for axes in spec]
    have_rows = cut & {*axis_names(workers.axis_name)} <= found[0]
    return have_rows, have_rows and (workers.param_specs is None or found[1:] == wanted[1:])


def _check_rows(workers: Workers, mode: OnWrongSharding, leaf: Leaf, pins: Pins) -> None:
    for spec in pins:
        if spec is not None:
            report_rows(workers, mode, leaf, spec)


def _check_new_rows(workers: Workers, mode: OnWrongSharding, leaf: Leaf, pins: Pins) -> None:
    """Report new rows, unless the program also returns them right, or as XLA chooses.

    A program may return the rows once more for another purpose, such as a report.
    """
    wrong = [spec for spec in pins if spec is not None and not _compare(workers, leaf, spec)[1]]
    if wrong and len(wrong) == len(pins):
        report_rows(workers, mode, leaf, wrong[0], "the new state")


def _check_param(name: str, workers: Workers, mode: OnWrongSharding, pins: Pins) -> None:
    """Report a parameter that is sharded, though `param_specs` does not say so."""
    shape = workers.mesh.shape
    for spec in pins:
        axes = [] if spec is None else spec_axes(PartitionSpec(*spec))
        if spec and any(shape.get(axis, 1) > 1 for axis in axes if axis not in workers.inside):
            _report(
                mode,
                f"{name} is sharded as {_written(spec)}, but param_specs is not given: XLA would "
                "gather it, and its state would lie whole on every device. Pass param_specs, such "
                "as jax.tree.map(lambda p: p.sharding.spec, params)",
            )


def _written(spec: Spec) -> PartitionSpec:
    entries = [axes[0] if len(axes) == 1 else axes or None for axes in spec]
    return PartitionSpec(*entries)


def _report(mode: OnWrongSharding, message: str) -> None:
    if mode == "raise":
        raise ValueError(message)
    warnings.warn(message, stacklevel=2)
