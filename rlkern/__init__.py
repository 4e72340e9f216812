"""rlkern: fused kernels for the loss hot paths of LLM preference optimisation and RL.

Token functions, primitives and losses have flat names. Beside them:

    rlkern.advantages    rewards -> advantages
    rlkern.diffusion     masks and estimates of masked diffusion models
    rlkern.losses        losses by family, their schedules and histories
    rlkern.metrics       merging the metrics of micro-batches and processes, and further metrics
    rlkern.parallel      ranks that share a vocabulary or a batch
    rlkern.selection     exactly K tokens, where only the device knows K
    rlkern.reference     the formulas in plain PyTorch
"""

__version__ = "0.1.0"

from .requires import check_packages

check_packages()

from . import advantages, diffusion, losses, metrics, parallel, primitives, reference, selection
from .backends import backend_info, use_backend
from .diffusion import (
    BGPOAccumulator,
    BGPOOutput,
    BGPOStats,
    bgpo_loss,
    diffu_grpo_loss,
    elbo_coeff,
    espo_loss,
    spg_loss,
    unigrpo_loss,
    vrpo_loss,
    wd1_loss,
)
from .losses import *  # noqa: F403
from .metrics import reduce_metrics
from .primitives import *  # noqa: F403

__all__ = [
    *losses.__all__,
    *primitives.__all__,
    "BGPOAccumulator",
    "BGPOOutput",
    "BGPOStats",
    "advantages",
    "backend_info",
    "bgpo_loss",
    "diffu_grpo_loss",
    "diffusion",
    "elbo_coeff",
    "espo_loss",
    "losses",
    "metrics",
    "parallel",
    "reduce_metrics",
    "reference",
    "selection",
    "spg_loss",
    "unigrpo_loss",
    "use_backend",
    "vrpo_loss",
    "wd1_loss",
]
