"""The output matrix at listed ids on a GPU: logits of pairs (row, id), statistics of each row's, gradients.

The gradient of the matrix takes the pairs sorted by id, a block of them a program. An id whose pairs lie in
one block is written at once. Of others each block leaves its part, and a second launch adds these up in
order: an id in every row costs no program more than its share, and there are no atomics.

Calling convention: rlkern/backends/contract.py.
"""

import torch
import triton
import triton.language as tl

from .constants import STATE_KEPT, STATE_MAX, STATE_MEAN_U, STATE_REST, STATE_SUM_SQ
from .gradient import load_upstream
from .launch import device_of, starts_aligned, strides
from .math import log1p
from .rows import BATCH_SHAPE, FLOOR, NEG_INF, row_inv_temperature, row_start

PAIRS, COLUMNS, WARPS = 8, 256, 4  # a tile of pairs
SORTED_PAIRS, WIDE = 32, 512  # pairs of an id one after the other, of so many columns
LIST = 64  # entries of a row at once: half of all lists hold one or two
NEVER_ONE = (*BATCH_SHAPE, "pairs", "rows", "blocks")


@triton.jit
def _starts(row, inner, stride_a, stride_b, ALIGN: tl.constexpr):
    """Offsets [PAIRS] of rows, multiples of ALIGN."""
    start = (row // inner).to(tl.int64) * stride_a + (row % inner).to(tl.int64) * stride_b
    return tl.multiple_of(start, (ALIGN,))


@triton.jit(do_not_specialize=NEVER_ONE)
def kept_logits_kernel(
    hidden_ptr, weight_ptr, bias_ptr,  # [A, B, H], [V, H], [V]
    ids_ptr, row_ptr, out_ptr,  # [pairs] each
    inner, stride_a, stride_b, weight_stride, pairs, rows, vocab, width,
    HAS_BIAS: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * PAIRS
    p = first + tl.arange(0, PAIRS)
    row = tl.load(row_ptr + p, mask=p < pairs, other=rows)
    token = tl.load(ids_ptr + p, mask=p < pairs, other=vocab)
    real = (row < rows) & (token < vocab)
    acc = tl.zeros((PAIRS, BLOCK), ACC)
    end = tl.where(tl.load(row_ptr + first) < rows, width, 0)  # else all are behind the last pair
    h_start = _starts(row, inner, stride_a, stride_b, ALIGN)[:, None]
    w_start = tl.multiple_of(token.to(tl.int64) * weight_stride, (ALIGN,))[:, None]
    for start in range(0, end, BLOCK):
        cols = start + tl.arange(0, BLOCK)[None, :]
        inside = real[:, None] & (cols < width)
        h = tl.load(hidden_ptr + h_start + cols, mask=inside, other=0.0)
        w = tl.load(weight_ptr + w_start + cols, mask=inside, other=0.0)
        acc += h.to(ACC) * w.to(ACC)
    x = tl.sum(acc, axis=1)
    if HAS_BIAS:
        x += tl.load(bias_ptr + token, mask=real, other=0.0).to(ACC)
    x = tl.where(real, x, tl.where(row < rows, float("nan"), 0.0))
    tl.store(out_ptr + p, x, mask=p < pairs)


@triton.jit(do_not_specialize=NEVER_ONE)
def kept_hidden_gradient_kernel(
    weight_ptr, ids_ptr, offsets_ptr, grad_ptr, out_ptr,  # [V, H], [pairs], [N + 1], [pairs], [N, H]
    weight_stride, vocab, width,
    ACC: tl.constexpr, ALIGN: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    end = tl.load(offsets_ptr + row + 1)
    acc = tl.zeros((PAIRS, BLOCK), ACC)
    for first in range(tl.load(offsets_ptr + row), end, PAIRS):
        p = first + tl.arange(0, PAIRS)
        token = tl.load(ids_ptr + p, mask=p < end, other=vocab)
        g = tl.load(grad_ptr + p, mask=p < end, other=0.0)  # NaN beside an id outside
        start = tl.multiple_of(token.to(tl.int64) * weight_stride, (ALIGN,))[:, None]
        w = tl.load(weight_ptr + start + cols, mask=(token < vocab)[:, None] & (cols < width), other=0.0)
        acc += g[:, None] * w.to(ACC)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + row * width + cols, tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty), mask=cols < width)


@triton.jit(do_not_specialize=NEVER_ONE)
def kept_weight_gradient_kernel(
    hidden_ptr,  # [A, B, H]
    ids_ptr, row_ptr, grad_ptr,  # [pairs], sorted by id
    out_ptr, parts_ptr,  # [V, H]; [blocks, 2, H]: of an id that began before this block, of one that goes on after it
    inner, stride_a, stride_b, pairs, vocab, width,
    ACC: tl.constexpr, ALIGN: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = block * PAIRS
    last = tl.minimum(first + PAIRS, pairs)
    before = tl.load(ids_ptr + first - 1, mask=first > 0, other=-1)
    token = tl.load(ids_ptr + first)
    acc = tl.zeros((BLOCK,), ACC)
    for p in range(first, last):
        start = row_start(tl.load(row_ptr + p), inner, stride_a, stride_b, ALIGN)
        read = tl.where(token < vocab, width, 0)
        acc += tl.load(grad_ptr + p) * tl.load(hidden_ptr + start + cols, mask=cols < read, other=0.0).to(ACC)
        following = tl.load(ids_ptr + p + 1, mask=p + 1 < pairs, other=-1)
        ends, goes_on = following != token, (following == token) & (p + 1 == last)
        whole = tl.where(ends & (token != before), read, 0)
        tl.store(out_ptr + token.to(tl.int64) * width + cols, acc.to(out_ptr.dtype.element_ty), mask=cols < whole)
        part = tl.where(goes_on | (ends & (token == before)), read, 0)
        tl.store(parts_ptr + (2 * block + (token != before).to(tl.int64)) * width + cols, acc, mask=cols < part)
        acc = tl.where(ends, 0.0, acc)
        token = following


@triton.jit(do_not_specialize=NEVER_ONE)
def kept_weight_parts_kernel(
    ids_ptr, out_ptr, parts_ptr,  # as above
    pairs, blocks, vocab, width,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    last = (block + 1) * PAIRS
    if last >= pairs:
        return
    token = tl.load(ids_ptr + last - 1)
    began_before = tl.load(ids_ptr + block * PAIRS - 1, mask=block > 0, other=-1) == token
    if (token >= vocab) | began_before | (tl.load(ids_ptr + last) != token):
        return
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.load(parts_ptr + (2 * block + 1) * width + cols, mask=cols < width, other=0.0)
    block += 1
    going = True
    while going:
        acc += tl.load(parts_ptr + 2 * block * width + cols, mask=cols < width, other=0.0)
        block += 1
        going = tl.load(ids_ptr + block * PAIRS, mask=block < blocks, other=-1) == token
    tl.store(out_ptr + token.to(tl.int64) * width + cols, acc.to(out_ptr.dtype.element_ty), mask=cols < width)


@triton.jit(do_not_specialize=NEVER_ONE)
def kept_rows_kernel(
    logits_ptr, ids_ptr, offsets_ptr,  # [pairs], [pairs], [N + 1]
    targets_ptr, counted_ptr, temperature_ptr,  # [N, K], [N], [N]
    logp_ptr, entropy_ptr, logsumexp_ptr, sum_sq_ptr, state_ptr, place_ptr,  # [N, K], 3 x [N], [N, STATE_KEPT], [N, K]
    temperature, n_targets,
    ROW_TEMPERATURE: tl.constexpr, ENTROPY: tl.constexpr, SUM_SQ: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets_ptr + row)
    end = tl.load(offsets_ptr + row + 1)
    counted = tl.load(counted_ptr + row) != 0
    inv_t = row_inv_temperature(temperature, temperature_ptr, row, ROW_TEMPERATURE, ACC)
    top = tl.full((BLOCK,), NEG_INF, ACC)
    unordered = tl.zeros((BLOCK,), tl.int32)
    for start in range(begin, end, BLOCK):
        p = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + p, mask=p < end, other=NEG_INF)
        unordered |= (x != x).to(tl.int32)
        top = tl.maximum(top, x)
    m = tl.where(tl.max(unordered, axis=0) > 0, float("nan"), tl.max(top, axis=0))
    undefined = (m != m) | (tl.abs(m) == float("inf"))
    shift = tl.where(undefined, 0.0, m)  # -inf - -inf would be NaN
    s0 = tl.zeros((BLOCK,), ACC)
    s1 = tl.zeros((BLOCK,), ACC)
    s2 = tl.zeros((BLOCK,), ACC)
    ties = tl.zeros((BLOCK,), tl.int32)
    for start in range(begin, end, BLOCK):
        p = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + p, mask=p < end, other=NEG_INF)
        u = tl.maximum((x - shift) * inv_t, FLOOR)
        e = tl.exp(u)
        s1 += e * u
        s2 += e * e
        ties += (x == m).to(tl.int32)
        s0 += tl.where(x == m, 0.0, e)  # the sum is without the 1 of the maximum
    rest = tl.sum(s0, axis=0) + (tl.sum(ties, axis=0) - 1).to(ACC)
    rest = tl.where(undefined, float("nan"), rest)
    log_s0 = log1p(rest)
    mean_u = tl.sum(s1, axis=0) / (1.0 + rest)
    sum_sq = tl.sum(s2, axis=0) / ((1.0 + rest) * (1.0 + rest))
    lse = tl.where(m == NEG_INF, NEG_INF, m * inv_t + log_s0)
    tl.store(logsumexp_ptr + row, tl.where(counted, lse, 0.0))
    if ENTROPY:
        tl.store(entropy_ptr + row, tl.where(counted, log_s0 - mean_u, 0.0))
    if SUM_SQ:
        tl.store(sum_sq_ptr + row, tl.where(counted, sum_sq, 0.0))
    state = state_ptr + row * STATE_KEPT
    tl.store(state + STATE_MAX, tl.where(counted, m, 0.0))
    tl.store(state + STATE_REST, tl.where(counted, rest, 0.0))
    tl.store(state + STATE_MEAN_U, tl.where(counted, mean_u, 0.0))
    tl.store(state + STATE_SUM_SQ, tl.where(counted, sum_sq, 0.0))
    for k in range(n_targets):
        y = tl.load(targets_ptr + row * n_targets + k)
        at = tl.full((BLOCK,), 1 << 30, tl.int32)
        for start in range(begin, end, BLOCK):
            p = start + tl.arange(0, BLOCK)
            token = tl.load(ids_ptr + p, mask=p < end, other=-1)
            at = tl.minimum(at, tl.where(token == y, (p - begin).to(tl.int32), 1 << 30))
        place = tl.min(at, axis=0)
        found = (place < (1 << 30)) & (y >= 0)
        x = tl.load(logits_ptr + begin + place, mask=found, other=NEG_INF)
        logp = tl.where(x == NEG_INF, NEG_INF, (x - shift) * inv_t - log_s0)
        logp = tl.where(undefined, float("nan"), logp)
        tl.store(logp_ptr + row * n_targets + k, tl.where(counted & (y >= 0), logp, 0.0))
        tl.store(place_ptr + row * n_targets + k, tl.where(found, place, -1))


@triton.jit(do_not_specialize=NEVER_ONE)
def kept_rows_backward_kernel(
    logits_ptr, offsets_ptr, place_ptr, temperature_ptr,  # [pairs], [N + 1], [N, K], [N]
    state_ptr, g_logp_ptr, g_entropy_ptr, g_logsumexp_ptr, g_sum_sq_ptr, out_ptr,  # [N, STATE_KEPT], [N, K], 3 x [N], [pairs]
    temperature, n_targets,
    HAS_LOGP: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_LOGSUMEXP: tl.constexpr, HAS_SUM_SQ: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    end = tl.load(offsets_ptr + row + 1)
    inv_t = row_inv_temperature(temperature, temperature_ptr, row, ROW_TEMPERATURE, ACC)
    state = state_ptr + row * STATE_KEPT
    m = tl.load(state + STATE_MAX)
    rest = tl.load(state + STATE_REST)
    mean_u = tl.load(state + STATE_MEAN_U)
    sum_sq = tl.load(state + STATE_SUM_SQ)
    g_entropy = load_upstream(g_entropy_ptr, row, HAS_ENTROPY, ACC)
    g_lse = load_upstream(g_logsumexp_ptr, row, HAS_LOGSUMEXP, ACC)
    g_sum_sq = load_upstream(g_sum_sq_ptr, row, HAS_SUM_SQ, ACC)
    total = tl.zeros((), ACC)
    idle = (g_entropy == 0) & (g_lse == 0) & (g_sum_sq == 0)
    if HAS_LOGP:
        for k in range(n_targets):
            g = tl.load(g_logp_ptr + row * n_targets + k)
            g = tl.where(tl.load(place_ptr + row * n_targets + k) >= 0, g, 0.0)
            total += g
            idle = idle & (g == 0)
    begin = tl.load(offsets_ptr + row)
    for start in range(begin, end, BLOCK):
        p = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + p, mask=p < end, other=NEG_INF)
        u = tl.maximum((x - m) * inv_t, FLOOR, propagate_nan=tl.PropagateNan.ALL)
        q = tl.exp(u) / (1.0 + rest)
        upstream = tl.zeros((BLOCK,), ACC)
        if HAS_LOGP:
            for k in range(n_targets):
                here = p - begin == tl.load(place_ptr + row * n_targets + k)
                upstream += tl.where(here, tl.load(g_logp_ptr + row * n_targets + k), 0.0)
        common = g_lse + tl.zeros((BLOCK,), ACC)
        if HAS_ENTROPY:
            common -= tl.where(g_entropy == 0, 0.0, g_entropy * (u - mean_u))  # entropy + log q
        if HAS_SUM_SQ:
            common += tl.where(g_sum_sq == 0, 0.0, 2.0 * g_sum_sq * (q - sum_sq))
        # 1 - q without cancellation: at the maximum it is rest / (1 + rest), and elsewhere q <= 1/2.
        others = tl.where(x == m, rest / (1.0 + rest), 1.0 - q)
        dz = inv_t * (q * (common + (upstream - total)) + upstream * others)
        tl.store(out_ptr + p, tl.where(idle, 0.0, dz), mask=p < end)


def _acc(dtype: torch.dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32


def _alignment(*matrices: torch.Tensor) -> int:
    """Elements that every row of all [A, B, H] starts on a multiple of, in 16 bytes."""
    align = 16 // matrices[0].element_size()
    return align if all(starts_aligned(x, align) for x in matrices) else 1


def kept_logits(hidden, weight, bias, ids, row, out) -> None:
    outer, inner, width = hidden.shape
    sizes = (inner, *strides(hidden), weight.stride(1), len(ids), outer * inner, weight.shape[1], width)
    options = dict(HAS_BIAS=bias is not None, ACC=_acc(out.dtype), ALIGN=_alignment(hidden, weight), PAIRS=PAIRS, BLOCK=COLUMNS)
    with device_of(hidden):
        kept_logits_kernel[(triton.cdiv(len(ids), PAIRS),)](
            hidden, weight, hidden if bias is None else bias, ids, row, out, *sizes, **options, num_warps=WARPS
        )  # fmt: skip


def kept_hidden_gradient(weight, ids, offsets, grad, out) -> None:
    n, width = out.shape
    options = dict(ACC=_acc(grad.dtype), ALIGN=_alignment(weight), PAIRS=PAIRS, BLOCK=COLUMNS, num_warps=WARPS)
    with device_of(weight):
        kept_hidden_gradient_kernel[(n, triton.cdiv(width, COLUMNS))](
            weight, ids, offsets, grad, out, weight.stride(1), weight.shape[1], width, **options
        )  # fmt: skip


def kept_weight_gradient(hidden, ids, row, grad, out) -> None:
    _, inner, width = hidden.shape
    pairs, vocab = len(ids), len(out)
    blocks, options = triton.cdiv(pairs, SORTED_PAIRS), dict(PAIRS=SORTED_PAIRS, BLOCK=WIDE, num_warps=WARPS)
    if blocks == 0:
        return
    parts = grad.new_empty((blocks, 2, width))
    grid = (blocks, triton.cdiv(width, WIDE))
    with device_of(hidden):
        kept_weight_gradient_kernel[grid](
            hidden, ids, row, grad, out, parts, inner, *strides(hidden), pairs, vocab, width,
            ACC=_acc(grad.dtype), ALIGN=_alignment(hidden), **options,
        )  # fmt: skip
        kept_weight_parts_kernel[grid](ids, out, parts, pairs, blocks, vocab, width, **options)


def _temperature(temperature, n: int, acc: torch.dtype, absent: torch.Tensor) -> tuple:
    """(pointer, number, whether each row has one). A Python float reaches a kernel as float32."""
    if acc == torch.float64 and not isinstance(temperature, torch.Tensor):
        temperature = torch.full((n,), temperature, dtype=acc, device=absent.device)
    return (temperature, 1.0, True) if isinstance(temperature, torch.Tensor) else (absent, temperature, False)


def kept_rows_forward(logits, ids, row, offsets, targets, counted, temperature, out) -> None:
    logp, entropy, logsumexp, sum_sq, state, place = out
    n, n_targets = targets.shape
    temperatures, temperature, per_row = _temperature(temperature, n, state.dtype, logits)
    options = dict(ROW_TEMPERATURE=per_row, ENTROPY=entropy is not None, SUM_SQ=sum_sq is not None, ACC=_acc(state.dtype), BLOCK=LIST)
    absent = [logsumexp if x is None else x for x in (entropy, logsumexp, sum_sq)]
    with device_of(logits):
        kept_rows_kernel[(n,)](
            logits, ids, offsets, targets, counted, temperatures, logp, *absent, state, place, temperature, n_targets, **options, num_warps=1
        )  # fmt: skip


def kept_rows_backward(logits, row, offsets, place, temperature, state, grads, out) -> None:
    n, n_targets = place.shape
    temperatures, temperature, per_row = _temperature(temperature, n, state.dtype, logits)
    options = dict(**{f"HAS_{name}": g is not None for name, g in zip(("LOGP", "ENTROPY", "LOGSUMEXP", "SUM_SQ"), grads, strict=True)},
                   ROW_TEMPERATURE=per_row, ACC=_acc(state.dtype), BLOCK=LIST)  # fmt: skip
    with device_of(logits):
        kept_rows_backward_kernel[(n,)](
            logits, offsets, place, temperatures, state, *(state if g is None else g for g in grads), out, temperature, n_targets,
            **options, num_warps=1,
        )  # fmt: skip
