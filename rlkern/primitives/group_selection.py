"""Exactly K tokens of a batch whose rows are on many ranks: those that one process would have taken.

Each rank lists the smallest of its own, as integers, and one gather makes the lists known. How many of the K
smallest of all lists are its own is a rank's share; ties go to lower ranks first. It then takes that many of
its own as a process alone would. A draw gives each token a key of its place in the batch, not of its rank.

Where the lists would be long, three sums of histograms find the K-th smallest instead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import computing_dtype
from ..parallel import Meeting, gather
from .batch_ranks import Batch, added_up
from .exact_sums import binned

MOST_LISTED = 4 << 20  # keys of all ranks
_RADIX_BITS = 11
_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}


class Share(NamedTuple):
    """What a rank takes, and what all ranks take together."""

    own: Tensor  # 0-d int64
    chosen: Tensor  # 0-d int64: of all ranks; with `carried`, those where that is no NaN
    mean: Tensor  # 0-d float64: of what those carry, 0 of none
    added: Tensor  # 0-d float64: the sum of `added` over the ranks


def list_length(batch: Batch, most: int, capacity: int | None = None) -> int:
    """How many keys each rank lists, at least 1. most: of the count that is selected."""
    return max(1, min(most, max(batch.sizes)) if capacity is None else capacity)


def would_send_list(meeting: Meeting, x: Tensor, length: int) -> None:
    """Tells a meeting of what `share_of` gathers, where x has the dtype of the values."""
    words = 2 * length + (2 if x.element_size() < 8 else 1)
    meeting.would_send(lambda: [x.new_empty(words, dtype=_INTEGER[computing_dtype(x)])])


def share_of(
    values: Tensor, valid: Tensor, count: Tensor, batch: Batch, length: int, carried: Tensor | None = None, added: Tensor | None = None
) -> Share:
    """What falls to this rank of the `count` smallest of all ranks' valid values, in one gather.

    Args:
        values, valid: [N] float32 or float64, and bool. NaN is the largest, and both zeros are alike.
        count: 0-d int64, the same on all ranks.
        length: of a rank's list, the same on all ranks. No rank takes more.
        carried: [N] like values, whose mean over the selected entries is asked for.
        added: 0-d float64, to be added up over the ranks.
    """
    keys = _keys(values, valid)
    carried = values.new_zeros(values.shape) if carried is None else carried.to(values.dtype)
    added = values.new_zeros((), dtype=torch.float64) if added is None else added.to(torch.float64)
    if batch.ranks * length > MOST_LISTED:
        return _counted_share(keys, valid, count, batch, carried, added)
    return _listed_share(keys, count, batch, length, carried, added)


def _keys(values: Tensor, valid: Tensor) -> Tensor:
    """Integers in the order of the values; where not valid the largest, which no value has."""
    integer = _INTEGER[values.dtype]
    largest = torch.iinfo(integer).max
    bits = torch.where(values == 0, 0, values).view(integer)
    keys = torch.where(values.isnan(), largest - 1, bits ^ ((bits >> (8 * values.element_size() - 1)) & largest))
    return torch.where(valid, keys, largest)


def _listed_share(keys, count, batch, length, carried, added) -> Share:
    last = torch.iinfo(keys.dtype).max
    ordered, order = keys.sort(stable=True)
    n = min(length, keys.numel())
    none = keys.new_full((length - n,), last)
    message = torch.cat([ordered[:n], none, carried[order[:n]].view(keys.dtype), none, added.view(1).view(keys.dtype)])
    messages = message.unsqueeze(0) if batch.ranks == 1 else gather(message, batch.group_name, batch.ranks)
    ordered, order = messages[:, :length].flatten().sort(stable=True)
    taken = (ordered < last) & (torch.arange(len(ordered), device=keys.device) < count)
    own = (taken & (order // length == batch.rank)).sum()
    beside = messages[:, length : 2 * length].flatten()[order].view(carried.dtype)
    counts = taken & ~beside.isnan()
    total = torch.where(counts, beside.to(torch.float64), 0).sum()
    chosen = counts.sum()
    return Share(own, chosen, total / chosen.clamp(min=1), messages[:, 2 * length :].contiguous().view(torch.float64).sum())


def _counted_share(keys, valid, count, batch, carried, added) -> Share:
    """The K-th smallest key, by its bits from high to low, from counts of all ranks."""
    top = 8 * keys.element_size()
    follows, smaller = valid, torch.zeros_like(valid)  # begins as the K-th smallest does; is certainly below it
    wanted = count
    while top > 0:
        low = max(top - _RADIX_BITS, 0)
        bins = 1 << (top - low)
        digits = (keys >> low).long() & (bins - 1)
        if top == 8 * keys.element_size():
            digits = digits ^ (bins >> 1)  # the first bit is the sign
        counts = added_up(binned(digits, follows.long(), bins).to(torch.int32), batch).long()
        upto = counts.cumsum(0)
        wanted = torch.minimum(wanted, upto[-1]).clamp(min=0)
        digit = (upto < wanted).sum()
        smaller = smaller | (follows & (digits < digit))
        follows = follows & (digits == digit)
        wanted = wanted - (upto - counts).gather(0, digit.view(1)).squeeze(0)
        top = low
    ties = follows.sum()
    by_rank = ties.view(1) if batch.ranks == 1 else gather(ties, batch.group_name, batch.ranks)
    before = by_rank[: batch.rank].sum()
    own_ties = torch.minimum((wanted - before).clamp(min=0), ties)
    selected = smaller | (follows & (follows.cumsum(0) <= own_ties))
    counts = selected & ~carried.isnan()
    parts = torch.stack([counts.sum().to(torch.float64), torch.where(counts, carried.to(torch.float64), 0).sum(), added])
    chosen, total, added = (parts if batch.ranks == 1 else gather(parts, batch.group_name, batch.ranks).sum(0)).unbind()
    return Share(smaller.sum() + own_ties, chosen.long(), total / chosen.clamp(min=1), added)


# --- a draw that does not depend on the ranks ---------------------------------------------------------------

_GOLDEN, _FIRST, _SECOND = (c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def random_values(valid: Tensor, seed: Tensor, first_row: int) -> Tensor:
    """A number for each entry, float32 [N], in random order: splitmix64 of seed and the entry's place.

    valid: [B, ...], whose first row is number first_row of the batch. seed: 0-d int64.
    """
    rows = valid.shape[0] if valid.dim() else 1
    row = torch.arange(rows, device=valid.device) + first_row
    column = torch.arange(valid.numel() // max(rows, 1), device=valid.device)
    x = seed + (((row.unsqueeze(1) << 32) | column).flatten() + 1) * _GOLDEN
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        x = (x ^ _shifted(x, shift)) * factor
    upper = _shifted(x ^ _shifted(x, 31), 34)
    return (upper + (1 << 23)).to(torch.int32).view(torch.float32)  # in order; neither NaN nor subnormal


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits of unsigned numbers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
