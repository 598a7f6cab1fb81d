"""Votes with weights: given weights, and weights that follow from agreement with the others."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from jax.sharding import AxisType, PartitionSpec
from workers import AXIS, auto_mesh, on_workers, rows_of_workers

import signax
from signax import diagnostics, testing

WEIGHTS = (3.0, 0.1, 1.0, 0.0, 2.0, 0.7, 1.0, 16.0)
ZEROS, TIES = ("dither", "abstain", "plus"), ("dither", "plus")


def rows_with_zeros(num_workers, size, seed=0):
    rng = np.random.default_rng(seed)
    return rng.choice([-2.0, -1.0, 0.0, 0.5, 1.0], size=(num_workers, size)).astype(np.float32)


def apart(tree):
    """Rows [M, ...] of every leaf as [M, d], in the order of the tree."""
    return [np.asarray(leaf).reshape(len(leaf), -1) for leaf in jax.tree.leaves(tree)]


# --- given weights ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transport", "numbers"), [("packed", (1, 3, 5, 8)), ("gather", (2, 4, 6, 7))]
)
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("zeros", ZEROS)
def test_weighted_votes_equal_the_reference_with_any_number_of_workers(
    zeros, ties, transport, numbers
):
    for num_workers in numbers:
        weights = WEIGHTS[:num_workers]
        rows = rows_with_zeros(num_workers, 133, num_workers)
        rows[num_workers // 2, 7] = np.nan if num_workers % 2 == 0 else 1.0

        def decide(row, active, weights=weights):
            vote = functools.partial(
                signax.pvote, row, AXIS, zeros=zeros, ties=ties, transport=transport, active=active
            )
            return jnp.stack([vote(step=step, weights=weights) for step in (0, 3)])

        votes = on_workers("vmap", decide, num_workers)
        for absent in {0, 1, num_workers - 1}:
            active = np.arange(num_workers) >= absent
            found = votes(rows, active)
            for step, decided in zip((0, 3), found, strict=True):
                expected = references.weighted_vote(rows, weights, step, zeros, ties, active)
                np.testing.assert_array_equal(decided, expected)


@functools.cache
def compiled_vote(weights, zeros, ties, transport):
    return on_workers(
        "vmap",
        lambda row: signax.pvote(
            row, AXIS, step=1, weights=weights, zeros=zeros, ties=ties, transport=transport
        ),
        len(weights),
    )


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    st.lists(
        st.one_of(st.integers(0, 5), st.floats(0, 100, width=32, allow_subnormal=False)),
        min_size=1,
        max_size=8,
    ).filter(lambda weights: max(weights) > 1e-3),
    st.sampled_from(ZEROS),
    st.sampled_from(TIES),
    st.sampled_from(["packed", "gather"]),
    st.integers(0, 99),
)
def test_any_weights_give_the_sums_of_numpy(weights, zeros, ties, transport, seed):
    rows = rows_with_zeros(len(weights), 40, seed)
    found = compiled_vote(tuple(weights), zeros, ties, transport)(rows)
    expected = references.weighted_vote(rows, weights, 1, zeros, ties)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("kind", ["shard_map", "pmap"])
def test_every_map_gives_the_same_weighted_vote(kind, zeros):
    """Under `shard_map` types prove that the result is the same on every worker."""
    rows = {"a": rows_with_zeros(8, 30), "b": rows_with_zeros(8, 17_000).reshape(8, 170, 100)}

    def vote(row):
        return signax.pvote(row, AXIS, step=0, zeros=zeros, weights=WEIGHTS)

    found = on_workers(kind, vote, 8)(rows)
    expected = [references.weighted_vote(leaf, WEIGHTS, 0, zeros) for leaf in apart(rows)]
    for decided, wanted in zip(jax.tree.leaves(found), expected, strict=True):
        np.testing.assert_array_equal(np.ravel(decided), wanted)


def test_many_workers_are_added_up_in_their_order():
    """Above 64 workers in a loop. The sum of f32 depends on the order."""
    num_workers = 100
    weights = np.random.default_rng(0).random(num_workers).astype(np.float32) ** 4
    rows = rows_with_zeros(num_workers, 70)
    vote = on_workers(
        "vmap", lambda row: signax.pvote(row, AXIS, step=0, weights=weights), num_workers
    )
    np.testing.assert_array_equal(vote(rows), references.weighted_vote(rows, weights))


@pytest.mark.parametrize("scale", [1e-30, 3e38, 1e300])
def test_weights_of_any_size_count_by_their_ratios(scale):
    rows = rows_with_zeros(8, 60)
    vote = on_workers(
        "vmap",
        lambda row: signax.pvote(row, AXIS, step=0, weights=[scale * w for w in WEIGHTS]),
        8,
    )
    np.testing.assert_array_equal(vote(rows), references.weighted_vote(rows, WEIGHTS))


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("ties", TIES)
def test_equal_weights_decide_like_a_vote_without_weights(zeros, ties):
    rows = rows_with_zeros(6, 100)
    rows[2, 0] = np.inf
    vote = on_workers(
        "vmap",
        lambda row: signax.pvote(row, AXIS, step=2, zeros=zeros, ties=ties, weights=[3] * 6),
        6,
    )
    np.testing.assert_array_equal(vote(rows), references.vote(rows, 2, zeros, ties))


@pytest.mark.parametrize("kind", ["vmap", "shard_map"])
def test_weights_follow_the_index_along_several_axes(kind):
    rows, weights = rows_with_zeros(6, 50), (8.0, 4.0, 2.0, 1.0, 0.5, 0.25)
    axes = ("a", "b")

    def votes(row):
        return [
            signax.pvote(row, axes, step=0, weights=weights, transport=way)
            for way in ("packed", "gather")
        ]

    if kind == "vmap":
        mapped = jax.vmap(jax.vmap(votes, axis_name="b"), axis_name="a")
        found = [leaf[0, 0] for leaf in jax.jit(mapped)(rows.reshape(2, 3, -1))]
    else:
        mesh = auto_mesh({"a": 2, "b": 3})
        found = jax.jit(
            jax.shard_map(
                lambda row: votes(row[0]),
                mesh=mesh,
                in_specs=PartitionSpec(axes),
                out_specs=PartitionSpec(),
            )
        )(rows)
    for decided in found:
        np.testing.assert_array_equal(decided, references.weighted_vote(rows, weights))


def test_a_worker_of_weight_zero_takes_part_and_decides_nothing():
    rows = np.array([[5.0, -1.0, 2.0], [-1.0, 1.0, 1.0], [9.0, 2.0, -3.0]], np.float32)
    tx = signax.majority_vote(AXIS, weights=(0, 1, 0))
    mapped = rows_of_workers("vmap", lambda row: tx.update(row, tx.init(row)), 3)
    updates, state = mapped(rows)
    np.testing.assert_array_equal(updates, np.sign(rows[1])[None].repeat(3, 0))
    np.testing.assert_array_equal(signax.participation(state).voters, 3)
    np.testing.assert_array_equal(signax.participation(state).missed, 0)


def weighted_votes(rows, weights, active):
    """The decisions of a vote with weights and a dither memory, [T, d]."""
    memory, decisions = references.DitherMemory(), []
    for step, values in enumerate(rows):
        takes_part = references.participants(values, active[step])
        dead = np.zeros((len(values), 1))
        at, options = memory.at(step), {"active": takes_part}
        decisions.append(references.weighted_vote(values, weights, step, **options, **at))
        memory.drift += references.weighted_vote(dead, weights, step, **options, **at)[0]
        if not takes_part.all():
            memory.first_missed = min(memory.first_missed, step // 2)
    return np.array(decisions)


@pytest.mark.parametrize("weights", [(1, 2, 1, 2), (4.0, 1.5, 1.0, 0.5)])
def test_a_weighted_vote_remembers_how_dead_coordinates_drift(weights):
    num_steps, rng = 40, np.random.default_rng(1)
    rows = np.stack([rows_with_zeros(4, 30, seed) for seed in range(num_steps)])
    rows[:, :, :4] = 0
    active = rng.random((num_steps, 4)) > 0.2
    tx = signax.majority_vote(AXIS, weights=weights)
    update = jax.jit(jax.vmap(lambda g, s, a: tx.update(g, s, active=a), axis_name=AXIS))
    states = jax.vmap(lambda _: tx.init(None))(jnp.arange(4))
    for step, expected in enumerate(weighted_votes(rows, weights, active)):
        decided, states = update(jnp.asarray(rows[step]), states, jnp.asarray(active[step]))
        np.testing.assert_array_equal(decided, np.broadcast_to(expected, rows[step].shape))


OPTIMIZERS = {
    "sign_sgd": signax.sign_sgd,
    "signum": functools.partial(signax.signum, beta=0.0),
    "lion": functools.partial(signax.lion, b1=0.0, weight_decay=0.0),
    "muon": functools.partial(
        signax.muon, others_rms=1.0, weight_dimension_numbers=lambda params: None
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_pass_weights_to_their_vote(name):
    rows, weights = rows_with_zeros(4, 33), (5, 1, 1, 2)
    tx = OPTIMIZERS[name](0.5, axis_name="data", zeros="abstain", weights=weights)
    tx, params = signax.DataParallel(tx, auto_mesh({"data": 4})), jnp.zeros(33)
    updates, _ = jax.jit(tx.update)(rows, tx.init(params), params)
    expected = references.weighted_vote(rows, weights, 0, "abstain")
    np.testing.assert_array_equal(updates, -0.5 * expected)


@pytest.mark.parametrize("zeros", ["dither", "abstain"])
@pytest.mark.parametrize("transport", ["packed", "gather"])
def test_a_split_exchange_decides_by_the_same_weights(transport, zeros):
    rows, weights = rows_with_zeros(4, 5000), (4.0, 1.0, 1.5, 2.0)
    vote = signax.majority_vote(
        "data", zeros=zeros, transport=transport, split_over="chip", weights=weights
    )
    tx, params = signax.DataParallel(vote, auto_mesh({"data": 4, "chip": 2})), jnp.zeros(5000)
    updates, _ = jax.jit(tx.update)(rows, tx.init(params), params)
    np.testing.assert_array_equal(updates, references.weighted_vote(rows, weights, 0, zeros))


def test_weights_change_no_byte_and_no_collective():
    rows, found = jax.ShapeDtypeStruct((8, 1 << 20), jnp.float32), []
    for weights in (None, WEIGHTS):
        tx = signax.DataParallel(
            signax.majority_vote("data", weights=weights), auto_mesh({"data": 8})
        )
        state = tx.abstract_state(jax.ShapeDtypeStruct((1 << 20,), jnp.float32))
        step = jax.jit(tx.update).lower(rows, state).compile()
        found.append([(one.operation, one.bytes_sent) for one in diagnostics.collectives(step)])
    assert found[0] == found[1]


# --- weights by agreement --------------------------------------------------------------------


def noisy_rows(step, num_workers, sizes, inverting, signal=0.5):
    """Gradients of workers that share a mean, some inverted, with zeros; and the mean."""
    rng = np.random.default_rng(step)
    mean = {name: rng.choice([-signal, signal], size) for name, size in sizes.items()}
    rows = {}
    for name, size in sizes.items():
        noise = rng.standard_normal((num_workers, size))
        leaf = (mean[name] + noise) * (rng.random((num_workers, size)) > 0.1)
        leaf[:inverting] *= -1
        rows[name] = leaf.astype(np.float32)
    return rows, mean


def follow(reputations, weights):
    """Assert that weights are the reference's up to one step of rounding, and take them over."""
    np.testing.assert_allclose(weights, reputations.weights, atol=1.01 / 256)
    reputations.weights = np.asarray(weights, np.float64)


