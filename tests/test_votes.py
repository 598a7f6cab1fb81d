"""`majority_vote`: its state, its arguments, and signs and vote fused in one pass."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from workers import AXIS, auto_mesh, on_workers

import signax
from signax._transforms.memory import checked
from signax._workers.votes import make_vote, voted


def apply(tx, **extra):
    """One worker's update from a fresh state."""

    def update(updates, active=None):
        keywords = extra if active is None else {**extra, "active": active}
        return tx.update(updates, tx.init(updates), **keywords)[0]

    return update


@pytest.mark.parametrize("zeros", ["dither", "abstain", "plus"])
@pytest.mark.parametrize("num_workers", [1, 4, 5])
def test_a_vote_counts_its_steps(num_workers, zeros):
    tx = signax.majority_vote(AXIS, zeros=zeros)
    rng = np.random.default_rng(0)
    update = jax.jit(jax.vmap(tx.update, axis_name=AXIS))
    states = jax.vmap(lambda _: tx.init(None))(jnp.arange(num_workers))
    for step in range(20):
        rows = rng.choice([-1.0, 0.0, 1.0], size=(num_workers, 40)).astype(np.float32)
        decided, states = update(jnp.asarray(rows), states)
        expected = references.vote(rows, step, zeros)
        np.testing.assert_array_equal(decided, np.broadcast_to(expected, rows.shape))
    np.testing.assert_array_equal(states.count, 20)


@pytest.mark.parametrize("transport", ["packed", "gather", "sum"])
@pytest.mark.parametrize("num_workers", [1, 4, 5])
def test_a_vote_remembers_its_dither_while_workers_come_and_go(num_workers, transport):
    num_steps, rng = 40, np.random.default_rng(num_workers)
    tx = signax.majority_vote(AXIS, transport=transport)
    rows = rng.choice([-1.0, 0.0, 1.0], size=(num_steps, num_workers, 41)).astype(np.float32)
    rows[9, -1, 0] = np.nan
    active = rng.random((num_steps, num_workers)) > 0.2
    active[:3] = True
    update = jax.jit(jax.vmap(lambda g, s, a: tx.update(g, s, active=a), axis_name=AXIS))
    states = jax.vmap(lambda _: tx.init(None))(jnp.arange(num_workers))
    expected = references.votes(rows, active)
    for step in range(num_steps):
        decided, states = update(jnp.asarray(rows[step]), states, jnp.asarray(active[step]))
        np.testing.assert_array_equal(decided, np.broadcast_to(expected[step], rows[step].shape))


def test_active_reaches_a_vote_inside_a_chain():
    tx = optax.chain(optax.clip(1.0), signax.majority_vote(AXIS), optax.scale(2.0))
    rows = jnp.array([[1.0], [-1.0], [-1.0]])
    decided = on_workers("vmap", apply(tx), 3)(rows, jnp.array([True, False, False]))
    np.testing.assert_array_equal(decided, [2.0])


def test_partition_can_vote_on_some_leaves_and_average_others():
    tx = optax.partition(
        {"vote": signax.majority_vote(AXIS), "mean": signax.average_updates(AXIS)},
        {"kernel": "vote", "bias": "mean"},
    )
    rows = {"kernel": jnp.array([[1.0], [2.0], [-9.0]]), "bias": jnp.array([[1.0], [2.0], [-9.0]])}
    updates = on_workers("vmap", apply(tx), 3)(rows)
    np.testing.assert_array_equal(updates["kernel"], [1.0])
    np.testing.assert_array_equal(updates["bias"], [-2.0])


@pytest.mark.parametrize("make", [signax.majority_vote, signax.average_updates])
def test_rejects_updates_that_are_replicated_by_type(make, mesh):
    whole = jax.sharding.PartitionSpec()
    update = jax.shard_map(apply(make("data")), mesh=mesh, in_specs=whole, out_specs=whole)
    with pytest.raises(ValueError, match=r"updates\['w'\] does not vary over axis 'data'"):
        jax.eval_shape(update, {"w": jnp.ones(3)})


def test_names_the_leaf_that_differs_over_the_axis_of_a_split():
    """Leaves that are joined for the vote have one type, so they are checked before."""
    tx = signax.signum(0.1, axis_name="data", split_over="chip")
    specs = {"a": PartitionSpec("data"), "b": PartitionSpec(("data", "chip"))}
    mapped = jax.shard_map(
        apply(tx),
        mesh=auto_mesh({"data": 2, "chip": 2}),
        in_specs=(specs,),
        out_specs=PartitionSpec(),
    )
    with pytest.raises(ValueError, match=r"updates\['b'\] varies over split_over='chip'"):
        jax.eval_shape(mapped, {"a": jnp.ones(8), "b": jnp.ones(8)})


