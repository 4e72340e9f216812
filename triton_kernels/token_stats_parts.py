"""Row statistics from those of a row's parts: programs, segments or ranks that had some of its columns each.

A part is relative to its own maximum, and its REST leaves that one's own 1 out. So a confident row keeps its
relative accuracy: the 1 is left out once, for the maximum of the row.
"""

import triton
import triton.language as tl

from .constants import STATE_MAX, STATE_MEAN_U, STATE_REST, STATE_SUM_SQ, STATE_TARGETS
from .math import log1p, sum_scaled
from .rows import LN2, LOG2E, NEG_INF, exponent, row_inv_temperature, row_targets
from .token_stats_forward import distribution, kept_threshold, write_stats, write_targets, write_zeros


@triton.jit
def write_part(part_ptr, m, ties, s0, s1, s2, SUM_SQ: tl.constexpr):
    """The first columns of `State`, from the sums of `sweep`."""
    m, rest, mean_u, sum_sq = distribution(m, ties, s0, s1, s2, SUM_SQ)
    tl.store(part_ptr + STATE_MAX, m)
    tl.store(part_ptr + STATE_REST, rest)
    tl.store(part_ptr + STATE_MEAN_U, mean_u)
    tl.store(part_ptr + STATE_SUM_SQ, sum_sq)


@triton.jit
def merge_parts(parts_row, parts, stride_part, scale, SUM_SQ: tl.constexpr, P_BLOCK: tl.constexpr):
    """(MAX, REST, MEAN_U, SUM_SQ) of a row from its `parts` <= P_BLOCK parts. Of a part with MAX -inf nothing
    counts. NaN as of `distribution`."""
    part = tl.arange(0, P_BLOCK)
    at, present = parts_row + part.to(tl.int64) * stride_part, part < parts
    part_m = tl.load(at + STATE_MAX, mask=present, other=NEG_INF)
    m = tl.max(part_m, axis=0)
    counts = part_m != NEG_INF
    own_rest = tl.load(at + STATE_REST, mask=counts, other=0.0)
    first = tl.min(tl.where(part_m == m, part, P_BLOCK), axis=0)
    t = exponent(part_m, tl.where(m == NEG_INF, 0.0, m), scale)
    shrink = tl.where(counts, tl.exp2(t), 0.0)
    rest = sum_scaled(shrink, tl.where(part == first, own_rest, 1.0 + own_rest))
    mass = shrink * (1.0 + own_rest)
    u = LN2 * t
    linear = sum_scaled(mass, tl.load(at + STATE_MEAN_U, mask=counts, other=0.0) + u)
    nothing = (m == NEG_INF) & (rest == rest)
    rest = tl.where(nothing | (m == float("inf")), float("nan"), rest)
    total = 1.0 + rest
    sum_sq = tl.zeros((), m.dtype)
    if SUM_SQ:
        sum_sq = sum_scaled(mass * mass, tl.load(at + STATE_SUM_SQ, mask=counts, other=0.0)) / (total * total)
    return tl.where(nothing | (m > NEG_INF), m, float("nan")), rest, linear / total, sum_sq


@triton.jit
def _shifted_targets(parts_row, parts, stride_part, m, K: tl.constexpr, K_BLOCK: tl.constexpr):
    """The targets' logits less the row's maximum [K_BLOCK], from the parts that have them; else NaN."""
    k = tl.arange(0, K_BLOCK)
    shifted = tl.full((K_BLOCK,), float("nan"), m.dtype)
    for part in range(parts):
        of_part = parts_row + tl.cast(part, tl.int64) * stride_part
        part_m = tl.load(of_part + STATE_MAX)
        x = tl.load(of_part + STATE_TARGETS + k, mask=k < K, other=float("nan")) + tl.where(part_m == m, 0.0, part_m - m)
        shifted = tl.where((x > shifted) | (shifted != shifted), x, shifted)
    return shifted


@triton.jit(do_not_specialize=("parts", "stride_part"))
def token_stats_merge_kernel(
    parts_ptr, targets_ptr, mask_ptr, temperature_ptr,  # [P, N, STATE_TARGETS + K], [N, K], [N], [N]
    logp_ptr, entropy_ptr, lse_ptr, sum_sq_ptr, state_ptr,  # [N, K], [N] three times, [N, STATE_TARGETS + K]
    parts, stride_part, stride_row, temperature, ignore_index, log_kept: tl.float64,
    K: tl.constexpr, K_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr, HAS_MASK: tl.constexpr, ROW_TEMPERATURE: tl.constexpr,
    SUM_SQ: tl.constexpr, KEPT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Outputs and state of one row, but for what is kept."""
    row = tl.program_id(0).to(tl.int64)
    active, y = row_targets(row, targets_ptr, mask_ptr, ignore_index, K, K_BLOCK, HAS_MASK)
    if not active:
        write_zeros(
            row, state_ptr, logp_ptr, entropy_ptr, lse_ptr, sum_sq_ptr, state_ptr, state_ptr,
            K, K_BLOCK, SUM_SQ, False, None, ACC,
        )  # fmt: skip
        return
    inv_t = row_inv_temperature(temperature, temperature_ptr, row, ROW_TEMPERATURE, ACC)
    parts_row = parts_ptr + row * stride_row
    m, rest, mean_u, sum_sq = merge_parts(parts_row, parts, stride_part, inv_t * LOG2E, SUM_SQ, P_BLOCK)
    log_s0 = log1p(rest)
    zero = tl.zeros((), ACC)
    delta = kept_threshold(log_s0, log_kept, inv_t, KEPT, ACC) if KEPT else zero
    write_stats(row, m, rest, mean_u, sum_sq, log_s0, zero, delta, inv_t, entropy_ptr, lse_ptr, sum_sq_ptr, state_ptr, K, SUM_SQ)
    if K > 0:
        shifted = _shifted_targets(parts_row, parts, stride_part, m, K, K_BLOCK)
        write_targets(row, y, shifted, log_s0, inv_t, logp_ptr, state_ptr, ignore_index, K, K_BLOCK)
