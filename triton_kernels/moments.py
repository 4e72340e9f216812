"""Mean and variance of rows of logits on a GPU. Calling convention: rlkern/backends/contract.py.

Forward: SPLITS programs read a run of whole tiles each, then one merges them. A part is summed around the
mean of its first tile, which is read twice, the second time from cache: sums around zero cancel in rows far
from it. Parts merge by the rule of Chan, Golub and LeVeque (1983). SPLITS is a function of V (launch.py): a
row has the same bits in any batch. Backward: a program reads and writes a few tiles.
"""

import triton
import triton.language as tl

from .gradient import columns, edges, load_upstream, write_zeros
from .launch import backward_shape, device_of, forward_shape, gpu, row_options, starts_aligned, strides
from .math import sum_scaled
from .rows import BATCH_SHAPE, row_start, row_targets
from .token_stats_forward import CAN_SHIFT, end_of_whole_tiles, last_tile, row_boundary, sum_lanes, whole_tile
from .token_stats_split import part_of


@triton.jit
def _last_differences(boundary, i, lead, end, shift, ACC: tl.constexpr, SHIFTED: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """x - shift in a tile that may reach beyond the row, 0 there."""
    lane = (tl.arange(0, LANES)[None, :] - lead + LANES) % LANES
    inside = i + tl.arange(0, BLOCK // LANES)[:, None] * LANES + lane < end
    return tl.where(inside, last_tile(boundary, i, lead, end, SHIFTED, BLOCK, LANES).to(ACC) - shift, 0.0)


@triton.jit
def _add(d, s, q):
    return s + tl.sum(d, axis=0), q + tl.sum(d * d, axis=0)


@triton.jit(do_not_specialize=BATCH_SHAPE)
def row_moments_part_kernel(
    logits_ptr, targets_ptr, mask_ptr,  # [A, B, V], [N], [N]
    parts_ptr,  # [N, 4, SPLITS]: columns, shift, mean - shift, sum of squares around the mean
    inner, stride_a, stride_b, vocab, ignore_index,
    HAS_MASK: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, ALIGNED: tl.constexpr, SHIFTED: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // SPLITS
    part = tl.program_id(0) % SPLITS
    row_ptr = logits_ptr + row_start(row, inner, stride_a, stride_b, ALIGN if ALIGNED else 1)
    row = row.to(tl.int64)
    active, _y = row_targets(row, targets_ptr, mask_ptr, ignore_index, 1, 1, HAS_MASK)
    if not active:
        return
    begin, end = part_of(vocab, part, BLOCK, SPLITS)
    boundary, lead = row_boundary(row_ptr, ALIGN, SHIFTED)
    s = tl.zeros((LANES,), ACC)
    q = tl.zeros((LANES,), ACC)
    shift = tl.load(row_ptr + begin, mask=begin < end, other=0.0).to(ACC)
    d = _last_differences(boundary, begin, lead, end, shift, ACC, SHIFTED, BLOCK, LANES)
    first = tl.maximum(tl.minimum(end - begin, BLOCK), 1).to(ACC)
    shift += sum_lanes(tl.sum(d, axis=0), lead, SHIFTED, LANES) / first
    whole = end_of_whole_tiles(begin, end, vocab, ALIGN, SHIFTED, BLOCK)
    for i in tl.range(begin, whole, BLOCK, num_stages=STAGES):
        s, q = _add(whole_tile(boundary, i, lead, ALIGN, SHIFTED, BLOCK, LANES).to(ACC) - shift, s, q)
    if SHIFTED:
        if end - whole > BLOCK:
            s, q = _add(_last_differences(boundary, whole, lead, end, shift, ACC, SHIFTED, BLOCK, LANES), s, q)
            whole += BLOCK
    if whole < end:
        s, q = _add(_last_differences(boundary, whole, lead, end, shift, ACC, SHIFTED, BLOCK, LANES), s, q)
    total = sum_lanes(s, lead, SHIFTED, LANES)
    apart = total / tl.maximum(end - begin, 1).to(ACC)
    out = parts_ptr + row * (4 * SPLITS) + part
    tl.store(out, (end - begin).to(ACC))
    tl.store(out + SPLITS, shift)
    tl.store(out + 2 * SPLITS, apart)
    tl.store(out + 3 * SPLITS, sum_lanes(q, lead, SHIFTED, LANES) - total * apart)


@triton.jit(do_not_specialize=BATCH_SHAPE)
def row_moments_merge_kernel(
    logits_ptr, targets_ptr, mask_ptr,  # [A, B, V], [N], [N]
    parts_ptr,  # [N, 4, SPLITS]
    target_ptr, variance_ptr, mean_ptr,  # [N], [N], [N, 2]
    inner, stride_a, stride_b, vocab, ignore_index,
    HAS_MASK: tl.constexpr, ACC: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    row_ptr = logits_ptr + row_start(row, inner, stride_a, stride_b)
    row = row.to(tl.int64)
    active, y = row_targets(row, targets_ptr, mask_ptr, ignore_index, 1, 1, HAS_MASK)
    y = tl.sum(y, axis=0)
    head = tl.zeros((), ACC)
    tail = tl.zeros((), ACC)
    variance = tl.zeros((), ACC)
    target = tl.zeros((), ACC)
    if active:
        part = parts_ptr + row * (4 * SPLITS) + tl.arange(0, SPLITS)
        n = tl.load(part)
        head = tl.load(parts_ptr + row * (4 * SPLITS) + SPLITS)  # the first part's shift; no part before it is empty
        apart = tl.where(n > 0, tl.load(part + SPLITS) - head + tl.load(part + 2 * SPLITS), 0.0)
        tail = sum_scaled(n, apart) / vocab
        tail = tl.where(tl.abs(tail) < float("inf"), tail, float("nan"))
        variance = tl.sum(tl.load(part + 3 * SPLITS) + n * (apart - tail) * (apart - tail), axis=0) / vocab
        in_vocab = (y >= 0) & (y < vocab)
        x = tl.load(row_ptr + y, mask=in_vocab, other=0.0).to(ACC)
        target = tl.where(in_vocab, x - head - tail, float("nan"))
    tl.store(target_ptr + row, target)
    tl.store(variance_ptr + row, variance)
    tl.store(mean_ptr + row * 2, head)
    tl.store(mean_ptr + row * 2 + 1, tail)


@triton.jit
def _gradient_tile(x, z_ptr, cols, valid, y, head, tail, slope, constant, g_target):
    dx = tl.where(slope == 0, constant, (x - head - tail) * slope + constant)  # no infinite logit times 0
    dx = tl.where(cols == y, dx + g_target, dx)
    tl.store(z_ptr + cols, dx.to(z_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=BATCH_SHAPE)
def row_moments_backward_kernel(
    logits_ptr, targets_ptr, mask_ptr,  # [A, B, V], [N], [N]
    mean_ptr, g_target_ptr, g_variance_ptr, out_ptr,  # [N, 2], [N], [N], [A, B, V]
    inner, stride_a, stride_b, out_stride_a, out_stride_b, vocab, groups, ignore_index,
    HAS_MASK: tl.constexpr, HAS_TARGET: tl.constexpr, HAS_VARIANCE: tl.constexpr, ACC: tl.constexpr,
    ALIGN: tl.constexpr, ALIGNED: tl.constexpr, SAME_LEAD: tl.constexpr, EDGES: tl.constexpr,  # as in token_stats_backward_kernel
    BLOCK: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = pid // groups
    first = (pid - row * groups) * (TILES * BLOCK)
    start = row_start(row, inner, stride_a, stride_b, ALIGN if ALIGNED else 1)
    out_start = row_start(row, inner, out_stride_a, out_stride_b, ALIGN if ALIGNED else 1)
    row = row.to(tl.int64)
    lead, body, body_end, end, last = columns(out_start, first, vocab, ALIGN, ALIGNED, BLOCK, TILES)
    x_ptr = logits_ptr + (tl.multiple_of(start - lead, ALIGN) if SAME_LEAD else start - lead)
    z_ptr = out_ptr + tl.multiple_of(out_start - lead, ALIGN)
    edge, in_row = edges(lead, body, body_end, end, ALIGN)
    active, y = row_targets(row, targets_ptr, mask_ptr, ignore_index, 1, 1, HAS_MASK)
    g_target = load_upstream(g_target_ptr, row, HAS_TARGET, ACC)
    g_variance = load_upstream(g_variance_ptr, row, HAS_VARIANCE, ACC)
    if not (active & ((g_target != 0) | (g_variance != 0))):
        write_zeros(z_ptr, first, last, edge, in_row, body, body_end, EDGES, BLOCK)
        return
    y = tl.sum(y, axis=0)
    g_target = tl.where((g_target == 0) | ((y >= 0) & (y < vocab)), g_target, float("nan"))
    y = (y + lead).to(tl.int32)
    head = tl.load(mean_ptr + row * 2)
    tail = tl.load(mean_ptr + row * 2 + 1)
    slope = 2.0 * g_variance / vocab
    constant = -g_target / vocab
    if EDGES:
        if first == 0:
            x = tl.load(x_ptr + edge, mask=in_row).to(ACC)
            _gradient_tile(x, z_ptr, edge, in_row, y, head, tail, slope, constant, g_target)
    for tile in tl.range(first, last, BLOCK, num_stages=STAGES):
        cols = tile + tl.arange(0, BLOCK)
        in_body = (cols >= body) & (cols < body_end)
        x = tl.load(x_ptr + cols, mask=in_body).to(ACC)
        _gradient_tile(x, z_ptr, cols, in_body, y, head, tail, slope, constant, g_target)


def row_moments_forward(logits, targets, mask, ignore_index, out) -> None:
    mean = out[2]
    (mask, _), _, options = row_options(logits, mask, 1.0, mean.dtype)
    outer, inner, vocab = logits.shape
    align = 16 // logits.element_size()
    aligned = starts_aligned(logits, align)
    card = gpu(logits.device)
    shape = forward_shape(card, vocab, logits.element_size(), aligned)
    tile = dict(ALIGN=align, ALIGNED=aligned, SHIFTED=CAN_SHIFT and not aligned, BLOCK=shape.block, STAGES=shape.stages, num_warps=shape.warps)
    tile["LANES"] = min(shape.block, shape.warps * card.warp_size * align)
    parts = mean.new_empty((outer * inner, 4, shape.splits))
    row_args = (inner, *strides(logits), vocab, ignore_index)
    split = dict(HAS_MASK=options["HAS_MASK"], ACC=options["ACC"], SPLITS=shape.splits)
    with device_of(logits):
        row_moments_part_kernel[(outer * inner * shape.splits,)](logits, targets, mask, parts, *row_args, **split, **tile)
        row_moments_merge_kernel[(outer * inner,)](logits, targets, mask, parts, *out, *row_args, **split, num_warps=1)


def row_moments_backward(logits, targets, mask, ignore_index, mean, grads, out) -> None:
    (mask, _), _, options = row_options(logits, mask, 1.0, mean.dtype)
    outer, inner, vocab = logits.shape
    align = 16 // logits.element_size()
    aligned = all(s % align == 0 for s in strides(logits) + strides(out))
    shape = backward_shape(gpu(logits.device), vocab, logits.element_size(), aligned)
    groups = triton.cdiv(vocab + (0 if aligned else align - 1), shape.tiles * shape.block)
    pointers = (logits, targets, mask, mean, *(mean if g is None else g for g in grads), out)
    tile = dict(
        ALIGN=align,
        ALIGNED=aligned,
        EDGES=not aligned or vocab % align != 0,
        SAME_LEAD=all((a - b) % align == 0 for a, b in zip(strides(logits), strides(out), strict=True)),
        **dict(BLOCK=shape.block, TILES=shape.tiles, STAGES=shape.stages, num_warps=shape.warps),
    )
    tile |= {f"HAS_{name}": g is not None for name, g in zip(("TARGET", "VARIANCE"), grads, strict=True)}
    row_args = (inner, *strides(logits), *strides(out), vocab, groups, ignore_index)
    with device_of(logits):
        row_moments_backward_kernel[(outer * inner * groups,)](*pointers, *row_args, HAS_MASK=options["HAS_MASK"], ACC=options["ACC"], **tile)
