"""`pmean_scaled_signs`: results, memories and messages, against the reference."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from jax.sharding import PartitionSpec
from workers import AXIS, auto_mesh, rows_of_workers

import signax
from signax import diagnostics

SHAPES = {
    "matrix": (13, 7), "rows": (64, 3), "number": (), "none": (0, 3), "vector": (65,),
    "large": (2040, 9), "long": (16_385,),
}  # fmt: skip


def random_values(num_steps, num_workers, seed=0):
    """Rows of values for each step, many of them zero, and one leaf of zeros."""
    rng = np.random.default_rng(seed)

    def leaf(shape):
        scale = rng.choice([0.01, 1.0], size=(num_steps, num_workers, math.prod(shape)))
        # A block that is zero at two steps would have the sign of a rounding error.
        scale[..., ::2] *= rng.choice([0.0, 1.0], size=scale[..., ::2].shape)
        return (rng.standard_normal(scale.shape) * scale).reshape(num_steps, num_workers, *shape)

    values = {name: leaf(shape) for name, shape in SHAPES.items()}
    return {**values, "dead": np.zeros((num_steps, num_workers, 5))}


def run(kind, values, num_workers, feedback="both", active=None, **options):
    """Updates and memories after each step, with one row per worker."""
    example = jax.tree.map(lambda leaf: leaf[0, 0], values)

    def one_step(tree, memory, step, active):
        options_now = {**options, "step": step, "active": active}
        return signax.pmean_scaled_signs(tree, AXIS, memory, **options_now)

    mapped = rows_of_workers(kind, one_step, num_workers)
    memory = signax.scaled_signs_memory(example, num_workers, feedback=feedback)
    memory = jax.tree.map(lambda leaf: jnp.stack([leaf] * num_workers), memory)
    history = []
    for t in range(len(values["matrix"])):
        rows = jax.tree.map(lambda leaf, t=t: jnp.asarray(leaf[t]), values)
        flags = np.ones(num_workers, bool) if active is None else active[t]
        updates, memory = mapped(rows, memory, jnp.full(num_workers, t), jnp.asarray(flags))
        history.append(jax.tree.map(np.asarray, (updates, memory)))
    return history


def flat_rows(leaf):
    return leaf.reshape(len(leaf), -1)


def assert_follows(history, expected, values, rtol, atol):
    """Compares each step's updates and memories; padding must stay 0."""
    names = list(values)
    for t, (updates, memory) in enumerate(history):
        for n, name in enumerate(names):
            mean, errors, server = expected[t][n]
            message = f"step {t} {name}"
            close = partial(np.testing.assert_allclose, rtol=rtol, atol=atol, err_msg=message)
            rows = flat_rows(updates[name])
            np.testing.assert_array_equal(rows, np.broadcast_to(rows[:1], rows.shape))
            close(rows[0], mean)
            if memory.worker is not None:
                close(flat_rows(memory.worker[name]), errors)
            if memory.server is not None and server.size:
                kept = np.reshape(memory.server[name].copy(), (len(rows), -1))
                places = references.servers(values[name].shape[2:], len(rows))
                close(kept[places], server)
                kept[places] = 0
                np.testing.assert_array_equal(kept, 0)


def reference(values, **options):
    steps = range(len(values["matrix"]))
    leaves = [[leaf[t] for leaf in values.values()] for t in steps]
    return references.mean_of_scaled_signs(leaves, **options)


