"""token_stats over lists of kept ids, of rows whose columns are cut over ranks."""

import contextlib
import math
import random
import re
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from isas import every_isa
from kept_oracle import OUTSIDE, Case, draw_case
from oracle import TOLERANCE
from ranks import compiles, on_ranks
from torch._dynamo.testing import CompileCounter

import rlkern
from rlkern import Kept, token_stats
from rlkern.parallel import Meeting, Shard
from rlkern.primitives import kept_stats, linear_kept, sharded_kept
from rlkern.primitives.row_stats import row_options

FIELDS = ("logp", "entropy", "logsumexp", "sum_sq_prob", "full_entropy", "full_logsumexp")
NAN, INF = math.nan, math.inf


def draw(seed, **of) -> Case:
    """A case with lists, a third of the rows without one."""
    for at in range(seed, 10**6, 1000):
        case = draw_case(at, **of)
        if case.keep.kind == "ids":
            break
    options = {name: value for name, value in case.options.items() if name != "min_p"} | {"with_full": seed % 3 == 1}
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
    fields, total = [x for x in (getattr(stats, name) for name in FIELDS) if x is not None], 0.0
    for seed, x in enumerate(fields):
        weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        total = total + (torch.where(x.isneginf(), 0 * x.detach().nan_to_num(), x).double() * weight).sum()
    return total


