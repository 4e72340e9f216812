"""rlkern beside eager PyTorch on this machine, for a few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from ..primitives.token_stats import token_stats

SECONDS = 10.0


class Comparison(NamedTuple):
    shape: tuple[int, int]
    agree: bool  # in what they compute
    eager_ms: float
    rlkern_ms: float


def _eager(logits: Tensor, ids: Tensor) -> Tensor:
    logp = logits.float().log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, ids.unsqueeze(-1)).sum() + entropy.sum()


def _ours(logits: Tensor, ids: Tensor) -> Tensor:
    stats = token_stats(logits, ids)
    return stats.logp.sum() + stats.entropy.sum()


SIDES = (_eager, _ours)


def _milliseconds(function: Callable[[Tensor, Tensor], Tensor], logits: Tensor, ids: Tensor) -> float:
    if logits.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    torch.autograd.grad(function(logits, ids), logits)
    if logits.is_cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def compare(dtype: torch.dtype, device: str, seconds: float) -> Comparison:
    """Log-probability and entropy of rows, forward and backward: medians, both sides in turn."""
    shape = (2048, 131_072) if device == "cuda" else (256, 32_768)
    logits = torch.randn(*shape, device=device).to(dtype).requires_grad_()
    ids = torch.randint(shape[1], shape[:1], device=device)
    eager, ours = (function(logits.detach(), ids) for function in SIDES)
    agree = bool(((ours - eager).abs() <= 1e-3 * eager.abs()).item())
    rounds: list[list[float]] = []
    end = time.perf_counter() + seconds
    while not rounds or time.perf_counter() < end:
        rounds.append([_milliseconds(function, logits, ids) for function in SIDES])
    eager_ms, ours_ms = (median(times) for times in zip(*(rounds[1:] or rounds), strict=True))  # the first warms up
    return Comparison(shape, agree, eager_ms, ours_ms)
