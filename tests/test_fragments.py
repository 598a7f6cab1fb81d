"""Fragments of parameters, which DiLoCo exchanges in turn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from diloco_references import SGD, diloco
from diloco_runs import AVERAGE, VOTE, batches, make, run
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from least_squares import assert_trees_close, assert_trees_equal, make_mesh

import signax
from signax import diagnostics
from signax._data_parallel.fragments import deal, schedule

# The leaves have 6, 2, 8 and 4 coordinates, so three fragments have 6, 10 and 4.
PARAMS = {
    "a": jnp.arange(6.0).reshape(3, 2) / 8 - 0.25,
    "b": jnp.ones(2),
    "c": jnp.full((2, 4), 0.5),
    "d": jnp.linspace(-1.0, 1.0, 4),
}
FRAGMENTS = {"a": 0, "b": 1, "c": 1, "d": 2}
OPTIONS = {"num_local_steps": 6, "num_fragments": 3}


def squares(params, batch):
    """Each leaf is drawn to the mean of a worker's targets."""
    target = jnp.mean(batch["x"])
    return 0.5 * sum(jnp.sum((leaf - target) ** 2) for leaf in params.values())


def gradients(given, workers=4):
    def of_worker(x):
        target = np.mean(x)

        def function(params):
            loss = 0.5 * sum(((leaf - target) ** 2).sum() for leaf in params.values())
            return loss, {name: leaf - target for name, leaf in params.items()}

        return function

    return [[of_worker(x) for x in np.split(np.float64(b["x"]), workers)] for b in given]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40), st.data())
def test_leaves_are_dealt_in_order_into_groups_of_about_equal_size(sizes, data):
    number = data.draw(st.integers(1, len(sizes)))
    groups = deal([jax.ShapeDtypeStruct((size,), jnp.float32) for size in sizes], number)
    assert len(groups) == number
    assert all(groups)
    assert [leaf for group in groups for leaf in group] == list(range(len(sizes)))
    ends = np.cumsum([0, *sizes])
    cuts = [0, *np.cumsum([len(group) for group in groups])]
    for k in range(1, number):
        # A cut misses its share by half a leaf, unless it has to leave a leaf on either side.
        limits = cuts[k - 1] + 1, len(sizes) - number + k
        assert limits[0] <= cuts[k] <= limits[1]
        missed = abs(ends[cuts[k]] - k * ends[-1] / number)
        assert missed <= max(sizes) / 2 or cuts[k] in limits


@given(st.integers(1, 60), st.data())
def test_each_fragment_is_due_once_in_a_round_at_even_distances(num_local_steps, data):
    number = data.draw(st.integers(1, num_local_steps))
    due = schedule(num_local_steps, number)
    assert sorted(fragment for fragment in due if fragment < number) == list(range(number))
    assert due.count(number) == num_local_steps - number
    steps = [t for t, fragment in enumerate(due) if fragment < number]
    gaps = np.diff([*steps, steps[0] + num_local_steps])
    assert gaps.max() - gaps.min() <= 1
    assert due[0] == number - 1  # the round ends with the last fragment


def test_fragments_in_turn_equal_the_reference():
    tx, given = make(inner=optax.sgd(1 / 16, momentum=0.5), **OPTIONS), batches(13)
    remainders = {name: 2 * (fragment + 1) for name, fragment in FRAGMENTS.items()}
    expected = diloco(
        PARAMS, gradients(given), 6, lambda: SGD(1 / 16, 0.5),
        lambda: SGD(0.7, 0.9, nesterov=True), due=remainders,
    )  # fmt: skip
    state, step = tx.init(PARAMS), tx.train_step(squares)
    for number, (batch, (common, own, losses)) in enumerate(
        zip(given, expected, strict=True), start=1
    ):
        before = jax.device_get(state.params)
        state, loss = step(state, batch)
        assert_trees_close(state.params, common)
        assert_trees_close(state.own, jax.tree.map(lambda *leaves: np.stack(leaves), *own))
        np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
        changed = {name for name in PARAMS if np.any(before[name] != state.params[name])}
        due = [3, 3, 0, 3, 1, 3, 2][(number - 1) % 6 + 1]
        assert changed == {name for name, fragment in FRAGMENTS.items() if fragment == due}
    assert step._cache_size() == 1
    np.testing.assert_array_equal(state.synced, [8, 10, 12])