def all_at_once(rows):
    return np.concatenate(apart(rows), axis=1)


@pytest.mark.parametrize(
    ("zeros", "transport"), [("dither", "packed"), ("dither", "gather"), ("abstain", "packed")]
)
def test_reputations_follow_the_reference_for_fifty_steps(zeros, transport):
    num_workers, sizes = 8, {"a": 500, "b": 301}
    vote = signax.majority_vote("data", zeros=zeros, transport=transport, weights="agreement")
    tx = signax.DataParallel(vote, auto_mesh({"data": num_workers}))
    params = {name: jnp.zeros(size) for name, size in sizes.items()}
    state, update = tx.init(params), jax.jit(tx.update)
    reputations, rng = references.Reputations(num_workers), np.random.default_rng(5)
    right, honest = {"weighted": 0, "counted": 0, "honest": 0}, np.arange(num_workers) >= 3
    coordinates = 40 * sum(sizes.values())
    for step in range(50):
        rows, mean = noisy_rows(step, num_workers, sizes, inverting=3)
        active = rng.random(num_workers) > 0.1 if step > 20 else np.ones(num_workers, bool)
        if step == 10:
            rows["b"][4, 3] = np.nan
        weights = optax.tree.get(state, "weights")
        takes_part = references.participants(all_at_once(rows), active)
        follow(reputations, weights)
        memory = optax.tree.get(state, "dither")
        at = {}
        if memory is not None:
            at = {"drift": int(memory.drift), "shuffled": step // 2 > memory.first_missed}
        updates, state = update(rows, state, params, active=jnp.asarray(active))
        for name, leaf in rows.items():
            expected = references.weighted_vote(
                leaf, reputations.of(takes_part), step, zeros, active=takes_part, **at
            )
            np.testing.assert_array_equal(updates[name], expected)
            if step >= 10:
                by_count = references.vote(leaf, step, zeros, active=takes_part)
                best = references.vote(leaf, step, zeros, active=takes_part & honest)
                decisions = {"weighted": expected, "counted": by_count, "honest": best}
                for kind, decided in decisions.items():
                    right[kind] += np.sum(decided == np.sign(mean[name])) / coordinates
        reputations.advance(all_at_once(rows), step, active)
        np.testing.assert_allclose(
            optax.tree.get(state, "average_agreement"), reputations.average, rtol=1e-5
        )
    assert (reputations.weights[:3] == 0).all()
    assert (reputations.weights[3:] > 0.8).all()
    # 60% of the coordinates are right by count (52% with "abstain", where ties are 0), 78% to 79%
    # with weights and, with dithered ties, by the honest workers alone.
    assert right["counted"] < 0.62
    assert right["weighted"] > max(0.77, right["honest"] - 0.01)


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5])
def test_few_workers_have_reputations_too(num_workers):
    tx = signax.majority_vote(AXIS, weights="agreement")
    init = rows_of_workers("vmap", lambda row: tx.init(row), num_workers)
    update = jax.jit(jax.vmap(tx.update, axis_name=AXIS))
    reputations, states = references.Reputations(num_workers), None
    for step in range(6):
        rows = all_at_once(noisy_rows(step, num_workers, {"a": 200}, inverting=num_workers > 2)[0])
        states = init(rows) if states is None else states
        decided, states = update(rows, states)
        expected = references.weighted_vote(rows, reputations.weights, step)
        if step == 0:  # later the memory of the dither decides ties
            np.testing.assert_array_equal(decided[0], expected)
        reputations.advance(rows, step)
        for average in states.reputation.average_agreement:
            np.testing.assert_allclose(average, reputations.average, rtol=1e-5)
        for weights in states.reputation.weights:
            follow(reputations, weights)


