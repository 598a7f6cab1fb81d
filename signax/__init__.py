"""One-bit distributed training: sign-based gradient transformations and a majority vote."""

import warnings
from typing import Any

from optax import scale_by_sign

from signax import diagnostics, testing
from signax._data_parallel.data_parallel import DataParallel
from signax._data_parallel.diloco import DiLoCo
from signax._data_parallel.diloco_state import DiLoCoState
from signax._data_parallel.inner import LocalStepsState
from signax._data_parallel.layout import state_specs
from signax._data_parallel.norms import GradNorm
from signax._data_parallel.rules import inner_rules
from signax._optimizers.ef_muon import ef_muon
from signax._optimizers.means import ef_sign_sgd, ssdm
from signax._optimizers.muon import MuonMomentumState, muon
from signax._optimizers.one_bit_adam import OneBitAdamState, one_bit_adam
from signax._optimizers.votes import lion, sign_sgd, signum
from signax._overlap.find_buckets import find_buckets
from signax._overlap.overlap import overlap
from signax._transforms.buckets import BucketsState, in_buckets
from signax._transforms.compressors import (
    ScaleByRandomKState,
    ScaleByStochasticSignState,
    scale_by_random_k,
    scale_by_scaled_sign,
    scale_by_stochastic_sign,
    scale_by_top_k,
)
from signax._transforms.freezing import freeze
from signax._transforms.memory import (
    ErrorFeedbackState,
    ScaleBySignumState,
    error_feedback,
    scale_by_signum,
)
from signax._transforms.orthogonal import orthogonalize
from signax._transforms.participation import (
    Participation,
    hold_if_nonfinite,
    leave_out_nonfinite,
    participation,
)
from signax._transforms.spikes import SkipOnSpikeState, skip_on_spike
from signax._wire.ballots import DitherMemory
from signax._wire.feedback import ScaledSignsMemory, scaled_signs_memory
from signax._wire.quantized import pmean_quantized
from signax._workers.agreement import Reputation
from signax._workers.collectives import pmean_scaled_signs, pmean_signs, pvote, pvote_scatter
from signax._workers.compressed import MeanScaledSignsState, mean_quantized, mean_scaled_signs
from signax._workers.means import (
    AverageUpdatesState,
    MeanSignsState,
    average_updates,
    mean_signs,
)
from signax._workers.vote_state import WeightedVoteState
from signax._workers.votes import Agreement, MajorityVoteState, majority_vote

__version__ = "0.2.0"

__all__ = [
    "Agreement",
    "AverageUpdatesState",
    "BucketsState",
    "DataParallel",
    "DiLoCo",
    "DiLoCoState",
    "DitherMemory",
    "ErrorFeedbackState",
    "GradNorm",
    "LocalStepsState",
    "MajorityVoteState",
    "MeanScaledSignsState",
    "MeanSignsState",
    "MuonMomentumState",
    "OneBitAdamState",
    "Participation",
    "Reputation",
    "ScaleByRandomKState",
    "ScaleBySignumState",
    "ScaleByStochasticSignState",
    "ScaledSignsMemory",
    "SkipOnSpikeState",
    "WeightedVoteState",
    "average_updates",
    "diagnostics",
    "ef_muon",
    "ef_sign_sgd",
    "error_feedback",
    "find_buckets",
    "freeze",
    "hold_if_nonfinite",
    "in_buckets",
    "inner_rules",
    "leave_out_nonfinite",
    "lion",
    "majority_vote",
    "mean_quantized",
    "mean_scaled_signs",
    "mean_signs",
    "muon",
    "one_bit_adam",
    "orthogonalize",
    "overlap",
    "participation",
    "pmean_quantized",
    "pmean_scaled_signs",
    "pmean_signs",
    "pvote",
    "pvote_scatter",
    "scale_by_random_k",
    "scale_by_scaled_sign",
    "scale_by_sign",
    "scale_by_signum",
    "scale_by_stochastic_sign",
    "scale_by_top_k",
    "scaled_signs_memory",
    "sign_sgd",
    "signum",
    "skip_on_spike",
    "ssdm",
    "state_specs",
    "testing",
]


def __getattr__(name: str) -> Any:
    if name == "adversaries":
        warnings.warn(
            "signax.adversaries is deprecated: use signax.testing", DeprecationWarning, stacklevel=2
        )
        return testing
    raise AttributeError(f"module 'signax' has no attribute {name!r}")
