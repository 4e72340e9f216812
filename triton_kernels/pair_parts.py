"""Pairs of rows from those of their parts: segments or ranks that had some columns each.

In float64 throughout, as rlkern/backends/reference_pair_parts.py, which has the formulas. One program a pair,
one lane a part.
"""

import triton
import triton.language as tl

from .constants import (
    PAIR_KIND_FORWARD_KL,
    PAIR_KIND_JSD,
    PAIR_KIND_MIXED_KL,
    PAIR_KIND_REVERSE_KL,
    PAIR_MAX,
    PAIR_MEAN_SLOPE,
    PAIR_MEAN_U,
    PAIR_OFFSET,
    PAIR_OTHER_MAX,
    PAIR_OTHER_MEAN_SLOPE,
    PAIR_OTHER_REF,
    PAIR_OTHER_REST,
    PAIR_REF,
    PAIR_REST,
    PAIR_TARGET,
    PAIR_WIDTH,
    PART_DIVERGENCE,
    PART_OTHER_ENTROPY,
    PART_OTHER_LOGP,
)
from .math import excess, log1p
from .pair_forward import write_no_pair
from .pair_terms import NEAR, bounded, log_ratio
from .rows import NEG_INF, row_inv_temperature, row_targets


@triton.jit
def _column(parts_row, column, part, parts, stride_part, other):
    return tl.load(parts_row + part.to(tl.int64) * stride_part + column, mask=part < parts, other=other).to(tl.float64)


@triton.jit
def _side(m, rest, mean_u, part, inv_t, P_BLOCK: tl.constexpr):
    """Of one distribution (MAX, REST, MEAN_U; of each part whether it is empty, log of its share)"""
    top = tl.max(m, axis=0)
    empty = m == NEG_INF
    d = tl.maximum(tl.where(m == top, 0.0, m - top) * inv_t, -1e300)
    mass = tl.where(empty, 0.0, tl.exp(d) * (1.0 + rest))
    first = tl.min(tl.where(m == top, part, P_BLOCK), axis=0)
    whole = tl.sum(tl.where(part == first, rest, mass), axis=0)
    whole = tl.where(tl.abs(top) == float("inf"), float("nan"), whole)
    log_share = tl.where(empty, NEG_INF, d + log1p(rest) - log1p(whole))
    log_share = tl.where(whole == whole, log_share, float("nan"))
    return top, whole, _mean(empty, log_share, mean_u + d), empty, log_share


@triton.jit
def _mean(empty, log_share, x):
    return tl.sum(tl.where(empty, 0.0, tl.exp(log_share) * x), axis=0)


@triton.jit
def _found(at_target):
    """What the part that has the target says of it, NaN where none has it."""
    here = at_target == at_target
    found = tl.max(tl.where(here, at_target, NEG_INF), axis=0)
    return tl.where(tl.max(here.to(tl.int32), axis=0) > 0, found, float("nan"))


@triton.jit
def _difference(p, q, x):
    """p t, with t = q / p - 1"""
    return tl.where(tl.abs(x) <= NEAR, p * (x + excess(x)), q - p)


@triton.jit
def _logsumexp(m, rest, inv_t):
    return tl.where(m == NEG_INF, NEG_INF, m * inv_t + log1p(rest))


