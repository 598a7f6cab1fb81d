"""Runs a function on M workers under each of JAX's ways to map one."""

import math

import jax
import numpy as np
from jax.sharding import AxisType, PartitionSpec

AXIS = "workers"
MAPS = ("shard_map", "pmap", "vmap")


def auto_mesh(sizes):
    """A mesh of axes of type Auto, from a dict of their sizes, on the first devices."""
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=jax.devices()[: math.prod(sizes.values())],
    )


def on_workers(kind, function, num_workers):
    """`function` of one worker's values, as a function of rows to one result that all share.

    Under `shard_map` JAX's types prove that it is shared, otherwise the rows are compared.
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
    """`function` of one worker's values, as a function of rows to one row for each worker."""
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
