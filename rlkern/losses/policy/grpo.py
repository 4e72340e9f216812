"""Group relative policy optimisation (arXiv 2402.03300): PPO, group advantages, KL to a reference."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import check_flags, check_number, check_tokens
from ...primitives.kl import check_kl, is_unbiased, kl_penalty
from ...primitives.packing import Packed, per_token
from ...primitives.ratio import clipped_ratio, ratio_terms
from ..aggregate import LossOutput, aggregate_terms
from ..arguments import check_clip, policy_inputs
from ..rollout_weights import RolloutWeights


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor | Packed,
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
    weights: Tensor | RolloutWeights | None = None,
    aggregation: str | Tensor = "token-mean",
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """PPO's loss plus kl_coef * kl_scale * KL(pi || pi_ref) at the token taken: arXiv 2402.03300 Eq. 3, 4.

        the paper                           aggregation="grpo", kl_coef=0.04
        Dr. GRPO (arXiv 2503.20783)         "dr_grpo", no KL, advantages not divided by std
        DAPO                                "dapo", clip_high=0.28
        TRL                                 its loss_type names are aggregation modes, its delta is dual_clip
        verl's KL loss                      kl_kind="k3", kl_clamp=10, kl_coef=0.001
        CLPO (arXiv 2509.25004)             kl_coef=0.001, kl_scale [B]: 0.5 for hard prompts, else 1

    Args:
        logp, old_logp, advantages, mask, clip_low, clip_high, dual_clip, log_ratio_clamp, weights,
            aggregation, normalizer: as in `ppo_loss`. `weights` does not touch the KL.
        reference_logp: [B, T] float, detached; None leaves the KL out, and then kl_coef must be 0.
        kl_coef: strength of the penalty, >= 0. With 0 the KL is only reported.
        kl_kind: "k1", "abs", "k2" ("mse"), "k3", or one of them with a + (its value, k2's gradient). On
            samples of the policy itself, k2 and all with a + have the right gradient. k3 has that of the
            other direction's KL, abs that of the total variation, k1 noise: see `rlkern.primitives.kl`.
        kl_clamp: bounds the estimate, see `kl_estimate`.
        kl_scale: [B], [B, 1] or [B, T] float, without gradient: a coefficient per sample.
        kl_times_ratio: multiplies the estimate by exp(logp - old_logp), for samples of an older policy. For
            k1 and k3 the ratio has its gradient (arXiv 2512.02556; TRL's use_bias_correction_kl), and the
            expected gradient becomes that of KL(pi || pi_ref). For the others the ratio is a constant, and
            they keep their expected gradient. log_ratio_clamp bounds the ratio; it is not clipped. This bound
            and kl_clamp bias the gradient.

    Returns, Raises: as `ppo_loss`; with a reference also kl, the mean estimate before its coefficients.
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
        kl_scale = torch.where(x.mask, per_token("kl_scale", kl_scale, logp, x.sequences), 0)

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
    return LossOutput(aggregate_terms(terms, x.sequences, ratio.tokens, aggregation, normalizer), metrics)
