"""REINFORCE (GPG, arXiv 2504.02546), truncated importance sampling, TOPR (arXiv 2503.14286)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import check_number
from ...primitives.kinks import clamped
from ...primitives.packing import Packed
from ...primitives.ratio import PolicyTokens, ratio_metrics
from ...primitives.reductions import fraction
from ..aggregate import LossOutput, aggregate_values
from ..arguments import policy_tokens
from ..rollout_weights import RolloutWeights


def _truncated(p: PolicyTokens, cap: float) -> Tensor:
    return clamped(p.ratio, high=cap)


def _metrics(p: PolicyTokens, cap: float | None) -> dict[str, Tensor]:
    truncated = {} if cap is None else {"clip_fraction_high": fraction(p.ratio > cap, p.mask, p.logp.dtype)}
    return {**truncated, **ratio_metrics(p)}


def reinforce_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor | Packed,
    *,
    square_coef: float = 0.0,
    weights: Tensor | RolloutWeights | None = None,
    aggregation: str | Tensor = "token-mean",
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """-A logp per token: REINFORCE, the plain policy gradient of verl and TRL.

    With `rlkern.advantages.gpg` it is GPG (arXiv 2504.02546). old_logp only serves the metrics and Kimi
    k1.5's term + square_coef / 2 (logp - old_logp)^2 (arXiv 2501.12599, tau there); it may be None.
    Importance weights go in as `weights`, without gradient.

    Args:
        logp, old_logp, advantages, mask, weights, aggregation, normalizer: as in `ppo_loss`. A token with A =
            0 has no loss, even at logp = -inf.
        square_coef: >= 0. `weights` does not touch its term (in verl's "dro" it does).

    Returns, Raises: as `ppo_loss`, without clip fractions.
    """
    check_number("square_coef", square_coef, 0)
    p = policy_tokens(logp, old_logp, advantages, mask, weights=weights, aggregation=aggregation, normalizer=normalizer)
    values = p.weigh(-p.advantages * p.score())
    if square_coef:
        values = values + (0.5 * square_coef) * p.log_ratio.square()
    return LossOutput(aggregate_values(values, p.sequences, aggregation, normalizer), _metrics(p, None))


def tis_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor | Packed,
    *,
    cap: float = 1.0,
    weights: Tensor | RolloutWeights | None = None,
    aggregation: str | Tensor = "token-mean",
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """-sg(min(r, cap)) A logp per token: truncated importance sampling, ROLL's "tis" at cap=1.

    Args:
        logp, old_logp, advantages, mask, weights, aggregation, normalizer: as in `ppo_loss`.
        cap: the largest importance weight, >= 0.

    Returns, Raises: as `ppo_loss`; clip_fraction_high is that of the tokens above the cap.
    """
    check_number("cap", cap, 0)
    p = policy_tokens(logp, old_logp, advantages, mask, weights=weights, levels=(), aggregation=aggregation, normalizer=normalizer)
    values = p.weigh(-_truncated(p, cap) * p.advantages * p.score())
    return LossOutput(aggregate_values(values, p.sequences, aggregation, normalizer), _metrics(p, cap))


def topr_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor | Packed,
    *,
    cap: float = 1.0,
    weights: Tensor | RolloutWeights | None = None,
    aggregation: str | Tensor = "token-mean",
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """Tapered off-policy REINFORCE (arXiv 2503.14286): -A logp for A >= 0, -sg(min(r, cap)) A logp for A < 0.

    What the policy already avoids is pushed away no further. The ratio is the token's, as in ROLL; the
    paper's is that of the whole sequence. Args, Returns, Raises: as for `tis_loss`.
    """
    check_number("cap", cap, 0)
    p = policy_tokens(logp, old_logp, advantages, mask, weights=weights, levels=(), aggregation=aggregation, normalizer=normalizer)
    weight = torch.where(p.advantages < 0, _truncated(p, cap), 1)
    values = p.weigh(-weight * p.advantages * p.score())
    return LossOutput(aggregate_values(values, p.sequences, aggregation, normalizer), _metrics(p, cap))