CASES = [("shard_map", 3, None), ("vmap", 4, 8), ("pmap", 2, None)]
FURTHER_CASES = [
    ("shard_map", 1, 6), ("shard_map", 2, 1000), ("shard_map", 3, 6), ("shard_map", 5, 1000),
    ("shard_map", 8, None), ("shard_map", 9, 6), ("pmap", 4, 5),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "num_workers", "block"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.thorough) for case in FURTHER_CASES)],
)
def test_fifty_steps_with_both_memories_equal_the_reference(kind, num_workers, block):
    num_steps = 50
    rng = np.random.default_rng(num_workers)
    values = random_values(num_steps, num_workers)
    active = rng.random((num_steps, num_workers)) > 0.1
    active[20:25, 0] = False  # one worker is absent for a while
    active[30] = False  # no worker takes part
    values["matrix"][40, -1, 3, 2] = np.nan
    with jax.enable_x64(True):
        options = {} if block is None else {"block": block}
        history = run(kind, values, num_workers, active=active, **options)
    expected = reference(values, block=block, active=active)
    assert_follows(history, expected, values, rtol=1e-9, atol=1e-11)
    assert all(not np.any(update) for update in jax.tree.leaves(history[30][0]))
    before, after = history[39][1].worker, history[40][1].worker
    for name in values:
        np.testing.assert_array_equal(after[name][-1], before[name][-1])


@pytest.mark.parametrize("feedback", ["worker", "none"])
@pytest.mark.parametrize("block", [None, 9])
def test_worker_feedback_and_no_feedback_equal_the_reference(feedback, block):
    values = random_values(12, 5, seed=3)
    options = {} if block is None else {"block": block}
    with jax.enable_x64(True):
        history = run("shard_map", values, 5, feedback, decay=0.75, **options)
    expected = reference(values, feedback=feedback, block=block, decay=0.75)
    assert_follows(history, expected, values, rtol=1e-9, atol=1e-11)


