"""DataParallel: the state and the gradients of each worker as global arrays, under `jax.jit`."""

import inspect
import math
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from signax._checks import (
    check_axis_name,
    check_count,
    check_key,
    check_transformation,
    is_traced,
)
from signax._gradients import check_batch, local_value_and_grad
from signax._layout import Layout, PerWorker, check_state, find_layout, rows_in
from signax._local_steps import own_local_state, with_local_state
from signax._participation import leave_out_nonfinite
from signax._resize import resize_state
from signax._specs import auto_axes, axis_names, explicit_axes, varying_axes
from signax._workers import Workers, add_axis, check_param_specs, conditional_vote


class DataParallel(optax.GradientTransformationExtraArgs):
    r"""Runs a transformation on every worker of a mesh axis, on global arrays.

    It is itself a gradient transformation, for use under plain `jax.jit`: training loops written
    for Optax stay as they are, `TrainState.apply_gradients` and `nnx.Optimizer.update` included.
    Inside, `tx` runs on each worker's own gradient and state in `jax.shard_map` with
    `check_vma=True`, so that JAX's types prove that the parameters stay the same on all workers.

    State that differs between workers, such as momentum and error memory, gets a leading axis with
    one row per worker, sharded over the mesh axis; the rest is replicated. Which is which is found
    by tracing `tx`. So M workers keep M momenta between them, one each, and a checkpoint of the
    whole state holds all M. `abstract_state` says what to restore such a checkpoint into, and
    `resize` makes a state of another number of workers.

    Of the update's extra arguments `active`, bool[M], says which workers take part; the others go
    to `tx` whole. As it is traced without them, `tx` must not insist on any.

    Args:
      tx: the transformation of one worker, with a vote or a mean over `axis_name` in it.
      mesh: a mesh that has the axis; its axes may be of type Auto or Explicit.
      axis_name: the mesh axis along which the workers lie, or a tuple of axes.
      param_specs: for parameters that are sharded over further mesh axes, a tree like the
        parameters of their `PartitionSpec`s. A vote then runs on local blocks, and nothing is
        gathered. `train_step` gives parameters and state as it takes them.
      local: an optimiser of one worker for the steps that it takes on a copy of the parameters
        between two votes, see `local_steps`. The state is then a `LocalStepsState`.
      per_worker: overrides what was found: a function of a state leaf's path (as
        `jax.tree_util.keystr` writes it) and its shape and dtype on one worker. True gives each
        worker a copy, False shares one, None leaves it as found. JAX refuses to share a leaf that
        differs.

    Attributes:
      num_workers: the number of workers M, the size of the axis, or the product of several.

    Raises:
      ValueError: the mesh has no such axis, or `param_specs` names the workers' axis or an unknown
        one.
      TypeError: `axis_name` names no axis.

    Examples:
      >>> import jax, jax.numpy as jnp, signax
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> tx = signax.DataParallel(signax.signum(0.5, axis_name="data"), mesh)
      >>> def loss_fn(params, batch):
      ...     return jnp.mean((batch - params) ** 2)
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
    _workers: Workers
    _per_worker: PerWorker | None
    _layouts: dict[Any, Layout]
    _compiled_update: jax.stages.Wrapped

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
        check_axis_name(axis_name)
        if not isinstance(mesh, Mesh):
            raise TypeError(f"mesh={mesh!r} is not a jax.sharding.Mesh: jax.make_mesh makes one")
        for axis in axis_names(axis_name):
            if axis not in mesh.axis_names:
                raise ValueError(
                    f"axis_name={axis_name!r}: {axis!r} is not an axis of the mesh, which has "
                    f"{mesh.axis_names}"
                )
        check_param_specs(param_specs, mesh, axis_name)

        def init_fn(params):
            return self._init(params)

        def update_fn(updates, state, params=None, **extra_args):
            return self._update(updates, state, params, **extra_args)

        self = super().__new__(cls, init_fn, update_fn)
        self.tx = _with_extra_args(tx)
        self.local = local
        if local is not None:
            self.tx = with_local_state(local, self.tx)
            per_worker = own_local_state(per_worker)
        self.mesh = mesh
        self.axis_name = axis_name
        self.num_workers = math.prod(mesh.shape[axis] for axis in axis_names(axis_name))
        self.param_specs = param_specs
        inside = explicit_axes(mesh) - set(axis_names(axis_name))
        self._workers = Workers(mesh, axis_name, self.num_workers, inside, param_specs)
        self._per_worker = per_worker
        self._layouts = {}
        self._compiled_update = jax.jit(self._trace_update, static_argnums=4)
        return self

    def __copy__(self):
        return (
            self  # nothing in it changes; a tuple's own way would call __new__ with two functions
        )

    def __deepcopy__(self, memo):
        del memo
        return self

    def __reduce_ex__(self, protocol):
        del protocol
        raise TypeError(
            "DataParallel cannot be pickled, since its mesh holds devices of this process: pickle "
            "what it is made from, and make another one where it is loaded"
        )

    def state_shardings(self, params: optax.Params) -> Any:
        """The shardings of the state of `params`, for `out_shardings` and for checkpoints.

        Args:
          params: the parameters, or their `jax.ShapeDtypeStruct`s.

        Returns:
          A tree like the state, of `NamedSharding`s.
        """
        layout = self._layout(params, self._workers.specs(params))
        return layout.structure.unflatten(leaf.sharding for leaf in layout.leaves)

    def abstract_state(self, params: optax.Params, num_workers: int | None = None) -> Any:
        """The shapes, dtypes and shardings of the state of `params`, to restore a checkpoint into.

        Args:
          params: the parameters, or their `jax.ShapeDtypeStruct`s.
          num_workers: how many workers the state was saved by; by default as many as the mesh has.
            `resize` makes a state of this mesh's of one of other numbers.

        Returns:
          A tree like the state, of `jax.ShapeDtypeStruct`s.
        """
        wanted = self._check_num_workers(num_workers)
        layout = self._layout(params, self._workers.specs(params), wanted)

        def abstract(leaf):
            shape = (wanted, *leaf.shape) if leaf.per_worker else leaf.shape
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)

        return layout.structure.unflatten(abstract(leaf) for leaf in layout.leaves)

    def resize(self, state: Any, params: optax.Params, num_workers: int | None = None) -> Any:
        """Makes a state of any number of workers into one of another number, outside of `jax.jit`.

        Rows are dealt out in order: of twice as many workers each two start as copies of one, and
        of half as many each as the mean of two, so that the mean of momenta and of error memories
        over the workers stays the same. The servers' memory of
        :func:`signax.mean_scaled_signs` is cut anew, keys get the new worker's index folded in
        (and uint32 in the shape of one raw key is taken for that), and integers are taken over from
        the worker who was there.

        Args:
          state: of these parameters, with rows for any number of workers.
          params: the parameters, or their `jax.ShapeDtypeStruct`s.
          num_workers: the number wanted, by default this mesh's. With 1 a checkpoint is small and
            loses what workers differ in.

        Returns:
          The state, on this mesh; with the default number laid out as `update` takes it.

        Raises:
          ValueError: the state is not one of these parameters, or `num_workers` is not positive.

        Examples:
          >>> import jax, jax.numpy as jnp, optax, signax
          >>> mesh = jax.make_mesh((1,), ("data",))
          >>> tx = signax.DataParallel(signax.signum(0.1, axis_name="data"), mesh)
          >>> params = jnp.zeros(3)
          >>> state = tx.resize(tx.init(params), params, 4)  # for a mesh of four
          >>> print(optax.tree.get(state, "momentum").shape)
          (4, 3)
        """
        wanted = self._check_num_workers(num_workers)
        specs = self._workers.specs(params)
        had = rows_in(state, self._layout(params, specs), self.num_workers)
        before, after = self._layout(params, specs, had), self._layout(params, specs, wanted)
        check_state(state, before, had)
        leaves = _put(jax.tree.leaves(state), _auto_shardings(before, self.mesh))
        if had != wanted:
            flags = before.structure.unflatten(leaf.per_worker for leaf in before.leaves)

            def resized(leaves):
                state = before.structure.unflatten(leaves)
                return jax.tree.leaves(resize_state(state, flags, wanted))

            leaves = jax.jit(resized, out_shardings=_auto_shardings(after, self.mesh))(leaves)
        return after.structure.unflatten(_put(leaves, [x.sharding for x in after.leaves]))

    def value_and_grad(
        self, loss_fn: Callable, *, has_aux: bool = False, accumulate: int = 1
    ) -> Callable:
        """Like `jax.value_and_grad`, with the gradient of each worker's share of the batch.

        Args:
          loss_fn: a function of `(params, batch, *replicated)`, and of `key=` if a key is given,
            to a scalar loss, or with `has_aux` to a pair of it and of anything else.
          has_aux: whether `loss_fn` returns such a pair.
          accumulate: how many micro-batches each worker's share is cut into; gradients and losses
            are averaged over them, in at least f32, before anything is sent.

        Returns:
          A function of `(params, batch, *replicated, key=None)`. The leaves of `batch` are cut
          along their first axis, whose length must be a multiple of the number of workers times
          `accumulate`; `replicated` goes to every worker whole; into `key` the worker's index (and
          the micro-batch's) is folded, so that workers draw different dropout masks. It returns
          `(loss, grads)` or `((loss, aux), grads)`: the mean of those of the workers' losses that
          are finite (NaN if none is), gradients with one row per worker, and aux with one row per
          worker (then one per micro-batch, if `accumulate` is above 1).

        Raises:
          ValueError: `accumulate` is below 1; at the call, the batch cannot be cut evenly.
          TypeError: `accumulate` is no whole number; at the call, `key` is not a random key.
        """
        gradient = self._gradient(loss_fn, has_aux, accumulate, None)

        def value_and_grad_fn(params, batch, *replicated, key=None):
            value, grads, _ = gradient(params, None, batch, replicated, key)
            return value, grads

        return value_and_grad_fn

    def local_steps(
        self, loss_fn: Callable, *, has_aux: bool = False, accumulate: int = 1
    ) -> Callable:
        """How far each worker goes by itself, to be voted on in place of a gradient.

        Each worker follows the gradients of its micro-batches one after the other, by the optimiser
        `local` and on a copy of the parameters of its own, and forgets the copy. What `tx` is given
        is where it started minus where it came: one exchange for `accumulate` steps.

        Args:
          loss_fn: see `value_and_grad`.
          has_aux: see `value_and_grad`.
          accumulate: how many micro-batches each worker's share is cut into, and so the number of
            local steps.

        Returns:
          A function of `(params, state, batch, *replicated, key=None)` to `(loss, differences,
          state)`, or `((loss, aux), differences, state)`: as `value_and_grad`'s, with the new
          state of `local` in the state. A worker with a loss, gradient or state that is not finite
          keeps its state, and what it hands over is not finite either.

        Raises:
          ValueError: this `DataParallel` has no `local`; at the call, the state is not one of it,
            or has rows for another number of workers; or as in `value_and_grad`.
          TypeError: as in `value_and_grad`.
        """
        if self.local is None:
            raise ValueError("local=None: local steps need DataParallel(..., local=optimizer)")
        gradient = self._gradient(loss_fn, has_aux, accumulate, self.local)

        def local_steps_fn(params, state, batch, *replicated, key=None):
            layout = self._layout(params, self._workers.specs(params))
            check_state(state, layout, self.num_workers)
            own = jax.tree.map(lambda leaf: self._workers.place(leaf, per_worker=True), state.local)
            value, differences, own = gradient(params, own, batch, replicated, key)
            return value, differences, state._replace(local=own)

        return local_steps_fn

    def train_step(
        self, loss_fn: Callable, *, has_aux: bool = False, accumulate: int = 1
    ) -> jax.stages.Wrapped:
        """A compiled step of training, which takes over the memory of its parameters and state.

        Args:
          loss_fn: see `value_and_grad`.
          has_aux: see `value_and_grad`.
          accumulate: see `value_and_grad`, and with `local` see `local_steps`.

        Returns:
          A jitted function of `(params, state, batch, *replicated, key=None, active=None)` to
          `(params, state, loss)`, or with `has_aux` to `(params, state, (loss, aux))`; bool[M]
          `active` says which workers take part. Its `.lower` gives the program, as that of any
          jitted function. Parameters that do not lie on the mesh yet are moved there by the first
          call, and the second compiles once more for it.
        """
        options = {"has_aux": has_aux, "accumulate": accumulate}
        gradient = self.value_and_grad(loss_fn, **options)

        def own_gradient(params, state, batch, *replicated, key=None):
            return *gradient(params, batch, *replicated, key=key), state

        follow = own_gradient if self.local is None else self.local_steps(loss_fn, **options)

        def step(params, state, batch, *replicated, key=None, active=None):
            value, rows, state = follow(params, state, batch, *replicated, key=key)
            updates, state = self.update(rows, state, params, active=active)
            params = optax.apply_updates(params, updates)
            if self.param_specs is not None:
                params = jax.tree.map(self._workers.keep, params, self.param_specs)
            return params, state, value

        return jax.jit(step, donate_argnums=(0, 1))

    def _gradient(
        self,
        loss_fn: Callable,
        has_aux: bool,
        accumulate: int,
        local: optax.GradientTransformation | None,
    ) -> Callable:
        """Of parameters, state of `local`, batch, replicated arguments and key: value, rows, state.

        With `local` the rows are differences, otherwise gradients.
        """
        check_count("accumulate", accumulate)

        def loss_and_aux(*args, **kwargs):
            value = loss_fn(*args, **kwargs)
            return value if has_aux else (value, None)

        def of_worker(params, own, batch, replicated, key):
            if key is not None:
                key = jax.random.fold_in(key, lax.axis_index(self.axis_name))
            own = jax.tree.map(lambda row: row.squeeze(0), own)
            loss, *rows = local_value_and_grad(
                loss_and_aux, params, batch, replicated, key, accumulate, local, own
            )
            return self._workers.mean_of_finite(loss), *jax.tree.map(add_axis, rows)

        # Every worker's row is its own, so that there is nothing for types to prove, and with them
        # a loss could not start a scan from a constant. Nor would gradients be the worker's own.
        whole, split = PartitionSpec(), PartitionSpec(self.axis_name)
        specs = (whole, split, split, whole, whole), (whole, split, split, split)
        mapped = self._workers.shard_map(of_worker, *specs, check_vma=False)

        def gradient(params, own, batch, replicated, key):
            check_batch(batch, self.num_workers, accumulate)
            if key is not None:
                check_key(key)
            batch = self._workers.place(batch, per_worker=True)
            loss, aux, rows, own = mapped(
                self._workers.place_params(params),
                own,
                batch,
                self._workers.place(replicated),
                self._workers.place(key),
            )
            return ((loss, aux) if has_aux else loss), rows, own

        return gradient

    def _init(self, params):
        layout = self._layout(params, self._workers.specs(params))

        def local(params):
            return self._state_rows(self.tx.init(params), layout)

        mapped = self._workers.shard_map(local, (PartitionSpec(),), self._worker_specs(layout))

        def init(params):
            return mapped(self._workers.place_params(params))

        shardings = [leaf.sharding for leaf in layout.leaves]
        return layout.structure.unflatten(jax.jit(init, out_shardings=shardings)(params))

    def _update(self, updates, state, params, **extra_args):
        self._workers.check_rows(updates, params)
        self._workers.check_active(extra_args.get("active"))
        is_traced_call = any(map(is_traced, jax.tree.leaves((updates, state, params, extra_args))))
        numbers, others = _split_numbers(extra_args)
        if is_traced_call or not _is_hashable(others):
            return self._trace_update(updates, state, params, extra_args)
        # Outside jax.jit a shard_map would compile each of its operations in every call.
        return self._compiled_update(updates, state, params, numbers, others)

    def _trace_update(self, updates, state, params, numbers, others=()):
        """The update, with extra arguments in a dict, and further ones as pairs of name and value.

        Pairs can be hashed, as `jax.jit` asks of arguments that it does not trace.
        """
        extra_args = {**numbers, **dict(others)}
        active = extra_args.pop("active", None)
        one_worker = self._workers.one_worker(updates) if params is None else params
        specs = self._workers.specs(one_worker)
        layout = self._layout(one_worker, specs)
        check_state(state, layout, self.num_workers)
        if specs is not None:
            extra_args["param_specs"] = specs

        # Barriers keep the axis of rows out of what XLA fuses: else a donated state is copied.
        def local(updates, leaves, params, active):
            extra = extra_args if active is None else {**extra_args, "active": active.squeeze(0)}
            state = layout.structure.unflatten(
                lax.optimization_barrier(leaf.squeeze(0)) if place.per_worker else leaf
                for leaf, place in zip(leaves, layout.leaves, strict=True)
            )
            updates = jax.tree.map(lambda row: row.squeeze(0), updates)
            updates, state = self.tx.update(updates, state, params, **extra)
            self._workers.check_settled(updates)
            return updates, self._state_rows(state, layout)

        whole, split = PartitionSpec(), PartitionSpec(self.axis_name)
        state_specs = self._worker_specs(layout)
        mapped = self._workers.shard_map(
            local, (split, state_specs, whole, split), (whole, state_specs)
        )
        leaves = [
            self._workers.place(leaf, per_worker=place.per_worker)
            for leaf, place in zip(jax.tree.leaves(state), layout.leaves, strict=True)
        ]
        arguments = (
            self._workers.place(updates, per_worker=True),
            leaves,
            self._workers.place_params(params),
            self._workers.place(active, per_worker=True),
        )
        try:
            updates, leaves = mapped(*arguments)
        except TypeError as error:
            # Of the types of two branches JAX names the manual axes only if they differ in those.
            differs = all(words in str(error) for words in ("cond branches", "manual ax"))
            if differs and layout.is_conditional:
                raise conditional_vote(self.axis_name) from error
            raise
        leaves = [
            self._workers.keep(leaf, place.sharding.spec)
            for leaf, place in zip(leaves, layout.leaves, strict=True)
        ]
        return updates, layout.structure.unflatten(leaves)

    def _worker_specs(self, layout: Layout) -> list[PartitionSpec]:
        """The state's specs over the workers' axis alone."""
        row, whole = PartitionSpec(self.axis_name), PartitionSpec()
        return [row if leaf.per_worker else whole for leaf in layout.leaves]

    def _check_num_workers(self, num_workers: int | None) -> int:
        if num_workers is None:
            return self.num_workers
        check_count("num_workers", num_workers)
        return num_workers

    def _layout(self, params: Any, specs: Any, num_workers: int | None = None) -> Layout:
        """The layout of the state of `params`, found once for their structure and shapes."""
        num_workers = self.num_workers if num_workers is None else num_workers
        params = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), params
        )
        key = (
            jax.tree.structure(params),
            tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(params)),
            tuple(jax.tree.leaves(specs)),
            num_workers,
        )
        if key not in self._layouts:
            self._layouts[key] = find_layout(
                self.tx,
                params,
                specs,
                self.mesh,
                self.axis_name,
                num_workers,
                self._per_worker,
            )
        return self._layouts[key]

    def _state_rows(self, state: Any, layout: Layout) -> list[jax.Array]:
        structure = jax.tree.structure(state)
        if structure != layout.structure:
            raise ValueError(
                f"tx changes the structure of its state from {layout.structure} to {structure}"
            )
        rows = []
        for leaf, place in zip(jax.tree.leaves(state), layout.leaves, strict=True):
            leaf = jnp.asarray(leaf)
            if not place.per_worker and varying_axes(leaf, self.axis_name):
                raise ValueError(
                    f"state{place.path} differs between workers but is to be shared: let "
                    "per_worker return True for it"
                )
            rows.append(
                self._workers.row(lax.optimization_barrier(leaf)) if place.per_worker else leaf
            )
        return rows


def _split_numbers(
    extra_args: dict[str, Any],
) -> tuple[dict[str, Any], tuple[tuple[str, Any], ...]]:
    """Splits arguments into trees of arrays and floats, which `jax.jit` traces, and others."""
    kinds = jax.Array, np.ndarray, np.number, np.bool_, float
    numbers = {
        name: value
        for name, value in extra_args.items()
        if all(isinstance(leaf, kinds) for leaf in jax.tree.leaves(value))
    }
    return numbers, tuple(item for item in extra_args.items() if item[0] not in numbers)


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _put(leaves: list[Any], shardings: list[NamedSharding]) -> list[jax.Array]:
    """`jax.device_put`, which takes keys that lie in several processes as their data only."""
    is_key = [jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key) for leaf in leaves]
    data = [jax.random.key_data(x) if key else x for x, key in zip(leaves, is_key, strict=True)]
    data = jax.device_put(data, shardings)
    return [
        jax.random.wrap_key_data(new, impl=jax.random.key_impl(old)) if key else new
        for old, new, key in zip(leaves, data, is_key, strict=True)
    ]


def _auto_shardings(layout: Layout, mesh: Mesh) -> list[NamedSharding]:
    """A layout's shardings over axes of type Auto, where any array may be cut anew."""
    return [NamedSharding(auto_axes(mesh), leaf.sharding.spec) for leaf in layout.leaves]


def _with_extra_args(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Passes extra arguments to all that take them, `optax.MultiSteps` included.

    What takes any is told all updates, so that its votes and means leave out the same workers.
    """
    parameters = inspect.signature(tx.update).parameters.values()
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
        return leave_out_nonfinite(optax.GradientTransformationExtraArgs(tx.init, tx.update))
    return optax.with_extra_args_support(tx)
