"""Sums over packed sequences: a program a sequence, float64 lanes, one sum of them at the end. No atomics.
And back: a gather by tokens, whatever the sizes of their sequences.

Calling convention: rlkern/backends/contract.py.
"""

import torch
import triton
import triton.language as tl

from .launch import device_of

BLOCK, WARPS = 1024, 4


@triton.jit
def _sequence_sums_kernel(
    values_ptr,  # [K, N]
    mask_ptr,  # [N]
    cu_seqlens_ptr,  # [S + 1], on a GPU nobody has checked them
    out_ptr,  # [K, S]
    n, sequences,
    BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    row, i = pid // sequences, pid % sequences
    begin = tl.maximum(tl.load(cu_seqlens_ptr + i), 0)
    end = tl.minimum(tl.load(cu_seqlens_ptr + i + 1), n)
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        counted = (at < end) & (tl.load(mask_ptr + at, mask=at < end, other=0) != 0)
        x = tl.load(values_ptr + row * n + at, mask=counted, other=0.0)
        sums += x.to(tl.float64)
    tl.store(out_ptr + pid, tl.sum(sums, axis=0))


@triton.jit
def _sequence_spread_kernel(
    x_ptr,  # [S]
    mask_ptr,  # [N]
    seq_idx_ptr,  # [N], on a GPU nobody has checked them
    out_ptr,  # [N]
    n, sequences,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    own = tl.load(seq_idx_ptr + at, mask=inside, other=-1)
    counted = (own >= 0) & (own < sequences)
    if HAS_MASK:
        counted &= tl.load(mask_ptr + at, mask=inside, other=0) != 0
    tl.store(out_ptr + at, tl.load(x_ptr + own, mask=counted, other=0.0), mask=inside)


def sequence_sums(values: torch.Tensor, mask: torch.Tensor, cu_seqlens: torch.Tensor, out: torch.Tensor) -> None:
    rows, n = values.shape
    sequences = out.shape[1]
    with device_of(values):
        _sequence_sums_kernel[(rows * sequences,)](values, mask, cu_seqlens, out, n, sequences, BLOCK=BLOCK, num_warps=WARPS)


def sequence_spread(x: torch.Tensor, mask: torch.Tensor | None, seq_idx: torch.Tensor, out: torch.Tensor) -> None:
    n, options = out.numel(), dict(HAS_MASK=mask is not None, BLOCK=BLOCK, num_warps=WARPS)
    with device_of(x):
        _sequence_spread_kernel[(triton.cdiv(n, BLOCK),)](x, mask, seq_idx, out, n, x.numel(), **options)
