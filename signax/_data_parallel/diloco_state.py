"""The state of DiLoCo on a mesh: its start, its shapes and shardings, and other numbers of workers.

The exchange is a `DataParallel` for each fragment of the parameters. The workers' own parameters
and the states of their inner optimisers are laid out by another one.
"""

from collections.abc import Hashable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from signax._core.checks import check_count, check_mode, check_transformation
from signax._core.leaves import check_floating, spec_axes
from signax._data_parallel.data_parallel import DataParallel
from signax._data_parallel.eager import Programs
from signax._data_parallel.fragments import Fragment, deal, select
from signax._data_parallel.layout import find_layout
from signax._data_parallel.own import OwnRows, check_own_optimizer, with_own_params
from signax._data_parallel.pinned import OnWrongSharding, has_auto_axes, watch_params
from signax._data_parallel.placement import Layouts, Workers


class DiLoCoState(NamedTuple):
    """State of :class:`signax.DiLoCo`.

    Attributes:
      count: int32[], the local steps so far, the same on all workers.
      synced: int32[num_fragments], the count at the last exchange of each fragment.
      params: the common parameters, which the last exchange of each leaf left.
      own: each worker's own parameters, with one row per worker: [M, ...].
      inner: the states of the workers' inner optimisers, with one row per worker: [M, ...].
      outer: a tuple of the outer state of each fragment, as :class:`signax.DataParallel` has it. A
        fragment has `optax.MaskedNode` in the place of the other leaves.
    """

    count: Any
    synced: Any
    params: Any
    own: Any
    inner: Any
    outer: tuple[Any, ...]


