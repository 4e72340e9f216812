"""Row statistics of logits, forward and backward: one program reads a row once; one program a tile writes its gradient.

The forward keeps, per thread and element, S0 = sum 2^t and S1 = sum t 2^t with t = (x - m) log2(e) / T and m the running maximum. Only one block-wide
reduction a tile is needed, its maximum; a tile that raises the maximum takes a uniform branch, where the sums are rescaled and the entries
equal to the maximum are counted and taken out, so that S0 never holds the maximum's own 1 (a confident row keeps its relative accuracy).

Which element meets which in a sum depends on its column alone, never on the row's address or number: a row has the same bits in any batch. So the
forward loads 16 bytes at once only where rows start on 16-byte boundaries; the backward, which sums nothing, does so from any address.

Calling convention: rlkern/backends.py.
"""

import math

import torch
import triton
import triton.language as tl

from .launch import backward_shape, capability, device_of, forward_shape, warp_size
from .math import log1p

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEG_INF = tl.constexpr(float("-inf"))
FLOOR = tl.constexpr(-2000.0)  # 2^FLOOR is 0 in float32 and float64, and unlike -inf it can be multiplied by 0


@triton.jit
def _row_inv_temperature(temperature, temperature_ptr, row, ROW_TEMPERATURE: tl.constexpr, ACC: tl.constexpr):
    if ROW_TEMPERATURE:
        t = tl.load(temperature_ptr + row).to(ACC)
        return tl.where(t > 0, 1.0 / t, float("nan"))
    return 1.0 / tl.cast(temperature, ACC)


