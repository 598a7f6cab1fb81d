"""One map over the workers for a step that has two: of gradients, and of the update.

`DataParallel` maps a function of one worker for the gradient, and another for the update. Between
two maps a program holds all gradients. In one map an exchange may begin before the last of them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from signax._core.maps import map_again, mapped_axes
from signax._overlap.program import Evaluation, Operation, Program, run_equation, scopes_of


class Joined(NamedTuple):
    """A map of gradients and the map of the update that reads them, as one.

    Attributes:
      gradient: the first map.
      update: the second map.
      passed: the input of the second map that each output of the first map becomes, if any.
    """

    gradient: int
    update: int
    passed: dict[int, int]


def find_joined(program: Program, is_update: Callable[[Operation], bool]) -> Joined | None:
    """The maps that can be one, if there are any."""
    operations = program.operations
    maker = {value: n for n, operation in enumerate(operations) for value in operation.outputs}
    for n, update in enumerate(operations):
        if not (_is_map(update) and is_update(update)):
            continue
        makers = {maker[value] for value in update.reads if value in maker}
        for m in sorted(makers):
            gradient = operations[m]
            if _is_map(gradient) and _are_alike(gradient, update):
                passed = _passed(gradient, update)
                if passed and not _waits(operations, maker, m, n, passed):
                    return Joined(m, n, passed)
    return None


def run_joined(
    program: Program,
    joined: Joined,
    values: Evaluation,
    overlap: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> None:
    """Run a program with the two maps as one, whose function `overlap` wraps."""
    operations = program.operations
    gradient, update = operations[joined.gradient], operations[joined.update]
    first, second = (operation.params for operation in (gradient, update))
    own = [n for n in range(len(update.inputs)) if n not in joined.passed.values()]

    def of_worker(inputs: Sequence[Any], others: Sequence[Any]):
        made = _call(gradient, inputs)
        filled = dict(zip(own, others, strict=True))
        filled |= {n: made[output] for output, n in joined.passed.items()}
        return made, _call(update, [filled[n] for n in range(len(update.inputs))])

    mapped = jax.shard_map(
        overlap(of_worker),
        mesh=first["mesh"],
        in_specs=([*first["in_specs"]], [second["in_specs"][n] for n in own]),
        out_specs=([*first["out_specs"]], [*second["out_specs"]]),
        axis_names={*mapped_axes(first)},
        check_vma=False,  # the types of both maps were checked when each of them was traced
    )
    waiting = _descendants(operations, {joined.gradient, joined.update})
    for n, operation in enumerate(operations):
        if n not in waiting:
            values.run(operation)
    inputs = [*map(values.read, gradient.inputs)]
    made, updated = mapped(inputs, [values.read(update.inputs[n]) for n in own])
    values.values.update(zip(gradient.outputs, made, strict=True))
    values.values.update(zip(update.outputs, updated, strict=True))
    for n in sorted(waiting - {joined.gradient, joined.update}):
        values.run(operations[n])


def _is_map(operation: Operation) -> bool:
    return operation.name == "shard_map"


def _are_alike(one: Operation, other: Operation) -> bool:
    """Whether two maps are over the same axes of the same mesh."""
    same_mesh = one.params["mesh"] == other.params["mesh"]
    return same_mesh and mapped_axes(one.params) == mapped_axes(other.params)


def _passed(gradient: Operation, update: Operation) -> dict[int, int]:
    """Which output of one map is which input of the other, in the same layout."""
    specs, wanted = gradient.params["out_specs"], update.params["in_specs"]
    outputs = {value: n for n, value in enumerate(gradient.outputs)}
    return {
        outputs[value]: n
        for n, value in enumerate(update.inputs)
        if isinstance(value, int) and value in outputs and specs[outputs[value]] == wanted[n]
    }


def _waits(
    operations: list[Operation],
    maker: dict[int, int],
    gradient: int,
    update: int,
    passed: dict[int, int],
) -> bool:
    """Whether the update waits for the gradient's map in another way too."""
    inputs = operations[update].inputs
    others = [value for n, value in enumerate(inputs) if n not in passed.values()]
    after = _descendants(operations[:update], {gradient})
    return any(isinstance(value, int) and maker.get(value) in after for value in others)


def _descendants(operations: list[Operation], roots: set[int]) -> set[int]:
    """Some operations, and those that wait for them."""
    found = {*roots}
    made = {value for n in roots for value in operations[n].outputs}
    for n, operation in enumerate(operations):
        if n in found or made.intersection(operation.reads):
            found.add(n)
            made.update(operation.outputs)
    return found


def _call(operation: Operation, inputs: Sequence[Any]) -> list[Any]:
    """The outputs of a map's function for one worker's inputs."""
    return _evaluate(operation.params["jaxpr"], [], inputs)


def _evaluate(jaxpr: Any, constants: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """The outputs of a jaxpr where no types are checked."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *inputs], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        found = [*map(read, equation.invars)]
        if equation.primitive.name == "pvary":
            outputs = found  # only its result has a type here, and a scan mixes no types
        elif equation.primitive.name == "scan":
            closed = equation.params["jaxpr"]
            body = functools.partial(_evaluate, closed.jaxpr, closed.consts)
            shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in closed.in_avals]
            untyped = jax.make_jaxpr(lambda *xs, body=body: body(xs))(*shapes)
            outputs = equation.primitive.bind(*found, **{**equation.params, "jaxpr": untyped})
        elif equation.primitive.name == "shard_map":
            outputs = _map_over_further_axes(equation, found)
        else:
            outputs = run_equation(equation, jaxpr, (), *found)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [*map(read, jaxpr.outvars)]


def _map_over_further_axes(equation: Any, inputs: Sequence[Any]) -> list[Any]:
    """The outputs of a map over the devices of a worker, which checks no types either."""

    def of_device(*blocks: Any) -> list[Any]:
        return _evaluate(equation.params["jaxpr"], [], blocks)

    with scopes_of(equation):
        return map_again(of_device, equation.params, check_vma=False)(*inputs)
