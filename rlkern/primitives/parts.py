"""Statistics of rows in parts: of some of their columns, and of whole rows from those.

The parts may be tiles of a matrix, or shards of a vocabulary on the ranks of a group.

A part is the state that a backend's forward leaves of its columns. What parts add up to, in their order, is
the state of the row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import backends
from ..backends.contract import KeptKind, State
from ..checks import check_target_range, computing_dtype
from ..layout import as_rows, counted_rows
from ..operator import Operator, values_readable
from .row_stats import IGNORED, OPTIONS, RESULTS, TENSORS, Options, Results, compute, for_backend, new_results, real_columns, targets_in_part

_N = len(Options._fields)


# --- of columns ---------------------------------------------------------------------------------------------


def pieces_of(columns: int, o: Options, segments: int) -> Iterator[tuple[int, int]]:
    """[from, to) of each part among the columns here, without padding; an empty one may be (a, a)."""
    real, size = real_columns(columns, o), columns // max(segments, 1)
    for i in range(max(segments, 1)):
        yield min(i * size, real), min((i + 1) * size, real)


def state_of_nothing(state: Tensor) -> Tensor:
    """That of no columns, like a state."""
    nothing = torch.zeros_like(state)
    nothing[..., State.MAX] = -math.inf
    nothing[..., State.TARGETS :] = math.nan
    return nothing


def parts_of(logits, targets, mask, row_temperature, *args) -> Tensor:
    """[P, ..., W]: of each segment of the columns, or of all of them."""
    o, segments, parts = Options(*args[:_N]), args[_N], []
    if targets is not None and values_readable(logits):
        single = targets.dim() < logits.dim()
        y = targets.reshape(-1, 1 if single else targets.shape[-1])
        check_target_range(y, None if mask is None else mask.reshape(-1), o.ignore_index, o.vocab_size)
    in_part = o._replace(ignore_index=IGNORED, kept_kind=KeptKind.NONE, vocab_start=0, vocab_size=0)
    for start, stop in pieces_of(logits.shape[-1], o, segments):
        if start == stop:
            parts.append(state_of_nothing(new_results(logits, targets, in_part).state))
            continue
        y = targets_in_part(targets, o.vocab_start + start, o.vocab_start + stop, o.vocab_size, o.ignore_index)
        parts.append(compute(logits[..., start:stop], y, mask, row_temperature, *in_part).state)
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)


def _new_parts(logits, targets, mask, row_temperature, *args) -> Tensor:
    results = new_results(logits, targets, Options(*args[:_N]))
    return results.state.new_empty(max(args[_N], 1), *results.state.shape)


def _kept_masses(logits, targets, mask, row_temperature, *args) -> Tensor:
    """[P, ..., 2]: the mass that is kept of each part and that of its other columns, from the rows' state."""
    o, segments, state = Options(*args[:_N]), args[_N], args[_N + 1]
    out = _new_masses(logits, targets, mask, row_temperature, *args)
    if state.numel() == 0:
        return out
    _, counted, temperature = for_backend(logits, None, mask, row_temperature, o.temperature)
    rows, backend = as_rows(logits), backends.select(logits.device)
    for i, (start, stop) in enumerate(pieces_of(logits.shape[-1], o, segments)):
        if start == stop:
            out[i].zero_()
            continue
        y = targets_in_part(targets, o.vocab_start + start, o.vocab_start + stop, o.vocab_size, o.ignore_index)
        y, *_ = for_backend(logits, y, None, None, 1.0)
        of_part = (rows[..., start:stop], y, counted, temperature, IGNORED, o.kept_kind, state, out[i].view(-1, 2))
        backend.token_stats_kept_masses(*of_part, o.softcap)
    return out


def _new_masses(logits, targets, mask, row_temperature, *args) -> Tensor:
    return logits.new_empty(max(args[_N], 1), *logits.shape[:-1], 2, dtype=computing_dtype(logits))


token_stats_parts = Operator(f"token_stats_parts(Tensor logits, {TENSORS}, {OPTIONS}, int segments) -> Tensor", parts_of, _new_parts)
token_stats_kept_masses = Operator(
    f"token_stats_kept_masses(Tensor logits, {TENSORS}, {OPTIONS}, int segments, Tensor state) -> Tensor", _kept_masses, _new_masses
)


# --- of whole rows ------------------------------------------------------------------------------------------


def merge(parts, targets, mask, row_temperature, *options) -> Results:
    """Of whole rows from their parts [P, ..., W]. What is kept is missing: `with_kept` adds it."""
    o = Options(*options)
    out = new_results(parts[0], targets, o._replace(kept_kind=KeptKind.NONE))
    if out.logsumexp.numel() == 0:
        return out
    y, mask, temperature = for_backend(parts[0], targets, mask, row_temperature, o.temperature)
    backend = backends.select(parts.device)
    rows = parts.flatten(1, -2) if parts.dim() > 2 else parts.unsqueeze(1)
    of_backend = (*out[:5], out.state)
    backend.token_stats_merge(rows, y, mask, temperature, o.ignore_index, o.kept_kind, o.log_kept, of_backend)
    return out


token_stats_merge = Operator(
    f"token_stats_merge(Tensor parts, {TENSORS}, {OPTIONS}) -> {RESULTS}",
    run=merge,
    fake=lambda parts, targets, mask, row_temperature, *options: new_results(parts[0], targets, Options(*options)._replace(kept_kind=KeptKind.NONE)),
)


def with_kept(results: Results, masses: Tensor, targets: Tensor | None, mask: Tensor | None, options: Options) -> Results:
    """The results of a merge with what is kept: the parts' masses [P, ..., 2], added in their order."""
    state = results.state
    total = masses[0]
    for i in range(1, len(masses)):
        total = total + masses[i]
    logmass = -(total[..., 1] / total[..., 0]).log1p()
    logmass = torch.where(state[..., State.REST].isnan(), math.nan, logmass)
    counted = counted_rows(targets, mask, options.ignore_index, logmass.dim())
    if counted is not None:
        logmass = torch.where(counted, logmass, 0)
    before, after = state[..., : State.KEPT], state[..., State.THRESHOLD :]
    state = torch.cat([before, logmass.unsqueeze(-1), after], -1)
    target_kept = None
    if options.kept_kind != KeptKind.UNLISTED and targets is not None:
        target_kept = (state[..., State.TARGETS :] >= state[..., State.THRESHOLD : State.TARGETS]).view(targets.shape)
    return results._replace(kept_logmass=logmass, target_kept=target_kept, state=state)