@triton.jit
def _row_start(row, inner, stride_a, stride_b):
    """Offset of a row, which may pass 2^31; the row number does not, and divides in 32 bits."""
    return (row // inner).to(tl.int64) * stride_a + (row % inner).to(tl.int64) * stride_b


@triton.jit
def _edge(e, lead, body, body_end, end, ALIGN: tl.constexpr):
    """Columns outside the body, before and after it, as e = 0, 1, ..., and which of them are the row's."""
    col = tl.where(e < ALIGN, e, body_end + e - ALIGN)
    return col, (e < 2 * ALIGN) & (col >= lead) & (col < end) & ((e < ALIGN) == (col < body))


@triton.jit
def _exponent(x, m, scale):
    """(x - m) * scale, -inf clamped to FLOOR; NaN stays NaN. Not x * scale - m * scale: that loses rows with a large common offset."""
    return tl.maximum((x - m) * scale, FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _add_tile(x, m, ties, r0, r1, r2, s0, s1, s2, scale, SUM_SQ: tl.constexpr):
    """Takes a tile into the running sums; r0, r1, r2 hold what former maxima contributed."""
    tile_max = tl.max(tl.max(x, axis=0), axis=0)
    if tile_max >= m:
        if tile_max > m:
            d = tl.where(m == NEG_INF, 0.0, (m - tile_max) * scale)
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
    t = _exponent(x, tl.where(m == NEG_INF, 0.0, m), scale)
    e = tl.exp2(t)
    s0 += tl.sum(e, axis=0)
    s1 += tl.sum(e * t, axis=0)
    if SUM_SQ:
        s2 += tl.sum(e * e, axis=0)
    return m, ties, r0, r1, r2, s0, s1, s2


@triton.jit
def _kept_tile(x, m, delta, scale, kept, dropped):
    e = tl.exp2(_exponent(x, m, scale))
    inside = x - m >= delta
    return kept + tl.sum(tl.where(inside, e, 0.0), axis=0), dropped + tl.sum(tl.where(inside, 0.0, e), axis=0)


@triton.jit
def _forward_kernel(
    logits_ptr,  # [A, B, V]
    targets_ptr,  # [N, K]
    mask_ptr,  # [N]
    temperature_ptr,  # [N]
    logp_ptr,  # [N, K]
    entropy_ptr,  # [N]
    lse_ptr,  # [N]
    sum_sq_ptr,  # [N]
    kept_ptr,  # [N]
    state_ptr,  # [N, 6 + K]
    inner,
    stride_a,
    stride_b,
    vocab,
    temperature,
    ignore_index,
    log_kept,
    K: tl.constexpr,
    K_BLOCK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
    SUM_SQ: tl.constexpr,
    KEPT: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGNED: tl.constexpr,  # every row starts on a 16-byte boundary
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0)
    start = _row_start(row, inner, stride_a, stride_b)
    row = row.to(tl.int64)
    k = tl.arange(0, K_BLOCK)
    state_row = state_ptr + row * (6 + K)
    active = True
    if HAS_MASK:
        active = tl.load(mask_ptr + row) != 0
    if K > 0:
        y = tl.load(targets_ptr + row * K + k, mask=k < K, other=ignore_index)
        active = active & (tl.sum((y != ignore_index).to(tl.int32), axis=0) > 0)
    if not active:
        zero = tl.zeros((), ACC)
        tl.store(entropy_ptr + row, zero)
        tl.store(lse_ptr + row, zero)
        if SUM_SQ:
            tl.store(sum_sq_ptr + row, zero)
        if KEPT:
            tl.store(kept_ptr + row, zero)
        for i in tl.static_range(6):
            tl.store(state_row + i, zero)
        if K > 0:
            tl.store(logp_ptr + row * K + k, tl.zeros((K_BLOCK,), ACC), mask=k < K)
            tl.store(state_row + 6 + k, tl.zeros((K_BLOCK,), ACC), mask=k < K)
        return

    inv_t = _row_inv_temperature(temperature, temperature_ptr, row, ROW_TEMPERATURE, ACC)
    scale = inv_t * LOG2E
    row_ptr = logits_ptr + (tl.multiple_of(start, ALIGN) if ALIGNED else start)
    # A tile is [BLOCK / LANES, LANES], every thread holding whole loads of a line: sums over axis 0 stay inside a thread.
    cols = tl.arange(0, BLOCK // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]

    m = tl.full((), NEG_INF, ACC)
    ties = tl.zeros((), ACC)
    r0 = tl.zeros((), ACC)
    r1 = tl.zeros((), ACC)
    r2 = tl.zeros((), ACC)
    s0 = tl.zeros((LANES,), ACC)
    s1 = tl.zeros((LANES,), ACC)
    s2 = tl.zeros((LANES,), ACC) if SUM_SQ else tl.zeros((), ACC)
    whole = vocab // BLOCK * BLOCK
    for i in tl.range(0, whole, BLOCK, num_stages=STAGES):
        x = tl.load(row_ptr + i + cols, eviction_policy="evict_first").to(ACC)
        m, ties, r0, r1, r2, s0, s1, s2 = _add_tile(x, m, ties, r0, r1, r2, s0, s1, s2, scale, SUM_SQ)
    if whole < vocab:
        x = tl.load(row_ptr + whole + cols, mask=whole + cols < vocab, other=NEG_INF).to(ACC)
        m, ties, r0, r1, r2, s0, s1, s2 = _add_tile(x, m, ties, r0, r1, r2, s0, s1, s2, scale, SUM_SQ)

    rest = tl.sum(s0, axis=0) + r0 + (ties - 1.0)
    s1_row = tl.sum(s1, axis=0) + r1
    nothing = (m == NEG_INF) & (rest == -1.0)
    # A row of -inf alone is no distribution, and one of +inf has no differences.
    rest = tl.where(nothing | (m == float("inf")), float("nan"), rest)
    log_s0 = log1p(rest)
    mean_u = LN2 * s1_row / (1.0 + rest)
    entropy = log_s0 - mean_u
    lse = tl.where(nothing, NEG_INF, m * inv_t + log_s0)
    tl.store(entropy_ptr + row, entropy)
    tl.store(lse_ptr + row, lse)
    tl.store(state_row, m)
    tl.store(state_row + 1, rest)
    tl.store(state_row + 2, mean_u)
    sum_sq = tl.zeros((), ACC)
    if SUM_SQ:
        total = 1.0 + rest
        sum_sq = (tl.sum(s2, axis=0) + r2 + ties) / (total * total)
        tl.store(sum_sq_ptr + row, sum_sq)
    tl.store(state_row + 3, sum_sq)

    log_mass = tl.zeros((), ACC)
    delta = tl.zeros((), ACC)
    if KEPT:
        delta = (log_kept if KEPT == 1 else log_kept + log_s0) / inv_t
        kept = tl.zeros((LANES,), ACC)
        dropped = tl.zeros((LANES,), ACC)
        for i in range(0, whole, BLOCK):
            x = tl.load(row_ptr + i + cols).to(ACC)
            kept, dropped = _kept_tile(x, m, delta, scale, kept, dropped)
        if whole < vocab:
            x = tl.load(row_ptr + whole + cols, mask=whole + cols < vocab, other=NEG_INF).to(ACC)
            kept, dropped = _kept_tile(x, m, delta, scale, kept, dropped)
        log_mass = -log1p(tl.sum(dropped, axis=0) / tl.sum(kept, axis=0))
        log_mass = tl.where(log_s0 == log_s0, log_mass, log_s0)
        tl.store(kept_ptr + row, log_mass)
    tl.store(state_row + 4, log_mass)
    tl.store(state_row + 5, delta)

    if K > 0:
        in_vocab = (k < K) & (y >= 0) & (y < vocab)
        x_y = tl.load(row_ptr + y, mask=in_vocab, other=float("nan")).to(ACC)
        shifted = x_y - m
        logp = tl.where(y == ignore_index, 0.0, shifted * inv_t - log_s0)
        tl.store(logp_ptr + row * K + k, logp, mask=k < K)
        tl.store(state_row + 6 + k, shifted, mask=k < K)


@triton.jit
def _load_grad(ptr, row, HAS: tl.constexpr, ACC: tl.constexpr):
    if HAS:
        return tl.load(ptr + row)
    return tl.zeros((), ACC)


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
def _gradient_tile(
    x_ptr, z_ptr, cols, valid, low, high, lead, row, m, rest, scale, inv_t, weight, c0, c1, c2, inside, delta, y, g_logp,
    targets_ptr, state_row, ignore_index,
    K: tl.constexpr, HAS_LOGP: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_SUM_SQ: tl.constexpr, HAS_KEPT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reads and writes the columns `cols` that are `valid`, all in [low, high); what the others hold is never stored."""
    x = tl.load(x_ptr + cols, mask=valid).to(ACC)
    shifted = x - m
    t = shifted * scale
    if HAS_ENTROPY:  # the one term that multiplies by t
        t = tl.maximum(t, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp2(t)
    dz = e * _coefficient(t, e, shifted, c0, c1, c2, inside, delta, HAS_ENTROPY, HAS_SUM_SQ, HAS_KEPT)
    if HAS_LOGP:
        for j in range(K):
            y_j = tl.load(targets_ptr + row * K + j)
            if (y_j + lead >= low) & (y_j + lead < high) & (y_j != ignore_index) & (y_j >= 0):
                # At a target, 1 - p without cancellation: at the maximum it is rest / S0, and elsewhere p <= 1/2.
                at_y = tl.sum(tl.where(y == y_j, g_logp, 0.0), axis=0)
                shifted_y = tl.load(state_row + 6 + j)
                t_y = tl.maximum(shifted_y * scale, FLOOR, propagate_nan=tl.PropagateNan.ALL)
                e_y = tl.exp2(t_y)
                c_y = _coefficient(t_y, e_y, shifted_y, c0, c1, c2, inside, delta, HAS_ENTROPY, HAS_SUM_SQ, HAS_KEPT)
                at_max = c_y + weight * at_y + weight * rest * at_y
                col = (y_j + lead).to(tl.int32)
                dz = tl.where(cols == col, tl.where(shifted_y == 0, at_max, e_y * c_y + inv_t * at_y), dz)
    tl.store(z_ptr + cols, dz.to(z_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _backward_kernel(
    logits_ptr,  # [A, B, V]
    targets_ptr,  # [N, K]
    mask_ptr,  # [N]
    temperature_ptr,  # [N]
    state_ptr,  # [N, 6 + K]
    g_logp_ptr,  # [N, K]
    g_entropy_ptr,  # [N]
    g_lse_ptr,  # [N]
    g_sum_sq_ptr,  # [N]
    g_kept_ptr,  # [N]
    out_ptr,  # [A, B, V]
    inner,
    stride_a,
    stride_b,
    out_stride_a,
    out_stride_b,
    vocab,
    tiles,
    temperature,
    ignore_index,
    K: tl.constexpr,
    K_BLOCK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
    HAS_LOGP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_SUM_SQ: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGNED: tl.constexpr,  # every row starts on a 16-byte boundary
    SAME_LEAD: tl.constexpr,  # or at least equally far from one in logits and out
    EDGES: tl.constexpr,  # some row starts or ends off one
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    row = pid // tiles
    tile = (pid - row * tiles) * BLOCK
    start = _row_start(row, inner, stride_a, stride_b)
    out_start = _row_start(row, inner, out_stride_a, out_stride_b)
    row = row.to(tl.int64)
    k = tl.arange(0, K_BLOCK)
    state_row = state_ptr + row * (6 + K)
    lead = tl.zeros((), tl.int32) if ALIGNED else (out_start % ALIGN).to(tl.int32)
    # Columns count from the 16-byte boundary before the row. The body lies between boundaries, so even its masked tiles move 16 bytes at a time.
    end = vocab + lead
    body = 0 if ALIGNED else ALIGN
    body_end = tl.multiple_of(end // ALIGN * ALIGN, ALIGN)
    x_ptr = logits_ptr + (tl.multiple_of(start - lead, ALIGN) if SAME_LEAD else start - lead)
    z_ptr = out_ptr + tl.multiple_of(out_start - lead, ALIGN)
    cols = tile + tl.arange(0, BLOCK)
    in_body = (cols >= body) & (cols < body_end)
    edge, in_row = _edge(tl.arange(0, 2 * ALIGN), lead, body, body_end, end, ALIGN)

    active = True
    if HAS_MASK:
        active = tl.load(mask_ptr + row) != 0
    g_entropy = _load_grad(g_entropy_ptr, row, HAS_ENTROPY, ACC)
    g_lse = _load_grad(g_lse_ptr, row, HAS_LSE, ACC)
    g_sum_sq = _load_grad(g_sum_sq_ptr, row, HAS_SUM_SQ, ACC)
    g_kept = _load_grad(g_kept_ptr, row, HAS_KEPT, ACC)
    flows = (g_entropy != 0) | (g_lse != 0) | (g_sum_sq != 0) | (g_kept != 0)
    y = tl.zeros((K_BLOCK,), tl.int64)
    g_logp = tl.zeros((K_BLOCK,), ACC)
    if K > 0:
        y = tl.load(targets_ptr + row * K + k, mask=k < K, other=ignore_index)
        active = active & (tl.sum((y != ignore_index).to(tl.int32), axis=0) > 0)
    if HAS_LOGP:
        g_logp = tl.where(y != ignore_index, tl.load(g_logp_ptr + row * K + k, mask=k < K, other=0.0), 0.0)
        flows = flows | (tl.sum((g_logp != 0).to(tl.int32), axis=0) > 0)
    if not (active & flows):
        zero = tl.zeros((BLOCK,), out_ptr.dtype.element_ty)
        tl.store(z_ptr + cols, zero, mask=in_body)
        if EDGES:
            if tile == 0:
                tl.store(z_ptr + edge, tl.zeros((2 * ALIGN,), out_ptr.dtype.element_ty), mask=in_row)
        return

    inv_t = _row_inv_temperature(temperature, temperature_ptr, row, ROW_TEMPERATURE, ACC)
    m = tl.load(state_row)
    rest = tl.load(state_row + 1)
    c0 = g_lse
    c1 = -g_entropy * LN2  # t is in base 2
    c2 = 2.0 * g_sum_sq
    inside = tl.zeros((), ACC)
    delta = tl.zeros((), ACC)
    if HAS_ENTROPY:
        c0 += g_entropy * tl.load(state_row + 2)
    if HAS_SUM_SQ:
        c0 -= c2 * tl.load(state_row + 3)
    if HAS_KEPT:
        log_mass = tl.load(state_row + 4)
        delta = tl.load(state_row + 5)
        g_kept = tl.where(log_mass == NEG_INF, 0.0, g_kept)  # an empty kept set is a constant
        inside = tl.where(g_kept == 0, 0.0, g_kept * tl.exp(-log_mass))
        c0 -= g_kept
    if HAS_LOGP:
        c0 -= tl.sum(g_logp, axis=0)
        lost = (k < K) & (y != ignore_index) & ((y < 0) | (y >= vocab))
        c0 = tl.where(tl.sum(lost.to(tl.int32), axis=0) > 0, float("nan"), c0)
    # dz = e * c: what turns e into p, and the chain rule's 1/T, go into the row's scalars.
    weight = inv_t / (1.0 + rest)
    c0 *= weight
    c1 *= weight
    c2 *= weight / (1.0 + rest)
    inside *= weight

    scale = inv_t * LOG2E
    if EDGES:
        if tile == 0:
            _gradient_tile(
                x_ptr, z_ptr, edge, in_row, 0, end, lead, row, m, rest, scale, inv_t, weight, c0, c1, c2, inside, delta, y, g_logp,
                targets_ptr, state_row, ignore_index, K, HAS_LOGP, HAS_ENTROPY, HAS_SUM_SQ, HAS_KEPT, ACC,
            )  # fmt: skip
    _gradient_tile(
        x_ptr, z_ptr, cols, in_body, tile, tile + BLOCK, lead, row, m, rest, scale, inv_t, weight, c0, c1, c2, inside, delta, y, g_logp,
        targets_ptr, state_row, ignore_index, K, HAS_LOGP, HAS_ENTROPY, HAS_SUM_SQ, HAS_KEPT, ACC,
    )  # fmt: skip


def _common(logits, targets, mask, temperature, state):
    """Pointers and specialisations that both kernels share; an absent tensor is passed as the logits, and never read."""
    acc = state.dtype
    if acc == torch.float64 and not isinstance(temperature, torch.Tensor):
        # a Python float reaches a kernel as float32
        temperature = torch.full((logits.shape[0] * logits.shape[1],), temperature, dtype=acc, device=logits.device)
    row_temperature = isinstance(temperature, torch.Tensor)
    n_targets = 0 if targets is None else targets.shape[1]
    pointers = (logits, logits if targets is None else targets, logits if mask is None else mask, temperature if row_temperature else logits)
    options = dict(
        K=n_targets,
        K_BLOCK=triton.next_power_of_2(max(1, n_targets)),
        HAS_MASK=mask is not None,
        ROW_TEMPERATURE=row_temperature,
        ACC=tl.float64 if acc == torch.float64 else tl.float32,
        ALIGN=16 // logits.element_size(),
    )
    return pointers, (1.0 if row_temperature else temperature), options


def _strides(x):
    return x.stride(0), x.stride(1)


def token_stats_forward(logits, targets, mask, temperature, ignore_index, kept_kind, log_kept, out) -> None:
    logp, entropy, lse, sum_sq, kept, state = out
    pointers, temperature, options = _common(logits, targets, mask, temperature, state)
    outer, inner, vocab = logits.shape
    aligned = all(s % options["ALIGN"] == 0 for s in _strides(logits))
    block, warps, stages = forward_shape(vocab, logits.element_size())
    # Blackwell pairs the arithmetic of two loads side by side; older cards only spend registers on it.
    side_by_side = 2 if capability() >= (10, 0) else 1
    lanes = min(block, side_by_side * warps * warp_size() * options["ALIGN"])
    with device_of(logits):
        _forward_kernel[(outer * inner,)](
            *pointers,
            *(logits if t is None else t for t in (logp, entropy, lse, sum_sq, kept)),
            state,
            inner,
            *_strides(logits),
            vocab,
            temperature,
            ignore_index,
            log_kept,
            **options,
            SUM_SQ=sum_sq is not None,
            KEPT=kept_kind,
            ALIGNED=aligned,
            BLOCK=block,
            LANES=lanes,
            STAGES=stages if aligned else 1,  # the pipeline moves at least 4 bytes at a time, and pays from 16
            num_warps=warps,
        )


def token_stats_backward(logits, targets, mask, temperature, ignore_index, state, grads, out) -> None:
    pointers, temperature, options = _common(logits, targets, mask, temperature, state)
    outer, inner, vocab = logits.shape
    align = options["ALIGN"]
    aligned = all(s % align == 0 for s in _strides(logits) + _strides(out))
    block, warps = backward_shape(vocab, logits.element_size())
    tiles = math.ceil((vocab + (0 if aligned else align - 1)) / block)
    with device_of(logits):
        _backward_kernel[(outer * inner * tiles,)](
            *pointers,
            state,
            *(logits if g is None else g for g in grads),
            out,
            inner,
            *_strides(logits),
            *_strides(out),
            vocab,
            tiles,
            temperature,
            ignore_index,
            **options,
            **{f"HAS_{name}": g is not None for name, g in zip(("LOGP", "ENTROPY", "LSE", "SUM_SQ", "KEPT"), grads, strict=True)},
            ALIGNED=aligned,
            EDGES=not aligned or vocab % align != 0,
            SAME_LEAD=all((a - b) % align == 0 for a, b in zip(_strides(logits), _strides(out), strict=True)),
            BLOCK=block,
            num_warps=warps,
        )
