"""What a token adds to a policy loss, with its slope in closed form: the clipped ratio times the advantage, the KL estimates, and all that is
reported of a ratio, each in one pass. The same in plain PyTorch, differentiated by autograd, is in `losses/`: it runs where no backend has these
passes, and is what torch.compile fuses and torch.func transforms.

Terms are [2, B, T], in float32 (float64 for float64 logp): the values, and the derivatives of the values by logp; 0 where masked.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends
from .checks import computing_dtype, numbers
from .rows import OnlyOnce, call

SUMMARY = (
    "count",
    *("clip_fraction_low", "clip_fraction_high", "clip_fraction_dual"),
    *("approx_kl_k1", "approx_kl_k3", "ratio_max", "ratio_min", "effective_sample_size"),
    *("tokens", "log_mean_ratio", "abs_log_ratio"),
)

_SECOND = 'compute the loss under rlkern.use_backend("reference"), or differentiate it with torch.func'

_lib = torch.library.Library("rlkern", "FRAGMENT")
_lib.define(
    "ratio_terms(Tensor logp, Tensor? old_logp, Tensor advantages, Tensor mask, Tensor? unclipped, "
    "float low, float high, float dual, float least, float most) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_lib.define(
    "kl_terms(Tensor logp, Tensor reference, Tensor mask, int kind, bool straight_through, float clamp) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class RatioTerms(NamedTuple):
    """terms: [2, B, T]. free: bool [B, T], tokens that count, with a finite logp, and that the clip lets go. summary: [12], what `SUMMARY`
    names: `count`, the divisor of the means, is `tokens` but at least 1."""

    terms: Tensor
    free: Tensor
    summary: Tensor


def _new_ratio_terms(logp, *args):
    return (
        logp.new_empty((2, *logp.shape)),
        logp.new_empty(logp.shape, dtype=torch.bool),
        logp.new_empty(len(SUMMARY)),
    )


def _new_terms(logp, *args):
    return logp.new_empty((2, *logp.shape))


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [x if x is None or x.is_contiguous() else x.contiguous() for x in tensors]


def _ratio_terms(logp, old_logp, advantages, mask, unclipped, *bounds):
    out = _new_ratio_terms(logp)
    backends.select(logp.device).ratio_terms(*_dense(logp, old_logp, advantages, mask, unclipped), bounds, out)
    return out


def _kl_terms(logp, reference, mask, *options):
    out = _new_terms(logp)
    backends.select(logp.device).kl_terms(*_dense(logp, reference, mask), *options, out)
    return out


_lib.impl("ratio_terms", _ratio_terms, "CompositeExplicitAutograd")
_lib.impl("kl_terms", _kl_terms, "CompositeExplicitAutograd")
torch.library.register_fake("rlkern::ratio_terms", _new_ratio_terms, lib=_lib)
torch.library.register_fake("rlkern::kl_terms", _new_terms, lib=_lib)


def ratio_terms(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    dual: float = math.inf,
    least: float = -math.inf,
    most: float = math.inf,
    unclipped: Tensor | None = None,
) -> RatioTerms:
    """Values -A r, with r = exp(d bounded to [least, most]), d = logp - old_logp, clipped as PPO's maximum does it: at low and dual where A < 0, at
    high where A > 0. No slope where a bound holds.

    Args:
        logp, old_logp: [B, T] float, used detached; old_logp None is logp itself.
        advantages: [B, T] float32, or float64 where logp is.
        mask: bool [B, T].
        unclipped: bool [B, T], tokens that are not clipped, though reported as if.
    """
    dtype = advantages.dtype
    old_logp = None if old_logp is None else numbers(old_logp, dtype)
    args = (numbers(logp, dtype), old_logp, advantages, mask, unclipped, low, high, dual, least, most)
    return RatioTerms(*call(torch.ops.rlkern.ratio_terms.default, _ratio_terms, *args))


def kl_terms(logp: Tensor, reference: Tensor, mask: Tensor, kind: int, straight_through: bool, clamp: float) -> Tensor:
    """Terms of the estimates of `losses/kl.py` where the mask is set. kind: 0 k1, 1 abs, 2 k2, 3 k3; straight_through: slope d for any of them."""
    dtype = computing_dtype(logp)
    args = (numbers(logp, dtype), numbers(reference, dtype), mask, kind, straight_through, clamp)
    return call(torch.ops.rlkern.kl_terms.default, _kl_terms, *args)


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logp, terms, total):
        values, slopes = terms.unbind()
        ctx.save_for_backward(slopes)
        ctx.logp = logp  # not saved: whoever writes into it afterwards changes nothing here
        return values.sum() if total else values.clone()

    @staticmethod
    def backward(ctx, g):
        (slopes,) = ctx.saved_tensors
        with torch.no_grad():
            gradient = g * slopes  # autograd gives it the dtype of logp
        return (OnlyOnce.apply(gradient, ctx.logp, _SECOND) if torch.is_grad_enabled() else gradient), None, None


def attach(logp: Tensor, terms: Tensor, *, total: bool = False) -> Tensor:
    """The values [B, T] of terms, or their sum, with the gradient that the slopes make. It cannot be differentiated again."""
    return _Attached.apply(logp, terms, total)
