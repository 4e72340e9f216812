"""Divergences of long rows, forward: SPLITS programs sum a run of whole tiles each, then one merges them.

As in token_stats_split.py. Two rows at once are long at half the vocabulary. The divergences from a mixture
sweep the parts once more, when the offset of the whole pair is known. So do the shards of a vocabulary, which
other processes sum.

A pair's parts are [PARTS, SPLITS] in the accumulation dtype: what pair_sweep returns, then the two sums of
mixture_sweep.
"""

import triton
import triton.language as tl

from .constants import PAIR_MAX, PAIR_OFFSET, PAIR_OTHER_REF, PAIR_REST, PAIR_WIDTH
from .math import sum_scaled
from .pair_forward import (
    balanced,
    frame_growth,
    frame_scale,
    lowest,
    mixture_sweep,
    moved,
    pair_sweep,
    pair_totals,
    unless_empty,
    write_no_pair,
    write_pair,
)
from .rows import BATCH_SHAPE, FLOOR, LOG2E, NEG_INF, exponent, row_inv_temperature, row_start, row_targets
from .token_stats_split import part_of

PARTS = tl.constexpr(16)


@triton.jit
def _merge(parts_row, inv_t, other_inv_t, difference, KIND: tl.constexpr, SAME_TEMPERATURE: tl.constexpr, ACC: tl.constexpr, SPLITS: tl.constexpr):
    """What pair_sweep returns of a pair, but for the other row's own, from that of its parts."""
    part = parts_row + tl.arange(0, SPLITS)
    part_m = tl.load(part)
    other_m = tl.max(tl.load(part + SPLITS), axis=0)
    part_ref = tl.load(part + 2 * SPLITS)
    ties = tl.load(part + 3 * SPLITS)
    s0 = tl.load(part + 4 * SPLITS)
    x = tl.load(part + 5 * SPLITS)
    a = tl.load(part + 6 * SPLITS)
    b = tl.load(part + 7 * SPLITS)
    s1 = tl.load(part + 8 * SPLITS)
    worst = tl.max(tl.load(part + 9 * SPLITS), axis=0)
    m = tl.max(part_m, axis=0)
    part_top, top = tl.maximum(part_m, lowest(ACC)), tl.maximum(m, lowest(ACC))
    k, log_k = frame_scale(part_top, top, inv_t)
    other_ref = tl.maximum(other_m, lowest(ACC))
    k_other, _log = frame_scale(part_ref, other_ref, other_inv_t)
    p_all = sum_scaled(k, s0 + ties)
    q_all = sum_scaled(k_other, s0 + ties + x)
    other_ref = balanced(other_ref, p_all, q_all, other_inv_t)
    k_other, _log = frame_scale(part_ref, other_ref, other_inv_t)
    eta = frame_growth(part_top, part_ref, top, other_ref, inv_t, difference, SAME_TEMPERATURE)
    k, log_k, eta = unless_empty(part_m, k, log_k, eta, part_ref, other_ref, other_inv_t)
    # The others' maxima are ordinary entries of the row.
    at_top = part_m == m
    s1 = sum_scaled(k, s1 + tl.maximum(log_k * LOG2E, FLOOR) * (s0 + ties))
    p, x, a, b = moved(s0 + ties, x, a, b, k, log_k, k_other, eta, KIND)
    s0 = tl.where(at_top, s0, p)
    return (
        m, other_m, other_ref, tl.sum(tl.where(at_top, ties, 0.0), axis=0), tl.sum(s0, axis=0),
        tl.sum(x, axis=0), tl.sum(a, axis=0), tl.sum(b, axis=0), s1, worst,
    )  # fmt: skip


@triton.jit
def _merge_other(parts_row, scale, SPLITS: tl.constexpr):
    """The other row's own (maximum, how many are equal to it, S0 and S1 of the others)"""
    part = parts_row + 10 * SPLITS + tl.arange(0, SPLITS)
    part_m = tl.load(part)
    ties = tl.load(part + SPLITS)
    m = tl.max(part_m, axis=0)
    d = exponent(part_m, tl.where(m == NEG_INF, 0.0, m), scale)
    s0 = tl.load(part + 2 * SPLITS) + tl.where(part_m == m, 0.0, ties)
    s1 = tl.load(part + 3 * SPLITS) + d * s0
    k = tl.exp2(d)
    return m, tl.sum(tl.where(part_m == m, ties, 0.0), axis=0), sum_scaled(k, s0), sum_scaled(k, s1)


