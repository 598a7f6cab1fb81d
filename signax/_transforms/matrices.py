"""Functions of whole matrices, which may be stacked in a leaf or cut over a worker's devices.

Matrices of one shape run one after the other through one program. A transformer has about five
shapes, so its program has five such loops, and each loop keeps one matrix's intermediate results.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from optax.contrib import MuonDimensionNumbers

from signax._core.leaves import entry_axes, explicit_axes, sharding_groups

# Of a matrix and the axes of its rows and columns: an array of the matrix's shape.
OfMatrix = Callable[[jax.Array, MuonDimensionNumbers], jax.Array]


class Kind(NamedTuple):
    """What matrices must share to run through one program.

    Attributes:
      shape: the shape of a device's block of the matrix.
      dtype: its dtype.
      numbers: the axes of its rows and columns.
      cut: the axes that are cut over devices, each with its mesh axes.
    """

    shape: tuple[int, ...]
    dtype: Any
    numbers: MuonDimensionNumbers
    cut: tuple[tuple[int, tuple[Hashable, ...]], ...]


class Stack(NamedTuple):
    """A device's block of a leaf, as a stack of matrices of one kind.

    Attributes:
      kind: the kind of its matrices.
      order: the axes of the leaf that count matrices, and then the axes of a matrix.
      shape: the shape of the block with its axes in this order.
    """

    kind: Kind
    order: tuple[int, ...]
    shape: tuple[int, ...]

    def matrices(self, block: jax.Array) -> jax.Array:
        """The matrices of a block, [count, ...]."""
        return block.transpose(self.order).reshape(-1, *self.kind.shape)

    def block(self, matrices: jax.Array) -> jax.Array:
        """The block that has these matrices."""
        back = sorted(range(len(self.order)), key=lambda axis: self.order[axis])
        return matrices.reshape(self.shape).transpose(back)


def given_axes(entry: Sequence[int] | int) -> tuple[int, ...]:
    """The axes in one entry of dimension numbers, which is an integer or several."""
    return tuple(entry) if isinstance(entry, Sequence) else (entry,)


def matrix_axes(rank: int, numbers: MuonDimensionNumbers) -> tuple[list[int], list[int]]:
    """The row axes and the column axes of an array of a given rank, as non-negative numbers."""
    rows, columns = ([int(axis) % rank for axis in given_axes(entry)] for entry in numbers)
    return rows, columns


def map_matrices(
    function: OfMatrix,
    leaves: Sequence[jax.Array],
    numbers: Sequence[MuonDimensionNumbers | None],
    specs: Sequence[PartitionSpec],
) -> list[jax.Array]:
    """Apply a function to every matrix of the leaves that have dimension numbers.

    A matrix that is cut over the devices of a worker is gathered for the function.
    """
    new = list(leaves)
    for group in sharding_groups(leaves, specs):
        chosen = [
            (n, leaves[n], entry, spec)
            for n, spec in zip(group.positions, group.specs, strict=True)
            if (entry := numbers[n]) is not None
        ]
        if not chosen:
            continue
        positions, own, own_numbers, own_specs = map(list, zip(*chosen, strict=True))

        def on_blocks(
            blocks: Any, places: Any, own_numbers: Any = own_numbers, own_specs: Any = own_specs
        ):
            stacks = [_stack(*each) for each in zip(blocks, own_numbers, own_specs, strict=True)]
            return _map_stacks(function, blocks, stacks, places)

        mapped: Callable[..., list[jax.Array]] = on_blocks
        if group.axes:
            in_specs = own_specs, {axis: PartitionSpec(axis) for axis in group.axes}
            mapped = jax.shard_map(
                on_blocks, in_specs=in_specs, out_specs=own_specs, axis_names=set(group.axes)
            )
        for n, leaf in zip(positions, mapped(own, _places(group.axes)), strict=True):
            new[n] = leaf
    return new


def _places(axes: Sequence[Hashable]) -> dict[Hashable, jax.Array]:
    """A device's place along each axis, i32[1] once it is mapped.

    Places are arguments since older versions of JAX have no axis index in a nested `shard_map`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    places = {}
    for axis in axes:
        places[axis] = jnp.arange(mesh.shape[axis])
        if axis in explicit_axes(mesh):
            places[axis] = jax.sharding.reshard(places[axis], PartitionSpec(axis))
    return places


def _stack(block: jax.Array, numbers: MuonDimensionNumbers, spec: PartitionSpec) -> Stack:
    rows, columns = matrix_axes(block.ndim, numbers)
    inside = sorted([*rows, *columns])
    order = [axis for axis in range(block.ndim) if axis not in inside] + inside
    entries = {axis: entry_axes(entry) for axis, entry in enumerate(spec)}
    kind = Kind(
        shape=tuple(block.shape[axis] for axis in inside),
        dtype=block.dtype,
        numbers=MuonDimensionNumbers(
            tuple(inside.index(axis) for axis in rows),
            tuple(inside.index(axis) for axis in columns),
        ),
        cut=tuple((n, entries[axis]) for n, axis in enumerate(inside) if entries.get(axis)),
    )
    return Stack(kind, tuple(order), tuple(block.shape[axis] for axis in order))


def _map_stacks(
    function: OfMatrix,
    blocks: Sequence[jax.Array],
    stacks: Sequence[Stack],
    places: Mapping[Hashable, jax.Array],
) -> list[jax.Array]:
    """Apply a function to the matrices of blocks, kind by kind."""
    new = list(blocks)
    for kind in dict.fromkeys(stack.kind for stack in stacks):

        def of_block(block: jax.Array, kind: Kind = kind):
            return _of_whole(function, block, kind, places)

        positions = [n for n, stack in enumerate(stacks) if stack.kind == kind]
        matrices = [stacks[n].matrices(blocks[n]) for n in positions]
        together = jnp.concatenate(matrices)
        together = lax.map(of_block, together) if len(together) > 1 else of_block(together[0])[None]
        ends = [len(each) for each in matrices]
        parts = jnp.split(together, [sum(ends[:n]) for n in range(1, len(ends))])
        for position, part in zip(positions, parts, strict=True):
            new[position] = stacks[position].block(part)
    return new


def _of_whole(
    function: OfMatrix, block: jax.Array, kind: Kind, places: Mapping[Hashable, jax.Array]
) -> jax.Array:
    """A device's block of a function of the whole matrix."""
    for axis, names in kind.cut:
        block = lax.all_gather(block, names, axis=axis, tiled=True)
    whole = function(block, kind.numbers)
    mesh = jax.sharding.get_abstract_mesh()
    for axis, names in kind.cut:
        place = jnp.int32(0)
        for name in names:
            place = place * mesh.shape[name] + places[name][0]
        size = kind.shape[axis]
        whole = lax.dynamic_slice_in_dim(whole, place * size, size, axis)
    return whole
