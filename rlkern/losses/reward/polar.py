"""Bradley-Terry losses of reward models, with options of POLAR's trainer (arXiv 2507.05197) and of TRL's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ...checks import check_choice, check_number, expect, expect_alike
from ...primitives.kinks import bounded, number
from ...primitives.reductions import total
from ..aggregate import LossOutput

PENALTIES = ("none", "log_barrier", "l2")
LAYOUT = "[B] (one reward a response)"
_BARRIER_MARGIN = 1e-3  # rewards are clamped this far inside the barrier


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

    Args:
        chosen_rewards, rejected_rewards: [B] float; gradients flow into both.
        margin: [B] float, used detached.
        focal_gamma: multiplies a pair by (1 - 2 relu(sigmoid(d) - 1/2))^gamma, gradient included (InternLM2,
            arXiv 2403.17297: 2).
        penalty, penalty_weight: adds for the rewards r of both sides penalty_weight times r^2 ("l2"), or
            -log(bound - r) - log(bound + r) ("log_barrier").
        reward_bound: of the barrier. There r is clamped to 0.001 inside +-reward_bound, without gradient
            beyond.
        centering: adds centering (chosen + rejected)^2, which keeps rewards around 0 (arXiv 2312.09244; TRL's
            center_rewards_coefficient).
        normalizer: what the sum over pairs is divided by; default B. XTuner averages 1 / B over the ranks.

    Returns:
        LossOutput(loss, metrics): accuracy, reward_margin, chosen_reward, rejected_reward (means), pairs.
        float32 (float64 for float64 rewards).

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices and options other than the above.
    """
    expect_alike("float", LAYOUT, chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    if margin is not None:
        expect("margin", margin, "float", "[B]", like=("chosen_rewards", chosen_rewards))
    check_terms(focal_gamma, penalty, penalty_weight, reward_bound, centering, normalizer)
    dtype = torch.float64 if torch.float64 in (chosen_rewards.dtype, rejected_rewards.dtype) else torch.float32
    chosen, rejected = chosen_rewards.to(dtype), rejected_rewards.to(dtype)
    d = chosen - rejected
    if margin is not None:
        d = d - margin.detach().to(dtype)
    losses = -logsigmoid(d)
    if focal_gamma > 0:  # 1 - 2 relu(sigmoid(d) - 1/2) without the cancellation
        losses = losses * torch.where(d > 0, 2 * torch.sigmoid(-d), 1) ** focal_gamma
    if centering > 0:
        losses = losses + centering * (chosen + rejected).square()
    if penalty != "none":
        for rewards in (chosen, rejected):
            term = rewards.square() if penalty == "l2" else log_barrier(rewards, reward_bound)
            losses = losses + penalty_weight * term
    return LossOutput(losses.sum() / (normalizer or max(len(losses), 1)), reward_metrics(chosen.detach(), rejected.detach()))


def polar_pretrain_loss(same_policy_rewards: Tensor, other_policy_rewards: Tensor, **options) -> LossOutput:
    """POLAR's pre-training: r(prompt, A1, A2) should exceed r(prompt, A1, B1).

    A1 and A2 are from one policy, B1 is from another. Both [B]. `bradley_terry_loss` under the paper's names,
    with its options.
    """
    expect_alike("float", LAYOUT, same_policy_rewards=same_policy_rewards, other_policy_rewards=other_policy_rewards)
    return bradley_terry_loss(same_policy_rewards, other_policy_rewards, **options)


def polar_finetune_loss(middle_rewards: Tensor, worst_rewards: Tensor, **options) -> LossOutput:
    """POLAR's fine-tuning on triples A > B > C: r(prompt, A, B) should exceed r(prompt, A, C).

    The best response A is the reference. Both [B]. `bradley_terry_loss` under the paper's names, with its
    options.
    """
    expect_alike("float", LAYOUT, middle_rewards=middle_rewards, worst_rewards=worst_rewards)
    return bradley_terry_loss(middle_rewards, worst_rewards, **options)


def check_terms(focal_gamma: float, penalty: str, penalty_weight: float, reward_bound: float, centering: float, normalizer: float | None) -> None:
    """Raises TypeError or ValueError for options that `bradley_terry_loss` does not take."""
    check_choice("penalty", penalty, PENALTIES)
    named = {"focal_gamma": focal_gamma, "penalty_weight": penalty_weight, "centering": centering, "reward_bound": reward_bound}
    for name, value in named.items():
        check_number(name, value, 0)
    if reward_bound <= _BARRIER_MARGIN:
        raise ValueError(f"reward_bound must be above {_BARRIER_MARGIN}, got {reward_bound}")
    if normalizer is not None:
        check_number("normalizer", normalizer, 0)


def log_barrier(rewards: Tensor, bound: float) -> Tensor:
    inside = bounded(rewards, _BARRIER_MARGIN - bound, bound - _BARRIER_MARGIN)
    return -(bound - inside).log() - (bound + inside).log()


def reward_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    n = max(len(chosen), 1)
    return {
        "accuracy": total(chosen > rejected, chosen.dtype) / n,
        "reward_margin": (chosen - rejected).sum() / n,
        "chosen_reward": chosen.sum() / n,
        "rejected_reward": rejected.sum() / n,
        "pairs": number(len(chosen), chosen),
    }
