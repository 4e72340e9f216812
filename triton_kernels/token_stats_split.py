"""Row statistics of long rows, forward: SPLITS programs sum a run of whole tiles each, then one merges them.

This fills the card in small batches, and the last rows of a large one do not keep it waiting. SPLITS is a
function of V (launch.py), never of the number of rows: a row has the same bits in any batch. With a kept set
the parts are swept once more, when all of them are summed.

A row's parts are [7, SPLITS] in the accumulation dtype: the maximum, how many are equal to it, S0, S1 and S2
of the others, S0 of the kept entries and of the others.
"""

import triton
import triton.language as tl

from .keep import row_set
from .math import sum_scaled
from .rows import BATCH_SHAPE, LOG2E, NEG_INF, exponent, row_inv_temperature, row_start, row_targets
from .token_stats_forward import kept_sweep, kept_threshold, log_total, sweep, write_row, write_target_kept, write_zeros


@triton.jit
def part_of(vocab, part, BLOCK: tl.constexpr, SPLITS: tl.constexpr):
    """First and last column, whole tiles but at the row's end; the last parts of a row may be empty."""
    share = tl.cdiv(tl.cdiv(vocab, BLOCK), SPLITS) * BLOCK
    begin = part * share
    return begin, tl.maximum(begin, tl.minimum(begin + share, vocab))


@triton.jit
def _merge(parts_row, scale, SUM_SQ: tl.constexpr, SPLITS: tl.constexpr):
    """(m, ties, S0, S1, S2) of a row from those of its parts."""
    part = parts_row + tl.arange(0, SPLITS)
    part_m = tl.load(part)
    ties = tl.load(part + SPLITS)
    m = tl.max(part_m, axis=0)
    top = part_m == m
    d = exponent(part_m, tl.where(m == NEG_INF, 0.0, m), scale)
    shrink = tl.exp2(d)
    below = tl.where(top, 0.0, ties)  # the others' maxima are ordinary entries of the row
    s0 = tl.load(part + 2 * SPLITS) + below
    s1 = tl.load(part + 3 * SPLITS) + d * s0
    s2 = sum_scaled(shrink * shrink, tl.load(part + 4 * SPLITS) + below) if SUM_SQ else tl.zeros((), m.dtype)
    return m, tl.sum(tl.where(top, ties, 0.0), axis=0), sum_scaled(shrink, s0), sum_scaled(shrink, s1), s2


