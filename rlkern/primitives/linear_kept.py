"""`linear_token_stats` over lists of kept ids: only the listed columns of the output matrix are multiplied.

Three operators. The first turns a `Kept` into pairs (row, id), sorted by row. The second is their logits, the
third what `token_stats` computes, of every row's pairs. Each has one number a pair; nothing has size [N, V].
Where ranks hold the rows of the matrix between them, each computes its own pairs' logits, and gets the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends.contract import State
from ..backends.gradient_memory import empty
from ..backends.reference_rows import soft_cap, soft_cap_slope
from ..checks import computing_dtype
from ..layout import as_rows, counted_rows
from ..operator import Operator, Steps, differentiable, values_readable
from ..parallel import add_up, gather
from .kept_sets import Kept, list_of_entry
from .row_stats import Options, Results, TokenStats

# --- pairs --------------------------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """Row r has the pairs [offsets[r], offsets[r + 1]): its list in order, then its target if it is added."""

    ids: Tensor  # [P] int32; V stands for one outside [0, V), whose row is NaN
    row: Tensor  # [P] int32, N beyond the last pair: P is M ids and N targets, on any device
    offsets: Tensor  # [N + 1] int64
    targets: Tensor  # [N, K] int32, -1 where ignored
    counted: Tensor  # [N] bool: not masked, and not among the dense rows
    listed: Tensor  # [N, K] bool: the target is in its row's set, as far as ids can tell where K > 1
    dense: Tensor  # [max_dense_rows] int64: unrestricted rows in order, N behind the last


def _new_pairs(entries, targets, begin, end, rows, mask, ignore_index, vocab, outside, open_empty, max_dense_rows) -> Pairs:
    n, k = targets.shape
    room, ints = entries.numel() + n, targets.new_empty
    return Pairs(
        ints(room, dtype=torch.int32),
        ints(room, dtype=torch.int32),
        ints(n + 1),
        ints((n, k), dtype=torch.int32),
        ints(n, dtype=torch.bool),
        ints((n, k), dtype=torch.bool),
        ints(max_dense_rows),
    )


def _row_of_entry(entries: Tensor, n: int, begin, end, rows, counted: Tensor) -> tuple[Tensor, Tensor | None]:
    """([M] the row that each entry is for, n for none; [n] whether another row has the same list)."""
    number = torch.arange(n, device=entries.device)
    size = entries.numel()
    if begin is None:
        return number.unsqueeze(-1).expand(n, size // max(n, 1)).reshape(-1), None
    lists = len(begin)
    owner, shared = number, None
    if rows is not None:
        of_row = torch.where(counted & (rows >= 0) & (rows < lists), rows, lists).long()
        in_order, order = of_row.sort(stable=True)
        again = (in_order == in_order.roll(1)) & (in_order < lists) & (number > 0)
        shared = torch.zeros_like(again).scatter_(0, order, again)
        owner = torch.full((lists + 1,), n, device=entries.device).scatter_(0, of_row.masked_fill(shared, lists), number)
    owner = torch.cat([owner[:lists], owner.new_full((1,), n)])
    return owner[list_of_entry(begin, end, size)], shared


def _pairs(entries, targets, begin, end, rows, mask, ignore_index, vocab, outside, open_empty, max_dense_rows) -> Pairs:
    n, several = len(targets), targets.shape[-1] > 1
    readable = values_readable(targets)

    def by_entry(of_row: Tensor) -> Tensor:
        """What entries look up by the number of their row, which may be n."""
        return torch.cat([of_row, of_row.new_zeros(1)])[row]

    def marked(entry_is: Tensor) -> Tensor:
        """[n]: whether any entry of the row is."""
        return torch.zeros(n + 1, dtype=torch.bool, device=row.device).index_fill_(0, torch.where(entry_is, row, n), True)[:n]

    ignored = targets == ignore_index
    y = torch.where((targets < 0) | (targets >= vocab), vocab, targets).masked_fill(ignored, -1)
    counted: Any = counted_rows(targets, mask, ignore_index, 1)
    row, shared = _row_of_entry(entries, n, begin, end, rows, counted)
    row, room = torch.where(entries < 0, n, row), entries.numel() + n
    if readable and begin is None:  # most of padded lists is padding
        entries, row = entries[row < n], row[row < n]
    row = torch.where(by_entry(counted), row, n)
    ids = entries.clamp(max=vocab)
    if readable:
        _check_pairs(entries, row, targets, y, shared, counted, vocab)

    filled = marked(row < n)
    listed = torch.ones_like(ignored) if several else marked(ids == by_entry(y[:, 0])).unsqueeze(-1)
    everything = ~filled & counted if open_empty else torch.zeros_like(counted)
    listed = listed | everything.unsqueeze(-1) | ~counted.unsqueeze(-1)
    unrestricted = everything | ~listed.all(-1) if outside == "everything" else everything
    if shared is not None:
        unrestricted = unrestricted & ~shared
    rank = unrestricted.cumsum(0)
    if readable and n > 0 and int(rank[-1]) > max_dense_rows:
        raise ValueError(
            f"max_dense_rows={max_dense_rows}, but {int(rank[-1])} rows are over the whole vocabulary: by keep, whose list is empty there, "
            f"or by outside={outside!r}"
        )
    number = torch.arange(n, device=targets.device)
    side = unrestricted & (rank <= max_dense_rows)
    dense = torch.full((max_dense_rows + 1,), n, device=targets.device).scatter_(0, torch.where(side, rank - 1, max_dense_rows), number)
    counted = counted & ~side
    undefined = unrestricted | (y == vocab).any(-1)
    undefined = (undefined if shared is None else undefined | shared) & counted

    # A row that is undefined has one pair, of an id outside the vocabulary.
    row = torch.where(by_entry(counted & ~undefined), row, n)
    adds = undefined | (counted & ~listed[:, 0]) if outside == "include" else undefined
    row = torch.cat([row, torch.where(adds, number, n)])
    ids = torch.cat([ids, torch.where(undefined, vocab, y[:, 0])])
    row, order = row.int().sort(stable=True)
    ids = torch.where(row < n, ids[order], vocab)
    offsets = torch.searchsorted(row, torch.arange(n + 1, dtype=torch.int32, device=row.device))
    ids, row = (torch.cat([x.int(), x.new_full((room - len(x),), end, dtype=torch.int32)]) for x, end in ((ids, vocab), (row, n)))
    return Pairs(ids, row, offsets, y.int(), counted, listed, dense[:max_dense_rows])


def _check_pairs(entries, row, targets, y, shared, counted, vocab) -> None:
    """IndexError for ids and targets of rows that count, ValueError for shared lists. Reads values."""
    n = len(targets)
    bad = (entries >= vocab) & (row < n)
    if bad.any():
        raise IndexError(f"keep holds the id {entries[bad][0].item()} for row {row[bad][0].item()}, out of range for {vocab} logits")
    bad = (y == vocab) & counted.unsqueeze(-1)
    if bad.any():
        r = bad.nonzero()[0, 0].item()
        raise IndexError(f"target {targets[bad][0].item()} of row {r} is out of range for {vocab} logits (and is not ignore_index)")
    if shared is not None and (shared & counted).any():
        raise ValueError(f"keep: a list serves one row, and row {shared.nonzero()[0].item()} has that of a row before it")


_kept_pairs = Operator(
    "kept_pairs(Tensor entries, Tensor targets, Tensor? begin, Tensor? end, Tensor? rows, Tensor? mask, int ignore_index, "
    "SymInt vocab, str outside, bool open_empty, int max_dense_rows) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    run=_pairs,
    fake=_new_pairs,
)


# --- their logits -------------------------------------------------------------------------------------------


def _new_logits(hidden, weight, bias, ids, row, offsets):
    return hidden.new_empty(ids.shape, dtype=computing_dtype(hidden))


def _logits(hidden, weight, bias, ids, row, offsets):
    out = torch.zeros_like(ids, dtype=computing_dtype(hidden))
    if out.numel() > 0 and len(offsets) > 1:  # lists may have room for ids where there is no row
        bias = None if bias is None else bias.contiguous()
        backends.select(hidden.device).kept_logits(as_rows(hidden), as_rows(weight), bias, ids, row, out)
    return out


def _new_gradients(hidden, weight, bias, ids, row, offsets, grad, wanted):
    return tuple(empty(x) if want and x is not None else None for x, want in zip((hidden, weight, bias), wanted, strict=True))


def _logits_backward(hidden, weight, bias, ids, row, offsets, grad, wanted):
    out = _new_gradients(hidden, weight, bias, ids, row, offsets, grad, wanted)
    d_hidden, d_weight, d_bias = out
    backend, grad = backends.select(hidden.device), grad.contiguous()
    if d_hidden is not None and d_hidden.numel() > 0:
        backend.kept_hidden_gradient(as_rows(weight), ids, offsets, grad, d_hidden.view(-1, d_hidden.shape[-1]))
    if d_weight is None and d_bias is None:
        return out
    size = int(offsets[-1]) if values_readable(offsets) else len(ids) if len(offsets) > 1 else 0
    ids, order = ids[:size].sort(stable=True)  # row by row for each id: one order of its sum
    row, grad = row[order], grad[order]
    if d_weight is not None:
        backend.kept_weight_gradient(as_rows(hidden), ids, row, grad, d_weight.zero_())
    if d_bias is not None:  # a column of the matrix that meets ones
        ones = hidden.new_ones(1, 1, 1).expand(*as_rows(hidden).shape[:2], 1)
        backend.kept_weight_gradient(ones, ids, row, grad, d_bias.zero_().unsqueeze(-1))
    return out


_INSTEAD = "use rlkern.reference.token_stats of torch.nn.functional.linear(hidden, weight, bias), -inf where an id is not kept"
_PAIRS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor ids, Tensor row, Tensor offsets"
_logits_of = Operator(f"kept_logits({_PAIRS}) -> Tensor", _logits, _new_logits)
_logits_backward_of = Operator(
    f"kept_logits_backward({_PAIRS}, Tensor grad, bool[] wanted) -> (Tensor, Tensor, Tensor)", _logits_backward, _new_gradients
)
_kept_logits = differentiable(_logits_of, _logits_backward_of, wrt=3, instead=_INSTEAD)


# --- over ranks ---------------------------------------------------------------------------------------------


class Cut(NamedTuple):
    """How the rows of the matrix are cut over the ranks of a group."""

    group_name: str
    ranks: int
    start: int  # the id of this rank's first row
    vocab: int
    sums_hidden: bool  # over the ranks, in the backward


def _own_pairs(ids: Tensor, row: Tensor, n: int, columns: int, cut: Cut) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ids, row, offsets) of the pairs whose id is among this rank's, in front; where each stands among all.
    A pair of an id outside the vocabulary is everyone's: NaN."""
    own = (ids >= cut.vocab) | ((ids >= cut.start) & (ids < cut.start + columns))
    row, order = torch.where(own, row, n).sort(stable=True)
    ids = torch.where((ids < cut.vocab) & own, ids - cut.start, columns)[order]
    return ids, row, torch.searchsorted(row, torch.arange(n + 1, dtype=row.dtype, device=row.device)), order


