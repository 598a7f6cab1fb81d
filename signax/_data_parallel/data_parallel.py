"""DataParallel: every worker's state and gradients as global arrays, under `jax.jit`."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import optax

from signax._core.leaves import is_traced
from signax._data_parallel import mapped, wrappers
from signax._data_parallel.eager import are_constant, static_arguments
from signax._data_parallel.gradients import GradientsOnMesh
from signax._overlap.overlap import compiler_options, overlap
from signax._transforms.buckets import has_buckets


class DataParallel(GradientsOnMesh):
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
      on_wrong_sharding: `"raise"` an error, or `"warn"`, if a jitted step takes or returns rows of
        the state that are pinned to another sharding than :meth:`state_shardings` has, or takes
        sharded parameters without `param_specs`. XLA would gather them at every step.

    Attributes:
      num_workers: int, M, the size of the axis, or the product of the sizes of several axes.

    Raises:
      ValueError: the mesh has no such axis, the workers' axes are of both types, or `param_specs`
        names the workers' axis or an unknown axis.
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
            that differs, `tx` votes under a worker's own condition, or a wrapper would see rows.
          TypeError: `tx` requires an extra argument, or a part of `tx` takes only some.

        Examples:
          See :meth:`value_and_grad`.
        """
        wrappers.check_wrappers()
        layout = self._layout(params)
        return self._boxed(mapped.map_init(params, self.tx, self._workers, layout), layout)

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
            workers, the updates of `tx` differ between workers, or a wrapper such as
            `optax.MultiSteps`, or a transformation before it in `optax.chain`, sees the rows.
          TypeError: `active` is not an array of M booleans.

        Examples:
          See :meth:`value_and_grad`.
        """
        wrappers.check_wrappers()
        self._workers.check_rows(updates, params)
        self._workers.check_active(extra_args.get("active"))
        active = extra_args.pop("active", None)
        arguments = updates, state, params, active, extra_args
        if any(map(is_traced, jax.tree.leaves(arguments))):
            return self._map_update(*arguments)
        # Outside jax.jit a shard_map would compile each of its operations in every call.
        static = static_arguments(extra_args)
        traced = {name: extra_args[name] for name in extra_args.keys() - dict(static).keys()}
        arguments = updates, state, params, active, traced
        if are_constant(static):
            return self._compiled_update(*arguments, static)
        return self._programs(lambda *arguments: self._map_update(*arguments, static), *arguments)

    def train_step(
        self,
        loss_fn: Callable[..., Any],
        *,
        has_aux: bool = False,
        accumulate: int = 1,
        num_local_steps: int | None = None,
        aux: Any = "rows",
    ) -> jax.stages.Wrapped:
        """A compiled training step, which donates the memory of its parameters and state.

        Args:
          loss_fn: see :meth:`value_and_grad`.
          has_aux: see :meth:`value_and_grad`.
          accumulate: without `local`, see :meth:`value_and_grad`.
          num_local_steps: with `local`, see :meth:`local_steps`; by default 1.
          aux: see :meth:`value_and_grad`.

        Returns:
          A jitted function of `(params, state, batch, *replicated, key=None, active=None)` to
          `(params, state, loss)`, or with `has_aux` to `(params, state, (loss, aux))`. `active`,
          bool[M], says which workers may take part. If the first call has to move parameters to the
          mesh, the second call compiles once more.

        Raises:
          ValueError: `num_local_steps` is given without `local`, or together with `accumulate`; or
            as in :meth:`value_and_grad` or :meth:`local_steps`; at the call, as in :meth:`update`.
          TypeError: as in :meth:`value_and_grad`; at the call, as in :meth:`update`.

        Examples:
          See :class:`signax.DataParallel`.
        """
        if self.local is not None:
            number = _find_num_local_steps(accumulate, num_local_steps)
            gradient = self.local_steps(loss_fn, has_aux=has_aux, num_local_steps=number, aux=aux)
        elif num_local_steps is None:
            gradient = self.value_and_grad(loss_fn, has_aux=has_aux, accumulate=accumulate, aux=aux)
        else:
            raise ValueError(
                f"num_local_steps={num_local_steps!r} needs DataParallel(..., local=optimizer). To "
                "average the gradients of micro-batches, use accumulate="
            )

        def step(
            params: Any, state: Any, batch: Any, *more: Any, key: Any = None, active: Any = None
        ):
            if self.local is None:
                value, rows = gradient(params, batch, *more, key=key)
            else:
                value, rows, state = gradient(params, state, batch, *more, key=key)
            updates, state = self.update(rows, state, params, active=active)
            params = optax.apply_updates(params, updates)
            return self._workers.constrain(params, self._workers.specs(params)), state, value

        def step_in_order(params: Any, state: Any, *more: Any, **keywords: Any):
            layout = self._layout(params)
            has = has_buckets(layout.structure.unflatten(layout.leaves))
            return (overlap(step) if has else step)(params, state, *more, **keywords)

        options = compiler_options(self.mesh)
        return jax.jit(step_in_order, donate_argnums=(0, 1), compiler_options=options or None)


def _find_num_local_steps(accumulate: Any, num_local_steps: Any) -> Any:
    """The number of local steps that `train_step` got, maybe by its old name."""
    if accumulate == 1:
        return 1 if num_local_steps is None else num_local_steps
    if num_local_steps is not None:
        raise ValueError(
            f"accumulate={accumulate!r} and num_local_steps={num_local_steps!r} are both given: "
            "with local= use num_local_steps= alone"
        )
    message = "train_step(accumulate=...) with local= is deprecated: use num_local_steps=..."
    warnings.warn(message, DeprecationWarning, stacklevel=3)
    return accumulate
