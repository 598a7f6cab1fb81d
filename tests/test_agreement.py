"""The agreement of a worker with the others, and the rule that flags opposing workers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from digits import Network, load_data, warmup_cosine
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from workers import AXIS, auto_mesh, rows_of_workers

import signax
from signax import diagnostics, testing

THRESHOLD = 1.25  # the default of diagnostics.opposes
SHAPES = {"odd": (5,), "matrix": (33, 31), "large": (141, 128), "number": (), "none": (0, 2)}


def random_rows(num_workers, seed=0):
    """Gradients with a common part, with zeros on one worker and on all workers."""
    rng = np.random.default_rng(seed)
    rows = {}
    for name, shape in SHAPES.items():
        leaf = rng.standard_normal((num_workers, *shape)) + 0.7 * rng.standard_normal(shape)
        leaf *= rng.random(leaf.shape) > 0.1
        rows[name] = (leaf * (rng.random(shape) > 0.2)).astype(np.float32)
    return rows


def expected_share(rows, active):
    counts = sum(
        references.agreements(leaf.reshape(len(leaf), -1), active) for leaf in rows.values()
    )
    total = counts.sum(axis=1)
    measured = (total > 0) & (active.sum() >= 4)
    return np.where(measured, counts[:, 0] / np.maximum(total, 1), 0.5)


@pytest.mark.parametrize("transport", ["packed", "gather", "sum"])
@pytest.mark.parametrize("zeros", ["dither", "abstain", "plus"])
@pytest.mark.parametrize("num_workers", [4, 5, 8])
def test_share_counts_clear_majorities_of_the_other_workers(num_workers, zeros, transport):
    tx = signax.majority_vote(AXIS, zeros=zeros, transport=transport, agreement=True)

    def update(gradient, active):
        return tx.update(gradient, tx.init(gradient), active=active)[1].agreement

    measure = rows_of_workers("vmap", update, num_workers)
    for absent in (0, 1, num_workers - 3):  # the last leaves too few voters to measure
        rows, active = random_rows(num_workers, absent), np.arange(num_workers) >= absent
        share = measure(rows, active).share
        wanted = expected_share(rows, active)
        np.testing.assert_allclose(share[active], wanted[active], atol=1e-6)
        np.testing.assert_array_equal(share[~active], 0.5)


@pytest.mark.parametrize("kind", ["shard_map", "pmap"])
def test_share_is_the_same_under_every_map(kind):
    rows = random_rows(6)
    tx = signax.majority_vote(AXIS, agreement=True)
    measure = rows_of_workers(kind, lambda g: tx.update(g, tx.init(g))[1].agreement.share, 6)
    wanted = expected_share(rows, np.ones(6, bool))
    np.testing.assert_allclose(measure(rows), wanted, atol=1e-6)


@pytest.mark.parametrize("zeros", ["dither", "abstain"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_share_covers_all_blocks_of_sharded_leaves(kind, zeros):
    mesh = jax.make_mesh(
        (4, 2), ("data", "model"), axis_types=(kind, kind), devices=jax.devices()[:8]
    )
    rows = {"matrix": random_rows(4)["matrix"][:, :32], "odd": random_rows(4)["odd"]}
    specs = {"matrix": PartitionSpec("model"), "odd": PartitionSpec()}
    tx = signax.DataParallel(
        signax.majority_vote("data", zeros=zeros, agreement=True), mesh, param_specs=specs
    )
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:]), rows)
    params = {
        name: jax.device_put(leaf, jax.NamedSharding(mesh, specs[name]))
        for name, leaf in params.items()
    }
    rows = {
        name: jax.device_put(leaf, jax.NamedSharding(mesh, PartitionSpec("data", *specs[name])))
        for name, leaf in rows.items()
    }
    _, state = jax.jit(tx.update)(rows, tx.init(params), params)
    wanted = expected_share(jax.tree.map(np.asarray, rows), np.ones(4, bool))
    np.testing.assert_allclose(optax.tree.get(state, "share"), wanted, atol=1e-6)


@pytest.mark.parametrize("zeros", ["dither", "abstain"])
def test_share_covers_the_whole_tree_when_the_exchange_is_split(zeros):
    mesh = auto_mesh({"data": 4, "chip": 2})
    vote = signax.majority_vote(
        "data", zeros=zeros, transport="packed", split_over="chip", agreement=True
    )
    tx, rows = signax.DataParallel(vote, mesh), random_rows(4)
    params = jax.tree.map(lambda leaf: leaf[0], rows)
    _, state = jax.jit(tx.update)(rows, tx.init(params), params)
    wanted = expected_share(rows, np.ones(4, bool))
    np.testing.assert_allclose(optax.tree.get(state, "share"), wanted, atol=1e-6)


def test_agreement_changes_neither_votes_nor_the_number_of_collectives():
    rows = random_rows(8)
    params = jax.tree.map(lambda leaf: leaf[0], rows)
    found = []
    for agreement in (False, True):
        tx = signax.DataParallel(
            signax.signum(0.1, axis_name="data", transport="packed", agreement=agreement),
            auto_mesh({"data": 8}),
        )
        step = jax.jit(tx.update).lower(rows, tx.init(params), params).compile()
        updates, _ = step(rows, tx.init(params), params)
        kinds = sorted(record.operation for record in diagnostics.collectives(step))
        found.append((updates, kinds, diagnostics.collective_bytes(step)))
    (without, kinds, sent), (measured, kinds_measured, sent_measured) = found
    jax.tree.map(np.testing.assert_array_equal, measured, without)
    assert kinds_measured == kinds == ["all-gather", "all-to-all"]
    # A second plane of 75 words goes to each of 8 servers, which pads the part by 128 words.
    assert sent_measured - sent == 7 * 512


def test_agreement_sends_a_second_bit_up_and_none_down():
    rows, sent = jax.ShapeDtypeStruct((8, 1 << 20), jnp.float32), []
    for agreement in (False, True):
        vote = signax.majority_vote("data", agreement=agreement)
        tx = signax.DataParallel(vote, auto_mesh({"data": 8}))
        params = jax.ShapeDtypeStruct((1 << 20,), jnp.float32)
        step = jax.jit(tx.update).lower(rows, tx.abstract_state(params)).compile()
        sent.append({one.operation: one.bytes_sent for one in diagnostics.collectives(step)})
    without, measured = sent
    assert measured["all-to-all"] == pytest.approx(2 * without["all-to-all"], rel=0.02)
    assert measured["all-gather"] == pytest.approx(without["all-gather"], rel=0.02)


@pytest.mark.parametrize("size", [1, 4, 16, 100])
def test_a_share_of_few_coordinates_adds_less_opposition(size):
    tx = signax.majority_vote(AXIS, agreement=True)
    rows = jnp.ones((5, size)).at[0].multiply(-1).at[1].set(0)
    state = rows_of_workers("vmap", lambda g: tx.update(g, tx.init(g))[1], 5)(rows)
    against, none = min(size, 16) / 16 * (0.5 - 0 - 0.1), 0
    np.testing.assert_allclose(state.agreement.opposition, [against, none, none, none, none])


def oppositions(shares):
    """Page's test: the sum of shortfalls below 0.4, kept at 0 or above."""
    sums = [np.zeros(len(shares[0]))]
    for share in shares:
        sums.append(np.maximum(0, sums[-1] + 0.5 - share - 0.1))
    return sums[1:]


