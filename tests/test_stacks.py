"""What users' stacks do with a state's shardings: a step sends one bit, or raises an error.

Each stack builds a training step in its own way, and pins the shardings of parameters and state.
The bytes that cross the workers' axis are read from the compiled program.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import signax
from signax import diagnostics

WIDTH = 256
INPUTS, TARGETS = jnp.ones((16, WIDTH)), jnp.ones((16, WIDTH))

MESHES = {
    "data": (8,),
    "data fsdp": (4, 2),
    "data fsdp model": (2, 2, 2),
}


def make_mesh(name, axis_type):
    shape, axes = MESHES[name], tuple(name.split())
    return jax.make_mesh(
        shape, axes, axis_types=(axis_type,) * len(axes), devices=jax.devices()[:8]
    )


def names_on(mesh, *axes):
    """The names of a kernel's axes, as far as the mesh has them."""
    return tuple(axis if axis in mesh.axis_names else None for axis in axes)


def pinned(mesh, specs):
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )


def signum(mesh, specs=None, **options):
    optimizer = signax.signum(1e-2, axis_name="data")
    return signax.DataParallel(optimizer, mesh, param_specs=specs, **options)


class Linen(nn.Module):
    boxes: bool
    mesh: jax.sharding.Mesh

    @nn.compact
    def __call__(self, x):
        def init(*axes):
            names = names_on(self.mesh, *axes)
            plain = nn.initializers.lecun_normal()
            return nn.with_partitioning(plain, names) if self.boxes else plain

        x = nn.Dense(WIDTH, kernel_init=init("fsdp", "model"))(x)
        return nn.Dense(WIDTH, kernel_init=init("model", "fsdp"))(jnp.tanh(x))


def linen_step(mesh, *, boxes, shardings_of, specs="boxes", **options):
    """A compiled step of Linen's `TrainState`, whose shardings are pinned."""
    model = Linen(boxes, mesh)
    named = nn.get_partition_spec(jax.eval_shape(Linen(True, mesh).init, jax.random.key(0), INPUTS))
    tx = signum(mesh, named if specs == "boxes" else specs, **options)

    def create(key):
        return TrainState.create(apply_fn=model.apply, params=model.init(key, INPUTS), tx=tx)

    abstract = jax.eval_shape(create, jax.random.key(0))
    shardings = shardings_of(mesh, tx, abstract, named)
    state = jax.jit(create, out_shardings=shardings)(jax.random.key(0))

    def step(state, batch):
        def loss_fn(params, batch):
            return jnp.mean((model.apply(params, batch[0]) - batch[1]) ** 2)

        loss, grads = tx.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads=grads), loss

    pins = {"in_shardings": (shardings, None), "out_shardings": (shardings, None)}
    compiled = jax.jit(step, **pins).lower(state, (INPUTS, TARGETS)).compile()
    return compiled, nn.meta.unbox(state.params)


def from_metadata(mesh, tx, abstract, named):
    """What Flax reads from boxes: MaxText, big_vision and others pin this."""
    del tx, named
    return pinned(mesh, nn.get_partition_spec(abstract))


def from_state_shardings(mesh, tx, abstract, named):
    """Shardings of parameters by hand, and those of the state from DataParallel."""
    params = pinned(mesh, named)
    abstract_params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract.params,
        params,
    )
    return abstract.replace(
        step=NamedSharding(mesh, PartitionSpec()),
        params=params,
        opt_state=tx.state_shardings(abstract_params),
    )


def like_parameters(mesh, tx, abstract, named):
    """Rows pinned as if they were parameters: wrong."""
    right = from_state_shardings(mesh, tx, abstract, named)

    def without_rows(sharding):
        if not sharding.spec:
            return sharding
        return NamedSharding(mesh, PartitionSpec(None, *sharding.spec[1:]))

    return right.replace(opt_state=jax.tree.map(without_rows, right.opt_state))


