"""One optimizer step on sampled answers, for the curriculum lab."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

import rlkern

from .rollout import answer_stats, descend


class Answers(NamedTuple):
    ids: Tensor  # [N, T] prompt and answer
    old_logp: Tensor  # [N, K]
    mask: Tensor  # [N, K]
    advantages: Tensor  # [N]
    reference_logp: Tensor | None = None  # [N, K], for a KL penalty
    kl_scale: Tensor | None = None  # [N], of the penalty

    def take(self, index: Tensor) -> Answers:
        return Answers(*(None if x is None else x[index] for x in self))


def loss(model: nn.Module, answers: Answers, kl_coef: float = 0.0) -> Tensor:
    logp = answer_stats(model, answers.ids, answers.mask.shape[1]).logp
    reference = {"reference_logp": answers.reference_logp, "kl_coef": kl_coef, "kl_scale": answers.kl_scale}
    return rlkern.grpo_loss(logp, answers.old_logp, answers.advantages, answers.mask, **reference).loss


def update(model: nn.Module, optimizer: torch.optim.Optimizer, answers: Answers, kl_coef: float = 0.0) -> None:
    descend(model, optimizer, loss(model, answers, kl_coef))
