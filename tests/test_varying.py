"""The walk that finds outputs that differ between workers, against running the program.

The oracle runs the program by `jax.vmap` over both axes of a mesh, with different inputs on every
worker, and compares the outputs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import signax
from signax._data_parallel.varying import varying_outputs

WORKERS, MODEL = 4, 2
AXES = [("data", WORKERS), ("model", MODEL)]
SHAPE = (WORKERS, 3)  # the workers can split the first axis


def marked(function, axes=AXES):
    """The walk's answer for each output of a function of (own, shared)."""
    own, shared = jnp.ones(SHAPE), jnp.ones(SHAPE)
    jaxpr = jax.make_jaxpr(function, axis_env=axes)(own, shared).jaxpr
    return varying_outputs(jaxpr, [True, False], "data")


def observed(function):
    """The outputs of a function of (own, shared) that differ when every worker runs it."""
    own = jax.random.normal(jax.random.key(0), (MODEL, WORKERS, *SHAPE))
    # Each worker gets a copy, since vmap's all_to_all is wrong for unbatched values.
    shared = jnp.broadcast_to(jax.random.normal(jax.random.key(1), SHAPE), own.shape)
    over_data = jax.vmap(function, axis_name="data", axis_size=WORKERS)
    over_both = jax.vmap(over_data, axis_name="model", axis_size=MODEL)
    outputs = (np.asarray(output) for output in jax.tree.leaves(over_both(own, shared)))
    return [bool(np.any(output != output[:, :1])) for output in outputs]


@jax.custom_jvp
def first_of_jvp(x, y):
    return x, y + 1


first_of_jvp.defjvp(lambda primals, tangents: (first_of_jvp(*primals), tangents))


@jax.custom_vjp
def swap_of_vjp(x, y):
    return y, x


swap_of_vjp.defvjp(lambda x, y: (swap_of_vjp(x, y), None), lambda _, cotangents: cotangents[::-1])


def shifted(x, y, loop):
    """x reaches the last part of the carry only after three rounds."""
    return loop(lambda carry: (carry[0] + x, carry[0], carry[1], carry[3]), (y, y, y, y))


def rounds(step, carry):
    return lax.fori_loop(0, 5, lambda _, carry: step(carry), carry)


def scanned(step, carry):
    return lax.scan(lambda carry, _: (step(carry), None), carry, length=5)[0]


def looped(step, carry):
    """A while loop with a shared condition."""

    def go_on(carry):
        return carry[0] < 5

    count, *rest = lax.while_loop(
        go_on, lambda carry: (carry[0] + 1, *step(carry[1:])), (0, *carry)
    )
    del count
    return tuple(rest)


