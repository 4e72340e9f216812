"""Sums over the sequences of a pack: one number a sequence from its tokens, and back.

Sums run in float64, in one order whatever lies around a sequence, and are rounded once by whoever asks. So a
sequence has the same sum in any pack, and but for ties that a float64 sum straddles the same in padded rows.
The gradient of a sum is a gather, and that of a gather a sum: no atomics, and any order of derivative.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends
from ..checks import computing_dtype
from ..operator import Operator, only_values, refuse_torch_func, transformed
from ..parallel import add_up


def wide(x: Tensor) -> torch.dtype:
    """What sums accumulate in: float64, but float32 on Apple's GPUs, which have no wider type."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _new_sums(values, mask, cu_seqlens):
    return values.new_empty((values.shape[0], cu_seqlens.shape[0] - 1), dtype=wide(values))


def _sums(values, mask, cu_seqlens):
    out = _new_sums(values, mask, cu_seqlens)
    if out.numel():
        backends.select(values.device).sequence_sums(values.contiguous(), mask.contiguous(), cu_seqlens.contiguous(), out)
    return out


_sequence_sums = Operator("sequence_sums(Tensor values, Tensor mask, Tensor cu_seqlens) -> Tensor", run=_sums, fake=_new_sums)
refuse_torch_func(_sequence_sums)


def _new_spread(x, mask, seq_idx):
    return x.new_empty(seq_idx.shape)


def _spread(x, mask, seq_idx):
    if x.dtype not in (torch.float32, torch.float64):
        return _gathered(x, mask, seq_idx)
    out = _new_spread(x, mask, seq_idx)
    if out.numel():
        mask = None if mask is None else mask.contiguous()
        backends.select(x.device).sequence_spread(x.contiguous(), mask, seq_idx.contiguous(), out)
    return out


def _gathered(x, mask, seq_idx):
    tokens = torch.nn.functional.pad(x, (0, 1)).index_select(0, seq_idx)
    return tokens if mask is None else torch.where(mask, tokens, 0)


_sequence_spread = Operator("sequence_spread(Tensor x, Tensor? mask, Tensor seq_idx) -> Tensor", run=_spread, fake=_new_spread, plain=_gathered)
refuse_torch_func(_sequence_spread)


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mask, seq_idx, cu_seqlens, group_name, rounded, *values):
        ctx.save_for_backward(mask, seq_idx, cu_seqlens)
        ctx.dtypes = [x.dtype for x in values]
        return _values(mask, cu_seqlens, group_name, rounded, values)

    @staticmethod
    def backward(ctx, *gradients):
        mask, seq_idx, cu_seqlens = ctx.saved_tensors
        tokens = []
        for gradient, dtype in zip(gradients, ctx.dtypes, strict=True):
            gradient = gradient.to(dtype)
            # Compiled code has no second derivative, and Dynamo of torch 2.6 asks nothing about a gradient.
            compiled = torch.compiler.is_compiling()
            tokens.append(_gathered(gradient, mask, seq_idx) if compiled else spread(gradient, seq_idx, cu_seqlens, mask))
        return None, None, None, None, None, *tokens


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask, seq_idx, cu_seqlens):
        ctx.save_for_backward(mask, seq_idx, cu_seqlens)
        return _sequence_spread(x, mask, seq_idx)

    @staticmethod
    def backward(ctx, gradient):
        mask, seq_idx, cu_seqlens = ctx.saved_tensors
        if mask is None:  # between the sequences of slots are places of none
            mask = seq_idx < cu_seqlens.shape[0] - 1
        (sums,) = sequence_sums([gradient.to(computing_dtype(gradient))], mask, seq_idx, cu_seqlens)
        return sums.to(gradient.dtype), None, None, None


def _values(mask: Tensor, cu_seqlens: Tensor, group_name: str, rounded: bool, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    sums = _sequence_sums(torch.stack(list(values)) if len(values) > 1 else values[0].unsqueeze(0), mask, cu_seqlens)
    if group_name != "":
        sums = add_up(sums, group_name)
    # Copies: callers may write into what they get.
    return tuple(row.to(x.dtype if rounded else row.dtype, copy=True) for row, x in zip(sums, values, strict=True))


def sequence_sums(
    values: Sequence[Tensor], mask: Tensor, seq_idx: Tensor, cu_seqlens: Tensor, group_name: str = "", rounded: bool = False
) -> tuple[Tensor, ...]:
    """The sums of each sequence's counted tokens, with gradient.

    With the name of a group they are those of all ranks, which hold other tokens of the same sequences; all
    values go there in one exchange. The gradient stays here: a rank's tokens get theirs from what it computes
    of the whole sum itself.

    Args:
        values: K of [N] float32 or float64; masked places may hold anything.
        mask: [N] bool.
        seq_idx: [N] int64 in [0, S], S for none; not descending but for places of none.
        cu_seqlens: [S + 1] int64; sequence i is [cu_seqlens[i], cu_seqlens[i + 1]).
        rounded: to the dtypes of the values.

    Returns:
        K of [S] float64, 0 of nothing.
    """
    if not any(transformed(x) for x in values):
        if only_values(values):
            return _values(mask, cu_seqlens, group_name, rounded, values)
        return _Sums.apply(mask, seq_idx, cu_seqlens, group_name, rounded, *values)
    return tuple(_plain_sums(x, mask, seq_idx, cu_seqlens, group_name).to(x.dtype if rounded else wide(x)) for x in values)


def _plain_sums(values: Tensor, mask: Tensor, seq_idx: Tensor, cu_seqlens: Tensor, group_name: str) -> Tensor:
    sums = values.new_zeros(cu_seqlens.shape[0], dtype=wide(values))
    sums = sums.index_add(0, seq_idx, torch.where(mask, values, 0).to(sums.dtype))[:-1]
    return sums + (add_up(sums.detach(), group_name) - sums.detach()) if group_name else sums


def spread(x: Tensor, seq_idx: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None) -> Tensor:
    """[S] -> [N]: each token gets its sequence's number, 0 where it belongs to none. With gradient.

    mask: [N] bool, also 0 where it is not set; None: all count.
    """
    if transformed(x):
        return _gathered(x, mask, seq_idx)
    if only_values([x]):
        return _sequence_spread(x, mask, seq_idx)
    return _Spread.apply(x, mask, seq_idx, cu_seqlens) if x.requires_grad else _gathered(x, mask, seq_idx)
