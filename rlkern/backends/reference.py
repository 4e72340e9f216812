"""The contract of contract.py in plain PyTorch: closed forms for any device, used where no kernel runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..layout import row_chunks
from .contract import ELSEWHERE, LARGEST_EXPONENT, KeptKind, KLKind, State
from .reference_keep import Columns, columns
from .reference_kept import kept_hidden_gradient as kept_hidden_gradient
from .reference_kept import kept_logits as kept_logits
from .reference_kept import kept_rows_backward as kept_rows_backward
from .reference_kept import kept_rows_forward as kept_rows_forward
from .reference_kept import kept_weight_gradient as kept_weight_gradient
from .reference_pair import pair_backward as pair_backward
from .reference_pair import pair_forward as pair_forward
from .reference_pair import pair_mixture_sums as pair_mixture_sums
from .reference_pair_parts import pair_merge as pair_merge
from .reference_parts import token_stats_kept_masses as token_stats_kept_masses
from .reference_parts import token_stats_merge as token_stats_merge
from .reference_rows import inverse_temperature, listed_columns, skipped_rows, soft_cap, soft_cap_slope
from .reference_sampler import sampler_threshold as sampler_threshold

CHECKS_TARGETS = False


def _masked(keep, x, a, rows, flat, targets, ignored) -> tuple[Tensor, Columns]:
    """(rows x [R, V] at -inf outside their sets, NaN if those cannot be; the sets)"""
    sets = columns(keep, x, a, rows, flat, targets, ignored)
    return x.masked_fill(~sets.inside, -math.inf).masked_fill(sets.undefined, math.nan), sets


def token_stats_forward(logits, targets, mask, temperature, ignore_index, kept_kind, log_kept, out, softcap=0.0, keep=None, keep_out=None) -> None:
    logp_out, entropy_out, lse_out, sum_sq_out, kept_out, state_out = out
    state_out = state_out.view(-1, state_out.shape[-1])
    acc = state_out.dtype
    n, vocab = state_out.shape[0], logits.shape[-1]
    skipped = skipped_rows(n, targets, mask, ignore_index, logits.device)
    if keep is not None and keep_out[3] is not None:
        _, full_entropy, full_lse, full_state = keep_out
        whole = state_out.new_empty(n, State.TARGETS)
        results = (None, full_entropy, full_lse, None, None, whole)
        token_stats_forward(logits, None, ~skipped, temperature, ignore_index, KeptKind.NONE, 0.0, results, softcap)
        full_state.view(n, 3).copy_(whole[:, :3])
    for a, rows, flat in row_chunks(logits):
        x = logits[a, rows].to(acc)
        if keep is not None:
            x, sets = _masked(keep, x, a, rows, flat, targets, skipped.unsqueeze(-1) | (targets == ignore_index))
            keep_out[0].view(n, -1)[flat] = sets.target_kept
        x = soft_cap(x, softcap)
        inv_t = inverse_temperature(temperature, flat, acc)
        m = x.amax(-1, keepdim=True)
        shifted = torch.where(torch.isneginf(x), x, x - m)  # -inf - -inf would be NaN in a row of -inf alone
        u = shifted * inv_t
        # The sum is without the 1 of the maximum: log1p then keeps the relative accuracy of confident rows.
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
        state[:, State.MAX], state[:, State.REST], state[:, State.MEAN_U] = (x.squeeze(-1) for x in (m, rest, mean_u))
        if sum_sq_out is not None:
            state[:, State.SUM_SQ] = log_p.exp().square().sum(-1)
            sum_sq_out.view(-1)[flat] = state[:, State.SUM_SQ].masked_fill(skipped[flat], 0)
        if kept_kind != KeptKind.NONE:
            if kept_kind == KeptKind.UNLISTED:
                delta, inside = torch.full_like(m, -math.inf), ~listed_columns(targets[flat], ignore_index, vocab)
            else:
                inv = inv_t if isinstance(inv_t, Tensor) else torch.full_like(m, inv_t)
                delta = (log_kept if kept_kind == KeptKind.MIN_P else log_kept + log_s0) / inv
                inside = shifted >= delta
            kept, dropped = (torch.where(where, u.exp(), 0).sum(-1, keepdim=True) for where in (inside, ~inside))
            mass = torch.where(log_s0.isnan(), math.nan, -(dropped / kept).log1p())
            state[:, State.KEPT], state[:, State.THRESHOLD] = mass.squeeze(-1), delta.squeeze(-1)
            kept_out.view(-1)[flat] = state[:, State.KEPT].masked_fill(skipped[flat], 0)
        if targets is not None:
            y = targets[flat]
            valid = (y >= 0) & (y < vocab)
            index = y.clamp(0, vocab - 1)
            state[:, State.TARGETS :] = shifted.gather(-1, index).masked_fill(~valid, math.nan)
            logp = log_p.gather(-1, index).masked_fill(~valid, math.nan)
            dropped = skipped[flat].unsqueeze(-1) | (y == ignore_index)
            logp_out.view(n, -1)[flat] = logp.masked_fill(dropped, 0)
        if entropy_out is not None:
            entropy_out.view(-1)[flat] = entropy.squeeze(-1).masked_fill(skipped[flat], 0)
        lse_out.view(-1)[flat] = lse.squeeze(-1).masked_fill(skipped[flat], 0)
        state_out[flat] = state.masked_fill(skipped[flat].unsqueeze(-1), 0)


def _sum_of_equals(columns: Tensor, values: Tensor, spare: int) -> tuple[Tensor, Tensor]:
    """(columns, sums) [R, K]: every column once, with the sum of its values; repetitions become `spare`.

    A repetition's sum is partial. After sorting, equal columns are neighbours. Each step of the loop doubles
    how far back a sum reaches. scatter_add would not do: its order is not fixed on a GPU.
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


