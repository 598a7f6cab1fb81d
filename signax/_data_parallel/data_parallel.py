"""DataParallel: every worker's state and gradients as global arrays, under `jax.jit`."""

from collections.abc import Callable, Hashable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from signax._core.checks import check_count, check_transformation
from signax._core.leaves import is_traced
from signax._data_parallel import mapped
from signax._data_parallel.layout import Layout, Leaf, PerWorker, find_layout
from signax._data_parallel.placement import Workers, check_state, resize_state, rows_in


class DataParallel(mapped.Aggregator):
    r"""Run a transformation on every worker of a mesh axis, on global arrays.

    It is itself a gradient transformation, for use under plain `jax.jit`: training loops written
    for Optax stay as they are, `TrainState.apply_gradients` and `nnx.Optimizer.update` included.
    `tx` runs on each worker's own gradient and state in `jax.shard_map` with `check_vma=True`:
    JAX's types prove that the parameters stay the same on all workers.

    State that differs between workers, such as momentum, gets a leading axis with one row per
    worker, sharded over the mesh axis; the rest is replicated. Tracing `tx` tells which state
    differs. The M workers, `num_workers`, are the size of the axis, or the product of several.

    Args:
      tx: the transformation of one worker, with a vote or a mean over `axis_name` in it. It is
        traced without extra arguments, so each of those needs a default.
      mesh: a mesh that has the axis; its axes may be of type Auto or Explicit.
      axis_name: the mesh axis along which the workers lie, or a tuple of axes.
      param_specs: for parameters that are sharded over further mesh axes, a tree like the
        parameters of their `PartitionSpec`s. A vote then runs on local blocks, and nothing is
        gathered. The outputs of `train_step` have the shardings of its inputs.
      local: an optimiser of one worker for the steps that it takes on a copy of the parameters
        between two votes, see `local_steps`. The state is then a `LocalStepsState`.
      per_worker: overrides the layout: a function of a state leaf's path (as
        `jax.tree_util.keystr` writes it) and of its shape and dtype on one worker. True gives each
        worker a copy, False shares one (JAX rejects it if it differs), None keeps the layout.

    Raises:
      ValueError: the mesh has no such axis, or `param_specs` names the workers' axis or an unknown
        one.
      TypeError: `axis_name` names no axis.

    Examples:
      >>> import jax, jax.numpy as jnp, signax
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> tx = signax.DataParallel(signax.signum(0.5, axis_name="data"), mesh)
      >>> loss_fn = lambda params, batch: jnp.mean((batch - params) ** 2)
      >>> params = jnp.zeros(3)
      >>> state = tx.init(params)
      >>> step = tx.train_step(loss_fn)
      >>> params, state, loss = step(params, state, jnp.ones((2 * tx.num_workers, 3)))
      >>> print(params, loss)
      [0.5 0.5 0.5] 1.0
    """

    tx: optax.GradientTransformationExtraArgs
    mesh: Mesh
    axis_name: Hashable
    num_workers: int
    param_specs: Any
    local: optax.GradientTransformation | None
    _name: str
    _workers: Workers
    _find_layout: Callable[..., Layout]
    _map_update: Callable[..., Any]
    _compiled_update: Callable[..., Any]

    def __new__(
        cls,
        tx: optax.GradientTransformation,
        mesh: Mesh,
        axis_name: Hashable = "data",
        *,
        param_specs: Any = None,
        local: optax.GradientTransformation | None = None,
        per_worker: PerWorker | None = None,
    ):
        check_transformation("tx", tx)
        if local is not None:
            check_transformation("local", local)
        workers = Workers.find(mesh, axis_name, param_specs)

        self = super().__new__(
            cls,
            lambda params: cls.init(self, params),
            lambda *args, **kwargs: cls.update(self, *args, **kwargs),
        )
        self._name = getattr(tx.update, "__qualname__", repr(tx)).split(".")[0]
        self.tx = mapped.with_extra_args(tx)
        self.local = local
        if local is not None:
            self.tx = mapped.with_local_state(local, self.tx)
            per_worker = mapped.own_local_state(per_worker)
        self.mesh = mesh
        self.axis_name = axis_name
        self.num_workers = workers.num_workers
        self.param_specs = param_specs
        self._workers = workers
        self._find_layout = cache(partial(find_layout, self.tx, mesh, axis_name, per_worker))
        self._map_update = partial(
            mapped.map_update, tx=self.tx, workers=workers, layout_of=self._layout
        )
        self._compiled_update = jax.jit(self._map_update, static_argnums=5)
        return self

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

    def init(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, params: optax.Params
    ) -> optax.OptState:
        """The state of `params`, placed on the mesh.

        Args:
          params: the parameters, which need not lie on the mesh.

        Returns:
          The state of `tx`. Leaves that differ between workers have a leading axis of M rows.
        """
        return mapped.map_init(params, self.tx, self._workers, self._layout(params))

    def update(  # pyright: ignore[reportIncompatibleVariableOverride]
        self,
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        """Transform the workers' updates into the update that all of them apply.

        Args:
          updates: gradients with one row per worker, as `value_and_grad` returns them.
          state: the state that `init`, or the previous update, returned.
          params: the parameters; `None` if `tx` needs none.
          **extra_args: `active`, bool[M], says which workers take part. `tx` gets the others whole.

        Returns:
          Updates like the parameters, the same on every worker, and the new state.

        Raises:
          ValueError: `updates` lack a row per worker, the state belongs to other parameters or
            workers, or the updates of `tx` differ between workers.
          TypeError: `active` is not an array of M booleans.
        """
        self._workers.check_rows(updates, params)
        self._workers.check_active(extra_args.get("active"))
        active = extra_args.pop("active", None)
        static = mapped.static_arguments(extra_args)
        arguments = updates, state, params, active, extra_args
        if static is None or any(map(is_traced, jax.tree.leaves(arguments))):
            return self._map_update(*arguments)
        # Outside jax.jit a shard_map would compile each of its operations in every call.
        traced = {name: extra_args[name] for name in extra_args.keys() - dict(static).keys()}
        return self._compiled_update(updates, state, params, active, traced, static)

    def state_shardings(self, params: optax.Params) -> Any:
        """The shardings of the state of `params`, for `out_shardings` and for checkpoints.

        Args:
          params: the parameters, or their `jax.ShapeDtypeStruct`s.

        Returns:
          A tree like the state, of `NamedSharding`s.
        """
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state(params))

    def abstract_state(self, params: optax.Params, num_workers: int | None = None) -> Any:
        """The shapes, dtypes and shardings of the state of `params`, to restore a checkpoint into.

        Args:
          params: the parameters, or their `jax.ShapeDtypeStruct`s.
          num_workers: the number of workers that saved the state, by default this mesh's. Use
            `resize` for a state saved with another number of workers.

        Returns:
          A tree like the state, of `jax.ShapeDtypeStruct`s.
        """
        wanted = self._wanted(num_workers)
        layout = self._layout(params, wanted)

        def abstract(leaf: Leaf) -> jax.ShapeDtypeStruct:
            shape = (wanted, *leaf.shape) if leaf.per_worker else leaf.shape
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)

        return layout.structure.unflatten(map(abstract, layout.leaves))

    def resize(self, state: Any, params: optax.Params, num_workers: int | None = None) -> Any:
        """Make a state for another number of workers, outside of `jax.jit`.

        Rows are dealt out in order: with twice as many workers each two start as copies of one, and
        with half as many each starts as the mean of two, so the mean of momenta and of error
        memories stays the same. Servers' memories are cut into new parts, keys get the new worker's
        index folded in (uint32 in the shape of a raw key counts as a key), and integers are those
        of the worker who was there.

        Args:
          state: a state of these parameters, with rows for any number of workers.
          params: the parameters, or their `jax.ShapeDtypeStruct`s.
          num_workers: the number wanted, by default this mesh's. A checkpoint of 1 is small.

        Returns:
          The state, on this mesh; with the default number laid out as `update` takes it.

        Raises:
          ValueError: the state belongs to other parameters, or `num_workers` is not positive.

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
        check_state(state, before, had)
        return resize_state(state, before, after, self.mesh, wanted)

    def value_and_grad(
        self, loss_fn: Callable[..., Any], *, has_aux: bool = False, accumulate: int = 1
    ) -> Callable[..., Any]:
        """Like `jax.value_and_grad`, with the gradient of each worker's share of the batch.

        Args:
          loss_fn: a function of `(params, batch, *replicated)`, and of `key=` if a key is given,
            to a scalar loss, or with `has_aux` to a pair of the loss and anything else.
          has_aux: whether `loss_fn` returns such a pair.
          accumulate: the number of micro-batches in each worker's share; gradients and losses are
            averaged over them, in at least f32, before anything is sent.

        Returns:
          A function of `(params, batch, *replicated, key=None)`. The leaves of `batch` are cut
          along their first axis, whose length must be a multiple of M times `accumulate`; every
          worker gets `replicated` whole; the worker's index (and the micro-batch's) is folded into
          `key`, so workers draw different dropout masks. It returns `(loss, grads)` or `((loss,
          aux), grads)`: the mean of the workers' finite losses (NaN if none is), gradients with one
          row per worker, and aux with one row per worker (then one per micro-batch).

        Raises:
          ValueError: `accumulate` is below 1; at the call, the batch cannot be cut evenly.
          TypeError: `accumulate` is not a whole number; at the call, `key` is not a random key.
        """
        gradient = mapped.map_gradient(loss_fn, self._workers, has_aux, accumulate, None)

        def value_and_grad_fn(params: Any, batch: Any, *replicated: Any, key: Any = None):
            value, grads, _ = gradient(params, None, batch, replicated, key)
            return value, grads

        return value_and_grad_fn

    def local_steps(
        self, loss_fn: Callable[..., Any], *, has_aux: bool = False, accumulate: int = 1
    ) -> Callable[..., Any]:
        """Differences of parameters over each worker's own steps, to vote on instead of gradients.

        Each worker follows the gradients of its micro-batches one after the other, by the optimiser
        `local`, on a copy of the parameters. `tx` gets the start minus the end.

        Args:
          loss_fn: see `value_and_grad`.
          has_aux: see `value_and_grad`.
          accumulate: the number of local steps, and of micro-batches in each worker's share.

        Returns:
          A function of `(params, state, batch, *replicated, key=None)` to `(loss, differences,
          state)`, or `((loss, aux), differences, state)`, with the new state of `local`. If a loss,
          gradient or state is not finite, the worker keeps its state, and its differences are NaN.

        Raises:
          ValueError: there is no `local`; at the call, the state belongs to other parameters or M.
        """
        if self.local is None:
            raise ValueError("local=None: local steps need DataParallel(..., local=optimizer)")
        gradient = mapped.map_gradient(loss_fn, self._workers, has_aux, accumulate, self.local)

        def local_steps_fn(params: Any, state: Any, batch: Any, *replicated: Any, key: Any = None):
            check_state(state, self._layout(params), self.num_workers)
            own = self._workers.reshard(state.local, per_worker=True)
            value, differences, own = gradient(params, own, batch, replicated, key)
            return value, differences, state._replace(local=own)

        return local_steps_fn

    def train_step(
        self, loss_fn: Callable[..., Any], *, has_aux: bool = False, accumulate: int = 1
    ) -> jax.stages.Wrapped:
        """A compiled training step, which donates the memory of its parameters and state.

        Args:
          loss_fn: see `value_and_grad`.
          has_aux: see `value_and_grad`.
          accumulate: see `value_and_grad` or, with `local`, `local_steps`.

        Returns:
          A jitted function of `(params, state, batch, *replicated, key=None, active=None)` to
          `(params, state, loss)`, or with `has_aux` to `(params, state, (loss, aux))`; bool[M]
          `active` says which workers take part. If the first call has to move parameters to the
          mesh, the second call compiles once more.
        """
        make = self.value_and_grad if self.local is None else self.local_steps
        gradient = make(loss_fn, has_aux=has_aux, accumulate=accumulate)

        def step(
            params: Any, state: Any, batch: Any, *more: Any, key: Any = None, active: Any = None
        ):
            if self.local is None:
                value, rows = gradient(params, batch, *more, key=key)
            else:
                value, rows, state = gradient(params, state, batch, *more, key=key)
            updates, state = self.update(rows, state, params, active=active)
            params = optax.apply_updates(params, updates)
            return self._workers.constrain(params, self.param_specs), state, value

        return jax.jit(step, donate_argnums=(0, 1))

    def _wanted(self, num_workers: int | None) -> int:
        if num_workers is not None:
            check_count("num_workers", num_workers)
        return num_workers or self.num_workers

    def _layout(self, params: Any, num_workers: int | None = None) -> Layout:
        specs = self._workers.specs(params)
        leaves, structure = jax.tree.flatten(params)
        shapes = tuple([(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves])
        specs = None if specs is None else tuple(jax.tree.leaves(specs))
        return self._find_layout(structure, shapes, specs, num_workers or self.num_workers)
