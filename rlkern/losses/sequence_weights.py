"""What a loss over a whole optimizer batch divides by, and the weights of its sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..advantages import Groups
from ..checks import FINITE, as_bool, check_choice, check_count, check_number, check_positive, expect, shown
from ..operator import values_readable
from ..parallel import Meeting, add_up, check_member
from ..primitives.packing import Packed
from ..primitives.sequence_sums import wide
from .aggregate import BY_LENGTH, COUNTED, LENGTH_MODES, MODES, length_divisor

PROMPT_MODES = ("prompt-mean", "prompt-seq-mean")


class _Rows(NamedTuple):
    """The sequences of this rank's optimizer batch."""

    lengths: Tensor  # [B] int64
    number: Tensor  # 0-d int64: how many there are. A pack may hold fewer than it has places for


def _parts(lengths: Any) -> tuple[list[Any], Any]:
    """(the micro-batches', the first tensor among them)"""
    parts = list(lengths) if isinstance(lengths, (list, tuple)) and not isinstance(lengths, Packed) else [lengths]
    first = parts[0] if parts else None
    return parts, first.lengths if isinstance(first, Packed) else first


def _check_lengths(parts: Sequence[Any]) -> None:
    if not parts:
        raise ValueError("lengths must hold at least one tensor [B] or [B, T], got none")
    for part in parts:
        if isinstance(part, Packed):
            continue
        if not isinstance(part, Tensor):
            raise TypeError(f"lengths must be integers [B], a mask [B, T], a Packed, or a list of these, got {shown(part)}")
        if part.dim() == 1:
            expect("lengths", part, "integer", "[B]")
        else:
            expect("lengths (a mask)", part, "real", "[B, T]")
        if part.dim() == 1 and values_readable(part) and (part < 0).any():
            raise ValueError(f"lengths must not be negative, got {part.min().item()}")


def _rows(parts: Sequence[Any]) -> _Rows:
    """Of checked micro-batches."""
    lengths, count, known = [], 0, True  # type: ignore[var-annotated]
    for part in parts:
        own = part.lengths if isinstance(part, Packed) else part.long() if part.dim() == 1 else as_bool(part).sum(-1)
        lengths.append(own)
        n = part.num_seqs if isinstance(part, Packed) else own.shape[0]
        count, known = count + n, known and not isinstance(n, Tensor)  # type: ignore[assignment]
    all_lengths = torch.cat(lengths)
    return _Rows(all_lengths, all_lengths.new_full((), count) if known else count)  # type: ignore[arg-type]


