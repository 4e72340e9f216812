"""`token_stats` of hidden states times the output matrix. The logits exist a chunk of rows at a time.

The backward computes them again, so two products of a step become four: the logits twice, and two for their
gradient. The library computes the products. Nothing of size [N, V] stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_count, check_flags, check_logits, check_target_range, computing_dtype, expect
from ..layout import counted_rows
from ..operator import Operator, differentiable, values_readable
from .token_stats import (
    GRADIENTS,
    OPTIONS,
    RESULTS,
    TENSORS,
    Options,
    Results,
    TokenStats,
    compute,
    mark_kept,
    new_results,
    public_stats,
    row_options,
    write_gradient,
)


def _default_chunk_rows(hidden: Tensor, vocab: int) -> int:
    """Enough rows to keep the product busy: a GPU must read the whole matrix for each chunk."""
    return max(1, (64 << 20 if hidden.device.type == "cpu" else 512 << 20) // (vocab * hidden.element_size()))


class _Chunks:
    """The rows in pieces. Their logits are always in the same memory."""

    def __init__(self, hidden, weight, bias, chunk_rows, *by_row):
        self.hidden, self.weight, self.bias, self.by_row = hidden, weight, bias, by_row
        self.step = min(chunk_rows, max(1, hidden.shape[0]))
        self.buffer = hidden.new_empty(self.step, weight.shape[0])

    def __iter__(self):
        """Yields (rows, logits of these rows, *these rows of every other tensor)."""
        for start in range(0, self.hidden.shape[0], self.step):
            rows = slice(start, start + self.step)
            hidden = self.hidden[rows]
            logits = self.buffer[: hidden.shape[0]]
            if self.bias is None:
                torch.mm(hidden, self.weight.t(), out=logits)
            else:
                torch.addmm(self.bias, hidden, self.weight.t(), out=logits)
            yield rows, logits, *(None if x is None else x[rows] for x in self.by_row)


def _indices(counted: Tensor | None) -> Tensor | None:
    """The rows that products need; None: all, as on a GPU, where the host would wait."""
    if counted is None or not values_readable(counted) or counted.all():
        return None
    return counted.nonzero().squeeze(-1)


class _Rows:
    """Tensors by row, leading dimensions merged. On a CPU only counted rows, for smaller products."""

    def __init__(self, hidden, targets, mask, ignore_index, *others):
        self.lead = hidden.shape[:-1]
        hidden, targets, mask, *others = (self.flat(x) for x in (hidden, targets, mask, *others))
        self.counts = counted_rows(targets, mask, ignore_index, 1)
        self.counted = _indices(self.counts)
        picked = (hidden, targets, mask, *others)
        self.hidden, *self.others = (x if x is None or self.counted is None else x[self.counted] for x in picked)

    def flat(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x.reshape(self.lead.numel(), *x.shape[len(self.lead) :])

    def room(self, to: Tensor | None) -> Tensor | None:
        """Where to write the rows of a contiguous tensor, before `place`."""
        flat = self.flat(to)
        return flat if flat is None or self.counted is None else flat.new_empty((len(self.counted), *flat.shape[1:]))

    def place(self, to: Tensor | None, value: Tensor | None) -> None:
        """Puts what was written where it belongs, and 0 into the rows that do not count."""
        flat = self.flat(to)
        if flat is not None and value is not None and self.counted is not None:
            flat.zero_()[self.counted] = value


def _new_stats(hidden, weight, bias, targets, mask, row_temperature, chunk_rows, *options) -> Results:
    return new_results(hidden, targets, Options(*options))


def _forward(hidden, weight, bias, targets, mask, row_temperature, chunk_rows, *options) -> Results:
    o = Options(*options)
    stats = new_results(hidden, targets, o)
    if stats.logsumexp.numel() == 0:
        return stats
    if targets is not None and values_readable(hidden):  # before _Rows renumbers the rows
        y = targets.reshape(stats.logsumexp.numel(), -1)
        check_target_range(y, None if mask is None else mask.reshape(-1), o.ignore_index, weight.shape[0])
    rows = _Rows(hidden, targets, mask, o.ignore_index, row_temperature)
    results = [rows.room(x) for x in stats]
    for part, logits, *of_rows in _Chunks(rows.hidden, weight, bias, chunk_rows, *rows.others):
        for to, value in zip(results, compute(logits, *of_rows, *o), strict=True):
            if to is not None and value is not None:
                to[part] = value
    for to, value in zip(stats, results, strict=True):
        rows.place(to, value)
    mark_kept(stats)
    return stats


def _new_gradients(hidden, weight, bias, *others):
    *_, wanted = others
    parts = zip((hidden, weight, bias), wanted, strict=True)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) if want else None for x, want in parts)


def _backward(
    hidden, weight, bias, targets, mask, row_temperature, chunk_rows,
    temperature, ignore_index, kept_kind, log_kept, with_sum_sq, with_entropy,
    state, g_logp, g_entropy, g_logsumexp, g_sum_sq_prob, g_kept_logmass, wanted,
):  # fmt: skip
    o = Options(temperature, ignore_index, kept_kind, log_kept, with_sum_sq, with_entropy)
    by_row = (state, g_logp, g_entropy, g_logsumexp, g_sum_sq_prob, g_kept_logmass)
    d_hidden, d_weight, d_bias = out = _new_gradients(hidden, weight, bias, wanted)
    acc = computing_dtype(hidden)
    rows = _Rows(hidden, targets, mask, ignore_index, row_temperature, *by_row)
    hidden = rows.hidden
    if rows.counted is None and rows.counts is not None:
        # A row that does not count meets a gradient of 0, but may hold NaN.
        hidden = hidden.masked_fill(~rows.counts.unsqueeze(-1), 0)
    d_rows = rows.room(d_hidden)
    weight_sum = None if d_weight is None else torch.zeros_like(weight, dtype=acc)
    bias_sum = None if d_bias is None else torch.zeros_like(bias, dtype=acc)
    for part, logits, y, kept, row_t, *of_rows in _Chunks(hidden, weight, bias, chunk_rows, *rows.others):
        write_gradient(logits, logits, y, kept, row_t, *o, *of_rows)
        if d_rows is not None:
            torch.mm(logits, weight, out=d_rows[part])
        if weight_sum is not None and weight_sum.dtype == logits.dtype:
            weight_sum.addmm_(logits.t(), hidden[part])
        elif weight_sum is not None:
            weight_sum += torch.mm(logits.t(), hidden[part])
        if bias_sum is not None:
            bias_sum += logits.sum(0, dtype=acc)
    rows.place(d_hidden, d_rows)
    for to, value in ((d_weight, weight_sum), (d_bias, bias_sum)):
        if to is not None:
            to.copy_(value)
    return out


_ARGUMENTS = f"Tensor hidden, Tensor weight, Tensor? bias, {TENSORS}, int chunk_rows, {OPTIONS}"
_linear_token_stats = differentiable(
    Operator(
        f"linear_token_stats({_ARGUMENTS}) -> {RESULTS}",
        run=_forward,
        fake=_new_stats,
    ),
    Operator(
        f"linear_token_stats_backward({_ARGUMENTS}, {GRADIENTS}, bool[] wanted) -> (Tensor, Tensor, Tensor)",
        run=_backward,
        fake=_new_gradients,
    ),
    outputs=5,
    constants=1,
    wrt=3,
    instead="use rlkern.reference.token_stats of torch.nn.functional.linear(hidden, weight, bias), with targets [..., K]",
)


def _check_matrix(hidden: Any, weight: Any, bias: Any) -> None:
    check_logits(hidden, "hidden")
    for name, x in (("weight", weight), ("bias", bias)):
        if name == "bias" and x is None:
            continue
        if isinstance(x, Tensor) and x.dtype != hidden.dtype:
            raise TypeError(f"{name} must have the dtype of hidden {hidden.dtype} (or run under torch.autocast), got {x.dtype}")
        expect(name, x, "float", "[...]")
        if x.device != hidden.device:
            raise ValueError(f"{name} must be on the device of hidden {hidden.device}, got {x.device}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(f"weight must be [V, {hidden.shape[-1]}] with V >= 1 for hidden {tuple(hidden.shape)}, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}] for weight {tuple(weight.shape)}, got {tuple(bias.shape)}")


def _autocast(x: Any, device: str) -> Any:
    castable = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(device)) if castable else x


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_rows: int | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    min_p: float | None = None,
    min_prob: float | None = None,
    with_sum_sq: bool = False,
    with_entropy: bool = True,
    with_tail: bool = False,
    group=None,
) -> TokenStats:
    """`token_stats` of `hidden @ weight.T + bias`, without all logits at once.

    Extra memory is one chunk of logits, for any number of rows. The backward adds float32 sums of the
    gradients of weight and bias if these are wanted, and computes the logits a second time. Use `token_stats`
    where the logits fit.

    Args:
        hidden: [..., H] float32, bfloat16, float16 or float64. torch.autocast casts it, with weight and bias.
        weight: [V, H], the lm_head's. bias: [V]. Dtype and device of hidden. All three may require grad.
        chunk_rows: rows at a time; None takes 64 MiB of logits on a CPU, 512 MiB on a GPU.
        targets, mask, temperature, ignore_index, min_p, min_prob, with_sum_sq, with_entropy, with_tail,
            group: as in `token_stats`, for the rows of hidden. On a CPU masked rows are left out of the
            products too.

    Returns:
        TokenStats as of `token_stats`, with its gradients. Logits are rounded to hidden's dtype, like those
        of a model's own head. Gradients of weight and bias are summed over the chunks in float32.

    Raises:
        TypeError, ValueError, IndexError: as `token_stats`; for weights of another shape, dtype or device.
    """
    if group is not None:
        raise ValueError("group: vocabulary-parallel weights are not supported in this version, expected None")
    if targets is None:
        raise TypeError("targets must be an integer tensor, got None")
    if isinstance(hidden, Tensor) and not hidden.is_meta and torch.is_autocast_enabled(hidden.device.type):
        hidden, weight, bias = (_autocast(x, hidden.device.type) for x in (hidden, weight, bias))
    _check_matrix(hidden, weight, bias)
    check_flags(with_sum_sq=with_sum_sq, with_entropy=with_entropy, with_tail=with_tail)
    y, counted, row_temperature, o = row_options(
        hidden,
        targets,
        of="hidden",
        mask=mask,
        temperature=temperature,
        ignore_index=ignore_index,
        min_p=min_p,
        min_prob=min_prob,
        with_sum_sq=with_sum_sq,
        with_entropy=with_entropy,
        with_tail=with_tail,
    )
    if chunk_rows is None:
        chunk_rows = _default_chunk_rows(hidden, weight.shape[0])
    check_count("chunk_rows", chunk_rows, 1)
    return public_stats(o, *_linear_token_stats(hidden, weight, bias, y, counted, row_temperature, chunk_rows, *o))