def compare(case: Case, stats, grad, want, d_want) -> None:
    acc = want.logp.dtype
    tol = {"rtol": 5 * TOLERANCE[acc], "atol": 5 * TOLERANCE[acc]}
    for name in FIELDS[: 6 if case.options["with_full"] else 4]:
        torch.testing.assert_close(getattr(stats, name), getattr(want, name), **tol, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")
    assert torch.equal(stats.target_kept, want.target_kept)
    vocab, tol = case.logits.shape[-1], 2 * max(TOLERANCE[case.logits.dtype], TOLERANCE[acc])
    torch.testing.assert_close(grad[..., :vocab], d_want, rtol=tol, atol=tol, equal_nan=True, msg=lambda m: f"gradient: {m}")
    assert (grad[..., vocab:] == 0).all() and ((grad[..., :vocab][~inside(case)] == 0).all() or case.options["with_full"])


def inside(case: Case):
    """S', also where this module took a row's list away."""
    none = torch.zeros(len(case.logits), 1, dtype=torch.bool)
    if case.keep.rows is not None:
        none = (case.keep.rows < 0).unsqueeze(-1)
    sets, y = case.sets & ~none, case.targets.reshape(len(none), -1).clamp(0, case.sets.shape[-1] - 1)
    open_ = ~sets.any(-1, keepdim=True) & (case.keep.empty == "everything")
    if case.options["outside"] == "include":
        sets = sets.scatter(-1, y, True)
    elif case.options["outside"] == "everything":
        open_ = open_ | ~sets.gather(-1, y)
    return sets | open_


def garbage(case: Case, logits, seed: int):
    logits = logits.clone()
    if not case.options["with_full"]:
        logits[..., : case.logits.shape[-1]][~inside(case)] = (NAN, INF, -INF)[seed % 4 % 3]
    return logits


def on_one(case: Case, seed: int, ranks: int, monkeypatch, edges=None):
    """(statistics, gradient) of ranks that take turns: first all send their parts, then all go on."""
    logits, edges = (case.logits, edges) if edges else cut(case, seed, ranks)
    logits, vocab, parts, grads = garbage(case, logits, seed), case.logits.shape[-1], [], []
    options = {"mask": None, "temperature": 1.0} | {name: x for name, x in case.options.items() if name not in ("outside", "with_full")}
    options |= {"ignore_index": -100, "min_p": None, "min_prob": None, "with_entropy": True, "with_tail": False}

    how = {name: case.options[name] for name in ("outside", "with_full")}

    def run(start, stop):
        leaf = logits[..., start:stop].clone().requires_grad_()
        *rows, o = row_options(leaf, case.targets, **options)
        shard, o = Shard("", ranks, start, vocab, 0), o._replace(vocab_start=start, vocab_size=vocab)
        return leaf, sharded_kept.sharded_kept_stats(shard, leaf, *rows, o, keep=case.keep, in_place=False, **how)

    monkeypatch.setattr(sharded_kept, "all_parts", lambda own, *_: parts.append(own) or own)
    for columns in pairwise(edges):
        run(*columns)
    monkeypatch.setattr(sharded_kept, "all_parts", lambda *_: torch.cat(parts))
    for columns in pairwise(edges):
        leaf, stats = run(*columns)
        stats_loss(stats).backward()
        grads.append(leaf.grad)
    return stats, torch.cat(grads, -1)


CASES = {"reference": 20, "native": 50, "triton": 2}


@every_isa
def test_parts_of_every_backend(backend, monkeypatch):
    """Whatever stands outside of the sets."""
    small = dict(vocabs=(3, 31), rows=(4,)) if backend == "triton" else {}
    for seed in range(CASES[backend]):
        case = draw(seed, **small)
        with told(seed, case):
            compare(case, *on_one(case, seed, 2 + seed % 2, monkeypatch), *whole(case))


@pytest.mark.parametrize("outside", OUTSIDE)
@every_isa
def test_a_target_on_another_rank(backend, outside, monkeypatch):
    """Adds nothing to a set and is not missed there. Where nothing of a list is, the row has nothing."""
    lists = [[1, 2], [1, -1, 9], [8], [0, -1, 9], [], [5], [3, 7], [9, 8]]
    targets = torch.tensor([7, 1, 8, 5, 3, 2, -100, 0])
    flat, sets = [i for of_row in lists for i in of_row], torch.zeros(8, 10, dtype=torch.bool)
    for row, of_row in enumerate(lists):
        sets[row, [i for i in of_row if i >= 0]] = True
    edges = torch.tensor([0, *(len(of_row) for of_row in lists)]).cumsum(0)
    rows = torch.tensor([0, 1, 2, 3, 4, -1, 6, 7])
    logits = torch.randn(8, 10, generator=torch.Generator().manual_seed(0))
    options = {"outside": outside, "with_sum_sq": True, "with_full": False}
    for empty in ("everything", "nothing") if backend != "triton" or outside == "include" else ("everything",):
        keep = Kept.csr(torch.tensor(flat), edges, rows=rows, empty=empty)
        case = Case(logits, targets, sets, sets, targets, keep, options)
        compare(case, *on_one(case, 2, 2, monkeypatch, [0, 4, 10]), *whole(case))
    if outside == "minus_inf":
        several = case._replace(targets=torch.stack([targets, targets.roll(1), torch.full_like(targets, 9)], -1))
        compare(several, *on_one(several, 1, 2, monkeypatch, [0, 4, 10]), *whole(several))


@pytest.mark.parametrize("outside", OUTSIDE)
def test_what_cannot_be_is_nan_where_the_host_may_not_look(outside, monkeypatch):
    """As on a GPU: an id and a target outside of the vocabulary, a list beyond the last."""
    monkeypatch.setattr(kept_stats, "values_readable", lambda x: False)
    sets = torch.zeros(5, 10, dtype=torch.bool)
    sets[[0, 0, 1, 1, 2, 3, 4], [1, 8, 2, 9, 3, 4, 9]] = True
    ids, edges = torch.tensor([1, 10, 8, 2, 9, 3, 4, 9]), torch.tensor([0, 3, 5, 6, 7, 8])
    keep = Kept(ids, edges[:-1], edges[1:], torch.tensor([0, 1, 7, 3, 4]), "everything")
    logits, targets = torch.randn(5, 10, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2, 3, 12, 5])
    case = Case(logits, targets, sets, sets, targets, keep, {"outside": outside, "with_sum_sq": True, "with_full": False})
    with rlkern.use_backend("reference"), monkeypatch.context() as patch:
        patch.setattr(kept_stats, "check_target_range", lambda *_: None)
        got, d_got = on_one(case, 0, 2, patch, [0, 4, 10])
        want, d_want = whole(case)
    assert got.logp.isnan().tolist() == want.logp.isnan().tolist() == [True, False, True, True, False]
    torch.testing.assert_close(got.logp, want.logp, equal_nan=True)
    torch.testing.assert_close(d_got[[1, 4]], d_want[[1, 4]])


