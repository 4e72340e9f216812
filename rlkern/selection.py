"""Which tokens: exactly K of them, K known to the device only. Nothing waits for the device and every shape is known beforehand: this can be
captured in a CUDA graph. Ties go to the token that comes first, row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends
from .checks import as_bool, check_fraction, check_number, computing_dtype

__all__ = ["fraction_count", "select_bottom", "select_random", "select_top"]

_lib = torch.library.Library("rlkern", "FRAGMENT")
_lib.define("select_bottom(Tensor values, Tensor valid, Tensor count) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _select_bottom(values, valid, count):
    out = values.new_empty(values.shape, dtype=torch.bool)
    if values.numel():
        values, valid = values.contiguous().view(-1), valid.contiguous().view(-1)
        backends.select(values.device).select_bottom(values, valid, count, out.view(-1))
    return out


_lib.impl("select_bottom", _select_bottom, "CompositeExplicitAutograd")
torch.library.register_fake("rlkern::select_bottom", lambda values, *args: values.new_empty(values.shape, dtype=torch.bool), lib=_lib)
_op = torch.ops.rlkern.select_bottom.default


def _check_valid(valid: Tensor) -> None:
    if not isinstance(valid, Tensor) or valid.dtype.is_complex:
        raise TypeError(f"valid must be a bool or number tensor, got {valid.dtype if isinstance(valid, Tensor) else type(valid).__name__}")


def _as_count(count: Tensor | int, values: Tensor) -> Tensor:
    """0-d int64 on the device of values."""
    if not isinstance(count, Tensor):
        check_number("count", count)
        if isinstance(count, float):
            raise TypeError(f"count must be an integer, got {count}")
        return torch.zeros((), dtype=torch.int64, device=values.device) + count
    if count.numel() != 1:
        raise ValueError(f"count must be one number, got shape {tuple(count.shape)}")
    if count.dtype.is_floating_point or count.dtype.is_complex or count.dtype == torch.bool:
        raise TypeError(f"count must be an integer tensor, got {count.dtype}")
    if count.device != values.device:
        raise ValueError(f"count must be on the device of values {values.device}, got {count.device}")
    return count.reshape(()).to(torch.int64)


def fraction_count(total: Tensor, fraction: float, minimum: int = 0) -> Tensor:
    """max(floor(total * fraction), minimum) as a 0-d int64 tensor on total's device; the product is that of float64, as in Python.

    Raises:
        TypeError, ValueError: a fraction outside [0, 1], a minimum below 0.
    """
    check_fraction("fraction", fraction)
    check_number("minimum", minimum, 0)
    return (total.to(torch.float64) * fraction).to(torch.int64).clamp(min=minimum)


@torch.no_grad()
def select_bottom(values: Tensor, valid: Tensor, count: Tensor | int) -> Tensor:
    """The `count` smallest of the valid values; all valid ones if there are fewer.

    Args:
        values: float tensor of any shape. NaN counts as the largest, -0 as 0.
        valid: shaped like values, bool or number; nonzero is valid.
        count: 0-d integer tensor on the device of values, or an int.

    Returns:
        bool tensor shaped like values. Among equals the lowest flat index wins.

    Raises:
        TypeError, ValueError: for dtypes, shapes and devices other than these.
    """
    if not isinstance(values, Tensor) or not values.dtype.is_floating_point:
        raise TypeError(f"values must be a float tensor, got {values.dtype if isinstance(values, Tensor) else type(values).__name__}")
    _check_valid(valid)
    if valid.shape != values.shape:
        raise ValueError(f"valid must have the shape of values {tuple(values.shape)}, got {tuple(valid.shape)}")
    if valid.device != values.device:
        raise ValueError(f"valid must be on the device of values {values.device}, got {valid.device}")
    return _op(values.detach().to(computing_dtype(values)), as_bool(valid), _as_count(count, values))


@torch.no_grad()
def select_top(values: Tensor, valid: Tensor, count: Tensor | int) -> Tensor:
    """As `select_bottom`, the `count` largest; NaN counts as the smallest."""
    negated = -values.detach() if isinstance(values, Tensor) and values.dtype.is_floating_point else values
    return select_bottom(negated, valid, count)


@torch.no_grad()
def select_random(valid: Tensor, count: Tensor | int, generator: torch.Generator | None = None) -> Tensor:
    """`count` of the valid entries, uniformly and without replacement; all of them if there are fewer.

    Args:
        valid: bool or number tensor of any shape; nonzero is valid.
        count: 0-d integer tensor on the device of valid, or an int.
        generator: on the device of `valid`; None takes that device's default generator. It draws one number an entry, valid or not.

    Returns:
        bool tensor shaped like valid.

    Raises:
        TypeError, ValueError: for dtypes, shapes and devices other than these.
    """
    _check_valid(valid)
    if generator is None:  # torch.compile knows rand without a generator only
        keys = torch.rand(valid.shape, device=valid.device)
    else:
        keys = torch.rand(valid.shape, device=valid.device, generator=generator)
    return select_bottom(keys, valid, count)
