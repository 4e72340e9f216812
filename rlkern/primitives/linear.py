"""`token_stats` of hidden states times the output matrix, without all logits at once.

The backward writes the gradient over the logits that were kept. It computes the others again: by tiles of the
matrix, whose gradient is then complete a tile at a time, or by chunks of whole rows. plans.py says which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.contract import KeptKind
from ..checks import check_choice, check_count, check_flags, check_number, check_target_range, computing_dtype, expect, shown
from ..dtensors import is_dtensor, local_head
from ..layout import counted_rows
from ..operator import Operator, Steps, differentiable, values_readable
from ..parallel import UNKNOWN, Shard, add_up, is_sharded
from .kept_sets import Kept, check_kept, check_outside
from .linear_kept import Cut, kept_payloads, linear_kept_stats
from .parts import merge, parts_of, pieces_of, state_of_nothing, token_stats_merge
from .plans import check_logits_dtype, check_workspace, cut
from .projection import GradientSums, Head, Rows, add_product, autocast, blocks, check_num_valid, gathering, new_gradients, whole_head
from .row_stats import (
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
    real_columns,
    row_options,
    write_gradient,
)
from .sharded_kept import largest_kept_id, what_keep_says
from .sharded_stats import Columns, agreed_shard, all_parts, refuse_rows


class _How(NamedTuple):
    """What the operators take before `Options`: the plan, and what else does not change the mathematics."""

    keep_rows: int  # these four are a `Cut`
    tile: int
    block_rows: int
    fixed: bool
    wide: bool  # float32 logits of 16-bit operands
    num_valid: int | None
    weight_grad_out: Tensor | None
    segments: int  # of the columns here, each with products of its own; 0: one
    group_name: str  # of the ranks that hold the other columns, see `Shard`
    ranks: int
    sums_hidden: bool  # over the ranks: the gradients of hidden and lora_hidden


def _split(args: Sequence[Any]) -> tuple[_How, Options, Sequence[Any]]:
    """(how, options, what follows) from an operator's arguments after the tensors."""
    n = len(_How._fields)
    return _How(*args[:n]), Options(*args[n : n + len(Options._fields)]), args[n + len(Options._fields) :]


def _logits_dtype(hidden: Tensor, how: _How) -> torch.dtype:
    return computing_dtype(hidden) if how.wide else hidden.dtype


def _heads(hidden: Tensor, weight, bias, lora_hidden, lora_weight, how: _How, o: Options) -> list[Head]:
    """What the logits are the sum of, without padding."""
    real = slice(0, real_columns(len(weight), o))
    weight, bias, lora_weight = (x if x is None else x[real] for x in (weight, bias, lora_weight))
    dtype, rows = _logits_dtype(hidden, how), how.block_rows if how.fixed else 0
    heads = [Head(hidden, weight, bias, dtype, rows)]
    return heads if lora_weight is None else [*heads, Head(lora_hidden, lora_weight, None, dtype, rows)]


def _logits(heads: Sequence[Head], rows: slice, buffer: Tensor) -> Tensor:
    first, *others = heads
    logits = first.logits(rows, buffer)
    for head in others:
        add_product(logits, head.hidden[rows], head.weight.t())
    return logits


def _tiles(heads: Sequence[Head], tile: int) -> Iterator[tuple[list[Head], slice]]:
    """All columns, `tile` at a time; 0: at once."""
    vocab = len(heads[0].weight)
    for columns in blocks(0, vocab, tile):
        yield [head.columns(columns) for head in heads], columns


def _of(rows: slice, *by_row: Tensor | None) -> list[Any]:
    return [None if x is None else x[rows] for x in by_row]


def _new_stats(hidden, weight, bias, lora_hidden, lora_weight, targets, mask, row_temperature, *args) -> tuple:
    how, o, _ = _split(args)
    kept = None
    if how.keep_rows > 0:
        rows = hidden.shape[:-1].numel() if how.num_valid is None else how.num_valid
        kept = hidden.new_empty(min(rows, how.keep_rows), real_columns(weight.shape[0], o), dtype=_logits_dtype(hidden, how))
    return (*new_results(hidden, targets, o), kept)


