"""Accuracy, not speed: errors against float64 beside eager PyTorch's, inputs that break others, close pairs.

python benchmarks/accuracy.py          # without a GPU, TRITON_INTERPRET=1 adds the Triton kernels
"""

import contextlib
import functools
import math
import os

import torch
from contenders import log_softmax_pair, trl_gkd
from table import columns

import rlkern
from rlkern import backends

ROWS, VOCAB = 16, 9001
PAIR_KINDS = ("reverse_kl", "jsd")


def names() -> list[str]:
    usable = [n for n in ("reference", "native", "triton") if not isinstance(backends.load(n), Exception)]
    on_cpu = not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
    return [n for n in usable if n != "triton" or not on_cpu]


def eager(logits, targets):
    log_p = torch.log_softmax(logits, -1)
    return log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def fused(name):
    def run(logits, targets):
        device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
        with rlkern.use_backend(name):
            stats = rlkern.token_stats(logits.to(device), targets.to(device))
        return stats.logp, stats.entropy

    return run


def measure(run, logits, targets):
    """(logp, entropy, gradient of both) as float64."""
    leaf = logits.clone().requires_grad_()
    logp, entropy = run(leaf, targets)
    weights = torch.linspace(-1, 1, logp.numel(), device=logp.device, dtype=logp.dtype)
    (logp * weights + 0.1 * entropy * weights.flip(0)).sum().backward()
    return [t.detach().double().cpu() for t in (logp, entropy, leaf.grad)]


def exact(logits, targets):
    """For float64: p = 0 entries are taken out of the entropy, a confident row's logp is by log1p."""
    top = logits.argmax(-1, keepdim=True)
    shifted = logits - logits.gather(-1, top)
    rest = torch.where(torch.zeros_like(shifted, dtype=torch.bool).scatter(-1, top, True), 0, shifted.exp())
    log_p = shifted - torch.log1p(rest.sum(-1, keepdim=True))
    finite = torch.isfinite(shifted.detach())
    entropy = -torch.where(finite, log_p.exp() * torch.where(finite, log_p, 0), 0).sum(-1)
    return log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy


def error(got, want) -> float:
    """Largest error of an entry, relative to the largest entry; nan if a result is not finite."""
    return math.nan if not torch.isfinite(got).all() else float((got - want).abs().max() / want.abs().max().clamp_min(1e-300))


def stress_cases():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(ROWS, VOCAB, generator=g) * 3, torch.randint(4200, 4800, (ROWS,), generator=g)
    confident = torch.full((ROWS, VOCAB), -25.2)
    confident[torch.arange(ROWS), y] = 0.0  # p = 1 - 1e-7
    yield "random", x, y
    yield "first tile all -inf", x.clone().index_fill_(1, torch.arange(4200), -math.inf), y
    yield "one -inf", x.clone().index_fill_(1, torch.tensor([17]), -math.inf), y
    yield "last tile all -inf", x.clone().index_fill_(1, torch.arange(4801, VOCAB), -math.inf), y
    yield "logits of +-1e4", x * 3e3, (x * 3e3).argmax(-1)
    yield "common offset 1e4", x + 1e4, y
    yield "common offset -1e30", x - 1e30, y
    yield "confident, p = 1 - 1e-7", confident, y


def close_pair(dtype, noise, rows=ROWS, vocab=VOCAB):
    """Logits, and the same with noise, both rounded."""
    g = torch.Generator().manual_seed(2)
    z, w = (torch.randn(rows, vocab, generator=g, dtype=torch.float64) for _ in range(2))
    z = (3 * z).to(dtype)
    return z, (z.double() + noise * w).to(dtype)


def exact_pair(kind):
    """For float64: sums of p f(log(q / p)) with f >= 0, in which small divergences keep their digits."""

    def h(t):
        return (1 + t) * torch.log1p(t) - t

    def run(logits, other):
        log_p = logits.log_softmax(-1)
        x = other.log_softmax(-1) - log_p
        t = torch.expm1(x)
        return (log_p.exp() * (t - x if kind == "reverse_kl" else 0.5 * h(t) - h(0.5 * t))).sum(-1)

    return run


def fused_pair(name, kind):
    def run(logits, other):
        device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
        with rlkern.use_backend(name):
            return rlkern.token_divergence(logits.to(device), other.to(device), kind=kind)

    return run


def pair_runs(kind):
    """By name: eager float32, TRL's function where TRL is installed, every backend of rlkern."""

    def first(forward):
        return lambda logits, other: forward(logits, (other, None))[0]

    runs = {"eager": first(functools.partial(log_softmax_pair, kind))}
    with contextlib.suppress(ImportError):
        runs["TRL"] = first(next(c.forward for c in trl_gkd() if c.computes == kind))
    return runs | {name: fused_pair(name, kind) for name in names()}


def measure_pair(run, logits, other):
    """(value, gradient) as float64."""
    leaf = logits.clone().requires_grad_()
    value = run(leaf, other)
    (value * torch.linspace(-1, 1, value.numel(), device=value.device, dtype=value.dtype)).sum().backward()
    return [t.detach().double().cpu() for t in (value, leaf.grad)]


def pair_errors(kind, logits, other) -> dict[str, list[float]]:
    """By name, the errors of value and gradient."""
    want = measure_pair(exact_pair(kind), logits.double(), other.double())
    return {name: [error(a, b) for a, b in zip(measure_pair(run, logits, other), want, strict=True)] for name, run in pair_runs(kind).items()}


def main() -> None:
    runs = {"eager": eager, **{name: fused(name) for name in names()}}
    header = ["", *(f"{name} {what}" for name in runs for what in ("logp", "H", "grad"))]

    def errors(x, y):
        want = measure(exact, x.double(), y)
        return [f"{error(a, b):.0e}" for run in runs.values() for a, b in zip(measure(run, x, y), want, strict=True)]

    rows = [header]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for scale in (0.1, 3.0, 12.0):
            g = torch.Generator().manual_seed(1)
            x, y = (torch.randn(ROWS, VOCAB, generator=g) * scale).to(dtype), torch.randint(0, VOCAB, (ROWS,), generator=g)
            rows.append([f"{str(dtype).removeprefix('torch.')}, scale {scale}", *errors(x, y)])
    print(f"\nLargest error against float64 on the same rounded logits, relative to the largest value, {ROWS} x {VOCAB}")
    print(columns(rows))
    print("\nThe inputs that break other kernels, float32")
    print(columns([header, *([name, *errors(x, y)] for name, x, y in stress_cases())]))

    rows = [["", *(f"{name} {what}" for name in pair_runs(PAIR_KINDS[0]) for what in ("value", "grad"))]]
    for kind in PAIR_KINDS:
        for dtype in (torch.float32, torch.bfloat16):
            for noise in (1e-1, 1e-3, 1e-5):
                found = pair_errors(kind, *close_pair(dtype, noise))
                name = f"{kind}, {str(dtype).removeprefix('torch.')}, noise {noise:.0e}"
                rows.append([name, *(f"{e:.0e}" for errors_of_run in found.values() for e in errors_of_run)])
    print("\nTwo rows, the second is the first with noise; of a noise of 1e-5 bfloat16 keeps what falls on logits near 0")
    print(columns(rows))


if __name__ == "__main__":
    main()
