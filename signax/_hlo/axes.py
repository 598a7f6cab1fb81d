"""The axes of a mesh that groups of devices cross."""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from signax._hlo.groups import SLICE_STRIDE, Groups, Numbers
from signax._hlo.program import Program


class Placement(NamedTuple):
    """Where the devices of a program lie on a mesh.

    Attributes:
      names: the names of the mesh's axes.
      sizes: their sizes.
      coordinates: i64[slices, partitions, axes], the position on the mesh of each partition of the
        program. Only programs for several TPU slices have more than one slice.
      numbered: the positions by the numbers of devices in transfers between slices. The first table
        that has all devices of a group counts.
    """

    names: tuple[Hashable, ...]
    sizes: tuple[int, ...]
    coordinates: Numbers
    numbered: tuple[dict[int, Numbers], ...]

    def crossed(self, groups: Groups) -> tuple[Hashable, ...]:
        """The axes along which any two devices of a group differ, in the mesh's order."""
        differ = np.zeros(len(self.names), bool)
        for block in groups.members:
            points = self._between(block) if groups.between_slices else self._inside(block)
            if points is None:
                return self._all_axes()
            differ |= (points != points[..., :1, :]).any(axis=tuple(range(points.ndim - 1)))
        if not groups.members:
            return self._all_axes()
        return tuple(name for name, crosses in zip(self.names, differ, strict=True) if crosses)

    def _all_axes(self) -> tuple[Hashable, ...]:
        return tuple(name for name, size in zip(self.names, self.sizes, strict=True) if size > 1)

    def _inside(self, block: Numbers) -> Numbers:
        partitions = self.coordinates.shape[1]
        if block.max() >= partitions:
            raise ValueError(
                f"compiled has a collective on device {block.max()}, but runs on {partitions} "
                "(replica_count times num_partitions). Pass the whole text of the program."
            )
        return self.coordinates[:, block]  # [slices, groups, devices, axes]

    def _between(self, block: Numbers) -> Numbers | None:
        numbers = block.ravel().tolist()
        for table in self.numbered:
            if all(number in table for number in numbers):
                found = np.array([table[number] for number in numbers])
                return found.reshape(*block.shape, -1)  # [groups, devices, axes]
        return None


def check_mesh(mesh: Any) -> None:
    """Raise if `mesh` is no mesh."""
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(
            f"mesh={mesh!r} is not a jax.sharding.Mesh or AbstractMesh. Pass the mesh that the "
            "program was compiled for."
        )


def place(compiled: Any, program: Program, mesh: Mesh | AbstractMesh) -> Placement:
    """Find each device of a program on a mesh. Raises if the mesh has other devices."""
    check_mesh(mesh)
    partitions = program.num_replicas * program.num_partitions
    known = None if isinstance(compiled, str) else _devices_of(compiled)
    _check_size(mesh, program, partitions, known)
    sizes = tuple(mesh.shape.values())
    coordinates = np.indices(sizes).reshape(len(sizes), -1).T  # [devices, axes]
    devices = list(mesh.devices.flat) if isinstance(mesh, Mesh) else None
    if devices is not None and known is not None:
        coordinates = coordinates[_order(known, devices)]
        devices = known
    slices = _slices(devices, mesh.size, partitions)
    numbered = _numbered(devices, slices, coordinates)
    inside = np.stack([coordinates[slices == number] for number in np.unique(slices)])
    return Placement(tuple(mesh.axis_names), sizes, inside, numbered)


def _devices_of(compiled: Any) -> list[Any] | None:
    """The devices of a compiled program in the order of its partitions, if shardings tell."""
    for sharding in jax.tree.leaves((compiled.input_shardings, compiled.output_shardings)):
        # All shardings of a program list the devices in one order, or JAX refuses the program.
        mesh = getattr(sharding, "mesh", None)
        if isinstance(mesh, Mesh):
            return list(mesh.devices.flat)
    return None


def _check_size(
    mesh: Mesh | AbstractMesh, program: Program, partitions: int, known: Sequence[Any] | None
) -> None:
    if known is not None:
        expected = len(known)
    else:
        # The HLO of a program for several TPU slices is the program of one slice.
        sends = (i.rest for scope in program.computations.values() for i in scope.values())
        several = any("_xla_megascale_target=" in rest for rest in sends)
        expected = mesh.size if several and mesh.size % partitions == 0 else partitions
    if mesh.size != expected:
        shape = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
        raise ValueError(
            f"mesh has {mesh.size} devices ({shape}), but the program runs on {expected}. Pass the "
            "mesh that the program was compiled for."
        )


def _order(known: list[Any], devices: list[Any]) -> list[int]:
    positions = {device: position for position, device in enumerate(devices)}
    if missing := [device for device in known if device not in positions]:
        raise ValueError(
            f"mesh lacks devices of the program, such as {missing[0]}. Pass the mesh that the "
            "program was compiled for."
        )
    return [positions[device] for device in known]


def _slices(devices: list[Any] | None, size: int, partitions: int) -> Numbers:
    """The number of each device's slice, where `partitions` devices form a slice."""
    told = np.array([getattr(device, "slice_index", None) or 0 for device in devices or ()], int)
    _, counts = np.unique(told, return_counts=True)
    if len(counts) == size // partitions and (counts == partitions).all():
        return told
    return np.repeat(np.arange(size // partitions), partitions)


def _numbered(
    devices: list[Any] | None, slices: Numbers, coordinates: Numbers
) -> tuple[dict[int, Numbers], ...]:
    identities = [device.id for device in devices] if devices else list(range(len(slices)))
    by_identity = dict(zip(identities, coordinates, strict=True))
    by_slice: dict[int, Numbers] = {}
    for number in np.unique(slices):
        members = sorted(np.flatnonzero(slices == number), key=lambda i: identities[i])
        for index, position in enumerate(members):
            by_slice[SLICE_STRIDE * (int(number) + 1) + index] = coordinates[position]
    return by_identity, by_slice