@contextlib.contextmanager
def told(seed, case: Case):
    try:
        yield
    except Exception as error:
        given = (seed, case.keep.empty, case.keep.begin is None, case.options, case.logits.dtype, tuple(case.logits.shape))
        raise AssertionError(f"{given}") from error


# --- with processes -----------------------------------------------------------------------------------------


def sharded(group, rank, seeds):
    """Of each case: (statistics, gradient, collectives of the forward, of the backward)."""
    found, ranks = [], group.size()
    for seed in seeds:
        case = draw(seed)
        logits, edges = cut(case, seed, ranks)
        leaf = garbage(case, logits, seed)[..., edges[rank] : edges[rank + 1]].clone().requires_grad_()
        columns = {"group": group, "vocab_start": edges[rank], "vocab_size": case.logits.shape[-1]}
        with counted_collectives() as collectives:
            z = leaf * 1 if seed % 4 == 3 else leaf
            stats = token_stats(z, case.targets, keep=case.keep, inplace_backward=seed % 4 == 3, **columns, **case.options)
            forward = len(collectives)
            stats_loss(stats).backward()
        found.append((stats, leaf.grad, forward, len(collectives) - forward))
    return found


@contextlib.contextmanager
def counted_collectives():
    calls, before = [], {}
    for name in ("all_gather_into_tensor", "all_gather_single", "all_reduce"):
        if hasattr(dist, name):
            before[name] = getattr(dist, name)
            setattr(dist, name, lambda *args, of=before[name], **kwargs: calls.append(of) or of(*args, **kwargs))
    yield calls
    for name, function in before.items():
        setattr(dist, name, function)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks(ranks):
    """Against whole rows in one process. All ranks have the same bits, by one gather behind the header."""
    seeds = range(24)
    of_rank = on_ranks(ranks, sharded, seeds)
    for seed, *of_case in zip(seeds, *of_rank, strict=True):
        case = draw(seed)
        with told(seed, case):
            stats = of_case[0][0]
            for others, _, forward, backward in of_case:
                assert (forward, backward) == (2, 0) and same_bits(stats, others)
            compare(case, stats, torch.cat([grad for _, grad, *_ in of_case], -1), *whole(case))


def same_bits(a, b) -> bool:
    pairs = list(zip(a, b, strict=True))
    return all(y is None if x is None else torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in pairs)


def wrong(group, rank, which):
    """A call that is not possible, on all ranks or on rank 1 alone; then one that is."""
    logits, targets, ids = torch.zeros(3, 10), torch.tensor([0, 5, 19]), torch.tensor([[0, 7, -1]] * 3)
    options = {"keep": Kept.ids(ids)}
    change = {
        "id": {"keep": Kept.ids(torch.tensor([[0, 20, -1]] * 3))},
        "padded id": {"vocab_size": 19, "keep": Kept.ids(torch.tensor([[0, 19, 1]] * 3))},
        "an id on one": {"keep": Kept.ids(torch.tensor([[0, 20, -1]] * 3))},
        "lengths": {"keep": Kept.ids(ids[:, :2])},
        "empty": {"keep": Kept.ids(ids, empty="nothing")},
        "outside": {"outside": "minus_inf"},
        "unknown": {"outside": "drop"},
        "none": {"keep": None},
        "min_p": {"min_p": 0.1},
        "with_full": {"with_full": True},
        "segments": {"segments": 2},
        "bits": {"keep": Kept.bits(torch.zeros(3, 1, dtype=torch.int32))},
        "mask": {"keep": torch.ones(3, 10, dtype=torch.bool)},
        "at_least": {"keep": Kept.at_least(torch.zeros(3))},
    }[which]
    alone = which in ("with_full", "an id on one", "lengths", "empty", "outside", "unknown", "none")
    if which == "padded id":
        targets = targets.clamp(max=18)
    try:
        token_stats(logits, targets, group=group, **options | (change if not alone or rank == 1 else {}))
    except Exception as error:
        dist.barrier(group)
        return f"{type(error).__name__}: {error}", token_stats(logits, targets, group=group, **options).logp
    return "nothing was raised", None


