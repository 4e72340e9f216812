"""What tokens add to a loss: terms [S, B, T], 0 where masked.

S = 1: values, through which autograd goes. S = 2: a backend has computed them in one pass, and below the values stand their slopes d value / d logp.
Losses only do to terms what is linear in both rows (choose among them, scale them, add them), so that one line serves both.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ratio
from ..selection import one_pass
from .aggregate import TOKEN_MODES, aggregate, divisor
from .kl import ESTIMATES, is_unbiased, kl_estimate, resolve
from .policy import LARGEST_EXPONENT, LossOutput, PolicyInputs, clean, clip_fractions, clipped_surrogate, fraction, masked_mean, ratio_metrics


class ClippedRatio(NamedTuple):
    terms: Tensor  # [S, B, T]: -A r, clipped
    free: Tensor  # bool [B, T]: tokens that count, with a finite logp, and that the clip lets go
    count: Tensor  # 0-d: the number of tokens, at least 1
    metrics: dict[str, Tensor]


def clipped_ratio(
    x: PolicyInputs,
    clip_low: float | None,
    clip_high: float | None,
    dual_clip: float | None = None,
    *,
    unclipped: Tensor | None = None,
    with_distance: bool = False,
) -> ClippedRatio:
    """-A r of every token, clipped as in `clipped_surrogate` unless clip_low is None or the token is one of `unclipped` [B, T].

    metrics: those of `ratio_metrics`; with a clip those of `clip_fractions`, whatever `unclipped` says; with dual_clip clip_fraction_dual;
    with_distance abs_log_ratio.
    """
    if not one_pass(x.logp):
        return _plain_clipped_ratio(x, clip_low, clip_high, dual_clip, unclipped, with_distance)
    bounds = {} if clip_low is None else {"low": 1 - clip_low, "high": 1 + clip_high}
    if dual_clip is not None:
        bounds["dual"] = dual_clip
    if x.log_ratio_clamp is not None:
        bounds["least"] = -x.log_ratio_clamp
    most = LARGEST_EXPONENT if x.log_ratio_clamp is None else x.log_ratio_clamp
    terms, free, summary = ratio.ratio_terms(x.logp, x.old_logp, x.advantages, x.mask, unclipped=unclipped, most=most, **bounds)
    metrics = dict(zip(ratio.SUMMARY, summary.unbind(), strict=True))
    if clip_low is None:
        del metrics["clip_fraction_low"], metrics["clip_fraction_high"]
    if dual_clip is None:
        del metrics["clip_fraction_dual"]
    if not with_distance:
        del metrics["abs_log_ratio"]
    return ClippedRatio(terms, free, metrics.pop("count"), metrics)


def _plain_clipped_ratio(x, clip_low, clip_high, dual_clip, unclipped, with_distance) -> ClippedRatio:
    p = clean(x)
    plain, ratios = -p.advantages * p.ratio, p.ratio.detach()
    count, free, metrics = p.mask.sum().clamp(min=1), p.mask & p.logp.detach().isfinite(), {}
    if clip_low is None:
        values = plain
    else:
        values = clipped_surrogate(p.ratio, p.advantages, clip_low, clip_high, dual_clip)
        if unclipped is not None:
            values = torch.where(unclipped, plain, values)
        free = free & ~torch.where(p.advantages < 0, ratios < 1 - clip_low, (p.advantages > 0) & (ratios > 1 + clip_high))
        metrics = clip_fractions(p.ratio, p.advantages, p.mask, 1 - clip_low, 1 + clip_high)
    if dual_clip is not None:
        metrics["clip_fraction_dual"] = fraction((p.advantages < 0) & (ratios > dual_clip), p.mask, ratios.dtype)
    metrics.update(ratio_metrics(p))
    if with_distance:
        metrics["abs_log_ratio"] = masked_mean(p.log_ratio.abs(), p.mask)
    return ClippedRatio(values.unsqueeze(0), free, count, metrics)


def kl_penalty(x: PolicyInputs, reference_logp: Tensor, where: Tensor, kind: str, clamp: float | None) -> Tensor:
    """`kl_estimate` of the tokens of `where`, a part of the mask."""
    if one_pass(x.logp):
        name, straight_through = resolve(kind)
        return ratio.kl_terms(x.logp, reference_logp, where, list(ESTIMATES).index(name), straight_through, math.inf if clamp is None else clamp)
    dtype = x.advantages.dtype
    own, reference = (torch.where(where, t.to(dtype), 0) for t in (x.logp, reference_logp))
    return kl_estimate(own, reference, kind, clamp=clamp).unsqueeze(0)


def times_ratio(kl: Tensor, x: PolicyInputs, kind: str) -> Tensor:
    """Terms of `kl_penalty` times exp(logp - old_logp), bounded as in `clean`: as a factor that has its own gradient if the estimate is unbiased,
    else as a constant."""
    if kl.shape[0] == 1:
        ratios = clean(x).ratio
        return kl * (ratios if is_unbiased(kind) else ratios.detach())
    ratios = clipped_ratio(x._replace(advantages=x.advantages.new_full(x.logp.shape, -1)), None, None).terms
    if not is_unbiased(kind):
        return kl * ratios[0]
    (value, slope), (r, r_slope) = kl.unbind(), ratios.unbind()
    return torch.stack([value * r, slope * r + value * r_slope])


def weigh_terms(terms: Tensor, x: PolicyInputs) -> Tensor:
    """Times the importance weights, if there are any."""
    return terms if x.weights is None else terms * torch.where(x.mask, x.weights, 0)


def without_gradient(terms: Tensor, where: Tensor) -> Tensor:
    """The same values, and no slope where `where` says."""
    if terms.shape[0] == 1:
        return torch.where(where, terms.detach(), terms)
    return torch.stack([terms[0], torch.where(where, 0, terms[1])])


def values_of(terms: Tensor, x: PolicyInputs) -> Tensor:
    """[B, T] with gradient, for what is not linear."""
    return terms[0] if terms.shape[0] == 1 else ratio.attach(x.logp, terms)


def finish_terms(
    terms: Tensor, x: PolicyInputs, count: Tensor, aggregation: str, normalizer: float | Tensor | None, metrics: dict[str, Tensor]
) -> LossOutput:
    """Terms of all tokens to the output; `count` is that of `clipped_ratio`."""
    if terms.shape[0] == 1 or aggregation not in TOKEN_MODES:
        return LossOutput(aggregate(values_of(terms, x), x.mask, aggregation, normalizer), metrics)
    terms = terms / (count if normalizer is None else divisor(0, normalizer))
    return LossOutput(ratio.attach(x.logp, terms, total=True), metrics)
