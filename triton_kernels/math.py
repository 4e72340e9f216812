"""What Triton lacks on every target (its interpreter has no libdevice). Used once a row: a series will do."""

import triton
import triton.language as tl


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, accurate relative to x."""
    if x.dtype == tl.float64:
        w = 1.0 + x
        small = tl.where(w == 1.0, x, tl.log(w) * (x / (w - 1.0)))
        return tl.where(x < 1.0, small, tl.log(w))  # of +inf small is NaN
    # The hardware's log2 has an absolute error near 1; there 2 atanh(x / (2 + x)) as a series.
    s = x / (2.0 + x)
    q = s * s
    series = 1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9 + q * (1.0 / 11 + q * (1.0 / 13))))))
    return tl.where(x < 0.5, 2.0 * s * series, tl.log(1.0 + x))


@triton.jit
def expm1(x):
    """e^x - 1 for x >= 0, accurate relative to it."""
    if x.dtype == tl.float64:
        w = tl.exp(x)
        small = tl.where(w == 1.0, x, (w - 1.0) * (x / tl.log(w)))
        return tl.where(x < 1.0, small, w - 1.0)
    series = 1.0 + x * (1.0 / 5) * (1.0 + x * (1.0 / 6) * (1.0 + x * (1.0 / 7) * (1.0 + x * (1.0 / 8))))
    series = 1.0 + x * 0.5 * (1.0 + x * (1.0 / 3) * (1.0 + x * 0.25 * series))
    return tl.where(x < 0.5, x * series, tl.exp(x) - 1.0)