def test_single_precision_is_close_to_the_reference():
    values = jax.tree.map(np.float32, random_values(50, 4, seed=5))
    del values["large"], values["long"]  # some of many values are as small as a rounding error
    history = run("shard_map", values, 4)
    assert_follows(history, reference(values), values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_sent_values_and_memories_add_up_to_the_input(dtype):
    """The input equals the sum of all updates and of the memories."""
    num_workers, shape = 2, (3, 11)
    values = np.random.default_rng(1).integers(-8, 9, size=(6, num_workers, *shape)) / 4
    tree = {"matrix": jnp.asarray(values, dtype)}
    memory_dtype = jnp.float32

    def one_step(tree, memory, step):
        return signax.pmean_scaled_signs(tree, AXIS, memory, step=step)

    mapped = rows_of_workers("vmap", one_step, num_workers)
    memory = signax.scaled_signs_memory(
        jax.tree.map(lambda leaf: leaf[0, 0], tree), num_workers, dtype=memory_dtype
    )
    memory = jax.tree.map(lambda leaf: jnp.stack([leaf] * num_workers), memory)
    emitted = np.zeros(math.prod(shape))
    for t in range(len(values)):
        rows = jax.tree.map(lambda leaf, t=t: leaf[t], tree)
        updates, memory = mapped(rows, memory, jnp.full(num_workers, t))
        assert updates["matrix"].dtype == dtype
        emitted += np.asarray(updates["matrix"][0], np.float64).ravel()
    worker = flat_rows(np.asarray(memory.worker["matrix"], np.float64)).mean(axis=0)
    kept = np.asarray(memory.server["matrix"], np.float64).reshape(num_workers, -1)
    server = kept[references.servers(shape, num_workers)]
    # Sums of numbers around 1 in f32 lose a few units in the last place per step.
    came_in = values.mean(axis=1).reshape(len(values), -1).sum(axis=0)
    np.testing.assert_allclose(emitted + worker + server, came_in, atol=1e-5)


def transformer_shapes(layers=16, width=256):
    """200 leaves like a transformer's: embeddings, and twelve for each layer."""
    layer = {
        "query": (width, width), "key": (width, width), "value": (width, width),
        "out": (width, width), "up": (width, 4 * width), "down": (4 * width, width),
        "norm1": (width,), "norm2": (width,), "out_bias": (width,), "up_bias": (4 * width,),
        "down_bias": (width,), "query_bias": (width,),
    }  # fmt: skip
    outer = {
        "tokens": (4096, width), "positions": (512, width), "norm": (width,), "shift": (width,),
        "head": (width, 4096), "head_bias": (4096,), "scale": (), "type": (2, width),
    }  # fmt: skip
    tree = {f"layer{n}": layer for n in range(layers)} | outer
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    return jax.tree.map(shape, tree, is_leaf=lambda node: isinstance(node, tuple))


@pytest.mark.parametrize(
    "dtypes", [("float32",), ("bfloat16", "float16"), ("float32", "float64")], ids="-".join
)
def test_the_formula_equals_the_bytes_of_the_program(dtypes):
    """48 leaves of one word: scales of a wrong size would change the length of a part."""
    with jax.enable_x64(True):
        shapes = [(2, 3), (), (32,), (0, 2)] * 16
        tree = [
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, dtype in zip(shapes, itertools.cycle(dtypes), strict=False)
        ]
        tx = signax.DataParallel(signax.mean_scaled_signs(AXIS), auto_mesh({AXIS: 4}), AXIS)
        rows = jax.tree.map(lambda s: jax.ShapeDtypeStruct((4, *s.shape), s.dtype), tree)
        state = jax.eval_shape(tx.init, tree)
        program = jax.jit(tx.update).lower(rows, state, tree).compile()
        sent = diagnostics.collective_bytes(program)
        assert sent == diagnostics.wire_bytes(tree, 4, scheme="scaled_signs")


def test_a_transformer_sends_one_bit_each_way():
    num_workers, tree = 8, transformer_shapes()
    assert len(jax.tree.leaves(tree)) == 200
    size = sum(leaf.size for leaf in jax.tree.leaves(tree))
    mesh = auto_mesh({AXIS: num_workers})
    tx = signax.DataParallel(signax.mean_scaled_signs(AXIS), mesh, AXIS)
    rows = jax.tree.map(lambda s: jax.ShapeDtypeStruct((num_workers, *s.shape), s.dtype), tree)
    state = jax.eval_shape(tx.init, tree)
    program = jax.jit(tx.update).lower(rows, state, tree).compile()
    sent = {c.operation: c.bytes_sent for c in diagnostics.collectives(program)}
    one_way = (num_workers - 1) / num_workers * size / 8
    assert sorted(sent) == ["all-gather", "all-to-all"]
    assert sum(sent.values()) == pytest.approx(2 * one_way, rel=0.02)
    assert sum(sent.values()) == diagnostics.wire_bytes(tree, num_workers, scheme="scaled_signs")


def test_sharded_leaves_are_compressed_in_place():
    mesh = auto_mesh({"data": 2, "model": 2})
    specs = {"kernel": PartitionSpec(None, "model"), "bias": PartitionSpec()}
    params = {"kernel": jnp.zeros((5, 6)), "bias": jnp.zeros(3)}
    grads = jax.tree.map(
        lambda p: np.random.default_rng(7).standard_normal((2, *p.shape)).astype(np.float32), params
    )
    tx = signax.DataParallel(
        signax.mean_scaled_signs("data", feedback="worker"), mesh, param_specs=specs
    )
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    expected = references.mean_of_scaled_signs([[*grads.values()]], feedback="worker")[0]
    for name, (mean, errors, _) in zip(grads, expected, strict=True):
        np.testing.assert_allclose(np.ravel(updates[name]), mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(flat_rows(state.memory.worker[name]), errors, atol=1e-6)


@pytest.mark.parametrize("feedback", ["worker", "none"])
def test_a_checkpoint_continues_the_same_on_every_mesh(feedback):
    """Every leaf has one scale, whether it is sharded or not."""
    shapes = {"large": (64, 512), "small": (4, 12), "odd": (5,)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    rng = np.random.default_rng(11)
    steps = [
        {
            # The columns of a leaf have different magnitudes.
            name: (rng.standard_normal((2, *shape)) * np.linspace(1, 9, shape[-1])).astype("f4")
            for name, shape in shapes.items()
        }
        for _ in range(4)
    ]
    whole = PartitionSpec()
    meshes = [
        ({"data": 2}, whole, whole),
        ({"data": 2, "model": 2}, PartitionSpec(None, "model"), PartitionSpec("model")),
        ({"data": 2, "fsdp": 2, "model": 2}, PartitionSpec("fsdp", "model"), whole),
        ({"data": 2, "fsdp": 2, "model": 2}, PartitionSpec(None, ("model", "fsdp")), whole),
    ]
    found, checkpoint = [], None
    for sizes, large, small in meshes:
        specs = {"large": large, "small": small, "odd": whole}
        tx = signax.DataParallel(
            signax.mean_scaled_signs("data", feedback=feedback),
            auto_mesh(sizes),
            param_specs=specs,
        )
        update = jax.jit(tx.update)
        if checkpoint is None:
            state = tx.init(params)
            for grads in steps[:-1]:
                _, state = update(grads, state, params)
            checkpoint = jax.device_get(state)
        restored = jax.device_put(checkpoint, tx.state_shardings(params))
        found.append(jax.device_get(update(steps[-1], restored, params)))
    for other in found[1:]:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), other, found[0])


@pytest.mark.parametrize("feedback", ["both", "worker"])
def test_programs_grow_linearly_with_the_number_of_small_leaves(feedback):
    def text(leaves):
        shapes = [(2 + n % 7, 300 + n % 5 * 100) for n in range(leaves)]
        tree = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        tx = signax.DataParallel(
            signax.mean_scaled_signs(AXIS, feedback=feedback), auto_mesh({AXIS: 8}), AXIS
        )
        rows = [jax.ShapeDtypeStruct((8, *leaf.shape), leaf.dtype) for leaf in tree]
        return jax.jit(tx.update).lower(rows, jax.eval_shape(tx.init, tree), tree)

    few, many = text(40), text(160)
    assert len(many.as_text()) < 4.5 * len(few.as_text())


def test_temporary_memory_of_small_leaves_is_bounded_by_their_size():
    tree = [jax.ShapeDtypeStruct((2, 1500), jnp.float32)] * 100
    tx = signax.DataParallel(signax.mean_scaled_signs(AXIS), auto_mesh({AXIS: 8}), AXIS)
    rows = [jax.ShapeDtypeStruct((8, *leaf.shape), leaf.dtype) for leaf in tree]
    program = jax.jit(tx.update).lower(rows, jax.eval_shape(tx.init, tree), tree).compile()
    size = sum(leaf.size for leaf in tree) * 4
    assert program.memory_analysis().temp_size_in_bytes < 3 * size


def test_a_block_larger_than_a_leaf_costs_no_more_than_the_leaf():
    tree = [jax.ShapeDtypeStruct((64,), jnp.float32)] * 2
    tx = signax.DataParallel(
        signax.mean_scaled_signs(AXIS, block=2**20), auto_mesh({AXIS: 8}), AXIS
    )
    rows = [jax.ShapeDtypeStruct((8, *leaf.shape), leaf.dtype) for leaf in tree]
    program = jax.jit(tx.update).lower(rows, jax.eval_shape(tx.init, tree), tree).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2**18


def test_large_values_do_not_overflow():
    rows = jnp.full((2, 64), 2e38).at[:, ::2].multiply(-1)
    memory = signax.scaled_signs_memory(rows[0], 2)
    mapped = rows_of_workers(
        "vmap", lambda row: signax.pmean_scaled_signs(row, AXIS, memory, step=0), 2
    )
    updates, _ = mapped(rows)
    np.testing.assert_allclose(updates, rows, rtol=1e-6)


def test_rejects_invalid_arguments():
    tree = jnp.ones((2, 300))
    memory = signax.scaled_signs_memory(tree[0], 2)

    def mean(*args, **options):
        options = {"step": 0, **options}
        call = partial(signax.pmean_scaled_signs, axis_name=AXIS, memory=memory, **options)
        return jax.vmap(lambda row: call(row), axis_name=AXIS)(*args)

    with pytest.raises(ValueError, match="block=0 is unknown"):
        mean(tree, block=0)
    with pytest.raises(ValueError, match=r"decay=1\.5 is outside"):
        mean(tree, decay=1.5)
    with pytest.raises(TypeError, match="tree has dtype int32"):
        mean(tree.astype(jnp.int32))
    with pytest.raises(ValueError, match=r"memory\.server has leaves.*DataParallel\.resize"):
        mean(jnp.ones((3, 300)))
    with pytest.raises(
        ValueError, match=r"tree and memory\.worker differ.*from scaled_signs_memory on the same"
    ):
        mean({"a": tree})
    with pytest.raises(ValueError, match="feedback='all' is unknown"):
        signax.scaled_signs_memory(tree, 2, feedback="all")
    for dtype in (jnp.int32, jnp.complex64, "single bit"):
        with pytest.raises(ValueError, match=r"^dtype=.* is no floating-point dtype"):
            signax.scaled_signs_memory(tree, 2, dtype=dtype)
    with pytest.raises(ValueError, match="num_workers=0"):
        signax.scaled_signs_memory(tree, 0)
    with pytest.raises(TypeError, match="num_workers='2' must be a whole number"):
        signax.scaled_signs_memory(tree, "2")
    with pytest.raises(TypeError, match=r"num_workers=2\.5 must be a whole number"):
        signax.mean_scaled_signs(AXIS, num_workers=2.5)


def test_accepts_python_and_numpy_integers_as_block_size():
    rows = jnp.ones((2, 300)).at[:, ::7].set(-3)

    @partial(rows_of_workers, "vmap", num_workers=2)
    def updates(rows):
        txs = (signax.mean_scaled_signs(AXIS, block=size) for size in (8, np.int64(8)))
        return [tx.update(rows, tx.init(rows))[0] for tx in txs]

    np.testing.assert_array_equal(*updates(rows))
    with pytest.raises(TypeError, match=r"block must be known.*'block' in the static_args"):
        signax.mean_scaled_signs(AXIS, block=jnp.int32(8))


def test_a_learning_rate_works_with_an_empty_leaf():
    params = {"vector": jnp.zeros(5), "empty": jnp.zeros((0, 3))}
    rows = {"vector": jnp.full((2, 5), 3.0), "empty": jnp.zeros((2, 0, 3))}
    mean = signax.mean_scaled_signs("data", learning_rate=lambda count: 1 / (1 + count))
    tx = signax.DataParallel(mean, auto_mesh({"data": 2}))
    updates, _ = jax.jit(tx.update)(rows, tx.init(params), params)
    np.testing.assert_array_equal(updates["vector"], np.full(5, 3))
    assert updates["empty"].shape == (0, 3)


def test_num_workers_must_be_static_under_inject_hyperparams():
    tx = optax.inject_hyperparams(signax.ef_sign_sgd)(0.1, axis_name=AXIS, num_workers=2)
    with pytest.raises(TypeError, match=r"num_workers must be known.*'num_workers' in the static_"):
        tx.init(jnp.zeros(3))


@pytest.mark.parametrize("memory_dtype", [None, jnp.float32])
@pytest.mark.parametrize("feedback", ["both", "worker", "none"])
def test_memories_of_sparse_f16_gradients_stay_finite(feedback, memory_dtype):
    """One coordinate grows faster than a scaled sign can send it, up to the end of the range."""
    num_workers = 2
    gradients = jnp.zeros((num_workers, 64), jnp.float16).at[:, 5].set(3e4)
    memory = signax.scaled_signs_memory(
        gradients[0], num_workers, feedback=feedback, dtype=memory_dtype
    )
    memory = jax.tree.map(lambda leaf: jnp.stack([leaf] * num_workers), memory)
    one_step = jax.jit(
        jax.vmap(partial(signax.pmean_scaled_signs, axis_name=AXIS, step=0), axis_name=AXIS)
    )
    for _ in range(100):
        updates, memory = one_step(gradients, memory=memory)
        for leaf in (updates, *jax.tree.leaves(memory)):
            assert np.isfinite(leaf).all()
        assert (updates[:, 5] > 0).all()  # no worker is excluded


def test_rejects_a_memory_of_another_type():
    with pytest.raises(TypeError, match="memory is of type dict: start with"):
        jax.vmap(
            lambda g: signax.pmean_scaled_signs(g, AXIS, {"worker": g}, step=0), axis_name=AXIS
        )(jnp.ones((2, 3)))