def test_every_fragment_has_its_own_outer_state():
    tx = make(signax.mean_quantized("data"), **OPTIONS)
    state, _ = run(tx, tx.init(PARAMS), batches(2), loss_fn=squares)
    traces = [optax.tree.get(outer, "trace") for outer in state.outer]
    for number, trace in enumerate(traces):
        names = [name for name, node in trace.items() if not isinstance(node, optax.MaskedNode)]
        assert names == [name for name, fragment in FRAGMENTS.items() if fragment == number]
        moved = [np.any(leaf != 0) for leaf in jax.tree.leaves(trace)]
        assert moved == [number == 0] * len(names)
    voters = [signax.participation(outer).voters for outer in state.outer]
    assert voters == [4, 0, 0]
    assert signax.participation(state).voters == 0  # a fragment has not been exchanged yet
    state, _ = run(tx, state, batches(4), loss_fn=squares)
    assert signax.participation(state).voters == 4


LARGE = {f"layer{n}": jax.ShapeDtypeStruct((1024, 512), jnp.float32) for n in range(8)}


def large_loss(params, batch):
    return jnp.mean(batch) * sum(jnp.sum(leaf**2) for leaf in params.values())


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_the_bytes_of_an_exchange_are_a_fragments_share(kind):
    options = {"num_local_steps": 8, "mesh": make_mesh((4,), kind)}
    streaming, plain = make(VOTE, num_fragments=4, **options), make(VOTE, **options)
    state = streaming.abstract_state(LARGE)
    sent = [
        diagnostics.collective_bytes(
            jax.jit(lambda s, n=number: streaming.sync(s, fragment=n)).lower(state).compile()
        )
        for number in range(4)
    ]
    pair = {"first": LARGE["layer0"], "second": LARGE["layer1"]}
    assert sent == [diagnostics.wire_bytes(pair, 4)] * 4
    whole = jax.jit(plain.sync).lower(plain.abstract_state(LARGE)).compile()
    np.testing.assert_allclose(sum(sent), diagnostics.collective_bytes(whole), rtol=0.05)
    batch = jax.ShapeDtypeStruct((8,), jnp.float32)
    step = streaming.train_step(large_loss).lower(state, batch).compile()
    # A step runs one branch at most, and adds the loss.
    assert 0 < diagnostics.collective_bytes(step) - sent[0] <= 16


def test_sync_brings_all_fragments_or_one_up_to_date():
    tx, given = make(**OPTIONS), batches(5)
    state, _ = run(tx, tx.init(PARAMS), given, loss_fn=squares)
    np.testing.assert_array_equal(state.synced, [2, 4, 0])
    one = tx.sync(state, fragment=1)
    np.testing.assert_array_equal(one.synced, [2, 5, 0])
    for name in PARAMS:
        changed = bool(np.any(one.params[name] != state.params[name]))
        assert changed == (FRAGMENTS[name] == 1)
        assert np.all(one.own[name] == one.params[name]) == changed
    every = tx.sync(one)
    np.testing.assert_array_equal(every.synced, [5, 5, 5])
    assert_trees_equal(every.own, jax.tree.map(lambda p: np.stack([p] * 4), every.params))
    # The fragment without a local step since its exchange has not moved, nor has its momentum.
    assert_trees_equal(every.outer[1], one.outer[1])
    assert_trees_equal(every.params["c"], one.params["c"])
    with pytest.raises(ValueError, match="no local step since the last exchange"):
        tx.sync(one, fragment=1)
    with pytest.raises(ValueError, match="fragment=3 is not one of the 3 fragments"):
        tx.sync(state, fragment=3)
    for fragment in (1.0, True, "1"):
        with pytest.raises(TypeError, match=f"fragment={fragment!r} must be a whole number"):
            tx.sync(state, fragment=fragment)
    assert_trees_equal(tx.sync(state, fragment=jnp.int32(1)), one)


