"""Natural language policy optimisation (NLPO, arXiv 2210.01241): PPO over the vocabulary that a lagging mask policy leaves open."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..advantages import whiten
from ..checks import FINITE, check_count, check_flag, check_number, check_positive, check_tokens
from ..ops import token_stats
from ..rows import as_rows, check_logits, rows_per_chunk, values_at_hand
from .aggregate import aggregate
from .policy import LossOutput, check_clip, fraction, masked_mean, policy_inputs, policy_tokens, total
from .ppo import check_dual_clip
from .terms import clipped_ratio, values_of


def _keep_rows(x: Tensor, top_p: float | None, top_k: int | None, min_tokens_to_keep: int) -> Tensor:
    """[R, V] -> bool [R, V]"""
    if top_k is not None:
        threshold = x.topk(min(max(top_k, min_tokens_to_keep), x.shape[-1]), -1).values[:, -1:]
        return (x >= threshold) & (x > -math.inf)
    ordered, order = x.sort(dim=-1, descending=True, stable=True)
    p = (ordered.softmax(-1) * 2.0**52).long()  # sums of integers have no order: on a GPU those of floats may change from run to run
    before = p.cumsum(-1) - p
    kept = before <= int(top_p * 2**52)
    kept[:, :min_tokens_to_keep] = True
    return torch.empty_like(kept).scatter_(-1, order, kept) & (x > -math.inf)


def _ids(name: str, ids: Tensor, rows: Tensor) -> Tensor:
    """int64 [n] on the device of rows [..., V]. Raises TypeError, ValueError; IndexError for an id outside [0, V) where that can be seen."""
    if not isinstance(ids, Tensor) or ids.dim() != 1 or ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name} must be an integer tensor [n] of ids, got {got}")
    if ids.device != rows.device and ids.device.type != "cpu":
        raise ValueError(f"{name} must be on the device of the logits {rows.device} or on the CPU, got {ids.device}")
    if values_at_hand(ids):
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
    """The tokens that stay open, bool [..., V], from the mask policy's logits. Store it with the rollout: every PPO epoch reuses it.

    Args:
        mask_logits: [..., V] of the mask policy, a copy of the actor refreshed now and then.
        top_p: keep the smallest set of likeliest tokens whose mass exceeds top_p (the one that crosses it included); RL4LMs: 0.9.
        top_k: keep the k likeliest, and those tied with the last of them. Give one of the two.
        min_tokens_to_keep: at least so many (RL4LMs keeps one more than asked for in its encoder-decoder path).
        always_keep: [n] integer ids in [0, V), such as end of sequence; on the logits' device or on a CPU.
        temperature: divides the logits first.

    Tokens at -inf are never kept. Raises TypeError, ValueError for dtypes, shapes and options other than these; IndexError for an id outside of
    [0, V) in always_keep. On a GPU such an id is without effect, and an error with RLKERN_DEBUG=1 only: to look would wait for the device.
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
    rows = as_rows(mask_logits)
    outer, inner, vocab = rows.shape
    out = torch.empty(rows.shape, dtype=torch.bool, device=rows.device)
    accumulate = torch.float64 if rows.dtype == torch.float64 else torch.float32
    step = rows_per_chunk(rows)
    for a in range(outer):
        for start in range(0, inner, step):
            x = rows[a, start : start + step].to(accumulate) / temperature
            out[a, start : start + step] = _keep_rows(x, top_p, top_k, min_tokens_to_keep)
    if always_keep is not None:
        ids = _ids("always_keep", always_keep, rows)
        # One place more, for ids that there are not: neither a write out of bounds nor an assertion on the device.
        kept = torch.zeros(vocab + 1, dtype=torch.bool, device=rows.device)
        kept.index_fill_(0, torch.where((ids >= 0) & (ids < vocab), ids, vocab), True)
        out |= kept[:vocab]
        out &= rows > -math.inf
    return out.view(mask_logits.shape)


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

    renorm=True is the paper's masked policy r = p / S on the set, S the actor's mass on it: logp = log r(target), entropy = -sum r log r.
    renorm=False is what RL4LMs computes: it renormalises the probabilities but not the log-probabilities, so logp = log p(target), the plain
    one, and entropy = -sum r log p.

    Args:
        logits: [..., V] of the actor; keep: bool [..., V] of `nlpo_keep_set`, at least one token a row.
        targets, temperature, mask, ignore_index: as in `rlkern.token_stats`. One masked copy of the logits is made.

    Raises:
        TypeError, ValueError, IndexError: as `rlkern.token_stats`, and for a keep of another dtype or shape.
    """
    check_flag("renorm", renorm)
    check_logits(logits)
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
        raise TypeError(f"keep must be a bool tensor [..., V], got {keep.dtype if isinstance(keep, Tensor) else type(keep).__name__}")
    if keep.shape != logits.shape or keep.device != logits.device:
        raise ValueError(f"keep must be like logits, {tuple(logits.shape)} on {logits.device}, got {tuple(keep.shape)} on {keep.device}")
    options = {"temperature": temperature, "mask": mask, "ignore_index": ignore_index}
    plain = token_stats(logits, targets, **options)
    kept = token_stats(logits.masked_fill(~keep, -math.inf), targets, **options)
    kept_logmass = kept.logsumexp - plain.logsumexp
    if renorm:
        return NLPOStats(kept.logp, kept.entropy, kept_logmass)
    return NLPOStats(plain.logp, kept.entropy - kept_logmass, kept_logmass)


def nlpo_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    normalize_advantages: bool = True,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    log_ratio_clamp: float | None = None,
    aggregation: str = "token-mean",
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """PPO's loss on the log-probabilities of `nlpo_stats`, old and new under the same stored kept set, as RL4LMs runs it.

    Args:
        logp, old_logp: [B, T]; gradients flow into logp; old_logp=None is on-policy. A token at -inf, outside of the kept set, does not
            count: it cannot have been sampled from the set.
        advantages: [B], [B, 1] or [B, T].
        mask: [B, T], nonzero counts.
        entropy: [B, T] of `nlpo_stats`; gradients flow into it. entropy_coef of it is subtracted from the loss (RL4LMs: 0).
        normalize_advantages: to mean 0 and std 1 over the tokens of this minibatch.
        clip_low, clip_high, dual_clip, log_ratio_clamp, aggregation, normalizer: as in `ppo_loss`.

    Returns:
        LossOutput(loss, metrics): those of `ppo_loss`, outside_fraction (tokens left out for being outside of the set) and
        mask_tokens (those and the others), entropy if given.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices and options other than the above.
    """
    check_clip(clip_low, clip_high)
    check_dual_clip(dual_clip)
    check_number("entropy_coef", entropy_coef, 0)
    check_flag("normalize_advantages", normalize_advantages)
    if entropy is None and entropy_coef != 0:
        raise ValueError(f"entropy_coef={entropy_coef} needs entropy= [B, T]")
    options = {"log_ratio_clamp": log_ratio_clamp, "aggregation": aggregation, "normalizer": normalizer}
    given = policy_tokens(logp, old_logp, advantages, mask, **options)
    inside = given.mask & (given.logp > -math.inf)
    if old_logp is not None:
        inside = inside & (given.keep(old_logp) > -math.inf)
    standard = whiten(given.advantages, inside) if normalize_advantages else given.advantages
    x = policy_inputs(logp, old_logp, standard, inside, **options)
    ratio = clipped_ratio(x, clip_low, clip_high, dual_clip)
    values, metrics = values_of(ratio.terms, x), ratio.metrics
    metrics["outside_fraction"] = fraction(~inside, given.mask, given.logp.dtype)
    metrics["mask_tokens"] = total(given.mask, given.logp.dtype)
    if entropy is not None:
        check_tokens("entropy", entropy, logp)
        h = torch.where(inside, entropy.to(values.dtype), 0)
        values = values - entropy_coef * h
        metrics["entropy"] = masked_mean(h, inside)
    return LossOutput(aggregate(values, inside, aggregation, normalizer), metrics)
