"""What is reported of a batch, and how the reports of its parts make that of the whole."""

from ..primitives.covariance import covariance_quantiles
from .differential import DIDEntropy, did_entropy, displacement_metrics, log_ratio_rewards
from .merge import merge_metrics, reduce_metrics

__all__ = [
    "DIDEntropy",
    "covariance_quantiles",
    "did_entropy",
    "displacement_metrics",
    "log_ratio_rewards",
    "merge_metrics",
    "reduce_metrics",
]
