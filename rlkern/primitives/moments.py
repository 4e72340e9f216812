"""Mean and variance of rows of logits in one read, for losses without softmax."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .. import backends
from ..backends.gradient_memory import new_gradient
from ..checks import check_ignore_index, check_logits, check_mask, check_target_range, check_targets, computing_dtype
from ..layout import as_rows
from ..operator import Operator, differentiable, values_readable


class RowMoments(NamedTuple):
    centred_target: Tensor  # logit of the target minus the mean
    variance: Tensor  # biased: sum (x - mean)^2 / V


def _new_moments(logits, targets, mask, ignore_index):
    """(centred target, variance, mean as the sum of two numbers)"""
    shapes = (targets.shape, targets.shape, (*targets.shape, 2))
    return tuple(logits.new_empty(shape, dtype=computing_dtype(logits)) for shape in shapes)


def _for_backend(targets, mask):
    return targets.contiguous().view(-1, 1), None if mask is None else mask.contiguous().view(-1)


def _moments(logits, targets, mask, ignore_index):
    out = _new_moments(logits, targets, mask, ignore_index)
    if targets.numel() == 0:
        return out
    backend, (y, counted) = backends.select(logits.device), _for_backend(targets, mask)
    if not backend.CHECKS_TARGETS and values_readable(logits):
        check_target_range(y, counted, ignore_index, logits.shape[-1], may_be_elsewhere=False)
    backend.row_moments_forward(as_rows(logits), y, counted, ignore_index, out)
    return out


def _gradient(logits, targets, mask, ignore_index, mean, *grads):
    out = new_gradient(logits)
    if targets.numel():
        y, counted = _for_backend(targets, mask)
        upstream = [None if g is None else g.to(mean.dtype).contiguous() for g in grads]
        backends.select(logits.device).row_moments_backward(as_rows(logits), y, counted, ignore_index, mean, upstream, as_rows(out))
    return out


_ARGUMENTS = "Tensor logits, Tensor targets, Tensor? mask, int ignore_index"
_row_moments = differentiable(
    Operator(f"row_moments({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _moments, _new_moments),
    Operator(
        f"row_moments_backward({_ARGUMENTS}, Tensor mean, Tensor? g_target, Tensor? g_variance) -> Tensor",
        run=_gradient,
        fake=lambda logits, *_: new_gradient(logits),
    ),
    outputs=2,
    instead="use rlkern.reference.row_moments",
)


def row_moments(logits: Tensor, targets: Tensor, *, mask: Tensor | None = None, ignore_index: int = -100) -> RowMoments:
    """(target's logit - mean, variance) of rows: [..., V], [...] -> two [...], float32 (float64 for float64).

    Sums run around a mean, in float32: a row far from zero keeps its variance. A row with an infinite logit
    is NaN. Rows whose target is `ignore_index` or whose mask is 0 are not read: they give zeros and take no
    gradient. Raises as `rlkern.token_stats`; the targets have one entry a row.
    """
    check_logits(logits)
    targets = check_targets(targets, logits, several=False)
    mask = check_mask(mask, logits)
    return RowMoments(*_row_moments(logits, targets, mask, check_ignore_index(ignore_index)))
