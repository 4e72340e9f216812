"""Triton kernels, one file per primitive, with torch and triton only. See rlkern/backends/contract.py."""

from .covariance import token_covariance
from .did import did_entropy_backward, did_entropy_forward
from .kept import kept_hidden_gradient, kept_logits, kept_rows_backward, kept_rows_forward, kept_weight_gradient
from .moments import row_moments_backward, row_moments_forward
from .pair import pair_backward, pair_forward, pair_merge, pair_mixture_sums
from .ratio import kl_terms, ratio_terms
from .sampler import sampler_threshold
from .selection import select_bottom, select_fraction, selected_means
from .sequence_sums import sequence_spread, sequence_sums
from .token_stats import token_stats_backward, token_stats_forward, token_stats_kept_masses, token_stats_merge

CHECKS_TARGETS = False  # a check would wait for the device

__all__ = [
    "CHECKS_TARGETS",
    "did_entropy_backward",
    "did_entropy_forward",
    "kept_hidden_gradient",
    "kept_logits",
    "kept_rows_backward",
    "kept_rows_forward",
    "kept_weight_gradient",
    "kl_terms",
    "pair_backward",
    "pair_forward",
    "pair_merge",
    "pair_mixture_sums",
    "ratio_terms",
    "row_moments_backward",
    "row_moments_forward",
    "sampler_threshold",
    "select_bottom",
    "select_fraction",
    "selected_means",
    "sequence_spread",
    "sequence_sums",
    "token_covariance",
    "token_stats_backward",
    "token_stats_forward",
    "token_stats_kept_masses",
    "token_stats_merge",
]
