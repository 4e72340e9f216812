"""Launches every variant of every kernel on small inputs against the reference, for compute-sanitizer.

    compute-sanitizer --tool memcheck --error-exitcode 9 python benchmarks/sanitize.py

Inputs are made on the CPU: the tool watches little but the kernels under test. Exits 1 if a result is wrong.
"""

import argparse
import itertools
import math
import subprocess
import sys

import torch
from kept_sets import packed

import rlkern
from rlkern import reference
from rlkern.primitives.moments import row_moments

SETS = ("ids", "csr", "bits", "mask", "at_least")
OUTSIDE = ("include", "everything", "minus_inf")
KL_AND_MIXTURE = ("reverse_kl", "jsd")  # the two families of kernels for pairs
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def variants():
    """(dtype, vocab, layout, options) over everything that makes the launcher choose other code."""
    for dtype in _TOLERANCE:
        for vocab, layout in ((5000, "rows"), (9001, "rows"), (5000, "odd stride"), (9001, "in place")):
            yield dtype, vocab, layout, {}
    for vocab, layout in itertools.product((1, 7, 256, 5000), ("rows", "slice", "odd stride", "in place")):
        yield torch.bfloat16, vocab, layout, {}
    single = [{"mask": True}, {"row_temperature": True}, {"temperature": 0.7}, {"with_sum_sq": True}]
    single += [{"min_p": 0.1}, {"min_prob": 1e-3}, {"targets": 3}, {"holes": True}]
    single += [{"softcap": 4.0, "logit_scale": 1.3}, {"softcap": 4.0, "targets": 12}]
    everything = {"mask": True, "row_temperature": True, "with_sum_sq": True, "min_p": 0.05, "targets": 5}
    for vocab, layout in ((5000, "rows"), (9001, "odd stride")):
        for options in (*single, everything):
            yield torch.bfloat16, vocab, layout, options
        yield torch.float32, vocab, layout, everything
        yield torch.float64, vocab, layout, everything
    for vocab in (262_144, 262_147):  # split over several programs a row
        yield torch.bfloat16, vocab, "slice", {}
        yield torch.bfloat16, vocab, "rows", everything
    yield torch.bfloat16, 5000, "rows", {"targets": 3, "with_tail": True}
    for dtype in (torch.bfloat16, torch.float32):  # rows in parts
        yield dtype, 5120, "rows", {"segments": 8, "targets": 3, "mask": True, "min_p": 0.05}
        yield dtype, 262_144, "slice", {"segments": 2, "with_tail": True}
    yield from others()


def others():
    """The same of the kernels over two rows, of moments, kept ids and kept sets: `of` names the function."""
    for i, (keep, with_full) in enumerate([*((keep, False) for keep in SETS), ("ids", True), ("bits", True)]):
        for j, (dtype, vocab, layout) in enumerate(
            ((torch.bfloat16, 5000, "rows"), (torch.float32, 9001, "odd stride"), (torch.bfloat16, 9001, "in place"))
        ):
            yield dtype, vocab, layout, {"of": "sets", "keep": keep, "outside": OUTSIDE[(i + j) % 3], "with_full": with_full}
        yield torch.bfloat16, 262_147, "rows", {"of": "sets", "keep": keep, "outside": "include", "with_full": with_full, "targets": 1}
    for of in (*KL_AND_MIXTURE, "moments", "did"):
        for dtype in (torch.bfloat16, torch.float32):
            for vocab, layout in ((7, "rows"), (5000, "slice"), (9001, "odd stride")):
                yield dtype, vocab, layout, {"of": of}
        yield torch.float64, 5000, "rows", {"of": of}
        yield torch.bfloat16, 262_147, "rows", {"of": of, "mask": True}
    for of in KL_AND_MIXTURE:
        for vocab, layout in ((5000, "in place"), (9001, "in place"), (262_144, "rows")):
            yield torch.bfloat16, vocab, layout, {"of": of, "mask": True, "row_temperature": True}
    for dtype in _TOLERANCE:
        for vocab in (7, 5000):
            yield dtype, vocab, "rows", {"of": "kept"}
    for of in ("forward_kl", "mixed_kl", "cross_entropy", "skew_forward_kl", "skew_reverse_kl"):
        yield torch.bfloat16, 5000, "odd stride", {"of": of}