def _in_tiles(heads: Sequence[Head], tile: int, o: Options, rows: slice, buffer: Tensor, targets, mask, row_temperature) -> Results:
    """The statistics of some rows from their parts, tiles of the columns from o.vocab_start on."""
    parts, of_rows, vocab = [], (targets, mask, row_temperature), o.vocab_size or len(heads[0].weight)
    for of_tile, columns in _tiles(heads, tile):
        in_tile = o._replace(vocab_start=o.vocab_start + columns.start, vocab_size=vocab)
        parts.append(parts_of(_logits(of_tile, rows, buffer), *of_rows, *in_tile, 0))
    return merge(torch.cat(parts), *of_rows, *o)


def _forward(hidden, weight, bias, lora_hidden, lora_weight, targets, mask, row_temperature, *args) -> tuple:
    how, o, _ = _split(args)
    *new, logits = _new_stats(hidden, weight, bias, lora_hidden, lora_weight, targets, mask, row_temperature, *args)
    stats = Results(*new)
    if stats.logsumexp.numel() == 0:
        return (*stats, logits)
    if targets is not None and values_readable(hidden):  # before Rows renumbers the rows
        y = targets.reshape(stats.logsumexp.numel(), -1)
        check_target_range(y, None if mask is None else mask.reshape(-1), o.ignore_index, real_columns(len(weight), o))
    rows = Rows(hidden, targets, mask, o.ignore_index, row_temperature, lora_hidden, num_valid=how.num_valid)
    *by_row, of_lora = rows.others
    results = [rows.room(x) for x in stats]
    heads = _heads(rows.hidden, weight, bias, of_lora, lora_weight, how, o)
    n = rows.hidden.shape[0]
    kept = 0 if logits is None else min(n, len(logits))  # of the rows that count there may be fewer

    def put(part: slice, values: Results) -> None:
        for to, value in zip(results, values, strict=True):
            if to is not None and value is not None:
                to[part] = value

    if kept or not how.tile:
        whole, _ = next(_tiles(heads, 0))
    for part in blocks(0, kept, how.block_rows if how.fixed else 0):
        put(part, compute(_logits(whole, part, logits[part]), *_of(part, *by_row), *o))
    if kept < n:
        buffer = heads[0].new_logits(min(how.block_rows, n - kept), how.tile or len(heads[0].weight))
        for part in blocks(kept, n, how.block_rows):
            of_rows = _of(part, *by_row)
            put(part, _in_tiles(heads, how.tile, o, part, buffer, *of_rows) if how.tile else compute(_logits(whole, part, buffer), *of_rows, *o))
    for to, value in zip(stats, results, strict=True):
        rows.place(to, value)
    mark_kept(stats)
    return (*stats, logits)


def _new_parts(hidden, weight, bias, lora_hidden, lora_weight, targets, mask, row_temperature, *args) -> tuple:
    how, _, _ = _split(args)
    *results, logits = _new_stats(hidden, weight, bias, lora_hidden, lora_weight, targets, mask, row_temperature, *args)
    state = Results(*results).state
    return state.new_empty(max(how.segments, 1), *state.shape), logits


def _parts(hidden, weight, bias, lora_hidden, lora_weight, targets, mask, row_temperature, *args) -> tuple:
    """What `_forward` computes, of the columns of one rank: the parts [P, ..., W], and the kept logits."""
    how, o, _ = _split(args)
    parts, logits = _new_parts(hidden, weight, bias, lora_hidden, lora_weight, targets, mask, row_temperature, *args)
    if parts.numel() == 0:
        return parts, logits
    if targets is not None and values_readable(hidden):
        y = targets.reshape(parts[0, ..., 0].numel(), -1)
        check_target_range(y, None if mask is None else mask.reshape(-1), o.ignore_index, o.vocab_size)
    rows = Rows(hidden, targets, mask, o.ignore_index, row_temperature, lora_hidden, num_valid=how.num_valid)
    *by_row, of_lora = rows.others
    n = rows.hidden.shape[0]
    kept = 0 if logits is None else min(n, len(logits))
    for i, (start, stop) in enumerate(pieces_of(len(weight), o, how.segments)):
        room: Any = rows.room(parts[i])
        if start == stop:
            room.copy_(state_of_nothing(room))
        elif n > 0:
            segment = [head.columns(slice(start, stop)) for head in _heads(rows.hidden, weight, bias, of_lora, lora_weight, how, o)]
            in_segment = o._replace(vocab_start=o.vocab_start + start)
            buffer = segment[0].new_logits(min(how.block_rows, n), how.tile or stop - start)
            for part in blocks(0, kept, how.block_rows if how.fixed else 0):
                assert logits is not None
                whole = stop - start == logits.shape[1]
                piece = _logits(segment, part, logits[part] if whole else segment[0].new_logits(part.stop - part.start, stop - start))
                room[part] = parts_of(piece, *_of(part, *by_row), *in_segment, 0)[0]
                if not whole:
                    logits[part, start:stop] = piece
            for part in blocks(kept, n, how.block_rows):
                room[part] = _in_tiles(segment, how.tile, in_segment, part, buffer, *_of(part, *by_row)).state
        rows.place(parts[i], room)
    return parts, logits


