"""Which values of a program differ between workers: a walk over its jaxpr.

A value computed from a value that differs, differs too; a reduction or an all_gather over the
workers' axis makes it the same again. The walk proves nothing (the types of `jax.shard_map` do,
once the program runs). It finds the smallest set of state to keep per worker, for programs whose
types are right only once that set is known.
"""

from collections.abc import Hashable, Sequence
from typing import Any

from jax.extend import core, source_info_util

_EQUALISING = {
    "psum", "psum2", "psum_invariant", "pmax", "pmin", "all_gather", "all_gather_invariant",
}  # fmt: skip


def varying_outputs(
    jaxpr: core.Jaxpr, varying_inputs: Sequence[bool], axis_name: Hashable
) -> list[bool]:
    """Whether each output differs between workers, given which inputs differ.

    Raises:
      ValueError: a collective over the axis runs under a condition that differs between workers:
        some workers would wait in it forever.
    """
    varying = dict(zip(jaxpr.invars, varying_inputs, strict=True))

    def read(atom: Any) -> bool:
        return not isinstance(atom, core.Literal) and varying.get(atom, False)

    for eqn in jaxpr.eqns:
        outputs = _equation_outputs(eqn, [read(atom) for atom in eqn.invars], axis_name)
        varying.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _equation_outputs(eqn: Any, inputs: list[bool], axis_name: Hashable) -> list[bool]:
    name = eqn.primitive.name
    if name == "cond":
        return _cond_outputs(eqn, inputs, axis_name)
    if name == "while":
        return _while_outputs(eqn, inputs, axis_name)
    if name == "scan":
        return _scan_outputs(eqn, inputs, axis_name)
    inner = _called_jaxpr(eqn)
    if inner is not None:
        return varying_outputs(inner, inputs, axis_name)
    if _runs_over(eqn, axis_name):
        if name not in _EQUALISING:  # axis_index or all_to_all, for example
            return [True] * len(eqn.outvars)
        within_groups = eqn.params.get("axis_index_groups") is not None
        return [within_groups and any(inputs)] * len(eqn.outvars)
    return [any(inputs) or _has_collective(eqn, axis_name)] * len(eqn.outvars)


def _cond_outputs(eqn: Any, inputs: list[bool], axis_name: Hashable) -> list[bool]:
    branches = [_open(branch) for branch in eqn.params["branches"]]
    differs, *operands = inputs
    if differs and _has_collective(eqn, axis_name):
        raise _deadlock(eqn, axis_name)
    outputs = [varying_outputs(branch, operands, axis_name) for branch in branches]
    return [differs or any(column) for column in zip(*outputs, strict=True)]


def _while_outputs(eqn: Any, inputs: list[bool], axis_name: Hashable) -> list[bool]:
    condition, body = _open(eqn.params["cond_jaxpr"]), _open(eqn.params["body_jaxpr"])
    first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    condition_consts, body_consts = inputs[:first], inputs[first : first + second]

    def step(carry: list[bool]):
        return varying_outputs(body, [*body_consts, *carry], axis_name)

    carry = _fixpoint(step, inputs[first + second :])
    if any(varying_outputs(condition, [*condition_consts, *carry], axis_name)):
        if _has_collective(eqn, axis_name):
            raise _deadlock(eqn, axis_name)
        return [True] * len(carry)
    return carry


def _scan_outputs(eqn: Any, inputs: list[bool], axis_name: Hashable) -> list[bool]:
    body = _open(eqn.params["jaxpr"])

    # The number of variables that the body does not see a slice of.
    def whole(outer: Sequence[Any], inner: Sequence[Any]) -> int:
        return sum(a.aval.shape == b.aval.shape for a, b in zip(outer, inner, strict=True))

    carried = whole(eqn.outvars, body.outvars)
    consts = whole(eqn.invars, body.invars) - carried
    slices = inputs[consts + carried :]

    def step(carry: list[bool]):
        return varying_outputs(body, [*inputs[:consts], *carry, *slices], axis_name)

    carry = _fixpoint(lambda carry: step(carry)[:carried], inputs[consts : consts + carried])
    return [*carry, *step(carry)[carried:]]


def _fixpoint(step: Any, values: list[bool]) -> list[bool]:
    while True:
        grown = [old or new for old, new in zip(values, step(values), strict=True)]
        if grown == values:
            return values
        values = grown


def _open(jaxpr: Any) -> core.Jaxpr:
    return getattr(jaxpr, "jaxpr", jaxpr)  # of a closed one


def _inner_jaxprs(eqn: Any) -> list[core.Jaxpr]:
    """The jaxprs in an equation's parameters."""
    return [_open(jaxpr) for jaxpr in core.jaxprs_in_params(eqn.params)]


def _called_jaxpr(eqn: Any) -> core.Jaxpr | None:
    """The one jaxpr that an equation such as jit or custom_vjp runs on its own inputs."""
    inner = _inner_jaxprs(eqn)
    fits = (
        len(inner) == 1
        and len(inner[0].invars) == len(eqn.invars)
        and len(inner[0].outvars) == len(eqn.outvars)
    )
    return inner[0] if fits else None


def _runs_over(eqn: Any, axis_name: Hashable) -> bool:
    """Whether an equation itself communicates over the axis, or asks for its index."""
    for parameter in ("axes", "axis_name"):
        axes = eqn.params.get(parameter, ())
        if axis_name in (axes if isinstance(axes, (tuple, list, frozenset)) else (axes,)):
            return True
    return False


def has_conditional_collective(jaxpr: core.Jaxpr, axis_name: Hashable) -> bool:
    """Whether a collective over the axis stands in a branch of a condition."""
    return any(
        (eqn.primitive.name == "cond" and _has_collective(eqn, axis_name))
        or any(has_conditional_collective(inner, axis_name) for inner in _inner_jaxprs(eqn))
        for eqn in jaxpr.eqns
    )


def _has_collective(eqn: Any, axis_name: Hashable) -> bool:
    """Whether a collective over the axis stands anywhere inside an equation."""
    return any(
        (_runs_over(inner, axis_name) and inner.primitive.name != "axis_index")
        or _has_collective(inner, axis_name)
        for jaxpr in _inner_jaxprs(eqn)
        for inner in jaxpr.eqns
    )


def _deadlock(eqn: Any, axis_name: Hashable) -> ValueError:
    where = source_info_util.summarize(eqn.source_info)
    return ValueError(
        f"a collective over axis {axis_name!r} runs inside a {eqn.primitive.name} whose condition "
        f"differs between workers, at {where}: workers that do not enter it would leave the others "
        "waiting forever. Put the vote or mean outside, as in "
        "optax.chain(signax.hold_if_nonfinite(inner), signax.majority_vote(axis_name))"
    )
