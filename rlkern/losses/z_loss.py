"""The Z-loss of the spherical family, and the penalty on the softmax normaliser that PaLM calls z_loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..checks import FINITE, check_choice, check_number, check_positive, computing_dtype, expect
from ..primitives.moments import row_moments
from ..primitives.packing import Packed, sequences_of
from .aggregate import aggregate, check_aggregation

REDUCTIONS = ("sum", "mean", "none")


def spherical_z_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    scale: float = 1.0,
    offset: float = 0.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "sum",
) -> Tensor:
    """The Z-loss (arXiv 1604.08859): softplus(scale (offset - z_y)) / scale.

    z = (logits - mean) / std over the vocabulary.
    It replaces the cross-entropy. It needs no exponential of the vocabulary, and it does not change when the
    logits are shifted or multiplied by a positive number. It defines no probabilities, so it cannot feed a
    policy ratio.

    Args:
        logits: [..., V], finite. A row with an infinite logit gives NaN: the family knows no masked
            vocabulary.
        targets: [...] integer ids.
        scale, offset: a > 0 and b of the paper.
        mask, ignore_index: rows where the mask is 0 or the target is `ignore_index` are left out.
        reduction: "sum" over all rows (the authors'), "mean" over those that count, or "none".

    Returns:
        A 0-d tensor, or [...] for "none", float32 (float64 for float64 logits). A row of equal logits is a
        constant without gradient; the authors divide by std + 1e-12.

    Raises:
        TypeError, ValueError, IndexError: as `rlkern.token_stats`, and for options other than the above.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_positive("scale", scale, FINITE)
    check_number("offset", offset)
    target, variance = row_moments(logits, targets, mask=mask, ignore_index=ignore_index)
    flat = variance == 0
    z = torch.where(flat, 0, target * torch.where(flat, 1, variance).rsqrt())
    losses = -logsigmoid(scale * (z - offset)) / scale
    counted = targets != ignore_index
    if mask is not None:
        counted = counted & (mask != 0)
    losses = torch.where(counted, losses, 0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / counted.sum().clamp(min=1)


def lse_penalty(
    logsumexp: Tensor,
    mask: Tensor | Packed,
    *,
    coef: float = 1e-4,
    aggregation: str | Tensor = "token-mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """coef * logsumexp(logits)^2, aggregated: keeps the softmax normaliser near 1.

    PaLM, arXiv 2204.02311. There and in most code it is called z_loss.

    Args:
        logsumexp: [B, T] (any shape for the token modes), from `token_stats(...).logsumexp`, whose gradient
            it uses: 2 coef lse p per logit.
        mask: shaped like it, or a `Packed`; what it excludes may hold anything.
        coef: lambda, >= 0; PaLM uses 1e-4.
        aggregation, normalizer: as in `rlkern.aggregate`.

    Returns:
        A 0-d tensor to add to a loss, float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: as `rlkern.aggregate`, and for a coef that is negative or no number.
    """
    check_number("coef", coef, 0)
    check_aggregation(aggregation, normalizer)
    expect("logsumexp", logsumexp, "float", "[...]")
    if isinstance(mask, Packed):
        counted = sequences_of(mask, logsumexp, "logsumexp").mask
    else:
        expect("mask", mask, "real", "[...]", like=("logsumexp", logsumexp))
        counted = mask != 0
    logsumexp = torch.where(counted, logsumexp, 0).to(computing_dtype(logsumexp))
    return coef * aggregate(logsumexp.square(), mask, aggregation, normalizer)
