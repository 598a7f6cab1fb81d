"""Meshes of workers, and maps of a worker's function over M workers in each of JAX's ways."""

import math

import jax
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from signax import diagnostics

AXIS = "workers"
MAPS = ("shard_map", "pmap", "vmap")


def auto_mesh(sizes):
    """A mesh of Auto axes with the given sizes, on the first devices."""
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=jax.devices()[: math.prod(sizes.values())],
    )


def on_workers(kind, function, num_workers):
    """Map a function of one worker's values to a function of rows, with one shared result.

    Under `shard_map` JAX's types prove that all workers have an equal result. Other maps compare
    the rows.
    """
    if kind == "shard_map":
        mesh = auto_mesh({AXIS: num_workers})

        def local(*rows):
            return function(*jax.tree.map(lambda row: row[0], rows))

        split, whole = PartitionSpec(AXIS), PartitionSpec()
        return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=split, out_specs=whole))

    mapped = rows_of_workers(kind, function, num_workers)

    def shared(*rows):
        return jax.tree.map(one_of_equals, mapped(*rows))

    return shared


def rows_of_workers(kind, function, num_workers):
    """Map a function of one worker's values to a function of rows, with one row per worker."""
    if kind == "shard_map":

        def local(*rows):
            result = function(*jax.tree.map(lambda row: row[0], rows))
            return jax.tree.map(lambda part: part[None], result)

        split = PartitionSpec(AXIS)
        mesh = auto_mesh({AXIS: num_workers})
        return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=split, out_specs=split))
    if kind == "pmap":
        return jax.pmap(function, axis_name=AXIS, devices=jax.devices()[:num_workers])
    return jax.jit(jax.vmap(function, axis_name=AXIS))


def one_of_equals(rows):
    numbers = np.asarray(rows)
    np.testing.assert_array_equal(numbers, np.broadcast_to(numbers[:1], numbers.shape))
    return numbers[0]


def assert_same_on_all_devices(tree, num_devices=8):
    """Assert that the devices' copies of every array are equal bit for bit."""
    for leaf in jax.tree.leaves(tree):
        shards = leaf.addressable_shards
        assert len(shards) == num_devices
        assert len({np.asarray(shard.data).tobytes() for shard in shards}) == 1


def large_floating(compiled, elements=8):
    """A compiled program's collectives with more than `elements` floating-point elements."""
    return [
        record
        for record in diagnostics.collectives(compiled)
        if record.is_floating and record.elements > elements
    ]
