"""One-bit distributed training: sign-based gradient transformations and a majority vote."""

from optax import scale_by_sign

from signax import adversaries, diagnostics
from signax._agreement import Agreement
from signax._averaging import AverageUpdatesState, MeanSignsState, average_updates, mean_signs
from signax._averaging_scaled import MeanScaledSignsState, mean_scaled_signs
from signax._ballots import DitherMemory
from signax._collectives import pvote
from signax._compressors import (
    ScaleByRandomKState,
    ScaleByStochasticSignState,
    scale_by_random_k,
    scale_by_scaled_sign,
    scale_by_stochastic_sign,
    scale_by_top_k,
)
from signax._data_parallel import DataParallel
from signax._error_memory import ScaledSignsMemory, scaled_signs_memory
from signax._local_steps import LocalStepsState
from signax._means import pmean_signs
from signax._optimizers import ef_sign_sgd, lion, sign_sgd, signum, ssdm
from signax._participation import Participation, leave_out_nonfinite
from signax._scaled_signs import pmean_scaled_signs
from signax._scatter import pvote_scatter
from signax._transforms import (
    ErrorFeedbackState,
    ScaleBySignumState,
    error_feedback,
    hold_if_nonfinite,
    scale_by_signum,
)
from signax._voting import MajorityVoteState, majority_vote

__version__ = "0.1.0"

__all__ = [
    "Agreement",
    "AverageUpdatesState",
    "DataParallel",
    "DitherMemory",
    "ErrorFeedbackState",
    "LocalStepsState",
    "MajorityVoteState",
    "MeanScaledSignsState",
    "MeanSignsState",
    "Participation",
    "ScaleByRandomKState",
    "ScaleBySignumState",
    "ScaleByStochasticSignState",
    "ScaledSignsMemory",
    "adversaries",
    "average_updates",
    "diagnostics",
    "ef_sign_sgd",
    "error_feedback",
    "hold_if_nonfinite",
    "leave_out_nonfinite",
    "lion",
    "majority_vote",
    "mean_scaled_signs",
    "mean_signs",
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
    "ssdm",
]
