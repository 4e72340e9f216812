"""Gradient of the divergence and of the row statistics of a pair, by the logits, in one write.

As in token_stats_backward.py a program fetches a row's scalars, then reads and writes TILES tiles. It sums
nothing: 16 bytes move at once from any address, if both rows and the gradient start equally far from a
boundary, and a row's bits do not depend on its tiles.
"""

import triton
import triton.language as tl

from .constants import (
    ELSEWHERE,
    PAIR_KIND_REVERSE_KL,
    PAIR_KIND_SKEW_FORWARD_KL,
    PAIR_MAX,
    PAIR_MEAN_SLOPE,
    PAIR_MEAN_U,
    PAIR_OFFSET,
    PAIR_OTHER_REF,
    PAIR_REF,
    PAIR_REST,
    PAIR_TARGET,
    PAIR_WIDTH,
)
from .gradient import columns, edges, load_upstream, write_zeros
from .math import soft_cap, soft_cap_slope
from .pair_terms import bounded, log_ratio, slope_term
from .rows import BATCH_SHAPE, LN2, LOG2E, NEG_INF, exponent, row_inv_temperature, row_start, row_targets


@triton.jit
def _gradient_tile(
    raw, w, z_ptr, cols, valid, low, high, y, m, scale, inv_t, other_scale, difference, inverse_cap, other_inverse_cap, ref, other_ref, offset,
    q_shift, beta, c0, c1, c_logp, c_slope, at_target,
    KIND: tl.constexpr, SAME_TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr, OTHER_SOFTCAP: tl.constexpr,
    HAS_DIVERGENCE: tl.constexpr, HAS_LOGP: tl.constexpr, HAS_ENTROPY: tl.constexpr,
):  # fmt: skip
    """Writes the gradient at the `valid` of `cols`, all in [low, high); no others."""
    z, w = soft_cap(raw, inverse_cap, SOFTCAP), soft_cap(w, other_inverse_cap, OTHER_SOFTCAP)
    e = tl.exp2((z - m) * scale)
    slopes = e * 0.0
    if HAS_DIVERGENCE:
        x = bounded(log_ratio(z, w, ref, other_ref, inv_t, difference, SAME_TEMPERATURE) + offset)
        q = e
        if KIND != PAIR_KIND_REVERSE_KL:
            q = tl.exp2((w - other_ref) * other_scale + q_shift)
        slopes = c_slope * slope_term(e, q, x, beta, KIND)
    c = c0
    if HAS_ENTROPY:
        c = c + c1 * exponent(z, m, scale)
    dz = e * (c - c_logp) + slopes
    if HAS_LOGP:
        if (y >= low) & (y < high):
            dz = tl.where(cols == y.to(tl.int32), e * c + slopes + at_target, dz)
    if SOFTCAP:
        dz *= soft_cap_slope(raw, inverse_cap)
    dz = tl.where(z == NEG_INF, 0.0 * c0, dz)  # NaN if the row is
    tl.store(z_ptr + cols, dz.to(z_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=BATCH_SHAPE)
def pair_backward_kernel(
    logits_ptr, other_ptr, targets_ptr, mask_ptr, temperature_ptr, other_temperature_ptr,  # [A, B, V] twice, [N] four times
    state_ptr, g_divergence_ptr, g_logp_ptr, g_entropy_ptr, g_lse_ptr, out_ptr,  # [N, PAIR_WIDTH], [N] four times, [A, B, V]
    inner, stride_a, stride_b, other_stride_a, other_stride_b, out_stride_a, out_stride_b, vocab, groups,
    temperature, other_temperature, ignore_index, inverse_cap: tl.float64, other_inverse_cap: tl.float64, beta: tl.float64,
    KIND: tl.constexpr, K: tl.constexpr, K_BLOCK: tl.constexpr, HAS_MASK: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr, SAME_TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr, OTHER_SOFTCAP: tl.constexpr,
    HAS_DIVERGENCE: tl.constexpr, HAS_LOGP: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_LSE: tl.constexpr,
    ACC: tl.constexpr, ALIGN: tl.constexpr, OTHER_ALIGN: tl.constexpr,
    ALIGNED: tl.constexpr,  # every row starts on a 16-byte boundary
    SAME_LEAD: tl.constexpr,  # or at least equally far from one in logits and out
    OTHER_SAME_LEAD: tl.constexpr,  # and in other and out
    EDGES: tl.constexpr,  # some row starts or ends off one
    BLOCK: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = pid // groups
    first = (pid - row * groups) * (TILES * BLOCK)
    start = row_start(row, inner, stride_a, stride_b, ALIGN if ALIGNED else 1)
    other_start = row_start(row, inner, other_stride_a, other_stride_b, OTHER_ALIGN if ALIGNED else 1)
    out_start = row_start(row, inner, out_stride_a, out_stride_b, ALIGN if ALIGNED else 1)
    row = row.to(tl.int64)
    lead, body, body_end, end, last = columns(out_start, first, vocab, ALIGN, ALIGNED, BLOCK, TILES)
    x_ptr = logits_ptr + (tl.multiple_of(start - lead, ALIGN) if SAME_LEAD else start - lead)
    other_x_ptr = other_ptr + (tl.multiple_of(other_start - lead, OTHER_ALIGN) if OTHER_SAME_LEAD else other_start - lead)
    z_ptr = out_ptr + tl.multiple_of(out_start - lead, ALIGN)
    cols = tl.arange(0, BLOCK)
    edge, in_row = edges(lead, body, body_end, end, ALIGN)

    active, targets = row_targets(row, targets_ptr, mask_ptr, ignore_index, K, K_BLOCK, HAS_MASK)
    g_divergence = load_upstream(g_divergence_ptr, row, HAS_DIVERGENCE, ACC)
    g_logp = load_upstream(g_logp_ptr, row, HAS_LOGP, ACC)
    g_entropy = load_upstream(g_entropy_ptr, row, HAS_ENTROPY, ACC)
    g_lse = load_upstream(g_lse_ptr, row, HAS_LSE, ACC)
    if not (active & ((g_divergence != 0) | (g_logp != 0) | (g_entropy != 0) | (g_lse != 0))):
        write_zeros(z_ptr, first, last, edge, in_row, body, body_end, EDGES, BLOCK)
        return

    beta = tl.full((), beta, ACC)
    inv_t = row_inv_temperature(temperature, temperature_ptr, row, ROW_TEMPERATURE, ACC)
    other_inv_t = row_inv_temperature(other_temperature, other_temperature_ptr, row, ROW_TEMPERATURE, ACC)
    difference = other_inv_t - inv_t
    inverse_cap, other_inverse_cap = tl.full((), inverse_cap, ACC), tl.full((), other_inverse_cap, ACC)
    scale = inv_t * LOG2E
    state_row = state_ptr + row * PAIR_WIDTH
    m = tl.load(state_row + PAIR_MAX)
    rest = tl.load(state_row + PAIR_REST)
    ref = tl.load(state_row + PAIR_REF)
    other_ref = tl.load(state_row + PAIR_OTHER_REF)
    offset = tl.load(state_row + PAIR_OFFSET)
    q_shift = (ref - m) * scale + offset * LOG2E  # q in proportion to e
    weight = inv_t / (1.0 + rest)
    c0 = g_lse
    if HAS_ENTROPY:
        c0 += g_entropy * tl.load(state_row + PAIR_MEAN_U)
    if HAS_DIVERGENCE:  # where nobody differentiates it, it may be infinite
        mean_slope = tl.load(state_row + PAIR_MEAN_SLOPE)
        if KIND == PAIR_KIND_SKEW_FORWARD_KL:
            mean_slope = tl.where(mean_slope < 0, mean_slope + (1.0 - beta), mean_slope)
        c0 -= tl.where(g_divergence == 0, 0.0, g_divergence * mean_slope)
    y = tl.zeros((), tl.int32)
    at_target = tl.zeros((), ACC)
    if HAS_LOGP:
        y = tl.sum(targets, axis=0)
        c0 = tl.where(((y < 0) | (y >= vocab)) & (y != ELSEWHERE), float("nan"), c0)
        shifted = tl.load(state_row + PAIR_TARGET)
        # 1 - p without cancellation: at the maximum it is rest / S0, and elsewhere p <= 1/2.
        others = tl.where(shifted == 0, rest / (1.0 + rest), 1.0 - tl.exp2(exponent(shifted, 0.0, scale)) / (1.0 + rest))
        at_target = g_logp * inv_t * others
        y += lead
    c0 *= weight
    c1 = -g_entropy * LN2 * weight  # its exponent is in base 2
    c_logp = g_logp * weight
    c_slope = g_divergence * weight
    other_scale = other_inv_t * LOG2E
    if EDGES:
        if first == 0:
            z = tl.load(x_ptr + edge, mask=in_row).to(ACC)
            w = tl.load(other_x_ptr + edge, mask=in_row).to(ACC)
            _gradient_tile(
                z, w, z_ptr, edge, in_row, 0, end, y, m, scale, inv_t, other_scale, difference, inverse_cap, other_inverse_cap, ref, other_ref,
                offset, q_shift, beta, c0, c1, c_logp, c_slope, at_target,
                KIND, SAME_TEMPERATURE, SOFTCAP, OTHER_SOFTCAP, HAS_DIVERGENCE, HAS_LOGP, HAS_ENTROPY,
            )  # fmt: skip
    for tile in tl.range(first, last, BLOCK, num_stages=STAGES):
        in_body = (tile + cols >= body) & (tile + cols < body_end)
        z = tl.load(x_ptr + tile + cols, mask=in_body).to(ACC)
        w = tl.load(other_x_ptr + tile + cols, mask=in_body).to(ACC)
        _gradient_tile(
            z, w, z_ptr, tile + cols, in_body, tile, tile + BLOCK, y, m, scale, inv_t, other_scale, difference, inverse_cap, other_inverse_cap,
            ref, other_ref, offset, q_shift, beta, c0, c1, c_logp, c_slope, at_target,
            KIND, SAME_TEMPERATURE, SOFTCAP, OTHER_SOFTCAP, HAS_DIVERGENCE, HAS_LOGP, HAS_ENTROPY,
        )  # fmt: skip
