"""token_stats in float64 on the rounded inputs, and comparisons at the tolerances that rlkern promises."""

import math

import pytest
import torch

from rlkern import reference, token_stats

INF = math.inf
FIELDS = ("logp", "entropy", "logsumexp", "sum_sq_prob", "kept_logmass", "tail_logmass")
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def draw(*shape, dtype=torch.float32, device="cpu", scale=3.0, seed=0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype).to(device)


def ids(vocab, *shape, device="cpu", seed=1):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed)).to(device)


def upstream(fields, seed=0):
    """One random gradient a field, the same for every backend."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in fields]


def run(logits, targets, *, seed=0, only=None, **options):
    """(fields, dlogits) of rlkern, with random upstream gradients of the fields in `only` (default: all)."""
    leaf = logits.detach().requires_grad_()  # no copy: its strides and its address are part of the case
    stats = token_stats(leaf, targets, **options)
    fields = {name: getattr(stats, name) for name in FIELDS if getattr(stats, name) is not None}
    used = [t for name, t in fields.items() if only is None or name in only]
    grads = [g.to(t) for g, t in zip(upstream(used, seed), used, strict=True)]
    torch.autograd.backward(used, grads)
    return fields, leaf.grad


def expected(
    logits,
    targets,
    *,
    seed=0,
    only=None,
    mask=None,
    temperature=1.0,
    ignore_index=-100,
    min_p=None,
    min_prob=None,
    with_sum_sq=False,
    with_tail=False,
    logit_scale=1.0,
    softcap=None,
):
    """The same from plain float64 PyTorch and autograd, row skipping by `where`."""
    leaf = logits.detach().double().cpu().clone().requires_grad_()
    y = targets.cpu() if targets.dim() == logits.dim() else targets.cpu().unsqueeze(-1)
    ignored = y == ignore_index
    skipped = ignored.all(-1) if mask is None else ignored.all(-1) | (mask.cpu() == 0)
    x = torch.where(skipped.unsqueeze(-1), 0.0, leaf)
    t = temperature.double().cpu() if isinstance(temperature, torch.Tensor) else temperature
    y = torch.where(ignored, y.gather(-1, (~ignored).long().argmax(-1, keepdim=True)), y)  # what it lists is listed anyway
    ref = reference.token_stats(x, y.clamp(0, logits.shape[-1] - 1), t, min_p, min_prob, with_tail, logit_scale, softcap)
    values = {"logp": torch.where(ignored | skipped.unsqueeze(-1), 0.0, ref.logp).view(targets.shape)}
    asked = {"sum_sq_prob": with_sum_sq, "kept_logmass": ref.kept_logmass is not None, "tail_logmass": with_tail}
    values |= {name: torch.where(skipped, 0.0, getattr(ref, name)) for name in FIELDS[1:] if asked.get(name, True)}
    used = [v for name, v in values.items() if only is None or name in only]
    torch.autograd.backward(used, upstream(used, seed))
    return values, leaf.grad


def check(logits, targets, *, only=None, seed=0, inplace_backward=False, **options):
    """Asserts that the values (float32) and dlogits (in the logits' dtype) are right; returns both."""
    want, d_want = expected(logits, targets, only=only, seed=seed, **options)
    got, d_logits = run(logits, targets, only=only, seed=seed, inplace_backward=inplace_backward, **options)
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == acc, name
        tol = TOLERANCE[acc]
        torch.testing.assert_close(got[name].double().cpu(), want[name], rtol=tol, atol=0.1 * tol, msg=lambda m, name=name: f"{name}: {m}")
    assert d_logits.dtype == logits.dtype and d_logits.shape == logits.shape
    tol = max(TOLERANCE[logits.dtype], TOLERANCE[acc])
    # A gradient's rounding is relative to its size. The absolute part covers float32 accumulation, relative
    # to the largest entry (with 10,000 logits most are below 1e-5), half of float16's smallest number, and
    # the rounding of the float64 that it is compared with, relative to the largest logit.
    atol = max(0.01 * TOLERANCE[acc] * d_want.abs().max().item() if d_want.numel() else 0.0, 2**-25 if logits.dtype == torch.float16 else 0.0)
    rounding = 1e-14 * max(1.0, logits.masked_fill(logits.isinf(), 0).abs().max().item() if logits.numel() else 0.0)
    torch.testing.assert_close(d_logits.double().cpu(), d_want, rtol=tol, atol=atol + rounding, msg=lambda m: f"dlogits: {m}")
    return got, d_logits


def check_confident(vocab, where, gap, offset=0.0, device="cpu", **options):
    """A row with maxima at `where` and all else `gap` below: closed forms, which float64's softmax loses."""
    x = torch.full((1, vocab), offset - gap, device=device)
    x[0, where] = offset
    got, d = run(x, torch.tensor([where[0]], device=device), only=["logp"], **options)
    k, rest = len(where), (vocab - len(where)) * math.exp(-gap)
    g = upstream([got["logp"]])[0].item()
    want = {
        "logp": -math.log(k) - math.log1p(rest / k),
        "entropy": math.log(k) + math.log1p(rest / k) + rest * gap / (k + rest),
        "at the label": g * (k - 1 + rest) / (k + rest),
        "elsewhere": -g * math.exp(-gap) / (k + rest),
    }
    got |= {"at the label": d[0, where[0]], "elsewhere": d[0, where[0] - 1]}
    for name, value in want.items():
        assert got[name].item() == pytest.approx(value, rel=1e-5, abs=0), name
    return got


def check_undefined(vocab, device="cpu", **options):
    """A row of -inf, one with a NaN and one with +inf are NaN, and no others."""
    x = draw(5, vocab, device=device)
    x[1] = -INF
    x[2, vocab // 2], x[3, vocab - 1] = math.nan, INF
    stats = token_stats(x, ids(vocab, 5, device=device), **options)
    for t in (stats.logp, stats.entropy, *([] if stats.kept_logmass is None else [stats.kept_logmass])):
        assert t.isnan().tolist() == [False, True, True, True, False]
    assert stats.logsumexp[1] == -INF and stats.logsumexp[2:4].isnan().all()


def check_skipped(vocab, device="cpu", **options):
    """A masked row of NaN and an ignored one give zeros."""
    x, y = draw(4, vocab, device=device), ids(vocab, 4, device=device)
    x[1], x[2], y[2] = math.nan, math.nan, -100
    stats, d = run(x, y, mask=torch.tensor([True, False, True, True], device=device), **options)
    for t in (*stats.values(), d):
        assert (t[1:3] == 0).all() and (t[[0, 3]] != 0).all()
    check(x[[0, 3]], y[[0, 3]], **options)


def eager(logits, targets, temperature=1.0):
    """What trainers write, in the logits' own dtype."""
    log_p = torch.log_softmax(logits / temperature, -1)
    return log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)
