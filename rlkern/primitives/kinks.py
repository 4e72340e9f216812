"""Functions with a kink, with the derivative there written down: PyTorch's choice has changed between releases.

The bounds are numbers that a caller may change from step to step without torch.compile compiling again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def number(value: float, like: Tensor) -> Tensor:
    """The value as a 0-d tensor. torch.compile keeps the factor of a product symbolic, where it would bake the argument of `full` into the graph."""
    return like.new_ones(()) * value


def clamped(x: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """x.clamp(low, high) without gradient; torch.compile would compile the call of clamp again for every new bound."""
    bounds: list[Any] = [low, high]
    if torch.compiler.is_compiling():
        bounds = [None if bound is None else number(bound, x) for bound in bounds]
    return x.detach().clamp(*bounds)


def bounded(x: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """The values of x.clamp(low, high). The gradient is 1 wherever the value is x itself, so at a bound too, and 0 beyond: as in the kernels.

    The gradient of clamp at a bound is PyTorch's choice, which has changed.
    """
    if low is None and high is None:
        return x
    values = clamped(x, low, high)
    return torch.where(values == x, x, values)


def excess(x: Tensor) -> Tensor:
    """The values of x.relu(). The gradient is 0 at 0, as that of relu, which would save its result: a caller may write into that."""
    return torch.where(x <= 0, 0, x)
