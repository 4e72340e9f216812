"""Divergences over K ids a token, and what all others hold as one more class. Plain PyTorch on [..., K]."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import as_bool, check_choice, check_flags, check_fraction, check_number, computing_dtype, expect
from .kinks import bounded, number

TOPK_KINDS = ("forward_kl", "reverse_kl", "mixed_kl", "jsd")
TAILS = ("none", "bucket", "renormalize")


def _excess(p: Tensor, q: Tensor, x: Tensor) -> Tensor:
    """p (e^x - 1 - x) >= 0 with x = log(q / p), finite. To its last digits for q near p too."""
    near = x.abs() <= 0.5
    small, series = torch.where(near, x, 0), torch.zeros_like(x)
    for n in range(16 if x.dtype == torch.float64 else 9, 1, -1):  # 1/2! + x / 3! + x^2 / 4! + ...
        series = series * small + 1 / math.factorial(n)
    return torch.where(near, p * (small * small * series), q - p - p * x)


class _Classes:
    """Log-probabilities l and m [..., K], and which of them is -inf."""

    def __init__(self, l: Tensor, m: Tensor):  # noqa: E741
        no_l, no_m = l == -math.inf, m == -math.inf
        self.only_l, self.only_m, either = no_m & ~no_l, no_l & ~no_m, no_l | no_m  # have mass
        self.p, self.q = l.exp(), m.exp()
        # Without -inf, whose differences would be NaN: where one stands the terms of both are 0.
        self.l, self.m = l.masked_fill(either, 0), m.masked_fill(either, 0)
        self.both_p, self.both_q = (x.masked_fill(either, 0) for x in (self.p, self.q))


def _kl(of: Tensor, to: Tensor, complete: bool) -> Tensor:
    """[...]: sum p log(p / q), from log p and log q. Where both are complete, sum p log(p / q) - p + q."""
    c = _Classes(of, to)
    if not complete:
        terms = c.both_p * (c.l - c.m)
    else:
        terms = _excess(c.both_p, c.both_q, c.m - c.l) + torch.where(c.only_m, c.q, 0)
    return terms.masked_fill(c.only_l, math.inf).sum(-1)


def _jsd(l: Tensor, m: Tensor, beta: float) -> Tensor:  # noqa: E741
    """[...]: beta KL(q || M) + (1 - beta) KL(p || M) with M = beta q + (1 - beta) p. No term is negative."""
    c = _Classes(l, m)
    x = c.m - c.l
    rises = x > 0
    b = number(beta, x)
    log_mix = torch.log1p(torch.where(rises, 1 - b, b) * torch.expm1(torch.where(rises, -x, x)))  # against the larger of both
    mix = b * c.both_q + (1 - b) * c.both_p
    of_q = _excess(c.both_q, mix, log_mix + torch.where(rises, 0, -x))
    of_p = _excess(c.both_p, mix, log_mix + torch.where(rises, x, 0))
    alone = torch.where(c.only_m, -b * b.log() * c.q, 0) + torch.where(c.only_l, -(1 - b) * torch.log1p(-b) * c.p, 0)
    return (b * of_q + (1 - b) * of_p + alone).sum(-1)


def _divergence(l: Tensor, m: Tensor, kind: str, beta: float, complete: bool) -> Tensor:  # noqa: E741
    if kind == "jsd":
        return _jsd(l, m, beta)
    if kind == "forward_kl" or (kind == "mixed_kl" and beta == 1):
        return _kl(m, l, complete)
    if kind == "reverse_kl" or beta == 0:
        return _kl(l, m, complete)
    return beta * _kl(m, l, complete) + (1 - beta) * _kl(l, m, complete)


def _renormalized(x: Tensor) -> Tensor:
    """log_softmax; a row of -inf alone stays one."""
    empty = (x == -math.inf).all(-1, keepdim=True)
    return x - x.masked_fill(empty, 0).logsumexp(-1, keepdim=True).masked_fill(empty, 0)


def _log_rest(x: Tensor) -> Tensor:
    """log(1 - sum e^x): -inf where the sum is 1, or rounded above it."""
    return torch.log(-torch.expm1(x.logsumexp(-1).clamp(max=0)))


def topk_divergence(
    logp: Tensor,
    other_logp: Tensor,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    tail: str = "none",
    tail_logmass: Tensor | None = None,
    other_tail_logmass: Tensor | None = None,
    valid: Tensor | None = None,
    min_logp: float | None = None,
) -> Tensor:
    """Divergence over K ids a token, of the student's p from the teacher's q: [..., K] twice -> [...].

        kind          value
        "forward_kl"  KL(q, p) = sum q log(q / p)
        "reverse_kl"  KL(p, q) = sum p log(p / q)
        "mixed_kl"    beta KL(q, p) + (1 - beta) KL(p, q)
        "jsd"         beta KL(q, M) + (1 - beta) KL(p, M), M = beta q + (1 - beta) p (arXiv 2306.13649)

        tail           the classes
        "none"         the K ids. Their masses differ, so a KL may be negative
        "bucket"       the K ids, and all others as one. At most the divergence over the whole vocabulary
        "renormalize"  the K ids, with p and q divided by their masses on them

    Args:
        logp: [..., K] float, log p at K distinct ids: `token_stats(logits, ids, with_tail=True).logp`.
        other_logp: [..., K] float, log q at the same ids; used detached.
        kind, beta: see above. beta is in [0, 1], for "jsd" in (0, 1). The others do not use it.
        tail_logmass: [...] float, log of the mass that p has elsewhere, for "bucket": `tail_logmass` of the
            same `token_stats`. It carries gradient too.
        other_tail_logmass: [...] float, the same of q; used detached. None takes it from other_logp: 1 less
            the sum, exact to 1e-7 in float32.
        valid: [..., K] bool or number, 0 at ids that are no class at all, such as padding and repetitions.
            A bucket holds their mass only if tail_logmass does: it does where ignore_index stood in the ids.
        min_logp: raise both log-probabilities to at least this before anything else, as verl does at -10
            (`log_prob_min_clamp`). Below it there is no gradient, at the bound there is.

    Returns:
        [...] in float32 (float64 for float64 logp), differentiable any number of times by logp and
        tail_logmass. "bucket", "renormalize" and "jsd" are sums of terms >= 0: never negative. They are as
        accurate as the log-probabilities given: in float32 a KL below 1e-7 is their rounding. A class at -inf
        on both sides contributes 0, and an entry at -inf gets no gradient. A KL is +inf where its first
        argument has mass that its second lacks.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices or options other than the above.
    """
    expect("logp", logp, "float", "[..., K]")
    expect("other_logp", other_logp, "float", "[..., K]", like=("logp", logp))
    check_choice("kind", kind, TOPK_KINDS)
    check_choice("tail", tail, TAILS)
    check_fraction("beta", beta)
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta is the weight of other_logp in the mixture, 0 < beta < 1 for kind='jsd', got {beta}")
    if min_logp is not None:
        check_number("min_logp", min_logp)
    if tail == "bucket" and tail_logmass is None:
        raise TypeError("tail='bucket' needs tail_logmass=, a float tensor [...], as of token_stats(..., with_tail=True), got None")
    for name, x in (("tail_logmass", tail_logmass), ("other_tail_logmass", other_tail_logmass)):
        if x is None:
            continue
        if tail != "bucket":
            raise ValueError(f"{name} belongs to tail='bucket', got tail={tail!r}")
        expect(name, x, "float", "[...]", shape=logp.shape[:-1], like=("logp", logp))
    if valid is not None:
        expect("valid", valid, "real", "[..., K]", like=("logp", logp))

    dtype = computing_dtype(logp)
    counted = torch.ones_like(logp, dtype=torch.bool) if valid is None else as_bool(valid)

    def classes(x: Tensor, low: float | None = None) -> Tensor:
        return torch.where(counted, bounded(x.to(dtype), low=low), -math.inf)

    other_logp = other_logp.detach()
    l, m = classes(logp, min_logp), classes(other_logp, min_logp)  # noqa: E741
    if tail == "renormalize":
        l, m = _renormalized(l), _renormalized(m)  # noqa: E741
    if tail_logmass is not None:
        rest = _log_rest(classes(other_logp)) if other_tail_logmass is None else other_tail_logmass.detach().to(dtype)
        l = torch.cat([l, tail_logmass.to(dtype).unsqueeze(-1)], -1)  # noqa: E741
        m = torch.cat([m, rest.unsqueeze(-1)], -1)
    return _divergence(l, m, kind, beta, complete=tail != "none")


def topk_reverse_kl(logp: Tensor, teacher_logp: Tensor, *, renormalize: bool = False) -> Tensor:
    """Reverse KL over K ids a token: sum_k p_k (log p_k - log q_k), [..., K] twice -> [...], with gradient.

    It is `topk_divergence(logp, teacher_logp, kind="reverse_kl")`, with tail="renormalize" if so asked, and
    for `kdrl_loss(kd="exact", teacher_kl=...)`. Without renormalize the sum lacks the tail, and may be
    negative. Raises TypeError, ValueError for dtypes and shapes other than there.
    """
    expect("logp", logp, "float", "[..., K]")
    expect("teacher_logp", teacher_logp, "float", "[..., K]", like=("logp", logp))
    check_flags(renormalize=renormalize)
    return topk_divergence(logp, teacher_logp, kind="reverse_kl", tail="renormalize" if renormalize else "none")
