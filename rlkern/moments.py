"""Mean and variance of rows of logits, with gradients in closed form: the source behind losses that need no softmax. Plain PyTorch, any device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .rows import DEBUG, OnlyOnce, accumulation_dtype, as_rows, check_ignore_index, check_logits, check_mask, check_targets, rows_per_chunk

_lib = torch.library.Library("rlkern", "FRAGMENT")
_lib.define("row_moments(Tensor logits, Tensor targets, Tensor skipped) -> (Tensor, Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
_lib.define(
    "row_moments_backward(Tensor logits, Tensor targets, Tensor skipped, Tensor mean, Tensor g_target, Tensor g_variance) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class RowMoments(NamedTuple):
    centred_target: Tensor  # logit of the target minus the mean
    variance: Tensor  # biased: sum (x - mean)^2 / V


def _chunks(logits: Tensor):
    """Yields (a, rows, flat): `logits[a, rows]` of a [A, B, V] tensor is a chunk, `flat` the slice of its row numbers."""
    outer, inner, vocab = logits.shape
    step = rows_per_chunk(logits)
    for a in range(outer):
        for start in range(0, inner, step):
            stop = min(inner, start + step)
            yield a, slice(start, stop), slice(a * inner + start, a * inner + stop)


def _check_range(targets: Tensor, skipped: Tensor, vocab: int) -> None:
    bad = ((targets < 0) | (targets >= vocab)) & ~skipped
    if bad.any():
        raise IndexError(f"target {targets[bad][0].item()} is out of range for {vocab} logits")


def _row_moments(logits, targets, skipped):
    acc = accumulation_dtype(logits)
    if DEBUG or logits.device.type == "cpu":
        with torch._C.DisableTorchFunction():  # the inside of an operator is not for function modes to see
            _check_range(targets, skipped, logits.shape[-1])
    outputs = tuple(logits.new_empty(targets.shape, dtype=acc) for _ in range(3))
    target, variance, mean = (t.view(-1) for t in outputs)
    vocab, y, skip = logits.shape[-1], targets.reshape(-1), skipped.reshape(-1)
    rows_of = as_rows(logits)
    for a, rows, flat in _chunks(rows_of):
        x = rows_of[a, rows].to(acc)
        average = x.mean(-1, keepdim=True)
        x = x - average  # around the mean: E[x^2] - mean^2 would cancel
        x = x - x.mean(-1, keepdim=True)  # what rounding left of it
        valid = (y[flat] >= 0) & (y[flat] < vocab)
        picked = x.gather(-1, y[flat].clamp(0, vocab - 1).unsqueeze(-1)).squeeze(-1)
        target[flat] = torch.where(valid, picked, torch.nan).masked_fill_(skip[flat], 0)
        variance[flat] = x.square().mean(-1).masked_fill_(skip[flat], 0)
        mean[flat] = average.squeeze(-1)
    return outputs


def _row_moments_backward(logits, targets, skipped, mean, g_target, g_variance):
    out = logits.new_empty(logits.shape)
    acc, vocab, y, skip = mean.dtype, logits.shape[-1], targets.reshape(-1), skipped.reshape(-1)
    mean, g_target, g_variance = (t.reshape(-1).to(acc) for t in (mean, g_target, g_variance))
    rows_of, rows_of_out = as_rows(logits), as_rows(out)
    for a, rows, flat in _chunks(rows_of):
        g_t, g_v = g_target[flat].unsqueeze(-1), g_variance[flat].unsqueeze(-1)
        dx = (rows_of[a, rows].to(acc) - mean[flat].unsqueeze(-1)) * (2 * g_v / vocab) - g_t / vocab
        at = y[flat].clamp(0, vocab - 1).unsqueeze(-1)
        dx.scatter_(-1, at, dx.gather(-1, at) + g_t)  # one target a row: no need of an atomic addition
        idle = skip[flat] | ((g_t == 0) & (g_v == 0)).squeeze(-1)
        rows_of_out[a, rows] = dx.masked_fill_(idle.unsqueeze(-1), 0).to(out.dtype)
    return out


def _row_moments_fake(logits, targets, skipped):
    return tuple(logits.new_empty(targets.shape, dtype=accumulation_dtype(logits)) for _ in range(3))


_lib.impl("row_moments", _row_moments, "CompositeExplicitAutograd")
_lib.impl("row_moments_backward", _row_moments_backward, "CompositeExplicitAutograd")
torch.library.register_fake("rlkern::row_moments", _row_moments_fake, lib=_lib)
torch.library.register_fake("rlkern::row_moments_backward", lambda logits, *args: logits.new_empty(logits.shape), lib=_lib)


def _refuse(ctx, *grads):
    raise RuntimeError("rlkern's operators are differentiated through rlkern's functions, once, by torch.autograd; not by torch.func")


for _name in ("row_moments", "row_moments_backward"):
    torch.library.register_autograd(f"rlkern::{_name}", _refuse, setup_context=lambda ctx, inputs, output: None, lib=_lib)


class _RowMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, skipped):
        target, variance, mean = torch.ops.rlkern.row_moments.default(logits, targets, skipped)
        ctx.save_for_backward(logits, targets, skipped, mean)
        return target, variance

    @staticmethod
    def backward(ctx, g_target, g_variance):
        backward = torch.ops.rlkern.row_moments_backward.default
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return backward(*ctx.saved_tensors, g_target, g_variance), None, None
        with torch.no_grad():  # create_graph=True
            d_logits = backward(*ctx.saved_tensors, g_target, g_variance)
        return OnlyOnce.apply(d_logits, ctx.saved_tensors[0], "use rlkern.reference.row_moments"), None, None


def row_moments(logits: Tensor, targets: Tensor, *, mask: Tensor | None = None, ignore_index: int = -100) -> RowMoments:
    """(logit of the target - mean, variance) of each row: [..., V] and [...] -> two [...], float32 (float64 for float64 logits).

    Sums run around the mean, in float32. Rows where the target is `ignore_index` or the mask 0 give zeros and take no gradient.
    Raises as `rlkern.token_stats`; the targets have one entry a row.
    """
    check_logits(logits)
    targets = check_targets(targets, logits)
    if targets.dim() == logits.dim():
        raise ValueError(f"targets must be {tuple(logits.shape[:-1])}, one a row, got {tuple(targets.shape)}")
    mask = check_mask(mask, logits)
    skipped = targets == check_ignore_index(ignore_index)
    skipped = skipped if mask is None else skipped | ~mask
    return RowMoments(*_RowMoments.apply(logits, targets, skipped))
