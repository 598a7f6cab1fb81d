"""DataParallel: every worker's state and gradients as global arrays, under `jax.jit`."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from signax._core.leaves import is_traced
from signax._data_parallel import mapped, wrappers
from signax._data_parallel.eager import static_arguments
from signax._data_parallel.mapped import map_gradient
from signax._data_parallel.norms import GradNorm
from signax._data_parallel.placement import check_state
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
      on_wrong_sharding: `"raise"` an error, or `"warn"`, if a jitted step takes or returns rows of
        the state that are pinned to another sharding than :meth:`state_shardings` has, or takes
        sharded parameters without `param_specs`. XLA would gather them at every step.

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
        static = static_arguments(extra_args)
        if static is None:
            return self._map_update(*arguments)
        # Outside jax.jit a shard_map would compile each of its operations in every call.
        traced = {name: extra_args[name] for name in extra_args.keys() - dict(static).keys()}
        return self._compiled_update(updates, state, params, active, traced, static)

    def value_and_grad(
        self,
        loss_fn: Callable[..., Any],
        *,
        has_aux: bool = False,
        accumulate: int = 1,
        aux: Any = "rows",
    ) -> Callable[..., Any]:
        """Differentiate a loss on each worker's own share of the batch.

        Args:
          loss_fn: a function of `(params, batch, *replicated)`, and of `key=` if a key is given. It
            returns a scalar loss, or with `has_aux` a pair of the loss and anything else. Other
            arrays that it uses reach every worker whole. A random key among these gives all workers
            equal masks.
          has_aux: whether `loss_fn` returns such a pair.
          accumulate: the number of micro-batches in each worker's share; gradients and losses are
            averaged over them, in at least f32, before anything is sent.
          aux: what becomes of aux. `"rows"` gives each worker, and then each micro-batch if there
            are several, an entry: [M, ...] or [M, accumulate, ...]. `"concat"` joins results per
            example in the order of the batch: [b, ...] of each worker to [M b, ...]. `"mean"` and
            `"sum"` run over micro-batches and over the workers whose loss is finite, `"mean"` only
            over finite values, in at least f32 or, for sums of integers, int32. A tree of modes,
            such as `{"logits": "concat", "correct": "sum"}`, has the outer structure of aux.

        Returns:
          A function of `(params, batch, *replicated, key=None)` to `(loss, grads)`, or with
          `has_aux` to `((loss, aux), grads)`. The leaves of `batch` are cut along their first axis,
          whose length must be a multiple of M times `accumulate`. Every worker gets `replicated`
          whole. The worker's index (and the micro-batch's) is folded into `key`, so workers draw
          different dropout masks. The loss is the mean of the workers' finite losses, or NaN
          without any. Gradients have one row per worker. Outside `jax.jit` a call is compiled, and
          traces `loss_fn` again every time, so it sees changed Python values.

        Raises:
          ValueError: `accumulate` is below 1, `aux` is no mode, or is given without `has_aux`; at
            the call, the batch cannot be cut evenly, aux of the mode `"concat"` is a scalar, or
            `loss_fn` uses arrays that cannot be handed to the workers.
          TypeError: `accumulate` is not a whole number; at the call, `key` is not a random key, or
            aux of the mode `"mean"` is not floating-point.

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
        gradient = map_gradient(
            loss_fn, self._workers, self._programs,
            has_aux=has_aux, accumulate=accumulate, aux=aux,
        )  # fmt: skip

        def value_and_grad_fn(params: Any, batch: Any, *replicated: Any, key: Any = None):
            if self._watch is not None:
                params = self._watch(params)
            value, grads, _ = gradient(params, None, batch, replicated, key)
            return value, grads

        return value_and_grad_fn

    def local_steps(
        self,
        loss_fn: Callable[..., Any],
        *,
        has_aux: bool = False,
        accumulate: int = 1,
        aux: Any = "rows",
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
          aux: see :meth:`value_and_grad`.

        Returns:
          A function of `(params, state, batch, *replicated, key=None)` to `(loss, differences,
          state)`, or with `has_aux` to `((loss, aux), differences, state)`. Differences have one
          row per worker, and the state holds the new state of `local`. If a loss, gradient or state
          is not finite, the worker keeps its state, and its differences are NaN.

        Raises:
          ValueError: there is no `local`, or the state belongs to other parameters or another M; or
            as in :meth:`value_and_grad`.
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
        gradient = map_gradient(
            loss_fn, self._workers, self._programs, self.local,
            has_aux=has_aux, accumulate=accumulate, aux=aux,
        )  # fmt: skip

        def local_steps_fn(params: Any, state: Any, batch: Any, *replicated: Any, key: Any = None):
            check_state(state, self._layout(params), self.num_workers)
            value, differences, own = gradient(params, state.local, batch, replicated, key)
            return value, differences, state._replace(local=own)

        return local_steps_fn

    def train_step(
        self,
        loss_fn: Callable[..., Any],
        *,
        has_aux: bool = False,
        accumulate: int = 1,
        aux: Any = "rows",
    ) -> jax.stages.Wrapped:
        """A compiled training step, which donates the memory of its parameters and state.

        Args:
          loss_fn: see :meth:`value_and_grad`.
          has_aux: see :meth:`value_and_grad`.
          accumulate: see :meth:`value_and_grad` or, with `local`, :meth:`local_steps`.
          aux: see :meth:`value_and_grad`.

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
        gradient = make(loss_fn, has_aux=has_aux, accumulate=accumulate, aux=aux)

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

        return jax.jit(step, donate_argnums=(0, 1))

    def grad_norm(self, rows: optax.Updates) -> GradNorm:
        r"""Each worker's gradient norm, and an estimate of the mean gradient's norm.

        .. math:: n_i = \lVert g_i \rVert_2, \qquad
          n \approx \Big\lVert \frac{1}{|F|} \sum_{i \in F} g_i \Big\rVert_2, \qquad
          F = \{i : g_i \text{ is finite}\}

        over all leaves together. Gradients are not exchanged: each worker sends a random linear
        sketch of 4,096 numbers, below 33 kB per step for any model. The estimate of :math:`n^2` is
        unbiased, with a standard deviation of about 2.3% of :math:`n^2`, that is, 1.1% of n. The
        sketch is the same in every call, so errors of similar gradients are similar.

        `optax.global_norm` of rows is the norm of all workers' gradients together, about
        :math:`\sqrt{M}` times the norm of one. To clip gradients, clip inside, before the vote.

        Args:
          rows: gradients with one row per worker, as :meth:`value_and_grad` returns them, or
            differences of :meth:`local_steps`.

        Returns:
          A :class:`signax.GradNorm`. Its `workers`, f32[M], are NaN where a gradient is not finite,
          and at most the largest f32. Its `mean`, f32[], is NaN if no gradient is finite, and
          infinite if the sketch exceeds the range of f32.

        Raises:
          ValueError: `rows` lack a row per worker, or differ from `param_specs` in structure.
          TypeError: a leaf is not floating-point.

        Examples:
          >>> import jax, jax.numpy as jnp, signax
          >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
          >>> tx = signax.DataParallel(signax.sign_sgd(0.5, axis_name="data"), mesh)
          >>> loss_fn = lambda params, batch: jnp.mean(batch @ params)
          >>> batch = jnp.tile(jnp.array([3.0, 4.0]), (tx.num_workers, 1))
          >>> loss, grads = tx.value_and_grad(loss_fn)(jnp.zeros(2), batch)
          >>> norms = tx.grad_norm(grads)
          >>> print(bool((norms.workers == 5).all()), norms.mean)
          True 5.0
        """
        return self._compiled_norm(rows)
