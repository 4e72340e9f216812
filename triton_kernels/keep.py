"""Which columns of a row are in its set: the sets of a `Keep` (rlkern/backends/contract.py) but for lists.

Bits are read as bytes, one for eight columns that a thread holds. A row's set S' is S, or all columns where
the row is `whole`. With OUTSIDE_INCLUDE one column more may be in it: `target`, -1 for none. Sweeps leave it
out of their tiles, which would take twice the registers with it, and add it at their end.
"""

import torch
import triton
import triton.language as tl

from .constants import ELSEWHERE, OUTSIDE_EVERYTHING, OUTSIDE_INCLUDE, SET_AT_LEAST, SET_BITS, SET_LISTS, SET_MASK
from .launch import starts_aligned, strides
from .rows import NEG_INF


@triton.jit
def has_columns(set_row, col, valid, KEEP: tl.constexpr):
    """Whether bits or a mask have the columns, False where these are not valid."""
    if KEEP == SET_BITS:
        return ((tl.load(set_row + (col >> 3), mask=valid, other=0).to(tl.int32) >> (col & 7).to(tl.int32)) & 1) != 0
    return tl.load(set_row + col, mask=valid, other=0) != 0


@triton.jit
def _read_set(row, y, at_y, sets_ptr, set_start, vocab, ignore_index, KEEP: tl.constexpr, OUTSIDE: tl.constexpr, ACC: tl.constexpr):
    counted, in_vocab = y != ignore_index, (y >= 0) & (y < vocab)
    if KEEP == SET_AT_LEAST:
        set_row = tl.load(sets_ptr + row)
        whole = tl.where(set_row != set_row, 1, 0) != 0  # else the interpreter makes it a float
        has = (in_vocab & (tl.load(at_y, mask=in_vocab, other=NEG_INF).to(ACC) >= set_row)) | whole
    else:
        set_row = sets_ptr + set_start
        whole = row < 0
        has = has_columns(set_row, y, in_vocab, KEEP)
    target = tl.full((), -1, tl.int32)
    if OUTSIDE == OUTSIDE_INCLUDE:
        target += tl.sum(tl.where(has, 0, tl.where(counted & in_vocab, y + 1, 0)), axis=0).to(tl.int32)
    if OUTSIDE == OUTSIDE_EVERYTHING:
        whole = whole | (tl.sum(tl.where(has, 0, (counted & (y != ELSEWHERE)).to(tl.int32)), axis=0) > 0)
    return set_row, whole, target, has, has | (y == ignore_index)


@triton.jit
def row_set(row, y, at_y, sets_ptr, set_start, vocab, ignore_index, KEEP: tl.constexpr, OUTSIDE: tl.constexpr, ACC: tl.constexpr):
    """(where the row's set begins, or its threshold; whether the row is whole; the target that is added, or
    -1; whether S has the targets y [K_BLOCK]; the same, but True for those that are ignored). at_y: pointers
    to the logits at y."""
    if KEEP is None:
        return 0, False, -1, False, False
    else:
        return _read_set(row, y, at_y, sets_ptr, set_start, vocab, ignore_index, KEEP, OUTSIDE, ACC)


@triton.jit
def _spread(bits):
    """[L, C] bytes -> [L, 8 C], whether each of their bits is set."""
    each = (bits[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(each, (bits.shape[0], 8 * bits.shape[1])) != 0


@triton.jit
def set_tile(i, lead, vocab, set_row, KEEP: tl.constexpr, SHIFTED: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """What S has of the tile at column i of token_stats_forward.py: bytes of bits, a mask, or the
    threshold."""
    line = tl.arange(0, BLOCK // LANES)[:, None] * LANES
    if KEEP == SET_BITS:
        group = tl.arange(0, LANES // 8)[None, :]
        at = (i >> 3) + line // 8 + group
        bits = tl.load(set_row + at, mask=at * 8 < vocab, other=0)
        if SHIFTED:  # a line is rotated
            at = (i >> 3) + line // 8 + (group + LANES // 8 - 1) % (LANES // 8)
            before = tl.load(set_row + at, mask=at * 8 < vocab, other=0).to(tl.int32)
            bits = ((bits.to(tl.int32) << lead) | (before >> (8 - lead))).to(tl.uint8)
        return bits
    elif KEEP == SET_MASK:  # both loads contiguous along a line, as in last_tile
        lane = tl.arange(0, LANES)[None, :]
        at = i + line + lane - lead
        held = tl.load(set_row + at, mask=(lane >= lead) & (at < vocab), other=0)
        if SHIFTED:
            following = tl.load(set_row + at + LANES, mask=(lane < lead) & (at + LANES < vocab), other=0)
            held = tl.where(lane < lead, following, held)
        return held
    else:
        return set_row


@triton.jit
def tile_in_set(x, held, whole, KEEP: tl.constexpr):
    """The tile x of raw logits with -inf outside S but in whole rows. held: its `set_tile`."""
    if KEEP == SET_AT_LEAST:
        kept = (x >= held) | whole
    elif KEEP == SET_BITS:  # or whole, for eight columns at once
        kept = _spread(held.to(tl.int32) | tl.where(whole, 255, 0))
    else:
        kept = (held != 0) | whole
    return tl.where(kept, x, NEG_INF)


@triton.jit
def columns_in_set(x, col, valid, set_row, whole, KEEP: tl.constexpr):
    """Whether columns are in S, or the row whole, one by one. x: their raw logits."""
    if KEEP == SET_AT_LEAST:
        kept = x >= set_row
    else:
        kept = has_columns(set_row, col, valid, KEEP)
    return kept | whole


@triton.jit
def run_in_set(x, first, lead, vocab, set_row, whole, KEEP: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """The same of BLOCK columns from first - lead on, first a multiple of 8; False outside the row. ALIGNED:
    no lead."""
    col = first - lead + tl.arange(0, BLOCK)
    if KEEP != SET_BITS:
        return columns_in_set(x, col, (col >= 0) & (col < vocab), set_row, whole, KEEP)
    else:
        at = (first >> 3) + tl.arange(0, BLOCK // 8)
        bits = tl.load(set_row + at, mask=at * 8 < vocab, other=0).to(tl.int32)
        if not ALIGNED:
            before = tl.load(set_row + at - 1, mask=(at > 0) & (at * 8 < vocab + 8), other=0).to(tl.int32)
            bits = (bits << lead) | (before >> (8 - lead))
        bits |= tl.where(whole, 255, 0)
        return tl.reshape((bits[:, None] >> tl.arange(0, 8)[None, :]) & 1, (BLOCK,)) != 0


def set_arguments(keep, logits: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int], dict]:
    """(sets, their strides, specialisations) of kernels that read sets beside the logits. Lists have kernels
    of their own. The logits stand for an absent tensor."""
    if keep is None or keep.kind == SET_LISTS.value:
        return logits, (0, 0), dict(KEEP=None, OUTSIDE=None, SETS_ALIGN=1)
    by_row = keep.kind == SET_AT_LEAST.value
    # As many columns to a load as of logits, and one byte of bits: a thread then holds the set of its logits.
    align = 16 // logits.element_size() if keep.kind == SET_MASK.value else 1
    options = dict(KEEP=keep.kind, OUTSIDE=keep.outside, SETS_ALIGN=align if not by_row and starts_aligned(keep.sets, align) else 1)
    return keep.sets, (0, 0) if by_row else strides(keep.sets), options
