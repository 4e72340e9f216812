"""Divergences of two rows in float64: as the textbook has them, and so that small ones keep their digits."""

import math

import torch

import rlkern

KINDS = ("reverse_kl", "forward_kl", "mixed_kl", "cross_entropy", "jsd", "skew_forward_kl", "skew_reverse_kl", "alpha", "total_variation")
NATIVE = KINDS[:-2]  # kinds with kernels
DIVERGENCES = tuple(kind for kind in KINDS if kind != "cross_entropy")  # 0 for equal rows
SWAPPED = {  # kind -> the same with both rows' places exchanged, and whether beta becomes 1 - beta
    "reverse_kl": ("forward_kl", False),
    "forward_kl": ("reverse_kl", False),
    "mixed_kl": ("mixed_kl", True),
    "jsd": ("jsd", True),
    "skew_forward_kl": ("skew_reverse_kl", False),
    "skew_reverse_kl": ("skew_forward_kl", False),
    "alpha": ("alpha", True),
    "total_variation": ("total_variation", False),
}


def swapped(kind, beta):
    kind, complement = SWAPPED[kind]
    return {"kind": kind, "beta": 1 - beta if complement else beta}


def draw(*shape, dtype=torch.float32, scale=3.0, noise=None, seed=0):
    """Two rows of logits N(0, scale). With `noise` the other is the first plus so much noise."""
    g = torch.Generator().manual_seed(seed)
    z, w = (torch.randn(*shape, generator=g, dtype=torch.float64) for _ in range(2))
    z = (scale * z).to(dtype)
    return z, ((scale * w) if noise is None else z.double() + noise * w).to(dtype)


def _scaled(x, temperature):
    return x.double() / (temperature.double().unsqueeze(-1) if isinstance(temperature, torch.Tensor) else temperature)


def textbook(logits, other, kind="reverse_kl", beta=0.5, temperature=1.0, other_temperature=None):
    """With gradients by both."""
    p, q = _scaled(logits, temperature).softmax(-1), _scaled(other, temperature if other_temperature is None else other_temperature).softmax(-1)

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    m = beta * q + (1 - beta) * p
    return {
        "reverse_kl": lambda: kl(p, q),
        "forward_kl": lambda: kl(q, p),
        "mixed_kl": lambda: beta * kl(q, p) + (1 - beta) * kl(p, q),
        "cross_entropy": lambda: -(q * p.log()).sum(-1),
        "jsd": lambda: beta * kl(q, m) + (1 - beta) * kl(p, m),
        "skew_forward_kl": lambda: kl(q, m),
        "skew_reverse_kl": lambda: kl(p, beta * p + (1 - beta) * q),
        "alpha": lambda: (1 - (q**beta * p ** (1 - beta)).sum(-1)) / (beta * (1 - beta)),
        "total_variation": lambda: (p - q).abs().sum(-1) / 2,
    }[kind]()


def precise(logits, other, kind="reverse_kl", beta=0.5, temperature=1.0, other_temperature=None):
    """(value, gradient by the logits, the gradient's largest term by row), for -inf by the limits.

    A sum of p f(log(q / p)) with f >= 0 and f'(0) = 0. An error of log(q / p) counts by its square, so a
    divergence of 1e-12 is off by 1e-8 of itself.
    """
    log_p = _scaled(logits, temperature).log_softmax(-1)
    log_q = _scaled(other, temperature if other_temperature is None else other_temperature).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    no_p, no_q, b, k = log_p == -math.inf, log_q == -math.inf, beta, 1 - beta
    x = torch.where(no_p, 0.0, log_q - log_p)
    t = torch.expm1(x)

    def h(t):
        return torch.special.xlog1py(1 + t, t) - t

    f, without_p, g = {  # without_p: the limit of p f / q as p goes to 0
        "reverse_kl": (t - x, 1.0, -x),
        "forward_kl": (h(t), math.inf, -t),
        "mixed_kl": (b * h(t) + k * (t - x), math.inf, -b * t - k * x),
        "cross_entropy": (-(1 + t) * log_p.masked_fill(no_p, 0.0), math.inf, -t),
        "jsd": (b * h(t) - h(b * t), -b * math.log(b), -k * torch.log1p(b * t)),
        "skew_forward_kl": (h(t) - h(b * t) - k * t * torch.log1p(b * t), -math.log(b) - k, -k * k * t / (1 + b * t)),
        "skew_reverse_kl": (k * t - torch.log1p(k * t), k, b * k * t / (1 + k * t) - torch.log1p(k * t)),
        "alpha": ((torch.expm1(b * x) - b * t) / (b * (b - 1)), 1 / k, -torch.expm1(b * x) / b),
        "total_variation": (t.abs() / 2, 0.5, -x.sign() / 2),
    }[kind]
    terms = torch.where(no_p, math.inf if without_p == math.inf else q * without_p, p * f)
    if kind in ("reverse_kl", "mixed_kl"):
        terms = torch.where(no_q, math.inf, terms)  # even if p underflows
    value = terms.masked_fill(no_p & no_q, 0.0).sum(-1)
    p_g = torch.where(no_p, 0.0, p * g)
    mean = p_g.sum(-1, keepdim=True)
    gradient = _scaled(p_g - p * mean, temperature).masked_fill(value.unsqueeze(-1) == math.inf, math.nan)
    return value, gradient, _scaled(p_g.abs() + p * mean.abs(), temperature).amax(-1)


def both(z, w, **options):
    """(value, gradient)"""
    leaf = z.detach().requires_grad_()  # no copy: strides and address are part of the case
    value = rlkern.token_divergence(leaf, w, **options)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def assert_value(got, expected, rtol):
    torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=0, equal_nan=True)


def assert_gradient(got, expected, largest, rtol):
    """To rtol of the largest term of the row, and once rounded to the dtype."""
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(got.dtype, 0.0)
    smallest = 2**-24 if got.dtype == torch.float16 else 0.0
    allowed = rtol * largest.nan_to_num(0.0).unsqueeze(-1) + rounding * expected.abs() + smallest
    wrong = ~((got.double() - expected).abs() <= allowed) & ~(got.isnan() & expected.isnan())
    at = wrong.nonzero()
    assert not len(at), f"{len(at)} entries, first {at[0].tolist()}: {got[wrong][0]} for {expected[wrong][0]}, allowed {allowed[wrong][0]}"


def check(z, w, *, value_rtol=5e-6, gradient_rtol=1e-6, **options):
    expected = precise(z, w, **options)
    got = both(z, w, **options)
    assert_value(got[0], expected[0], value_rtol)
    assert_gradient(got[1], *expected[1:], gradient_rtol)
