"""Selects exactly K tokens, where only the device knows K. Ties go to the token that comes first, row by row.

Nothing waits for the device and every shape is known beforehand, so a CUDA graph can capture it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..checks import as_bool, check_count, check_fraction, check_generator, check_number, computing_dtype, expect, shown
from ..operator import Operator


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
    """max(floor(total * fraction), minimum), 0-d int64 on total's device; the product is in float64.

    Raises TypeError, ValueError: a total that is no 0-d tensor, a fraction outside [0, 1], a minimum below 0.
    """
    expect("total", total, "real", "0-d", shape=())
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
    expect("values", values, "float", "[...]")
    expect("valid", valid, "real", "[...]", like=("values", values))
    return _select_bottom(values.detach().to(computing_dtype(values)), as_bool(valid), _as_count(count, values))


@torch.no_grad()
def select_top(values: Tensor, valid: Tensor, count: Tensor | int) -> Tensor:
    """As `select_bottom`, the `count` largest; NaN counts as the smallest."""
    negated = -values.detach() if isinstance(values, Tensor) and values.dtype.is_floating_point else values
    return select_bottom(negated, valid, count)


@torch.no_grad()
def select_random(valid: Tensor, count: Tensor | int, generator: torch.Generator | None = None) -> Tensor:
    """`count` of the valid entries, uniformly and without replacement; all of them if there are fewer.

    Args:
        valid, count: as in `select_bottom`.
        generator: on the device of `valid`; None: its default. It draws one number an entry, valid or not.

    Returns, Raises: as `select_bottom`, shaped like valid.
    """
    expect("valid", valid, "real", "[...]")
    check_generator(generator, valid.device)
    return select_bottom(_random_keys(valid, generator), valid, count)


def _random_keys(valid: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is None:  # torch.compile supports only this rand
        return torch.rand(valid.shape, dtype=torch.float32, device=valid.device)
    return torch.rand(valid.shape, dtype=torch.float32, device=valid.device, generator=generator)


# --- for losses, which have checked what they hand over -----------------------------------------------------


def _bottom(values, valid, count):
    out = values.new_empty(values.shape, dtype=torch.bool)
    if values.numel():
        dense = (x.contiguous().view(-1) for x in (values, valid))
        backends.select(values.device).select_bottom(*dense, count, out.view(-1))
    return out


def _like_values(values, *args):
    return values.new_empty(values.shape, dtype=torch.bool)


_select_bottom = Operator("select_bottom(Tensor values, Tensor valid, Tensor count) -> Tensor", _bottom, _like_values)


def _fraction(values, valid, group, fraction, minimum, least):
    out = values.new_empty(values.shape, dtype=torch.bool)
    if values.numel():
        dense = (x.contiguous().view(-1) for x in (values, valid, group))
        backends.select(values.device).select_fraction(*dense, fraction, minimum, least, out.view(-1))
    return out


def _plain_fraction(values, valid, group, fraction, minimum, least):
    count = fraction_count(group.sum(), fraction, minimum)
    return select_bottom(values, valid, torch.where(count >= least, count, 0))


_select_fraction = Operator(
    "select_fraction(Tensor values, Tensor valid, Tensor group, float fraction, int minimum, int least) -> Tensor",
    run=_fraction,
    fake=_like_values,
    plain=_plain_fraction,
)


def select_fraction(values: Tensor, valid: Tensor, group: Tensor, fraction: float, *, minimum: int = 0, least: int = 0) -> Tensor:
    """`select_bottom` of max(floor(fraction * tokens of the group), minimum), or of none if that is less than
    `least`. values float32 or float64 [B, T], valid and group bool [B, T]."""
    return _select_fraction(values, valid, group, fraction, minimum, least)


def select_random_fraction(valid: Tensor, group: Tensor, fraction: float, *, minimum: int = 0, generator: torch.Generator | None = None) -> Tensor:
    """As `select_fraction`, uniformly drawn; `generator` as in `select_random`."""
    return select_fraction(_random_keys(valid, generator), valid, group, fraction, minimum=minimum)


def _means(values, selected, mask):
    out = values.new_empty(3)
    backends.select(values.device).selected_means(*(x.contiguous() for x in (values, selected, mask)), out)
    return out


def _plain_means(values, selected, mask):
    tokens, chosen = mask.sum().clamp(min=1), selected.sum()
    return torch.stack([
        chosen.to(values.dtype) / tokens,
        torch.where(mask, values, 0).sum() / tokens,
        torch.where(selected, values, 0).sum() / chosen.clamp(min=1),
    ])  # fmt: skip


_selected_means = Operator(
    "selected_means(Tensor values, Tensor selected, Tensor mask) -> Tensor", _means, lambda values, *_: values.new_empty(3), _plain_means
)


def selected_means(values: Tensor, selected: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """The selected fraction of the tokens, and the means of values over tokens and selected; 0 of nothing.
    values [B, T] float32 or float64, finite where masked; selected and mask bool [B, T], selected in mask."""
    return _selected_means(values, selected, mask).unbind()
