"""Soft adaptive policy optimisation (SAPO, arXiv 2511.20347): a sigmoid instead of PPO's hard clip."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import check_positive
from ...primitives.kinks import number
from ...primitives.packing import Packed
from ...primitives.ratio import ratio_metrics
from ..aggregate import LossOutput, aggregate_values
from ..arguments import policy_tokens
from ..rollout_weights import RolloutWeights


def sapo_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor | Packed,
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
    log_ratio_clamp: float | None = None,
    weights: Tensor | RolloutWeights | None = None,
    aggregation: str | Tensor = "seq-mean-token-mean",
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """-A (4 / tau) sigmoid(tau (r - 1)) per token, tau by the sign of A: arXiv 2511.20347.

    Its slope at r = 1 is that of -A r. verl's "sapo" always uses the default aggregation (and
    log_ratio_clamp=20); TRL's is aggregation="grpo".

    Args:
        logp, old_logp, advantages, mask, log_ratio_clamp, weights, aggregation, normalizer: as in `ppo_loss`.
        tau_positive, tau_negative: how fast the gradient fades off-policy, for A > 0 and A <= 0; > 0.

    Returns, Raises: as `ppo_loss`, without clip fractions.
    """
    check_positive("tau_positive", tau_positive)
    check_positive("tau_negative", tau_negative)
    p = policy_tokens(
        logp, old_logp, advantages, mask, weights=weights, log_ratio_clamp=log_ratio_clamp, aggregation=aggregation, normalizer=normalizer
    )
    tau = torch.where(p.advantages > 0, number(tau_positive, p.logp), number(tau_negative, p.logp))
    values = p.weigh(-p.advantages * (4 / tau) * torch.sigmoid(tau * (p.ratio - 1)))
    return LossOutput(aggregate_values(values, p.sequences, aggregation, normalizer), ratio_metrics(p))
