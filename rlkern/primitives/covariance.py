"""The covariance of logp and advantage by which Clip-Cov and KL-Cov select (arXiv 2505.22617, Eq. 10)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import backends
from ..checks import as_bool, check_number, expect, numbers, shown
from ..operator import Operator
from .batch_ranks import Call, Totals, agreed_batch, batch_totals, would_add_totals
from .packing import Packed, per_token, sequences_of


def _covariance(logp, advantages, mask, sums):
    out = logp.new_empty(logp.shape)
    if logp.numel():
        sums = None if sums is None else sums.unsqueeze(0)
        dense = (x.contiguous() for x in (logp, advantages, mask))
        backends.select(logp.device).token_covariance(*dense, sums, out)
    return out


_token_covariance = Operator(
    "token_covariance(Tensor logp, Tensor advantages, Tensor mask, Tensor? sums) -> Tensor",
    run=_covariance,
    fake=lambda logp, *_: logp.new_empty(logp.shape),
)


def token_covariance(logp: Tensor, advantages: Tensor, mask: Tensor | Packed, *, group: torch.distributed.ProcessGroup | None = None) -> Tensor:
    """cov_i = (A_i - mean A)(logp_i - mean logp), both means over all counted tokens.

    Args:
        logp: [B, T] float. A token whose logp is not finite (the policy forbids it) counts as masked:
            it would make every mean infinite.
        advantages: [B, T], [B, 1] or [B] float that does not require grad.
        mask: [B, T] bool or number; nonzero counts. Masked places may hold NaN.
        group: processes that hold the rows of a batch between them, to take the means over: one sum of
            integers, after an exchange of the arguments' dtypes on CPUs. The means are exact and rounded
            once, so the result does not depend on how many ranks there are and which rows and padding each
            holds.

    Returns:
        [B, T] float32 (float64 for float64 logp), 0 where masked, detached. Equal advantages give about 0.

    Raises:
        TypeError, ValueError: for dtypes, shapes and devices other than these. With a group on CPUs every
            rank raises if one does, or if they disagree on the dtype.
    """

    def checked() -> tuple[Tensor, Tensor]:
        sequences = sequences_of(mask, logp)
        if sequences.group_name:
            raise ValueError("token_covariance compares tokens of a batch: it takes no pack with group=, but group= itself")
        return per_token("advantages", advantages, logp, sequences), sequences.mask

    call = Call("token_covariance", group)
    batch, (a, counted) = agreed_batch(call, logp, checked, lambda _: (), lambda meeting, _: would_add_totals(meeting, logp))
    return covariance_of(logp, a, counted, None if batch is None else batch_totals(logp, a, counted, batch))


def covariance_of(logp: Tensor, advantages: Tensor, mask: Tensor, totals: Totals | None = None) -> Tensor:
    """`token_covariance` of checked inputs: advantages [B, T] in the dtype of the computation, mask bool.
    totals: those of the whole batch, or None for those of the inputs."""
    return _token_covariance(numbers(logp, advantages.dtype), advantages, mask, None if totals is None else totals.sums)


@torch.no_grad()
def covariance_quantiles(covariance: Tensor, mask: Tensor, quantiles: tuple[float, ...] = (0.5, 0.9, 0.99, 0.999)) -> Tensor:
    """Quantiles over the counted tokens, for plots: [len(quantiles)], 0 without tokens.

    Each is the value at rank floor(q (N - 1)), not interpolated. Raises TypeError or ValueError for shapes
    that differ and for quantiles outside [0, 1].
    """
    expect("covariance", covariance, "float", "[...]")
    expect("mask", mask, "real", "[...]", like=("covariance", covariance))
    if not isinstance(quantiles, (tuple, list)):
        raise TypeError(f"quantiles must be a tuple of numbers in [0, 1], got {shown(quantiles)}")
    for q in quantiles:
        check_number("quantiles", q, 0, 1)
    mask = as_bool(mask)
    ordered = torch.where(mask, covariance, math.nan).flatten().sort().values
    ordered = torch.nn.functional.pad(ordered, (0, 1))  # something to read in an empty batch
    last = (mask.sum() - 1).clamp(min=0).to(torch.float64)
    if not quantiles:
        return covariance.new_empty(0)
    ranks = torch.stack([(last * q).floor().to(torch.int64) for q in quantiles])
    return torch.where(mask.any(), ordered.gather(0, ranks), 0)
