"""Transformations around `DataParallel` are right, or an error says where they belong.

A wrapper is right if it gives the same updates around a plain transformation of NumPy's votes.
"""

import copy
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from least_squares import PARAMS, SIGN_SGD, WORKERS, assert_trees_close, make_mesh
from optax import contrib

import signax

BOTH = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
MASK = {"w": True, "b": False}
LABELS = {"w": "vote", "b": "other"}


def rows_without_ties(seed=0):
    """Gradients of eight workers with a majority of at least six on every coordinate."""
    rng = np.random.default_rng(seed)
    rows = {}
    for name, leaf in PARAMS.items():
        signs = np.where(np.arange(WORKERS) < 2, -1, 1).reshape(WORKERS, *[1] * leaf.ndim)
        signs = signs * rng.choice([-1, 1], leaf.shape)
        sizes = 1 + rng.random((WORKERS, *leaf.shape))
        rows[name] = (signs * sizes).astype(np.float32)
    return rows


def votes(rows):
    """What `SIGN_SGD` makes of rows without ties."""
    return jax.tree.map(lambda row: np.float32(-0.125 * np.sign(np.sign(row).sum(axis=0))), rows)


def placed(mesh):
    whole, split = PartitionSpec(), PartitionSpec("data")
    params = jax.device_put(PARAMS, NamedSharding(mesh, whole))
    return params, jax.device_put(rows_without_ties(), NamedSharding(mesh, split))


def of_user(inner):
    """A transformation that a user wrote, around another one."""
    return optax.GradientTransformationExtraArgs(
        inner.init,
        lambda updates, state, params=None, **extra: inner.update(updates, state, params),
    )


# Refused.


@pytest.mark.parametrize(
    ("wrap", "name", "place"),
    [
        (partial(optax.MultiSteps, every_k_schedule=2), "optax.MultiSteps", "accumulate="),
        (
            lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
            "optax.MultiSteps",
            "accumulate=",
        ),
        (
            partial(optax.apply_if_finite, max_consecutive_errors=3),
            "optax.apply_if_finite",
            "Leave",
        ),
        (
            partial(optax.conditionally_mask, should_transform_fn=lambda step: step < 9),
            "optax.conditionally_mask",
            "after the vote",
        ),
        (
            partial(optax.conditionally_transform, should_transform_fn=lambda step: step < 9),
            "optax.conditionally_transform",
            "after the vote",
        ),
        (partial(optax.masked, mask=MASK), "optax.masked", "inside"),
        (
            lambda tx: optax.partition({"vote": tx, "other": optax.adam(0.1)}, LABELS),
            "optax.partition",
            "inside",
        ),
        (
            lambda tx: optax.selective_transform(tx, freeze_mask=MASK),
            "optax.partition",
            "inside",
        ),
        (optax.flatten, "optax.flatten", "inside"),
        (contrib.mechanize, "optax.contrib.mechanize", "inside"),
        (lambda tx: contrib.sam(tx, optax.sgd(0.1)), "optax.contrib.sam", "inside"),
        (lambda tx: contrib.sam(optax.sgd(0.1), tx), "optax.contrib.sam", "inside"),
        (
            lambda tx: contrib.galore(0.1, base_optimizer=tx, rank=1),
            "optax.contrib.scale_by_galore",
            "inside",
        ),
        (lambda tx: optax.monitor({"vote": tx}), "optax.monitor", "inside"),
        (signax.skip_on_spike, "signax.skip_on_spike", "before the vote"),
        (signax.error_feedback, "signax.error_feedback", "inside"),
        (lambda tx: optax.masked(optax.chain(tx), MASK), "optax.masked", "inside"),
        (lambda tx: optax.masked(of_user(tx), MASK), "optax.masked", "inside"),
    ],
)
def test_a_wrapper_that_takes_rows_for_one_gradient_is_refused_at_init(wrap, name, place, mesh):
    wrapped = wrap(signax.DataParallel(SIGN_SGD, mesh))
    with pytest.raises(ValueError, match=rf"^{name} wraps DataParallel.*{place}"):
        jax.eval_shape(wrapped.init, PARAMS)


