"""Which tokens: exactly K of them, K known to the device only. A sort and a comparison of ranks, so nothing waits for the device and every
shape is known beforehand: this can be captured in a CUDA graph. Ties go to the token that comes first, row by row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import as_bool, check_fraction, check_number

__all__ = ["fraction_count", "select_bottom", "select_random", "select_top"]


def _ranks(keys: Tensor) -> Tensor:
    """The place of each entry in ascending order, NaN last; among equals the first comes first."""
    order = keys.flatten().argsort(stable=True)
    places = torch.arange(order.numel(), device=keys.device)
    return torch.empty_like(order).scatter(0, order, places).view(keys.shape)


def _check(values: Tensor, valid: Tensor, count: Tensor) -> None:
    if not isinstance(values, Tensor) or not values.dtype.is_floating_point:
        raise TypeError(f"values must be a float tensor, got {values.dtype if isinstance(values, Tensor) else type(values).__name__}")
    if not isinstance(valid, Tensor) or valid.dtype.is_complex:
        raise TypeError(f"valid must be a bool or number tensor, got {valid.dtype if isinstance(valid, Tensor) else type(valid).__name__}")
    if valid.shape != values.shape:
        raise ValueError(f"valid must have the shape of values {tuple(values.shape)}, got {tuple(valid.shape)}")
    if isinstance(count, Tensor) and count.numel() != 1:
        raise ValueError(f"count must be one number, got shape {tuple(count.shape)}")


def fraction_count(total: Tensor, fraction: float, minimum: int = 0) -> Tensor:
    """max(floor(total * fraction), minimum) as a 0-d int64 tensor on total's device; the product is that of float64, as in Python.

    Raises:
        TypeError, ValueError: a fraction outside [0, 1], a minimum below 0.
    """
    check_fraction("fraction", fraction)
    check_number("minimum", minimum, 0)
    return (total.to(torch.float64) * fraction).floor().to(torch.int64).clamp(min=minimum)


@torch.no_grad()
def select_bottom(values: Tensor, valid: Tensor, count: Tensor | int) -> Tensor:
    """The `count` smallest of the valid values; all valid ones if there are fewer.

    Args:
        values: float tensor of any shape. NaN counts as the largest.
        valid: shaped like values, bool or number; nonzero is valid.
        count: 0-d integer tensor, or an int.

    Returns:
        bool tensor shaped like values. Among equals the lowest flat index wins.

    Raises:
        TypeError, ValueError: for dtypes and shapes other than these.
    """
    _check(values, valid, count)
    valid = as_bool(valid)
    # NaN sorts behind +inf, so an invalid entry never takes a valid one's place.
    return (_ranks(torch.where(valid, values.detach(), math.nan)) < count) & valid


@torch.no_grad()
def select_top(values: Tensor, valid: Tensor, count: Tensor | int) -> Tensor:
    """As `select_bottom`, the `count` largest; NaN counts as the smallest."""
    _check(values, valid, count)
    return select_bottom(-values.detach(), valid, count)


@torch.no_grad()
def select_random(valid: Tensor, count: Tensor | int, generator: torch.Generator | None = None) -> Tensor:
    """`count` of the valid entries, uniformly and without replacement; all of them if there are fewer.

    Args:
        valid: bool or number tensor of any shape; nonzero is valid.
        count: 0-d integer tensor, or an int.
        generator: on the device of `valid`; None takes that device's default generator. It draws one number an entry, valid or not.

    Returns:
        bool tensor shaped like valid.

    Raises:
        TypeError: a tensor that is no bool or number tensor.
    """
    if not isinstance(valid, Tensor) or valid.dtype.is_complex:
        raise TypeError(f"valid must be a bool or number tensor, got {valid.dtype if isinstance(valid, Tensor) else type(valid).__name__}")
    if generator is None:  # torch.compile knows rand without a generator only
        keys = torch.rand(valid.shape, device=valid.device)
    else:
        keys = torch.rand(valid.shape, device=valid.device, generator=generator)
    return select_bottom(keys, valid, count)
