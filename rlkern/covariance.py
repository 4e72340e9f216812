"""How a token's log-probability moves with its advantage: the covariance that Clip-Cov and KL-Cov select by (arXiv 2505.22617, Eq. 10)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import backends
from .checks import as_bool, check_group, check_logp, check_number, check_tokens, numbers, per_token, shown
from .rows import call

__all__ = ["covariance_quantiles", "token_covariance"]

_lib = torch.library.Library("rlkern", "FRAGMENT")
_lib.define("covariance_sums(Tensor logp, Tensor advantages, Tensor mask) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_lib.define("token_covariance(Tensor logp, Tensor advantages, Tensor mask, Tensor? sums) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _covariance_sums(logp, advantages, mask):
    if logp.numel() == 0:
        return logp.new_zeros(3, dtype=torch.float64)
    return backends.select(logp.device).covariance_sums(logp.contiguous(), advantages.contiguous(), mask.contiguous()).sum(0)


def _token_covariance(logp, advantages, mask, sums):
    out = logp.new_empty(logp.shape)
    if logp.numel():
        backend = backends.select(logp.device)
        sums = None if sums is None else sums.unsqueeze(0)
        backend.token_covariance(logp.contiguous(), advantages.contiguous(), mask.contiguous(), sums, out)
    return out


_lib.impl("covariance_sums", _covariance_sums, "CompositeExplicitAutograd")
_lib.impl("token_covariance", _token_covariance, "CompositeExplicitAutograd")
torch.library.register_fake("rlkern::covariance_sums", lambda logp, *args: logp.new_empty(3, dtype=torch.float64), lib=_lib)
torch.library.register_fake("rlkern::token_covariance", lambda logp, *args: logp.new_empty(logp.shape), lib=_lib)


def token_covariance(logp: Tensor, advantages: Tensor, mask: Tensor, *, group: torch.distributed.ProcessGroup | None = None) -> Tensor:
    """cov_i = (A_i - mean A)(logp_i - mean logp), both means over all counted tokens.

    Args:
        logp: [B, T] float. A token whose logp is not finite (the policy forbids it) counts as masked, it would make every mean infinite.
        advantages: [B, T], [B, 1] or [B] float that does not require grad.
        mask: [B, T] bool or number; nonzero counts. Masked places may hold NaN.
        group: data-parallel processes to take the means over (one all_reduce of three numbers); None takes this tensor alone.

    Returns:
        [B, T] float32 (float64 for float64 logp), 0 where masked, no gradient. With equal advantages it is 0 up to rounding.

    Raises:
        TypeError, ValueError: for dtypes, shapes and devices other than these.
    """
    check_logp(logp)
    check_tokens("mask", mask, logp, floating=False)
    check_group(group)
    return covariance_of(logp, per_token("advantages", advantages, logp), as_bool(mask), group)


def covariance_of(logp: Tensor, advantages: Tensor, mask: Tensor, group: torch.distributed.ProcessGroup | None) -> Tensor:
    """`token_covariance` of checked inputs: advantages [B, T] in the dtype of the computation, mask bool."""
    logp = numbers(logp, advantages.dtype)
    sums = None
    if group is not None:
        sums = torch.ops.rlkern.covariance_sums.default(logp.detach(), advantages, mask)
        torch.distributed.all_reduce(sums, group=group)
    return call(torch.ops.rlkern.token_covariance.default, _token_covariance, logp, advantages, mask, sums)


@torch.no_grad()
def covariance_quantiles(covariance: Tensor, mask: Tensor, quantiles: tuple[float, ...] = (0.5, 0.9, 0.99, 0.999)) -> Tensor:
    """Quantiles over the counted tokens, for plots: [len(quantiles)], 0 without tokens. The value at rank floor(q (N - 1)), nothing interpolated.

    Raises:
        TypeError, ValueError: shapes that differ, quantiles outside [0, 1].
    """
    if not isinstance(covariance, Tensor) or not isinstance(mask, Tensor):
        raise TypeError(f"covariance and mask must be tensors, got {type(covariance).__name__} and {type(mask).__name__}")
    if not covariance.dtype.is_floating_point or mask.dtype.is_complex:
        raise TypeError(f"covariance must be a float tensor and mask bool or numbers, got {covariance.dtype} and {mask.dtype}")
    if covariance.shape != mask.shape:
        raise ValueError(f"mask must have the shape of covariance {tuple(covariance.shape)}, got {tuple(mask.shape)}")
    if covariance.device != mask.device:
        raise ValueError(f"mask must be on the device of covariance {covariance.device}, got {mask.device}")
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