def test_voters_without_reputation_vote_with_equal_weights():
    tx = signax.majority_vote(AXIS, weights="agreement")
    rows = rows_with_zeros(5, 200)

    def vote(row, weights, active):
        state = tx.init(row)
        state = state._replace(reputation=state.reputation._replace(weights=weights))
        return tx.update(row, state, active=active)[0]

    vote = jax.jit(jax.vmap(vote, in_axes=(0, None, 0), axis_name=AXIS))
    everyone = np.ones(5, bool)
    alike = references.vote(rows)
    np.testing.assert_array_equal(vote(rows, jnp.zeros(5), everyone)[0], alike)
    active = np.array([False, True, True, True, True])
    found = vote(rows, jnp.array([1.0, 0, 0, 0, 0]), active)[0]
    np.testing.assert_array_equal(found, references.vote(rows, active=active))


def test_an_excluded_worker_keeps_its_reputation():
    tx = signax.DataParallel(
        signax.majority_vote("data", weights="agreement"), auto_mesh({"data": 6})
    )
    params = jnp.zeros(300)
    state, update = tx.init(params), jax.jit(tx.update)
    rows = all_at_once(noisy_rows(0, 6, {"a": 300}, inverting=0)[0])
    rows[1, 5] = np.nan
    _, state = update(rows, state, params, active=jnp.arange(6) != 4)
    average = np.asarray(optax.tree.get(state, "average_agreement"))
    np.testing.assert_array_equal(average[[1, 4]], np.float32(0.51))
    assert (average[[0, 2, 3, 5]] > np.float32(0.51)).all()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_reputations_cover_all_blocks_of_sharded_leaves(kind):
    mesh = jax.make_mesh(
        (4, 2), ("data", "model"), axis_types=(kind, kind), devices=jax.devices()[:8]
    )
    specs = {"a": PartitionSpec("model"), "b": PartitionSpec()}
    vote = signax.majority_vote("data", weights="agreement", agreement=True)
    tx = signax.DataParallel(vote, mesh, param_specs=specs)
    rows = noisy_rows(0, 4, {"a": 640, "b": 31}, inverting=1)[0]

    def place(leaf, spec):
        return jax.device_put(leaf, jax.NamedSharding(mesh, spec))

    params = {name: place(jnp.zeros(leaf.shape[1:]), specs[name]) for name, leaf in rows.items()}
    placed = {name: place(leaf, PartitionSpec("data", *specs[name])) for name, leaf in rows.items()}
    _, state = jax.jit(tx.update)(placed, tx.init(params), params)
    reputations = references.Reputations(4)
    reputations.advance(all_at_once(rows), 0)
    np.testing.assert_allclose(
        optax.tree.get(state, "average_agreement"), reputations.average, rtol=1e-6
    )
    agree, disagree = references.agreements(all_at_once(rows)).T
    np.testing.assert_allclose(optax.tree.get(state, "share"), agree / (agree + disagree))