@pytest.mark.parametrize("option", ["zeros", "ties", "transport"])
def test_rejects_unknown_modes_at_construction(option):
    with pytest.raises(ValueError, match=f"{option}='often'"):
        signax.majority_vote(AXIS, **{option: "often"})


@pytest.mark.parametrize("make", [signax.majority_vote, signax.average_updates])
@pytest.mark.parametrize("axis_name", [None, (), ("data", None), ["data"]])
def test_rejects_an_invalid_axis_name(make, axis_name):
    with pytest.raises(TypeError, match="axis_name="):
        make(axis_name)


@pytest.mark.parametrize("make", [signax.majority_vote, signax.average_updates])
def test_workers_may_lie_along_several_axes(make):
    rows = jnp.array([[[1.0], [3.0], [5.0]], [[-9.0], [-9.0], [-9.0]]])
    update = jax.vmap(apply(make(("a", "b"))), axis_name="b")
    decided = jax.jit(jax.vmap(update, axis_name="a"))(rows)
    coin = np.asarray(references.vote(np.asarray(rows).reshape(6, 1), 0))
    expected = coin if make is signax.majority_vote else [-3.0]
    np.testing.assert_array_equal(decided, np.broadcast_to(expected, rows.shape))


# Signs and vote in one pass, as in the optimisers, against a chain of signs and vote.

# With these decays nothing is rounded: XLA may fuse a product and a sum, which rounds once less.
BAD = {1: -np.inf, 2: np.nan, 4: np.inf}  # one value of a worker's gradient at these steps


def momentum(**options):
    return signax.scale_by_signum(0.5, **options)


def lion_signs():
    return optax.scale_by_lion(0.5, 0.75)


SIGNS = {
    "sign_sgd": (checked(optax.scale_by_sign()), jnp.float32),
    "signum": (momentum(), jnp.float32),
    "signum nesterov": (momentum(nesterov=True), jnp.bfloat16),
    "signum warmup": (momentum(warmup=True), jnp.float32),
    "signum bf16": (momentum(accumulator_dtype=jnp.bfloat16), jnp.float32),
    "signum f32 for f16": (momentum(accumulator_dtype=jnp.float32), jnp.float16),
    "lion": (checked(lion_signs(), memory="mu"), jnp.float32),
}
LEAVES = {"blocks": (256, 128), "flat": (45, 367), "small": (3, 11), "scalar": ()}


def gradients_at(step, num_workers, dtype):
    """Small numbers, often 0, for every worker; at the steps in `BAD` one value is not finite."""
    rng = np.random.default_rng(step)
    rows = {
        name: rng.choice([-1.0, 0.0, 0.5, 1.0], size=(num_workers, *shape))
        for name, shape in LEAVES.items()
    }
    name = list(LEAVES)[step % len(LEAVES)]
    rows[name].reshape(num_workers, -1)[1, -1] = BAD.get(step, 1.0)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), rows)


def assert_bitwise_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, left), right in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        message = jax.tree_util.keystr(path)
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right), err_msg=message)


@pytest.mark.parametrize(
    ("name", "zeros"), [*((name, "dither") for name in SIGNS), ("signum", "abstain")]
)
def test_a_fused_vote_equals_signs_and_vote_in_a_chain(name, zeros):
    signs, dtype = SIGNS[name]
    num_workers = 3
    fused = voted(signs, make_vote(AXIS, zeros))
    chain = optax.chain(signax.hold_if_nonfinite(signs), signax.majority_vote(AXIS, zeros=zeros))
    params = jax.tree.map(lambda row: row[0], gradients_at(0, num_workers, dtype))
    states = [
        jax.tree.map(lambda leaf: jnp.stack([leaf] * num_workers), tx.init(params))
        for tx in (fused, chain)
    ]
    updates = [jax.jit(jax.vmap(tx.update, axis_name=AXIS)) for tx in (fused, chain)]
    for step in range(6):
        gradients = gradients_at(step, num_workers, dtype)
        (found, states[0]), (expected, states[1]) = (
            update(gradients, state) for update, state in zip(updates, states, strict=True)
        )
        assert_bitwise_equal(found, expected)
        assert_bitwise_equal(states[0], states[1])


