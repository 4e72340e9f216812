"""From the logits and labels of a batch to its responses: padded, one a row, or packed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...checks import check_flags, check_ignore_index, expect
from ...operator import values_readable
from ...primitives.packing import Packed, Rows, check_packed
from ...primitives.sequence import check_labels, next_tokens


class Responses(NamedTuple):
    """What each row of logits predicts, `ignore_index` where nothing counts, and where the responses are."""

    targets: Tensor
    sequences: Rows | Packed


def check_responses(logits: Any, labels: Any, packed: Any, shift: bool, ignore_index: int, rows: str = "B") -> int:
    """Raises TypeError or ValueError unless logits [B, T, V] go with labels [B, T], or both with a pack.

    Args:
        logits, labels: beside a pack [N, V] and [N], [1, N, V] and [1, N], or of another shape of N rows.
        rows: what B is called in errors.

    Returns:
        The number of responses.
    """
    check_flags(shift=shift)
    check_ignore_index(ignore_index)
    check_labels(labels, logits)
    if packed is None:
        if logits.dim() != 3:
            raise ValueError(f"logits must be [{rows}, T, V], or [N, V] beside packed=, got shape {tuple(logits.shape)}")
        return labels.shape[0]
    check_packed(packed)
    if labels.numel() != packed.mask.numel():
        raise ValueError(f"packed must have the {labels.numel()} tokens of logits and labels, got {packed.mask.numel()}")
    if labels.device != packed.mask.device:
        raise ValueError(f"packed must be on the device of labels {labels.device}, got {packed.mask.device}")
    if isinstance(packed.num_seqs, Tensor):
        raise ValueError("packed must have a number of sequences that the host knows: give packed(...) num_seqs=")
    if not packed.whole:
        raise ValueError("packed must hold whole sequences, got parts of them (full_lengths=): these need two phases, see docs/losses.md")
    return packed.num_seqs


def responses_of(labels: Tensor, packed: Packed | None, shift: bool, ignore_index: int, only: Tensor | None = None) -> Responses:
    """Of checked arguments. only: bool [B] (packed [S]), the sequences that count; None: all."""
    targets = (next_tokens(labels, ignore_index, packed=packed) if shift else labels).long()
    sequences = Rows(targets != ignore_index) if packed is None else packed.like(targets)
    dropped = None if packed is None else ~sequences.mask
    if only is not None:
        others = ~sequences.spread(only)
        dropped = others if dropped is None else dropped | others
    if dropped is None:
        return Responses(targets, sequences)
    targets = torch.where(dropped, ignore_index, targets)
    return Responses(targets, sequences.among(targets != ignore_index))


def union(a: Tensor, b: Tensor, ignore_index: int) -> Tensor:
    """Targets that count in either. On a CPU a ValueError where both count and differ."""
    counted = a != ignore_index
    if values_readable(a) and (counted & (b != ignore_index) & (a != b)).any():
        raise ValueError(f"sft_labels must be the labels wherever both count, as those that are not {ignore_index=}, got others")
    return torch.where(counted, a, b)


def check_reference(reference_logps: Any, logits: Tensor, labels: Tensor, packed: Packed | None, sequences: str, only_tokens: str = "") -> None:
    """One number a response or one a token.

    Args:
        sequences: the layout of the former in words.
        only_tokens: what for these must be the latter, if so.
    """
    n = labels.shape[0] if packed is None else packed.num_seqs
    tokens = f"{sequences[:-1]}, T]" if packed is None else "one a token as labels"
    if packed is not None:
        sequences = "[S], [S, 1]"
    shapes = [labels.shape] if only_tokens else [(n,), labels.shape] if packed is None else [(n,), (n, 1), labels.shape]
    layout = f"{tokens}, one a token for {only_tokens}" if only_tokens else f"{sequences} or {tokens}"
    expect("reference_logps", reference_logps, "float", layout, shape=tuple(shapes), like=("logits", logits))
    if packed is not None and not only_tokens and reference_logps.shape == labels.shape == (n,) and n > 0:
        raise ValueError(f"reference_logps [{n}] may be one a token or one a sequence, as there are {n} of both: give it as [S, 1]")
