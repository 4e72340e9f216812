"""VESPO (arXiv 2602.10693): the sequence's importance weight through a smooth kernel that is 1 on-policy and fades on both sides."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .policy import LossOutput, check_number, finish, number, policy_tokens, ratio_metrics, score, weigh

_TOKEN_BOUND = 20.0  # of a token's log ratio, and of the sequence's from above: TRL's
_SEQUENCE_BOUND = math.log(1e-8)


def vespo_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    k_positive: float = 2.0,
    lambda_positive: float = 3.0,
    k_negative: float = 3.0,
    lambda_negative: float = 2.0,
    weights: Tensor | None = None,
    aggregation: str = "token-mean",
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """-sg(phi(W)) A logp per token, phi(W) = exp(lambda) W^k exp(-lambda W), W the product of the sequence's token ratios: arXiv 2602.10693.

    Log ratios are bounded to [-20, 20] a token and [log 1e-8, 20] a sequence, as in TRL, whose "vespo" divides by the tokens of the whole
    accumulated batch: pass `normalizer`.

    Args:
        logp, old_logp, advantages, mask, weights, aggregation, normalizer: as in `ppo_loss`.
        k_positive, lambda_positive: the kernel for A >= 0, both >= 0.
        k_negative, lambda_negative: the kernel for A < 0.

    Returns:
        LossOutput as that of `ppo_loss`, without clip fractions; metrics also: kernel_mean, over the tokens.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices, names and options other than the above.
    """
    numbers = {"k_positive": k_positive, "lambda_positive": lambda_positive, "k_negative": k_negative, "lambda_negative": lambda_negative}
    for name, value in numbers.items():
        check_number(name, value, 0)
    p = policy_tokens(logp, old_logp, advantages, mask, weights=weights, aggregation=aggregation, normalizer=normalizer)
    with torch.no_grad():
        log_w = p.log_ratio.clamp(-_TOKEN_BOUND, _TOKEN_BOUND).sum(-1, keepdim=True).clamp(_SEQUENCE_BOUND, _TOKEN_BOUND)
        negative = p.advantages < 0
        k = torch.where(negative, number(k_negative, log_w), number(k_positive, log_w))
        rate = torch.where(negative, number(lambda_negative, log_w), number(lambda_positive, log_w))
        kernel = (rate + k * log_w - rate * log_w.exp()).exp()
    values = weigh(-kernel * p.advantages * score(p), p)
    with torch.no_grad():
        kernel_mean = torch.where(p.mask, kernel, 0).sum() / p.mask.sum().clamp(min=1)
    return finish(values, p, aggregation, normalizer, {"kernel_mean": kernel_mean, **ratio_metrics(p)})
