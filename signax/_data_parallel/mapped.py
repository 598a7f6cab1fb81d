"""Functions that run on every worker: its gradient, its initial state, and its update."""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec

from signax._core.checks import check_count, check_key
from signax._core.leaves import axis_names, is_traced, is_traced_call, varying_axes
from signax._data_parallel.auxiliary import aux_specs, check_aux, combine_aux
from signax._data_parallel.captured import (
    Hoisted,
    captured_error,
    check_constraint,
    hoist,
    is_of_captured,
    local_shape,
)
from signax._data_parallel.eager import Programs, split_arrays
from signax._data_parallel.layout import Layout
from signax._data_parallel.pieces import Differentiate, OfShare, local_value_and_grad
from signax._data_parallel.placement import Report, Workers, add_axis, check_state, state_leaves
from signax._transforms.participation import Extras
from signax._wire.feedback import with_specs


def check_batch(batch: Any, num_workers: int, pieces: int, name: str) -> None:
    """Raise if a batch cannot be cut into equal shares, and each share into equal pieces."""
    for path, leaf in jax.tree.leaves_with_path(batch):
        shape = jnp.shape(leaf)
        if not shape or shape[0] % (num_workers * pieces):
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} has shape {shape}, whose first axis is not a "
                f"multiple of {num_workers} workers times {name}={pieces}: drop or pad "
                "examples. Pass a random key as key=, and other arguments that are not to be "
                "split after the batch"
            )


class _Gradient(NamedTuple):
    """The gradient of every worker, or its local steps, on global arrays.

    Attributes:
      differentiate: the loss, aux and gradient of one piece of the batch.
      workers: the workers of the mesh.
      pieces: the number of pieces in each worker's share.
      of_share: what a worker computes from its share of the batch.
      aux: the mode of aux, or a tree of modes; `None` if there is no aux.
    """

    differentiate: Differentiate
    workers: Workers
    pieces: int
    of_share: OfShare
    aux: Any

    def run(
        self, differentiate: Callable[..., Any], captured: list[Any], *arguments: Any
    ) -> tuple[Any, Any, Any, Any]:
        """The loss, aux, rows and own state, with captured arrays as a first argument."""
        workers = self.workers

        def of_worker(captured: Any, params: Any, own: Any, batch: Any, replicated: Any, key: Any):
            if key is not None:
                key = jax.random.fold_in(key, lax.axis_index(workers.axis_name))
            own = jax.tree.map(lambda row: row.squeeze(0), own)
            differentiate_here = partial(differentiate, captured)
            loss, aux, *rows = self.of_share(
                differentiate_here, params, batch, replicated, key, self.pieces, own
            )
            if self.aux is not None:
                aux = combine_aux(aux, self.aux, loss, self.pieces, workers)
            return workers.mean_of_finite(loss), aux, *jax.tree.map(add_axis, rows)

        # Every worker's row is its own, so types have nothing to prove here. With varying types a
        # loss could not start a scan from a constant, and gradients would not be the worker's own.
        whole, split = PartitionSpec(), PartitionSpec(workers.axis_name)
        in_specs = whole, whole, split, split, whole, whole
        of_aux = whole if self.aux is None else aux_specs(self.aux, workers)
        out_specs = whole, of_aux, split, split
        mapped = workers.shard_map(of_worker, in_specs, out_specs, check_vma=False)
        return mapped(workers.reshard(captured), *self._place(*arguments))

    def run_or_hoist(self, *arguments: Any) -> tuple[Any, Any, Any, Any]:
        """Run, and pass on as arguments what the loss function captures if JAX demands that."""

        def differentiate(captured: Any, *inputs: Any):
            del captured
            return self.differentiate(*inputs)

        try:
            return self.run(differentiate, [], *arguments)
        except (NotImplementedError, TypeError, ValueError) as error:
            check_constraint(error, self.workers.axis_name)
            # A captured array whose type has Explicit axes may be the cause.
            if not self.workers.explicit:
                raise
            hoisted = self.hoist(*arguments)
            if isinstance(hoisted, Exception) and is_of_captured(error):
                if not any(word in str(hoisted) for word in ("shard", "mesh", "@")):
                    raise hoisted from None  # of the loss function itself
                raise captured_error(str(error).partition("Got input with ")[2]) from error
            if isinstance(hoisted, Exception) or not hoisted.captured:
                raise
            try:
                return self.run(hoisted.call, hoisted.captured, *arguments)
            except (NotImplementedError, TypeError, ValueError) as second:
                if not is_of_captured(second):
                    raise second from None
                types = [str(jax.typeof(array)) for array in hoisted.captured]
                raise captured_error(", ".join(types)) from second

    def hoist(self, *arguments: Any) -> Hoisted | Exception:
        """The gradient of one piece, with captured arrays as an argument, or why there is none."""
        workers, axes = self.workers, axis_names(self.workers.axis_name)
        placed = jax.eval_shape(self._place, *arguments)
        shape = partial(local_shape, mesh=workers.mesh, axes=axes)
        piece = partial(shape, pieces=workers.num_workers * self.pieces)
        params, own, *others = placed
        params = workers.params_like(own[0]) if params is None else params
        params, batch, *others = jax.tree.map(jax.typeof, (params, *others))
        shapes = (*jax.tree.map(shape, (params,)), jax.tree.map(piece, batch))
        try:
            return hoist(
                self.differentiate, (*shapes, *jax.tree.map(shape, others)), workers.mesh, axes
            )
        except Exception as error:  # whatever the loss function raises
            return error

    def _place(self, params: Any, own: Any, batch: Any, replicated: Any, key: Any) -> Any:
        """The arguments as the mesh demands."""
        own, batch = self.workers.reshard((own, batch), per_worker=True)
        replicated, key = self.workers.reshard((replicated, key))
        return self.workers.reshard_params(params), own, batch, replicated, key


