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


class Means(NamedTuple):
    """Of what is selected on all ranks."""

    chosen: Tensor  # 0-d int64: how many, of those whose `carried` is no NaN
    mean: Tensor  # 0-d float64: of what these carry, 0 of none
    added: Tensor  # 0-d float64: the sum of `added` over the ranks


class _Beside(NamedTuple):
    carried: Tensor  # [N], in the dtype of the values
    added: Tensor  # 0-d float64


def list_length(batch: Batch, most: int, capacity: int | None = None) -> int:
    """How many keys each rank lists, at least 1. most: of the count that is selected."""
    return max(1, min(most, max(batch.sizes)) if capacity is None else capacity)


def would_send_list(meeting: Meeting, x: Tensor, length: int, *, with_means: bool = True) -> None:
    """Tells a meeting of what `share_of` gathers, where x has the dtype of the values."""
    integer = _INTEGER[computing_dtype(x)]
    words = 2 * length + 8 // integer.itemsize if with_means else length
    meeting.would_send(lambda: [x.new_empty(words, dtype=integer)])


def share_of(values: Tensor, valid: Tensor, count: Tensor, batch: Batch, length: int) -> Tensor:
    """How many of the `count` smallest of all ranks' valid values are this rank's: 0-d int64. One gather.

    Args:
        values, valid: [N] float32 or float64, and bool. NaN is the largest, and both zeros are alike.
        count: 0-d int64, the same on all ranks.
        length: of a rank's list, the same on all ranks. No rank has more of them.
    """
    return _share(values, valid, count, batch, length, None)[0]


def share_with_means(values: Tensor, valid: Tensor, count: Tensor, batch: Batch, length: int, carried: Tensor, added: Tensor) -> tuple[Tensor, Means]:
    """(`share_of`, and what the selected entries of all ranks carry), in the same gather.

    Args:
        carried: [N] float.
        added: 0-d float64, to be added up over the ranks.
    """
    own, means = _share(values, valid, count, batch, length, _Beside(carried.to(values.dtype), added))
    return own, means  # type: ignore[return-value]  # not None


def _share(values, valid, count, batch, length, beside) -> tuple[Tensor, Means | None]:
    keys = _keys(values, valid)
    if batch.ranks * length > MOST_LISTED:
        return _counted_share(keys, valid, count, batch, length, beside)
    return _listed_share(keys, count, batch, length, beside)


def _keys(values: Tensor, valid: Tensor) -> Tensor:
    """Integers in the order of the values; where not valid the largest, which no value has."""
    integer = _INTEGER[values.dtype]
    largest = torch.iinfo(integer).max
    bits = torch.where(values == 0, 0, values).view(integer)
    keys = torch.where(values.isnan(), largest - 1, bits ^ ((bits >> (8 * values.element_size() - 1)) & largest))
    return torch.where(valid, keys, largest)


def _listed_share(keys, count, batch, length, beside) -> tuple[Tensor, Means | None]:
    last = torch.iinfo(keys.dtype).max
    ordered, order = keys.sort(stable=True)
    n = min(length, keys.numel())
    none = keys.new_full((length - n,), last)
    parts = [ordered[:n], none]
    if beside is not None:
        parts += [beside.carried[order[:n]].view(keys.dtype), none, beside.added.view(1).view(keys.dtype)]
    words = torch.cat(parts)
    words = words.unsqueeze(0) if batch.ranks == 1 else gather(words, batch.group_name, batch.ranks)
    ordered, order = words[:, :length].flatten().sort(stable=True)
    taken = (ordered < last) & (torch.arange(len(ordered), device=keys.device) < count)
    own = (taken & (order // length == batch.rank)).sum()
    if beside is None:
        return own, None
    carried = words[:, length : 2 * length].flatten()[order].view(beside.carried.dtype)
    taken = taken & ~carried.isnan()
    total, chosen = torch.where(taken, carried.to(torch.float64), 0).sum(), taken.sum()
    return own, Means(chosen, total / chosen.clamp(min=1), words[:, 2 * length :].contiguous().view(torch.float64).sum())


def _counted_share(keys, valid, count, batch, length, beside) -> tuple[Tensor, Means | None]:
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
    own = (smaller.sum() + own_ties).clamp(max=length)
    if beside is None:
        return own, None
    taken = (smaller | (follows & (follows.cumsum(0) <= own_ties))) & ~beside.carried.isnan()
    sums = torch.stack([taken.sum().to(torch.float64), torch.where(taken, beside.carried.to(torch.float64), 0).sum(), beside.added])
    chosen, total, added = (sums if batch.ranks == 1 else gather(sums, batch.group_name, batch.ranks).sum(0)).unbind()
    return own, Means(chosen.long(), total / chosen.clamp(min=1), added)


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
