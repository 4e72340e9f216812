"""Pairs of rows in parts, in plain PyTorch: pair_merge of contract.py, in float64 throughout.

With P and Q the masses that two rows have in each part, and p_r and q_r their distributions within part r,

    KL(p, q) = sum_r P_r KL(p_r, q_r) + KL(P, Q)

and every term is at least 0. So small divergences keep their relative accuracy, as those of the parts do.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .contract import PairKind, PairPart, PairState
from .reference_pair_terms import Terms, log_ratio

_NEAR = 0.5  # up to this much a difference of normalisers is a sum of differences
_LOWEST = -1e300  # in place of -inf: it can be multiplied by 0


class _Side(NamedTuple):
    """One distribution: of rows [N], and of their parts [P, N]."""

    max: Tensor
    rest: Tensor  # as in PairState
    mean_u: Tensor
    empty: Tensor  # parts of -inf alone
    log_share: Tensor  # of the mass
    inv_t: Tensor

    @property
    def share(self) -> Tensor:
        return self.log_share.exp()

    @property
    def undefined(self) -> Tensor:
        return self.rest.isnan()

    def mean(self, x: Tensor) -> Tensor:
        """The mean of x [P, N] over the parts that are not empty."""
        return _total(torch.where(self.empty, 0, self.share * x))

    @property
    def entropy(self) -> Tensor:
        return self.rest.log1p() - self.mean_u

    @property
    def logsumexp(self) -> Tensor:
        return torch.where(torch.isneginf(self.max), self.max, self.max * self.inv_t + self.rest.log1p())


def _total(parts: Tensor) -> Tensor:
    """Their sum, in their order."""
    total = parts[0]
    for i in range(1, len(parts)):
        total = total + parts[i]
    return total


def _side(m: Tensor, rest: Tensor, mean_u: Tensor, inv_t: Tensor) -> _Side:
    top = m.amax(0)
    empty = torch.isneginf(m)
    d = (torch.where(m == top, 0, m - top) * inv_t).clamp_min(_LOWEST)
    mass = torch.where(empty, 0, d.exp() * (1 + rest))
    first = (m == top).to(torch.uint8).argmax(0, keepdim=True)
    # As in token_stats: the sum is without the maximum's own 1.
    whole = _total(mass.scatter(0, first, rest.gather(0, first))).masked_fill(top.isinf(), math.nan)
    log_share = torch.where(empty, -math.inf, d + rest.log1p() - whole.log1p())
    log_share = torch.where(whole.isnan(), math.nan, log_share)
    side = _Side(top, whole, whole, empty, log_share, inv_t)
    return side._replace(mean_u=side.mean(mean_u + d))


class _Frame(NamedTuple):
    """What the log ratio of an entry is counted from, as in PairState, with REF = MAX."""

    other_ref: Tensor
    offset: Tensor
    x: Tensor  # [P, N], the log ratio of the parts' masses


def _frame(parts: Tensor, p: _Side, q: _Side, dtype: torch.dtype) -> _Frame:
    """OTHER_REF is a number of that dtype such that OFFSET is no more than what its rounding leaves."""
    both = ~(p.empty | q.empty)
    best = torch.where(both, p.log_share + q.log_share, -math.inf).argmax(0, keepdim=True)  # the rest is counted from this part

    def at_best(x: Tensor) -> Tensor:
        return x.gather(0, best).squeeze(0)

    refs, other_refs, offsets = (parts[..., i] for i in (PairState.REF, PairState.OTHER_REF, PairState.OFFSET))
    ref, other_ref, offset, log_p, log_q = (at_best(x) for x in (refs, other_refs, offsets, p.log_share, q.log_share))
    d = log_ratio(refs, other_refs, ref, other_ref, p.inv_t, q.inv_t) - (offsets - offset)
    close = both & (d.abs() <= _NEAR)
    difference = torch.where(close, p.share * torch.expm1(torch.where(close, d, 0)), (q.log_share - log_q + log_p).exp() - p.share)
    share = _total(difference)
    shift = torch.where(share.abs() < _NEAR, torch.log1p(share), log_p - log_q)
    alone = torch.where(p.empty == q.empty, 0, torch.where(p.empty, math.inf, -math.inf))
    x = torch.where(both, d - shift, alone)

    apart = ~both.any(0)  # no part has mass of both
    ref, other_ref = torch.where(apart, p.max, ref), torch.where(apart, q.max, other_ref)
    offset = torch.where(apart, p.rest.log1p() - q.rest.log1p(), offset - shift)
    stretch = p.inv_t / q.inv_t
    balanced = (p.max * stretch + (other_ref - ref * stretch) - offset / q.inv_t).to(dtype).double()
    return _Frame(balanced, offset + log_ratio(p.max, balanced, ref, other_ref, p.inv_t, q.inv_t), x)


def _divergence(kind: int, beta: float, parts: Tensor, p: _Side, q: _Side, x: Tensor) -> tuple[Tensor, Tensor]:
    """(the divergence, MEAN_SLOPE) of a kind without a mixture."""
    value, slope, other_slope = (parts[..., i] for i in (PairPart.DIVERGENCE, PairState.MEAN_SLOPE, PairState.OTHER_MEAN_SLOPE))
    terms = Terms(p.share, q.share, x)
    only_p, only_q = ~p.empty & q.empty, p.empty & ~q.empty
    infinite = torch.isposinf(value) & ~only_p & ~only_q
    if kind in (PairKind.REVERSE_KL, PairKind.MIXED_KL):
        infinite = infinite | only_p
    if kind != PairKind.REVERSE_KL:
        infinite = infinite | only_q
    if kind == PairKind.REVERSE_KL:
        mean_slope = whole = p.mean(value) + _total(terms.reverse)
    elif kind == PairKind.MIXED_KL:
        mean_slope = p.mean(slope) + (1 - beta) * _total(terms.reverse)
        whole = mean_slope + q.mean(other_slope) + beta * _total(terms.forward)
    elif kind == PairKind.FORWARD_KL:
        whole = q.mean(value) + _total(terms.forward)
        mean_slope = torch.zeros_like(whole)
    else:
        whole = q.mean(value - p.log_share)
        mean_slope = torch.zeros_like(whole)
    undefined, infinite = p.undefined | q.undefined, infinite.any(0)
    whole = torch.where(undefined, math.nan, torch.where(infinite, math.inf, whole))
    return whole, torch.where(undefined | infinite, math.nan, mean_slope)


def _found(at_target: Tensor) -> Tensor:
    """[N] what the part that has the target says of it [P, N], NaN where none has it."""
    absent = at_target.isnan()
    return at_target.masked_fill(absent, -math.inf).amax(0).masked_fill(absent.all(0), math.nan)


def pair_merge(parts, mask, temperature, other_temperature, kind, beta, out) -> None:
    *results, state_out = out
    acc, n = parts.dtype, parts.shape[1]
    inv_t, other_inv_t = (_inverse(t, parts) for t in (temperature, other_temperature))
    parts = parts.double()
    of = parts.unbind(-1)
    p = _side(of[PairState.MAX], of[PairState.REST], of[PairState.MEAN_U], inv_t)
    other_mean_u = of[PairState.OTHER_REST].log1p() - of[PairPart.OTHER_ENTROPY]
    q = _side(of[PairState.OTHER_MAX], of[PairState.OTHER_REST], other_mean_u, other_inv_t)
    frame = _frame(parts, p, q, acc)
    value = mean_slope = torch.zeros_like(p.rest)
    if kind < PairKind.JSD:
        value, mean_slope = _divergence(kind, beta, parts, p, q, frame.x)
    at_target = _found(of[PairState.TARGET] + torch.where(p.empty, 0, of[PairState.MAX] - p.max))
    other_logp = _found(of[PairPart.OTHER_LOGP] + q.log_share)
    computed = (value, at_target * inv_t - p.rest.log1p(), p.entropy, p.logsumexp, other_logp, q.entropy, q.logsumexp)
    undefined = p.undefined | q.undefined
    columns = {PairState.MAX: p.max, PairState.REST: p.rest, PairState.MEAN_U: p.mean_u, PairState.REF: p.max}
    columns |= {PairState.OTHER_REF: frame.other_ref, PairState.OFFSET: frame.offset.masked_fill(undefined, math.nan)}
    columns |= {PairState.MEAN_SLOPE: mean_slope, PairState.OTHER_MAX: q.max, PairState.OTHER_REST: q.rest}
    columns |= {PairState.OTHER_MEAN_SLOPE: value - mean_slope, PairState.TARGET: at_target}
    state = torch.stack([columns[i] for i in range(PairState.WIDTH)], -1)
    skipped = torch.zeros(n, dtype=torch.bool, device=parts.device) if mask is None else ~mask
    for to, result in zip(results, computed, strict=True):
        if to is not None:
            to.view(-1).copy_(result.masked_fill(skipped, 0))
    state_out.view(-1, PairState.WIDTH).copy_(state.masked_fill(skipped.unsqueeze(-1), 0))


def _inverse(temperature: float | Tensor, parts: Tensor) -> Tensor:
    """1 / T as kernels compute it, in float64."""
    if isinstance(temperature, Tensor):
        return torch.where(temperature > 0, 1 / temperature, math.nan).double()
    return parts.new_full((), 1 / temperature).double()
