"""The transformation that runs on each worker, with its extra arguments and local steps."""

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import optax

from signax._data_parallel.layout import PerWorker
from signax._transforms.participation import leave_out_nonfinite

if TYPE_CHECKING:
    Aggregator = optax.GradientTransformationExtraArgs
else:
    try:  # Optax's class for transformations of rows of updates into one update
        from optax.experimental import aggregating

        Aggregator = aggregating.Aggregator
    except (ImportError, AttributeError):
        Aggregator = optax.GradientTransformationExtraArgs


class LocalStepsState(NamedTuple):
    """State of a `DataParallel` with local steps.

    Attributes:
      local: the state of the optimiser `local`, with one row per worker: [M, ...].
      exchanged: the state of the transformation `tx`, which exchanges the differences.
    """

    local: Any
    exchanged: Any


def with_local_state(
    local: optax.GradientTransformation, tx: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """Keep the state of local steps beside the state of `tx`, and leave it alone."""

    def init_fn(params: optax.Params):
        return LocalStepsState(local=local.init(params), exchanged=tx.init(params))

    def update_fn(updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any):
        updates, exchanged = tx.update(updates, state.exchanged, params, **extra_args)
        return updates, LocalStepsState(local=state.local, exchanged=exchanged)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def own_local_state(per_worker: PerWorker | None) -> PerWorker:
    """Give each worker its own state of local steps, though no update shows that it differs."""

    def is_per_worker(path: str, leaf: jax.ShapeDtypeStruct) -> bool | None:
        if path.startswith(".local"):
            return True
        return None if per_worker is None else per_worker(path, leaf)

    return is_per_worker


def with_extra_args(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Pass extra arguments to every transformation that accepts any, even `optax.MultiSteps`.

    Such a transformation learns of all updates, so its votes and means exclude the same workers.
    """
    parameters = inspect.signature(tx.update).parameters.values()
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
        return leave_out_nonfinite(optax.GradientTransformationExtraArgs(tx.init, tx.update))
    return optax.with_extra_args_support(tx)
