"""`pvote` equals its reference for every option, transport, map, dtype and number of workers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec
from workers import AXIS, MAPS, auto_mesh, on_workers, one_of_equals, rows_of_workers

import signax
from signax import diagnostics

OPTIONS = [("dither", "dither"), ("dither", "plus"), ("plus", "dither"), ("plus", "plus"),
           ("abstain", "dither")]  # fmt: skip
TRANSPORTS = ("packed", "gather", "sum")
DTYPES = (jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16)
SHAPES = ((), (31,), (4, 8), (3, 11), (2, 0, 3), (127,))
# Leaves of 2**14 or more coordinates are packed alone: one of these flat, one along axis 1.
LARGE_SHAPES = ((45, 367), (1,), (128, 255))
WHOLE = PartitionSpec()


def random_rows(rng, shape, dtype):
    """Values that often tie and are often zero, of both signs."""
    return jnp.asarray(rng.choice([-2.0, -1.0, -0.0, 0.0, 1.0, 0.5], size=shape), dtype)


def assert_votes_equal_the_reference(kind, num_workers, shapes, options):
    """Compares every transport and option in one program, with any number of absent workers."""
    ways = list(itertools.product(options, TRANSPORTS))

    def vote_in_all_ways(tree, step, active):
        return [
            signax.pvote(
                tree, AXIS, step=step, zeros=zeros, ties=ties, active=active, transport=transport
            )
            for (zeros, ties), transport in ways
        ]

    rng = np.random.default_rng(num_workers)
    tree = {
        f"{jnp.dtype(dtype).name}{shape}": random_rows(rng, (num_workers, *shape), dtype)
        for dtype, shape in zip(itertools.cycle(DTYPES), shapes, strict=False)
    }
    vote = on_workers(kind, vote_in_all_ways, num_workers)
    for absent in range(num_workers + 1):
        step = 7 * absent + num_workers
        active = rng.permutation(np.arange(num_workers) >= absent)
        # Each worker has its own copy of the step, which varies over the axis by type.
        results = vote(tree, jnp.full(num_workers, step), jnp.asarray(active))
        for (way, result), name in itertools.product(zip(ways, results, strict=True), tree):
            (zeros, ties), transport = way
            values = np.asarray(tree[name], np.float64).reshape(num_workers, -1)
            expected = references.vote(values, step, zeros, ties, active)
            found = np.asarray(result[name], np.float64).reshape(-1)
            message = f"{name} {zeros} {ties} {transport} {active}"
            np.testing.assert_array_equal(found, expected, err_msg=message)


def maps_and_workers(*quick):
    """Numbers of workers under each map: around those at which a count needs one bit more."""
    numbers = {"shard_map": (1, 2, 3, 4, 7, 8, 9), "vmap": (1, 4), "pmap": (2, 5)}
    cases = [(kind, number) for kind in numbers for number in numbers[kind]]
    further = [
        pytest.param(*case, marks=pytest.mark.thorough) for case in cases if case not in quick
    ]
    return pytest.mark.parametrize(("kind", "num_workers"), [*quick, *further])


@maps_and_workers(("shard_map", 3), ("vmap", 1), ("vmap", 4), ("pmap", 2))
def test_votes_equal_the_reference_with_any_number_of_absent_workers(kind, num_workers):
    with jax.enable_x64(True):
        assert_votes_equal_the_reference(kind, num_workers, SHAPES, OPTIONS)


@pytest.fixture
def as_accelerators_pack(monkeypatch):
    """Make programs take the default branch of `lax.platform_dependent`."""
    jax.clear_caches()
    monkeypatch.setattr(lax, "platform_dependent", lambda *args, default, **_: default(*args))
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("as_accelerators_pack")
@pytest.mark.parametrize("shapes", [SHAPES, LARGE_SHAPES], ids=["small", "large"])
def test_votes_equal_the_reference_when_packed_as_on_accelerators(shapes):
    options = [("dither", "dither"), ("abstain", "dither")]
    with jax.enable_x64(True):
        assert_votes_equal_the_reference("shard_map", 4, shapes, options)


@maps_and_workers(("shard_map", 8))
def test_votes_on_large_leaves_equal_the_reference(kind, num_workers):
    with jax.enable_x64(True):
        options = [("dither", "dither"), ("abstain", "dither")]
        assert_votes_equal_the_reference(kind, num_workers, LARGE_SHAPES, options)


@pytest.mark.parametrize("zeros", ["dither", "abstain"])
@pytest.mark.parametrize("num_workers", [127, 128, 130])
def test_sums_of_small_integers_do_not_wrap(num_workers, zeros):
    rows = random_rows(np.random.default_rng(num_workers), (num_workers, 96), jnp.float32)
    rows = rows.at[:, :2].set(jnp.array([3.0, -3.0]))  # sums of +-M, which int8 holds up to 127

    def vote(row):
        return signax.pvote(row, AXIS, step=3, zeros=zeros, transport="sum")

    decided = on_workers("vmap", vote, num_workers)(rows)
    np.testing.assert_array_equal(decided[:2], [1.0, -1.0])
    np.testing.assert_array_equal(decided, references.vote(np.asarray(rows), 3, zeros))


@pytest.mark.parametrize("kind", MAPS)
def test_a_vote_keeps_structure_shapes_and_dtypes(kind):
    tree = {
        "bf16": jnp.ones((2, 3, 5), jnp.bfloat16),
        "nested": [jnp.ones((2,)), None, {}, jnp.ones((2, 0), jnp.float16)],
    }
    vote = on_workers(kind, lambda tree: signax.pvote(tree, AXIS, step=0), 2)
    result = vote(tree)
    assert jax.tree.structure(result) == jax.tree.structure(tree)
    assert [leaf.shape for leaf in jax.tree.leaves(result)] == [(3, 5), (), (0,)]
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(result)]
    assert dtypes == [jnp.bfloat16, jnp.float32, jnp.float16]


def assert_a_flat_leaf_is_decided_whole(num_workers, size, step):
    rows = random_rows(np.random.default_rng(size), (num_workers, size), jnp.float32)
    expected = references.vote(np.asarray(rows), step)

    def vote(row):
        return [signax.pvote(row, AXIS, step=step, transport=way) for way in ("packed", "gather")]

    for decided in on_workers("vmap", vote, num_workers)(rows):
        np.testing.assert_array_equal(decided, expected)


@pytest.mark.parametrize("bits", [-1, 0, 1, 33])
def test_a_leaf_that_just_fills_its_parts_is_decided_completely(bits):
    assert_a_flat_leaf_is_decided_whole(2, 32 * 2 * 127 + bits, 3)


@settings(max_examples=20)
@given(
    num_workers=st.integers(1, 5),
    parts=st.sampled_from([0, 1, 2]),
    words=st.integers(-1, 1),
    bits=st.integers(-1, 1),
    step=st.integers(0, 2**31 - 1),
)
def test_leaves_around_every_size_of_parts_are_decided_completely(
    num_workers, parts, words, bits, step
):
    # A part holds 128 k - 1 words of payload.
    payload = max(0, 128 * parts - 1)
    size = max(1, 32 * (num_workers * payload + words) + bits)
    assert_a_flat_leaf_is_decided_whole(num_workers, size, step)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("zeros", ["dither", "plus", "abstain"])
def test_one_nonfinite_value_excludes_the_worker_from_every_leaf(zeros, bad):
    rows = {"a": jnp.array([[1.0, 1.0], [1.0, 1.0], [-1.0, -1.0]]), "b": jnp.ones((3, 1))}
    rows["b"] = rows["b"].at[0, 0].set(bad)
    rows["b"] = rows["b"].at[1, 0].set(bad)
    vote = on_workers("vmap", lambda row: signax.pvote(row, AXIS, step=0, zeros=zeros), 3)
    result = vote(rows)
    np.testing.assert_array_equal(result["a"], [-1.0, -1.0])
    np.testing.assert_array_equal(result["b"], [1.0])


def test_an_active_flag_does_not_let_a_nan_vote():
    rows = jnp.array([[np.nan, 1.0], [-1.0, -1.0]])
    vote = on_workers("vmap", lambda row: signax.pvote(row, AXIS, step=0, active=True), 2)
    np.testing.assert_array_equal(vote(rows), [-1.0, -1.0])


@pytest.mark.parametrize("kind", MAPS)
def test_equal_values_on_every_worker_are_decided_unanimously(kind):
    rows = jnp.broadcast_to(jnp.array([3.0, -2.0, 1e-30, -1e30]), (6, 4))
    vote = on_workers(kind, lambda row: signax.pvote(row, AXIS, step=5), 6)
    np.testing.assert_array_equal(vote(rows), [1.0, -1.0, 1.0, -1.0])


def test_a_vote_on_a_constant_is_right_under_vmap():
    # Here vmap batches only the axis index.
    vote = jax.jit(jax.vmap(lambda _: signax.pvote(jnp.ones(4), AXIS, step=0), axis_name=AXIS))
    np.testing.assert_array_equal(vote(jnp.arange(3.0)), np.ones((3, 4)))


@pytest.mark.parametrize(
    ("zeros", "ties", "expected"), [("abstain", "dither", [1, 0, 0]), ("plus", "plus", [1, 1, 1])]
)
def test_without_a_dither_the_step_does_not_matter(zeros, ties, expected):
    rows = jnp.array([[1.0, -1.0, 0.0], [1.0, 1.0, 0.0]])
    for step in range(4):
        options = {"zeros": zeros, "ties": ties, "step": step}
        vote = on_workers("vmap", lambda row, o=options: signax.pvote(row, AXIS, **o), 2)
        np.testing.assert_array_equal(vote(rows), expected, err_msg=f"step {step}")


@pytest.mark.parametrize("collective", [signax.pvote, signax.pvote_scatter, signax.pmean_signs])
def test_step_is_a_required_argument(collective):
    with pytest.raises(TypeError, match="required keyword-only argument: 'step'"):
        collective(jnp.ones(3), AXIS)


def test_rejects_a_missing_step():
    vote = on_workers("vmap", lambda row: signax.pvote(row, AXIS, step=None), 2)
    with pytest.raises(TypeError, match=r"step=None must be one integer, the number of the step"):
        vote(jnp.ones((2, 3)))


def vote_on(tree, **options):
    return jax.vmap(lambda row: signax.pvote(row, AXIS, step=0, **options), axis_name=AXIS)(tree)


@pytest.mark.parametrize("option", ["zeros", "ties", "transport"])
def test_rejects_an_unknown_mode(option):
    with pytest.raises(ValueError, match=f"{option}='sometimes'.*use one of"):
        vote_on(jnp.ones((2, 3)), **{option: "sometimes"})


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, jnp.bool_])
def test_rejects_a_leaf_that_is_not_floating(dtype):
    with pytest.raises(TypeError, match=r"\['w'\]\[1\].*" + jnp.dtype(dtype).name):
        vote_on({"w": [jnp.ones((2, 3)), jnp.ones((2, 3), dtype)]})


@pytest.mark.parametrize("vote", [signax.pvote, signax.pvote_scatter])
@pytest.mark.parametrize("axis_name", [None, (), ("a", None), ["a"]])
def test_rejects_an_invalid_axis_name(axis_name, vote):
    with pytest.raises(TypeError, match="axis_name="):
        vote(jnp.ones(3), axis_name, step=0)


@pytest.mark.parametrize("vote", [signax.pvote, signax.pvote_scatter])
def test_rejects_a_repeated_axis(vote):
    with pytest.raises(ValueError, match=r"axis_name=\('a', 'a'\) names an axis twice"):
        vote(jnp.ones(3), ("a", "a"), step=0)


def test_an_unbound_axis_error_lists_the_ways_to_bind_it():
    with pytest.raises(NameError, match=r"axis_name='nowhere' is not bound.*shard_map.*pmap.*vmap"):
        signax.pvote(jnp.ones(3), "nowhere", step=0)


@pytest.mark.parametrize("step", [1.5, np.array([1, 2])])
def test_rejects_a_step_that_is_not_one_integer(step):
    with pytest.raises(TypeError, match="step="):
        jax.vmap(lambda row: signax.pvote(row, AXIS, step=step), axis_name=AXIS)(jnp.ones((2, 3)))


@pytest.mark.parametrize("active", [np.array([True, False]), 1.0])
def test_rejects_an_active_flag_that_is_not_one_boolean(active):
    with pytest.raises(TypeError, match="active="):
        vote_on(jnp.ones((2, 3)), active=active)


def test_rejects_values_that_are_replicated_by_type(mesh):
    replicated, split = PartitionSpec(), PartitionSpec("data")

    def summed_gradient(params, batch):
        # JAX sums a gradient with respect to replicated parameters over the workers.
        grads = jax.grad(lambda p: jnp.sum(p["w"] * batch))(params)
        return signax.pvote(grads, "data", step=0)

    step = jax.shard_map(
        summed_gradient, mesh=mesh, in_specs=(replicated, split), out_specs=replicated
    )
    with pytest.raises(ValueError, match=r"\['w'\] does not vary over axis 'data'.*pcast"):
        jax.eval_shape(step, {"w": jnp.ones(3)}, jnp.ones((8, 3)))


def test_a_vote_without_type_checks_equals_one_with_them(mesh):
    split = PartitionSpec("data")
    rows = random_rows(np.random.default_rng(0), (8, 100), jnp.float32)

    def vote(row):
        return signax.pvote(row[0], "data", step=3)[None]

    unchecked = jax.shard_map(vote, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    decided = jax.jit(unchecked)(rows)
    expected = references.vote(np.asarray(rows), 3)
    np.testing.assert_array_equal(decided, np.broadcast_to(expected, (8, 100)))


@pytest.mark.parametrize(
    ("transport", "expected"),
    [
        ("auto", {"all-gather": {"u32"}}),  # a small tree
        ("packed", {"all-gather": {"u32"}, "all-to-all": {"u32"}}),
        ("gather", {"all-gather": {"u32"}}),
    ],
)
def test_a_tree_is_sent_in_one_exchange_of_packed_words(transport, expected, mesh):
    tree = [jnp.ones((8, *shape), dtype) for shape in [(3,), (4, 8)] for dtype in DTYPES[1:]]
    split = PartitionSpec("data")

    def vote(rows):
        return signax.pvote([row[0] for row in rows], "data", step=0, transport=transport)

    program = jax.jit(jax.shard_map(vote, mesh=mesh, in_specs=(split,), out_specs=WHOLE))
    sent = diagnostics.collectives(program.lower(tree).compile())
    assert sorted(record.operation for record in sent) == sorted(expected)
    assert {record.dtype for record in sent} == {"u32"}


def test_a_large_tree_uses_the_transport_with_fewer_bytes(mesh):
    rows = jax.ShapeDtypeStruct((8, 1 << 20), jnp.float32)
    split = PartitionSpec("data")
    vote = jax.shard_map(
        lambda row: signax.pvote(row[0], "data", step=0), mesh=mesh, in_specs=split, out_specs=WHOLE
    )
    compiled = jax.jit(vote).lower(rows).compile()
    sent = diagnostics.collectives(compiled)
    assert sorted(record.operation for record in sent) == ["all-gather", "all-to-all"]
    one_worker = jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype)
    assert diagnostics.collective_bytes(compiled) == diagnostics.wire_bytes(one_worker, 8)


# Axes in a tuple, and exchanges split over a worker's devices.

PAIR = {"slice": 2, "chip": 4}
MIXED = {"large": (45, 367), "small": (3, 11)}


def mixed_rows(num_workers, dtype=jnp.float32):
    rng = np.random.default_rng(num_workers)
    return {name: random_rows(rng, (num_workers, *s), dtype) for name, s in MIXED.items()}


def assert_equals_the_vote(decided, rows, step, zeros="dither"):
    for name, leaf in rows.items():
        expected = references.vote(np.asarray(leaf).reshape(len(leaf), -1), step, zeros)
        np.testing.assert_array_equal(np.reshape(decided[name], -1), expected)


@pytest.mark.parametrize("axes", [("slice", "chip"), ("chip", "slice")])
@pytest.mark.parametrize("kind", ["shard_map", "vmap"])
def test_workers_along_several_axes_are_numbered_in_tuple_order(kind, axes):
    sizes = [PAIR[axis] for axis in axes]
    rows = mixed_rows(8)

    def vote(tree):
        return [signax.pvote(tree, axes, step=5, transport=way) for way in TRANSPORTS]

    if kind == "shard_map":

        def local(rows):
            return vote(jax.tree.map(lambda row: row[0], rows))

        # Specs order the rows, independently of the order of the axes in the mesh.
        mapped = jax.shard_map(
            local, mesh=auto_mesh(PAIR), in_specs=PartitionSpec(axes), out_specs=WHOLE
        )
        results = jax.jit(mapped)(rows)
    else:
        nested = jax.jit(jax.vmap(jax.vmap(vote, axis_name=axes[1]), axis_name=axes[0]))
        grid = jax.tree.map(lambda leaf: leaf.reshape(*sizes, *leaf.shape[1:]), rows)
        flat = jax.tree.map(lambda leaf: leaf.reshape(8, *leaf.shape[2:]), nested(grid))
        results = jax.tree.map(one_of_equals, flat)
    for decided in results:
        assert_equals_the_vote(decided, rows, step=5)


def split_vote(**options):
    """The vote of 2 workers of 4 devices each, as a function of the workers' rows."""

    def local(rows):
        row = jax.tree.map(lambda row: row[0], rows)
        return signax.pvote(row, "slice", step=5, **options)

    return jax.jit(
        jax.shard_map(local, mesh=auto_mesh(PAIR), in_specs=PartitionSpec("slice"), out_specs=WHOLE)
    )


