"""Wrong pins of a state's rows are noticed where `update` runs, however deep inside a program.

No step is compiled here: errors come while JAX lowers it. test_stacks.py compiles whole steps.
"""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.extend.core import Primitive
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import signax
from signax._data_parallel import pinned

WORKERS = 8
WRONG_STATE = r"^state.*momentum.* is pinned to .*, but its rows lie as .*'data'.*state_shardings"
WRONG_NEW_STATE = f"^the new {WRONG_STATE[1:]}"


def in_cond(step):
    def skip(rows, *carry):
        del rows
        return carry

    return lambda rows, *carry: lax.cond(rows["w"].sum() > 0, step, skip, rows, *carry)


def in_scan(step):
    return lambda rows, *carry: lax.scan(lambda c, _: (step(rows, *c), None), carry, length=3)[0]


def in_while(step):
    def small(carry):
        return jnp.max(carry[0]["w"]) < 9

    return lambda rows, *carry: lax.while_loop(small, lambda c: step(rows, *c), carry)


PLACES = {
    "jit": lambda step: step,
    "cond": in_cond,
    "scan": in_scan,
    "while_loop": in_while,
    "nested jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "cond in scan in nested jit": lambda step: jax.jit(in_scan(in_cond(step))),
}

every_place = pytest.mark.parametrize("place", PLACES)
both_types = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)


class Case:
    """A step of signum, and the shapes of its arguments, which carry their shardings."""

    def __init__(self, axis_type=AxisType.Auto, **options):
        devices = jax.devices()[:WORKERS]
        self.mesh = jax.make_mesh((WORKERS,), ("data",), axis_types=(axis_type,), devices=devices)
        self.whole = NamedSharding(self.mesh, PartitionSpec())
        self.split = NamedSharding(self.mesh, PartitionSpec("data"))
        optimizer = signax.signum(1e-2, axis_name="data")
        self.tx = signax.DataParallel(optimizer, self.mesh, **options)
        self.params = {"w": jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=self.whole)}
        self.rows = {"w": jax.ShapeDtypeStruct((8, 16, 4), jnp.float32, sharding=self.split)}
        self.state = self.tx.abstract_state(self.params)
        self.right = self.tx.state_shardings(self.params)
        self.wrong = jax.tree.map(lambda _: self.whole, self.right)

    def step(self, rows, params, state):
        updates, state = self.tx.update(rows, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    def lower(self, step, state_shardings=None, out=None):
        """Lower a step whose state arrives with some shardings, and leaves with others."""
        state = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self.state,
            self.right if state_shardings is None else state_shardings,
        )
        return jax.jit(step, out_shardings=out).lower(self.rows, self.params, state)


@every_place
@both_types
def test_rows_that_arrive_replicated_are_an_error(place, axis_type):
    case = Case(axis_type)
    with pytest.raises(ValueError, match=WRONG_STATE):
        case.lower(PLACES[place](case.step), case.wrong)


@every_place
@both_types
def test_rows_that_leave_replicated_are_an_error(place, axis_type):
    case = Case(axis_type)
    with pytest.raises(ValueError, match=WRONG_NEW_STATE):
        case.lower(PLACES[place](case.step), out=(None, case.wrong))


@every_place
@both_types
def test_rows_with_right_pins_are_accepted_and_the_program_is_unchanged(
    place, axis_type, monkeypatch
):
    case = Case(axis_type)
    for out in (None, (None, case.right)):
        watched = case.lower(PLACES[place](case.step), out=out).as_text()
        with monkeypatch.context() as patch:
            patch.setattr(pinned, "watch", lambda array, end, check: array)
            assert case.lower(PLACES[place](case.step), out=out).as_text() == watched


@every_place
def test_rows_without_a_sharding_are_accepted(place):
    case = Case()
    free = jax.tree.map(lambda _: None, case.right)
    case.lower(PLACES[place](case.step), free)


@pytest.mark.parametrize("place", ["jit", "scan"])
def test_wrong_pins_of_a_nested_jit_are_an_error(place):
    case = Case()
    takes = jax.jit(case.step, in_shardings=(None, None, case.wrong))
    with pytest.raises(ValueError, match=WRONG_STATE):
        case.lower(PLACES[place](takes))
    returns = jax.jit(case.step, out_shardings=(None, case.wrong))
    with pytest.raises(ValueError, match=WRONG_NEW_STATE):
        case.lower(PLACES[place](returns))


