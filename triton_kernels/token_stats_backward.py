"""Gradient of the row statistics: a program fetches a row's scalars, then reads and writes TILES tiles.

It sums nothing: 16 bytes move at once from any address, and a row's bits do not depend on its tiles.

A few targets are set in the tile that holds them: each tile looks at each of them. Where there are many
(FEW_TARGETS, launch.py) the tiles leave them out. A second kernel then writes them, one program a row.
"""

import triton
import triton.language as tl

from .constants import (
    ELSEWHERE,
    OUTSIDE_INCLUDE,
    OUTSIDE_MINUS_INF,
    STATE_KEPT,
    STATE_MAX,
    STATE_MEAN_U,
    STATE_REST,
    STATE_SUM_SQ,
    STATE_TARGETS,
    STATE_THRESHOLD,
)
from .gradient import columns, edges, load_upstream, write_zeros
from .keep import columns_in_set, row_set, run_in_set
from .math import expm1, soft_cap, soft_cap_slope
from .rows import BATCH_SHAPE, FLOOR, LN2, LOG2E, NEG_INF, row_inv_temperature, row_start, row_targets


@triton.jit
def _coefficient(t, e, shifted, c0, c1, c2, inside, delta, HAS_ENTROPY: tl.constexpr, HAS_SUM_SQ: tl.constexpr, HAS_KEPT: tl.constexpr):
    """c of dz = e * c, with e = 2^t = S0 p; terms without an upstream gradient are not there at all."""
    c = c0
    if HAS_ENTROPY:
        c = c + c1 * t
    if HAS_SUM_SQ:
        c = c + c2 * e
    if HAS_KEPT:
        c = c + tl.where(shifted >= delta, inside, 0.0)
    return c


