"""Triton kernels, one file per primitive. They import torch and triton only; `rlkern.backends` holds the calling convention."""

from .covariance import covariance_sums, token_covariance
from .selection import select_bottom
from .token_stats import token_stats_backward, token_stats_forward

__all__ = ["covariance_sums", "select_bottom", "token_covariance", "token_stats_backward", "token_stats_forward"]