@pytest.mark.parametrize("place", ["jit", "scan"])
def test_right_pins_of_a_nested_jit_are_accepted(place):
    case = Case()
    pins = {"in_shardings": (None, None, case.right), "out_shardings": (None, case.right)}
    case.lower(PLACES[place](jax.jit(case.step, **pins)))


def test_one_wrong_caller_of_a_nested_jit_is_an_error():
    case = Case()
    nested = jax.jit(case.step)

    def twice(rows, params, state, other):
        return nested(rows, params, state), nested(rows, params, other)

    def lower(other):
        other = jax.tree.map(lambda a, s: a.update(sharding=s), case.state, other)
        return jax.jit(twice).lower(case.rows, case.params, case.state, other)

    lower(case.right)
    with pytest.raises(ValueError, match=WRONG_STATE):
        lower(case.wrong)


@pytest.mark.parametrize("kept", ["right", "free"])
def test_a_second_copy_of_new_rows_may_leave_replicated(kept):
    case = Case()

    def reported(*arguments):
        params, state = case.step(*arguments)
        return params, state, state

    case.lower(reported, out=(None, case.right if kept == "right" else None, case.wrong))
    with pytest.raises(ValueError, match=WRONG_NEW_STATE):
        case.lower(reported, out=(None, case.wrong, case.wrong))


def test_rows_that_are_resharded_first_may_arrive_replicated():
    case = Case()

    def resharded(rows, params, state):
        return case.step(rows, params, lax.with_sharding_constraint(state, case.right))

    case.lower(resharded, case.wrong)


def test_a_constraint_that_leaves_the_choice_to_xla_is_accepted():
    case = Case()

    def open_step(rows, params, state):
        free = NamedSharding(case.mesh, PartitionSpec(PartitionSpec.UNCONSTRAINED))
        pins = jax.tree.map(lambda leaf: free if leaf.ndim else case.whole, state)
        return case.step(rows, params, lax.with_sharding_constraint(state, pins))

    case.lower(open_step)


@pytest.mark.parametrize("place", ["cond", "nested jit"])
def test_a_warning_leaves_the_program_unchanged(place, monkeypatch):
    case = Case(on_wrong_sharding="warn")
    with pytest.warns(UserWarning, match="is pinned to") as warned:
        lowered = case.lower(PLACES[place](case.step), case.wrong, out=(None, case.wrong))
    found = [str(warning.message).split()[0] for warning in warned]
    assert found == ["state[0][0].momentum['w']", "state[0][1].participation.missed", "the", "the"]
    monkeypatch.setattr(pinned, "watch", lambda array, end, check: array)
    unwatched = case.lower(PLACES[place](case.step), case.wrong, out=(None, case.wrong))
    assert lowered.as_text() == unwatched.as_text()


@every_place
def test_sharded_parameters_without_param_specs_are_an_error(place):
    case = Case()
    types, devices = (AxisType.Auto,) * 2, jax.devices()[:WORKERS]
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=types, devices=devices)
    decayed = signax.signum(1e-2, axis_name="data", weight_decay=0.1)  # reads the parameters
    case.tx = signax.DataParallel(decayed, mesh)
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    params = {"w": jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=sharding)}
    rows = {"w": jax.ShapeDtypeStruct((4, 16, 4), jnp.float32)}
    step = jax.jit(PLACES[place](case.step))
    with pytest.raises(ValueError, match=r"params.* is sharded as .*fsdp.*param_specs"):
        step.lower(rows, params, case.tx.abstract_state(params))


def test_a_step_is_checked_after_the_lowering_of_another_failed():
    case = Case()
    unknown = Primitive("unknown_to_xla")
    unknown.def_abstract_eval(lambda array: array)

    def fails(*arguments):
        params, state = case.step(*arguments)
        return jax.tree.map(unknown.bind, params), state

    with pytest.raises(NotImplementedError, match="unknown_to_xla"):
        case.lower(jax.jit(fails))
    case.lower(case.step)
    with pytest.raises(ValueError, match=WRONG_STATE):
        case.lower(case.step, case.wrong)
