"""CISPO (MiniMax-M1, arXiv 2506.13585): clips the importance weight, so that no token loses its gradient."""

from __future__ import annotations

from torch import Tensor

from ...checks import check_positive
from ...primitives.kinks import clamped
from ...primitives.packing import Packed
from ...primitives.ratio import ratio_metrics
from ...primitives.reductions import fraction
from ..aggregate import LossOutput, aggregate_values
from ..arguments import check_clip, policy_tokens
from ..rollout_weights import RolloutWeights


def cispo_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor | Packed,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    cap: float | None = None,
    log_ratio_clamp: float | None = None,
    weights: Tensor | RolloutWeights | None = None,
    aggregation: str | Tensor = "token-mean",
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """-sg(clip(r, 1 - clip_low, 1 + clip_high)) A logp or, with cap, -sg(min(r, cap)) A logp per token.

    arXiv 2506.13585 Eq. 4, 5. The paper has no lower bound: clip_low=1. verl's "cispo" is clip_low, clip_high
    and log_ratio_clamp=20. TRL's epsilon_high is `cap`: an absolute number (5.0), not 1 + epsilon, without a
    lower bound.

    Args:
        logp, old_logp, advantages, mask, log_ratio_clamp, weights, aggregation, normalizer: as in `ppo_loss`.
        clip_low, clip_high: bounds of the weight; not used with `cap`.
        cap: the largest weight, > 0.

    Returns, Raises: as `ppo_loss`, but the clip fractions count all tokens whose weight was cut.
    """
    check_clip(clip_low, clip_high)
    if cap is not None:
        check_positive("cap", cap)
    p = policy_tokens(
        logp, old_logp, advantages, mask, weights=weights, log_ratio_clamp=log_ratio_clamp, aggregation=aggregation, normalizer=normalizer
    )
    low, high = (0.0, cap) if cap is not None else (1 - clip_low, 1 + clip_high)
    ratio = p.ratio.detach()
    values = p.weigh(-clamped(ratio, low, high) * p.advantages * p.score())
    cut = {"clip_fraction_low": fraction(ratio < low, p.mask, ratio.dtype), "clip_fraction_high": fraction(ratio > high, p.mask, ratio.dtype)}
    return LossOutput(aggregate_values(values, p.sequences, aggregation, normalizer), {**cut, **ratio_metrics(p)})
