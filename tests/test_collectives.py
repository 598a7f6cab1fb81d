"""`pvote` against its reference, exactly: every option, map, number of workers and dtype."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from hypothesis import given, settings
from hypothesis import strategies as st
from workers import AXIS, MAPS, on_workers

import signax

OPTIONS = [("dither", "dither"), ("dither", "plus"), ("plus", "dither"), ("plus", "plus"),
           ("abstain", "dither")]  # fmt: skip
DTYPES = (jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16)
SHAPES = ((), (1,), (31,), (4, 8), (3, 11), (2, 0, 3), (127,), (257,))


def random_rows(rng, shape, dtype):
    """Values that tie and vanish often, a sign of zero included."""
    return jnp.asarray(rng.choice([-2.0, -1.0, -0.0, 0.0, 1.0, 0.5], size=shape), dtype)


def vote_with_all_options(tree, step, active):
    return [
        signax.pvote(tree, AXIS, step=step[()], zeros=zeros, ties=ties, active=active)
        for zeros, ties in OPTIONS
    ]


@pytest.mark.parametrize(
    "num_workers",
    [1, 2, 3, 8, *(pytest.param(number, marks=pytest.mark.slow) for number in (4, 5, 6, 7, 9))],
)
@pytest.mark.parametrize("kind", MAPS)
def test_votes_equal_the_reference_with_any_number_of_workers_out(kind, num_workers):
    rng = np.random.default_rng(num_workers)
    with jax.enable_x64(True):
        tree = {
            f"{jnp.dtype(dtype).name}{shape}": random_rows(rng, (num_workers, *shape), dtype)
            for dtype, shape in zip(itertools.cycle(DTYPES), SHAPES, strict=False)
        }
        vote = on_workers(kind, vote_with_all_options, num_workers)
        for out in range(num_workers + 1):
            step = 7 * out + num_workers
            active = rng.permutation(np.arange(num_workers) >= out)
            results = vote(tree, jnp.full(num_workers, step), jnp.asarray(active))
            for (zeros, ties), result in zip(OPTIONS, results, strict=True):
                for name, rows in tree.items():
                    values = np.asarray(rows, np.float64).reshape(num_workers, -1)
                    expected = references.vote(values, step, zeros, ties, active)
                    np.testing.assert_array_equal(
                        np.asarray(result[name], np.float64).reshape(-1),
                        expected,
                        err_msg=f"{name} {zeros} {ties} {active}",
                    )


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


@settings(max_examples=25, deadline=None)
@given(
    num_workers=st.integers(1, 5),
    parts=st.sampled_from([0, 1, 2]),
    words=st.integers(-1, 1),
    bits=st.integers(-1, 1),
    step=st.integers(0, 2**31 - 1),
)
def test_a_leaf_that_just_fills_the_parts_is_decided_whole(num_workers, parts, words, bits, step):
    # A part holds 128 k - 1 words of payload.
    payload = max(0, 128 * parts - 1)
    size = max(1, 32 * (num_workers * payload + words) + bits)
    rows = random_rows(np.random.default_rng(size), (num_workers, size), jnp.float32)
    vote = on_workers("vmap", lambda row: signax.pvote(row, AXIS, step=step), num_workers)
    np.testing.assert_array_equal(vote(rows), references.vote(np.asarray(rows), step))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("zeros", ["dither", "plus", "abstain"])
def test_a_worker_with_one_value_that_is_not_finite_is_out_everywhere(zeros, bad):
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
    # There vmap batches nothing but the axis index.
    vote = jax.jit(jax.vmap(lambda _: signax.pvote(jnp.ones(4), AXIS, step=0), axis_name=AXIS))
    np.testing.assert_array_equal(vote(jnp.arange(3.0)), np.ones((3, 4)))


def test_a_step_that_nothing_uses_may_be_left_out():
    rows = jnp.array([[1.0, -1.0, 0.0], [1.0, 1.0, 0.0]])
    for zeros, ties, expected in [("abstain", "dither", [1, 0, 0]), ("plus", "plus", [1, 1, 1])]:
        vote = on_workers(
            "vmap", lambda row, z=zeros, t=ties: signax.pvote(row, AXIS, zeros=z, ties=t), 2
        )
        np.testing.assert_array_equal(vote(rows), expected)


@pytest.mark.parametrize(("zeros", "ties"), [("dither", "plus"), ("plus", "dither")])
def test_a_step_that_is_used_must_be_given(zeros, ties):
    vote = on_workers("vmap", lambda row: signax.pvote(row, AXIS, zeros=zeros, ties=ties), 2)
    with pytest.raises(ValueError, match="step=None"):
        vote(jnp.ones((2, 3)))


def vote_on(tree, **options):
    return jax.vmap(lambda row: signax.pvote(row, AXIS, step=0, **options), axis_name=AXIS)(tree)


@pytest.mark.parametrize("option", ["zeros", "ties", "transport"])
def test_an_unknown_mode_is_named(option):
    with pytest.raises(ValueError, match=f"{option}='sometimes'.*use one of"):
        vote_on(jnp.ones((2, 3)), **{option: "sometimes"})


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, jnp.bool_])
def test_a_leaf_that_has_no_sign_is_named(dtype):
    with pytest.raises(TypeError, match=r"\['w'\]\[1\].*" + jnp.dtype(dtype).name):
        vote_on({"w": [jnp.ones((2, 3)), jnp.ones((2, 3), dtype)]})


@pytest.mark.parametrize("axis_name", [None, ("a", "b"), ["a"]])
def test_what_names_no_single_axis_is_refused(axis_name):
    with pytest.raises(TypeError, match="axis_name="):
        signax.pvote(jnp.ones(3), axis_name, step=0)


def test_an_unbound_axis_is_named_with_the_ways_to_bind_it():
    with pytest.raises(NameError, match=r"axis_name='nowhere' is not bound.*shard_map.*pmap.*vmap"):
        signax.pvote(jnp.ones(3), "nowhere", step=0)


@pytest.mark.parametrize("step", [1.5, np.array([1, 2])])
def test_a_step_that_is_not_one_integer_is_named(step):
    with pytest.raises(TypeError, match="step="):
        jax.vmap(lambda row: signax.pvote(row, AXIS, step=step), axis_name=AXIS)(jnp.ones((2, 3)))


@pytest.mark.parametrize("active", [np.array([True, False]), 1.0])
def test_an_active_flag_that_is_not_one_boolean_is_named(active):
    with pytest.raises(TypeError, match="active="):
        vote_on(jnp.ones((2, 3)), active=active)


def test_values_that_types_know_to_be_equal_are_refused(mesh):
    replicated, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("data")

    def summed_gradient(params, batch):
        # With respect to replicated parameters: JAX has summed it over the workers already.
        grads = jax.grad(lambda p: jnp.sum(p["w"] * batch))(params)
        return signax.pvote(grads, "data", step=0)

    step = jax.shard_map(
        summed_gradient, mesh=mesh, in_specs=(replicated, split), out_specs=replicated
    )
    with pytest.raises(ValueError, match=r"\['w'\] does not vary over axis 'data'.*pcast"):
        jax.eval_shape(step, {"w": jnp.ones(3)}, jnp.ones((8, 3)))


def test_a_vote_without_type_checks_equals_one_with_them(mesh):
    split = jax.sharding.PartitionSpec("data")
    rows = random_rows(np.random.default_rng(0), (8, 100), jnp.float32)

    def vote(row):
        return signax.pvote(row[0], "data", step=3)[None]

    unchecked = jax.shard_map(vote, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    decided = jax.jit(unchecked)(rows)
    expected = references.vote(np.asarray(rows), 3)
    np.testing.assert_array_equal(decided, np.broadcast_to(expected, (8, 100)))


def test_a_tree_takes_one_exchange_of_packed_words(mesh):
    split, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    tree = [jnp.ones((8, *shape), dtype) for shape in SHAPES for dtype in DTYPES[1:]]

    def vote(rows):
        return signax.pvote([row[0] for row in rows], "data", step=0)

    program = jax.jit(jax.shard_map(vote, mesh=mesh, in_specs=(split,), out_specs=whole))
    sent = signax.diagnostics.collectives(program.lower(tree).compile())
    assert sorted(record.operation for record in sent) == ["all-gather", "all-to-all"]
    assert {record.dtype for record in sent} == {"u32"}