@torch.no_grad()
def sequence_weights(
    mode: str,
    lengths: Tensor | Packed | Sequence[Tensor | Packed],
    *,
    groups: int | Tensor | None = None,
    num_groups: int | None = None,
    length: float | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    averaged_over: float = 1,
) -> Tensor:
    """One number a sequence, w_i, with which every mean over a whole optimizer batch is a sum of losses.

    The loss of the batch is sum_i w_i sum_t loss_it. Whatever its micro-batches and ranks are, their losses
    with `aggregation=w[rows]` add up to it, and so do the gradients. There is nothing else to divide by:

        w = rlkern.sequence_weights("prompt-mean", lengths, groups=ids, num_groups=P, group=data_group,
                                    averaged_over=ranks)  # once a step
        for rows, pack in micro_batches:
            rlkern.grpo_loss(logp, old_logp, advantages, pack, aggregation=w[rows]).loss.backward()

    With N tokens, B sequences, F of them with tokens, n_i tokens in sequence i, P prompts with tokens, and
    N_p tokens and F_p sequences with tokens of the prompt of i:

        "token-mean", "bnpo", "dapo"   1 / N                "grpo"               1 / (n_i B)
        "seq-mean-token-mean"          1 / (n_i F)          "dr_grpo"            1 / (B T)
        "seq-mean-token-sum"           1 / F                "prompt-mean"        1 / (P N_p)
        "seq-mean-token-sum-norm"      1 / T                "prompt-seq-mean"    1 / (P F_p n_i)

    "prompt-mean" gives each prompt the same weight, its tokens share it: DAPO read prompt by prompt.
    "prompt-seq-mean" lets the responses of a prompt share its weight, whatever their lengths. "grpo" is that
    only where all groups have the same size.

    Args:
        mode: one of the above.
        lengths: [B] integers, the counted tokens of each whole sequence of this rank's optimizer step. Or a
            mask [B, T], a `Packed`, or a list of any of them, one a micro-batch.
        groups: for the prompt modes: [B] integer ids of the prompts, or the size of a group of neighbours.
        num_groups: prompts are numbered 0 to num_groups - 1 over all ranks, and ranks may share them. None:
            no prompt has responses on two ranks.
        length: T, for "dr_grpo" and "seq-mean-token-sum-norm".
        group: data-parallel ranks, each with other sequences: one sum of four numbers (with num_groups two
            more a prompt). Context-parallel ranks do not belong to it: they hold the same sequences.
        averaged_over: the number of ranks that gradients are averaged over (DDP, FSDP), context-parallel ones
            too. Multiply it by what the framework divides by afterwards, such as micro-batches.

    Returns:
        [B] float64 (float32 on Apple's GPUs) on the device of lengths, 0 for empty sequences where n_i or N_p
        divides. Nothing is read on the host.

    Raises:
        TypeError, ValueError: for arguments other than these. On CPUs every rank of the group raises if one
            does, or if they disagree on an option. On GPUs the others' weights are NaN if one raises.
    """
    parts, first = _parts(lengths)
    with Meeting("sequence_weights", group, first) as meeting:
        if num_groups is not None:
            check_count("num_groups", num_groups)
        if isinstance(first, Tensor):
            meeting.would_add(lambda: [first.new_empty(4 + 2 * (num_groups or 0), dtype=wide(first))])
        check_choice("mode", mode, (*MODES, *PROMPT_MODES))
        by_prompt = mode in PROMPT_MODES
        _check_lengths(parts)
        rows = _rows(parts)
        if (groups is None) == by_prompt:
            raise ValueError(f"groups is for the prompt modes, which need it, got mode={mode!r} and groups {'None' if groups is None else 'given'}")
        if num_groups is not None and not isinstance(groups, Tensor):
            raise ValueError(f"num_groups numbers the prompts of groups= [B], got {num_groups} with groups={shown(groups)}")
        if (length is None) == (mode in LENGTH_MODES):
            raise ValueError(f"length is T of {' and '.join(LENGTH_MODES)}, which need it, got mode={mode!r} and length={shown(length)}")
        if length is not None:
            check_number("length", length, 0)
        check_positive("averaged_over", averaged_over, FINITE)
        prompts = None if groups is None else _prompts(groups, rows.lengths, num_groups)
        if meeting.exchanges:
            meeting.about(options={"mode": mode, "num_groups": num_groups, "length": length, "averaged_over": averaged_over})
    n, dtype = rows.lengths, wide(rows.lengths)
    has = n > 0
    # N, F, B, P; with numbered prompts their tokens and sequences
    totals = [n.sum(), has.sum(), rows.number.to(n.dtype), n.new_zeros(()) if prompts is None else prompts.number]
    counts = torch.stack(totals)
    if prompts is not None and prompts.table is not None:
        counts = torch.cat([counts, prompts.table.flatten()])
    counts = counts.to(dtype)  # whole numbers, exact; a rank that refuses on a GPU makes them NaN
    if meeting.ranks > 1:
        counts = add_up(counts, meeting.group_name)
    tokens, sequences, batch, prompt_count = counts[:4].clamp(min=1).unbind()
    own = n.to(dtype).clamp(min=1)
    if prompts is not None:
        of_prompt = prompts.of_rows
        if prompts.table is not None:
            table = counts[4:].view(2, -1)
            prompt_count = (table[0] > 0).sum().to(dtype).clamp(min=1)
            ids = groups.long().clamp(0, max(num_groups - 1, 0))  # type: ignore[union-attr, operator]  # both given with a table
            of_prompt = table[:, ids] if num_groups else table.new_zeros(2, len(n))
        prompt_tokens, prompt_sequences = of_prompt.to(dtype).clamp(min=1).unbind()
        divisor = prompt_count * (prompt_tokens if mode == "prompt-mean" else prompt_sequences * own)
    elif length is not None:
        divisor = length_divisor(mode, length or 1, batch)
    else:
        count = {"tokens": tokens, "sequences": sequences, "rows": batch}[COUNTED[mode]]
        divisor = own * count if mode in BY_LENGTH else count
    weights = tokens.new_full((), averaged_over).div(divisor).expand(n.shape)
    return torch.where(has, weights, 0) if mode in (*BY_LENGTH, *PROMPT_MODES) else weights.clone()


class _Prompts(NamedTuple):
    """Of this rank."""

    of_rows: Tensor  # [2, B]: tokens and sequences with tokens of each row's prompt
    number: Tensor  # 0-d int64: prompts with tokens
    table: Tensor | None  # [2, num_groups], the same by number


