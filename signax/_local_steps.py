"""The state of steps that each worker takes by itself, beside that of what it then hands over."""

from typing import Any, NamedTuple

import optax

from signax._layout import PerWorker


class LocalStepsState(NamedTuple):
    """State of a `DataParallel` with local steps.

    Attributes:
      local: the state of the optimiser of local steps, one row per worker.
      exchanged: the state of the transformation that is handed what they come to.
    """

    local: Any
    exchanged: Any


def with_local_state(
    local: optax.GradientTransformation, tx: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """`tx` with the state of local steps beside its own, which it leaves alone."""

    def init_fn(params):
        return LocalStepsState(local=local.init(params), exchanged=tx.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        updates, exchanged = tx.update(updates, state.exchanged, params, **extra_args)
        return updates, LocalStepsState(local=state.local, exchanged=exchanged)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def own_local_state(per_worker: PerWorker | None) -> PerWorker:
    """Gives each worker its own state of local steps, which no update shows to differ."""

    def is_per_worker(path, leaf):
        if path.startswith(".local"):
            return True
        return None if per_worker is None else per_worker(path, leaf)

    return is_per_worker
