"""The part of contract.py about sets of kept ids in plain PyTorch: which columns of some rows S' has."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .contract import ELSEWHERE, Keep, Outside, SetKind


class Columns(NamedTuple):
    """Of R rows."""

    inside: Tensor  # bool [R, V]: in S'
    target_kept: Tensor  # bool [R, K]: in S, or the row has none
    undefined: Tensor  # bool [R, 1]: its list cannot be


def padded_lists(keep: Keep, n: int, flat: slice) -> tuple[Tensor, Tensor]:
    """(ids [R, K], negative where there is none, of the rows `flat` of n; [R] whether a row names a list
    beyond the last). The longest list of them is read on the host."""
    if keep.begin is None:
        ids = keep.sets.view(n, -1)[flat].long()
        return ids, torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    begin, end, size = keep.begin, keep.end, len(keep.sets)
    number = torch.arange(n, device=begin.device)[flat] if keep.rows is None else keep.rows[flat]
    lists = len(begin)
    beyond, named = number >= lists, (number >= 0) & (number < lists)
    begin, end = (torch.cat([x.clamp(0, size), x.new_zeros(1)])[torch.where(named, number, lists)] for x in (begin, end))  # type: ignore[union-attr]
    length = torch.where(named, end - begin, 0).clamp(min=0)
    at = torch.arange(int(length.max()) if len(length) else 0, device=begin.device)
    ids = torch.cat([keep.sets, keep.sets.new_zeros(1)])[(begin.unsqueeze(-1) + at).clamp(max=size)]
    return ids.long().masked_fill(at >= length.unsqueeze(-1), -1), beyond


def _lists(keep: Keep, n: int, flat: slice, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """(bool [R, V], [R] whether the row is over all ids, [R] whether it is undefined)"""
    ids, beyond = padded_lists(keep, n, flat)
    listed = torch.zeros(len(ids), vocab + 1, dtype=torch.bool, device=ids.device)
    listed.scatter_(-1, torch.where((ids < 0) | (ids >= vocab), vocab, ids), True)
    open_ = (ids < 0).all(-1) & ~beyond & keep.open_empty
    if keep.rows is not None:
        open_ = open_ | (keep.rows[flat] < 0)
    return listed[:, :vocab], open_, (ids >= vocab).any(-1) | beyond


def columns(keep: Keep, x: Tensor, a: int, rows: slice, flat: slice, targets: Tensor, ignored: Tensor) -> Columns:
    """Of rows x [R, V] of logits, the rows [a, rows] of all, with targets [N, K]; ignored [N, K]: of a row
    that is skipped, too."""
    vocab, y = x.shape[-1], targets[flat]
    nothing = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    open_, undefined = nothing, nothing
    kept: Any
    if keep.kind == SetKind.LISTS:
        kept, open_, undefined = _lists(keep, len(targets), flat, vocab)
    elif keep.kind == SetKind.BITS:
        at = torch.arange(vocab, device=x.device)
        kept = (keep.sets[a, rows][:, at // 8] >> (at % 8).to(torch.uint8)) & 1 != 0
    elif keep.kind == SetKind.MASK:
        kept = keep.sets[a, rows]
    else:
        threshold = keep.sets[flat].unsqueeze(-1)
        kept, open_ = x >= threshold, threshold.isnan().squeeze(-1)
    valid = (y >= 0) & (y < vocab)
    index = y.clamp(0, vocab - 1)
    found = kept.gather(-1, index) & valid | open_.unsqueeze(-1) | ignored[flat]
    if keep.outside == Outside.EVERYTHING:
        open_ = open_ | ~(found | (y == ELSEWHERE)).all(-1)
    inside = kept | open_.unsqueeze(-1)
    if keep.outside == Outside.INCLUDE:  # of one target a row
        inside = inside | (torch.arange(vocab, device=x.device) == y)
    return Columns(inside, found, undefined.unsqueeze(-1))