def sent_between_workers(compiled, mesh):
    return sum(
        record.bytes_sent
        for record in diagnostics.collectives(compiled, mesh=mesh)
        if "data" in record.axes
    )


def expected_bytes(mesh, params):
    """A vote on each device's blocks: one for leaves that are sharded over the same axes."""
    groups = {}
    for leaf in jax.tree.leaves(params):
        shape = leaf.sharding.shard_shape(leaf.shape)
        axes = frozenset(axis for axis in leaf.sharding.spec if axis is not None)
        groups.setdefault(axes, []).append(jax.ShapeDtypeStruct(shape, leaf.dtype))
    return sum(diagnostics.wire_bytes(group, mesh.shape["data"]) for group in groups.values())


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize(
    ("boxes", "shardings_of"),
    [(True, from_metadata), (False, from_state_shardings)],
    ids=["boxes, metadata", "no boxes, state_shardings"],
)
def test_a_linen_step_with_pinned_shardings_sends_one_bit(name, boxes, shardings_of):
    mesh = make_mesh(name, AxisType.Auto)
    compiled, params = linen_step(mesh, boxes=boxes, shardings_of=shardings_of)
    sent = sent_between_workers(compiled, mesh)
    assert sent == pytest.approx(expected_bytes(mesh, params), rel=0.05)


@pytest.mark.parametrize("name", MESHES)
def test_rows_pinned_like_parameters_are_an_error(name):
    mesh = make_mesh(name, AxisType.Auto)
    message = (
        r"state.*momentum.* is pinned to .*, but its rows lie as .*'data'.*gather the rows of all "
        r"workers, [\d,]+ bytes, at every step.*state_shardings"
    )
    with pytest.raises(ValueError, match=message):
        linen_step(mesh, boxes=False, shardings_of=like_parameters)


def test_rows_pinned_like_parameters_can_be_a_warning():
    mesh = make_mesh("data fsdp", AxisType.Auto)
    with pytest.warns(UserWarning, match="is pinned to"):
        compiled, params = linen_step(
            mesh, boxes=False, shardings_of=like_parameters, on_wrong_sharding="warn"
        )
    assert sent_between_workers(compiled, mesh) > 4 * expected_bytes(mesh, params)


def test_sharded_parameters_without_param_specs_are_an_error():
    mesh = make_mesh("data fsdp", AxisType.Auto)
    message = r"params.* is sharded as .*fsdp.* param_specs is not given"
    with pytest.raises(ValueError, match=message):
        linen_step(mesh, boxes=True, shardings_of=from_metadata, specs=None)


def nnx_step(mesh, *, metadata, pin):
    """A compiled step of `nnx.Optimizer`, with the state split off and its shardings pinned."""

    def init(*axes):
        names = names_on(mesh, *axes)
        plain = nnx.initializers.lecun_normal()
        return nnx.with_partitioning(plain, names) if metadata else plain

    class Model(nnx.Module):
        def __init__(self, rngs):
            options = {"use_bias": False, "rngs": rngs}
            self.up = nnx.Linear(WIDTH, WIDTH, kernel_init=init("fsdp", "model"), **options)
            self.down = nnx.Linear(WIDTH, WIDTH, kernel_init=init("model", "fsdp"), **options)

        def __call__(self, x):
            return self.down(jnp.tanh(self.up(x)))

    specs = {
        name: {"kernel": PartitionSpec(*(names_on(mesh, *axes) if metadata else ()))}
        for name, axes in {"up": ("fsdp", "model"), "down": ("model", "fsdp")}.items()
    }
    tx = signum(mesh, specs)
    with jax.set_mesh(mesh):
        model = Model(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))
    shardings = nnx.get_named_sharding(state, mesh) if pin else None
    if pin:
        state = jax.device_put(state, shardings)

    def step(state, batch):
        model, optimizer = nnx.merge(graph, state)
        graph_of_model, params, rest = nnx.split(model, nnx.Param, ...)

        def loss_fn(params, batch, rest):
            outputs = nnx.merge(graph_of_model, params, rest)(batch[0])
            return jnp.mean((outputs - batch[1]) ** 2)

        loss, grads = tx.value_and_grad(loss_fn)(params, batch, rest)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), loss

    pins = {"in_shardings": (shardings, None), "out_shardings": (shardings, None)} if pin else {}
    with jax.set_mesh(mesh):
        compiled = jax.jit(step, **pins).lower(state, (INPUTS, TARGETS)).compile()
    return compiled, nnx.state(model, nnx.Param)


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("pin", [True, False], ids=["pinned", "free"])
def test_an_nnx_step_with_metadata_sends_one_bit(name, pin):
    mesh = make_mesh(name, AxisType.Auto)
    compiled, params = nnx_step(mesh, metadata=True, pin=pin)
    sent = sent_between_workers(compiled, mesh)
    assert sent == pytest.approx(expected_bytes(mesh, params), rel=0.05)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
