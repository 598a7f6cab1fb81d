"""Arrays that a function captures, turned into arguments.

`jax.shard_map` rejects a function that captures an array whose type has Explicit axes, and advises
the author of the `shard_map`. Here the captured arrays become arguments: the function is traced
outside, where its own types hold, and its program runs again inside, with the types inside.
"""

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
from jax.extend import core, source_info_util
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from signax._core.leaves import entry_axes
from signax._core.maps import map_again

# Calls that are evaluated in place. Gradients are part of the program, so nothing needs the rules
# of a custom derivative any more.
CALLS = {
    "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr",
    "jit", "pjit",
}  # fmt: skip

_ClosedJaxpr = getattr(core, "ClosedJaxpr", core.Jaxpr)  # one class in newer versions of JAX


class Hoisted(NamedTuple):
    """A function whose captured arrays are an argument.

    Attributes:
      captured: the arrays that the function captures, or tracers of them.
      call: the function of these arrays and of its own arguments.
    """

    captured: list[Any]
    call: Callable[..., Any]


def hoist(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    mesh: Mesh,
    axes: Sequence[Hashable],
) -> Hoisted:
    """Trace a function of one worker for shapes of its arguments, and hoist what it captures."""
    sizes = [(axis, mesh.shape[axis]) for axis in axes]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program, result = jax.make_jaxpr(function, axis_env=sizes, return_shape=True)(*arguments)
    captured = {id(array): array for array in _captured_arrays(program)}
    structure = jax.tree.structure(result)

    def call(arrays: Sequence[Any], *arguments: Any) -> Any:
        program_inside = _Program(dict(zip(captured, arrays, strict=True)), frozenset(axes))
        outputs = program_inside.run(program, jax.tree.leaves(arguments))
        return structure.unflatten(outputs)

    return Hoisted(list(captured.values()), call)


