"""The instructions of a compiled program, from its HLO text."""

import re
from typing import NamedTuple


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    rest: str  # Operands and attributes: the text after the opcode's opening parenthesis.


Computation = dict[str, Instruction]  # by the names of the instructions


class Program(NamedTuple):
    """The computations of a module. Each replica of the program has `num_partitions` devices."""

    computations: dict[str, Computation]
    entry: str
    num_replicas: int
    num_partitions: int


_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][\w\-]*)\((.*)")
_COMPUTATION = re.compile(r"\s*(ENTRY )?%?([\w.\-]+)(?: \(.*->.*)? \{\s*$")


def parse(text: str) -> Program:
    """Parse the text of a compiled module. Raises if it has no entry computation."""
    computations: dict[str, Computation] = {}
    entry, current, sizes = "", {}, dict[str, int]()
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            current[match[1]] = Instruction(*match.groups())
        elif match := _COMPUTATION.match(line):
            current = computations.setdefault(match[2], {})
            entry = match[2] if match[1] else entry
        elif line.startswith("HloModule"):
            found = re.findall(r"\b(num_partitions|replica_count)=(\d+)", line)
            sizes = {name: int(size) for name, size in found}
    if not entry:
        raise ValueError(
            "compiled must be a compiled program or its HLO text (call .compile() on a lowered "
            f"program); got text without an ENTRY computation: {text[:60]!r}"
        )
    return Program(
        computations, entry, sizes.get("replica_count", 1), sizes.get("num_partitions", 1)
    )


def operands(rest: str) -> list[str]:
    """The names of an instruction's operands."""
    # Without comments, layouts and dimensions, an operand ends with its name: "f32 %x" or "%x".
    plain = re.sub(r"/\*.*?\*/|\{[^{}]*\}|\[[^\]]*\]", "", rest)
    named = plain[: plain.index(")")].split(",")
    return [operand.split()[-1].lstrip("%") for operand in named if operand.strip()]


def called(instruction: Instruction, attributes: str) -> list[str]:
    """The names of the computations in `attributes`, a regular expression of their names."""
    found = re.findall(rf"\b(?:{attributes})=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", instruction.rest)
    return [name.strip(" %") for many, one in found for name in (many or one).split(",")]


def is_later_stage(name: str, program: Program) -> bool:
    """Whether a computation is a later stage of a collective that another computation starts."""
    # TPU compilers print an overlapped collective three times: in the fusion that starts the
    # collective, in the fusions that run beside it, and in the fusion that ends it.
    instructions = program.computations.get(name, {}).values()
    done = 'custom_call_target="AsyncCollectiveDone"'
    return name.startswith("async_collective_fusion") or any(done in i.rest for i in instructions)


def trip_count(loop: Instruction, unknown: int | None) -> int:
    """The number of iterations of a loop; `unknown` if its HLO does not say."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known is None and unknown is None:
        raise ValueError(
            f"loop {loop.name} communicates, and the program does not say how often it runs "
            "(unknown trip count); pass unknown_trip_count to count it that many times"
        )
    return int(known[1]) if known else int(unknown or 0)
