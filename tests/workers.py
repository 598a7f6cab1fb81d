"""Runs a function on M workers under each of JAX's ways to map one."""

import jax
import numpy as np
from jax.sharding import AxisType, PartitionSpec

AXIS = "workers"
MAPS = ("shard_map", "pmap", "vmap")


def on_workers(kind, function, num_workers):
    """`function` of one worker's values, as a function of rows to one result that all share.

    Under `shard_map` JAX's types prove that it is shared, otherwise the rows are compared.
    """
    if kind == "shard_map":
        mesh = jax.make_mesh(
            (num_workers,),
            (AXIS,),
            axis_types=(AxisType.Auto,),
            devices=jax.devices()[:num_workers],
        )

        def local(*rows):
            return function(*jax.tree.map(lambda row: row[0], rows))

        split, whole = PartitionSpec(AXIS), PartitionSpec()
        return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=split, out_specs=whole))

    if kind == "pmap":
        mapped = jax.pmap(function, axis_name=AXIS, devices=jax.devices()[:num_workers])
    else:
        mapped = jax.jit(jax.vmap(function, axis_name=AXIS))

    def shared(*rows):
        return jax.tree.map(one_of_equals, mapped(*rows))

    return shared


def one_of_equals(rows):
    numbers = np.asarray(rows)
    np.testing.assert_array_equal(numbers, np.broadcast_to(numbers[:1], numbers.shape))
    return numbers[0]
