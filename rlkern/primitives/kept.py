"""NLPO's kept sets from another policy's logits, and log-probabilities within (arXiv 2210.01241)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import FINITE, check_count, check_flags, check_logits, check_number, check_positive, expect
from ..operator import values_readable
from .kept_sets import Kept
from .sampler import sampler_threshold
from .token_stats import token_logprobs, token_stats

_EQUAL = 1e-9  # masses of `sampler_threshold` that differ by less may be equal


def _ids(name: str, ids: Tensor, rows: Tensor) -> Tensor:
    """ids as int64 [n] on the device of rows [..., V], checked; their range only where values can be read."""
    expect(name, ids, "integer", "[n]")
    if ids.device != rows.device and ids.device.type != "cpu":
        raise ValueError(f"{name} must be on the device of the logits {rows.device} or on the CPU, got {ids.device}")
    if values_readable(ids):
        bad = (ids < 0) | (ids >= rows.shape[-1])
        if bad.any():
            raise IndexError(f"{name} holds the id {ids[bad][0].item()}, out of range for the {rows.shape[-1]} logits of a row of mask_logits")
    return ids.to(rows.device).long()


@torch.no_grad()
def nlpo_keep_set(
    mask_logits: Tensor,
    *,
    top_p: float | None = None,
    top_k: int | None = None,
    min_tokens_to_keep: int = 1,
    always_keep: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """The tokens that stay open, bool [..., V]. Store it with the rollout: every PPO epoch reuses it.

    Args:
        mask_logits: [..., V] of the mask policy, a copy of the actor refreshed now and then.
        top_p: keep the smallest set of likeliest tokens whose mass exceeds top_p (RL4LMs: 0.9).
        top_k: keep the k likeliest. Give one of the two. Those tied with the last that is kept stay too.
        min_tokens_to_keep: at least so many (RL4LMs keeps one more than this in its encoder-decoder path).
        always_keep: [n] integer ids in [0, V), such as end of sequence; on the logits' device or on a CPU.
        temperature: divides the logits first.

    Tokens at -inf are never kept, and of a row that is no distribution only those of always_keep. Raises
    TypeError, ValueError for other dtypes, shapes and options, and IndexError for an id outside [0, V) in
    always_keep. On a GPU the check would wait for the device. Without RLKERN_DEBUG=1 such an id has no effect
    there. The set without always_keep is one number a row: `sampler_threshold`.
    """
    check_logits(mask_logits, "mask_logits")
    if (top_p is None) == (top_k is None):
        raise ValueError(f"give one of top_p and top_k, got top_p={top_p}, top_k={top_k}")
    if top_p is not None:
        check_number("top_p", top_p, 0, 1)
    if top_k is not None:
        check_count("top_k", top_k, 1)
    check_count("min_tokens_to_keep", min_tokens_to_keep, 1)
    check_positive("temperature", temperature, FINITE)
    vocab = mask_logits.shape[-1]
    least = sampler_threshold(mask_logits, top_k=max(top_k or 1, min_tokens_to_keep))
    if top_p is not None:
        least = torch.minimum(least, sampler_threshold(mask_logits, top_p=min(1.0, top_p + _EQUAL), temperature=temperature))
    out = mask_logits >= least.unsqueeze(-1)
    if always_keep is not None:
        ids = _ids("always_keep", always_keep, mask_logits)
        # One entry more for ids out of range: no write out of bounds, no assertion on the device.
        kept = torch.zeros(vocab + 1, dtype=torch.bool, device=mask_logits.device)
        kept.index_fill_(0, torch.where((ids >= 0) & (ids < vocab), ids, vocab), True)
        out |= kept[:vocab]
    return out.logical_and_(mask_logits > -math.inf)


class NLPOStats(NamedTuple):
    """Each shaped like targets, float32 (float64 for float64 logits)."""

    logp: Tensor  # -inf where the target is not in the kept set and renorm is True
    entropy: Tensor
    kept_logmass: Tensor  # log of the actor's mass on the kept set


def nlpo_stats(
    logits: Tensor,
    targets: Tensor,
    keep: Tensor,
    *,
    renorm: bool = True,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
) -> NLPOStats:
    """Log-probability and entropy of the actor restricted to the kept set, differentiable.

    renorm=True is the paper's masked policy r = p / S on the set, where S is the actor's mass on it: logp =
    log r(target), entropy = -sum r log r. renorm=False is what RL4LMs computes. It renormalises probabilities
    but not log-probabilities: logp = log p(target), the plain one, and entropy = -sum r log p.

    Args:
        logits: [..., V] of the actor; keep: bool [..., V] of `nlpo_keep_set`, at least one token a row.
        targets, temperature, mask, ignore_index: as in `rlkern.token_stats`.

    Raises:
        TypeError, ValueError, IndexError: as `rlkern.token_stats`, and for a keep of another dtype or shape.
    """
    check_flags(renorm=renorm)
    check_logits(logits)
    expect("keep", keep, "bool", "[..., V]", like=("logits", logits))
    rows: dict[str, Any] = {"temperature": temperature, "mask": mask, "ignore_index": ignore_index}
    kept = token_stats(logits, targets, keep=Kept.mask(keep), outside="minus_inf", with_full=True, **rows)
    entropy, kept_logmass = kept.entropy, kept.logsumexp - kept.full_logsumexp
    if renorm:
        return NLPOStats(kept.logp, entropy, kept_logmass)
    return NLPOStats(token_logprobs(logits, targets, **rows), entropy - kept_logmass, kept_logmass)
