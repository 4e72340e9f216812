"""The ratio of the policy to the one that sampled: its clipped term in a loss, and its metrics.

A kernel computes all of it in one pass, with slopes. torch.compile fuses the plain form, torch.func
transforms it, and the reference backend differentiates it any number of times.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends.contract import LARGEST_EXPONENT, SUMMARY
from ..checks import numbers
from ..operator import Operator
from .kinks import bounded
from .packing import Packed, Rows
from .reductions import fraction, masked_mean
from .token_terms import TokenTerms


class PolicyInputs(NamedTuple):
    """The checked arguments of policy losses, not cleaned: masked places may hold anything.

    [B, T] stands for the shape of logp: with a pack that is any shape of N elements.
    """

    logp: Tensor  # [B, T] float, with its gradient
    old_logp: Tensor | None  # [B, T] float
    advantages: Tensor  # [B, T], in the dtype of the computation
    mask: Tensor  # [B, T] bool
    sequences: Rows | Packed  # of that mask
    weights: Tensor | None  # as the advantages
    log_ratio_clamp: float | None
    weighs_penalties: bool = True  # not only the policy's term

    def among(self, mask: Tensor) -> PolicyInputs:
        """The same with other tokens that count."""
        sequences = self.sequences.among(mask)
        return PolicyInputs(self.logp, self.old_logp, self.advantages, mask, sequences, self.weights, self.log_ratio_clamp, self.weighs_penalties)

    def weigh(self, terms: TokenTerms) -> TokenTerms:
        """Times the importance weights, if there are any."""
        return terms if self.weights is None else terms.scaled(torch.where(self.mask, self.weights, 0))

    def weigh_penalty(self, terms: TokenTerms) -> TokenTerms:
        """`weigh` for a term beside the policy's, which corrections of the rollout do not touch."""
        return self.weigh(terms) if self.weighs_penalties else terms


class PolicyTokens(NamedTuple):
    """The tokens of a batch, [B, T] or as packed, float32 (float64 for float64 logp).

    No value and no gradient comes from masked ones. Only logp, log_ratio and ratio carry gradient.
    """

    logp: Tensor  # log pi(token), 0 where masked
    log_ratio: Tensor  # log pi / pi_old, 0 where masked; never clamped
    ratio: Tensor  # exp(log_ratio), 1 where masked; finite, so its product with A = 0 is 0
    advantages: Tensor  # without gradient, 0 where masked
    mask: Tensor  # bool
    sequences: Rows | Packed  # of that mask
    weights: Tensor | None  # without gradient, 0 where masked; None stands for 1

    def keep(self, x: Tensor) -> Tensor:
        """x [B, T] detached, in the dtype of the computation and 0 where masked."""
        return torch.where(self.mask, x.detach().to(self.logp.dtype), 0)

    def weigh(self, values: Tensor) -> Tensor:
        """The values times the importance weights, if there are any."""
        return values if self.weights is None else values * self.weights

    def score(self) -> Tensor:
        """logp, but 0 where the advantage is 0: then the product is 0 even at logp = -inf."""
        return torch.where(self.advantages == 0, 0, self.logp)


def own_gradient(x: Tensor) -> Tensor:
    """0 with the gradient of x; also where x is infinite, and x - x is not a number."""
    return torch.where(x.isfinite(), x - x.detach(), 0)


def clean(x: PolicyInputs) -> PolicyTokens:
    """Checked inputs made safe to compute with."""
    logp, log_ratio, ratio, advantages = _clean(x.logp, x.old_logp, x.advantages, x.mask, *exponent_bounds(x.log_ratio_clamp))
    weights = None if x.weights is None else torch.where(x.mask, x.weights, 0)
    return PolicyTokens(logp, log_ratio, ratio, advantages, x.mask, x.sequences, weights)


def log_ratios(x: PolicyInputs) -> Tensor:
    """log pi / pi_old [B, T] without gradient, in the dtype of the computation; anything where masked."""
    logp = x.logp.detach().to(x.advantages.dtype)
    return torch.zeros_like(logp) if x.old_logp is None else logp - x.old_logp.detach().to(logp.dtype)


def exponent_bounds(log_ratio_clamp: float | None) -> tuple[float | None, float]:
    """(least, most) of the log ratio."""
    return (None, LARGEST_EXPONENT) if log_ratio_clamp is None else (-log_ratio_clamp, log_ratio_clamp)


