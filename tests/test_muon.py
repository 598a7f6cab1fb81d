"""Muon by majority vote against NumPy, against Optax's Muon, and on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers
from workers import AXIS, auto_mesh

import signax
from signax import diagnostics

STEPS = 6


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def along(tx, gradients, params=None):
    """The updates along given gradients, [T, ...]."""
    like = jax.tree.map(lambda rows: jnp.zeros(rows.shape[1:], rows.dtype), gradients)
    params = like if params is None else params

    def step(state, gradient):
        updates, state = tx.update(gradient, state, params)
        return state, updates

    return jax.lax.scan(step, tx.init(params), gradients)[1]


def voted(tx, gradients):
    """The common updates of M workers along gradients [T, M, ...], by vmap."""
    rows = jax.vmap(lambda own: along(tx, own), in_axes=1, out_axes=1, axis_name=AXIS)(gradients)
    for leaf in jax.tree.leaves(rows):
        np.testing.assert_array_equal(leaf, jnp.broadcast_to(leaf[:, :1], leaf.shape))
    return jax.tree.map(lambda leaf: leaf[:, 0], rows)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("num_workers", [1, 2, 3, 5])
def test_steps_follow_the_majority_of_polar_factors_signs(num_workers, nesterov):
    matrices = normal((STEPS, num_workers, 4, 6), seed=num_workers)
    vectors = normal((STEPS, num_workers, 7), seed=10 + num_workers)
    tx = signax.muon(
        0.5,
        0.8,
        nesterov=nesterov,
        consistent_rms=0.25,
        others_rms=0.125,
        others=optax.scale_by_lion(0.6, 0.9),
        axis_name=AXIS,
    )
    found = voted(tx, {"w": jnp.asarray(matrices), "b": jnp.asarray(vectors)})

    own = [references.muon(m, 0.8, nesterov) for m in matrices.astype(float).swapaxes(0, 1)]
    lion = [references.lion(v, 0.6, 0.9) for v in vectors.astype(float).swapaxes(0, 1)]
    assert np.abs(own).min() > 1e-4  # no sign is in doubt
    for step in range(STEPS):
        directions = [
            np.concatenate([vector[step], matrix[step].ravel()])
            for vector, matrix in zip(lion, own, strict=True)
        ]
        leaves = np.split(np.array(directions), [7], axis=1)  # coins count within a leaf
        b, w = (references.vote(leaf, step=step) for leaf in leaves)
        np.testing.assert_array_equal(found["b"][step], -0.5 * 0.125 * b)
        np.testing.assert_array_equal(found["w"][step].ravel(), -0.5 * 0.25 * w)


def test_orthogonalized_votes_are_the_polar_factor_of_the_majoritys_signs():
    gradients = jnp.asarray(normal((STEPS, 3, 4, 6)))
    signs = voted(signax.muon(1.0, axis_name=AXIS, consistent_rms=1.0), gradients)
    options = {"axis_name": AXIS, "consistent_rms": 0.5, "after_vote": "orthogonalize"}
    found = voted(signax.muon(1.0, **options), gradients)
    expected = [0.5 * references.polar(np.float64(sign)) for sign in signs]
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("nesterov", [True, False])
def test_without_an_axis_matrices_take_the_steps_of_optax(nesterov):
    gradients = {"w": jnp.asarray(normal((STEPS, 4, 6))), "b": jnp.asarray(normal((STEPS, 5)))}
    params = {"w": jnp.asarray(normal((4, 6), 1)), "b": jnp.ones(5)}
    schedule = optax.linear_schedule(0.1, 0.0, STEPS)
    ours = signax.muon(schedule, 0.9, nesterov=nesterov, weight_decay=0.1)
    theirs = optax.contrib.muon(
        schedule, beta=0.9, nesterov=nesterov, weight_decay=0.1, consistent_rms=0.2
    )
    found, expected = along(ours, gradients, params), along(theirs, gradients, params)
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-5, atol=1e-6)
    others = signax.lion(schedule, weight_decay=1.0)  # a tenth of its decay is 0.1
    lion = along(others, {"b": gradients["b"]}, {"b": params["b"]})
    np.testing.assert_allclose(found["b"], 0.1 * lion["b"], rtol=1e-5)


def test_one_bit_per_coordinate_travels_for_all_leaves_in_one_exchange():
    mesh = auto_mesh({"data": 8})
    shapes = {"embedding": (64, 32), "kernel": (32, 96), "scale": (32,)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    numbers = {"embedding": None, "kernel": MuonDimensionNumbers(), "scale": None}
    options = {"axis_name": "data", "weight_decay": 0.0}
    muon = signax.muon(0.1, weight_dimension_numbers=numbers, **options)
    sent = {}
    for name, optimizer in (("muon", muon), ("lion", signax.lion(0.1, **options))):
        tx = signax.DataParallel(optimizer, mesh)
        step = tx.train_step(lambda p, b: sum(jnp.sum(x) for x in jax.tree.leaves(p)) * b.sum())
        compiled = step.lower(params, tx.init(params), jnp.ones((8, 1))).compile()
        sent[name] = sorted(
            (record.operation, record.bytes_sent) for record in diagnostics.collectives(compiled)
        )
    assert sent["muon"] == sent["lion"]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
@pytest.mark.parametrize("after_vote", ["signs", "orthogonalize"])
def test_sharded_matrices_take_the_steps_of_whole_matrices(kind, after_vote):
    specs = {"w": PartitionSpec("fsdp"), "b": PartitionSpec()}
    gradients = {"w": normal((2, 8, 16)), "b": normal((2, 5))}
    params = {"w": normal((8, 16), 1), "b": normal(5, 1)}
    options = {"axis_name": "data", "after_vote": after_vote, "weight_decay": 0.1}
    options["ties"] = "plus"  # coins of ties count in a device's block
    found = []
    for cut in (True, False):
        types = (kind,) * (2 if cut else 1)
        sizes, names = ((2, 4), ("data", "fsdp")) if cut else ((2,), ("data",))
        mesh = jax.make_mesh(
            sizes, names, axis_types=types, devices=jax.devices()[: 8 if cut else 2]
        )

        def place(tree, axis, cut=cut, mesh=mesh):
            def of_leaf(leaf, spec):
                return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*axis, *spec)))

            whole = jax.tree.map(lambda _: PartitionSpec(), specs)
            return jax.tree.map(of_leaf, tree, specs if cut else whole)

        tx = signax.DataParallel(
            signax.muon(0.1, **options), mesh, param_specs=specs if cut else None
        )
        own, rows = place(params, ()), place(gradients, ("data",))
        state = tx.init(own)
        _, state = jax.jit(tx.update)(rows, state, own)
        found.append(jax.jit(tx.update)(rows, state, own)[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *found)


@pytest.mark.parametrize("optimizer", [signax.muon, signax.ef_muon])
def test_dimension_numbers_may_be_a_tree_where_matrices_are_sharded(optimizer):
    numbers = {"stack": MuonDimensionNumbers(1, 2), "embed": None}
    params = {"stack": jnp.zeros((2, 4, 3)), "embed": jnp.zeros((4, 2))}
    specs = {"stack": PartitionSpec(None, "model"), "embed": PartitionSpec()}
    tx = signax.DataParallel(
        optimizer(0.1, weight_dimension_numbers=numbers, axis_name="data"),
        auto_mesh({"data": 2, "model": 2}),
        param_specs=specs,
    )
    momentum = optax.tree.get(tx.init(params), "momentum")["stack"]
    assert momentum.shape == (2, 2, 4, 3)
    assert momentum.sharding.spec == PartitionSpec("data", None, "model")


def test_a_worker_with_a_nan_does_not_vote_and_keeps_its_momentum():
    gradients = normal((3, 4, 6))
    gradients[1, 2, 3] = np.nan
    tx = signax.muon(0.1, axis_name=AXIS, consistent_rms=1.0)

    def update(gradient):
        state = tx.init(jnp.zeros((4, 6)))
        _, state = tx.update(jnp.ones((4, 6)), state)
        before = optax.tree.get(state, "momentum")
        updates, state = tx.update(gradient, state)
        return updates, before, optax.tree.get(state, "momentum"), signax.participation(state)

    updates, before, after, seen = jax.vmap(update, axis_name=AXIS)(jnp.asarray(gradients))
    assert np.isfinite(updates).all()
    np.testing.assert_array_equal(before[1], after[1])
    assert (before[0] != after[0]).any()
    assert seen.voters.tolist() == [2, 2, 2]
    assert seen.missed.tolist() == [0, 1, 0]


def test_others_may_be_any_direction_of_one_worker():
    gradients = {
        "w": jnp.asarray(normal((STEPS, 3, 2, 2))),
        "b": jnp.asarray(normal((STEPS, 3, 9))),
    }
    tx = signax.muon(0.5, others=signax.scale_by_signum(0.7), axis_name=AXIS, others_rms=1.0)
    signum = voted(signax.signum(0.5, 0.7, axis_name=AXIS), {"b": gradients["b"]})
    np.testing.assert_array_equal(voted(tx, gradients)["b"], signum["b"])


def test_momentum_may_be_wider_than_gradients():
    tx = signax.muon(0.1, mu_dtype=jnp.float32)
    params = {"w": jnp.ones((3, 4), jnp.bfloat16), "b": jnp.ones(3, jnp.bfloat16)}
    updates, state = tx.update(params, tx.init(params), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert optax.tree.get(state, "momentum")["w"].dtype == jnp.float32
    assert optax.tree.get(state, "mu")["b"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"beta": 1.0}, ValueError, "beta"),
        ({"consistent_rms": -0.1}, ValueError, "consistent_rms"),
        ({"others_rms": "half"}, TypeError, "others_rms"),
        ({"ns_steps": 0}, ValueError, "ns_steps"),
        ({"after_vote": "polar"}, ValueError, "after_vote"),
        ({"others": "lion"}, TypeError, "others"),
        ({"zeros": "abstain"}, ValueError, "axis_name"),
        ({"mu_dtype": jnp.int32}, ValueError, "mu_dtype"),
        ({"after_vote": "orthogonalize"}, ValueError, "axis_name"),
    ],
)
def test_rejects_options(options, error, words):
    with pytest.raises(error, match=words):
        signax.muon(0.1, **options)


def test_rejects_stacks_without_dimension_numbers_at_init():
    with pytest.raises(
        ValueError, match=r"\['w'\] has shape \(2, 3, 4\).*weight_dimension_numbers"
    ):
        signax.muon(0.1).init({"w": jnp.zeros((2, 3, 4))})


def test_rejects_gradients_that_are_the_same_on_all_workers():
    mesh = auto_mesh({AXIS: 2})
    tx = signax.muon(0.1, axis_name=AXIS)

    def update(gradient):
        return tx.update(gradient, tx.init(gradient))[0]

    whole = PartitionSpec()
    mapped = jax.shard_map(update, mesh=mesh, in_specs=whole, out_specs=whole)
    with pytest.raises(ValueError, match="does not vary over axis"):
        mapped(jnp.ones((2, 2)))
