"""Two rows of logits at once, in plain PyTorch: pair_forward and pair_backward of contract.py.

Every divergence is sum p f(x), with x = log(q / p) and f >= 0 term by term. Its gradient by the logits is
p (g(x) - sum p g) / temperature. So it keeps its relative accuracy however close the rows are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import row_chunks
from .contract import PairKind, PairState
from .reference_rows import inverse_temperature, skipped_rows, soft_cap, soft_cap_slope

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


class _Terms:
    """Entries of p and q [R, V], and p times functions of x."""

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


class _Side(NamedTuple):
    """One distribution of a chunk, all [R, V] or [R, 1]."""

    x: Tensor  # the logits
    inv_t: Tensor | float
    max: Tensor
    rest: Tensor
    e: Tensor  # exp(u), u = (x - max) / T
    u: Tensor

    @property
    def p(self) -> Tensor:
        return self.e / (1 + self.rest)

    @property
    def mean_u(self) -> Tensor:
        return (self.e * self.u.clamp_min(-1e4)).sum(-1, keepdim=True) / (1 + self.rest)


def _side(x: Tensor, inv_t: Tensor | float) -> _Side:
    m = x.amax(-1, keepdim=True)
    u = torch.where(torch.isneginf(x), x, x - m) * inv_t
    # As in token_stats: the sum is without the 1 of the maximum.
    ties = (x == m).sum(-1, keepdim=True)
    rest = torch.where(x == m, 0, u.exp()).sum(-1, keepdim=True) + (ties - 1)
    return _Side(x, inv_t, m, torch.where(m.isinf() | m.isnan(), math.nan, rest), u.exp(), u)


def _log_ratio(z: _Side, w: _Side, ref: Tensor, other_ref: Tensor) -> Tensor:
    """log(q / p) up to the OFFSET. Where neither has mass it is anything finite."""
    none = torch.isneginf(z.x) & torch.isneginf(w.x)
    a, b = (torch.where(none, r, s.x) for r, s in ((ref, z), (other_ref, w)))
    lead = ref - other_ref
    # The difference of the logits first: near equality it is exact. Rows far apart would lose digits by it.
    same = torch.where(lead.abs() > _APART, (b - other_ref) - (a - ref), b - a + lead) * z.inv_t
    if not isinstance(z.inv_t, Tensor) and not isinstance(w.inv_t, Tensor):
        return same if z.inv_t == w.inv_t else (b - other_ref) * w.inv_t - (a - ref) * z.inv_t
    return torch.where(torch.as_tensor(z.inv_t == w.inv_t), same, (b - other_ref) * w.inv_t - (a - ref) * z.inv_t)


def pair_forward(logits, other, targets, mask, temperature, other_temperature, ignore_index, kind, beta, out, softcap=0.0, other_softcap=0.0) -> None:
    *results, state_out = out
    state_out = state_out.view(-1, PairState.WIDTH)
    acc, vocab = state_out.dtype, logits.shape[-1]
    skipped = skipped_rows(state_out.shape[0], targets, mask, ignore_index, logits.device)
    for a, rows, flat in row_chunks(logits):
        z = _side(soft_cap(logits[a, rows].to(acc), softcap), inverse_temperature(temperature, flat, acc))
        w = _side(soft_cap(other[a, rows].to(acc), other_softcap), inverse_temperature(other_temperature, flat, acc))
        # The offset is log(sum e^u / sum e^w'), where it is near 0 from the sum of the differences.
        x = _log_ratio(z, w, z.max, w.max)
        terms = _Terms(z.e, w.e, x)
        share = terms.t.sum(-1, keepdim=True) / (1 + z.rest)
        offset = torch.where(share.abs() < 0.5, -torch.log1p(share), z.rest.log1p() - w.rest.log1p())
        terms = _Terms(z.p, w.p, x + offset)

        value = terms.value(kind, beta).sum(-1, keepdim=True).clamp(min=0)
        mean_slope = terms.slope(kind, beta).sum(-1, keepdim=True)
        if kind == PairKind.REVERSE_KL:
            mean_slope = value
        elif kind in (PairKind.FORWARD_KL, PairKind.CROSS_ENTROPY):
            mean_slope = torch.zeros_like(value)
        elif kind == PairKind.SKEW_FORWARD_KL:
            mean_slope = mean_slope.clamp(min=0)
        elif kind == PairKind.MIXED_KL:
            mean_slope = (1 - beta) * terms.reverse.sum(-1, keepdim=True)
        if kind == PairKind.CROSS_ENTROPY:  # -sum q log p, both terms positive
            value = z.rest.log1p() - (w.p * z.u.clamp_min(-1e30)).sum(-1, keepdim=True)
        # Mass that the other lacks, even mass that underflows.
        only_p = (torch.isneginf(w.x) & ~torch.isneginf(z.x)).any(-1, keepdim=True)
        only_q = (torch.isneginf(z.x) & ~torch.isneginf(w.x)).any(-1, keepdim=True)
        infinite = torch.zeros_like(only_p)
        if kind in (PairKind.REVERSE_KL, PairKind.MIXED_KL):
            infinite = infinite | only_p
        if kind in (PairKind.FORWARD_KL, PairKind.MIXED_KL, PairKind.CROSS_ENTROPY):
            infinite = infinite | only_q
        undefined = z.rest.isnan() | w.rest.isnan()
        value = torch.where(undefined, math.nan, torch.where(infinite, math.inf, value))
        mean_slope = torch.where(undefined | infinite, math.nan, mean_slope)

        state = torch.zeros(z.x.shape[0], PairState.WIDTH, dtype=acc, device=logits.device)
        columns = {PairState.MAX: z.max, PairState.REST: z.rest, PairState.REF: z.max, PairState.OTHER_REF: w.max}
        columns |= {PairState.OFFSET: offset, PairState.MEAN_SLOPE: mean_slope}
        columns |= {PairState.OTHER_MAX: w.max, PairState.OTHER_REST: w.rest, PairState.OTHER_MEAN_SLOPE: value - mean_slope}
        computed: list[Tensor | None] = [value]
        for side in (z, w):
            log_s0 = side.rest.log1p()
            shifted = None
            if targets is not None:
                y = targets[flat]
                valid = (y >= 0) & (y < vocab)
                at_y = side.x.gather(-1, y.clamp(0, vocab - 1))
                shifted = torch.where(torch.isneginf(at_y), at_y, at_y - side.max).masked_fill(~valid, math.nan)
            if side is z:
                columns[PairState.MEAN_U] = z.mean_u
                if shifted is not None:
                    columns[PairState.TARGET] = shifted
            logp = None if shifted is None else shifted * side.inv_t - log_s0
            computed += [logp, log_s0 - side.mean_u, torch.where(torch.isneginf(side.max), side.max, side.max * side.inv_t + log_s0)]
        for column, content in columns.items():
            state[:, column] = content.squeeze(-1)
        dropped = skipped[flat].unsqueeze(-1)
        for x_out, result in zip(results, computed, strict=True):
            if x_out is not None and result is not None:
                x_out.view(-1)[flat] = result.masked_fill(dropped, 0).squeeze(-1)
        state_out[flat] = state.masked_fill(dropped, 0)


def pair_backward(
    logits, other, targets, mask, temperature, other_temperature, ignore_index, kind, beta, state, grads, out, softcap=0.0, other_softcap=0.0
) -> None:
    state = state.view(-1, PairState.WIDTH)
    acc, n, vocab = state.dtype, state.shape[0], logits.shape[-1]
    upstream = [torch.zeros(n, dtype=acc, device=logits.device) if g is None else g.view(-1) for g in grads]
    skipped = skipped_rows(n, targets, mask, ignore_index, logits.device) | torch.stack(upstream).eq(0).all(0)
    for a, rows, flat in row_chunks(logits):
        columns = state[flat].unbind(-1)
        m, rest, mean_u, ref, other_ref, offset, mean_slope = (c.unsqueeze(-1) for c in columns[: PairState.OTHER_MAX])
        g_div, g_logp, g_entropy, g_lse = (g[flat].unsqueeze(-1) for g in upstream)
        if kind == PairKind.SKEW_FORWARD_KL:
            mean_slope = torch.where(mean_slope < 0, mean_slope + (1 - beta), mean_slope)
        raw, inv_t = logits[a, rows].to(acc), inverse_temperature(temperature, flat, acc)
        z_x, w_x = soft_cap(raw, softcap), soft_cap(other[a, rows].to(acc), other_softcap)
        other_inv_t = inverse_temperature(other_temperature, flat, acc)
        shifted = z_x - m
        u = (shifted * inv_t).clamp_min(-1e4)
        z = _Side(z_x, inv_t, m, rest, torch.where(torch.isneginf(z_x), 0, u.exp()), u)
        w = _Side(w_x, other_inv_t, m, rest, z.e, u)  # only its logits are looked at
        x = _log_ratio(z, w, ref, other_ref) + offset
        # q = p e^x from one exponent: p may underflow where q is large.
        log_q = (w_x - other_ref) * other_inv_t + offset + (ref - m) * inv_t - rest.log1p()
        terms = _Terms(z.p, log_q.exp(), x)
        # An entry without mass has no gradient by the divergence, whatever its log ratio.
        dz = (g_div * (terms.slope(kind, beta) - z.p * mean_slope)).masked_fill_((g_div == 0) | (torch.isneginf(z_x) & ~mean_slope.isnan()), 0)
        dz = dz + z.p * (g_lse - g_logp - g_entropy * (u - mean_u))
        if targets is not None:
            y = targets[flat]
            valid = (y >= 0) & (y < vocab)
            at = y.clamp(0, vocab - 1)
            # 1 - p without cancellation: at the maximum it is rest / S0, and elsewhere p <= 1/2.
            share = torch.where(shifted.gather(-1, at) == 0, rest / (1 + rest), 1 - z.p.gather(-1, at))
            others = dz.gather(-1, at) + z.p.gather(-1, at) * g_logp
            dz = dz.scatter(-1, at, others + g_logp * share)
            dz = torch.where(valid, dz, math.nan)
        if softcap > 0:
            dz = dz * soft_cap_slope(raw, softcap)
        out[a, rows] = (dz * inv_t).masked_fill(skipped[flat].unsqueeze(-1), 0).to(out.dtype)
