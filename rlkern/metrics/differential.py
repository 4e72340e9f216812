"""What preference training changed: the differential-information view of DPO (arXiv 2505.23761). Metrics, no training loss.

The differential-information distribution (DID) of two policies is q(y) proportional to pi'(y) / pi(y).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_number
from ..primitives.kinks import number


class DIDEntropy(NamedTuple):
    entropy: Tensor  # nats; may be negative: it is an estimate
    effective_sample_size: Tensor  # (sum w)^2 / sum w^2, between 1 and K; near 1 the estimate says nothing


def _check_logps(tensors: dict[str, Tensor]) -> None:
    (first_name, first), *_ = tensors.items()
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
            raise TypeError(f"{name} must be a float tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
        if x.shape != first.shape or x.device != first.device:
            raise ValueError(f"{name} must be like {first_name}, {tuple(first.shape)} on {first.device}, got {tuple(x.shape)} on {x.device}")


@torch.no_grad()
def log_ratio_rewards(logps: Tensor, reference_logps: Tensor, *, beta: float = 0.1) -> Tensor:
    """DPO's implicit reward beta (log pi' - log pi) of each response, from sequence log-probabilities of one shape. float32 or float64."""
    _check_logps({"logps": logps, "reference_logps": reference_logps})
    check_number("beta", beta, 0)
    difference = beta * (logps.double() - reference_logps.double())
    return difference.to(torch.float64 if logps.dtype == torch.float64 else torch.float32)


@torch.no_grad()
def did_entropy(logps: Tensor, reference_logps: Tensor, proposal_logps: Tensor) -> DIDEntropy:
    """Entropy of the DID over whole responses, from K samples of any proposal: self-normalised importance sampling.

    With x = log pi' - log pi and weights w proportional to exp(x) / proposal:  H = log mean(exp(x) / proposal) - sum w x.

    Args:
        logps, reference_logps, proposal_logps: [..., K], log-probabilities of the samples under pi', pi and what they were drawn from.

    Returns:
        DIDEntropy(entropy [...], effective_sample_size [...]). Consistent as K grows; the paper's K = 32 has a high variance.

    Raises:
        TypeError, ValueError: for other dtypes, shapes or devices, and K = 0.
    """
    _check_logps({"logps": logps, "reference_logps": reference_logps, "proposal_logps": proposal_logps})
    if logps.dim() == 0 or logps.shape[-1] == 0:
        raise ValueError(f"logps must be [..., K] with K >= 1 samples, got shape {tuple(logps.shape)}")
    x = logps.double() - reference_logps.double()
    log_w = x - proposal_logps.double()
    w = log_w.softmax(-1)
    entropy = log_w.logsumexp(-1) - math.log(logps.shape[-1]) - (w * x).sum(-1)
    dtype = torch.float64 if logps.dtype == torch.float64 else torch.float32
    return DIDEntropy(entropy.to(dtype), (1 / w.square().sum(-1)).to(dtype))


@torch.no_grad()
def displacement_metrics(
    policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, reference_chosen_logps: Tensor, reference_rejected_logps: Tensor
) -> dict[str, Tensor]:
    """Where preference training moved probability, from sequence log-probabilities [B]: the likelihood displacement of DPO.

    chosen_shift, rejected_shift: mean change of log-probability; margin_shift: their difference; both_decreased: fraction of the pairs where
    chosen and rejected both lost probability; chosen_decreased: where the chosen one did; pairs: how many.
    Detached 0-d tensors; 0 for an empty batch.
    """
    _check_logps({
        "policy_chosen_logps": policy_chosen_logps,
        "policy_rejected_logps": policy_rejected_logps,
        "reference_chosen_logps": reference_chosen_logps,
        "reference_rejected_logps": reference_rejected_logps,
    })  # fmt: skip
    chosen = policy_chosen_logps.double() - reference_chosen_logps.double()
    rejected = policy_rejected_logps.double() - reference_rejected_logps.double()
    dtype = torch.float64 if policy_chosen_logps.dtype == torch.float64 else torch.float32
    values = {
        "chosen_shift": chosen,
        "rejected_shift": rejected,
        "margin_shift": chosen - rejected,
        "both_decreased": (chosen < 0) & (rejected < 0),
        "chosen_decreased": chosen < 0,
    }
    metrics = {name: (value.sum().double() / max(chosen.numel(), 1)).to(dtype) for name, value in values.items()}
    metrics["pairs"] = number(chosen.numel(), chosen).to(dtype)
    return metrics
