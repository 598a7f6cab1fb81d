"""Adversaries: each attack forges the updates of attackers, and passes on the others'."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from workers import AXIS, MAPS, auto_mesh, on_workers, rows_of_workers

import signax
from signax.testing import adversary

KEY = jax.random.key(7)


def random_rows(num_workers, dtype=jnp.float32):
    rng = np.random.default_rng(num_workers)
    shapes = {"kernel": (5, 3), "bias": (4,), "number": (), "none": (0, 2)}
    return {
        name: jnp.asarray(rng.standard_normal((num_workers, *shape)), dtype)
        for name, shape in shapes.items()
    }


def attacked(rows, workers, attack, kind="vmap", steps=1, key=KEY):
    """The updates that each worker passes on at the last step."""
    tx = adversary(AXIS, workers, attack, key)

    def send(updates):
        sent, state = updates, tx.init(updates)
        for _ in range(steps):
            sent, state = tx.update(updates, state)
        return sent

    return rows_of_workers(kind, send, len(rows["bias"]))(rows)


EXPECTED = {
    "invert": lambda leaf: -leaf,
    "zero": np.zeros_like,
    "nan": lambda leaf: np.full_like(leaf, np.nan),
    "inf": lambda leaf: np.full_like(leaf, np.inf),
    "scale": lambda leaf: np.float32(1e6) * leaf,
}


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("attack", EXPECTED)
def test_attackers_send_forged_updates_and_honest_workers_their_own(attack, kind):
    rows = random_rows(4)
    sent = attacked(rows, [1, 3], attack, kind)
    for name, leaf in rows.items():
        leaf = np.asarray(leaf)
        expected = leaf.copy()
        expected[[1, 3]] = EXPECTED[attack](leaf[[1, 3]])
        np.testing.assert_array_equal(sent[name], expected)


def test_without_attackers_nothing_changes():
    rows = random_rows(3)
    jax.tree.map(np.testing.assert_array_equal, attacked(rows, [], "nan"), rows)


@pytest.mark.parametrize("kind", MAPS)
def test_random_updates_keep_the_size_and_differ_by_worker_step_and_key(kind):
    rows = {"bias": jnp.asarray(np.random.default_rng(0).standard_normal((4, 5000)))}
    first = np.asarray(attacked(rows, [0, 2], "random", kind)["bias"])
    np.testing.assert_array_equal(first[[1, 3]], rows["bias"][jnp.array([1, 3])])
    for worker in 0, 2:
        sizes = [np.sqrt(np.mean(np.square(row))) for row in (first[worker], rows["bias"][worker])]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.05)
        assert abs(np.corrcoef(first[worker], rows["bias"][worker])[0, 1]) < 0.06
    again = attacked(rows, [0, 2], "random", kind)["bias"]
    np.testing.assert_array_equal(again, first)
    later = np.asarray(attacked(rows, [0, 2], "random", kind, steps=2)["bias"])
    other = attacked(rows, [0, 2], "random", kind, key=jax.random.key(8))["bias"]
    drawn = [first[0], first[2], later[0], later[2], np.asarray(other)[0]]
    assert np.all(np.abs(np.corrcoef(drawn) - np.eye(5)) < 0.06)


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize(("num_workers", "attackers"), [(8, [0, 4, 5]), (4, [0, 1]), (5, [4])])
def test_colluders_vote_against_the_honest_majority(kind, num_workers, attackers):
    rows = random_rows(num_workers)
    tx = optax.chain(adversary(AXIS, attackers, "collude"), signax.majority_vote(AXIS))
    voted = on_workers(kind, lambda g: tx.update(g, tx.init(g))[0], num_workers)(rows)
    sent = attacked(rows, attackers, "collude", kind, key=None)
    for name in "kernel", "bias", "number":
        honest = np.delete(np.sign(rows[name]), attackers, axis=0).sum(axis=0)
        against = np.where(honest > 0, -1, 1)
        for worker in attackers:
            np.testing.assert_array_equal(sent[name][worker], against)
        total = honest + len(attackers) * against
        decided = total != 0
        np.testing.assert_array_equal(np.asarray(voted[name])[decided], np.sign(total)[decided])


def test_an_attack_function_gets_a_key_for_each_worker():
    def multiply(updates, key):
        leaves, structure = jax.tree.flatten(updates)
        return structure.unflatten(leaf * jax.random.normal(key, leaf.shape) for leaf in leaves)

    rows = {"bias": jnp.ones((3, 1000))}
    sent = np.asarray(attacked(rows, [0, 1], multiply)["bias"])
    np.testing.assert_array_equal(sent[2], 1)
    assert abs(sent[0].mean()) < 0.1
    assert abs(np.corrcoef(sent[:2])[0, 1]) < 0.1


def test_results_of_an_attack_function_are_cast_but_not_broadcast():
    rows = random_rows(3, jnp.bfloat16)

    def in_f32(updates, key):
        del key
        return jax.tree.map(lambda leaf: 2 * leaf.astype(jnp.float32), updates)

    sent = attacked(rows, [1], in_f32)
    for name, leaf in rows.items():
        expected = leaf.at[1].multiply(2)
        np.testing.assert_array_equal(sent[name], expected, strict=True)
    with pytest.raises(ValueError, match=r"attack's result.* has shape \(\)"):
        attacked(rows, [1], lambda updates, key: jax.tree.map(jnp.sum, updates))
    with pytest.raises(ValueError, match="attack's result and updates differ in structure"):
        attacked(rows, [1], lambda updates, key: list(updates.values()))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("attack", ["random", "scale", "collude", "inf"])
def test_attacks_keep_dtypes(attack, dtype):
    rows = random_rows(3, dtype)
    sent = attacked(rows, [1], attack)
    assert jax.tree.map(lambda leaf: leaf.dtype, sent) == dict.fromkeys(rows, dtype)
    if attack != "inf":
        assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in sent.values())


def test_votes_under_attack_keep_replicas_equal():
    tx = optax.chain(
        adversary("data", [1, 2, 6], "random", KEY), signax.signum(0.1, axis_name="data")
    )
    parallel = signax.DataParallel(tx, auto_mesh({"data": 8}))
    rows = random_rows(8)
    params = jax.tree.map(lambda leaf: leaf[0], rows)
    updates, state = jax.jit(parallel.update)(rows, parallel.init(params), params)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(updates))
    key = optax.tree.get(state, "key")
    assert key.shape == ()  # shared by all workers


def test_indices_may_be_an_array():
    rows = jnp.ones((4, 2))
    for workers in (jnp.array([1, 3]), np.array([1, 3])):
        tx = adversary(AXIS, workers, "zero")
        found = rows_of_workers("vmap", lambda g, tx=tx: tx.update(g, tx.init(g))[0], 4)(rows)
        np.testing.assert_array_equal(found, [[1, 1], [0, 0], [1, 1], [0, 0]])


def test_rejects_invalid_arguments():
    with pytest.raises(ValueError, match="attack='lie' is unknown: use one of 'invert'"):
        adversary(AXIS, [0], "lie")
    with pytest.raises(ValueError, match=r"workers=\[0, 0\] must be different indices"):
        adversary(AXIS, [0, 0], "invert")
    with pytest.raises(ValueError, match=r"workers=\[-1\]"):
        adversary(AXIS, [-1], "invert")
    for workers in (2, [0.5], "0", [None]):
        with pytest.raises(TypeError, match=r"workers=.* must be a list of indices, such as"):
            adversary(AXIS, workers, "invert")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="key=None is no random key, which attack='random' needs"):
        adversary(AXIS, [0], "random")
    with pytest.raises(TypeError, match="key=3"):
        adversary(AXIS, [0], "random", 3)
    with pytest.raises(TypeError, match="axis_name=None"):
        adversary(None, [0], "invert")
    with pytest.raises(ValueError, match=r"workers=\[3\] names one beyond the 3 of the axis"):
        attacked(random_rows(3), [3], "invert")
    with pytest.raises(TypeError, match="dtype int32"):
        attacked({"bias": jnp.ones((2, 3), jnp.int32)}, [0], "invert")
    tx = adversary(AXIS, [0], "invert")
    with pytest.raises(NameError, match="axis_name='workers' is not bound"):
        tx.update(jnp.ones(3), tx.init(jnp.ones(3)))


@pytest.mark.parametrize(
    ("dtype", "size"), [("float32", 1e30), ("float32", 1e-30), ("float16", 1.5e4)]
)
def test_random_updates_keep_the_size_where_squares_overflow(dtype, size):
    attack = signax.testing.adversary(AXIS, [0], "random", jax.random.key(0))
    updates = jnp.full((1, 400), size, dtype)
    forged = jax.vmap(lambda g: attack.update(g, attack.init(g))[0], axis_name=AXIS)(updates)
    noise = np.asarray(forged, np.float64) / size
    assert np.isfinite(noise).all()
    assert 0.8 < np.sqrt((noise**2).mean()) < 1.1
