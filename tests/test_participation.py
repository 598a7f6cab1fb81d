"""Participation: the same in every vote and mean of a step, and kept in their states."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from workers import AXIS, auto_mesh, rows_of_workers

import signax
from signax import diagnostics

PARAMS = {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(5), "scale": jnp.zeros(2)}
MEANS = {
    "vote": lambda: signax.majority_vote("data"),
    "gather": lambda: signax.majority_vote("data", transport="gather"),
    "packed": lambda: signax.majority_vote("data", transport="packed"),
    "sum": lambda: signax.majority_vote("data", transport="sum"),
    "abstain": lambda: signax.majority_vote("data", zeros="abstain"),
    "mean of signs": lambda: signax.mean_signs("data"),
    "both memories": lambda: signax.mean_scaled_signs("data"),
    "no memory": lambda: signax.mean_scaled_signs("data", feedback="none"),
    "mean": lambda: signax.average_updates("data"),
}


def random_rows(num_workers, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.standard_normal((num_workers, *leaf.shape)).astype(np.float32), PARAMS
    )


def partitioned(kernel, others):
    """Two groups, of one leaf and of two."""
    labels = {"kernel": "kernel", "bias": "others", "scale": "others"}
    return optax.partition({"kernel": kernel, "others": others}, labels)


@pytest.mark.parametrize(
    ("before", "voters"),
    [
        (optax.identity(), 2),
        (optax.clip(1.0), 3),  # the vote sees 1 instead of infinity
        (signax.hold_if_nonfinite(optax.clip(1.0)), 2),
    ],
    ids=["unchanged", "clipped", "held"],
)
def test_a_vote_excludes_workers_by_the_values_that_reach_it(before, voters):
    tx = signax.leave_out_nonfinite(optax.chain(before, signax.majority_vote(AXIS)))
    rows = jnp.array([[1.0, 2.0], [-1.0, 3.0], [jnp.inf, 1.0]])
    _, state = rows_of_workers("vmap", lambda g: tx.update(g, tx.init(g)), 3)(rows)
    np.testing.assert_array_equal(optax.tree.get(state, "voters"), voters)


@pytest.mark.parametrize("name", MEANS)
def test_voters_and_missed_steps_are_in_the_state(name):
    num_workers, steps = 5, 7
    tx = signax.DataParallel(MEANS[name](), auto_mesh({"data": num_workers}))
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    rng = np.random.default_rng(3)
    finite, active = rng.random((2, steps, num_workers)) > 0.3
    active[4] = False
    missed = np.zeros(num_workers, int)
    assert optax.tree.get(state, "voters") == 0
    for t in range(steps):
        rows = random_rows(num_workers, t)
        rows["bias"][~finite[t], 2] = [np.nan, np.inf, -np.inf][t % 3]
        updates, state = update(rows, state, PARAMS, active=jnp.asarray(active[t]))
        votes = finite[t] & active[t]
        missed += ~votes
        voters = optax.tree.get(state, "voters")
        assert voters == votes.sum()
        assert voters.shape == ()  # shared by all workers, as types prove
        np.testing.assert_array_equal(optax.tree.get(state, "missed"), missed)
        moved = any(np.any(leaf) for leaf in jax.tree.leaves(updates))
        assert moved == (voters > 0)


@pytest.mark.parametrize("leaf", PARAMS)
@pytest.mark.parametrize("kernel", ["vote", "sum", "both memories", "mean of signs"])
def test_a_worker_excluded_from_one_group_is_excluded_from_all(leaf, kernel):
    num_workers = 3
    tx = partitioned(MEANS[kernel](), MEANS["mean"]())
    parallel = signax.DataParallel(tx, auto_mesh({"data": num_workers}))
    rows, active = random_rows(num_workers), jnp.array([True, False, True])
    expected, expected_state = jax.jit(parallel.update)(
        rows, parallel.init(PARAMS), PARAMS, active=active
    )
    rows[leaf][1].flat[0] = np.inf
    found, state = jax.jit(parallel.update)(rows, parallel.init(PARAMS), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    jax.tree.map(np.testing.assert_array_equal, state, expected_state)
    for field, value in [("voters", 2), ("missed", [0, 1, 0])]:
        kept = [found for _, found in optax.tree.get_all_with_path(state, field)]
        assert len(kept) == 2
        for each in kept:
            np.testing.assert_array_equal(each, value)


@pytest.mark.parametrize("kind", ["shard_map", "vmap"])
def test_leave_out_nonfinite_excludes_a_worker_from_all_groups(kind):
    others = optax.chain(optax.clip_by_global_norm(1.0), signax.average_updates(AXIS))
    tx = partitioned(signax.majority_vote(AXIS), others)
    rows = jax.tree.map(lambda leaf: np.ones((4, *leaf.shape), np.float32), PARAMS)
    for leaf in rows.values():
        leaf[2:] = -1  # two against two, or two against one
    rows["bias"][2, 0] = np.nan

    def update(tx):
        return rows_of_workers(kind, lambda g: tx.update(g, tx.init(g))[0], 4)(rows)["kernel"]

    assert np.all(update(signax.leave_out_nonfinite(tx)) == 1)
    assert not np.all(update(tx) == 1)  # otherwise the worker votes


def test_masked_extra_arguments_hide_no_updates():
    def masked(tx, *names):
        mask = {name: name in names for name in PARAMS}
        return optax.masked(tx, mask, mask_compatible_extra_args=True)

    vote, mean = signax.majority_vote(AXIS), signax.average_updates(AXIS)
    inner = optax.chain(masked(vote, "kernel"), masked(mean, "bias", "scale"))
    tx = signax.leave_out_nonfinite(inner)
    rows = random_rows(3)
    rows["bias"][1, 0] = np.nan
    state = rows_of_workers("vmap", lambda g: tx.update(g, tx.init(g))[1], 3)(rows)
    found = optax.tree.get_all_with_path(state, "voters")
    assert len(found) == 2
    for _, voters in found:
        np.testing.assert_array_equal(voters, 2)


def test_a_vote_on_a_flattened_tree_checks_all_raw_updates():
    tx = optax.flatten(optax.chain(optax.identity(), signax.majority_vote(AXIS)))
    masked = optax.masked(tx, {"kernel": True, "bias": False, "scale": False})
    rows = random_rows(3)
    rows["scale"][0, 1] = np.nan

    def update(g):
        tx = signax.leave_out_nonfinite(masked)
        return tx.update(g, tx.init(g))[1]

    state = rows_of_workers("vmap", update, 3)(rows)
    np.testing.assert_array_equal(optax.tree.get(state, "missed"), [1, 0, 0])


def test_leave_out_nonfinite_passes_an_extra_argument_named_raw_on():
    def add_raw(updates, state, params=None, *, raw, **extra_args):
        del params, extra_args
        return jax.tree.map(lambda u: u + raw, updates), state

    shift = optax.GradientTransformationExtraArgs(optax.init_empty_state, add_raw)
    tx = signax.leave_out_nonfinite(optax.chain(signax.majority_vote(AXIS), shift))

    def update(g):
        return tx.update(g, tx.init(g), raw=jnp.float32(10.0))[0]

    rows = jnp.array([[1.0, -1.0], [2.0, -3.0], [jnp.nan, 5.0]])
    np.testing.assert_array_equal(rows_of_workers("vmap", update, 3)(rows), [[11.0, 9.0]] * 3)


# Reading it from a state.


def test_participation_of_one_vote_is_read_from_the_state():
    tx = signax.DataParallel(signax.signum(0.1, axis_name="data"), auto_mesh({"data": 3}))
    state = tx.init(PARAMS)
    assert signax.participation(state).voters == 0
    _, state = jax.jit(tx.update)(
        random_rows(3), state, PARAMS, active=jnp.array([True, False, True])
    )
    found = signax.participation(state)
    assert found.voters == optax.tree.get(state, "voters") == 2
    np.testing.assert_array_equal(found.missed, [0, 1, 0])


def test_participation_of_a_partition_is_read_from_the_state():
    """`optax.tree.get` finds several numbers of voters, and raises."""
    tx = partitioned(signax.majority_vote("data"), signax.average_updates("data"))
    parallel = signax.DataParallel(tx, auto_mesh({"data": 3}))
    rows = random_rows(3)
    rows["scale"][2, 1] = np.nan
    _, state = jax.jit(parallel.update)(rows, parallel.init(PARAMS), PARAMS)
    with pytest.raises(KeyError, match="voters"):
        optax.tree.get(state, "voters")
    found = signax.participation(state)
    assert found.voters == 2
    np.testing.assert_array_equal(found.missed, [0, 0, 1])


def test_participation_of_disagreeing_votes_has_the_fewest_voters_and_the_most_missed_steps():
    # Without leave_out_nonfinite the vote on the kernel does not see the NaN in the bias.
    tx = partitioned(signax.majority_vote(AXIS), signax.average_updates(AXIS))
    rows = random_rows(3)
    rows["bias"][1, 0] = np.nan
    state = rows_of_workers("vmap", lambda g: tx.update(g, tx.init(g))[1], 3)(rows)
    voters = [int(found[0]) for _, found in optax.tree.get_all_with_path(state, "voters")]
    assert sorted(voters) == [2, 3]
    found = signax.participation(state)
    np.testing.assert_array_equal(found.voters, [2, 2, 2])
    np.testing.assert_array_equal(found.missed, [0, 1, 0])


@pytest.mark.parametrize("tx", [optax.adam(0.1), signax.signum(0.1)], ids=["adam", "no axis"])
def test_participation_rejects_a_state_without_votes(tx):
    with pytest.raises(ValueError, match=r"state holds no vote.*signax\.majority_vote.*axis_name="):
        signax.participation(tx.init(PARAMS))


# The cost.


def test_groups_need_no_extra_collective_to_agree_on_participants():
    tx = partitioned(MEANS["packed"](), MEANS["mean"]())
    parallel = signax.DataParallel(tx, auto_mesh({"data": 4}))
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, random_rows(4)))
    state = jax.eval_shape(parallel.init, PARAMS)
    program = jax.jit(parallel.update).lower(shapes, state, PARAMS).compile()
    found = sorted(record.operation for record in diagnostics.collectives(program))
    assert sorted(set(found)) == ["all-gather", "all-reduce", "all-to-all"]
    assert found.count("all-gather") == found.count("all-to-all") == 1


def test_one_vote_on_all_leaves_checks_finiteness_once():
    tx = signax.DataParallel(signax.majority_vote("data"), auto_mesh({"data": 2}))
    bare = jax.make_jaxpr(tx.update)(random_rows(2), tx.init(PARAMS), PARAMS)
    groups = signax.DataParallel(
        partitioned(MEANS["vote"](), MEANS["vote"]()), auto_mesh({"data": 2})
    )
    both = jax.make_jaxpr(groups.update)(random_rows(2), groups.init(PARAMS), PARAMS)
    assert str(bare).count(" is_finite ") < str(both).count(" is_finite ")
    vote = jax.vmap(lambda row: signax.pvote(row, AXIS, step=0), axis_name=AXIS)
    alone = jax.make_jaxpr(vote)(random_rows(2))
    assert str(bare).count(" is_finite ") == str(alone).count(" is_finite ") > 0


def test_a_loss_scale_can_follow_the_number_of_voters():
    """Half precision: unscale gradients before the vote, and halve the scale after an overflow."""
    num_workers = 4
    target = jnp.linspace(-1, 1, 6)
    tx = signax.DataParallel(signax.signum(0.05, 0.5, axis_name="data"), auto_mesh({"data": 4}))

    def loss_fn(params, noise, scale):
        error = params["x"] - target + noise.mean(axis=0)
        # The gradient is f16 on its way back through the scaled loss.
        return (jnp.sum(error.astype(jnp.float16) ** 2) * scale.astype(jnp.float16)).astype(
            jnp.float32
        )

    gradient = tx.value_and_grad(loss_fn)

    @jax.jit
    def step(params, state, noise, scale):
        _, grads = gradient(params, noise, scale)
        grads = jax.tree.map(lambda g: g / scale, grads)
        updates, state = tx.update(grads, state, params)
        overflowed = optax.tree.get(state, "voters") < num_workers
        return (
            optax.apply_updates(params, updates),
            state,
            jnp.where(overflowed, scale / 2, scale),
        )

    params = {"x": jnp.zeros(6)}
    state, scale = tx.init(params), jnp.float32(2.0**15)
    rng, scales = np.random.default_rng(0), []
    for _ in range(60):
        noise = 0.3 * rng.standard_normal((num_workers, 6)).astype(np.float32)
        params, state, scale = step(params, state, noise, scale)
        scales.append(float(scale))
    assert 2.0 < scales[-1] == scales[-20] < 2.0**15  # the scale has settled
    np.testing.assert_allclose(params["x"], target, atol=0.25)  # within a few steps
    assert np.all(np.isfinite(optax.tree.get(state, "momentum")["x"]))
    assert np.sum(optax.tree.get(state, "missed")) > 0


REMEMBERING = {
    "signum": lambda: signax.signum(0.1, axis_name="data"),
    "error feedback": lambda: signax.ef_sign_sgd(0.1, momentum=0.9, axis_name="data"),
    "ssdm": lambda: signax.ssdm(0.1, key=jax.random.key(0), axis_name="data"),
    "chain": lambda: optax.chain(
        signax.hold_if_nonfinite(signax.scale_by_signum()), signax.majority_vote("data")
    ),
}


@pytest.mark.parametrize("name", REMEMBERING)
def test_a_nonfinite_leaf_of_another_group_leaves_momenta_and_memories_unchanged(name):
    num_workers = 3
    tx = partitioned(REMEMBERING[name](), MEANS["mean"]())
    parallel = signax.DataParallel(tx, auto_mesh({"data": num_workers}))
    update, state = jax.jit(parallel.update), parallel.init(PARAMS)
    before = state
    for t in range(2):
        before, rows = state, random_rows(num_workers, t)
        rows["bias"][1, 4] = np.nan
        _, state = update(rows, state, PARAMS)
    own = jax.tree.map(lambda leaf: leaf.ndim > 1 and leaf.shape[1:] == (4, 3), state)
    assert any(jax.tree.leaves(own))
    for old, new, is_own in zip(*map(jax.tree.leaves, (before, state, own)), strict=True):
        if is_own:
            np.testing.assert_array_equal(new[1], 0)
            assert np.all(np.any(new[::2] != old[::2], axis=(1, 2)))


@pytest.mark.parametrize(
    ("optimizer", "momentum"),
    [
        (signax.signum(0.1, axis_name="data"), "momentum"),
        (signax.lion(0.1, axis_name="data"), "mu"),
        (signax.ef_sign_sgd(0.1, 0.9, axis_name="data"), "trace"),
        (signax.ssdm(0.1, jax.random.key(0), axis_name="data"), "ema"),
    ],
    ids=["signum", "lion", "ef_sign_sgd", "ssdm"],
)
def test_an_inactive_worker_keeps_updating_its_momentum(optimizer, momentum):
    tx = signax.DataParallel(optimizer, auto_mesh({"data": 2}))
    flags = jnp.array([True, False])
    _, state = jax.jit(tx.update)(random_rows(2), tx.init(PARAMS), PARAMS, active=flags)
    leaves = jax.tree.leaves(optax.tree.get(state, momentum))
    assert len(leaves) == 3
    for leaf in leaves:
        assert leaf.shape[0] == 2
        assert np.all(np.asarray(leaf))


@pytest.mark.parametrize("name", [name for name in MEANS if name != "both memories"])
def test_one_nonfinite_block_of_a_sharded_leaf_excludes_its_worker(name):
    """The result equals an inactive worker's. Only one device of the worker holds the NaN."""
    mesh = auto_mesh({"data": 3, "model": 2})
    specs = {"kernel": PartitionSpec("model"), "bias": PartitionSpec(), "scale": PartitionSpec()}
    tx = signax.DataParallel(MEANS[name](), mesh, param_specs=specs)
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    rows = random_rows(3)
    expected, _ = update(rows, state, PARAMS, active=jnp.array([True, False, True]))
    rows["kernel"][1, 3, 0] = np.nan
    updates, after = update(rows, state, PARAMS)
    assert optax.tree.get(after, "voters") == 2
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    for leaf in jax.tree.leaves(after):
        assert np.isfinite(np.asarray(leaf, np.float64)).all()
