"""Parameters sharded over further mesh axes, Auto or Explicit: results, layouts and messages."""

import contextlib
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from least_squares import (
    PARAMS,
    SIGN_SGD,
    SIGNUM,
    assert_trees_close,
    assert_trees_equal,
    is_placed_as,
    make_batch,
    make_mesh,
    squared_error,
)
from scaled_rows import (
    SHARDED,
    assert_follows_blocks,
    block_counts,
    follow_sharded,
    served,
    shard,
    sharded_rows,
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


# Error feedback: a server's memory has a part of each device's block.

WHOLE = PartitionSpec()
FIRST = {
    "large": PartitionSpec("model"),
    "small": PartitionSpec("model"),
    "cube": PartitionSpec(None, "model"),
    "whole": WHOLE,
}
SECOND = {
    "large": PartitionSpec(None, "model"),
    "small": PartitionSpec(None, "model"),
    "cube": PartitionSpec(None, None, "model"),
    "whole": WHOLE,
}
CROSSED = {
    "large": PartitionSpec("model", "fsdp"),
    "small": PartitionSpec("fsdp", "model"),
    "cube": PartitionSpec("fsdp"),
    "whole": WHOLE,
}
JOINED = {
    "large": PartitionSpec(None, ("fsdp", "model")),
    "small": PartitionSpec(("model", "fsdp")),
    "cube": WHOLE,
    "whole": WHOLE,
}
SIGNS = signax.mean_scaled_signs, {}
SHORT = signax.mean_scaled_signs, {"block": 9, "decay": 0.75}
QUANTIZED = signax.mean_quantized, {"bits": 2}
FINE = signax.mean_quantized, {"bits": 4, "block": 9}


@pytest.mark.parametrize(
    ("shape", "kind", "cuts", "mean", "with_specs"),
    [
        ((2, 2), A, SECOND, SIGNS, True),
        ((2, 2, 2), E, CROSSED, QUANTIZED, False),
        *(
            pytest.param(*case, marks=pytest.mark.thorough)
            for case in [
                ((2, 2), E, SECOND, FINE, False),
                ((4, 2), A, FIRST, SHORT, True),
                ((4, 2), E, FIRST, QUANTIZED, True),
                ((4, 2), (A, E), FIRST, SIGNS, True),
                ((2, 2, 2), A, CROSSED, SIGNS, True),
                ((2, 2, 2), A, JOINED, FINE, True),
                ((2, 2, 2), E, JOINED, SIGNS, False),
                ((2, 2, 2), (A, E, A), CROSSED, SHORT, True),
            ]
        ),
    ],
)
def test_feedback_of_sharded_leaves_follows_the_reference(shape, kind, cuts, mean, with_specs):
    """A device's block is a leaf of its own, except for the one scale of a leaf on the way up."""
    num_steps, num_workers, (make, options) = 6, shape[0], mean
    mesh, rows = make_mesh(shape, kind), sharded_rows(num_steps, num_workers)
    active = np.random.default_rng(1).random((num_steps, num_workers)) > 0.2
    active[3] = False  # no worker takes part
    active[4], rows["small"][4, -1, 3, 2] = True, np.nan
    with jax.enable_x64(True):
        tx = make("data", **options)
        history = follow_sharded(tx, mesh, cuts, rows, active, with_specs=with_specs)
    counts = block_counts(mesh, cuts)
    steps = [[leaf[t] for leaf in rows.values()] for t in range(num_steps)]
    expected = references.mean_of_scaled_signs(steps, active=active, counts=counts, **options)
    assert_follows_blocks(history, expected, counts)


@pytest.mark.parametrize("kind", [A, E])
def test_axes_of_size_one_leave_memories_and_results_unchanged(kind):
    rows, found = sharded_rows(3, 4), []
    mean = signax.mean_scaled_signs("data")
    for shape, cuts in [((4,), dict.fromkeys(FIRST, WHOLE)), ((4, 1), FIRST)]:
        with jax.enable_x64(True):
            history = follow_sharded(mean, make_mesh(shape, kind), cuts, rows)
        found.append(jax.device_get(history))
    assert_trees_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "specs"), [(A, True), (E, False)], ids=["Auto with specs", "Explicit, known by type"]
)
def test_feedback_of_sharded_leaves_crosses_the_axes_within_a_worker_by_scales_only(kind, specs):
    mesh = make_mesh((2, 2, 2), kind)
    optimizer = signax.ef_sign_sgd(0.1, 0.9, axis_name="data")
    tx = signax.DataParallel(optimizer, mesh, param_specs=CROSSED if specs else None)
    params = shard({name: jnp.ones(shape) for name, shape in SHARDED.items()}, mesh, CROSSED)
    rows = {name: jnp.ones((2, *shape)) for name, shape in SHARDED.items()}
    rows, state = shard(rows, mesh, CROSSED, "data"), tx.init(params)
    memories = optax.tree.get(state, "server")
    for name, block in {"large": (512, 18), "small": (6, 4)}.items():
        share = 2 * int(np.ceil(references.columns(block) / 4))
        assert memories[name].shape == (2, 2, 2, 32, share)
        assert memories[name].sharding.spec == PartitionSpec("data", *CROSSED[name])
    step = jax.jit(tx.update).lower(rows, state, params).compile()
    records = diagnostics.collectives(step, mesh=mesh)
    inside = [record for record in records if {"model", "fsdp"}.intersection(record.axes or ())]
    assert inside
    assert all(record.elements <= len(SHARDED) for record in inside)
    between = {record.operation for record in records if record.axes == ("data",)}
    assert between == {"all-to-all", "all-gather"}
    assert not any(record.is_floating for record in records if record not in inside)
    _, after = step(rows, state, params)
    for leaf, sharding in zip(
        jax.tree.leaves(after), jax.tree.leaves(tx.state_shardings(params)), strict=True
    ):
        assert is_placed_as(leaf, sharding)