def test_a_worker_is_excluded_from_every_fragment_until_all_its_parameters_are_finite():
    tx, (batch,) = make(**OPTIONS), batches(1)
    local_step = tx.local_step(squares)
    _, state = local_step(tx.init(PARAMS), batch)
    state = state._replace(own={**state.own, "d": state.own["d"].at[1, 0].set(jnp.nan)})
    missed = [0, 1, 0, 0]
    for fragment in (0, 2):
        state = tx.sync(state, fragment=fragment)
        found = signax.participation(state.outer[fragment])
        np.testing.assert_array_equal(found.missed, missed)
    assert_trees_equal(state.own["d"], np.stack([state.params["d"]] * 4))
    _, state = local_step(state, batch)
    state = tx.sync(state, fragment=0)
    assert signax.participation(state.outer[0]).voters == 4


def test_rejects_a_state_of_another_number_of_fragments():
    whole, tx = make(), make(**OPTIONS)
    state = whole.init(PARAMS)
    message = r"state\.outer is for 1 fragments, but num_fragments=3: pass num_fragments=1"
    for function in (tx.resize, tx.sync, lambda s: tx.train_step(squares)(s, batches(1)[0])):
        with pytest.raises(ValueError, match=message):
            function(state)


def test_masks_and_labels_of_the_whole_tree_fit_fragments():
    labels = {"a": "vote", "b": "mean", "c": "vote", "d": "mean"}
    mixed = optax.partition({"vote": VOTE, "mean": AVERAGE}, labels)
    decayed = optax.chain(
        mixed, optax.add_decayed_weights(0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
    )
    found = {}
    for number in (1, 3):
        tx = make(decayed, 6, num_fragments=number)
        local_step, state = tx.local_step(squares), tx.init(PARAMS)
        for batch in batches(2):
            _, state = local_step(state, batch)
        found[number] = tx.sync(state).params
    assert_trees_close(found[3], found[1])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_fragments_may_be_sharded_within_workers(kind):
    specs = {"a": PartitionSpec(None, "model"), "b": PartitionSpec()}
    specs |= {"c": PartitionSpec("model"), "d": PartitionSpec("model")}
    mesh = make_mesh((4, 2), kind)
    params = {
        name: jax.device_put(leaf, NamedSharding(mesh, specs[name]))
        for name, leaf in PARAMS.items()
    }
    # Ties are not dithered, as that would depend on the index within a device's block.
    vote = optax.chain(signax.majority_vote("data", zeros="abstain"), optax.scale(1 / 64))
    given, whole = batches(7), make(vote, **OPTIONS)
    tx = make(vote, mesh=mesh, param_specs=specs, **OPTIONS)
    expected, _ = run(whole, whole.init(PARAMS), given, loss_fn=squares)
    state, _ = run(tx, tx.init(params), given, loss_fn=squares)
    assert_trees_close((state.params, state.own), (expected.params, expected.own))
    for name in PARAMS:
        assert state.params[name].sharding.is_equivalent_to(
            NamedSharding(mesh, specs[name]), PARAMS[name].ndim
        )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_resize_between_exchanges_keeps_every_fragment(kind):
    four, two = (
        make(signax.mean_quantized("data"), mesh=make_mesh((m,), kind), **OPTIONS) for m in (4, 2)
    )
    state, _ = run(four, four.init(PARAMS), batches(5), loss_fn=squares)
    halved = two.resize(state)
    assert_trees_equal((halved.params, halved.synced), (state.params, state.synced))
    assert jax.tree.map(jnp.shape, halved) == jax.tree.map(jnp.shape, two.abstract_state(PARAMS))
    resumed, _ = run(two, halved, batches(6, 2), loss_fn=squares)
    np.testing.assert_array_equal(resumed.synced, [8, 10, 6])
