"""Trees as bytes, for snapshots: their leaves, one after the other."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def tree_to_bytes(tree: Any) -> memoryview:
    """The bytes of all leaves, end to end."""
    leaves = jax.device_get([*map(_data_of, jax.tree.leaves(tree))])
    return memoryview(b"".join([np.asarray(leaf).tobytes() for leaf in leaves]))


def tree_from_bytes(payload: memoryview, like: Any) -> Any:
    """Invert `tree_to_bytes` for a tree like another one."""
    leaves, structure = jax.tree.flatten(like)
    likes = [*map(_data_of, leaves)]
    size = sum([one.nbytes for one in likes])
    if size != len(payload):
        raise ValueError(
            f"the snapshot has {len(payload)} bytes, and parameters and state have {size}: all "
            "jobs must have the same optimiser"
        )
    found, start = [], 0
    for leaf, one in zip(leaves, likes, strict=True):
        numbers = np.frombuffer(payload[start : start + one.nbytes], one.dtype).reshape(one.shape)
        array = jax.device_put(numbers, one.sharding)
        found.append(_as_key(array, leaf) if _is_key(jnp.asarray(leaf)) else array)
        start += one.nbytes
    return structure.unflatten(found)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _data_of(leaf: Any) -> jax.Array:
    """A leaf as an array of numbers: the bits of a typed key, otherwise the leaf."""
    leaf = jnp.asarray(leaf)
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _as_key(data: jax.Array, like: Any) -> jax.Array:
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(like))
