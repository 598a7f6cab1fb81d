"""DataParallel: every worker's state and gradients as global arrays, under `jax.jit`."""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from signax._core.checks import check_transformation
from signax._core.leaves import is_traced
from signax._data_parallel import mapped
from signax._data_parallel.layout import PerWorker, find_layout
from signax._data_parallel.placement import Layouts, Workers, check_state
from signax._data_parallel.state import StateOnMesh


class DataParallel(StateOnMesh):
    r"""Run a transformation on every worker of a mesh axis, on global arrays.

    It is itself a gradient transformation, for use under plain `jax.jit`. Training loops written
    for Optax need no change, `TrainState.apply_gradients` and `nnx.Optimizer.update` included.
    `tx` runs on each worker's own gradient and state in `jax.shard_map` with `check_vma=True`:
    JAX's types prove that the parameters stay the same on all workers.

    State that differs between workers, such as momentum, gets a leading axis with one row per
    worker, sharded over the mesh axis. The rest is replicated. Tracing `tx` shows which state
    differs.

    Args:
      tx: the transformation of one worker, with a vote or a mean over `axis_name` in it. It is
        traced without extra arguments, so give every extra argument a default.
      mesh: a `jax.sharding.Mesh` that has the axis; its axes may be of type Auto or Explicit.
      axis_name: the mesh axis along which the workers lie, or a tuple of axes.
      param_specs: for parameters that are sharded over further mesh axes, a tree of
        `jax.sharding.PartitionSpec` like the parameters. A vote then runs on local blocks, and
        nothing is gathered. The outputs of `train_step` have the shardings of its inputs.
      local: an optimiser of one worker for steps on its own copy of the parameters between two
        votes, see :meth:`local_steps`. The state is then a :class:`signax.LocalStepsState`.
      per_worker: overrides the layout: a function of a state leaf's path (as
        `jax.tree_util.keystr` writes it) and of its `jax.ShapeDtypeStruct` on one worker. True
        gives each worker a copy. False shares one (JAX rejects a shared leaf that differs). None
        keeps the layout.

    Attributes:
      num_workers: int, M, the size of the axis, or the product of the sizes of several axes.

    Raises:
      ValueError: the mesh has no such axis, or `param_specs` names the workers' axis or an unknown
        axis.
      TypeError: `tx` or `local` is not a transformation, `mesh` is not a mesh, `axis_name` names no
        axis, or `param_specs` holds something else than specs.

    Examples:
      >>> import jax, jax.numpy as jnp, signax
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> tx = signax.DataParallel(signax.signum(0.5, axis_name="data"), mesh)
      >>> loss_fn = lambda params, batch: jnp.mean((batch - params) ** 2)
      >>> params, batch = jnp.zeros(3), jnp.ones((2 * tx.num_workers, 3))
      >>> state = tx.init(params)
      >>> step = tx.train_step(loss_fn)
      >>> params, state, loss = step(params, state, batch)
      >>> print(params, loss)
      [0.5 0.5 0.5] 1.0
    """

    tx: optax.GradientTransformationExtraArgs
    axis_name: Hashable
    param_specs: Any
    local: optax.GradientTransformation | None
    _name: str
    _workers: Workers
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
        find = partial(find_layout, self.tx, mesh, axis_name, per_worker)
        self._layout = Layouts(workers, find)
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
        """Make the initial state of `params`, and place it on the mesh.

        Args:
          params: the parameters, a tree of floating-point arrays. They need not lie on the mesh.

        Returns:
          The state of `tx`. Leaves that differ between workers have a leading axis of M rows.

        Raises:
          ValueError: `params` and `param_specs` differ in structure, `per_worker` shares a leaf
            that differs, or `tx` votes under a condition that differs between workers.
          TypeError: `tx` requires an extra argument, or a part of `tx` takes only some.

        Examples:
          See :meth:`value_and_grad`.
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
          **extra_args: `active`, bool[M], says which workers may take part. `tx` gets the other
            extra arguments whole.

        Returns:
          Updates like the parameters, the same on every worker, and the new state.

        Raises:
          ValueError: `updates` lack a row per worker, the state belongs to other parameters or
            workers, or the updates of `tx` differ between workers.
          TypeError: `active` is not an array of M booleans.

        Examples:
          See :meth:`value_and_grad`.
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

    def value_and_grad(
        self, loss_fn: Callable[..., Any], *, has_aux: bool = False, accumulate: int = 1
    ) -> Callable[..., Any]:
        """Differentiate a loss on each worker's own share of the batch.

        Args:
          loss_fn: a function of `(params, batch, *replicated)`, and of `key=` if a key is given. It
            returns a scalar loss, or with `has_aux` a pair of the loss and anything else.
          has_aux: whether `loss_fn` returns such a pair.
          accumulate: the number of micro-batches in each worker's share; gradients and losses are
            averaged over them, in at least f32, before anything is sent.

        Returns:
          A function of `(params, batch, *replicated, key=None)` to `(loss, grads)`, or with
          `has_aux` to `((loss, aux), grads)`. The leaves of `batch` are cut along their first axis,
          whose length must be a multiple of M times `accumulate`. Every worker gets `replicated`
          whole. The worker's index (and the micro-batch's) is folded into `key`, so workers draw
          different dropout masks. The loss is the mean of the workers' finite losses, or NaN
          without any. Gradients have one row per worker. So has aux, with an axis of micro-batches
          after the axis of workers if there are several.

        Raises:
          ValueError: `accumulate` is below 1; at the call, the batch cannot be cut evenly.
          TypeError: `accumulate` is not a whole number; at the call, `key` is not a random key.

        Examples:
          >>> import jax, jax.numpy as jnp, optax, signax
          >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
          >>> tx = signax.DataParallel(signax.sign_sgd(0.5, axis_name="data"), mesh)
          >>> loss_fn = lambda params, batch: jnp.mean((batch - params) ** 2)
          >>> params, batch = jnp.zeros(3), jnp.ones((2 * tx.num_workers, 3))
          >>> state = tx.init(params)
          >>> loss, grads = tx.value_and_grad(loss_fn)(params, batch)
          >>> updates, state = tx.update(grads, state, params)
          >>> print(loss, grads.shape == (tx.num_workers, 3))
          1.0 True
          >>> print(optax.apply_updates(params, updates))
          [0.5 0.5 0.5]
        """
        gradient = mapped.map_gradient(loss_fn, self._workers, has_aux, accumulate, None)

        def value_and_grad_fn(params: Any, batch: Any, *replicated: Any, key: Any = None):
            value, grads, _ = gradient(params, None, batch, replicated, key)
            return value, grads

        return value_and_grad_fn

    def local_steps(
        self, loss_fn: Callable[..., Any], *, has_aux: bool = False, accumulate: int = 1
    ) -> Callable[..., Any]:
        r"""Differences of parameters over local steps, to vote on instead of gradients.

        .. math:: x_{i, 0} = x, \quad
          x_{i, t} = x_{i, t - 1} + u_{i, t}, \quad \Delta_i = x - x_{i, k}

        Each worker i follows the gradients of its k micro-batches one after the other, on a copy of
        the parameters x, with updates u of the optimiser `local`. `tx` gets the start minus the
        end.

        Args:
          loss_fn: see :meth:`value_and_grad`.
          has_aux: see :meth:`value_and_grad`.
          accumulate: k, the number of local steps, and of micro-batches in each worker's share.

        Returns:
          A function of `(params, state, batch, *replicated, key=None)` to `(loss, differences,
          state)`, or with `has_aux` to `((loss, aux), differences, state)`. Differences have one
          row per worker, and the state holds the new state of `local`. If a loss, gradient or state
          is not finite, the worker keeps its state, and its differences are NaN.

        Raises:
          ValueError: there is no `local`, or `accumulate` is below 1; at the call, the batch cannot
            be cut evenly, or the state belongs to other parameters or another M.
          TypeError: as in :meth:`value_and_grad`.

        Examples:
          >>> import jax, jax.numpy as jnp, signax
          >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
          >>> vote = signax.sign_sgd(1.0, axis_name="data")
          >>> tx = signax.DataParallel(vote, mesh, local=signax.sign_sgd(0.25))
          >>> loss_fn = lambda params, batch: jnp.mean((batch - params) ** 2)
          >>> params, batch = jnp.zeros(3), jnp.ones((2 * tx.num_workers, 3))
          >>> local_steps = tx.local_steps(loss_fn, accumulate=2)
          >>> loss, differences, state = local_steps(params, tx.init(params), batch)
          >>> print(differences.shape == (tx.num_workers, 3))
          True
          >>> print((differences == -0.5).all())  # two steps of 0.25 each
          True
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
          loss_fn: see :meth:`value_and_grad`.
          has_aux: see :meth:`value_and_grad`.
          accumulate: see :meth:`value_and_grad` or, with `local`, :meth:`local_steps`.

        Returns:
          A jitted function of `(params, state, batch, *replicated, key=None, active=None)` to
          `(params, state, loss)`, or with `has_aux` to `(params, state, (loss, aux))`. `active`,
          bool[M], says which workers may take part. If the first call has to move parameters to the
          mesh, the second call compiles once more.

        Raises:
          ValueError: as in :meth:`value_and_grad` or :meth:`local_steps`; at the call, as in
            :meth:`update`.
          TypeError: as in :meth:`value_and_grad`; at the call, as in :meth:`update`.

        Examples:
          See :class:`signax.DataParallel`.
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