def test_opposition_accumulates_and_an_excluded_worker_keeps_its_own():
    num_workers = 6
    tx = signax.DataParallel(
        signax.majority_vote("data", agreement=True), auto_mesh({"data": num_workers})
    )
    params = jax.tree.map(jnp.zeros_like, jax.tree.map(lambda leaf: leaf[0], random_rows(1)))
    state, update, shares = tx.init(params), jax.jit(tx.update), []
    assert not np.any(diagnostics.opposes(state))
    for t in range(40):
        rows = random_rows(num_workers, t)
        rows = jax.tree.map(lambda leaf: np.concatenate([-leaf[:1], leaf[1:]]), rows)
        _, state = update(rows, state, params)
        shares.append(np.asarray(optax.tree.get(state, "share")))
    np.testing.assert_allclose(
        optax.tree.get(state, "opposition"), oppositions(shares)[-1], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(diagnostics.opposes(state), np.arange(num_workers) == 0)
    assert not np.any(diagnostics.opposes(state, threshold=99.0))
    _, later = update(
        random_rows(num_workers, 3), state, params, active=~diagnostics.opposes(state)
    )
    before, after = (optax.tree.get(tree, "agreement") for tree in (state, later))
    assert before.opposition[0] == after.opposition[0]
    assert before.share[0] == after.share[0]
    assert np.all(before.share[1:] != after.share[1:])
    assert optax.tree.get(later, "voters") == num_workers - 1


@functools.partial(jax.jit, static_argnames="pattern")
def flags_after(inverting, signal, dead, pattern):
    """The flags after 1,000 steps that exclude flagged workers.

    Gradients of 400 coordinates are a common mean plus noise. A share `dead` of the coordinates is
    zero: the same for all workers, or other coordinates for each worker, fixed or drawn
    at each step.
    """
    num_workers, tx = len(inverting), signax.majority_vote(AXIS, agreement=True)
    keys = jax.random.split(jax.random.key(0), 3)
    mean = signal * jax.random.normal(keys[0], (400,))
    own = jax.random.uniform(keys[1], (num_workers, 400)) < dead
    update = jax.vmap(lambda g, s, a: tx.update(g, s, active=a), axis_name=AXIS)

    def step(carry, key):
        states, flags = carry
        noise, drawn = jax.random.split(key)
        rows = mean + jax.random.normal(noise, (num_workers, 400))
        zero = {
            "alike": jnp.arange(400) < dead * 400,
            "own": own,
            "drawn": jax.random.uniform(drawn, (num_workers, 400)) < dead,
        }[pattern]
        rows = jnp.where(zero, 0, rows) * jnp.where(inverting, -1, 1)[:, None]
        _, states = update(rows, states, ~flags)
        return (states, diagnostics.opposes(states)), None

    states = jax.vmap(lambda _: tx.init(None))(jnp.arange(num_workers))
    start = states, jnp.zeros(num_workers, bool)
    return jax.lax.scan(step, start, jax.random.split(keys[2], 1000))[0][1]


@pytest.mark.parametrize(
    "signal", [1.0, 0.1]
)  # the noise is 1, so the second is too weak to flag workers
@pytest.mark.parametrize("pattern", ["alike", "own", "drawn"])
@pytest.mark.parametrize("attackers", [[], [1], [1, 3], [1, 3, 5]])
def test_no_honest_worker_is_flagged_when_coordinates_are_dead(attackers, pattern, signal):
    inverting = np.isin(np.arange(8), attackers)
    for dead in (0.0, 0.25, 0.5, 0.75, 0.9):
        flags = np.asarray(flags_after(inverting, signal, dead, pattern))
        assert not np.any(flags & ~inverting), dead
        # If each worker has only a tenth of the coordinates, few can be compared.
        if signal == 1 and (dead < 0.9 or pattern == "alike"):
            np.testing.assert_array_equal(flags, inverting, err_msg=f"{dead} dead")


def opposition_on_digits(b1, attackers, steps, num_workers=8, images_each=16):
    """The opposition of each worker after each step: f[steps, M]."""
    images, _, labels, _ = map(jnp.asarray, load_data())
    graph, params = nnx.split(Network(nnx.Rngs(0)))
    signum = signax.signum(warmup_cosine(1e-3, 1000), b1, axis_name=AXIS, agreement=True)
    tx = optax.chain(testing.adversary(AXIS, attackers, "invert"), signum)

    def loss_fn(params, chosen):
        logits = nnx.merge(graph, params)(images[chosen])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[chosen]).mean()

    def of_worker(params, state, chosen):
        updates, state = tx.update(jax.grad(loss_fn)(params, chosen), state, params)
        return optax.apply_updates(params, updates), state

    def step(carry, key):
        chosen = jax.random.randint(key, (num_workers, images_each), 0, len(images))
        carry = jax.vmap(of_worker, axis_name=AXIS)(*carry, chosen)
        return carry, optax.tree.get(carry[1], "opposition")

    @jax.jit
    def run(params):
        params = jax.tree.map(lambda leaf: jnp.stack([leaf] * num_workers), params)
        start = params, jax.vmap(tx.init, axis_name=AXIS)(params)
        return jax.lax.scan(step, start, jax.random.split(jax.random.key(1), steps))[1]

    return np.asarray(run(params))


