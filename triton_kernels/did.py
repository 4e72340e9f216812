"""The entropy of softmax((logits - reference) / T) on a GPU. Calling convention: rlkern/backends/contract.py.

token_stats on differences that are formed as both rows are read. Forward: SPLITS programs a row, whose parts
merge as those of token_stats. Backward: a program reads a few tiles of both rows, and writes each gradient.
"""

import triton
import triton.language as tl

from .constants import STATE_KEPT, STATE_MAX, STATE_MEAN_U, STATE_REST, STATE_TARGETS
from .gradient import columns, edges, write_zeros
from .launch import backward_shape, device_of, forward_shape, gpu, row_options, starts_aligned, strides, target_warps
from .rows import BATCH_SHAPE, LN2, LOG2E, NEG_INF, exponent, row_inv_temperature, row_start
from .token_stats_forward import CAN_SHIFT, add_tile, end_of_whole_tiles, last_tile, row_boundary, sum_lanes, whole_tile
from .token_stats_parts import write_part
from .token_stats_split import part_of, token_stats_split_merge_kernel

BATCH_SHAPES = (*BATCH_SHAPE, "reference_stride_a", "reference_out_stride_a")


@triton.jit
def _difference(x, reference, ACC: tl.constexpr):
    """-inf where x is -inf: mass 0, whatever the reference holds."""
    x = x.to(ACC)
    return tl.where(x == NEG_INF, NEG_INF, x - reference.to(ACC))


