"""TRL's losses of ORPOTrainer, CPOTrainer and KTOTrainer, on rlkern's.

ORPO's is finite where a response is certain, KTO's keeps its slope where it is nearly right, and all are
computed in float32. What rlkern has no form of goes to TRL's own function.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from ...losses import dpo_loss
from ...losses.preference.dpo_types import log_odds_ratio
from ...losses.preference.kto import complement
from .trainers import Replacement, own, replacement
from .versions import check_arguments

_ARGUMENTS = ("self", "policy_chosen_logps", "policy_rejected_logps")
_CPO = {"simpo": "simpo", "sigmoid": "cpo", "hinge": "hinge", "ipo": "ipo"}  # TRL's loss_type -> that of dpo_loss


def _odds_ratio_loss(self: Any, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor) -> tuple[Tensor, ...]:
    """Of means: (negated losses, two rewards, mean log sigmoid(log odds ratio), mean log odds ratio)."""
    ones = torch.ones_like(policy_chosen_logps)
    policy = policy_chosen_logps.float(), policy_rejected_logps.float()
    losses, *rewards = dpo_loss(*policy, None, None, self.beta, loss_type="orpo", chosen_lengths=ones, rejected_lengths=ones)
    return -losses, *rewards, -losses.mean() / self.beta, log_odds_ratio(*policy).mean()


def _cpo_loss(self: Any, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor) -> tuple[Tensor, ...] | None:
    """For "simpo" and "ipo" the log-probabilities are means already. AlphaPO is TRL's."""
    kind = _CPO.get(self.loss_type)
    if kind is None or self.alpha != 0:
        return None
    options: dict[str, Any] = {"loss_type": kind}
    if kind in ("simpo", "cpo"):
        options["label_smoothing"] = self.label_smoothing
    if kind == "simpo":
        ones = torch.ones_like(policy_chosen_logps)
        options.update(gamma=self.simpo_gamma, chosen_lengths=ones, rejected_lengths=ones)
    device = self.accelerator.device
    policy = policy_chosen_logps.to(device), policy_rejected_logps.to(device)
    return tuple(dpo_loss(*policy, None, None, self.beta, reference_free=True, **options))


class _Sigmoid:
    """sigmoid(x) as KTOTrainer uses it: subtracted from 1, or times a weight."""

    def __init__(self, x: Tensor):
        self.x = x

    def __rsub__(self, one: int) -> Tensor:
        return complement(self.x)

    def __rmul__(self, weight: float) -> Tensor:
        return weight * complement(-self.x)


class _Functional:
    """torch.nn.functional for KTOTrainer, whose losses are `1 - F.sigmoid(x)` and `F.sigmoid(x)`."""

    sigmoid = _Sigmoid

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.nn.functional, name)


_FUNCTIONAL = _Functional()


def preference_replacements(cls: type) -> list[Replacement]:
    """What replaces the class's loss, if it is one of TRL's three."""
    if cls.__name__ == "KTOTrainer" and own(cls, "_compute_loss"):
        return [(sys.modules[cls.__module__], "F", _FUNCTIONAL)]
    for owner, name, ours in (("ORPOTrainer", "odds_ratio_loss", _odds_ratio_loss), ("CPOTrainer", "cpo_loss", _cpo_loss)):
        if cls.__name__ == owner and own(cls, name):
            stock = getattr(cls, name)
            check_arguments(f"{owner}.{name}", stock, _ARGUMENTS)
            return [(cls, name, replacement(stock, ours))]
    return []
