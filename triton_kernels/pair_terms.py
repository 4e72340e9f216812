"""Entries of two rows: their log ratio x = log(q / p), and e times functions of it, e in proportion to p.

Where |x| <= 1/2 differences of e and q are computed from x by series, so that nothing cancels. Beyond, from e
and q, each by one exponential: no product of a large and a small number.
"""

import triton
import triton.language as tl

from .constants import (
    PAIR_KIND_CROSS_ENTROPY,
    PAIR_KIND_FORWARD_KL,
    PAIR_KIND_JSD,
    PAIR_KIND_MIXED_KL,
    PAIR_KIND_REVERSE_KL,
    PAIR_KIND_SKEW_FORWARD_KL,
)
from .math import excess, log1p_gap
from .rows import LOG2E

NEAR = tl.constexpr(0.5)
APART = tl.constexpr(32.0)  # logits


@triton.jit
def bounded(x):
    """x with finite numbers in place of infinities, for products with 0. Of NaN it is a finite number too."""
    if x.dtype == tl.float64:
        return tl.minimum(tl.maximum(x, -1e300), 1e300)
    return tl.minimum(tl.maximum(x, -1e30), 1e30)


@triton.jit
def log_ratio(z, w, ref, other_ref, inv_t, difference, SAME_TEMPERATURE: tl.constexpr):
    """(w - other_ref) / other_temperature - (z - ref) / temperature: x up to the row's offset. The difference
    of the logits is taken first: near equality it is exact. Rows that lie far apart would lose digits by it.
    difference: that of the inverse temperatures."""
    lead = ref - other_ref
    apart = tl.abs(lead) > APART
    x = ((w - tl.where(apart, other_ref, 0.0)) - (z - tl.where(apart, ref, 0.0)) + tl.where(apart, 0.0, lead)) * inv_t
    if not SAME_TEMPERATURE:
        x += (w - other_ref) * difference
    return x


@triton.jit
def ratio_term(e, q, x):
    """e t, t = e^x - 1"""
    return tl.where(tl.abs(x) <= NEAR, e * (x + excess(x)), q - e)


@triton.jit
def _mixture(x, share):
    """M = (1 - share) p + share q far from equality: (log(M / p), log(q / M), t / (1 + share t)). For x > 0
    seen from q: nothing overflows."""
    lesser = tl.exp2(-tl.abs(x) * LOG2E)  # min(p, q) / max(p, q)
    own = tl.where(x > 0, share, 1.0 - share)  # the larger one's share
    total = own + (1.0 - own) * lesser
    rest = tl.log(total)
    gap = (1.0 - lesser) / total
    return tl.maximum(x, 0.0) + rest, tl.minimum(x, 0.0) - rest, tl.where(x > 0, gap, -gap)


@triton.jit
def mixture_terms(e, q, x, beta, KIND: tl.constexpr):
    """(e f, e g) of the divergences from a mixture"""
    near = tl.abs(x) <= NEAR
    phi = excess(x)
    t = x + phi
    if KIND == PAIR_KIND_JSD or KIND == PAIR_KIND_SKEW_FORWARD_KL:
        share = beta
    else:
        share = 1.0 - beta
    rest = 1.0 - share
    v = share * t
    gap = log1p_gap(tl.where(near, v, 0.0))
    y = v - gap  # log(1 + v)
    log_m, log_other, slope = _mixture(x, share)
    if KIND == PAIR_KIND_JSD:
        f = share * (x * t - phi) - (y * v - gap)
        far_f = share * q * log_other - rest * e * log_m
        g = -rest * y
        far_g = -rest * e * log_m
    elif KIND == PAIR_KIND_SKEW_FORWARD_KL:
        f = (x * t - phi) - (y * v - gap) - rest * t * y
        far_f = q * log_other - rest * (q - e)
        g = -rest * rest * t / (1.0 + v)
        far_g = -rest * rest * (e * slope)
    else:
        f = gap
        far_f = share * (q - e) - e * log_m
        g = beta * v / (1.0 + v) - y
        far_g = e * (beta * share * slope - log_m)
    return tl.where(near, e * f, far_f), tl.where(near, e * g, far_g)


@triton.jit
def slope_term(e, q, x, beta, KIND: tl.constexpr):
    """e g, where a divergence sum p f has the gradient p (g - sum p g). The reverse KL does without q."""
    if KIND == PAIR_KIND_REVERSE_KL:
        return -e * x
    elif KIND == PAIR_KIND_FORWARD_KL or KIND == PAIR_KIND_CROSS_ENTROPY:
        return -ratio_term(e, q, x)
    elif KIND == PAIR_KIND_MIXED_KL:
        return -beta * ratio_term(e, q, x) - (1.0 - beta) * (e * x)
    else:
        _f, g = mixture_terms(e, q, x, beta, KIND)
        return g