IDS = "keep must be made by Kept.ids, Kept.csr, Kept.counts or Kept.samples, got"


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("id", "IndexError: keep holds the id 20, out of range for 20 logits"),
        ("padded id", "IndexError: keep holds the id 19, out of range for 19 logits"),
        ("an id on one", "token_stats: the ranks of the group must agree on keep's ids"),
        ("lengths", "agree on keep's ids"),
        ("empty", "agree on keep's empty, got everything, nothing by rank"),
        ("outside", "agree on outside, got include, minus_inf by rank"),
        ("unknown", ("rank 1 of the group refused its arguments", "ValueError: unknown outside 'drop'")),
        ("none", "agree on keep, got ids, None by rank"),
        ("min_p", "ValueError: keep over several ranks takes no min_p, min_prob or with_tail"),
        ("with_full", "agree on with_full, got False, True by rank"),
        ("segments", "ValueError: keep takes no segments: expected None, got 2"),
        ("bits", f"TypeError: {IDS} Kept.bits"),
        ("mask", f"TypeError: {IDS} a tensor of torch.bool"),
        ("at_least", f"TypeError: {IDS} Kept.at_least"),
    ],
)
def test_errors(which, message):
    messages = (message, message) if isinstance(message, str) else message
    for (found, logp), expected in zip(on_ranks(2, wrong, which), messages, strict=True):
        assert re.search(expected, found), found
        assert logp is not None and logp.isfinite().all()


def test_padding_without_a_group(monkeypatch):
    """Sets are then of the vocabulary, without the padded columns."""
    for seed in range(40):
        case = draw_case(seed, vocabs=(31, 32, 40))
        vocab, with_full = case.logits.shape[-1], seed % 3 == 0
        keep = case.keep
        wide = torch.nn.functional.pad(case.logits, (0, 9), value=NAN)
        results = []
        for logits, size in ((case.logits, None), (wide, vocab)):
            leaf = logits.clone().requires_grad_()
            stats = token_stats(leaf, case.targets, keep=keep, vocab_size=size, with_full=with_full, **case.options)
            (stats_loss(stats) + (stats.full_entropy.sum() if with_full else 0)).backward()
            assert (leaf.grad[..., vocab:] == 0).all()
            results.append((*stats[:5], stats.target_kept, stats.full_entropy, leaf.grad[..., :vocab]))
        with told(seed, case):
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True) if a is not None else None
    with pytest.raises(ValueError, match=r"Kept.mask must be \(3, 37\) for logits \(3, 40\) and vocab_size=37, got \(3, 40\)"):
        token_stats(torch.zeros(3, 40), torch.zeros(3, dtype=torch.long), vocab_size=37, keep=torch.ones(3, 40, dtype=torch.bool))
    with pytest.raises(IndexError, match="keep holds the id 38 for row 0, out of range for 37 logits"):
        token_stats(torch.zeros(1, 40), torch.zeros(1, dtype=torch.long), vocab_size=37, keep=Kept.ids(torch.tensor([[1, 38]])))
    hidden, weight, y, keep = torch.ones(2, 4), torch.ones(40, 4), torch.zeros(2, dtype=torch.long), Kept.ids(torch.tensor([[1, 37], [1, 2]]))
    with pytest.raises(IndexError, match="keep holds the id 37 for row 0, out of range for 37 logits"):
        rlkern.linear_token_stats(hidden, weight, y, vocab_size=37, keep=keep)
    monkeypatch.setattr(linear_kept, "values_readable", lambda x: False)
    assert rlkern.linear_token_stats(hidden, weight, y, vocab_size=37, keep=keep).logp.isnan().tolist() == [True, False]


# --- the output matrix over ranks ---------------------------------------------------------------------------


def head_of(seed: int):
    """(the case, hidden, weight with padding, bias, options of linear_token_stats)"""
    r, case = random.Random(seed), draw(seed)
    g, (n, vocab) = torch.Generator().manual_seed(seed), case.logits.shape
    dtype = case.logits.dtype if case.logits.dtype != torch.float16 else torch.float32
    hidden, weight, bias = (torch.randn(*shape, generator=g).to(dtype) for shape in ((n, 5), (vocab + 3, 5), (vocab + 3,)))
    weight[vocab:], bias[vocab:] = NAN, NAN
    options = {name: x for name, x in case.options.items() if name != "with_full"} | {"max_dense_rows": n, "round_logits": r.random() < 0.3}
    return case, hidden, weight, bias if r.random() < 0.5 else None, options


