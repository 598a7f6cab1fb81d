"""Collectives and their bytes, read from compiled programs."""

import math
import re
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

from jax.sharding import AbstractMesh, Mesh

from signax._hlo.axes import Placement, check_mesh, place
from signax._hlo.groups import Groups, collective_groups, permute_groups, send_groups
from signax._hlo.program import (
    Computation,
    Instruction,
    Program,
    called,
    is_later_stage,
    operands,
    parse,
    trip_count,
)


class Collective(NamedTuple):
    """One device's share in one collective of a compiled program.

    An instruction that exchanges arrays of several dtypes makes one record for each dtype.

    Attributes:
      name: the name of the HLO instruction.
      operation: its opcode, `"all-reduce"` for example, without `-start`. The prefix `"megascale-"`
        marks transfers of a TPU program between slices, over the data-centre network.
      dtype: the HLO name of the element type, `"u32"` for example.
      elements: the number of elements in one device's operand.
      group_size: the number of devices that exchange with one another.
      bytes_sent: the bytes that one device sends each time, rounded up.
      count: the number of times that the instruction runs per execution of the program. The count
        is 0 in a branch of a conditional that sends less than another branch.
      axes: the mesh axes that the collective crosses, in the mesh's order: the axes along which any
        two devices of a group differ. None if :func:`collectives` had no mesh.
    """

    name: str
    operation: str
    dtype: str
    elements: int
    group_size: int
    bytes_sent: int
    count: int
    axes: tuple[Hashable, ...] | None = None

    @property
    def is_floating(self) -> bool:
        """Whether the elements are floating point or complex numbers."""
        return self.dtype.startswith(("f", "bf", "c"))


def collective_bytes(
    compiled: Any,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    crossing: Hashable | tuple[Hashable, ...] | None = None,
    unknown_trip_count: int | None = None,
) -> int:
    """The bytes that one device sends per execution of a compiled program, read from its HLO.

    The result is the sum of `bytes_sent * count` over the records of :func:`collectives`, or over
    the records that cross an axis in `crossing`.

    Args:
      compiled: `jax.jit(f).lower(...).compile()`, or its HLO text.
      mesh: see :func:`collectives`. Needed for `crossing` only.
      crossing: the name of a mesh axis, or a tuple of names. Only collectives that cross one of
        these axes count. A collective that crosses several axes counts in full for each of them.
      unknown_trip_count: see :func:`collectives`.

    Returns:
      Bytes per device and execution. A conditional counts as the branch with most of these bytes.

    Raises:
      TypeError: as in :func:`collectives`.
      ValueError: as in :func:`collectives`, or `crossing` names no axis of `mesh`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from signax import diagnostics
      >>> step = jax.jit(jnp.sin).lower(jnp.ones(1_000)).compile()
      >>> diagnostics.collective_bytes(step)  # one device has nobody to send to
      0

      Two hosts of four devices sum 6 floats on each host. No byte leaves a host.

      >>> mesh = jax.sharding.AbstractMesh((2, 4), ("host", "chip"))
      >>> hlo = '''HloModule step, num_partitions=8
      ... ENTRY %main (x: f32[6]) -> f32[6] {
      ...   %x = f32[6]{0} parameter(0)
      ...   ROOT %sum = f32[6]{0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add
      ... }'''
      >>> diagnostics.collective_bytes(hlo, mesh=mesh, crossing="chip")
      36
      >>> diagnostics.collective_bytes(hlo, mesh=mesh, crossing="host")
      0
    """
    axes = None if crossing is None else check_crossing(crossing, mesh)
    found = _collectives(compiled, mesh, unknown_trip_count, axes)
    return sum(record.bytes_sent * record.count for record in found)