def _gathered_logits(call, hidden, weight, bias, ids, row, offsets, *cut) -> tuple:
    c = Cut(*cut)
    *own, order = _own_pairs(ids, row, len(offsets) - 1, len(weight), c)
    logits = call(_logits_of, hidden, weight, bias, *own)
    logits = gather(torch.zeros_like(logits).scatter(0, order, logits), c.group_name, c.ranks)
    return (logits.sum(0), *own, order)  # each is one rank's, and 0 on the others


def _own_gradients(call, hidden, weight, bias, ids, row, offsets, *args) -> tuple:
    c, (*own, order, grad, wanted) = Cut(*args[: len(Cut._fields)]), args[len(Cut._fields) :]
    d_hidden, *others = call(_logits_backward_of, hidden, weight, bias, *own, grad[order], wanted)
    if c.sums_hidden and wanted[0]:
        d_hidden = add_up(d_hidden, c.group_name)
    return (d_hidden, *others)


_kept_logits_of_all = differentiable(
    Steps("sharded_kept_logits", _gathered_logits, _logits_of),
    Steps("sharded_kept_logits_backward", _own_gradients, _logits_backward_of),
    wrt=3,
    instead=_INSTEAD,
)


def kept_payloads(hidden: Any, keep: Any, targets: Any, max_dense_rows: Any) -> list[Tensor]:
    """What is gathered, as far as these arguments say: the logits of all pairs, and parts of dense rows."""
    if not (isinstance(hidden, Tensor) and isinstance(keep, Kept) and isinstance(targets, Tensor)) or hidden.dim() == 0:
        return []
    acc, n = computing_dtype(hidden), hidden.shape[:-1].numel()
    payloads = [hidden.new_empty(keep.entries.numel() + n, dtype=acc)]
    if isinstance(max_dense_rows, int) and max_dense_rows > 0 and n > 0:
        n_targets = 1 if targets.dim() < hidden.dim() else targets.shape[-1]
        payloads.append(hidden.new_empty(1, max_dense_rows, State.TARGETS + n_targets, dtype=acc))
    return payloads