def test_reputations_cover_the_whole_tree_when_the_exchange_is_split():
    vote = signax.majority_vote("data", weights="agreement", transport="packed", split_over="chip")
    tx = signax.DataParallel(vote, auto_mesh({"data": 4, "chip": 2}))
    rows, params = noisy_rows(0, 4, {"a": 3000}, inverting=1)[0], {"a": jnp.zeros(3000)}
    _, state = jax.jit(tx.update)(rows, tx.init(params), params)
    reputations = references.Reputations(4)
    reputations.advance(rows["a"], 0)
    np.testing.assert_allclose(
        optax.tree.get(state, "average_agreement"), reputations.average, rtol=1e-6
    )


def test_types_know_that_reputations_are_the_same_on_every_worker():
    tx = signax.majority_vote(AXIS, weights="agreement")

    def of_worker(row):
        return tx.update(row, tx.init(row))[1].reputation

    rows = noisy_rows(0, 4, {"a": 100}, inverting=1)[0]["a"]
    found = on_workers("shard_map", of_worker, 4)(rows)  # its result is unsharded by type
    assert found.average_agreement.shape == found.weights.shape == (4,)
    specs = signax.state_specs(tx, jnp.zeros(3), AXIS, {AXIS: 4})
    assert specs.reputation == (PartitionSpec(), PartitionSpec())


