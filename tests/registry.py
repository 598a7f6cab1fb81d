"""Every transformation and optimiser of the library, with arguments to make it."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import signax
from signax._transforms.freezing import freeze
from signax._transforms.spikes import skip_on_spike

AXIS = "workers"
KEY = jax.random.key(0)
NOTHING = MappingProxyType({})


class Case(NamedTuple):
    """A transformation, and arguments to make it."""

    factory: Callable[..., optax.GradientTransformation]
    numbers: Mapping[str, float] = NOTHING  # inject_hyperparams may trace these
    others: Mapping[str, Any] = NOTHING
    voted: bool = False  # it runs inside a mapped axis
    needs_params: bool = False
    num_workers: int = 2
    rounding: float = 1e-6  # between programs that compute the same

    def make(self, **changes):
        return self.wrap(self.factory(**{**self.numbers, **self.others, **changes}))

    def wrap(self, tx):
        return (
            over_workers(tx, self.num_workers) if self.voted else optax.with_extra_args_support(tx)
        )


def over_workers(tx, num_workers):
    """Run `tx` on workers with equal updates, as a transformation of one worker's updates."""
    tx = optax.with_extra_args_support(tx)

    def update_fn(updates, state, params=None, **extra_args):
        def worker(own):
            return tx.update(own, state, params, **extra_args)

        rows = jax.tree.map(lambda u: jnp.broadcast_to(u, (num_workers, *u.shape)), updates)
        mapped = jax.vmap(worker, axis_name=AXIS, axis_size=num_workers)
        return jax.tree.map(lambda row: row[0], mapped(rows))

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def matrices(params):
    """Dimension numbers for leaves of two axes, and for no others."""

    def of_leaf(leaf):
        return optax.contrib.MuonDimensionNumbers() if jnp.ndim(leaf) == 2 else None

    return jax.tree.map(of_leaf, params)


def alternating(params):
    """Two buckets, of every second leaf."""
    leaves, structure = jax.tree.flatten(params)
    return structure.unflatten([n % 2 for n in range(len(leaves))])