def _new_gradients(hidden, weight, bias, lora_hidden, lora_weight, targets, mask, row_temperature, *args):
    how, _, (*_, wanted) = _split(args)
    wanted = [want and not (i == 1 and how.weight_grad_out is not None) for i, want in enumerate(wanted)]
    return new_gradients((hidden, weight, bias, lora_hidden, lora_weight), wanted)


def _backward(overwrite, hidden, weight, bias, lora_hidden, lora_weight, targets, mask, row_temperature, *args):
    how, o, (state, logits, *grads, wanted) = _split(args)
    out = _new_gradients(hidden, weight, bias, lora_hidden, lora_weight, targets, mask, row_temperature, *args)
    rows = Rows(hidden, targets, mask, o.ignore_index, row_temperature, state, *grads, lora_hidden, num_valid=how.num_valid)
    targets, *of_rows, of_lora = rows.others
    of_lora = None if of_lora is None else rows.clean(of_lora)
    heads = _heads(rows.clean(rows.hidden), weight, bias, of_lora, lora_weight, how, o)
    n, columns_here = rows.hidden.shape[0], len(heads[0].weight)
    if columns_here == 0:
        for gradient in out:
            if gradient is not None:
                gradient.zero_()
        return out
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
    cast = heads[0].dtype != heads[0].hidden.dtype
    kept_pieces = list(blocks(0, kept, how.block_rows if how.fixed or cast and not how.tile else 0))
    other_pieces = list(blocks(kept, n, how.block_rows))
    tile = how.tile if other_pieces or cast else 0
    weight_sum = how.weight_grad_out if wanted[1] else None
    sums = [GradientSums(rows, heads[0], out[:3], tiled=tile > 0, weight_sum=weight_sum)]
    if lora_weight is not None:
        sums.append(GradientSums(rows, heads[1], (*out[3:], None), tiled=tile > 0))
    buffer = heads[0].new_logits(min(how.block_rows, n - kept), tile or columns_here)
    for of_tile, columns in _tiles(heads, tile):
        for of_head, head in zip(sums, of_tile, strict=True):
            of_head.begin(head, columns, len(kept_pieces) + len(other_pieces))
        for part in kept_pieces:
            for of_head in sums:
                of_head.add(part, d_logits[part, columns])
        in_tile = o._replace(vocab_start=o.vocab_start + columns.start, vocab_size=o.vocab_size or columns_here)
        for part in other_pieces:
            piece = _logits(of_tile, part, buffer)
            write(piece, piece, part, targets, in_tile)
            for of_head in sums:
                of_head.add(part, piece)
    for of_head in sums:
        of_head.finish()
    return out


_TENSORS = f"Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_hidden, Tensor? lora_weight, {TENSORS}"
_HOW = "int keep_rows, int tile, int block_rows, bool fixed, bool wide, SymInt? num_valid, Tensor? weight_grad_out, "
_HOW += "int segments, str group_name, int ranks, bool sums_hidden"
_SAVED = GRADIENTS.replace("Tensor state, ", "Tensor state, Tensor? logits, ")
_GRADIENTS = "(Tensor, Tensor, Tensor, Tensor, Tensor)"


def _backward_schema(name: str, how: str, saved: str) -> str:
    return f"{name}({_TENSORS}, {how}, {OPTIONS}, {saved}, bool[] wanted) -> {_GRADIENTS}"


