"""Row statistics over lists of ids: a program gathers the logits of a row's list. For token_stats.py.

Padded lists are first moved together: a row's bits depend on its list alone, not on where the padding stands.
Rows over all ids are left to the kernels without sets. A target that OUTSIDE_INCLUDE adds stands behind its
row's list.

The gradient of the listed entries waits in a tensor of its own while the rows are zeroed: these may be the
logits that it is computed from.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .constants import ELSEWHERE, OUTSIDE_EVERYTHING, OUTSIDE_INCLUDE, SET_LISTS, STATE_MAX, STATE_TARGETS
from .launch import device_of, stats_options, strides, target_warps
from .math import log1p, soft_cap, soft_cap_slope
from .rows import BATCH_SHAPE, LOG2E, NEG_INF, row_inv_temperature, row_start, row_targets
from .token_stats_backward import at_target, full_coefficients, full_gradient, row_coefficients, upstream_of
from .token_stats_forward import add_tile, distribution, kept_threshold, kept_tile, write_row, write_target_kept, write_zeros

LIST = 64  # entries of a row at once: half of all lists hold one or two
PADDED = 128  # the same, with padding
LIST_SHAPE = (*BATCH_SHAPE, "lists", "size", "width")


@triton.jit(do_not_specialize=LIST_SHAPE)
def compact_lists_kernel(ids_ptr, out_ptr, begin_ptr, end_ptr, width, BLOCK: tl.constexpr):
    """Moves the ids >= 0 of each row of `width` to its front."""
    row = tl.program_id(0).to(tl.int64)
    end = row * width
    tl.store(begin_ptr + row, end)
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        token = tl.load(ids_ptr + row * width + col, mask=col < width, other=-1)
        real = (token >= 0).to(tl.int32)
        tl.store(out_ptr + end + tl.cumsum(real, axis=0) - real, token, mask=token >= 0)
        end += tl.sum(real, axis=0)
    tl.store(end_ptr + row, end)


@triton.jit
def _read_list(
    row, y, ids_ptr, begin_ptr, end_ptr, rows_ptr, lists, size, vocab, ignore_index,
    K_BLOCK: tl.constexpr, HAS_ROWS: tl.constexpr, OPEN_EMPTY: tl.constexpr, OUTSIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(begin, end, how many of the targets y [K_BLOCK] are added: 0 or 1; whether there can be no such list;
    whether the row is over all ids; which targets the set has, or are of a row without one)"""
    number = tl.load(rows_ptr + row) if HAS_ROWS else row
    named = (number >= 0) & (number < lists)
    begin = tl.minimum(tl.maximum(tl.load(begin_ptr + number, mask=named, other=0), 0), size)
    end = tl.maximum(tl.minimum(tl.load(end_ptr + number, mask=named, other=0), size), begin)
    has = tl.zeros((K_BLOCK,), tl.int32)
    largest = tl.full((BLOCK,), -1, tl.int64)
    for start in range(begin, end, BLOCK):
        p = start + tl.arange(0, BLOCK)
        token = tl.load(ids_ptr + p, mask=p < end, other=-1).to(tl.int64)
        largest = tl.maximum(largest, token)
        if K_BLOCK == 1:
            has |= tl.max((token == y).to(tl.int32), axis=0)
    if K_BLOCK > 1:
        for p in range(begin, end):
            has |= (tl.load(ids_ptr + p) == y).to(tl.int32)
    counted = y != ignore_index
    has = (has != 0) & (y >= 0) & (y < vocab)
    largest = tl.max(largest, axis=0)
    impossible = (number >= lists) | (largest >= vocab)
    whole = number < 0
    if OPEN_EMPTY:
        whole = (largest < 0) & (number < lists)
    has = has | whole
    added = tl.zeros((), tl.int32)
    if OUTSIDE == OUTSIDE_INCLUDE:
        added = tl.sum(tl.where(has, 0, (counted & (y >= 0) & (y < vocab)).to(tl.int32)), axis=0)
    if OUTSIDE == OUTSIDE_EVERYTHING:
        outside = tl.sum(tl.where(has, 0, (counted & (y != ELSEWHERE)).to(tl.int32)), axis=0)
        whole = whole | ((outside > 0) & (number < lists) & (largest < vocab))
    return begin, end, added, impossible, whole, has