@pytest.mark.parametrize(
    ("wrap", "state", "message"),
    [
        (partial(optax.masked, mask=MASK), optax.MaskedState, "^optax.masked wraps DataParallel"),
        (signax.hold_if_nonfinite, lambda state: state, "^signax.hold_if_nonfinite.* before the"),
    ],
)
def test_a_wrapper_is_refused_at_the_update_if_its_init_was_not_called(wrap, state, message, mesh):
    tx = signax.DataParallel(SIGN_SGD, mesh)
    state = state(tx.init(PARAMS))
    with pytest.raises(ValueError, match=message):
        wrap(tx).update(rows_without_ties(), state, PARAMS)


CLIP = optax.clip_by_global_norm(1.0)


@BOTH
@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda tx: optax.chain(CLIP, tx), "chain"),
        (lambda tx: optax.chain(CLIP, optax.scale(0.5), tx, optax.scale(0.5)), "chain"),
        (lambda tx: optax.named_chain(("clip", CLIP), ("vote", tx)), "named_chain"),
        (lambda tx: optax.chain(CLIP, optax.chain(tx, optax.scale(0.5))), "chain"),
        (lambda tx: optax.chain(CLIP, contrib.schedule_free(tx, 0.125)), "chain"),
        (lambda tx: optax.chain(CLIP, of_user(tx)), "chain"),
        (lambda tx: optax.chain(CLIP, optax.GradientTransformation(*tx)), "chain"),
    ],
)
def test_a_transformation_before_it_in_a_chain_is_refused_when_the_step_is_traced(wrap, name, kind):
    chain = wrap(signax.DataParallel(SIGN_SGD, make_mesh(kind=kind)))
    state = jax.eval_shape(chain.init, PARAMS)
    message = rf"^optax.{name} runs another transformation before DataParallel.* inside, before or"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(chain.update, rows_without_ties(), state, PARAMS)


def test_clipping_before_it_is_refused_outside_jit_too(mesh):
    chain = optax.chain(CLIP, signax.DataParallel(SIGN_SGD, mesh))
    with pytest.raises(ValueError, match=r"use DataParallel\.grad_norm"):
        chain.update(rows_without_ties(), chain.init(PARAMS), PARAMS)


def test_a_data_parallel_in_a_data_parallel_is_refused(mesh):
    tx = signax.DataParallel(SIGN_SGD, mesh)
    with pytest.raises(TypeError, match=r"tx=DataParallel\(.* is a DataParallel itself"):
        signax.DataParallel(tx, mesh)
    with pytest.raises(TypeError, match=r"local=DataParallel\(.* is a DataParallel itself"):
        signax.DataParallel(SIGN_SGD, mesh, local=tx)


def test_hyperparameters_injected_outside_an_explicit_mesh_are_refused_with_their_place():
    mesh = make_mesh(kind=AxisType.Explicit)
    injected = optax.inject_hyperparams(
        lambda rate: signax.DataParallel(signax.sign_sgd(rate, axis_name="data"), mesh)
    )(rate=0.125)
    params, rows = placed(mesh)
    state = jax.jit(injected.init)(params)
    with pytest.raises(ValueError, match=r"Put optax\.inject_hyperparams inside"):
        jax.eval_shape(injected.update, rows, state, params)


# Right.


@BOTH
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(tx, optax.scale(0.5), optax.trace(0.5)),
        lambda tx: optax.named_chain(("vote", tx), ("decay", optax.add_decayed_weights(-0.1))),
        lambda tx: optax.chain(optax.chain(tx, optax.scale(0.5)), optax.trace(0.5)),
        lambda tx: contrib.schedule_free(tx, 0.125),
        lambda tx: optax.with_extra_args_support(of_user(tx)),
        lambda tx: optax.GradientTransformation(*tx),
        signax.leave_out_nonfinite,
    ],
    ids=["chain", "named_chain", "chains", "schedule_free", "user", "unpacked", "leave_out"],
)
def test_what_comes_after_it_sees_the_update_that_all_workers_share(wrap, jit, kind):
    mesh = make_mesh(kind=kind)
    params, rows = placed(mesh)
    tx = wrap(signax.DataParallel(SIGN_SGD, mesh))
    plain = wrap(optax.stateless(lambda updates, _: updates))
    state, plain_state = tx.init(params), plain.init(PARAMS)
    update = jax.jit(tx.update) if jit else tx.update
    expected = PARAMS
    for _ in range(3):
        updates, state = update(rows, state, params)
        wanted, plain_state = plain.update(votes(rows_without_ties()), plain_state, expected)
        params, expected = (
            optax.apply_updates(params, updates),
            optax.apply_updates(expected, wanted),
        )
        assert_trees_close(params, expected)


