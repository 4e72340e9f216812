"""`token_stats` over each row's set of kept ids: the statistics of rows that are -inf elsewhere.

Nothing outside a set counts, not even NaN, and its gradient is exactly 0. Listed ids are gathered: a row
costs as many reads as its list is long, and its gradient one write of zeros.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends.contract import Keep, KeptKind, Outside, SetKind, State
from ..backends.gradient_memory import new_gradient
from ..backends.reference_keep import padded_lists
from ..checks import check_target_range, computing_dtype
from ..layout import as_rows, counted_rows
from ..operator import DEBUG, Operator, differentiable, values_readable
from .kept_sets import OUTSIDE, Kept
from .parts import state_of_nothing
from .row_stats import OPTIONS, TENSORS, Options, Results, TokenStats, for_backend, mark_kept, new_results, real_columns, targets_here

_KINDS = {"ids": SetKind.LISTS, "bits": SetKind.BITS, "mask": SetKind.MASK, "at_least": SetKind.AT_LEAST}
_RULES = dict(zip(OUTSIDE, (Outside.INCLUDE, Outside.EVERYTHING, Outside.MINUS_INF), strict=True))


class Sets(NamedTuple):
    """What the operators take after `Options`."""

    kind: int  # a `SetKind`
    outside: int  # an `Outside`
    open_empty: bool  # of lists: a row whose list is empty is over all ids. One without a list always is
    with_full: bool


class KeptResults(NamedTuple):
    results: Results  # over the sets; its target_kept is of min_p or min_prob
    full_entropy: Tensor | None
    full_logsumexp: Tensor | None
    target_kept: Tensor
    full_state: Tensor | None
    found: Tensor | None  # target_kept for the backward, where a target may be outside

    def flat(self) -> tuple:
        *numbers, in_proxy, state = self.results
        return (*numbers, self.full_entropy, self.full_logsumexp, self.target_kept, in_proxy, state, self.full_state, self.found)

    @classmethod
    def from_flat(cls, flat: Any) -> KeptResults:
        """From what the operators return."""
        full_entropy, full_logsumexp, target_kept, in_proxy, state, full_state, found = flat[5:]
        results = Results._make((*flat[:5], in_proxy, state))
        return cls(results, full_entropy, full_logsumexp, target_kept, full_state, found)


def _new(logits: Tensor, targets: Tensor, options: Options, sets: Sets) -> KeptResults:
    results = new_results(logits, targets, options)
    lse: Any = results.logsumexp
    full = (torch.empty_like(lse), torch.empty_like(lse), lse.new_empty((*lse.shape, 3))) if sets.with_full else (None, None, None)
    target_kept = torch.empty_like(results.logp, dtype=torch.bool)  # type: ignore[arg-type]  # there are targets
    return KeptResults(results, full[0], full[1], target_kept, full[2], torch.empty_like(target_kept) if sets.outside == Outside.MINUS_INF else None)


def _split(args: Any) -> tuple[Options, Sets, Any]:
    """(options, sets, what follows) from an operator's arguments after the tensors."""
    n, m = len(Options._fields), len(Options._fields) + len(Sets._fields)
    return Options(*args[:n]), Sets(*args[n:m]), args[m:]


def _keep(logits: Tensor, entries: Tensor, begin, end, rows, sets: Sets) -> Keep:
    """The sets as the backends want them, copied if need be."""
    if sets.kind == SetKind.LISTS:
        begin, end, rows = (None if x is None else x.long().contiguous().view(-1) for x in (begin, end, rows))
        return Keep(sets.kind, entries.contiguous().view(-1), sets.outside, begin, end, rows, sets.open_empty)
    if sets.kind == SetKind.AT_LEAST:
        return Keep(sets.kind, entries.to(computing_dtype(logits)).contiguous().view(-1), sets.outside)
    entries = as_rows(entries)
    if sets.kind == SetKind.BITS and entries.dtype != torch.uint8:
        if entries.stride(-1) != 1:  # of one word a row
            entries = entries.as_strided(entries.shape, (*entries.stride()[:-1], 1))
        entries = entries.view(torch.uint8)  # little-endian: the same bytes
    return Keep(sets.kind, entries, sets.outside)


