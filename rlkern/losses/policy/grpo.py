"""Group relative policy optimisation (arXiv 2402.03300): PPO's ratio, group advantages, and a penalty for leaving a reference policy."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import check_flags, check_number, check_tokens, per_token
from ...primitives.kl import check_kl, is_unbiased, kl_penalty
from ...primitives.ratio import clipped_ratio, ratio_terms
from ..aggregate import LossOutput, aggregate_terms
from ..arguments import check_clip, policy_inputs


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    reference_logp: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_kind: str = "k3",
    kl_clamp: float | None = None,
    kl_scale: Tensor | None = None,
    kl_times_ratio: bool = False,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    log_ratio_clamp: float | None = None,
    weights: Tensor | None = None,
    aggregation: str = "token-mean",
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """PPO's loss plus kl_coef * kl_scale * KL(pi || pi_ref), the KL estimated at the token taken: arXiv 2402.03300, Eq. 3 and 4.

    Which options reproduce what: the paper is aggregation="grpo", kl_coef=0.04; Dr. GRPO (arXiv 2503.20783) "dr_grpo" without KL and advantages
    without the division by std; DAPO "dapo", clip_high=0.28; TRL's loss_type names are aggregation modes, its delta is dual_clip; verl's KL loss is
    kl_kind="k3", kl_clamp=10, kl_coef=0.001; CLPO (arXiv 2509.25004) is kl_scale [B]: 0.5 for hard prompts, 1 for the others, kl_coef=0.001.

    Args:
        logp, old_logp, advantages, mask, clip_low, clip_high, dual_clip, log_ratio_clamp, weights, aggregation, normalizer: as in `ppo_loss`.
            `weights` does not touch the KL.
        reference_logp: [B, T] float, detached; None leaves the KL out, and then kl_coef must be 0.
        kl_coef: strength of the penalty, >= 0. With 0 the KL is only reported.
        kl_kind: "k1", "abs", "k2" ("mse"), "k3", or one with a + behind it (its value, k2's gradient): see `rlkern.primitives.kl`. The gradient of k3
            pulls along the KL of the other direction, that of abs along the total variation, and that of k1 is noise; k2 and all with a + have
            the right one. All that on samples of the policy itself.
        kl_clamp: bounds the estimate, see `kl_estimate`.
        kl_scale: [B], [B, 1] or [B, T] float, without gradient: a coefficient per sample.
        kl_times_ratio: multiplies the estimate with exp(logp - old_logp), for samples of an older policy. With k1 and k3 gradient included
            (arXiv 2512.02556; TRL's use_bias_correction_kl), and their expected gradient is then that of KL(pi || pi_ref); with the others as a
            constant, and they keep theirs. The ratio is not clipped, but bounded by log_ratio_clamp; bounds and kl_clamp bias the gradient.

    Returns:
        LossOutput as that of `ppo_loss`; metrics also: kl (mean of the estimate, before its coefficients) if there is a reference.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices, names and options other than the above.
    """
    check_clip(clip_low, clip_high, dual_clip)
    check_number("kl_coef", kl_coef, 0)
    check_kl(kl_kind, kl_clamp)
    check_flags(kl_times_ratio=kl_times_ratio)
    x = policy_inputs(
        logp, old_logp, advantages, mask, weights=weights, log_ratio_clamp=log_ratio_clamp, aggregation=aggregation, normalizer=normalizer
    )
    if reference_logp is not None:
        check_tokens("reference_logp", reference_logp, logp)
    elif kl_coef != 0:
        raise ValueError(f"kl_coef={kl_coef} needs reference_logp= [B, T]")
    if kl_scale is not None:
        kl_scale = torch.where(x.mask, per_token("kl_scale", kl_scale, logp), 0)

    ratio = clipped_ratio(x, clip_low, clip_high, dual_clip)
    terms, metrics = x.weigh(ratio.terms), ratio.metrics
    if reference_logp is not None:
        kl = kl_penalty(logp, reference_logp, x.mask, kl_kind, kl_clamp)
        if kl_times_ratio:
            kl = kl.times(ratio_terms(x)) if is_unbiased(kl_kind) else kl.scaled(ratio_terms(x).values)
        metrics["kl"] = kl.values.sum() / ratio.tokens
        if kl_scale is not None:
            kl = kl.scaled(kl_scale).dropped(kl_scale == 0)  # a ratio times an estimate may overflow
        terms = terms.plus(kl.scaled(kl_coef))
    return LossOutput(aggregate_terms(terms, x.mask, ratio.tokens, aggregation, normalizer), metrics)