@pytest.mark.parametrize("kind", [A, E])
def test_memories_of_sharded_leaves_survive_a_resize_and_a_restore(kind):
    tx = signax.ef_sign_sgd(0.1, axis_name="data")
    cuts, rows = FIRST, sharded_rows(4, 4)
    old, new = (
        signax.DataParallel(tx, make_mesh((num_workers, 2), kind), param_specs=cuts)
        for num_workers in (4, 2)
    )
    first = {name: leaf[:3] for name, leaf in rows.items()}
    *_, (_, state) = follow_sharded(tx, old.mesh, cuts, first)
    params = shard({name: jnp.zeros(shape) for name, shape in SHARDED.items()}, new.mesh, cuts)
    resized = new.resize(state, params)
    assert jax.tree.map(lambda leaf: leaf.sharding, resized) == new.state_shardings(params)
    counts = dict(zip(SHARDED, block_counts(new.mesh, cuts), strict=True))
    before, after = (optax.tree.get(each, "server") for each in (state, resized))
    for name, shape in SHARDED.items():
        kept, places = served(before[name], shape, counts[name])
        found, new_places = served(after[name], shape, counts[name])
        np.testing.assert_array_equal(found[new_places], kept[places])
        assert np.any(kept)
        assert np.count_nonzero(found) == np.count_nonzero(kept)
    back = optax.tree.get(old.resize(resized, params), "server")
    assert_trees_equal(back, before)

    last = {name: leaf[3:] for name, leaf in rows.items()}
    restored = jax.device_put(jax.device_get(state), old.state_shardings(params))
    uninterrupted = follow_sharded(tx, old.mesh, cuts, last, state=state)
    continued = follow_sharded(tx, old.mesh, cuts, last, state=restored)
    assert_trees_equal(jax.device_get(continued), jax.device_get(uninterrupted))


@pytest.mark.parametrize("kind", [A, E])
def test_masks_and_partitions_keep_memories_of_sharded_leaves(kind):
    """A leaf's memory is the same whether other leaves are masked or not."""
    mesh, rows = make_mesh((2, 2), kind), sharded_rows(2, 2)
    mean, average = signax.mean_scaled_signs("data"), signax.average_updates("data")
    labels = {"large": "mean", "small": "average", "cube": "mean", "whole": "average"}
    tx = optax.partition({"mean": mean, "average": average}, labels)
    with jax.enable_x64(True):
        found, expected = (follow_sharded(each, mesh, SECOND, rows)[-1] for each in (tx, mean))
    for name in ("large", "cube"):
        assert_trees_close(found[0][name], expected[0][name], rtol=1e-12)
        server = optax.tree.get(found[1], "server")[name]
        assert_trees_close(server, expected[1].memory.server[name], rtol=1e-12)


@pytest.mark.parametrize("kind", [A, E])
def test_labels_of_a_partition_may_come_from_a_function_of_a_dict(kind):
    mesh, spec = make_mesh((2, 2), kind), PartitionSpec("model")
    groups = {"vote": signax.signum(0.1, axis_name="data"), "mean": signax.average_updates("data")}

    def labels(params):
        return {name: "vote" if name == "w" else "mean" for name in params}

    params = {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)}
    params["w"] = jax.device_put(params["w"], NamedSharding(mesh, spec))
    specs = {"w": spec, "b": PartitionSpec()} if kind == A else None  # or the types say so
    tx = signax.DataParallel(optax.partition(groups, labels), mesh, param_specs=specs)
    momentum = optax.tree.get(tx.init(params), "momentum")["w"]
    assert momentum.shape == (2, 4, 3)
    assert is_placed_as(momentum, NamedSharding(mesh, PartitionSpec("data", "model")))