AMPLIFIED = 3.5**5 * 1e-6  # five Newton-Schulz iterations multiply small singular values so much
RATE = {"learning_rate": 0.1}
VOTE = {"axis_name": AXIS}
REGISTRY = {
    "scale_by_sign": Case(signax.scale_by_sign),
    "scale_by_scaled_sign": Case(signax.scale_by_scaled_sign),
    "scale_by_scaled_sign tree": Case(signax.scale_by_scaled_sign, others={"block": "tree"}),
    "scale_by_scaled_sign row": Case(signax.scale_by_scaled_sign, others={"block": "row"}),
    "scale_by_scaled_sign blocks": Case(signax.scale_by_scaled_sign, others={"block": 4}),
    "scale_by_stochastic_sign": Case(signax.scale_by_stochastic_sign, others={"key": KEY}),
    "scale_by_stochastic_sign bound": Case(
        signax.scale_by_stochastic_sign, {"norm": 2.0}, {"key": KEY}
    ),
    "scale_by_stochastic_sign axis": Case(
        signax.scale_by_stochastic_sign, others={"key": KEY, "norm": "linf", **VOTE}, voted=True
    ),
    "scale_by_top_k": Case(signax.scale_by_top_k, {"fraction": 0.4}),
    "scale_by_random_k": Case(signax.scale_by_random_k, {"fraction": 0.4}, {"key": KEY}),
    "scale_by_signum": Case(signax.scale_by_signum, {"beta": 0.8}),
    "scale_by_signum wide": Case(
        signax.scale_by_signum,
        {"beta": 0.8},
        {"nesterov": True, "accumulator_dtype": jnp.float32},
    ),
    "scale_by_signum warmup": Case(signax.scale_by_signum, others={"beta": 0.8, "warmup": True}),
    "error_feedback": Case(
        signax.error_feedback, {"decay": 0.9}, {"compressor": signax.scale_by_scaled_sign()}
    ),
    "error_feedback after a rate": Case(
        signax.error_feedback,
        {"learning_rate": 0.1},
        {"compressor": signax.scale_by_scaled_sign()},
    ),
    "error_feedback wide": Case(
        signax.error_feedback,
        others={
            "compressor": signax.scale_by_random_k(0.4, KEY),
            "accumulator_dtype": jnp.float32,
        },
    ),
    "hold_if_nonfinite": Case(signax.hold_if_nonfinite, others={"inner": signax.scale_by_signum()}),
    "skip_on_spike": Case(
        skip_on_spike,
        {"factor": 3.0, "decay": 0.8},
        {"inner": signax.scale_by_signum(), "warmup": 1},
    ),
    "freeze": Case(freeze),
    "leave_out_nonfinite": Case(
        signax.leave_out_nonfinite, others={"inner": signax.majority_vote(AXIS)}, voted=True
    ),
    "in_buckets": Case(
        signax.in_buckets,
        others={"inner": signax.majority_vote(AXIS), "buckets": alternating},
        voted=True,
    ),
    "in_buckets momentum": Case(
        signax.in_buckets,
        others={"inner": signax.signum(0.1, axis_name=AXIS), "buckets": alternating},
        voted=True,
    ),
    "majority_vote": Case(signax.majority_vote, others=VOTE, voted=True),
    "majority_vote abstain": Case(
        signax.majority_vote, others={**VOTE, "zeros": "abstain"}, voted=True
    ),
    "majority_vote agreement": Case(
        signax.majority_vote, others={**VOTE, "agreement": True}, voted=True, num_workers=4
    ),
    "majority_vote weights": Case(
        signax.majority_vote, others={**VOTE, "weights": (2.0, 1.0)}, voted=True
    ),
    "mean_signs": Case(signax.mean_signs, others=VOTE, voted=True),
    "mean_scaled_signs": Case(
        signax.mean_scaled_signs, others={**VOTE, "num_workers": 2}, voted=True
    ),
    "mean_scaled_signs worker": Case(
        signax.mean_scaled_signs,
        {"decay": 0.9, "learning_rate": 0.1},
        {**VOTE, "feedback": "worker", "block": 4, "accumulator_dtype": jnp.float32},
        voted=True,
    ),
    "mean_quantized": Case(signax.mean_quantized, others={**VOTE, "num_workers": 2}, voted=True),
    "mean_quantized worker": Case(
        signax.mean_quantized,
        {"decay": 0.9},
        {**VOTE, "bits": 4, "feedback": "worker", "block": 4},
        voted=True,
    ),
    "average_updates": Case(signax.average_updates, others=VOTE, voted=True),
    "adversary": Case(
        signax.testing.adversary,
        others={**VOTE, "workers": [0], "attack": "invert", "key": KEY},
        voted=True,
    ),
    "sign_sgd": Case(signax.sign_sgd, RATE),
    "sign_sgd voted": Case(signax.sign_sgd, RATE, VOTE, voted=True),
    "signum": Case(signax.signum, RATE),
    "signum voted": Case(
        signax.signum,
        {**RATE, "beta": 0.8, "weight_decay": 0.1},
        VOTE,
        voted=True,
        needs_params=True,
    ),
    "lion": Case(
        signax.lion, {**RATE, "b1": 0.8, "b2": 0.9, "weight_decay": 0.1}, needs_params=True
    ),
    "lion wide": Case(signax.lion, RATE, {"mu_dtype": jnp.float32, "weight_decay": 0.0}),
    "lion voted": Case(signax.lion, RATE, {**VOTE, "weight_decay": 0.0}, voted=True),
    "orthogonalize": Case(signax.orthogonalize),
    "muon": Case(
        signax.muon,
        {**RATE, "beta": 0.5, "weight_decay": 0.1},
        {"weight_dimension_numbers": matrices},
        needs_params=True,
        rounding=AMPLIFIED,
    ),
    "muon voted": Case(signax.muon, RATE, {**VOTE, "mu_dtype": jnp.float32}, voted=True),
    "ssdm": Case(
        signax.ssdm,
        {**RATE, "beta": 0.8, "weight_decay": 0.1},
        {"key": KEY},
        needs_params=True,
    ),
    "ssdm over workers": Case(signax.ssdm, RATE, {"key": KEY, **VOTE}, voted=True),
    "one_bit_adam": Case(
        signax.one_bit_adam,
        {**RATE, "b1": 0.8, "b2": 0.9, "eps": 1e-3, "weight_decay": 0.1},
        {"warmup_steps": 1},
        needs_params=True,
    ),
    "one_bit_adam over workers": Case(
        signax.one_bit_adam,
        {**RATE, "b1": 0.8, "b2": 0.9},
        {**VOTE, "warmup_steps": 1, "mu_dtype": jnp.float32, "num_workers": 2},
        voted=True,
    ),
    "ef_muon": Case(
        signax.ef_muon,
        {**RATE, "beta": 0.5, "decay": 0.5, "weight_decay": 0.1},
        {"weight_dimension_numbers": matrices},
        needs_params=True,
        rounding=AMPLIFIED,
    ),
    "ef_muon over workers": Case(
        signax.ef_muon,
        RATE,
        {**VOTE, "weight_dimension_numbers": matrices, "mu_dtype": jnp.float32, "num_workers": 2},
        voted=True,
        rounding=AMPLIFIED,
    ),
    "ef_sign_sgd": Case(signax.ef_sign_sgd, {**RATE, "weight_decay": 0.1}, needs_params=True),
    "ef_sign_sgd over workers": Case(
        signax.ef_sign_sgd,
        {**RATE, "momentum": 0.9},
        {"nesterov": True, **VOTE, "num_workers": 2},
        voted=True,
    ),
}
# Exports that do not transform one worker's updates. DataParallel transforms global arrays, and
# has tests of its own.
OTHERS = {
    "DataParallel", "DiLoCo", "GradNorm", "diagnostics", "find_buckets", "inner_rules", "overlap",
    "participation", "pmean_quantized",
    "pmean_scaled_signs", "pmean_signs", "pvote", "pvote_scatter", "scaled_signs_memory",
    "state_specs", "testing",
}  # fmt: skip

# Re-exported from Optax, which accepts any dtype and documents it.
OPTAXS = {"scale_by_sign"}
