"""What is read from rows of logits or from tokens. One file each holds the maths and the public function."""

from .covariance import token_covariance
from .did import token_did_entropy
from .divergence import PairStats, gkd_divergence, pair_stats, token_divergence
from .elbo import masked_elbo
from .kept import NLPOStats, nlpo_keep_set, nlpo_stats
from .kept_sets import Kept
from .kl import kl_estimate
from .linear import linear_token_stats
from .linear_divergence import linear_pair_stats, linear_token_divergence
from .packing import Packed, packed
from .plans import LinearPlan, linear_plan
from .row_stats import TokenStats
from .sampler import sampler_threshold
from .sequence import next_tokens, sequence_logps
from .token_stats import entropy_from_logits, token_logprobs, token_stats
from .topk import topk_divergence, topk_reverse_kl

__all__ = [
    "Kept",
    "LinearPlan",
    "NLPOStats",
    "Packed",
    "PairStats",
    "TokenStats",
    "entropy_from_logits",
    "gkd_divergence",
    "kl_estimate",
    "linear_pair_stats",
    "linear_plan",
    "linear_token_divergence",
    "linear_token_stats",
    "masked_elbo",
    "next_tokens",
    "nlpo_keep_set",
    "nlpo_stats",
    "packed",
    "pair_stats",
    "sampler_threshold",
    "sequence_logps",
    "token_covariance",
    "token_did_entropy",
    "token_divergence",
    "token_logprobs",
    "token_stats",
    "topk_divergence",
    "topk_reverse_kl",
]