def test_a_compiled_init_makes_memories_of_sharded_leaves_for_each_mesh():
    """JAX keeps a trace for each sharding, although parameters of Auto axes have one type."""
    mean = signax.mean_scaled_signs("data")
    tx = optax.GradientTransformationExtraArgs(jax.jit(mean.init), mean.update)
    params = {name: jnp.zeros(shape) for name, shape in SHARDED.items()}
    for shape, cuts in [((4, 2), FIRST), ((2, 2, 2), CROSSED), ((2, 2), None)]:
        found, expected = (
            signax.DataParallel(each, make_mesh(shape), param_specs=cuts).init(params)
            for each in (tx, mean)
        )
        assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, expected)


def test_resize_moves_memories_of_servers_to_parameters_that_are_sharded_otherwise():
    tx = signax.ef_sign_sgd(0.1, axis_name="data")
    places = [((4, 2), FIRST), ((2, 2, 2), CROSSED), ((8,), dict.fromkeys(FIRST, WHOLE))]
    meshes = [make_mesh(shape) for shape, _ in places]
    state = follow_sharded(tx, meshes[0], FIRST, sharded_rows(2, 4))[-1][1]
    moved = []
    for mesh, (_, cuts) in zip(meshes, places, strict=True):
        data_parallel = signax.DataParallel(tx, mesh, param_specs=cuts)
        params = shard({name: jnp.zeros(shape) for name, shape in SHARDED.items()}, mesh, cuts)
        state = data_parallel.resize(state, params)
        shardings = data_parallel.state_shardings(params)
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings
        memory, counts = optax.tree.get(state, "server"), block_counts(mesh, cuts)
        pairs = zip(SHARDED.items(), counts, strict=True)
        servers = [served(memory[name], shape, count) for (name, shape), count in pairs]
        moved.append([kept[places] for kept, places in servers])
    for other in moved[1:]:
        assert_trees_equal(other, moved[0])


# One's own map over the workers' axis alone.


def in_own_map(function, mesh, values, spec):
    """Map a function of one worker's values, with rows that are sharded within the workers."""
    rows = jax.device_put(values, NamedSharding(mesh, PartitionSpec("data", *spec)))
    mapped = jax.shard_map(
        lambda rows: function(rows[0]),
        mesh=mesh,
        in_specs=PartitionSpec("data"),
        out_specs=WHOLE,
        axis_names={"data"},
    )
    return np.asarray(jax.jit(mapped)(rows))


def scaled_mean(values, feedback="none"):
    memory = signax.scaled_signs_memory(values, 3, feedback=feedback)
    return signax.pmean_scaled_signs(values, "data", memory, step=0)[0]


def reference_of_scaled_mean(values):
    return references.mean_of_scaled_signs([[values]], feedback="none")[0][0][0]


OWN = {
    "vote": (partial(signax.pvote, axis_name="data", step=0), references.vote),
    "mean": (partial(signax.pmean_signs, axis_name="data", step=0), references.mean_of_signs),
    "scaled mean": (scaled_mean, reference_of_scaled_mean),
}


@pytest.mark.parametrize("kind", [A, E])
@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize(
    ("shape", "spec"), [((64, 300), PartitionSpec("model")), ((600,), PartitionSpec("model"))]
)
def test_values_in_ones_own_map_may_be_sharded_over_axes_within_a_worker(kind, name, shape, spec):
    """Three workers cannot tie, so no result depends on a coordinate's index in a block."""
    function, reference = OWN[name]
    values = np.random.default_rng(2).standard_normal((3, *shape)).astype(np.float32)
    found = in_own_map(function, make_mesh((3, 2), kind), values, spec)
    np.testing.assert_allclose(found.ravel(), reference(values.reshape(3, -1)), rtol=1e-5)


def test_rejects_a_memory_of_whole_leaves_for_leaves_that_types_shard_within_a_worker():
    values, mean = np.ones((3, 64, 4), np.float32), partial(scaled_mean, feedback="both")
    with pytest.raises(ValueError, match="In your own shard_map map over these axes too"):
        in_own_map(mean, make_mesh((3, 2), E), values, PartitionSpec("model"))
