"""Functions with a kink, and an explicit derivative there: PyTorch's has changed between releases.

A caller may change the bounds from step to step without recompilation by torch.compile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def number(value: float, like: Tensor) -> Tensor:
    """The value as a 0-d tensor. torch.compile keeps a factor symbolic, but fixes the argument of `full`."""
    return like.new_ones(()) * value


def clamped(x: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """x.clamp(low, high) without gradient. torch.compile would recompile a plain call for new bounds."""
    bounds: list[Any] = [low, high]
    if torch.compiler.is_compiling():
        bounds = [None if bound is None else number(bound, x) for bound in bounds]
    return x.detach().clamp(*bounds)


def bounded(x: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """x.clamp(low, high), with gradient 1 where that is x, at a bound too, and 0 beyond: as in kernels."""
    if low is None and high is None:
        return x
    values = clamped(x, low, high)
    return torch.where(values == x, x, values)


def excess(x: Tensor) -> Tensor:
    """x.relu(), with gradient 0 at 0. Unlike relu it does not save its result: callers may write to it."""
    return torch.where(x <= 0, 0, x)