CASES = {
    "arithmetic": (lambda x, y: (x * y, y + 1, x), [True, False, True]),
    "output without inputs": (lambda x, y: jnp.zeros_like(x), [False]),
    "a literal and an unused input": (lambda x, y: (1.0, y), [False, False]),
    "psum": (lambda x, y: lax.psum(x, "data"), [False]),
    "pmean": (lambda x, y: lax.pmean((x, y), "data"), [False, False]),
    "pmax": (lambda x, y: lax.pmax(x, "data"), [False]),
    "pmin": (lambda x, y: lax.pmin(x, "data"), [False]),
    "all_gather": (lambda x, y: lax.all_gather(x, "data"), [False]),
    "tiled all_gather": (lambda x, y: lax.all_gather(x, "data", tiled=True), [False]),
    "psum, then own again": (lambda x, y: lax.psum(x, "data") + x, [True]),
    "psum over both axes": (lambda x, y: lax.psum(x, ("model", "data")), [False]),
    "psum over another axis": (lambda x, y: lax.psum((x, y), "model"), [True, False]),
    "pmax over another axis": (lambda x, y: lax.pmax(x, "model"), [True]),
    "all_gather over another axis": (lambda x, y: lax.all_gather((x, y), "model"), [True, False]),
    "index on the axis": (lambda x, y: lax.axis_index("data") + y, [True]),
    "index on another axis": (lambda x, y: lax.axis_index("model") + y, [False]),
    "size of the axis": (lambda x, y: lax.axis_size("data") + y, [False]),
    "all_to_all of equal values": (lambda x, y: lax.all_to_all(y, "data", 0, 0), [True]),
    "psum_scatter of equal values": (lambda x, y: lax.psum_scatter(y, "data"), [True]),
    "ppermute of own values": (
        lambda x, y: lax.ppermute(x, "data", [(i, (i + 1) % WORKERS) for i in range(WORKERS)]),
        [True],
    ),
    "cond on a shared value": (
        lambda x, y: lax.cond(y[0, 0] < 9, lambda: (x, y, x), lambda: (y, -y, x)),
        [True, False, True],
    ),
    "cond on the worker's own value": (
        lambda x, y: lax.cond(x[0, 0] > 0, lambda: (x, y), lambda: (y, -y)), [True, True]
    ),
    "switch on the worker": (
        lambda x, y: lax.switch(lax.axis_index("data"), [lambda: y, lambda: -y]), [True]
    ),
    "collective under a shared cond": (
        lambda x, y: lax.cond(y[0, 0] < 9, lambda: lax.psum(x, "data"), lambda: y), [False]
    ),
    "cond on a reduced value": (
        lambda x, y: lax.cond(lax.pmax(x, "data").sum() < 99, lambda: y, lambda: -y), [False]
    ),
    "scan": (lambda x, y: shifted(x, y, scanned), [True, True, True, False]),
    "fori_loop": (lambda x, y: shifted(x, y, rounds), [True, True, True, False]),
    "while loop": (lambda x, y: shifted(x, y, looped), [True, True, True, False]),
    "while loop of own length": (
        lambda x, y: lax.while_loop(lambda c: c < x[0, 0], lambda c: c + 0.1, y[0, 0]), [True]
    ),
    "scan over own slices": (
        lambda x, y: lax.scan(lambda c, s: (c + 1, (s, c)), y[0], x), [False, True, False]
    ),
    "scan that reduces each slice": (
        lambda x, y: lax.scan(lambda c, s: (c + lax.psum(s, "data"), c), y[0], x), [False, False]
    ),
    "map": (lambda x, y: lax.map(lambda pair: pair, (x, y)), [True, False]),
    "jit": (lambda x, y: jax.jit(lambda a, b: (b, a, lax.psum(a, "data")))(x, y),
            [False, True, False]),
    "jit in jit": (lambda x, y: jax.jit(jax.jit(lambda a, b: (b, a)))(x, y), [False, True]),
    "remat": (lambda x, y: jax.checkpoint(lambda a, b: (jnp.sin(b), jnp.sin(a)))(x, y),
              [False, True]),
    "custom_jvp": (first_of_jvp, [True, False]),
    "custom_vjp": (swap_of_vjp, [False, True]),
    "gradient through remat": (
        jax.grad(lambda x, y: jax.checkpoint(lambda a: (jnp.sin(a) * y).sum())(x)), [True]
    ),
    "scatter of own values": (lambda x, y: (y.at[0].set(x[0]), y.at[0].add(y[1])), [True, False]),
    "shared random key": (lambda x, y: jax.random.normal(jax.random.key(0), SHAPE), [False]),
    "key with the worker folded in": (
        lambda x, y: jax.random.normal(
            jax.random.fold_in(jax.random.key(0), lax.axis_index("data")), SHAPE
        ),
        [True],
    ),
    "vote": (lambda x, y: signax.pvote(x, "data", step=0), [False]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_walk_finds_the_outputs_that_differ(name):
    function, expected = CASES[name]
    assert marked(function) == expected
    assert observed(function) == expected


# One step of a random program: a pair of values to another pair.
STEPS = [
    lambda x, y: (y, x),
    lambda x, y: (jnp.sin(x), x + y),
    lambda x, y: (lax.pmean(x, "data"), y),
    lambda x, y: (lax.pmean(x, "model"), y),
    lambda x, y: (lax.all_to_all(x, "data", 0, 0, tiled=True), y),
    lambda x, y: (x + lax.axis_index("data"), y),
    lambda x, y: (x, jnp.full(SHAPE, lax.all_gather(y, "data").mean())),
    lambda x, y: (lax.cond(y[0, 0] > 0, lambda: x, lambda: -x), y),
    lambda x, y: scanned(lambda carry: (carry[1], carry[0] + carry[1]), (x, y)),
    lambda x, y: jax.jit(lambda a, b: (b + 1, a))(x, y),
]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(STEPS), min_size=1, max_size=6))
def test_outputs_that_differ_are_never_called_shared(steps):
    def program(own, shared):
        for step in steps:
            own, shared = step(own, shared)
        return own, shared

    differs = np.array(observed(program))
    assert np.all(np.array(marked(program)) >= differs)


