"""DiLoCo: local steps across calls, and an exchange of the workers' progress from time to time."""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from signax._core.leaves import is_traced_call
from signax._data_parallel.diloco_state import DiLoCoOnMesh, DiLoCoState
from signax._data_parallel.fragments import schedule
from signax._data_parallel.mapped import map_gradient
from signax._data_parallel.own import OwnRows, differences, rows_of, step_on_own
from signax._data_parallel.pinned import report_rows, watch_update
from signax._data_parallel.placement import check_state, state_leaves


class DiLoCo(DiLoCoOnMesh):
    r"""Let each worker train its own parameters, and exchange the progress every H steps.

    .. math:: x_i \leftarrow x_i + u_i \; \text{(inner, on the gradient of worker } i), \qquad
      \text{every } H \text{ steps: } \Delta_i = x - x_i, \quad x \leftarrow x + U(\Delta_1, \dots,
      \Delta_M), \quad x_i \leftarrow x

    Each worker i takes H steps of the optimiser `inner` on its own copy :math:`x_i` of the
    parameters, one micro-batch per call. Nothing is exchanged in these steps except the loss. Then
    `outer` combines the differences between the common parameters x and the copies by a vote or a
    mean, and updates x. Every worker goes on from there, and keeps the state of its inner
    optimiser.

    With several fragments, the leaves are cut into groups of about equal size. The fragments are
    exchanged in turn, every H steps each, so each exchange is small (Streaming DiLoCo). Fragment f
    of F is due after :math:`\lfloor (f + 1) H / F \rfloor` local steps of a round.

    A local step whose loss, gradient or new state is not finite leaves the worker's parameters and
    floating-point state as they were. An exchange excludes a worker that is not active, whose own
    parameters are not finite, or whose parameters have not moved since the last exchange. It
    restarts from the common parameters like all others.

    Args:
      inner: the optimiser of one worker, without votes or means, such as `optax.adamw`. All workers
        begin with the same state, so a random key in it draws the same numbers on every worker.
      outer: a vote or a mean over `axis_name`, and an optimiser of the result. It gets the
        differences in the place of gradients. Give means of compressed values `decay=0.0`: error
        feedback would come a round late, and a momentum would amplify it.
      mesh: a `jax.sharding.Mesh` that has the axis; its axes may be of type Auto or Explicit.
      axis_name: the mesh axis along which the workers lie, or a tuple of axes.
      num_local_steps: H, the number of local steps between two exchanges of a leaf.
      num_fragments: F, the number of groups of leaves that are exchanged in turn.
      param_specs: see :class:`signax.DataParallel`.
      on_wrong_sharding: see :class:`signax.DataParallel`.

    Attributes:
      num_workers: int, M, the size of the axis, or the product of the sizes of several axes.

    Raises:
      ValueError: `num_local_steps` or `num_fragments` is below 1, or there are more fragments than
        local steps; or as in :class:`signax.DataParallel`.
      TypeError: `inner` or `outer` is not a transformation of one worker, or a number is not whole;
        or as in :class:`signax.DataParallel`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, signax
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> outer = optax.chain(signax.average_updates("data"), optax.sgd(1.0))
      >>> tx = signax.DiLoCo(optax.sgd(0.25), outer, mesh, num_local_steps=2)
      >>> loss_fn = lambda params, batch: jnp.mean((batch - params) ** 2)
      >>> state = tx.init(jnp.zeros(()))
      >>> step = tx.train_step(loss_fn)
      >>> for _ in range(2):
      ...     state, loss = step(state, jnp.ones(tx.num_workers))
      ...     print(loss, state.params)
      1.0 0.0
      0.25 0.75

    References:
      Douillard et al., `DiLoCo: Distributed Low-Communication Training of Language Models
      <https://arxiv.org/abs/2311.08105>`_, 2023; Douillard et al., `Streaming DiLoCo with
      overlapping communication <https://arxiv.org/abs/2501.18512>`_, 2025
    """

    def local_step(
        self,
        loss_fn: Callable[..., Any],
        *,
        has_aux: bool = False,
        accumulate: int = 1,
        aux: Any = "rows",
    ) -> Callable[..., Any]:
        """A step of every worker on its own parameters and its own share of the batch.

        Args:
          loss_fn: see :meth:`signax.DataParallel.value_and_grad`.
          has_aux: see :meth:`signax.DataParallel.value_and_grad`.
          accumulate: the number of micro-batches in each worker's share. Their gradients are
            averaged for a single local step.
          aux: see :meth:`signax.DataParallel.value_and_grad`.

        Returns:
          A function of `(state, batch, *replicated, key=None)` to `(loss, state)`, or with
          `has_aux` to `((loss, aux), state)`. The loss is the mean of the workers' finite losses,
          each with the worker's parameters before the step.

        Raises:
          ValueError: as in :meth:`signax.DataParallel.value_and_grad`; at the call, the state
            belongs to another number of workers or fragments.
          TypeError: as in :meth:`signax.DataParallel.value_and_grad`.

        Examples:
          See :meth:`sync`.
        """
        workers = self._workers
        gradient = map_gradient(
            loss_fn, workers, self._programs, has_aux=has_aux, pieces=accumulate, aux=aux,
            of_share=partial(step_on_own, inner=self.inner),
        )  # fmt: skip
        report = partial(report_rows, workers, self._mode)

        def step_rows(updates: None, rows: Any, params: Any, *arguments: Any) -> Any:
            del updates
            layout = self._layout(params)
            leaves = workers.reshard_state(state_leaves(rows, layout), layout, report)
            old = layout.structure.unflatten(leaves)
            value, *new = gradient(None, tuple(old), *arguments)
            specs = [leaf.sharding.spec for leaf in layout.leaves]
            leaves = workers.constrain(jax.tree.leaves(new), specs)
            return value, jax.tree.structure(rows).unflatten(leaves)

        step_rows = watch_update(step_rows, workers, self._layout, self._mode)

        def local_step_fn(state: DiLoCoState, batch: Any, *replicated: Any, key: Any = None):
            rows = self._checked_rows(state)
            value, rows = step_rows(None, rows, state.params, batch, replicated, key)
            count = optax.safe_increment(jnp.asarray(state.count))
            return value, state._replace(count=count, own=rows.own, inner=rows.inner)

        return local_step_fn

    def sync(
        self, state: DiLoCoState, active: Any = None, *, fragment: int | None = None
    ) -> DiLoCoState:
        """Exchange the workers' progress, and let all workers go on from the common parameters.

        :meth:`train_step` does this when it is due. Call it yourself in a loop of your own, and at
        the end of a run with several fragments, to bring all leaves up to date. A fragment without
        local steps since its last exchange stays as it is.

        Args:
          state: the state that :meth:`local_step` returned.
          active: bool[M], says which workers may take part.
          fragment: the number of a fragment to exchange; by default all fragments.

        Returns:
          The new state.

        Raises:
          ValueError: outside `jax.jit`, there was no local step since the last exchange; or there
            is no such fragment, or the state belongs to another number of workers or fragments.
          TypeError: `active` is not an array of M booleans, or `fragment` is not a whole number.

        Examples:
          >>> import jax, jax.numpy as jnp, optax, signax
          >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
          >>> outer = optax.chain(signax.average_updates("data"), optax.sgd(1.0))
          >>> tx = signax.DiLoCo(optax.sgd(0.25), outer, mesh, num_local_steps=2)
          >>> local_step = tx.local_step(lambda params, batch: jnp.mean((batch - params) ** 2))
          >>> loss, state = local_step(tx.init(jnp.zeros(())), jnp.ones(tx.num_workers))
          >>> print(state.params, tx.sync(state).params)
          0.0 0.5
        """
        self._workers.check_active(active)
        numbers = tuple(range(self.num_fragments))
        if fragment is not None:
            numbers = (self._checked_number(fragment),)
        self._checked_rows(state)
        if is_traced_call((state, active)):
            return self._sync(numbers, state, active)
        if np.all(np.asarray(state.synced)[[*numbers]] == np.asarray(state.count)):
            raise ValueError(
                f"there was no local step since the last exchange, at count={int(state.count)}: "
                "call local_step first. train_step calls sync itself when it is due"
            )
        return self._compiled_sync(numbers, state, active)

    def train_step(
        self,
        loss_fn: Callable[..., Any],
        *,
        has_aux: bool = False,
        accumulate: int = 1,
        aux: Any = "rows",
    ) -> jax.stages.Wrapped:
        """A compiled local step, with the exchange that is due, which donates the state's memory.

        Args:
          loss_fn: see :meth:`local_step`.
          has_aux: see :meth:`local_step`.
          accumulate: see :meth:`local_step`.
          aux: see :meth:`local_step`.

        Returns:
          A jitted function of `(state, batch, *replicated, key=None, active=None)` to `(state,
          loss)`, or with `has_aux` to `(state, (loss, aux))`. `active`, bool[M], says which workers
          may take part in the exchange, if one is due. One program serves all steps.

        Raises:
          ValueError: as in :meth:`local_step`.
          TypeError: as in :meth:`local_step`; at the call, as in :meth:`sync`.

        Examples:
          See :class:`signax.DiLoCo`.
        """
        local_step = self.local_step(loss_fn, has_aux=has_aux, accumulate=accumulate, aux=aux)
        due = np.array(schedule(self.num_local_steps, self.num_fragments), np.int32)

        def step(state: DiLoCoState, batch: Any, *more: Any, key: Any = None, active: Any = None):
            self._workers.check_active(active)
            value, state = local_step(state, batch, *more, key=key)
            number = jnp.asarray(due)[state.count % self.num_local_steps]
            branches: list[Any] = [partial(self._exchange, n) for n in range(self.num_fragments)]
            if self.num_fragments < self.num_local_steps:
                branches.append(_stay)
            return self._select(number, branches, state, active), value

        return jax.jit(step, donate_argnums=0)

    def _checked_rows(self, state: DiLoCoState) -> OwnRows:
        """The workers' rows. Raises if a state belongs to other workers or fragments."""
        self._check_fragments(state)
        rows = OwnRows(state.own, state.inner)
        check_state(rows, self._layout(state.params), self.num_workers)
        return rows

    def _checked_number(self, fragment: Any) -> int:
        """The number of a fragment. Raises if there is no such fragment."""
        try:
            number = operator.index(fragment)
        except TypeError:
            number = None
        if number is None or isinstance(fragment, bool):
            raise TypeError(f"fragment={fragment!r} must be a whole number")
        if number not in range(self.num_fragments):
            raise ValueError(
                f"fragment={fragment!r} is not one of the {self.num_fragments} fragments: count "
                "them from 0, or leave the argument out to exchange all"
            )
        return number

    def _sync(self, numbers: tuple[int, ...], state: DiLoCoState, active: Any) -> DiLoCoState:
        """Exchange fragments that have moved since the last time."""
        for number in numbers:
            # A vote decides all coordinates, also where no worker has moved.
            moved = (state.count > state.synced[number]).astype(jnp.int32)
            state = self._select(moved, [_stay, partial(self._exchange, number)], state, active)
        return state

    def _select(
        self, number: jax.Array, branches: list[Any], state: DiLoCoState, active: Any
    ) -> DiLoCoState:
        """The state after one of several functions of what an exchange changes."""
        workers = self._workers
        params = workers.reshard_params(state.params)
        own = workers.reshard(state.own, per_worker=True)
        changing = params, own, state.outer, state.synced
        params, own, outer, synced = lax.switch(number, branches, state.count, active, changing)
        params = workers.constrain(params, workers.specs(params))
        layout = self._layout(params)
        specs = [leaf.sharding.spec for leaf in layout.leaves]
        own_leaves = jax.tree.leaves(own)
        own_leaves = workers.constrain(own_leaves, specs[: len(own_leaves)])
        own = jax.tree.structure(own).unflatten(own_leaves)
        return state._replace(params=params, own=own, outer=outer, synced=synced)

    def _exchange(self, number: int, count: Any, active: Any, changing: Any) -> Any:
        """Exchange one fragment, from the parts of a state that this changes."""
        params, own, outer, synced = changing
        fragment = self._fragments(params)[number]
        common = fragment.select(params)
        rows, takes_part = differences(
            self._workers, jax.tree.leaves(params), jax.tree.leaves(own), fragment.positions, active
        )
        rows = jax.tree.structure(common).unflatten(rows)
        updates, new_outer = fragment.outer.update(rows, outer[number], common, active=takes_part)
        common = optax.apply_updates(common, updates)
        return (
            fragment.replace(params, common),
            fragment.replace(own, rows_of(self._workers, jax.tree.leaves(common))),
            (*outer[:number], new_outer, *outer[number + 1 :]),
            jnp.where(np.arange(self.num_fragments) == number, count, synced),
        )


def _stay(count: Any, active: Any, changing: Any) -> Any:
    del count, active
    return changing
