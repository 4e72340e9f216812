"""The part of contract.py about kept ids in plain PyTorch. Sums over pairs of a row or an id are in order."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..layout import chunk_elements
from .contract import State


def _sums(values: Tensor, offsets: Tensor, of: str = "sum", initial: float = 0) -> Tensor:
    """Of the runs [offsets[i], offsets[i + 1]) of values [P, ...]."""
    return torch.segment_reduce(values, of, offsets=offsets, axis=0, initial=initial)


def kept_logits(hidden, weight, bias, ids, row, out) -> None:
    hidden, weight = hidden.reshape(-1, hidden.shape[-1]), weight[0]
    n, vocab, step = len(hidden), len(weight), max(1, chunk_elements(hidden) // max(1, hidden.shape[-1]))
    for start in range(0, len(ids), step):
        part = slice(start, start + step)
        r, v = row[part].clamp(max=n - 1), ids[part].clamp(max=vocab - 1)
        x = (hidden[r].to(out.dtype) * weight[v].to(out.dtype)).sum(-1)
        if bias is not None:
            x = x + bias[v].to(out.dtype)
        out[part] = torch.where(row[part] == n, 0, torch.where(ids[part] == vocab, math.nan, x))


def _columns(pairs: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of `width` columns, of which `pairs` rows are a chunk."""
    step = max(1, chunk_elements(torch.empty(0, device=device)) // max(1, pairs))
    return (slice(start, start + step) for start in range(0, width, step))


def kept_hidden_gradient(weight, ids, offsets, grad, out) -> None:
    weight = weight[0]
    v = ids.clamp(max=len(weight) - 1)
    for cols in _columns(len(v), out.shape[-1], out.device):
        out[:, cols] = _sums(grad.unsqueeze(-1) * weight[:, cols][v].to(grad.dtype), offsets).to(out.dtype)


def kept_weight_gradient(hidden, ids, row, grad, out) -> None:
    hidden = hidden.reshape(-1, hidden.shape[-1])
    r, grad = row.clamp(max=len(hidden) - 1), grad.unsqueeze(-1)
    offsets = torch.searchsorted(ids, torch.arange(len(out) + 1, dtype=ids.dtype, device=ids.device))
    for cols in _columns(len(r), out.shape[-1], out.device):
        out[:, cols] = _sums(grad * hidden[:, cols][r].to(grad.dtype), offsets).to(out.dtype)


def _inverse_temperature(temperature: float | Tensor) -> float | Tensor:
    """1/T, a float or [N + 1]; a temperature that is not positive makes the row NaN."""
    if not isinstance(temperature, Tensor):
        return 1.0 / temperature
    return torch.cat([torch.where(temperature > 0, 1 / temperature, math.nan), temperature.new_ones(1)])


def kept_rows_forward(logits, ids, row, offsets, targets, counted, temperature, out) -> None:
    logp_out, entropy_out, lse_out, sum_sq_out, state, place = out
    n, x = len(targets), logits
    inv_t = _inverse_temperature(temperature)
    inv = inv_t[row] if isinstance(inv_t, Tensor) else inv_t

    def by_pair(of_row: Tensor) -> Tensor:
        return torch.cat([of_row, of_row.new_zeros(1)])[row]

    def of_rows(values: Tensor) -> Tensor:
        return _sums(values, offsets)

    m = _sums(x, offsets, "max", -math.inf)
    m = torch.where(of_rows(x.isnan().to(x.dtype)) > 0, math.nan, m)
    top = by_pair(m)
    u = torch.where(x.isneginf(), x, x - top) * inv
    # The sum is without the 1 of the maximum: log1p then keeps the relative accuracy of confident rows.
    e = torch.where(x == top, 0, u.exp())
    ties = of_rows((x == top).to(x.dtype))
    rest = torch.where(m.isinf() | m.isnan(), math.nan, of_rows(e) + (ties - 1))
    log_s0 = rest.log1p()
    mean_u = of_rows(e * u.clamp_min(-1e4)) / (1 + rest)
    sum_sq = of_rows(torch.where(x == top, 1, e.square())) / (1 + rest).square()
    of_t = inv_t[:-1] if isinstance(inv_t, Tensor) else inv_t
    lse = torch.where(m.isneginf(), m, m * of_t + log_s0)

    begin, at = offsets[:-1], torch.arange(len(ids), device=ids.device)
    for k in range(targets.shape[-1]):  # few: as many as a row lists
        y = targets[:, k]
        same = (ids == by_pair(y)) & (row < n) & (by_pair(y) >= 0)
        first = _sums(torch.where(same, -at.double(), -math.inf), offsets, "max", -math.inf)
        found = first > -math.inf
        place[:, k] = torch.where(found, -first.masked_fill(~found, 0) - begin, -1).int()
        pair = (begin + place[:, k]).clamp(0, max(len(ids) - 1, 0))
        log_p = torch.where(found, u[pair] - log_s0, -math.inf)
        log_p = torch.where(rest.isnan(), math.nan, log_p)
        logp_out[:, k] = torch.where(counted & (y >= 0), log_p, 0)
    for to, value in ((entropy_out, log_s0 - mean_u), (lse_out, lse), (sum_sq_out, sum_sq)):
        if to is not None:
            to.copy_(torch.where(counted, value, 0))
    columns = {State.MAX: m, State.REST: rest, State.MEAN_U: mean_u, State.SUM_SQ: sum_sq}
    for column, value in columns.items():
        state[:, column] = torch.where(counted, value, 0)


def kept_rows_backward(logits, row, offsets, place, temperature, state, grads, out) -> None:
    n, acc = len(state), state.dtype
    g_logp, g_entropy, g_lse, g_sum_sq = grads
    if g_logp is not None:
        g_logp = g_logp.masked_fill(place < 0, 0)
    upstream = [g for g in (g_logp, g_entropy, g_lse, g_sum_sq) if g is not None]
    idle = torch.stack([(g.view(n, -1) == 0).all(-1) for g in upstream]).all(0)

    def by_pair(of_row: Tensor) -> Tensor:
        return torch.cat([of_row, of_row.new_zeros(1)])[row]

    m, rest, mean_u, sum_sq = (by_pair(state[:, i]) for i in (State.MAX, State.REST, State.MEAN_U, State.SUM_SQ))
    inv_t = _inverse_temperature(temperature)
    inv_t = inv_t[row] if isinstance(inv_t, Tensor) else inv_t
    u = ((logits - m) * inv_t).clamp_min(-1e4)
    p = u.exp() / (1 + rest)
    common = torch.zeros_like(p)
    if g_lse is not None:
        common = common + by_pair(g_lse)
    if g_entropy is not None:
        common = common - by_pair(g_entropy) * (u - mean_u)  # entropy + log p
    if g_sum_sq is not None:
        common = common + 2 * by_pair(g_sum_sq) * (p - sum_sq)
    dz = p * common
    if g_logp is not None:
        at_pair, total = torch.zeros(len(p) + 1, dtype=acc, device=p.device), torch.zeros(n, dtype=acc, device=p.device)
        for k in range(g_logp.shape[-1]):  # one target a row, so no two of one write
            total += g_logp[:, k]
            pair = torch.where(place[:, k] < 0, len(p), offsets[:-1] + place[:, k])
            at_pair[pair] = at_pair[pair] + g_logp[:, k]
        at_pair = at_pair[:-1]
        # 1 - p without cancellation: at the maximum it is rest / (1 + rest), and elsewhere p <= 1/2.
        rest_of_p = torch.where(logits == m, rest / (1 + rest), 1 - p)
        dz = dz + p * (at_pair - by_pair(total)) + at_pair * rest_of_p
    out.copy_((dz * inv_t).masked_fill(by_pair(idle) | (row == n), 0))
