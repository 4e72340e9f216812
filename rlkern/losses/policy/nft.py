"""Negative-aware fine-tuning (NFT, arXiv 2505.18116): supervised learning on right and on wrong answers.

Wrong answers are learned from through an implicit policy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.contract import LARGEST_EXPONENT
from ...checks import check_choice, check_fraction, check_number, shown
from ...primitives.kinks import bounded
from ...primitives.packing import Packed, per_sequence, per_token
from ...primitives.ratio import ratio_metrics
from ...primitives.reductions import fraction, masked_mean, total
from ..aggregate import LossOutput, aggregate, aggregate_values
from ..arguments import ratio_tokens, rollout_tokens, whole_sums
from ..rollout_weights import RolloutWeights

NORMALIZERS = {"token": 1000.0, "sequence": 1.0}  # of the official code: the loss is a sum divided by it


def nft_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    success_rate: Tensor,
    correct: Tensor,
    mask: Tensor | Packed,
    *,
    normalize: int = 1,
    neg_weight: float = 1.0,
    clamp_neg: float = 1.0,
    clamp_pos: float = 0.0,
    ratio_type: str = "token",
    rate_bounds: tuple[float, float] = (0.02, 0.98),
    log_ratio_clamp: float = 10.0,
    log_ratio_sums: Tensor | None = None,
    weights: Tensor | RolloutWeights | None = None,
    aggregation: str | Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """NFT. With R = pi / pi_old, c the success rate of the prompt and k whether the response is right:

        loss = w (-k log R - neg_weight (1 - k) log max(prox, clamp_neg)),    prox = (1 - c R) / (1 - c)

    w = 1, 1 - c or sqrt((1 - c) / c) for normalize = 0, 1, 2. The clamp of prox is straight-through: with
    clamp_neg = 1 a wrong token with R >= 1 has loss 0 and still the gradient c R / (1 - c). On-policy,
    normalize = 1 has the gradient of Dr.GRPO, and normalize = 2 that of GRPO with the std of 0/1 rewards.

    Args:
        logp: [B, T] float; gradients flow here.
        old_logp: [B, T] float, used detached; None is on-policy.
        success_rate: [B], c: the mean of `correct` over the responses to the same prompt, clipped to
            rate_bounds. The paper drops prompts where all or none are right.
        correct: [B], bool or float in [0, 1]; a fraction blends both terms.
        mask: [B, T], nonzero counts.
        normalize: chooses w.
        neg_weight: 0 is rejection fine-tuning. (Below 0 the official code runs DAPO: use `ppo_loss` with
            clip_high=0.28.)
        clamp_neg: > 0, since prox may be 0 or less.
        clamp_pos: the same straight-through clamp for R in the first term.
        ratio_type: "token", or "sequence": one R a response, exp(sum of its log ratios).
        log_ratio_clamp: log R is clamped from above. Here no gradient flows beyond.
        log_ratio_sums: for ratio_type "sequence", as in `gspo_loss`.
        weights: [B, T], [B, 1] or [B] float, for ratio_type "sequence" one a response, multiplied with the
            losses, detached. `RolloutWeights` are refused: R already corrects for the policy that sampled.
        aggregation: None is the official sum over the batch divided by a constant, `normalizer` (default 1000
            for "token", 1 for "sequence"). That loss grows with the batch. For "token", any mode of
            `aggregate`.

    Returns:
        LossOutput(loss, metrics): the ratio metrics, positive_fraction of the tokens, clamped_fraction (wrong
        tokens with prox < clamp_neg), success_rate after clipping. The last three are over `answers`: the
        tokens, or with ratio_type "sequence" the responses.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices and options other than the above.
    """
    check_choice("normalize", normalize, (0, 1, 2))
    check_numbers(neg_weight, clamp_neg, clamp_pos, log_ratio_clamp, rate_bounds)
    check_choice("ratio_type", ratio_type, NORMALIZERS)
    if ratio_type == "token" and log_ratio_sums is not None:
        raise ValueError("log_ratio_sums is for ratio_type 'sequence', got it with 'token'")
    if aggregation is not None and ratio_type == "sequence":
        raise ValueError(f"ratio_type 'sequence' has one loss a response: aggregation must be None, got {shown(aggregation)}")
    if aggregation is None:
        aggregation, normalizer = "token-mean", NORMALIZERS[ratio_type] if normalizer is None else normalizer
    tokens = ratio_tokens(logp, old_logp, mask, aggregation=aggregation, normalizer=normalizer)
    sequences = tokens.sequences
    if isinstance(weights, RolloutWeights):
        rollout_tokens(weights, old_logp, logp, sequences, ())  # of no level: raises
    c = per_sequence("success_rate", success_rate, tokens.logp, sequences).clamp(*rate_bounds)
    k = per_sequence("correct", correct, tokens.logp, sequences)
    if ratio_type == "sequence":
        log_ratio, counted = whole_sums(tokens.log_ratio, tokens, log_ratio_sums), sequences.lengths > 0
    else:
        log_ratio, counted, c, k = tokens.log_ratio, tokens.mask, sequences.spread(c), sequences.spread(k)
    log_ratio = bounded(log_ratio, high=log_ratio_clamp)
    ratio = log_ratio.exp()
    prox = (1 - c * ratio) / (1 - c)
    positive = log_ratio if clamp_pos == 0 else log_at_least(ratio, clamp_pos)
    weight = (1.0, 1 - c, ((1 - c) / c).sqrt())[int(normalize)]
    losses = -weight * (k * positive + (1 - k) * neg_weight * log_at_least(prox, clamp_neg))
    if weights is not None:
        of = per_token if ratio_type == "token" else per_sequence
        losses = losses * torch.where(counted, of("weights", weights, logp, sequences), 0)
    metrics = {
        **ratio_metrics(tokens),
        "positive_fraction": masked_mean(k.expand_as(losses), counted),
        "clamped_fraction": fraction((prox < clamp_neg) & (k < 1), counted, losses.dtype),
        "success_rate": masked_mean(c.expand_as(losses), counted),
        "answers": total(counted, losses.dtype),
    }
    if ratio_type == "token":
        return LossOutput(aggregate_values(losses, sequences, aggregation, normalizer), metrics)
    share = sequences.share(losses.dtype)
    if share is not None:  # parts of the loss add up to it, and each has the whole gradient of the tokens here
        losses = losses + losses.detach() * (share - 1)
    return LossOutput(aggregate(losses, counted, "token-mean", normalizer), metrics)


def log_at_least(x: Tensor, low: float) -> Tensor:
    """log max(x, low), with the gradient dx / max(x, low) everywhere: straight through the clamp."""
    clamped = x.detach().clamp(min=low)
    return clamped.log() + (x - x.detach()) / clamped


def check_numbers(neg_weight, clamp_neg, clamp_pos, log_ratio_clamp, rate_bounds) -> None:
    """Raises TypeError or ValueError for numbers that `nft_loss` does not take."""
    check_number("neg_weight", neg_weight, 0)
    check_number("clamp_neg", clamp_neg, 0)
    if clamp_neg == 0:
        raise ValueError("clamp_neg must be positive: prox may be 0 or less, and its logarithm is taken, got 0")
    check_number("clamp_pos", clamp_pos, 0)
    check_number("log_ratio_clamp", log_ratio_clamp, 0, LARGEST_EXPONENT)
    if not isinstance(rate_bounds, (tuple, list)) or len(rate_bounds) != 2:
        raise TypeError(f"rate_bounds must be a pair (low, high), got {shown(rate_bounds)}")
    for rate in rate_bounds:
        check_fraction("rate_bounds", rate)
    if not 0 < rate_bounds[0] <= rate_bounds[1] < 1:
        raise ValueError(f"rate_bounds must satisfy 0 < low <= high < 1, got {rate_bounds}")