def _forward(logits, targets, mask, row_temperature, entries, begin, end, rows, *args) -> tuple:
    o, sets, _ = _split(args)
    out = _new(logits, targets, o, sets)
    results = out.results
    if results.logsumexp.numel() == 0:
        return out.flat()
    real = real_columns(logits.shape[-1], o)
    if real == 0:
        results.state.copy_(state_of_nothing(results.state))
        if out.full_state is not None:
            out.full_state.zero_()[..., State.MAX] = -math.inf
        return out.flat()
    backend = backends.select(logits.device)
    y, mask, temperature = for_backend(logits, targets, mask, row_temperature, o.temperature)
    y, ignore_index = targets_here(y, logits.shape[-1], o)
    keep = _keep(logits, entries, begin, end, rows, sets)
    if (DEBUG or not backend.CHECKS_TARGETS) and values_readable(logits):
        check_target_range(y, mask, ignore_index, real)  # type: ignore[arg-type]  # there are targets
        _check_lists(keep, y, mask, ignore_index, real)
    of_backend, of_sets = (*results[:5], results.state), (out.target_kept, out.full_entropy, out.full_logsumexp, out.full_state)
    of_row = (y, mask, temperature, ignore_index, o.kept_kind, o.log_kept)
    backend.token_stats_forward(as_rows(logits)[..., :real], *of_row, of_backend, o.softcap, keep, of_sets)
    if results.target_kept is not None:
        mark_kept(results)
    if out.found is not None:
        out.found.copy_(out.target_kept)
    return out.flat()


def _check_lists(keep: Keep, targets: Any, mask: Tensor | None, ignore_index: int, vocab: int) -> None:
    """IndexError for an id or a list out of range, in a row that counts; with RLKERN_DEBUG=1 also ValueError
    for an id listed twice. Reads values."""
    if keep.kind != SetKind.LISTS:
        return
    counted: Any = counted_rows(targets, mask, ignore_index, 1)
    if keep.rows is not None and keep.begin is not None:
        bad = (keep.rows >= len(keep.begin)) & counted
        if bad.any():
            r = bad.nonzero()[0, 0].item()
            raise IndexError(f"keep: row {r} names list {keep.rows[r].item()} of {len(keep.begin)}")
    ids, _ = padded_lists(keep, len(targets), slice(0, len(targets)))
    bad = (ids >= vocab) & counted.unsqueeze(-1)
    if bad.any():
        r, k = bad.nonzero()[0].tolist()
        raise IndexError(f"keep holds the id {ids[r, k].item()} for row {r}, out of range for {vocab} logits")
    if DEBUG:
        ids = ids.sort(-1).values[counted]
        twice = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)
        if twice.any():
            r, k = twice.nonzero()[0].tolist()
            raise ValueError(f"keep holds the id {ids[r, k].item()} twice for row {counted.nonzero()[r].item()}")


def _write_gradient(out, logits, targets, mask, row_temperature, entries, begin, end, rows, *args) -> None:
    """Into out, which may be the logits."""
    if logits.numel() == 0:
        return
    o, sets, (state, full_state, found, *grads) = _split(args)
    x = as_rows(logits)
    rows_of_out, real = x if out is logits else as_rows(out), real_columns(logits.shape[-1], o)
    if real < logits.shape[-1]:
        rows_of_out[..., real:].zero_()
        x, rows_of_out = x[..., :real], rows_of_out[..., :real]
    if real == 0:
        return
    y, mask, temperature = for_backend(logits, targets, mask, row_temperature, o.temperature)
    y, ignore_index = targets_here(y, logits.shape[-1], o)
    g_logp, *upstream = (None if g is None else g.to(state.dtype).contiguous() for g in grads)
    if g_logp is not None and found is not None:
        g_logp = g_logp.masked_fill(~found, 0)
    g_full_entropy, g_full_logsumexp = upstream[-2:]
    full = None if g_full_entropy is None and g_full_logsumexp is None else (full_state, g_full_entropy, g_full_logsumexp)
    keep = _keep(logits, entries, begin, end, rows, sets)
    of_row = (y, mask, temperature, ignore_index, o.kept_kind, state, (g_logp, *upstream[:4]))
    backends.select(logits.device).token_stats_backward(x, *of_row, rows_of_out, o.softcap, keep, full)


