"""One conformance matrix for every transformation and optimiser."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from registry import OPTAXS, OTHERS, REGISTRY

import signax

every = pytest.mark.parametrize("name", REGISTRY)
ours = pytest.mark.parametrize("name", [name for name in REGISTRY if name not in OPTAXS])


def case_names(condition):
    return pytest.mark.parametrize("name", [name for name in REGISTRY if condition(REGISTRY[name])])


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def small_tree(dtype="float32", seed=0):
    shapes = {"kernel": (3, 5), "bias": (5,)}
    return {name: jnp.asarray(normal(s, seed), dtype) for name, s in shapes.items()}


def awkward_tree(dtype="float32"):
    """Every kind of node that parameters may have, among them nodes without leaves."""
    return {
        "kernel": jnp.asarray(normal((2, 3)), dtype),
        "none": None,
        "masked": optax.MaskedNode(),
        "empty": {},
        "tuple": (),
        "nested": [jnp.asarray(1.5, dtype), (jnp.zeros((0, 3), dtype), jnp.zeros(0, dtype))],
    }


def shapes(tree):
    """The structure of a tree, with each array's shape, dtype and weak type."""
    return jax.tree.map(lambda a: (a.shape, a.dtype, a.weak_type), jax.eval_shape(lambda: tree))


def abstract_update(tx, tree, steps=1, **extra_args):
    """Shapes of the updates and of the state, before and after some steps."""
    state = tx.init(tree)
    updates, after = tree, state
    for _ in range(steps):
        updates, after = jax.eval_shape(
            lambda u, s: tx.update(u, s, tree, **extra_args), tree, after
        )
    describe = functools.partial(jax.tree.map, lambda a: (a.shape, a.dtype))
    return describe(updates), describe(jax.eval_shape(lambda: state)), describe(after)


def assert_trees_equal(found, expected, **tolerance):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        if jnp.issubdtype(ours.dtype, jax.dtypes.prng_key):
            ours, theirs = jax.random.key_data(ours), jax.random.key_data(theirs)
        ours, theirs = (
            np.asarray(a, np.float64 if jnp.issubdtype(a.dtype, jnp.floating) else None)
            for a in (ours, theirs)
        )
        np.testing.assert_allclose(ours, theirs, **tolerance)


# --- the registry ----------------------------------------------------------------------------


def is_state(export):
    return isinstance(export, type) and issubclass(export, tuple) and hasattr(export, "_fields")


def test_every_export_is_in_the_registry_or_in_the_list_of_others():
    tested = {case.factory for case in REGISTRY.values()}
    for name in signax.__all__:
        export = getattr(signax, name)
        known = name in OTHERS or is_state(export)
        assert known != (export in tested), name


@ours
def test_a_transformation_takes_extra_arguments_as_optax_defines_it(name):
    tx = REGISTRY[name].factory(**{**REGISTRY[name].numbers, **REGISTRY[name].others})
    assert isinstance(tx, optax.GradientTransformationExtraArgs)


# --- compiled and not ------------------------------------------------------------------------


@functools.cache
def compiled(name):
    """A jitted update, and the list of its traces."""
    tx, traces = REGISTRY[name].make(), []

    def update(updates, state, params):
        traces.append(1)
        return tx.update(updates, state, params)

    return jax.jit(update), traces


@every
def test_compiled_equals_eager(name):
    tx, params = REGISTRY[name].make(), small_tree()
    update, _ = compiled(name)
    eager = jitted = tx.init(params)
    rounding = REGISTRY[name].rounding
    for seed in (1, 2):
        gradients = small_tree(seed=seed)
        expected, eager = tx.update(gradients, eager, params)
        found, jitted = update(gradients, jitted, params)
        assert_trees_equal(found, expected, rtol=rounding, atol=rounding)
        assert_trees_equal(jitted, eager, rtol=rounding, atol=rounding)


@every
def test_steps_compile_once(name):
    update, traces = compiled(name)
    params = small_tree()
    state = REGISTRY[name].make().init(params)
    for seed in range(3):
        _, state = update(small_tree(seed=seed), state, params)
    assert len(traces) == 1