def collectives(
    compiled: Any,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    unknown_trip_count: int | None = None,
) -> list[Collective]:
    r"""The collectives of a compiled program, read from its HLO.

    With n devices in a group and an operand of b bytes, rings send

    - :math:`2 \frac{n - 1}{n} b` in an all-reduce,
    - :math:`\frac{n - 1}{n} b` in an all-to-all or a reduce-scatter,
    - :math:`(n - 1) b` in an all-gather.

    A permute, a broadcast or a send sends b, and a ragged all-to-all at most as much as an
    all-to-all. Groups of one are left out. Remote copies inside custom kernels are left out, too:
    no opcode shows them.

    Args:
      compiled: `jax.jit(f).lower(...).compile()`, or its HLO text.
      mesh: the mesh that the program was compiled for, or another mesh of the same devices. The
        records then name the `axes` that they cross. HLO text and an abstract mesh do not list
        devices. With either, the order of the program's devices is taken to be the mesh's order.
      unknown_trip_count: the number of iterations of each loop without a trip count in the HLO. No
        `while_loop` has a trip count there, and on TPU no `scan` has.

    Returns:
      Records in arbitrary order. The `count` of a record in a loop includes the loop's trip count.
      A permute crosses the axes along which the source and the target of any pair differ. A send
      whose HLO does not list its pairs crosses all axes.

    Raises:
      TypeError: `mesh` is not a mesh.
      ValueError: the text is not compiled HLO, a loop that communicates has an unknown trip count
        and `unknown_trip_count` is not given, or `mesh` has other devices than the program.

    Examples:
      >>> import jax
      >>> from signax import diagnostics
      >>> hlo = '''HloModule step, num_partitions=4
      ... ENTRY %main (x: f32[6]) -> f32[12] {
      ...   %x = f32[6]{0} parameter(0)
      ...   ROOT %all = f32[12]{0} all-gather(%x), replica_groups={{0,2},{1,3}}, dimensions={0}
      ... }'''
      >>> mesh = jax.sharding.AbstractMesh((2, 2), ("data", "model"))
      >>> [gather] = diagnostics.collectives(hlo, mesh=mesh)
      >>> gather.operation, gather.elements, gather.bytes_sent, gather.is_floating, gather.axes
      ('all-gather', 6, 24, True, ('data',))
    """
    return _collectives(compiled, mesh, unknown_trip_count)


def _collectives(
    compiled: Any,
    mesh: Mesh | AbstractMesh | None,
    unknown_trip_count: int | None,
    crossing: frozenset[Hashable] | None = None,
) -> list[Collective]:
    """The records of a program, or those that cross any of the axes `crossing`."""
    text = compiled if isinstance(compiled, str) else compiled.as_text() or ""
    program = parse(text)
    placement = None if mesh is None else place(compiled, program, mesh)
    found = collectives_by_instruction(program, placement, unknown_trip_count, crossing)
    return [record for records in found.values() for record in records]


def collectives_by_instruction(
    program: Program,
    placement: Placement | None = None,
    unknown_trip_count: int | None = 1,
    crossing: frozenset[Hashable] | None = None,
) -> dict[str, list[Collective]]:
    """The records of each instruction of the entry computation, in its order, if it has any."""
    tallies: dict[str, list[Collective]] = {}

    def tally(name: str) -> list[Collective]:
        if name not in tallies:
            scope = program.computations.get(name, {})
            tallies[name] = found = []
            for instruction in scope.values():
                found += of_instruction(instruction, scope)
        return tallies[name]

    def of_instruction(instruction: Instruction, scope: Computation) -> list[Collective]:
        own = _own(instruction, scope, program, placement)
        counted = [r for r in own if crossing is None or crossing.intersection(r.axes or ())]
        return counted + nested(instruction)

    def nested(instruction: Instruction) -> list[Collective]:
        if instruction.opcode == "while":
            body, condition = (tally(called(instruction, key)[0]) for key in ("body", "condition"))
            if not body and not condition:
                return []
            trips = trip_count(instruction, unknown_trip_count)
            # The condition is evaluated once more than the body, to end the loop.
            return _times(body, trips) + _times(condition, trips + 1)
        if instruction.opcode == "conditional":
            branches = [tally(name) for name in called(instruction, r"\w+_computations?")]
            sent = [sum(r.bytes_sent * r.count for r in each) for each in branches]
            most = sent.index(max(sent))
            return [r for i, each in enumerate(branches) for r in _times(each, int(i == most))]
        if instruction.opcode.endswith(("-update", "-done")):
            return []  # Some versions print the computations of -start here again.
        names = called(instruction, "calls|to_apply|called_computations")
        return [r for name in names if not is_later_stage(name, program) for r in tally(name)]

    entry = program.computations[program.entry]
    found = {name: of_instruction(instruction, entry) for name, instruction in entry.items()}
    return {name: records for name, records in found.items() if records}


