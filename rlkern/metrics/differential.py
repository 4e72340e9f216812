"""What preference training changed: the differential-information view of DPO (arXiv 2505.23761).

Metrics, no training loss. The differential-information distribution (DID) of two policies is q(y)
proportional to pi'(y) / pi(y).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_number, computing_dtype, expect_alike
from ..primitives.kinks import number


class DIDEntropy(NamedTuple):
    """entropy: in nats. An estimate, so it may be negative.
    effective_sample_size: (sum w)^2 / sum w^2, between 1 and K. Near 1 the estimate says nothing.
    """

    entropy: Tensor
    effective_sample_size: Tensor


@torch.no_grad()
def log_ratio_rewards(logps: Tensor, reference_logps: Tensor, *, beta: float = 0.1) -> Tensor:
    """DPO's implicit reward beta (log pi' - log pi) of each response, float32 (float64 for float64 logps).

    logps, reference_logps: sequence log-probabilities, of one shape.
    """
    expect_alike("float", "[...]", logps=logps, reference_logps=reference_logps)
    check_number("beta", beta, 0)
    return (beta * (logps.double() - reference_logps.double())).to(computing_dtype(logps))


@torch.no_grad()
def did_entropy(logps: Tensor, reference_logps: Tensor, proposal_logps: Tensor) -> DIDEntropy:
    """Entropy of the DID over whole responses, by self-normalised importance sampling from any proposal.

    x = log pi' - log pi, the weights w are proportional to exp(x) / proposal, H = log mean(exp(x) / proposal)
    - sum w x.

    Args:
        logps, reference_logps, proposal_logps: [..., K], log-probabilities of the samples under pi', pi and
            what they were drawn from.

    Returns:
        DIDEntropy(entropy [...], effective_sample_size [...]). Consistent as K grows; the paper's K = 32 has
        a high variance.

    Raises:
        TypeError, ValueError: for other dtypes, shapes or devices, and K = 0.
    """
    expect_alike("float", "[..., K]", logps=logps, reference_logps=reference_logps, proposal_logps=proposal_logps)
    if logps.dim() == 0 or logps.shape[-1] == 0:
        raise ValueError(f"logps must be [..., K] with K >= 1 samples, got shape {tuple(logps.shape)}")
    x = logps.double() - reference_logps.double()
    log_w = x - proposal_logps.double()
    w = log_w.softmax(-1)
    entropy = log_w.logsumexp(-1) - math.log(logps.shape[-1]) - (w * x).sum(-1)
    dtype = computing_dtype(logps)
    return DIDEntropy(entropy.to(dtype), (1 / w.square().sum(-1)).to(dtype))


@torch.no_grad()
def displacement_metrics(
    policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, reference_chosen_logps: Tensor, reference_rejected_logps: Tensor
) -> dict[str, Tensor]:
    """Where preference training moved probability: the likelihood displacement of DPO.

    The arguments are sequence log-probabilities [B]. The metrics are detached 0-d tensors, 0 for an empty
    batch. chosen_shift, rejected_shift: mean change of log-probability. margin_shift: their difference.
    both_decreased: fraction of the pairs where chosen and rejected both lost probability. chosen_decreased:
    where the chosen one did. pairs: how many.
    """
    expect_alike(
        "float",
        "[...]",
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        reference_chosen_logps=reference_chosen_logps,
        reference_rejected_logps=reference_rejected_logps,
    )
    chosen = policy_chosen_logps.double() - reference_chosen_logps.double()
    rejected = policy_rejected_logps.double() - reference_rejected_logps.double()
    dtype = computing_dtype(policy_chosen_logps)
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