def _full_gradient(raw, full, flat, inv_t, softcap):
    """T times the gradient by rows [R, V] of the entropy and log-sum-exp without a set."""
    state, g_entropy, g_lse = full
    m, rest, mean_u = state.view(-1, 3)[flat].split(1, -1)
    u = ((soft_cap(raw, softcap) - m) * inv_t).clamp_min(-1e4)
    c = torch.zeros_like(m)
    if g_lse is not None:
        c = c + g_lse.view(-1, 1)[flat]
    if g_entropy is not None:
        c = c - g_entropy.view(-1, 1)[flat] * (u - mean_u)  # entropy + log p
    dz = u.exp() / (1 + rest) * c
    return dz * soft_cap_slope(raw, softcap) if softcap > 0 else dz


def token_stats_backward(logits, targets, mask, temperature, ignore_index, kept_kind, state, grads, out, softcap=0.0, keep=None, full=None) -> None:
    state = state.view(-1, state.shape[-1])
    acc, n, vocab = state.dtype, state.shape[0], logits.shape[-1]
    g_logp, g_entropy, g_lse, g_sum_sq, g_kept = grads
    if g_logp is not None:
        dropped = targets == ignore_index
        g_logp = g_logp.view(n, -1).masked_fill(dropped, 0)
    per_row = [None if g is None else g.view(-1) for g in (g_entropy, g_lse, g_sum_sq, g_kept)]
    skipped = skipped_rows(n, targets, mask, ignore_index, logits.device)
    # A row without upstream gradient gets zeros, even if it holds NaN.
    idle = torch.ones_like(skipped)
    for g in (None if g_logp is None else g_logp.ne(0).any(-1), *per_row):
        if g is not None:
            idle &= ~g if g.dtype == torch.bool else g == 0
    full_idle = torch.ones_like(skipped)
    for g in full[1:] if full is not None else ():
        if g is not None:
            full_idle &= g.view(-1) == 0
    skipped_here, skipped = skipped, skipped | (idle & full_idle)

    for a, rows, flat in row_chunks(logits):
        s = state[flat]
        m, rest, mean_u, sum_sq, log_kept_mass, delta = (s[:, i : i + 1] for i in range(State.TARGETS))
        gl = None if g_logp is None else g_logp[flat]
        g_h, g_z, g_s2, g_k = (None if g is None else g[flat].unsqueeze(-1) for g in per_row)
        inv_t = inverse_temperature(temperature, flat, acc)
        raw = whole = logits[a, rows].to(acc)
        if keep is not None:
            raw, sets = _masked(keep, raw, a, rows, flat, targets, skipped_here.unsqueeze(-1) | (targets == ignore_index))
        x = soft_cap(raw, softcap)
        shifted = x - m
        u = (shifted * inv_t).clamp_min(-1e4)
        p = u.exp() / (1 + rest)
        c = torch.zeros_like(m)
        if gl is not None:
            c = c - gl.sum(-1, keepdim=True)
            nowhere = dropped[flat] | (targets[flat] == ELSEWHERE)
            valid = (targets[flat] >= 0) & (targets[flat] < vocab) | nowhere
            c = torch.where(valid.all(-1, keepdim=True), c, math.nan)
        if g_z is not None:
            c = c + g_z
        if g_h is not None:
            c = c - g_h * (u - mean_u)  # entropy + log p
        if g_s2 is not None:
            c = c + 2 * g_s2 * (p - sum_sq)
        if g_k is not None:
            g_k = torch.where(torch.isneginf(log_kept_mass), 0, g_k)  # an empty kept set is a constant
            if kept_kind == KeptKind.UNLISTED:
                elsewhere = torch.where(g_k != 0, torch.expm1(-log_kept_mass), 0)
                c = c + g_k * torch.where(listed_columns(targets[flat], ignore_index, vocab), -1, elsewhere)
            else:
                inside = torch.where(g_k != 0, (-log_kept_mass).exp(), 0)
                c = c + g_k * (torch.where(shifted >= delta, inside, 0) - 1)
        dz = p * c
        if gl is not None:
            # At a target, 1 - p without cancellation: at the maximum it is rest / S0, and elsewhere p <= 1/2.
            columns, at_y = _sum_of_equals(targets[flat].masked_fill(nowhere | ~valid, vocab), gl, vocab)
            y = columns.clamp_max(vocab - 1)
            c_y, p_y = c.expand_as(p).gather(-1, y), p.gather(-1, y)
            fixed = torch.where(shifted.gather(-1, y) == 0, p_y * (c_y + at_y) + at_y * rest / (1 + rest), p_y * c_y + at_y)
            spare = torch.cat([dz, torch.zeros_like(m)], -1)
            dz = spare.scatter(-1, columns, fixed)[:, :vocab]
        if softcap > 0:
            dz = dz * soft_cap_slope(raw, softcap)
        if keep is not None:
            dz = dz.masked_fill(~sets.inside | idle[flat].unsqueeze(-1), 0)
        if full is not None:
            dz = dz + _full_gradient(whole, full, flat, inv_t, softcap).masked_fill(full_idle[flat].unsqueeze(-1), 0)
        dz = (dz * inv_t).masked_fill(skipped[flat].unsqueeze(-1), 0)
        out[a, rows] = dz.to(out.dtype)


