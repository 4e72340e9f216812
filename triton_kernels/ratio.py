"""What a token adds to a policy loss, and its derivative by the token's log-probability: one launch for the tokens, one for what is reported of them.

Each program leaves the sums over its own stretch in memory, and one program adds those up, always in the same order. No atomics: the same bits every
time. Sums of ratios are kept relative to the largest so far, as a log-sum-exp is, so that no square overflows or vanishes.

Calling convention: rlkern/backends.py.
"""

import torch
import triton
import triton.language as tl

from .launch import device_of

BLOCK, WARPS = 1024, 4
MOST_PROGRAMS = 1024  # as many parts as the second launch reads at once
COLUMNS = tl.constexpr(11)  # that a program leaves
LARGEST_EXPONENT = tl.constexpr(80.0)
MINUS_INF = tl.constexpr(-float("inf"))


@triton.jit
def _exp_tail(x):
    """exp(x) - 1 - x, accurate relative to itself: a series where the difference would cancel."""
    series = tl.zeros_like(x) + 1.0
    for i in tl.static_range(15, 2, -1):
        series = 1.0 + x * series / i
    return tl.where(tl.abs(x) < 0.5, 0.5 * x * x * series, tl.exp(x) - 1.0 - x)


@triton.jit
def _relative(d, largest):
    """exp(d - largest), 0 where nothing was added up yet."""
    return tl.exp(d - tl.where(largest == MINUS_INF, 0.0, largest))


