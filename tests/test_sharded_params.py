"""Parameters sharded over further mesh axes, Auto or Explicit: results, layouts and messages."""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from least_squares import (
    PARAMS,
    SIGN_SGD,
    SIGNUM,
    assert_trees_equal,
    is_placed_as,
    make_batch,
    make_mesh,
    squared_error,
)
from workers import large_floating

import signax
from signax import diagnostics

A, E = AxisType.Auto, AxisType.Explicit


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_state_is_sharded_like_its_parameters(kind):
    mesh = make_mesh((4, 2), kind)
    specs = {"w": PartitionSpec(None, "model"), "b": PartitionSpec()}
    state = signax.DataParallel(SIGNUM, mesh, param_specs=specs).init(PARAMS)
    momentum = state[0][0].momentum
    assert is_placed_as(momentum["w"], NamedSharding(mesh, PartitionSpec("data", None, "model")))
    assert is_placed_as(momentum["b"], NamedSharding(mesh, PartitionSpec("data")))


@pytest.mark.parametrize(
    ("spec", "kind", "said"),
    [
        (PartitionSpec("data"), ValueError, "the workers' own axis"),
        (PartitionSpec(None, ("model", "data")), ValueError, "the workers' own axis"),
        (PartitionSpec("pipe"), ValueError, r"names 'pipe'; the mesh has \('data', 'model'\)"),
        ("model", TypeError, "'model' is not a jax.sharding.PartitionSpec"),
    ],
)
def test_rejects_invalid_param_specs(spec, kind, said):
    with pytest.raises(kind, match=rf"param_specs\['w'\].*{said}"):
        signax.DataParallel(
            SIGNUM, make_mesh((4, 2)), param_specs={"w": spec, "b": PartitionSpec()}
        )


def test_rejects_param_specs_of_another_structure(mesh):
    tx = signax.DataParallel(SIGNUM, mesh, param_specs={"w": PartitionSpec()})
    with pytest.raises(ValueError, match="param_specs and params differ in structure"):
        tx.init(PARAMS)


# Training on every kind of mesh.


def two_steps(tx, params, batch):
    """Parameters after two steps of a jitted loop."""

    @jax.jit
    def step(params, state, batch):
        loss, grads = tx.value_and_grad(squared_error)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state = tx.init(params)
    for _ in range(2):
        params, state, _ = step(params, state, batch)
    return params


@pytest.fixture(scope="module")
def stepped():
    """Two steps of four workers on a mesh of one Auto axis, without placing any array."""
    mesh = make_mesh((4,))
    tx = signax.DataParallel(signax.signum(0.125, axis_name="data", zeros="abstain"), mesh)
    return jax.tree.map(np.asarray, two_steps(tx, PARAMS, make_batch()))


SPECS = {"w": PartitionSpec(None, "model"), "b": PartitionSpec("model")}
ONE_AXIS = [
    ((4,), A, None, False, False),
    ((4,), A, None, True, True),
    *(((4,), E, None, *there) for there in itertools.product((False, True), (False, True))),
]
TWO_AXES = [
    ((4, 2), kinds, specs, there, there)
    for kinds, specs, there in itertools.product(
        ((A, A), (E, E), (A, E)), (None, SPECS), (False, True)
    )
]


# Axes of mixed types with given specs are the hardest case, so it is quick.
@pytest.mark.parametrize(
    ("shape", "kind", "specs", "placed", "context"),
    [
        pytest.param(*case, marks=[] if case[1:3] == ((A, E), SPECS) else pytest.mark.thorough)
        for case in ONE_AXIS + TWO_AXES
    ],
)
def test_training_gives_the_same_parameters_on_every_mesh(
    shape, kind, specs, placed, context, stepped
):
    """Bit for bit, with or without placed arrays, and inside or outside of `jax.set_mesh`."""
    mesh = make_mesh(shape, kind)
    optimizer = signax.signum(0.125, axis_name="data", zeros="abstain")
    params, batch = PARAMS, make_batch()
    if placed:
        places = specs or {name: PartitionSpec() for name in PARAMS}
        params = {
            name: jax.device_put(leaf, NamedSharding(mesh, places[name]))
            for name, leaf in PARAMS.items()
        }
        batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    tx = signax.DataParallel(optimizer, mesh, param_specs=specs)
    with jax.set_mesh(mesh) if context else contextlib.nullcontext():
        actual = two_steps(tx, params, batch)
    assert_trees_equal(actual, stepped)


def test_one_device_acts_as_one_worker():
    mesh = make_mesh((1,))
    tx = signax.DataParallel(signax.signum(0.125, axis_name="data"), mesh)
    actual = two_steps(tx, PARAMS, make_batch())

    single = signax.signum(0.125)
    params, state = PARAMS, single.init(PARAMS)
    for _ in range(2):
        updates, state = single.update(jax.grad(squared_error)(params, make_batch()), state, params)
        params = optax.apply_updates(params, updates)
    assert_trees_equal(actual, params)