# --- moments ------------------------------------------------------------------------------------------------


def row_moments_forward(logits, targets, mask, ignore_index, out) -> None:
    target_out, variance_out, mean_out = (t.view(logits.shape[:2].numel(), -1) for t in out)
    n, vocab = mean_out.shape[0], logits.shape[-1]
    skipped = skipped_rows(n, targets, mask, ignore_index, logits.device).unsqueeze(-1)
    for a, rows, flat in row_chunks(logits):
        x = logits[a, rows].to(mean_out.dtype)
        head = x.mean(-1, keepdim=True)
        x = x - head  # around the mean: E[x^2] - mean^2 would cancel
        tail = x.mean(-1, keepdim=True)  # what rounding left
        x = x - tail
        y = targets[flat]
        target = x.gather(-1, y.clamp(0, vocab - 1)).masked_fill((y < 0) | (y >= vocab), math.nan)
        variance = x.square().mean(-1, keepdim=True)
        for to, value in ((target_out, target), (variance_out, variance), (mean_out, torch.cat([head, tail], -1))):
            to[flat] = value.masked_fill(skipped[flat], 0)


def row_moments_backward(logits, targets, mask, ignore_index, mean, grads, out) -> None:
    mean = mean.view(-1, 2)
    acc, n, vocab = mean.dtype, mean.shape[0], logits.shape[-1]
    g_target, g_variance = (mean.new_zeros(n, 1) if g is None else g.view(n, 1) for g in grads)
    idle = skipped_rows(n, targets, mask, ignore_index, logits.device).unsqueeze(-1) | ((g_target == 0) & (g_variance == 0))
    g_target = torch.where((targets >= 0) & (targets < vocab) | (g_target == 0), g_target, math.nan)
    for a, rows, flat in row_chunks(logits):
        g_t, g_v, (head, tail) = g_target[flat], g_variance[flat], mean[flat].split(1, -1)
        dx = (logits[a, rows].to(acc) - head - tail) * (2 * g_v / vocab)
        dx = torch.where(g_v == 0, 0, dx) - g_t / vocab  # no infinite logit times 0
        at = targets[flat].clamp(0, vocab - 1)
        dx.scatter_(-1, at, dx.gather(-1, at) + g_t)  # one target a row, so no atomic addition
        out[a, rows] = dx.masked_fill_(idle[flat], 0).to(out.dtype)


