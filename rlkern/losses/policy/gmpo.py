"""Geometric-mean policy optimisation (GMPO, arXiv 2507.20673): the geometric mean of clipped token ratios."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.contract import LARGEST_EXPONENT
from ...checks import check_number
from ...primitives.kinks import bounded
from ...primitives.ratio import clip_fractions, ratio_metrics
from ...primitives.reductions import sequence_mean
from ..aggregate import LossOutput, aggregate
from ..arguments import policy_tokens


def gmpo_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.4,
    clip_high: float = 0.4,
    weights: Tensor | None = None,
    aggregation: str = "seq-mean-token-mean",
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """-mean(A) exp(mean over the sequence of d'), arXiv 2507.20673 Eq. 4, with d = logp - old_logp:

        d' = min(d, clip_high) for A > 0,   max(d, -clip_low) for A < 0

    The clip is in **log space**: the paper's interval is exp(-0.4), exp(0.4). Every token carries its
    sequence's value, so the default aggregation is the mean over sequences. "grpo" counts empty sequences
    too, as verl's "geo_mean" does, which takes its clip_ratio, 0.2, for the bounds.

    Args:
        logp, old_logp, advantages, mask, weights, aggregation, normalizer: as in `ppo_loss`. The paper has
            one advantage a sequence. Of several the mean is taken, and each token's sign decides its clip.
        clip_low, clip_high: bounds of the log ratio, >= 0.

    Returns, Raises: as `ppo_loss`; the clip fractions are those of log space.
    """
    check_number("clip_low", clip_low, 0)
    check_number("clip_high", clip_high, 0)
    p = policy_tokens(logp, old_logp, advantages, mask, weights=weights, aggregation=aggregation, normalizer=normalizer)
    a, d = p.advantages, torch.where(p.advantages == 0, 0, p.log_ratio)
    clipped = torch.where(a < 0, bounded(d, low=-clip_low), bounded(d, high=clip_high))
    ratio = bounded(sequence_mean(clipped, p.mask), high=LARGEST_EXPONENT).exp()
    values = p.weigh((-sequence_mean(a, p.mask) * ratio).expand_as(p.logp))
    metrics = clip_fractions(d, a, p.mask, -clip_low, clip_high)
    return LossOutput(aggregate(values, p.mask, aggregation, normalizer), {**metrics, **ratio_metrics(p)})
