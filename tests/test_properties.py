"""Any tree of any values gives the right answer, or an error that names the problem."""

import functools
import inspect
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from hypothesis import given, settings
from hypothesis import strategies as st
from registry import AXIS, OPTAXS, REGISTRY
from special_values import as_seen, special_values
from workers import auto_mesh

import signax
from signax import diagnostics

# NumPy warns of signalling NaNs.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

NUM_WORKERS, STEPS = 3, 2
OURS = [name for name in REGISTRY if name not in OPTAXS]
few = settings(max_examples=10)


class Pair(NamedTuple):
    left: Any
    right: Any


def awkward(leaf):
    """A tree of every kind of node, with `leaf` of a shape and a dtype in it."""
    return {
        "matrix": leaf((3, 5), "float32"),
        "list": [leaf((33,), "float16"), {"number": leaf((), "bfloat16")}],
        "pair": Pair((leaf((1, 1), "float32"),), leaf((0, 3), "float16")),
        "none": None,
        "masked": optax.MaskedNode(),
        "empty": {"dict": {}, "tuple": ()},
    }


# The kinds of values of a leaf.
KINDS = ("normal", "zeros", "huge", "below the range", "special", "one NaN", "one infinity")
FINITE_KINDS = KINDS[:4]


def values(kind, shape, dtype, rng):
    info = jnp.finfo(dtype)
    normal = rng.standard_normal(shape).astype(dtype)
    if kind == "zeros":
        return np.asarray(rng.choice([0.0, -0.0], shape), dtype)
    if kind == "huge":
        return np.asarray(rng.choice([-0.99, 0.5, 0.99], shape) * float(info.max), dtype)
    if kind == "below the range":
        return np.asarray(rng.choice([-0.25, 0.5, 3.0], shape) * float(info.tiny), dtype)
    if kind == "special":
        return np.asarray(rng.choice(special_values(dtype), shape), dtype)
    if kind != "normal" and normal.size:
        normal = np.array(normal)
        normal.flat[rng.integers(normal.size)] = np.nan if kind == "one NaN" else -np.inf
    return np.asarray(normal, dtype)


