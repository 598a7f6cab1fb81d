"""States on a mesh: their shardings and shapes, and states for another number of workers.

A leaf of which every worker has its own is an array of M rows. To resize a state, rows are dealt
out in order, as if each row filled an M-th of a line that is cut into new parts:

    3 workers    [ a  a | b  b | c  c ]
    2 workers    [ a  a   b | b  c  c ]    each row is the mean of its part

The mean over workers stays the same, doubled workers start as copies, and halved workers as means
of two. State for which that is wrong has a method `resized`.
"""

import math
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding

from signax._core.checks import check_count, check_mode, check_transformation
from signax._core.leaves import mean, wide_dtype
from signax._data_parallel import inner, mapped, norms
from signax._data_parallel.boxes import add_row_axis
from signax._data_parallel.eager import Programs
from signax._data_parallel.layout import Layout, Leaf, PerWorker, find_layout, found_layout
from signax._data_parallel.pinned import (
    OnWrongSharding,
    has_auto_axes,
    report_rows,
    watch_params,
    watch_update,
)
from signax._data_parallel.placement import Layouts, Workers, check_state, rows_in, state_leaves
from signax._data_parallel.wrappers import explain_captured


class StateOnMesh(inner.Aggregator):
    """What `DataParallel` is made from, and its methods that are about a state alone."""

    mesh: Mesh
    axis_name: Hashable
    num_workers: int
    _layout: Layouts
    tx: optax.GradientTransformationExtraArgs
    param_specs: Any
    local: optax.GradientTransformation | None
    _name: str
    _workers: Workers
    _map_update: Callable[..., Any]
    _compiled_update: Callable[..., Any]
    _compiled_norm: Callable[..., norms.GradNorm]
    _programs: Programs
    _watch: Callable[..., Any] | None

    def __new__(
        cls,
        tx: optax.GradientTransformation,
        mesh: Mesh,
        axis_name: Hashable = "data",
        *,
        param_specs: Any = None,
        local: optax.GradientTransformation | None = None,
        per_worker: PerWorker | None = None,
        on_wrong_sharding: OnWrongSharding = "raise",
    ):
        check_transformation("tx", tx)
        check_mode("on_wrong_sharding", on_wrong_sharding, ("raise", "warn"))
        if local is not None:
            check_transformation("local", local)
        for name, value in (("tx", tx), ("local", local)):
            if isinstance(value, StateOnMesh):
                raise TypeError(
                    f"{name}={value!r} is a DataParallel itself: pass the transformation of one "
                    "worker, such as signax.signum(1e-3, axis_name='data')"
                )
        workers = Workers.find(mesh, axis_name, param_specs)

        own: Any = cls  # methods, which a subclass of a named tuple of functions may have
        self = super().__new__(
            cls,
            lambda params: own.init(self, params),
            lambda *args, **kwargs: own.update(self, *args, **kwargs),
        )
        self._name = getattr(tx.update, "__qualname__", repr(tx)).split(".")[0]
        self.tx = inner.with_extra_args(tx)
        self.local = local
        if local is not None:
            self.tx = inner.with_local_state(local, self.tx)
            per_worker = inner.own_local_state(per_worker)
        self.mesh = mesh
        self.axis_name = axis_name
        self.num_workers = workers.num_workers
        self.param_specs = param_specs
        self._workers = workers
        find = partial(find_layout, self.tx, mesh, axis_name, per_worker)
        self._layout = Layouts(workers, find)
        report = partial(report_rows, workers, on_wrong_sharding)
        self._map_update = watch_update(
            explain_captured(partial(mapped.map_update, self.tx, workers, self._layout, report)),
            workers,
            self._layout,
            on_wrong_sharding,
        )
        self._compiled_update = jax.jit(self._map_update, static_argnums=5)
        self._compiled_norm = jax.jit(partial(norms.grad_norm, workers))
        self._programs = Programs()
        self._watch = None
        if has_auto_axes(workers):
            self._watch = partial(watch_params, workers=workers, mode=on_wrong_sharding)
        return self

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        # As a tree it has no leaves. JAX would build a named tuple again from two functions.
        jax.tree_util.register_static(cls)

    def __repr__(self):
        workers = f"axis_name={self.axis_name!r}, num_workers={self.num_workers}"
        return f"DataParallel({self._name}(...), {workers})"

    def _replace(self, **kwargs: Any):
        raise TypeError(f"cannot replace {', '.join(kwargs)}: make another DataParallel(tx, mesh)")

    def __copy__(self, memo: Any = None):
        return self  # it is immutable; a tuple's own way would call __new__ with two functions

    __deepcopy__ = __copy__

    def __reduce_ex__(self, protocol: Any):
        raise TypeError(
            "DataParallel cannot be pickled: its mesh holds devices of this process. Pickle what "
            "it is made from, and make another one where it is loaded"
        )

    def state_shardings(self, params: optax.Params) -> Any:
        """The shardings of the state of `params`, for `out_shardings` and for checkpoints.

        Args:
          params: the parameters, a tree of arrays or of `jax.ShapeDtypeStruct`.

        Returns:
          A tree of `jax.sharding.NamedSharding` with the structure of the state.

        Raises:
          ValueError: as in :meth:`init`.
          TypeError: as in :meth:`init`.

        Examples:
          See :meth:`abstract_state`.
        """
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state(params))

    def abstract_state(self, params: optax.Params, num_workers: int | None = None) -> Any:
        """The shapes, dtypes and shardings of the state of `params`, to restore a checkpoint into.

        Args:
          params: the parameters, a tree of arrays or of `jax.ShapeDtypeStruct`.
          num_workers: the number of workers that saved the state, by default M. Use :meth:`resize`
            after restoring a state that another number of workers saved.

        Returns:
          A tree of `jax.ShapeDtypeStruct` with the structure of the state.

        Raises:
          ValueError: `num_workers` is below 1; or as in :meth:`init`.
          TypeError: `num_workers` is not a whole number; or as in :meth:`init`.

        Examples:
          >>> import jax, jax.numpy as jnp, optax, signax
          >>> mesh = jax.make_mesh((1,), ("data",))
          >>> tx = signax.DataParallel(signax.signum(0.1, axis_name="data"), mesh)
          >>> like = tx.abstract_state(jnp.zeros(3), 4)  # saved by four workers
          >>> print(optax.tree.get(like, "momentum").shape)
          (4, 3)
          >>> shardings = tx.state_shardings(jnp.zeros(3))
          >>> print(optax.tree.get(shardings, "momentum").spec == jax.P("data"))
          True
        """
        wanted = self._wanted(num_workers)
        layout = self._layout(params, wanted)

        def abstract(leaf: Leaf) -> jax.ShapeDtypeStruct:
            shape = (wanted, *leaf.shape) if leaf.per_worker else leaf.shape
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)

        state = layout.structure.unflatten(map(abstract, layout.leaves))
        return self._boxed(state, layout)

    def resize(self, state: Any, params: optax.Params, num_workers: int | None = None) -> Any:
        """Make a state for another number of workers, outside of `jax.jit`.

        Rows are dealt out in order. With twice as many workers, each two workers start as copies of
        one. With half as many, each worker starts as the mean of two. The mean of momenta and of
        error memories over workers stays the same. Servers' memories are cut into new parts. Keys
        get the new worker's index folded in (uint32 in the shape of a raw key counts as a key).
        Integers are taken from the worker in the same place.

        Args:
          state: a state of these parameters, with rows for any number of workers.
          params: the parameters, a tree of arrays or of `jax.ShapeDtypeStruct`.
          num_workers: the wanted number of workers, by default M. With 1 a checkpoint is small.

        Returns:
          The state, on this mesh; with the default number laid out as `update` takes it.

        Raises:
          ValueError: the state belongs to other parameters, or `num_workers` is below 1; or as in
            :meth:`init`.
          TypeError: `num_workers` is not a whole number; or as in :meth:`init`.

        Examples:
          >>> import jax, jax.numpy as jnp, optax, signax
          >>> signum = signax.signum(0.1, axis_name="data")
          >>> tx = signax.DataParallel(signum, jax.make_mesh((1,), ("data",)))
          >>> state = tx.resize(tx.init(jnp.zeros(3)), jnp.zeros(3), 4)  # for a mesh of four
          >>> print(optax.tree.get(state, "momentum").shape)
          (4, 3)
        """
        wanted = self._wanted(num_workers)
        had = rows_in(state, self._layout(params), self.num_workers)
        before, after = self._layout(params, had), self._layout(params, wanted)
        leaves = state_leaves(state, before)
        before = found_layout(before, leaves, had)
        check_state(state, before, had)
        inner = before.structure.unflatten(leaves)
        resized = resize_state(inner, before, after, self.mesh, wanted)
        return jax.tree.structure(state).unflatten(jax.tree.leaves(resized))

    def _boxed(self, state: Any, layout: Layout) -> Any:
        """Name the axis of rows in the boxes of a state, if there are any."""
        flags = [leaf.per_worker for leaf in layout.leaves]
        return add_row_axis(state, flags, self.axis_name)

    def _wanted(self, num_workers: int | None) -> int:
        if num_workers is not None:
            check_count("num_workers", num_workers)
        return num_workers or self.num_workers


