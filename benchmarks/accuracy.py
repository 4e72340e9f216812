"""Accuracy, not speed: errors against float64 beside eager PyTorch's, and inputs that break other kernels.

python benchmarks/accuracy.py          # without a GPU, TRITON_INTERPRET=1 adds the Triton kernels
"""

import math
import os

import torch
from table import columns

import rlkern
from rlkern import backends

ROWS, VOCAB = 16, 9001


def names() -> list[str]:
    usable = [n for n in ("reference", "native", "triton") if not isinstance(backends._load(n), Exception)]
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


if __name__ == "__main__":
    main()
