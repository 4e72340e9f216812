"""Row statistics of logits, forward: one program reads a row once. Long rows: token_stats_split.py.

Per thread and element it keeps S0 = sum 2^t and S1 = sum t 2^t with t = (x - m) log2(e) / T and m the
running maximum. A tile needs one block-wide reduction, its maximum. A tile that raises the maximum takes a
uniform branch: the sums are rescaled, and the entries equal to the maximum are counted and taken out. So S0
never holds the maximum's own 1, and a confident row keeps its relative accuracy.

Which element meets which in a sum depends on its column alone, never on the row's address or number: a row
has the same bits in any batch. Rows may start off a 16-byte boundary. To load 16 bytes at once, the lines of
a tile are then rotated. With `lead` elements between the boundary and the row, lane e of a line holds its
column e - lead. The first `lead` lanes hold its last columns, which stand where the next line begins. A tile
has the same columns, and a lane's sum the same terms, as without a lead. At the end the lanes' sums are put
in order.
"""

import triton
import triton.language as tl

from .constants import (
    KEPT_MIN_P,
    KEPT_UNLISTED,
    OUTSIDE_MINUS_INF,
    SET_BITS,
    STATE_KEPT,
    STATE_MAX,
    STATE_MEAN_U,
    STATE_REST,
    STATE_SUM_SQ,
    STATE_TARGETS,
    STATE_THRESHOLD,
)
from .keep import row_set, set_tile, tile_in_set
from .math import log1p, soft_cap
from .rows import BATCH_SHAPE, FLOOR, LN2, LOG2E, NEG_INF, exponent, row_inv_temperature, row_start, row_targets


@triton.jit
def add_tile(x, m, ties, r0, r1, r2, s0, s1, s2, scale, SUM_SQ: tl.constexpr):
    """Takes a tile into the running sums; r0, r1, r2 hold what former maxima contributed."""
    tile_max = tl.max(tl.max(x, axis=0), axis=0)
    if tile_max >= m:
        if tile_max > m:
            # The lowest float is used as a mask like -inf, and overflows here.
            d = tl.where(m == NEG_INF, 0.0, tl.maximum((m - tile_max) * scale, FLOOR))
            shrink = tl.exp2(d)
            r1 = shrink * (r1 + d * (r0 + ties))
            r0 = shrink * (r0 + ties)
            s1 = shrink * (s1 + d * s0)
            s0 = shrink * s0
            if SUM_SQ:
                r2 = shrink * shrink * (r2 + ties)
                s2 = shrink * shrink * s2
            m = tile_max
            ties = ties * 0.0
        if tile_max > NEG_INF:
            ties += tl.sum(tl.sum((x == tile_max).to(ties.dtype), axis=0), axis=0)
            x = tl.where(x == tile_max, NEG_INF, x)
    t = exponent(x, tl.where(m == NEG_INF, 0.0, m), scale)
    e = tl.exp2(t)
    s0 += tl.sum(e, axis=0)
    s1 += tl.sum(e * t, axis=0)
    if SUM_SQ:
        s2 += tl.sum(e * e, axis=0)
    return m, ties, r0, r1, r2, s0, s1, s2


@triton.jit
def _add_entry(x, m, ties, s0, s1, s2, scale, SUM_SQ: tl.constexpr):
    """Takes one more entry into the sums of a row."""
    if x > m:
        d = tl.maximum((m - x) * scale, FLOOR)
        shrink = tl.exp2(d)
        s1 = shrink * (s1 + d * (s0 + ties))
        s0 = shrink * (s0 + ties)
        if SUM_SQ:
            s2 = shrink * shrink * (s2 + ties)
        m = x
        ties = ties * 0.0 + 1.0
    else:
        top = (x == m) & (x > NEG_INF)
        t = exponent(x, tl.where(m == NEG_INF, 0.0, m), scale)
        e = tl.where(top, 0.0, tl.exp2(t))
        ties += tl.where(top, 1.0, 0.0)
        s0 += e
        s1 += e * t
        if SUM_SQ:
            s2 += e * e
    return m, ties, s0, s1, s2