def _clean(logp, old_logp, advantages, mask, least, most):
    """(logp, log ratio, ratio, advantages), neutral where masked."""
    logp = torch.where(mask, logp.to(advantages.dtype), 0)
    old_logp = logp.detach() if old_logp is None else torch.where(mask, old_logp.detach().to(logp.dtype), 0)
    log_ratio = logp - old_logp
    return logp, log_ratio, bounded(log_ratio, least, most).exp(), torch.where(mask, advantages, 0)


# --- the clip -----------------------------------------------------------------------------------------------


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None) -> Tensor:
    """max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), for A < 0 at most -A dual_clip.

    It is -A times the clipped ratio: one that overflows and is clipped away then makes no NaN gradient.
    """
    return _clipped(ratio, advantages, 1 - clip_low, 1 + clip_high, dual_clip)


def _clipped(ratio, advantages, low, high, dual):
    return -advantages * torch.where(advantages < 0, bounded(ratio, low, dual), bounded(ratio, high=high))


class ClippedRatio(NamedTuple):
    terms: TokenTerms  # -A r, clipped
    free: Tensor  # bool [B, T]: tokens that count, have a finite logp and are not clipped
    tokens: Tensor  # 0-d: how many count, at least 1
    metrics: dict[str, Tensor]


def clipped_ratio(
    x: PolicyInputs,
    clip_low: float | None = None,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    *,
    unclipped: Tensor | None = None,
    log_ratio: Tensor | None = None,
    with_distance: bool = False,
) -> ClippedRatio:
    """-A r by token, clipped as in `clipped_surrogate` unless clip_low is None or the token in `unclipped`.

    log_ratio: [B, T] without gradient, a sequence's log r in place of the token's own, with the slope of one
        token's; log_ratio_clamp bounds it from above alone.

    metrics: those of `ratio_metrics`; with a clip those of `clip_fractions`, which ignore `unclipped` [B, T];
    with dual_clip clip_fraction_dual; with_distance abs_log_ratio.
    """
    low, high = (None, None) if clip_low is None or clip_high is None else (1 - clip_low, 1 + clip_high)
    least, most = exponent_bounds(x.log_ratio_clamp)
    bounds = (low, high, dual_clip, least if log_ratio is None else None, most)
    terms, free, summary = _ratio_terms(x.logp, x.old_logp, x.advantages, x.mask, unclipped, log_ratio, *bounds)
    metrics = dict(zip(SUMMARY, summary.unbind(), strict=True))
    count = metrics.pop("count")
    if low is None:
        del metrics["clip_fraction_low"], metrics["clip_fraction_high"]
    if dual_clip is None:
        del metrics["clip_fraction_dual"]
    if not with_distance:
        del metrics["abs_log_ratio"]
    return ClippedRatio(TokenTerms(x.logp, terms), free, count, metrics)


def ratio_terms(x: PolicyInputs) -> TokenTerms:
    """The ratio itself, bounded as in `clean`; 0 where masked."""
    minus_one = x.advantages.new_full(x.logp.shape, -1)
    return clipped_ratio(PolicyInputs(x.logp, x.old_logp, minus_one, x.mask, x.sequences, None, x.log_ratio_clamp)).terms


def _new_ratio_terms(logp, old_logp, advantages, *args):
    """(terms, free, summary)"""
    shape, like = logp.shape, advantages
    return like.new_empty((2, *shape)), like.new_empty(shape, dtype=torch.bool), like.new_empty(len(SUMMARY))


def _kernel(logp, old_logp, advantages, mask, unclipped, log_ratio, low, high, dual, least, most):
    out = _new_ratio_terms(logp, old_logp, advantages)
    if log_ratio is not None:
        logp, old_logp = log_ratio, torch.zeros_like(log_ratio)
    bounds = (
        -math.inf if low is None else low,
        math.inf if high is None else high,
        math.inf if dual is None else dual,
        -math.inf if least is None else least,
        math.inf if most is None else most,
    )
    backends.select(logp.device).ratio_terms(
        numbers(logp, advantages.dtype).contiguous(),
        None if old_logp is None else numbers(old_logp, advantages.dtype).contiguous(),
        advantages.contiguous(),
        mask.contiguous(),
        None if unclipped is None else unclipped.contiguous(),
        bounds,
        out,
    )
    return out


