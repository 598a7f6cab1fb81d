"""Functions that run on every worker: its gradient, its local steps, and its update."""

import inspect
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import PartitionSpec

from signax._core.checks import check_count, check_key
from signax._core.leaves import all_finite, varying_axes, wide_dtype
from signax._data_parallel.layout import Layout, PerWorker
from signax._data_parallel.placement import Workers, add_axis, check_state
from signax._transforms.participation import Extras, hold, leave_out_nonfinite

if TYPE_CHECKING:
    Aggregator = optax.GradientTransformationExtraArgs
else:
    try:  # Optax's class for transformations of rows of updates into one update
        from optax.experimental import aggregating

        Aggregator = aggregating.Aggregator
    except (ImportError, AttributeError):
        Aggregator = optax.GradientTransformationExtraArgs


def check_batch(batch: Any, num_workers: int, accumulate: int) -> None:
    """Raise if a batch cannot be cut into equal shares, and each share into micro-batches."""
    for path, leaf in jax.tree.leaves_with_path(batch):
        shape = jnp.shape(leaf)
        if not shape or shape[0] % (num_workers * accumulate):
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} has shape {shape}, whose first axis is not a "
                f"multiple of {num_workers} workers times accumulate={accumulate}: drop or pad "
                "examples. Pass a random key as key=, and other arguments that are not to be "
                "split after the batch"
            )


def local_value_and_grad(
    loss_fn: Callable[..., Any],
    params: Any,
    batch: Any,
    replicated: tuple[Any, ...],
    key: Any,
    pieces: int,
    local: optax.GradientTransformation | None = None,
    state: Any = None,
) -> tuple[jax.Array, Any, Any, Any]:
    """The loss, aux and gradient of `loss_fn`, and the state of `local`.

    `loss_fn` returns a pair of loss and aux. Losses and gradients are averaged over several pieces,
    and aux is stacked. With an optimiser `local`, the worker takes a step for each piece instead,
    and the parameters before minus the parameters after take the gradient's place.
    """
    gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def of_piece(params: Any, piece: Any, number: Any):
        keyword = {}
        if key is not None:
            keyword["key"] = key if number is None else jax.random.fold_in(key, number)
        (loss, aux), grads = gradient(params, piece, *replicated, **keyword)
        return grads, (loss, aux)

    if pieces == 1 and local is None:
        grads, (loss, aux) = of_piece(params, batch, None)
        return loss, aux, grads, state

    def cut(leaf: Any):
        return leaf.reshape(pieces, leaf.shape[0] // pieces, *leaf.shape[1:])

    stacked = jax.tree.map(cut, batch), jnp.arange(pieces)
    if local is None:
        grads, (losses, aux) = _average(of_piece, params, stacked)
    else:
        grads, state, (losses, aux) = _follow(of_piece, params, stacked, local, state)
    if pieces == 1:
        aux = jax.tree.map(lambda leaf: leaf[0], aux)
    return jnp.mean(losses), aux, grads, state


def _average(of_piece: Callable[..., Any], params: Any, stacked: Any) -> tuple[Any, Any]:
    """The mean gradient over micro-batches, in at least f32 until the end."""

    def add(total: Any, piece_and_number: Any):
        grads, seen = of_piece(params, *piece_and_number)
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads), seen

    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=wide_dtype(p.dtype)), params)
    total, seen = lax.scan(add, zeros, stacked)
    pieces = len(stacked[1])
    return jax.tree.map(lambda t, p: (t / pieces).astype(p.dtype), total, params), seen


