"""Sums over packed sequences: a program a sequence, float64 lanes, one sum of them at the end. No atomics.

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


def sequence_sums(values: torch.Tensor, mask: torch.Tensor, cu_seqlens: torch.Tensor, out: torch.Tensor) -> None:
    rows, n = values.shape
    sequences = out.shape[1]
    with device_of(values):
        _sequence_sums_kernel[(rows * sequences,)](values, mask, cu_seqlens, out, n, sequences, BLOCK=BLOCK, num_warps=WARPS)
