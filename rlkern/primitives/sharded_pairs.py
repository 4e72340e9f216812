"""`pair_stats` and `token_divergence` of rows cut over the ranks of a group, or into segments.

Each rank sends what its columns of both rows add up to: one gather of a few numbers a row. A divergence from
a mixture is summed once both normalisers are known: a second gather of two. The gradient needs none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.contract import PairKind, PairPart, PairState
from ..checks import check_target_range, computing_dtype
from ..layout import as_rows, counted_rows
from ..operator import Operator, Steps, differentiable, values_readable
from ..parallel import Shard
from .pair_rows import (
    INSTEAD,
    N_OPTIONS,
    PAIR_OPTIONS,
    PAIR_RESULTS,
    PAIR_ROWS,
    PairOptions,
    compute_pair,
    for_backend,
    new_pair_results,
    pair_backward,
    pair_overwrite,
    pair_rows,
)
from .row_stats import IGNORED, targets_in_part
from .sharded_stats import Columns, agreed_rows, all_parts, new_payload

_PAIR = f"Tensor logits, Tensor other, {PAIR_ROWS}, {PAIR_OPTIONS}"  # vocab: of all columns, those below it count
_HERE = "SymInt vocab_start, int segments"


def _real(columns: int, o: PairOptions, start: int) -> int:
    """How many of the columns are no padding."""
    return min(columns, max(0, o.vocab - start))


# --- operators ----------------------------------------------------------------------------------------------


def _new_parts(logits, other, targets, mask, row_temperature, other_row_temperature, *args) -> Tensor:
    return logits.new_empty(max(args[-1], 1), *logits.shape[:-1], PairPart.WIDTH, dtype=computing_dtype(logits))


def _part_of(logits, other, targets, *args) -> Tensor:
    """[..., PairPart.WIDTH] of columns that all count; targets are theirs."""
    o = PairOptions(*args[-N_OPTIONS:])
    # A mixture waits for the normalisers, which any kind comes with.
    o = o._replace(kind=o.kind if o.kind < PairKind.JSD else PairKind.REVERSE_KL, other_grad=True)
    divergence, *_, other_logp, other_entropy, _, state = compute_pair(logits, other, targets, *args[:-N_OPTIONS], *o)
    if other_logp is not None:  # -inf - -inf is NaN, which stands for a target that is not here
        m, other_m, at_target = (state[..., i] for i in (PairState.MAX, PairState.OTHER_MAX, PairState.TARGET))
        at_target.masked_fill_((targets >= 0) & m.isneginf(), -math.inf)
        other_logp.masked_fill_((targets >= 0) & other_m.isneginf(), -math.inf)
    added = (torch.zeros_like(divergence) if x is None else x for x in (divergence, other_entropy, other_logp))
    return torch.cat([state, *(x.unsqueeze(-1) for x in added)], -1)


def _pieces(columns: int, o: PairOptions, start: int, segments: int) -> Iterator[tuple[int, int]]:
    """[from, to) of each part among the columns here, without padding; an empty one is (a, a)."""
    real, size = _real(columns, o, start), columns // max(segments, 1)
    for i in range(max(segments, 1)):
        yield min(i * size, real), min((i + 1) * size, real)


def _parts(logits, other, targets, mask, row_temperature, other_row_temperature, *args) -> Tensor:
    """[P, ..., PairPart.WIDTH]: of each segment of the columns, or of all of them."""
    o, (start, segments) = PairOptions(*args[:N_OPTIONS]), args[N_OPTIONS:]
    if targets is not None and values_readable(logits):
        check_target_range(targets.reshape(-1, 1), None if mask is None else mask.reshape(-1), o.ignore_index, o.vocab)
    parts = []
    for first, stop in _pieces(logits.shape[-1], o, start, segments):
        if first == stop:
            parts.append(_part_of_nothing(logits))
            continue
        y = targets_in_part(targets, start + first, start + stop, o.vocab, o.ignore_index)
        here = o._replace(ignore_index=IGNORED, vocab=stop - first)
        columns = logits[..., first:stop], other[..., first:stop]
        parts.append(_part_of(*columns, y, mask, row_temperature, other_row_temperature, *here))
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)


def _part_of_nothing(logits: Tensor) -> Tensor:
    part = logits.new_zeros(*logits.shape[:-1], PairPart.WIDTH, dtype=computing_dtype(logits))
    part[..., PairState.MAX] = part[..., PairState.OTHER_MAX] = -math.inf
    part[..., PairState.TARGET] = part[..., PairPart.OTHER_LOGP] = math.nan
    return part


def _merge(parts, targets, mask, row_temperature, other_row_temperature, *options):
    """The results of new_pair_results, of whole rows from their parts [P, ..., W], but for a mixture's."""
    o = PairOptions(*options)
    out = new_pair_results(parts[0], None, targets, mask, row_temperature, other_row_temperature, *options)
    if out[0].numel() == 0:
        return out
    mask = counted_rows(targets, mask, o.ignore_index, parts.dim() - 2)
    _, mask, t, other_t = for_backend(parts[0], None, mask, row_temperature, other_row_temperature, o.temperature, o.other_temperature)
    rows = parts.flatten(1, -2) if parts.dim() > 2 else parts.unsqueeze(1)
    backends.select(parts.device).pair_merge(rows, mask, t, other_t, o.kind, o.beta, out)
    return out