def resize_state(state: Any, before: Layout, after: Layout, mesh: Mesh, num_workers: int) -> Any:
    """A state laid out as `after` says, from a state laid out as `before` says."""
    flags = before.structure.unflatten([leaf.per_worker for leaf in before.leaves])
    like = after.structure.unflatten(
        [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in after.leaves]
    )

    def resize(node: Any, flags: Any, like: Any):
        if _has_a_way(node):
            return node.resized(num_workers, resize_rows, like)
        return resize_rows(node, num_workers) if flags else node

    def resized(leaves: list[Any]):
        state = before.structure.unflatten(leaves)
        return jax.tree.leaves(jax.tree.map(resize, state, flags, like, is_leaf=_has_a_way))

    leaves = _device_put(jax.tree.leaves(state), _auto_shardings(before, mesh))
    if before is not after:
        leaves = jax.jit(resized, out_shardings=_auto_shardings(after, mesh))(leaves)
    return after.structure.unflatten(_device_put(leaves, [leaf.sharding for leaf in after.leaves]))


def _has_a_way(node: Any) -> bool:
    return hasattr(node, "resized")


def resize_rows(rows: jax.Array, num_workers: int) -> jax.Array:
    """Deal the rows of M workers, [M, ...], out to another number of workers.

    Each new row is the mean of floating-point rows. Each worker takes over keys, integers and
    booleans from the worker who was there before, and folds its index into keys. An array of uint32
    in the shape of a raw key counts as a key.
    """
    old = len(rows)
    if jnp.issubdtype(rows.dtype, jnp.floating):
        each = math.lcm(old, num_workers)
        shares = jnp.repeat(rows, each // old, axis=0)
        shares = shares.reshape(num_workers, each // num_workers, *rows.shape[1:])
        return mean(shares.astype(wide_dtype(rows.dtype)), axis=1).astype(rows.dtype)
    workers = jnp.arange(num_workers)
    taken = rows[workers * old // num_workers]
    if jnp.issubdtype(rows.dtype, jax.dtypes.prng_key):
        return _fold(taken, workers)
    raw_key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    if (rows.dtype, rows.shape[1:]) == (raw_key.dtype, raw_key.shape):
        return jax.random.key_data(_fold(jax.random.wrap_key_data(taken), workers))
    return taken


def _fold(keys: jax.Array, workers: jax.Array) -> jax.Array:
    """Fold each worker's index into its keys: key[M, ...]."""
    flat = keys.reshape(len(keys), -1)
    folded = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(0, None)))(flat, workers)
    return folded.reshape(keys.shape)


def _device_put(leaves: list[Any], shardings: list[NamedSharding]) -> list[jax.Array]:
    """`jax.device_put`, which accepts keys that lie in several processes only as their data."""
    is_key = [jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key) for leaf in leaves]
    data = [jax.random.key_data(x) if key else x for x, key in zip(leaves, is_key, strict=True)]
    data = jax.device_put(data, shardings)
    return [
        jax.random.wrap_key_data(new, impl=jax.random.key_impl(old)) if key else new
        for old, new, key in zip(leaves, data, is_key, strict=True)
    ]


def _auto_shardings(layout: Layout, mesh: Mesh) -> list[NamedSharding]:
    """A layout's shardings over axes of type Auto, where any array may be cut again."""
    types = (AxisType.Auto,) * mesh.devices.ndim
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=types)
    return [NamedSharding(auto, leaf.sharding.spec) for leaf in layout.leaves]
