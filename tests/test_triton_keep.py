"""The Triton kernels of token_stats over kept sets: many tiles, parts of rows, lists longer than a block.

test_keep.py compares every backend with float64 on short rows. Small launch shapes, as in
test_triton_token_stats.py, give these rows many tiles.
"""

import math

import pytest
import torch
from kept_oracle import Case, check, draw_case, kept_as, lists_of
from oracle import INF, draw, ids
from test_triton_token_stats import BLOCK, DEVICE, GROUPS, SPLIT, WHOLE, nan_filled, reads_behind
from test_triton_token_stats import on_triton as on_triton
from test_triton_token_stats import shape as shape

import rlkern
from rlkern import Kept
from rlkern.backends.contract import Keep, Outside, SetKind, State
from rlkern.triton_kernels import token_stats as launchers

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the sets are made on a processor")
NAN = math.nan


@pytest.mark.parametrize("seed", range(10))
def test_many_tiles(shape, seed):
    """Targets, bits and thresholds in other tiles than each other, garbage outside."""
    shape((SPLIT, WHOLE)[seed % 2], GROUPS)
    case = draw_case(seed, vocabs=(2 * BLOCK, 4 * BLOCK - 7), rows=(2, 3))
    check(case, with_full=seed % 3 == 0, garbage=(NAN, INF)[seed % 2])


def some_sets(vocab: int, share: float, n: int = 3, dtype=torch.float32, k: int | None = None) -> Case:
    """A share of the columns kept; row 0 keeps its targets, row 1 none of them, row 2 one column."""
    g = torch.Generator().manual_seed(vocab)
    logits, y = draw(n, vocab, dtype=dtype, scale=1.0), ids(vocab, n, k or 1)
    sets = torch.rand(n, vocab, generator=g) < share
    sets[0, y[0]], sets[1:, y[-1]] = True, False
    sets[2:] = torch.arange(vocab) == vocab - 1
    found = sets.gather(-1, y)
    options = {"outside": "minus_inf" if k else "include", "with_sum_sq": True}
    inside = sets if k else sets.scatter(-1, y, True)
    if not k:
        y, found = y[:, 0], found[:, 0]
    return Case(logits, y, sets, inside, found, kept_as("mask", sets), options)


@pytest.mark.parametrize(("kind", "k", "with_full"), [("bits", 3, False), ("mask", 12, False), ("bits", 12, True), ("at_least", 12, True)])
def test_targets_in_many_tiles(shape, kind, k, with_full):
    """More than eight are written by a kernel of their own."""
    shape(SPLIT, GROUPS)
    case = some_sets(2 * BLOCK + 5, 0.3, n=2, k=k)
    case.options.update({"softcap": 3.0})
    if kind == "at_least":
        threshold = case.logits.quantile(0.7, -1)
        sets = case.logits >= threshold.unsqueeze(-1)
        case = case._replace(sets=sets, inside=sets, target_kept=sets.gather(-1, case.targets), keep=Kept.at_least(threshold))
    else:
        case = case._replace(keep=kept_as(kind, case.sets))
    check(case, with_full, garbage=NAN)


