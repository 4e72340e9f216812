"""From per-token values to one number: all conventions of verl and TRL, under their names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import as_bool, check_choice, check_number, computing_dtype, expect, shown
from ..parallel import Meeting, add_up, check_member
from ..primitives.token_terms import TokenTerms


class LossOutput(NamedTuple):
    """loss: 0-d, carries the gradient. metrics: detached 0-d tensors by name, of the loss's device and dtype.

    Nothing was read on the host. `rlkern.metrics.merge_metrics` merges metrics by the counts among them.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


TOKEN_MODES = ("token-mean", "bnpo", "dapo")
SEQUENCE_MODES = ("seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "grpo", "dr_grpo")
MODES = TOKEN_MODES + SEQUENCE_MODES


def check_aggregation(mode: str, normalizer: float | Tensor | None = None) -> None:
    """Raises ValueError or TypeError for a mode not in `MODES` or a wrong normalizer."""
    check_choice("aggregation mode", mode, MODES)
    if isinstance(normalizer, Tensor):
        if normalizer.dtype.is_complex:
            raise TypeError(f"normalizer must be a real number, got {normalizer.dtype}")
        if normalizer.numel() != 1 or normalizer.requires_grad:
            raise ValueError(
                f"normalizer must be one number without gradient, got shape {tuple(normalizer.shape)}, requires_grad={normalizer.requires_grad}"
            )
    elif normalizer is not None:
        if not isinstance(normalizer, (int, float)) or isinstance(normalizer, bool):
            raise TypeError(f"normalizer must be a number, a tensor with one element or None, got {type(normalizer).__name__}")
        if not normalizer >= 0:
            raise ValueError(f"normalizer must not be negative, got {normalizer}")
        check_number("normalizer", normalizer)


def own_aggregation(loss: Callable) -> str | None:
    """A loss's default mode. One of SEQUENCE_MODES belongs to its definition; None: it has its own sum."""
    return inspect.signature(loss).parameters["aggregation"].default


def divisor(default: int | Tensor, normalizer: float | Tensor | None) -> float | Tensor:
    """The count to divide by. A count of zero goes with a sum of zero, so it becomes 1."""
    count = default if normalizer is None else normalizer
    if isinstance(count, Tensor):
        return torch.where(count == 0, 1, count).reshape(())
    return 1 if count == 0 else count


def aggregate(values: Tensor, mask: Tensor, mode: str = "token-mean", normalizer: float | Tensor | None = None) -> Tensor:
    """Reduces per-token values to a scalar. Sums run over the mask m, len_i counts sequence i's tokens:

        mode                           loss                                  what `normalizer` replaces
        "token-mean", "bnpo", "dapo"   sum / sum(m)                          the number of tokens
        "seq-mean-token-mean"          sum_i (sum_t / len_i) / #{len_i > 0}  the number of sequences
        "seq-mean-token-sum"           sum / #{len_i > 0}                    the number of sequences
        "seq-mean-token-sum-norm"      sum / T                               T, verl's loss_scale_factor
        "grpo"                         sum_i (sum_t / len_i) / B             the number of sequences B
        "dr_grpo"                      sum / (B * T)                         T, TRL's max_completion_length

    The hyphenated names are verl's `loss_agg_mode`, the others TRL's `loss_type`. TRL's dapo, cispo and vespo
    divide by the tokens of the whole accumulated batch. Pass that count as `normalizer`, over the number of
    processes if gradients are averaged over these: see `batch_count`. verl's global counts go in the same
    way. Empty sequences
    count in "grpo" and "dr_grpo" only. "seq-mean-token-sum-norm" does not divide by B, as in verl up to 0.7;
    verl from 0.8 and TRL's "dr_grpo" do. verl divides a sequence by len_i + 1e-8, this by len_i.

    Args:
        values: [B, T], or any shape for the token modes; float. Masked positions may hold NaN and inf.
        mask: shaped like values, bool or number; nonzero counts. It selects, it does not weigh.
        mode: one of the above.
        normalizer: a number or a one-element tensor (read on the device, never on the host). None takes the
            count of this batch.

    Returns:
        A 0-d tensor, float32 (float64 for float64 values). 0 with zero gradient if nothing counts.

    Raises:
        TypeError: values that are no float tensor, a mask that is no tensor, a normalizer that is no number.
        ValueError: other shapes or devices, unknown modes, sequence modes of values not [B, T], negative
            normalizers.
    """
    check_aggregation(mode, normalizer)
    expect("values", values, "float", "[...]")
    expect("mask", mask, "real", "[...]", like=("values", values))
    if mode in SEQUENCE_MODES and values.dim() != 2:
        raise ValueError(f"mode {mode!r} counts sequences: values must be [B, T], got shape {tuple(values.shape)}")

    kept = mask if mask.dtype == torch.bool else mask != 0
    accumulate = computing_dtype(values)
    values = torch.where(kept, values.to(accumulate), 0)  # not a product, which keeps masked NaN
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.to(accumulate)  # a float64 one would make the loss float64
    if mode in TOKEN_MODES:
        return values.sum() / divisor(kept.sum(), normalizer)
    lengths = kept.sum(-1)
    n_sequences, length = values.shape
    if mode == "seq-mean-token-sum-norm":
        return values.sum() / divisor(length, normalizer)
    if mode == "dr_grpo":
        return values.sum() / divisor(length, normalizer) / max(n_sequences, 1)
    if mode == "seq-mean-token-sum":
        return values.sum() / divisor((lengths > 0).sum(), normalizer)
    sequence_means = values.sum(-1) / lengths.clamp(min=1)
    return sequence_means.sum() / divisor(n_sequences if mode == "grpo" else (lengths > 0).sum(), normalizer)


_COUNTED = {  # by mode: what `batch_count` counts
    **dict.fromkeys(TOKEN_MODES, "tokens"),
    **dict.fromkeys(("seq-mean-token-mean", "seq-mean-token-sum"), "sequences"),
    "grpo": "rows",
}
_BY_LENGTH = ("seq-mean-token-mean", "grpo")  # divide each sequence by its own length


@torch.no_grad()
def batch_count(
    masks: Tensor | Sequence[Tensor],
    aggregation: str = "token-mean",
    *,
    group: torch.distributed.ProcessGroup | None = None,
    context_group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """What a loss over a whole optimizer batch divides by: its tokens or sequences, for `normalizer=`.

    The batch is all micro-batches of all ranks. Their losses, each sum / normalizer, then add up to the loss
    of one process with all rows, however the batch is cut:

        count = batch_count([m["mask"] for m in micro_batches], group=data_group)
        for m in micro_batches:
            loss, metrics = rlkern.ppo_loss(..., m["mask"], normalizer=count / averaged)
            loss.backward()  # not divided by the number of micro-batches

    `averaged` is the number of ranks over which the trainer averages gradients, or 1 where it adds them up.
    DDP averages over data-parallel ranks. So does FSDP2, unless set_gradient_divide_factor(1.0) makes it add.
    With context parallelism gradients are reduced over those ranks too, and count if they are averaged.

    Args:
        masks: those of this rank's micro-batches, [B, T] bool or number each, of any sizes; or one mask.
            Ranks may have different numbers of them, but each at least one, which may have no rows.
        aggregation: the loss's mode. "token-mean", "bnpo" and "dapo" count tokens, "seq-mean-token-mean" and
            "seq-mean-token-sum" rows with a token, "grpo" rows. The other two divide by a length.
        group: data-parallel processes, which hold other rows: one sum of one integer.
        context_group: processes that hold other tokens of the same rows. For tokens another such sum, for
            "seq-mean-token-sum" a sum of an integer a row. Modes that divide a sequence by its length have no
            such form: a rank knows the length of its part alone.

    Returns:
        0-d int64 on the device of the masks, the same on all ranks. Nothing is read on the host.

    Raises:
        TypeError, ValueError: for masks, modes and groups other than these. On CPUs every rank of the groups
            raises if one does, or if they disagree on the mode.
    """
    check_member(context_group, "context_group")
    parts = [masks] if isinstance(masks, Tensor) else masks
    first = parts[0] if isinstance(parts, (list, tuple)) and parts else None
    with Meeting("batch_count", group, first) as everyone, Meeting("batch_count", context_group, first) as context:
        for meeting in (everyone, context):
            if isinstance(first, Tensor):
                meeting.would_add(lambda: [first.new_empty((), dtype=torch.int64)])
        kept, what = _check_count(parts, aggregation, context_group)
        for meeting in (everyone, context):
            if meeting.exchanges:
                rows = sum(map(len, kept)) if meeting is context and what == "sequences" else 0
                meeting.about(rows=rows, options={"aggregation": aggregation, "context_group": context_group is not None})
    if what == "rows":
        count = kept[0].new_full((), sum(map(len, kept)), dtype=torch.int64)
    elif what == "tokens":
        count = _over(torch.stack([mask.sum() for mask in kept]).sum(), context)
    else:
        count = (_over(torch.cat([mask.sum(-1) for mask in kept]), context) > 0).sum()
    return _over(count, everyone)


def _over(x: Tensor, meeting: Meeting) -> Tensor:
    return x if meeting.ranks == 1 else add_up(x, meeting.group_name)


def _check_count(masks: Sequence[Tensor], aggregation: str, context_group: object) -> tuple[list[Tensor], str]:
    """(the masks as bool, what to count)"""
    check_aggregation(aggregation)
    if aggregation not in _COUNTED:
        raise ValueError(f"aggregation {aggregation!r} divides by a length, not by a count: expected one of {', '.join(map(repr, _COUNTED))}")
    if context_group is not None and aggregation in _BY_LENGTH:
        raise ValueError(f"aggregation {aggregation!r} divides by a sequence's length, which no rank of context_group has: expected another mode")
    if not isinstance(masks, (list, tuple)):
        raise TypeError(f"masks must be a tensor [B, T] or a list of them, got {shown(masks)}")
    if not masks:
        raise ValueError("masks must hold at least one tensor [B, T], got none")
    for mask in masks:
        expect("masks", mask, "real", "[B, T]")
    return [as_bool(mask) for mask in masks], _COUNTED[aggregation]


def aggregate_terms(terms: TokenTerms, mask: Tensor, count: Tensor, mode: str = "token-mean", normalizer: float | Tensor | None = None) -> Tensor:
    """`aggregate` of terms. `count` is the number of tokens that count, at least 1."""
    if terms.one_pass and mode in TOKEN_MODES:
        return terms.sum_over(count if normalizer is None else divisor(0, normalizer))
    return aggregate(terms.tensor(), mask, mode, normalizer)
