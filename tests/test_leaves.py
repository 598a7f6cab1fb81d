"""Leaves of trees: whether all of them are finite."""

import jax
import jax.numpy as jnp
import pytest

from signax._core.leaves import all_finite


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_tree_is_finite_if_every_floating_leaf_is(dtype):
    good = {"a": jnp.ones(3, dtype), "n": jnp.arange(3), "e": jnp.ones((0, 2), dtype), "x": None}
    assert all_finite(good)
    assert all_finite({"n": jnp.arange(3)})
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        assert not all_finite({**good, "s": jnp.asarray(bad, dtype)})


def test_the_finiteness_check_grows_linearly_with_the_number_of_leaves():
    def held(tree):
        finite = all_finite(tree)
        return jax.tree.map(lambda leaf: jnp.where(finite, leaf + 1, leaf), tree)

    def length(leaves):
        tree = [jnp.ones(64) for _ in range(leaves)]
        return len(jax.jit(held).lower(tree).compile().as_text())

    assert length(64) < 6 * length(16)