# --- statistics of each row's pairs -------------------------------------------------------------------------


def _new_stats(logits, ids, row, offsets, targets, counted, temperatures, temperature, with_sum_sq, with_entropy):
    n = len(targets)
    return (
        logits.new_empty(targets.shape),
        logits.new_empty(n) if with_entropy else None,
        logits.new_empty(n),
        logits.new_empty(n) if with_sum_sq else None,
        logits.new_empty(targets.shape, dtype=torch.bool),
        logits.new_empty((n, State.KEPT)),
        logits.new_empty(targets.shape, dtype=torch.int32),
    )


def _stats(logits, ids, row, offsets, targets, counted, temperatures, temperature, with_sum_sq, with_entropy):
    out = _new_stats(logits, ids, row, offsets, targets, counted, temperatures, temperature, with_sum_sq, with_entropy)
    logp, entropy, logsumexp, sum_sq, found, state, place = out
    if logsumexp.numel() > 0:
        t = temperature if temperatures is None else temperatures
        of_backend = (logp, entropy, logsumexp, sum_sq, state, place)
        backends.select(logits.device).kept_rows_forward(logits, ids, row, offsets, targets, counted, t, of_backend)
    torch.ge(place, 0, out=found)
    return out


def _stats_backward(
    logits, ids, row, offsets, targets, counted, temperatures, temperature, with_sum_sq, with_entropy, state, place, *grads
):  # fmt: skip
    out = torch.zeros_like(logits)
    if state.numel() > 0 and out.numel() > 0:
        t = temperature if temperatures is None else temperatures
        upstream = [None if g is None else g.to(state.dtype).contiguous() for g in grads]
        backends.select(logits.device).kept_rows_backward(logits, row, offsets, place, t, state, upstream, out)
    return out


