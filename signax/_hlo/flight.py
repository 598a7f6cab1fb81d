"""Collectives in flight beside the backward pass, read from the schedule of a compiled program."""

import re
from collections.abc import Hashable
from typing import Any, NamedTuple

from jax.sharding import AbstractMesh, Mesh

from signax._hlo.axes import place
from signax._hlo.collectives import check_crossing, collectives_by_instruction
from signax._hlo.program import Instruction, Program, called, is_later_stage, operands, parse

_BACKWARD = re.compile(r'op_name="[^"]*transpose\(')
_PRODUCTS = ("dot", "convolution")
_KERNELS = (*_PRODUCTS, "fusion", "custom-call", "call", "while", "conditional", "reduce")
_LIBRARIES = re.compile(r'custom_call_target="[^"]*(gemm|matmul|conv|fmha|attention|dot)', re.I)


class Flight(NamedTuple):
    """A collective in a program's schedule.

    Attributes:
      name: the name of the HLO instruction.
      operation: its opcode, as in :class:`signax.diagnostics.Collective`.
      bytes_sent: the bytes that one device sends.
      beside: the number of kernels of the backward pass between its start and its end; 0 if it is
        synchronous.
      after: the number of matrix products of the backward pass after its start.
    """

    name: str
    operation: str
    bytes_sent: int
    beside: int
    after: int


def in_flight(
    compiled: Any,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    crossing: Hashable | tuple[Hashable, ...] | None = None,
) -> list[Flight]:
    """The collectives of a compiled training step, in order, and what runs beside them.

    A collective is hidden if the device computes while it is in flight. A compiled program is a
    schedule: an asynchronous collective has a start and an end, with other instructions between.
    JAX names the operations of a backward pass, so the schedule shows how many of its kernels lie
    between. The compiler puts as much between as the collective takes by its estimate, which knows
    the device and not every link.

    Args:
      compiled: `jax.jit(step).lower(...).compile()`, or its HLO text. Programs for TPUs and GPUs
        are schedules. Programs for CPUs are not, and their collectives are synchronous.
      mesh: the mesh that the program was compiled for. Needed for `crossing` only.
      crossing: the name of a mesh axis, or a tuple of names. Only collectives that cross one of
        these axes are listed, as in :func:`collective_bytes`.

    Returns:
      A record for each collective outside loops and conditions.

    Raises:
      TypeError: `mesh` is not a mesh.
      ValueError: the text is not compiled HLO, or not a schedule; `crossing` names no axis of
        `mesh`, or `mesh` has other devices than the program.

    Examples:
      >>> from signax import diagnostics
      >>> hlo = '''HloModule step, is_scheduled=true, num_partitions=4
      ... ENTRY %main (x: f32[8,8]) -> f32[8,8] {
      ...   %x = f32[8,8]{1,0} parameter(0)
      ...   %start = f32[8,8]{1,0} all-reduce-start(%x), replica_groups=[1,4]<=[4], to_apply=%add
      ...   %dx = f32[8,8]{1,0} dot(%x, %x), metadata={op_name="f/transpose(jvp())/dot_general"}
      ...   %done = f32[8,8]{1,0} all-reduce-done(%start)
      ...   ROOT %sum = f32[8,8]{1,0} add(%done, %dx)
      ... }'''
      >>> print(diagnostics.in_flight(hlo))
      [Flight(name='start', operation='all-reduce', bytes_sent=384, beside=1, after=1)]
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text() or ""
    program = parse(text)
    if "is_scheduled=true" not in text:
        raise ValueError(
            "compiled is not a schedule: compile for a TPU or a GPU, or pass the text of the "
            "compiled program, not of the lowered one"
        )
    axes = None if crossing is None else check_crossing(crossing, mesh)
    placement = None if mesh is None else place(compiled, program, mesh)
    scope = program.computations[program.entry]
    order = {name: place for place, name in enumerate(scope)}
    backward = [
        (place, _multiplies(instruction, program))
        for place, instruction in enumerate(scope.values())
        if instruction.opcode in _KERNELS and _BACKWARD.search(instruction.rest)
    ]
    found = []
    for name, records in collectives_by_instruction(program, placement, 1, axes).items():
        if scope[name].opcode in ("while", "conditional"):
            continue
        start, end = order[name], order[_end(name, program)]
        beside = sum(start < place < end for place, _ in backward)
        after = sum(multiplies for place, multiplies in backward if place > start)
        size = sum(record.bytes_sent for record in records)
        found.append(Flight(name, records[0].operation, size, beside, after))
    return found


def _multiplies(instruction: Instruction, program: Program) -> bool:
    """Whether an instruction multiplies matrices."""
    if instruction.opcode in _PRODUCTS or _LIBRARIES.search(instruction.rest):
        return True
    names = called(instruction, "calls|to_apply|called_computations|body")
    inner = [i for name in names for i in program.computations.get(name, {}).values()]
    return any(_multiplies(i, program) for i in inner)


def _end(name: str, program: Program) -> str:
    """The name of the instruction that ends a collective; its own name if it is synchronous."""
    scope = program.computations[program.entry]
    end, stages = name, {name}
    opcode = scope[name].opcode
    is_start = name.startswith("async-collective-start") or opcode.endswith(("-start", "send"))
    for instruction in list(scope.values()) if is_start else []:
        if stages.isdisjoint(operands(instruction.rest)):
            continue
        if instruction.opcode.endswith("-done"):
            return instruction.name
        if any(is_later_stage(inner, program) for inner in called(instruction, "calls")):
            end = instruction.name  # TPUs pass an overlapped collective on from fusion to fusion
            stages.add(end)
        elif instruction.opcode == "get-tuple-element":
            stages.add(instruction.name)
    return end