def _plain(logp, old_logp, advantages, mask, unclipped, log_ratio, low, high, dual, least, most):
    if log_ratio is not None:
        logp, old_logp = log_ratio + own_gradient(torch.where(mask, logp.to(log_ratio.dtype), 0)), torch.zeros_like(log_ratio)
    logp, log_ratio, ratio, a = _clean(logp, old_logp, advantages, mask, least, most)
    values, free, r = -a * ratio, mask & logp.detach().isfinite(), ratio.detach()
    if low is not None:
        clipped = _clipped(ratio, a, low, high, dual)
        values = clipped if unclipped is None else torch.where(unclipped, values, clipped)
        free = free & ~torch.where(a < 0, r < low, (a > 0) & (r > high))
    return values, free, _plain_summary(log_ratio.detach(), r, a, mask, low, high, dual)


@torch.no_grad()
def _plain_summary(d, ratio, advantages, mask, low, high, dual):
    none, count = torch.zeros_like(mask), mask.sum()
    any_token = count > 0
    counted = torch.where(mask, d, -math.inf)
    # A batch of size 0 has no ends.
    ends = (counted.amax(), torch.where(mask, d, math.inf).amin()) if d.numel() > 0 else (d.sum(), d.sum())
    largest, smallest = (torch.where(any_token, end, 0) for end in ends)
    shift = torch.where(largest.isinf(), 0, largest)
    scaled = (counted - shift).exp()  # the largest is 1: no overflow
    weights = scaled.sum()
    ess = weights.square() / (count * scaled.square().sum())
    divisor = count.clamp(min=1)
    negative = advantages < 0
    below = negative & (ratio < low) if low is not None else none
    above = (advantages > 0) & (ratio > high) if high is not None else none
    beyond = negative & (ratio > dual) if dual is not None else none
    return torch.stack([
        divisor.to(d.dtype),
        *(fraction(where, mask, d.dtype) for where in (below, above, beyond)),
        -d.sum() / divisor,
        (torch.expm1(d) - d).sum() / divisor,
        largest.exp(),
        smallest.exp(),
        torch.where(any_token, ess, 1),
        count.to(d.dtype),
        torch.where(any_token, shift + (weights / divisor).log(), 0),
        masked_mean(d.abs(), mask),
    ])  # fmt: skip


_ratio_terms = Operator(
    "ratio_terms(Tensor logp, Tensor? old_logp, Tensor advantages, Tensor mask, Tensor? unclipped, Tensor? log_ratio, "
    "float? low, float? high, float? dual, float? least, float? most) -> (Tensor, Tensor, Tensor)",
    run=_kernel,
    fake=_new_ratio_terms,
    plain=_plain,
)


# --- metrics: all detached 0-d tensors ----------------------------------------------------------------------

_RATIO_METRICS = ("approx_kl_k1", "approx_kl_k3", "ratio_max", "ratio_min", "effective_sample_size", "tokens", "log_mean_ratio")


@torch.no_grad()
def ratio_metrics(tokens: PolicyTokens) -> dict[str, Tensor]:
    """Metrics of the ratio, in the order below; 0, 0, 1, 1, 1, 0, 0 without tokens.

    approx_kl_k1, approx_kl_k3: estimates of KL(pi_old || pi) from samples of pi_old: means of -d and exp(d) -
    1 - d, with d the log ratio;
    ratio_max, ratio_min: over the tokens, infinite if it overflows;
    effective_sample_size: (sum r)^2 / (N sum r^2), a fraction of the tokens in (0, 1];
    tokens, log_mean_ratio: N and log(sum r / N), by which these are merged.
    """
    d = tokens.log_ratio.detach()
    _, _, summary = _ratio_terms(d, torch.zeros_like(d), tokens.advantages, tokens.mask, *[None] * 7)
    named = dict(zip(SUMMARY, summary.unbind(), strict=True))
    return {name: named[name] for name in _RATIO_METRICS}


@torch.no_grad()
def clip_fractions(ratio: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float) -> dict[str, Tensor]:
    """clip_fraction_low, clip_fraction_high: the fractions of tokens that lose their gradient, by A < 0 and
    ratio < low, or by A > 0 and ratio > high."""
    return {
        "clip_fraction_low": fraction((advantages < 0) & (ratio < low), mask, advantages.dtype),
        "clip_fraction_high": fraction((advantages > 0) & (ratio > high), mask, advantages.dtype),
    }