@triton.jit(do_not_specialize=BATCH_SHAPES)
def did_entropy_part_kernel(
    logits_ptr, reference_ptr, mask_ptr, temperature_ptr,  # [A, B, V] twice, [N], [N]
    parts_ptr,  # [N, SPLITS, STATE_KEPT], as of token_stats_part_kernel
    inner, stride_a, stride_b, reference_stride_a, reference_stride_b, vocab, temperature,
    HAS_MASK: tl.constexpr, ROW_TEMPERATURE: tl.constexpr, ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGNED: tl.constexpr,  # every row of both starts on a boundary
    SHIFTED: tl.constexpr,  # both start equally far from one
    BLOCK: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // SPLITS
    part = tl.program_id(0) % SPLITS
    x_ptr = logits_ptr + row_start(row, inner, stride_a, stride_b, ALIGN if ALIGNED else 1)
    reference_row = reference_ptr + row_start(row, inner, reference_stride_a, reference_stride_b, ALIGN if ALIGNED else 1)
    row = row.to(tl.int64)
    if HAS_MASK:
        if tl.load(mask_ptr + row) == 0:
            return
    scale = row_inv_temperature(temperature, temperature_ptr, row, ROW_TEMPERATURE, ACC) * LOG2E
    begin, end = part_of(vocab, part, BLOCK, SPLITS)
    x_row, lead = row_boundary(x_ptr, ALIGN, SHIFTED)
    r_row, _lead = row_boundary(reference_row, ALIGN, SHIFTED)
    m = tl.full((), NEG_INF, ACC)
    ties = tl.zeros((), ACC)
    r0 = tl.zeros((), ACC)
    r1 = tl.zeros((), ACC)
    none = tl.zeros((), ACC)
    s0 = tl.zeros((LANES,), ACC)
    s1 = tl.zeros((LANES,), ACC)
    whole = end_of_whole_tiles(begin, end, vocab, ALIGN, SHIFTED, BLOCK)
    for i in tl.range(begin, whole, BLOCK, num_stages=STAGES):
        x, r = whole_tile(x_row, i, lead, ALIGN, SHIFTED, BLOCK, LANES), whole_tile(r_row, i, lead, ALIGN, SHIFTED, BLOCK, LANES)
        m, ties, r0, r1, none, s0, s1, none = add_tile(_difference(x, r, ACC), m, ties, r0, r1, none, s0, s1, none, scale, False)
    if SHIFTED:
        if end - whole > BLOCK:
            x, r = last_tile(x_row, whole, lead, end, SHIFTED, BLOCK, LANES), last_tile(r_row, whole, lead, end, SHIFTED, BLOCK, LANES)
            m, ties, r0, r1, none, s0, s1, none = add_tile(_difference(x, r, ACC), m, ties, r0, r1, none, s0, s1, none, scale, False)
            whole += BLOCK
    if whole < end:
        x, r = last_tile(x_row, whole, lead, end, SHIFTED, BLOCK, LANES), last_tile(r_row, whole, lead, end, SHIFTED, BLOCK, LANES)
        m, ties, r0, r1, none, s0, s1, none = add_tile(_difference(x, r, ACC), m, ties, r0, r1, none, s0, s1, none, scale, False)
    s0, s1 = sum_lanes(s0, lead, SHIFTED, LANES) + r0, sum_lanes(s1, lead, SHIFTED, LANES) + r1
    write_part(parts_ptr + (row * SPLITS + part) * STATE_KEPT, m, ties, s0, s1, none, False)


@triton.jit
def _gradient_tile(
    x_ptr, r_ptr, dx_ptr, dr_ptr, cols, valid, m, scale, constant, linear, HAS_OUT: tl.constexpr, HAS_REFERENCE_OUT: tl.constexpr, ACC: tl.constexpr
):
    t = exponent(_difference(tl.load(x_ptr + cols, mask=valid), tl.load(r_ptr + cols, mask=valid), ACC), m, scale)
    dz = tl.exp2(t) * (constant + linear * t)
    if HAS_OUT:
        tl.store(dx_ptr + cols, dz.to(dx_ptr.dtype.element_ty), mask=valid)
    if HAS_REFERENCE_OUT:
        tl.store(dr_ptr + cols, (0.0 - dz).to(dr_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=BATCH_SHAPES)
def did_entropy_backward_kernel(
    logits_ptr, reference_ptr, mask_ptr, temperature_ptr,  # [A, B, V] twice, [N], [N]
    state_ptr, grad_ptr, out_ptr, reference_out_ptr,  # [N, STATE_TARGETS], [N], [A, B, V] twice
    inner, stride_a, stride_b, reference_stride_a, reference_stride_b,
    out_stride_a, out_stride_b, reference_out_stride_a, reference_out_stride_b, vocab, groups, temperature,
    HAS_MASK: tl.constexpr, ROW_TEMPERATURE: tl.constexpr, HAS_OUT: tl.constexpr, HAS_REFERENCE_OUT: tl.constexpr, ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGNED: tl.constexpr,  # every row of all four starts on a boundary
    SAME_LEAD: tl.constexpr,  # or all equally far from one
    EDGES: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = pid // groups
    first = (pid - row * groups) * (TILES * BLOCK)
    DIVISOR: tl.constexpr = ALIGN if ALIGNED else 1
    start = row_start(row, inner, stride_a, stride_b, DIVISOR)
    reference_start = row_start(row, inner, reference_stride_a, reference_stride_b, DIVISOR)
    out_start = row_start(row, inner, out_stride_a, out_stride_b, DIVISOR)
    reference_out_start = row_start(row, inner, reference_out_stride_a, reference_out_stride_b, DIVISOR)
    row = row.to(tl.int64)
    lead, body, body_end, end, last = columns(out_start, first, vocab, ALIGN, ALIGNED, BLOCK, TILES)
    LEAD_DIVISOR: tl.constexpr = ALIGN if SAME_LEAD else 1
    x_ptr = logits_ptr + tl.multiple_of(start - lead, LEAD_DIVISOR)
    r_ptr = reference_ptr + tl.multiple_of(reference_start - lead, LEAD_DIVISOR)
    dx_ptr = out_ptr + tl.multiple_of(out_start - lead, ALIGN)
    dr_ptr = reference_out_ptr + tl.multiple_of(reference_out_start - lead, LEAD_DIVISOR)
    edge, in_row = edges(lead, body, body_end, end, ALIGN)
    g = tl.load(grad_ptr + row)
    active = g != 0
    if HAS_MASK:
        active = active & (tl.load(mask_ptr + row) != 0)
    if not active:
        if HAS_OUT:
            write_zeros(dx_ptr, first, last, edge, in_row, body, body_end, EDGES, BLOCK)
        if HAS_REFERENCE_OUT:
            write_zeros(dr_ptr, first, last, edge, in_row, body, body_end, EDGES, BLOCK)
        return
    inv_t = row_inv_temperature(temperature, temperature_ptr, row, ROW_TEMPERATURE, ACC)
    state_row = state_ptr + row * STATE_TARGETS
    m = tl.load(state_row + STATE_MAX)
    weight = inv_t * g / (1.0 + tl.load(state_row + STATE_REST))
    constant = weight * tl.load(state_row + STATE_MEAN_U)
    linear = -weight * LN2  # t is in base 2
    scale = inv_t * LOG2E
    if EDGES:
        if first == 0:
            _gradient_tile(x_ptr, r_ptr, dx_ptr, dr_ptr, edge, in_row, m, scale, constant, linear, HAS_OUT, HAS_REFERENCE_OUT, ACC)
    for tile in tl.range(first, last, BLOCK, num_stages=STAGES):
        cols = tile + tl.arange(0, BLOCK)
        in_body = (cols >= body) & (cols < body_end)
        _gradient_tile(x_ptr, r_ptr, dx_ptr, dr_ptr, cols, in_body, m, scale, constant, linear, HAS_OUT, HAS_REFERENCE_OUT, ACC)


def _sizes(logits, reference) -> tuple[int, int]:
    """(elements of both that fill whole 16 bytes, bytes that a column is counted as)"""
    return 16 // min(logits.element_size(), reference.element_size()), 2 * max(logits.element_size(), reference.element_size())


def _same_lead(align: int, *tensors) -> bool:
    """Whether a row starts equally far from a boundary in all of them."""
    x, *others = tensors
    return all(y.dtype == x.dtype and all((a - b) % align == 0 for a, b in zip(strides(x), strides(y), strict=True)) for y in others)


def did_entropy_forward(logits, reference, mask, temperature, out) -> None:
    entropy, state = out
    pointers, temperature, options = row_options(logits, mask, temperature, state.dtype)
    outer, inner, vocab = logits.shape
    align, column = _sizes(logits, reference)
    aligned = starts_aligned(logits, align) and starts_aligned(reference, align)
    same_lead = _same_lead(align, logits, reference) and (logits.data_ptr() - reference.data_ptr()) % 16 == 0
    card = gpu(logits.device)
    shape = forward_shape(card, vocab, column, aligned)
    side_by_side = 2 if card.capability >= (10, 0) else 1  # as for token_stats
    tile = dict(
        ALIGN=align,
        ALIGNED=aligned,
        SHIFTED=CAN_SHIFT and same_lead and not aligned,
        LANES=min(shape.block, side_by_side * shape.warps * card.warp_size * align),
        **dict(BLOCK=shape.block, STAGES=shape.stages, num_warps=shape.warps),
    )
    rows, parts = outer * inner, state.new_empty((outer * inner, shape.splits, STATE_KEPT.value))
    logsumexp = entropy.new_empty(rows)  # of the differences, which nobody asked for
    split = dict(SPLITS=shape.splits, **options)
    with device_of(logits):
        did_entropy_part_kernel[(rows * shape.splits,)](
            logits, reference, *pointers, parts, inner, *strides(logits), *strides(reference), vocab, temperature, **split, **tile
        )  # fmt: skip
        token_stats_split_merge_kernel[(rows,)](
            logits, logits, *pointers, logits, logits, parts, parts, logits, entropy, logsumexp, logits, logits, state,
            inner, *strides(logits), 0, 0, vocab, temperature, 0, 0.0, 0.0, **split,
            K=0, K_BLOCK=1, SOFTCAP=False, KEEP=None, OUTSIDE=None, SETS_ALIGN=1, ZEROS=True, SUM_SQ=False, KEPT=0, num_warps=target_warps(1),
        )  # fmt: skip


def did_entropy_backward(logits, reference, mask, temperature, state, grad, out) -> None:
    pointers, temperature, options = row_options(logits, mask, temperature, state.dtype)
    outer, inner, vocab = logits.shape
    align, column = _sizes(logits, reference)
    written = [x for x in out if x is not None]
    d_logits, d_reference = (written[0] if x is None else x for x in out)
    tensors = (logits, reference, d_logits, d_reference)
    aligned = all(s % align == 0 for x in tensors for s in strides(x))
    shape = backward_shape(gpu(logits.device), vocab, column, aligned)
    groups = triton.cdiv(vocab + (0 if aligned else align - 1), shape.tiles * shape.block)
    tile = dict(
        ALIGN=align,
        ALIGNED=aligned,
        SAME_LEAD=aligned or _same_lead(align, *tensors),
        EDGES=not aligned or vocab % align != 0,
        **dict(BLOCK=shape.block, TILES=shape.tiles, STAGES=shape.stages, num_warps=shape.warps),
    )
    options |= dict(HAS_OUT=out[0] is not None, HAS_REFERENCE_OUT=out[1] is not None)
    row_args = (inner, *(s for x in tensors for s in strides(x)), vocab, groups, temperature)
    with device_of(logits):
        did_entropy_backward_kernel[(outer * inner * groups,)](
            logits, reference, *pointers, state, grad, d_logits, d_reference, *row_args, **options, **tile
        )  # fmt: skip
