"""Flax NNX modules as they are: dropout, statistics and LoRA with a gradient for each worker.

Nothing else in signax imports Flax, and `import signax` does not import this module.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from signax._core.leaves import all_finite, wide_dtype
from signax._data_parallel.auxiliary import check_aux
from signax._data_parallel.captured import CALLS
from signax._data_parallel.data_parallel import DataParallel

if TYPE_CHECKING:
    nnx: Any = None  # a type checker whose root is this folder takes this file for Flax
else:
    try:
        from flax import nnx
    except ImportError as error:
        raise ImportError("signax.flax needs Flax: pip install flax") from error

__all__ = ["value_and_grad"]

_CALLS = {*CALLS, "remat2"}  # with `jax.checkpoint`


def value_and_grad(
    tx: DataParallel,
    loss_fn: Callable[..., Any],
    *,
    wrt: Any = nnx.Param,
    has_aux: bool = False,
    aux: Any = "rows",
    accumulate: int = 1,
) -> Callable[..., Any]:
    r"""Differentiate a loss of an NNX module on each worker's share of the batch.

    In a step of the Flax documentation it takes the place of `nnx.value_and_grad`. Random streams
    and written variables would differ between workers, so each gets a rule:

    - Random streams, such as the stream of `nnx.Dropout(rate, rngs=rngs)`, draw a new mask on each
      worker, for each micro-batch, and at each step. Their counts advance once.
    - Floating-point variables that the loss function writes, such as the statistics of
      `nnx.BatchNorm`, become means:

      .. math:: v \leftarrow \frac{1}{|F|} \sum_{i \in F} v_i

      F holds the micro-batches after which all written variables are finite, on active workers
      whose losses and gradient are finite. If F is empty, the model keeps its old variables.
    - Written integers and booleans, such as counters, become the largest value of all workers.
      Written random keys are discarded.

    Args:
      tx: the :class:`signax.DataParallel` of the `nnx.Optimizer`.
      loss_fn: a function of `(model, batch, *replicated)`, and of `key=` if it has this argument
        and a key is given. It returns a scalar loss, or with `has_aux` a pair of the loss and
        anything else.
      wrt: the filter of the variables to differentiate, as in the `nnx.Optimizer`;
        `nnx.LoRAParam` for LoRA. The others are neither changed by gradients nor sent.
      has_aux: whether `loss_fn` returns such a pair.
      aux: what becomes of aux, see :meth:`signax.DataParallel.value_and_grad`.
      accumulate: the number of micro-batches in each worker's share. Each micro-batch starts from
        the variables before the step.

    Returns:
      A function of `(model, batch, *replicated, key=None, active=None)` to `(loss, grads)`, or with
      `has_aux` to `((loss, aux), grads)`. It writes the variables of `model` in place. `grads` have
      one row per worker, for `optimizer.update(model, grads)`. Masks depend on the stored streams
      and, if it is given, on `key`. `active`, bool[M], says whose variables count. Pass it to
      `optimizer.update` too.

    Raises:
      ValueError: as in :meth:`signax.DataParallel.value_and_grad`; at the call, `loss_fn` adds a
        variable, changes the shape of a variable, or writes a variable of `wrt`.
      TypeError: `tx` is not a `DataParallel`; at the call, neither `loss_fn` nor the model uses
        `key`, or `active` is not an array of M booleans; or as in
        :meth:`signax.DataParallel.value_and_grad`.

    Examples:
      >>> import jax, jax.numpy as jnp, signax.flax
      >>> from flax import nnx
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> tx = signax.DataParallel(signax.signum(0.5, axis_name="data"), mesh)
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Dropout(0.5, rngs=rngs), nnx.Linear(3, 1, rngs=rngs))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> loss_fn = lambda model, batch: jnp.mean((model(batch) - 1) ** 2)
      >>> @nnx.jit
      ... def step(model, optimizer, batch):
      ...     loss, grads = signax.flax.value_and_grad(tx, loss_fn)(model, batch)
      ...     optimizer.update(model, grads)
      ...     return loss
      >>> loss = step(model, optimizer, jnp.ones((2 * tx.num_workers, 3)))
      >>> print(loss.shape, model.layers[0].rngs.count[...])
      () 1
    """
    if not isinstance(tx, DataParallel):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"tx={tx!r} is not a signax.DataParallel: wrap the transformation in one")
    check_aux(aux, has_aux)
    takes_key = _takes_key(loss_fn)

    def value_and_grad_fn(
        model: Any, batch: Any, *replicated: Any, key: Any = None, active: Any = None
    ):
        tx._workers.check_active(active)  # pyright: ignore[reportPrivateUsage]
        graph, params, rest = nnx.split(model, wrt, ...)
        has_streams = bool(_stream_keys(model))
        passes_key = key is not None and takes_key
        if key is not None and not (takes_key or has_streams):
            raise TypeError(
                f"key={key!r} has no effect: loss_fn has no argument key, and the model stores no "
                "random streams. Leave it out, or give it to loss_fn"
            )
        if key is None and has_streams:
            key = jax.random.key(0)  # stored keys and counts make the streams differ

        def loss_of_worker(
            params: Any, batch: Any, rest: Any, *replicated: Any, **own: Any
        ) -> tuple[Any, Any]:
            def run(params: Any, rest: Any):
                # NNX allows writes only on a copy that is made here.
                network = nnx.merge(graph, params, rest, copy=True)
                if own:
                    _fold_into_streams(network, **own)
                before = _leaves(network, wrt)
                value = loss_fn(network, batch, *replicated, **(own if passes_key else {}))
                return value, before, _leaves(network, wrt)

            value, before, after = run(params, rest)
            loss, values = value if has_aux else (value, None)
            written = _written(before, after, partial(_unwritten, run, params, rest))
            return loss, (values, {**written, "finite_loss": jnp.isfinite(loss)})

        gradient = tx.value_and_grad(
            loss_of_worker, has_aux=True, accumulate=accumulate, aux=(aux, "rows")
        )
        (loss, (values, written)), grads = gradient(params, batch, rest, *replicated, key=key)
        nnx.update(model, _settle(rest, written, jax.tree.leaves(grads), active))
        return ((loss, values) if has_aux else loss), grads

    return value_and_grad_fn


def _takes_key(loss_fn: Callable[..., Any]) -> bool:
    """Whether a function has an argument `key`."""
    parameters = inspect.signature(loss_fn).parameters
    return "key" in parameters or any(p.kind == p.VAR_KEYWORD for p in parameters.values())


def _stream_keys(model: Any) -> list[Any]:
    """The variables that hold the keys of a model's random streams."""
    return [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.RngKey)]


