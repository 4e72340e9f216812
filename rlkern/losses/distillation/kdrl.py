"""KDRL (arXiv 2506.02208): reinforcement learning and distillation, on the student's own samples."""

from __future__ import annotations

import torch
from torch import Tensor

from ...advantages import Groups
from ...checks import FINITE, check_choice, check_number, check_tokens, expect
from ...primitives.kl import kl_estimate
from ...primitives.packing import Packed, per_token
from ...primitives.ratio import PolicyTokens, clean, clipped_ratio
from ...primitives.reductions import fraction, masked_mean
from ..aggregate import LossOutput, aggregate_values, check_parts
from ..arguments import check_clip, policy_inputs
from ..rollout_weights import RolloutWeights

ESTIMATES = ("k1", "k2", "k3", "exact")


def kdrl_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    teacher_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor | Packed,
    *,
    kd: str = "k2",
    kd_coef: float = 5e-3,
    teacher_kl: Tensor | None = None,
    kd_mask: Tensor | None = None,
    kd_norm: str = "all",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    log_ratio_clamp: float | None = None,
    weights: Tensor | RolloutWeights | None = None,
    aggregation: str | Tensor = "token-mean",
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """GRPO's loss plus kd_coef times an estimate of KL(student || teacher) a token, d = logp - teacher_logp:

        kd         value             gradient in expectation over the student's samples
        "k1"       d                 none: noise of mean 0
        "k2"       d^2 / 2           that of KL(student || teacher), the paper's default
        "k3"       e^-d - 1 + d      that of KL(teacher || student), another divergence
        "exact"    teacher_kl        its own, on any samples

    For "exact" take logp and teacher_kl (the divergence) from `rlkern.pair_stats(logits, teacher_logits, y)`:
    one read and one gradient for both. `topk_divergence` needs less of the teacher. Off-policy, with old_logp
    of another student, the first three are biased: the ratio multiplies the reward's part alone.

    Args:
        logp, old_logp: [B, T]; gradients flow into logp. old_logp=None is on-policy, as the paper writes it.
        teacher_logp: [B, T] of the same tokens, used detached; None with kd="exact".
        advantages: [B], [B, 1] or [B, T]: `rlkern.advantages.grpo`.
        mask: [B, T], nonzero counts.
        kd_coef: fixed, or from `kd_coefficient(step)`.
        teacher_kl: [B, T] with gradient, for "exact".
        kd_mask: [B], [B, 1] or [B, T]: distil only where it is nonzero, see `reward_guided_mask`.
        kd_norm: what the distillation term is averaged over: "all" tokens, or the "kept" ones, with this
            batch's own counts.
        clip_low, clip_high, dual_clip, log_ratio_clamp, weights, aggregation, normalizer: as in `ppo_loss`.
            `weights` do not touch the distillation.

    Returns:
        LossOutput(loss, metrics): those of `ppo_loss`, kd (mean estimate over all tokens), kd_fraction
        (tokens that are distilled).

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices and options other than the above.
    """
    check_clip(clip_low, clip_high, dual_clip)
    check_choice("kd", kd, ESTIMATES)
    check_choice("kd_norm", kd_norm, ("all", "kept"))
    check_number("kd_coef", kd_coef, 0)
    if (teacher_kl is None) == (kd == "exact"):
        given = "None" if teacher_kl is None else "given"
        raise ValueError(f"teacher_kl= [B, T] belongs to kd='exact', got kd={kd!r} and teacher_kl {given}")
    x = policy_inputs(
        logp, old_logp, advantages, mask, weights=weights, log_ratio_clamp=log_ratio_clamp, aggregation=aggregation, normalizer=normalizer
    )
    p = clean(x)
    divergence = _divergence(kd, teacher_logp, teacher_kl, p)
    kept = p.mask if kd_mask is None else p.mask & (per_token("kd_mask", kd_mask, p.logp, p.sequences, "real") != 0)
    ratio = clipped_ratio(x, clip_low, clip_high, dual_clip)
    values = x.weigh(ratio.terms).tensor()
    if kd_norm == "all":
        loss = aggregate_values(values + kd_coef * torch.where(kept, divergence, 0), p.sequences, aggregation, normalizer)
    else:
        loss = aggregate_values(values, p.sequences, aggregation, normalizer) + kd_coef * _kept_mean(divergence, kept, p, aggregation)
    metrics = {**ratio.metrics, "kd": masked_mean(divergence, p.mask), "kd_fraction": fraction(kept, p.mask, p.logp.dtype)}
    return LossOutput(loss, metrics)


def _kept_mean(divergence: Tensor, kept: Tensor, p: PolicyTokens, aggregation: str | Tensor) -> Tensor:
    """With the counts of the kept tokens."""
    sequences = p.sequences.among(kept)
    check_parts(sequences, aggregation, None)
    return aggregate_values(divergence, sequences, aggregation, None)


def _divergence(kd: str, teacher_logp, teacher_kl, p: PolicyTokens) -> Tensor:
    """[B, T] with gradient."""
    if kd == "exact":
        check_tokens("teacher_kl", teacher_kl, p.logp)
        return torch.where(p.mask, teacher_kl.to(p.logp.dtype), 0)
    check_tokens("teacher_logp", teacher_logp, p.logp)
    return kl_estimate(p.logp, p.keep(teacher_logp), kd)


def kd_coefficient(step: int, *, start: float = 5e-3, decrement: float = 5e-5, floor: float = 1e-3) -> float:
    """The paper's annealed coefficient, max(start - decrement * step, floor)."""
    check_number("step", step, 0)
    for name, value in {"start": start, "decrement": decrement, "floor": floor}.items():
        check_number(name, value, 0, FINITE)
    return max(start - decrement * step, floor)


@torch.no_grad()
def reward_guided_mask(correct: Tensor, groups: int | Tensor | None = None, *, level: str = "response") -> Tensor:
    """Which responses to distil, bool [B], as `kd_mask` of `kdrl_loss`.

    level "response": the wrong ones. "group": all of a group without a single right one; `groups` as in
    `rlkern.advantages`. correct [B], bool or number; nonzero is right. Raises TypeError, ValueError for
    anything else.
    """
    check_choice("level", level, ("response", "group"))
    expect("correct", correct, "real", "[B]")
    if level == "response":
        return correct == 0
    if groups is None:
        raise ValueError("level 'group' needs groups= (the size of a group or ids [B])")
    right = (correct != 0).double()
    return Groups(groups, right, name="correct").total(right) == 0
