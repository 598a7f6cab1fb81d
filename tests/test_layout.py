"""The per-worker leaves of a state, for every wrapper of Optax.

Each case lists the leaves. The list must equal the layout of `DataParallel`, and the leaves that
differ when eight workers run the transformation under `jax.vmap` on different gradients.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import signax

WORKERS = 8
PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
VOTE = signax.majority_vote("data")
MEAN = signax.average_updates("data")
SIGNUM = signax.signum(0.1, axis_name="data")
FROZEN = {"w": "trained", "b": "frozen"}


def freezing():
    return optax.partition({"trained": optax.identity(), "frozen": optax.set_to_zero()}, FROZEN)


def halved_three_times():
    def halve(update):
        return jax.lax.fori_loop(0, 3, lambda _, value: value / 2, update)

    return optax.stateless(lambda updates, params: jax.tree.map(halve, updates))


def voted_and_averaged(partition):
    averaged = optax.chain(MEAN, optax.adam(0.01))
    return partition({"vote": SIGNUM, "mean": averaged}, {"w": "vote", "b": "mean"})


def injected(**hyperparams):
    """Signum with injected numbers; the options of the vote are static."""
    static = ("axis_name", "zeros", "ties", "transport", "warmup", "nesterov")
    build = optax.inject_hyperparams(signax.signum, static_args=static)
    return build(**hyperparams, axis_name="data")


MOMENTUM = {".momentum['w']", ".momentum['b']"}


def under(prefix, leaves=MOMENTUM):
    return {prefix + leaf for leaf in leaves}


# name: (transformation, per-worker leaves, shared leaves)
CASES = {
    "chain": (
        optax.chain(optax.clip(1.0), signax.scale_by_signum(), VOTE, optax.scale(-0.1)),
        under("[1]"), {"[1].count", "[2].count"},
    ),
    "trace before and after the vote": (
        optax.chain(optax.trace(0.9), VOTE, optax.trace(0.5)),
        under("[0]", {".trace['w']", ".trace['b']"}),
        {"[1].count", "[2].trace['w']", "[2].trace['b']"},
    ),
    "masked": (
        optax.chain(optax.masked(optax.trace(0.9), {"w": True, "b": False}), VOTE),
        {"[0].inner_state.trace['w']"}, {"[1].count"},
    ),
    "partition": (
        voted_and_averaged(optax.partition),
        {".inner_states['vote'].inner_state[0][0].momentum['w']"},
        under(".inner_states['mean'].inner_state[1][0]", {".count", ".mu['b']", ".nu['b']"})
        | under(".inner_states['vote'].inner_state", {"[0][0].count", "[0][1].count"}),
    ),
    "injected numbers": (
        injected(learning_rate=0.1, beta=0.5, weight_decay=0.01),
        under(".inner_state[0][0]"),
        {".count", ".hyperparams['beta']", ".hyperparams['learning_rate']",
         ".hyperparams['weight_decay']", ".inner_state[0][0].count", ".inner_state[0][1].count"},
    ),
    "injected schedule": (
        injected(learning_rate=optax.linear_schedule(0.1, 0.01, 10)),
        under(".inner_state[0][0]"),
        {".count", ".hyperparams['beta']", ".hyperparams['learning_rate']",
         ".hyperparams['weight_decay']", ".hyperparams_states['learning_rate'].count",
         ".inner_state[0][0].count", ".inner_state[0][1].count"},
    ),
    "schedule": (
        signax.signum(optax.linear_schedule(0.1, 0.01, 10), axis_name="data"),
        under("[0][0]"), {"[0][0].count", "[0][1].count", "[2].count"},
    ),
    "MultiSteps": (
        optax.MultiSteps(SIGNUM, 2).gradient_transformation(),
        under(".inner_opt_state[0][0]") | under("", {".acc_grads['w']", ".acc_grads['b']"}),
        {".mini_step", ".gradient_step", ".inner_opt_state[0][0].count",
         ".inner_opt_state[0][1].count"},
    ),
    "set_to_zero before the vote": (
        optax.chain(optax.masked(optax.set_to_zero(), {"w": False, "b": True}), SIGNUM),
        under("[1][0][0]"), {"[1][0][0].count", "[1][0][1].count"},
    ),
    "set_to_zero after the vote": (
        optax.chain(SIGNUM, freezing()),
        under("[0][0][0]"), {"[0][0][0].count", "[0][0][1].count"},
    ),
    "typed key": (
        optax.chain(signax.scale_by_stochastic_sign(jax.random.key(0)), VOTE),
        set(), {"[0].key", "[1].count"},
    ),
    "raw key": (
        optax.chain(signax.scale_by_random_k(0.5, jax.random.PRNGKey(0)), VOTE),
        set(), {"[0].key", "[1].count"},
    ),
    # The worker's index is folded into the key of a draw, not into the stored key.
    "key folded with the worker": (
        optax.chain(
            signax.scale_by_stochastic_sign(jax.random.key(0), axis_name="data"), VOTE
        ),
        set(), {"[0].key", "[1].count"},
    ),
    # Workers differ in whether their gradient was finite, and in the counts of such gradients.
    "apply_if_finite before the vote": (
        optax.chain(optax.apply_if_finite(signax.scale_by_signum(), 3), VOTE),
        under("[0].inner_state") | {"[0].inner_state.count"}
        | under("[0]", {".notfinite_count", ".last_finite", ".total_notfinite"}),
        {"[1].count"},
    ),
    "hold_if_nonfinite": (
        optax.chain(signax.hold_if_nonfinite(signax.scale_by_signum()), VOTE),
        under("[0]"), {"[0].count", "[1].count"},
    ),
    "clip_by_global_norm": (
        optax.chain(optax.clip_by_global_norm(1.0), signax.lion(0.1, axis_name="data")),
        under("[1][0][0]", {".mu['w']", ".mu['b']"}), {"[1][0][0].count", "[1][0][1].count"},
    ),
    "error_feedback": (
        optax.chain(signax.error_feedback(signax.scale_by_scaled_sign()), VOTE),
        under("[0]", {".error['w']", ".error['b']"}), {"[0].count", "[1].count"},
    ),
    "error feedback of workers and servers": (
        signax.mean_scaled_signs("data"),
        under(".memory.worker", {"['w']", "['b']"}) | under(".memory.server", {"['w']", "['b']"}),
        {".count"},
    ),
    "no state but the vote's": (signax.sign_sgd(0.1, axis_name="data"), set(), {"[0][1].count"}),
    "loop inside": (
        optax.chain(optax.trace(0.9), halved_three_times(), VOTE),
        under("[0]", {".trace['w']", ".trace['b']"}), {"[2].count"},
    ),
    "averaged AdamW": (
        optax.chain(MEAN, optax.adamw(0.01)),
        set(),
        under("[1][0]", {".count", ".mu['w']", ".mu['b']", ".nu['w']", ".nu['b']"}),
    ),
}  # fmt: skip
if hasattr(optax, "multi_transform"):  # the older name of partition
    CASES["multi_transform"] = (voted_and_averaged(optax.multi_transform), *CASES["partition"][1:])

# Holding a frozen leaf depends on the worker, although both choices are equal.
ALWAYS_EQUAL = {"set_to_zero before the vote": {"[1][0][0].momentum['b']"}}


def placed(tx, mesh, params=PARAMS, **options):
    """The paths of per-worker leaves, and the paths of shared leaves."""
    shardings = signax.DataParallel(tx, mesh, **options).state_shardings(params)
    own, shared = set(), set()
    for path, sharding in jax.tree.leaves_with_path(shardings):
        assert sharding.spec in (PartitionSpec("data"), PartitionSpec())
        (own if sharding.spec else shared).add(jax.tree_util.keystr(path))
    assert not memories(own, "dither")
    shared -= memories(shared, "dither")
    participations = [memories(paths, "participation") for paths in (own, shared)]
    if any(
        leaf.size for leaf in jax.tree.leaves(params)
    ):  # without coordinates nothing is exchanged
        missed, voters = ({path.rpartition(".")[0] for path in paths} for paths in participations)
        assert missed == voters
    return own - participations[0], shared - participations[1]


def memories(paths, field):
    """The paths that lie in one field of the states of votes."""
    return {path for path in paths if f".{field}." in path}


def differing(tx):
    """The leaves that differ at some of four steps; one worker is nonfinite at the third."""
    tx = optax.with_extra_args_support(tx)
    grads = {
        name: jax.random.normal(jax.random.key(position), (4, WORKERS, *leaf.shape))
        for position, (name, leaf) in enumerate(PARAMS.items())
    }
    grads["w"] = grads["w"].at[2, 5, 0, 0].set(jnp.nan)

    def run(grads):
        states = [tx.init(PARAMS)]
        for position in range(4):
            now = jax.tree.map(lambda g: g[position], grads)  # noqa: B023
            states.append(tx.update(now, states[-1], PARAMS)[1])
        return jax.tree.map(lambda *leaves: jnp.stack([raw(leaf) for leaf in leaves]), *states)

    rows = jax.jit(jax.vmap(run, in_axes=1, axis_name="data", axis_size=WORKERS))(grads)
    paths = {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree.leaves_with_path(rows)
        if np.any(np.asarray(leaf != leaf[:1]))
    }
    return paths - memories(paths, "participation")


def raw(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


@pytest.mark.parametrize("name", CASES)
def test_per_worker_leaves_are_found(name, mesh):
    tx, own, shared = CASES[name]
    assert placed(tx, mesh) == (own, shared)


@pytest.mark.parametrize("name", CASES)
def test_per_worker_leaves_are_the_leaves_that_differ_when_workers_run(name):
    tx, own, _ = CASES[name]
    assert differing(tx) == own - ALWAYS_EQUAL.get(name, set())


@pytest.mark.parametrize(
    ("wrapped", "wrapper"),
    [
        (optax.apply_if_finite(SIGNUM, 3), "apply_if_finite"),
        (optax.apply_if_finite(optax.chain(MEAN, optax.adam(0.1)), 3), "apply_if_finite"),
        (
            optax.MultiSteps(
                SIGNUM, 2, should_skip_update_fn=optax.skip_not_finite
            ).gradient_transformation(),
            "MultiSteps",
        ),
    ],
)
def test_rejects_an_exchange_that_some_workers_would_skip(wrapped, wrapper, mesh):
    """At run time the workers that skip the exchange would leave the others waiting."""
    tx = signax.DataParallel(wrapped, mesh)
    with pytest.raises(ValueError, match=wrapper) as error:
        tx.init(PARAMS)
    assert "'data'" in str(error.value)
    assert "signax.hold_if_nonfinite" in str(error.value)


def test_multi_steps_equals_a_step_on_the_mean_gradient(mesh):
    # With whole numbers the running mean is exact.
    first, second = (
        {
            name: jax.random.randint(jax.random.key(seed), (WORKERS, *leaf.shape), -4, 5) * 1.0
            for name, leaf in PARAMS.items()
        }
        for seed in (0, 1)
    )
    single = signax.DataParallel(SIGNUM, mesh)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    expected, expected_state = jax.jit(single.update)(mean, single.init(PARAMS), PARAMS)

    several = signax.DataParallel(optax.MultiSteps(SIGNUM, 2), mesh)
    update = jax.jit(several.update)
    nothing, state = update(first, several.init(PARAMS), PARAMS)
    updates, state = update(second, state, PARAMS)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(nothing))
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    jax.tree.map(np.testing.assert_array_equal, state.inner_opt_state, expected_state)


def test_override_gives_every_worker_a_copy(mesh):
    tx = optax.chain(signax.scale_by_signum(), VOTE)
    own, shared = placed(tx, mesh, per_worker=lambda path, _: path == "[0].count" or None)
    assert own == under("[0]", {*MOMENTUM, ".count"})
    assert shared == {"[1].count"}


def test_overridden_leaf_has_a_row_for_each_worker_and_is_updated(mesh):
    inner = optax.chain(signax.scale_by_signum(), VOTE)
    tx = signax.DataParallel(inner, mesh, per_worker=lambda path, _: path == "[0].count" or None)
    grads = jax.tree.map(lambda leaf: jnp.ones((WORKERS, *leaf.shape)), PARAMS)
    _, state = jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(state[0].count, np.ones(WORKERS))


def test_overridden_key_has_a_row_for_each_worker(mesh):
    inner = optax.chain(signax.scale_by_stochastic_sign(jax.random.key(7)), VOTE)
    tx = signax.DataParallel(inner, mesh, per_worker=lambda path, _: "key" in path or None)
    grads = jax.tree.map(lambda leaf: jnp.ones((WORKERS, *leaf.shape)), PARAMS)
    _, state = jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS)
    assert state[0].key.shape == (WORKERS,)


def test_override_is_called_with_each_leafs_path_and_shape_on_one_worker(mesh):
    asked = {}
    tx = optax.chain(signax.scale_by_signum(), VOTE)
    placed(tx, mesh, per_worker=lambda path, leaf: asked.update({path: (leaf.shape, leaf.dtype)}))
    assert asked == {
        "[0].count": ((), jnp.int32),
        "[0].momentum['w']": ((3, 2), jnp.float32),
        "[0].momentum['b']": ((2,), jnp.float32),
        "[1].count": ((), jnp.int32),
        "[1].participation.voters": ((), jnp.int32),
        "[1].participation.missed": ((), jnp.int32),
        "[1].dither.drift": ((), jnp.int32),
        "[1].dither.first_missed": ((), jnp.int32),
    }


def test_rejects_sharing_a_leaf_that_differs(mesh):
    inner = optax.chain(signax.scale_by_signum(), VOTE)
    tx = signax.DataParallel(
        inner, mesh, per_worker=lambda path, _: False if path == "[0].momentum['b']" else None
    )
    grads = jax.tree.map(lambda leaf: jnp.ones((WORKERS, *leaf.shape)), PARAMS)
    with pytest.raises(ValueError, match=r"state\[0\]\.momentum\['b'\] differs.*per_worker"):
        jax.eval_shape(tx.update, grads, tx.init(PARAMS), PARAMS)


def indexed():
    """State that differs between workers from the start, and never changes."""

    def init(params):
        del params
        return jax.lax.axis_index("data")

    return optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))


def test_state_that_differs_at_init_has_a_row_for_each_worker(mesh):
    state = signax.DataParallel(optax.chain(indexed(), VOTE), mesh).init(PARAMS)
    np.testing.assert_array_equal(state[0], np.arange(WORKERS))


def test_rejects_sharing_an_initial_state_that_differs(mesh):
    inner = optax.chain(indexed(), VOTE)
    tx = signax.DataParallel(inner, mesh, per_worker=lambda *_: False)
    with pytest.raises(ValueError, match=r"state\[0\] differs.*per_worker"):
        tx.init(PARAMS)


# `state_specs`, for a `shard_map` written by hand.

OWN, WHOLE = PartitionSpec("data"), PartitionSpec()


def test_state_specs_of_a_voted_chain(mesh):
    direction, vote = signax.state_specs(SIGNUM, PARAMS, "data", dict(mesh.shape))[0]
    assert direction.momentum == {"w": OWN, "b": OWN}
    assert vote.participation.missed == OWN
    assert [direction.count, vote.count, vote.participation.voters] == [WHOLE] * 3


def test_state_specs_run_in_a_handwritten_shard_map(mesh):
    specs = signax.state_specs(SIGNUM, PARAMS, "data", dict(mesh.shape))
    state = jax.tree.map(
        lambda leaf, spec: jnp.stack([leaf] * WORKERS) if spec == OWN else leaf,
        SIGNUM.init(PARAMS),
        specs,
    )

    def step(grads, state, params):
        grads = jax.tree.map(lambda leaf: leaf[0], grads)
        state = jax.tree.map(lambda leaf, spec: leaf[0] if spec == OWN else leaf, state, specs)
        updates, state = SIGNUM.update(grads, state, params)
        rows = jax.tree.map(lambda leaf, spec: leaf[None] if spec == OWN else leaf, state, specs)
        return updates, rows

    mapped = jax.shard_map(step, mesh=mesh, in_specs=(OWN, specs, WHOLE), out_specs=(WHOLE, specs))
    grads = {
        name: jax.random.normal(jax.random.key(n), (WORKERS, *leaf.shape))
        for n, (name, leaf) in enumerate(PARAMS.items())
    }
    found = jax.jit(mapped)(grads, state, PARAMS)
    tx = signax.DataParallel(SIGNUM, mesh)
    expected = jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("axis_name", "missing"), [("workers", "workers"), (("slice", "data"), "slice")]
)
def test_state_specs_rejects_a_missing_axis(axis_name, missing):
    with pytest.raises(ValueError, match=rf"lacks '{missing}': pass dict\(mesh\.shape\)"):
        signax.state_specs(SIGNUM, PARAMS, axis_name, {"data": WORKERS})


@pytest.mark.parametrize(
    "params", [{}, {"w": jnp.ones(2), "none": None}, jnp.ones(()), (jnp.ones(0),)]
)
def test_layout_works_for_any_tree_of_parameters(params, mesh):
    own, shared = placed(optax.chain(signax.scale_by_signum(), VOTE), mesh, params)
    assert len(own) == len(jax.tree.leaves(params))
    assert shared == {"[0].count", "[1].count"}