def _fold_into_streams(network: Any, key: jax.Array) -> None:
    """Make the keys of all streams those of one worker and micro-batch."""
    word = jax.random.bits(jax.random.fold_in(key, 0))
    for variable in _stream_keys(network):
        fold = jax.random.fold_in
        for _ in range(variable[...].ndim):  # a stream that was split has an array of keys
            fold = jax.vmap(fold, in_axes=(0, None))
        variable[...] = fold(variable[...], word)


def _leaves(network: Any, wrt: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays in the variables of `wrt`, and in the others, by their paths."""
    _, params, rest = nnx.split(network, wrt, ...)
    by_path = [
        {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}
        for state in (params, rest)
    ]
    return by_path[0], by_path[1]


def _written(before: Any, after: Any, unwritten: Callable[[], set[str]]) -> dict[str, Any]:
    """The variables that a loss function wrote.

    An array that is still the same object was not written. `unwritten` finds the others that were
    not.
    """
    old, new = {**before[0], **before[1]}, {**after[0], **after[1]}
    kept = {path for path, leaf in old.items() if new.get(path) is leaf}
    if any(jnp.issubdtype(old[path].dtype, jnp.inexact) for path in old.keys() - kept):
        kept |= unwritten()
    for path in before[0]:
        if path not in kept:
            raise ValueError(
                f"loss_fn writes the variable {path}, which wrt selects for a gradient: let wrt "
                "leave it out, or do not write it"
            )
    floating: dict[str, Any] = {}
    other: dict[str, Any] = {}
    for path, leaf in new.items():
        if path in kept:
            continue
        if path not in old or jnp.shape(old[path]) != jnp.shape(leaf):
            raise ValueError(
                f"loss_fn adds the variable {path} to the model, or changes its shape to "
                f"{jnp.shape(leaf)}: take it out in loss_fn, as in nnx.pop(model, nnx.Intermediate)"
                ", and return it as aux"
            )
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        (floating if jnp.issubdtype(leaf.dtype, jnp.inexact) else other)[path] = leaf
    return {"floating": floating, "finite": all_finite(floating), "other": other}


def _unwritten(run: Callable[..., Any], params: Any, rest: Any) -> set[str]:
    """The paths of variables that a loss function does not write, by its program.

    `nnx.remat` and `nnx.jit` return each variable of their modules as another object, even if
    nothing writes it.
    """

    def after(params: Any, rest: Any) -> dict[str, Any]:
        _, _, (by_gradient, others) = run(params, rest)
        return {**by_gradient, **others}

    program, shapes = jax.make_jaxpr(after, return_shape=True)(params, rest)
    leaves = [*jax.tree.leaves_with_path(params), *jax.tree.leaves_with_path(rest)]
    paths = [jax.tree_util.keystr(path) for path, _ in leaves]
    sources = _sources(program.jaxpr, paths)
    return {path for path, source in zip(sorted(shapes), sources, strict=True) if path == source}


def _sources(jaxpr: Any, names: Sequence[str | None]) -> list[str | None]:
    """The name of the input that each output is, if it is one. Calls are followed."""
    known = dict(zip(jaxpr.invars, names, strict=True))

    def read(atom: Any) -> str | None:
        return None if isinstance(atom, core.Literal) else known.get(atom)

    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _CALLS:
            (called,) = [eqn.params[name] for name in ("jaxpr", "call_jaxpr") if name in eqn.params]
            found = _sources(getattr(called, "jaxpr", called), [*map(read, eqn.invars)])
            known.update(zip(eqn.outvars, found, strict=True))
    return [*map(read, jaxpr.outvars)]


def _settle(rest: Any, written: dict[str, Any], grads: list[Any], active: Any) -> Any:
    """The state that all workers share, from rows of what each wrote and of its gradient."""
    leaves = jax.tree.leaves_with_path(rest)
    old = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    new: dict[str, Any] = {}
    if written["floating"]:
        new |= _means({name: old[name] for name in written["floating"]}, written, grads, active)
    for name, rows in written["other"].items():
        largest = rows.max(axis=tuple(range(rows.ndim - old[name].ndim)))
        new[name] = largest.astype(old[name].dtype)
    return jax.tree.structure(rest).unflatten([new.get(name, leaf) for name, leaf in old.items()])


@jax.jit
def _means(
    old: dict[str, Any], written: dict[str, Any], grads: list[Any], active: Any
) -> dict[str, Any]:
    """The means of written variables, from rows [M, ...] or [M, accumulate, ...]."""
    flags = [written["finite_loss"], *[jnp.isfinite(rows) for rows in grads]]
    flags = [jnp.all(flag, axis=tuple(range(1, flag.ndim))) for flag in flags]
    # Without the barrier XLA copies the chain of flags into every use of the result.
    own = reduce(jnp.logical_and, lax.optimization_barrier(flags))  # bool[M]
    if active is not None:
        own &= active
    finite = written["finite"]
    counted = finite & jnp.expand_dims(own, tuple(range(1, finite.ndim)))
    pieces = tuple(range(counted.ndim))
    number = jnp.sum(counted, axis=pieces, dtype=jnp.float32)

    def mean(old: Any, rows: jax.Array) -> jax.Array:
        mask = jnp.expand_dims(counted, tuple(range(counted.ndim, rows.ndim)))
        total = jnp.sum(jnp.where(mask, rows, 0).astype(wide_dtype(rows.dtype)), axis=pieces)
        return jnp.where(number > 0, total / jnp.maximum(number, 1), old).astype(old.dtype)

    return {name: mean(old[name], rows) for name, rows in written["floating"].items()}
