"""What every kernel over rows of logits [A, B, V] starts with."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEG_INF = tl.constexpr(float("-inf"))
FLOOR = tl.constexpr(-2000.0)  # 2^FLOOR is 0 in float32 and float64, and unlike -inf it can be multiplied by 0

# Arguments that change with the batch. Code that depends on one being 1, or a multiple of 16, would be
# compiled again in the middle of a run.
BATCH_SHAPE = ("inner", "stride_a", "out_stride_a", "sets_stride_a")


@triton.jit
def row_start(row, inner, stride_a, stride_b, DIVISOR: tl.constexpr = 1):
    """Offset of a row, a multiple of DIVISOR. It may pass 2^31. The row number does not: 32-bit division."""
    return tl.multiple_of((row // inner).to(tl.int64) * stride_a + (row % inner).to(tl.int64) * stride_b, DIVISOR)


@triton.jit
def row_inv_temperature(temperature, temperature_ptr, row, ROW_TEMPERATURE: tl.constexpr, ACC: tl.constexpr):
    if ROW_TEMPERATURE:
        t = tl.load(temperature_ptr + row).to(ACC)
        return tl.where(t > 0, 1.0 / t, float("nan"))
    return 1.0 / tl.cast(temperature, ACC)


@triton.jit
def row_targets(row, targets_ptr, mask_ptr, ignore_index, K: tl.constexpr, K_BLOCK: tl.constexpr, HAS_MASK: tl.constexpr):
    """(whether the row counts, its targets [K_BLOCK])"""
    y = tl.zeros((K_BLOCK,), tl.int64)
    active = row >= 0
    if HAS_MASK:
        active = tl.load(mask_ptr + row) != 0
    if K > 0:
        k = tl.arange(0, K_BLOCK)
        y = tl.load(targets_ptr + row * K + k, mask=k < K, other=ignore_index)
        active = active & (tl.sum((y != ignore_index).to(tl.int32), axis=0) > 0)
    return active, y


@triton.jit
def exponent(x, m, scale):
    """(x - m) * scale, -inf clamped to FLOOR; NaN stays NaN. Not x * scale - m * scale: that
    loses rows with a large common offset."""
    return tl.maximum((x - m) * scale, FLOOR, propagate_nan=tl.PropagateNan.ALL)
