"""Exactly K of the smallest values, K read from the device: a radix select, eight bits a launch, high to low.

A launch counts the next eight bits of the keys that begin as the K-th smallest does. From the counts the
next launch knows eight bits more of the K-th key. Counts are integers, so atomics cannot change their sum.
The last launch marks every smaller key, and of the equal ones as many as are still wanted, by their index.

Calling convention: rlkern/backends/contract.py.
"""

import torch
import triton
import triton.language as tl

from .launch import device_of

BLOCK, WARPS = 2048, 4
BINS = tl.constexpr(256)


@triton.jit
def _load_keys(values_ptr, valid_ptr, at, n, BITS: tl.constexpr):
    """(signed integers in the order of the values, both zeros alike and NaN last; which of them are valid)"""
    x = tl.load(values_ptr + at, mask=at < n, other=0.0)
    if BITS == 64:
        bits = tl.where(x == 0, 0, x.to(tl.int64, bitcast=True))
        key = tl.where(x == x, bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF), 0x7FFFFFFFFFFFFFFF)
    else:
        bits = tl.where(x == 0, 0, x.to(tl.int32, bitcast=True))
        key = tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    return key, tl.load(valid_ptr + at, mask=at < n, other=0) != 0


@triton.jit
def _threshold(counts_ptr, count_ptr, digits):
    """(the first digits of the K-th smallest key, how many of the keys that begin so are among the K)"""
    bins = tl.arange(0, BINS)
    wanted = tl.load(count_ptr)
    prefix = tl.zeros((), tl.int64)
    for i in range(digits):
        counts = tl.load(counts_ptr + i * BINS + bins)
        wanted = tl.minimum(wanted, tl.sum(counts, axis=0))  # there may be fewer than K
        digit = tl.sum((tl.cumsum(counts, axis=0) < wanted).to(tl.int32), axis=0)
        wanted -= tl.sum(tl.where(bins < digit, counts, 0), axis=0)
        prefix = prefix * BINS + tl.where(i == 0, digit - BINS // 2, digit)  # the first digit holds the sign
    return prefix, wanted


@triton.jit(do_not_specialize=["digit"])
def _count_digits_kernel(
    values_ptr, valid_ptr, count_ptr,  # [N], [N], []
    counts_ptr,  # [BITS / 8, BINS], those of digits that are yet to come 0
    of_block_ptr,  # [blocks, BINS]
    n, digit,  # which one to count
    BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    key, valid = _load_keys(values_ptr, valid_ptr, pid * BLOCK + tl.arange(0, BLOCK), n, BITS)
    prefix, _ = _threshold(counts_ptr, count_ptr, digit)
    shift = BITS - 8 * (digit + 1)
    follows = valid & ((digit == 0) | ((key >> tl.minimum(shift + 8, BITS - 1)) == prefix))
    value = ((key >> shift).to(tl.int32) & (BINS - 1)) ^ tl.where(digit == 0, BINS // 2, 0)
    # Those that do not follow are counted as zeros, and taken out again.
    bins = tl.arange(0, BINS)
    counts = tl.histogram(tl.where(follows, value, 0), BINS)
    counts -= tl.where(bins == 0, BLOCK - tl.sum(follows.to(tl.int32), axis=0), 0)
    tl.atomic_add(counts_ptr + digit * BINS + bins, counts, mask=counts > 0, sem="relaxed")
    if shift == 0:
        tl.store(of_block_ptr + pid * BINS + bins, counts)


@triton.jit
def _select_kernel(
    values_ptr, valid_ptr, count_ptr,  # [N], [N], []
    counts_ptr, of_block_ptr, out_ptr,  # [BITS / 8, BINS], [blocks, BINS], [N]
    n, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    at = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key, valid = _load_keys(values_ptr, valid_ptr, at, n, BITS)
    threshold, wanted = _threshold(counts_ptr, count_ptr, BITS // 8)
    earlier = tl.zeros((BLOCK,), tl.int32)
    column = threshold & (BINS - 1)
    for i in range(0, pid, BLOCK):
        block = i + tl.arange(0, BLOCK)
        earlier += tl.load(of_block_ptr + block.to(tl.int64) * BINS + column, mask=block < pid, other=0)
    tie = valid & (key == threshold)
    place = tl.sum(earlier, axis=0) + tl.cumsum(tie.to(tl.int32), axis=0)
    tl.store(out_ptr + at, valid & ((key < threshold) | (tie & (place <= wanted))), mask=at < n)


@triton.jit(do_not_specialize=["minimum", "least"])
def _fraction_count_kernel(
    group_ptr, count_ptr,  # [N], []
    n, fraction: tl.float64, minimum, least, BLOCK: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK)
    tokens = tl.zeros((BLOCK,), tl.int64)
    for i in range(0, n, BLOCK):
        tokens += (tl.load(group_ptr + i + cols, mask=i + cols < n, other=0) != 0).to(tl.int64)
    count = (tl.sum(tokens, axis=0).to(tl.float64) * tl.full((), fraction, tl.float64)).to(tl.int64)
    count = tl.maximum(count, minimum)
    tl.store(count_ptr, tl.where(count < least, 0, count))


@triton.jit
def _selected_means_kernel(
    values_ptr, selected_ptr, mask_ptr, means_ptr,  # [N], means [3]
    n, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype = values_ptr.dtype.element_ty
    cols = tl.arange(0, BLOCK)
    tokens = tl.zeros((BLOCK,), tl.int32)
    chosen = tl.zeros((BLOCK,), tl.int32)
    total = tl.zeros((BLOCK,), dtype)
    chosen_total = tl.zeros((BLOCK,), dtype)
    for i in range(0, n, BLOCK):
        at = i + cols
        mask = tl.load(mask_ptr + at, mask=at < n, other=0) != 0
        selected = tl.load(selected_ptr + at, mask=at < n, other=0) != 0
        values = tl.load(values_ptr + at, mask=mask, other=0.0)
        tokens += mask.to(tl.int32)
        chosen += selected.to(tl.int32)
        total += values
        chosen_total += tl.where(selected, values, 0.0)
    count = tl.maximum(tl.sum(tokens.to(tl.int64), axis=0), 1).to(tl.float64)
    n_chosen = tl.sum(chosen.to(tl.int64), axis=0).to(tl.float64)
    tl.store(means_ptr, (n_chosen / count).to(dtype))
    tl.store(means_ptr + 1, (tl.sum(total.to(tl.float64), axis=0) / count).to(dtype))
    tl.store(means_ptr + 2, (tl.sum(chosen_total.to(tl.float64), axis=0) / tl.maximum(n_chosen, 1.0)).to(dtype))


def select_bottom(values, valid, count, out) -> None:
    n, bits = values.numel(), 8 * values.element_size()
    blocks = triton.cdiv(n, BLOCK)
    counts = torch.zeros(bits // 8, BINS.value, dtype=torch.int32, device=values.device)
    of_block = torch.empty(blocks, BINS.value, dtype=torch.int32, device=values.device)
    shared = (values, valid, count, counts, of_block)
    with device_of(values):
        for digit in range(bits // 8):
            _count_digits_kernel[(blocks,)](*shared, n, digit, BITS=bits, BLOCK=BLOCK, num_warps=WARPS)
        _select_kernel[(blocks,)](*shared, out, n, BITS=bits, BLOCK=BLOCK, num_warps=WARPS)


def select_fraction(values, valid, group, fraction, minimum, least, out) -> None:
    count = torch.empty((), dtype=torch.int64, device=values.device)
    with device_of(values):
        _fraction_count_kernel[(1,)](group, count, group.numel(), fraction, minimum, least, BLOCK=BLOCK, num_warps=8)
    select_bottom(values.view(-1), valid.view(-1), count, out.view(-1))


def selected_means(values, selected, mask, out) -> None:
    """One program: a step of a million tokens is far from where that would be felt."""
    with device_of(values):
        _selected_means_kernel[(1,)](values, selected, mask, out, values.numel(), BLOCK=BLOCK, num_warps=8)