def _logits(dtype, vocab, layout, generator):
    """[A, B, V] on the CPU with the strides of `layout`; storage around it is NaN, so a stray read shows."""
    outer, inner = 2, 3
    width = {"odd stride": vocab + 1}.get(layout, vocab)
    height = inner + 1 if layout == "slice" else inner
    storage = torch.full((outer, height, width), math.nan, dtype=dtype)
    x = storage[:, :inner, :vocab]
    x.copy_(3 * torch.randn(outer, inner, vocab, generator=generator))
    return storage, x


def few_columns(options) -> int:
    """For Triton's interpreter."""
    return 16 * options["segments"] if "segments" in options else 33


def check(dtype, vocab, layout, options, device="cuda") -> str | None:
    """Runs one variant forward and backward; returns what is wrong with it, or None."""
    if "of" in options:
        return _check_other(dtype, vocab, layout, device, **options)
    generator = torch.Generator().manual_seed(vocab)
    options = dict(options)
    storage, x = _logits(dtype, vocab, layout, generator)
    rows, k = x.shape[:-1], options.pop("targets", None)
    if options.pop("holes", False) and vocab > 8:
        x[..., : vocab // 3] = -math.inf
        x[0, :, vocab // 2 :] = -math.inf
    y = torch.randint(vocab, (*rows, k) if k else rows, generator=generator)
    if vocab > 8 and not k:
        y = vocab // 3 + y % (vocab // 2 - vocab // 3)
    mask = torch.rand(rows, generator=generator) < 0.7 if options.pop("mask", False) else None
    temperature = 0.5 + torch.rand(rows, generator=generator) if options.pop("row_temperature", False) else options.pop("temperature", 1.0)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    weights = [torch.randn(rows, generator=generator, dtype=acc) for _ in range(4)]
    g_logp = torch.randn(y.shape, generator=generator, dtype=acc)

    def loss(stats, logp, w):
        parts = [(logp * w[0]).sum(), (stats.entropy * w[1]).sum(), (stats.logsumexp * w[2]).sum()]
        parts += [(stats.sum_sq_prob * w[3]).sum()] if options.get("with_sum_sq") else []
        mass = stats.tail_logmass if options.get("with_tail") else stats.kept_logmass
        return sum(parts + ([(mass * w[4]).sum()] if mass is not None else []))

    on_device = storage.to(device, copy=True).as_strided(x.shape, x.stride(), x.storage_offset()).requires_grad_()
    t = temperature.to(device) if isinstance(temperature, torch.Tensor) else temperature
    kw = dict(options, mask=None if mask is None else mask.to(device), temperature=t, inplace_backward=layout == "in place")
    stats = rlkern.token_stats(on_device, y.to(device), **kw)
    got = torch.autograd.grad(loss(stats, stats.logp, [w.to(device) for w in [g_logp, *weights]]), on_device)[0]

    exact_x = x.double().requires_grad_()
    exact_t = temperature.double() if isinstance(temperature, torch.Tensor) else temperature
    exact = reference.token_stats(
        exact_x, y if k else y.unsqueeze(-1), exact_t, options.get("min_p"), options.get("min_prob"), options.get("with_tail", False),
        logit_scale=options.get("logit_scale", 1.0), softcap=options.get("softcap"),
    )  # fmt: skip
    keep = torch.ones(rows, dtype=torch.bool) if mask is None else mask
    exact_logp = exact.logp if k else exact.logp.squeeze(-1)
    masked = type(exact)(*(None if f is None else torch.where(keep, f, 0) if f.shape == rows else f for f in exact))
    exact_logp = torch.where(keep.unsqueeze(-1) if k else keep, exact_logp, 0)
    expected = torch.autograd.grad(loss(masked, exact_logp, [w.double() for w in [g_logp, *weights]]), exact_x)[0]
    compared = {"logp": (stats.logp, exact_logp, 1e-5), "entropy": (stats.entropy, masked.entropy, 1e-5)}
    return _wrong(compared | {"gradient": (got, expected, _TOLERANCE[dtype])})


def _wrong(compared: dict) -> str | None:
    """name -> (value, what it should be, tolerance)"""
    for name, (value, wanted, tolerance) in compared.items():
        error = (value.cpu().double() - wanted.detach()).abs()
        if not (error <= tolerance * (1 + wanted.detach().abs())).all():
            return f"{name} off by {error.max().item():.2e}"
    return None


def _check_kept(dtype, vocab, device, rows=300, width=70) -> str | None:
    """The head over lists of ids: of 1 to 9 ids and padding, id 3 in all of them."""
    g = torch.Generator().manual_seed(vocab)
    hidden, weight, bias = (torch.randn(*shape, generator=g).to(dtype) for shape in ((rows, width), (vocab, width), (vocab,)))
    ids = torch.rand(rows, vocab, generator=g).argsort(-1)[:, : min(9, vocab)].sort(-1).values
    ids = ids.masked_fill((torch.rand(ids.shape, generator=g) < 0.3) | (ids == 3), -1)
    ids, y = torch.cat([ids, torch.full((rows, 1), 3)], -1), torch.randint(vocab, (rows,), generator=g)
    weights = [torch.randn(rows, generator=g, dtype=torch.float64) for _ in range(2)]

    def gradients(logp, entropy, leaves):
        loss = sum((value * w.to(value)).sum() for value, w in zip((logp, entropy), weights, strict=True))
        return torch.autograd.grad(loss, leaves)

    leaves = [x.to(device, copy=True).requires_grad_() for x in (hidden, weight, bias)]
    stats = rlkern.linear_token_stats(*leaves[:2], y.to(device), bias=leaves[2], keep=rlkern.Kept.ids(ids.to(device)))
    wide = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    kept = torch.zeros(rows, vocab + 1, dtype=torch.bool).scatter_(1, ids % (vocab + 1), True)[:, :vocab]
    kept = kept.scatter(1, y.unsqueeze(-1), True)
    exact = reference.token_stats(torch.nn.functional.linear(*wide).masked_fill(~kept, -math.inf), y.unsqueeze(-1))
    logp = exact.logp.squeeze(-1)
    compared = {"logp": (stats.logp, logp, 1e-5), "entropy": (stats.entropy, exact.entropy, 1e-5)}
    pairs = zip(gradients(stats.logp, stats.entropy, leaves), gradients(logp, exact.entropy, wide), strict=True)
    tolerance = _TOLERANCE[dtype] + 1e-5
    return _wrong(compared | {f"gradient {i}": (got, want, tolerance * max(1.0, want.abs().max().item())) for i, (got, want) in enumerate(pairs)})


def _check_sets(dtype, vocab, layout, device, keep, outside, with_full, targets=12) -> str | None:
    """Rows over 9 ids; NaN stands around the rows. With "minus_inf" some targets of a row."""
    generator = torch.Generator().manual_seed(vocab)
    storage, x = _logits(dtype, vocab, layout, generator)
    rows = x.shape[:-1]
    ids = torch.rand(*rows, vocab, generator=generator).argsort(-1)[..., :9]
    kept = torch.zeros(*rows, vocab, dtype=torch.bool).scatter_(-1, ids, True)
    threshold = x.float().topk(9).values[..., -1:]
    kept = x.float() >= threshold if keep == "at_least" else kept
    made = {
        "ids": lambda: rlkern.Kept.ids(torch.nn.functional.pad(ids, (2, 3), value=-1).int()),
        "csr": lambda: rlkern.Kept.csr(ids.flatten(), torch.arange(0, ids.numel() + 1, ids.shape[-1])),
        "bits": lambda: rlkern.Kept.bits(packed(kept.flatten(0, 1)).unflatten(0, rows)),
        "mask": lambda: rlkern.Kept.mask(kept),
        "at_least": lambda: rlkern.Kept.at_least(threshold.squeeze(-1)),
    }
    y = torch.randint(vocab, (*rows, targets if outside == "minus_inf" else 1), generator=generator)
    y[..., 0] = torch.where(torch.rand(rows, generator=generator) < 0.5, kept.int().argmax(-1), y[..., 0])
    found = kept.gather(-1, y)
    inside = {"include": kept.scatter(-1, y, True), "everything": kept | ~found, "minus_inf": kept}[outside] if y.shape[-1] == 1 else kept
    weights = [torch.randn(rows, generator=generator, dtype=torch.float64) for _ in range(2)]
    g_logp = torch.randn(y.shape, generator=generator, dtype=torch.float64).masked_fill(~found if outside == "minus_inf" else torch.tensor(False), 0)

    def gradient(logp, entropy, full_entropy, leaf):
        values = [(logp, g_logp), (entropy, weights[0]), *([(full_entropy, weights[1])] if with_full else [])]
        loss = sum((torch.where(w.to(v) == 0, 0, v) * w.to(v)).sum() for v, w in values)
        return torch.autograd.grad(loss, leaf)[0]

    leaf = storage.to(device, copy=True).as_strided(x.shape, x.stride(), x.storage_offset()).requires_grad_()
    options = {"outside": outside, "with_full": with_full, "inplace_backward": layout == "in place"}
    stats = rlkern.token_stats(leaf, y.to(device), keep=made[keep]().to(device), **options)
    exact_x = x.double().requires_grad_()
    exact, full = (reference.token_stats(z, y) for z in (exact_x.masked_fill(~inside, -math.inf), exact_x))
    compared = {"entropy": (stats.entropy, exact.entropy, 1e-5), "logp": (stats.logp.exp(), exact.logp.exp(), 1e-5)}
    if with_full:
        compared["full entropy"] = (stats.full_entropy, full.entropy, 1e-5)
    got = gradient(stats.logp, stats.entropy, stats.full_entropy, leaf)
    return _wrong(compared | {"gradient": (got, gradient(exact.logp, exact.entropy, full.entropy, exact_x), _TOLERANCE[dtype])})


def _check_other(dtype, vocab, layout, device, of, mask=False, row_temperature=False, **options) -> str | None:
    if of == "sets":
        return _check_sets(dtype, vocab, layout, device, **options)
    if of == "kept":
        return _check_kept(dtype, vocab, device)
    generator = torch.Generator().manual_seed(vocab)
    (storage, x), (other_storage, other) = (_logits(dtype, vocab, layout, generator) for _ in range(2))
    rows = x.shape[:-1]
    y = torch.randint(vocab, rows, generator=generator)
    keep = torch.rand(rows, generator=generator) < 0.7 if mask else torch.ones(rows, dtype=torch.bool)
    t = 0.5 + torch.rand(rows, generator=generator) if row_temperature else 0.7

    def run(x, other, device, exact=False):
        if of == "moments":
            return reference.row_moments(x, y) if exact else row_moments(x, y.to(device), mask=keep.to(device) if mask else None)
        temperature = t.to(device, x.dtype if exact else torch.float32) if row_temperature else t
        options = {"temperature": temperature} | ({} if exact else {"mask": keep.to(device) if mask else None})
        if of == "did":
            return ((reference if exact else rlkern).token_did_entropy(x, other, **options),)
        if exact:
            stats = reference.token_stats(x, y.unsqueeze(-1), temperature)
            return reference.token_divergence(x, other, of, **options), stats.logp.squeeze(-1), stats.entropy
        stats = rlkern.pair_stats(x, other, y.to(device), kind=of, inplace_backward=layout == "in place", **options)
        return stats.divergence, stats.logp, stats.entropy

    on_device = [s.to(device, copy=True).as_strided(z.shape, z.stride(), z.storage_offset()) for s, z in ((storage, x), (other_storage, other))]
    leaf, exact = on_device[0].requires_grad_(), x.double().requires_grad_()
    values, wanted = run(leaf, on_device[1], device), run(exact, other.double(), "cpu", exact=True)
    weights = [torch.randn(rows, generator=generator, dtype=torch.float64) for _ in values]
    gradient = torch.autograd.grad(sum((v * w.to(v)).sum() for v, w in zip(values, weights, strict=True)), leaf)[0]
    wanted = [torch.where(keep, w, 0) for w in wanted]
    expected = torch.autograd.grad(sum((v * w).sum() for v, w in zip(wanted, weights, strict=True)), exact)[0]
    compared = {f"result {i}": (v, w, 1e-5) for i, (v, w) in enumerate(zip(values, wanted, strict=True))}
    return _wrong(compared | {"gradient": (gradient, expected, _TOLERANCE[dtype])})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="processes to share the variants among")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "OF"), help="only every OF-th variant, from the I-th on")
    parser.add_argument("--rehearse", action="store_true", help="a few small ones on the processor")
    args = parser.parse_args()
    device = "cpu" if args.rehearse else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing to check")
        return 0
    if args.jobs > 1:
        command = [sys.executable, __file__, *(["--rehearse"] if args.rehearse else [])]
        jobs = [subprocess.Popen([*command, "--part", str(i), str(args.jobs)]) for i in range(args.jobs)]
        return 1 if any([job.wait() for job in jobs]) else 0
    chosen = list(variants())
    if args.rehearse:  # a few, on rows short enough for Triton's interpreter
        few = chosen[:: 2 * len(_TOLERANCE) + 3]
        chosen = [(dtype, few_columns(options), layout, options) for dtype, _, layout, options in few]
    mine = chosen[args.part[0] :: args.part[1]]
    wrong = 0
    for variant in mine:
        if message := check(*variant, device=device):
            wrong += 1
            print("WRONG", *variant, message)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{len(mine)} kernel variants launched, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
