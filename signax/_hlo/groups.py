"""The devices that exchange with one another in a collective, in every notation of HLO."""

import math
import re
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from signax._hlo.program import Instruction, Program

Numbers = NDArray[np.int64]

# In programs of several TPU slices, device i of slice s = 1, 2, ... has the number
# s * SLICE_STRIDE + i.
SLICE_STRIDE = 100_000


class Groups(NamedTuple):
    """The groups of devices that exchange with one another.

    Attributes:
      size: the number of devices in the largest group.
      members: i64[groups, devices] for groups of one size, in a list. The list is empty if the
        program does not tell the members.
      between_slices: whether members are numbers of devices in all slices (see `SLICE_STRIDE`),
        otherwise they are numbers of partitions, counted from 0 in each slice.
    """

    size: int
    members: list[Numbers]
    between_slices: bool = False


def collective_groups(instruction: Instruction, program: Program) -> Groups:
    """The groups of an instruction with `replica_groups`."""
    kind = instruction.opcode.removesuffix("-start")
    members = _devices(_listed(instruction.rest), kind, instruction.rest, program)
    return Groups(max(block.shape[1] for block in members), members)


def permute_groups(instruction: Instruction, program: Program) -> Groups:
    """Pairs of source and target, without pairs of a device with itself."""
    pairs = _pairs(instruction.rest)
    members = _devices([pairs], "permute", instruction.rest, program) if pairs.size else []
    return Groups(np.unique(pairs).size, members)


def send_groups(instruction: Instruction, program: Program) -> tuple[str, Groups]:
    """The name of the operation that a `send` is a part of, and its groups."""
    rest = instruction.rest
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', rest)
    if transfer is None:
        # A send goes to the host, for a callback, or to one other device.
        if "is_host_transfer=true" in rest:
            return "send", Groups(0, [])
        return "send", Groups(2, permute_groups(instruction, program).members)
    members = _target(rest)
    size = members[0].shape[1] if members else 2
    kind = transfer[1].lower().replace("_", "-")
    return f"megascale-{kind}", Groups(size, members, between_slices=True)


def _listed(rest: str) -> list[Numbers]:
    """The numbers in `replica_groups`, before the rules for replicas and partitions."""
    if match := re.search(r"replica_groups=mesh\[(.*?) \{(.*?)\}", rest):
        return [_of_mesh(match[1], match[2])]
    iota = r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if match := re.search(iota, rest):
        return [_iota(match[2], match[3]).reshape(_integers(match[1]))]
    match = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", rest)
    return _blocks([_integers(g) for g in re.findall(r"\{([\d,]+)\}", match[1])]) if match else []


def _of_mesh(mesh: str, axes: str) -> Numbers:
    # mesh['a'=8,'b'=2] {'a':(2)4,'b'}: devices that differ in the listed axes, or parts of axes,
    # form a group. The part (2)4 of an axis is what remains of it after its 2 major blocks, cut
    # into 4.
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh)}
    names, shape = list(sizes), tuple(sizes.values())
    coordinates = np.indices(shape).reshape(len(shape), -1)  # [axes, devices]
    shared, group_size = coordinates.copy(), 1
    for name, major, part in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", axes):
        index = names.index(name)
        before, size = (int(major), int(part)) if part else (1, sizes[name])
        stride = sizes[name] // (before * size)
        shared[index] -= coordinates[index] // stride % size * stride
        group_size *= size
    order = np.argsort(np.ravel_multi_index(tuple(shared), shape), kind="stable")
    # device_ids=([4,2]T(1,0)) or device_ids=(0,2,1,3) lists the devices of the mesh.
    listed = re.search(r"device_ids=\((?:\[([\d,]+)\]T\(([\d,]+)\)|\[?([\d,]+))", mesh)
    if listed and listed[3]:
        order = np.array(_integers(listed[3]))[order]
    elif listed:
        order = _iota(listed[1], listed[2])[order]
    return order.reshape(-1, group_size)


def _devices(groups: list[Numbers], kind: str, rest: str, program: Program) -> list[Numbers]:
    """Replaces the numbers of replicas or partitions by numbers of devices.

    The numbers of devices count all partitions of the first replica, then of the second, ...
    """
    devices = np.arange(program.num_replicas * program.num_partitions)
    grid = devices.reshape(program.num_replicas, program.num_partitions)
    flat = "use_global_device_ids=true" in rest
    if not groups and (flat or 1 in grid.shape):
        return [devices[None]]
    if flat:
        table = grid.reshape(1, -1, 1)
    elif "channel_id=" not in rest:
        table = grid.T[:, :, None]  # each partition by itself, between replicas
    elif kind in ("all-reduce", "all-gather", "reduce-scatter"):
        table = grid[None]  # replicas with all their partitions
    else:
        table = grid[:, :, None]  # each replica by itself, between partitions
    copies, numbers, width = table.shape
    found: list[Numbers] = []
    for block in groups or [np.arange(numbers)[None]]:
        # With one replica, or one partition, compilers number devices without saying so.
        if block.max() >= numbers:
            return groups
        found.append(table[:, block].reshape(copies * len(block), block.shape[1] * width))
    return found


def _pairs(rest: str) -> Numbers:
    listed = re.search(r'source_target_pairs="?(\{[\d,{} ]*\})', rest)
    found = re.findall(r"\{(\d+), *(\d+)\}", listed[1]) if listed else []
    pairs = np.array(found, int).reshape(-1, 2)
    return pairs[pairs[:, 0] != pairs[:, 1]]


def _target(rest: str) -> list[Numbers]:
    # A target lists slices and the devices of each, "{1,2}x{0:7}", or groups of devices,
    # {{100000,200000}}, or pairs, {{100000->200000}}.
    match = re.search(r'_xla_megascale_target=(?:"([^"]*)"|([\d,{}>\-]*))', rest)
    text = (match[1] or match[2]) if match else ""
    if products := re.findall(r"\{([\d,]+)\}x\{(\d+):(\d+)\}", text):
        return [
            np.arange(int(first), int(last) + 1)[:, None]
            + SLICE_STRIDE * np.array(_integers(slices))
            for slices, first, last in products
        ]
    groups = re.findall(r"\{(\d+(?:(?:,|->)\d+)*)\}", text)
    return _blocks([_integers(group.replace("->", ",")) for group in groups])


def _blocks(groups: list[tuple[int, ...]]) -> list[Numbers]:
    if len({len(group) for group in groups}) == 1:
        return [np.array(groups)]
    return [np.array([group]) for group in groups]


def _iota(shape: str, order: str | None) -> Numbers:
    sizes = _integers(shape)
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return numbers.transpose(_integers(order) if order else None).ravel()


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))