def _backward(logits, *args) -> Tensor:
    out = new_gradient(logits)
    _write_gradient(out, logits, *args)
    return out


_ARGUMENTS = f"{TENSORS}, Tensor entries, Tensor? begin, Tensor? end, Tensor? rows, {OPTIONS}, "
_ARGUMENTS += "int set_kind, int outside, bool open_empty, bool with_full"
_GRADIENTS = "Tensor state, Tensor? full_state, Tensor? found, Tensor? g_logp, Tensor? g_entropy, Tensor? g_logsumexp, Tensor? g_sum_sq_prob, "
_GRADIENTS += "Tensor? g_kept_logmass, Tensor? g_full_entropy, Tensor? g_full_logsumexp"
# Of whole rows, or of the columns that `Options` names: the forward's results are then those of a part.
forward = Operator(
    f"kept_token_stats(Tensor logits, {_ARGUMENTS}) -> ({', '.join(['Tensor'] * 12)})",
    run=_forward,
    fake=lambda logits, targets, mask, row_temperature, entries, begin, end, rows, *args: _new(logits, targets, *_split(args)[:2]).flat(),
)
backward = Operator(f"kept_token_stats_backward(Tensor logits, {_ARGUMENTS}, {_GRADIENTS}) -> Tensor", _backward, lambda x, *_: new_gradient(x))
overwrite = Operator(
    f"kept_token_stats_backward_(Tensor(a!) logits, {_ARGUMENTS}, {_GRADIENTS}) -> ()",
    run=lambda logits, *args: _write_gradient(logits, logits, *args),
    fake=lambda *args: None,
)
INSTEAD = "use rlkern.reference.token_stats of the logits at -inf outside the set, with targets [..., K]"
_kept_stats = differentiable(forward, backward, outputs=7, constants=2, instead=INSTEAD, overwrite=overwrite)


def sets_of(keep: Kept, outside: str, with_full: bool = False) -> Sets:
    """What the operators take of checked arguments, beside the tensors."""
    return Sets(_KINDS[keep.kind], _RULES[outside], keep.empty == "everything", with_full)


def with_empty_list(begin: Tensor, end: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(begin, end, rows) with one more list, an empty one, for rows without a list."""
    lists = len(begin)
    rows = torch.where(rows < 0, lists, torch.where(rows < lists, rows, lists + 1))  # also beyond the last, as before
    return torch.cat([begin, begin.new_zeros(1)]), torch.cat([end, end.new_zeros(1)]), rows


def kept_stats(
    logits: Tensor,
    targets: Any,  # a tensor
    mask: Tensor | None,
    row_temperature: Tensor | None,
    options: Options,
    keep: Kept,
    outside: str,
    with_full: bool,
    in_place: bool,
) -> TokenStats:
    """`token_stats` over the sets, from checked arguments. Raises ValueError for a tail."""
    if options.kept_kind == KeptKind.UNLISTED:
        raise ValueError("keep takes no with_tail: expected False, got True")
    begin, end, rows = keep.begin, keep.end, keep.rows
    if rows is not None and keep.empty == "nothing":
        begin, end, rows = with_empty_list(begin, end, rows)  # type: ignore[arg-type]  # rows come with lists
    sets = sets_of(keep, outside, with_full)
    return public_kept_stats(*_kept_stats(logits, targets, mask, row_temperature, keep.entries, begin, end, rows, *options, *sets, in_place=in_place))


def public_kept_stats(*results: Any) -> TokenStats:
    """What the operators return, by public name."""
    logp, entropy, logsumexp, sum_sq, kept_logmass, full_entropy, full_logsumexp, target_kept, in_proxy = results
    tail_logmass: Any = None
    numbers = (logp, entropy, logsumexp, sum_sq, kept_logmass)
    return TokenStats(*numbers, target_kept, tail_logmass, full_entropy, full_logsumexp, in_proxy)
