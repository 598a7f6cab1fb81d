"""Old spellings of names and options warn, and work like the new spellings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from workers import AXIS, rows_of_workers

import signax

KEY = jax.random.key(0)
ROWS = jnp.array([[1.0, -2.0, 0.0], [3.0, -1.0, 0.0], [-2.0, 4.0, 0.0]])


def two_updates(tx):
    """The updates and the state after two steps of one worker."""
    first, second = (jnp.array(row, jnp.float32) for row in ([1.0, -2.0], [-9.0, 0.5]))
    params = jnp.ones(2)
    _, state = tx.update(first, tx.init(params), params)
    return tx.update(second, state, params)


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert left.dtype == right.dtype
        if jnp.issubdtype(left.dtype, jax.dtypes.prng_key):
            left, right = jax.random.key_data(left), jax.random.key_data(right)
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(
    ("make", "old", "new", "value"),
    [
        (lambda **options: signax.signum(0.1, **options), "b1", "beta", 0.8),
        (lambda **options: signax.ssdm(0.1, KEY, **options), "b1", "beta", 0.8),
        (signax.scale_by_signum, "b1", "beta", 0.8),
        (
            lambda **options: signax.lion(0.1, **options),
            "accumulator_dtype",
            "mu_dtype",
            "bfloat16",
        ),
    ],
    ids=["signum", "ssdm", "scale_by_signum", "lion"],
)
def test_an_old_argument_warns_and_equals_the_new_argument(make, old, new, value):
    with pytest.warns(DeprecationWarning, match=rf"\({old}=\.\.\.\) is deprecated: use {new}="):
        tx = make(**{old: value})
    assert_equal(two_updates(tx), two_updates(make(**{new: value})))


def test_an_old_argument_beside_the_new_one_is_an_error():
    with pytest.raises(ValueError, match=r"b1=0\.5 and beta=0\.9 are one option"):
        signax.signum(0.1, b1=0.5, beta=0.9)  # pyright: ignore[reportCallIssue]


def voted(**options):
    tx = signax.majority_vote(AXIS, **options)
    return rows_of_workers("vmap", lambda g: tx.update(g, tx.init(g))[0], 3)(ROWS)


def signum_voted(**options):
    tx = signax.signum(0.1, axis_name=AXIS, **options)
    return rows_of_workers("vmap", lambda g: tx.update(g, tx.init(g))[0], 3)(ROWS)


def pvoted(**options):
    return rows_of_workers("vmap", lambda g: signax.pvote(g, AXIS, step=0, **options), 3)(ROWS)


@pytest.mark.parametrize("vote", [voted, signum_voted, pvoted])
def test_the_int8_transport_warns_and_equals_sum(vote):
    with pytest.warns(DeprecationWarning, match="transport='int8' is deprecated.*use 'sum'"):
        found = vote(transport="int8")
    np.testing.assert_array_equal(found, vote(transport="sum"))


def test_adversaries_warns_and_is_testing():
    with pytest.warns(
        DeprecationWarning, match=r"signax\.adversaries is deprecated: use signax\.t"
    ):
        module = signax.adversaries
    assert module is signax.testing


def test_an_unknown_attribute_is_an_error():
    with pytest.raises(AttributeError, match="module 'signax' has no attribute 'nothing'"):
        _ = signax.nothing
