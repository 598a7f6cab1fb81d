"""Find out, while a program is compiled, to which shardings it pins a value.

Under Auto axes a value's type does not show its sharding. The lowered program does: in the
attributes of its arguments and results, and in constraints. When JAX lowers a value inside a
condition, a loop or a nested function, the value's way to the arguments and results does not exist
yet. `watch` therefore marks the value with an operation that nothing uses. When the program is
complete, the marks are followed and erased: the program that XLA compiles has no trace of them.
"""

import itertools
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import jax
from jax import monitoring
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import sdy
from jax.interpreters import ad, batching, mlir

Spec = Sequence[tuple[Hashable, ...]]
End = Literal["argument", "result"]
Check = Callable[[Sequence[Spec | None]], None]

_MARK = "signax.watch"
_numbers = itertools.count()  # of marks, so that no program finds the checks of another
_watch_p = Primitive("signax_watch_sharding")


def watch(array: jax.Array, end: End, check: Check) -> jax.Array:
    """Return an array, and call `check` with its pins when the program around it is compiled.

    A pin has the mesh axes of each dimension, or is `None` if XLA may choose the sharding. With
    "argument" the array has a pin for each argument or constraint that it comes from. With "result"
    it has a pin for each result of the program that it becomes. Conditions, loops and functions may
    lie between. Results of other operations have no pins.
    """
    return _watch_p.bind(array, end=end, check=check)


class _Lowering(threading.local):
    """The program that this thread lowers, and the checks of its marks."""

    module: Any = None
    checks: dict[int, tuple[End, Check]]


_lowering = _Lowering()


def _lower(context: mlir.LoweringRuleContext, value: Any, *, end: End, check: Check) -> list[Any]:
    module = context.module_context.module
    if _lowering.module is not module:  # the last one is finished, or its lowering failed
        _lowering.module, _lowering.checks = module, {}
    number = next(_numbers)
    _lowering.checks[number] = end, check
    mark: dict[str, Any] = {_MARK: ir.IntegerAttr.get(ir.IntegerType.get_signless(64), number)}
    ir.Operation.create("stablehlo.reshape", [value.type], [value], mark)
    return [value]


def _finish(event: str, duration_secs: float, **kwargs: Any) -> None:
    """Check and erase the marks of a complete program.

    JAX reports when it has lowered a program, and passes a listener's error on to the caller.
    """
    del event, duration_secs, kwargs
    module = _lowering.module
    if module is None or not _is_complete(module):
        return
    checks, _lowering.module = _lowering.checks, None
    marks: list[ir.Operation] = []
    calls: defaultdict[str, list[Any]] = defaultdict(list)

    def visit(operation: ir.Operation):
        if operation.name == "func.call":
            callee: Any = operation.attributes["callee"]
            calls[callee.value].append(operation)
        elif _MARK in operation.attributes:
            marks.append(operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    found: list[tuple[Check, list[Spec | None]]] = []
    for mark in marks:
        number: Any = mark.attributes[_MARK]
        if number.value in checks:
            end, check = checks[number.value]
            follow = _pins_before if end == "argument" else _pins_after
            found.append((check, follow(mark.operands[0], calls)))
        mark.erase()
    for check, pins in found:
        check(pins)


def _is_complete(module: Any) -> bool:
    functions = ir.SymbolTable(module.operation)
    if "main" not in functions:
        return False
    main: Any = functions["main"]
    return any(op.operation.name == "func.return" for op in main.body.blocks[0].operations)


def _pins_before(value: Any, calls: dict[str, list[Any]]) -> list[Spec | None]:
    """The pins of a value, from constraints and from arguments of the program."""
    if not isinstance(value, ir.BlockArgument):
        operation = value.owner.operation
        is_constraint = operation.name == "sdy.sharding_constraint"
        return [_pin(operation.attributes)] if is_constraint else []
    operation, number = value.owner.owner.operation, value.arg_number
    if operation.name == "stablehlo.while":
        return _pins_before(operation.operands[number], calls)
    if operation.name != "func.func":
        return []
    name = _name(operation)
    if name == "main":
        return [_pin_of_main(operation, "arg_attrs", number)]
    outer = [_pins_before(call.operands[number], calls) for call in calls[name]]
    return [pin for pins in outer for pin in pins]


def _pins_after(value: Any, calls: dict[str, list[Any]]) -> list[Spec | None]:
    """The pins of a value, from the results of the program that it becomes."""
    pins: list[Spec | None] = []
    for use in value.uses:
        operation, number = use.owner.operation, use.operand_number
        if operation.name == "sdy.sharding_constraint":
            own = _pin(operation.attributes)
            pins += [own if pin is None else pin for pin in _pins_after(operation.result, calls)]
        if operation.name not in ("func.return", "stablehlo.return"):
            continue
        outer = operation.parent.operation
        if outer.name in ("stablehlo.case", "stablehlo.while"):
            pins += _pins_after(outer.results[number], calls)
        elif outer.name == "func.func" and _name(outer) == "main":
            pins.append(_pin_of_main(outer, "res_attrs", number))
        elif outer.name == "func.func":
            for call in calls[_name(outer)]:
                pins += _pins_after(call.results[number], calls)
    return pins


def _name(function: Any) -> str:
    return function.attributes["sym_name"].value


def _pin_of_main(function: Any, kind: str, number: int) -> Spec | None:
    attributes = function.attributes
    return _pin(attributes[kind][number], "sdy.sharding") if kind in attributes else None


def _pin(attributes: Any, name: str = "sharding") -> Spec | None:
    """The mesh axes of each dimension, or `None` if XLA may choose or add some."""
    if name not in attributes:
        return None
    dimensions = sdy.TensorShardingAttr(attributes[name]).dimension_shardings
    parts = [sdy.DimensionShardingAttr(dimension) for dimension in dimensions]
    if not all(part.is_closed for part in parts):
        return None
    return [tuple(sdy.AxisRefAttr(axis).name for axis in part.axes) for part in parts]


_watch_p.def_impl(lambda array, *, end, check: array)
_watch_p.def_abstract_eval(lambda array, *, end, check: array)
mlir.register_lowering(_watch_p, _lower, cacheable=False)
ad.deflinear2(_watch_p, lambda cotangent, *_, end, check: [cotangent])
batching.primitive_batchers[_watch_p] = lambda arrays, axes, *, end, check: (arrays[0], axes[0])
monitoring.register_event_duration_secs_listener(_finish)