@triton.jit
def kept_tile(x, m, delta, scale, kept, dropped, KEPT: tl.constexpr):
    e = tl.exp2(exponent(x, m, scale))
    if KEPT == KEPT_UNLISTED:  # the others are not in x
        return kept + tl.sum(e, axis=0), dropped
    inside = x - m >= delta
    return kept + tl.sum(tl.where(inside, e, 0.0), axis=0), dropped + tl.sum(tl.where(inside, 0.0, e), axis=0)


# A tile is [BLOCK / LANES, LANES]. A thread holds whole loads of a line: sums over axis 0 stay inside it.


@triton.jit
def row_boundary(row_ptr, ALIGN: tl.constexpr, SHIFTED: tl.constexpr):
    """(what loads count from: the row, if SHIFTED the 16-byte boundary before it; elements between them)"""
    lead = tl.zeros((), tl.int32)
    if SHIFTED:
        lead = (row_ptr.to(tl.int64) % 16 // (16 // ALIGN)).to(tl.int32)
    return tl.multiple_of(row_ptr - lead, 16) if SHIFTED else row_ptr, lead


@triton.jit
def whole_tile(boundary, i, lead, ALIGN: tl.constexpr, SHIFTED: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    line = tl.arange(0, BLOCK // LANES)[:, None]
    replaced = tl.cdiv(lead, ALIGN) * ALIGN  # lanes, whole loads of them
    if not SHIFTED:
        x = tl.load(boundary + i + line * LANES + tl.arange(0, LANES)[None, :], eviction_policy="evict_first")
    elif ALIGN != 8:
        lane = tl.arange(0, LANES)[None, :]
        at = boundary + i + line * LANES + lane
        x = tl.load(at, eviction_policy="evict_first")
        x = tl.where(lane < lead, tl.load(at + LANES, mask=lane < replaced), x)
    else:  # two elements to a word, and one instruction for both
        word = tl.arange(0, LANES // 2)[None, :]
        at = tl.multiple_of(boundary.to(tl.pointer_type(tl.int32)), 16) + i // 2 + line * (LANES // 2) + word
        following = tl.load(at + LANES // 2, mask=word < replaced // 2, other=0)
        bits = tl.where(2 * word + 1 < lead, -1, tl.where(2 * word < lead, 0xFFFF, 0))
        pair = (tl.load(at, eviction_policy="evict_first") & ~bits) | (following & bits)
        dtype = boundary.dtype.element_ty
        low, high = pair.to(tl.int16).to(dtype, bitcast=True), (pair >> 16).to(tl.int16).to(dtype, bitcast=True)
        x = tl.reshape(tl.join(low, high), (BLOCK // LANES, LANES))
    return x


@triton.jit
def last_tile(boundary, i, lead, end, SHIFTED: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """The same, element by element: nothing outside of the row is read. Both loads are contiguous along a
    line. If they were not, Triton 3.6 would keep each sum in several threads, which all write it to shared
    memory at once."""
    lane = tl.arange(0, LANES)[None, :]
    at = i + tl.arange(0, BLOCK // LANES)[:, None] * LANES + lane
    x = tl.load(boundary + at, mask=(lane >= lead) & (at - lead < end), other=NEG_INF)
    if SHIFTED:
        following = tl.load(boundary + at + LANES, mask=(lane < lead) & (at + LANES - lead < end), other=NEG_INF)
        x = tl.where(lane < lead, following, x)
    return x


@triton.jit
def end_of_whole_tiles(begin, end, vocab, ALIGN: tl.constexpr, SHIFTED: tl.constexpr, BLOCK: tl.constexpr):
    """A shifted tile loads up to ALIGN - 1 elements behind its last column: they must be the row's. More than
    one tile may be left."""
    return tl.maximum(begin, (tl.minimum(end, vocab - (ALIGN - 1)) if SHIFTED else end) // BLOCK * BLOCK)


CAN_SHIFT = hasattr(tl, "gather")  # Triton 3.2 has none: rows that start off a boundary are read by elements

if CAN_SHIFT:

    @triton.jit
    def _rotate(s, lead, LANES: tl.constexpr):
        return tl.gather(s, (tl.arange(0, LANES) + lead) % LANES, 0)

else:

    @triton.jit
    def _rotate(s, lead, LANES: tl.constexpr):
        return s


@triton.jit
def sum_lanes(s, lead, SHIFTED: tl.constexpr, LANES: tl.constexpr):
    """In the order of the columns."""
    return tl.sum(_rotate(s, lead, LANES) if SHIFTED else s, axis=0)


@triton.jit
def sweep(
    row_ptr, begin, end, vocab, scale, inverse_cap, set_row, whole_row, target,
    SUM_SQ: tl.constexpr, KEEP: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr,
    ALIGN: tl.constexpr, SHIFTED: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums over the columns [begin, end), begin a whole number of tiles: (m, how many are equal to m, S0, S1,
    S2 of the others). set_row, whole_row, target: of `row_set`, if KEEP."""
    boundary, lead = row_boundary(row_ptr, ALIGN, SHIFTED)
    m = tl.full((), NEG_INF, ACC)
    ties = tl.zeros((), ACC)
    r0 = tl.zeros((), ACC)
    r1 = tl.zeros((), ACC)
    r2 = tl.zeros((), ACC)
    s0 = tl.zeros((LANES,), ACC)
    s1 = tl.zeros((LANES,), ACC)
    s2 = tl.zeros((LANES,), ACC) if SUM_SQ else tl.zeros((), ACC)
    whole = end_of_whole_tiles(begin, end, vocab, ALIGN, SHIFTED, BLOCK)
    if KEEP == SET_BITS and not SHIFTED:
        held = set_tile(begin, lead, vocab, set_row, KEEP, SHIFTED, BLOCK, LANES)
    for i in tl.range(begin, whole, BLOCK, num_stages=STAGES):
        x = whole_tile(boundary, i, lead, ALIGN, SHIFTED, BLOCK, LANES).to(ACC)
        if KEEP == SET_BITS and not SHIFTED:  # a tile ahead: loads of single bytes have no place in the pipeline
            following = set_tile(i + BLOCK, lead, vocab, set_row, KEEP, SHIFTED, BLOCK, LANES)
            x = tile_in_set(x, held, whole_row, KEEP)
            held = following
        elif KEEP is not None:
            x = tile_in_set(x, set_tile(i, lead, vocab, set_row, KEEP, SHIFTED, BLOCK, LANES), whole_row, KEEP)
        x = soft_cap(x, inverse_cap, SOFTCAP)
        m, ties, r0, r1, r2, s0, s1, s2 = add_tile(x, m, ties, r0, r1, r2, s0, s1, s2, scale, SUM_SQ)
    if SHIFTED:
        if end - whole > BLOCK:
            x = last_tile(boundary, whole, lead, end, SHIFTED, BLOCK, LANES).to(ACC)
            if KEEP is not None:
                x = tile_in_set(x, set_tile(whole, lead, vocab, set_row, KEEP, SHIFTED, BLOCK, LANES), whole_row, KEEP)
            x = soft_cap(x, inverse_cap, SOFTCAP)
            m, ties, r0, r1, r2, s0, s1, s2 = add_tile(x, m, ties, r0, r1, r2, s0, s1, s2, scale, SUM_SQ)
            whole += BLOCK
    if whole < end:
        x = last_tile(boundary, whole, lead, end, SHIFTED, BLOCK, LANES).to(ACC)
        if KEEP is not None:
            x = tile_in_set(x, set_tile(whole, lead, vocab, set_row, KEEP, SHIFTED, BLOCK, LANES), whole_row, KEEP)
        x = soft_cap(x, inverse_cap, SOFTCAP)
        m, ties, r0, r1, r2, s0, s1, s2 = add_tile(x, m, ties, r0, r1, r2, s0, s1, s2, scale, SUM_SQ)
    if SUM_SQ:
        r2 += sum_lanes(s2, lead, SHIFTED, LANES)
    r0 += sum_lanes(s0, lead, SHIFTED, LANES)
    r1 += sum_lanes(s1, lead, SHIFTED, LANES)
    if KEEP is not None:
        if (target >= begin) & (target < end):
            x = soft_cap(tl.load(row_ptr + target).to(ACC), inverse_cap, SOFTCAP)
            m, ties, r0, r1, r2 = _add_entry(x, m, ties, r0, r1, r2, scale, SUM_SQ)
    return m, ties, r0, r1, r2


@triton.jit
def _listed_mass(
    row_ptr, listed_row, begin, end, vocab, m, scale, inverse_cap,
    K: tl.constexpr, K_BLOCK: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(S0 of the listed entries in [begin, end), each once; the place of the first of them)"""
    k = tl.arange(0, K_BLOCK)
    y = tl.load(listed_row + k, mask=k < K, other=vocab)
    following = tl.load(listed_row + k + 1, mask=k + 1 < K, other=vocab)
    x = tl.load(row_ptr + y, mask=(y >= begin) & (y < end) & (y != following), other=NEG_INF).to(ACC)
    x = soft_cap(x, inverse_cap, SOFTCAP)
    return tl.sum(tl.exp2(exponent(x, m, scale)), axis=0), tl.sum((y < begin).to(tl.int32), axis=0)


@triton.jit
def _without_listed(x, i, lead, listed_row, place, K: tl.constexpr, SHIFTED: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """(the tile at column i with -inf for its run of listed ids, which starts at `place`; where the next run
    starts)"""
    line = tl.arange(0, BLOCK // LANES)[:, None] * LANES  # known to the compiler: no registers for columns
    lane = tl.arange(0, LANES)[None, :]
    first = i + lane
    if SHIFTED:
        first += tl.where(lane < lead, LANES, 0) - lead
    y = tl.load(listed_row + place, mask=place < K, other=i + BLOCK)
    while y < i + BLOCK:
        x = tl.where(line == y.to(tl.int32) - first, NEG_INF, x)
        place += 1
        y = tl.load(listed_row + place, mask=place < K, other=i + BLOCK)
    return x, place


@triton.jit
def kept_sweep(
    row_ptr, begin, end, vocab, m, delta, scale, inverse_cap, listed_row, set_row, whole_row, target,
    K: tl.constexpr, K_BLOCK: tl.constexpr, KEPT: tl.constexpr, KEEP: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr,
    ALIGN: tl.constexpr, SHIFTED: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """(S0 of the kept entries, S0 of the others) over the columns [begin, end), as in `sweep`. listed_row:
    the row's ids [K] in order, for KEPT_UNLISTED."""
    boundary, lead = row_boundary(row_ptr, ALIGN, SHIFTED)
    kept = tl.zeros((LANES,), ACC)
    dropped = tl.zeros((LANES,), ACC)
    if KEPT == KEPT_UNLISTED:
        listed, place = _listed_mass(row_ptr, listed_row, begin, end, vocab, m, scale, inverse_cap, K, K_BLOCK, SOFTCAP, ACC)
    whole = end_of_whole_tiles(begin, end, vocab, ALIGN, SHIFTED, BLOCK)
    for i in range(begin, whole, BLOCK):
        x = whole_tile(boundary, i, lead, ALIGN, SHIFTED, BLOCK, LANES).to(ACC)
        if KEEP is not None:
            x = tile_in_set(x, set_tile(i, lead, vocab, set_row, KEEP, SHIFTED, BLOCK, LANES), whole_row, KEEP)
        x = soft_cap(x, inverse_cap, SOFTCAP)
        if KEPT == KEPT_UNLISTED:
            x, place = _without_listed(x, i, lead, listed_row, place, K, SHIFTED, BLOCK, LANES)
        kept, dropped = kept_tile(x, m, delta, scale, kept, dropped, KEPT)
    if SHIFTED:
        if end - whole > BLOCK:
            x = last_tile(boundary, whole, lead, end, SHIFTED, BLOCK, LANES).to(ACC)
            if KEEP is not None:
                x = tile_in_set(x, set_tile(whole, lead, vocab, set_row, KEEP, SHIFTED, BLOCK, LANES), whole_row, KEEP)
            x = soft_cap(x, inverse_cap, SOFTCAP)
            if KEPT == KEPT_UNLISTED:
                x, place = _without_listed(x, whole, lead, listed_row, place, K, SHIFTED, BLOCK, LANES)
            kept, dropped = kept_tile(x, m, delta, scale, kept, dropped, KEPT)
            whole += BLOCK
    if whole < end:
        x = last_tile(boundary, whole, lead, end, SHIFTED, BLOCK, LANES).to(ACC)
        if KEEP is not None:
            x = tile_in_set(x, set_tile(whole, lead, vocab, set_row, KEEP, SHIFTED, BLOCK, LANES), whole_row, KEEP)
        x = soft_cap(x, inverse_cap, SOFTCAP)
        if KEPT == KEPT_UNLISTED:
            x, place = _without_listed(x, whole, lead, listed_row, place, K, SHIFTED, BLOCK, LANES)
        kept, dropped = kept_tile(x, m, delta, scale, kept, dropped, KEPT)
    kept, dropped = sum_lanes(kept, lead, SHIFTED, LANES), sum_lanes(dropped, lead, SHIFTED, LANES)
    if KEEP is not None:
        if (target >= begin) & (target < end):
            x = soft_cap(tl.load(row_ptr + target).to(ACC), inverse_cap, SOFTCAP)
            e = tl.exp2(exponent(x, m, scale))
            kept += tl.where(x - m >= delta, e, 0.0)
            dropped += tl.where(x - m >= delta, 0.0, e)
    return kept, (listed if KEPT == KEPT_UNLISTED else dropped)


@triton.jit
def log_total(m, ties, s0):
    """(sum e^u without the maximum's own 1, log sum e^u, whether all is -inf), u = (x - m) / T"""
    rest = s0 + (ties - 1.0)
    nothing = (m == NEG_INF) & (rest == -1.0)
    # A row of -inf alone is no distribution, and one of +inf has no differences.
    rest = tl.where(nothing | (m == float("inf")), float("nan"), rest)
    return rest, log1p(rest), nothing


@triton.jit
def kept_threshold(log_s0, log_kept, inv_t, KEPT: tl.constexpr, ACC: tl.constexpr):
    """x is kept where x - m reaches it, and all but the listed are, for KEPT_UNLISTED."""
    if KEPT == KEPT_UNLISTED:
        return tl.full((), NEG_INF, ACC)
    log_kept = tl.full((), log_kept, ACC)
    return (log_kept if KEPT == KEPT_MIN_P else log_kept + log_s0) / inv_t


@triton.jit
def distribution(m, ties, s0, s1, s2, SUM_SQ: tl.constexpr):
    """(MAX, REST, MEAN_U, SUM_SQ) of `State`, from the sums of `sweep`. MAX is -inf only where nothing else
    is: of a NaN beside -inf it is NaN."""
    rest, _log_s0, nothing = log_total(m, ties, s0)
    total = 1.0 + rest
    mean_u = LN2 * s1 / total
    sum_sq = (s2 + ties) / (total * total) if SUM_SQ else tl.zeros((), m.dtype)
    return tl.where(nothing | (m > NEG_INF), m, float("nan")), rest, mean_u, sum_sq


@triton.jit
def write_stats(
    row, m, rest, mean_u, sum_sq, log_s0, log_mass, delta, inv_t, entropy_ptr, lse_ptr, sum_sq_ptr, state_ptr,
    K: tl.constexpr, SUM_SQ: tl.constexpr,
):  # fmt: skip
    """All but what is kept and what is of targets."""
    tl.store(entropy_ptr + row, log_s0 - mean_u)
    tl.store(lse_ptr + row, tl.where(m == NEG_INF, NEG_INF, m * inv_t + log_s0))
    if SUM_SQ:
        tl.store(sum_sq_ptr + row, sum_sq)
    state_row = state_ptr + row * (STATE_TARGETS + K)
    tl.store(state_row + STATE_MAX, m)
    tl.store(state_row + STATE_REST, rest)
    tl.store(state_row + STATE_MEAN_U, mean_u)
    tl.store(state_row + STATE_SUM_SQ, sum_sq)
    tl.store(state_row + STATE_KEPT, log_mass)
    tl.store(state_row + STATE_THRESHOLD, delta)


@triton.jit
def write_targets(row, y, shifted, log_s0, inv_t, logp_ptr, state_ptr, ignore_index, K: tl.constexpr, K_BLOCK: tl.constexpr):
    """shifted [K_BLOCK]: the targets' logits less the row's maximum"""
    k = tl.arange(0, K_BLOCK)
    tl.store(logp_ptr + row * K + k, tl.where(y == ignore_index, 0.0, shifted * inv_t - log_s0), mask=k < K)
    tl.store(state_ptr + row * (STATE_TARGETS + K) + STATE_TARGETS + k, shifted, mask=k < K)


@triton.jit
def write_row(
    row_ptr, row, y, has, m, rest, mean_u, sum_sq, kept, dropped, inv_t, inverse_cap,
    logp_ptr, entropy_ptr, lse_ptr, sum_sq_ptr, kept_ptr, state_ptr, vocab, ignore_index, log_kept,
    K: tl.constexpr, K_BLOCK: tl.constexpr, SUM_SQ: tl.constexpr, KEPT: tl.constexpr, OUTSIDE: tl.constexpr,
    SOFTCAP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """m, rest, mean_u, sum_sq: of `distribution`; has: whether the row's set has the targets, for
    OUTSIDE_MINUS_INF."""
    log_s0 = log1p(rest)
    log_mass = tl.zeros((), ACC)
    delta = tl.zeros((), ACC)
    if KEPT:
        log_mass = -log1p(dropped / kept)
        log_mass = tl.where(log_s0 == log_s0, log_mass, log_s0)
        delta = kept_threshold(log_s0, log_kept, inv_t, KEPT, ACC)
        tl.store(kept_ptr + row, log_mass)
    write_stats(row, m, rest, mean_u, sum_sq, log_s0, log_mass, delta, inv_t, entropy_ptr, lse_ptr, sum_sq_ptr, state_ptr, K, SUM_SQ)
    if K > 0:
        in_vocab = (tl.arange(0, K_BLOCK) < K) & (y >= 0) & (y < vocab)
        x_y = soft_cap(tl.load(row_ptr + y, mask=in_vocab, other=float("nan")).to(ACC), inverse_cap, SOFTCAP)
        if OUTSIDE == OUTSIDE_MINUS_INF:
            x_y = tl.where(has, x_y, tl.where(in_vocab, NEG_INF, x_y))
        shifted = tl.where(x_y == NEG_INF, NEG_INF, x_y - m)  # also where all is -inf
        write_targets(row, y, shifted, log_s0, inv_t, logp_ptr, state_ptr, ignore_index, K, K_BLOCK)


@triton.jit
def write_target_kept(row, target_kept, target_kept_ptr, KEEP: tl.constexpr, K: tl.constexpr, K_BLOCK: tl.constexpr):
    if KEEP is not None:
        k = tl.arange(0, K_BLOCK)
        tl.store(target_kept_ptr + row * K + k, target_kept, mask=k < K)


@triton.jit
def write_zeros(
    row, target_kept_ptr, logp_ptr, entropy_ptr, lse_ptr, sum_sq_ptr, kept_ptr, state_ptr,
    K: tl.constexpr, K_BLOCK: tl.constexpr, SUM_SQ: tl.constexpr, KEPT: tl.constexpr, KEEP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    write_target_kept(row, tl.arange(0, K_BLOCK) < K, target_kept_ptr, KEEP, K, K_BLOCK)
    zero = tl.zeros((), ACC)
    state_row = state_ptr + row * (STATE_TARGETS + K)
    tl.store(entropy_ptr + row, zero)
    tl.store(lse_ptr + row, zero)
    if SUM_SQ:
        tl.store(sum_sq_ptr + row, zero)
    if KEPT:
        tl.store(kept_ptr + row, zero)
    for i in tl.static_range(STATE_TARGETS):
        tl.store(state_row + i, zero)
    if K > 0:
        k = tl.arange(0, K_BLOCK)
        tl.store(logp_ptr + row * K + k, tl.zeros((K_BLOCK,), ACC), mask=k < K)
        tl.store(state_row + STATE_TARGETS + k, tl.zeros((K_BLOCK,), ACC), mask=k < K)


@triton.jit(do_not_specialize=BATCH_SHAPE)
def token_stats_forward_kernel(
    logits_ptr, targets_ptr, mask_ptr, temperature_ptr,  # [A, B, V], [N, K], [N], [N]
    listed_ptr,  # [N, K], for KEPT_UNLISTED: the targets of each row that are not ignored, in order
    sets_ptr, target_kept_ptr,  # a `Keep`'s, [N, K]
    logp_ptr, entropy_ptr, lse_ptr, sum_sq_ptr, kept_ptr, state_ptr,  # [N, K], [N] four times, [N, STATE_TARGETS + K]
    inner, stride_a, stride_b, sets_stride_a, sets_stride_b, vocab, temperature, ignore_index, inverse_cap: tl.float64, log_kept: tl.float64,
    K: tl.constexpr, K_BLOCK: tl.constexpr, HAS_MASK: tl.constexpr, ROW_TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr,
    KEEP: tl.constexpr, OUTSIDE: tl.constexpr, SETS_ALIGN: tl.constexpr,
    ZEROS: tl.constexpr,  # rows that do not count become zeros; else they stay as they are
    SUM_SQ: tl.constexpr, KEPT: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr,
    ALIGNED: tl.constexpr,  # every row starts on a 16-byte boundary
    SHIFTED: tl.constexpr,  # rows start anywhere, and are loaded from the boundary before them
    BLOCK: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row a program."""
    row = tl.program_id(0)
    row_ptr = logits_ptr + row_start(row, inner, stride_a, stride_b, ALIGN if ALIGNED else 1)
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
    set_row, whole_row, target, has, target_kept = row_set(row, y, row_ptr + y, sets_ptr, set_start, vocab, ignore_index, KEEP, OUTSIDE, ACC)
    write_target_kept(row, target_kept, target_kept_ptr, KEEP, K, K_BLOCK)
    inv_t = row_inv_temperature(temperature, temperature_ptr, row, ROW_TEMPERATURE, ACC)
    scale = inv_t * LOG2E
    inverse_cap = tl.full((), inverse_cap, ACC)
    m, ties, s0, s1, s2 = sweep(
        row_ptr, 0, vocab, vocab, scale, inverse_cap, set_row, whole_row, target,
        SUM_SQ, KEEP, SOFTCAP, ACC, ALIGN, SHIFTED, BLOCK, LANES, STAGES,
    )  # fmt: skip
    kept = tl.zeros((), ACC)
    dropped = tl.zeros((), ACC)
    if KEPT:
        _rest, log_s0, _nothing = log_total(m, ties, s0)
        delta = kept_threshold(log_s0, log_kept, inv_t, KEPT, ACC)
        kept, dropped = kept_sweep(
            row_ptr, 0, vocab, vocab, m, delta, scale, inverse_cap, listed_ptr + row * K, set_row, whole_row, target,
            K, K_BLOCK, KEPT, KEEP, SOFTCAP, ACC, ALIGN, SHIFTED, BLOCK, LANES,
        )  # fmt: skip
    m, rest, mean_u, sum_sq = distribution(m, ties, s0, s1, s2, SUM_SQ)
    write_row(
        row_ptr, row, y, has, m, rest, mean_u, sum_sq, kept, dropped, inv_t, inverse_cap,
        logp_ptr, entropy_ptr, lse_ptr, sum_sq_ptr, kept_ptr, state_ptr, vocab, ignore_index, log_kept,
        K, K_BLOCK, SUM_SQ, KEPT, OUTSIDE, SOFTCAP, ACC,
    )  # fmt: skip
