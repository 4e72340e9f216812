"""What the plain PyTorch forms over rows of logits share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def skipped_rows(n: int, targets: Tensor | None, mask: Tensor | None, ignore_index: int, device: torch.device) -> Tensor:
    """bool [n]: not read, by mask [n] or because all targets [n, K] are ignored."""
    skipped = torch.zeros(n, dtype=torch.bool, device=device) if mask is None else ~mask
    return skipped if targets is None else skipped | (targets == ignore_index).all(-1)


def listed_columns(targets: Tensor, ignore_index: int, vocab: int) -> Tensor:
    """[R, V]: which ids are among the targets [R, K]."""
    nowhere = (targets == ignore_index) | (targets < 0) | (targets >= vocab)
    listed = torch.zeros(targets.shape[0], vocab + 1, dtype=torch.bool, device=targets.device)
    return listed.scatter_(-1, targets.masked_fill(nowhere, vocab), True)[:, :vocab]


def inverse_temperature(temperature: float | Tensor, rows: slice, acc: torch.dtype) -> float | Tensor:
    """1/T, a float or [R, 1]; a temperature that is not positive makes the row NaN."""
    if not isinstance(temperature, Tensor):
        return 1.0 / temperature
    t = temperature[rows].to(acc).unsqueeze(-1)
    return torch.where(t > 0, 1 / t, math.nan)


def soft_cap(x: Tensor, softcap: float) -> Tensor:
    """x as it is without a softcap, else tanh(x / softcap); -inf stays, it is a mask."""
    return torch.where(torch.isneginf(x), x, (x / softcap).tanh()) if softcap > 0 else x


def soft_cap_slope(x: Tensor, softcap: float) -> Tensor:
    """The derivative of tanh(x / softcap) by x. 1 - tanh^2 would be 0 where the tanh rounds to 1."""
    r = (x.abs() * (-2 / softcap)).exp()
    return 4 / softcap * r / (1 + r).square()