SETTINGS = {
    "strict": {
        "jax_numpy_rank_promotion": "raise",
        "jax_numpy_dtype_promotion": "strict",
        "jax_debug_nans": True,
        "jax_enable_checks": True,
    },
    "without jit": {"jax_disable_jit": True},
}


@pytest.mark.parametrize("setting", SETTINGS)
@every
def test_settings_of_jax_change_nothing(name, setting):
    tx, params, gradients = REGISTRY[name].make(), small_tree(), small_tree(seed=1)
    update, _ = compiled(name)
    expected, _ = update(gradients, tx.init(params), params)
    before = {option: getattr(jax.config, option) for option in SETTINGS[setting]}
    try:
        for option, value in SETTINGS[setting].items():
            jax.config.update(option, value)
        found, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
    finally:
        for option, value in before.items():
            jax.config.update(option, value)
    assert_trees_equal(found, expected, rtol=1e-6, atol=1e-6)


# --- dtypes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@every
def test_updates_and_state_keep_their_shapes_and_dtypes(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        tree = small_tree(dtype)
        updates, state, after = abstract_update(REGISTRY[name].make(), tree, steps=2)
    assert updates == jax.tree.map(lambda a: (a.shape, a.dtype), tree)
    assert after == state


@every
def test_each_leaf_keeps_its_dtype(name):
    with jax.enable_x64(True):
        tree = {
            dtype: jnp.asarray(normal(6), dtype)
            for dtype in ("float16", "bfloat16", "float32", "float64")
        }
        updates, state, after = abstract_update(REGISTRY[name].make(), tree)
    assert updates == {dtype: ((6,), jnp.dtype(dtype)) for dtype in tree}
    assert after == state


@pytest.mark.parametrize("dtypes", ["bfloat16", "float32", "float32 bfloat16"])
@every
def test_no_dtype_is_promoted_by_accident(name, dtypes):
    with jax.numpy_dtype_promotion("strict"):
        tree = {dtype: small_tree(dtype) for dtype in dtypes.split()}
        abstract_update(REGISTRY[name].make(), tree, steps=2)


@case_names(lambda case: case.numbers)
def test_numbers_of_a_wider_dtype_leave_updates_and_state_their_dtypes(name):
    """Under `inject_hyperparams` numbers have the widest dtype of all leaves."""
    case = REGISTRY[name]
    tree = {dtype: small_tree(dtype) for dtype in ("bfloat16", "float32")}
    tx = case.make(**{option: np.float32(value) for option, value in case.numbers.items()})
    for promotion in ("standard", "strict"):
        with jax.numpy_dtype_promotion(promotion):
            updates, state, after = abstract_update(tx, tree)
        assert updates == jax.tree.map(lambda a: (a.shape, a.dtype), tree)
        assert after == state


@pytest.mark.parametrize("leaf", [jnp.ones(2, jnp.int32), jnp.ones(2, jnp.complex64)])
@ours
def test_rejects_integer_and_complex_updates_by_name(name, leaf):
    tx, params = REGISTRY[name].make(), {"good": jnp.ones(2), "bad": jnp.ones(2)}
    with pytest.raises(TypeError, match=rf"updates\['bad'\] has dtype {leaf.dtype}"):
        tx.update({**params, "bad": leaf}, tx.init(params), params)


# --- state -----------------------------------------------------------------------------------


@every
def test_scan_can_carry_the_state(name):
    tx, params = REGISTRY[name].make(), small_tree()

    def step(state, _):
        updates, state = tx.update(params, state, params)
        return state, updates

    init = tx.init(params)
    state, _ = jax.eval_shape(lambda s: lax.scan(step, s, length=3), init)
    assert shapes(state) == shapes(init)


@every
def test_a_step_may_donate_the_state(name):
    """No array is in a state twice, and none belongs to the caller or to the transformation."""
    tx, params = REGISTRY[name].make(), small_tree()
    leaves = jax.tree.leaves(tx.init(params))
    assert len({*map(id, leaves)}) == len(leaves)
    for leaf in leaves:
        leaf.delete()  # as a donation does
    jax.block_until_ready((params, tx.init(params)))


@every
def test_both_branches_of_cond_can_return_the_state(name):
    tx, params = REGISTRY[name].make(), small_tree()

    def maybe(skip, state):
        return lax.cond(
            skip,
            lambda s: (jax.tree.map(jnp.zeros_like, params), s),
            lambda s: tx.update(params, s, params),
            state,
        )

    init = tx.init(params)
    _, state = jax.eval_shape(maybe, True, init)
    assert shapes(state) == shapes(init)


@every
def test_states_are_named_tuples(name):
    def check(state):
        assert isinstance(state, tuple)
        for part in state if type(state) is tuple else ():
            check(part)
        assert type(state) is tuple or hasattr(state, "_fields")

    check(REGISTRY[name].make().init(small_tree()))


@every
def test_map_params_finds_the_state_in_the_shape_of_the_parameters(name):
    tx, params = REGISTRY[name].make(), small_tree()
    found = optax.tree.map_params(
        tx, lambda leaf: True, tx.init(params), transform_non_params=lambda leaf: False
    )
    # Counts and keys are scalars, and parameters are not.
    expected = jax.tree.map(lambda leaf: leaf.ndim > 0, tx.init(params))
    assert found == expected


@case_names(lambda case: "accumulator_dtype" in inspect.signature(case.factory).parameters)
def test_rejects_a_state_of_another_tree(name):
    tx = REGISTRY[name].make()
    params = {"a": jnp.ones(2)}
    state = tx.init(params)
    other = {"b": jnp.ones(2)}
    with pytest.raises(ValueError, match="differ in structure"):
        tx.update(other, state, other)


# --- pytrees and wrappers --------------------------------------------------------------------


@every
def test_trees_may_hold_nodes_without_arrays(name):
    tree = awkward_tree()
    updates, state, after = abstract_update(REGISTRY[name].make(), tree)
    assert updates == jax.tree.map(lambda a: (a.shape, a.dtype), tree)
    assert after == state


@pytest.mark.parametrize("tree", [{}, (), jnp.zeros(0)], ids=["dict", "tuple", "array"])
@every
def test_trees_may_be_empty(name, tree):
    tx = REGISTRY[name].make()
    updates, _ = tx.update(tree, tx.init(tree), tree)
    assert shapes(updates) == shapes(tree)


@every
def test_scalars_and_empty_leaves_come_out_finite(name):
    tx, tree = REGISTRY[name].make(), awkward_tree()
    updates, state = jax.jit(tx.update)(tree, tx.init(tree), tree)
    for leaf in jax.tree.leaves((updates, state)):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            assert np.isfinite(np.asarray(leaf)).all()


@every
def test_masks_and_labels_choose_the_leaves_that_are_transformed(name):
    """As if they were alone, so that no norm, vote or memory covers the other leaves."""
    make, tree = REGISTRY[name].make, small_tree()
    labels, theirs = {"kernel": "ours", "bias": "theirs"}, optax.scale(2.0)

    @jax.jit  # one program, since most of the three is equal
    def first_updates(tree):
        masked = optax.masked(make(), {"kernel": True, "bias": False})
        partition = optax.partition({"ours": make(), "theirs": theirs}, labels)
        ways = (make(), {"kernel": tree["kernel"]}), (masked, tree), (partition, tree)
        return [tx.update(part, tx.init(part), part)[0] for tx, part in ways]

    alone, masked, partition = first_updates(tree)
    np.testing.assert_array_equal(masked["kernel"], alone["kernel"])
    np.testing.assert_array_equal(partition["kernel"], alone["kernel"])
    np.testing.assert_array_equal(masked["bias"], tree["bias"])
    np.testing.assert_array_equal(partition["bias"], 2 * tree["bias"])


@pytest.mark.parametrize("name", [name for name in REGISTRY if " " not in name or "vote" in name])
def test_multi_steps_updates_with_the_mean_of_its_micro_steps(name):
    case = REGISTRY[name]
    many = optax.MultiSteps(case.make(), every_k_schedule=2)
    first, second = small_tree(seed=1), small_tree(seed=2)
    update = jax.jit(many.update)
    waiting, state = update(first, many.init(first), first)
    assert not any(map(np.any, jax.tree.leaves(waiting)))
    updates, _ = update(second, state, first)
    mean = jax.tree.map(lambda a, b: a + (b - a) / 2, first, second)  # as MultiSteps computes it
    expected, _ = compiled(name)[0](mean, case.make().init(first), first)
    assert_trees_equal(updates, expected, rtol=1e-6, atol=1e-6)


@case_names(lambda case: case.numbers)
def test_injected_numbers_act_like_constants(name):
    case, tree = REGISTRY[name], small_tree()
    static = [p for p in inspect.signature(case.factory).parameters if p not in case.numbers]
    inject = optax.inject_hyperparams(case.factory, static_args=static)
    tx = case.wrap(inject(**case.numbers, **case.others))
    state = tx.init(tree)
    assert set(optax.tree.get(state, "hyperparams")) == set(case.numbers)
    updates, _ = jax.jit(tx.update)(tree, state, tree)  # here the numbers are traced
    expected, _ = compiled(name)[0](tree, case.make().init(tree), tree)
    assert_trees_equal(updates, expected, rtol=case.rounding)


@case_names(lambda case: case.numbers)
def test_injected_numbers_keep_dtypes(name):
    case, tree = REGISTRY[name], small_tree("bfloat16")
    static = [p for p in inspect.signature(case.factory).parameters if p not in case.numbers]
    inject = optax.inject_hyperparams(case.factory, static_args=static)
    tx = case.wrap(inject(**case.numbers, **case.others))
    updates, state, after = abstract_update(tx, tree)
    assert updates == jax.tree.map(lambda a: (a.shape, a.dtype), tree)
    assert after == state


@every
def test_unknown_extra_arguments_are_ignored(name):
    tree = small_tree()
    tx = REGISTRY[name].make()
    assert abstract_update(tx, tree, value=1.0) == abstract_update(tx, tree)


@case_names(lambda case: not case.needs_params)
def test_update_works_without_parameters_where_none_are_used(name):
    tx, tree = REGISTRY[name].make(), small_tree()
    without, _ = jax.jit(tx.update)(tree, tx.init(tree))
    given, _ = compiled(name)[0](tree, tx.init(tree), tree)
    assert_trees_equal(without, given, rtol=0)


@every
def test_works_in_a_chain(name):
    tree = small_tree()
    tx = optax.chain(optax.identity(), REGISTRY[name].make(), optax.scale(1.0))
    updates, state, after = abstract_update(tx, tree, value=1.0)
    assert updates == jax.tree.map(lambda a: (a.shape, a.dtype), tree)
    assert after == state


# --- documentation and signatures --------------------------------------------------------------

EXPORTS = [name for name in signax.__all__ if not inspect.ismodule(getattr(signax, name))]
STATES = [name for name in EXPORTS if is_state(getattr(signax, name)) and name not in OTHERS]
FACTORIES = [name for name in EXPORTS if name not in (*STATES, *OPTAXS)]
# Optax too takes these hyperparameters second to fourth.
POSITIONAL = {"beta", "b1", "b2", "eps", "momentum"}


@pytest.mark.parametrize(
    "name",
    [name for name in FACTORIES if name != "find_buckets"],  # it passes the rest to a loss
)
def test_options_are_spelled_out(name):
    kinds = {p.kind for p in inspect.signature(getattr(signax, name)).parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}


@pytest.mark.parametrize(
    "name", [name for name in FACTORIES if not inspect.isclass(getattr(signax, name))]
)
def test_options_are_keyword_only(name):
    for parameter in inspect.signature(getattr(signax, name)).parameters.values():
        optional = parameter.default is not inspect.Parameter.empty
        leads = (name, parameter.name) == ("majority_vote", "axis_name")  # or exchange=
        if optional and parameter.name not in POSITIONAL and not leads:
            assert parameter.kind == inspect.Parameter.KEYWORD_ONLY, parameter.name


@pytest.mark.parametrize("name", FACTORIES)
def test_every_argument_and_result_has_a_type(name):
    export = getattr(signax, name)
    signature = inspect.signature(export)
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter.name
    assert inspect.isclass(export) or signature.return_annotation is not inspect.Signature.empty