# --- differential information distribution ------------------------------------------------------------------


def _differences(logits: Tensor, reference: Tensor, mask: Tensor | None, acc: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yields (a, rows, flat, differences [1, R, V], mask): a chunk at a time."""
    for a, rows, flat in row_chunks(logits):
        x = logits[a, rows].to(acc)
        difference = (x - reference[a, rows].to(acc)).masked_fill_(torch.isneginf(x), -math.inf)  # mass 0 in any case
        yield a, rows, flat, difference.unsqueeze(0), None if mask is None else mask[flat]


def did_entropy_forward(logits, reference, mask, temperature, out) -> None:
    entropy, state = out[0].view(-1), out[1].view(-1, State.TARGETS)
    for _, _, flat, difference, counted in _differences(logits, reference, mask, state.dtype):
        t = temperature[flat] if isinstance(temperature, Tensor) else temperature
        results = (None, entropy[flat], torch.empty_like(entropy[flat]), None, None, state[flat])
        token_stats_forward(difference, None, counted, t, 0, KeptKind.NONE, 0.0, results)


def did_entropy_backward(logits, reference, mask, temperature, state, grad, out) -> None:
    state, grad = state.view(-1, State.TARGETS), grad.view(-1)
    for a, rows, flat, difference, counted in _differences(logits, reference, mask, state.dtype):
        t = temperature[flat] if isinstance(temperature, Tensor) else temperature
        token_stats_backward(difference, None, counted, t, 0, KeptKind.NONE, state[flat], (None, grad[flat], None, None, None), difference)
        for to, sign in zip(out, (1, -1), strict=True):
            if to is not None:
                to[a, rows] = (sign * difference[0]).to(to.dtype)


# --- one number a token, over all tokens of a batch ---------------------------------------------------------


def _covariance_sums(logp, advantages, mask) -> Tensor:
    logp = logp.detach()
    mask = mask & logp.isfinite()
    sums = [torch.where(mask, x, 0).sum(dtype=torch.float64) for x in (logp, advantages)]
    return torch.stack([mask.sum().to(torch.float64), *sums]).unsqueeze(0)


def sequence_sums(values, mask, cu_seqlens, out) -> None:
    last = values.shape[-1]
    offsets = cu_seqlens.clamp(0, last).cummax(0).values  # on a GPU nobody has checked them
    for row, sums in zip(values, out, strict=True):
        counted = torch.where(mask, row, 0).to(out.dtype)
        sums.copy_(torch.segment_reduce(counted, "sum", offsets=offsets, unsafe=True))


def sequence_spread(x, mask, seq_idx, out) -> None:
    last = x.shape[0]
    known = (seq_idx >= 0) & (seq_idx < last)
    numbers = torch.nn.functional.pad(x, (0, 1)).index_select(0, torch.where(known, seq_idx, last))
    out.copy_(numbers if mask is None else torch.where(mask, numbers, 0))


def token_covariance(logp, advantages, mask, sums, out) -> None:
    count, *totals = (_covariance_sums(logp, advantages, mask) if sums is None else sums).sum(0)
    mean_logp, mean_advantage = ((total / count.clamp(min=1)).to(logp.dtype) for total in totals)
    out.copy_(torch.where(mask & logp.isfinite(), (advantages - mean_advantage) * (logp.detach() - mean_logp), 0))


def select_bottom(values, valid, count, out) -> None:
    order = values.argsort(stable=True)  # NaN last
    in_order = valid.gather(0, order)
    out.scatter_(0, order, in_order & (in_order.cumsum(0) <= count))


def select_fraction(values, valid, group, fraction, minimum, least, out) -> None:
    count = (group.sum().to(torch.float64) * fraction).to(torch.int64).clamp(min=minimum)
    select_bottom(values, valid, torch.where(count >= least, count, 0), out)


def selected_means(values, selected, mask, out) -> None:
    tokens, chosen = mask.sum().clamp(min=1), selected.sum()
    sums = [torch.where(where, values, 0).sum() / n for where, n in ((mask, tokens), (selected, chosen.clamp(min=1)))]
    out.copy_(torch.stack([chosen.to(values.dtype) / tokens, *sums]))


def ratio_terms(logp, old_logp, advantages, mask, unclipped, bounds, out) -> None:
    low, high, dual, least, most = bounds
    terms, free, summary = out
    d = torch.where(mask, logp.detach() - (logp if old_logp is None else old_logp).detach(), 0)
    ratio, outside = d.clamp(least, most).exp(), (d < least) | (d > most)
    below, above = (advantages < 0) & (ratio < low), (advantages > 0) & (ratio > high)
    beyond = (advantages < 0) & (ratio > dual)
    clips = below | above | beyond
    clips = clips if unclipped is None else clips & ~unclipped
    bound = torch.where(below, low, torch.where(above, high, dual)).to(ratio.dtype)
    terms[0] = torch.where(mask, -advantages * torch.where(clips, bound, ratio), 0)
    terms[1] = torch.where(clips | outside, 0, terms[0])
    free.copy_(mask & logp.isfinite() & ~below & ~above)

    tokens = mask.sum().to(torch.float64)
    count, x = tokens.clamp(min=1), d.double()
    largest, smallest = (torch.where(mask, x, end).amax() if end < 0 else torch.where(mask, x, end).amin() for end in (-math.inf, math.inf))
    weights = torch.where(mask, (x - torch.where(largest.isinf(), 0, largest)).exp(), 0)
    mean = weights.sum() / count
    summary.copy_(torch.stack([
        count,
        *(((where & mask).sum() / count) for where in (below, above, beyond)),
        -x.sum() / count,
        torch.where(mask, torch.expm1(x) - x, 0).sum() / count,
        torch.where(tokens > 0, largest.exp(), 1),
        torch.where(tokens > 0, smallest.exp(), 1),
        torch.where(tokens > 0, weights.sum() * mean / weights.square().sum(), 1),
        tokens,
        torch.where(tokens > 0, largest + mean.log(), 0),
        x.abs().sum() / count,
    ]))  # fmt: skip


def kl_terms(logp, reference, mask, kind, straight_through, clamp, out) -> None:
    d = torch.where(mask, logp.detach() - reference, 0)
    x = (-d).clamp(max=LARGEST_EXPONENT)
    value, slope = {
        KLKind.K1: (d, torch.ones_like(d)),
        KLKind.ABS: (d.abs(), d.sign()),
        KLKind.K2: (0.5 * d.square(), d),
        KLKind.K3: (torch.expm1(x) - x, torch.where(-d > LARGEST_EXPONENT, 0, -torch.expm1(x))),
    }[kind]
    slope = d if straight_through else torch.where(value.abs() > clamp, 0, slope)
    out[0], out[1] = value.clamp(-clamp, clamp), torch.where(mask, slope, 0)