def _prompts(groups: int | Tensor, lengths: Tensor, num_groups: int | None) -> _Prompts:
    has = (lengths > 0).long()
    if num_groups is not None:
        expect("groups", groups, "integer", "[B], one id a sequence", shape=lengths.shape, like=("lengths", lengths))
        ids = groups.long()  # type: ignore[union-attr]
        if values_readable(ids) and ids.numel() and not 0 <= ids.min() <= ids.max() < num_groups:
            raise ValueError(f"groups must be in [0, num_groups = {num_groups}), got {ids.min().item()} to {ids.max().item()}")
        inside = (ids >= 0) & (ids < num_groups)  # on a GPU nobody has checked
        table = lengths.new_zeros(2, num_groups + 1).index_add_(1, torch.where(inside, ids, num_groups), torch.stack([lengths, has]))
        return _Prompts(lengths.new_zeros(2, len(lengths)), lengths.new_zeros(()), table[:, :num_groups])
    members = Groups(groups, lengths.double(), name="lengths")
    of_rows = torch.stack([members.total(lengths.double()), members.total(has.double())]).round().long()
    # Each prompt's last sequence with tokens counts it.
    order = torch.arange(len(lengths), device=lengths.device, dtype=torch.float64)
    latest = members.largest(torch.where(has > 0, order, -torch.inf))
    return _Prompts(of_rows, ((has > 0) & (order == latest)).sum(), None)


@torch.no_grad()
def batch_count(
    mode: str,
    lengths: Tensor | Packed | Sequence[Tensor | Packed],
    *,
    group: torch.distributed.ProcessGroup | None = None,
    context_group: torch.distributed.ProcessGroup | None = None,
    averaged_over: float = 1,
) -> Tensor:
    """What a loss over a whole optimizer batch divides by: its tokens or sequences, for `normalizer=`.

    The batch is all micro-batches of all ranks. Their losses, each sum / normalizer, then add up to the loss
    of one process with all rows, however the batch is cut:

        masks = [m["mask"] for m in micro_batches]
        count = batch_count("token-mean", masks, group=data_group, averaged_over=ranks)
        for m in micro_batches:
            loss, metrics = rlkern.ppo_loss(..., m["mask"], normalizer=count)
            loss.backward()  # not divided by the number of micro-batches

    Args:
        mode: the loss's aggregation. "token-mean", "bnpo" and "dapo" count tokens, "seq-mean-token-mean" and
            "seq-mean-token-sum" sequences with a token, "grpo" sequences. The other two divide by a length.
        lengths: as in `sequence_weights`: lengths [B], masks [B, T] or packs of this rank's micro-batches.
            Ranks may have different numbers of them, but each at least one, which may have no rows.
        group: data-parallel processes, which hold other sequences: one sum of one integer.
        context_group: processes that hold other tokens of the same rows, for masks (a `Packed` with a group
            knows the whole lengths). For tokens another such sum, for "seq-mean-token-sum" a sum of an
            integer a row. Modes that divide a sequence by its length have no such form: a rank knows the
            length of its part alone.
        averaged_over: as in `sequence_weights`. DDP averages over data-parallel ranks. So does FSDP2, unless
            set_gradient_divide_factor(1.0) makes it add. 1 where gradients are added up.

    Returns:
        0-d on the device of lengths, the same on all ranks: int64, or float64 divided by averaged_over.
        Nothing is read on the host.

    Raises:
        TypeError, ValueError: for arguments other than these. On CPUs every rank of the groups raises if one
            does, or if they disagree on the mode.
    """
    check_member(context_group, "context_group")
    parts, first = _parts(lengths)
    with Meeting("batch_count", group, first) as everyone, Meeting("batch_count", context_group, first) as context:
        for meeting in (everyone, context):
            if isinstance(first, Tensor):
                meeting.would_add(lambda: [first.new_empty((), dtype=torch.int64)])
        check_choice("mode", mode, MODES)
        if mode not in COUNTED:
            raise ValueError(f"mode {mode!r} divides by a length, not by a count: expected one of {', '.join(map(repr, COUNTED))}")
        if context_group is not None and mode in BY_LENGTH:
            raise ValueError(f"mode {mode!r} divides by a sequence's length, which no rank of context_group has: expected another mode")
        check_positive("averaged_over", averaged_over, FINITE)
        _check_lengths(parts)
        what, rows = COUNTED[mode], _rows(parts)
        for meeting in (everyone, context):
            if meeting.exchanges:
                size = len(rows.lengths) if meeting is context and what == "sequences" else 0
                meeting.about(rows=size, options={"mode": mode, "context_group": context_group is not None, "averaged_over": averaged_over})
    if what == "rows":
        count = rows.number
    elif what == "tokens":
        count = _over(rows.lengths.sum(), context)
    else:
        count = (_over(rows.lengths.clone(), context) > 0).sum()
    count = _over(count.to(rows.lengths.dtype).clone(), everyone)
    return count if averaged_over == 1 else count.to(wide(count)) / averaged_over


def _over(x: Tensor, meeting: Meeting) -> Tensor:
    return x if meeting.ranks == 1 else add_up(x, meeting.group_name)