def test_weights_by_agreement_add_four_bytes_per_worker_to_agreement():
    """Beside the second bit that agreement sends up."""
    rows, sent = jax.ShapeDtypeStruct((8, 1 << 20), jnp.float32), []
    for weights in (None, "agreement"):
        vote = signax.majority_vote("data", agreement=weights is None, weights=weights)
        tx = signax.DataParallel(vote, auto_mesh({"data": 8}))
        state = tx.abstract_state(jax.ShapeDtypeStruct((1 << 20,), jnp.float32))
        step = jax.jit(tx.update).lower(rows, state).compile()
        sent.append(
            sorted((one.operation, one.bytes_sent) for one in diagnostics.collectives(step))
        )
    agreement, weighted = sent
    assert weighted == sorted([*agreement, ("all-gather", 7 * 4)])


def test_dead_coordinates_stay_within_one_step_while_reputations_change():
    tx = signax.majority_vote(AXIS, weights="agreement")
    update, states = jax.jit(jax.vmap(tx.update, axis_name=AXIS)), None
    at, furthest, weights = 0, 0, set()
    for step in range(60):
        rows = all_at_once(noisy_rows(step, 8, {"a": 60}, inverting=1)[0])
        rows[:, :10] = 0
        if states is None:
            states = jax.vmap(tx.init, axis_name=AXIS)(rows)
        decided, states = update(rows, states)
        at = at + decided[0, :10]
        furthest = max(furthest, np.abs(at).max())
        weights.add(tuple(np.asarray(states.reputation.weights[0])))
    assert len(weights) == 31  # at first, and after each pair
    assert furthest == 1


