"""`token_stats` over lists of kept ids, of rows whose columns are cut over the ranks of a group.

All ranks have the same lists, of ids of the whole vocabulary. A rank's part of a row is over what its columns
hold of the row's list. What takes the whole list every rank finds by itself: which rows are over all ids, and
whether a set has its targets. A target that is added to its set is added by the rank that holds it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.contract import KeptKind, Outside, State
from ..layout import counted_rows
from ..operator import Operator, Steps, differentiable, values_readable
from ..parallel import Shard, digest_of
from .kept_sets import Kept, check_kept, check_outside, list_of_entry
from .kept_stats import INSTEAD, KeptResults, Sets, backward, forward, overwrite, public_kept_stats, sets_of, with_empty_list
from .parts import token_stats_merge
from .row_stats import Options, Results, TokenStats, real_columns
from .sharded_stats import all_parts, part_payloads

_N, _M = len(Options._fields), len(Sets._fields)
_WIDTH = 1 << 31  # more than any id of a vocabulary
_OF_FULL = 3  # numbers of a row's state without its set

# --- the lists of some columns ------------------------------------------------------------------------------


class _OwnLists(NamedTuple):
    entries: Tensor  # [M] ids of the columns here, in the order of the lists, with spare room at the end
    begin: Tensor  # [R + 1]: the last list is empty
    end: Tensor
    rows: Tensor  # [N]: negative where the row is over all ids
    target_kept: Tensor  # [N, K]


def _new_own_lists(targets, mask, entries, begin, end, rows, *_) -> _OwnLists:
    lists = len(targets) if begin is None else len(begin)
    edges = targets.new_empty(lists + 1), targets.new_empty(lists + 1)
    return _OwnLists(entries.new_empty(entries.numel()), *edges, targets.new_empty(len(targets)), torch.empty_like(targets, dtype=torch.bool))


def _as_lists(n: int, entries, begin, end, rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(entries [M], begin [R], end [R], rows [n]) of the fields of a `Kept`, for n rows."""
    size = entries.numel()
    if begin is None:
        begin = torch.arange(n, device=entries.device) * (size // max(n, 1))
        end = begin + size // max(n, 1)
    rows = torch.arange(n, device=entries.device) if rows is None else rows.long().reshape(-1)
    return entries.reshape(-1), begin.long().clamp(0, size), end.long().clamp(0, size), rows


def _counts_before(marked: Tensor) -> Tensor:
    """[M + 1] how many of the entries before each are marked."""
    return torch.cat([torch.zeros(1, dtype=torch.int64, device=marked.device), marked.cumsum(0)])


def _has_targets(ids: Tensor, of_entry: Tensor, lists: int, rows: Tensor, targets: Tensor) -> Tensor:
    """[N, K] whether a row's list has its targets: they are looked up among all entries, in order."""
    listed = (of_entry < lists) & (ids >= 0) & (ids < _WIDTH)
    keys = torch.where(listed, of_entry * _WIDTH + ids, -1)
    if values_readable(keys):
        keys = keys[listed]
    keys = torch.cat([keys.sort().values, keys.new_full((1,), torch.iinfo(torch.int64).max)])
    valid = ((rows >= 0) & (rows < lists)).unsqueeze(-1) & (targets >= 0) & (targets < _WIDTH)
    wanted = torch.where(valid, rows.unsqueeze(-1) * _WIDTH + targets, 0)
    return (keys[torch.searchsorted(keys, wanted)] == wanted) & valid


def _own_lists(targets, mask, entries, begin, end, rows, ignore_index, start, columns, vocab, outside, open_empty) -> _OwnLists:
    """What the columns [start, start + columns) hold of lists of the ids [0, vocab), of rows with targets
    [N, K]. An id beyond those is one here, too: its row becomes NaN."""
    entries, begin, end, rows = _as_lists(len(targets), entries, begin, end, rows)
    lists, size, ids = len(begin), len(entries), entries.long()
    ignored, counted = targets == ignore_index, counted_rows(targets, mask, ignore_index, 1)
    found = _has_targets(ids, list_of_entry(begin, end, size), lists, rows, targets)
    beyond = ids >= vocab

    edges = (*(torch.cat([x, x.new_zeros(1)]) for x in (begin, end)), torch.where((rows >= 0) & (rows < lists), rows, lists))

    def has(marked: Tensor) -> Tensor:
        """[N] whether any of the row's entries is marked."""
        before = _counts_before(marked)
        return (before[edges[1]] > before[edges[0]])[edges[2]]

    whole = ~has(ids >= 0) & (rows < lists) & open_empty
    found = found | whole.unsqueeze(-1) | ignored | ~counted.unsqueeze(-1)  # type: ignore[union-attr]  # there are targets
    if outside == Outside.EVERYTHING:
        whole = whole | (~found.all(-1) & (rows < lists) & ~has(beyond))
    here = torch.where(beyond, columns, ids - start)
    own = beyond | ((here >= 0) & (here < columns))
    before = _counts_before(own)
    compact = entries.new_full((size + 1,), -1).scatter_(0, torch.where(own, before[:-1], size), here.to(entries.dtype))
    begin, end, rows = with_empty_list(before[begin], before[end], rows)
    return _OwnLists(compact[:size], begin, end, rows.masked_fill(whole, -1), found)


_own = Operator(
    "kept_lists_of_columns(Tensor targets, Tensor? mask, Tensor entries, Tensor? begin, Tensor? end, Tensor? rows, int ignore_index, "
    "SymInt start, SymInt columns, SymInt vocab, int outside, bool open_empty) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    run=_own_lists,
    fake=_new_own_lists,
)


# --- the steps ----------------------------------------------------------------------------------------------


def _split(args: Any) -> tuple[Options, Sets, tuple[str, int], Any]:
    """(options, sets, the group's name and ranks, what follows)"""
    group = args[_N + _M : _N + _M + 2]
    return Options(*args[:_N]), Sets(*args[_N : _N + _M]), group, args[_N + _M + 2 :]


def _forward(call, logits, targets, mask, row_temperature, entries, begin, end, rows, *args) -> tuple:
    o, sets, group, _ = _split(args)
    y = targets.reshape(-1, 1 if targets.dim() < logits.dim() else targets.shape[-1])
    counted = None if mask is None else mask.reshape(-1)
    columns = o.ignore_index, o.vocab_start, real_columns(logits.shape[-1], o), o.vocab_size
    own = _OwnLists(*call(_own, y, counted, entries, begin, end, rows, *columns, sets.outside, sets.open_empty))
    of_rows = (targets, mask, row_temperature)
    part = KeptResults.from_flat(call(forward, logits, *of_rows, *own[:4], *o, *sets._replace(open_empty=False)))
    state: Any = part.results.state
    target_kept = own.target_kept.view(targets.shape)
    sent = state if part.full_state is None or not sets.with_full else torch.cat([state, part.full_state], -1)
    parts = all_parts(sent.unsqueeze(0), *group, *of_rows)
    whole = Results(*call(token_stats_merge, parts[..., : state.shape[-1]], *of_rows, *o))
    results = part._replace(results=whole, target_kept=target_kept)
    if sets.with_full:
        full = _merged_full(call, parts[..., state.shape[-1] :], targets, mask, row_temperature, o)
        results = results._replace(full_entropy=full.entropy, full_logsumexp=full.logsumexp, full_state=full.state[..., :_OF_FULL].contiguous())
    if sets.outside == Outside.MINUS_INF:
        results = results._replace(found=target_kept.clone())
    return (*results.flat(), *own[:4])


def _merged_full(call, parts: Tensor, targets: Tensor, mask: Tensor | None, row_temperature: Tensor | None, o: Options) -> Results:
    """Of whole rows without their sets, from their parts [P, ..., 3]."""
    parts = torch.cat([parts, parts.new_zeros(*parts.shape[:-1], State.TARGETS - _OF_FULL)], -1)
    counted = counted_rows(targets, mask, o.ignore_index, parts.dim() - 2)
    return Results(*call(token_stats_merge, parts, None, counted, row_temperature, *o._replace(with_sum_sq=False, with_entropy=True)))


def _without_ranks(operator: Operator):
    def steps(call, logits, targets, mask, row_temperature, entries, begin, end, rows, *args):
        o, sets, _, (state, full_state, found, *rest) = _split(args)
        own, grads = rest[:4], rest[4:]
        return call(operator, logits, targets, mask, row_temperature, *own, *o, *sets._replace(open_empty=False), state, full_state, found, *grads)

    return steps


_sharded_kept_stats = differentiable(
    Steps("sharded_kept_token_stats", _forward, forward, token_stats_merge, _own),
    Steps("sharded_kept_token_stats_backward", _without_ranks(backward), backward),
    outputs=7,
    constants=2,
    instead=INSTEAD,
    overwrite=Steps("sharded_kept_token_stats_backward_", _without_ranks(overwrite), overwrite),
)


def sharded_kept_stats(shard: Shard, logits: Tensor, *rows: Any, keep: Kept, outside: str, with_full: bool, in_place: bool) -> TokenStats:
    """`token_stats` over lists, of all columns of the group; rows as of `agreed_shard`."""
    lists, group = (keep.entries, keep.begin, keep.end, keep.rows), (shard.group_name, shard.ranks)
    *by_row, o = rows
    return public_kept_stats(*_sharded_kept_stats(logits, *by_row, *lists, *o, *sets_of(keep, outside, with_full), *group, in_place=in_place))


# --- what ranks must agree on -------------------------------------------------------------------------------


def check_kept_over_ranks(keep: Any, outside: str, logits: Tensor, targets: Tensor, options: Options) -> None:
    """TypeError or ValueError for what is no list for the rows, or takes the sets of whole rows."""
    check_kept(keep, logits, "logits", logits.shape[-1], lists_only=True)
    check_outside(outside, several=targets.dim() == logits.dim() and targets.shape[-1] > 1)
    if options.kept_kind != KeptKind.NONE:
        raise ValueError("keep over several ranks takes no min_p, min_prob or with_tail: expected None, None and False")


def kept_part_payloads(logits: Any, targets: Any, with_full: Any) -> list[Tensor]:
    """What is gathered, as far as these arguments say."""
    beside = _OF_FULL if with_full else 0
    return [x.new_empty(*x.shape[:-1], x.shape[-1] + beside) for x in part_payloads(logits, targets, False, None, 1)]


def what_keep_says(keep: Any) -> dict[str, Any]:
    """What is the same on all ranks if their lists are, by name. Reads values."""
    if not isinstance(keep, Kept):
        return {"keep": "None" if keep is None else "given"}
    said: dict[str, Any] = {"keep": keep.kind, "keep's empty": keep.empty}
    if keep.kind == "ids":
        for name, x in (("ids", keep.entries), ("begin", keep.begin), ("end", keep.end), ("rows", keep.rows)):
            said[f"keep's {name}"] = None if x is None else digest_of(x.detach().cpu().long().contiguous().numpy().tobytes())
    return said


def largest_kept_id(keep: Kept, logits: Tensor, targets: Tensor, mask: Tensor | None, ignore_index: int) -> int:
    """Of the rows that count; -1 without any. Reads values."""
    n = logits.shape[:-1].numel()
    if n == 0 or keep.entries.numel() == 0:
        return -1
    counted: Any = counted_rows(targets.reshape(n, -1), None if mask is None else mask.reshape(n), ignore_index, 1)
    entries, begin, end, number = _as_lists(n, keep.entries, keep.begin, keep.end, keep.rows)
    used = torch.zeros(len(begin) + 1, dtype=torch.bool, device=entries.device)
    used[number[counted & (number >= 0) & (number < len(begin))]] = True
    return int(torch.where(used[list_of_entry(begin, end, len(entries))], entries, -1).max())