def test_lookahead_around_it_gives_the_steps_of_lookahead_around_a_vote(mesh):
    params, rows = placed(mesh)
    wrap = partial(optax.lookahead, sync_period=2, slow_step_size=0.5)
    tx = wrap(signax.DataParallel(SIGN_SGD, mesh))
    plain = wrap(optax.stateless(lambda updates, _: updates))
    pair = optax.LookaheadParams.init_synced(params)
    expected = optax.LookaheadParams.init_synced(PARAMS)
    state, plain_state = tx.init(pair), plain.init(expected)
    for _ in range(4):
        updates, state = jax.jit(tx.update)(rows, state, pair)
        wanted, plain_state = plain.update(votes(rows_without_ties()), plain_state, expected)
        pair, expected = optax.apply_updates(pair, updates), optax.apply_updates(expected, wanted)
    assert_trees_close(pair, expected)


def test_hyperparameters_may_be_injected_outside_on_a_mesh_of_auto_axes(mesh):
    injected = optax.inject_hyperparams(
        lambda rate: signax.DataParallel(signax.sign_sgd(rate, axis_name="data"), mesh)
    )(rate=0.5)
    params, rows = placed(mesh)
    state = jax.jit(injected.init)(params)
    state.hyperparams["rate"] = jnp.float32(0.125)
    updates, _ = jax.jit(injected.update)(rows, state, params)
    assert_trees_close(updates, votes(rows_without_ties()))


@BOTH
def test_a_scale_that_needs_the_loss_may_come_after_it(kind):
    mesh = make_mesh(kind=kind)
    params, rows = placed(mesh)
    tx = optax.chain(signax.DataParallel(SIGN_SGD, mesh), contrib.reduce_on_plateau(patience=1))
    state, scales = tx.init(params), []
    for loss in (1.0, 2.0, 3.0):
        updates, state = jax.jit(tx.update)(rows, state, params, value=loss)
        scales.append(float(optax.tree.get(state, "scale")))
    assert scales == [1.0, pytest.approx(0.1), pytest.approx(0.01)]
    wanted = jax.tree.map(lambda vote: scales[-1] * vote, votes(rows_without_ties()))
    assert_trees_close(updates, wanted)


@BOTH
@pytest.mark.parametrize("limit", [1.0, 1e6], ids=["spike", "no spike"])
def test_a_loop_may_skip_a_step_by_a_condition_of_its_own(limit, kind):
    mesh = make_mesh(kind=kind)
    params, rows = placed(mesh)
    tx = signax.DataParallel(SIGN_SGD, mesh)

    @jax.jit
    def step(params, state, rows):
        def skip():
            return jax.tree.map(jnp.zeros_like, params), state

        norm = tx.grad_norm(rows).mean
        return jax.lax.cond(norm > limit, skip, lambda: tx.update(rows, state, params))

    updates, state = step(params, tx.init(params), rows)
    skipped = limit == 1
    wanted = votes(rows_without_ties())
    assert_trees_close(updates, jax.tree.map(jnp.zeros_like, wanted) if skipped else wanted)
    assert signax.participation(state).voters == (0 if skipped else WORKERS)


# As a value.


def test_it_is_one_value_for_trees_and_for_jit(mesh):
    tx = signax.DataParallel(SIGN_SGD, mesh)
    assert jax.tree.map(lambda leaf: leaf, {"tx": tx})["tx"] is tx
    assert jax.tree.leaves(tx) == []
    assert {tx: 1}[copy.deepcopy(tx)] == 1
    params, rows = placed(mesh)
    step = jax.jit(lambda tx, *arguments: tx.update(*arguments))
    updates, _ = step(tx, rows, tx.init(params), params)
    assert_trees_close(updates, votes(rows_without_ties()))


def test_unpacked_functions_and_maps_over_its_state_are_no_wrappers(mesh):
    tx = signax.DataParallel(signax.signum(0.125, axis_name="data"), mesh)
    init, update = tx
    state = init(PARAMS)
    _, state = update(rows_without_ties(), state, PARAMS)
    cleared = optax.tree.map_params(tx, jnp.zeros_like, state)
    assert all((leaf != 0).all() for leaf in optax.tree.get(state, "momentum").values())
    assert all((leaf == 0).all() for leaf in optax.tree.get(cleared, "momentum").values())
