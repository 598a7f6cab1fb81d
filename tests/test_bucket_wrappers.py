"""Buckets inside other transformations, their states under DataParallel, and wrong arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import references
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from test_buckets import (
    BUCKETS,
    DATA,
    LABELS,
    PARAMS,
    assert_equal,
    data_parallel,
    random_rows,
    run,
    with_faults,
)
from workers import auto_mesh

import signax
from signax import diagnostics


def in_buckets(tx, buckets=BUCKETS):
    return signax.in_buckets(tx, buckets)


def voters(state):
    """The number of voters in each vote of a state."""
    return [int(found) for _, found in optax.tree.get_all_with_path(state, "voters")]


# Transformations around buckets.


def averaged_bias(tx):
    """A partition in which the bias is averaged. Buckets then lack a leaf."""
    labels = {"embed": "vote", "head": "vote", "layer": {"b": "mean", "w": "vote"}}
    return optax.partition({"vote": tx, "mean": signax.average_updates("data")}, labels)


def test_a_fault_in_a_leaf_of_another_vote_excludes_a_worker_from_all_buckets():
    rows = random_rows(3, 0)
    rows["layer"]["b"][1, 0] = np.inf
    tx = data_parallel(averaged_bias(in_buckets(signax.sign_sgd(1.0, **DATA))), 3)
    ((updates, state),) = run(tx, [rows])
    assert voters(state) == [2, 2, 2, 2]
    np.testing.assert_array_equal(signax.participation(state).missed, [0, 1, 0])
    flags = [True, False, True]
    for found, own in [(updates["head"], rows["head"]), (updates["embed"], rows["embed"])]:
        memory = references.DitherMemory()
        expected = -references.vote(own.reshape(3, -1), 0, active=flags, **memory.at(0))
        np.testing.assert_array_equal(found.reshape(-1), expected)


def test_a_fault_in_a_bucket_excludes_a_worker_from_other_votes():
    rows = with_faults(random_rows(3, 0), [(2, 2)])
    tx = data_parallel(averaged_bias(in_buckets(signax.sign_sgd(1.0, **DATA))), 3)
    ((_, state),) = run(tx, [rows])
    found = optax.tree.get_all_with_path(state, "voters")
    averaged = [int(n) for path, n in found if "mean" in jax.tree_util.keystr(path)]
    voted = [int(n) for path, n in found if "mean" not in jax.tree_util.keystr(path)]
    assert averaged == [2]
    assert voted == [3, 3, 2]


def test_a_clip_by_the_global_norm_before_them_spreads_a_fault_to_all_buckets():
    rows = with_faults(random_rows(3, 0), [(1, 2)])
    clip = signax.hold_if_nonfinite(optax.clip_by_global_norm(1.0))
    tx = optax.chain(clip, in_buckets(signax.sign_sgd(1.0, **DATA)))
    ((_, state),) = run(data_parallel(tx, 3), [rows])
    assert voters(state) == [2, 2, 2]


def test_a_fault_that_a_clip_hides_excludes_a_worker_from_no_bucket():
    rows = random_rows(3, 0)
    rows["layer"]["b"][1, 0] = np.inf
    tx = optax.chain(optax.clip(1.0), in_buckets(signax.sign_sgd(1.0, **DATA)))
    ((_, state),) = run(data_parallel(tx, 3), [rows])
    assert voters(state) == [3, 3, 3]


@pytest.mark.parametrize("outside", [True, pytest.param(False, marks=pytest.mark.thorough)])
def test_multi_steps_may_hold_buckets(outside):
    """In the second exchange a worker's first gradient has a fault, and its second has none.

    With MultiSteps inside a bucket, the vote of a later bucket does not see the earlier gradient.
    """
    steps = [random_rows(3, t) for t in range(4)]
    vote = signax.sign_sgd(1.0, **DATA)
    tx = optax.MultiSteps(in_buckets(vote), 2) if outside else in_buckets(optax.MultiSteps(vote, 2))
    found = run(data_parallel(tx, 3), steps)
    expected = run(data_parallel(optax.MultiSteps(vote, 2), 3), steps)
    for (updates, _), (wanted, _) in zip(found, expected, strict=True):
        assert_equal(updates, wanted)
    steps[2] = with_faults(steps[2], [(0, 1)])
    state = run(data_parallel(tx, 3), steps)[-1][1]
    assert voters(state) == [3, 2, 2] if outside else [3, 2, 3]


def test_a_step_may_be_skipped_by_all_workers():
    tx = data_parallel(in_buckets(signax.signum(0.25, **DATA)))
    rows, state = random_rows(4, 0), tx.init(PARAMS)

    @jax.jit
    def maybe(run, rows, state):
        def skip(rows, state):
            del rows
            return jax.tree.map(jnp.zeros_like, PARAMS), state

        return lax.cond(run, lambda r, s: tx.update(r, s, PARAMS), skip, rows, state)

    assert_equal(maybe(False, rows, state), (jax.tree.map(jnp.zeros_like, PARAMS), state))
    assert_equal(maybe(True, rows, state), jax.jit(tx.update)(rows, state, PARAMS))


def test_learning_rates_may_be_injected():
    def make(learning_rate):
        return in_buckets(signax.signum(learning_rate, **DATA))

    schedule = optax.linear_schedule(0.5, 0.25, 2)
    found = run(data_parallel(optax.inject_hyperparams(make)(schedule)), [random_rows(4, 0)] * 3)
    for (updates, _), rate in zip(found, (0.5, 0.375, 0.25), strict=True):
        np.testing.assert_array_equal(np.unique(np.abs(updates["embed"])), [np.float32(rate)])


def test_extra_arguments_reach_every_bucket():
    def add(updates, state, params=None, *, amount, **extra_args):
        del params, extra_args
        return jax.tree.map(lambda u: u + amount, updates), state

    shift = optax.GradientTransformationExtraArgs(optax.init_empty_state, add)
    updates, _ = in_buckets(shift).update(PARAMS, in_buckets(shift).init(PARAMS), amount=2.0)
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 2), updates)


def test_a_bucket_without_leaves_of_a_vote_counts_all_workers():
    """Here the last bucket has no leaf that is voted on."""
    labels = {"embed": "mean", "head": "vote", "layer": {"b": "vote", "w": "vote"}}
    groups = {"vote": signax.sign_sgd(1.0, **DATA), "mean": signax.average_updates("data")}
    inside = in_buckets(optax.partition(groups, labels))
    groups["vote"] = in_buckets(groups["vote"])
    for tx in (inside, optax.partition(groups, labels)):
        state = run(data_parallel(tx, 3), [random_rows(3, 0)])[-1][1]
        assert signax.participation(state).voters == 3
        np.testing.assert_array_equal(signax.participation(state).missed, 0)


# States.


@pytest.mark.parametrize("new", [2, 6])
def test_a_resized_state_continues_like_the_state_of_one_message(new):
    results: list = []
    optimizer = signax.ef_sign_sgd(0.1, 0.9, block=8, **DATA)
    for tx in (optimizer, in_buckets(optimizer)):
        state = run(data_parallel(tx), [random_rows(4, t) for t in range(3)])[-1][1]
        other = data_parallel(tx, new)
        state = other.resize(state, PARAMS)
        assert jax.tree.structure(state) == jax.tree.structure(other.init(PARAMS))
        results.append(jax.jit(other.update)(random_rows(new, 3), state, PARAMS)[0])
    assert_equal(*results)


def test_a_restored_run_equals_the_uninterrupted_run_bit_for_bit(tmp_path):
    """The buckets are restored too."""
    tx = data_parallel(in_buckets(signax.ef_sign_sgd(0.1, 0.9, **DATA)))
    steps = [random_rows(4, t) for t in range(5)]
    state, update = run(tx, steps[:3])[-1][1], jax.jit(tx.update)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", {"state": state, "buckets": BUCKETS})
    whole = NamedSharding(tx.mesh, PartitionSpec())
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), PARAMS
    )
    like = {"state": tx.abstract_state(params), "buckets": BUCKETS}
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.restore(tmp_path / "checkpoint", like)
    assert_equal(saved["state"], state)
    other = data_parallel(in_buckets(signax.ef_sign_sgd(0.1, 0.9, **DATA), saved["buckets"]))
    expected, found = (None, state), (None, saved["state"])
    for rows in steps[3:]:
        expected = update(rows, expected[1], PARAMS)
        found = jax.jit(other.update)(rows, found[1], PARAMS)
    assert_equal(found, expected)


def test_buckets_may_be_integers_of_numpy_and_jax():
    for kind in (np.int64, np.asarray, jnp.int32, jnp.asarray):
        tx = in_buckets(signax.signum(0.1), jax.tree.map(kind, BUCKETS))
        assert len(tx.init(PARAMS).inner_states) == 3


def test_metrics_of_a_state_in_buckets_are_those_of_all_votes():
    tx = data_parallel(in_buckets(signax.signum(0.1, agreement=True, **DATA)))
    state = run(tx, [with_faults(random_rows(4, 0), [(3, 2)])])[-1][1]
    metrics = diagnostics.metrics(state)
    counted = {name: int(value) for name, value in metrics.items() if "voters" in name}
    assert counted == {f"signax/voters/{b}": n for b, n in enumerate((4, 4, 3))}
    assert not np.any(diagnostics.opposes(state))


def test_each_bucket_sends_its_own_messages():
    tx = signax.DataParallel(
        in_buckets(signax.majority_vote("data", transport="packed")), auto_mesh({"data": 4})
    )
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, random_rows(4, 0)))
    program = jax.jit(tx.update).lower(shapes, jax.eval_shape(tx.init, PARAMS), PARAMS).compile()
    found = sorted(record.operation for record in diagnostics.collectives(program))
    assert found == ["all-gather"] * 3 + ["all-to-all"] * 3


# Wrong arguments.

WRONG = {
    "negative": ({**BUCKETS, "head": -1}, ValueError, r"buckets\['head'\]=-1 must be at least 0"),
    "fraction": ({**BUCKETS, "head": 0.5}, TypeError, r"buckets\['head'\]=0.5 must be.*an integer"),
    "boolean": ({**BUCKETS, "head": True}, TypeError, r"buckets\['head'\]=True must be"),
    "text": ({**BUCKETS, "head": "0"}, TypeError, r"buckets\['head'\]='0' must be"),
    "array": ({**BUCKETS, "head": np.ones(2, int)}, TypeError, r"buckets\['head'\]=array"),
    "gap": ({**BUCKETS, "embed": 3}, ValueError, "buckets go up to 3, but no leaf is in bucket 2"),
    "start": ({**BUCKETS, "head": 1}, ValueError, "up to 2, but no leaf is in bucket 0"),
    "missing": ({"embed": 0, "head": 1}, ValueError, "buckets must be a tree of integers like the"),
    "prefix": ({**BUCKETS, "layer": 1}, ValueError, r"parameters, PyTreeDef\(.*but is PyTreeDef"),
    "deeper": ({**BUCKETS, "head": [0]}, ValueError, "buckets must be a tree of integers like"),
    "none": ({**BUCKETS, "head": None}, ValueError, "no leaf is in bucket 0"),
    "number": (0, ValueError, "buckets must be a tree of integers like the parameters"),
}


@pytest.mark.parametrize("as_function", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_rejects_wrong_buckets(name, as_function):
    buckets, kind, message = WRONG[name]
    tx = in_buckets(signax.signum(0.1), (lambda params: buckets) if as_function else buckets)
    with pytest.raises(kind, match=message):
        tx.init(PARAMS)
    state = in_buckets(signax.signum(0.1)).init(PARAMS)
    with pytest.raises(kind, match=message):
        tx.update(PARAMS, state)


def test_rejects_a_state_of_another_number_of_buckets():
    state = in_buckets(signax.signum(0.1), jax.tree.map(lambda _: 0, BUCKETS)).init(PARAMS)
    with pytest.raises(ValueError, match=r"state has 1 buckets, and buckets= now has 3: pass the"):
        in_buckets(signax.signum(0.1)).update(PARAMS, state)


def test_rejects_a_state_of_other_buckets():
    state = in_buckets(signax.signum(0.1), {**BUCKETS, "embed": 0, "head": 2}).init(PARAMS)
    with pytest.raises(ValueError, match=r"updates and state.momentum differ in structure"):
        in_buckets(signax.signum(0.1)).update(PARAMS, state)


@pytest.mark.parametrize("inner", [signax.signum, None, optax.linear_schedule(1.0, 0.0, 1)])
def test_rejects_an_inner_that_is_no_transformation(inner):
    with pytest.raises(TypeError, match=r"inner=.* is not a gradient transformation"):
        in_buckets(inner)


def test_labels_are_in_the_order_of_leaves():
    assert jax.tree.leaves(BUCKETS) == LABELS
