"""A reader of collectives and their bytes from the HLO text of compiled programs."""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


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
    """

    name: str
    operation: str
    dtype: str
    elements: int
    group_size: int
    bytes_sent: int
    count: int

    @property
    def is_floating(self) -> bool:
        """Whether the elements are floating point or complex numbers."""
        return self.dtype.startswith(("f", "bf", "c"))


def collective_bytes(compiled: Any, *, unknown_trip_count: int | None = None) -> int:
    """The bytes that one device sends per execution of a compiled program, read from its HLO.

    The result is the sum of `bytes_sent * count` over the records of :func:`collectives`.

    Args:
      compiled: `jax.jit(f).lower(...).compile()`, or its HLO text.
      unknown_trip_count: see :func:`collectives`.

    Returns:
      Bytes per device and execution. A conditional counts as its most expensive branch.

    Raises:
      ValueError: as in :func:`collectives`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from signax import diagnostics
      >>> step = jax.jit(jnp.sin).lower(jnp.ones(1_000)).compile()
      >>> diagnostics.collective_bytes(step)  # one device has nobody to send to
      0
    """
    found = collectives(compiled, unknown_trip_count=unknown_trip_count)
    return sum(record.bytes_sent * record.count for record in found)


def collectives(compiled: Any, *, unknown_trip_count: int | None = None) -> list[Collective]:
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
      unknown_trip_count: the number of iterations of each loop without a trip count in the HLO. No
        `while_loop` has a trip count there, and on TPU no `scan` has.

    Returns:
      Records in arbitrary order. The `count` of a record in a loop includes the loop's trip count.

    Raises:
      ValueError: the text is not compiled HLO, or a loop that communicates has an unknown trip
        count and `unknown_trip_count` is not given.

    Examples:
      >>> from signax import diagnostics
      >>> hlo = '''HloModule step, num_partitions=4
      ... ENTRY %main (x: f32[6]) -> f32[24] {
      ...   %x = f32[6]{0} parameter(0)
      ...   ROOT %all = f32[24]{0} all-gather(%x), replica_groups={{0,1,2,3}}, dimensions={0}
      ... }'''
      >>> [gather] = diagnostics.collectives(hlo)
      >>> gather.operation, gather.elements, gather.bytes_sent, gather.is_floating
      ('all-gather', 6, 72, True)
    """
    module = _parse(compiled if isinstance(compiled, str) else compiled.as_text() or "")
    tallies: dict[str, list[Collective]] = {}

    def tally(computation: str) -> list[Collective]:
        if computation not in tallies:
            scope = module.computations.get(computation, {})
            tallies[computation] = found = []
            for instruction in scope.values():
                found += _own(instruction, scope, module.num_devices)
                found += nested(instruction)
        return tallies[computation]

    def nested(instruction: _Instruction) -> list[Collective]:
        if instruction.opcode == "while":
            body, condition = (tally(_called(instruction, key)[0]) for key in ("body", "condition"))
            if not body and not condition:
                return []
            trips = _trip_count(instruction, unknown_trip_count)
            # The condition is evaluated once more than the body, to end the loop.
            return _times(body, trips) + _times(condition, trips + 1)
        if instruction.opcode == "conditional":
            branches = [tally(name) for name in _called(instruction, r"\w+_computations?")]
            sent = [sum(r.bytes_sent * r.count for r in each) for each in branches]
            most = sent.index(max(sent))
            return [r for i, each in enumerate(branches) for r in _times(each, int(i == most))]
        if instruction.opcode.endswith(("-update", "-done")):
            return []  # Some versions print the computations of -start here again.
        called = _called(instruction, "calls|to_apply|called_computations")
        return [r for name in called if not _is_later_stage(name, module) for r in tally(name)]

    return list(tally(module.entry))


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    rest: str  # Operands and attributes: the text after the opcode's opening parenthesis.


class _Module(NamedTuple):
    computations: dict[str, dict[str, _Instruction]]
    entry: str
    num_devices: int


