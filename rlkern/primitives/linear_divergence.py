"""`pair_stats` of two policies' hidden states times their output matrices, without all logits at once.

The logits are float32 also of 16-bit operands: rounded to 16 bits, the logits of two policies that are close
differ by their rounding. The backward writes the gradient over those that were kept. It computes the others
again, a chunk of rows at a time.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..checks import check_count, check_target_range, computing_dtype, expect
from ..operator import Operator, differentiable, values_readable
from .divergence import PairStats, pair_options
from .pair_rows import (
    N_OPTIONS,
    PAIR_GRADIENTS,
    PAIR_OPTIONS,
    PAIR_RESULTS,
    PAIR_ROWS,
    PairOptions,
    compute_pair,
    exchange_pair,
    new_pair_results,
    write_pair_gradient,
)
from .plans import check_workspace
from .projection import GradientSums, Head, Rows, autocast, blocks, check_matrix, default_chunk_rows, new_gradients


def _new_results(hidden, weight, bias, other_hidden, other_weight, other_bias, targets, mask, row_temperature, other_row_temperature, *args):
    keep_rows, _, *options = args
    logits = None
    if keep_rows > 0:
        rows = min(hidden.shape[:-1].numel(), keep_rows)
        logits = hidden.new_empty(2, rows, PairOptions(*options).vocab, dtype=computing_dtype(hidden))
    return (*new_pair_results(hidden, other_hidden, targets, mask, row_temperature, other_row_temperature, *options), logits)


def _head(rows: Rows, hidden: Any, weight: Tensor, bias: Tensor | None, vocab: int) -> Head:
    return Head(rows.clean(hidden), weight[:vocab], None if bias is None else bias[:vocab], computing_dtype(hidden)).whole()


def _forward(hidden, weight, bias, other_hidden, other_weight, other_bias, targets, mask, *args):
    *stats, kept_logits = _new_results(hidden, weight, bias, other_hidden, other_weight, other_bias, targets, mask, *args)
    row_temperature, other_row_temperature, _, chunk_rows, *options = args
    o = PairOptions(*options)
    if stats[0].numel() == 0:
        return (*stats, kept_logits)
    if targets is not None and values_readable(hidden):  # before Rows renumbers the rows
        check_target_range(targets.reshape(-1, 1), None if mask is None else mask.reshape(-1), o.ignore_index, o.vocab)
    rows = Rows(hidden, targets, mask, o.ignore_index, row_temperature, other_row_temperature, other_hidden)
    *by_row, others = rows.others
    results = [rows.room(x) for x in stats]
    heads = _head(rows, rows.hidden, weight, bias, o.vocab), _head(rows, others, other_weight, other_bias, o.vocab)
    n = rows.hidden.shape[0]
    kept = 0 if kept_logits is None else min(n, kept_logits.shape[1])  # of the rows that count there may be fewer
    buffers = [head.new_logits(min(chunk_rows, n - kept), o.vocab) for head in heads]
    for part in (*blocks(0, kept, 0), *blocks(kept, n, chunk_rows)):
        memory = kept_logits[:, part] if part.stop <= kept else buffers
        logits = [head.logits(part, x) for head, x in zip(heads, memory, strict=True)]
        computed = compute_pair(*logits, *(None if x is None else x[part] for x in by_row), *o)
        for to, value in zip(results, computed, strict=True):
            if to is not None:
                to[part] = value
    for to, value in zip(stats, results, strict=True):
        rows.place(to, value)
    return (*stats, kept_logits)


def _new_gradients(*args):
    return new_gradients(args[:6], args[-1])


def _backward(overwrite, hidden, weight, bias, other_hidden, other_weight, other_bias, targets, mask, *args):
    row_temperature, other_row_temperature, _, chunk_rows, *args = args
    o, (state, kept_logits, *grads, wanted) = PairOptions(*args[:N_OPTIONS]), args[N_OPTIONS:]
    out = new_gradients((hidden, weight, bias, other_hidden, other_weight, other_bias), wanted)
    rows = Rows(hidden, targets, mask, o.ignore_index, row_temperature, other_row_temperature, state, *grads, other_hidden)
    *by_row, others = rows.others
    heads = _head(rows, rows.hidden, weight, bias, o.vocab), _head(rows, others, other_weight, other_bias, o.vocab)
    n = rows.hidden.shape[0]
    kept = 0 if kept_logits is None else min(n, kept_logits.shape[1])
    buffers = [head.new_logits(min(chunk_rows, n - kept), o.vocab) for head in heads]
    sums, other_sums = GradientSums(rows, heads[0], out[:3]), GradientSums(rows, heads[1], out[3:])
    # Kept logits are one piece, unless a copy of all of it would be made: of a gradient that is cast for the
    # products, or beside logits that the other gradient needs too.
    copies = sums.wanted and other_sums.wanted or any(head.dtype != head.hidden.dtype for head in heads)
    pieces = [*blocks(0, kept, chunk_rows if copies else 0), *blocks(kept, n, chunk_rows)]
    sums.begin(heads[0], slice(0, o.vocab), len(pieces))
    other_sums.begin(heads[1], slice(0, o.vocab), len(pieces))
    for part in pieces:
        if part.stop <= kept:
            logits, other_logits = kept_logits[:, part]
        else:
            logits, other_logits = (head.logits(part, x) for head, x in zip(heads, buffers, strict=True))
        in_place = overwrite or part.stop > kept
        pair = logits, other_logits, *(None if x is None else x[part] for x in by_row[:4]), *o, *(None if x is None else x[part] for x in by_row[4:])
        exchanged = exchange_pair(*pair) if other_sums.wanted and grads[0] is not None else None
        if sums.wanted:
            d_logits = logits if in_place and exchanged is None else torch.empty_like(logits)  # the other's gradient needs both logits
            write_pair_gradient(d_logits, *pair)
            sums.add(part, d_logits)
        if other_sums.wanted:
            d_logits = other_logits if in_place else torch.empty_like(other_logits)
            if exchanged is None:
                d_logits.zero_()
            else:
                write_pair_gradient(d_logits, *exchanged)
            other_sums.add(part, d_logits)
    sums.finish()
    other_sums.finish()
    return out


_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor other_hidden, Tensor other_weight, Tensor? other_bias, "
    f"{PAIR_ROWS}, int keep_rows, int chunk_rows, {PAIR_OPTIONS}"
)
_SAVED = PAIR_GRADIENTS.replace("Tensor state, ", "Tensor state, Tensor? logits, ")
_GRADIENTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
_linear_pair_stats = differentiable(
    Operator(f"linear_pair_stats({_ARGUMENTS}) -> {PAIR_RESULTS[:-1]}, Tensor)", _forward, _new_results),
    Operator(
        f"linear_pair_stats_backward({_ARGUMENTS}, {_SAVED}, bool[] wanted) -> {_GRADIENTS}",
        run=partial(_backward, False),
        fake=_new_gradients,
    ),
    outputs=4,
    constants=3,
    wrt=6,
    instead="use rlkern.reference.token_divergence of torch.nn.functional.linear(hidden, weight, bias) and of the other's",
    consume=Operator(
        f"linear_pair_stats_backward_({_ARGUMENTS}, {_SAVED.replace('Tensor? logits', 'Tensor(a!)? logits')}, bool[] wanted) -> {_GRADIENTS}",
        run=partial(_backward, True),
        fake=_new_gradients,
    ),
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
    workspace: int | None,
    chunk_rows: int | None,
    group: Any,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """(divergence, logp, entropy, logsumexp, other_logp, other_entropy, other_logsumexp)"""
    if group is not None:
        raise ValueError("group: not of hidden states in this version, expected None; pair_stats and token_divergence take one with the logits")
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
    workspace, bytes_a_row, keep_rows = check_workspace(workspace, hidden.device.type), 2 * o.vocab * computing_dtype(hidden).itemsize, 0
    if chunk_rows is None:
        chunk_rows = default_chunk_rows(hidden, bytes_a_row)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias, *other)):
            keep_rows = workspace // bytes_a_row
    check_count("chunk_rows", chunk_rows, 1)
    return _linear_pair_stats(hidden, weight, bias, *other, *by_row, keep_rows, chunk_rows, *o)


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
    logit_scale: float = 1.0,
    softcap: float | None = None,
    other_logit_scale: float | None = None,
    other_softcap: float | None = None,
    mask: Tensor | None = None,
    vocab: int | None = None,
    other_grad: bool = False,
    workspace: int | None = None,
    chunk_rows: int | None = None,
    group=None,
) -> Tensor:
    """`token_divergence` of `hidden @ weight.T + bias` and the same of the other, without all logits at once.

    For distillation from hidden states, also of a teacher that ships them. Both policies' logits of as many
    rows as `workspace` holds are kept for the backward, which writes the gradient over them. Forward and
    backward are then four products of 2 N H V operations, three if weight is frozen, six with other_grad.
    The logits of other rows are computed a second time: two products more. Without gradients nothing is kept.
    A second backward (retain_graph=True) computes all of them again.

    Args:
        hidden: [..., H] float32, bfloat16, float16 or float64. torch.autocast casts it, with all others.
        weight: [V, H], the lm_head's. bias: [V]. Dtype and device of hidden. All three may require grad.
        other_hidden, other_weight, other_bias: the teacher's or reference's, [..., H'], [V', H'] and [V'],
            of one dtype, on the device of hidden. H' may differ from H, and V' from V with vocab=.
        other_grad: whether they take a gradient too; not for "cross_entropy". Without it they are used
            detached.
        workspace: bytes of logits to keep; None takes 1 GiB, on a CPU 256 MiB. Beyond it comes a chunk of the
            other rows' logits: 512 MiB, on a CPU 64 MiB.
        chunk_rows: rows at a time instead: nothing is kept, and gradients of weight and bias are summed over
            the chunks in float32.
        kind, beta, temperature, other_temperature, logit_scale, softcap, other_logit_scale, other_softcap,
            mask, vocab: as in `token_divergence`, for the rows of hidden. On a CPU masked rows are
            left out of the products too.

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
        workspace=workspace,
        chunk_rows=chunk_rows,
        kind=kind,
        beta=beta,
        temperature=temperature,
        other_temperature=other_temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        other_logit_scale=other_logit_scale,
        other_softcap=other_softcap,
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
    logit_scale: float = 1.0,
    softcap: float | None = None,
    other_logit_scale: float | None = None,
    other_softcap: float | None = None,
    mask: Tensor | None = None,
    vocab: int | None = None,
    other_grad: bool = False,
    workspace: int | None = None,
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
        workspace=workspace,
        chunk_rows=chunk_rows,
        kind=kind,
        beta=beta,
        temperature=temperature,
        other_temperature=other_temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        other_logit_scale=other_logit_scale,
        other_softcap=other_softcap,
        mask=mask,
        vocab=vocab,
        other_grad=other_grad,
        group=group,
        ignore_index=ignore_index,
        with_stats=True,
    )
    return PairStats(divergence, logp, other_logp, entropy, other_entropy, logsumexp, other_logsumexp)  # type: ignore[arg-type]