def _mixture_sums(logits, other, targets, mask, row_temperature, other_row_temperature, *args) -> Tensor:
    """[P, ..., 2]: sum p f and sum p g of each part, from the rows' state."""
    o, (start, segments, state) = PairOptions(*args[:N_OPTIONS]), args[N_OPTIONS:]
    out = _new_sums(logits, other, targets, mask, row_temperature, other_row_temperature, *args)
    if logits.numel() == 0:
        return out.zero_()
    mask = counted_rows(targets, mask, o.ignore_index, logits.dim() - 1)
    of_rows = for_backend(logits, None, mask, row_temperature, other_row_temperature, o.temperature, o.other_temperature)
    z, w, backend = as_rows(logits), as_rows(other), backends.select(logits.device)
    for sums, (first, stop) in zip(out, _pieces(logits.shape[-1], o, start, segments), strict=True):
        if first == stop:
            sums.zero_()
            continue
        columns = z[..., first:stop], w[..., first:stop]
        backend.pair_mixture_sums(*columns, *of_rows[1:], o.kind, o.beta, state, sums.view(-1, 2), o.softcap, o.other_softcap)
    return out


def _new_sums(logits, other, targets, mask, row_temperature, other_row_temperature, *args) -> Tensor:
    return logits.new_empty(max(args[N_OPTIONS + 1], 1), *logits.shape[:-1], 2, dtype=computing_dtype(logits))


_pair_parts = Operator(f"pair_parts({_PAIR}, {_HERE}) -> Tensor", _parts, _new_parts)
_pair_mixture_sums = Operator(f"pair_mixture_sums({_PAIR}, {_HERE}, Tensor state) -> Tensor", _mixture_sums, _new_sums)
_pair_merge = Operator(
    f"pair_merge(Tensor parts, {PAIR_ROWS}, {PAIR_OPTIONS}) -> {PAIR_RESULTS}",
    run=_merge,
    fake=lambda parts, targets, *args: new_pair_results(parts[0], None, targets, *args),
)


# --- steps --------------------------------------------------------------------------------------------------


def _split(args: Sequence[Any]) -> tuple[PairOptions, Shard, Sequence[Any]]:
    m = N_OPTIONS + len(Shard._fields)
    return PairOptions(*args[:N_OPTIONS]), Shard(*args[N_OPTIONS:m]), args[m:]


