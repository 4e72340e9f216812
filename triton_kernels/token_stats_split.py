"""Row statistics of long rows, forward: SPLITS programs sum a run of whole tiles each, then one merges them.

This fills the card in small batches, and the last rows of a large one do not keep it waiting. SPLITS is a
function of V (launch.py), never of the number of rows: a row has the same bits in any batch. With a kept set
the parts are swept once more, when all of them are summed.

In the accumulation dtype a row's parts are [SPLITS, STATE_KEPT], the first columns of `State`, and its masses
[SPLITS, 2]: S0 of the kept entries and of the others.
"""

import triton
import triton.language as tl

from .constants import STATE_KEPT, STATE_MAX, STATE_TARGETS, STATE_THRESHOLD
from .keep import row_set
from .math import log1p
from .rows import BATCH_SHAPE, LOG2E, row_inv_temperature, row_start, row_targets
from .token_stats_forward import kept_sweep, kept_threshold, sweep, write_row, write_target_kept, write_zeros
from .token_stats_parts import merge_parts, write_part


@triton.jit
def part_of(vocab, part, BLOCK: tl.constexpr, SPLITS: tl.constexpr):
    """First and last column, whole tiles but at the row's end; the last parts of a row may be empty."""
    share = tl.cdiv(tl.cdiv(vocab, BLOCK), SPLITS) * BLOCK
    begin = part * share
    return begin, tl.maximum(begin, tl.minimum(begin + share, vocab))


@triton.jit(do_not_specialize=BATCH_SHAPE)
def token_stats_part_kernel(
    logits_ptr, targets_ptr, mask_ptr, temperature_ptr,  # [A, B, V], [N, K], [N], [N]
    sets_ptr,  # a `Keep`'s
    parts_ptr,  # [N, SPLITS, STATE_KEPT]
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
    write_part(parts_ptr + (row * SPLITS + part) * STATE_KEPT, m, ties, s0, s1, s2, SUM_SQ)


@triton.jit
def _write_masses(masses_ptr, part, kept, dropped):
    tl.store(masses_ptr + 2 * part, kept)
    tl.store(masses_ptr + 2 * part + 1, dropped)


@triton.jit(do_not_specialize=BATCH_SHAPE)
def token_stats_kept_part_kernel(
    logits_ptr, targets_ptr, mask_ptr, temperature_ptr,  # [A, B, V], [N, K], [N], [N]
    sets_ptr,  # a `Keep`'s
    of_row_ptr,  # the row's parts [N, SPLITS, STATE_KEPT], or its state [N, STATE_TARGETS + K]
    masses_ptr,  # [N, SPLITS, 2]
    listed_ptr,  # [N, K], for KEPT_UNLISTED: the targets of each row that are not ignored, in order
    inner, stride_a, stride_b, sets_stride_a, sets_stride_b, vocab, temperature, ignore_index, inverse_cap: tl.float64, log_kept: tl.float64,
    K: tl.constexpr, K_BLOCK: tl.constexpr, HAS_MASK: tl.constexpr, ROW_TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr,
    KEEP: tl.constexpr, OUTSIDE: tl.constexpr, SETS_ALIGN: tl.constexpr,
    KEPT: tl.constexpr,
    FROM_STATE: tl.constexpr,
    ACC: tl.constexpr, ALIGN: tl.constexpr, ALIGNED: tl.constexpr, SHIFTED: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The kept and the other mass of one part, once the row's maximum and sum are known. From a state, the
    columns may be a part of a row themselves. Rows that do not count then get zeros."""
    row = tl.program_id(0) // SPLITS
    part = tl.program_id(0) % SPLITS
    row_ptr = logits_ptr + row_start(row, inner, stride_a, stride_b, ALIGN if ALIGNED else 1)
    set_start = row_start(row, inner, sets_stride_a, sets_stride_b, SETS_ALIGN)
    row = row.to(tl.int64)
    active, y = row_targets(row, targets_ptr, mask_ptr, ignore_index, K, K_BLOCK, HAS_MASK)
    if not active:
        if FROM_STATE:
            _write_masses(masses_ptr, row * SPLITS + part, tl.zeros((), ACC), tl.zeros((), ACC))
        return
    set_row, whole_row, target, _has, _target_kept = row_set(row, y, row_ptr + y, sets_ptr, set_start, vocab, ignore_index, KEEP, OUTSIDE, ACC)
    inv_t = row_inv_temperature(temperature, temperature_ptr, row, ROW_TEMPERATURE, ACC)
    scale = inv_t * LOG2E
    begin, end = part_of(vocab, part, BLOCK, SPLITS)
    if FROM_STATE:
        state_row = of_row_ptr + row * (STATE_TARGETS + K)
        m, delta = tl.load(state_row + STATE_MAX), tl.load(state_row + STATE_THRESHOLD)
    else:
        m, rest, _u, _sq = merge_parts(of_row_ptr + row * (SPLITS * STATE_KEPT), SPLITS, STATE_KEPT, scale, False, SPLITS)
        delta = kept_threshold(log1p(rest), log_kept, inv_t, KEPT, ACC)
    kept, dropped = kept_sweep(
        row_ptr, begin, end, vocab, m, delta, scale, tl.full((), inverse_cap, ACC), listed_ptr + row * K, set_row, whole_row, target,
        K, K_BLOCK, KEPT, KEEP, SOFTCAP, ACC, ALIGN, SHIFTED, BLOCK, LANES,
    )  # fmt: skip
    _write_masses(masses_ptr, row * SPLITS + part, kept, dropped)


@triton.jit(do_not_specialize=BATCH_SHAPE)
def token_stats_split_merge_kernel(
    logits_ptr, targets_ptr, mask_ptr, temperature_ptr,  # [A, B, V], [N, K], [N], [N]
    sets_ptr, target_kept_ptr,  # a `Keep`'s, [N, K]
    parts_ptr, masses_ptr,  # [N, SPLITS, STATE_KEPT], [N, SPLITS, 2]
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
    m, rest, mean_u, sum_sq = merge_parts(parts_ptr + row * (SPLITS * STATE_KEPT), SPLITS, STATE_KEPT, inv_t * LOG2E, SUM_SQ, SPLITS)
    kept = tl.zeros((), ACC)
    dropped = tl.zeros((), ACC)
    if KEPT:
        masses = masses_ptr + (row * SPLITS + tl.arange(0, SPLITS)) * 2
        kept, dropped = tl.sum(tl.load(masses), axis=0), tl.sum(tl.load(masses + 1), axis=0)
    write_row(
        row_ptr, row, y, has, m, rest, mean_u, sum_sq, kept, dropped, inv_t, tl.full((), inverse_cap, ACC),
        logp_ptr, entropy_ptr, lse_ptr, sum_sq_ptr, kept_ptr, state_ptr, vocab, ignore_index, log_kept,
        K, K_BLOCK, SUM_SQ, KEPT, OUTSIDE, SOFTCAP, ACC,
    )  # fmt: skip