def of_head(case, hidden, weight, bias, options, **columns):
    """[statistics, target_kept, gradients of hidden, weight and bias]"""
    leaves = [None if x is None else x.clone().requires_grad_() for x in (hidden, weight, bias)]
    stats = rlkern.linear_token_stats(leaves[0], leaves[1], case.targets, bias=leaves[2], keep=case.keep, **options, **columns)
    stats_loss(stats).backward()
    return [*stats[:4], stats.target_kept, *(None if x is None else x.grad for x in leaves)]


def sharded_heads(group, rank, seeds):
    found = []
    for seed in seeds:
        case, hidden, weight, bias, options = head_of(seed)
        _, edges = cut(case._replace(logits=weight.T), seed, group.size())
        own = slice(edges[rank], edges[rank + 1])
        columns = {"group": group, "vocab_start": own.start, "vocab_size": case.logits.shape[-1]}
        columns["hidden_grad"] = "partial" if seed % 3 == 0 else "all_reduce"
        found.append(of_head(case, hidden, weight[own], None if bias is None else bias[own], options, **columns))
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_output_matrix_over_ranks(ranks):
    """Rows over all ids, too. The kept logits are those of one process, and so are all bits that follow."""
    seeds = range(16)
    for seed, *of_case in zip(seeds, *on_ranks(ranks, sharded_heads, seeds), strict=True):
        case, hidden, weight, bias, options = head_of(seed)
        vocab = case.logits.shape[-1]
        with told(seed, case):
            whole = (hidden, weight[:vocab], None if bias is None else bias[:vocab], options)
            want, padded = of_head(case, *whole), of_head(case, hidden, weight, bias, options, vocab_size=vocab)
            d_hidden = [x[5].double() for x in of_case]
            got = [*of_case[0][:5], sum(d_hidden) if seed % 3 == 0 else d_hidden[0]]
            got += [torch.cat([x[i] for x in of_case]) if of_case[0][i] is not None else None for i in (6, 7)]
            acc = 5 * TOLERANCE[want[0].dtype]
            for i, (a, b, c) in enumerate(zip(got, padded, want, strict=True)):
                if c is None:
                    assert a is None and b is None
                    continue
                tol = (
                    {"rtol": acc, "atol": acc}
                    if i < 5
                    else {"rtol": 4 * max(acc, TOLERANCE[hidden.dtype]), "atol": 4 * max(acc, TOLERANCE[hidden.dtype])}
                )
                if i > 5:
                    assert (a[vocab:] == 0).all() and (b[vocab:] == 0).all()
                    a, b = a[:vocab], b[:vocab]
                torch.testing.assert_close(a.to(c.dtype), c, **tol, equal_nan=True, msg=lambda m, i=i: f"{i}: {m}")
                torch.testing.assert_close(b, c, **tol, equal_nan=True, msg=lambda m, i=i: f"padded {i}: {m}")
            for others in of_case[1:]:
                assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(of_case[0][:5], others[:5], strict=True))


def wrong_head(group, rank, which):
    hidden, weight, targets, ids = torch.ones(3, 4), torch.ones(10, 4), torch.tensor([0, 5, 19]), torch.tensor([[0, 7, -1]] * 3)
    options, change = {"keep": Kept.ids(ids)}, {
        "id": {"keep": Kept.ids(torch.tensor([[0, 20, -1]] * 3))},
        "target": {"targets": torch.tensor([0, 5, 20])},
        "dense": {"keep": Kept.ids(torch.tensor([[-1]] * 3))},
        "segments": {"segments": 2},
        "max_dense_rows": {"max_dense_rows": 2},
        "mask": {"keep": Kept.mask(torch.ones(3, 10, dtype=torch.bool))},
    }[which]  # fmt: skip
    alone = which in ("max_dense_rows", "mask")
    arguments = {"targets": targets, **options, **(change if not alone or rank == 1 else {})}
    try:
        rlkern.linear_token_stats(hidden, weight, group=group, **arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}", rlkern.linear_token_stats(hidden, weight, targets, group=group, **options).logp
    return "nothing was raised", None


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("id", "IndexError: keep holds the id 20, out of range for 20 logits"),
        ("target", "IndexError: target 20 of row 2 is out of range for 20 logits"),
        ("dense", "ValueError: max_dense_rows=0, but 3 rows are over the whole vocabulary"),
        ("segments", "ValueError: keep takes no segments"),
        ("max_dense_rows", "agree on max_dense_rows, got 0, 2 by rank"),
        ("mask", ("rank 1 of the group refused its arguments", f"TypeError: {IDS} Kept.mask")),
    ],
)
def test_errors_of_the_output_matrix(which, message):
    messages = (message, message) if isinstance(message, str) else message
    for (found, logp), expected in zip(on_ranks(2, wrong_head, which), messages, strict=True):
        assert re.search(expected, found), found
        assert logp is not None and logp.isfinite().all()