@triton.jit(do_not_specialize=("parts", "stride_part"))
def pair_parts_merge_kernel(
    parts_ptr, mask_ptr, temperature_ptr, other_temperature_ptr,  # [P, N, PairPart.WIDTH], [N] three times
    divergence_ptr, logp_ptr, entropy_ptr, lse_ptr, other_logp_ptr, other_entropy_ptr, other_lse_ptr, state_ptr,  # [N], [N, PAIR_WIDTH]
    parts, stride_part, stride_row, temperature, other_temperature, beta: tl.float64,
    KIND: tl.constexpr, K: tl.constexpr, P_BLOCK: tl.constexpr, HAS_MASK: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr, SAME_TEMPERATURE: tl.constexpr, STATS: tl.constexpr, OTHER: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Outputs and state of one pair, but for the divergence from a mixture."""
    row = tl.program_id(0).to(tl.int64)
    active, _y = row_targets(row, mask_ptr, mask_ptr, 0, 0, 1, HAS_MASK)
    if not active:
        write_no_pair(
            row, divergence_ptr, logp_ptr, entropy_ptr, lse_ptr, other_logp_ptr, other_entropy_ptr, other_lse_ptr, state_ptr, K, STATS, OTHER, ACC
        )
        return
    inv_t = row_inv_temperature(temperature, temperature_ptr, row, ROW_TEMPERATURE, ACC).to(tl.float64)
    other_inv_t = row_inv_temperature(other_temperature, other_temperature_ptr, row, ROW_TEMPERATURE, ACC).to(tl.float64)
    difference = other_inv_t - inv_t
    of_row, part = parts_ptr + row * stride_row, tl.arange(0, P_BLOCK)
    part_m = _column(of_row, PAIR_MAX, part, parts, stride_part, NEG_INF)
    part_other_m = _column(of_row, PAIR_OTHER_MAX, part, parts, stride_part, NEG_INF)
    other_rest = _column(of_row, PAIR_OTHER_REST, part, parts, stride_part, 0.0)
    other_u = log1p(other_rest) - _column(of_row, PART_OTHER_ENTROPY, part, parts, stride_part, 0.0)
    m, rest, mean_u, no_p, log_p = _side(
        part_m, _column(of_row, PAIR_REST, part, parts, stride_part, 0.0), _column(of_row, PAIR_MEAN_U, part, parts, stride_part, 0.0),
        part, inv_t, P_BLOCK,
    )  # fmt: skip
    other_m, other_rest, other_mean_u, no_q, log_q = _side(part_other_m, other_rest, other_u, part, other_inv_t, P_BLOCK)
    p, q, both = tl.exp(log_p), tl.exp(log_q), (no_p == 0) & (no_q == 0)

    # The log ratios of the parts' masses, counted from one part that has much of both.
    refs = _column(of_row, PAIR_REF, part, parts, stride_part, 0.0)
    other_refs = _column(of_row, PAIR_OTHER_REF, part, parts, stride_part, 0.0)
    offsets = _column(of_row, PAIR_OFFSET, part, parts, stride_part, 0.0)
    much = log_p + log_q
    best = part == tl.argmax(tl.where(both & (much == much), much, NEG_INF), axis=0)
    ref = tl.sum(tl.where(best, refs, 0.0), axis=0)
    other_ref = tl.sum(tl.where(best, other_refs, 0.0), axis=0)
    offset = tl.sum(tl.where(best, offsets, 0.0), axis=0)
    lead_p, lead_q = tl.sum(tl.where(best, log_p, 0.0), axis=0), tl.sum(tl.where(best, log_q, 0.0), axis=0)
    d = log_ratio(refs, other_refs, ref, other_ref, inv_t, difference, SAME_TEMPERATURE) - (offsets - offset)
    d = tl.where(both, d, tl.where(no_p == no_q, 0.0, tl.where(no_p, float("inf"), NEG_INF)))
    share = tl.sum(_difference(p, tl.exp(log_q - lead_q + lead_p), bounded(d)), axis=0)
    shift = tl.where(tl.abs(share) < NEAR, log1p(share), lead_p - lead_q)
    x = bounded(tl.where(both, d - shift, d))

    # The frame of whole rows: from the maximum, and OTHER_REF such that OFFSET is what its rounding leaves.
    log_s0, other_log_s0 = log1p(rest), log1p(other_rest)
    apart = tl.max(both.to(tl.int32), axis=0) == 0
    ref, other_ref = tl.where(apart, m, ref), tl.where(apart, other_m, other_ref)
    offset = tl.where(apart, log_s0 - other_log_s0, offset - shift)
    stretch = inv_t / other_inv_t
    balanced = (m * stretch + (other_ref - ref * stretch) - offset / other_inv_t).to(ACC).to(tl.float64)
    offset += log_ratio(m, balanced, ref, other_ref, inv_t, difference, SAME_TEMPERATURE)
    undefined = (rest != rest) | (other_rest != other_rest)
    offset = tl.where(undefined, float("nan"), offset)

    value, slope = rest * 0.0, rest * 0.0
    if KIND < PAIR_KIND_JSD:
        of_part = _column(of_row, PART_DIVERGENCE, part, parts, stride_part, 0.0)
        infinite = both & (of_part == float("inf"))
        phi, gained = excess(x), _difference(p, q, x)
        reverse = tl.sum(tl.where(tl.abs(x) <= NEAR, p * phi, gained - p * x), axis=0)
        forward = tl.sum(tl.where(tl.abs(x) <= NEAR, p * (x * (x + phi) - phi), q * x - gained), axis=0)
        if KIND == PAIR_KIND_REVERSE_KL:
            value = _mean(no_p, log_p, of_part) + reverse
            slope = value
        elif KIND == PAIR_KIND_MIXED_KL:
            slope = _mean(no_p, log_p, _column(of_row, PAIR_MEAN_SLOPE, part, parts, stride_part, 0.0)) + (1.0 - beta) * reverse
            value = slope + _mean(no_q, log_q, _column(of_row, PAIR_OTHER_MEAN_SLOPE, part, parts, stride_part, 0.0)) + beta * forward
        elif KIND == PAIR_KIND_FORWARD_KL:
            value = _mean(no_q, log_q, of_part) + forward
        else:
            value = _mean(no_q, log_q, of_part - log_p)
        if KIND == PAIR_KIND_REVERSE_KL or KIND == PAIR_KIND_MIXED_KL:
            infinite = infinite | ((no_p == 0) & no_q)
        if KIND != PAIR_KIND_REVERSE_KL:
            infinite = infinite | ((no_q == 0) & no_p)
        any_infinite = tl.max(infinite.to(tl.int32), axis=0) > 0
        value = tl.where(undefined, float("nan"), tl.where(any_infinite, float("inf"), value))
        slope = tl.where(undefined | any_infinite, float("nan"), slope)
    tl.store(divergence_ptr + row, value)
    shifted = rest * 0.0
    if STATS:
        tl.store(entropy_ptr + row, log_s0 - mean_u)
        tl.store(lse_ptr + row, _logsumexp(m, rest, inv_t))
    if OTHER:
        tl.store(other_entropy_ptr + row, other_log_s0 - other_mean_u)
        tl.store(other_lse_ptr + row, _logsumexp(other_m, other_rest, other_inv_t))
    if K > 0:
        shifted = _found(_column(of_row, PAIR_TARGET, part, parts, stride_part, float("nan")) + tl.where(no_p, 0.0, part_m - m))
        tl.store(logp_ptr + row, shifted * inv_t - log_s0)
        if OTHER:
            tl.store(other_logp_ptr + row, _found(_column(of_row, PART_OTHER_LOGP, part, parts, stride_part, float("nan")) + log_q))
    state_row = state_ptr + row * PAIR_WIDTH
    tl.store(state_row + PAIR_MAX, m)
    tl.store(state_row + PAIR_REST, rest)
    tl.store(state_row + PAIR_MEAN_U, mean_u)
    tl.store(state_row + PAIR_REF, m)
    tl.store(state_row + PAIR_OTHER_REF, balanced)
    tl.store(state_row + PAIR_OFFSET, offset)
    tl.store(state_row + PAIR_MEAN_SLOPE, slope)
    tl.store(state_row + PAIR_OTHER_MAX, other_m)
    tl.store(state_row + PAIR_OTHER_REST, other_rest)
    tl.store(state_row + PAIR_OTHER_MEAN_SLOPE, value - slope)
    tl.store(state_row + PAIR_TARGET, shifted)
