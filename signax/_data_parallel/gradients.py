"""Gradients on a mesh: of each worker's share of a batch, over local steps, and their norms."""

from collections.abc import Callable
from typing import Any

import optax

from signax._core.checks import renamed
from signax._data_parallel.mapped import map_gradient
from signax._data_parallel.norms import GradNorm
from signax._data_parallel.placement import check_state
from signax._data_parallel.state import StateOnMesh


class GradientsOnMesh(StateOnMesh):
    """The methods of `DataParallel` that are about rows of gradients."""

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
            has_aux=has_aux, pieces=accumulate, aux=aux,
        )  # fmt: skip

        def value_and_grad_fn(params: Any, batch: Any, *replicated: Any, key: Any = None):
            if self._watch is not None:
                params = self._watch(params)
            value, grads, _ = gradient(params, None, batch, replicated, key)
            return value, grads

        return value_and_grad_fn

    @renamed(accumulate="num_local_steps")
    def local_steps(
        self,
        loss_fn: Callable[..., Any],
        *,
        has_aux: bool = False,
        num_local_steps: int = 1,
        aux: Any = "rows",
    ) -> Callable[..., Any]:
        r"""Differences of parameters over local steps, to vote on instead of gradients.

        .. math:: x_{i, 0} = x, \quad
          x_{i, t} = x_{i, t - 1} + u_{i, t}, \quad \Delta_i = x - x_{i, H}

        Each worker i follows the gradients of its H micro-batches one after the other, on a copy of
        the parameters x, with updates u of the optimiser `local`. `tx` gets the start minus the
        end.

        Args:
          loss_fn: see :meth:`value_and_grad`.
          has_aux: see :meth:`value_and_grad`.
          num_local_steps: H, the number of local steps, and of micro-batches in each worker's
            share.
          aux: see :meth:`value_and_grad`, with `num_local_steps` for `accumulate`.

        Returns:
          A function of `(params, state, batch, *replicated, key=None)` to `(loss, differences,
          state)`, or with `has_aux` to `((loss, aux), differences, state)`. The first axis of
          every leaf of `batch` must be a multiple of M times H. Differences have one row per
          worker, and the state holds the new state of `local`. If a loss, gradient or state is not
          finite, the worker keeps its state, and its differences are NaN.

        Raises:
          ValueError: there is no `local`, or `num_local_steps` is below 1; at the call, the state
            belongs to other parameters or another M; or as in :meth:`value_and_grad`.
          TypeError: `num_local_steps` is not a whole number; or as in :meth:`value_and_grad`.

        Examples:
          >>> import jax, jax.numpy as jnp, signax
          >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
          >>> vote = signax.sign_sgd(1.0, axis_name="data")
          >>> tx = signax.DataParallel(vote, mesh, local=signax.sign_sgd(0.25))
          >>> loss_fn = lambda params, batch: jnp.mean((batch - params) ** 2)
          >>> params, batch = jnp.zeros(3), jnp.ones((2 * tx.num_workers, 3))
          >>> local_steps = tx.local_steps(loss_fn, num_local_steps=2)
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
            has_aux=has_aux, pieces=num_local_steps, aux=aux,
        )  # fmt: skip

        def local_steps_fn(params: Any, state: Any, batch: Any, *replicated: Any, key: Any = None):
            check_state(state, self._layout(params), self.num_workers)
            value, differences, own = gradient(params, state.local, batch, replicated, key)
            return value, differences, state._replace(local=own)

        return local_steps_fn

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