def _follow(
    of_piece: Callable[..., Any],
    params: Any,
    stacked: Any,
    local: optax.GradientTransformation,
    state: Any,
) -> tuple[Any, Any, Any]:
    """Take a step for each micro-batch on a copy of the parameters: the start minus the end.

    If a loss, a gradient or the state is not finite at any step, the difference is NaN (the sign of
    an infinity would be finite), and the state is the state before all steps.
    """

    def step(carry: Any, piece_and_number: Any):
        own, state, finite = carry
        grads, (loss, aux) = of_piece(own, *piece_and_number)
        updates, state = local.update(grads, state, own)
        finite &= all_finite((loss, grads, state))
        return (optax.apply_updates(own, updates), state, finite), (loss, aux)

    carry = params, state, jnp.bool_(True)
    (own, new_state, finite), seen = lax.scan(step, carry, stacked)
    differences = jax.tree.map(lambda p, q: p - q, params, own)
    finite &= all_finite(differences)
    differences = jax.tree.map(lambda d: jnp.where(finite, d, jnp.nan), differences)
    return differences, hold(finite, state, new_state), seen


def map_gradient(
    loss_fn: Callable[..., Any],
    workers: Workers,
    has_aux: bool,
    accumulate: int,
    local: optax.GradientTransformation | None,
) -> Callable[..., Any]:
    """Return `f(params, local_state, batch, replicated, key) -> (value, rows, local_state)`.

    Rows are gradients, or with `local` differences of parameters.
    """
    check_count("accumulate", accumulate)

    def loss_and_aux(*args: Any, **kwargs: Any):
        value = loss_fn(*args, **kwargs)
        return value if has_aux else (value, None)

    def of_worker(params: Any, own: Any, batch: Any, replicated: tuple[Any, ...], key: Any):
        if key is not None:
            key = jax.random.fold_in(key, lax.axis_index(workers.axis_name))
        own = jax.tree.map(lambda row: row.squeeze(0), own)
        loss, *rows = local_value_and_grad(
            loss_and_aux, params, batch, replicated, key, accumulate, local, own
        )
        return workers.mean_of_finite(loss), *jax.tree.map(add_axis, rows)

    # Every worker's row is its own, so types have nothing to prove here. With varying types a loss
    # could not start a scan from a constant, and gradients would not be the worker's own.
    whole, split = PartitionSpec(), PartitionSpec(workers.axis_name)
    specs = (whole, split, split, whole, whole), (whole, split, split, split)
    mapped = workers.shard_map(of_worker, *specs, check_vma=False)

    def gradient(params: Any, own: Any, batch: Any, replicated: tuple[Any, ...], key: Any):
        check_batch(batch, workers.num_workers, accumulate)
        if key is not None:
            check_key(key)
        batch = workers.reshard(batch, per_worker=True)
        replicated, key = workers.reshard((replicated, key))
        params = workers.reshard_params(params)
        loss, aux, rows, own = mapped(params, own, batch, replicated, key)
        return ((loss, aux) if has_aux else loss), rows, own

    return gradient


class LocalStepsState(NamedTuple):
    """State of a `DataParallel` with local steps.

    Attributes:
      local: the state of the optimiser `local`, with one row per worker: [M, ...].
      exchanged: the state of the transformation `tx`, which exchanges the differences.
    """

    local: Any
    exchanged: Any