def map_gradient(
    loss_fn: Callable[..., Any],
    workers: Workers,
    programs: Programs,
    local: optax.GradientTransformation | None = None,
    *,
    has_aux: bool,
    pieces: int,
    aux: Any,
    of_share: OfShare | None = None,
) -> Callable[..., Any]:
    """Return `f(params, own_state, batch, replicated, key) -> (value, rows, own_state)`.

    Rows are gradients, or with `local` differences of parameters, or what `of_share` returns.
    `programs` compiles the calls that are outside `jax.jit`.
    """
    name = "accumulate" if local is None else "num_local_steps"
    check_count(name, pieces)
    if has_aux or aux != "rows":
        check_aux(aux, has_aux)

    def loss_and_aux(*args: Any, **kwargs: Any):
        value = loss_fn(*args, **kwargs)
        return value if has_aux else (value, None)

    def differentiate(params: Any, piece: Any, replicated: tuple[Any, ...], key: Any):
        keyword = {} if key is None else {"key": key}
        with_gradient = jax.value_and_grad(loss_and_aux, has_aux=True)
        return with_gradient(params, piece, *replicated, **keyword)

    of_share = of_share or partial(local_value_and_grad, local=local)
    mapped = _Gradient(differentiate, workers, pieces, of_share, aux if has_aux else None)

    def gradient(*arguments: Any):
        _, _, batch, _, key = arguments
        check_batch(batch, workers.num_workers, pieces, name)
        if key is not None:
            check_key(key)
        if is_traced_call(arguments):
            loss, values, rows, own = mapped.run_or_hoist(*arguments)
        else:
            loss, values, rows, own = _run_compiled(mapped, programs, arguments)
        return ((loss, values) if has_aux else loss), rows, own

    return gradient


def _run_compiled(mapped: _Gradient, programs: Programs, arguments: tuple[Any, ...]) -> Any:
    """Run a compiled program. Captured arrays are arguments, or each would have its program."""
    hoisted = mapped.hoist(*arguments)
    if isinstance(hoisted, Exception) or not hoisted.captured:
        return programs(mapped.run_or_hoist, *arguments)
    if any(map(is_traced, hoisted.captured)):
        return mapped.run_or_hoist(*arguments)  # a transformation such as jax.vmap around it
    try:
        return programs(partial(mapped.run, hoisted.call), hoisted.captured, *arguments)
    except (NotImplementedError, TypeError, ValueError):
        return programs(mapped.run_or_hoist, *arguments)  # it finds out which error to raise


def map_init(
    params: Any, tx: optax.GradientTransformation, workers: Workers, layout: Layout
) -> Any:
    """The state of `params` as global arrays."""

    def init_worker(params: optax.Params):
        init = with_specs(tx.init, workers.specs(params), workers.mesh.shape)
        return _state_rows(init(params), workers, layout)

    mapped = workers.shard_map(init_worker, (PartitionSpec(),), _worker_specs(workers, layout))

    def init(params: optax.Params):
        return mapped(workers.reshard_params(params))

    shardings = [leaf.sharding for leaf in layout.leaves]
    return layout.structure.unflatten(jax.jit(init, out_shardings=shardings)(params))