def test_lists_of_many_blocks():
    """Padding moves none of their bits: not of the numbers, nor of the gradient."""
    case = some_sets(300, 0.5, n=2, dtype=torch.bfloat16)
    case.options.update({"min_p": 0.3, "softcap": 2.0, "temperature": 0.7})
    padded = lists_of(case.sets, 200)
    real = padded >= 0
    front = torch.where(real, padded, -1).gather(-1, (~real).long().argsort(dim=-1, stable=True))
    edges = torch.cat([torch.zeros(1, dtype=torch.long), real.sum(-1).cumsum(0)])
    found = []
    for keep in (Kept.ids(padded), Kept.ids(front.long()), Kept.csr(padded[real], edges)):
        leaf = case.logits.clone().requires_grad_()
        stats = rlkern.token_stats(leaf, case.targets, keep=keep, **case.options)
        (stats.logp + stats.entropy + stats.logsumexp).sum().backward()
        found.append(torch.cat([*(x.flatten().double() for x in stats if x is not None), leaf.grad.flatten().double()]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    check(case._replace(keep=Kept.ids(padded)), with_full=True, garbage=NAN)
    case = some_sets(300, 0.5, n=2, k=3)
    check(case._replace(keep=Kept.ids(lists_of(case.sets, 200))), with_full=True, garbage=NAN)


@pytest.mark.parametrize("top", [-1.0, 9.0])
def test_a_target_that_is_added(shape, top):
    """Alone in its tile and part, outside of min_p's set or the maximum itself."""
    shape(SPLIT, GROUPS)
    case = some_sets(3 * BLOCK, 0.3, n=2)
    case.sets[:, BLOCK : 2 * BLOCK] = False
    case.targets.copy_(torch.tensor([BLOCK, 2 * BLOCK - 1]))
    case.logits[:, BLOCK : 2 * BLOCK] = top
    case = case._replace(inside=case.sets.scatter(-1, case.targets.unsqueeze(-1), True), target_kept=torch.tensor([False, False]))
    case.options.update({"min_p": 0.1})
    check(case, with_full=False, garbage=None)


@pytest.mark.parametrize(
    ("dtype", "variant"), [(torch.bfloat16, SPLIT), (torch.float32, WHOLE), (torch.float64, WHOLE)], ids=["bf16", "fp32", "fp64"]
)
def test_a_row_has_the_same_bits_wherever_it_starts(shape, dtype, variant):
    """Beside bits and a mask that start anywhere, too."""
    shape(variant, GROUPS)
    case = some_sets(2 * BLOCK + 5, 0.3, n=1, dtype=dtype)
    vocab, per_boundary, want = case.logits.shape[-1], 16 // dtype.itemsize, None
    for lead in sorted({0, 1, per_boundary - 3, per_boundary - 1} & set(range(per_boundary))):
        for bits in (True, False):
            rows = torch.full((vocab + 8,), NAN, dtype=dtype)
            rows[lead : lead + vocab] = case.logits
            entries = kept_as("bytes", case.sets).entries[0] if bits else case.sets[0]
            beside = torch.full((len(entries) + 16,), 255 if bits else True, dtype=entries.dtype)
            sets = beside[3 * lead : 3 * lead + len(entries)] if 3 * lead < 16 else beside[1 : 1 + len(entries)]
            sets.copy_(entries)
            leaf = rows[lead : lead + vocab].unsqueeze(0).requires_grad_()
            keep = Kept.bits(sets.unsqueeze(0)) if bits else Kept.mask(sets.unsqueeze(0))
            stats = rlkern.token_stats(leaf, case.targets, keep=keep, min_p=0.1, **case.options)
            (grad,) = torch.autograd.grad((stats.logp + stats.entropy + stats.kept_logmass).sum(), leaf)
            got = torch.cat([torch.stack(stats[:5]).flatten().double(), grad.flatten().double()])
            want = got if want is None else want
            assert torch.equal(got, want), (lead, bits)


@pytest.mark.parametrize("vocab", [BLOCK + 1, BLOCK + 7, 5, 1])
@pytest.mark.parametrize("kind", ["bytes", "mask"])
def test_nothing_behind_the_last_set_is_read(shape, vocab, kind, monkeypatch):
    shape(WHOLE, GROUPS)
    case = some_sets(vocab, 0.3, dtype=torch.bfloat16)
    entries = kept_as(kind, case.sets).entries
    storage = torch.zeros(entries.numel() + 128, dtype=entries.dtype)
    sets = storage[: entries.numel()].view(entries.shape)
    sets.copy_(entries)
    behind = reads_behind(sets[-1], monkeypatch)
    for logits in (case.logits, torch.nn.functional.pad(case.logits, (1, 2))[:, 1:-2]):
        leaf = logits.requires_grad_()
        keep = Kept.bits(sets) if kind == "bytes" else Kept.mask(sets)
        rlkern.token_stats(leaf, case.targets, keep=keep, min_p=0.1).logp.sum().backward()
    assert not behind


def test_scratch_is_written_before_it_is_read(shape, monkeypatch):
    """Rows over all ids, rows with lists and rows that are skipped, side by side."""
    shape(SPLIT, GROUPS)
    vocab = 2 * BLOCK + 5
    logits, y = draw(6, vocab), ids(vocab, 6)
    y[4] = -100
    lists = torch.tensor([[5, 9, -1], [-1, -1, -1], [-1, 500, -1], [7, 3, 2], [1, 2, 3], [-1, 0, 4]])

    def results(with_full):
        leaf = logits.clone().requires_grad_()
        mask = torch.tensor([1, 1, 1, 0, 1, 1])
        stats = rlkern.token_stats(leaf, y, mask=mask, keep=Kept.ids(lists), with_sum_sq=True, min_p=0.1, with_full=with_full)
        total = sum(x.sum() for x in stats if x is not None and x.dtype != torch.bool)
        return [x for x in stats if x is not None] + list(torch.autograd.grad(total, leaf))

    want = [results(with_full) for with_full in (False, True)]
    monkeypatch.setattr(torch.Tensor, "new_empty", nan_filled)
    monkeypatch.setattr(torch, "empty_like", lambda x, dtype=None, **_: nan_filled(x, x.shape, dtype=dtype or x.dtype))
    for with_full in (False, True):
        assert all(torch.equal(a, b) for a, b in zip(results(with_full), want[with_full], strict=True))
    assert (want[0][-1][3:5] == 0).all() and (want[0][-1][1] != 0).all() and (want[0][-1][0] != 0).sum() == 3


def listed(logits, y, keep: Keep, in_place: bool = False):
    """(logp, gradient of its sum) of the launchers alone: nothing has looked at the lists."""
    n = len(y)
    rows, logp, lse = logits.unsqueeze(0).clone(), torch.empty(n, 1), torch.empty(n)
    state, found = torch.empty(n, State.TARGETS + 1), torch.empty(n, 1, dtype=torch.bool)
    launchers.token_stats_forward(rows, y, None, 1.0, -100, 0, 0.0, (logp, None, lse, None, None, state), 0.0, keep, (found, None, None, None))
    out = rows if in_place else torch.full_like(rows, NAN)
    launchers.token_stats_backward(rows, y, None, 1.0, -100, 0, state, (torch.ones(n, 1), *[None] * 4), out, 0.0, keep)
    return logp[:, 0], out[0]


def lists(ids, begin, end, rows=None, outside=Outside.INCLUDE):
    as_ids = [None if x is None else torch.tensor(x) for x in (begin, end, rows)]
    return Keep(SetKind.LISTS, torch.tensor(ids, dtype=torch.int32), outside, *as_ids, True)


def test_lists_that_cannot_be_are_nan():
    """And nothing else is: ids and lists out of range, ends outside of the ids, backward ones."""
    logits, y = draw(6, 50), torch.tensor([[1], [2], [3], [4], [5], [6]])
    sound = lists([1, 2, 3, 4, 9, 30], [0, 1, 2, 3, 4, 6], [1, 2, 3, 4, 6, 6])
    want, d_want = listed(logits, y, sound)
    broken = lists([1, 50, 3, 4, 9, 30], [-7, 1, 2, 3, 4, 9], [1, 2, 3, 4, 10**9, 2])
    got, d = listed(logits, y, broken)
    kept = [0, 2, 3, 4, 5]
    assert torch.equal(got[kept], want[kept]) and torch.equal(d[kept], d_want[kept])
    assert got[1].isnan() and d[1, 2].isnan() and (d[1].nan_to_num() == 0).all()
    got, d = listed(logits, y, lists([7, 8], [0], [2], [0, -1, 5, -1, -1, -1]))
    assert got.isnan().tolist() == [False, False, True, False, False, False]
    assert d[0].nonzero().flatten().tolist() == [1, 7, 8] and (d[1] != 0).all()


@pytest.mark.parametrize("in_place", [False, True])
def test_rows_that_share_a_list(in_place):
    """Right where there is room for the gradients of all, and else NaN."""
    logits, y = draw(3, 50), torch.tensor([[7], [8], [20]])
    got, d = listed(logits, y, lists([7, 8, 9, 30, 31, 32], [0, 3], [2, 3], [0, 0, 0]), in_place)
    want, d_want = listed(logits, y, lists([7, 8, 7, 8, 7, 8], [0, 2, 4], [2, 4, 6]))
    assert torch.equal(got, want) and torch.equal(d, d_want)
    _, d = listed(logits, y, lists([7, 8], [0], [2], [0, 0, 0]), in_place)
    assert torch.equal(d[0], d_want[0]) and d[1:, 7:9].isnan().all()
