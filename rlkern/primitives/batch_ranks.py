"""A batch whose rows are on the ranks of a group, as in data parallelism: who takes part, and its totals."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import check_choice, check_count, computing_dtype, numbers
from ..parallel import Meeting, add_up
from .exact_sums import digit_count, exact_digits, rounded

_T = TypeVar("_T")
_NOT_FINITE = 1 << 32  # in the count of a sum: far above 2^31 tokens


class Batch(NamedTuple):
    """The ranks that hold the rows of a batch between them."""

    group_name: str  # "": no other rank
    ranks: int
    rank: int
    sizes: tuple[int, ...]  # entries by rank; where the ranks did not exchange them, as many as here


class Call(NamedTuple):
    """What a call says of the ranks, as its caller gave it."""

    function: str
    group: Any
    capacity: int | None = None
    row_offset: int | None = None
    select_over: str = "group"


def _check_call(call: Call) -> None:
    check_choice("select_over", call.select_over, ("rank", "group"))
    for name, value in (("capacity", call.capacity), ("row_offset", call.row_offset)):
        if value is not None:
            check_count(name, value, 1 if name == "capacity" else 0)
            if call.group is None:
                raise ValueError(f"{name} is for the ranks of a group, got {value} without a group")


def agreed_batch(
    call: Call,
    x: Any,
    check: Callable[[], _T],
    options: Callable[[_T], Sequence[Any]],
    payloads: Callable[[Meeting, Batch], None],
) -> tuple[Batch | None, _T]:
    """(the ranks, what check returned), once all ranks agree. Every rank raises if one does. None: no group.

    Args:
        x: the tensor whose entries the ranks hold, if it is one.
        check: the checks of the arguments.
        options: of what it returned, what must be the same on all ranks.
        payloads: tells a meeting what the call would send, for a rank that refuses its arguments.
    """
    if call.group is None:
        _check_call(call)
        return None, check()
    size = x.numel() if isinstance(x, Tensor) else 0
    with Meeting(call.function, call.group, x) as meeting:
        batch = Batch(meeting.group_name, meeting.ranks, dist.get_rank(call.group), (size,) * meeting.ranks)
        try:
            _check_call(call)
            checked = check()
            asked = options(checked)
        except Exception:
            with contextlib.suppress(Exception):  # as far as the arguments say
                payloads(meeting, batch)
            raise
        if meeting.exchanges:
            said = {"capacity": call.capacity, "select_over": call.select_over, "what to select": tuple(asked)}
            meeting.about(dtype=computing_dtype(x), options=said)
            meeting.covers(size, 0, None)
    return (batch._replace(sizes=tuple(said.columns for said in meeting.everyone)) if meeting.everyone else batch), checked


def added_up(x: Tensor, batch: Batch) -> Tensor:
    """The sum over the ranks."""
    return x if batch.ranks == 1 else add_up(x, batch.group_name)


# --- the first collective: totals ---------------------------------------------------------------------------


class Totals(NamedTuple):
    """Of a whole batch."""

    batch: Batch
    tokens: Tensor  # 0-d int64
    sums: Tensor  # [3] float64: tokens with a finite logp, and the sums of their logp and of their advantages
    seed: Tensor  # 0-d int64


def would_add_totals(meeting: Meeting, x: Tensor) -> None:
    """Tells a meeting of what `batch_totals` of x adds up."""
    meeting.would_add(lambda: [x.new_empty(3 + 2 * digit_count(computing_dtype(x)), dtype=torch.int64)])


def batch_totals(logp: Tensor, advantages: Tensor, mask: Tensor, batch: Batch, seed: Tensor | None = None) -> Totals:
    """One sum over the ranks of 21 int64 (137 for float64). The sums are exact, and rounded once, to float64.

    Args:
        logp: [B, T] float.
        advantages: [B, T] in the dtype of the computation. One that is not finite makes both sums NaN.
        mask: [B, T] bool.
        seed: 0-d int64, 0 on all ranks but one.
    """
    logp = numbers(logp, advantages.dtype).detach()
    counts = mask & logp.isfinite()
    fine = counts & advantages.isfinite()
    terms = [torch.where(where, x, 0).flatten() for where, x in ((counts, logp), (fine, advantages))]
    counted = counts.sum() + _NOT_FINITE * (counts & ~fine).sum()
    seed = counted.new_zeros(()) if seed is None else seed
    words = torch.cat([torch.stack([mask.sum(), counted, seed]), *map(exact_digits, terms)])
    words = added_up(words, batch)
    tokens, counted, seed = words[:3].unbind()
    sums = rounded(words[3:].view(2, -1), logp.dtype)
    fine = (counted >= 0) & (counted < _NOT_FINITE)  # negative where a rank refused its arguments
    sums = torch.cat([counted.to(torch.float64).view(1), torch.where(fine, sums, torch.nan)])
    return Totals(batch, tokens, sums, seed)


def drawn_seed(batch: Batch, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """0-d int64: a number from the generator on the first rank, and 0 on the others."""
    if batch.rank:
        return torch.zeros((), dtype=torch.int64, device=device)
    if generator is None:  # torch.compile supports only this
        return torch.randint((1 << 63) - 1, (), device=device)
    return torch.randint((1 << 63) - 1, (), device=device, generator=generator)