_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][\w\-]*)\((.*)")
_COMPUTATION = re.compile(r"\s*(ENTRY )?%?([\w.\-]+)(?: \(.*->.*)? \{\s*$")
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


def _parse(text: str) -> _Module:
    computations: dict[str, dict[str, _Instruction]] = {}
    entry, current, num_devices = "", {}, 1
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            current[match[1]] = _Instruction(*match.groups())
        elif match := _COMPUTATION.match(line):
            current = computations.setdefault(match[2], {})
            entry = match[2] if match[1] else entry
        elif line.startswith("HloModule"):
            sizes = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", line)
            num_devices = math.prod(map(int, sizes))
    if not entry:
        raise ValueError(
            "compiled must be a compiled program or its HLO text (call .compile() on a lowered "
            f"program); got text without an ENTRY computation: {text[:60]!r}"
        )
    return _Module(computations, entry, num_devices)


def _own(
    instruction: _Instruction, scope: dict[str, _Instruction], num_devices: int
) -> Iterator[Collective]:
    operation = kind = instruction.opcode.removesuffix("-start")
    if kind not in _SENT:
        return
    if kind == "send":
        operation, kind, group_size = _send(instruction.rest)
    elif kind == "collective-permute":
        group_size = _permuted(instruction.rest)
    else:
        group_size = _group_size(instruction.rest, num_devices)
    if group_size < 2:
        return
    operands = _operands(instruction.rest)
    if instruction.opcode in ("send", "ragged-all-to-all"):
        operands = operands[:1]  # Tokens and offsets are not sent.
    for dtype, (elements, size) in _payload(operands, scope).items():
        sent = _SENT[kind](group_size, size)
        yield Collective(instruction.name, operation, dtype, elements, group_size, sent, 1)


def _operands(rest: str) -> list[str]:
    # Without comments, layouts and dimensions, an operand ends with its name: "f32 %x" or "%x".
    plain = re.sub(r"/\*.*?\*/|\{[^{}]*\}|\[[^\]]*\]", "", rest)
    return [operand.split()[-1].lstrip("%") for operand in plain[: plain.index(")")].split(",")]


def _payload(operands: list[str], scope: dict[str, _Instruction]) -> dict[str, tuple[int, int]]:
    # Sizes are read from the operands' definitions: the result of a -start also holds buffers and
    # flags, and only some versions print shapes beside operands.
    payload: dict[str, tuple[int, int]] = {}
    for name in operands:
        for dtype, dimensions, layout in _ARRAY.findall(scope[name].shape):
            elements = math.prod(int(n.lstrip("<=")) for n in dimensions.split(",") if n)
            width = re.match(r"[a-z]+(\d+)", dtype)
            # A narrow type takes a byte unless its layout packs it: s4[8]{0:E(4)}.
            packed = re.search(r"E\((\d+)\)", layout)
            bits = int(packed[1]) if packed else max(8, int(width[1])) if width else 8
            seen, size = payload.get(dtype, (0, 0))
            payload[dtype] = (seen + elements, size + -(-elements * bits // 8))
    return payload


def _group_size(rest: str, num_devices: int) -> int:
    mesh = r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(.*?\))? \{(.*?)\}"
    if match := re.search(mesh, rest):
        # mesh['a'=4,'b'=2] {'a','b':(1)2}: multiply the sizes of the axes or parts in braces.
        sizes = dict(re.findall(r"([^\s,=]+)=(\d+)", match[1]))
        axes = [axis for axis in match[2].split(",") if axis]
        return math.prod(int(sizes.get(axis) or axis.rsplit(")")[-1]) for axis in axes)
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(match[1])
    match = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", rest)
    groups = re.findall(r"\{([\d,]+)\}", match[1]) if match else []
    return max((group.count(",") + 1 for group in groups), default=num_devices)


def _permuted(rest: str) -> int:
    pairs = re.search(r"source_target_pairs=\{([\d,{}]*)\}", rest)
    moved = re.findall(r"\{(\d+),(\d+)\}", pairs[1]) if pairs else []
    return len({device for pair in moved if pair[0] != pair[1] for device in pair})


def _send(rest: str) -> tuple[str, str, int]:
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', rest)
    if transfer is None:
        # A send goes to the host, for a callback, or to one other device.
        return "send", "send", 0 if "is_host_transfer=true" in rest else 2
    kind = transfer[1].lower().replace("_", "-")
    # A target lists slices and the devices of each, "{1,2}x{0:7}", or devices, {{100000,100001}}.
    group = re.search(r'_xla_megascale_target="?\{+([\d,]+)\}', rest)
    size = group[1].count(",") + 1 if group else 2
    return f"megascale-{kind}", kind if kind in _SENT else "send", size


def _called(instruction: _Instruction, attributes: str) -> list[str]:
    found = re.findall(rf"\b(?:{attributes})=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", instruction.rest)
    return [name.strip(" %") for many, one in found for name in (many or one).split(",")]


def _is_later_stage(name: str, module: _Module) -> bool:
    # TPU compilers print an overlapped collective three times: in the fusion that starts the
    # collective, in the fusions that run beside it, and in the fusion that ends it.
    instructions = module.computations.get(name, {}).values()
    done = 'custom_call_target="AsyncCollectiveDone"'
    return name.startswith("async_collective_fusion") or any(done in i.rest for i in instructions)


def _trip_count(instruction: _Instruction, unknown: int | None) -> int:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.rest)
    if known is None and unknown is None:
        raise ValueError(
            f"loop {instruction.name} communicates, and the program does not say how often it runs "
            "(unknown trip count); pass unknown_trip_count to count it that many times"
        )
    return int(known[1]) if known else int(unknown or 0)


def _times(records: list[Collective], times: int) -> list[Collective]:
    return [record._replace(count=record.count * times) for record in records]
