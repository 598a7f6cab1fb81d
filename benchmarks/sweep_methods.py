"""What benchmarks/sweep.py trains: the example's methods, compressed Muon and Adam, and DiLoCo.

A method is a name with options in order, such as `muon/direction/1` or `diloco/adamw/30/2`:

- a method of examples/train_language_model.py, such as `ef-muon`;
- `OPTIMIZER/PLACE/BITS`: `muon` or `adamw` with error feedback that compresses to 1, 2 or 4 bits,
  or in full precision to `f32`. The place is the worker's `gradient`, its `momentum`, or the
  `direction` that its own optimiser would step in. `direction-polar` orthogonalises the mean
  direction of matrices again. `ef21` sends changes of the momentum up, and full precision down;
- `diloco/OPTIMIZER/H/BITS`: H local steps, then an outer step by SGD with Nesterov's momentum on
  the mean of compressed differences. `1x128` is one bit with a scale for every 128 coordinates,
  and `1+4` the same for matrices, and 4 bits for embeddings and vectors;
- `delayed-diloco/OPTIMIZER/H/BITS`: the same, but the outer step comes H local steps after its
  differences were sent, and workers go on meanwhile;
- `one-bit-adam/SHARE`: 1-bit Adam, with a warm-up of a share of all steps;
- `others/RMS/METHOD`: `muon` or `ef-muon` with this `others_rms`;
- `delay/METHOD`: a method whose updates are applied one step later;
- `fault/KIND/METHOD`: a method where three workers forge their gradients, by `invert`, `random` or
  `nan`.

The step size, momentum and decay of memories may be traced, so one program runs a whole grid.
"""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from accelerator_model import load_example

import signax

example = load_example()

AXIS = "data"
PLACES = ("gradient", "momentum", "ef21", "direction", "direction-polar")
FAULTY = (0, 1, 2)  # the workers that forge gradients
LOCAL = {"adamw": example.make_adamw, "muon": example.make_muon}


def is_matrix(params: Any) -> Any:
    """Labels of the leaves that Muon orthogonalises, and of the others."""

    def of_leaf(leaf: Any, kind: str):
        return "other" if kind == "embedding" or leaf.ndim < 2 else "matrix"

    return jax.tree.map(of_leaf, params, example.label(params))


def of_matrices(matrix: Any, other: Any) -> Any:
    """One transformation for matrices, another for the other leaves."""
    return optax.partition({"matrix": matrix, "other": other}, is_matrix)


def descend(run: SimpleNamespace) -> Any:
    """The example's weight decay and schedule, behind a direction."""
    rate = optax.scale_by_learning_rate(example.make_schedule(run))
    return optax.chain(optax.add_decayed_weights(*example.decay_options(run).values()), rate)


def mean(run: SimpleNamespace, bits: str) -> Any:
    """The mean over workers: in full precision, or compressed both ways with memories."""
    if bits == "f32":
        return signax.average_updates(AXIS)
    if bits == "1":
        return signax.mean_scaled_signs(AXIS, decay=run.decay)
    if bits == "1+4":
        return of_matrices(mean(run, "1x128"), mean(run, "4"))
    if bits.startswith("1x"):
        return signax.mean_scaled_signs(AXIS, block=int(bits[2:]), decay=run.decay)
    count: Any = int(bits)
    return signax.mean_quantized(AXIS, bits=count, decay=run.decay)


def ef21() -> Any:
    """EF21: a worker's estimate G of m follows by G += C(m - G), and only C(m - G) is sent."""
    sign = signax.scale_by_scaled_sign()

    def update(updates: Any, state: Any, params: Any = None):
        difference = jax.tree.map(jnp.subtract, updates, state)
        sent, _ = sign.update(difference, sign.init(params))
        estimate = jax.tree.map(jnp.add, state, sent)
        return estimate, estimate

    init: Any = optax.tree.zeros_like
    return optax.GradientTransformation(init, update)


def compressed(run: SimpleNamespace, optimizer: str, place: str, bits: str) -> Any:
    """Muon or Adam with a compressed mean at one place."""
    if optimizer not in LOCAL or place not in PLACES:
        raise ValueError(f"{run.method!r} is unknown: use one of {[*LOCAL]} at one of {PLACES}")
    if place == "gradient":
        return optax.chain(mean(run, bits), LOCAL[optimizer](run))
    adam = optax.scale_by_adam(run.momentum, 0.95)
    polar = optax.chain(signax.orthogonalize(), optax.scale(0.2))  # an AdamW step's usual size
    if place in ("momentum", "ef21"):
        squares = optax.scale_by_adam(0.0, 0.95)
        behind = of_matrices(polar, squares) if optimizer == "muon" else squares
        own = signax.hold_if_nonfinite(optax.ema(run.momentum))
        average = optax.chain(ef21(), mean(run, "f32")) if place == "ef21" else mean(run, bits)
        return optax.chain(own, average, behind, descend(run))
    momentum = optax.trace(run.momentum, nesterov=True)
    own = of_matrices(optax.chain(momentum, polar), adam) if optimizer == "muon" else adam
    chain = optax.chain(signax.hold_if_nonfinite(own), mean(run, bits))
    if place == "direction-polar":
        chain = optax.chain(chain, of_matrices(polar, optax.identity()))
    return optax.chain(chain, descend(run))


def delayed(inner: Any) -> Any:
    """Apply an update one step after it was made: an exchange may take a whole step."""
    inner = optax.with_extra_args_support(inner)

    def init(params: Any):
        return inner.init(params), optax.tree.zeros_like(params)

    def update(updates: Any, state: Any, params: Any = None):
        new, state_of_inner = inner.update(updates, state[0], params)
        return state[1], (state_of_inner, new)

    return optax.GradientTransformation(init, update)


def of_method(run: SimpleNamespace, *method: str) -> SimpleNamespace:
    """Return a run with the same settings that trains by another method."""
    return SimpleNamespace(**{**vars(run), "method": "/".join(method)})


def make(run: SimpleNamespace) -> tuple[Any, Any, int]:
    """The optimiser of every step, the outer one of DiLoCo if any, and H."""
    name, *options = run.method.split("/")
    if not options:
        return example.make_optimizer(run, AXIS), None, 1
    if name == "fault":
        kind, *method = options
        forge = signax.testing.adversary(AXIS, FAULTY, kind, jax.random.key(0))
        return optax.chain(forge, make(of_method(run, *method))[0]), None, 1
    if name == "delay":
        return delayed(make(of_method(run, *options))[0]), None, 1
    if name == "others":
        rms, method = options
        run = of_method(run, method)
        return example.make_optimizer(run, AXIS, others_rms=float(rms)), None, 1
    if name == "one-bit-adam":
        steps = max(1, round(run.steps * float(options[0])))
        rate, decays = example.make_schedule(run), example.decay_options(run)
        decays |= {"b1": run.momentum, "b2": 0.95, "decay": run.decay}
        return signax.one_bit_adam(rate, warmup_steps=steps, axis_name=AXIS, **decays), None, 1
    if name not in ("diloco", "delayed-diloco"):
        return compressed(run, name, *options), None, 1
    optimizer, local_steps, bits = options
    outer = optax.sgd(run.outer_step_size, momentum=run.outer_momentum, nesterov=True)
    return LOCAL[optimizer](run), optax.chain(mean(run, bits), outer), int(local_steps)
