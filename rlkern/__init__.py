"""rlkern: fused kernels for the loss hot paths of LLM preference optimisation and RL."""

__version__ = "0.1.0"

from .backends import backend_info, use_backend
from .losses import DPOOutput, aggregate, dpo_loss, dpo_loss_from_logits, sequence_logps
from .ops import TokenStats, entropy_from_logits, token_logprobs, token_stats

__all__ = [
    "DPOOutput",
    "TokenStats",
    "aggregate",
    "backend_info",
    "dpo_loss",
    "dpo_loss_from_logits",
    "entropy_from_logits",
    "sequence_logps",
    "token_logprobs",
    "token_stats",
    "use_backend",
]
