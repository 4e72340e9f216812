"""What the plain PyTorch forms over rows of logits share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def skipped_rows(n: int, targets: Tensor | None, mask: Tensor | None, ignore_index: int, device: torch.device) -> Tensor:
    """bool [n]: not read, by mask [n] or because all targets [n, K] are ignored."""
    skipped = torch.zeros(n, dtype=torch.bool, device=device) if mask is None else ~mask
    return skipped if targets is None else skipped | (targets == ignore_index).all(-1)


def inverse_temperature(temperature: float | Tensor, rows: slice, acc: torch.dtype) -> float | Tensor:
    """1/T, a float or [R, 1]; a temperature that is not positive makes the row NaN."""
    if not isinstance(temperature, Tensor):
        return 1.0 / temperature
    t = temperature[rows].to(acc).unsqueeze(-1)
    return torch.where(t > 0, 1 / t, math.nan)
