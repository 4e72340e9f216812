"""Divergences of two rows of logits, forward: one program reads a pair once, for a mixture twice.
Long rows: pair_split.py.

With z the logits and w the others, u = (z - top) / T, e = exp(u) and x = (w - other_ref) / T' - u, it keeps

    P = sum e    X = sum e t    A = sum e (t - x)    B = sum e (x t - t + x)    t = exp(x) - 1

The frame (top, other_ref) moves: top is the maximum, and other_ref such that sum exp((w - other_ref) / T')
was P when the frame last moved. So x is log(q / p) up to a small offset, -log(1 + X / P). To first order in
the offset A / P and B / P do not change: the KL divergences are these, less a term of second order. They keep
their relative accuracy however close the rows are.

A tile has one block-wide reduction: whether it raises a maximum. If so, a uniform branch moves the frame and
the sums. As in token_stats_forward.py the sum P is without the maximum's own 1. What former maxima
contributed to the sums is in r0, rx, ra, rb and r1.
"""

import triton
import triton.language as tl

from .constants import (
    PAIR_KIND_CROSS_ENTROPY,
    PAIR_KIND_FORWARD_KL,
    PAIR_KIND_MIXED_KL,
    PAIR_KIND_REVERSE_KL,
    PAIR_KIND_SKEW_FORWARD_KL,
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
)
from .math import excess, log1p, log1p_gap, soft_cap
from .pair_terms import APART, NEAR, bounded, log_ratio, mixture_terms
from .rows import BATCH_SHAPE, FLOOR, LN2, LOG2E, NEG_INF, exponent, row_inv_temperature, row_start, row_targets
from .token_stats_forward import add_tile, log_total


@triton.jit
def lowest(ACC: tl.constexpr):
    """What a frame is at before any logit: finite, and no logit is lower."""
    if ACC == tl.float64:
        return tl.full((), -1.7976931348623157e308, ACC)
    return tl.full((), -3.4028234663852886e38, ACC)


@triton.jit
def frame_scale(ref, new_ref, inv_t):
    """What exp((z - ref) / T) is multiplied by in a new frame, and its logarithm."""
    log_k = bounded((ref - new_ref) * inv_t)
    return tl.exp2(log_k * LOG2E), log_k


@triton.jit
def balanced(other_m, p_all, q_all, other_inv_t):
    """The other_ref that makes both masses equal, from those seen from the maxima."""
    return other_m + tl.where((p_all > 0) & (q_all > 0), tl.log(q_all) - tl.log(p_all), 0.0) / other_inv_t


@triton.jit
def frame_growth(top, other_ref, new_top, new_ref, inv_t, difference, SAME_TEMPERATURE: tl.constexpr):
    """What is added to every x. With one temperature it is the difference of what log_ratio rounds."""
    lead, new_lead = top - other_ref, new_top - new_ref
    eta = tl.where(tl.maximum(tl.abs(lead), tl.abs(new_lead)) > APART, (new_top - top) - (new_ref - other_ref), new_lead - lead) * inv_t
    if not SAME_TEMPERATURE:
        eta += (other_ref - new_ref) * difference
    return bounded(eta)


@triton.jit
def unless_empty(m, k, log_k, eta, other_ref, new_ref, other_inv_t):
    """(k, log k, eta) of sums up to the maximum m. Without mass of p their unit is the new one already."""
    empty = m == NEG_INF
    return tl.where(empty, 1.0, k), tl.where(empty, 0.0, log_k), tl.where(empty, bounded((other_ref - new_ref) * other_inv_t), eta)


@triton.jit
def moved(p, x, a, b, k, log_k, k_other, eta, KIND: tl.constexpr):
    """(P, X, A, B) in a frame where e is k times as large, exp(x) e is k_other times, and x is larger by eta.
    Small differences by series. The cross entropy has sum e exp(x) u in place of B."""
    near = tl.abs(eta) <= NEAR
    small = tl.where(near, eta, 0.0)
    phi = excess(small)
    growth = tl.where(near, k * (small + phi), k_other - k)
    if KIND == PAIR_KIND_REVERSE_KL or KIND == PAIR_KIND_MIXED_KL:
        a = k * a + growth * x + tl.where(near, k * phi, growth - k * eta) * p
    if KIND == PAIR_KIND_FORWARD_KL or KIND == PAIR_KIND_MIXED_KL:
        b = k_other * (b + eta * x) + tl.where(near, k * (small * (small + phi) - phi), k_other * eta - growth) * p
    if KIND == PAIR_KIND_CROSS_ENTROPY:
        b = tl.fma(k_other, b + log_k * (p + x), 0.0)  # as in sum_scaled
    return k * p, k * x + growth * (x + p), a, b