@triton.jit
def _ratio_terms_kernel(
    logp_ptr,  # [N]
    old_logp_ptr,  # [N]
    advantages_ptr,  # [N]
    mask_ptr,  # [N]
    unclipped_ptr,  # [N], read if UNCLIPPED
    terms_ptr,  # [2, N]
    free_ptr,  # [N]
    sums_ptr,  # [programs, COLUMNS]
    n,
    blocks,  # that a program takes
    low: tl.float64,
    high: tl.float64,
    dual: tl.float64,
    least: tl.float64,
    most: tl.float64,
    UNCLIPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype = logp_ptr.dtype.element_ty
    low = tl.full((), low, dtype)
    high = tl.full((), high, dtype)
    dual = tl.full((), dual, dtype)
    least = tl.full((), least, dtype)
    most = tl.full((), most, dtype)
    pid = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    tokens = tl.zeros((BLOCK,), tl.int32)
    below = tl.zeros((BLOCK,), tl.int32)
    above = tl.zeros((BLOCK,), tl.int32)
    beyond = tl.zeros((BLOCK,), tl.int32)
    d_sum = tl.zeros((BLOCK,), dtype)
    distance = tl.zeros((BLOCK,), dtype)
    k3 = tl.zeros((BLOCK,), dtype)
    largest = tl.full((BLOCK,), MINUS_INF, dtype)
    smallest = -largest
    weights = tl.zeros((BLOCK,), dtype)
    squares = tl.zeros((BLOCK,), dtype)
    for i in range(blocks):
        at = (pid * blocks + i) * BLOCK + cols
        inside = at < n
        counts = inside & (tl.load(mask_ptr + at, mask=inside, other=0) != 0)
        logp = tl.load(logp_ptr + at, mask=counts, other=0.0)
        d = logp - tl.load(old_logp_ptr + at, mask=counts, other=0.0)
        a = tl.load(advantages_ptr + at, mask=counts, other=0.0)
        outside = (d < least) | (d > most)
        r = tl.exp(tl.where(d < least, least, tl.where(d > most, most, d)))
        is_below = (a < 0) & (r < low)
        is_above = (a > 0) & (r > high)
        is_beyond = (a < 0) & (r > dual)
        clips = is_below | is_above | is_beyond
        if UNCLIPPED:
            clips = clips & (tl.load(unclipped_ptr + at, mask=inside, other=0) == 0)
        value = tl.where(counts, -a * tl.where(clips, tl.where(is_below, low, tl.where(is_above, high, dual)), r), 0.0)
        tl.store(terms_ptr + at, value, mask=inside)
        tl.store(terms_ptr + n + at, tl.where(clips | outside, 0.0, value), mask=inside)
        tl.store(free_ptr + at, counts & (tl.abs(logp) < float("inf")) & (is_below == 0) & (is_above == 0), mask=inside)

        tokens += counts.to(tl.int32)
        below += is_below.to(tl.int32)
        above += is_above.to(tl.int32)
        beyond += is_beyond.to(tl.int32)
        d_sum += d
        distance += tl.abs(d)
        k3 += _exp_tail(d)
        before = largest
        largest = tl.maximum(largest, tl.where(counts, d, MINUS_INF))
        smallest = tl.minimum(smallest, tl.where(counts, d, float("inf")))
        shrink, added = _relative(before, largest), tl.where(counts, _relative(d, largest), 0.0)
        weights = weights * shrink + added
        squares = squares * shrink * shrink + added * added
    top = tl.max(largest, axis=0)
    scale = _relative(largest, top)
    row = sums_ptr + pid * COLUMNS
    tl.store(row, tl.sum(tokens, axis=0).to(tl.float64))
    tl.store(row + 1, tl.sum(below, axis=0).to(tl.float64))
    tl.store(row + 2, tl.sum(above, axis=0).to(tl.float64))
    tl.store(row + 3, tl.sum(beyond, axis=0).to(tl.float64))
    tl.store(row + 4, tl.sum(d_sum, axis=0).to(tl.float64))
    tl.store(row + 5, tl.sum(distance, axis=0).to(tl.float64))
    tl.store(row + 6, tl.sum(k3, axis=0).to(tl.float64))
    tl.store(row + 7, top.to(tl.float64))
    tl.store(row + 8, tl.min(smallest, axis=0).to(tl.float64))
    tl.store(row + 9, tl.sum(weights * scale, axis=0).to(tl.float64))
    tl.store(row + 10, tl.sum(squares * scale * scale, axis=0).to(tl.float64))


@triton.jit
def _column(sums_ptr, part, parts, column, other):
    return tl.load(sums_ptr + part * COLUMNS + column, mask=part < parts, other=other)


@triton.jit
def _ratio_summary_kernel(
    sums_ptr,  # [parts, COLUMNS]
    summary_ptr,  # [12]
    parts,
    PARTS: tl.constexpr,
):
    dtype = summary_ptr.dtype.element_ty
    part = tl.arange(0, PARTS)
    tokens = tl.sum(_column(sums_ptr, part, parts, 0, 0.0), axis=0)
    count = tl.maximum(tokens, 1.0)
    tl.store(summary_ptr, count.to(dtype))
    for i in tl.static_range(3):
        tl.store(summary_ptr + 1 + i, (tl.sum(_column(sums_ptr, part, parts, 1 + i, 0.0), axis=0) / count).to(dtype))
    tl.store(summary_ptr + 4, (-tl.sum(_column(sums_ptr, part, parts, 4, 0.0), axis=0) / count).to(dtype))
    tl.store(summary_ptr + 5, (tl.sum(_column(sums_ptr, part, parts, 6, 0.0), axis=0) / count).to(dtype))
    tops = _column(sums_ptr, part, parts, 7, MINUS_INF)
    top = tl.max(tops, axis=0)
    bottom = tl.min(_column(sums_ptr, part, parts, 8, float("inf")), axis=0)
    tl.store(summary_ptr + 6, tl.where(tokens > 0, tl.exp(top), 1.0).to(dtype))
    tl.store(summary_ptr + 7, tl.where(tokens > 0, tl.exp(bottom), 1.0).to(dtype))
    scale = _relative(tops, top)
    weights = tl.sum(_column(sums_ptr, part, parts, 9, 0.0) * scale, axis=0)
    squares = tl.sum(_column(sums_ptr, part, parts, 10, 0.0) * scale * scale, axis=0)
    tl.store(summary_ptr + 8, tl.where(tokens > 0, weights * weights / (count * squares), 1.0).to(dtype))
    tl.store(summary_ptr + 9, tokens.to(dtype))
    # The logarithm in the result's own precision: that of a double spills. The mean, of ratios scaled by the largest, is between 1 / count and 1.
    log_mean = tl.where(top == float("inf"), top, top + tl.log(weights.to(dtype) / count.to(dtype)))
    tl.store(summary_ptr + 10, tl.where(tokens > 0, log_mean, 0.0).to(dtype))
    tl.store(summary_ptr + 11, (tl.sum(_column(sums_ptr, part, parts, 5, 0.0), axis=0) / count).to(dtype))


@triton.jit
def _kl_terms_kernel(
    logp_ptr,  # [N]
    reference_ptr,  # [N]
    mask_ptr,  # [N]
    terms_ptr,  # [2, N]
    n,
    clamp: tl.float64,
    KIND: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype = logp_ptr.dtype.element_ty
    clamp = tl.full((), clamp, dtype)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    counts = inside & (tl.load(mask_ptr + at, mask=inside, other=0) != 0)
    d = tl.load(logp_ptr + at, mask=counts, other=0.0) - tl.load(reference_ptr + at, mask=counts, other=0.0)
    if KIND == 0:
        value = d
        slope = tl.zeros_like(d) + 1.0
    elif KIND == 1:
        value = tl.abs(d)
        slope = (d > 0).to(dtype) - (d < 0).to(dtype)
    elif KIND == 2:
        value = 0.5 * d * d
        slope = d
    else:
        x = tl.where(-d > LARGEST_EXPONENT, LARGEST_EXPONENT, -d)
        value = _exp_tail(x)
        slope = tl.where(-d > LARGEST_EXPONENT, 0.0, -(value + x))
    slope = tl.where((value > clamp) | (value < -clamp), 0.0, slope)
    value = tl.where(value > clamp, clamp, tl.where(value < -clamp, -clamp, value))
    tl.store(terms_ptr + at, tl.where(counts, value, 0.0), mask=inside)
    tl.store(terms_ptr + n + at, tl.where(counts, d if STRAIGHT_THROUGH else slope, 0.0), mask=inside)


def ratio_terms(logp, old_logp, advantages, mask, unclipped, bounds, out) -> None:
    terms, free, summary = out
    n = logp.numel()
    blocks = max(1, triton.cdiv(triton.cdiv(n, BLOCK), MOST_PROGRAMS))
    programs = max(1, triton.cdiv(n, BLOCK * blocks))
    sums = torch.empty(programs, COLUMNS.value, dtype=torch.float64, device=logp.device)
    rows = (logp, logp if old_logp is None else old_logp, advantages, mask, mask if unclipped is None else unclipped, terms, free, sums)
    with device_of(logp):
        _ratio_terms_kernel[(programs,)](*rows, n, blocks, *bounds, UNCLIPPED=unclipped is not None, BLOCK=BLOCK, num_warps=WARPS)
        _ratio_summary_kernel[(1,)](sums, summary, programs, PARTS=MOST_PROGRAMS, num_warps=WARPS)


def kl_terms(logp, reference, mask, kind, straight_through, clamp, out) -> None:
    n = logp.numel()
    if n:
        with device_of(logp):
            _kl_terms_kernel[(triton.cdiv(n, BLOCK),)](
                logp, reference, mask, out, n, clamp, KIND=kind, STRAIGHT_THROUGH=straight_through, BLOCK=BLOCK, num_warps=WARPS
            )  # fmt: skip
