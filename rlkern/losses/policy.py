"""What all policy losses share: their output, the checks and clean-up of their inputs, the metrics that their users plot."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import as_bool, check_logp, check_number, check_tokens, per_token
from ..checks import check_choice as check_choice  # for the losses
from ..checks import check_fraction as check_fraction
from ..ratio import SUMMARY, ratio_terms
from ..selection import one_pass
from .aggregate import aggregate, check_aggregation

LARGEST_EXPONENT = 80.0  # exp of it is finite in float32, with room for a product


class LossOutput(NamedTuple):
    """loss: 0-d, carries the gradient. metrics: name -> detached 0-d tensor on the loss's device and in its dtype; nothing was read on the host.

    Metrics come with the counts that they are merged by: see `rlkern.merge_metrics`.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class PolicyInputs(NamedTuple):
    """The arguments that every policy loss takes, checked and not yet touched: anything may stand where the mask is not set."""

    logp: Tensor  # [B, T] float, with its gradient
    old_logp: Tensor | None  # [B, T] float
    advantages: Tensor  # [B, T], in the dtype of the computation
    mask: Tensor  # [B, T] bool
    weights: Tensor | None  # as the advantages
    log_ratio_clamp: float | None


class PolicyTokens(NamedTuple):
    """The tokens of a batch, [B, T], float32 (float64 for float64 logp), neutral where masked: no value and no gradient can come from there.

    Only logp, log_ratio and ratio carry gradient.
    """

    logp: Tensor  # log pi(token), 0 where masked
    log_ratio: Tensor  # log pi / pi_old, 0 where masked; never clamped
    ratio: Tensor  # exp(log_ratio), 1 where masked; never infinite, so that its product with A = 0 is 0
    advantages: Tensor  # without gradient, 0 where masked
    mask: Tensor  # bool
    weights: Tensor | None  # without gradient, 0 where masked; None stands for 1

    def keep(self, x: Tensor) -> Tensor:
        """x [B, T] detached, in the dtype of the computation and 0 where masked."""
        return torch.where(self.mask, x.detach().to(self.logp.dtype), 0)


# --- kinks, and numbers that a caller may change from step to step ----------------------------------------------------------------------------


def number(value: float, like: Tensor) -> Tensor:
    """The value as a 0-d tensor. torch.compile keeps the factor of a product symbolic, where it would bake the argument of `full` into the graph."""
    return like.new_ones(()) * value