def local_shape(
    typed: Any, mesh: Mesh | AbstractMesh, axes: Collection[Hashable], pieces: int = 1
) -> jax.ShapeDtypeStruct:
    """The shape of one of several pieces of an array of a type, without the given mesh axes."""
    shape = (typed.shape[0] // pieces, *typed.shape[1:]) if pieces > 1 else typed.shape
    sharding = None
    if not typed.sharding.mesh.empty:
        sharding = NamedSharding(mesh, _without_axes(typed.sharding.spec, frozenset(axes)))
    return jax.ShapeDtypeStruct(
        shape, typed.dtype, sharding=sharding, weak_type=getattr(typed, "weak_type", False)
    )


def _captured_arrays(program: Any) -> Iterator[Any]:
    """The arrays that a program or a program within it captures; NumPy arrays have no mesh."""
    yield from [const for const in _consts(program) if isinstance(const, jax.Array)]
    for eqn in _open(program).eqns:
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                if isinstance(inner, (_ClosedJaxpr, core.Jaxpr)):
                    yield from _captured_arrays(inner)


def _open(program: Any) -> Any:
    """The equations of a program, without the arrays that it captures."""
    return getattr(program, "jaxpr", program)


def _consts(program: Any) -> Sequence[Any]:
    return getattr(program, "consts", ())


def _without_axes(spec: PartitionSpec, axes: frozenset[Hashable]) -> PartitionSpec:
    entries = [tuple([axis for axis in entry_axes(entry) if axis not in axes]) for entry in spec]
    return PartitionSpec(*[entry or None for entry in entries])


class _Program(NamedTuple):
    """A program that was traced outside of a `shard_map`, to run inside.

    Attributes:
      arrays: the captured arrays as arguments, by the `id` of the originals.
      axes: the mesh axes that are mapped inside.
    """

    arrays: dict[int, Any]
    axes: frozenset[Hashable]

    def run(self, program: Any, arguments: Sequence[Any]) -> list[Any]:
        """Evaluate a program equation by equation, with the types inside the map."""
        consts = [self.arrays.get(id(const), const) for const in _consts(program)]
        program = _open(program)
        values = dict(
            zip([*program.constvars, *program.invars], [*consts, *arguments], strict=True)
        )

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, core.Literal) else values[atom]

        mesh, stack = jax.sharding.get_abstract_mesh(), source_info_util.current_name_stack()
        for eqn in program.eqns:
            with (
                eqn.ctx.manager,
                jax.sharding.use_abstract_mesh(mesh),
                source_info_util.set_name_stack(stack + eqn.source_info.name_stack),
            ):
                results = self._evaluate(eqn, [read(atom) for atom in eqn.invars])
            values.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in program.outvars]

    def _evaluate(self, eqn: Any, inputs: list[Any]) -> Sequence[Any]:
        if eqn.primitive.name in CALLS:
            (called,) = [eqn.params[name] for name in ("jaxpr", "call_jaxpr") if name in eqn.params]
            return self.run(called, inputs)
        if eqn.primitive.name == "shard_map":
            return self._map(eqn.params, inputs)
        params = {name: self._convert(value) for name, value in eqn.params.items()}
        results = eqn.primitive.bind(*inputs, **params)
        return results if eqn.primitive.multiple_results else [results]

    def _map(self, params: dict[str, Any], inputs: list[Any]) -> Sequence[Any]:
        """Run a map over axes within a worker, on the mesh inside the map over workers."""

        def run(*arguments: Any) -> list[Any]:
            return self.run(params["jaxpr"], arguments)

        return map_again(run, params, check_vma=params["check_vma"])(*inputs)

    def _convert(self, value: Any) -> Any:
        """A parameter of an equation, with programs, shardings and meshes as they are inside."""
        if isinstance(value, (_ClosedJaxpr, core.Jaxpr)):
            return self._retrace(value)
        if isinstance(value, NamedSharding):
            spec = _without_axes(value.spec, self.axes)
            mesh = self._mesh(value.mesh.abstract_mesh)
            return NamedSharding(mesh, spec, memory_kind=value.memory_kind)
        if isinstance(value, AbstractMesh):
            return self._mesh(value)
        if type(value) in (tuple, list):
            return type(value)([self._convert(item) for item in value])
        if isinstance(value, tuple) and hasattr(value, "_fields"):  # of a linear solve, for example
            return type(value)(*map(self._convert, value))
        return value

    def _mesh(self, mesh: AbstractMesh) -> AbstractMesh:
        manual = {axis: AxisType.Manual for axis in self.axes if axis in mesh.axis_names}
        return mesh.update_axis_types(manual)

    def _retrace(self, program: Any) -> Any:
        """A program that is a parameter, such as the body of a loop, with the types inside."""
        avals = [variable.aval for variable in _open(program).invars]
        if not all(isinstance(aval, jax.core.ShapedArray) for aval in avals):
            return program  # a kernel on references, which have no mesh
        mesh = jax.sharding.get_abstract_mesh()
        shapes = [local_shape(aval, mesh, self.axes) for aval in avals]
        retraced = jax.make_jaxpr(lambda *arguments: self.run(program, arguments))(*shapes)
        return retraced if isinstance(program, _ClosedJaxpr) else retraced.jaxpr


def is_of_captured(error: Exception) -> bool:
    """Whether an error of JAX is about an array with types from outside the `shard_map`."""
    words = "Closing over inputs", "ontext mesh", "Mesh for all inputs"
    return any(part in str(error) for part in words)


def captured_error(arrays: str) -> ValueError:
    """The error for captured arrays that cannot become arguments."""
    return ValueError(
        f"loss_fn uses arrays that lie on the mesh but are not its arguments{arrays and ': '}"
        f"{arrays}. Let it take them as arguments, pass them after the batch, and pass a random "
        "key as key="
    )


def check_constraint(error: Exception, axis_name: Hashable) -> None:
    """Raise an error with a remedy if JAX rejects a sharding constraint over a mapped axis."""
    words = (
        "can only refer to Auto axes",
        "cannot contain axis names that are of type Auto or Manual",
        "contains a manual axes",
        "should match the mesh passed to shard_map",
    )
    if any(part in str(error) for part in words):
        raise ValueError(
            f"loss_fn constrains a sharding over a mapped axis, and {axis_name!r}, the workers' "
            "axis, is mapped here. Leave it out, for Flax's logical axis rules by "
            f"signax.inner_rules(rules, {axis_name!r}), or give the workers a mesh axis that the "
            "model does not name"
        ) from error