@triton.jit(do_not_specialize=BATCH_SHAPE)
def pair_part_kernel(
    logits_ptr, other_ptr, targets_ptr, mask_ptr, temperature_ptr, other_temperature_ptr,  # [A, B, V] twice, [N] four times
    parts_ptr,  # [N, PARTS, SPLITS]
    inner, stride_a, stride_b, other_stride_a, other_stride_b, vocab, temperature, other_temperature, ignore_index,
    inverse_cap: tl.float64, other_inverse_cap: tl.float64,
    KIND: tl.constexpr, K: tl.constexpr, K_BLOCK: tl.constexpr, HAS_MASK: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr, SAME_TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr, OTHER_SOFTCAP: tl.constexpr,
    STATS: tl.constexpr, OTHER: tl.constexpr,
    ACC: tl.constexpr, ALIGN: tl.constexpr, OTHER_ALIGN: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The sums of one part of a pair."""
    row = tl.program_id(0) // SPLITS
    part = tl.program_id(0) % SPLITS
    row_ptr = logits_ptr + row_start(row, inner, stride_a, stride_b, ALIGN if ALIGNED else 1)
    other_row_ptr = other_ptr + row_start(row, inner, other_stride_a, other_stride_b, OTHER_ALIGN if ALIGNED else 1)
    row = row.to(tl.int64)
    active, _y = row_targets(row, targets_ptr, mask_ptr, ignore_index, K, K_BLOCK, HAS_MASK)
    if not active:
        return
    inv_t = row_inv_temperature(temperature, temperature_ptr, row, ROW_TEMPERATURE, ACC)
    other_inv_t = row_inv_temperature(other_temperature, other_temperature_ptr, row, ROW_TEMPERATURE, ACC)
    begin, end = part_of(vocab, part, BLOCK, SPLITS)
    m, other_m, other_ref, ties, s0, x, a, b, s1, worst, own_m, own_ties, own0, own1 = pair_sweep(
        row_ptr, other_row_ptr, begin, end, inv_t, other_inv_t, other_inv_t - inv_t,
        tl.full((), inverse_cap, ACC), tl.full((), other_inverse_cap, ACC),
        KIND, STATS, OTHER, SAME_TEMPERATURE, SOFTCAP, OTHER_SOFTCAP, ACC, ALIGNED, BLOCK, LANES, STAGES,
    )  # fmt: skip
    out = parts_ptr + row * (PARTS * SPLITS) + part
    tl.store(out, m)
    tl.store(out + SPLITS, other_m)
    tl.store(out + 2 * SPLITS, other_ref)
    tl.store(out + 3 * SPLITS, ties)
    tl.store(out + 4 * SPLITS, s0)
    tl.store(out + 5 * SPLITS, x)
    tl.store(out + 6 * SPLITS, a)
    tl.store(out + 7 * SPLITS, b)
    tl.store(out + 8 * SPLITS, s1)
    tl.store(out + 9 * SPLITS, worst)
    if OTHER:
        tl.store(out + 10 * SPLITS, own_m)
        tl.store(out + 11 * SPLITS, own_ties)
        tl.store(out + 12 * SPLITS, own0)
        tl.store(out + 13 * SPLITS, own1)


@triton.jit(do_not_specialize=BATCH_SHAPE)
def pair_mixture_part_kernel(
    logits_ptr, other_ptr, targets_ptr, mask_ptr, temperature_ptr, other_temperature_ptr,  # [A, B, V] twice, [N] four times
    parts_ptr,  # [N, PARTS, SPLITS]
    inner, stride_a, stride_b, other_stride_a, other_stride_b, vocab, temperature, other_temperature, ignore_index,
    inverse_cap: tl.float64, other_inverse_cap: tl.float64, beta: tl.float64,
    KIND: tl.constexpr, K: tl.constexpr, K_BLOCK: tl.constexpr, HAS_MASK: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr, SAME_TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr, OTHER_SOFTCAP: tl.constexpr,
    ACC: tl.constexpr, ALIGN: tl.constexpr, OTHER_ALIGN: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The sums of f and g over one part, once the pair's offset is known."""
    row = tl.program_id(0) // SPLITS
    part = tl.program_id(0) % SPLITS
    row_ptr = logits_ptr + row_start(row, inner, stride_a, stride_b, ALIGN if ALIGNED else 1)
    other_row_ptr = other_ptr + row_start(row, inner, other_stride_a, other_stride_b, OTHER_ALIGN if ALIGNED else 1)
    row = row.to(tl.int64)
    active, _y = row_targets(row, targets_ptr, mask_ptr, ignore_index, K, K_BLOCK, HAS_MASK)
    if not active:
        return
    beta = tl.full((), beta, ACC)
    inv_t = row_inv_temperature(temperature, temperature_ptr, row, ROW_TEMPERATURE, ACC)
    other_inv_t = row_inv_temperature(other_temperature, other_temperature_ptr, row, ROW_TEMPERATURE, ACC)
    difference = other_inv_t - inv_t
    begin, end = part_of(vocab, part, BLOCK, SPLITS)
    parts_row = parts_ptr + row * (PARTS * SPLITS)
    m, other_m, other_ref, ties, s0, x, _a, _b, _s1, _worst = _merge(
        parts_row, inv_t, other_inv_t, difference, KIND, SAME_TEMPERATURE, ACC, SPLITS
    )  # fmt: skip
    _rest, _log_s0, _xi, offset, _nothing = pair_totals(m, other_m, ties, s0, x)
    f, g = mixture_sweep(
        row_ptr, other_row_ptr, begin, end, beta, m, other_ref, offset, inv_t, other_inv_t, difference,
        tl.full((), inverse_cap, ACC), tl.full((), other_inverse_cap, ACC),
        KIND, SAME_TEMPERATURE, SOFTCAP, OTHER_SOFTCAP, ACC, ALIGNED, BLOCK, LANES, STAGES,
    )  # fmt: skip
    tl.store(parts_row + 14 * SPLITS + part, f)
    tl.store(parts_row + 15 * SPLITS + part, g)


@triton.jit(do_not_specialize=BATCH_SHAPE)
def pair_mixture_sums_kernel(
    logits_ptr, other_ptr, targets_ptr, mask_ptr, temperature_ptr, other_temperature_ptr,  # [A, B, V] twice, [N] four times
    state_ptr, sums_ptr,  # [N, PAIR_WIDTH], [N, 2]
    inner, stride_a, stride_b, other_stride_a, other_stride_b, vocab, temperature, other_temperature, ignore_index,
    inverse_cap: tl.float64, other_inverse_cap: tl.float64, beta: tl.float64,
    KIND: tl.constexpr, K: tl.constexpr, K_BLOCK: tl.constexpr, HAS_MASK: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr, SAME_TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr, OTHER_SOFTCAP: tl.constexpr,
    ACC: tl.constexpr, ALIGN: tl.constexpr, OTHER_ALIGN: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """sum p f and sum p g over some columns, from the state of whole rows."""
    row = tl.program_id(0)
    row_ptr = logits_ptr + row_start(row, inner, stride_a, stride_b, ALIGN if ALIGNED else 1)
    other_row_ptr = other_ptr + row_start(row, inner, other_stride_a, other_stride_b, OTHER_ALIGN if ALIGNED else 1)
    row = row.to(tl.int64)
    out = sums_ptr + 2 * row
    active, _y = row_targets(row, targets_ptr, mask_ptr, ignore_index, K, K_BLOCK, HAS_MASK)
    if not active:
        tl.store(out, tl.zeros((), ACC))
        tl.store(out + 1, tl.zeros((), ACC))
        return
    beta = tl.full((), beta, ACC)
    inv_t = row_inv_temperature(temperature, temperature_ptr, row, ROW_TEMPERATURE, ACC)
    other_inv_t = row_inv_temperature(other_temperature, other_temperature_ptr, row, ROW_TEMPERATURE, ACC)
    state_row = state_ptr + row * PAIR_WIDTH
    m = tl.load(state_row + PAIR_MAX)
    other_ref = tl.load(state_row + PAIR_OTHER_REF)
    offset = tl.load(state_row + PAIR_OFFSET)
    f, g = mixture_sweep(
        row_ptr, other_row_ptr, 0, vocab, beta, m, other_ref, offset, inv_t, other_inv_t, other_inv_t - inv_t,
        tl.full((), inverse_cap, ACC), tl.full((), other_inverse_cap, ACC),
        KIND, SAME_TEMPERATURE, SOFTCAP, OTHER_SOFTCAP, ACC, ALIGNED, BLOCK, LANES, STAGES,
    )  # fmt: skip
    # NaN where a row is no distribution.
    total = tl.where(offset == offset, 1.0 + tl.load(state_row + PAIR_REST), float("nan"))
    tl.store(out, f / total)
    tl.store(out + 1, g / total)


@triton.jit(do_not_specialize=BATCH_SHAPE)
def pair_merge_kernel(
    logits_ptr, other_ptr, targets_ptr, mask_ptr, temperature_ptr, other_temperature_ptr,  # [A, B, V] twice, [N] four times
    parts_ptr,  # [N, PARTS, SPLITS]
    divergence_ptr, logp_ptr, entropy_ptr, lse_ptr, other_logp_ptr, other_entropy_ptr, other_lse_ptr, state_ptr,  # [N], [N, PAIR_WIDTH]
    inner, stride_a, stride_b, other_stride_a, other_stride_b, vocab, temperature, other_temperature, ignore_index,
    inverse_cap: tl.float64, other_inverse_cap: tl.float64, beta: tl.float64,
    KIND: tl.constexpr, K: tl.constexpr, K_BLOCK: tl.constexpr, HAS_MASK: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr, SAME_TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr, OTHER_SOFTCAP: tl.constexpr,
    STATS: tl.constexpr, OTHER: tl.constexpr, MIXTURE: tl.constexpr,
    ACC: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Outputs and state of one pair, from its parts."""
    row = tl.program_id(0)
    row_ptr = logits_ptr + row_start(row, inner, stride_a, stride_b)
    other_row_ptr = other_ptr + row_start(row, inner, other_stride_a, other_stride_b)
    row = row.to(tl.int64)
    active, y = row_targets(row, targets_ptr, mask_ptr, ignore_index, K, K_BLOCK, HAS_MASK)
    if not active:
        write_no_pair(
            row, divergence_ptr, logp_ptr, entropy_ptr, lse_ptr, other_logp_ptr, other_entropy_ptr, other_lse_ptr, state_ptr, K, STATS, OTHER, ACC
        )
        return
    beta = tl.full((), beta, ACC)
    inv_t = row_inv_temperature(temperature, temperature_ptr, row, ROW_TEMPERATURE, ACC)
    other_inv_t = row_inv_temperature(other_temperature, other_temperature_ptr, row, ROW_TEMPERATURE, ACC)
    parts_row = parts_ptr + row * (PARTS * SPLITS)
    m, other_m, other_ref, ties, s0, x, a, b, s1, worst = _merge(
        parts_row, inv_t, other_inv_t, other_inv_t - inv_t, KIND, SAME_TEMPERATURE, ACC, SPLITS
    )  # fmt: skip
    zero = tl.zeros((), ACC)
    own_m, own_ties, own0, own1 = zero, zero, zero, zero
    if OTHER:
        own_m, own_ties, own0, own1 = _merge_other(parts_row, other_inv_t * LOG2E, SPLITS)
    f = zero
    g = zero
    if MIXTURE:
        f = tl.sum(tl.load(parts_row + 14 * SPLITS + tl.arange(0, SPLITS)), axis=0)
        g = tl.sum(tl.load(parts_row + 15 * SPLITS + tl.arange(0, SPLITS)), axis=0)
    write_pair(
        row_ptr, other_row_ptr, row, tl.sum(y, axis=0), m, other_m, other_ref, ties, s0, x, a, b, s1, worst,
        own_m, own_ties, own0, own1, f, g, beta, inv_t, other_inv_t,
        tl.full((), inverse_cap, ACC), tl.full((), other_inverse_cap, ACC),
        divergence_ptr, logp_ptr, entropy_ptr, lse_ptr, other_logp_ptr, other_entropy_ptr, other_lse_ptr, state_ptr, vocab, ignore_index,
        KIND, K, STATS, OTHER, SOFTCAP, OTHER_SOFTCAP, ACC,
    )  # fmt: skip
