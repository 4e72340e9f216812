"""`pair_stats` of two policies' hidden states times their output matrices, a chunk of rows at a time.

The logits of a chunk are float32 also of 16-bit operands: rounded to 16 bits, the logits of two policies that
are close differ by their rounding. The backward computes them again: four products a step become six.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_count, check_target_range, computing_dtype, expect
from ..operator import Operator, differentiable, values_readable
from .divergence import (
    PAIR_GRADIENTS,
    PAIR_OPTIONS,
    PAIR_RESULTS,
    PAIR_ROWS,
    PairOptions,
    PairStats,
    compute_pair,
    exchange_pair,
    new_pair_results,
    pair_options,
    write_pair_gradient,
)
from .projection import Chunks, GradientSums, Head, Rows, autocast, check_matrix, default_chunk_rows, new_gradients

_STATE = 8  # how many options there are before it in the backward's arguments


def _new_results(hidden, weight, bias, other_hidden, other_weight, other_bias, targets, mask, row_temperature, other_row_temperature, _, *options):
    return new_pair_results(hidden, other_hidden, targets, mask, row_temperature, other_row_temperature, *options)


def _chunks(rows: Rows, hidden: Any, head: tuple, vocab: int, chunk_rows: int, *by_row: Any) -> Chunks:
    weight, bias = (None if x is None else x[:vocab] for x in head)
    return Chunks(Head(rows.clean(hidden), weight, bias, computing_dtype(hidden)), chunk_rows, *by_row)  # type: ignore[arg-type]


def _forward(
    hidden, weight, bias, other_hidden, other_weight, other_bias, targets, mask, row_temperature, other_row_temperature, chunk_rows, *options
):  # fmt: skip
    o = PairOptions(*options)
    stats = new_pair_results(hidden, other_hidden, targets, mask, row_temperature, other_row_temperature, *options)
    if stats[0].numel() == 0:
        return stats
    if targets is not None and values_readable(hidden):  # before Rows renumbers the rows
        check_target_range(targets.reshape(-1, 1), None if mask is None else mask.reshape(-1), o.ignore_index, o.vocab)
    rows = Rows(hidden, targets, mask, o.ignore_index, row_temperature, other_row_temperature, other_hidden)
    *by_row, others = rows.others
    results = [rows.room(x) for x in stats]
    own = _chunks(rows, rows.hidden, (weight, bias), o.vocab, chunk_rows, *by_row)
    other = _chunks(rows, others, (other_weight, other_bias), o.vocab, chunk_rows)
    for (part, logits, *of_rows), (_, other_logits) in zip(own, other, strict=True):
        for to, value in zip(results, compute_pair(logits, other_logits, *of_rows, *o), strict=True):
            if to is not None:
                to[part] = value
    for to, value in zip(stats, results, strict=True):
        rows.place(to, value)
    return stats


def _new_gradients(*args):
    return new_gradients(args[:6], args[-1])


def _backward(
    hidden, weight, bias, other_hidden, other_weight, other_bias, targets, mask, row_temperature, other_row_temperature, chunk_rows, *args
):  # fmt: skip
    *args, wanted = args
    o = PairOptions(*args[:_STATE])
    out = new_gradients((hidden, weight, bias, other_hidden, other_weight, other_bias), wanted)
    rows = Rows(hidden, targets, mask, o.ignore_index, row_temperature, other_row_temperature, *args[_STATE:], other_hidden)
    *by_row, others = rows.others
    own = _chunks(rows, rows.hidden, (weight, bias), o.vocab, chunk_rows, *by_row)
    other = _chunks(rows, others, (other_weight, other_bias), o.vocab, chunk_rows)
    sums, other_sums = GradientSums(rows, own.head, out[:3]), GradientSums(rows, other.head, out[3:])
    sums.begin(own.head, slice(0, o.vocab), len(own))
    other_sums.begin(other.head, slice(0, o.vocab), len(other))
    for (part, logits, *of_rows), (_, other_logits) in zip(own, other, strict=True):
        y, kept, row_t, other_row_t, *of_stats = of_rows
        pair = logits, other_logits, y, kept, row_t, other_row_t, *o, *of_stats
        exchanged = exchange_pair(*pair) if other_sums.wanted and of_stats[1] is not None else None
        if sums.wanted:
            d_logits = logits if exchanged is None else torch.empty_like(logits)  # the other's gradient needs both logits
            write_pair_gradient(d_logits, *pair)
            sums.add(part, d_logits)
        if exchanged is not None:
            write_pair_gradient(other_logits, *exchanged)
            other_sums.add(part, other_logits)
        elif other_sums.wanted:
            other_sums.add(part, other_logits.zero_())
    sums.finish()
    other_sums.finish()
    return out


_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor other_hidden, Tensor other_weight, Tensor? other_bias, "
    f"{PAIR_ROWS}, int chunk_rows, {PAIR_OPTIONS}"
)
_linear_pair_stats = differentiable(
    Operator(f"linear_pair_stats({_ARGUMENTS}) -> {PAIR_RESULTS}", _forward, _new_results),
    Operator(
        f"linear_pair_stats_backward({_ARGUMENTS}, {PAIR_GRADIENTS}, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        run=_backward,
        fake=_new_gradients,
    ),
    outputs=4,
    constants=3,
    wrt=6,
    instead="use rlkern.reference.token_divergence of torch.nn.functional.linear(hidden, weight, bias) and of the other's",
)


def _linear_pair(
    hidden: Tensor,
    weight: Tensor,
    other_hidden: Tensor,
    other_weight: Tensor,
    targets: Tensor | None,
    *,
    bias: Tensor | None,
    other_bias: Tensor | None,
    chunk_rows: int | None,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """(divergence, logp, entropy, logsumexp, other_logp, other_entropy, other_logsumexp)"""
    hidden, weight, bias = autocast(hidden, weight, bias)
    other_hidden, other_weight, other_bias = autocast(other_hidden, other_weight, other_bias)
    check_matrix(hidden, weight, bias)
    check_matrix(other_hidden, other_weight, other_bias, "other_")
    expect("other_hidden", other_hidden, "float", "[..., H]", shape=(*hidden.shape[:-1], other_hidden.shape[-1]), like=("hidden", hidden))
    widths = {"weight": weight.shape[0], "other_weight": other_weight.shape[0]}
    *by_row, o = pair_options(hidden, targets, of="hidden", widths=widths, counted="rows", **options)
    other = other_hidden, other_weight, other_bias
    if (hidden.dtype == torch.float64) != (other_hidden.dtype == torch.float64):
        other = tuple(None if x is None else x.to(computing_dtype(hidden)) for x in other)  # type: ignore[assignment]
    if not o.other_grad:
        other = tuple(None if x is None else x.detach() for x in other)  # type: ignore[assignment]
    if chunk_rows is None:
        chunk_rows = default_chunk_rows(hidden, 2 * o.vocab * computing_dtype(hidden).itemsize)
    check_count("chunk_rows", chunk_rows, 1)
    return _linear_pair_stats(hidden, weight, bias, *other, *by_row, chunk_rows, *o)


def linear_token_divergence(
    hidden: Tensor,
    weight: Tensor,
    other_hidden: Tensor,
    other_weight: Tensor,
    *,
    bias: Tensor | None = None,
    other_bias: Tensor | None = None,
    kind: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    other_temperature: float | Tensor | None = None,
    mask: Tensor | None = None,
    vocab: int | None = None,
    other_grad: bool = False,
    chunk_rows: int | None = None,
    group=None,
) -> Tensor:
    """`token_divergence` of `hidden @ weight.T + bias` and the same of the other, without all logits at once.

    For distillation from hidden states, also of a teacher that ships them. Extra memory is one chunk of both
    policies' logits, for any number of rows. The backward computes the logits again, and sums the gradients
    of weight and bias in float32 if these are wanted.

    Args:
        hidden: [..., H] float32, bfloat16, float16 or float64. torch.autocast casts it, with all others.
        weight: [V, H], the lm_head's. bias: [V]. Dtype and device of hidden. All three may require grad.
        other_hidden, other_weight, other_bias: the teacher's or reference's, [..., H'], [V', H'] and [V'],
            of one dtype, on the device of hidden. H' may differ from H, and V' from V with vocab=.
        other_grad: whether they take a gradient too; not for "cross_entropy". Without it they are used
            detached.
        chunk_rows: rows at a time; None takes 64 MiB of logits on a CPU, 512 MiB on a GPU.
        kind, beta, temperature, other_temperature, mask, vocab, group: as in `token_divergence`, for the
            rows of hidden. On a CPU masked rows are left out of the products too.

    Returns:
        [...] as `token_divergence`. The logits are float32 (float64), also of 16-bit operands, where a
        model's own head would round them. On a GPU their gradient is rounded to hidden's dtype for the
        products. A CPU, and torch before 2.8, has no product of 16-bit operands with a float32 result: there
        the operands are cast.

    Raises:
        TypeError, ValueError: as `token_divergence`; for weights of another shape, dtype or device.
    """
    return _linear_pair(
        hidden,
        weight,
        other_hidden,
        other_weight,
        None,
        bias=bias,
        other_bias=other_bias,
        chunk_rows=chunk_rows,
        kind=kind,
        beta=beta,
        temperature=temperature,
        other_temperature=other_temperature,
        mask=mask,
        vocab=vocab,
        other_grad=other_grad,
        group=group,
        ignore_index=-100,
        with_stats=False,
    )[0]  # type: ignore[return-value]


def linear_pair_stats(
    hidden: Tensor,
    weight: Tensor,
    other_hidden: Tensor,
    other_weight: Tensor,
    targets: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    other_bias: Tensor | None = None,
    kind: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    other_temperature: float | Tensor | None = None,
    mask: Tensor | None = None,
    vocab: int | None = None,
    other_grad: bool = False,
    chunk_rows: int | None = None,
    group=None,
    ignore_index: int = -100,
) -> PairStats:
    """`pair_stats` from hidden states, as `linear_token_divergence` is `token_divergence` from them.

    Args:
        targets, ignore_index: as in `pair_stats`.
        others: as in `linear_token_divergence`.

    Returns:
        PairStats as of `pair_stats`, with its gradients.

    Raises:
        TypeError, ValueError, IndexError: as `linear_token_divergence` and `pair_stats`.
    """
    divergence, logp, entropy, logsumexp, other_logp, other_entropy, other_logsumexp = _linear_pair(
        hidden,
        weight,
        other_hidden,
        other_weight,
        targets,
        bias=bias,
        other_bias=other_bias,
        chunk_rows=chunk_rows,
        kind=kind,
        beta=beta,
        temperature=temperature,
        other_temperature=other_temperature,
        mask=mask,
        vocab=vocab,
        other_grad=other_grad,
        group=group,
        ignore_index=ignore_index,
        with_stats=True,
    )
    return PairStats(divergence, logp, other_logp, entropy, other_entropy, logsumexp, other_logsumexp)  # type: ignore[arg-type]