def test_an_nnx_step_without_metadata_sends_one_bit(axis_type):
    mesh = make_mesh("data", axis_type)
    compiled, params = nnx_step(mesh, metadata=False, pin=False)
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    sent = sent_between_workers(compiled, mesh)
    assert sent == pytest.approx(expected_bytes(mesh, params), rel=0.05)


def test_an_nnx_step_without_metadata_and_with_pinned_rows_is_an_error():
    mesh = make_mesh("data", AxisType.Auto)
    with pytest.raises(ValueError, match="is pinned to"):
        nnx_step(mesh, metadata=False, pin=True)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
@pytest.mark.parametrize("jitted", [True, False], ids=["jit", "eager"])
def test_replicated_rows_are_an_error_for_both_types_of_axes(axis_type, jitted):
    mesh = make_mesh("data", axis_type)
    tx = signum(mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    params = jax.device_put({"w": jnp.ones((8, 4))}, whole)
    rows = {"w": jnp.ones((8, 8, 4))}
    state = jax.device_put(tx.init(params), whole)
    update = jax.jit(tx.update) if jitted else tx.update
    with pytest.raises(ValueError, match=r"momentum\['w'\] is pinned to"):
        update(rows, state, params)


def test_a_state_that_lies_nowhere_yet_is_accepted():
    mesh = make_mesh("data", AxisType.Auto)
    tx = signum(mesh)
    params = {"w": jnp.ones((8, 4))}
    state = jax.device_get(tx.init(params))
    updates, state = jax.jit(tx.update)({"w": jnp.ones((8, 8, 4))}, state, params)
    assert (updates["w"] == -0.01).all()
    assert optax.tree.get(state, "momentum")["w"].sharding.spec[0] == "data"


def test_axes_of_one_device_may_be_pinned_anywhere():
    shape, axes = (4, 2, 1), ("data", "fsdp", "model")
    types, devices = (AxisType.Auto,) * 3, jax.devices()[:8]
    mesh = jax.make_mesh(shape, axes, axis_types=types, devices=devices)
    tx = signum(mesh, {"w": PartitionSpec(None, "fsdp")})
    spec = PartitionSpec("model", "fsdp")
    params = {"w": jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, spec))}

    def pin(leaf):
        is_momentum = leaf.ndim == 3
        return NamedSharding(mesh, PartitionSpec("data", *spec)) if is_momentum else leaf.sharding

    state = tx.init(params)
    state = jax.device_put(state, jax.tree.map(pin, state))
    updates, _ = jax.jit(tx.update)({"w": jnp.ones((4, 8, 4))}, state, params)
    assert (updates["w"] == -0.01).all()


def test_one_worker_may_be_pinned_anywhere():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    tx = signum(mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    params = jax.device_put({"w": jnp.ones((8, 4))}, whole)
    state = jax.device_put(tx.init(params), whole)
    updates, _ = jax.jit(tx.update)({"w": jnp.ones((1, 8, 4))}, state, params)
    assert (updates["w"] == -0.01).all()