def refusing(group, rank, of_head):
    """Where no header is exchanged, as on GPUs: what rank 0 finds, rank 1's error; then a call of both."""
    logits, targets = torch.zeros(3, 10), torch.tensor([0, 5, 19])
    options = {"group": group, "keep": Kept.ids(torch.tensor([[0, 7, -1], [3, 12, 15], [-1, -1, -1]]))}
    if of_head:
        options["max_dense_rows"] = 2
    else:
        options["with_full"] = True

    def call(**change):
        if of_head:
            return rlkern.linear_token_stats(torch.ones(3, 4), torch.ones(10, 4), targets, **options | change).logp
        return token_stats(logits, targets, **options | change).logp

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Meeting, "exchanges", False)
        try:
            found = call(**({"outside": "drop"} if rank == 1 else {}))
        except ValueError as error:
            found = str(error)
        return found, call()


@pytest.mark.parametrize("of_head", [False, True])
def test_a_rank_that_refuses_where_the_host_may_not_look(of_head):
    (found, logp), (error, same) = on_ranks(2, refusing, of_head)
    assert found.isnan().all() and "unknown outside 'drop'" in error and torch.equal(logp, same)
    torch.testing.assert_close(logp, torch.tensor([2, 4, 20]).log().neg())


# --- compiled -----------------------------------------------------------------------------------------------


def compiled(group, rank):
    """Whether compiled calls give what eager ones do, for lists of several lengths; the compilations."""
    g = torch.Generator().manual_seed(0)
    targets, same = torch.randint(0, 20, (6,), generator=g), []

    def loss(z, ids, edges):
        stats = token_stats(z, targets, keep=Kept.csr(ids, edges), group=group)
        return (stats.logp + stats.entropy).sum(), stats.target_kept

    counter = CompileCounter()
    compiled_loss = torch.compile(loss, backend=counter, fullgraph=True)
    for size in (10, 12, 14):
        ids, edges = torch.randperm(20, generator=g)[:size].int(), torch.linspace(0, size, 7).long()
        z = torch.randn(6, 10, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        (a, kept), (b, of_eager) = compiled_loss(z, ids, edges), loss(z, ids, edges)
        same.append(torch.equal(torch.autograd.grad(a, z)[0], torch.autograd.grad(b, z)[0]) and torch.equal(kept, of_eager))
    return same, counter.frame_count


@compiles
def test_compile():
    for same, compilations in on_ranks(2, compiled):
        assert same == [True, True, True] and compilations <= 2


def test_the_operator_on_lists():
    ids, edges = torch.tensor([1, 8, 4, 11, -1, 0], dtype=torch.int32), torch.tensor([0, 2, 5])
    arguments = (torch.tensor([[1], [3]]), None, ids, edges[:-1], edges[1:], None, -100, 4, 8, 12, 0, True)
    torch.library.opcheck(torch.ops.rlkern.kept_lists_of_columns.default, arguments)
    entries, begin, end, rows, target_kept = torch.ops.rlkern.kept_lists_of_columns(*arguments)
    assert entries[:3].tolist() == [4, 0, 7] and begin.tolist() == [0, 1, 0] and end.tolist() == [1, 3, 0]
    assert rows.tolist() == [0, 1] and target_kept.tolist() == [[True], [False]]