@triton.jit
def at_target(
    shifted_y, at_y, g_sum, rest, scale, inv_t, weight, others, c1, c2, inside, delta,
    HAS_ENTROPY: tl.constexpr, HAS_SUM_SQ: tl.constexpr, HAS_KEPT: tl.constexpr,
):  # fmt: skip
    """The gradient at a target whose entries have upstream gradients of at_y together, all of the row's
    targets g_sum."""
    # 1 - p without cancellation: at the maximum it is rest / S0, and elsewhere p <= 1/2. Of a single target
    # at_y - g_sum is 0. The compiler makes an FMA of the products with weight. What that leaves, 6e-8,
    # is more than a confident row's 1 - p.
    t_y = tl.maximum(shifted_y * scale, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    e_y = tl.exp2(t_y)
    c_y = _coefficient(t_y, e_y, shifted_y, others, c1, c2, inside, delta, HAS_ENTROPY, HAS_SUM_SQ, HAS_KEPT)
    at_max = c_y + weight * (at_y - g_sum) + weight * rest * at_y
    return tl.where(shifted_y == 0, at_max, e_y * (c_y - weight * g_sum) + inv_t * at_y)


@triton.jit
def full_gradient(x, full_m, f0, f1, scale):
    """What the statistics of the whole row send to a column, whatever the row's set."""
    t = tl.maximum((x - full_m) * scale, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    return tl.exp2(t) * (f0 + f1 * t)


@triton.jit
def full_coefficients(row, full_state_ptr, g_full_entropy_ptr, g_full_lse_ptr, inv_t, HAS_FULL: tl.constexpr, ACC: tl.constexpr):
    """(whether anything flows back into the whole row, m, f0, f1 of `full_gradient`)"""
    g_entropy = load_upstream(g_full_entropy_ptr, row, HAS_FULL, ACC)
    g_lse = load_upstream(g_full_lse_ptr, row, HAS_FULL, ACC)
    m = load_upstream(full_state_ptr, 3 * row + STATE_MAX, HAS_FULL, ACC)
    weight = inv_t / (1.0 + load_upstream(full_state_ptr, 3 * row + STATE_REST, HAS_FULL, ACC))
    mean_u = load_upstream(full_state_ptr, 3 * row + STATE_MEAN_U, HAS_FULL, ACC)
    return (g_entropy != 0) | (g_lse != 0), m, (g_lse + g_entropy * mean_u) * weight, -g_entropy * LN2 * weight


@triton.jit
def _gradient_tile(
    raw, x_ptr, z_ptr, cols, valid, low, high, lead, row, m, rest, scale, inv_t, inverse_cap, weight, others, c0, c1, c2, inside, delta, y, g_logp,
    kept, target, has, flows, full_m, f0, f1, full_flows, targets_ptr, state_row, ignore_index,
    K: tl.constexpr, K_BLOCK: tl.constexpr, AT_TARGETS: tl.constexpr, SOFTCAP: tl.constexpr, KEEP: tl.constexpr, OUTSIDE: tl.constexpr,
    HAS_FULL: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_SUM_SQ: tl.constexpr, HAS_KEPT: tl.constexpr,
):  # fmt: skip
    """Writes the gradient at the `valid` of `cols`, all in [low, high), from their logits; no others. kept:
    which are in the row's set. target, has: of `row_set`. full_m, f0, f1: of `full_coefficients`."""
    x = soft_cap(raw, inverse_cap, SOFTCAP)
    shifted = x - m
    t = shifted * scale
    if HAS_ENTROPY:  # the one term that multiplies by t
        t = tl.maximum(t, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp2(t)
    dz = e * _coefficient(t, e, shifted, c0, c1, c2, inside, delta, HAS_ENTROPY, HAS_SUM_SQ, HAS_KEPT)
    if SOFTCAP:
        dz *= soft_cap_slope(raw, inverse_cap)
    if KEEP is not None:
        if OUTSIDE == OUTSIDE_INCLUDE and not AT_TARGETS:
            kept = kept | (cols == target + lead)
        dz = tl.where(kept, dz, 0.0)
    if AT_TARGETS:
        for j in range(K):
            y_j = tl.sum(y, axis=0) if K == 1 else tl.load(targets_ptr + row * K + j)
            if (y_j + lead >= low) & (y_j + lead < high) & (y_j != ignore_index) & (y_j >= 0):
                at_y = tl.sum(tl.where(y == y_j, g_logp, 0.0), axis=0)
                shifted_y = tl.load(state_row + STATE_TARGETS + j)
                g_sum = tl.sum(g_logp, axis=0)
                dz_y = at_target(shifted_y, at_y, g_sum, rest, scale, inv_t, weight, others, c1, c2, inside, delta, HAS_ENTROPY, HAS_SUM_SQ, HAS_KEPT)
                if SOFTCAP:  # the thread that writes it reads it, no other one looks at it: also in place
                    dz_y *= soft_cap_slope(tl.load(x_ptr + y_j + lead).to(dz_y.dtype), inverse_cap)
                if OUTSIDE == OUTSIDE_MINUS_INF:
                    has_j = tl.sum(((tl.arange(0, K_BLOCK) == j) & has).to(tl.int32), axis=0) > 0
                    dz_y = tl.where(has_j, dz_y, 0.0)
                dz = tl.where(cols == (y_j + lead).to(tl.int32), dz_y, dz)
    if HAS_FULL:
        full = full_gradient(x, full_m, f0, f1, scale)
        if SOFTCAP:
            full *= soft_cap_slope(raw, inverse_cap)
        dz = tl.where(flows, dz, 0.0) + tl.where(full_flows, full, 0.0)
    tl.store(z_ptr + cols, dz.to(z_ptr.dtype.element_ty), mask=valid)


@triton.jit
def upstream_of(
    row, targets_ptr, mask_ptr, g_logp_ptr, g_entropy_ptr, g_lse_ptr, g_sum_sq_ptr, g_kept_ptr, ignore_index,
    K: tl.constexpr, K_BLOCK: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LOGP: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_LSE: tl.constexpr,
    HAS_SUM_SQ: tl.constexpr, HAS_KEPT: tl.constexpr, HAS_TAIL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(whether the row counts; whether anything flows back into it; its targets [K_BLOCK]; upstream
    gradients: logp's [K_BLOCK], each statistic's)"""
    active, y = row_targets(row, targets_ptr, mask_ptr, ignore_index, K, K_BLOCK, HAS_MASK)
    g_entropy = load_upstream(g_entropy_ptr, row, HAS_ENTROPY, ACC)
    g_lse = load_upstream(g_lse_ptr, row, HAS_LSE, ACC)
    g_sum_sq = load_upstream(g_sum_sq_ptr, row, HAS_SUM_SQ, ACC)
    g_kept = load_upstream(g_kept_ptr, row, HAS_KEPT or HAS_TAIL, ACC)
    flows = (g_entropy != 0) | (g_lse != 0) | (g_sum_sq != 0) | (g_kept != 0)
    g_logp = tl.zeros((K_BLOCK,), ACC)
    if HAS_LOGP:
        k = tl.arange(0, K_BLOCK)
        g_logp = tl.where(y != ignore_index, tl.load(g_logp_ptr + row * K + k, mask=k < K, other=0.0), 0.0)
        flows = flows | (tl.sum((g_logp != 0).to(tl.int32), axis=0) > 0)
    return active, active & flows, y, g_logp, g_entropy, g_lse, g_sum_sq, g_kept


@triton.jit
def row_coefficients(
    state_row, y, g_logp, g_entropy, g_lse, g_sum_sq, g_kept, inv_t, vocab, ignore_index,
    K: tl.constexpr, K_BLOCK: tl.constexpr, HAS_LOGP: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_SUM_SQ: tl.constexpr,
    HAS_KEPT: tl.constexpr, HAS_TAIL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(rest, weight, others, c0, c1, c2, inside, delta) of dz = e * c. What turns e into p, and the chain
    rule's 1/T, are in them. others: c0 without what comes from the targets' logp, as it is at the targets."""
    rest = tl.load(state_row + STATE_REST)
    c0 = g_lse
    c1 = -g_entropy * LN2  # t is in base 2
    c2 = 2.0 * g_sum_sq
    inside = tl.zeros((), ACC)
    delta = tl.zeros((), ACC)
    if HAS_ENTROPY:
        c0 += g_entropy * tl.load(state_row + STATE_MEAN_U)
    if HAS_SUM_SQ:
        c0 -= c2 * tl.load(state_row + STATE_SUM_SQ)
    if HAS_KEPT:
        log_mass = tl.load(state_row + STATE_KEPT)
        delta = tl.load(state_row + STATE_THRESHOLD)
        g_kept = tl.where(log_mass == NEG_INF, 0.0, g_kept)  # an empty kept set is a constant
        inside = tl.where(g_kept == 0, 0.0, g_kept * tl.exp(-log_mass))
        c0 -= g_kept
    if HAS_TAIL:  # at the targets -1, elsewhere 1 / (1 - S) - 1 = S / (1 - S)
        log_mass = tl.load(state_row + STATE_KEPT)
        g_kept = tl.where(log_mass == NEG_INF, 0.0, g_kept)
    others = c0 - g_kept if HAS_TAIL else c0
    if HAS_LOGP or HAS_TAIL:
        lost = (tl.arange(0, K_BLOCK) < K) & (y != ignore_index) & (y != ELSEWHERE) & ((y < 0) | (y >= vocab))
        undefined = tl.sum(lost.to(tl.int32), axis=0) > 0
        others = tl.where(undefined, float("nan"), others)
        if HAS_TAIL:
            elsewhere = tl.where(g_kept == 0, 0.0, g_kept * expm1(-log_mass))
            c0 = tl.where(undefined, float("nan"), c0 + elsewhere) - tl.sum(g_logp, axis=0)
        else:
            c0 = others - tl.sum(g_logp, axis=0)
    weight = inv_t / (1.0 + rest)
    return rest, weight, others * weight, c0 * weight, c1 * weight, c2 * (weight / (1.0 + rest)), inside * weight, delta


@triton.jit(do_not_specialize=BATCH_SHAPE)
def token_stats_backward_kernel(
    logits_ptr, targets_ptr, mask_ptr, temperature_ptr,  # [A, B, V], [N, K], [N], [N]
    sets_ptr, raw_ptr,  # a `Keep`'s; for SET_AT_LEAST [N, K], the logits at the targets
    full_state_ptr, g_full_entropy_ptr, g_full_lse_ptr,  # of rows without their sets: [N, 3], [N], [N]
    state_ptr,  # [N, STATE_TARGETS + K]
    g_logp_ptr, g_entropy_ptr, g_lse_ptr, g_sum_sq_ptr, g_kept_ptr, out_ptr,  # [N, K], [N] four times, [A, B, V]
    inner, sets_stride_a, sets_stride_b, stride_a, stride_b, out_stride_a, out_stride_b, vocab, groups,
    temperature, ignore_index, inverse_cap: tl.float64,
    K: tl.constexpr, K_BLOCK: tl.constexpr, HAS_MASK: tl.constexpr, ROW_TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr,
    KEEP: tl.constexpr, OUTSIDE: tl.constexpr, SETS_ALIGN: tl.constexpr, HAS_FULL: tl.constexpr,
    HAS_LOGP: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_LSE: tl.constexpr, HAS_SUM_SQ: tl.constexpr, HAS_KEPT: tl.constexpr,
    HAS_TAIL: tl.constexpr,  # g_kept_ptr is of the mass of the ids that are not targets
    ACC: tl.constexpr,
    AT_TARGETS: tl.constexpr,  # the tiles write the targets
    ALIGN: tl.constexpr,
    ALIGNED: tl.constexpr,  # every row starts on a 16-byte boundary
    SAME_LEAD: tl.constexpr,  # or at least equally far from one in logits and out
    EDGES: tl.constexpr,  # some row starts or ends off one
    BLOCK: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = pid // groups
    first = (pid - row * groups) * (TILES * BLOCK)
    start = row_start(row, inner, stride_a, stride_b, ALIGN if ALIGNED else 1)
    out_start = row_start(row, inner, out_stride_a, out_stride_b, ALIGN if ALIGNED else 1)
    set_start = row_start(row, inner, sets_stride_a, sets_stride_b, SETS_ALIGN)
    row = row.to(tl.int64)
    state_row = state_ptr + row * (STATE_TARGETS + K)
    lead, body, body_end, end, last = columns(out_start, first, vocab, ALIGN, ALIGNED, BLOCK, TILES)
    x_ptr = logits_ptr + (tl.multiple_of(start - lead, ALIGN) if SAME_LEAD else start - lead)
    z_ptr = out_ptr + tl.multiple_of(out_start - lead, ALIGN)
    cols = tl.arange(0, BLOCK)
    edge, in_row = edges(lead, body, body_end, end, ALIGN)

    active, flows, y, g_logp, g_entropy, g_lse, g_sum_sq, g_kept = upstream_of(
        row, targets_ptr, mask_ptr, g_logp_ptr, g_entropy_ptr, g_lse_ptr, g_sum_sq_ptr, g_kept_ptr, ignore_index,
        K, K_BLOCK, HAS_MASK, HAS_LOGP, HAS_ENTROPY, HAS_LSE, HAS_SUM_SQ, HAS_KEPT, HAS_TAIL, ACC,
    )  # fmt: skip
    inv_t = row_inv_temperature(temperature, temperature_ptr, row, ROW_TEMPERATURE, ACC)
    full_flows, full_m, f0, f1 = full_coefficients(row, full_state_ptr, g_full_entropy_ptr, g_full_lse_ptr, inv_t, HAS_FULL, ACC)
    full_flows = full_flows & active
    if not (flows | full_flows):
        write_zeros(z_ptr, first, last, edge, in_row, body, body_end, EDGES, BLOCK)
        return

    m = tl.load(state_row + STATE_MAX)
    k = tl.arange(0, K_BLOCK)
    set_row, whole_row, target, has, _target_kept = row_set(
        row, y, raw_ptr + row * K + k, sets_ptr, set_start, vocab, ignore_index, KEEP, OUTSIDE, ACC
    )
    rest, weight, others, c0, c1, c2, inside, delta = row_coefficients(
        state_row, y, g_logp, g_entropy, g_lse, g_sum_sq, g_kept, inv_t, vocab, ignore_index,
        K, K_BLOCK, HAS_LOGP, HAS_ENTROPY, HAS_SUM_SQ, HAS_KEPT, HAS_TAIL, ACC,
    )  # fmt: skip
    scale = inv_t * LOG2E
    inverse_cap = tl.full((), inverse_cap, ACC)
    if EDGES:
        if first == 0:
            x = tl.load(x_ptr + edge, mask=in_row).to(ACC)
            kept = True
            if KEEP is not None:
                kept = columns_in_set(x, edge - lead, in_row, set_row, whole_row, KEEP)
            _gradient_tile(
                x, x_ptr, z_ptr, edge, in_row, 0, end, lead, row, m, rest, scale, inv_t, inverse_cap, weight, others, c0, c1, c2, inside, delta,
                y, g_logp, kept, target, has, flows, full_m, f0, f1, full_flows, targets_ptr, state_row, ignore_index,
                K, K_BLOCK, AT_TARGETS, SOFTCAP, KEEP, OUTSIDE, HAS_FULL, HAS_ENTROPY, HAS_SUM_SQ, HAS_KEPT,
            )  # fmt: skip
    for tile in tl.range(first, last, BLOCK, num_stages=STAGES):
        in_body = (tile + cols >= body) & (tile + cols < body_end)
        x = tl.load(x_ptr + tile + cols, mask=in_body).to(ACC)
        kept = True
        if KEEP is not None:
            kept = run_in_set(x, tile, lead, vocab, set_row, whole_row, KEEP, ALIGNED, BLOCK)
        _gradient_tile(
            x, x_ptr, z_ptr, tile + cols, in_body, tile, tile + BLOCK, lead, row, m, rest, scale, inv_t, inverse_cap, weight, others,
            c0, c1, c2, inside, delta, y, g_logp, kept, target, has, flows, full_m, f0, f1, full_flows, targets_ptr, state_row, ignore_index,
            K, K_BLOCK, AT_TARGETS, SOFTCAP, KEEP, OUTSIDE, HAS_FULL, HAS_ENTROPY, HAS_SUM_SQ, HAS_KEPT,
        )  # fmt: skip


@triton.jit
def _add_equals(y_a, g_a, y_b, g_b):
    return y_b, tl.where(y_a == y_b, g_a + g_b, g_b)


@triton.jit(do_not_specialize=BATCH_SHAPE)
def token_stats_backward_targets_kernel(
    sorted_ptr, order_ptr,  # [N, K], the targets of each row, sorted; where each of them stands in targets
    raw_ptr,  # [N, K], where used: the logits at the targets, over which the gradient may be written by now
    targets_ptr, mask_ptr, temperature_ptr,  # [N, K], [N], [N]
    sets_ptr, full_state_ptr, g_full_entropy_ptr, g_full_lse_ptr,  # as above
    state_ptr,  # [N, STATE_TARGETS + K]
    g_logp_ptr, g_entropy_ptr, g_lse_ptr, g_sum_sq_ptr, g_kept_ptr, out_ptr,  # [N, K], [N] four times, [A, B, V]
    inner, sets_stride_a, sets_stride_b, out_stride_a, out_stride_b, vocab, temperature, ignore_index, inverse_cap: tl.float64,
    K: tl.constexpr, K_BLOCK: tl.constexpr, HAS_MASK: tl.constexpr, ROW_TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr,
    KEEP: tl.constexpr, OUTSIDE: tl.constexpr, SETS_ALIGN: tl.constexpr, HAS_FULL: tl.constexpr,
    HAS_LOGP: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_LSE: tl.constexpr, HAS_SUM_SQ: tl.constexpr, HAS_KEPT: tl.constexpr,
    HAS_TAIL: tl.constexpr,  # g_kept_ptr is of the mass of the ids that are not targets
    ACC: tl.constexpr,
):  # fmt: skip
    """Writes the gradient at a row's targets. Equal ones stand side by side; the last of them has the sum."""
    row = tl.program_id(0)
    out_start = row_start(row, inner, out_stride_a, out_stride_b)
    set_start = row_start(row, inner, sets_stride_a, sets_stride_b, SETS_ALIGN)
    row = row.to(tl.int64)
    _active, flows, y, g_logp, g_entropy, g_lse, g_sum_sq, g_kept = upstream_of(
        row, targets_ptr, mask_ptr, g_logp_ptr, g_entropy_ptr, g_lse_ptr, g_sum_sq_ptr, g_kept_ptr, ignore_index,
        K, K_BLOCK, HAS_MASK, HAS_LOGP, HAS_ENTROPY, HAS_LSE, HAS_SUM_SQ, HAS_KEPT, HAS_TAIL, ACC,
    )  # fmt: skip
    if not flows:
        return
    inv_t = row_inv_temperature(temperature, temperature_ptr, row, ROW_TEMPERATURE, ACC)
    state_row = state_ptr + row * (STATE_TARGETS + K)
    rest, weight, others, _c0, c1, c2, inside, delta = row_coefficients(
        state_row, y, g_logp, g_entropy, g_lse, g_sum_sq, g_kept, inv_t, vocab, ignore_index,
        K, K_BLOCK, HAS_LOGP, HAS_ENTROPY, HAS_SUM_SQ, HAS_KEPT, HAS_TAIL, ACC,
    )  # fmt: skip
    k = tl.arange(0, K_BLOCK)
    y = tl.load(sorted_ptr + row * K + k, mask=k < K, other=ignore_index)
    following = tl.load(sorted_ptr + row * K + k + 1, mask=k + 1 < K, other=ignore_index)
    at = tl.load(order_ptr + row * K + k, mask=k < K, other=0)
    in_vocab = (y != ignore_index) & (y >= 0) & (y < vocab)
    g = tl.load(g_logp_ptr + row * K + at, mask=y != ignore_index, other=0.0) if HAS_LOGP else tl.zeros((K_BLOCK,), ACC)
    shifted_y = tl.load(state_row + STATE_TARGETS + at, mask=in_vocab, other=0.0)
    _y, at_y = tl.associative_scan((y, g), 0, _add_equals)
    # The sum of all in the same order: of targets that are all the same their difference is 0.
    _y, running = tl.associative_scan((tl.zeros_like(y), g), 0, _add_equals)
    g_sum = tl.sum(tl.where(k == K - 1, running, 0.0), axis=0)
    dz = at_target(shifted_y, at_y, g_sum, rest, inv_t * LOG2E, inv_t, weight, others, c1, c2, inside, delta, HAS_ENTROPY, HAS_SUM_SQ, HAS_KEPT)
    at_y = raw_ptr + row * K + at
    inverse_cap = tl.full((), inverse_cap, ACC)
    raw = tl.load(at_y, mask=in_vocab, other=0.0).to(ACC) if SOFTCAP or HAS_FULL else shifted_y
    slope = soft_cap_slope(raw, inverse_cap) if SOFTCAP else 1.0
    dz *= slope
    if OUTSIDE == OUTSIDE_MINUS_INF:
        _set, _whole, _target, has, _target_kept = row_set(row, y, at_y, sets_ptr, set_start, vocab, ignore_index, KEEP, OUTSIDE, ACC)
        dz = tl.where(has, dz, 0.0)
    full_flows, full_m, f0, f1 = full_coefficients(row, full_state_ptr, g_full_entropy_ptr, g_full_lse_ptr, inv_t, HAS_FULL, ACC)
    if HAS_FULL:
        dz += tl.where(full_flows, full_gradient(soft_cap(raw, inverse_cap, SOFTCAP), full_m, f0, f1, inv_t * LOG2E) * slope, 0.0)
    tl.store(out_ptr + out_start + y, dz.to(out_ptr.dtype.element_ty), mask=in_vocab & (y != following))