_ROWS = "Tensor logits, Tensor ids, Tensor row, Tensor offsets, Tensor targets, Tensor counted, Tensor? temperatures, float temperature, "
_ROWS += "bool with_sum_sq, bool with_entropy"
_GRADIENTS = "Tensor state, Tensor place, Tensor? g_logp, Tensor? g_entropy, Tensor? g_logsumexp, Tensor? g_sum_sq_prob"
_kept_rows = differentiable(
    Operator(f"kept_rows({_ROWS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", _stats, _new_stats),
    Operator(f"kept_rows_backward({_ROWS}, {_GRADIENTS}) -> Tensor", _stats_backward, lambda logits, *_: torch.empty_like(logits)),
    outputs=4,
    constants=1,
    instead=_INSTEAD,
)


# --- rows over the whole vocabulary -------------------------------------------------------------------------


def _new_picked(x, at):
    return x.new_empty((len(at), *x.shape[1:]))


def _new_unpicked(x, at, grad):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_picked_rows = differentiable(  # PyTorch's own adds the gradients in any order
    Operator("picked_rows(Tensor x, Tensor at) -> Tensor", lambda x, at: x[at.clamp(max=len(x) - 1)], _new_picked),
    Operator(
        "picked_rows_backward(Tensor x, Tensor at, Tensor grad) -> Tensor", lambda x, at, grad: _placed(torch.zeros_like(x), grad, at), _new_unpicked
    ),
    instead=_INSTEAD,
)