@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_an_inverting_worker_is_flagged_within_twenty_steps(b1):
    found = opposition_on_digits(b1, [3], 20)[-1] > THRESHOLD
    np.testing.assert_array_equal(found, np.arange(8) == 3)


@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_no_worker_is_flagged_in_a_thousand_clean_steps(b1):
    found = opposition_on_digits(b1, [], 1000)
    assert found.max() < THRESHOLD
    assert found.max() > 0  # late in training gradients are noise, so workers disagree at times


def test_a_parameter_that_is_called_opposition_is_no_agreement():
    params = {"opposition": jnp.ones(3)}
    assert not diagnostics.opposes(signax.lion(0.1, axis_name=AXIS, agreement=True).init(params))
    with pytest.raises(ValueError, match="holds no agreement"):
        diagnostics.opposes(signax.lion(0.1, axis_name=AXIS).init(params))


def test_rejects_agreement_that_cannot_be_measured():
    rows = random_rows(3)
    tx = signax.majority_vote(AXIS, agreement=True)
    with pytest.raises(ValueError, match="takes 4 workers; 'workers' has 3"):
        rows_of_workers("vmap", lambda g: tx.update(g, tx.init(g))[0], 3)(rows)
    with pytest.raises(TypeError, match="agreement='yes' must be True or False"):
        signax.majority_vote(AXIS, agreement="yes")
    with pytest.raises(ValueError, match="agreement=True are options of the vote"):
        signax.signum(0.1, agreement=True)
    with pytest.raises(ValueError, match="state holds no agreement"):
        diagnostics.opposes(signax.majority_vote(AXIS).init(rows))
    for threshold in (0, -1):
        with pytest.raises(ValueError, match=rf"threshold={threshold} is outside \(0"):
            diagnostics.opposes(tx.init(rows), threshold=threshold)