_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](\{[^{}]*\})?")
# The bytes that one of n devices sends if each device's operand has b bytes.
_SENT: dict[str, Callable[[int, int], int]] = {
    "all-reduce": lambda n, b: -(-2 * (n - 1) * b // n),
    "reduce-scatter": lambda n, b: -(-(n - 1) * b // n),
    "all-to-all": lambda n, b: -(-(n - 1) * b // n),
    "ragged-all-to-all": lambda n, b: -(-(n - 1) * b // n),
    "all-gather": lambda n, b: (n - 1) * b,
    "collective-broadcast": lambda n, b: b,
    "collective-permute": lambda n, b: b,
    "send": lambda n, b: b,
}


def _own(
    instruction: Instruction, scope: Computation, program: Program, placement: Placement | None
) -> Iterator[Collective]:
    kind = instruction.opcode.removesuffix("-start")
    if kind not in _SENT:
        return
    operation, groups = _groups(kind, instruction, program)
    if groups.size < 2:
        return
    kind = operation.removeprefix("megascale-")
    sent = _SENT.get(kind, _SENT["send"])
    axes = None if placement is None else placement.crossed(groups)
    names = operands(instruction.rest)
    if instruction.opcode in ("send", "ragged-all-to-all"):
        names = names[:1]  # Tokens and offsets are not sent.
    for dtype, (elements, size) in _payload(names, scope).items():
        in_bytes = sent(groups.size, size)
        yield Collective(
            instruction.name, operation, dtype, elements, groups.size, in_bytes, 1, axes
        )


def _groups(kind: str, instruction: Instruction, program: Program) -> tuple[str, Groups]:
    if kind == "send":
        return send_groups(instruction, program)
    if kind == "collective-permute":
        return kind, permute_groups(instruction, program)
    return kind, collective_groups(instruction, program)


def _payload(names: list[str], scope: Computation) -> dict[str, tuple[int, int]]:
    # Sizes are read from the operands' definitions: the result of a -start also holds buffers and
    # flags, and only some versions print shapes beside operands.
    payload: dict[str, tuple[int, int]] = {}
    for name in names:
        for dtype, dimensions, layout in _ARRAY.findall(scope[name].shape):
            elements = math.prod(int(n.lstrip("<=")) for n in dimensions.split(",") if n)
            width = re.match(r"[a-z]+(\d+)", dtype)
            # A narrow type takes a byte unless its layout packs it: s4[8]{0:E(4)}.
            packed = re.search(r"E\((\d+)\)", layout)
            bits = int(packed[1]) if packed else max(8, int(width[1])) if width else 8
            seen, size = payload.get(dtype, (0, 0))
            payload[dtype] = (seen + elements, size + -(-elements * bits // 8))
    return payload


def _times(records: list[Collective], times: int) -> list[Collective]:
    return [record._replace(count=record.count * times) for record in records]


def check_crossing(
    crossing: Hashable | tuple[Hashable, ...], mesh: Mesh | AbstractMesh | None
) -> frozenset[Hashable]:
    if mesh is None:
        raise ValueError(f"crossing={crossing!r} needs a mesh. Pass the program's mesh as mesh=.")
    check_mesh(mesh)
    axes = crossing if isinstance(crossing, tuple) else (crossing,)
    for name in axes:
        if name not in mesh.axis_names:
            raise ValueError(
                f"crossing={crossing!r} names {name!r}, which is no axis of mesh. Choose from "
                f"{', '.join(map(repr, mesh.axis_names))}."
            )
    return frozenset(axes)
