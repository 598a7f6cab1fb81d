"""Buckets: one exchange in several messages, and participation bucket by bucket."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from jax.sharding import PartitionSpec
from workers import auto_mesh

import signax

PARAMS = {
    "embed": jnp.zeros((10, 3)),
    "head": jnp.zeros((3, 11)),
    "layer": {"b": jnp.zeros(7), "w": jnp.zeros((4, 6))},
}
BUCKETS = {"embed": 2, "head": 0, "layer": {"b": 1, "w": 1}}
LABELS = [2, 0, 1, 1]  # of the leaves in order
DATA = {"axis_name": "data"}
thorough = pytest.mark.thorough


def random_rows(num_workers, seed, params=PARAMS):
    """Multiples of an eighth, on which arithmetic is exact, and dead coordinates."""
    rng = np.random.default_rng(seed)

    def rows(leaf):
        numbers = rng.integers(-16, 17, (num_workers, *leaf.shape)) / 8
        return np.where(np.arange(leaf.shape[-1]) % 5 == 0, 0, numbers).astype(np.float32)

    return jax.tree.map(rows, params)


def with_faults(rows, faults):
    """Rows with a NaN or an infinity of worker i in a leaf of bucket b, for each pair (i, b)."""
    leaves, structure = jax.tree.flatten(rows)
    for worker, bucket in faults:
        value = [np.nan, np.inf, -np.inf][(worker + bucket) % 3]
        leaves[LABELS.index(bucket)][worker].flat[-1] = value
    return structure.unflatten(leaves)


def run(tx, steps, params=PARAMS, active=None):
    """Updates and states after each step, from rows and perhaps flags of all workers."""
    state, update, history = tx.init(params), jax.jit(tx.update), []
    for t, rows in enumerate(steps):
        extra = {} if active is None else {"active": jnp.asarray(active[t])}
        updates, state = update(rows, state, params, **extra)
        history.append((updates, state))
    return history


def data_parallel(tx, num_workers=4, **options):
    return signax.DataParallel(tx, auto_mesh({"data": num_workers}), **options)


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# Where all workers take part, the messages are cut, and nothing else changes.

RATE = optax.linear_schedule(0.25, 0.0, 10)
MASK = {"embed": False, "head": True, "layer": {"b": False, "w": True}}
EQUAL = {
    "signum": lambda: signax.signum(RATE, weight_decay=0.1, mask=MASK, **DATA),
    "lion": lambda: signax.lion(0.1, **DATA),
    "muon": lambda: signax.muon(0.1, **DATA),
    "scaled signs by blocks": lambda: signax.ef_sign_sgd(0.1, 0.9, block=8, **DATA),
    "quantised by blocks": lambda: signax.mean_quantized("data", bits=4, block=8),
    "one memory": lambda: signax.mean_scaled_signs("data", feedback="worker", block=8),
    "mean of signs": lambda: signax.mean_signs("data"),
    "mean": lambda: signax.average_updates("data"),
    "abstain": lambda: signax.majority_vote("data", zeros="abstain"),
    "plus": lambda: signax.majority_vote("data", zeros="plus", ties="plus"),
    "packed": lambda: signax.majority_vote("data", transport="packed"),
    "gather": lambda: signax.majority_vote("data", transport="gather"),
    "sum": lambda: signax.majority_vote("data", transport="sum"),
    "weights": lambda: signax.majority_vote("data", weights=(1.0, 2.0, 0.5, 1.0)),
    "agreement": lambda: signax.majority_vote("data", agreement=True),
    "injected": lambda: optax.inject_hyperparams(signax.signum, static_args=["axis_name"])(
        RATE, beta=0.5, **DATA
    ),
}
QUICK = ("signum", "lion", "scaled signs by blocks", "abstain")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=thorough) for n in EQUAL]
)
def test_updates_equal_those_of_one_message_bit_for_bit(name):
    steps = [random_rows(4, t) for t in range(6)]
    params = jax.tree.map(lambda leaf: leaf + 1, PARAMS)
    expected = run(data_parallel(EQUAL[name]()), steps, params)
    found = run(data_parallel(signax.in_buckets(EQUAL[name](), BUCKETS)), steps, params)
    for (updates, state), (wanted, _) in zip(found, expected, strict=True):
        assert_equal(updates, wanted)
        assert signax.participation(state).voters == 4
    assert any(np.any(leaf) for leaf in jax.tree.leaves(found[-1][0]))


MEANS = {
    "ef_sign_sgd": lambda: signax.ef_sign_sgd(0.1, 0.9, **DATA),
    "mean_quantized": lambda: signax.mean_quantized("data"),
}
ROUNDED = MEANS | {"one_bit_adam": lambda: signax.one_bit_adam(0.1, warmup_steps=2, **DATA)}


@pytest.mark.parametrize(
    "name", [n if n == "ef_sign_sgd" else pytest.param(n, marks=thorough) for n in ROUNDED]
)
def test_scales_of_small_leaves_differ_by_rounding(name):
    """Magnitudes of small leaves are added up together, in an order that depends on the others."""
    steps = [random_rows(4, t) for t in range(6)]
    expected = run(data_parallel(ROUNDED[name]()), steps)
    found = run(data_parallel(signax.in_buckets(ROUNDED[name](), BUCKETS)), steps)
    for (updates, _), (wanted, _) in zip(found, expected, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, wanted)


@pytest.mark.parametrize("name", MEANS)
def test_large_leaves_have_equal_scales(name):
    params = {"first": jnp.zeros((128, 130)), "last": jnp.zeros((129, 128))}
    steps = [random_rows(2, t, params) for t in range(3)]
    buckets = {"first": 1, "last": 0}
    expected = run(data_parallel(MEANS[name](), 2), steps, params)
    found = run(data_parallel(signax.in_buckets(MEANS[name](), buckets), 2), steps, params)
    for (updates, _), (wanted, _) in zip(found, expected, strict=True):
        assert_equal(updates, wanted)


SHARDED = {
    "embed": PartitionSpec("model"),
    "head": PartitionSpec(),
    "layer": {"b": PartitionSpec(), "w": PartitionSpec(None, "model")},
}


@pytest.mark.parametrize(
    ("make", "specs", "as_function"),
    [
        (lambda: signax.majority_vote("data", transport="packed", split_over="model"), None, False),
        (lambda: signax.signum(0.1, **DATA), SHARDED, True),
        pytest.param(lambda: signax.signum(0.1, **DATA), SHARDED, False, marks=thorough),
        pytest.param(
            lambda: signax.ef_sign_sgd(0.1, block=8, **DATA), SHARDED, True, marks=thorough
        ),
    ],
    ids=["split", "a function, sharded", "sharded", "sharded memories"],
)
def test_workers_may_have_several_devices(make, specs, as_function):
    mesh = auto_mesh({"data": 4, "model": 2})

    def label(params):
        return jax.tree.map(lambda bucket, _: bucket, BUCKETS, params)

    steps = [random_rows(4, t) for t in range(4)]
    transformations = make(), signax.in_buckets(make(), label if as_function else BUCKETS)
    expected, found = (
        run(signax.DataParallel(tx, mesh, param_specs=specs), steps) for tx in transformations
    )
    for (updates, _), (wanted, _) in zip(found, expected, strict=True):
        assert_equal(updates, wanted)


def test_agreement_of_a_bucket_counts_its_own_coordinates():
    """So weights by agreement differ between buckets."""
    tx = data_parallel(
        signax.in_buckets(signax.majority_vote("data", weights="agreement"), BUCKETS)
    )
    steps = [random_rows(4, t) for t in range(6)]
    for rows in steps:  # the last worker opposes the first two
        jax.tree.map(lambda leaf: leaf.__setitem__(1, leaf[0]), rows)
        jax.tree.map(lambda leaf: leaf.__setitem__(3, -leaf[0]), rows)
    reputations = [references.Reputations(4) for _ in range(3)]
    for t, (updates, _) in enumerate(run(tx, steps)):
        values = [leaf.reshape(4, -1) for leaf in jax.tree.leaves(steps[t])]
        for leaf, own, b in zip(jax.tree.leaves(updates), values, LABELS, strict=True):
            weights = reputations[b].of(np.ones(4, bool))
            np.testing.assert_array_equal(
                leaf.reshape(-1), references.weighted_vote(own, weights, t)
            )
        for b, reputation in enumerate(reputations):
            own = [v for v, label in zip(values, LABELS, strict=True) if label == b]
            reputation.advance(np.concatenate(own, axis=1), t)


# Faults.


def faulty_steps(num_workers, number=6):
    """Steps in each of which a worker in three has a fault in a bucket drawn at random."""
    rng, steps = np.random.default_rng(num_workers), []
    for t in range(number):
        faults = [(i, rng.integers(3)) for i in range(num_workers) if rng.random() < 0.3]
        # Every bucket has the fault of one worker alone.
        faults = [(t % num_workers, t // 2)] if t % 2 == 0 else faults
        steps.append(with_faults(random_rows(num_workers, t), faults))
    return steps, rng.random((number, num_workers)) < 0.8


def missed_steps(steps, active):
    """The steps in which each worker missed a bucket at least, int[T, M]."""
    leaves = [jax.tree.leaves(rows) for rows in steps]
    votes = [
        references.bucket_participants(step, LABELS, flags)
        for step, flags in zip(leaves, active, strict=True)
    ]
    return np.array([v.sum(axis=1).min() for v in votes]), ~np.array([v.all(axis=0) for v in votes])


WORKERS = [n if n in (2, 3, 8) else pytest.param(n, marks=thorough) for n in range(2, 9)]


@pytest.mark.parametrize("num_workers", WORKERS)
def test_votes_with_faults_in_any_bucket_equal_the_reference(num_workers):
    steps, active = faulty_steps(num_workers)
    tx = signax.in_buckets(signax.signum(0.25, 0.5, **DATA), BUCKETS)
    leaves = [jax.tree.leaves(rows) for rows in steps]
    expected = references.signum_in_buckets(leaves, LABELS, 0.5, active)
    voters, missed = missed_steps(steps, active)
    found = run(data_parallel(tx, num_workers), steps, active=active)
    for t, (updates, state) in enumerate(found):
        momenta = optax.tree.get_all_with_path(state, "momentum")
        pairs = zip(jax.tree.leaves(updates), expected[t], LABELS, strict=True)
        for n, (update, (decision, momentum), b) in enumerate(pairs):
            np.testing.assert_array_equal(update.reshape(-1), -0.25 * decision)
            own = dict(enumerate(jax.tree.leaves(momenta[b][1], is_leaf=_is_masked)))[n]
            np.testing.assert_array_equal(own.reshape(num_workers, -1), momentum)
        participation = signax.participation(state)
        assert participation.voters == voters[t]
        np.testing.assert_array_equal(participation.missed, missed[: t + 1].sum(axis=0))


def _is_masked(node):
    return isinstance(node, optax.MaskedNode)


@pytest.mark.parametrize("num_workers", [3, pytest.param(8, marks=thorough)])
def test_error_memories_with_faults_in_any_bucket_equal_the_reference(num_workers):
    steps, active = faulty_steps(num_workers)
    tx = signax.in_buckets(signax.mean_scaled_signs("data"), BUCKETS)
    found = run(data_parallel(tx, num_workers), steps, active=active)
    leaves = [jax.tree.leaves(rows) for rows in steps]
    votes = np.array(
        [references.bucket_participants(s, LABELS, a) for s, a in zip(leaves, active, strict=True)]
    )
    for b in range(3):
        chosen = [n for n, label in enumerate(LABELS) if label == b]
        own = [[step[n] for n in chosen] for step in leaves]
        expected = references.mean_of_scaled_signs(own, active=votes[:, b])
        for t, (updates, state) in enumerate(found):
            memory = jax.tree.leaves(optax.tree.get_all_with_path(state, "worker")[b][1])
            updates = [jax.tree.leaves(updates)[n] for n in chosen]
            for update, kept, (mean, workers, _) in zip(updates, memory, expected[t], strict=True):
                np.testing.assert_allclose(update.reshape(-1), mean, rtol=1e-4, atol=1e-6)
                kept = np.asarray(kept).reshape(num_workers, -1)
                np.testing.assert_allclose(kept, workers, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("excluded", ["inactive", "nonfinite"])
def test_where_no_worker_takes_part_nothing_moves(excluded):
    tx = data_parallel(signax.in_buckets(signax.signum(0.25, **DATA), BUCKETS), 3)
    rows, flags = random_rows(3, 0), np.ones((1, 3), bool)
    if excluded == "inactive":
        flags[:] = False
    else:
        rows = with_faults(rows, [(i, 1) for i in range(3)])
    updates, state = run(tx, [rows], active=flags)[0]
    assert not np.any(updates["embed"])
    assert not np.any(updates["layer"]["w"])
    assert np.all(updates["head"]) == (excluded == "nonfinite")
    assert signax.participation(state).voters == 0
    np.testing.assert_array_equal(signax.participation(state).missed, 1)
    momenta = [found for _, found in optax.tree.get_all_with_path(state, "momentum")]
    assert np.any(momenta[0]["head"])
    assert np.any(momenta[2]["embed"]) == (excluded == "inactive")
