"""token_stats in float64 on the rounded inputs, and comparisons at the tolerances that rlkern promises."""

import torch

from rlkern import reference, token_stats

FIELDS = ("logp", "entropy", "logsumexp", "sum_sq_prob", "kept_logmass")
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def upstream(fields, seed=0):
    """One random gradient a field, the same for every backend."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in fields]


def run(logits, targets, *, seed=0, only=None, **options):
    """(fields, dlogits) of rlkern, with random upstream gradients of the fields in `only` (default: all)."""
    leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    stats = token_stats(leaf, targets, **options)
    fields = {name: getattr(stats, name) for name in FIELDS if getattr(stats, name) is not None}
    used = [t for name, t in fields.items() if only is None or name in only]
    grads = [g.to(t) for g, t in zip(upstream(used, seed), used, strict=True)]
    torch.autograd.backward(used, grads)
    return fields, leaf.grad


def expected(logits, targets, *, seed=0, only=None, mask=None, temperature=1.0, ignore_index=-100, min_p=None, min_prob=None, with_sum_sq=False):
    """The same from plain float64 PyTorch and autograd, row skipping by `where`."""
    leaf = logits.detach().double().cpu().clone().requires_grad_()
    y = targets.cpu() if targets.dim() == logits.dim() else targets.cpu().unsqueeze(-1)
    ignored = y == ignore_index
    skipped = ignored.all(-1) if mask is None else ignored.all(-1) | (mask.cpu() == 0)
    x = torch.where(skipped.unsqueeze(-1), 0.0, leaf)
    t = temperature.double().cpu() if isinstance(temperature, torch.Tensor) else temperature
    ref = reference.token_stats(x, y.clamp(0, logits.shape[-1] - 1), t, min_p, min_prob)
    values = {
        "logp": torch.where(ignored | skipped.unsqueeze(-1), 0.0, ref.logp).view(targets.shape),
        "entropy": torch.where(skipped, 0.0, ref.entropy),
        "logsumexp": torch.where(skipped, 0.0, ref.logsumexp),
    }
    if with_sum_sq:
        values["sum_sq_prob"] = torch.where(skipped, 0.0, ref.sum_sq_prob)
    if ref.kept_logmass is not None:
        values["kept_logmass"] = torch.where(skipped, 0.0, ref.kept_logmass)
    used = [v for name, v in values.items() if only is None or name in only]
    torch.autograd.backward(used, upstream(used, seed))
    return values, leaf.grad


def check(logits, targets, *, only=None, seed=0, **options):
    """Asserts that the values (float32) and dlogits (in the logits' dtype) are right; returns both."""
    got, d_logits = run(logits, targets, only=only, seed=seed, **options)
    want, d_want = expected(logits, targets, only=only, seed=seed, **options)
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == acc, name
        tol = TOLERANCE[acc]
        torch.testing.assert_close(got[name].double().cpu(), want[name], rtol=tol, atol=0.1 * tol, msg=lambda m, name=name: f"{name}: {m}")
    assert d_logits.dtype == logits.dtype and d_logits.shape == logits.shape
    tol = max(TOLERANCE[logits.dtype], TOLERANCE[acc])
    # A gradient's rounding is relative to its size. The absolute part covers float32 accumulation, relative
    # to the largest entry (with 10,000 logits most are below 1e-5), and half of float16's smallest number.
    atol = max(0.01 * TOLERANCE[acc] * d_want.abs().max().item() if d_want.numel() else 0.0, 2**-25 if logits.dtype == torch.float16 else 0.0)
    torch.testing.assert_close(d_logits.double().cpu(), d_want, rtol=tol, atol=atol, msg=lambda m: f"dlogits: {m}")


def eager(logits, targets, temperature=1.0):
    """What trainers write, in the logits' own dtype."""
    log_p = torch.log_softmax(logits / temperature, -1)
    return log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)
