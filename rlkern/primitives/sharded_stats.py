"""`token_stats` of rows whose columns are cut over the ranks of a group, or into segments.

Each rank sends what its columns add up to: one gather of a few numbers a row, and with min_p, min_prob or a
tail a second one of two. The gradient needs none: the state of whole rows is on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends.contract import KeptKind, State
from ..checks import check_target_range, computing_dtype
from ..dtensors import is_dtensor
from ..operator import DEBUG, Steps, differentiable, traced
from ..parallel import Meeting, Shard, check_sizes, gather, refuse, refusing_targets, shard_of, world
from .parts import token_stats_kept_masses, token_stats_merge, token_stats_parts, with_kept
from .row_stats import INSTEAD, Options, Results, backward, overwrite, row_stats

_N = len(Options._fields)


class _Ranks(NamedTuple):
    """What the steps take after `Options`."""

    group_name: str
    ranks: int
    segments: int


def _split(args: Any) -> tuple[Options, _Ranks, Any]:
    m = _N + len(_Ranks._fields)
    return Options(*args[:_N]), _Ranks(*args[_N:m]), args[m:]


def all_parts(parts: Tensor, group_name: str, ranks: int, *of_rows: Tensor | None) -> Tensor:
    """[P, ..., W] of this rank -> [ranks * P, ..., W].

    of_rows: targets, mask and temperatures, which RLKERN_DEBUG=1 compares. Where they are not the same on all
    ranks that is an error, on a GPU NaN in that row.
    """
    if ranks == 1:
        return parts
    if DEBUG and of_rows and not traced(parts):
        return _compared(parts, group_name, ranks, _digest(parts, *of_rows))
    return gather(parts, group_name, ranks).flatten(0, 1)


def _digest(parts: Tensor, *of_rows: Tensor | None) -> Tensor:
    """[...] a number below 2^24 for each row, of all that must be the same on every rank."""
    rows = parts.shape[1:-1]
    digest = torch.zeros(rows, dtype=torch.int64, device=parts.device)
    for x in of_rows:
        if x is not None:
            whole = x.double().view(torch.int64) if x.is_floating_point() else x
            for column in whole.reshape(*rows, whole.shape[-1] if whole.dim() > len(rows) else 1).unbind(-1):
                digest = (digest * 1000003 + column + 1) * 0x5851F42D4C957F2D
                digest = digest ^ (digest >> 33)
    return (digest & 0xFFFFFF).to(parts.dtype)


def _compared(parts: Tensor, group_name: str, ranks: int, digest: Tensor) -> Tensor:
    with_digest = torch.cat([parts, digest.expand(parts.shape[:-1]).unsqueeze(-1)], -1)
    gathered = gather(with_digest, group_name, ranks).flatten(0, 1)
    parts, digests = gathered[..., :-1], gathered[..., -1]
    differ = (digests != digests[0]).any(0)
    if parts.device.type == "cpu" and differ.any():
        row = differ.view(-1).nonzero()[0, 0].item()
        raise ValueError(f"the ranks of the group must agree on targets, mask and temperature, but they differ in row {row}")
    return parts.masked_fill(differ.unsqueeze(-1), float("nan"))


def _forward(call, logits, targets, mask, row_temperature, *args) -> tuple:
    o, ranks, _ = _split(args)
    of_rows = (targets, mask, row_temperature, *o)
    of_group = (ranks.group_name, ranks.ranks)
    parts = all_parts(call(token_stats_parts, logits, *of_rows, ranks.segments), *of_group, targets, mask, row_temperature)
    results = Results(*call(token_stats_merge, parts, *of_rows))
    if o.kept_kind != KeptKind.NONE:
        masses = all_parts(call(token_stats_kept_masses, logits, *of_rows, ranks.segments, results.state), *of_group)
        results = with_kept(results, masses, targets, mask, o)
    return tuple(results)


def _without_ranks(operator):
    def steps(call, *args):
        n = operator.tensors
        o, _, rest = _split(args[n:])
        return call(operator, *args[:n], *o, *rest)

    return steps


_sharded_stats = differentiable(
    Steps("sharded_token_stats", _forward, token_stats_parts, token_stats_merge, token_stats_kept_masses),
    Steps("sharded_token_stats_backward", _without_ranks(backward), backward),
    outputs=5,
    constants=1,
    instead=INSTEAD,
    overwrite=Steps("sharded_token_stats_backward_", _without_ranks(overwrite), overwrite),
)


_KEPT = {KeptKind.NONE: "none", KeptKind.MIN_P: "min_p", KeptKind.MIN_PROB: "min_prob", KeptKind.UNLISTED: "with_tail"}


class Columns(NamedTuple):
    """Which columns of the rows a call holds, as its caller says."""

    group: Any = None
    vocab_start: int | None = None
    vocab_size: int | None = None
    segments: int | None = None


def _target_span(targets: Tensor | None, mask: Tensor | None, ignore_index: int) -> tuple[int, int]:
    """The least and the greatest of the targets that count, (0, 0) without any. Reads values."""
    if targets is None or targets.numel() == 0:
        return 0, 0
    counts = targets != ignore_index
    if mask is not None:
        counts = counts & mask.view(mask.shape + (1,) * (targets.dim() - mask.dim()))
    least, most = torch.where(counts, targets, 0).aminmax()
    return int(least), int(most)


def new_payload(logits: Any, width: int, segments: Any, ranks: int) -> Tensor:
    """What a rank sends of the rows of logits: [P, ..., width]."""
    parts = segments // ranks if isinstance(segments, int) and segments else 1
    return logits.new_empty(parts, *logits.shape[:-1], width, dtype=computing_dtype(logits))


def part_payloads(logits: Any, targets: Any, second: bool, segments: Any, ranks: int) -> list[Tensor]:
    """What a call on these would send, as far as they say."""
    if not isinstance(logits, Tensor) or logits.dim() == 0 or not (targets is None or isinstance(targets, Tensor)):
        return []
    n_targets = 0 if targets is None else 1 if targets.dim() < logits.dim() else targets.shape[-1]
    widths = (State.TARGETS + n_targets, 2) if second else (State.TARGETS + n_targets,)
    return [new_payload(logits, width, segments, ranks) for width in widths]


def agreed_rows(
    function: str,
    logits: Tensor,
    at: Columns,
    check: Callable[[], tuple],
    payloads: Callable[[int], list[Tensor]],
    *,
    columns: Callable[[], int] | None = None,
    options: Callable[[], Mapping[str, Any]] | None = None,
    largest_id: Callable[[Tensor, Tensor | None, int], int] | None = None,
) -> tuple[Shard, tuple]:
    """(this rank's columns, the checked rows), once all ranks agree. Every rank raises if one does.

    Args:
        logits: [..., columns], or hidden states whose rows these are.
        check: returns (targets, mask, ..., what is asked of every row), or raises.
        payloads: returns what a call among so many ranks sends.
        columns: how many this rank holds; None: those of logits. Called after the check.
        options: returns what else must be the same on all ranks, by name. Called after the check.
        largest_id: of the ids that keep= lists for rows that count, from (targets, mask, ignore_index).
            Called after the check, where the host may read. IndexError for one outside the vocabulary.
    """
    if torch.compiler.is_compiling():  # nobody meets: the host reads nothing
        rows = check()
        held = logits.shape[-1] if columns is None else columns()
        check_sizes(held, world(at.group), at.vocab_start, at.vocab_size, at.segments)
        return shard_of(function, at.group, held, at.vocab_start, at.vocab_size, at.segments), rows
    with Meeting(function, at.group, logits) as meeting:
        meeting.would_send(lambda: payloads(meeting.ranks))
        rows = check()
        y, mask, *_, o = rows
        held = logits.shape[-1] if columns is None else columns()
        check_sizes(held, meeting.ranks, at.vocab_start, at.vocab_size, at.segments)
        if meeting.exchanges:
            n_targets = -1 if y is None else 0 if y.dim() < logits.dim() else y.shape[-1]
            asked = {"the rows' shape": tuple(logits.shape[:-1]), **o._asdict(), "segments": at.segments}
            for name, x in zip(("mask", "a temperature by row", "other_temperature by row"), rows[1:-1], strict=False):
                asked[name] = "None" if x is None else "given"
            if isinstance(o, Options):  # by the names of the arguments
                asked["min_p, min_prob or with_tail"] = _KEPT[asked.pop("kept_kind")]
            asked |= {} if options is None else options()
            meeting.about(rows=logits.shape[:-1].numel(), targets=n_targets, dtype=logits.dtype, options=asked)
            lowest, highest = _target_span(y, mask, o.ignore_index)
            largest = highest if largest_id is None else largest_id(y, mask, o.ignore_index)
            meeting.covers(held, at.vocab_start, at.vocab_size, lowest, max(highest, largest))
    shard = shard_of(function, at.group, held, at.vocab_start, at.vocab_size, at.segments, meeting.everyone)
    out_of_range = refusing_targets(meeting, shard.vocab)
    if out_of_range:
        if dist.get_rank(at.group) in out_of_range:
            y = y.reshape(logits.shape[:-1].numel(), -1)
            check_target_range(y, None if mask is None else mask.reshape(-1), o.ignore_index, shard.vocab)
            raise IndexError(f"keep holds the id {largest}, out of range for {shard.vocab} logits")
        refuse(meeting, out_of_range)
    return shard, rows


def agreed_shard(
    function: str,
    logits: Tensor,
    targets: Tensor | None,
    at: Columns,
    check: Callable[[], tuple],
    *,
    columns: Callable[[], int] | None = None,
    second: bool = False,
    options: Callable[[], Mapping[str, Any]] | None = None,
    largest_id: Callable[[Tensor, Tensor | None, int], int] | None = None,
    payloads: Callable[[], list[Tensor]] | None = None,
) -> tuple[Shard, tuple]:
    """`agreed_rows` of `token_stats`. check returns (targets, mask, row_temperature, `Options`), or raises.

    Args:
        second: whether there is a second gather.
        payloads: returns what the call sends; None: the parts of rows.
        others: as in `agreed_rows`.
    """

    def sends(ranks: int) -> list[Tensor]:
        return part_payloads(logits, targets, second, at.segments, ranks) if payloads is None else payloads()

    given = {"columns": columns, "options": options, "largest_id": largest_id}
    shard, (*by_row, o) = agreed_rows(function, logits, at, check, sends, **given)  # type: ignore[arg-type]
    return shard, (*by_row, o._replace(vocab_start=shard.start, vocab_size=shard.vocab))


def sharded_row_stats(shard: Shard, logits: Tensor, *rows: Any, in_place: bool = False) -> tuple:
    """What `row_stats` returns, of all columns of the group; rows as of `agreed_shard`."""
    *by_row, o = rows
    if shard.ranks == 1 and not shard.segments:
        return row_stats(logits, *by_row, *o, in_place=in_place)
    return _sharded_stats(logits, *by_row, *o, *_Ranks(shard.group_name, shard.ranks, shard.segments), in_place=in_place)


def refuse_rows(error: Exception, logits: Any, at: Columns) -> NoReturn:
    """Raises the error of a function around `token_stats` of one target a row, as a rank of that call."""
    if at.group is not None and not is_dtensor(logits):

        def check() -> tuple:
            raise error

        rows = logits[..., 0] if isinstance(logits, Tensor) and logits.dim() > 0 and logits.shape[-1] > 0 else None
        agreed_shard("token_stats", logits, rows, at, check)
    raise error