class DiLoCoOnMesh:
    """The options of `DiLoCo`, and its methods that need no loss function."""

    def __init__(
        self,
        inner: optax.GradientTransformation,
        outer: optax.GradientTransformation,
        mesh: Mesh,
        axis_name: Hashable = "data",
        *,
        num_local_steps: int,
        num_fragments: int = 1,
        param_specs: Any = None,
        on_wrong_sharding: OnWrongSharding = "raise",
    ):
        for name, value in (("inner", inner), ("outer", outer)):
            check_transformation(name, value)
            if isinstance(value, DataParallel):
                raise TypeError(
                    f"{name}={value!r} is a DataParallel itself: pass the transformation of one "
                    "worker. DiLoCo runs it on the mesh"
                )
        check_count("num_local_steps", num_local_steps)
        check_count("num_fragments", num_fragments)
        check_mode("on_wrong_sharding", on_wrong_sharding, ("raise", "warn"))
        if num_fragments > num_local_steps:
            raise ValueError(
                f"num_fragments={num_fragments} exceeds num_local_steps={num_local_steps}: one "
                "fragment at most is exchanged after a local step. Use fewer fragments"
            )
        self.inner = inner
        self.outer = outer
        self.mesh = mesh
        self.axis_name = axis_name
        self.num_local_steps = num_local_steps
        self.num_fragments = num_fragments
        self.param_specs = param_specs
        self._workers = Workers.find(mesh, axis_name, param_specs)
        self.num_workers = self._workers.num_workers
        self._mode: OnWrongSharding = on_wrong_sharding
        rows = optax.with_extra_args_support(with_own_params(inner))
        self._rows = DataParallel(
            rows, mesh, axis_name,
            param_specs=param_specs, per_worker=_always, on_wrong_sharding=on_wrong_sharding,
        )  # fmt: skip
        find = partial(find_layout, rows, mesh, axis_name, _always)
        self._layout = Layouts(self._workers, find)
        self._find_fragments = cache(self._make_fragments)
        self._programs = Programs()
        self._compiled_sync = jax.jit(self._sync, static_argnums=0)

    def __repr__(self):
        workers = f"axis_name={self.axis_name!r}, num_workers={self.num_workers}"
        steps = f"num_local_steps={self.num_local_steps}, num_fragments={self.num_fragments}"
        return f"{type(self).__name__}({workers}, {steps})"

    def init(self, params: optax.Params) -> DiLoCoState:
        """Make the initial state of `params`, and place it on the mesh.

        Args:
          params: the parameters, a tree of floating-point arrays. They need not lie on the mesh.

        Returns:
          A :class:`signax.DiLoCoState` in which every worker starts from a copy of `params`.

        Raises:
          ValueError: `outer` has no exchange for a leaf, `inner` has one, there are more fragments
            than leaves, or `params` and `param_specs` differ in structure.
          TypeError: a parameter is not floating-point, or `inner` or `outer` requires an extra
            argument.

        Examples:
          See :class:`signax.DiLoCo`.
        """
        check_floating(params, "params", only_arrays=False)
        check_own_optimizer(self.inner, params)
        self._check_exchange(params)

        def make(params: Any) -> DiLoCoState:
            if has_auto_axes(self._workers):
                params = watch_params(params, self._workers, self._mode)
            # Copies, or a step that donates the state would delete the caller's parameters. With a
            # weak type, as of jnp.full(3, 0.5), the second step would be compiled again.
            params = jax.tree.map(lambda p: jnp.array(p, jnp.result_type(p)), params)
            rows: Any = self._rows.init(params)
            outer = [part.outer.init(part.select(params)) for part in self._fragments(params)]
            counts = jnp.int32(0), jnp.zeros(self.num_fragments, jnp.int32)
            return DiLoCoState(*counts, params, rows.own, rows.inner, tuple(outer))

        return jax.jit(make, out_shardings=self.state_shardings(params))(params)

    def abstract_state(self, params: optax.Params, num_workers: int | None = None) -> DiLoCoState:
        """The shapes, dtypes and shardings of the state of `params`, to restore a checkpoint into.

        Args:
          params: the parameters, a tree of arrays or of `jax.ShapeDtypeStruct`.
          num_workers: the number of workers that saved the state, by default M. Use :meth:`resize`
            after restoring a state that another number of workers saved.

        Returns:
          A :class:`signax.DiLoCoState` of `jax.ShapeDtypeStruct`.

        Raises:
          ValueError: `num_workers` is below 1; or as in :meth:`init`.
          TypeError: `num_workers` is not a whole number; or as in :meth:`init`.

        Examples:
          >>> import jax, jax.numpy as jnp, optax, signax
          >>> outer = optax.chain(signax.average_updates("data"), optax.sgd(0.7))
          >>> mesh = jax.make_mesh((1,), ("data",))
          >>> tx = signax.DiLoCo(optax.adam(0.1), outer, mesh, num_local_steps=8)
          >>> like = tx.abstract_state(jnp.zeros(3), 4)  # saved by four workers
          >>> print(like.params.shape, like.own.shape)
          (3,) (4, 3)
          >>> print(tx.state_shardings(jnp.zeros(3)).own.spec[0])
          data
        """
        whole = PartitionSpec()
        count = jax.ShapeDtypeStruct((), jnp.int32)
        synced = jax.ShapeDtypeStruct((self.num_fragments,), jnp.int32)
        specs = self._workers.specs(params)
        specs = jax.tree.map(lambda _: whole, params) if specs is None else specs
        rows = self._rows.abstract_state(params, num_workers)
        outer = [
            part.outer.abstract_state(part.select(params), num_workers)
            for part in self._fragments(params)
        ]
        return DiLoCoState(
            count=self._abstract(count, whole),
            synced=self._abstract(synced, whole),
            params=jax.tree.map(self._abstract, params, specs),
            own=jax.tree.map(self._abstract, rows.own),
            inner=jax.tree.map(self._abstract, rows.inner),
            outer=tuple(jax.tree.map(self._abstract, outer)),
        )

    def state_shardings(self, params: optax.Params) -> DiLoCoState:
        """The shardings of the state of `params`, for `out_shardings` and for checkpoints.

        Args:
          params: the parameters, a tree of arrays or of `jax.ShapeDtypeStruct`.

        Returns:
          A :class:`signax.DiLoCoState` of `jax.sharding.NamedSharding`.

        Raises:
          ValueError: as in :meth:`init`.
          TypeError: as in :meth:`init`.

        Examples:
          See :meth:`abstract_state`.
        """
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state(params))

    def resize(self, state: DiLoCoState, num_workers: int | None = None) -> DiLoCoState:
        """Make a state for another number of workers, outside of `jax.jit`.

        The workers' own parameters and the states of their optimisers are dealt out as in
        :meth:`signax.DataParallel.resize`: with half as many workers, each one starts as the mean
        of two. The mean of the differences stays the same, so a round may be resized in the middle.

        Args:
          state: a state with rows for any number of workers.
          num_workers: the wanted number of workers, by default M.

        Returns:
          The state, on this mesh.

        Raises:
          ValueError: `num_workers` is below 1, or the parts of the state do not belong together.
          TypeError: `num_workers` is not a whole number.

        Examples:
          >>> import jax, jax.numpy as jnp, optax, signax
          >>> outer = optax.chain(signax.average_updates("data"), optax.sgd(0.7))
          >>> mesh = jax.make_mesh((1,), ("data",))
          >>> tx = signax.DiLoCo(optax.adam(0.1), outer, mesh, num_local_steps=8)
          >>> print(tx.resize(tx.init(jnp.zeros(3)), 4).own.shape)  # for a mesh of four
          (4, 3)
        """
        self._check_fragments(state)
        rows = self._rows.resize(OwnRows(state.own, state.inner), state.params, num_workers)
        outer = [
            part.outer.resize(outer, part.select(state.params), num_workers)
            for part, outer in zip(self._fragments(state.params), state.outer, strict=True)
        ]
        resized = state._replace(own=rows.own, inner=rows.inner, outer=tuple(outer))
        like = self.abstract_state(state.params, num_workers)
        return jax.device_put(resized, jax.tree.map(lambda leaf: leaf.sharding, like))

    def _abstract(self, leaf: Any, spec: Any = None) -> Any:
        """A leaf's shape and dtype, and its sharding as a compiled step writes it.

        A step names each dimension of its results on a mesh with Explicit axes. On Auto axes it
        names none beyond the last that is cut. With another spelling in the first state, the second
        step would be compiled again.
        """
        shape, spec = jnp.shape(leaf), leaf.sharding.spec if spec is None else spec
        entries = [*spec, *[None] * (len(shape) - len(spec))]
        explicit = self._workers.explicit
        has_auto = not explicit or not explicit.issuperset(spec_axes(spec))
        while has_auto and entries and entries[-1] is None:
            entries.pop()
        sharding = NamedSharding(self.mesh, PartitionSpec(*entries))
        return jax.ShapeDtypeStruct(shape, jnp.result_type(leaf), sharding=sharding)

    def _check_fragments(self, state: DiLoCoState) -> None:
        """Raise if a state belongs to another number of fragments."""
        if len(state.outer) != self.num_fragments:
            raise ValueError(
                f"state.outer is for {len(state.outer)} fragments, but num_fragments="
                f"{self.num_fragments}: pass num_fragments={len(state.outer)} to DiLoCo, or begin "
                "again with init(state.params)"
            )

    def _fragments(self, params: Any) -> list[Fragment]:
        """The fragments of parameters. They are found once for parameters of the same shapes."""
        leaves, structure = jax.tree.flatten(params)
        return self._find_fragments(structure, tuple([jnp.shape(leaf) for leaf in leaves]))

    def _make_fragments(
        self, structure: Any, shapes: tuple[tuple[int, ...], ...]
    ) -> list[Fragment]:
        params = structure.unflatten([jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes])
        make = partial(
            DataParallel, self.outer, self.mesh, self.axis_name, on_wrong_sharding=self._mode
        )
        found = deal(params, self.num_fragments)
        if self.param_specs is None or self.num_fragments == 1:
            outer = make(param_specs=self.param_specs)
            return [Fragment(positions, outer) for positions in found]
        specs = self._workers.specs(params)
        return [
            Fragment(positions, make(param_specs=select(positions, specs))) for positions in found
        ]

    def _check_exchange(self, params: Any) -> None:
        """Raise if the update of `outer` would differ between workers."""
        state, numbers = self.abstract_state(params), tuple(range(self.num_fragments))
        try:
            jax.eval_shape(partial(self._sync, numbers, active=None), state)
        except ValueError as error:
            if "neither voted nor averaged" not in str(error):
                raise
            raise ValueError(
                f"outer neither votes nor averages over {self.axis_name!r}, at least for one leaf. "
                f"Put a vote or a mean first: optax.chain(signax.average_updates("
                f"{self.axis_name!r}), optax.sgd(0.7, momentum=0.9, nesterov=True))"
            ) from error

    def _sync(self, numbers: tuple[int, ...], state: DiLoCoState, active: Any) -> DiLoCoState:
        """Exchange the fragments with these numbers."""
        raise NotImplementedError


def _always(path: str, leaf: jax.ShapeDtypeStruct) -> bool:
    del path, leaf
    return True
