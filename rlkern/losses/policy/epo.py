"""Entropy-regularised policy optimisation for agents (EPO, arXiv 2509.22576).

An entropy bonus, and a penalty outside of a band around the entropy's own history.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...checks import FINITE, check_choice, check_count, check_number, check_tokens, expect
from ...primitives.kinks import excess, number
from ...primitives.packing import Packed, per_sequence
from ...primitives.ratio import PolicyTokens, clean, clipped_ratio
from ...primitives.reductions import fraction, masked_mean
from ..aggregate import LossOutput, aggregate_values
from ..arguments import check_clip, policy_inputs
from ..rollout_weights import RolloutWeights


@dataclass
class EntropyHistory:
    """The plain mean of the batch entropies of all previous steps. Updating it does not wait for the device.

        out = epo_loss(..., mean_entropy=history.mean)
        history.update(out.metrics["entropy"])

    `update` takes a tensor of any fixed shape, so one history serves one value per turn as well.
    """

    total: Tensor | None = None
    steps: int = 0

    @property
    def mean(self) -> Tensor | None:
        """None before the first update."""
        return None if self.total is None else self.total / self.steps

    def update(self, entropy: Tensor) -> None:
        expect("entropy", entropy, "real", "[...]")
        entropy = entropy.detach().double()
        self.total = entropy if self.total is None else self.total + entropy
        self.steps += 1


def epo_beta(step: int, total_steps: int, *, gamma: float = 1.0, schedule: str = "paper") -> float:
    """The weight of the smoothing term at `step` of `total_steps`, with half = total_steps // 2.

    "paper": 1 + exp(-gamma step / half), from 2 to 1 + exp(-2 gamma). "released", the published code: 1 - 0.2
    (1 - exp(-2 p)) in the first half, 0.8 exp(-3 p) in the second, p the progress in that half. It jumps from
    0.827 to 0.8 and ends at 0.04.
    """
    check_choice("schedule", schedule, ("paper", "released"))
    check_count("total_steps", total_steps, 2)
    check_number("step", step, 0)
    if step > total_steps:
        raise ValueError(f"step must be in [0, total_steps = {total_steps}], got {step}")
    check_number("gamma", gamma, 0, FINITE)
    half = total_steps // 2
    if schedule == "paper":
        return 1 + math.exp(-gamma * step / half)
    if step < half:
        return 1 - 0.2 * (1 - math.exp(-2 * step / half))
    return 0.8 * math.exp(-3 * (step - half) / (total_steps - half))


def epo_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    entropy: Tensor,
    advantages: Tensor,
    mask: Tensor | Packed,
    *,
    mean_entropy: float | Tensor | None,
    coef: float = 1e-3,
    alpha: float = 0.1,
    beta: float = 1.0,
    kappa_low: float = 0.8,
    kappa_high: float = 1.2,
    smoothing: str = "hinge",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    log_ratio_clamp: float | None = None,
    weights: Tensor | RolloutWeights | None = None,
    aggregation: str | Tensor = "token-mean",
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """PPO minus coef (H - beta alpha P). P is a penalty on H outside of a band around the history's mean h.

        smoothing      P
        "hinge"        relu(kappa_low h - H) + relu(H - kappa_high h)      the paper's second version
        "indicator"    1 if H is outside of the band, else 0               the released code

    "hinge" has no gradient at the edges of the band, "indicator" has none anywhere.

    Args:
        logp, old_logp: [B, T]; gradients flow into logp; old_logp=None is on-policy.
        entropy: [B, T], `token_stats(...).entropy`; gradients flow into it.
        advantages: [B], [B, 1] or [B, T].
        mask: [B, T], nonzero counts.
        mean_entropy: h, a number, a 0-d tensor, or [B] (one per turn, as in the released code). None leaves
            the penalty out: there is no history yet. See `EntropyHistory`.
        coef, alpha, beta: see above; beta from `epo_beta(step, total_steps)`. coef=1e-3 is the paper's; the
            code's yaml has 1.
        kappa_low, kappa_high: the band. The published runs use 0 (no floor) and 2, with alpha 0.05 or 0.1.
        clip_low, clip_high, dual_clip, log_ratio_clamp, weights, aggregation, normalizer: as in `ppo_loss`.
            `weights` do not touch the entropy. All three terms are aggregated alike.

    Returns:
        LossOutput(loss, metrics): those of `ppo_loss`, entropy (the batch mean, for the history),
        entropy_low_fraction and entropy_high_fraction (tokens outside of the band).

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices and options other than the above.
    """
    check_clip(clip_low, clip_high, dual_clip)
    for name, value in {"coef": coef, "alpha": alpha, "beta": beta}.items():
        check_number(name, value, 0)
    check_band(kappa_low, kappa_high, smoothing)
    x = policy_inputs(
        logp, old_logp, advantages, mask, weights=weights, log_ratio_clamp=log_ratio_clamp, aggregation=aggregation, normalizer=normalizer
    )
    p = clean(x)
    check_tokens("entropy", entropy, p.logp)
    h = torch.where(p.mask, entropy.to(p.logp.dtype), 0)
    ratio = clipped_ratio(x, clip_low, clip_high, dual_clip)
    metrics = {**ratio.metrics, "entropy": masked_mean(h, p.mask)}
    bonus, below, above = h, torch.zeros_like(h), torch.zeros_like(h)
    if mean_entropy is not None:
        center = history_mean(mean_entropy, p)
        below, above = kappa_low * center - h, h - kappa_high * center
        bonus = h - beta * alpha * outside_band(below, above, smoothing)
    metrics["entropy_low_fraction"] = fraction(below > 0, p.mask, h.dtype)
    metrics["entropy_high_fraction"] = fraction(above > 0, p.mask, h.dtype)
    return LossOutput(aggregate_values(x.weigh(ratio.terms).tensor() - coef * bonus, p.sequences, aggregation, normalizer), metrics)


def check_band(kappa_low: float, kappa_high: float, smoothing: str) -> None:
    """Raises TypeError or ValueError for a band that `epo_loss` does not take."""
    check_choice("smoothing", smoothing, ("hinge", "indicator"))
    check_number("kappa_low", kappa_low, 0)
    check_number("kappa_high", kappa_high)
    if kappa_high < kappa_low:
        raise ValueError(f"kappa_high must not be below kappa_low, got {kappa_high} and {kappa_low}")


def history_mean(mean_entropy: float | Tensor, p: PolicyTokens) -> Tensor:
    """h as a tensor, [B, 1] or 0-d."""
    if not isinstance(mean_entropy, Tensor):
        check_number("mean_entropy", mean_entropy, 0)
        return number(mean_entropy, p.logp)
    if mean_entropy.dim() == 0:
        return mean_entropy.detach().to(p.logp.dtype)
    return p.sequences.spread(per_sequence("mean_entropy", mean_entropy, p.logp, p.sequences))


def outside_band(below: Tensor, above: Tensor, smoothing: str) -> Tensor:
    """P of every token, from how far it lies below and above the band."""
    if smoothing == "hinge":
        return excess(below) + excess(above)
    return ((below >= 0) | (above >= 0)).to(below.dtype)  # the band is open
