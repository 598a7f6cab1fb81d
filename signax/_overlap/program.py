"""A traced function as a list of operations, which may run in another order.

A jaxpr is such a list already, but functions under `jax.jit` in it are jaxprs of their own. Here
they are spelled out, so an operation of the backward pass stands beside those of the optimiser.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

Value = Any  # the number of a value, or a literal


class Operation(NamedTuple):
    """One operation of a program.

    Attributes:
      equation: the equation of a jaxpr.
      jaxpr: the jaxpr that holds the equation.
      scopes: the name scopes of the calls around it, outermost first.
      inputs: the values that it reads.
      outputs: the numbers of the values that it makes.
    """

    equation: Any
    jaxpr: Any
    scopes: tuple[str, ...]
    inputs: list[Value]
    outputs: list[int]

    @property
    def scope(self) -> str:
        """Where the operation comes from: the name scopes around it."""
        return "/".join([*self.scopes, str(self.equation.source_info.name_stack)])

    @property
    def results(self) -> list[tuple[int, Any]]:
        """The numbers of its outputs, with the variables of the equation."""
        return list(zip(self.outputs, self.equation.outvars, strict=True))

    @property
    def reads(self) -> list[int]:
        """The numbers of the values that it reads."""
        return [value for value in self.inputs if isinstance(value, int)]

    @property
    def multiplies(self) -> bool:
        """Whether it multiplies matrices, or convolves."""
        return _multiplies(self.equation)

    def run(self, *inputs: Any) -> list[Any]:
        """The outputs for some inputs."""
        equation = self.equation
        variables = [v for v in equation.invars if not isinstance(v, core.Literal)]
        alone = self.jaxpr.replace(
            constvars=[], invars=variables, outvars=[*equation.outvars], eqns=[equation],
            effects=equation.effects,
        )  # fmt: skip
        values = zip(equation.invars, inputs, strict=True)
        values = [value for v, value in values if not isinstance(v, core.Literal)]
        with contextlib.ExitStack() as stack:
            for scope in self.scopes:
                stack.enter_context(jax.named_scope(scope))
            return call_jaxpr(alone, values)


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
    numbers = iter(range(1 << 62))
    constants: dict[int, Any] = {}
    inputs = [next(numbers) for _ in closed.jaxpr.invars]
    operations: list[Operation] = []
    outputs = _spell_out(closed, inputs, (), operations, constants, numbers)
    return Program(operations, constants, inputs, outputs, jax.tree.structure(shape))


def _spell_out(
    closed: Any,
    inputs: Sequence[Value],
    scopes: tuple[str, ...],
    operations: list[Operation],
    constants: dict[int, Any],
    numbers: Iterator[int],
) -> list[Value]:
    """Append the operations of a jaxpr, and return its outputs."""
    jaxpr = closed.jaxpr
    values: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
    for variable, constant in zip(jaxpr.constvars, closed.consts, strict=True):
        values[variable] = number = next(numbers)
        constants[number] = constant

    def read(atom: Any) -> Value:
        return atom if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        read_values = [*map(read, equation.invars)]
        if _is_plain_call(equation):
            name = str(equation.source_info.name_stack)
            made = _spell_out(
                equation.params["jaxpr"], read_values, (*scopes, name) if name else scopes,
                operations, constants, numbers,
            )  # fmt: skip
        elif equation.primitive.name == "reshard" and _changes_nothing(equation):
            made = read_values
        else:
            made = [next(numbers) for _ in equation.outvars]
            operations.append(Operation(equation, jaxpr, scopes, read_values, made))
        values.update(zip(equation.outvars, made, strict=True))
    return [*map(read, jaxpr.outvars)]


def call_jaxpr(jaxpr: Any, inputs: Sequence[Any]) -> list[Any]:
    """The outputs of a jaxpr without constants."""
    closed = core.ClosedJaxpr(jaxpr, [])  # pyright: ignore[reportPrivateImportUsage]
    return core.jaxpr_as_fun(closed)(*inputs)


def _is_plain_call(equation: Any) -> bool:
    """Whether an equation only calls a jaxpr, by `jax.jit` without shardings."""
    if equation.primitive.name not in ("jit", "pjit"):
        return False
    shardings = (*equation.params["in_shardings"], *equation.params["out_shardings"])
    return not any(isinstance(sharding, jax.sharding.Sharding) for sharding in shardings)


def _changes_nothing(equation: Any) -> bool:
    """Whether a value already has the type that a reshard gives it."""
    return equation.invars[0].aval == equation.outvars[0].aval


def _multiplies(equation: Any) -> bool:
    if equation.primitive.name in ("dot_general", "conv_general_dilated"):
        return True
    inner = core.jaxprs_in_params(equation.params)
    return any(_multiplies(each) for jaxpr in inner for each in jaxpr.eqns)
