"""Rows in parts, in plain PyTorch: token_stats_merge and token_stats_kept_masses of contract.py.

A part is relative to its own maximum, and REST leaves out that maximum's own 1. So a confident row keeps its
relative accuracy: the 1 is left out once, for the maximum of the row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..layout import row_chunks
from .contract import KeptKind, State
from .reference_rows import inverse_temperature, listed_columns, skipped_rows, soft_cap


def _merged(parts: Tensor, inv_t: float | Tensor) -> Tensor:
    """The state [N, W] of whole rows from those of their parts [P, N, W], added in their order."""
    m_part, rest, mean_u, sum_sq = (parts[..., i] for i in (State.MAX, State.REST, State.MEAN_U, State.SUM_SQ))
    m = m_part.amax(0)
    below = torch.where(m_part == m, 0, m_part - m)  # also where both are -inf
    d = (below * inv_t).clamp_min(-1e4)  # e^d is 0, and unlike -inf it can be multiplied by 0
    mass = d.exp() * (1 + rest)
    first = (m_part == m).to(torch.uint8).argmax(0, keepdim=True)
    less_one = mass.scatter(0, first, rest.gather(0, first))  # the maximum's own 1 is left out, once
    terms = torch.stack([less_one, mass * (mean_u + d), mass.square() * sum_sq])
    terms = torch.where(torch.isneginf(m_part), 0, terms)
    sums = terms[:, 0]
    for i in range(1, len(parts)):
        sums = sums + terms[:, i]
    total_rest, weighted_u, squares = sums
    undefined = m.isinf()  # a row of -inf alone, or one with +inf
    total_rest = total_rest.masked_fill(undefined, math.nan)
    total = 1 + total_rest
    state = torch.zeros_like(parts[0])
    state[:, State.MAX], state[:, State.REST] = m, total_rest
    state[:, State.MEAN_U], state[:, State.SUM_SQ] = weighted_u / total, squares / total.square()
    at_target = parts[..., State.TARGETS :] + below.unsqueeze(-1)
    absent = at_target.isnan()
    found = at_target.masked_fill(absent, -math.inf).amax(0)
    state[:, State.TARGETS :] = found.masked_fill(absent.all(0), math.nan)
    return state


def token_stats_merge(parts, targets, mask, temperature, ignore_index, kept_kind, log_kept, out) -> None:
    logp_out, entropy_out, lse_out, sum_sq_out, _, state_out = out
    n = parts.shape[1]
    skipped = skipped_rows(n, targets, mask, ignore_index, parts.device).unsqueeze(-1)
    by_row = inverse_temperature(temperature, slice(None), parts.dtype)
    inv_t = torch.as_tensor(by_row, dtype=parts.dtype, device=parts.device)
    state = _merged(parts, by_row.squeeze(-1) if isinstance(by_row, Tensor) else by_row)
    m, rest, mean_u, sum_sq = (state[:, i : i + 1] for i in (State.MAX, State.REST, State.MEAN_U, State.SUM_SQ))
    log_s0 = rest.log1p()
    if kept_kind == KeptKind.UNLISTED:
        state[:, State.THRESHOLD] = -math.inf
    elif kept_kind != KeptKind.NONE:
        state[:, State.THRESHOLD : State.TARGETS] = (log_kept if kept_kind == KeptKind.MIN_P else log_kept + log_s0) / inv_t
    logsumexp = torch.where(torch.isneginf(m), m, m * inv_t + log_s0)
    for to, value in ((entropy_out, log_s0 - mean_u), (lse_out, logsumexp), (sum_sq_out, sum_sq)):
        if to is not None:
            to.view(n, 1).copy_(value.masked_fill(skipped, 0))
    if targets is not None:
        logp = state[:, State.TARGETS :] * inv_t - log_s0
        logp_out.view(n, -1).copy_(logp.masked_fill(skipped | (targets == ignore_index), 0))
    state_out.view(state.shape).copy_(state.masked_fill(skipped, 0))


def token_stats_kept_masses(logits, targets, mask, temperature, ignore_index, kept_kind, state, out, softcap=0.0) -> None:
    state = state.view(-1, state.shape[-1])
    skipped = skipped_rows(len(state), targets, mask, ignore_index, logits.device)
    for a, rows, flat in row_chunks(logits):
        x = soft_cap(logits[a, rows].to(state.dtype), softcap)
        m, threshold = (state[flat][:, i : i + 1] for i in (State.MAX, State.THRESHOLD))
        shifted = torch.where(torch.isneginf(x), x, x - m)
        e = (shifted * inverse_temperature(temperature, flat, state.dtype)).exp()
        kept = ~listed_columns(targets[flat], ignore_index, x.shape[-1]) if kept_kind == KeptKind.UNLISTED else shifted >= threshold
        masses = torch.stack([torch.where(where, e, 0).sum(-1) for where in (kept, ~kept)], -1)
        out[flat] = masses.masked_fill(skipped[flat].unsqueeze(-1), 0)
