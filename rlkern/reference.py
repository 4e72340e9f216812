"""The mathematics in plain PyTorch, written like the printed formulas. Tests compare with it.

It differentiates through autograd, in any dtype, any number of times. The closed forms that run where no
kernel does are in backends/reference.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Reference(NamedTuple):
    logp: Tensor | None
    entropy: Tensor
    logsumexp: Tensor
    sum_sq_prob: Tensor
    kept_logmass: Tensor | None
    tail_logmass: Tensor | None


def token_stats(
    logits: Tensor,
    targets: Tensor | None,
    temperature: float | Tensor = 1.0,
    min_p: float | None = None,
    min_prob: float | None = None,
    with_tail: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Reference:
    """Statistics of rows `logits` [..., V] in the logits' own precision, with `targets` [..., K] or None."""
    scale = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    u = transform(logits, logit_scale, softcap) / scale
    lse = u.logsumexp(-1)
    log_p = u - lse.unsqueeze(-1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p.masked_fill(p == 0, 0), 0 * p).sum(-1)
    logp = None if targets is None else log_p.gather(-1, targets)
    kept = None
    if min_p is not None:
        kept = u >= u.amax(-1, keepdim=True) + math.log(min_p)
    elif min_prob is not None:
        kept = u >= lse.unsqueeze(-1) + math.log(min_prob)
    kept_logmass = None if kept is None else log_p.masked_fill(~kept.detach(), -math.inf).logsumexp(-1)
    tail_logmass = None
    if with_tail and targets is not None:
        listed = torch.zeros_like(log_p, dtype=torch.bool).scatter_(-1, targets, True)
        tail_logmass = log_p.masked_fill(listed, -math.inf).logsumexp(-1)
    return Reference(logp, entropy, lse, (p * p).sum(-1), kept_logmass, tail_logmass)


def transform(logits: Tensor, logit_scale: float = 1.0, softcap: float | None = None) -> Tensor:
    """softcap tanh(logit_scale logits / softcap), without a softcap logit_scale logits; -inf stays -inf."""
    z = logits * logit_scale
    return z if softcap is None else (softcap * (z / softcap).tanh()).masked_fill(logits == -math.inf, -math.inf)


def token_divergence(
    logits: Tensor,
    other: Tensor,
    kind: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    other_temperature: float | Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    other_logit_scale: float | None = None,
    other_softcap: float | None = None,
) -> Tensor:
    """The divergences of `rlkern.token_divergence` between rows of finite logits [..., V]."""

    def log_softmax(x: Tensor, t: float | Tensor) -> Tensor:
        return (x / (t.unsqueeze(-1) if isinstance(t, Tensor) else t)).log_softmax(-1)

    cap = softcap if other_softcap is None else None if other_softcap == math.inf else other_softcap
    logits, other = transform(logits, logit_scale, softcap), transform(other, logit_scale if other_logit_scale is None else other_logit_scale, cap)
    log_p = log_softmax(logits, temperature)
    log_q = log_softmax(other, temperature if other_temperature is None else other_temperature)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a.exp() * (a - b)).sum(-1)

    def mixture(share: float) -> Tensor:
        """share q + (1 - share) p"""
        return torch.logaddexp(log_p + math.log1p(-share), log_q + math.log(share))

    if kind == "reverse_kl":
        return kl(log_p, log_q)
    if kind == "forward_kl":
        return kl(log_q, log_p)
    if kind == "mixed_kl":
        return beta * kl(log_q, log_p) + (1 - beta) * kl(log_p, log_q)
    if kind == "cross_entropy":
        return -(log_q.exp() * log_p).sum(-1)
    if kind == "skew_forward_kl":
        return kl(log_q, mixture(beta))
    if kind == "skew_reverse_kl":
        return kl(log_p, mixture(1 - beta))
    if kind == "alpha":
        return (1 - (beta * log_q + (1 - beta) * log_p).exp().sum(-1)) / (beta * (1 - beta))
    if kind == "total_variation":
        return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    return beta * kl(log_q, mixture(beta)) + (1 - beta) * kl(log_p, mixture(beta))


def token_did_entropy(logits: Tensor, reference_logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Entropy of softmax((logits - reference_logits) / temperature) of rows [..., V]; mass 0 at -inf."""
    difference = (logits - reference_logits).masked_fill(logits == -math.inf, -math.inf)
    return token_stats(difference, None, temperature).entropy


def row_moments(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(logit of the target minus the mean, variance) of rows [..., V] with targets [...]."""
    centred = logits - logits.mean(-1, keepdim=True)
    return centred.gather(-1, targets.unsqueeze(-1)).squeeze(-1), centred.square().mean(-1)