@triton.jit
def _add_entries(
    z, w, m, top, other_ref, s0, sx, a, b, s1, worst, inv_t, other_inv_t, difference,
    KIND: tl.constexpr, STATS: tl.constexpr, SAME_TEMPERATURE: tl.constexpr, HOLDS_MAX: tl.constexpr,
):  # fmt: skip
    """Adds a tile to the sums of its lanes, in their frame. s0 is P without entries at the maximum, s1 the
    sum of e log2(e). sx is X, but for the reverse KL X - A = sum e x: a select and two products less."""
    e = tl.exp2((z - top) * (inv_t * LOG2E))
    q = tl.exp2((w - other_ref) * (other_inv_t * LOG2E))
    x = bounded(log_ratio(z, w, top, other_ref, inv_t, difference, SAME_TEMPERATURE))
    near = tl.abs(x) <= NEAR
    phi = excess(x)
    s0 += tl.sum(tl.where(z == m, 0.0, e) if HOLDS_MAX else e, axis=0)
    far = q - e
    if KIND == PAIR_KIND_REVERSE_KL:
        sx += tl.sum(e * x, axis=0)
    else:
        sx += tl.sum(tl.where(near, e * (x + phi), far), axis=0)
    if KIND == PAIR_KIND_REVERSE_KL or KIND == PAIR_KIND_MIXED_KL:
        a += tl.sum(tl.where(near, e * phi, far - e * x), axis=0)
    if KIND == PAIR_KIND_FORWARD_KL or KIND == PAIR_KIND_MIXED_KL:
        b += tl.sum(tl.where(near, e * (x * (x + phi) - phi), q * x - far), axis=0)
    if KIND == PAIR_KIND_CROSS_ENTROPY:
        b += tl.sum(q * bounded((z - top) * inv_t), axis=0)
    if STATS:
        s1 += tl.sum(e * exponent(z, top, inv_t * LOG2E), axis=0)
    # Infinite where one row has mass that the other lacks, even mass that underflows.
    if KIND == PAIR_KIND_REVERSE_KL:
        worst = tl.maximum(worst, tl.max(-(w - z), axis=0))
    if KIND == PAIR_KIND_FORWARD_KL or KIND == PAIR_KIND_CROSS_ENTROPY:
        worst = tl.maximum(worst, tl.max(w - z, axis=0))
    if KIND == PAIR_KIND_MIXED_KL:
        worst = tl.maximum(worst, tl.max(tl.abs(w - z), axis=0))
    return s0, sx, a, b, s1, worst


