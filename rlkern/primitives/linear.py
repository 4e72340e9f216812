"""`token_stats` of hidden states times the output matrix, without all logits at once.

The backward writes the gradient over the logits that were kept. It computes the others again: by tiles of the
matrix, whose gradient is then complete a tile at a time, or by chunks of whole rows. plans.py says which.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..backends.contract import KeptKind
from ..checks import check_count, check_flags, check_target_range, computing_dtype
from ..operator import Operator, differentiable, values_readable
from .parts import IGNORED, finish, merge, part_of, targets_in_part
from .plans import check_logits_dtype, check_workspace, cut
from .projection import GradientSums, Head, Rows, autocast, blocks, check_matrix, new_gradients
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


def _logits_dtype(hidden: Tensor, wide: bool) -> torch.dtype:
    return computing_dtype(hidden) if wide else hidden.dtype


def _new_stats(hidden, weight, bias, targets, mask, row_temperature, keep_rows, tile, block_rows, wide, *options) -> tuple:
    kept = None
    if keep_rows > 0:
        kept = hidden.new_empty(min(hidden.shape[:-1].numel(), keep_rows), weight.shape[0], dtype=_logits_dtype(hidden, wide))
    return (*new_results(hidden, targets, Options(*options)), kept)


def _of(rows: slice, *by_row: Tensor | None) -> list[Any]:
    return [None if x is None else x[rows] for x in by_row]


def _tiles(head: Head, tile: int) -> Iterator[tuple[Head, slice]]:
    """All columns, `tile` at a time; 0: at once."""
    vocab = len(head.weight)
    for columns in blocks(0, vocab, tile or vocab):
        yield head.columns(columns), columns


def _in_tiles(head: Head, tile: int, o: Options, rows: slice, buffer: Tensor, targets, mask, row_temperature) -> Results:
    """The statistics of some rows from their parts."""
    in_part = o._replace(ignore_index=IGNORED)
    parts = []
    for of_tile, columns in _tiles(head, tile):
        logits = of_tile.logits(rows, buffer)
        y = targets_in_part(targets, columns.start, columns.stop, len(head.weight), o.ignore_index)
        parts.append(part_of(compute(logits, y, mask, row_temperature, *in_part), y))
    temperature = o.temperature if row_temperature is None else row_temperature
    return finish(merge(torch.stack(parts), temperature), targets, mask, temperature, o)


def _forward(hidden, weight, bias, targets, mask, row_temperature, keep_rows, tile, block_rows, wide, *options) -> tuple:
    o = Options(*options)
    *new, logits = _new_stats(hidden, weight, bias, targets, mask, row_temperature, keep_rows, tile, block_rows, wide, *options)
    stats = Results(*new)
    if stats.logsumexp.numel() == 0:
        return (*stats, logits)
    if targets is not None and values_readable(hidden):  # before Rows renumbers the rows
        y = targets.reshape(stats.logsumexp.numel(), -1)
        check_target_range(y, None if mask is None else mask.reshape(-1), o.ignore_index, weight.shape[0])
    rows = Rows(hidden, targets, mask, o.ignore_index, row_temperature)
    results = [rows.room(x) for x in stats]

    def put(part: slice, values: Results) -> None:
        for to, value in zip(results, values, strict=True):
            if to is not None and value is not None:
                to[part] = value

    head = Head(rows.hidden, weight, bias, _logits_dtype(hidden, wide))
    n = head.hidden.shape[0]
    kept = 0 if logits is None else min(n, len(logits))  # of the rows that count there may be fewer
    if kept:
        part = slice(0, kept)
        put(part, compute(head.whole().logits(part, logits), *_of(part, *rows.others), *o))
    if kept < n:
        head = head if tile else head.whole()
        buffer = head.new_logits(min(block_rows, n - kept), tile or len(weight))
        for part in blocks(kept, n, block_rows):
            of_rows = _of(part, *rows.others)
            put(part, _in_tiles(head, tile, o, part, buffer, *of_rows) if tile else compute(head.logits(part, buffer), *of_rows, *o))
    for to, value in zip(stats, results, strict=True):
        rows.place(to, value)
    mark_kept(stats)
    return (*stats, logits)


def _new_gradients(hidden, weight, bias, *others):
    return new_gradients((hidden, weight, bias), others[-1])


def _backward(
    overwrite, hidden, weight, bias, targets, mask, row_temperature, keep_rows, tile, block_rows, wide,
    temperature, ignore_index, kept_kind, log_kept, with_sum_sq, with_entropy,
    state, logits, g_logp, g_entropy, g_logsumexp, g_sum_sq_prob, g_kept_logmass, wanted,
):  # fmt: skip
    o = Options(temperature, ignore_index, kept_kind, log_kept, with_sum_sq, with_entropy)
    by_row = (state, g_logp, g_entropy, g_logsumexp, g_sum_sq_prob, g_kept_logmass)
    out = _new_gradients(hidden, weight, bias, wanted)
    rows = Rows(hidden, targets, mask, ignore_index, row_temperature, *by_row)
    targets, *of_rows = rows.others
    head = Head(rows.clean(rows.hidden), weight, bias, _logits_dtype(hidden, wide))
    n, vocab = head.hidden.shape[0], len(weight)
    kept = 0 if logits is None else min(n, logits.shape[0])

    def write(to: Tensor, of: Tensor, part: slice, y: Tensor | None, o: Options) -> None:
        counted, row_t, *of_stats = _of(part, *of_rows)
        write_gradient(to, of, None if y is None else y[part], counted, row_t, *o, *of_stats)

    if kept:
        part = slice(0, kept)
        d_logits = logits[part] if overwrite else torch.empty_like(logits[part])
        write(d_logits, logits[part], part, targets, o)
    # Kept logits are one piece, unless their gradient must be cast for the products: then a copy of all of it
    # would be made.
    cast = head.dtype != head.hidden.dtype
    kept_pieces = list(blocks(0, kept, block_rows if cast and not tile else max(1, kept)))
    other_pieces = list(blocks(kept, n, block_rows))
    tile = tile if other_pieces or cast else 0
    sums = GradientSums(rows, head, out, tiled=tile > 0)
    buffer = head.new_logits(min(block_rows, n - kept), tile or vocab)
    for of_tile, columns in _tiles(head, tile):
        sums.begin(of_tile, columns, len(kept_pieces) + len(other_pieces))
        for part in kept_pieces:
            sums.add(part, d_logits[part, columns])
        y, in_part = targets, o
        if tile:
            y = targets_in_part(targets, columns.start, columns.stop, vocab, ignore_index)
            in_part = o._replace(ignore_index=IGNORED)
        for part in other_pieces:
            piece = of_tile.logits(part, buffer)
            write(piece, piece, part, y, in_part)
            sums.add(part, piece)
    sums.finish()
    return out


_ARGUMENTS = f"Tensor hidden, Tensor weight, Tensor? bias, {TENSORS}, int keep_rows, int tile, int block_rows, bool wide, {OPTIONS}"
_SAVED = GRADIENTS.replace("Tensor state, ", "Tensor state, Tensor? logits, ")
_GRADIENTS = "(Tensor, Tensor, Tensor)"
_linear_token_stats = differentiable(
    Operator(
        f"linear_token_stats({_ARGUMENTS}) -> {RESULTS[:-1]}, Tensor)",
        run=_forward,
        fake=_new_stats,
    ),
    Operator(
        f"linear_token_stats_backward({_ARGUMENTS}, {_SAVED}, bool[] wanted) -> {_GRADIENTS}",
        run=partial(_backward, False),
        fake=_new_gradients,
    ),
    outputs=5,
    constants=1,
    wrt=3,
    instead="use rlkern.reference.token_stats of torch.nn.functional.linear(hidden, weight, bias), with targets [..., K]",
    consume=Operator(
        f"linear_token_stats_backward_({_ARGUMENTS}, {_SAVED.replace('Tensor? logits', 'Tensor(a!)? logits')}, bool[] wanted) -> {_GRADIENTS}",
        run=partial(_backward, True),
        fake=_new_gradients,
    ),
)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    workspace: int | None = None,
    logits_dtype: torch.dtype | None = None,
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

    The logits of as many rows as `workspace` holds are kept for the backward, which writes their gradient
    over them. The others are computed a second time there. `linear_plan` says what that comes to. Without
    gradients nothing is kept. A second backward (retain_graph=True) computes all of them again.

    Args:
        hidden: [..., H] float32, bfloat16, float16 or float64. torch.autocast casts it, with weight and bias.
        weight: [V, H], the lm_head's. bias: [V]. Dtype and device of hidden. All three may require grad.
        workspace: bytes of logits to keep; None takes 1 GiB, on a CPU 256 MiB. Beyond it come a tile of
            logits and a float32 sum of the gradient of hidden.
        logits_dtype: torch.float32 does not round the logits of 16-bit operands to 16 bits, and adds the
            bias in float32. On a GPU the operands stay as they are, and the gradient of the logits is rounded
            to their dtype for its products. Where the library has no such product (a CPU, torch before 2.8),
            the operands are cast. None: hidden's dtype, as a model's own head rounds them.
        chunk_rows: rows at a time instead: nothing is kept, and gradients of weight and bias are summed over
            the chunks in float32.
        targets, mask, temperature, ignore_index, min_p, min_prob, with_sum_sq, with_entropy, with_tail,
            group: as in `token_stats`, for the rows of hidden. On a CPU masked rows are left out of the
            products too.

    Returns:
        TokenStats as of `token_stats`, with its gradients. Those of weight and bias are
        rounded once.

    Raises:
        TypeError, ValueError, IndexError: as `token_stats`; for weights of another shape, dtype or device.
    """
    if group is not None:
        raise ValueError("group: vocabulary-parallel weights are not supported in this version, expected None")
    if targets is None:
        raise TypeError("targets must be an integer tensor, got None")
    hidden, weight, bias = autocast(hidden, weight, bias)
    check_matrix(hidden, weight, bias)
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
    if chunk_rows is not None:
        check_count("chunk_rows", chunk_rows, 1)
    dtype = check_logits_dtype(logits_dtype, hidden.dtype)
    grad = torch.is_grad_enabled()
    needs = (grad and hidden.requires_grad, grad and weight.requires_grad, grad and bias is not None and bias.requires_grad)
    whole_rows = o.kept_kind != KeptKind.NONE
    sizes = cut(weight.shape[0], dtype.itemsize, needs, check_workspace(workspace, hidden.device.type), whole_rows, chunk_rows)
    wide = dtype != hidden.dtype
    return public_stats(o, *_linear_token_stats(hidden, weight, bias, y, counted, row_temperature, *sizes, wide, *o))
