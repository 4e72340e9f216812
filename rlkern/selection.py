"""Which tokens: exactly K of them, K known to the device only. Nothing waits for the device and every shape is known beforehand: this can be
captured in a CUDA graph. Ties go to the token that comes first, row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends
from .backends import one_pass as one_pass  # for the losses
from .checks import as_bool, check_count, check_fraction, check_generator, check_number, computing_dtype, shown
from .rows import call

__all__ = ["fraction_count", "select_bottom", "select_fraction", "select_random", "select_random_fraction", "select_top", "selected_means"]

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

_lib.define(
    "select_fraction(Tensor values, Tensor valid, Tensor group, float fraction, int minimum, int least) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_lib.define("selected_means(Tensor values, Tensor selected, Tensor mask) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _select_fraction(values, valid, group, fraction, minimum, least):
    out = values.new_empty(values.shape, dtype=torch.bool)
    if values.numel():
        flat = (x.contiguous() for x in (values, valid, group))
        backends.select(values.device).select_fraction(*flat, fraction, minimum, least, out)
    return out


def _selected_means(values, selected, mask):
    out = values.new_empty(3)
    backends.select(values.device).selected_means(*(x.contiguous() for x in (values, selected, mask)), out)
    return out


_lib.impl("select_fraction", _select_fraction, "CompositeExplicitAutograd")
_lib.impl("selected_means", _selected_means, "CompositeExplicitAutograd")
torch.library.register_fake("rlkern::select_fraction", lambda values, *args: values.new_empty(values.shape, dtype=torch.bool), lib=_lib)
torch.library.register_fake("rlkern::selected_means", lambda values, *args: values.new_empty(3), lib=_lib)


def _check_valid(valid: Tensor) -> None:
    if not isinstance(valid, Tensor) or valid.dtype.is_complex:
        raise TypeError(f"valid must be a bool or number tensor, got {valid.dtype if isinstance(valid, Tensor) else type(valid).__name__}")


def _as_count(count: Tensor | int, values: Tensor) -> Tensor:
    """0-d int64 on the device of values."""
    if not isinstance(count, Tensor):
        if not isinstance(count, int):
            raise TypeError(f"count must be an integer, got {shown(count)}")
        check_number("count", count, -(1 << 63), (1 << 63) - 1)
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
    check_count("minimum", minimum)
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
    check_generator(generator, valid.device)
    return select_bottom(_random_keys(valid, generator), valid, count)


def _random_keys(valid: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is None:  # torch.compile knows rand without a generator only
        return torch.rand(valid.shape, dtype=torch.float32, device=valid.device)
    return torch.rand(valid.shape, dtype=torch.float32, device=valid.device, generator=generator)


def select_fraction(values: Tensor, valid: Tensor, group: Tensor, fraction: float, *, minimum: int = 0, least: int = 0) -> Tensor:
    """`select_bottom` with count = max(floor(fraction * tokens of the group), minimum), and none where that makes fewer than `least`.

    For losses, which have checked what they hand over: values float32 or float64 [B, T], valid and group bool [B, T].
    """
    if not one_pass(values):
        count = fraction_count(group.sum(), fraction, minimum)
        return select_bottom(values, valid, torch.where(count >= least, count, 0))
    return call(torch.ops.rlkern.select_fraction.default, _select_fraction, values, valid, group, fraction, minimum, least)


def select_random_fraction(valid: Tensor, group: Tensor, fraction: float, *, minimum: int = 0, generator: torch.Generator | None = None) -> Tensor:
    """As `select_fraction`, uniformly drawn; `generator` as in `select_random`."""
    return select_fraction(_random_keys(valid, generator), valid, group, fraction, minimum=minimum)


def selected_means(values: Tensor, selected: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The fraction of the tokens that is selected, the mean of the values over the tokens, and that over the selected ones; each 0 of nothing.

    For losses, which have checked what they hand over: values [B, T] float32 or float64, finite where masked; selected and mask bool [B, T], all of
    `selected` inside the mask.
    """
    if one_pass(values):
        return call(torch.ops.rlkern.selected_means.default, _selected_means, values, selected, mask).unbind()
    tokens, chosen = mask.sum().clamp(min=1), selected.sum()
    return chosen.to(values.dtype) / tokens, torch.where(mask, values, 0).sum() / tokens, torch.where(selected, values, 0).sum() / chosen.clamp(min=1)