def test_resize_keeps_reputations_and_starts_new_workers_at_the_prior():
    def make(num_workers):
        vote = signax.signum(0.1, axis_name="data", weights="agreement")
        return signax.DataParallel(vote, auto_mesh({"data": num_workers}))

    params, tx = jnp.zeros(400), make(4)
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(2):
        rows = noisy_rows(step, 4, {"a": 400}, inverting=1)[0]["a"]
        _, state = update(rows, state, params)
    before = np.asarray(optax.tree.get(state, "average_agreement"))
    for num_workers in (2, 8):
        larger = make(num_workers)
        resized = larger.resize(state, params)
        average = np.asarray(optax.tree.get(resized, "average_agreement"))
        kept = min(4, num_workers)
        np.testing.assert_array_equal(average[:kept], before[:kept])
        np.testing.assert_array_equal(average[kept:], np.float32(0.51))
        rows = noisy_rows(9, num_workers, {"a": 400}, inverting=1)[0]["a"]
        _, later = jax.jit(larger.update)(rows, resized, params)
        assert optax.tree.get(later, "weights").shape == (num_workers,)
        assert jax.tree.structure(later) == jax.tree.structure(larger.init(params))


def test_a_state_of_another_number_of_workers_is_rejected():
    tx = signax.majority_vote(AXIS, weights="agreement")
    state = jax.vmap(tx.init, axis_name=AXIS, axis_size=3, in_axes=None, out_axes=None)(jnp.ones(2))
    with pytest.raises(ValueError, match="reputation has 3 numbers, but axis_name='workers' has 4"):
        jax.vmap(lambda row: tx.update(row, state), axis_name=AXIS)(jnp.ones((4, 2)))