def clamped(x: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """x.clamp(low, high) without gradient; torch.compile would compile the call of clamp again for every new bound."""
    if torch.compiler.is_compiling():
        low, high = (None if bound is None else number(bound, x) for bound in (low, high))
    return x.detach().clamp(low, high)


def bounded(x: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """The values of x.clamp(low, high). The gradient is 1 wherever the value is x itself, so at a bound too, and 0 beyond: as in the kernels.

    The gradient of clamp at a bound is PyTorch's choice, which has changed.
    """
    values = clamped(x, low, high)
    return torch.where(values == x, x, values)


def excess(x: Tensor) -> Tensor:
    """The values of x.relu(). The gradient is 0 at 0, as that of relu, which would save its result: a caller may write into that."""
    return torch.where(x <= 0, 0, x)


# --- checks --------------------------------------------------------------------------------------------------------------------------------


def check_clip(clip_low: float, clip_high: float) -> None:
    """The bounds 1 - clip_low and 1 + clip_high must enclose 1; clip_low above 1 would be a negative ratio."""
    check_number("clip_low", clip_low, 0, 1)
    check_number("clip_high", clip_high, 0)


def policy_inputs(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    weights: Tensor | None = None,
    log_ratio_clamp: float | None = None,
    aggregation: str = "token-mean",
    normalizer: float | Tensor | None = None,
) -> PolicyInputs:
    """Checks the arguments that every policy loss takes.

    Args:
        logp: [B, T] float; gradients flow into it.
        old_logp: [B, T] float, used detached. None is on-policy: logp.detach(), so the ratio is 1 and its gradient that of logp.
        advantages: [B, T], [B, 1] or [B] float; one that requires grad is refused, it would lose its gradient here.
        mask: [B, T] bool or number; nonzero counts. It selects, it does not weigh.
        weights: [B, T], [B, 1] or [B] float, importance weights for `weigh`; without gradient, like the advantages.
        log_ratio_clamp: c bounds the exponent of `ratio` to [-c, c]; no gradient flows beyond (verl's vanilla loss: 20). None bounds it to
            (-inf, 80], where exp is finite in float32, so that a ratio that overflows cannot turn a clipped token's gradient into NaN.
        aggregation, normalizer: only checked here, see `aggregate`.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices and options other than these.
    """
    check_aggregation(aggregation, normalizer)
    if log_ratio_clamp is not None:
        check_number("log_ratio_clamp", log_ratio_clamp, 0, LARGEST_EXPONENT)
    check_logp(logp)
    if old_logp is not None:
        check_tokens("old_logp", old_logp, logp)
    check_tokens("mask", mask, logp, floating=False)

    advantages = per_token("advantages", advantages, logp)
    if weights is not None:
        weights = per_token("weights", weights, logp)
    return PolicyInputs(logp, old_logp, advantages, as_bool(mask), weights, log_ratio_clamp)


def clean(x: PolicyInputs) -> PolicyTokens:
    """Checked inputs made safe to compute with."""
    mask = x.mask
    logp = torch.where(mask, x.logp.to(x.advantages.dtype), 0)
    old_logp = logp.detach() if x.old_logp is None else torch.where(mask, x.old_logp.detach().to(logp.dtype), 0)
    log_ratio = logp - old_logp
    if x.log_ratio_clamp is None:
        exponent = bounded(log_ratio, high=LARGEST_EXPONENT)
    else:
        exponent = bounded(log_ratio, -x.log_ratio_clamp, x.log_ratio_clamp)
    weights = None if x.weights is None else torch.where(mask, x.weights, 0)
    return PolicyTokens(logp, log_ratio, exponent.exp(), torch.where(mask, x.advantages, 0), mask, weights)


def policy_tokens(logp: Tensor, old_logp: Tensor | None, advantages: Tensor, mask: Tensor, **options) -> PolicyTokens:
    """`policy_inputs`, made safe to compute with."""
    return clean(policy_inputs(logp, old_logp, advantages, mask, **options))


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None) -> Tensor:
    """max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), for A < 0 at most -A dual_clip; written as -A times the ratio that survives.

    That form needs no product with a ratio that is clipped away, so an overflowing one cannot make NaN of the gradient.
    """
    return -advantages * torch.where(advantages < 0, bounded(ratio, 1 - clip_low, dual_clip), bounded(ratio, high=1 + clip_high))


# --- reductions ----------------------------------------------------------------------------------------------------------------------------


def weigh(values: Tensor, tokens: PolicyTokens) -> Tensor:
    """The values times the importance weights, if there are any."""
    return values if tokens.weights is None else values * tokens.weights


def score(tokens: PolicyTokens) -> Tensor:
    """logp, and 0 where the advantage is 0: their product is 0 even at logp = -inf."""
    return torch.where(tokens.advantages == 0, 0, tokens.logp)


def sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """[B, T] -> [B, 1]: the mean over the tokens of each sequence; 0 for an empty one. Masked values must be finite."""
    return torch.where(mask, values, 0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


def finish(values: Tensor, tokens: PolicyTokens, aggregation: str, normalizer: float | Tensor | None, metrics: dict[str, Tensor]) -> LossOutput:
    """Per-token loss values [B, T] to the output."""
    return LossOutput(aggregate(values, tokens.mask, aggregation, normalizer), metrics)


# --- metrics: all detached 0-d tensors -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def total(where: Tensor, dtype: torch.dtype) -> Tensor:
    """How many are set, in the dtype of the computation: the quotient of two integers would follow torch.set_default_dtype."""
    return where.sum().to(dtype)


@torch.no_grad()
def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of float values over the mask. 0 if nothing counts."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


@torch.no_grad()
def fraction(where: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The fraction of the mask that is in `where`, both bool. 0 if nothing counts."""
    return total(where & mask, dtype) / mask.sum().clamp(min=1)


_RATIO_METRICS = ("approx_kl_k1", "approx_kl_k3", "ratio_max", "ratio_min", "effective_sample_size", "tokens", "log_mean_ratio")


@torch.no_grad()
def ratio_metrics(tokens: PolicyTokens) -> dict[str, Tensor]:
    """What a ratio tells of the step; 0, 0, 1, 1, 1, 0, 0 without tokens.

    approx_kl_k1, approx_kl_k3: estimates of KL(pi_old || pi) from its own samples, means of -d and of exp(d) - 1 - d, d the log ratio;
    ratio_max, ratio_min: over the tokens, infinite if it overflows;
    effective_sample_size: (sum r)^2 / (N sum r^2), a fraction of the tokens in (0, 1];
    tokens, log_mean_ratio: N and log(sum r / N), by which these are merged.
    """
    d, mask = tokens.log_ratio.detach(), tokens.mask
    if one_pass(d):
        summary = dict(zip(SUMMARY, ratio_terms(d, torch.zeros_like(d), tokens.advantages, mask).summary.unbind(), strict=True))
        return {name: summary[name] for name in _RATIO_METRICS}
    count = mask.sum()
    any_token = count > 0
    counted = torch.where(mask, d, -math.inf)
    ends = (counted.amax(), torch.where(mask, d, math.inf).amin()) if d.numel() > 0 else (d.sum(), d.sum())  # a batch of size 0 has none
    largest, smallest = (torch.where(any_token, end, 0) for end in ends)
    shift = torch.where(largest.isinf(), 0, largest)
    scaled = (counted - shift).exp()  # the largest is 1: no overflow
    weights = scaled.sum()
    ess = weights.square() / (count * scaled.square().sum())
    tokens, count = count.to(d.dtype), count.clamp(min=1)
    return {
        "approx_kl_k1": -d.sum() / count,
        "approx_kl_k3": (torch.expm1(d) - d).sum() / count,
        "ratio_max": largest.exp(),
        "ratio_min": smallest.exp(),
        "effective_sample_size": torch.where(any_token, ess, 1),
        "tokens": tokens,
        "log_mean_ratio": torch.where(any_token, shift + (weights / count).log(), 0),
    }


@torch.no_grad()
def clip_fractions(ratio: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float) -> dict[str, Tensor]:
    """clip_fraction_low, clip_fraction_high: of all tokens, those without gradient because A < 0 and ratio < low, or A > 0 and ratio > high."""
    return {
        "clip_fraction_low": fraction((advantages < 0) & (ratio < low), mask, advantages.dtype),
        "clip_fraction_high": fraction((advantages > 0) & (ratio > high), mask, advantages.dtype),
    }
