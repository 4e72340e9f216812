"""Two rows of logits at once, in plain PyTorch: the pair functions of contract.py but for pair_merge."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import row_chunks
from .contract import ELSEWHERE, PairKind, PairState
from .reference_pair_terms import Terms, log_ratio
from .reference_rows import inverse_temperature, skipped_rows, soft_cap, soft_cap_slope


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


def pair_forward(logits, other, targets, mask, temperature, other_temperature, ignore_index, kind, beta, out, softcap=0.0, other_softcap=0.0) -> None:
    *results, state_out = out
    state_out = state_out.view(-1, PairState.WIDTH)
    acc, vocab = state_out.dtype, logits.shape[-1]
    skipped = skipped_rows(state_out.shape[0], targets, mask, ignore_index, logits.device)
    for a, rows, flat in row_chunks(logits):
        z = _side(soft_cap(logits[a, rows].to(acc), softcap), inverse_temperature(temperature, flat, acc))
        w = _side(soft_cap(other[a, rows].to(acc), other_softcap), inverse_temperature(other_temperature, flat, acc))
        # The offset is log(sum e^u / sum e^w'), where it is near 0 from the sum of the differences.
        x = log_ratio(z.x, w.x, z.max, w.max, z.inv_t, w.inv_t)
        terms = Terms(z.e, w.e, x)
        share = terms.t.sum(-1, keepdim=True) / (1 + z.rest)
        offset = torch.where(share.abs() < 0.5, -torch.log1p(share), z.rest.log1p() - w.rest.log1p())
        terms = Terms(z.p, w.p, x + offset)

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


def pair_mixture_sums(logits, other, mask, temperature, other_temperature, kind, beta, state, out, softcap=0.0, other_softcap=0.0) -> None:
    state = state.view(-1, PairState.WIDTH)
    for a, rows, flat in row_chunks(logits):
        z_x, w_x = soft_cap(logits[a, rows].to(state.dtype), softcap), soft_cap(other[a, rows].to(state.dtype), other_softcap)
        inv_t, other_inv_t = (inverse_temperature(t, flat, state.dtype) for t in (temperature, other_temperature))
        terms, *_ = _terms_of_part(z_x, w_x, inv_t, other_inv_t, state[flat])
        out[flat] = torch.stack([terms.value(kind, beta).sum(-1), terms.slope(kind, beta).sum(-1)], -1)
        if mask is not None:
            out[flat] = out[flat].masked_fill(~mask[flat].unsqueeze(-1), 0)


def _terms_of_part(z: Tensor, w: Tensor, inv_t: Tensor | float, other_inv_t: Tensor | float, state: Tensor) -> tuple[Terms, Tensor, Tensor]:
    """(terms, z - MAX, that over the temperature) of some columns, from the state of whole rows."""
    m, rest, ref, other_ref, offset = (
        state[:, i : i + 1] for i in (PairState.MAX, PairState.REST, PairState.REF, PairState.OTHER_REF, PairState.OFFSET)
    )
    shifted = z - m
    u = (shifted * inv_t).clamp_min(-1e4)
    p = torch.where(torch.isneginf(z), 0, u.exp()) / (1 + rest)
    x = log_ratio(z, w, ref, other_ref, inv_t, other_inv_t) + offset
    # q = p e^x from one exponent: p may underflow where q is large.
    log_q = (w - other_ref) * other_inv_t + offset + (ref - m) * inv_t - rest.log1p()
    return Terms(p, log_q.exp(), x), shifted, u


def pair_backward(
    logits, other, targets, mask, temperature, other_temperature, ignore_index, kind, beta, state, grads, out, softcap=0.0, other_softcap=0.0
) -> None:
    state = state.view(-1, PairState.WIDTH)
    acc, n, vocab = state.dtype, state.shape[0], logits.shape[-1]
    upstream = [torch.zeros(n, dtype=acc, device=logits.device) if g is None else g.view(-1) for g in grads]
    skipped = skipped_rows(n, targets, mask, ignore_index, logits.device) | torch.stack(upstream).eq(0).all(0)
    for a, rows, flat in row_chunks(logits):
        columns = state[flat].unbind(-1)
        rest, mean_u, mean_slope = (columns[i].unsqueeze(-1) for i in (PairState.REST, PairState.MEAN_U, PairState.MEAN_SLOPE))
        g_div, g_logp, g_entropy, g_lse = (g[flat].unsqueeze(-1) for g in upstream)
        if kind == PairKind.SKEW_FORWARD_KL:
            mean_slope = torch.where(mean_slope < 0, mean_slope + (1 - beta), mean_slope)
        raw, inv_t = logits[a, rows].to(acc), inverse_temperature(temperature, flat, acc)
        z_x, w_x = soft_cap(raw, softcap), soft_cap(other[a, rows].to(acc), other_softcap)
        other_inv_t = inverse_temperature(other_temperature, flat, acc)
        terms, shifted, u = _terms_of_part(z_x, w_x, inv_t, other_inv_t, state[flat])
        # An entry without mass has no gradient by the divergence, whatever its log ratio.
        dz = (g_div * (terms.slope(kind, beta) - terms.p * mean_slope)).masked_fill_((g_div == 0) | (torch.isneginf(z_x) & ~mean_slope.isnan()), 0)
        dz = dz + terms.p * (g_lse - g_logp - g_entropy * (u - mean_u))
        if targets is not None:
            y = targets[flat]
            valid = (y >= 0) & (y < vocab)
            at = y.clamp(0, vocab - 1)
            before = dz.gather(-1, at)
            # 1 - p without cancellation: at the maximum it is rest / S0, and elsewhere p <= 1/2.
            share = torch.where(shifted.gather(-1, at) == 0, rest / (1 + rest), 1 - terms.p.gather(-1, at))
            at_target = before + terms.p.gather(-1, at) * g_logp + g_logp * share
            dz = dz.scatter(-1, at, torch.where(valid, at_target, before)).masked_fill(~valid & (y != ELSEWHERE), math.nan)
        if softcap > 0:
            dz = dz * soft_cap_slope(raw, softcap)
        out[a, rows] = (dz * inv_t).masked_fill(skipped[flat].unsqueeze(-1), 0).to(out.dtype)
