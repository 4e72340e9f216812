"""Reductions over the tokens that a mask counts, for metrics."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def total(where: Tensor, dtype: torch.dtype) -> Tensor:
    """How many are set, in that dtype: the quotient of two integers would follow torch.set_default_dtype."""
    return where.sum().to(dtype)


@torch.no_grad()
def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of float values over the mask. 0 if nothing counts."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


@torch.no_grad()
def fraction(where: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The fraction of the mask that is in `where`, both bool. 0 if nothing counts."""
    return total(where & mask, dtype) / mask.sum().clamp(min=1)