@pytest.mark.parametrize("transport", ["packed", "gather", "auto"])
@pytest.mark.parametrize("zeros", ["dither", "abstain"])
def test_a_split_exchange_decides_the_same(zeros, transport):
    rows = mixed_rows(2)
    vote = split_vote(split_over="chip", zeros=zeros, transport=transport)
    assert_equals_the_vote(vote(rows), rows, 5, zeros)
    rows["small"] = rows["small"].at[1, 2, 10].set(jnp.nan)
    assert_equals_the_vote(vote(rows), jax.tree.map(lambda row: row[:1], rows), 5, zeros)


@pytest.mark.parametrize("transport", ["packed", "gather"])
def test_an_exchange_is_split_under_vmap_too(transport):
    def vote(row):
        return signax.pvote(row, "slice", step=5, split_over="chip", transport=transport)

    rows = mixed_rows(3)
    devices = jax.vmap(vote, in_axes=None, axis_name="chip", axis_size=4)
    decided = jax.tree.map(
        lambda leaf: one_of_equals(leaf.reshape(12, *leaf.shape[2:])),
        jax.jit(jax.vmap(devices, axis_name="slice"))(rows),
    )
    assert_equals_the_vote(decided, rows, 5)


def test_an_exchange_split_over_four_devices_sends_a_quarter_between_workers():
    shape = jax.ShapeDtypeStruct((2, 1 << 20), jnp.float32)
    sent = {
        split: diagnostics.collectives(split_vote(**options).lower(shape).compile())
        for split, options in [(False, {}), (True, {"split_over": "chip"})]
    }
    words = (1 << 20) // 32
    (alone,), shared = sent[False], {record.group_size: record for record in sent[True]}
    assert (alone.operation, alone.group_size) == ("all-gather", 2)
    assert words < alone.elements <= words + 128
    assert sorted(shared) == [2, 4]
    assert words / 4 < shared[2].elements <= words / 4 + 128
    assert {record.operation for record in sent[True]} == {"all-gather"}


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"split_over": "slice"}, ValueError, "split_over='slice' is an axis of the workers"),
        ({"split_over": ("chip",)}, TypeError, r"split_over=\('chip',\) must name one axis"),
        ({"split_over": "chip", "transport": "sum"}, ValueError, "cannot be split over 'chip'"),
        ({"split_over": "nowhere"}, NameError, "split_over='nowhere' is neither a mapped axis"),
    ],
)
def test_rejects_an_invalid_split(options, kind, said):
    with pytest.raises(kind, match=said):
        split_vote(**options)(mixed_rows(2))


