"""Checks and clean-up for losses whose inputs are not advantages: one number a response, or a second log-probability a token."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_tokens
from .policy import PolicyTokens, policy_tokens


def ratio_tokens(logp: Tensor, old_logp: Tensor | None, mask: Tensor) -> PolicyTokens:
    """`policy_tokens` where nothing is known of advantages: they are 1."""
    shaped = isinstance(logp, Tensor) and logp.dim() == 2
    return policy_tokens(logp, old_logp, logp.detach().new_ones(logp.shape[0]) if shaped else torch.ones(0), mask)


def per_sequence(name: str, x: Tensor, tokens: PolicyTokens) -> Tensor:
    """x [B] or [B, 1], bool or real, detached, as [B, 1] in the tokens' dtype; 0 for a sequence without tokens. Raises TypeError, ValueError."""
    if not isinstance(x, Tensor) or x.dtype.is_complex:
        raise TypeError(f"{name} must be a real tensor [B], got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    n = tokens.logp.shape[0]
    if tuple(x.shape) not in ((n,), (n, 1)):
        raise ValueError(f"{name} must be [B] or [B, 1] with B = {n}, one number a response, got {tuple(x.shape)}")
    if x.device != tokens.logp.device:
        raise ValueError(f"{name} must be on the device of logp {tokens.logp.device}, got {x.device}")
    return torch.where(tokens.mask.any(-1, keepdim=True), x.detach().to(tokens.logp.dtype).view(n, 1), 0)


def log_ratio_to(name: str, other_logp: Tensor, tokens: PolicyTokens) -> Tensor:
    """logp - other_logp [B, T], with the gradient of logp; 0 where masked."""
    check_tokens(name, other_logp, tokens.logp)
    return tokens.logp - torch.where(tokens.mask, other_logp.detach().to(tokens.logp.dtype), 0)