def test_inverting_workers_lose_their_weight_and_the_run_learns():
    """Five honest of eight, on a quadratic: the vote by count is much further from the minimum."""
    target = jnp.asarray(np.random.default_rng(0).standard_normal(300), jnp.float32)
    distance = {}
    for weights in (None, "agreement"):
        optimizer = optax.chain(
            testing.adversary("data", [0, 3, 6], "invert"),
            signax.sign_sgd(0.02, axis_name="data", weights=weights),
        )
        tx, params = signax.DataParallel(optimizer, auto_mesh({"data": 8})), jnp.zeros(300)
        state, update = tx.init(params), jax.jit(tx.update)
        for step in range(60):
            noise = np.random.default_rng(step).standard_normal((8, 300))
            rows = jnp.asarray(params - target + noise, jnp.float32)
            updates, state = update(rows, state, params)
            params = params + updates
        distance[weights] = float(jnp.mean(jnp.abs(params - target)))
    assert distance["agreement"] < 0.6 * distance[None]
    heaviest = np.asarray(optax.tree.get(state, "weights"))
    np.testing.assert_array_equal(heaviest > 0, ~np.isin(np.arange(8), [0, 3, 6]))


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ((1.0, -2.0), ValueError, r"weights=\(1.0, -2.0\) must be finite numbers of at least 0"),
        ((1.0, np.nan), ValueError, "must be finite numbers of at least 0"),
        ((1.0, np.inf), ValueError, "must be finite numbers of at least 0"),
        ((0.0, 0.0), ValueError, r"weights=\(0.0, 0.0\) are all 0"),
        ((), ValueError, r"weights=\(\) are all 0"),
        ("often", ValueError, "weights='often' is unknown: use 'agreement'"),
        (3.0, TypeError, "weights=3.0 must be 'agreement', or one number for each worker"),
        ({0: 2.0, 1: 1.0}, TypeError, "one number for each worker"),
        ({1.0, 2.0}, TypeError, "one number for each worker"),
        (("a", 1.0), TypeError, "one number for each worker"),
        ((1.0, (2.0,)), TypeError, "one number for each worker"),
        ((1j, 1.0), TypeError, "one number for each worker"),
        ((None, 1.0), TypeError, "one number for each worker"),
    ],
)
@pytest.mark.parametrize("make", [signax.majority_vote, functools.partial(signax.signum, 0.1)])
def test_rejects_weights_that_are_none(make, weights, error, message):
    with pytest.raises(error, match=message):
        make(axis_name=AXIS, weights=weights)


def test_rejects_weights_that_a_vote_cannot_use():
    rows = jnp.ones((3, 4))

    def vote(**options):
        return jax.vmap(lambda row: signax.pvote(row, AXIS, step=0, **options), axis_name=AXIS)(
            rows
        )

    message = r"weights=\(1.0, 2.0\) has 2 numbers, but axis_name='workers' has 3 workers: pass one"
    with pytest.raises(ValueError, match=message):
        vote(weights=(1, 2))
    with pytest.raises(ValueError, match="weights='agreement' needs a state"):
        vote(weights="agreement")
    for weights in ((1, 2, 3), "agreement"):
        with pytest.raises(ValueError, match="transport='sum' has no place for weights="):
            signax.majority_vote(AXIS, transport="sum", weights=weights)
    with pytest.raises(ValueError, match=r"weights=\(1, 2\).* are options of the vote"):
        signax.sign_sgd(0.1, weights=(1, 2))
    with pytest.raises(ValueError, match="are options of the vote"):
        signax.muon(0.1, weights=np.ones(2))
    with pytest.raises(NameError, match="axis_name='workers' is not bound where the state is made"):
        signax.majority_vote(AXIS, weights="agreement").init(rows)


@pytest.mark.parametrize("make", [tuple, np.array, jnp.array])
def test_a_vote_under_jit_takes_weights_of_every_kind(make):
    weights = make([3.0, 1.0, 1.0])
    rows = jnp.array([[1.0, -1.0], [-1.0, 1.0], [-1.0, 1.0]])
    vote = rows_of_workers("vmap", lambda row: signax.pvote(row, AXIS, step=0, weights=weights), 3)
    np.testing.assert_array_equal(vote(rows)[0], [1.0, -1.0])


def test_weights_may_not_be_traced():
    with pytest.raises(TypeError, match="list 'weights' in the static_args"):
        jax.jit(lambda weights: signax.majority_vote(AXIS, weights=weights) and 0)(jnp.ones(3))
    inject = optax.inject_hyperparams(signax.sign_sgd, static_args=["axis_name", "weights"])
    tx = inject(learning_rate=0.5, axis_name=AXIS, weights=np.array([3.0, 1.0, 1.0]))
    rows = jnp.array([[1.0, -1.0], [-1.0, 1.0], [-1.0, 1.0]])
    updates = jax.vmap(lambda row: tx.update(row, tx.init(row), row)[0], axis_name=AXIS)(rows)
    np.testing.assert_array_equal(updates[0], [-0.5, 0.5])