def test_a_compiled_step_returns_parameters_in_the_sharding_of_its_inputs():
    """Without constraints XLA would choose other shardings for results, such as the scales."""
    mesh = make_mesh((2, 2, 2))
    specs = {"up": PartitionSpec("fsdp", "model"), "scale": PartitionSpec()}

    def loss_fn(params, batch):
        return jnp.mean(((batch @ params["up"]) * params["scale"]) ** 2)

    params = {
        "up": jax.device_put(jnp.ones((16, 16)), NamedSharding(mesh, specs["up"])),
        "scale": jax.device_put(jnp.ones(16), NamedSharding(mesh, specs["scale"])),
    }
    batch = jax.device_put(jnp.ones((8, 16)), NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    tx = signax.DataParallel(SIGNUM, mesh, param_specs=specs)
    state = tx.init(params)
    step = tx.train_step(loss_fn).lower(params, state, batch).compile()
    for _ in range(2):
        params, state, _ = step(params, state, batch)
    for name, leaf in params.items():
        assert leaf.sharding.spec == specs[name]


# What an update sends, and on which blocks it votes.


@pytest.mark.parametrize(
    ("kind", "specs"),
    [(A, True), (E, True), (E, False)],
    ids=["Auto with specs", "Explicit with specs", "Explicit, known by type"],
)
@pytest.mark.parametrize(
    "optimizer",
    [
        signax.signum(0.1, axis_name="data", weight_decay=0.1),
        signax.lion(0.1, axis_name="data", weight_decay=0.1),
        signax.sign_sgd(0.1, axis_name="data", weight_decay=0.1),
        signax.ssdm(0.1, jax.random.key(0), axis_name="data", weight_decay=0.1),
        signax.mean_signs("data"),
    ],
    ids=["signum", "lion", "sign_sgd", "ssdm", "mean_signs"],
)
def test_an_update_of_sharded_parameters_sends_no_large_floating_point_array(
    kind, specs, optimizer
):
    mesh = make_mesh((4, 2), kind)
    places = {"w": PartitionSpec(None, "model"), "b": PartitionSpec()}
    tx = signax.DataParallel(optimizer, mesh, param_specs=places if specs else None)
    shapes = {"w": (256, 128), "b": (128,)}
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, places[name]))
        for name, shape in shapes.items()
    }
    grads = {
        name: jax.ShapeDtypeStruct(
            (4, *shape),
            jnp.float32,
            sharding=NamedSharding(mesh, PartitionSpec("data", *places[name])),
        )
        for name, shape in shapes.items()
    }
    state = tx.abstract_state(params)
    compiled = jax.jit(tx.update).lower(grads, state, params).compile()
    assert large_floating(compiled) == []
    assert diagnostics.collective_bytes(compiled) > 0


PARTLY_AVERAGED = optax.partition(
    {"vote": SIGNUM, "mean": optax.chain(signax.average_updates("data"), optax.adam(0.1))},
    {"w": "vote", "b": "mean"},
)


WRAPPERS = {
    "MultiSteps": optax.MultiSteps(SIGNUM, 2),
    "MultiSteps as transformation": optax.MultiSteps(SIGNUM, 2).gradient_transformation(),
    "inject_hyperparams": optax.inject_hyperparams(
        lambda rate: signax.signum(rate, axis_name="data")
    )(0.1),
    "masked": optax.chain(optax.masked(optax.trace(0.9), {"w": True, "b": False}), SIGN_SGD),
    "partition": PARTLY_AVERAGED,
}


LOSES_SHARDING = pytest.mark.xfail(
    raises=TypeError, reason="zeros_like loses a sharding over Explicit axes inside shard_map"
)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=LOSES_SHARDING if kind == E and "MultiSteps" in name else ())
        for name, kind in itertools.product(WRAPPERS, (A, E))
    ],
)
def test_wrappers_vote_on_the_blocks_of_sharded_parameters(name, kind):
    """State is sharded like its parameter, and no vote sees more than a device's own block."""
    mesh = make_mesh((4, 2), kind)
    places = {"w": PartitionSpec(None, "model"), "b": PartitionSpec()}
    tx = signax.DataParallel(WRAPPERS[name], mesh, param_specs=places)
    params = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, places[name])
        )
        for name, leaf in PARAMS.items()
    }
    for path, sharding in jax.tree.leaves_with_path(tx.state_shardings(params)):
        of_w = jax.tree_util.keystr(path).endswith("['w']")
        assert ("model" in str(sharding.spec)) == of_w
    grads = {
        name: jax.ShapeDtypeStruct(
            (4, *leaf.shape),
            leaf.dtype,
            sharding=NamedSharding(mesh, PartitionSpec("data", *places[name])),
        )
        for name, leaf in PARAMS.items()
    }
    state = tx.abstract_state(params)
    jaxpr = str(jax.make_jaxpr(tx.update)(grads, state, params))
    # A map inside the map over workers runs the vote on blocks: 3 x 1 of w's 3 x 2.
    assert "f32[3,1]" in jaxpr