@st.composite
def trees(draw, kinds=KINDS):
    """Awkward trees of values, with another kind for each leaf."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return awkward(lambda shape, dtype: values(draw(st.sampled_from(kinds)), shape, dtype, rng))


def rows_of(workers):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *workers)


rows = st.lists(trees(), min_size=NUM_WORKERS, max_size=NUM_WORKERS).map(rows_of)


def like(tree):
    return jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), tree)


def is_finite(tree):
    floating = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return all(np.isfinite(np.asarray(leaf)).all() for leaf in floating)


def numbers(array):
    return np.asarray(array, np.float64)


# --- transformations of one worker -----------------------------------------------------------

SIGNS = ("scale_by_stochastic_sign", "scale_by_signum", "hold_if_nonfinite", "leave_out_nonfinite",
         "majority_vote")  # fmt: skip
# These pass a worker's own values on, so nonfinite values come out.
PASSES_ON = {"adversary", "scale_by_stochastic_sign axis"}


@functools.cache
def compiled(name):
    tx = REGISTRY[name].make()
    return jax.jit(tx.init), jax.jit(tx.update)


@pytest.mark.parametrize("name", OURS)
@given(st.data())
@few
def test_steps_keep_shapes_dtypes_and_finiteness(name, data):
    kinds = data.draw(st.sampled_from([FINITE_KINDS, KINDS]))
    init, update = compiled(name)
    params = awkward(lambda shape, dtype: jnp.ones(shape, dtype))
    state, finite = init(params), True
    for _ in range(STEPS):
        updates = data.draw(trees(kinds))
        finite &= is_finite(updates)
        expected = like(state)
        new_updates, state = update(updates, state, params)
        assert like(new_updates) == like(updates)
        assert like(state) == expected
        # A nonfinite worker is excluded, and its state does not change.
        if finite or (REGISTRY[name].voted and name not in PASSES_ON):
            assert is_finite(new_updates)
            assert is_finite(state)
        if name.startswith(SIGNS):
            for leaf in map(numbers, jax.tree.leaves(new_updates)):
                assert np.isin(leaf[~np.isnan(leaf)], [-1, 0, 1]).all()


@given(trees(FINITE_KINDS))
@few
def test_scaled_signs_equal_the_reference_up_to_the_end_of_the_range(tree):
    for block in ("leaf", "row", 4):
        tx = signax.scale_by_scaled_sign(block=block)
        found, _ = tx.update(jax.tree.map(jnp.asarray, tree), tx.init(None))
        for leaf, scaled in zip(jax.tree.leaves(tree), jax.tree.leaves(found), strict=True):
            expected = references.scaled_sign(as_seen(leaf), block)
            info = jnp.finfo(leaf.dtype)
            # Means of numbers just within the normal range may be flushed to zero.
            least = 64 * float(jnp.finfo(jnp.float32).tiny) + 2 * float(info.tiny)
            np.testing.assert_allclose(
                numbers(scaled),
                expected,
                rtol=4 * float(info.eps),
                atol=least,
                err_msg=f"block={block!r}, {leaf.dtype}{leaf.shape}",
            )


# --- collectives -----------------------------------------------------------------------------

VOTES = {
    "packed": {"zeros": "dither", "ties": "dither", "transport": "packed"},
    "gather": {"zeros": "abstain", "ties": "dither", "transport": "gather"},
    "sum": {"zeros": "plus", "ties": "dither", "transport": "sum"},
}


def over_workers(function):
    return jax.jit(jax.vmap(function, axis_name=AXIS))


@functools.cache
def compiled_vote(collective, name):
    options = dict(VOTES[name])
    if collective is signax.pmean_signs:
        del options["ties"]

    def local(tree, step, active):
        return collective(tree, AXIS, step=step, active=active, **options)

    return over_workers(local)


def votes_in(tree, active):
    """The workers that take part, from the rows of all workers."""
    finite = [
        np.isfinite(as_seen(leaf)).reshape(NUM_WORKERS, -1).all(axis=1)
        for leaf in jax.tree.leaves(tree)
    ]
    return np.all(finite, axis=0) & active


flags = st.lists(st.booleans(), min_size=NUM_WORKERS, max_size=NUM_WORKERS).map(np.array)
steps = st.integers(0, 9) | st.integers(0, 2**31 - 1)


def assert_rows_equal(found, expected, **tolerance):
    for row in numbers(found).reshape(NUM_WORKERS, -1):
        np.testing.assert_allclose(row, expected, **{"rtol": 0, **tolerance})


@pytest.mark.parametrize("collective", [signax.pvote, signax.pmean_signs])
@pytest.mark.parametrize("name", VOTES)
@given(tree=rows, active=flags, step=steps)
@few
def test_votes_and_means_of_signs_equal_the_reference(collective, name, tree, active, step):
    vote = compiled_vote(collective, name)
    found = vote(tree, jnp.full(NUM_WORKERS, step), jnp.asarray(active))
    assert like(found) == like(tree)
    active = votes_in(tree, active)
    zeros, ties = VOTES[name]["zeros"], VOTES[name]["ties"]
    for leaf, signs in zip(jax.tree.leaves(tree), jax.tree.leaves(found), strict=True):
        flat = as_seen(leaf).reshape(NUM_WORKERS, -1)
        if collective is signax.pvote:
            expected = references.vote(flat, step, zeros, ties, active)
        else:
            expected = references.mean_of_signs(flat, step, zeros, active)
            expected = expected.astype(np.float32).astype(leaf.dtype).astype(np.float64)
        assert_rows_equal(signs, expected)


@functools.cache
def compiled_scatter():
    def local(tree, step, active):
        return signax.pvote_scatter(tree, AXIS, step=step, active=active)

    return over_workers(local)


@given(seed=st.integers(0, 10**6), kinds=st.tuples(*[st.sampled_from(KINDS)] * 2), active=flags)
@few
def test_scattered_votes_equal_the_reference(seed, kinds, active):
    rng = np.random.default_rng(seed)
    tree = [values(kind, (NUM_WORKERS, 6, 3), "float32", rng) for kind in kinds]
    tree.append(np.zeros((NUM_WORKERS, 0, 2), np.float32))
    found = compiled_scatter()(tree, jnp.full(NUM_WORKERS, seed), jnp.asarray(active))
    active = votes_in(tree, active)
    for leaf, part in zip(tree, found, strict=True):
        parts = as_seen(leaf).reshape(NUM_WORKERS, NUM_WORKERS, -1)  # [worker, part, ...]
        for k in range(NUM_WORKERS):
            expected = references.vote(parts[:, k], seed, active=active)
            np.testing.assert_array_equal(np.ravel(part[k]), expected)


@functools.cache
def compiled_mean():
    tx = signax.average_updates(AXIS)
    return over_workers(lambda tree, active: tx.update(tree, tx.init(tree), active=active))


@given(tree=rows, active=flags)
@few
def test_means_equal_the_reference_and_are_finite(tree, active):
    found, state = compiled_mean()(tree, jnp.asarray(active))
    active = votes_in(tree, active)
    np.testing.assert_array_equal(state.participation.voters, active.sum())
    np.testing.assert_array_equal(state.participation.missed, ~active)
    for leaf, mean in zip(jax.tree.leaves(tree), jax.tree.leaves(found), strict=True):
        flat = as_seen(leaf).reshape(NUM_WORKERS, -1)
        expected = references.mean(flat, active)
        largest = np.abs(flat[active]).max(initial=0)
        least = 16 * float(jnp.finfo(leaf.dtype).tiny)
        eps = float(jnp.finfo(leaf.dtype).eps)
        assert np.isfinite(numbers(mean)).all()
        assert_rows_equal(mean, expected, atol=eps * largest + least)


@functools.cache
def compiled_scaled_mean():
    def local(tree, memory, step, active):
        return signax.pmean_scaled_signs(tree, AXIS, memory, step=step, active=active)

    return over_workers(local)


@given(tree=rows, active=flags, step=steps)
@few
def test_means_of_scaled_signs_are_bounded_and_excluded_workers_keep_their_memory(
    tree, active, step
):
    one = jax.tree.map(lambda leaf: leaf[0], tree)
    memory = signax.scaled_signs_memory(one, NUM_WORKERS)
    before = jax.tree.map(lambda leaf: jnp.stack([leaf] * NUM_WORKERS), memory)
    arguments = jnp.full(NUM_WORKERS, step), jnp.asarray(active)
    found, after = compiled_scaled_mean()(tree, before, *arguments)
    assert (like(found), like(after)) == (like(tree), like(before))
    assert is_finite((found, after))
    active = votes_in(tree, active)
    leaves = map(jax.tree.leaves, (tree, found, after.worker))
    for leaf, mean, kept in zip(*leaves, strict=True):
        assert not np.any(numbers(kept)[~active])
        if not leaf.size:
            continue
        flat = as_seen(leaf).reshape(NUM_WORKERS, -1)
        scale = np.abs(flat[active]).mean(axis=1).sum() / max(1, active.sum())
        bound = scale * (1 + 4 * float(jnp.finfo(leaf.dtype).eps)) + float(
            jnp.finfo(leaf.dtype).tiny
        )
        assert (np.abs(numbers(mean)) <= bound).all()
        assert_rows_equal(mean, np.ravel(numbers(mean)[0]))


@pytest.mark.parametrize("tree", [{}, (), None, [jnp.zeros((NUM_WORKERS, 0, 3))]], ids=str)
def test_collectives_accept_trees_without_coordinates(tree):
    def local(index, tree):
        memory = signax.scaled_signs_memory(tree, NUM_WORKERS)
        mean = signax.average_updates(AXIS)
        return (
            signax.pvote(tree, AXIS, step=index),
            signax.pvote(tree, AXIS, step=index, transport="sum"),
            signax.pmean_signs(tree, AXIS, step=index),
            signax.pvote_scatter(tree, AXIS, step=index),
            signax.pmean_scaled_signs(tree, AXIS, memory, step=index)[0],
            mean.update(tree, mean.init(tree))[0],
        )

    results = jax.vmap(local, axis_name=AXIS)(jnp.arange(NUM_WORKERS), tree)
    assert all(jax.tree.structure(result) == jax.tree.structure(tree) for result in results)


# --- errors -------------------------------------------------------------------------

WRONG = {
    "int32": jnp.ones(2, jnp.int32),
    "bool": jnp.ones(2, bool),
    "complex64": jnp.ones(2, jnp.complex64),
    "float8_e5m2": jnp.ones(2, jnp.float8_e5m2),
    "key<fry>": jax.random.key(0),
    "not an array: 1.5": 1.5,
    "not an array: text": "float32",
}
COLLECTIVES = {
    "pvote": lambda tree: signax.pvote(tree, AXIS, step=0),
    "pvote_scatter": lambda tree: signax.pvote_scatter(tree, AXIS, step=0),
    "pmean_signs": lambda tree: signax.pmean_signs(tree, AXIS, step=0),
    "pmean_scaled_signs": lambda tree: signax.pmean_scaled_signs(
        tree, AXIS, signax.ScaledSignsMemory(None, None), step=0
    ),
}


@pytest.mark.parametrize("name", [*OURS, *COLLECTIVES])
@given(st.data())
@few
def test_rejects_a_leaf_of_another_kind_by_name(name, data):
    wrong = data.draw(st.sampled_from(list(WRONG)))
    number = data.draw(st.integers(0, 4))
    tree = awkward(lambda shape, dtype: jnp.ones(shape, dtype))
    leaves, structure = jax.tree.flatten(tree)
    path = jax.tree_util.keystr([path for path, _ in jax.tree.leaves_with_path(tree)][number])
    spoilt = structure.unflatten([*leaves[:number], WRONG[wrong], *leaves[number + 1 :]])
    if name in COLLECTIVES:
        refuse = COLLECTIVES[name]
    else:  # without the registry's workers, which need arrays
        case = REGISTRY[name]
        tx = case.factory(**case.numbers, **case.others)
        refuse = functools.partial(tx.update, state=tx.init(tree), params=tree)
    with pytest.raises(TypeError) as caught:
        jax.vmap(lambda _: refuse(spoilt), axis_name=AXIS)(jnp.arange(2))
    assert f"{'tree' if name in COLLECTIVES else 'updates'}{path}" in str(caught.value)
    assert wrong.split(":")[0] in str(caught.value)


@pytest.mark.parametrize("function", [
    diagnostics.density,
    lambda tree: diagnostics.wire_bytes(tree, 2),
    lambda tree: diagnostics.exchange_seconds(tree, 2, link_rate=1e9),
    lambda tree: signax.scaled_signs_memory(tree, 2),
], ids=["density", "wire_bytes", "exchange_seconds", "scaled_signs_memory"])  # fmt: skip
@pytest.mark.parametrize("wrong", [name for name in WRONG if "1.5" not in name])
def test_functions_of_trees_reject_a_leaf_of_another_kind_by_name(function, wrong):
    with pytest.raises(TypeError, match=r"tree\['bad'\]"):
        function({"good": jnp.ones(2), "bad": WRONG[wrong]})


def grown(tree):
    """The tree with one more leaf."""
    return {**tree, "more": jnp.ones(2)}


def reshaped(tree):
    return {**tree, "matrix": jnp.ones((5, 3))}


def widened(tree):
    """The tree with a leaf that broadcasts to the original leaf."""
    return {**tree, "matrix": jnp.ones((2, 3, 5))}


CHANGES = (grown, reshaped, widened)
REMEMBERS = [
    name
    for name in OURS
    if "accumulator_dtype" in inspect.signature(REGISTRY[name].factory).parameters
]


def two_trees(change, swap):
    """A tree and a changed tree, in either order."""
    tree = awkward(lambda shape, dtype: jnp.ones(shape, dtype))
    return (change(tree), tree) if swap else (tree, change(tree))


@pytest.mark.parametrize("name", REMEMBERS)
@given(change=st.sampled_from(CHANGES), swap=st.booleans())
@few
def test_rejects_a_state_of_another_tree_by_name(name, change, swap):
    mine, other = two_trees(change, swap)
    tx = REGISTRY[name].make()
    with pytest.raises(ValueError, match=r"updates.*(state|memory)\."):
        jax.eval_shape(tx.update, other, tx.init(mine), other)


@pytest.mark.parametrize("name", [name for name in OURS if REGISTRY[name].needs_params])
@given(change=st.sampled_from(CHANGES), swap=st.booleans())
@few
def test_rejects_parameters_of_another_tree_by_name(name, change, swap):
    mine, other = two_trees(change, swap)
    tx = REGISTRY[name].make()
    with pytest.raises(ValueError, match=r"updates.*params"):
        jax.eval_shape(tx.update, mine, tx.init(mine), other)


# --- DataParallel ----------------------------------------------------------------------------


@functools.cache
def parallel(num_workers):
    """Signum under `DataParallel`, and its compiled update."""
    tx = signax.DataParallel(signax.signum(0.5, axis_name="data"), auto_mesh({"data": num_workers}))
    return tx, jax.jit(tx.update)


@given(tree=rows, active=flags)
@few
def test_data_parallel_equals_the_reference_and_stays_finite(tree, active):
    tx, update = parallel(NUM_WORKERS)
    params = awkward(lambda shape, dtype: jnp.ones(shape, dtype))
    updates, state = update(tree, tx.init(params), params, active=jnp.asarray(active))
    finite = votes_in(tree, True)
    votes = finite & active
    assert optax.tree.get(state, "voters") == votes.sum()
    np.testing.assert_array_equal(optax.tree.get(state, "missed"), ~votes)
    assert is_finite((updates, state))
    momenta = jax.tree.leaves(optax.tree.get(state, "momentum"))
    leaves = map(jax.tree.leaves, (tree, updates))
    for leaf, update, momentum in zip(*leaves, momenta, strict=True):
        assert not np.any(numbers(momentum)[~finite])
        # A tenth of the smallest normal number is subnormal.
        seen = as_seen((leaf * np.array(0.1, leaf.dtype)).astype(leaf.dtype))
        flat = np.where(finite[:, None], seen.reshape(NUM_WORKERS, -1), 0)
        expected = -0.5 * references.vote(flat, 0, active=votes)
        np.testing.assert_array_equal(np.ravel(numbers(update)), expected)

    smaller = tx.resize(state, params, 1)
    for before, after in zip(
        momenta, jax.tree.leaves(optax.tree.get(smaller, "momentum")), strict=True
    ):
        eps, largest = float(jnp.finfo(before.dtype).eps), np.abs(numbers(before)).max(initial=0)
        least = 16 * float(jnp.finfo(before.dtype).tiny)
        mean = numbers(before).mean(axis=0)
        np.testing.assert_allclose(numbers(after)[0], mean, rtol=0, atol=eps * largest + least)


@functools.cache
def gradient():
    tx, _ = parallel(NUM_WORKERS)
    return jax.jit(
        tx.value_and_grad(lambda params, batch: jnp.sum(params * jnp.sum(batch, axis=0)))
    )


@given(seed=st.integers(0, 10**6), kind=st.sampled_from(KINDS))
@few
def test_gradients_belong_to_shares_and_the_loss_averages_finite_losses(seed, kind):
    batch = values(kind, (NUM_WORKERS, 4), "float16", np.random.default_rng(seed))
    batch = batch / np.array(4, batch.dtype)  # so a loss is finite if its share is
    loss, grads = gradient()(jnp.ones(4, jnp.float16), batch)
    np.testing.assert_array_equal(numbers(grads), numbers(batch))
    losses = numbers(batch).sum(axis=1)
    losses = losses[np.isfinite(losses)]
    if not len(losses):
        assert np.isnan(loss)
    else:
        assert np.isfinite(loss)
        np.testing.assert_allclose(
            loss,
            losses.mean(),
            rtol=0,
            atol=0.004 * np.abs(batch[np.isfinite(batch)]).astype(float).sum() + 1e-6,
        )


@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    num_workers=st.integers(1, 4),
    rows=st.integers(1, 9),
)
@few
def test_rejects_rows_and_batches_that_do_not_fit(shape, num_workers, rows):
    tx, _ = parallel(NUM_WORKERS)
    params = {"a": jnp.ones(shape)}
    updates = {"a": jnp.ones((num_workers, *shape))}
    if num_workers != NUM_WORKERS:
        with pytest.raises(ValueError, match=r"updates\['a'\] has shape"):
            jax.eval_shape(tx.update, updates, tx.init(params), params)
    if rows % NUM_WORKERS:
        with pytest.raises(ValueError, match=r"batch\['x'\] has shape"):
            tx.value_and_grad(lambda p, b: jnp.sum(p))(jnp.ones(2), {"x": jnp.ones((rows, 2))})


# --- diagnostics -----------------------------------------------------------------------------


@given(trees())
@few
def test_densities_lie_between_one_coordinate_and_equal_magnitudes(tree):
    found = diagnostics.density(tree)
    for leaf, density in zip(jax.tree.leaves(tree), jax.tree.leaves(found), strict=True):
        # Relative to the largest value, so squares stay in the range of f64 too.
        seen = as_seen(leaf)
        if not np.isfinite(seen).all():
            assert np.isnan(density)
            continue
        assert 1 / max(leaf.size, 1) <= density * (1 + 1e-6)
        assert density <= 1
        largest = np.abs(seen).max(initial=0)
        relative = np.abs(seen) / (largest or 1)
        expected = relative.mean() ** 2 / (relative**2).mean() if largest else 1
        np.testing.assert_allclose(density, expected, rtol=1e-5)


@given(
    shapes=st.lists(st.lists(st.integers(0, 300), max_size=2).map(tuple), max_size=4),
    num_workers=st.integers(1, 300),
    scheme=st.sampled_from(["vote", "abstain", "mean_signs", "scaled_signs", "mean"]),
)
@settings(max_examples=60)
def test_bytes_and_seconds_are_bounded_by_the_bits(shapes, num_workers, scheme):
    tree = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    size = sum(math.prod(shape) for shape in shapes)
    sent = diagnostics.wire_bytes(tree, num_workers, scheme=scheme)
    seconds = diagnostics.exchange_seconds(tree, num_workers, link_rate=8.0, scheme=scheme)
    assert seconds == sent
    if num_workers == 1 or not size:
        assert sent == 0
    elif scheme == "mean":
        assert sent == math.ceil(2 * (num_workers - 1) * 4 * size / num_workers)
    else:
        bits = {"abstain": 2}.get(scheme, 1) * size
        assert sent >= (num_workers - 1) * bits / num_workers / 8
