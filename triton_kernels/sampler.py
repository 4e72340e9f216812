"""What a sampler's rules keep of a row, as its smallest logit, on a GPU. Calling convention:
rlkern/backends/contract.py.

A program has a row. One sweep finds the maximum; the others, as many as the rules need, find the row in the
second-level cache. The logit at which the weights of the greater ones reach a limit lies between two bounds.
A sweep adds up what is above three numbers between them, so each quarters what is left. Tiles without a
logit between the bounds are only read. Weights are integers, as sums of floats would depend on the shape of
a tile.
"""

import math

import torch
import triton
import triton.language as tl

from .launch import device_of, gpu, row_options, starts_aligned, strides
from .rows import BATCH_SHAPE, NEG_INF, row_start

TILE_BYTES, WARPS = 4096, 8
TRAILING_ZEROS = {torch.bfloat16: 16, torch.float16: 13}  # of the bits of a float32 that holds one


@triton.jit
def _key(x, ZEROS: tl.constexpr):
    """An int64 in the order of floats."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        key = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        bits = x.to(tl.int32, bitcast=True)
        key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) >> ZEROS
    return key


@triton.jit
def _of_key(key, ACC: tl.constexpr, ZEROS: tl.constexpr):
    if ACC == tl.float64:
        x = (key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)
    else:
        key = (key << ZEROS) | ((key >> 63) & ((1 << ZEROS) - 1))
        x = (key ^ ((key >> 63) & 0x7FFFFFFF)).to(tl.int32).to(tl.float32, bitcast=True)
    return x


@triton.jit
def _tile(row_ptr, start, vocab, ACC: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """[BLOCK / LANES, LANES]: a thread has a row of it, 16 bytes, so sums of rows take one register."""
    cols = start + tl.arange(0, BLOCK // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    return tl.load(row_ptr + cols, mask=cols < vocab, other=NEG_INF).to(ACC)


@triton.jit
def _masses(x, top, inv_t, unit):
    return (tl.exp((x.to(tl.float64) - top) * inv_t) * unit + 0.5).to(tl.int64)


@triton.jit
def _search(
    row_ptr, vocab, low, high, limit, inv_t, unit,  # low <= high, floats of the accumulation type
    MASSES: tl.constexpr, ACC: tl.constexpr, ZEROS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The least number from about `low` on such that all logits above it weigh less than `limit`."""
    top = high.to(tl.float64)
    lo = _key(low, ZEROS)
    hi = _key(high, ZEROS)
    above = tl.zeros((), tl.int64)  # what is above hi weighs that
    while lo < hi:
        step = tl.maximum((hi >> 2) - (lo >> 2), 1)
        end = _of_key(hi, ACC, ZEROS)
        first = _of_key(lo + step - 1, ACC, ZEROS)
        second = _of_key(lo + 2 * step - 1, ACC, ZEROS)
        third = _of_key(lo + 3 * step - 1, ACC, ZEROS)
        of_first = tl.zeros((BLOCK // LANES,), tl.int64)
        of_second = tl.zeros((BLOCK // LANES,), tl.int64)
        of_third = tl.zeros((BLOCK // LANES,), tl.int64)
        for start in tl.range(0, vocab, BLOCK, num_stages=STAGES):
            x = _tile(row_ptr, start, vocab, ACC, BLOCK, LANES)
            between = (x > first) & (x <= end)
            if tl.max(tl.max(between.to(tl.int32), axis=1), axis=0) > 0:
                weights = between.to(tl.int64)
                if MASSES:
                    weights = tl.where(between, _masses(x, top, inv_t, unit), 0)
                of_first += tl.sum(weights, axis=1)
                of_second += tl.sum(tl.where(x > second, weights, 0), axis=1)
                of_third += tl.sum(tl.where(x > third, weights, 0), axis=1)
        of_first = above + tl.sum(of_first, axis=0)
        of_second = above + tl.sum(of_second, axis=0)
        of_third = above + tl.sum(of_third, axis=0)
        heavy = (of_first >= limit).to(tl.int64) + (of_second >= limit).to(tl.int64) + (of_third >= limit).to(tl.int64)
        lower = lo + step * heavy
        upper = lower + step - 1
        found = (heavy < 3) & (upper < hi)
        above = tl.where(found, tl.where(heavy == 0, of_first, tl.where(heavy == 1, of_second, of_third)), above)
        hi = tl.where(found, upper, hi)
        lo = tl.minimum(lower, hi)
    return _of_key(lo, ACC, ZEROS)


@triton.jit(do_not_specialize=(*BATCH_SHAPE, "top_k", "bits"))
def sampler_threshold_kernel(
    logits_ptr, mask_ptr, temperature_ptr, out_ptr,  # [A, B, V], [N], [N], [N]
    inner, stride_a, stride_b, vocab, temperature: tl.float64, top_k, top_p: tl.float64, log_min_p: tl.float64, log_share: tl.float64, bits,
    HAS_MASK: tl.constexpr, ROW_TEMPERATURE: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, JOINT: tl.constexpr,
    ACC: tl.constexpr, ZEROS: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    row_ptr = logits_ptr + row_start(row, inner, stride_a, stride_b, ALIGN)
    row = row.to(tl.int64)
    if HAS_MASK:
        if tl.load(mask_ptr + row) == 0:
            tl.store(out_ptr + row, NEG_INF)
            return
    t = tl.load(temperature_ptr + row).to(tl.float64) if ROW_TEMPERATURE else tl.full((), temperature, tl.float64)

    maxima = tl.full((BLOCK // LANES,), NEG_INF, ACC)
    finite = tl.zeros((BLOCK // LANES,), tl.int32)
    strange = tl.zeros((BLOCK // LANES,), tl.int32)
    for start in tl.range(0, vocab, BLOCK, num_stages=STAGES):
        x = _tile(row_ptr, start, vocab, ACC, BLOCK, LANES)
        maxima = tl.maximum(maxima, tl.max(x, axis=1))
        finite += tl.sum((x > NEG_INF).to(tl.int32), axis=1)
        strange += tl.sum((x != x).to(tl.int32), axis=1)
    top = tl.max(maxima, axis=0)
    defined = (tl.sum(strange, axis=0) == 0) & (tl.abs(top) < float("inf")) & (t > 0)
    if not defined:
        tl.store(out_ptr + row, float("nan"))
        return

    least = tl.full((), log_min_p, tl.float64) * t + top.to(tl.float64)
    if TOP_K:
        wanted = tl.minimum(tl.sum(finite, axis=0), top_k).to(tl.int64)
        found = _search(row_ptr, vocab, tl.full((), NEG_INF, ACC), top, wanted, 0.0, 0.0, False, ACC, ZEROS, BLOCK, LANES, STAGES)
        least = tl.maximum(least, found.to(tl.float64))
    if TOP_P:
        inv_t = 1.0 / t
        unit = (tl.full((), 1, tl.int64) << bits).to(tl.float64)
        from_ = tl.full((), NEG_INF, tl.float64) if JOINT else least
        masses = tl.zeros((BLOCK // LANES,), tl.int64)
        for start in tl.range(0, vocab, BLOCK, num_stages=STAGES):
            x = _tile(row_ptr, start, vocab, ACC, BLOCK, LANES)
            masses += tl.sum(tl.where(x.to(tl.float64) >= from_, _masses(x, top.to(tl.float64), inv_t, unit), 0), axis=1)
        total = tl.sum(masses, axis=0)
        limit = tl.full((), top_p, tl.float64) * total.to(tl.float64)
        limit = tl.minimum(tl.maximum(tl.ceil(limit).to(tl.int64), 1), total)
        # What is not greater than a kept token has more than 1 - top_p of the mass, and the token its share.
        low = tl.maximum(from_, tl.full((), log_share, tl.float64) * t + top.to(tl.float64)).to(ACC)
        found = _search(row_ptr, vocab, tl.minimum(low, top), top, limit, inv_t, unit, True, ACC, ZEROS, BLOCK, LANES, STAGES)
        least = tl.maximum(least, found.to(tl.float64))

    minima = tl.full((BLOCK // LANES,), float("inf"), ACC)
    for start in tl.range(0, vocab, BLOCK, num_stages=STAGES):
        x = _tile(row_ptr, start, vocab, ACC, BLOCK, LANES)
        minima = tl.minimum(minima, tl.min(tl.where((x.to(tl.float64) >= least) & (x > NEG_INF), x, float("inf")), axis=1))
    tl.store(out_ptr + row, tl.min(minima, axis=0))


def mass_bits(vocab: int) -> int:
    """As in the contract."""
    return min(50, 62 - (vocab - 1).bit_length())


def sampler_threshold(logits, mask, temperature, top_k, top_p, log_min_p, joint, out) -> None:
    pointers, number, options = row_options(logits, mask, temperature, out.dtype)
    outer, inner, vocab = logits.shape
    align = 16 // logits.element_size()
    log_share = math.log((1 - top_p) / (2 * vocab)) if top_p < 1 else 0.0
    row_args = (inner, *strides(logits), vocab, number, top_k, top_p, log_min_p, log_share, mass_bits(vocab))
    rules = dict(TOP_K=top_k > 0, TOP_P=top_p < 1, JOINT=joint, ZEROS=TRAILING_ZEROS.get(logits.dtype, 0))
    whole = TILE_BYTES // logits.element_size()
    block = min(whole, max(256, triton.next_power_of_2(vocab)))
    shape = dict(
        ALIGN=align if starts_aligned(logits, align) else 1,
        BLOCK=block,
        LANES=align,
        STAGES=1 if gpu(logits.device).amd else 3,
        num_warps=max(1, WARPS * block // whole),
    )
    with device_of(logits):
        sampler_threshold_kernel[(outer * inner,)](logits, *pointers, out, *row_args, **options, **rules, **shape)