@triton.jit
def _entries(ids_ptr, start, end, added, y, BLOCK: tl.constexpr):
    """(places [BLOCK] from start on, the ids there; -1 behind the list and the target that is added)"""
    p = start + tl.arange(0, BLOCK)
    token = tl.load(ids_ptr + p, mask=p < end, other=-1).to(tl.int64)
    return p, tl.where((p == end) & (added > 0), tl.max(y, axis=0), token)


@triton.jit
def _gather(row_ptr, token, vocab, ACC: tl.constexpr):
    """The raw logits of ids: -inf at padding and at ids beyond the row, which make it NaN elsewhere."""
    return tl.load(row_ptr + token, mask=(token >= 0) & (token < vocab), other=NEG_INF).to(ACC)


@triton.jit(do_not_specialize=LIST_SHAPE)
def token_stats_listed_kernel(
    logits_ptr, targets_ptr, mask_ptr, temperature_ptr,  # [A, B, V], [N, K], [N], [N]
    ids_ptr, begin_ptr, end_ptr, rows_ptr,  # [size], [lists], [lists], [N]
    target_kept_ptr, whole_ptr,  # [N, K], [N]: rows over all ids, which are not written
    logp_ptr, entropy_ptr, lse_ptr, sum_sq_ptr, kept_ptr, state_ptr,  # [N, K], [N] four times, [N, STATE_TARGETS + K]
    inner, stride_a, stride_b, lists, size, vocab, temperature, ignore_index, inverse_cap: tl.float64, log_kept: tl.float64,
    K: tl.constexpr, K_BLOCK: tl.constexpr, HAS_MASK: tl.constexpr, ROW_TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr,
    HAS_ROWS: tl.constexpr, OPEN_EMPTY: tl.constexpr, OUTSIDE: tl.constexpr,
    SUM_SQ: tl.constexpr, KEPT: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The statistics of rows with lists, and zeros for rows that do not count."""
    row = tl.program_id(0)
    row_ptr = logits_ptr + row_start(row, inner, stride_a, stride_b)
    row = row.to(tl.int64)
    active, y = row_targets(row, targets_ptr, mask_ptr, ignore_index, K, K_BLOCK, HAS_MASK)
    if not active:
        tl.store(whole_ptr + row, active)
        write_zeros(row, target_kept_ptr, logp_ptr, entropy_ptr, lse_ptr, sum_sq_ptr, kept_ptr, state_ptr, K, K_BLOCK, SUM_SQ, KEPT, SET_LISTS, ACC)
        return
    begin, end, added, impossible, whole, has = _read_list(
        row, y, ids_ptr, begin_ptr, end_ptr, rows_ptr, lists, size, vocab, ignore_index, K_BLOCK, HAS_ROWS, OPEN_EMPTY, OUTSIDE, BLOCK
    )
    tl.store(whole_ptr + row, whole)
    write_target_kept(row, has | (y == ignore_index), target_kept_ptr, SET_LISTS, K, K_BLOCK)
    if whole:
        return
    inv_t = row_inv_temperature(temperature, temperature_ptr, row, ROW_TEMPERATURE, ACC)
    scale = inv_t * LOG2E
    inverse_cap = tl.full((), inverse_cap, ACC)
    m = tl.full((), NEG_INF, ACC)
    ties = tl.zeros((), ACC)
    r0 = tl.where(impossible, float("nan"), tl.zeros((), ACC))
    r1 = tl.zeros((), ACC)
    r2 = tl.zeros((), ACC)
    s0 = tl.zeros((BLOCK,), ACC)
    s1 = tl.zeros((BLOCK,), ACC)
    s2 = tl.zeros((BLOCK,), ACC) if SUM_SQ else tl.zeros((), ACC)
    for start in range(begin, end + added, BLOCK):
        _p, token = _entries(ids_ptr, start, end, added, y, BLOCK)
        x = soft_cap(_gather(row_ptr, token, vocab, ACC), inverse_cap, SOFTCAP)
        m, ties, r0, r1, r2, s0, s1, s2 = add_tile(x[None, :], m, ties, r0, r1, r2, s0, s1, s2, scale, SUM_SQ)
    s0 = tl.sum(s0, axis=0) + r0
    s1 = tl.sum(s1, axis=0) + r1
    if SUM_SQ:
        s2 = tl.sum(s2, axis=0) + r2
    m, rest, mean_u, sum_sq = distribution(m, ties, s0, s1, s2, SUM_SQ)
    kept = tl.zeros((), ACC)
    dropped = tl.zeros((), ACC)
    if KEPT:
        delta = kept_threshold(log1p(rest), log_kept, inv_t, KEPT, ACC)
        kept_lanes = tl.zeros((BLOCK,), ACC)
        dropped_lanes = tl.zeros((BLOCK,), ACC)
        for start in range(begin, end + added, BLOCK):
            _p, token = _entries(ids_ptr, start, end, added, y, BLOCK)
            x = soft_cap(_gather(row_ptr, token, vocab, ACC), inverse_cap, SOFTCAP)
            kept_lanes, dropped_lanes = kept_tile(x[None, :], m, delta, scale, kept_lanes, dropped_lanes, KEPT)
        kept, dropped = tl.sum(kept_lanes, axis=0), tl.sum(dropped_lanes, axis=0)
    write_row(
        row_ptr, row, y, has, m, rest, mean_u, sum_sq, kept, dropped, inv_t, inverse_cap,
        logp_ptr, entropy_ptr, lse_ptr, sum_sq_ptr, kept_ptr, state_ptr, vocab, ignore_index, log_kept,
        K, K_BLOCK, SUM_SQ, KEPT, OUTSIDE, SOFTCAP, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=LIST_SHAPE)
def token_stats_listed_backward_kernel(
    logits_ptr, targets_ptr, mask_ptr, temperature_ptr,  # [A, B, V], [N, K], [N], [N]
    ids_ptr, begin_ptr, end_ptr, rows_ptr, place_ptr,  # [size], [lists], [lists], [N], [N]: where a row's gradient begins
    full_state_ptr, g_full_entropy_ptr, g_full_lse_ptr,  # of rows without their lists: [N, 3], [N], [N]
    state_ptr,  # [N, STATE_TARGETS + K]
    g_logp_ptr, g_entropy_ptr, g_lse_ptr, g_sum_sq_ptr, g_kept_ptr,  # [N, K], [N] four times
    values_ptr, whole_ptr, entries_ptr,  # [size + N], the last N at targets that are added; [N]; [N]: -1 for none, or 1 with one
    inner, stride_a, stride_b, lists, size, vocab, temperature, ignore_index, inverse_cap: tl.float64,
    K: tl.constexpr, K_BLOCK: tl.constexpr, HAS_MASK: tl.constexpr, ROW_TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr,
    HAS_ROWS: tl.constexpr, OPEN_EMPTY: tl.constexpr, OUTSIDE: tl.constexpr, HAS_FULL: tl.constexpr,
    HAS_LOGP: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_LSE: tl.constexpr, HAS_SUM_SQ: tl.constexpr, HAS_KEPT: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient at the entries of lists that something flows back into."""
    row = tl.program_id(0)
    row_ptr = logits_ptr + row_start(row, inner, stride_a, stride_b)
    row = row.to(tl.int64)
    _active, flows, y, g_logp, g_entropy, g_lse, g_sum_sq, g_kept = upstream_of(
        row, targets_ptr, mask_ptr, g_logp_ptr, g_entropy_ptr, g_lse_ptr, g_sum_sq_ptr, g_kept_ptr, ignore_index,
        K, K_BLOCK, HAS_MASK, HAS_LOGP, HAS_ENTROPY, HAS_LSE, HAS_SUM_SQ, HAS_KEPT, False, ACC,
    )  # fmt: skip
    if not flows:
        tl.store(whole_ptr + row, flows)
        tl.store(entries_ptr + row, -1)
        return
    begin, end, added, _impossible, whole, _has = _read_list(
        row, y, ids_ptr, begin_ptr, end_ptr, rows_ptr, lists, size, vocab, ignore_index, K_BLOCK, HAS_ROWS, OPEN_EMPTY, OUTSIDE, BLOCK
    )
    tl.store(whole_ptr + row, whole)
    tl.store(entries_ptr + row, tl.where(whole, -1, added))
    if whole:
        return
    inv_t = row_inv_temperature(temperature, temperature_ptr, row, ROW_TEMPERATURE, ACC)
    scale = inv_t * LOG2E
    inverse_cap = tl.full((), inverse_cap, ACC)
    state_row = state_ptr + row * (STATE_TARGETS + K)
    m = tl.load(state_row + STATE_MAX)
    rest, weight, others, _c0, c1, c2, inside, delta = row_coefficients(
        state_row, y, g_logp, g_entropy, g_lse, g_sum_sq, g_kept, inv_t, vocab, ignore_index,
        K, K_BLOCK, HAS_LOGP, HAS_ENTROPY, HAS_SUM_SQ, HAS_KEPT, False, ACC,
    )  # fmt: skip
    full_flows, full_m, f0, f1 = full_coefficients(row, full_state_ptr, g_full_entropy_ptr, g_full_lse_ptr, inv_t, HAS_FULL, ACC)
    place = tl.load(place_ptr + row) if HAS_ROWS else begin
    for start in range(begin, end + added, BLOCK):
        p, token = _entries(ids_ptr, start, end, added, y, BLOCK)
        raw = _gather(row_ptr, token, vocab, ACC)
        x = soft_cap(raw, inverse_cap, SOFTCAP)
        at_y = tl.zeros((BLOCK,), ACC)
        g_sum = tl.zeros((BLOCK,), ACC)
        if HAS_LOGP:
            for k in range(K):  # of targets that are all the same, at_y is g_sum: added in one order
                y_k = tl.load(targets_ptr + row * K + k)
                g_k = tl.where(y_k == ignore_index, 0.0, tl.load(g_logp_ptr + row * K + k))
                at_y += tl.where(token == y_k, g_k, 0.0)
                g_sum += g_k
        dz = at_target(x - m, at_y, g_sum, rest, scale, inv_t, weight, others, c1, c2, inside, delta, HAS_ENTROPY, HAS_SUM_SQ, HAS_KEPT)
        if HAS_FULL:
            dz += tl.where(full_flows, full_gradient(x, full_m, f0, f1, scale), 0.0)
        if SOFTCAP:
            dz *= soft_cap_slope(raw, inverse_cap)
        at = tl.where(p == end, size + row, place + p - begin)
        tl.store(values_ptr + at, dz, mask=(p < end + added) & ((p == end) | (at < size)))


@triton.jit(do_not_specialize=LIST_SHAPE)
def token_stats_scatter_kernel(
    values_ptr, entries_ptr, targets_ptr, out_ptr,  # [size + N], [N], [N, K], [A, B, V]
    ids_ptr, begin_ptr, end_ptr, rows_ptr, place_ptr,  # as above
    inner, out_stride_a, out_stride_b, lists, size, vocab,
    K: tl.constexpr, HAS_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes what the kernel above found. NaN where `values` had no room: only where rows share lists."""
    row = tl.program_id(0)
    row_ptr = out_ptr + row_start(row, inner, out_stride_a, out_stride_b)
    row = row.to(tl.int64)
    added = tl.load(entries_ptr + row)
    if added < 0:
        return
    number = tl.load(rows_ptr + row) if HAS_ROWS else row
    named = (number >= 0) & (number < lists)
    begin = tl.minimum(tl.maximum(tl.load(begin_ptr + number, mask=named, other=0), 0), size)
    end = tl.minimum(tl.load(end_ptr + number, mask=named, other=0), size)
    place = tl.load(place_ptr + row) if HAS_ROWS else begin
    for start in range(begin, end, BLOCK):
        p = start + tl.arange(0, BLOCK)
        token = tl.load(ids_ptr + p, mask=p < end, other=-1).to(tl.int64)
        at = place + p - begin
        dz = tl.load(values_ptr + at, mask=(p < end) & (at < size), other=float("nan"))
        tl.store(row_ptr + token, dz.to(out_ptr.dtype.element_ty), mask=(token >= 0) & (token < vocab))
    if added > 0:
        dz = tl.load(values_ptr + size + row)
        tl.store(row_ptr + tl.load(targets_ptr + row * K), dz.to(out_ptr.dtype.element_ty))


class _Lists(NamedTuple):
    """List j is ids[begin[j] : end[j]]."""

    ids: torch.Tensor
    begin: torch.Tensor
    end: torch.Tensor
    rows: torch.Tensor | None

    @property
    def pointers(self) -> tuple[torch.Tensor, ...]:
        return self.ids, self.begin, self.end, self.begin if self.rows is None else self.rows

    @property
    def sizes(self) -> tuple[int, int]:
        return len(self.begin), len(self.ids)

    def place(self) -> torch.Tensor:
        """[N], where a row's gradient stands in one tensor of all, for rows that name their lists. Two may
        name the same."""
        if self.rows is None:
            return self.begin
        if len(self.begin) == 0:
            return torch.zeros_like(self.rows)
        length = (self.end.clamp(0, len(self.ids)) - self.begin.clamp(0, len(self.ids))).clamp(min=0)
        named = (self.rows >= 0) & (self.rows < len(length))
        length = torch.where(named, length[self.rows.clamp(0, len(length) - 1)], 0)
        return length.cumsum(0) - length


def _lists(keep, n: int) -> _Lists:
    if keep.begin is not None:
        return _Lists(keep.sets, keep.begin, keep.end, keep.rows)
    ids = torch.empty_like(keep.sets)
    begin, end = keep.sets.new_empty((2, n), dtype=torch.int64)
    compact_lists_kernel[(n,)](keep.sets, ids, begin, end, keep.sets.numel() // n, BLOCK=PADDED, num_warps=1)
    return _Lists(ids, begin, end, None)


def _launch(options: dict, keep) -> dict:
    return dict(**options, HAS_ROWS=keep.rows is not None, OPEN_EMPTY=keep.open_empty, OUTSIDE=keep.outside, BLOCK=LIST,
                num_warps=target_warps(options["K_BLOCK"]))  # fmt: skip


def listed_forward(logits, targets, mask, temperature, ignore_index, kept_kind, log_kept, out, softcap, keep, target_kept) -> torch.Tensor:
    """The forward of rows with lists, and of those that do not count. Returns the others, bool [N], over all
    ids."""
    *outputs, state = out
    if outputs[1] is None:
        outputs[1] = torch.empty_like(outputs[2])
    pointers, temperature, inverse_cap, options = stats_options(logits, targets, mask, temperature, state, softcap)
    options |= dict(SUM_SQ=outputs[3] is not None, KEPT=kept_kind)
    whole = logits.new_empty(len(targets), dtype=torch.bool)
    with device_of(logits):
        lists = _lists(keep, len(targets))
        token_stats_listed_kernel[(len(targets),)](
            *pointers, *lists.pointers, target_kept, whole, *(logits if t is None else t for t in outputs), state,
            logits.shape[1], *strides(logits), *lists.sizes, logits.shape[2], temperature, ignore_index, inverse_cap, log_kept,
            **_launch(options, keep),
        )  # fmt: skip
    return whole


class Listed(NamedTuple):
    """The gradient at the entries of lists."""

    whole: torch.Tensor  # bool [N]: rows over all ids
    values: torch.Tensor
    entries: torch.Tensor
    targets: torch.Tensor
    lists: _Lists
    place: torch.Tensor

    def write(self, out: torch.Tensor) -> None:
        """Into out [A, B, V], which is zero there or has another gradient that these are the sum with."""
        with device_of(out):
            token_stats_scatter_kernel[(len(self.targets),)](
                self.values, self.entries, self.targets, out, *self.lists.pointers, self.place, out.shape[1], *strides(out),
                *self.lists.sizes, out.shape[2], K=self.targets.shape[1], HAS_ROWS=self.lists.rows is not None, BLOCK=LIST, num_warps=1,
            )  # fmt: skip


def listed_backward(logits, targets, mask, temperature, ignore_index, kept_kind, state, grads, softcap, keep, full) -> Listed:
    """full: (state, gradients of the entropy and the log-sum-exp) of rows without their lists, or None."""
    pointers, temperature, inverse_cap, options = stats_options(logits, targets, mask, temperature, state, softcap)
    options |= {f"HAS_{name}": g is not None for name, g in zip(("LOGP", "ENTROPY", "LSE", "SUM_SQ", "KEPT"), grads, strict=True)}
    options["HAS_FULL"], full = full is not None, (logits,) * 3 if full is None else full
    n = len(targets)
    with device_of(logits):
        lists = _lists(keep, n)
        values, place = state.new_empty(len(lists.ids) + n), lists.place()
        whole, entries = logits.new_empty(n, dtype=torch.bool), logits.new_empty(n, dtype=torch.int8)
        token_stats_listed_backward_kernel[(n,)](
            *pointers, *lists.pointers, place, *full, state, *(logits if g is None else g for g in grads), values, whole, entries,
            logits.shape[1], *strides(logits), *lists.sizes, logits.shape[2], temperature, ignore_index, inverse_cap,
            **_launch(options, keep),
        )  # fmt: skip
    return Listed(whole, values, entries, targets, lists, place)