@pytest.mark.parametrize(
    "collective",
    [
        lambda x, groups: lax.psum(x, "data", axis_index_groups=groups),
        lambda x, groups: lax.all_gather(x, "data", axis_index_groups=groups),
    ],
    ids=["psum", "all_gather"],
)
def test_a_collective_within_groups_leaves_differences_between_groups(collective):
    groups = [[0, 1], [2, 3]]
    assert marked(lambda x, y: (collective(x, groups), collective(y, groups))) == [True, False]


def test_an_exchange_within_groups_makes_equal_values_differ():
    groups = [[0, 1], [2, 3]]
    exchange = lambda x, y: lax.all_to_all(y[:2], "data", 0, 0, axis_index_groups=groups)  # noqa: E731
    assert marked(exchange) == [True]


def test_an_invariant_gather_equalises(mesh):
    def local(x):
        return lax.all_gather(x, "data", to="invarying"), lax.all_gather(x, "data")

    row, whole = PartitionSpec("data"), PartitionSpec()
    mapped = jax.shard_map(local, mesh=mesh, in_specs=row, out_specs=(whole, row))
    rows = jax.device_put(jnp.ones(8), NamedSharding(mesh, row))
    (equation,) = jax.make_jaxpr(mapped)(rows).eqns
    assert varying_outputs(equation.params["jaxpr"], [True], "data") == [False, False]


def own_cond(x, y):
    return lax.cond(x[0, 0] > 0, lambda: lax.psum(y, "data"), lambda: y)


def own_cond_deep_inside(x, y):
    branch = jax.jit(lambda: scanned(lambda c: (lax.pmean(c[0], "data"),), (y,))[0])
    return lax.cond(x[0, 0] > 0, branch, lambda: y)


def cond_that_becomes_own(x, y):
    """The condition is shared in the first rounds, until x has moved along the carry."""
    return scanned(lambda carry: (carry[1], own_cond(carry[0], y) + x), (y, y))[0]


def own_while(x, y):
    return lax.while_loop(lambda c: c[0, 0] < x[0, 0], lambda c: lax.pmean(c, "data") + 1, y)


def own_while_condition(x, y):
    """The condition is shared until the carry differs."""
    return lax.while_loop(lambda c: c[0, 0] < 5, lambda c: lax.pmean(c, "data") + x, y)


@pytest.mark.parametrize(
    ("program", "kind"),
    [
        (own_cond, "cond"),
        (own_cond_deep_inside, "cond"),
        (cond_that_becomes_own, "cond"),
        (own_while, "while"),
        (own_while_condition, "while"),
    ],
)
def test_rejects_a_collective_that_only_some_workers_enter(program, kind):
    with pytest.raises(ValueError, match=f"axis 'data' runs inside a {kind} .* waiting forever"):
        marked(program)


@pytest.mark.parametrize(
    "inside",
    [lambda y: lax.psum(y, "model"), lambda y: lax.axis_index("data") + y],
    ids=["over another axis", "axis_index"],
)
def test_accepts_other_operations_under_a_condition(inside):
    program = lambda x, y: lax.cond(x[0, 0] > 0, lambda: inside(y), lambda: y)  # noqa: E731
    assert marked(program) == [True]


def test_accepts_a_collective_under_a_shared_condition():
    """All workers skip together, like `apply_if_finite` around a mean with a shared condition."""
    finite = lambda x: lax.pmin(jnp.isfinite(x).all().astype(jnp.float32), "data") > 0  # noqa: E731
    program = lambda x, y: lax.cond(finite(x), lambda: lax.pmean(x, "data"), lambda: y)  # noqa: E731
    assert marked(program) == observed(program) == [False]


@pytest.mark.parametrize("length", [1, 2, 7])
def test_the_walk_follows_a_chain_of_averages(length):
    """A difference moves on by one leaf per step, so the walk needs several rounds."""
    tx = optax.chain(*(optax.trace(0.9) for _ in range(length)))

    def state_after_two(own, shared):
        _, state = tx.update(own, tx.init(shared))
        return tx.update(own, state)[1]

    assert marked(state_after_two) == observed(state_after_two) == [True] * length
