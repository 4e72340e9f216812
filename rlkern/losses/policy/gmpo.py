"""Geometric-mean policy optimisation (GMPO, arXiv 2507.20673): the geometric mean of clipped token ratios."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends.contract import LARGEST_EXPONENT
from ...checks import check_number
from ...primitives.kinks import bounded
from ...primitives.packing import Packed
from ...primitives.ratio import PolicyTokens, clip_fractions, own_gradient, ratio_metrics
from ..aggregate import LossOutput, aggregate_values
from ..arguments import policy_tokens, whole_sums
from ..rollout_weights import BY_SEQUENCE, RolloutWeights


def gmpo_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor | Packed,
    *,
    clip_low: float = 0.4,
    clip_high: float = 0.4,
    log_ratio_sums: Tensor | None = None,
    weights: Tensor | RolloutWeights | None = None,
    aggregation: str | Tensor = "seq-mean-token-mean",
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
        log_ratio_sums: as in `gspo_loss`; advantages are then one a sequence. If tokens of a sequence are
            elsewhere, on other ranks or in other micro-batches, its weights are equal as well.

    Returns, Raises: as `ppo_loss`; the clip fractions are those of log space.
    """
    check_number("clip_low", clip_low, 0)
    check_number("clip_high", clip_high, 0)
    p = policy_tokens(logp, old_logp, advantages, mask, weights=weights, levels=BY_SEQUENCE, aggregation=aggregation, normalizer=normalizer)
    if p.sequences.is_split():
        check_one_a_sequence(p, advantages=advantages, weights=weights, aggregation=aggregation)
    a, d = p.advantages, torch.where(p.advantages == 0, 0, p.log_ratio)
    clipped = clipped_log_ratio(d, a, clip_low, clip_high)
    sums, lengths = whole_sums(clipped, p, log_ratio_sums), p.sequences.lengths.clamp(min=1)
    if p.sequences.is_split():  # each token its own gradient: that of other tokens' values is not here
        exponent, scale = p.sequences.spread((sums / lengths).detach()) + own_gradient(clipped), a
    else:
        exponent, scale = p.sequences.spread(sums / lengths), p.sequences.spread(p.sequences.mean(a))
    values = p.weigh((-scale * bounded(exponent, high=LARGEST_EXPONENT).exp()).expand_as(p.logp))
    metrics = clip_fractions(d, a, p.mask, -clip_low, clip_high)
    return LossOutput(aggregate_values(values, p.sequences, aggregation, normalizer), {**metrics, **ratio_metrics(p)})


def clipped_log_ratio(d: Tensor, a: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """d' of every token."""
    return torch.where(a < 0, bounded(d, low=-clip_low), bounded(d, high=clip_high))


def check_one_a_sequence(p: PolicyTokens, **given: Any) -> None:
    """Raises ValueError for one number a token, where a sequence has tokens elsewhere."""
    n = p.sequences.lengths.shape[0]
    for name, x in given.items():
        if isinstance(x, Tensor) and x.shape not in ((n,), (n, 1)):
            raise ValueError(f"{name} must be one a sequence, [S] or [S, 1], where a sequence has tokens elsewhere, got shape {tuple(x.shape)}")
