"""From per-token values to one number: all conventions of verl and TRL, under their names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import as_bool, check_choice, check_number, computing_dtype, expect
from ..primitives.packing import Packed, Rows, per_token, refuse_nested, sequences_of
from ..primitives.sequence_sums import wide
from ..primitives.token_terms import TokenTerms


class LossOutput(NamedTuple):
    """loss: 0-d, carries the gradient.
    metrics: detached 0-d tensors by name, of the loss's device and dtype.

    Nothing was read on the host. `rlkern.reduce_metrics` merges metrics by the counts among them.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


TOKEN_MODES = ("token-mean", "bnpo", "dapo")
LENGTH_MODES = ("seq-mean-token-sum-norm", "dr_grpo")  # divide by the padded length
SEQUENCE_MODES = ("seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "grpo", "dr_grpo")
MODES = TOKEN_MODES + SEQUENCE_MODES
COUNTED = {  # by mode: the count that it divides by
    **dict.fromkeys(TOKEN_MODES, "tokens"),
    **dict.fromkeys(("seq-mean-token-mean", "seq-mean-token-sum"), "sequences"),
    "grpo": "rows",
}
BY_LENGTH = ("seq-mean-token-mean", "grpo")  # divide each sequence by its own length as well


def check_aggregation(mode: str | Tensor, normalizer: float | Tensor | None = None) -> None:
    """Raises ValueError or TypeError for a mode not in `MODES`, wrong weights or a wrong normalizer."""
    if isinstance(mode, Tensor):
        if not mode.is_floating_point() or mode.requires_grad:
            raise TypeError(f"aggregation mode: weights must be floats without gradient, got {mode.dtype}, requires_grad={mode.requires_grad}")
        if normalizer is not None:
            raise ValueError(f"aggregation mode: weights leave nothing to divide by: normalizer must be None, got {normalizer}")
        return
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


def check_parts(sequences: Rows | Packed, mode: str | Tensor, normalizer: float | Tensor | None) -> None:
    """Raises ValueError for a default that sequences do not have: padding's T, or counts of whole ones."""
    if isinstance(sequences, Rows) or normalizer is not None or isinstance(mode, Tensor):
        return
    if mode in LENGTH_MODES:
        raise ValueError(f"aggregation {mode!r} divides by the padded length, which packed tokens do not have: give normalizer= or weights")
    if not sequences.whole:
        raise ValueError("parts of sequences (full_lengths=) do not have the counts of the whole batch: give normalizer=, or weights as aggregation=")


def own_aggregation(loss: Callable) -> str | None:
    """A loss's default mode. One of SEQUENCE_MODES belongs to its definition; None: it has its own sum."""
    return inspect.signature(loss).parameters["aggregation"].default


def divisor(default: int | Tensor, normalizer: float | Tensor | None) -> float | Tensor:
    """The count to divide by. A count of zero goes with a sum of zero, so it becomes 1."""
    count = default if normalizer is None else normalizer
    if isinstance(count, Tensor):
        return torch.where(count == 0, 1, count).reshape(())
    return 1 if count == 0 else count


def aggregate(
    values: Tensor,
    mask: Tensor | Packed,
    mode: str | Tensor = "token-mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Reduces per-token values to a scalar. Sums run over the mask m, len_i counts sequence i's tokens:

        mode                           loss                                  what `normalizer` replaces
        "token-mean", "bnpo", "dapo"   sum / sum(m)                          the number of tokens
        "seq-mean-token-mean"          sum_i (sum_t / len_i) / #{len_i > 0}  the number of sequences
        "seq-mean-token-sum"           sum / #{len_i > 0}                    the number of sequences
        "seq-mean-token-sum-norm"      sum / T                               T, verl's loss_scale_factor
        "grpo"                         sum_i (sum_t / len_i) / B             the number of sequences B
        "dr_grpo"                      sum / (B * T)                         T, TRL's max_completion_length
        weights w                      sum of w values                       -

    The hyphenated names are verl's `loss_agg_mode`, the others TRL's `loss_type`. TRL's dapo, cispo and vespo
    divide by the tokens of the whole accumulated batch. Pass that count as `normalizer`, over the number of
    processes if gradients are averaged over these: see `batch_count`. verl's global counts go in the same
    way. `sequence_weights` makes the weights of any mode for a whole optimizer batch, prompt means too; the
    losses of its micro-batches then add up. Empty sequences count in "grpo" and "dr_grpo" only.
    "seq-mean-token-sum-norm" does not divide by B, as in verl up to 0.7; verl from 0.8 and TRL's "dr_grpo"
    do. verl divides a sequence by len_i + 1e-8, this by len_i.

    Args:
        values: [B, T], or any shape for the token modes; float. Masked positions may hold NaN and inf.
        mask: shaped like values, bool or number; nonzero counts. It selects, it does not weigh. Or a
            `Packed` of as many tokens: then there is no T, and two modes need a normalizer.
        mode: one of the above. Weights are a float tensor without gradient, one a sequence ([B], [B, 1]) or
            one a token.
        normalizer: a number or a one-element tensor (read on the device, never on the host). None takes the
            count of this batch.

    Returns:
        A 0-d tensor, float32 (float64 for float64 values). 0 with zero gradient if nothing counts. If the
        pack has a group, this rank's part of the loss: the ranks' parts add up.

    Raises:
        TypeError: values that are no float tensor, a mask that is no tensor, a normalizer that is no number.
        ValueError: other shapes or devices, unknown modes, sequence modes of values not [B, T], negative
            normalizers, a normalizer beside weights, a missing one for a pack.
    """
    check_aggregation(mode, normalizer)
    refuse_nested("values", values)
    expect("values", values, "float", "[...]")
    if isinstance(mask, Packed):
        sequences: Rows | Packed = sequences_of(mask, values, "values")
        check_parts(sequences, mode, normalizer)
    else:
        expect("mask", mask, "real", "[...]", like=("values", values))
        sequences = Rows(as_bool(mask))
        if (isinstance(mode, Tensor) or mode in SEQUENCE_MODES) and values.dim() != 2:
            what = "weights are for" if isinstance(mode, Tensor) else f"mode {mode!r} counts"
            raise ValueError(f"{what} sequences: values must be [B, T], got shape {tuple(values.shape)}")
    return aggregate_values(values, sequences, mode, normalizer)


def aggregate_values(values: Tensor, sequences: Rows | Packed, mode: str | Tensor, normalizer: float | Tensor | None) -> Tensor:
    """`aggregate` of checked arguments."""
    values = torch.where(sequences.mask, values.to(computing_dtype(values)), 0)  # not a product, which keeps masked NaN
    factor, by = _scale(values, sequences, mode, normalizer, None)
    return values.sum() / by if factor is None else (values * factor).sum()


def aggregate_terms(
    terms: TokenTerms, sequences: Rows | Packed, count: Tensor, mode: str | Tensor = "token-mean", normalizer: float | Tensor | None = None
) -> Tensor:
    """`aggregate` of terms. `count` is the number of tokens that count, at least 1."""
    # Autograd would save a count that shares its memory with metrics, which a caller may write into.
    factor, by = _scale(terms.values, sequences, mode, normalizer, count if terms.one_pass else None)
    return terms.sum_over(by) if factor is None else terms.scaled(factor).sum_over(None)


def _scale(
    values: Tensor, sequences: Rows | Packed, mode: str | Tensor, normalizer: float | Tensor | None, tokens: Tensor | None
) -> tuple[Tensor | None, float | Tensor]:
    """(what multiplies each token, or None; what divides the sum). tokens: how many count here, if known."""
    if isinstance(mode, Tensor):
        factor = per_token("aggregation mode (weights)", mode, values, sequences, of="values")
        return torch.where(sequences.mask, factor, 0), 1
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.to(values.dtype)  # a float64 one would make the loss float64
    if mode in TOKEN_MODES:
        if normalizer is not None:
            return None, divisor(0, normalizer)
        if sequences.group_name:
            return None, divisor(sequences.lengths.sum(), None)
        return None, divisor(sequences.mask.sum(), None) if tokens is None else tokens
    if mode in LENGTH_MODES:
        return None, length_divisor(mode, divisor(sequences.mask.shape[-1], normalizer), _at_least_1(sequences.num_seqs))
    lengths = sequences.lengths
    count = divisor(sequences.num_seqs if COUNTED[mode] == "rows" else (lengths > 0).sum(), normalizer)
    if mode not in BY_LENGTH:
        return None, count
    return sequences.spread((1 / (lengths.clamp(min=1).to(wide(lengths)) * count)).to(values.dtype)), 1


def length_divisor(mode: str, length: float | Tensor, rows: int | Tensor) -> Any:
    """What one of `LENGTH_MODES` divides by, of numbers that are not 0."""
    return length * rows if mode == "dr_grpo" else length


def _at_least_1(count: int | Tensor) -> int | Tensor:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