_backward_of = Operator(_backward_schema("linear_token_stats_backward", _HOW, _SAVED), partial(_backward, False), _new_gradients)
_consume = Operator(
    _backward_schema(
        "linear_token_stats_backward_",
        _HOW.replace("Tensor? weight", "Tensor(a!)? weight"),
        _SAVED.replace("Tensor? logits", "Tensor(b!)? logits"),
    ),
    run=partial(_backward, True),
    fake=_new_gradients,
)
_INSTEAD = "use rlkern.reference.token_stats of torch.nn.functional.linear(hidden, weight, bias), with targets [..., K]"
_linear_token_stats = differentiable(
    Operator(f"linear_token_stats({_TENSORS}, {_HOW}, {OPTIONS}) -> {RESULTS[:-1]}, Tensor)", _forward, _new_stats),
    _backward_of,
    outputs=5,
    constants=1,
    wrt=5,
    instead=_INSTEAD,
    consume=_consume,
)

_linear_parts = Operator(f"linear_token_stats_parts({_TENSORS}, {_HOW}, {OPTIONS}) -> (Tensor, Tensor)", _parts, _new_parts)


def _sharded_forward(call, *args) -> tuple:
    tensors, (how, o, _) = args[: _linear_parts.tensors], _split(args[_linear_parts.tensors :])
    parts, logits = call(_linear_parts, *args)
    parts = all_parts(parts, how.group_name, how.ranks, *tensors[-3:])
    return (*call(token_stats_merge, parts, *tensors[-3:], *o), logits)


def _sharded_backward(operator: Operator, call, *args) -> tuple:
    """Hidden states meet the columns of all ranks: their gradient is a sum over these."""
    how, _, (*_, wanted) = _split(args[operator.tensors :])
    gradients = list(call(operator, *args))
    if how.sums_hidden and how.ranks > 1:
        for i in (0, 3):
            if wanted[i] and args[i] is not None:
                gradients[i] = add_up(gradients[i], how.group_name)
    return tuple(gradients)


_sharded_linear_stats = differentiable(
    Steps("sharded_linear_token_stats", _sharded_forward, _linear_parts, token_stats_merge),
    Steps("sharded_linear_token_stats_backward", partial(_sharded_backward, _backward_of), _backward_of),
    outputs=5,
    constants=1,
    wrt=5,
    instead=_INSTEAD,
    consume=Steps("sharded_linear_token_stats_backward_", partial(_sharded_backward, _consume), _consume),
)


