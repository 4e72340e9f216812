"""Entries of two rows: their log ratio, and what divergences make of it.

Every divergence is sum p f(x), with x = log(q / p) and f >= 0 term by term. Its gradient by the logits is
p (g(x) - sum p g) / temperature. So it keeps its relative accuracy however close the rows are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .contract import PairKind

_APART = 32  # logits
_NEAR = 0.5  # up to this |x| differences of p and q are computed from x, beyond it from p and q


def excess(x: Tensor) -> Tensor:
    """e^x - 1 - x for |x| <= 1/2, relative to itself."""
    terms = 16 if x.dtype == torch.float64 else 8
    series = torch.full_like(x, 1 / math.factorial(terms))
    for n in range(terms - 1, 1, -1):
        series = series * x + 1 / math.factorial(n)
    return series * x * x


class _Mixture(NamedTuple):
    """What mixing a share of q into p does to it: M = (1 - share) p + share q."""

    log: Tensor  # log(M / p) = log(1 + share t)
    log_other: Tensor  # log(q / M)
    slope: Tensor  # t / (1 + share t)


class Terms:
    """Entries of p and q, of one shape, and p times functions of x = log(q / p), to be summed over a row."""

    def __init__(self, p: Tensor, q: Tensor, x: Tensor):
        bound = 1e300 if x.dtype == torch.float64 else 1e30  # for infinity: finite, for a product with 0
        self.p, self.q, self.x = p, q, x.clamp(-bound, bound)
        self.near = self.x.abs() <= _NEAR
        self.close = torch.where(self.near, self.x, 0)
        self.t = torch.where(self.near, p * torch.expm1(self.close), q - p)  # p t, with t = q / p - 1

    def either(self, near: Tensor, far: Tensor) -> Tensor:
        return torch.where(self.near, self.p * near, far)

    @property
    def reverse(self) -> Tensor:
        """p (t - x)"""
        return self.either(excess(self.close), self.t - self.p * self.x)

    @property
    def forward(self) -> Tensor:
        """p (x (1 + t) - t)"""
        return self.either(self.close * torch.expm1(self.close) - excess(self.close), self.q * self.x - self.t)

    def mixture(self, share: float) -> _Mixture:
        """For x > 0 from q's side: nothing overflows."""
        s = torch.expm1(-self.x.abs())  # min(p, q) / max(p, q) - 1
        own = torch.full_like(s, 1 - share).masked_fill_(self.x > 0, share)  # the larger one's share
        rest = torch.log1p((1 - own) * s)
        slope = torch.where(self.x > 0, -s, s) / (1 + (1 - own) * s)
        return _Mixture(self.x.clamp(min=0) + rest, self.x.clamp(max=0) - rest, slope)

    def close_to(self, share: float) -> tuple[Tensor, Tensor]:
        """(log(1 + share t), share t) near equality"""
        v = share * torch.expm1(self.close)
        return torch.log1p(v), v

    def value(self, kind: int, beta: float) -> Tensor:
        """p f, to be summed over the row."""
        close = self.close
        if kind == PairKind.REVERSE_KL:
            return self.reverse
        if kind in (PairKind.FORWARD_KL, PairKind.CROSS_ENTROPY):
            return self.forward
        if kind == PairKind.MIXED_KL:
            return beta * self.forward + (1 - beta) * self.reverse
        if kind == PairKind.TOTAL_VARIATION:
            return self.t.abs() / 2
        if kind == PairKind.ALPHA:
            near = excess(beta * close) - beta * excess(close)
            return self.either(near, self.power(beta) - self.p - beta * self.t) / (beta * (beta - 1))
        if kind == PairKind.SKEW_REVERSE_KL:
            y, _ = self.close_to(1 - beta)
            return self.either(excess(y), (1 - beta) * self.t - self.p * self.mixture(1 - beta).log)
        y, v = self.close_to(beta)
        t, mixture = torch.expm1(close), self.mixture(beta)
        both, mixed = close * t - excess(close), y * v - excess(y)
        if kind == PairKind.JSD:
            far = beta * self.q * mixture.log_other - (1 - beta) * self.p * mixture.log
            return self.either(beta * both - mixed, far)
        far = self.q * mixture.log_other - (1 - beta) * self.t
        return self.either(both - mixed - (1 - beta) * t * y, far)

    def power(self, beta: float) -> Tensor:
        """q^beta p^(1 - beta)"""
        return torch.where((self.p > 0) & (self.q > 0), (self.p.log() + beta * self.x).exp(), 0 * self.t)

    def slope(self, kind: int, beta: float) -> Tensor:
        """p g"""
        if kind == PairKind.REVERSE_KL:
            return -self.p * self.x
        if kind in (PairKind.FORWARD_KL, PairKind.CROSS_ENTROPY):
            return -self.t
        if kind == PairKind.MIXED_KL:
            return -beta * self.t - (1 - beta) * self.p * self.x
        if kind == PairKind.TOTAL_VARIATION:
            return -self.p * self.x.sign() / 2
        if kind == PairKind.ALPHA:
            return self.either(-torch.expm1(beta * self.close), self.p - self.power(beta)) / beta
        if kind == PairKind.JSD:
            return -(1 - beta) * self.either(self.close_to(beta)[0], self.p * self.mixture(beta).log)
        if kind == PairKind.SKEW_FORWARD_KL:
            near = torch.expm1(self.close) / (1 + self.close_to(beta)[1])
            return -((1 - beta) ** 2) * self.either(near, self.p * self.mixture(beta).slope)
        k = 1 - beta
        y, v = self.close_to(k)
        mixture = self.mixture(k)
        return self.either(beta * v / (1 + v) - y, self.p * (beta * k * mixture.slope - mixture.log))


def log_ratio(z: Tensor, w: Tensor, ref: Tensor, other_ref: Tensor, inv_t: Tensor | float, other_inv_t: Tensor | float) -> Tensor:
    """log(q / p) of logits z and w, up to an offset. Where neither has mass it is finite."""
    none = torch.isneginf(z) & torch.isneginf(w)
    a, b = torch.where(none, ref, z), torch.where(none, other_ref, w)
    lead = ref - other_ref
    # The difference of the logits first: near equality it is exact. Rows far apart would lose digits by it.
    same = torch.where(lead.abs() > _APART, (b - other_ref) - (a - ref), b - a + lead) * inv_t
    if not isinstance(inv_t, Tensor) and not isinstance(other_inv_t, Tensor):
        return same if inv_t == other_inv_t else (b - other_ref) * other_inv_t - (a - ref) * inv_t
    return torch.where(torch.as_tensor(inv_t == other_inv_t), same, (b - other_ref) * other_inv_t - (a - ref) * inv_t)
