"""Mean and variance of rows of logits, for losses without softmax. Plain PyTorch, closed-form gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.gradient_memory import new_gradient
from ..checks import check_ignore_index, check_logits, check_mask, check_target_range, check_targets, computing_dtype
from ..layout import as_rows, row_chunks
from ..operator import Operator, differentiable, values_readable


class RowMoments(NamedTuple):
    centred_target: Tensor  # logit of the target minus the mean
    variance: Tensor  # biased: sum (x - mean)^2 / V


def _new_moments(logits, targets, skipped):
    """(centred target, variance, mean)"""
    return tuple(logits.new_empty(targets.shape, dtype=computing_dtype(logits)) for _ in range(3))


def _moments(logits, targets, skipped):
    outputs = _new_moments(logits, targets, skipped)
    target, variance, mean = (t.view(-1) for t in outputs)
    acc, vocab, y, skip = mean.dtype, logits.shape[-1], targets.reshape(-1), skipped.reshape(-1)
    if values_readable(logits):
        check_target_range(y.unsqueeze(-1), ~skip, None, vocab)
    rows = as_rows(logits)
    for a, b, flat in row_chunks(rows):
        x = rows[a, b].to(acc)
        average = x.mean(-1, keepdim=True)
        x = x - average  # around the mean: E[x^2] - mean^2 would cancel
        x = x - x.mean(-1, keepdim=True)  # the rest that rounding left
        valid = (y[flat] >= 0) & (y[flat] < vocab)
        picked = x.gather(-1, y[flat].clamp(0, vocab - 1).unsqueeze(-1)).squeeze(-1)
        target[flat] = torch.where(valid, picked, torch.nan).masked_fill_(skip[flat], 0)
        variance[flat] = x.square().mean(-1).masked_fill_(skip[flat], 0)
        mean[flat] = average.squeeze(-1)
    return outputs


def _gradient(logits, targets, skipped, mean, g_target, g_variance):
    out = new_gradient(logits)
    acc, vocab, y, skip = mean.dtype, logits.shape[-1], targets.reshape(-1), skipped.reshape(-1)
    grads = (torch.zeros_like(mean) if g is None else g for g in (g_target, g_variance))
    mean, g_target, g_variance = (t.reshape(-1).to(acc) for t in (mean, *grads))
    rows, rows_of_out = as_rows(logits), as_rows(out)
    for a, b, flat in row_chunks(rows):
        g_t, g_v = g_target[flat].unsqueeze(-1), g_variance[flat].unsqueeze(-1)
        dx = (rows[a, b].to(acc) - mean[flat].unsqueeze(-1)) * (2 * g_v / vocab) - g_t / vocab
        at = y[flat].clamp(0, vocab - 1).unsqueeze(-1)
        dx.scatter_(-1, at, dx.gather(-1, at) + g_t)  # one target a row, so no atomic addition
        idle = skip[flat] | ((g_t == 0) & (g_v == 0)).squeeze(-1)
        rows_of_out[a, b] = dx.masked_fill_(idle.unsqueeze(-1), 0).to(out.dtype)
    return out


_row_moments = differentiable(
    Operator("row_moments(Tensor logits, Tensor targets, Tensor skipped) -> (Tensor, Tensor, Tensor)", _moments, _new_moments),
    Operator(
        "row_moments_backward(Tensor logits, Tensor targets, Tensor skipped, Tensor mean, Tensor? g_target, Tensor? g_variance) -> Tensor",
        run=_gradient,
        fake=lambda logits, *_: new_gradient(logits),
    ),
    outputs=2,
    instead="use rlkern.reference.row_moments",
)


def row_moments(logits: Tensor, targets: Tensor, *, mask: Tensor | None = None, ignore_index: int = -100) -> RowMoments:
    """(target's logit - mean, variance) of rows: [..., V], [...] -> two [...], float32 (float64 for float64).

    Sums run around the mean, in float32. Rows whose target is `ignore_index` or whose mask is 0 give zeros
    and take no gradient. Raises as `rlkern.token_stats`; the targets have one entry a row.
    """
    check_logits(logits)
    targets = check_targets(targets, logits, several=False)
    mask = check_mask(mask, logits)
    skipped = targets == check_ignore_index(ignore_index)
    skipped = skipped if mask is None else skipped | ~mask
    return RowMoments(*_row_moments(logits, targets, skipped))
