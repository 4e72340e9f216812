"""The mathematics in plain PyTorch: the oracle of the tests, and the fallback that runs on any device.

`token_stats`, `token_divergence` and `row_moments` are written as the formulas are printed and differentiate through autograd, in any dtype, any
number of times.
`token_stats_forward` / `token_stats_backward` are the closed forms behind the operators, and what follows them is statistics over all tokens; see
`backends.py` for the calling convention.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 22  # rows are upcast a chunk at a time, so that the fallback never holds a float32 copy of the logits


class Reference(NamedTuple):
    logp: Tensor | None
    entropy: Tensor
    logsumexp: Tensor
    sum_sq_prob: Tensor
    kept_logmass: Tensor | None


def token_stats(
    logits: Tensor,
    targets: Tensor | None,
    temperature: float | Tensor = 1.0,
    min_p: float | None = None,
    min_prob: float | None = None,
) -> Reference:
    """Row statistics of `logits` [..., V], differentiable by autograd, in the logits' own precision. `targets` [..., K] or None."""
    scale = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    u = logits / scale
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
    return Reference(logp, entropy, lse, (p * p).sum(-1), kept_logmass)


def token_divergence(logits: Tensor, other: Tensor, kind: str = "reverse_kl", beta: float = 0.5, temperature: float | Tensor = 1.0) -> Tensor:
    """The divergences of `rlkern.token_divergence` between rows of finite logits [..., V], differentiable by autograd any number of times."""
    scale = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    log_p, log_q = (logits / scale).log_softmax(-1), (other / scale).log_softmax(-1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a.exp() * (a - b)).sum(-1)

    if kind == "reverse_kl":
        return kl(log_p, log_q)
    if kind == "forward_kl":
        return kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def row_moments(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(logit of the target minus the mean, variance) of rows [..., V] with targets [...], differentiable by autograd any number of times."""
    centred = logits - logits.mean(-1, keepdim=True)
    return centred.gather(-1, targets.unsqueeze(-1)).squeeze(-1), centred.square().mean(-1)


def _row_chunks(logits: Tensor):
    """Yields (a, rows, flat) over a [A, B, V] tensor: `logits[a, rows]` is a chunk and `flat` the slice of its row numbers."""
    outer, inner, vocab = logits.shape
    step = max(1, _CHUNK_ELEMENTS // vocab)
    for a in range(outer):
        for start in range(0, inner, step):
            stop = min(inner, start + step)
            yield a, slice(start, stop), slice(a * inner + start, a * inner + stop)


def _skipped(n: int, targets: Tensor | None, mask: Tensor | None, ignore_index: int, device) -> Tensor:
    skipped = torch.zeros(n, dtype=torch.bool, device=device) if mask is None else ~mask
    return skipped if targets is None else skipped | (targets == ignore_index).all(-1)


def _inverse_temperature(temperature: float | Tensor, rows: slice, acc: torch.dtype):
    """1/T, a float or [R, 1]; a temperature that is not positive makes the row NaN."""
    if not isinstance(temperature, Tensor):
        return 1.0 / temperature
    t = temperature[rows].to(acc).unsqueeze(-1)
    return torch.where(t > 0, 1 / t, math.nan)


def token_stats_forward(logits, targets, mask, temperature, ignore_index, kept_kind, log_kept, out) -> None:
    logp_out, entropy_out, lse_out, sum_sq_out, kept_out, state_out = out
    state_out = state_out.view(-1, state_out.shape[-1])
    acc = state_out.dtype
    n, vocab = state_out.shape[0], logits.shape[-1]
    skipped = _skipped(n, targets, mask, ignore_index, logits.device)
    for a, rows, flat in _row_chunks(logits):
        x = logits[a, rows].to(acc)
        inv_t = _inverse_temperature(temperature, flat, acc)
        m = x.amax(-1, keepdim=True)
        shifted = torch.where(torch.isneginf(x), x, x - m)  # a row of -inf alone: keep it from becoming NaN here
        u = shifted * inv_t
        # The maximum's own 1 is kept out of the sum: log1p then holds the relative accuracy of confident rows.
        ties = (x == m).sum(-1, keepdim=True)
        e = torch.where(x == m, 0, u.exp())
        rest = e.sum(-1, keepdim=True) + (ties - 1)
        rest = torch.where(m.isinf(), math.nan, rest)  # a row of -inf alone, or one with +inf: undefined
        log_s0 = rest.log1p()
        mean_u = (e * u.clamp_min(-1e4)).sum(-1, keepdim=True) / (1 + rest)
        entropy = log_s0 - mean_u
        lse = m * inv_t + log_s0
        lse = torch.where(torch.isneginf(m), m, lse)
        log_p = u - log_s0
        state = torch.zeros(x.shape[0], state_out.shape[1], dtype=acc, device=x.device)
        state[:, 0:1], state[:, 1:2], state[:, 2:3] = m, rest, mean_u
        if sum_sq_out is not None:
            state[:, 3] = log_p.exp().square().sum(-1)
            sum_sq_out.view(-1)[flat] = state[:, 3].masked_fill(skipped[flat], 0)
        if kept_kind:
            inv = inv_t if isinstance(inv_t, Tensor) else torch.full_like(m, inv_t)
            delta = (log_kept if kept_kind == 1 else log_kept + log_s0) / inv
            kept, dropped = (torch.where(inside, u.exp(), 0).sum(-1, keepdim=True) for inside in (shifted >= delta, ~(shifted >= delta)))
            state[:, 4:5], state[:, 5:6] = torch.where(log_s0.isnan(), math.nan, -(dropped / kept).log1p()), delta
            kept_out.view(-1)[flat] = state[:, 4].masked_fill(skipped[flat], 0)
        if targets is not None:
            y = targets[flat]
            valid = (y >= 0) & (y < vocab)
            index = y.clamp(0, vocab - 1)
            state[:, 6:] = shifted.gather(-1, index).masked_fill(~valid, math.nan)
            logp = log_p.gather(-1, index).masked_fill(~valid, math.nan)
            dropped = skipped[flat].unsqueeze(-1) | (y == ignore_index)
            logp_out.view(n, -1)[flat] = logp.masked_fill(dropped, 0)
        if entropy_out is not None:
            entropy_out.view(-1)[flat] = entropy.squeeze(-1).masked_fill(skipped[flat], 0)
        lse_out.view(-1)[flat] = lse.squeeze(-1).masked_fill(skipped[flat], 0)
        state_out[flat] = state.masked_fill(skipped[flat].unsqueeze(-1), 0)


def _sum_of_equals(columns: Tensor, values: Tensor, spare: int) -> tuple[Tensor, Tensor]:
    """(columns, sums) [R, K]: every column once, with the sum of its values; where it stood again, the column `spare` with some part of a sum.

    Sorted, equals are neighbours, and each step of the loop doubles how far back a sum reaches. Not scatter_add: its order is not fixed on a GPU.
    """
    columns, order = columns.sort(dim=-1, stable=True)
    sums, n = values.gather(-1, order), columns.shape[-1]
    reach = 1
    while reach < n:
        same = columns[:, reach:] == columns[:, :-reach]
        sums = torch.cat([sums[:, :reach], sums[:, reach:] + torch.where(same, sums[:, :-reach], 0)], -1)
        reach *= 2
    again = torch.cat([columns[:, 1:] == columns[:, :-1], torch.zeros_like(columns[:, :1], dtype=torch.bool)], -1)
    return columns.masked_fill(again, spare), sums


def token_stats_backward(logits, targets, mask, temperature, ignore_index, state, grads, out) -> None:
    state = state.view(-1, state.shape[-1])
    acc, n, vocab = state.dtype, state.shape[0], logits.shape[-1]
    g_logp, g_entropy, g_lse, g_sum_sq, g_kept = grads
    if g_logp is not None:
        dropped = targets == ignore_index
        g_logp = g_logp.view(n, -1).masked_fill(dropped, 0)
    per_row = [None if g is None else g.view(-1) for g in (g_entropy, g_lse, g_sum_sq, g_kept)]
    skipped = _skipped(n, targets, mask, ignore_index, logits.device)
    # A row that nothing flows back into is zero whatever it holds, NaN included.
    idle = torch.ones_like(skipped)
    for g in (None if g_logp is None else g_logp.ne(0).any(-1), *per_row):
        if g is not None:
            idle &= ~g if g.dtype == torch.bool else g == 0
    skipped = skipped | idle

    for a, rows, flat in _row_chunks(logits):
        s = state[flat]
        m, rest, mean_u, sum_sq, log_kept_mass, delta = (s[:, i : i + 1] for i in range(6))
        gl = None if g_logp is None else g_logp[flat]
        g_h, g_z, g_s2, g_k = (None if g is None else g[flat].unsqueeze(-1) for g in per_row)
        inv_t = _inverse_temperature(temperature, flat, acc)
        x = logits[a, rows].to(acc)
        shifted = x - m
        u = (shifted * inv_t).clamp_min(-1e4)
        p = u.exp() / (1 + rest)
        c = torch.zeros_like(m)
        if gl is not None:
            c = c - gl.sum(-1, keepdim=True)
            valid = (targets[flat] >= 0) & (targets[flat] < vocab) | dropped[flat]
            c = torch.where(valid.all(-1, keepdim=True), c, math.nan)
        if g_z is not None:
            c = c + g_z
        if g_h is not None:
            c = c - g_h * (u - mean_u)  # entropy + log p
        if g_s2 is not None:
            c = c + 2 * g_s2 * (p - sum_sq)
        if g_k is not None:
            g_k = torch.where(torch.isneginf(log_kept_mass), 0, g_k)  # an empty kept set is a constant
            inside = torch.where(g_k != 0, (-log_kept_mass).exp(), 0)
            c = c + g_k * (torch.where(shifted >= delta, inside, 0) - 1)
        dz = p * c
        if gl is not None:
            # At a target, 1 - p without cancellation: at the maximum it is rest / S0, and elsewhere p <= 1/2.
            nowhere = dropped[flat] | ~valid
            columns, at_y = _sum_of_equals(targets[flat].masked_fill(nowhere, vocab), gl, vocab)
            y = columns.clamp_max(vocab - 1)
            c_y, p_y = c.expand_as(p).gather(-1, y), p.gather(-1, y)
            fixed = torch.where(shifted.gather(-1, y) == 0, p_y * (c_y + at_y) + at_y * rest / (1 + rest), p_y * c_y + at_y)
            spare = torch.cat([dz, torch.zeros_like(m)], -1)
            dz = spare.scatter(-1, columns, fixed)[:, :vocab]
        dz = (dz * inv_t).masked_fill(skipped[flat].unsqueeze(-1), 0)
        out[a, rows] = dz.to(out.dtype)


# --- statistics over all tokens, one number a token ----------------------------------------------------------------------------------------------


def covariance_sums(logp, advantages, mask) -> Tensor:
    logp = logp.detach()
    mask = mask & logp.isfinite()
    sums = [torch.where(mask, x, 0).sum(dtype=torch.float64) for x in (logp, advantages)]
    return torch.stack([mask.sum().to(torch.float64), *sums]).unsqueeze(0)


def token_covariance(logp, advantages, mask, sums, out) -> None:
    count, *totals = (covariance_sums(logp, advantages, mask) if sums is None else sums).sum(0)
    mean_logp, mean_advantage = ((total / count.clamp(min=1)).to(logp.dtype) for total in totals)
    out.copy_(torch.where(mask & logp.isfinite(), (advantages - mean_advantage) * (logp.detach() - mean_logp), 0))


def select_bottom(values, valid, count, out) -> None:
    order = values.argsort(stable=True)  # NaN last
    in_order = valid.gather(0, order)
    out.scatter_(0, order, in_order & (in_order.cumsum(0) <= count))
