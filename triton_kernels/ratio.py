"""What a token adds to a policy loss, and its derivative by the token's log-probability.

One launch computes the tokens, one what is reported of them. Each program leaves the sums over its own
stretch in memory. One program adds those up, always in the same order. No atomics: the same bits every time.
Sums of ratios are kept relative to the largest so far, as in a log-sum-exp: no square overflows or vanishes.

Calling convention: rlkern/backends/contract.py.
"""

import torch
import triton
import triton.language as tl

from .constants import (
    KL_ABS,
    KL_K1,
    KL_K2,
    LARGEST_EXPONENT,
    SUMMARY_ABS_LOG_RATIO,
    SUMMARY_APPROX_KL_K1,
    SUMMARY_APPROX_KL_K3,
    SUMMARY_CLIP_FRACTION_LOW,
    SUMMARY_COUNT,
    SUMMARY_EFFECTIVE_SAMPLE_SIZE,
    SUMMARY_LOG_MEAN_RATIO,
    SUMMARY_RATIO_MAX,
    SUMMARY_RATIO_MIN,
    SUMMARY_TOKENS,
)
from .launch import device_of

BLOCK, WARPS = 1024, 4
MOST_PROGRAMS = 1024  # as many parts as the second launch reads at once
# What a program leaves, in this order; COLUMNS is how many these are.
TOKENS, BELOW, ABOVE, BEYOND, D_SUM, DISTANCE, K3, LARGEST, SMALLEST, WEIGHTS, SQUARES, COLUMNS = (
    tl.constexpr(column) for column in range(12)
)  # fmt: skip
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
    logp_ptr, old_logp_ptr, advantages_ptr, mask_ptr, unclipped_ptr,  # [N], unclipped is read if UNCLIPPED
    terms_ptr, free_ptr,  # [2, N], [N]
    sums_ptr,  # [programs, COLUMNS]
    n, blocks,  # that a program takes
    low: tl.float64, high: tl.float64, dual: tl.float64, least: tl.float64, most: tl.float64,
    UNCLIPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
    tl.store(row + TOKENS, tl.sum(tokens, axis=0).to(tl.float64))
    tl.store(row + BELOW, tl.sum(below, axis=0).to(tl.float64))
    tl.store(row + ABOVE, tl.sum(above, axis=0).to(tl.float64))
    tl.store(row + BEYOND, tl.sum(beyond, axis=0).to(tl.float64))
    tl.store(row + D_SUM, tl.sum(d_sum, axis=0).to(tl.float64))
    tl.store(row + DISTANCE, tl.sum(distance, axis=0).to(tl.float64))
    tl.store(row + K3, tl.sum(k3, axis=0).to(tl.float64))
    tl.store(row + LARGEST, top.to(tl.float64))
    tl.store(row + SMALLEST, tl.min(smallest, axis=0).to(tl.float64))
    tl.store(row + WEIGHTS, tl.sum(weights * scale, axis=0).to(tl.float64))
    tl.store(row + SQUARES, tl.sum(squares * scale * scale, axis=0).to(tl.float64))


@triton.jit
def _column(sums_ptr, part, parts, column, other):
    return tl.load(sums_ptr + part * COLUMNS + column, mask=part < parts, other=other)


@triton.jit
def _total(sums_ptr, part, parts, column):
    return tl.sum(_column(sums_ptr, part, parts, column, 0.0), axis=0)


@triton.jit
def _ratio_summary_kernel(
    sums_ptr,  # [parts, COLUMNS]
    summary_ptr,  # one for each SUMMARY_
    parts,
    PARTS: tl.constexpr,
):
    dtype = summary_ptr.dtype.element_ty
    part = tl.arange(0, PARTS)
    tokens = _total(sums_ptr, part, parts, TOKENS)
    count = tl.maximum(tokens, 1.0)
    tl.store(summary_ptr + SUMMARY_COUNT, count.to(dtype))
    for i in tl.static_range(3):  # below, above, beyond
        tl.store(summary_ptr + SUMMARY_CLIP_FRACTION_LOW + i, (_total(sums_ptr, part, parts, BELOW + i) / count).to(dtype))
    tl.store(summary_ptr + SUMMARY_APPROX_KL_K1, (-_total(sums_ptr, part, parts, D_SUM) / count).to(dtype))
    tl.store(summary_ptr + SUMMARY_APPROX_KL_K3, (_total(sums_ptr, part, parts, K3) / count).to(dtype))
    tops = _column(sums_ptr, part, parts, LARGEST, MINUS_INF)
    top = tl.max(tops, axis=0)
    bottom = tl.min(_column(sums_ptr, part, parts, SMALLEST, float("inf")), axis=0)
    tl.store(summary_ptr + SUMMARY_RATIO_MAX, tl.where(tokens > 0, tl.exp(top), 1.0).to(dtype))
    tl.store(summary_ptr + SUMMARY_RATIO_MIN, tl.where(tokens > 0, tl.exp(bottom), 1.0).to(dtype))
    scale = _relative(tops, top)
    weights = tl.sum(_column(sums_ptr, part, parts, WEIGHTS, 0.0) * scale, axis=0)
    squares = tl.sum(_column(sums_ptr, part, parts, SQUARES, 0.0) * scale * scale, axis=0)
    tl.store(summary_ptr + SUMMARY_EFFECTIVE_SAMPLE_SIZE, tl.where(tokens > 0, weights * weights / (count * squares), 1.0).to(dtype))
    tl.store(summary_ptr + SUMMARY_TOKENS, tokens.to(dtype))
    # The logarithm in the result's own precision: that of a double spills. Scaled by the largest ratio, the
    # mean is between 1 / count and 1.
    log_mean = tl.where(top == float("inf"), top, top + tl.log(weights.to(dtype) / count.to(dtype)))
    tl.store(summary_ptr + SUMMARY_LOG_MEAN_RATIO, tl.where(tokens > 0, log_mean, 0.0).to(dtype))
    tl.store(summary_ptr + SUMMARY_ABS_LOG_RATIO, (_total(sums_ptr, part, parts, DISTANCE) / count).to(dtype))


@triton.jit
def _kl_terms_kernel(
    logp_ptr, reference_ptr, mask_ptr, terms_ptr,  # [N], terms [2, N]
    n, clamp: tl.float64,
    KIND: tl.constexpr, STRAIGHT_THROUGH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype = logp_ptr.dtype.element_ty
    clamp = tl.full((), clamp, dtype)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    counts = inside & (tl.load(mask_ptr + at, mask=inside, other=0) != 0)
    d = tl.load(logp_ptr + at, mask=counts, other=0.0) - tl.load(reference_ptr + at, mask=counts, other=0.0)
    if KIND == KL_K1:
        value = d
        slope = tl.zeros_like(d) + 1.0
    elif KIND == KL_ABS:
        value = tl.abs(d)
        slope = (d > 0).to(dtype) - (d < 0).to(dtype)
    elif KIND == KL_K2:
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
