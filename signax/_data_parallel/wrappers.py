"""Transformations that wrap `DataParallel`, and so see the rows of all workers at once.

A wrapper takes the rows of all workers for one gradient: a norm covers all workers, and a state
like the parameters grows by broadcasting. Arrays cannot tell rows from a gradient. But a wrapper
calls `DataParallel`, so its code is on Python's stack whenever a state is made or a step is traced.
A training loop calls `DataParallel` without a wrapper.
"""

import inspect
from collections.abc import Callable
from types import FrameType
from typing import Any

from signax._data_parallel.captured import is_of_captured

_MODULES = (
    "optax._src.",
    "optax.contrib.",
    "optax.schedules.",
    "optax.transforms.",
    "signax._optimizers.",
    "signax._transforms.",
)

# These pass rows on as they are, and use only the updates that DataParallel returns.
_RIGHT = frozenset(
    {
        "inject_hyperparams",
        "inject_stateful_hyperparams",
        "leave_out_nonfinite",
        "lookahead",
        "schedule_free",
        "split_real_and_imaginary",
        "with_extra_args_support",
    }
)

_CHAINS = "chain", "named_chain"

_VOTE_AFTER = (
    "Put it inside, before the vote: DataParallel(optax.chain({name}(...), "
    "signax.majority_vote(...)), mesh)"
)
_VOTE_BEFORE = (
    "Put it inside, after the vote: DataParallel(optax.chain(signax.majority_vote(...), "
    "{name}(...)), mesh)"
)
_ELSEWHERE = {
    "MultiSteps": (
        "For micro-batches use accumulate= of DataParallel.value_and_grad or train_step, which "
        "votes once for all of them"
    ),
    "apply_if_finite": (
        "Leave it out: DataParallel excludes a worker with a NaN or an infinity from the step"
    ),
    "conditionally_mask": _VOTE_BEFORE,
    "conditionally_transform": _VOTE_BEFORE,
    "hold_if_nonfinite": _VOTE_AFTER,
    "skip_on_spike": _VOTE_AFTER,
}


def check_wrappers() -> None:
    """Raise if a transformation that mistakes rows for one gradient calls `DataParallel`."""
    frame, found = inspect.currentframe(), []
    while frame is not None:
        if name := _wrapper(frame):
            found.append(name)
        frame = frame.f_back
    if not found:
        return
    # optax.partition wraps by optax.masked.
    name = "optax.partition" if "optax.partition" in found else found[0]
    short = name.rpartition(".")[2]
    if short in _CHAINS:
        raise ValueError(
            f"{name} runs another transformation before DataParallel, on the gradients of all "
            "workers at once. Put the transformation inside, before or after the vote: "
            "DataParallel(optax.chain(..., signax.majority_vote(...), ...), mesh). To measure "
            "norms outside, use DataParallel.grad_norm"
        )
    remedy = _ELSEWHERE.get(short, "Put it inside: DataParallel({name}(...), mesh)")
    raise ValueError(
        f"{name} wraps DataParallel, and gets the gradients of all workers at once. "
        + remedy.format(name=name)
    )


def _wrapper(frame: FrameType) -> str | None:
    """The name of the transformation whose code a frame runs, if it is at a wrong place."""
    module = str(frame.f_globals.get("__name__"))
    if not module.startswith(_MODULES):
        return None
    function = frame.f_code.co_qualname  # as in chain.<locals>.update_fn or MultiSteps.update
    name, _, inner = function.partition(".")
    if not inner or name in _RIGHT:  # a doctest runs in its module, too
        return None
    if name in _CHAINS:
        # A chain collects new states. There are none yet while its first transformation runs. The
        # later transformations see the update that all workers share.
        is_first = "new_state" in frame.f_locals and not frame.f_locals["new_state"]
        if is_first or "update" not in function:
            return None
    public = "optax.contrib" if module.startswith("optax.contrib.") else module.partition(".")[0]
    return f"{public}.{name}"


def explain_captured(update: Callable[..., Any]) -> Callable[..., Any]:
    """Let an update raise an error with a remedy if `tx` captures arrays that lie on the mesh."""

    def explained(*arguments: Any) -> Any:
        try:
            return update(*arguments)
        except NotImplementedError as error:
            if not is_of_captured(error):
                raise
            raise ValueError(
                "tx uses arrays of the surrounding step, which JAX forbids on a mesh of Explicit "
                "axes. Put optax.inject_hyperparams inside, DataParallel(optax.inject_hyperparams("
                "...)(...), mesh), and pass other arrays to update as extra arguments"
            ) from error

    return explained
