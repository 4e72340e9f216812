"""Losses by row of hidden states times the output matrix, whose gradients are complete in the forward.

A token-level loss knows a row's gradient as soon as it knows that row's statistics. So a chunk of logits is
made once: statistics, slopes of the loss, the gradient written over the logits, and its products. That is
three products of the head, or two if the matrix is frozen. A loss that comes later takes one more, or keeps
the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_target_range, computing_dtype, shown
from ..operator import once, values_readable
from .projection import Chunks, GradientSums, Head, Rows, gathering, new_gradients
from .row_stats import Options, Results, TokenStats, compute, mark_kept, new_results, public_stats, write_gradient

_INSTEAD = "use linear_token_stats and the loss on what it returns"
_DIFFERENTIABLE = 5  # of Results, the first


@dataclass(frozen=True)
class RowStats:
    """Statistics of some rows [n], see `TokenStats`, which carry gradients. `index` says which of all rows
    [N] these are, as in `advantages.flatten()[rows.index]`."""

    logp: Tensor
    entropy: Tensor | None
    logsumexp: Tensor
    sum_sq_prob: Tensor | None
    kept_logmass: Tensor | None
    target_kept: Tensor | None
    tail_logmass: Tensor | None
    index: slice | Tensor

    @classmethod
    def of(cls, stats: TokenStats, index: slice | Tensor) -> RowStats:
        return cls(*stats[:7], index)  # type: ignore[call-arg]  # without what keep= adds


class KnownLoss(NamedTuple):
    """A loss of rows, and how it goes through the head."""

    of_rows: Callable[[RowStats], Tensor]  # 0-d
    of_all: Callable[[TokenStats], Tensor] | None  # the value from the statistics of all rows; None: the sum over of_rows
    expected: float | Tensor  # 0-d; what the backward is expected to be called with
    chunk_rows: int
    dtype: torch.dtype  # of the logits
    num_valid: int | None
    skips: bool  # whether rows that do not count may be left out
    gathered: Callable[[], Any] | None


def known_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets, mask, row_temperature, o: Options, loss: KnownLoss) -> tuple:
    """(loss, statistics of all rows); the loss has its gradients by hidden, weight and bias."""
    value, *results = _Known.apply(hidden, weight, bias, targets, mask, row_temperature, o, loss)
    return value, public_stats(o, *results)


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        *tensors, o, loss = args
        value, stats, gradients = _run(*tensors, o, loss, ctx.needs_input_grad[:3])
        ctx.save_for_backward(*tensors)
        ctx.how, ctx.gradients = (o, loss), gradients
        shown_stats = stats[:-1]  # without state
        ctx.mark_non_differentiable(*(x for x in shown_stats if x is not None))
        ctx.set_materialize_grads(False)
        return value, *shown_stats

    @staticmethod
    def backward(ctx, g, *_):
        if g is None:
            return (None,) * 8
        with torch.no_grad():
            gradients, ctx.gradients = ctx.gradients, None
            if gradients is None:  # a second time: the first one's belong to whoever got them
                loss = ctx.how[-1]
                with gathering(loss.gathered):
                    _, _, gradients = _run(*ctx.saved_tensors, *ctx.how, ctx.needs_input_grad[:3])
            _rescale(gradients, g, ctx.how[-1].expected)
        if torch.is_grad_enabled():  # create_graph=True
            gradients = tuple(None if x is None else once(x, of, _INSTEAD) for x, of in zip(gradients, ctx.saved_tensors, strict=False))
        return (*gradients, None, None, None, None, None)


def _rescale(gradients, g: Tensor, expected: float | Tensor) -> None:
    """Times g / expected, without waiting for a device to say that it is 1."""
    factor = g / expected
    if values_readable(factor) and factor == 1:
        return
    for x in gradients:
        if x is not None:
            x.mul_(factor)


def _run(
    hidden, weight, bias, targets, mask, row_temperature, o: Options, loss: KnownLoss, wanted
) -> tuple[Tensor, Results, tuple[Tensor | None, ...]]:
    """(loss, statistics, gradients by hidden, weight and bias)"""
    stats = new_results(hidden, targets, o)
    gradients = new_gradients((hidden, weight, bias), wanted)
    n = stats.logsumexp.numel()
    if targets is not None and n and values_readable(hidden):  # before Rows renumbers the rows
        check_target_range(targets.reshape(n, -1), None if mask is None else mask.reshape(-1), o.ignore_index, weight.shape[0])
    rows = Rows(hidden, targets, mask, o.ignore_index, row_temperature, num_valid=loss.num_valid, leaves_out=loss.skips)
    results = [rows.room(x) for x in stats]
    chunks = Chunks(Head(rows.clean(rows.hidden), weight, bias, loss.dtype), loss.chunk_rows, *rows.others)
    sums = GradientSums(rows, chunks.head, gradients)
    sums.begin(chunks.head, slice(0, weight.shape[0]), len(chunks))
    sum_of_values = hidden.new_zeros((), dtype=computing_dtype(hidden))
    for part, logits, y, counted, row_t in chunks:
        computed = compute(logits, y, counted, row_t, *o)
        for to, value in zip(results, computed, strict=True):
            if to is not None and value is not None:
                to[part] = value
        value, slopes = _slopes(computed, o, loss, rows.index(part))
        sum_of_values += value
        write_gradient(logits, logits, y, counted, row_t, *o, computed.state, *slopes)
        sums.add(part, logits)
    sums.finish()
    for to, value in zip(stats, results, strict=True):
        rows.place(to, value)
    mark_kept(stats)
    if loss.of_all is not None:
        sum_of_values.copy_(loss.of_all(public_stats(o, *stats[:-1])))
    return sum_of_values, stats, gradients


def check_sum(value: Any) -> None:
    """What a caller's loss returns is a 0-d float tensor."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        given = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else shown(value)
        raise TypeError(f"loss must return a float tensor, the sum over the rows it is given, got {given}")
    if value.dim():
        raise ValueError(f"loss must return the sum over the rows it is given, a 0-d tensor, got shape {tuple(value.shape)}")


def _check_gradients(value: Tensor, rows: list[Tensor]) -> None:
    """ValueError if the loss has a gradient by anything but its rows, which would be lost."""
    seen, todo = set(), [torch.autograd.graph.get_gradient_edge(value).node]
    while todo:
        node = todo.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None and not any(leaf is x for x in rows):
            raise ValueError(f"loss may take gradients by its rows alone, got one by another tensor {tuple(leaf.shape)}: detach it")
        seen.add(node)
        todo += [of for of, _ in node.next_functions if of is not None and of not in seen]


def _slopes(computed: Results, o: Options, loss: KnownLoss, index: slice | Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """The loss of some rows, and its gradient by each of their statistics."""
    with torch.enable_grad():
        leaves = [None if x is None else x.detach().requires_grad_() for x in computed[:_DIFFERENTIABLE]]
        results: Any = (*leaves, computed.target_kept)
        value = loss.of_rows(RowStats.of(public_stats(o, *results), index))
        check_sum(value)
        if not value.requires_grad:
            return value, [None] * _DIFFERENTIABLE
        given = [x for x in leaves if x is not None]
        if loss.of_all is None:
            _check_gradients(value, given)
        expected = torch.ones_like(value).mul_(loss.expected)  # to copy a number to the device would wait for it
        found = iter(torch.autograd.grad(value, given, expected, allow_unused=True))
    return value.detach(), [None if x is None else next(found) for x in leaves]
