"""Random sets of kept ids in every format, and token_stats of logits at -inf outside them, in float64."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import torch
from oracle import FIELDS, TOLERANCE, upstream
from torch import Tensor

import rlkern
from rlkern import Kept

KINDS = ("ids", "csr", "counts", "samples", "bits", "bytes", "mask", "at_least")
OUTSIDE = ("include", "everything", "minus_inf")


def words(kept: Tensor) -> Tensor:
    """[..., V] as int32 [..., ceil(V / 32)]; the bits beyond V are 1."""
    *lead, vocab = kept.shape
    bits = torch.ones(*lead, -(-vocab // 32), 32, dtype=torch.int64)
    bits.view(*lead, -1)[..., :vocab] = kept.long()
    return (bits << torch.arange(32)).sum(-1).to(torch.int32)


def lists_of(kept: Tensor, width: int, dtype=torch.int32, seed: int = 0) -> Tensor:
    """[N, V] as padded lists [N, width] in a random order with holes."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.full((len(kept), width), -1, dtype=dtype)
    for row, to in zip(kept, ids, strict=True):
        found = row.nonzero().flatten()
        places = torch.randperm(width, generator=g)[: len(found)]
        to[places] = found[torch.randperm(len(found), generator=g)].to(dtype)
    return ids


def kept_as(kind: str, kept: Tensor, *, empty: str = "everything", seed: int = 0, width: int = 8, logits: Tensor | None = None) -> Kept:
    """The sets bool [N, V], of at most `width` ids each, in a format. Lists of all formats have one order."""
    if kind == "at_least":
        rows = logits.float().masked_fill(~kept, math.inf).amin(-1)  # of kept ids that are the largest of a row
        return Kept.at_least(rows)
    if kind in ("bits", "bytes"):
        packed = words(kept)
        return Kept.bits(packed if kind == "bits" else packed.view(torch.uint8)[..., : -(-kept.shape[-1] // 8)])
    if kind == "mask":
        return Kept.mask(kept)
    ids = lists_of(kept, width, seed=seed)
    if kind == "ids":
        return Kept.ids(ids, empty=empty)
    flat, counts = ids[ids >= 0].long(), (ids >= 0).sum(-1)
    edges = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    if kind == "csr":  # room behind the last list
        return Kept.csr(torch.cat([flat, torch.full((3,), 10**6)]), edges.int(), empty=empty)
    if kind == "counts":
        return Kept.counts(flat.int(), counts, empty=empty)
    half = len(kept) // 2
    parts = [(flat[: edges[half]], edges[: half + 1]), (flat[edges[half] :], edges[half:] - edges[half])]
    return Kept.samples([x for x, _ in parts], [x for _, x in parts], torch.arange(len(kept)), empty=empty)


class Case(NamedTuple):
    logits: Tensor  # [N, V]
    targets: Tensor
    sets: Tensor  # bool [N, V], S
    inside: Tensor  # bool [N, V], S'
    target_kept: Tensor
    keep: Kept
    options: dict


def draw_case(seed: int, *, vocabs=(1, 3, 31, 32, 33, 40, 300), rows=(1, 4, 7), dtypes=tuple(TOLERANCE)) -> Case:
    """Masked and ignored rows, targets in and out of their sets, -inf inside sets, strides."""
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    vocab, n, dtype, kind, outside = r.choice(vocabs), r.choice(rows), r.choice(dtypes), r.choice(KINDS), r.choice(OUTSIDE)
    logits = (torch.randn(n, vocab + 3, generator=g) * 2).to(dtype)[:, : vocab if r.random() < 0.5 else None]
    vocab = logits.shape[-1]
    logits[:, 2::7] = -math.inf
    count = torch.randint(0, min(8, vocab) + 1, (n, 1), generator=g)
    order = logits.float().argsort(-1, descending=True) if kind == "at_least" else torch.rand(n, vocab, generator=g).argsort(-1)
    sets = torch.zeros(n, vocab, dtype=torch.bool).scatter_(-1, order, torch.arange(vocab) < count)
    empty = r.choice(("everything", "nothing"))
    k = 3 if outside == "minus_inf" and r.random() < 0.5 else 1
    targets = torch.randint(0, vocab, (n, k), generator=g)
    targets[:, 0] = torch.where(torch.rand(n, generator=g) < 0.6, sets.int().argmax(-1), targets[:, 0])
    targets[2:3], targets[-1:, 1:] = -100, -100
    mask = torch.ones(n, dtype=torch.bool)
    mask[1:2] = False
    options = {"mask": mask, "outside": outside, "temperature": r.choice((1.0, 0.7, 0.5 + torch.rand(n, generator=g)))}
    options |= {"min_p": r.choice((None, 0.1)), "softcap": r.choice((None, 3.0)), "with_sum_sq": True}
    return case_of(logits, targets, sets, kind, empty, options, seed)


def case_of(logits: Tensor, targets: Tensor, sets: Tensor, kind: str, empty: str, options: dict, seed: int = 0) -> Case:
    """Of logits [N, V], targets [N, K] and sets bool [N, V] of at most 8 ids each, in a format. Those of
    "at_least" hold the largest logits of each row."""
    keep, mask, outside = kept_as(kind, sets, empty=empty, seed=seed, logits=logits), options["mask"], options["outside"]
    if kind == "at_least":
        sets = logits >= keep.entries.unsqueeze(-1).to(torch.float64)  # ties, too
    read = mask.unsqueeze(-1) & (targets != -100).any(-1, keepdim=True)
    y = targets.clamp(min=0)
    open_ = ~sets.any(-1, keepdim=True) & (empty == "everything" and kind in KINDS[:4])
    found = sets.gather(-1, y) | open_
    inside = sets | open_
    if outside == "include":
        inside = inside.scatter(-1, y, True)
    elif outside == "everything":
        inside = inside | ~found
    target_kept = found | (targets == -100) | ~read
    if targets.shape[-1] == 1:
        targets, target_kept = targets[:, 0], target_kept[:, 0]
    return Case(logits, targets, sets, inside, target_kept, keep, options)


def run(case: Case, logits: Tensor, **changes):
    """(statistics, gradient by the logits) of rlkern with the sets."""
    leaf = logits.detach().requires_grad_()
    stats = rlkern.token_stats(leaf, case.targets, keep=case.keep, **case.options | changes)
    return stats, leaf


def check(case: Case, with_full: bool, garbage: float | None) -> None:
    """Values and gradients are those of the oracle; `garbage` stands outside the sets."""
    options = {name: value for name, value in case.options.items() if name != "outside"}
    exact = case.logits.double().detach().clone().requires_grad_()
    want = rlkern.token_stats(exact.masked_fill(~case.inside, -math.inf), case.targets, **options)
    full = rlkern.token_stats(exact, case.targets, **options)
    logits = case.logits.clone()
    if garbage is not None and not with_full and case.keep.kind != "at_least":
        logits[~case.inside] = garbage
    got, leaf = run(case, logits, with_full=with_full)
    pairs = [(name, getattr(got, name), getattr(want, name)) for name in FIELDS if getattr(want, name) is not None]
    if with_full:
        pairs += [("full_entropy", got.full_entropy, full.entropy), ("full_logsumexp", got.full_logsumexp, full.logsumexp)]
    acc = got.logp.dtype
    for name, a, b in pairs:
        tol = 5 * TOLERANCE[acc]
        torch.testing.assert_close(a.double(), b, rtol=tol, atol=tol, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")
    assert torch.equal(got.target_kept, case.target_kept)
    losses = [0.0, 0.0]
    for (name, a, b), w in zip(pairs, upstream([b for *_, b in pairs]), strict=True):
        counts = b.isfinite() & (case.target_kept if name == "logp" else True)
        losses[0] = losses[0] + (torch.where(counts, a.double(), 0) * w).sum()
        losses[1] = losses[1] + (torch.where(counts, b, 0) * w).sum()
    torch.autograd.backward(losses)
    tol = max(TOLERANCE[case.logits.dtype], TOLERANCE[acc])
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=tol, atol=tol, equal_nan=True, msg=lambda m: f"gradient: {m}")
    if not with_full:
        assert (leaf.grad[~case.inside] == 0).all()