def _placed(x: Any, value: Tensor | None, at: Tensor) -> Any:
    """x [N, ...] with value [D, ...] at the rows `at`; those that are N are left out. None if either is."""
    if x is None or value is None:
        return x
    spare = torch.cat([x, x.new_zeros((1, *x.shape[1:]))])
    return spare.index_copy(0, at, value.view(len(at), *x.shape[1:]))[:-1]


_capped = differentiable(  # autograd's derivative of a tanh is 0 where that rounds to 1
    Operator("kept_soft_cap(Tensor logits, float softcap) -> Tensor", soft_cap, lambda x, softcap: torch.empty_like(x)),
    Operator(
        "kept_soft_cap_backward(Tensor logits, float softcap, Tensor grad) -> Tensor",
        run=lambda x, softcap, grad: grad * soft_cap_slope(x, softcap),
        fake=lambda x, softcap, grad: torch.empty_like(x),
    ),
    instead=_INSTEAD,
)


# --- together -----------------------------------------------------------------------------------------------


def linear_kept_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Any,  # a tensor
    mask: Tensor | None,
    row_temperature: Tensor | None,
    options: Options,
    keep: Kept,
    outside: str,
    max_dense_rows: int,
    round_logits: bool,
    dense: Callable[..., Results],
    gathered: Callable[[], Any] | None,
    cut: Cut | None = None,
) -> TokenStats:
    """`token_stats` of each row's kept logits, from checked arguments.

    dense: (hidden [D, H], targets, mask, row_temperature) -> what the operator of `linear_token_stats`
        returns, for the rows over the whole vocabulary.
    gathered: as in `linear_token_stats`.
    cut: None: the matrix is whole.
    """
    lead, n = hidden.shape[:-1], hidden.shape[:-1].numel()
    y = targets.reshape(n, targets.shape[-1] if targets.dim() == hidden.dim() else 1)
    rows, counted, t = (None if x is None else x.reshape(n) for x in (keep.rows, mask, row_temperature))
    lists = (keep.entries.reshape(-1), y, keep.begin, keep.end, rows, counted)
    vocab = options.vocab_size or weight.shape[0]
    pairs = Pairs(*_kept_pairs(*lists, options.ignore_index, vocab, outside, keep.empty == "everything", max_dense_rows))
    of_pairs = (hidden, weight, bias, pairs.ids, pairs.row, pairs.offsets)
    if cut is not None:
        logits = _kept_logits_of_all(*of_pairs, *cut, around=gathered)
    else:
        if vocab < len(weight):  # no row of the padding stands for ids outside the vocabulary
            of_pairs = (*of_pairs[:3], torch.where(pairs.ids < vocab, pairs.ids, len(weight)), *of_pairs[4:])
        logits = _kept_logits(*of_pairs, around=gathered)
    if round_logits:
        logits = logits.to(hidden.dtype).to(logits.dtype)
    if options.softcap > 0:
        logits = _capped(logits, options.softcap)
    t = None if t is None else t.to(logits.dtype).contiguous()
    of_rows = (
        logits,
        pairs.ids,
        pairs.row,
        pairs.offsets,
        pairs.targets,
        pairs.counted,
        t,
        options.temperature,
        options.with_sum_sq,
        options.with_entropy,
    )
    logp, entropy, logsumexp, sum_sq, found = _kept_rows(*of_rows)
    if max_dense_rows > 0 and n > 0:
        at = pairs.dense.clamp(max=n - 1)
        of_dense = (y[at], pairs.dense < n, None if t is None else t[at])
        results = dense(_picked_rows(hidden.reshape(n, -1), pairs.dense), *of_dense)
        fields = zip((logp, entropy, logsumexp, sum_sq), results[:4], strict=True)
        logp, entropy, logsumexp, sum_sq = (_placed(x, value, pairs.dense) for x, value in fields)
    shape = targets.shape
    listed = pairs.listed if y.shape[-1] == 1 else found | (pairs.targets < 0) | ~pairs.counted.unsqueeze(-1)
    by_row: Any = (None if x is None else x.view(lead) for x in (entropy, logsumexp, sum_sq))
    entropy, logsumexp, sum_sq = by_row
    return TokenStats(logp.view(shape), entropy, logsumexp, sum_sq, target_kept=listed.view(shape))
