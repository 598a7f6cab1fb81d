"""A traced function as a list of operations, which may run in another order.

A jaxpr is such a list already, but functions under `jax.jit` in it are jaxprs of their own. Here
they are spelled out, so the operations of the backward pass stand side by side. The backward pass
of a function under `jax.checkpoint` stays one operation.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend import core, source_info_util

Value = Any  # the number of a value, or a literal


class Operation(NamedTuple):
    """One operation of a program.

    Attributes:
      name: the name of its primitive.
      params: the parameters of its primitive.
      scope: where it comes from: the name scopes around it.
      inputs: the values that it reads.
      outputs: the numbers of the values that it makes.
      sizes: the number of elements of each of these.
      run: a function from values read to a list of the values made.
    """

    name: str
    params: dict[str, Any]
    scope: str
    inputs: list[Value]
    outputs: list[int]
    sizes: list[int]
    run: Callable[..., list[Any]]

    @property
    def reads(self) -> list[int]:
        """The numbers of the values that it reads."""
        return [value for value in self.inputs if isinstance(value, int)]

    @property
    def multiplies(self) -> bool:
        """Whether it multiplies matrices, or convolves."""
        return _multiplies(self.name, self.params)


class Program(NamedTuple):
    """A traced function.

    Attributes:
      operations: its operations, in an order in which they can run.
      constants: the values of its constants, by their numbers.
      inputs: the numbers of its flat arguments.
      outputs: its flat results.
      structure: the structure of its result.
    """

    operations: list[Operation]
    constants: dict[int, Any]
    inputs: list[int]
    outputs: list[Value]
    structure: Any

    def places(self) -> dict[int, int]:
        """The place of the operation that decides when each value is ready.

        An operation with one input has the place of its input. If parameters are cast before their
        use, casts of all gradients are the last operations, but need not wait for one another.
        """
        found: dict[int, int] = {}
        for n, operation in enumerate(self.operations):
            read = {*operation.reads}
            place = (
                n if len(read) > 1 else max([found.get(value, -1) for value in read], default=-1)
            )
            found.update(dict.fromkeys(operation.outputs, place))
        return found

    def evaluate(self, arguments: Sequence[Any]) -> "Evaluation":
        return Evaluation({**self.constants, **dict(zip(self.inputs, arguments, strict=True))})


class Evaluation:
    """The values of a program's run so far."""

    def __init__(self, values: dict[int, Any]):
        self.values = values

    def read(self, value: Value) -> Any:
        return value.val if isinstance(value, core.Literal) else self.values[value]

    def run(self, operation: Operation) -> None:
        outputs = operation.run(*map(self.read, operation.inputs))
        self.values.update(zip(operation.outputs, outputs, strict=True))


def trace(function: Callable[..., Any], *args: Any) -> Program:
    """Trace a function of arrays, or of their shapes."""
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    writer = _Writer([], {}, itertools.count())
    inputs = [next(writer.numbers) for _ in closed.jaxpr.invars]
    outputs = writer.write(closed.jaxpr, closed.consts, inputs, ())
    return Program(writer.operations, writer.constants, inputs, outputs, jax.tree.structure(shape))


class _Writer(NamedTuple):
    """Writes the operations of jaxprs one after the other."""

    operations: list[Operation]
    constants: dict[int, Any]
    numbers: Iterator[int]

    def write(
        self, jaxpr: Any, constants: Sequence[Any], inputs: Sequence[Value], scopes: tuple[str, ...]
    ) -> list[Value]:
        """Write a jaxpr that is called in some name scopes, and return its outputs."""
        values: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        for variable, constant in zip(jaxpr.constvars, constants, strict=True):
            values[variable] = number = next(self.numbers)
            self.constants[number] = constant

        def read(atom: Any) -> Value:
            return atom if isinstance(atom, core.Literal) else values[atom]

        for equation in jaxpr.eqns:
            found = [*map(read, equation.invars)]
            values.update(
                zip(
                    equation.outvars,
                    self._write_equation(equation, jaxpr, found, scopes),
                    strict=True,
                )
            )
        return [*map(read, jaxpr.outvars)]

    def _write_equation(
        self, equation: Any, jaxpr: Any, inputs: list[Value], scopes: tuple[str, ...]
    ) -> list[Value]:
        """Write an equation of a jaxpr, and return its outputs."""
        name, params = equation.primitive.name, equation.params
        scope = str(equation.source_info.name_stack)
        inside = (*scopes, scope) if scope else scopes
        if name in ("jit", "pjit") and not _has_shardings(params):
            return self.write(params["jaxpr"].jaxpr, params["jaxpr"].consts, inputs, inside)
        if name == "reshard" and equation.invars[0].aval == equation.outvars[0].aval:
            return inputs  # it changes nothing
        outputs = [next(self.numbers) for _ in equation.outvars]
        sizes = [getattr(variable.aval, "size", 1) for variable in equation.outvars]
        run = functools.partial(run_equation, equation, jaxpr, scopes)
        self.operations.append(
            Operation(name, params, "/".join(inside), inputs, outputs, sizes, run)
        )
        return [*outputs]


def call_jaxpr(jaxpr: Any, inputs: Sequence[Any]) -> list[Any]:
    """The outputs of a jaxpr without constants."""
    closed = core.ClosedJaxpr(jaxpr, [])  # pyright: ignore[reportPrivateImportUsage]
    return core.jaxpr_as_fun(closed)(*inputs)


def run_equation(equation: Any, jaxpr: Any, scopes: tuple[str, ...], *inputs: Any) -> list[Any]:
    """The outputs of one equation of a jaxpr."""
    variables = [v for v in equation.invars if not isinstance(v, core.Literal)]
    alone = jaxpr.replace(
        constvars=[], invars=variables, outvars=[*equation.outvars], eqns=[equation],
        effects=equation.effects,
    )  # fmt: skip
    values = zip(equation.invars, inputs, strict=True)
    with contextlib.ExitStack() as stack:
        for scope in scopes:
            stack.enter_context(jax.named_scope(scope))
        if equation.primitive.name == "psum_invariant":
            # A sum that JAX made where types are checked rejects values of a map without types.
            stack.enter_context(scopes_of(equation))
            return lax.psum([*inputs], equation.params["axes"])
        return call_jaxpr(alone, [x for v, x in values if not isinstance(v, core.Literal)])


def scopes_of(equation: Any) -> contextlib.AbstractContextManager[Any]:
    """The name scopes of an equation, within the current ones."""
    scopes = source_info_util.current_name_stack() + equation.source_info.name_stack
    return source_info_util.set_name_stack(scopes)


def _has_shardings(params: dict[str, Any]) -> bool:
    """Whether a call of `jax.jit` demands shardings."""
    shardings = (*params["in_shardings"], *params["out_shardings"])
    return any(isinstance(sharding, jax.sharding.Sharding) for sharding in shardings)


def _multiplies(name: str, params: dict[str, Any]) -> bool:
    if name in ("dot_general", "conv_general_dilated"):
        return True
    inner = core.jaxprs_in_params(params)
    return any(_multiplies(e.primitive.name, e.params) for jaxpr in inner for e in jaxpr.eqns)