def with_local_state(
    local: optax.GradientTransformation, tx: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """Keep the state of local steps beside the state of `tx`, and leave it alone."""

    def init_fn(params: optax.Params):
        return LocalStepsState(local=local.init(params), exchanged=tx.init(params))

    def update_fn(updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any):
        updates, exchanged = tx.update(updates, state.exchanged, params, **extra_args)
        return updates, LocalStepsState(local=state.local, exchanged=exchanged)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def own_local_state(per_worker: PerWorker | None) -> PerWorker:
    """Give each worker its own state of local steps, though no update shows that it differs."""

    def is_per_worker(path: str, leaf: jax.ShapeDtypeStruct) -> bool | None:
        if path.startswith(".local"):
            return True
        return None if per_worker is None else per_worker(path, leaf)

    return is_per_worker


def map_init(
    params: Any, tx: optax.GradientTransformation, workers: Workers, layout: Layout
) -> Any:
    """The state of `params` as global arrays."""

    def init_worker(params: optax.Params):
        return _state_rows(tx.init(params), workers, layout)

    mapped = workers.shard_map(init_worker, (PartitionSpec(),), _worker_specs(workers, layout))

    def init(params: optax.Params):
        return mapped(workers.reshard_params(params))

    shardings = [leaf.sharding for leaf in layout.leaves]
    return layout.structure.unflatten(jax.jit(init, out_shardings=shardings)(params))


def map_update(
    updates: Any,
    state: Any,
    params: Any,
    active: Any,
    extra_args: dict[str, Any],
    static: tuple[tuple[str, Any], ...] = (),
    *,
    tx: optax.GradientTransformationExtraArgs,
    workers: Workers,
    layout_of: Callable[[Any], Layout],
) -> tuple[Any, Any]:
    """Updates and new state, from rows of updates and a state of global arrays."""
    like = workers.params_like(updates) if params is None else params
    specs, layout = workers.specs(like), layout_of(like)
    check_state(state, layout, workers.num_workers)
    extra_args = {**extra_args, **dict(static)}
    if specs is not None:
        extra_args["signax"] = Extras(param_specs=specs)
    whole, split = PartitionSpec(), PartitionSpec(workers.axis_name)
    state_specs = _worker_specs(workers, layout)

    # The barriers keep XLA from fusing the axis of rows: it would copy a donated state.
    def update_worker(updates: Any, leaves: list[Any], params: Any, active: Any):
        extra = extra_args if active is None else {**extra_args, "active": active.squeeze(0)}
        leaves = [
            lax.optimization_barrier(array.squeeze(0)) if leaf.per_worker else array
            for array, leaf in zip(leaves, layout.leaves, strict=True)
        ]
        updates = jax.tree.map(lambda row: row.squeeze(0), updates)
        updates, state = tx.update(updates, layout.structure.unflatten(leaves), params, **extra)
        workers.check_replicated(updates)
        return updates, _state_rows(state, workers, layout)

    mapped = workers.shard_map(
        update_worker, (split, state_specs, whole, split), (whole, state_specs)
    )
    leaves = [
        workers.reshard(array, per_worker=leaf.per_worker)
        for array, leaf in zip(jax.tree.leaves(state), layout.leaves, strict=True)
    ]
    updates, active = workers.reshard((updates, active), per_worker=True)
    try:
        updates, leaves = mapped(updates, leaves, workers.reshard_params(params), active)
    except TypeError as error:
        # JAX names the manual axes of two branches only if their types differ in those.
        differs = all(words in str(error) for words in ("cond branches", "manual ax"))
        if differs and layout.is_conditional:
            raise _conditional_vote(workers.axis_name) from error
        raise
    leaves = workers.constrain(leaves, [leaf.sharding.spec for leaf in layout.leaves])
    return updates, layout.structure.unflatten(leaves)


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


def with_extra_args(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Pass extra arguments to every transformation that accepts any, even `optax.MultiSteps`.

    Such a transformation learns of all updates, so its votes and means exclude the same workers.
    """
    parameters = inspect.signature(tx.update).parameters.values()
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
        return leave_out_nonfinite(optax.GradientTransformationExtraArgs(tx.init, tx.update))
    return optax.with_extra_args_support(tx)


def static_arguments(extra_args: dict[str, Any]) -> tuple[tuple[str, Any], ...] | None:
    """The arguments that `jax.jit` cannot trace; `None` if it cannot hash them either."""
    kinds = jax.Array, np.ndarray, np.number, np.bool_, float
    others = tuple(
        [
            (name, value)
            for name, value in extra_args.items()
            if not all(isinstance(leaf, kinds) for leaf in jax.tree.leaves(value))
        ]
    )
    try:
        hash(others)
    except TypeError:
        return None
    return others
