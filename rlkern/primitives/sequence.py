"""Log-probabilities of whole sequences."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_flags, expect, shown
from .kept_sets import Kept
from .packing import Packed, check_packed
from .sequence_sums import wide
from .sharded_stats import Columns, refuse_rows
from .token_stats import token_logprobs


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """Raises TypeError or ValueError unless `labels` [..., T] are integers that fit `logits` [..., T, V]."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a tensor [..., T, V], got {type(logits).__name__}")
    if logits.dim() < 2:
        raise ValueError(f"logits must be [..., T, V], got shape {tuple(logits.shape)}")
    expect("labels", labels, "integer", "[..., T]", shape=logits.shape[:-1], like=("logits", logits))


def next_tokens(labels: Tensor, ignore_index: int = -100, *, packed: Packed | None = None) -> Tensor:
    """Labels moved one to the left, `ignore_index` last: what a causal model predicts. [..., T] -> [..., T].

    The logits stay whole. Slicing them instead costs a zero-fill and a copy of all logits in the backward.
    With packed labels, N elements in any shape, `ignore_index` stands at the last place of every sequence:
    without that a sequence's last token predicts the first one of the next.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor [..., T], got {type(labels).__name__}")
    if labels.dim() == 0:
        raise ValueError(f"labels must be [..., T], got shape {tuple(labels.shape)}")
    if not isinstance(ignore_index, (int, float)):
        raise TypeError(f"ignore_index must be a number, got {shown(ignore_index)}")
    if labels.dtype == torch.bool and ignore_index not in (0, 1):
        raise ValueError(f"ignore_index must be False or True for labels of torch.bool, such as a mask, got {ignore_index}")
    if not (labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool):
        least, most = torch.iinfo(labels.dtype).min, torch.iinfo(labels.dtype).max
        if not isinstance(ignore_index, int) or not least <= ignore_index <= most:
            raise ValueError(f"ignore_index must be an integer that labels of {labels.dtype} can hold, got {ignore_index}")
    if packed is None:
        return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    check_packed(packed)
    if labels.numel() != packed.seq_idx.numel():
        raise ValueError(f"labels must have the {packed.seq_idx.numel()} tokens of the pack, got shape {tuple(labels.shape)}")
    if labels.device != packed.seq_idx.device:
        raise ValueError(f"labels must be on the device of the pack {packed.seq_idx.device}, got {labels.device}")
    here, none = packed.seq_idx.reshape(-1), packed.cu_seqlens.shape[0] - 1
    last = (here != F.pad(here[1:], (0, 1), value=-1)) | (here == none) if here.numel() > 0 else here.bool()
    return torch.where(last, ignore_index, F.pad(labels.reshape(-1), (0, 1), value=ignore_index)[1:]).view(labels.shape)


def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    average: bool = False,
    shift: bool = True,
    ignore_index: int = -100,
    temperature: float | Tensor = 1.0,
    inplace_backward: bool = False,
    keep: Kept | Tensor | None = None,
    outside: str = "include",
    group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    segments: int | None = None,
    packed: Packed | None = None,
) -> Tensor:
    """Log-probability of each sequence, the sum of its tokens': `_get_batch_logps` of the original DPO code.

    Sums run in float64 and are rounded once.

    Args:
        logits: [B, T, V] float32, bfloat16, float16 or float64 (any leading dimensions), not sliced.
        labels: [B, T] integer, `ignore_index` where a token does not count (prompt, padding).
        average: divide by the number of tokens. A sequence without tokens gives 0 either way.
        shift: logits at t predict the label at t + 1 (a causal model). False: labels are already aligned.
        temperature, inplace_backward, outside, group, vocab_start, vocab_size, segments: as in
            `rlkern.token_stats`.
        keep: as there, for the rows of logits. Sets that stand beside the labels: with shift,
            `keep.next_tokens()`.
        packed: `rlkern.packed` of S sequences, one behind the other, in logits [N, V] or [1, N, V] (any shape
            of N rows) and labels of as many tokens. What counts are its counted tokens whose label is not
            ignore_index. Its mask is of the rows of logits, as in `dpo_loss_from_logits`.

    Returns:
        [B], with packed [S], float32 (float64 for float64 logits), differentiable.

    Raises:
        TypeError, ValueError: for other dtypes, shapes or options; IndexError as `rlkern.token_stats`.
    """
    columns = Columns(group, vocab_start, vocab_size, segments)
    try:
        check_flags(average=average, shift=shift)
        check_labels(labels, logits)
        moved = next_tokens(labels, ignore_index, packed=packed) if shift or packed is not None else labels
        targets = moved if shift else labels
        if packed is not None:
            packed = packed.like(targets)
            targets = torch.where(packed.mask, targets.long(), ignore_index)
            packed = packed.among(targets != ignore_index) if average else packed
    except Exception as error:
        refuse_rows(error, logits, columns)
    options: Any = dict(temperature=temperature, ignore_index=ignore_index, inplace_backward=inplace_backward, keep=keep, outside=outside)
    logps = token_logprobs(logits, targets, **options, group=group, vocab_start=vocab_start, vocab_size=vocab_size, segments=segments)
    if packed is not None:
        return packed.mean(logps) if average else packed.sum(logps)
    sums = logps.sum(-1, dtype=wide(logps))
    return (sums / (targets != ignore_index).sum(-1).clamp(min=1) if average else sums).to(logps.dtype)
