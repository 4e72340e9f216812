"""A row in parts: statistics of some of its columns at a time, and of the whole row from those.

A part is what a backend's `token_stats_forward` leaves of some columns, in the columns of `State`. It is
relative to its own maximum, and REST leaves out that maximum's own 1. So a confident row keeps its relative
accuracy: the 1 is left out once, for the maximum of the row. Parts may be tiles of a matrix or shards of a
vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backends.contract import ELSEWHERE, State
from ..backends.reference_rows import inverse_temperature
from ..layout import counted_rows
from .row_stats import Options, Results

IGNORED, INVALID = -2, -1  # in place of targets in a part; an IGNORED entry is that part's ignore_index


def targets_in_part(targets: Tensor | None, start: int, stop: int, vocab: int, ignore_index: int) -> Tensor | None:
    """The targets of whole rows as those of the columns [start, stop), counted from `start`."""
    if targets is None:
        return None
    here = torch.where((targets >= start) & (targets < stop), targets - start, ELSEWHERE)
    here = here.masked_fill((targets < 0) | (targets >= vocab), INVALID)
    return here.masked_fill(targets == ignore_index, IGNORED)


def part_of(stats: Results, targets: Tensor | None) -> Tensor:
    """[n, State.TARGETS + K] from the statistics of some columns and the targets in them, [n] or [n, K].

    Columns that are all -inf have REST -1, hence no mass.
    """
    part = stats.state
    nothing = torch.isneginf(stats.logsumexp)
    part[:, State.REST].masked_fill_(nothing, -1)
    part[:, State.MEAN_U : State.SUM_SQ + 1].masked_fill_(nothing.unsqueeze(-1), 0)
    if targets is not None:  # -inf less a maximum of -inf
        part[:, State.TARGETS :].masked_fill_(nothing.unsqueeze(-1) & (targets.view(len(part), -1) >= 0), -math.inf)
    return part


def merge(parts: Tensor, temperature: float | Tensor) -> Tensor:
    """The state [n, W] of whole rows from those of their parts [P, n, W], added in their order.

    temperature: a float, or [n]. Of rows that were skipped the result means nothing.
    """
    m_part, rest, mean_u, sum_sq = (parts[..., i] for i in (State.MAX, State.REST, State.MEAN_U, State.SUM_SQ))
    inv_t = inverse_temperature(temperature, slice(None), parts.dtype)
    inv_t = inv_t.squeeze(-1) if isinstance(inv_t, Tensor) else inv_t
    m = m_part.amax(0)
    below = torch.where(m_part == m, 0, m_part - m)  # also where both are -inf
    d = (below * inv_t).clamp_min(-1e4)  # e^d is 0, and unlike -inf it can be multiplied by 0
    weight = d.exp()
    mass = weight * (1 + rest)
    first = (m_part == m).to(torch.uint8).argmax(0, keepdim=True)
    less_one = mass.scatter(0, first, rest.gather(0, first))  # the maximum's own 1 is left out, once
    terms = torch.stack([less_one, mass * (mean_u + d), mass.square() * sum_sq])
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


def finish(state: Tensor, targets: Tensor | None, mask: Tensor | None, temperature: float | Tensor, options: Options) -> Results:
    """The statistics of whole rows from their state [n, W]; targets [n] or [n, K], temperature as in `merge`.

    Rows that do not count get zeros.
    """
    counted = counted_rows(targets, mask, options.ignore_index, 1)
    if counted is not None:
        state = state.masked_fill(~counted.unsqueeze(-1), 0)
    inv_t = inverse_temperature(temperature, slice(None), state.dtype)
    m, rest, mean_u, sum_sq = (state[:, i : i + 1] for i in (State.MAX, State.REST, State.MEAN_U, State.SUM_SQ))
    log_s0 = rest.log1p()
    logsumexp = torch.where(torch.isneginf(m), m, m * inv_t + log_s0)
    by_row = [log_s0 - mean_u, logsumexp, sum_sq]
    if counted is not None:
        by_row = [x.masked_fill(~counted.unsqueeze(-1), 0) for x in by_row]
    entropy, logsumexp, sum_sq = (x.squeeze(-1) for x in by_row)
    logp = None
    if targets is not None:
        y = targets.view(len(state), -1)
        dropped = y == options.ignore_index
        dropped = dropped if counted is None else dropped | ~counted.unsqueeze(-1)
        logp = (state[:, State.TARGETS :] * inv_t - log_s0).masked_fill(dropped, 0).view(targets.shape)
    return Results(logp, entropy if options.with_entropy else None, logsumexp, sum_sq if options.with_sum_sq else None, None, None, state)
