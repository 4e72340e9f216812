"""token_stats over lists of kept ids, of rows whose columns are cut over ranks."""

import math
import random

import pytest
import torch
from isas import every_isa
from kept_oracle import Case, draw_case
from oracle import TOLERANCE
from ranks import on_ranks, try_on_ranks

import rlkern
from rlkern import Kept, token_stats
from rlkern.parallel import Shard
from rlkern.primitives import sharded_kept
from rlkern.primitives.row_stats import row_options

FIELDS = ("logp", "entropy", "logsumexp", "sum_sq_prob")
NAN, INF = math.nan, math.inf


def draw(seed, **of) -> Case:
    """A case with lists, a third of the rows without one."""
    for at in range(seed, 10**6, 1000):
        case = draw_case(at, **of)
        if case.keep.kind == "ids":
            break
    options = {name: value for name, value in case.options.items() if name != "min_p"}
    keep, n = case.keep, len(case.logits)
    if keep.begin is not None and seed % 2:
        keep = Kept(keep.entries, keep.begin, keep.end, torch.where(torch.arange(n) % 3 == 2, -1, torch.arange(n)), keep.empty)
    return case._replace(keep=keep, options=options)


def cut(case: Case, seed: int, ranks: int):
    """(logits with padded columns and garbage, where each rank's columns begin and end)"""
    r, vocab = random.Random(seed), case.logits.shape[-1]
    columns = max(vocab + r.choice((0, 0, 5)), ranks)
    edges = [0, *sorted(r.sample(range(1, columns), ranks - 1)), columns]
    return torch.nn.functional.pad(case.logits, (0, columns - vocab), value=NAN), edges


def whole(case: Case):
    """(statistics, gradient, what the gradient is by) of the whole rows in one process."""
    leaf = case.logits.clone().requires_grad_()
    stats = token_stats(leaf, case.targets, keep=case.keep, **case.options)
    stats_loss(stats).backward()
    return stats, leaf.grad


def stats_loss(stats):
    """logp counts where it is finite, also as a gradient that must not reach a target outside of its set."""
    fields, total = [getattr(stats, name) for name in FIELDS], 0.0
    for seed, x in enumerate(fields):
        weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        total = total + (torch.where(x.isneginf(), 0 * x.detach().nan_to_num(), x).double() * weight).sum()
    return total


def compare(case: Case, stats, grad, want, d_want) -> None:
    acc = want.logp.dtype
    tol = {"rtol": 5 * TOLERANCE[acc], "atol": 5 * TOLERANCE[acc]}
    for name in FIELDS:
        torch.testing.assert_close(getattr(stats, name), getattr(want, name), **tol, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")
    assert torch.equal(stats.target_kept, want.target_kept)
    vocab, tol = case.logits.shape[-1], 2 * max(TOLERANCE[case.logits.dtype], TOLERANCE[acc])
    torch.testing.assert_close(grad[..., :vocab], d_want, rtol=tol, atol=tol, equal_nan=True, msg=lambda m: f"gradient: {m}")
    assert (grad[..., vocab:] == 0).all() and (grad[..., :vocab][~inside(case)] == 0).all()


def inside(case: Case):
    """S' as this module changed the lists: rows without one are over everything or nothing."""
    none = torch.zeros(len(case.logits), 1, dtype=torch.bool)
    if case.keep.rows is not None:
        none = (case.keep.rows < 0).unsqueeze(-1)
    if case.keep.empty == "everything":
        return case.inside | none
    sets = case.sets & ~none
    y = case.targets.reshape(len(none), -1).clamp(min=0)
    if case.options["outside"] == "include":
        return sets.scatter(-1, y, True)
    if case.options["outside"] == "everything":
        return sets | ~sets.gather(-1, y)
    return sets


def garbage(case: Case, logits, seed: int):
    logits = logits.clone()
    logits[..., : case.logits.shape[-1]][~inside(case)] = (NAN, INF, -INF)[seed % 3]
    return logits


def on_one(case: Case, seed: int, ranks: int, monkeypatch):
    """(statistics of the last rank, gradient) of ranks that take turns: first for their parts, then for all."""
    logits, edges = cut(case, seed, ranks)
    logits, vocab, parts, grads = garbage(case, logits, seed), case.logits.shape[-1], [], []
    options = dict({"mask": None, "temperature": 1.0}, **{name: x for name, x in case.options.items() if name != "outside"})
    fixed = {"ignore_index": -100, "min_p": None, "min_prob": None, "with_entropy": True, "with_tail": False}
    gathered = lambda own, *_: own  # noqa: E731
    monkeypatch.setattr(sharded_kept, "all_parts", lambda own, *_: gathered(own))
    for turn in range(2):
        for start, stop in zip(edges[:-1], edges[1:], strict=True):
            leaf = logits[..., start:stop].clone().requires_grad_()
            if turn == 0:
                gathered = lambda own, *_: parts.append(own) or own  # noqa: E731
            else:
                everything = torch.cat(parts)
                gathered = lambda own, *_: everything  # noqa: E731
            *rows, o = row_options(leaf, case.targets, **fixed, **options)
            o = o._replace(vocab_start=start, vocab_size=vocab)
            shard = Shard("", ranks, start, vocab, 0)
            stats = sharded_kept.sharded_kept_stats(shard, leaf, *rows, o, keep=case.keep, outside=case.options["outside"], in_place=False)
            if turn == 1:
                stats_loss(stats).backward()
                grads.append(leaf.grad)
    return stats, torch.cat(grads, -1)


CASES = {"reference": 60, "native": 120, "triton": 14}


@every_isa
def test_parts_of_every_backend(backend, monkeypatch):
    """Whatever stands outside of the sets; a target on another rank adds nothing to a set, nor is it missed."""
    small = dict(vocabs=(3, 31, 40), rows=(4,)) if backend == "triton" else {}
    for seed in range(CASES[backend]):
        case = draw(seed, **small)
        try:
            compare(case, *on_one(case, seed, 2 + seed % 2, monkeypatch), *whole(case))
        except Exception as error:
            given = (seed, case.keep.empty, case.keep.begin is None, case.options, case.logits.dtype, tuple(case.logits.shape))
            raise AssertionError(f"{given}") from error