@triton.jit
def _add_pair(
    z, w, m, other_m, other_ref, ties, r0, rx, ra, rb, r1, s0, sx, a, b, s1, worst, inv_t, other_inv_t, difference,
    KIND: tl.constexpr, STATS: tl.constexpr, SAME_TEMPERATURE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Takes a tile of both rows into the running sums."""
    top = tl.maximum(m, lowest(ACC))
    raised = tl.maximum(tl.max(z, axis=0) - top, tl.max(w, axis=0) - tl.maximum(other_m, lowest(ACC)))
    if tl.max(raised, axis=0) >= 0:
        old_m = m
        m = tl.maximum(m, tl.max(tl.max(z, axis=0), axis=0))
        other_m = tl.maximum(other_m, tl.max(tl.max(w, axis=0), axis=0))
        new_top, new_ref = tl.maximum(m, lowest(ACC)), tl.maximum(other_m, lowest(ACC))
        x = sx + a if KIND == PAIR_KIND_REVERSE_KL else sx
        # Both masses so far, this tile's included, seen from the maxima.
        k, log_k = frame_scale(top, new_top, inv_t)
        k_other, _log = frame_scale(other_ref, new_ref, other_inv_t)
        p_tile = tl.sum(tl.sum(tl.exp2((z - new_top) * (inv_t * LOG2E)), axis=0), axis=0)
        q_tile = tl.sum(tl.sum(tl.exp2((w - new_ref) * (other_inv_t * LOG2E)), axis=0), axis=0)
        p_all = p_tile + k * (tl.sum(s0, axis=0) + (r0 + ties))
        q_all = q_tile + k_other * (tl.sum(s0 + x, axis=0) + (r0 + ties + rx))
        new_ref = balanced(new_ref, p_all, q_all, other_inv_t)

        k_other, _log = frame_scale(other_ref, new_ref, other_inv_t)
        eta = frame_growth(top, other_ref, new_top, new_ref, inv_t, difference, SAME_TEMPERATURE)
        k, log_k, eta = unless_empty(old_m, k, log_k, eta, other_ref, new_ref, other_inv_t)
        if STATS:
            d = tl.maximum(log_k * LOG2E, FLOOR)
            r1 = k * (r1 + d * (r0 + ties))
            s1 = k * (s1 + d * s0)
        s0, x, a, b = moved(s0, x, a, b, k, log_k, k_other, eta, KIND)
        sx = x - a if KIND == PAIR_KIND_REVERSE_KL else x
        all0, rx, ra, rb = moved(r0 + ties, rx, ra, rb, k, log_k, k_other, eta, KIND)
        r0 = tl.where(m > old_m, all0, r0)
        ties = tl.where(m > old_m, 0.0, ties)
        if m > NEG_INF:
            ties += tl.sum(tl.sum((z == m).to(ties.dtype), axis=0), axis=0)
        top, other_ref = new_top, new_ref
        s0, sx, a, b, s1, worst = _add_entries(
            z, w, m, top, other_ref, s0, sx, a, b, s1, worst, inv_t, other_inv_t, difference, KIND, STATS, SAME_TEMPERATURE, True
        )
    else:
        s0, sx, a, b, s1, worst = _add_entries(
            z, w, m, top, other_ref, s0, sx, a, b, s1, worst, inv_t, other_inv_t, difference, KIND, STATS, SAME_TEMPERATURE, False
        )
    return m, other_m, other_ref, ties, r0, rx, ra, rb, r1, s0, sx, a, b, s1, worst


# A tile is [BLOCK / LANES, LANES]. A thread holds whole lanes: sums over axis 0 stay inside it. Of aligned
# rows a lane is one load of 16 bytes, elsewhere neighbouring threads load neighbouring elements. So the last
# bits depend on whether rows start on 16 bytes.


@triton.jit
def _columns(BLOCK: tl.constexpr, LANES: tl.constexpr, ALIGNED: tl.constexpr):
    line, lane = tl.arange(0, BLOCK // LANES)[:, None], tl.arange(0, LANES)[None, :]
    return lane * (BLOCK // LANES) + line if ALIGNED else line * LANES + lane


@triton.jit
def pair_sweep(
    row_ptr, other_row_ptr, begin, end, inv_t, other_inv_t, difference, inverse_cap, other_inverse_cap,
    KIND: tl.constexpr, STATS: tl.constexpr, OTHER: tl.constexpr, SAME_TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr,
    OTHER_SOFTCAP: tl.constexpr, ACC: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums over the columns [begin, end), begin a whole number of tiles: (m, other_m, other_ref, how many are
    equal to m, P of the others, X, A, B, S1, the largest log ratio that may be infinite); and of the other
    row as in token_stats_forward.py (maximum, how many are equal to it, S0 and S1 of the others)."""
    columns = _columns(BLOCK, LANES, ALIGNED)
    zero = tl.zeros((), ACC)
    m = zero + NEG_INF
    other_m = zero + NEG_INF
    other_ref = lowest(ACC)
    ties, r0, rx, ra, rb, r1 = zero, zero, zero, zero, zero, zero
    s0 = tl.zeros((LANES,), ACC)
    sx = tl.zeros((LANES,), ACC)
    a = tl.zeros((LANES,), ACC) if KIND == PAIR_KIND_REVERSE_KL or KIND == PAIR_KIND_MIXED_KL else zero
    b = tl.zeros((LANES,), ACC) if KIND == PAIR_KIND_FORWARD_KL or KIND == PAIR_KIND_MIXED_KL or KIND == PAIR_KIND_CROSS_ENTROPY else zero
    s1 = tl.zeros((LANES,), ACC) if STATS else zero
    worst = tl.full((LANES,), NEG_INF, ACC)
    own_m = zero + NEG_INF
    own_ties, o0, o1, o2, own2 = zero, zero, zero, zero, zero
    own0 = tl.zeros((LANES,), ACC) if OTHER else zero
    own1 = tl.zeros((LANES,), ACC) if OTHER else zero
    whole = tl.maximum(begin, end // BLOCK * BLOCK)
    for i in tl.range(begin, whole, BLOCK, num_stages=STAGES):
        z = soft_cap(tl.load(row_ptr + i + columns).to(ACC), inverse_cap, SOFTCAP)
        w = soft_cap(tl.load(other_row_ptr + i + columns).to(ACC), other_inverse_cap, OTHER_SOFTCAP)
        m, other_m, other_ref, ties, r0, rx, ra, rb, r1, s0, sx, a, b, s1, worst = _add_pair(
            z, w, m, other_m, other_ref, ties, r0, rx, ra, rb, r1, s0, sx, a, b, s1, worst, inv_t, other_inv_t, difference,
            KIND, STATS, SAME_TEMPERATURE, ACC,
        )  # fmt: skip
        if OTHER:
            own_m, own_ties, o0, o1, o2, own0, own1, own2 = add_tile(w, own_m, own_ties, o0, o1, o2, own0, own1, own2, other_inv_t * LOG2E, False)
    if whole < end:
        z = soft_cap(tl.load(row_ptr + whole + columns, mask=whole + columns < end, other=NEG_INF).to(ACC), inverse_cap, SOFTCAP)
        w = tl.load(other_row_ptr + whole + columns, mask=whole + columns < end, other=NEG_INF).to(ACC)
        w = soft_cap(w, other_inverse_cap, OTHER_SOFTCAP)
        m, other_m, other_ref, ties, r0, rx, ra, rb, r1, s0, sx, a, b, s1, worst = _add_pair(
            z, w, m, other_m, other_ref, ties, r0, rx, ra, rb, r1, s0, sx, a, b, s1, worst, inv_t, other_inv_t, difference,
            KIND, STATS, SAME_TEMPERATURE, ACC,
        )  # fmt: skip
        if OTHER:
            own_m, own_ties, o0, o1, o2, own0, own1, own2 = add_tile(w, own_m, own_ties, o0, o1, o2, own0, own1, own2, other_inv_t * LOG2E, False)
    rx += tl.sum(sx + a if KIND == PAIR_KIND_REVERSE_KL else sx, axis=0)
    if KIND == PAIR_KIND_REVERSE_KL or KIND == PAIR_KIND_MIXED_KL:
        ra += tl.sum(a, axis=0)
    if KIND == PAIR_KIND_FORWARD_KL or KIND == PAIR_KIND_MIXED_KL or KIND == PAIR_KIND_CROSS_ENTROPY:
        rb += tl.sum(b, axis=0)
    if STATS:
        r1 += tl.sum(s1, axis=0)
    if OTHER:
        o0 += tl.sum(own0, axis=0)
        o1 += tl.sum(own1, axis=0)
    return (
        m, other_m, other_ref, ties, r0 + tl.sum(s0, axis=0), rx, ra, rb, r1, tl.max(worst, axis=0),
        own_m, own_ties, o0, o1,
    )  # fmt: skip


@triton.jit
def mixture_sweep(
    row_ptr, other_row_ptr, begin, end, beta, top, other_ref, offset, inv_t, other_inv_t, difference, inverse_cap, other_inverse_cap,
    KIND: tl.constexpr, SAME_TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr, OTHER_SOFTCAP: tl.constexpr, ACC: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(sum e f, sum e g) over the columns [begin, end), once the row's offset is known"""
    columns = _columns(BLOCK, LANES, ALIGNED)
    f = tl.zeros((LANES,), ACC)
    g = tl.zeros((LANES,), ACC)
    whole = tl.maximum(begin, end // BLOCK * BLOCK)
    for i in tl.range(begin, whole, BLOCK, num_stages=STAGES):
        z = soft_cap(tl.load(row_ptr + i + columns, eviction_policy="evict_first").to(ACC), inverse_cap, SOFTCAP)
        w = tl.load(other_row_ptr + i + columns, eviction_policy="evict_first").to(ACC)
        w = soft_cap(w, other_inverse_cap, OTHER_SOFTCAP)
        f, g = _add_mixture(z, w, f, g, beta, top, other_ref, offset, inv_t, other_inv_t, difference, KIND, SAME_TEMPERATURE)
    if whole < end:
        z = soft_cap(tl.load(row_ptr + whole + columns, mask=whole + columns < end, other=NEG_INF).to(ACC), inverse_cap, SOFTCAP)
        w = tl.load(other_row_ptr + whole + columns, mask=whole + columns < end, other=NEG_INF).to(ACC)
        w = soft_cap(w, other_inverse_cap, OTHER_SOFTCAP)
        f, g = _add_mixture(z, w, f, g, beta, top, other_ref, offset, inv_t, other_inv_t, difference, KIND, SAME_TEMPERATURE)
    return tl.sum(f, axis=0), tl.sum(g, axis=0)


@triton.jit
def _add_mixture(
    z, w, f, g, beta, top, other_ref, offset, inv_t, other_inv_t, difference, KIND: tl.constexpr, SAME_TEMPERATURE: tl.constexpr
):  # fmt: skip
    e = tl.exp2((z - top) * (inv_t * LOG2E))
    q = tl.exp2((w - other_ref) * (other_inv_t * LOG2E) + offset * LOG2E)
    ratio = bounded(log_ratio(z, w, top, other_ref, inv_t, difference, SAME_TEMPERATURE) + offset)
    f_tile, g_tile = mixture_terms(e, q, ratio, beta, KIND)
    return f + tl.sum(f_tile, axis=0), g + tl.sum(g_tile, axis=0)


@triton.jit
def pair_totals(m, other_m, ties, s0, x):
    """(P - 1, log P, X / P, the offset, whether a row is all -inf), NaN where a row is no distribution"""
    rest, log_s0, nothing = log_total(m, ties, s0)
    xi = x / (1.0 + rest)
    xi = tl.where(tl.abs(other_m) == float("inf"), float("nan"), xi)
    return rest, log_s0, xi, -log1p(xi), nothing


@triton.jit
def _value(rest, log_s0, xi, a, b, worst, f, g, beta, KIND: tl.constexpr):
    """(divergence, sum p g)"""
    total = 1.0 + rest
    gap = tl.where(tl.abs(xi) <= NEAR, log1p_gap(tl.where(tl.abs(xi) <= NEAR, xi, 0.0)), xi - log1p(xi))
    if KIND == PAIR_KIND_REVERSE_KL:
        value = a / total - gap
        slope = value
    elif KIND == PAIR_KIND_FORWARD_KL:
        value = (b / total - (xi * xi - (1.0 + xi) * gap)) / (1.0 + xi)
        slope = value * 0.0
    elif KIND == PAIR_KIND_MIXED_KL:
        reverse = tl.maximum(a / total - gap, 0.0)
        forward = (b / total - (xi * xi - (1.0 + xi) * gap)) / (1.0 + xi)
        slope = (1.0 - beta) * reverse
        value = beta * tl.maximum(forward, 0.0) + slope
    elif KIND == PAIR_KIND_CROSS_ENTROPY:
        value = log_s0 - b / (total * (1.0 + xi))
        slope = value * 0.0
    else:
        value, slope = f / total, g / total
    if KIND != PAIR_KIND_CROSS_ENTROPY:
        value = tl.maximum(value, 0.0)
    if KIND == PAIR_KIND_REVERSE_KL:
        slope = value
    infinite = worst == float("inf")
    undefined = (xi != xi) | (rest != rest)
    value = tl.where(undefined, float("nan"), tl.where(infinite, float("inf"), value))
    return value, tl.where(undefined | infinite, float("nan"), slope)


@triton.jit
def _write_logp(row_ptr, out_ptr, row, y, m, log_s0, inv_t, inverse_cap, vocab, SOFTCAP: tl.constexpr, ACC: tl.constexpr):
    """The log-probability of the target, and what state holds of it"""
    inside = (y >= 0) & (y < vocab)
    shifted = soft_cap(tl.load(row_ptr + y, mask=inside, other=float("nan")).to(ACC), inverse_cap, SOFTCAP) - m
    tl.store(out_ptr + row, shifted * inv_t - log_s0)
    return shifted


@triton.jit
def write_pair(
    row_ptr, other_row_ptr, row, y, m, other_m, other_ref, ties, s0, x, a, b, s1, worst, own_m, own_ties, own0, own1, f, g, beta, inv_t, other_inv_t,
    inverse_cap, other_inverse_cap,
    divergence_ptr, logp_ptr, entropy_ptr, lse_ptr, other_logp_ptr, other_entropy_ptr, other_lse_ptr, state_ptr, vocab, ignore_index,
    KIND: tl.constexpr, K: tl.constexpr, STATS: tl.constexpr, OTHER: tl.constexpr,
    SOFTCAP: tl.constexpr, OTHER_SOFTCAP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    rest, log_s0, xi, offset, nothing = pair_totals(m, other_m, ties, s0, x)
    value, slope = _value(rest, log_s0, xi, a, b, worst, f, g, beta, KIND)
    state_row = state_ptr + row * PAIR_WIDTH
    zero = tl.zeros((), ACC)
    mean_u = zero
    shifted = zero
    tl.store(divergence_ptr + row, value)
    if STATS:
        mean_u = LN2 * s1 / (1.0 + rest)
        tl.store(entropy_ptr + row, log_s0 - mean_u)
        tl.store(lse_ptr + row, tl.where(nothing, NEG_INF, m * inv_t + log_s0))
    if K > 0:
        shifted = _write_logp(row_ptr, logp_ptr, row, y, m, log_s0, inv_t, inverse_cap, vocab, SOFTCAP, ACC)
    other_rest = zero
    other_slope = zero
    if OTHER:
        other_rest, other_log_s0, nothing = log_total(own_m, own_ties, own0)
        other_slope = value - slope
        tl.store(other_entropy_ptr + row, other_log_s0 - LN2 * own1 / (1.0 + other_rest))
        tl.store(other_lse_ptr + row, tl.where(nothing, NEG_INF, own_m * other_inv_t + other_log_s0))
        if K > 0:
            _write_logp(other_row_ptr, other_logp_ptr, row, y, own_m, other_log_s0, other_inv_t, other_inverse_cap, vocab, OTHER_SOFTCAP, ACC)
    tl.store(state_row + PAIR_MAX, m)
    tl.store(state_row + PAIR_REST, rest)
    tl.store(state_row + PAIR_MEAN_U, mean_u)
    tl.store(state_row + PAIR_REF, m)
    tl.store(state_row + PAIR_OTHER_REF, other_ref)
    tl.store(state_row + PAIR_OFFSET, offset)
    # Not below 0 by rounding: of this kind the sign says something.
    tl.store(state_row + PAIR_MEAN_SLOPE, tl.maximum(slope, 0.0, propagate_nan=tl.PropagateNan.ALL) if KIND == PAIR_KIND_SKEW_FORWARD_KL else slope)
    tl.store(state_row + PAIR_OTHER_MAX, own_m if OTHER else zero)
    tl.store(state_row + PAIR_OTHER_REST, other_rest)
    tl.store(state_row + PAIR_OTHER_MEAN_SLOPE, other_slope)
    tl.store(state_row + PAIR_TARGET, shifted)


@triton.jit
def write_no_pair(
    row, divergence_ptr, logp_ptr, entropy_ptr, lse_ptr, other_logp_ptr, other_entropy_ptr, other_lse_ptr, state_ptr,
    K: tl.constexpr, STATS: tl.constexpr, OTHER: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Zeros, for a row that is skipped."""
    zero = tl.zeros((), ACC)
    tl.store(divergence_ptr + row, zero)
    if STATS:
        tl.store(entropy_ptr + row, zero)
        tl.store(lse_ptr + row, zero)
    if K > 0:
        tl.store(logp_ptr + row, zero)
    if OTHER:
        tl.store(other_entropy_ptr + row, zero)
        tl.store(other_lse_ptr + row, zero)
        if K > 0:
            tl.store(other_logp_ptr + row, zero)
    for i in tl.static_range(PAIR_WIDTH):
        tl.store(state_ptr + row * PAIR_WIDTH + i, zero)


@triton.jit(do_not_specialize=BATCH_SHAPE)
def pair_forward_kernel(
    logits_ptr, other_ptr, targets_ptr, mask_ptr, temperature_ptr, other_temperature_ptr,  # [A, B, V] twice, [N] four times
    divergence_ptr, logp_ptr, entropy_ptr, lse_ptr, other_logp_ptr, other_entropy_ptr, other_lse_ptr, state_ptr,  # [N], [N, PAIR_WIDTH]
    inner, stride_a, stride_b, other_stride_a, other_stride_b, vocab, temperature, other_temperature, ignore_index,
    inverse_cap: tl.float64, other_inverse_cap: tl.float64, beta: tl.float64,
    KIND: tl.constexpr, K: tl.constexpr, K_BLOCK: tl.constexpr, HAS_MASK: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr, SAME_TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr, OTHER_SOFTCAP: tl.constexpr,
    STATS: tl.constexpr,  # the entropy, and what comes with it
    OTHER: tl.constexpr,  # the same of the other row
    MIXTURE: tl.constexpr,  # the divergence takes a second sweep
    ACC: tl.constexpr, ALIGN: tl.constexpr, OTHER_ALIGN: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One pair of rows a program."""
    row = tl.program_id(0)
    row_ptr = logits_ptr + row_start(row, inner, stride_a, stride_b, ALIGN if ALIGNED else 1)
    other_row_ptr = other_ptr + row_start(row, inner, other_stride_a, other_stride_b, OTHER_ALIGN if ALIGNED else 1)
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
    difference = other_inv_t - inv_t
    inverse_cap, other_inverse_cap = tl.full((), inverse_cap, ACC), tl.full((), other_inverse_cap, ACC)
    m, other_m, other_ref, ties, s0, x, a, b, s1, worst, own_m, own_ties, own0, own1 = pair_sweep(
        row_ptr, other_row_ptr, 0, vocab, inv_t, other_inv_t, difference, inverse_cap, other_inverse_cap,
        KIND, STATS, OTHER, SAME_TEMPERATURE, SOFTCAP, OTHER_SOFTCAP, ACC, ALIGNED, BLOCK, LANES, STAGES,
    )  # fmt: skip
    f = tl.zeros((), ACC)
    g = tl.zeros((), ACC)
    if MIXTURE:
        _rest, _log_s0, _xi, offset, _nothing = pair_totals(m, other_m, ties, s0, x)
        f, g = mixture_sweep(
            row_ptr, other_row_ptr, 0, vocab, beta, m, other_ref, offset, inv_t, other_inv_t, difference, inverse_cap, other_inverse_cap,
            KIND, SAME_TEMPERATURE, SOFTCAP, OTHER_SOFTCAP, ACC, ALIGNED, BLOCK, LANES, STAGES,
        )  # fmt: skip
    write_pair(
        row_ptr, other_row_ptr, row, tl.sum(y, axis=0), m, other_m, other_ref, ties, s0, x, a, b, s1, worst,
        own_m, own_ties, own0, own1, f, g, beta, inv_t, other_inv_t, inverse_cap, other_inverse_cap,
        divergence_ptr, logp_ptr, entropy_ptr, lse_ptr, other_logp_ptr, other_entropy_ptr, other_lse_ptr, state_ptr, vocab, ignore_index,
        KIND, K, STATS, OTHER, SOFTCAP, OTHER_SOFTCAP, ACC,
    )  # fmt: skip