def _forward(call, logits, other, targets, mask, row_temperature, other_row_temperature, *args) -> tuple:
    o, shard, _ = _split(args)
    of_rows = (targets, mask, row_temperature, other_row_temperature)
    of_columns = (logits, other, *of_rows, *o, shard.start, shard.segments)
    of_group = (shard.group_name, shard.ranks)
    parts = all_parts(call(_pair_parts, *of_columns), *of_group, *of_rows)
    results = call(_pair_merge, parts, *of_rows, *o)
    if o.kind < PairKind.JSD:
        return tuple(results)
    _, *others, state = results
    parts = all_parts(call(_pair_mixture_sums, *of_columns, state), *of_group)
    sums = parts[0]
    for i in range(1, len(parts)):
        sums = sums + parts[i]
    divergence, mean_slope = sums.unbind(-1)
    divergence = divergence.clamp(min=0)
    if o.kind == PairKind.SKEW_FORWARD_KL:
        mean_slope = mean_slope.clamp(min=0)  # not below 0 by rounding: of this kind the sign says something
    columns = list(state.unbind(-1))
    columns[PairState.MEAN_SLOPE], columns[PairState.OTHER_MEAN_SLOPE] = mean_slope, divergence - mean_slope
    return (divergence, *others, torch.stack(columns, -1))


def _on_columns(operator: Operator) -> Callable:
    """The backward of whole rows as that of the columns here."""

    def steps(call, logits, other, targets, mask, row_temperature, other_row_temperature, *args):
        o, shard, rest = _split(args)
        real = _real(logits.shape[-1], o, shard.start)
        y = targets_in_part(targets, shard.start, shard.start + real, o.vocab, o.ignore_index)
        here = o._replace(ignore_index=IGNORED, vocab=real)
        return call(operator, logits, other, y, mask, row_temperature, other_row_temperature, *here, *rest)

    return steps


_sharded_pairs = differentiable(
    Steps("sharded_pair_stats", _forward, _pair_parts, _pair_merge, _pair_mixture_sums),
    Steps("sharded_pair_stats_backward", _on_columns(pair_backward), pair_backward),
    outputs=4,
    constants=3,
    wrt=2,
    instead=INSTEAD,
    overwrite=Steps("sharded_pair_stats_backward_", _on_columns(pair_overwrite), pair_overwrite),
)


# --- calls --------------------------------------------------------------------------------------------------


def agreed_pairs(function: str, logits: Tensor, other: Any, kind: Any, at: Columns, check: Callable[[], tuple]) -> tuple[Shard, tuple]:
    """(this rank's columns, the checked rows), as `agreed_rows`.

    check returns (targets, mask, row_temperature, other_row_temperature, `PairOptions`), or raises.
    """

    def payloads(ranks: int) -> list[Tensor]:
        if not isinstance(logits, Tensor) or logits.dim() == 0:
            return []
        widths = (PairPart.WIDTH, 2) if kind in ("jsd", "skew_forward_kl", "skew_reverse_kl") else (PairPart.WIDTH,)
        return [new_payload(logits, width, at.segments, ranks) for width in widths]

    def asked() -> dict[str, Any]:
        return {"kind": kind, "other's dtype": str(other.dtype).removeprefix("torch.")}

    shard, (*by_row, o) = agreed_rows(function, logits, at, check, payloads, options=asked)
    return shard, (*by_row, o._replace(vocab=shard.vocab))


def sharded_pair_rows(shard: Shard, logits: Tensor, other: Tensor, *rows: Any, in_place: bool) -> tuple:
    """What `pair_rows` returns, of all columns of the group; rows as of `agreed_pairs`."""
    *by_row, o = rows
    if shard.ranks == 1 and not shard.segments:
        return pair_rows(logits, other, *by_row, *o, in_place=in_place)
    return _sharded_pairs(logits, other, *by_row, *o, *shard, in_place=in_place)