@triton.jit(do_not_specialize=BATCH_SHAPE)
def token_stats_part_kernel(
    logits_ptr, targets_ptr, mask_ptr, temperature_ptr,  # [A, B, V], [N, K], [N], [N]
    sets_ptr,  # a `Keep`'s
    parts_ptr,  # [N, 7, SPLITS]
    inner, stride_a, stride_b, sets_stride_a, sets_stride_b, vocab, temperature, ignore_index, inverse_cap: tl.float64,
    K: tl.constexpr, K_BLOCK: tl.constexpr, HAS_MASK: tl.constexpr, ROW_TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr,
    KEEP: tl.constexpr, OUTSIDE: tl.constexpr, SETS_ALIGN: tl.constexpr,
    SUM_SQ: tl.constexpr,
    ACC: tl.constexpr, ALIGN: tl.constexpr, ALIGNED: tl.constexpr, SHIFTED: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The sums of one part of a row."""
    row = tl.program_id(0) // SPLITS
    part = tl.program_id(0) % SPLITS
    row_ptr = logits_ptr + row_start(row, inner, stride_a, stride_b, ALIGN if ALIGNED else 1)
    set_start = row_start(row, inner, sets_stride_a, sets_stride_b, SETS_ALIGN)
    row = row.to(tl.int64)
    active, y = row_targets(row, targets_ptr, mask_ptr, ignore_index, K, K_BLOCK, HAS_MASK)
    if not active:
        return
    set_row, whole_row, target, _has, _target_kept = row_set(row, y, row_ptr + y, sets_ptr, set_start, vocab, ignore_index, KEEP, OUTSIDE, ACC)
    scale = row_inv_temperature(temperature, temperature_ptr, row, ROW_TEMPERATURE, ACC) * LOG2E
    begin, end = part_of(vocab, part, BLOCK, SPLITS)
    m, ties, s0, s1, s2 = sweep(
        row_ptr, begin, end, vocab, scale, tl.full((), inverse_cap, ACC), set_row, whole_row, target,
        SUM_SQ, KEEP, SOFTCAP, ACC, ALIGN, SHIFTED, BLOCK, LANES, STAGES,
    )  # fmt: skip
    out = parts_ptr + row * (7 * SPLITS) + part
    tl.store(out, m)
    tl.store(out + SPLITS, ties)
    tl.store(out + 2 * SPLITS, s0)
    tl.store(out + 3 * SPLITS, s1)
    if SUM_SQ:
        tl.store(out + 4 * SPLITS, s2)


@triton.jit(do_not_specialize=BATCH_SHAPE)
def token_stats_kept_part_kernel(
    logits_ptr, targets_ptr, mask_ptr, temperature_ptr,  # [A, B, V], [N, K], [N], [N]
    sets_ptr,  # a `Keep`'s
    parts_ptr,  # [N, 7, SPLITS]
    listed_ptr,  # [N, K], for KEPT_UNLISTED: the targets of each row that are not ignored, in order
    inner, stride_a, stride_b, sets_stride_a, sets_stride_b, vocab, temperature, ignore_index, inverse_cap: tl.float64, log_kept: tl.float64,
    K: tl.constexpr, K_BLOCK: tl.constexpr, HAS_MASK: tl.constexpr, ROW_TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr,
    KEEP: tl.constexpr, OUTSIDE: tl.constexpr, SETS_ALIGN: tl.constexpr,
    KEPT: tl.constexpr,
    ACC: tl.constexpr, ALIGN: tl.constexpr, ALIGNED: tl.constexpr, SHIFTED: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The kept and the other mass of one part, once the row's maximum and sum are known."""
    row = tl.program_id(0) // SPLITS
    part = tl.program_id(0) % SPLITS
    row_ptr = logits_ptr + row_start(row, inner, stride_a, stride_b, ALIGN if ALIGNED else 1)
    set_start = row_start(row, inner, sets_stride_a, sets_stride_b, SETS_ALIGN)
    row = row.to(tl.int64)
    active, y = row_targets(row, targets_ptr, mask_ptr, ignore_index, K, K_BLOCK, HAS_MASK)
    if not active:
        return
    set_row, whole_row, target, _has, _target_kept = row_set(row, y, row_ptr + y, sets_ptr, set_start, vocab, ignore_index, KEEP, OUTSIDE, ACC)
    inv_t = row_inv_temperature(temperature, temperature_ptr, row, ROW_TEMPERATURE, ACC)
    scale = inv_t * LOG2E
    begin, end = part_of(vocab, part, BLOCK, SPLITS)
    parts_row = parts_ptr + row * (7 * SPLITS)
    m, ties, s0, _s1, _s2 = _merge(parts_row, scale, False, SPLITS)
    _rest, log_s0, _nothing = log_total(m, ties, s0)
    delta = kept_threshold(log_s0, log_kept, inv_t, KEPT, ACC)
    kept, dropped = kept_sweep(
        row_ptr, begin, end, vocab, m, delta, scale, tl.full((), inverse_cap, ACC), listed_ptr + row * K, set_row, whole_row, target,
        K, K_BLOCK, KEPT, KEEP, SOFTCAP, ACC, ALIGN, SHIFTED, BLOCK, LANES,
    )  # fmt: skip
    tl.store(parts_row + 5 * SPLITS + part, kept)
    tl.store(parts_row + 6 * SPLITS + part, dropped)


@triton.jit(do_not_specialize=BATCH_SHAPE)
def token_stats_merge_kernel(
    logits_ptr, targets_ptr, mask_ptr, temperature_ptr,  # [A, B, V], [N, K], [N], [N]
    sets_ptr, target_kept_ptr,  # a `Keep`'s, [N, K]
    parts_ptr,  # [N, 7, SPLITS]
    logp_ptr, entropy_ptr, lse_ptr, sum_sq_ptr, kept_ptr, state_ptr,  # [N, K], [N] four times, [N, STATE_TARGETS + K]
    inner, stride_a, stride_b, sets_stride_a, sets_stride_b, vocab, temperature, ignore_index, inverse_cap: tl.float64, log_kept: tl.float64,
    K: tl.constexpr, K_BLOCK: tl.constexpr, HAS_MASK: tl.constexpr, ROW_TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr,
    KEEP: tl.constexpr, OUTSIDE: tl.constexpr, SETS_ALIGN: tl.constexpr,
    ZEROS: tl.constexpr,  # rows that do not count become zeros; else they stay as they are
    SUM_SQ: tl.constexpr, KEPT: tl.constexpr, ACC: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Outputs and state of one row, from its parts."""
    row = tl.program_id(0)
    row_ptr = logits_ptr + row_start(row, inner, stride_a, stride_b)
    set_start = row_start(row, inner, sets_stride_a, sets_stride_b, SETS_ALIGN)
    row = row.to(tl.int64)
    active, y = row_targets(row, targets_ptr, mask_ptr, ignore_index, K, K_BLOCK, HAS_MASK)
    if not active:
        if ZEROS:
            write_zeros(
                row, target_kept_ptr, logp_ptr, entropy_ptr, lse_ptr, sum_sq_ptr, kept_ptr, state_ptr,
                K, K_BLOCK, SUM_SQ, KEPT, KEEP, ACC,
            )  # fmt: skip
        return
    _set, _whole, _target, has, target_kept = row_set(row, y, row_ptr + y, sets_ptr, set_start, vocab, ignore_index, KEEP, OUTSIDE, ACC)
    write_target_kept(row, target_kept, target_kept_ptr, KEEP, K, K_BLOCK)
    inv_t = row_inv_temperature(temperature, temperature_ptr, row, ROW_TEMPERATURE, ACC)
    parts_row = parts_ptr + row * (7 * SPLITS)
    m, ties, s0, s1, s2 = _merge(parts_row, inv_t * LOG2E, SUM_SQ, SPLITS)
    kept = tl.zeros((), ACC)
    dropped = tl.zeros((), ACC)
    if KEPT:
        kept = tl.sum(tl.load(parts_row + 5 * SPLITS + tl.arange(0, SPLITS)), axis=0)
        dropped = tl.sum(tl.load(parts_row + 6 * SPLITS + tl.arange(0, SPLITS)), axis=0)
    write_row(
        row_ptr, row, y, has, m, ties, s0, s1, s2, kept, dropped, inv_t, tl.full((), inverse_cap, ACC),
        logp_ptr, entropy_ptr, lse_ptr, sum_sq_ptr, kept_ptr, state_ptr, vocab, ignore_index, log_kept,
        K, K_BLOCK, SUM_SQ, KEPT, OUTSIDE, SOFTCAP, ACC,
    )  # fmt: skip