def _lora(lora: Any, hidden: Tensor, weight: Tensor, counted: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(scale * hidden @ A.T, B); counted: which rows count, bool [...]."""
    if lora is None:
        return None, None
    if not isinstance(lora, (tuple, list)) or len(lora) != 3:
        raise TypeError(f"lora must be (A [r, H], B [V, r], scale) or None, got {shown(lora)}")
    a, b, scale = *autocast(*lora[:2]), lora[2]
    check_number("lora's scale", scale)
    for name, x, layout in (("A", a, "[r, H]"), ("B", b, "[V, r]")):
        expect(f"lora's {name}", x, "float", layout)
        if x.dtype != hidden.dtype:
            raise TypeError(f"lora's {name} must have the dtype of hidden {hidden.dtype} (or run under torch.autocast), got {x.dtype}")
        if x.device != hidden.device:
            raise ValueError(f"lora's {name} must be on the device of hidden {hidden.device}, got {x.device}")
    vocab, hidden_size = weight.shape
    if a.shape[1] != hidden_size or b.shape != (vocab, a.shape[0]):
        wanted = f"A [r, {hidden_size}] and B [{vocab}, r] for weight {tuple(weight.shape)}"
        raise ValueError(f"lora must be {wanted}, got {tuple(a.shape)} and {tuple(b.shape)}")
    if counted is not None:  # the gradient by A is a product with all rows, of which some may hold NaN
        hidden = hidden.masked_fill(~counted.unsqueeze(-1), 0)
    return torch.nn.functional.linear(hidden, a) * scale, b


def _check_weight_grad_out(weight_grad_out: Tensor | None, weight: Tensor) -> None:
    if weight_grad_out is None:
        return
    if torch.compiler.is_compiling():
        raise ValueError("weight_grad_out is not supported under torch.compile: expected None")
    expect("weight_grad_out", weight_grad_out, "float", "[V, H]", like=("weight", weight), detached=True)
    if weight_grad_out.dtype != computing_dtype(weight):
        raise TypeError(f"weight_grad_out must be {computing_dtype(weight)} for weight {weight.dtype}, got {weight_grad_out.dtype}")


def _check_keep(keep, outside, max_dense_rows, round_logits, hidden, weight, targets, o: Options, lora, weight_grad_out) -> Kept | None:
    check_flags(round_logits=round_logits)
    several = targets.dim() == hidden.dim() and targets.shape[-1] > 1
    check_outside(outside, several and keep is not None)
    check_count("max_dense_rows", max_dense_rows)
    if keep is None:
        if outside != "include" or max_dense_rows or round_logits:
            given = f"{outside!r}, {max_dense_rows} and {round_logits}"
            raise ValueError(f"outside, max_dense_rows and round_logits go with keep: expected 'include', 0 and False without it, got {given}")
        return None
    if o.kept_kind != KeptKind.NONE:
        kind = {KeptKind.MIN_P: "min_p", KeptKind.MIN_PROB: "min_prob", KeptKind.UNLISTED: "with_tail"}[o.kept_kind]
        raise ValueError(f"keep takes no min_p, min_prob or with_tail: expected None, None and False, got {kind}")
    if lora is not None or weight_grad_out is not None:
        given = f"{shown(lora)} and {shown(weight_grad_out)}"
        raise ValueError(f"keep takes no lora or weight_grad_out: expected None and None, got {given}")
    return check_kept(keep, hidden, "hidden", weight.shape[0], lists_only=True)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    workspace: int | None = None,
    logits_dtype: torch.dtype | None = None,
    num_valid: int | None = None,
    fixed_blocks: bool = False,
    chunk_rows: int | None = None,
    weight_grad_out: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    gathered: Callable[[], Any] | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    min_p: float | None = None,
    min_prob: float | None = None,
    with_sum_sq: bool = False,
    with_entropy: bool = True,
    with_tail: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    keep: Kept | None = None,
    outside: str = "include",
    max_dense_rows: int = 0,
    round_logits: bool = False,
    group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    segments: int | None = None,
    hidden_grad: str = "all_reduce",
) -> TokenStats:
    """`token_stats` of `hidden @ weight.T + bias`, without all logits at once.

    The logits of as many rows as `workspace` holds are kept for the backward, which writes their gradient
    over them. The others are computed a second time there. `linear_plan` says what that comes to. Without
    gradients nothing is kept. A second backward (retain_graph=True) computes all of them again.

    Args:
        hidden: [..., H] float32, bfloat16, float16 or float64. torch.autocast casts it, with weight and bias.
            Float32 ones are cast where they are multiplied. No copy is kept, and the gradient is float32.
        weight: [V, H], the lm_head's. bias: [V]. Dtype and device of hidden. All three may require grad.
        workspace: bytes of logits to keep; None takes 1 GiB, on a CPU 256 MiB. Beyond it come a tile of
            logits and a float32 sum of the gradient of hidden.
        logits_dtype: torch.float32 does not round the logits of 16-bit operands to 16 bits, and adds the
            bias in float32. On a GPU the operands stay as they are, and the gradient of the logits is rounded
            to their dtype for its products. Where the library has no such product (a CPU, torch before 2.8),
            the operands are cast. None: hidden's dtype, as a model's own head rounds them.
        num_valid: how many rows count: their mask is not 0 and not all of their targets are ignored. A
            batch's collator knows it. The others are then left out of the products on a GPU too, where the
            host would have to wait to learn the number. Another number is an error on a CPU. On a GPU fewer
            rows that count change nothing; of more, those behind the first num_valid are taken as masked.
        fixed_blocks: all products of rows have the same shape, with rows of 0 behind the last. A row's bits
            then do not depend on how many others there are, as far as the library's products of one shape do
            not. Nothing is computed in tiles.
        chunk_rows: rows at a time instead: nothing is kept, and gradients of weight and bias are summed over
            the chunks in float32.
        weight_grad_out: float32 [V, H] (float64 for float64), such as Megatron's main_grad: the gradient by
            weight is added to it in any backward, where weight requires grad, and weight.grad gets none. Not
            under torch.compile.
        lora: (A [r, H], B [V, r], scale) of an adapter on the head: the logits are those of the weight
            weight + scale * B @ A, which is never formed. Gradients by A and B; weight is mostly frozen.
        gathered: a function that returns a context manager in which weight and bias have their values, as
            `lambda: deepspeed.zero.GatheredParameters([weight])` for ZeRO-3. The forward and the backward
            each run in one. Not under torch.compile.
        targets, mask, temperature, ignore_index, min_p, min_prob, with_sum_sq, with_entropy, with_tail,
            logit_scale, softcap: as in `token_stats`, for the rows of hidden. On a CPU masked rows are left
            out of the products too.
        keep: a `Kept`, the ids S that each row's softmax is over, as a sampler's top-p or top-k left them.
            Values and gradients are those of logits at -inf outside S, but only listed columns are
            multiplied. The logits are float32 sums, not rounded to hidden's dtype. Not with min_p, min_prob,
            with_tail, lora or weight_grad_out.
        outside: what to do where a target is not in S. "include" adds it to S. "everything" takes the whole
            vocabulary for that row. "minus_inf" gives logp = -inf, without gradient, and is for targets
            [..., K] too.
        max_dense_rows: how many rows may be over the whole vocabulary, by an empty list or by
            outside="everything". They are computed as without keep. More are a ValueError on a CPU, and NaN
            on a GPU.
        round_logits: round the kept logits to hidden's dtype, as a model's own head does.
        group, vocab_start, vocab_size, segments: as in `token_stats`, for a matrix whose rows are cut over
            the ranks of a group; so are bias and the adapter's B. hidden is the same on all ranks. One
            gather, however the products are cut: with keep, of the kept logits. Not with min_p, min_prob or
            with_tail, but for vocab_size alone. With keep no segments.
        hidden_grad: the gradient of hidden is a sum over the ranks, and so is what A of an adapter gets.
            "all_reduce" adds it up. "partial" leaves that to the caller, whose hidden came through
            Megatron's copy_to_tensor_model_parallel_region, or through a gather that scatters its gradient.
            A DTensor of hidden, replicated where one of weight is Shard(0), needs neither this nor a group.

    Returns:
        TokenStats as of `token_stats`, with its gradients. With keep, `target_kept` says whether S had the
        target (bool; True in rows that are not read). Those of weight and bias are rounded once. A
        DTensor among the two, as FSDP2 shards it, is gathered, and its gradient averaged over the mesh.

    Raises:
        TypeError, ValueError, IndexError: as `token_stats`; for weights of another shape, dtype or device.
            With keep also ValueError for rows that share a list and IndexError for ids >= V; on a GPU NaN.
    """
    if is_dtensor(hidden) or (is_dtensor(weight) and group is not None):
        options: Any = dict(workspace=workspace, logits_dtype=logits_dtype, num_valid=num_valid, fixed_blocks=fixed_blocks, chunk_rows=chunk_rows)
        options |= dict(weight_grad_out=weight_grad_out, lora=lora, gathered=gathered, ignore_index=ignore_index, min_p=min_p, min_prob=min_prob)
        options |= dict(with_sum_sq=with_sum_sq, with_entropy=with_entropy, with_tail=with_tail, logit_scale=logit_scale, softcap=softcap)
        options |= dict(keep=keep, outside=outside, max_dense_rows=max_dense_rows, round_logits=round_logits, segments=segments)
        local, columns, placed = local_head(hidden, weight, bias, group, vocab_start, vocab_size)
        hidden, weight, bias = local
        for name, x in (("targets", targets), ("mask", mask), ("temperature", temperature)):
            options[name] = x if placed is None else placed.local(x)
        stats = linear_token_stats(hidden, weight, bias=bias, **{"hidden_grad": hidden_grad, **options, **columns})
        return TokenStats(*map(placed.whole, stats)) if placed is not None and is_dtensor(targets) else stats
    at = Columns(group, vocab_start, vocab_size, segments)
    try:
        context = gathering(gathered)
    except Exception as error:
        refuse_rows(error, hidden, at)
    with context:
        checked: Any = None  # what the rows' check leaves beside them

        def check() -> tuple:
            nonlocal hidden, weight, bias, keep, checked
            if targets is None:
                raise TypeError("targets must be an integer tensor, got None")
            check_choice("hidden_grad", hidden_grad, ("all_reduce", "partial"))
            hidden, weight, bias = whole_head(hidden, weight, bias, least=1 if group is None else 0)
            check_flags(with_sum_sq=with_sum_sq, with_entropy=with_entropy, with_tail=with_tail, fixed_blocks=fixed_blocks)
            _check_weight_grad_out(weight_grad_out, weight)
            rows = row_options(
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
                logit_scale=logit_scale,
                softcap=softcap,
            )
            y, counted, _, o = rows
            lora_hidden, lora_weight = _lora(lora, hidden, weight, counted_rows(y, counted, ignore_index, hidden.dim() - 1))
            if chunk_rows is not None:
                check_count("chunk_rows", chunk_rows, 1)
            check_num_valid(num_valid, hidden)
            dtype = check_logits_dtype(logits_dtype, hidden.dtype)
            parameters = hidden, weight, bias, lora_hidden, lora_weight
            hidden_needs, weight_needs, *others_need = (torch.is_grad_enabled() and x is not None and x.requires_grad for x in parameters)
            needs = hidden_needs, weight_needs, any(others_need)
            size, whole_rows = check_workspace(workspace, hidden.device.type), o.kept_kind != KeptKind.NONE
            sizes = cut(max(weight.shape[0], 1), dtype.itemsize, needs, size, whole_rows, chunk_rows, bool(fixed_blocks))
            how = _How(*sizes, dtype != hidden.dtype, num_valid if keep is None else None, weight_grad_out, 0, "", 1, hidden_grad == "all_reduce")
            keep = _check_keep(keep, outside, max_dense_rows, round_logits, hidden, weight, targets, o, lora, weight_grad_out)
            if not (group is None and segments is None) and whole_rows:
                raise ValueError("group and segments take no min_p, min_prob or with_tail here: a second round would need the logits again")
            if segments is not None and keep is not None:
                raise ValueError(f"keep takes no segments: expected None, got {segments}")
            checked = parameters, how
            return rows

        if is_sharded(*at):

            def asked() -> dict[str, Any]:
                (hidden, _, bias, lora_hidden, _), how = checked
                given = {"hidden": hidden, "lora": lora_hidden}
                options = {f"the gradient of {name}": x is not None and x.requires_grad and torch.is_grad_enabled() for name, x in given.items()}
                options |= {f"the width of {name}": None if x is None else x.shape[-1] for name, x in given.items()}
                options |= {"hidden's dtype, cast": str(hidden.dtype), "the logits' dtype": str(_logits_dtype(hidden, how)), "bias": bias is not None}
                options |= {"lora's scale": None if lora is None else float(lora[2]), "num_valid": num_valid, "hidden_grad": hidden_grad}
                options |= {"outside": outside, "max_dense_rows": max_dense_rows, "round_logits": bool(round_logits)}
                return options | what_keep_says(keep)

            said: Any = {"columns": lambda: weight.shape[0], "options": asked}
            if keep is not None:
                said["payloads"] = partial(kept_payloads, hidden, keep, targets, max_dense_rows)
            if isinstance(keep, Kept):
                said["largest_id"] = partial(largest_kept_id, keep, hidden)
            shard, rows = agreed_shard("linear_token_stats", hidden, targets, at, check, **said)
            parameters, how = checked
            how = how._replace(segments=shard.segments, group_name=shard.group_name, ranks=shard.ranks)
        else:  # without _replace, which Dynamo of torch 2.6 does not follow
            shard, rows = Shard("", 1, 0, 0, 0), check()
            parameters, how = checked
        y, counted, row_temperature, o = rows
        run = _linear_token_stats if shard.ranks == 1 and not shard.segments else _sharded_linear_stats
        if keep is not None:

            def dense(hidden, *of_rows):
                return run(hidden, weight, bias, None, None, *of_rows, *how, *o, around=gathered)

            if shard.vocab == UNKNOWN:
                raise ValueError("keep needs vocab_size beside vocab_start: an id may be no rank's")
            cut_over = None if shard.ranks == 1 else Cut(shard.group_name, shard.ranks, shard.start, shard.vocab, how.sums_hidden)
            matrix, vector = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
            how_kept: Any = (outside, max_dense_rows, bool(round_logits), dense, gathered, cut_over)
            return linear_kept_stats(hidden, matrix, vector, y, counted, row_temperature, o, keep, *how_kept)
        return public_stats(o, *run(*parameters, y, counted, row_temperature, *how, *o, around=gathered))