@pytest.mark.parametrize(
    ("optimizer", "signs"),
    [
        (signax.sign_sgd(0.25, axis_name="data"), optax.scale_by_sign()),
        (signax.signum(0.25, 0.5, axis_name="data"), momentum()),
        (signax.lion(0.25, 0.5, 0.75, weight_decay=0.0, axis_name="data"), lion_signs()),
    ],
    ids=["sign_sgd", "signum", "lion"],
)
def test_an_optimizer_under_data_parallel_equals_the_chain(optimizer, signs):
    mesh = auto_mesh({"data": 4})
    chain = optax.chain(
        signax.hold_if_nonfinite(signs), signax.majority_vote("data"), optax.scale(-0.25)
    )
    params = jax.tree.map(lambda row: row[0], gradients_at(0, 4, jnp.float32))
    both = [signax.DataParallel(tx, mesh) for tx in (optimizer, chain)]
    states, updates = [tx.init(params) for tx in both], [jax.jit(tx.update) for tx in both]
    for step in range(6):
        gradients = gradients_at(step, 4, jnp.float32)
        (found, states[0]), (expected, states[1]) = (
            update(gradients, state, params) for update, state in zip(updates, states, strict=True)
        )
        assert_bitwise_equal(found, expected)
        # The optimiser's state nests a chain in a chain.
        assert_bitwise_equal(jax.tree.leaves(states[0]), jax.tree.leaves(states[1]))


# Shapes, dtypes and specs: runs of leaves that a vote joins, between leaves that stay alone.
MIXED = {
    "a": ((4, 3), jnp.float32, PartitionSpec("model")),
    "b": ((5,), jnp.float32, PartitionSpec()),
    "c": ((3, 2), jnp.bfloat16, PartitionSpec()),
    "d": ((), jnp.float32, PartitionSpec()),
    "e": ((0, 3), jnp.float32, PartitionSpec()),
    "f": ((6,), jnp.bfloat16, PartitionSpec("model")),
    "g": ((2, 2), jnp.bfloat16, PartitionSpec()),
}


def test_a_vote_joins_only_small_leaves_of_equal_dtypes_that_are_whole():
    """JAX would reject any other join, by strict promotion and by the types of Explicit axes."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    signum = signax.signum(1.0, 0.5, axis_name="data", zeros="plus", ties="plus")
    specs = {name: spec for name, (_, _, spec) in MIXED.items()}
    tx = signax.DataParallel(signum, mesh, param_specs=specs)
    update = jax.jit(jax.numpy_dtype_promotion("strict")(tx.update))
    params = {
        name: jax.device_put(jnp.zeros(shape, dtype), NamedSharding(mesh, spec))
        for name, (shape, dtype, spec) in MIXED.items()
    }
    state = tx.init(params)
    momenta = {name: np.zeros((2, *shape)) for name, (shape, _, _) in MIXED.items()}
    rng = np.random.default_rng(0)
    for step in range(2):
        rows = {name: rng.integers(-2, 3, m.shape).astype(float) for name, m in momenta.items()}
        voters = [0, 1]
        if step == 1:
            rows["g"][1, 0, 0], voters = np.nan, [0]
        gradients = {
            name: jax.device_put(
                jnp.asarray(row, MIXED[name][1]),
                NamedSharding(mesh, PartitionSpec("data", *specs[name])),
            )
            for name, row in rows.items()
        }
        updates, state = update(gradients, state, params)
        for name, row in rows.items():
            momentum = momenta[name]
            momentum[voters] = 0.5 * momentum[voters] + 0.5 * row[voters]
            ballots = np.where(momentum[voters] >= 0, 1, -1)
            expected = np.where(ballots.sum(axis=0) >= 0, -1, 1)
            assert updates[name].dtype == MIXED[name][1]
            np.testing.assert_array_equal(updates[name].astype(jnp.float32), expected)
    found = optax.tree.get(state, "momentum")
    for name, momentum in momenta.items():
        np.testing.assert_array_equal(found[name].astype(jnp.float32), momentum)


@pytest.mark.parametrize("agreement", [False, True])
def test_transports_of_a_fused_vote_agree_on_large_matrices(agreement):
    """An accelerator packs a momentum in slabs; a sum of integers has the matrix's own shape."""
    num_workers = 4
    rows = {"w": jax.random.normal(jax.random.key(0), (num_workers, 512, 256))}
    params = jax.tree.map(lambda row: row[0], rows)
    found = []
    for transport in ("packed", "sum"):
        tx = signax.signum(0.1, axis_name=AXIS, transport=transport, agreement=agreement)
        update = jax.jit(jax.vmap(tx.update, in_axes=(0, None), axis_name=AXIS))
        found.append(update(rows, tx.init(params)))
    assert_bitwise_equal(*found)