def test_rejects_a_split_of_values_that_differ_between_devices():
    vote = jax.shard_map(
        lambda tree: signax.pvote(tree, "slice", step=0, split_over="chip"),
        mesh=auto_mesh(PAIR),
        in_specs=PartitionSpec(("slice", "chip")),
        out_specs=WHOLE,
    )
    with pytest.raises(ValueError, match=r"\['w'\] varies over split_over='chip'.*pmean"):
        jax.eval_shape(vote, {"w": jnp.ones(8)})


@pytest.mark.parametrize("zeros", ["dither", "abstain"])
def test_sharded_parameters_are_voted_on_block_by_block(zeros):
    mesh = auto_mesh({"data": 4, "model": 2})
    specs = {"large": PartitionSpec(None, "model"), "small": PartitionSpec()}
    rng = np.random.default_rng(0)
    shapes = {"large": (130, 300), "small": (3, 11)}
    rows = {name: random_rows(rng, (4, *s), jnp.float32) for name, s in shapes.items()}
    tx = signax.DataParallel(signax.majority_vote("data", zeros=zeros), mesh, param_specs=specs)
    params = jax.tree.map(lambda row: row[0], rows)
    decided, _ = jax.jit(tx.update)(rows, tx.init(params), params)
    blocks = np.split(np.asarray(rows["large"]), 2, axis=2)
    expected = [references.vote(block.reshape(4, -1), 0, zeros) for block in blocks]
    expected = np.concatenate([block.reshape(130, 150) for block in expected], axis=1)
    np.testing.assert_array_equal(decided["large"], expected)
    assert_equals_the_vote({"small": decided["small"]}, {"small": rows["small"]}, 0, zeros)
    if zeros == "abstain":  # without a dither the index of a coordinate does not matter
        assert_equals_the_vote(decided, rows, 0, zeros)


# Each worker its part.


@pytest.mark.parametrize("step", [2**31, 2**32 + 5, -3])
def test_steps_beyond_32_bits_wrap_around(step):
    values = jnp.zeros((3, 9))

    def votes(values):
        return [signax.pvote(values, AXIS, step=s) for s in (step, jnp.uint32(step % 2**32))]

    np.testing.assert_array_equal(*rows_of_workers("vmap", votes, 3)(values))


@pytest.mark.parametrize("step", ["1", 1.5, True, [1], jnp.ones(1, jnp.int32)], ids=str)
def test_rejects_steps_of_other_types(step):
    with pytest.raises(TypeError, match=r"step=.* must be one integer"):
        jax.vmap(lambda g: signax.pvote(g, AXIS, step=step), axis_name=AXIS)(jnp.ones((2, 3)))