def map_update(
    tx: optax.GradientTransformationExtraArgs,
    workers: Workers,
    layout_of: Callable[[Any], Layout],
    report: Report,
    updates: Any,
    state: Any,
    params: Any,
    active: Any,
    extra_args: dict[str, Any],
    static: tuple[tuple[str, Any], ...] = (),
) -> tuple[Any, Any]:
    """Updates and new state, from rows of updates and a state of global arrays."""
    like = workers.params_like(updates) if params is None else params
    specs, layout = workers.specs(like), layout_of(like)
    check_state(state, layout, workers.num_workers)
    # Types of Explicit axes forbid that a map captures arrays, so they are arguments of the map.
    arrays, extra_args = split_arrays({**extra_args, **dict(static)})
    arrays.pop("signax", None)
    if specs is not None:
        extra_args["signax"] = Extras(param_specs=specs)
    whole, split = PartitionSpec(), PartitionSpec(workers.axis_name)
    state_specs = _worker_specs(workers, layout)

    # The barriers keep XLA from fusing the axis of rows: it would copy a donated state.
    def update_worker(updates: Any, leaves: list[Any], params: Any, active: Any, arrays: Any):
        extra = {**extra_args, **arrays}
        if active is not None:
            extra["active"] = active.squeeze(0)
        leaves = [
            lax.optimization_barrier(array.squeeze(0)) if leaf.per_worker else array
            for array, leaf in zip(leaves, layout.leaves, strict=True)
        ]
        updates = jax.tree.map(lambda row: row.squeeze(0), updates)
        updates, state = tx.update(updates, layout.structure.unflatten(leaves), params, **extra)
        workers.check_replicated(updates)
        return updates, _state_rows(state, workers, layout)

    mapped = workers.shard_map(
        update_worker, (split, state_specs, whole, split, whole), (whole, state_specs)
    )
    leaves = workers.reshard_state(state_leaves(state, layout), layout, report)
    updates, active = workers.reshard((updates, active), per_worker=True)
    try:
        params, arrays = workers.reshard_params(params), workers.reshard(arrays)
        updates, leaves = mapped(updates, leaves, params, active, arrays)
    except TypeError as error:
        # JAX names the manual axes of two branches only if their types differ in those.
        differs = all(words in str(error) for words in ("cond branches", "manual ax"))
        if differs and layout.is_conditional:
            raise _conditional_vote(workers.axis_name) from error
        raise
    leaves = workers.constrain(leaves, [leaf.sharding.spec for leaf in layout.leaves])
    return updates, jax.tree.structure(state).unflatten(leaves)


def _worker_specs(workers: Workers, layout: Layout) -> list[PartitionSpec]:
    """The specs of a state over the workers' axis alone."""
    row, whole = PartitionSpec(workers.axis_name), PartitionSpec()
    return [row if leaf.per_worker else whole for leaf in layout.leaves]


def _state_rows(state: Any, workers: Workers, layout: Layout) -> list[jax.Array]:
    """One worker's rows of the leaves of its state."""
    structure = jax.tree.structure(state)
    if structure != layout.structure:
        raise ValueError(
            f"tx changes the structure of its state from {layout.structure} to {structure}"
        )
    rows = []
    for array, leaf in zip(jax.tree.leaves(state), layout.leaves, strict=True):
        array = jnp.asarray(array)
        if not leaf.per_worker and varying_axes(array, workers.axis_name):
            if array.size:
                raise ValueError(
                    f"state{leaf.path} differs between workers but is to be shared: let per_worker "
                    "return True for it"
                )
            array = jnp.zeros(array.shape, array.dtype)  # nothing in it can differ
        rows.append(workers.row(lax.optimization_barrier(array)) if leaf.per_worker else array)
    return rows


def _conditional_vote(axis_name: Hashable) -> ValueError:
    """The error for a vote or mean on one side of a condition that all workers share."""
    return ValueError(
        f"tx votes or averages over {axis_name!r} on one side of a condition only, as in "
        "optax.conditionally_mask(vote, ...). On the other side nothing is exchanged, so updates "
        "may differ between workers. Put the condition after the vote, as in optax.chain("
        f"signax.majority_vote({axis_name!r}), optax.conditionally_mask(inner, ...))"
    )
