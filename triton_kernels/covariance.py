"""Covariance of each token's log-probability with its advantage: a launch for the sums, one for the products.

Each program adds up its own stretch of the tokens and leaves its sums in memory. Each program of the second
launch adds those up, all in the same order. No atomics: the same bits every time.

Calling convention: rlkern/backends/contract.py.
"""

import torch
import triton
import triton.language as tl

from .launch import device_of

BLOCK, WARPS = 1024, 4
MOST_PROGRAMS = 1024  # as many parts as the second launch reads at once


@triton.jit
def _load(logp_ptr, advantages_ptr, mask_ptr, at, inside):
    """logp, advantages and whether the token counts: its mask is set and its logp finite."""
    logp = tl.load(logp_ptr + at, mask=inside, other=0.0)
    advantages = tl.load(advantages_ptr + at, mask=inside, other=0.0)
    counted = inside & (tl.load(mask_ptr + at, mask=inside, other=0) != 0) & (tl.abs(logp) < float("inf"))
    return logp, advantages, counted


@triton.jit
def _covariance_sums_kernel(
    logp_ptr, advantages_ptr, mask_ptr,  # [N]
    sums_ptr,  # [programs, 3]
    n, blocks,  # that a program adds up
    BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    count = tl.zeros((BLOCK,), tl.int32)
    logp_sum = tl.zeros((BLOCK,), logp_ptr.dtype.element_ty)
    advantage_sum = tl.zeros((BLOCK,), logp_ptr.dtype.element_ty)
    for i in range(blocks):
        at = (pid * blocks + i) * BLOCK + cols
        logp, advantages, counted = _load(logp_ptr, advantages_ptr, mask_ptr, at, at < n)
        count += counted.to(tl.int32)
        logp_sum += tl.where(counted, logp, 0.0)
        advantage_sum += tl.where(counted, advantages, 0.0)
    tl.store(sums_ptr + pid * 3, tl.sum(count, axis=0).to(tl.float64))
    tl.store(sums_ptr + pid * 3 + 1, tl.sum(logp_sum, axis=0).to(tl.float64))
    tl.store(sums_ptr + pid * 3 + 2, tl.sum(advantage_sum, axis=0).to(tl.float64))


@triton.jit
def _covariance_kernel(
    logp_ptr, advantages_ptr, mask_ptr,  # [N]
    sums_ptr,  # [parts, 3]
    out_ptr,  # [N]
    n, blocks,  # that a program writes
    parts, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    p = tl.arange(0, PARTS)
    count = tl.sum(tl.load(sums_ptr + p * 3, mask=p < parts, other=0.0), axis=0)
    count = tl.maximum(count, 1.0)
    mean_logp = tl.sum(tl.load(sums_ptr + p * 3 + 1, mask=p < parts, other=0.0), axis=0) / count
    mean_advantage = tl.sum(tl.load(sums_ptr + p * 3 + 2, mask=p < parts, other=0.0), axis=0) / count
    mean_logp = mean_logp.to(logp_ptr.dtype.element_ty)
    mean_advantage = mean_advantage.to(logp_ptr.dtype.element_ty)
    pid = tl.program_id(0).to(tl.int64)
    for i in range(blocks):
        at = (pid * blocks + i) * BLOCK + tl.arange(0, BLOCK)
        logp, advantages, counted = _load(logp_ptr, advantages_ptr, mask_ptr, at, at < n)
        tl.store(out_ptr + at, tl.where(counted, (advantages - mean_advantage) * (logp - mean_logp), 0.0), mask=at < n)


def _grid(n: int) -> tuple[int, int]:
    """(programs, blocks that each of them takes)"""
    blocks = triton.cdiv(triton.cdiv(n, BLOCK), MOST_PROGRAMS)
    return triton.cdiv(n, BLOCK * blocks), blocks


def covariance_sums(logp, advantages, mask) -> torch.Tensor:
    n = logp.numel()
    programs, blocks = _grid(n)
    sums = torch.empty(programs, 3, dtype=torch.float64, device=logp.device)
    with device_of(logp):
        _covariance_sums_kernel[(programs,)](logp, advantages, mask, sums, n, blocks, BLOCK=BLOCK, num_warps=WARPS)
    return sums


def token_covariance(logp, advantages, mask, sums, out) -> None:
    sums = covariance_sums(logp, advantages, mask) if sums is None else sums
    n, parts = logp.numel(), sums.shape[0]
    programs, blocks = _grid(n)
    with device_of(logp):
        _covariance_kernel[(programs,)](
            logp, advantages, mask, sums, out, n, blocks, parts, PARTS=MOST_PROGRAMS, BLOCK=BLOCK, num_warps=WARPS
        )  # fmt: skip
