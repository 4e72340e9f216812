"""Selects exactly K tokens, where only the device knows K. Ties go to the token that comes first, row by row.

Nothing waits for the device and every shape is known beforehand, so a CUDA graph can capture it. Of tokens on
many ranks those are taken that one process would take, see group_selection.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..checks import as_bool, check_count, check_fraction, check_generator, check_number, computing_dtype, expect, shown
from ..operator import Operator
from ..parallel import Meeting
from .batch_ranks import Batch, Call, added_up, agreed_batch, drawn_seed
from .group_selection import Means, list_length, random_values, share_of, share_with_means, would_send_list


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
def select_bottom(
    values: Tensor,
    valid: Tensor,
    count: Tensor | int,
    *,
    group: torch.distributed.ProcessGroup | None = None,
    capacity: int | None = None,
) -> Tensor:
    """The `count` smallest of the valid values; all valid ones if there are fewer.

    Args:
        values: float tensor of any shape. NaN counts as the largest, -0 as 0.
        valid: shaped like values, bool or number; nonzero is valid.
        count: 0-d integer tensor on the device of values, or an int.
        group: processes that hold consecutive parts of the values, of any size, in rank order. `count` is of
            all of them, and must be the same on all. Each gets its part of what one process would select,
            bit for bit, from one gather of `capacity` numbers a rank. Beyond 4 M numbers of all ranks three
            sums of 2,048 counts find the last value instead (six for float64).
        capacity: how many entries a rank takes at most, the same on all ranks. None: the most that it can be
            asked for. On GPUs, where a rank does not know the others' sizes, give it if these differ.

    Returns:
        bool tensor shaped like values. Among equals the lowest rank and flat index wins.

    Raises:
        TypeError, ValueError: for dtypes, shapes and devices other than these. With a group on CPUs every
            rank raises if one does, or if they disagree on the dtype, an int count or the capacity.
    """
    return _selected(Call("select_bottom", group, capacity), values, valid, count)


@torch.no_grad()
def select_top(
    values: Tensor,
    valid: Tensor,
    count: Tensor | int,
    *,
    group: torch.distributed.ProcessGroup | None = None,
    capacity: int | None = None,
) -> Tensor:
    """As `select_bottom`, the `count` largest; NaN counts as the smallest."""
    negated = -values.detach() if isinstance(values, Tensor) and values.dtype.is_floating_point else values
    return _selected(Call("select_top", group, capacity), negated, valid, count)


def _selected(call: Call, values: Any, valid: Any, count: Any) -> Tensor:
    def checked() -> tuple[Tensor, Tensor, Tensor]:
        expect("values", values, "float", "[...]")
        expect("valid", valid, "real", "[...]", like=("values", values))
        return values.detach().to(computing_dtype(values)), as_bool(valid), _as_count(count, values)

    most = _most(count)

    def would_exchange(meeting: Meeting, batch: Batch) -> None:
        would_send_list(meeting, values, list_length(batch, most, call.capacity), with_means=False)

    batch, (x, among, wanted) = agreed_batch(call, values, checked, lambda _: (most,), would_exchange)
    if batch is not None:
        wanted = share_of(x.flatten(), among.flatten(), wanted, batch, list_length(batch, most, call.capacity))
    return _select_bottom(x, among, wanted)


def _most(count: Any) -> int:
    """The largest count that the host knows of."""
    return count if isinstance(count, int) else torch.iinfo(torch.int64).max


@torch.no_grad()
def select_random(
    valid: Tensor,
    count: Tensor | int,
    generator: torch.Generator | None = None,
    *,
    group: torch.distributed.ProcessGroup | None = None,
    capacity: int | None = None,
    row_offset: int | None = None,
) -> Tensor:
    """`count` of the valid entries, uniformly and without replacement; all of them if there are fewer.

    Args:
        valid, count: as in `select_bottom`.
        generator: on the device of `valid`; None: its default. It draws one number an entry, valid or not.
            With a group it draws one number in all, on the first rank. What is drawn then depends on that
            number and on an entry's row and place in it, not on the ranks or the rows' padding.
        group, capacity: as in `select_bottom`. The first rank's number goes round in a sum of one integer.
        row_offset: with a group, the number of this rank's first row in the batch; None: rank * rows. Rows
            are along the first dimension of valid. Give it where ranks hold different numbers of rows.

    Returns, Raises: as `select_bottom`, shaped like valid.
    """

    def checked() -> Tensor:
        expect("valid", valid, "real", "[...]")
        check_generator(generator, valid.device)
        return _as_count(count, valid)

    most = _most(count)

    def would_exchange(meeting: Meeting, batch: Batch) -> None:
        meeting.would_add(lambda: [valid.new_empty((), dtype=torch.int64)])
        would_send_list(meeting, valid.new_empty((), dtype=torch.float32), list_length(batch, most, capacity), with_means=False)

    call = Call("select_random", group, capacity, row_offset)
    batch, wanted = agreed_batch(call, valid, checked, lambda _: (most,), would_exchange)
    among = as_bool(valid)
    if batch is None:
        return _select_bottom(_random_keys(valid, generator), among, wanted)
    seed = added_up(drawn_seed(batch, valid.device, generator), batch)
    values = random_values(among, seed, first_row(among, batch, row_offset))
    own = share_of(values, among.flatten(), wanted, batch, list_length(batch, most, capacity))
    return _select_bottom(values.view(valid.shape), among, own)


def first_row(x: Tensor, batch: Batch, row_offset: int | None) -> int:
    """The number of this rank's first row in the batch."""
    if row_offset is not None:
        return row_offset
    return batch.rank * (x.shape[0] if x.dim() else 1)


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


class BatchChoice(NamedTuple):
    """What `select_fraction_of_batch` selects here, [B, T] bool, and of the whole batch."""

    selected: Tensor
    means: Means


def fraction_capacity(batch: Batch, fraction: float, minimum: int, capacity: int | None) -> int:
    """How long the ranks' lists are for max(floor(fraction * tokens), minimum) of at most all entries."""
    return list_length(batch, max(int(sum(batch.sizes) * fraction), minimum), capacity)


def select_fraction_of_batch(
    values: Tensor,
    valid: Tensor,
    tokens: Tensor,
    fraction: float,
    batch: Batch,
    *,
    minimum: int = 0,
    least: int = 0,
    capacity: int | None = None,
    carried: Tensor,
    added: Tensor | None = None,
) -> BatchChoice:
    """As `select_fraction` on one process, of the rows of all ranks. One gather.

    tokens: 0-d int64, the size of the group on all ranks. capacity: as in `select_bottom`. carried [B, T] and
    added: as in `share_with_means`; None is 0.
    """
    count = fraction_count(tokens, fraction, minimum)
    count = torch.where(count >= least, count, 0)
    length = fraction_capacity(batch, fraction, minimum, capacity)
    added = count.new_zeros((), dtype=torch.float64) if added is None else added
    own, means = share_with_means(values.flatten(), valid.flatten(), count, batch, length, carried.flatten(), added)
    return BatchChoice(_select_bottom(values, valid, own), means)


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
