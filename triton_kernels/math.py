"""What Triton lacks on every target (its interpreter has no libdevice)."""

import triton
import triton.language as tl


@triton.jit
def sum_scaled(k, x):
    """sum k x over a row's parts, the same bits in every thread. In tl.sum(k * x) the first addition may be
    an FMA: a thread's own product is not rounded there, but the one that it gets from another thread is."""
    return tl.sum(tl.fma(k, x, 0.0), axis=0)


@triton.jit
def log1p(x):
    """log(1 + x) for x > -1, accurate relative to x. Used once a row: a series will do."""
    if x.dtype == tl.float64:
        w = 1.0 + x
        small = tl.where(w == 1.0, x, tl.log(w) * (x / (w - 1.0)))
        return tl.where(x < 1.0, small, tl.log(w))  # of +inf small is NaN
    # The hardware's log2 has an absolute error near 1; there 2 atanh(x / (2 + x)) as a series.
    s = x / (2.0 + x)
    q = s * s
    series = 1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9 + q * (1.0 / 11 + q * (1.0 / 13))))))
    return tl.where(tl.abs(x) < 0.5, 2.0 * s * series, tl.log(1.0 + x))


@triton.jit
def excess(x):
    """e^x - 1 - x for |x| <= 1/2, relative to itself: 7 multiply-adds in float32."""
    if x.dtype == tl.float64:
        series = 1.0 + x * (1.0 / 16)
        for n in tl.static_range(15, 2, -1):
            series = 1.0 + x * (1.0 / n) * series
        return 0.5 * x * x * series
    series = 1.0 / 720 + x * (1.0 / 5040 + x * (1.0 / 40320))
    return x * x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * series))))


@triton.jit
def log1p_gap(x):
    """x - log(1 + x) for -0.4 <= x <= 0.7, relative to itself."""
    s = x / (2.0 + x)
    q = s * s
    if x.dtype == tl.float64:
        series = q * 0.0 + 1.0 / 33
        for n in tl.static_range(31, 1, -2):
            series = 1.0 / n + q * series
    else:
        series = 1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9 + q * (1.0 / 11 + q * (1.0 / 13)))))
    return s * (x - 2.0 * q * series)


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


@triton.jit
def _decay(x, inverse_cap):
    """(r = e^(-2 |x| / cap), 1 / (1 + r)); a division would look after infinities"""
    r = tl.exp2(tl.abs(x) * (inverse_cap * -2.8853900817779268))
    root = tl.rsqrt(1.0 + r)
    return r, root * root


@triton.jit
def _tanh_near_0(a):
    """tanh(a) for |a| <= 0.4, relative to itself."""
    q = a * a
    if a.dtype == tl.float64:
        fraction = q * 0.0 + 19.0
        for n in tl.static_range(17, 0, -2):
            fraction = n + q / fraction
        return a / fraction
    return a + a * q * (-0.33333328 + q * (0.13332532 + q * (-0.053715121 + q * 0.019268045)))


@triton.jit
def soft_cap(x, inverse_cap, SOFTCAP: tl.constexpr):
    """tanh(x / cap) if there is a softcap, else x. -inf stays: it is a mask, also of lanes beyond the row."""
    if SOFTCAP:
        r, inverse = _decay(x, inverse_cap)
        a = x * inverse_cap
        far = tl.fma(-2.0 * r, inverse, 1.0)  # said as one: every kernel must find the same maximum
        w = tl.where(tl.abs(a) < 0.4, _tanh_near_0(a), tl.where(x < 0, -far, far))
        x = tl.where(x == float("-inf"), x, w)
    return x


@triton.jit
def soft_cap_slope(x, inverse_cap):
    """The derivative of tanh(x / cap) by x. 1 - tanh^2 would be 0 where the tanh rounds to 1."""
    r, inverse = _decay(x, inverse_cap)
    return r * inverse * inverse * (4.0 * inverse_cap)
