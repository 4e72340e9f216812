"""Natural language policy optimisation (NLPO, arXiv 2210.01241).

PPO over the vocabulary that a lagging mask policy leaves open.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...advantages import whiten
from ...checks import check_flags, check_number, check_tokens
from ...primitives.packing import Packed
from ...primitives.ratio import PolicyInputs, clean, clipped_ratio
from ...primitives.reductions import fraction, masked_mean, total
from ..aggregate import LossOutput, aggregate_values
from ..arguments import check_clip, policy_inputs, refuse_context_group
from ..rollout_weights import RolloutWeights


def nlpo_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor | Packed,
    *,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    normalize_advantages: bool = True,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    log_ratio_clamp: float | None = None,
    weights: Tensor | RolloutWeights | None = None,
    aggregation: str | Tensor = "token-mean",
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """PPO's loss on the log-probabilities of `nlpo_stats`, as RL4LMs runs it.

    Args:
        logp, old_logp: [B, T] under the same stored kept set; gradients flow into logp; old_logp=None is
            on-policy. A token at -inf is outside of the kept set. It cannot have been sampled from it and
            does not count.
        advantages: [B], [B, 1] or [B, T].
        mask: [B, T], nonzero counts.
        entropy: [B, T] of `nlpo_stats`; gradients flow into it.
        entropy_coef: how much of the entropy is subtracted from the loss (RL4LMs: 0).
        normalize_advantages: to mean 0 and std 1 over the tokens of this minibatch.
        clip_low, clip_high, dual_clip, log_ratio_clamp, weights, aggregation, normalizer: as in `ppo_loss`.
            `weights` do not touch the entropy.

    Returns:
        LossOutput(loss, metrics): those of `ppo_loss`, outside_fraction (tokens left out for being outside of
        the set), mask_tokens (all tokens of the mask), entropy if given.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices and options other than the above.
    """
    check_clip(clip_low, clip_high, dual_clip)
    check_number("entropy_coef", entropy_coef, 0)
    check_flags(normalize_advantages=normalize_advantages)
    if entropy is None and entropy_coef != 0:
        raise ValueError(f"entropy_coef={entropy_coef} needs entropy= [B, T]")
    x = policy_inputs(
        logp, old_logp, advantages, mask, weights=weights, log_ratio_clamp=log_ratio_clamp, aggregation=aggregation, normalizer=normalizer
    )
    given = clean(x)
    inside = given.mask & (given.logp > -math.inf)
    if old_logp is not None:
        inside = inside & (given.keep(old_logp) > -math.inf)
    x = x.among(inside)
    if normalize_advantages:
        refuse_context_group(x)
        whitened = whiten(given.advantages.reshape(1, -1), inside.reshape(1, -1)).view(inside.shape)
        x = PolicyInputs(logp, old_logp, whitened, inside, x.sequences, x.weights, log_ratio_clamp)
    ratio = clipped_ratio(x, clip_low, clip_high, dual_clip)
    values, metrics = x.weigh(ratio.terms).tensor(), ratio.metrics
    metrics["outside_fraction"] = fraction(~inside, given.mask, given.logp.dtype)
    metrics["mask_tokens"] = total(given.mask, given.logp.dtype)
    if entropy is not None:
        check_tokens("entropy", entropy, logp)
        h = torch.where(inside, entropy.to(values.dtype), 0)
        values = values - entropy_coef * h
        metrics["entropy"] = masked_mean(h, inside)
    return LossOutput(aggregate_values(values, x.sequences, aggregation, normalizer), metrics)
