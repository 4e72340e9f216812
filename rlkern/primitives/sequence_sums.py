"""Sums over the sequences of a pack: one number a sequence from its tokens, and back.

Sums run in float64, in one order whatever lies around a sequence, and are rounded once by whoever asks. So a
sequence has the same sum in any pack, and but for ties that a float64 sum straddles the same in padded rows.
The gradient of a sum is a gather, and that of a gather a sum: no atomics, and any order of derivative.
"""

from __future__ import annotations

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
    return x.new_empty((x.shape[0], seq_idx.shape[0]))


def _spread(x, mask, seq_idx):
    if x.dtype not in (torch.float32, torch.float64):
        return _gathered(x, mask, seq_idx)
    out = _new_spread(x, mask, seq_idx)
    if out.numel():
        mask = None if mask is None else mask.contiguous()
        backends.select(x.device).sequence_spread(x.contiguous(), mask, seq_idx.contiguous(), out)
    return out


def _gathered(x, mask, seq_idx):
    tokens = torch.nn.functional.pad(x, (0, 1)).index_select(-1, seq_idx)
    return tokens if mask is None else torch.where(mask, tokens, 0)


_sequence_spread = Operator("sequence_spread(Tensor x, Tensor? mask, Tensor seq_idx) -> Tensor", run=_spread, fake=_new_spread, plain=_gathered)
refuse_torch_func(_sequence_spread)


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, mask, seq_idx, cu_seqlens, group_name):
        ctx.save_for_backward(mask, seq_idx, cu_seqlens)
        ctx.dtype = values.dtype
        return _added(values, mask, cu_seqlens, group_name)

    @staticmethod
    def backward(ctx, gradient):
        mask, seq_idx, cu_seqlens = ctx.saved_tensors
        gradient = gradient.to(ctx.dtype)
        # Compiled code has no second derivative, and Dynamo of torch 2.6 asks nothing about a gradient.
        if torch.compiler.is_compiling():
            return _gathered(gradient, mask, seq_idx), None, None, None, None
        return spread(gradient, seq_idx, cu_seqlens, mask), None, None, None, None


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
        return sequence_sums(gradient.to(computing_dtype(gradient)), mask, seq_idx, cu_seqlens).to(gradient.dtype), None, None, None


def _added(values: Tensor, mask: Tensor, cu_seqlens: Tensor, group_name: str) -> Tensor:
    sums = _sequence_sums(values, mask, cu_seqlens)
    return add_up(sums, group_name) if group_name != "" else sums


def sequence_sums(values: Tensor, mask: Tensor, seq_idx: Tensor, cu_seqlens: Tensor, group_name: str = "") -> Tensor:
    """The sums of each sequence's counted tokens, float64, with gradient.

    With the name of a group they are those of all ranks, which hold other tokens of the same sequences. The
    gradient stays here: a rank's tokens get theirs from what it computes of the whole sum itself.

    Args:
        values: [K, N] float32 or float64; masked places may hold anything.
        mask: [N] bool.
        seq_idx: [N] int64 in [0, S], S for none; not descending.
        cu_seqlens: [S + 1] int64; sequence i is [cu_seqlens[i], cu_seqlens[i + 1]).

    Returns:
        [K, S], 0 of nothing.
    """
    if not transformed(values):
        if only_values((values,)):
            return _added(values, mask, cu_seqlens, group_name)
        return _Sums.apply(values, mask, seq_idx, cu_seqlens, group_name)
    out = values.new_zeros((values.shape[0], cu_seqlens.shape[0]), dtype=wide(values))
    sums = out.index_add(-1, seq_idx, torch.where(mask, values, 0).to(out.dtype))[:, :-1]
    return sums + (add_up(sums.detach(), group_name) - sums.detach()) if group_name else sums


def spread(x: Tensor, seq_idx: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None) -> Tensor:
    """[K, S] -> [K, N]: each token gets its sequence's number, 0 where it belongs to none. With gradient.

    mask: [N] bool, also 0 where it is not set; None: all count.
    """
    if transformed(x):
        return _gathered(x, mask, seq_idx)
    if only_values((x,)):
        return _sequence_spread(x, mask, seq_idx)
    return _Spread.apply(x, mask, seq_idx, cu_seqlens) if x.requires_grad else _gathered(x, mask, seq_idx)
