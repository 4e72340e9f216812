"""Losses of reward models, on one scalar a response: Bradley-Terry with the options of POLAR's trainer (arXiv 2507.05197) and of TRL's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ...checks import check_choice, check_number
from ...primitives.kinks import bounded, number
from ...primitives.reductions import total
from ..aggregate import LossOutput

PENALTIES = ("none", "log_barrier", "l2")
_BARRIER_MARGIN = 1e-3  # rewards are clamped this far inside the barrier


def _check_rewards(tensors: dict[str, Tensor | None]) -> None:
    (first_name, first), *_ = tensors.items()
    for name, x in tensors.items():
        if x is None and name == "margin":
            continue
        if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
            raise TypeError(f"{name} must be a float tensor [B], got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
        if x.dim() != 1:
            raise ValueError(f"{name} must be [B], one reward a response, got shape {tuple(x.shape)}")
        if x.shape != first.shape:
            raise ValueError(f"{name} must be [B], one reward a response, shaped like {first_name} {tuple(first.shape)}, got {tuple(x.shape)}")
        if x.device != first.device:
            raise ValueError(f"{name} must be on the device of {first_name} {first.device}, got {x.device}")


def bradley_terry_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    margin: Tensor | None = None,
    focal_gamma: float = 0.0,
    penalty: str = "none",
    penalty_weight: float = 0.01,
    reward_bound: float = 5.0,
    centering: float = 0.0,
    normalizer: float | None = None,
) -> LossOutput:
    """-log sigmoid(d), d = chosen - rejected - margin, averaged over the pairs, plus optional terms.

        focal_gamma     multiplies a pair by (1 - 2 relu(sigmoid(d) - 1/2))^gamma, gradient included (InternLM2, arXiv 2403.17297: 2)
        penalty         penalty_weight times, for the rewards r of both sides,
                        "log_barrier": -log(bound - r) - log(bound + r), r clamped to 0.001 inside +-reward_bound (no gradient beyond)
                        "l2": r^2
        centering       c (chosen + rejected)^2, which keeps rewards around 0 (arXiv 2312.09244; TRL's center_rewards_coefficient)

    Args:
        chosen_rewards, rejected_rewards: [B] float; gradients flow into both.
        margin: [B], used detached.
        normalizer: what the sum over pairs is divided by; default B. XTuner averages 1 / B over the ranks.

    Returns:
        LossOutput(loss, metrics): accuracy, reward_margin, chosen_reward, rejected_reward (means), pairs. float32 (float64 for float64 rewards).

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices and options other than the above.
    """
    _check_rewards({"chosen_rewards": chosen_rewards, "rejected_rewards": rejected_rewards, "margin": margin})
    check_choice("penalty", penalty, PENALTIES)
    for name, value in (("focal_gamma", focal_gamma), ("penalty_weight", penalty_weight), ("centering", centering), ("reward_bound", reward_bound)):
        check_number(name, value, 0)
    if not reward_bound > _BARRIER_MARGIN:
        raise ValueError(f"reward_bound must be above {_BARRIER_MARGIN}, got {reward_bound}")
    if normalizer is not None:
        check_number("normalizer", normalizer, 0)
    accumulate = torch.float64 if torch.float64 in (chosen_rewards.dtype, rejected_rewards.dtype) else torch.float32
    chosen, rejected = chosen_rewards.to(accumulate), rejected_rewards.to(accumulate)
    d = chosen - rejected
    if margin is not None:
        d = d - margin.detach().to(accumulate)
    losses = -logsigmoid(d)
    if focal_gamma > 0:
        # 1 - 2 relu(sigmoid(d) - 1/2) without the cancellation
        losses = losses * torch.where(d > 0, 2 * torch.sigmoid(-d), 1) ** focal_gamma
    if centering > 0:
        losses = losses + centering * (chosen + rejected).square()
    if penalty != "none":
        for r in (chosen, rejected):
            if penalty == "l2":
                term = r.square()
            else:
                inside = bounded(r, _BARRIER_MARGIN - reward_bound, reward_bound - _BARRIER_MARGIN)
                term = -(reward_bound - inside).log() - (reward_bound + inside).log()
            losses = losses + penalty_weight * term
    n = max(len(losses), 1)
    with torch.no_grad():
        metrics = {
            "accuracy": total(chosen > rejected, accumulate) / n,
            "reward_margin": (chosen - rejected).sum() / n,
            "chosen_reward": chosen.sum() / n,
            "rejected_reward": rejected.sum() / n,
            "pairs": number(len(chosen), chosen),
        }
    return LossOutput(losses.sum() / (normalizer or n), metrics)


def polar_pretrain_loss(same_policy_rewards: Tensor, other_policy_rewards: Tensor, **options) -> LossOutput:
    """POLAR's pre-training: r(prompt, A1, A2) should exceed r(prompt, A1, B1), A1 and A2 from one policy, B1 from another. Both [B].

    `bradley_terry_loss` under the paper's names, with its options.
    """
    _check_rewards({"same_policy_rewards": same_policy_rewards, "other_policy_rewards": other_policy_rewards})
    return bradley_terry_loss(same_policy_rewards, other_policy_rewards, **options)


def polar_finetune_loss(middle_rewards: Tensor, worst_rewards: Tensor, **options) -> LossOutput:
    """POLAR's fine-tuning on triples A > B > C: with the best response A as the reference, r(prompt, A, B) should exceed r(prompt, A, C).

    Both [B]. `bradley_terry_loss` under the paper's names, with its options.
    """
    _check_rewards({"middle_rewards": middle_rewards, "worst_rewards": worst_rewards})
    return bradley_terry_loss(middle_rewards, worst_rewards, **options)
