"""linear_token_stats over lists of kept ids against masked logits in float64, on every backend."""

import contextlib
import math

import pytest
import torch
from isas import every_isa
from loss_battery import Operators
from oracle import FIELDS, upstream
from torch.nn.functional import linear
from torch.utils import _pytree

import rlkern
from rlkern import Kept, linear_token_stats, token_stats

V, H, N, K = 37, 21, 9, 5
INF = math.inf


def draw(dtype=torch.float64, n=N, vocab=V, width=H, seed=0):
    """(hidden, weight, bias), and targets of which some are in the padded ids [n, K], holes anywhere."""
    g = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for shape in ((n, width), (vocab, width), (vocab,))]
    ids = torch.stack([torch.randperm(vocab - 1, generator=g)[:K] for _ in range(n)])
    ids += ids >= 7
    for i, row in enumerate(ids[:-1]):
        row[: i % 3] = -1  # at the front, then in the middle and at the end
        row[3 if i % 4 else 4] = -100
    ids[:, 2] = 7  # in every list
    targets = torch.randint(vocab, (n,), generator=g)
    targets[::3], targets[1] = ids[::3, 2], ids[1, 1]
    return leaves, targets, ids


def masked(leaves, ids, targets=None, **options):
    """The oracle: all logits, -inf but for the ids and, if given, the targets."""
    hidden, weight, bias = leaves
    kept = torch.zeros(len(hidden), len(weight) + 1, dtype=torch.bool, device=hidden.device)
    kept.scatter_(-1, torch.where(ids < 0, len(weight), ids), True)
    if targets is not None:
        kept.scatter_(-1, targets.clamp(min=0).unsqueeze(-1), True)
    return linear(hidden, weight, bias).masked_fill(~kept[:, :-1], -INF)


def gradients(stats, leaves, seed=0):
    fields = [getattr(stats, name) for name in FIELDS if getattr(stats, name) is not None]
    loss = sum((f * g.to(f).masked_fill(f == -INF, 0)).sum() for f, g in zip(fields, upstream(fields, seed), strict=True))
    return torch.autograd.grad(loss, leaves)


def agree(stats, expected, leaves, rtol=1e-12, atol=1e-12):
    for name in FIELDS:
        got, want = getattr(stats, name), getattr(expected, name)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(gradients(stats, leaves), gradients(expected, leaves), rtol=rtol, atol=atol)


@every_isa
@pytest.mark.parametrize(
    "options",
    [{"with_sum_sq": True}, {"temperature": torch.linspace(0.5, 2, N)}, {"temperature": 0.7, "mask": torch.arange(N) % 3, "with_entropy": False}],
    ids=["sum_sq", "temperatures", "mask"],
)
def test_equals_masked_logits(backend, options):
    (hidden, weight, bias), targets, ids = draw()
    leaves = (hidden, weight, bias)
    targets[4] = -100
    stats = linear_token_stats(hidden, weight, targets, bias=bias, keep=Kept.ids(ids.int()), **options)
    agree(stats, token_stats(masked(leaves, ids, targets), targets, **options), leaves)
    counted = (targets >= 0) & (options.get("mask", torch.ones(N)) != 0)
    assert torch.equal(stats.target_kept, (ids == targets.unsqueeze(-1)).any(-1) | ~counted)
    assert (stats.logp[~counted] == 0).all() and (stats.logsumexp[~counted] == 0).all()


def every_format(ids, rows=(3, 3)):
    """The same lists as padded, CSR, counts and samples, each in some other disguise."""
    lists = [row[row >= 0] for row in ids]
    packed, lengths = torch.cat(lists), torch.tensor([len(x) for x in lists])
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    spare = torch.cat([packed, torch.full((4,), 10**6)])
    n = len(ids)
    backwards = torch.cat(lists[::-1]), torch.cat([torch.zeros(1, dtype=torch.long), lengths.flip(0).cumsum(0)])
    half = int(offsets[4])
    parts = [torch.cat([packed[:half], torch.tensor([V, 5])]), packed[half:].clone()], [offsets[:5].int(), offsets[4:].int() - half]
    return {
        "ids": Kept.ids(ids.view(*rows, K)),
        "ids int32": Kept.ids(torch.cat([ids, ids.new_full((n, 1), -7)], -1).int().view(*rows, K + 1)),
        "csr": Kept.csr(spare, offsets, rows=None),
        "csr of rows": Kept.csr(*backwards, rows=torch.arange(n - 1, -1, -1).view(rows)),
        "counts": Kept.counts(packed.int(), lengths.int()),
        "samples": Kept.samples(*parts, rows=torch.arange(n).view(rows)),
    }


def test_formats_have_the_same_bits(backend):
    (hidden, weight, bias), targets, ids = draw(torch.float32)
    hidden, targets = hidden.detach().view(3, 3, H).requires_grad_(), targets.view(3, 3)
    ids[5] = -1  # an empty list, also as CSR row -1
    formats = every_format(ids)
    formats["csr row -1"] = Kept.csr(formats["csr of rows"].entries, torch.cat([formats["csr of rows"].begin, formats["csr of rows"].end[-1:]]),
                                     rows=formats["csr of rows"].rows.clone().view(-1).index_fill(0, torch.tensor([5]), -1).view(3, 3))  # fmt: skip
    results = {}
    for name, keep in formats.items():
        stats = linear_token_stats(hidden, weight, targets, bias=bias, keep=keep, max_dense_rows=1, with_sum_sq=True)
        results[name] = [*(x for x in stats if x is not None), *gradients(stats, (hidden, weight, bias))]
    for name, values in results.items():
        assert all(torch.equal(a, b) for a, b in zip(values, results["ids"], strict=True)), name


@every_isa
@pytest.mark.parametrize("width", [16, 171])
def test_low_precision(backend, width):
    """As float64 on the rounded inputs: no rounding of a product, and one of each gradient."""
    (hidden, weight, bias), targets, ids = draw(torch.bfloat16, width=width)
    stats = linear_token_stats(hidden, weight, targets, bias=bias, keep=Kept.ids(ids))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    expected = token_stats(masked(exact, ids, targets), targets)
    size = linear(*exact).abs().max().item()
    torch.testing.assert_close(stats.logp.double(), expected.logp, rtol=0, atol=1e-6 * size)
    for got, want in zip(gradients(stats, (hidden, weight, bias)), gradients(expected, exact), strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), want, rtol=2**-7, atol=2**-7 * 1e-2 * want.abs().max().item())


@pytest.mark.parametrize("softcap", [None, 1.5, 40.0])
def test_scale_and_softcap(softcap):
    (hidden, weight, bias), targets, ids = draw()
    leaves, options = (hidden, weight, bias), {"logit_scale": 2.5, "softcap": softcap, "temperature": torch.linspace(0.5, 2, N)}
    ids[3] = -1
    stats = linear_token_stats(hidden, weight, targets, bias=bias, keep=Kept.ids(ids), max_dense_rows=1, with_sum_sq=True, **options)
    x = torch.where((torch.arange(N) == 3).unsqueeze(-1), linear(*leaves), masked(leaves, ids, targets))
    agree(stats, token_stats(x, targets, with_sum_sq=True, **options), leaves)
    weight = torch.tensor([[30.0], [29.0], [0.0]], requires_grad=True)  # 1 - tanh^2 is 0 in float32
    stats = linear_token_stats(torch.ones(1, 1), weight, torch.tensor([1]), keep=Kept.ids(torch.tensor([[0, 1, 2]])), softcap=2.0)
    exact = weight.detach().double().requires_grad_()
    want = torch.autograd.grad((2 * (exact.flatten() / 2).tanh()).log_softmax(0)[1], exact)
    torch.testing.assert_close(torch.autograd.grad(stats.logp.sum(), weight)[0].double(), want[0], rtol=1e-3, atol=0)


def test_round_logits_as_the_models_head():
    (hidden, weight, bias), targets, ids = draw(torch.bfloat16)
    exact = linear(*(x.detach().double() for x in (hidden, weight, bias)))
    logits = exact.float().bfloat16().float()  # one rounding of each
    kept = masked((hidden.detach(), weight.detach(), bias.detach()), ids, targets) > -INF
    want = token_stats(logits.masked_fill(~kept, -INF), targets)
    got = linear_token_stats(hidden, weight, targets, bias=bias, keep=Kept.ids(ids), round_logits=True)
    torch.testing.assert_close(got.logp, want.logp, rtol=1e-5, atol=1e-5)
    exactly = linear_token_stats(hidden, weight, targets, bias=bias, keep=Kept.ids(ids))
    assert (got.logp - exactly.logp).abs().max() > 1e-3


def plain_row(values, **options):
    """Logits `values` as the products of one row, and their gradient by logp."""
    weight = torch.tensor(values, dtype=torch.float64).unsqueeze(-1).requires_grad_()
    targets = torch.tensor([options.pop("target")])
    stats = linear_token_stats(torch.ones(1, 1, dtype=torch.float64), weight, targets, **options)
    return stats, torch.autograd.grad(stats.logp.sum(), weight)[0].squeeze(-1)


def test_a_target_outside_its_set(backend):
    def row(outside, **options):
        return plain_row([0.0, 1, 2, 3], target=3, keep=Kept.ids(torch.tensor([[1, 2]])), outside=outside, **options)

    (include, d_include), (everything, d_everything) = row("include"), row("everything", max_dense_rows=1)
    minus_inf, d_minus_inf = row("minus_inf")
    assert include.logp.item() == pytest.approx(-0.40761, abs=1e-5) and d_include[0] == 0
    assert everything.logp.item() == pytest.approx(-0.44019, abs=1e-5) and d_everything[0] != 0
    assert minus_inf.logp.item() == -INF and (d_minus_inf == 0).all()
    assert minus_inf.entropy.item() == pytest.approx(0.58220, abs=1e-5)
    assert not (include.target_kept | everything.target_kept | minus_inf.target_kept).any()


def test_a_set_of_one(backend):
    for ids, empty in (([[2, -1]], "everything"), ([[-1, -1]], "nothing")):
        stats, gradient = plain_row([0.3, 1.7, -2.1, 3], target=2, keep=Kept.ids(torch.tensor(ids), empty=empty), temperature=0.7, with_sum_sq=True)
        assert (stats.logp.item(), stats.entropy.item(), stats.sum_sq_prob.item()) == (0, 0, 1) and (gradient == 0).all()
        assert stats.target_kept.item() == (ids[0][0] == 2)
    stats, _ = plain_row([0.3, 1.7], target=1, keep=Kept.ids(torch.tensor([[-1]]), empty="nothing"), outside="minus_inf")
    assert stats.logsumexp.item() == -INF and stats.logp.isnan()
    weight = torch.tensor([[0.3], [0.1]], requires_grad=True)
    stats = linear_token_stats(torch.ones(1, 1), weight, torch.tensor([1]), keep=Kept.ids(torch.tensor([[1]])), temperature=0.7)
    fields = 3.7 * stats.logp + 1.9 * stats.entropy + 0.3 * stats.logsumexp
    (gradient,) = torch.autograd.grad(fields.sum(), weight)
    assert gradient[1].item() == pytest.approx(0.3 / 0.7, rel=2e-7) and gradient[0] == 0


def test_a_confident_row_keeps_its_digits(backend):
    """logp = -e^-20, of which 1 - p in float32 has none."""
    weight = torch.tensor([[20.0], [0.0], [-INF]], requires_grad=True)
    stats = linear_token_stats(torch.ones(1, 1), weight, torch.tensor([0]), keep=Kept.ids(torch.tensor([[2, 1, 0]])))
    rest = math.exp(-20)
    assert stats.logp.item() == pytest.approx(-rest, rel=1e-5)
    (gradient,) = torch.autograd.grad(stats.logp.sum(), weight)
    assert gradient.flatten().tolist() == pytest.approx([rest, -rest, 0], rel=1e-5)


def test_several_targets_ask_about_the_set(backend):
    leaves, _, ids = draw()
    ids[4] = torch.tensor([3, 8, 8 + V // 2, -1, 1])
    targets = torch.cat([ids, torch.arange(N).unsqueeze(-1)], -1).masked_fill(torch.cat([ids, ids[:, :1] * 0], -1) < 0, -1)
    stats = linear_token_stats(leaves[0], leaves[1], targets, bias=leaves[2], keep=Kept.ids(ids), outside="minus_inf", ignore_index=-1)
    expected = token_stats(masked(leaves, ids), targets, ignore_index=-1)
    agree(stats, expected, leaves)
    listed = (targets.unsqueeze(-1) == ids.unsqueeze(1)).any(-1) | (targets == -1)
    assert torch.equal(stats.target_kept, listed) and torch.equal(stats.logp == -INF, ~listed)


def test_an_id_in_every_row_and_bits(backend, monkeypatch):
    """More pairs of one id than a program takes; rows in any order, alone, twice, on other threads."""
    n = 600
    if backend == "triton":
        n = 11
        monkeypatch.setattr("rlkern.triton_kernels.kept.SORTED_PAIRS", 4)
    (hidden, weight, bias), targets, ids = draw(torch.float32, n=n)
    keep = Kept.ids(ids)

    def run(order=slice(None)):
        stats = linear_token_stats(hidden[order], weight, targets[order], bias=bias, keep=Kept.ids(keep.entries[order]))
        return [stats.logp, stats.entropy], gradients(stats, (hidden, weight, bias))

    fields, grads = run()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    expected = gradients(token_stats(masked(exact, ids, targets), targets), exact)
    torch.testing.assert_close([g.double() for g in grads], list(expected), rtol=2e-6, atol=2e-6 * expected[1].abs().max().item())
    order = torch.randperm(n, generator=torch.Generator().manual_seed(3))
    assert all(torch.equal(a[order], b) for a, b in zip(fields, run(order)[0], strict=True))
    assert all(torch.equal(a[7:8], b) for a, b in zip(fields, run(slice(7, 8))[0], strict=True))
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    again = run()
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip((*fields, *grads), (*again[0], *again[1]), strict=True))


def test_rows_over_the_whole_vocabulary(backend):
    leaves, targets, ids = draw()
    ids[2], ids[6] = -1, -1  # of which the second is masked
    mask = torch.arange(N) != 6
    outside = ~(ids == targets.unsqueeze(-1)).any(-1) & mask
    wide = ids.clone()

    def call(outside, rows, **options):
        return linear_token_stats(
            *leaves[:2], targets, bias=leaves[2], keep=Kept.ids(ids), outside=outside, mask=mask, max_dense_rows=rows, **options
        )

    def expected(open_rows):
        x = torch.where(open_rows.unsqueeze(-1), linear(*leaves), masked(leaves, wide, targets))
        return token_stats(x, targets, mask=mask, with_sum_sq=True)

    agree(call("include", 1, with_sum_sq=True), expected(torch.arange(N) == 2), leaves)
    count = int(outside.sum())
    agree(call("everything", count + 3, with_sum_sq=True), expected(outside), leaves)
    with pytest.raises(ValueError, match=f"max_dense_rows=1, but {count} rows are over the whole vocabulary"):
        call("everything", 1)
    with pytest.raises(ValueError, match="max_dense_rows=0, but 1 rows"):
        call("include", 0)


def test_where_no_host_looks_bad_rows_are_nan(backend, monkeypatch):
    """As on a GPU: too many dense rows, a target and an id outside, a list that two rows share."""
    monkeypatch.setattr("rlkern.primitives.linear_kept.values_readable", lambda x: False)
    (hidden, weight, bias), targets, ids = draw(torch.float32)
    ids[1] = ids[2] = -1
    ids[3, 2] = V + 5
    targets[4] = V
    rows = torch.arange(N)
    rows[8], rows[7] = 0, -1
    packed = torch.arange(N + 1) * K
    stats = linear_token_stats(hidden, weight, targets, bias=bias, keep=Kept.csr(ids.flatten(), packed, rows=rows), max_dense_rows=1)
    bad = torch.tensor([False, False, True, True, True, False, False, True, True])
    for field in (stats.logp, stats.entropy, stats.logsumexp):
        assert torch.equal(field.isnan(), bad)
    gradient = torch.autograd.grad(stats.logp[~bad].sum(), (hidden, weight, bias))
    assert all(g.isfinite().all() for g in gradient)
    for empty in ("everything", "nothing"):  # the third row has neither its list nor none
        shared = Kept.csr(IDS[0], OFFSETS[:3], rows=torch.tensor([1, 0, 1]), empty=empty)
        stats = linear_token_stats(hidden[:3], weight, targets[:3], keep=shared, max_dense_rows=3)
        assert stats.logp.isnan().tolist() == [False, False, True]


def test_nothing_of_the_size_of_logits(backend):
    """No result is larger than the gradient of the matrix, and that of a frozen one is not made."""
    (hidden, weight, bias), targets, ids = draw(torch.float32, n=16, vocab=997, width=8)
    keep = Kept.ids(ids)
    for frozen in (False, True):
        w = weight.detach() if frozen else weight
        with Operators() as ran:
            linear_token_stats(hidden, w, targets, bias=None, keep=keep).logp.sum().backward()
        most = max(x.numel() for _, _, results in ran.calls for x in results)
        assert most <= (16 * (K + 1) * 8 if frozen else 997 * 8)
        assert not any("item" in str(name) for name, *_ in ran.calls)


def test_masked_rows_may_hold_anything_and_frozen_inputs():
    (hidden, weight, bias), targets, ids = draw()
    mask = torch.arange(N) != 3
    dirty = hidden.detach().clone()
    dirty[3] = math.nan
    ids[3], targets[3] = V + 9, -5
    stats = linear_token_stats(dirty.requires_grad_(), weight.detach(), targets, bias=bias, keep=Kept.ids(ids), mask=mask)
    leaves = (hidden, weight.detach(), bias)
    expected = token_stats(masked(leaves, ids.clamp(max=0), targets.clamp(0)), targets.clamp(0), mask=mask)
    want = token_stats(masked(leaves, torch.where(mask.unsqueeze(-1), ids, 0), targets.clamp(0)), targets.clamp(0), mask=mask)
    assert expected.logp.shape == want.logp.shape
    torch.testing.assert_close(gradients(stats, (dirty, bias)), gradients(want, (hidden, bias)), rtol=1e-12, atol=1e-12)


def test_weights_that_are_gathered():
    """As by ZeRO-3: present inside the context alone, in the forward and in the backward."""
    (hidden, weight, _), targets, ids = draw()
    inside = []

    @contextlib.contextmanager
    def gathered():
        weight.data.nan_to_num_(nan=0.5)
        inside.append(1)
        yield
        weight.data.fill_(math.nan)

    weight.data.fill_(0.5)
    want = torch.autograd.grad(linear_token_stats(hidden, weight, targets, keep=Kept.ids(ids)).logp.sum(), hidden)[0]
    weight.data.fill_(math.nan)
    stats = linear_token_stats(hidden, weight, targets, keep=Kept.ids(ids), gathered=gathered)
    assert torch.equal(torch.autograd.grad(stats.logp.sum(), hidden)[0], want) and len(inside) == 2


def test_slices_of_everything():
    leaves, targets, ids = draw(n=12)
    hidden, weight, bias = leaves
    wide_h, wide_w = torch.randn(4, 4, H + 3, dtype=torch.float64), torch.randn(V, 2 * H, dtype=torch.float64)
    with torch.no_grad():
        wide_h[:, :-1, 2 : H + 2], wide_w[:, ::2] = hidden.view(4, 3, H), weight
    stats = linear_token_stats(
        wide_h[:, :-1, 2 : H + 2], wide_w[:, ::2], targets.view(4, 3), bias=bias, keep=Kept.ids(ids.t().contiguous().t().view(4, 3, K))
    )
    want = linear_token_stats(hidden, weight, targets, bias=bias, keep=Kept.ids(ids))
    assert torch.equal(stats.logp.flatten(), want.logp)
    stats.logp[0] = 0  # as trainers do
    (gradient,) = torch.autograd.grad(stats.logp.sum() + stats.entropy.sum(), bias)
    assert gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("n", [0, 3])
def test_empty_batches_and_lists_and_a_vocabulary_of_one(backend, n):
    hidden, weight = torch.ones(n, 2, requires_grad=True), torch.ones(1, 2, requires_grad=True)
    targets = torch.zeros(n, dtype=torch.long)
    for keep in (
        Kept.ids(torch.zeros(n, 0, dtype=torch.int32), empty="nothing"),
        Kept.csr(targets[:0], torch.zeros(n + 1, dtype=torch.int32), empty="nothing"),
        Kept.csr(torch.zeros(2, dtype=torch.long), torch.zeros(n + 1, dtype=torch.int32), empty="nothing"),  # spare room
    ):
        stats = linear_token_stats(hidden, weight, targets, keep=keep)
        assert (stats.logp == 0).all() and stats.target_kept.sum() == 0
        stats.logsumexp.sum().backward()
    assert torch.equal(weight.grad, torch.full((1, 2), 3.0 * n))
    dense = linear_token_stats(hidden, weight, targets, keep=Kept.csr(targets[:0], targets[:0].new_zeros(1), rows=targets - 1), max_dense_rows=n + 1)
    assert (dense.logsumexp == 2).all() and dense.target_kept.all()


def test_compile_opcheck_and_pytree():
    (hidden, weight, bias), targets, _ = draw(torch.float32)
    g = torch.Generator().manual_seed(0)

    def loss(hidden, weight, bias, targets, keep):
        stats = linear_token_stats(hidden, weight, targets, bias=bias, keep=keep, max_dense_rows=1)
        return (stats.logp * 0.3 + stats.entropy).sum() + stats.target_kept.sum()

    def lists(size):
        edges = torch.cat([torch.zeros(1, dtype=torch.long), torch.randint(size + 1, (N - 1,), generator=g).sort().values, torch.tensor([size])])
        return torch.randint(V, (size,), generator=g), edges

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for size in (40, 41, 60):
        ids, edges = lists(size)
        while (edges[1:] == edges[:-1]).any():
            ids, edges = lists(size)
        keep = Kept.csr(ids, edges)
        got, want = (torch.autograd.grad(f(hidden, weight, bias, targets, keep), (hidden, weight, bias)) for f in (compiled, loss))
        torch.testing.assert_close(got, want)
    assert counter.frame_count <= 2
    leaves, spec = _pytree.tree_flatten(keep)
    again = _pytree.tree_unflatten([x if x is None else x.clone() for x in leaves], spec)
    assert isinstance(again, Kept) and again.empty == "everything" and torch.equal(again.entries, keep.entries)

    keep = Kept.csr(ids, edges)
    operators = torch.ops.rlkern
    arguments = (keep.entries, targets.unsqueeze(-1), keep.begin, keep.end, None, None, -100, V, "include", True, 2)
    torch.library.opcheck(operators.kept_pairs.default, arguments)
    pairs = operators.kept_pairs(*arguments)
    plain = (hidden.detach(), weight.detach(), bias.detach())
    torch.library.opcheck(operators.kept_logits.default, (*plain, *pairs[:3]))
    logits = operators.kept_logits(*plain, *pairs[:3])
    torch.library.opcheck(operators.kept_rows.default, (logits, *pairs[:5], None, 0.7, True, False))


class Head(torch.nn.Linear):
    def forward(self, hidden, targets, keep):
        stats = linear_token_stats(hidden, self.weight, targets, bias=self.bias, keep=keep)
        return stats.logp, stats.entropy, stats.target_kept


def test_export():
    (hidden, _, _), targets, ids = draw(torch.float32)
    head, arguments = Head(H, V), (hidden.detach(), targets, Kept.ids(ids.int()))
    exported = torch.export.export(head, arguments).module()
    assert all(torch.equal(a, b) for a, b in zip(exported(*arguments), head(*arguments), strict=True))


def test_meta_autocast_and_second_derivatives():
    (hidden, weight, bias), targets, ids = draw(torch.float32)
    on_meta = [x.detach().to("meta").requires_grad_() for x in (hidden, weight, bias)]
    stats = linear_token_stats(on_meta[0], on_meta[1], targets.to("meta"), bias=on_meta[2], keep=Kept.ids(ids.to("meta")))
    stats.logp.sum().backward()
    assert stats.entropy.is_meta and on_meta[1].grad.shape == (V, H)
    with torch.autocast("cpu", torch.bfloat16):
        cast = linear_token_stats(hidden, weight, targets, keep=Kept.ids(ids))
    want = linear_token_stats(hidden.bfloat16(), weight.bfloat16(), targets, keep=Kept.ids(ids))
    assert torch.equal(cast.logp, want.logp)
    (g,) = torch.autograd.grad(cast.logp.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        g.sum().backward()


def test_an_id_listed_twice_counts_twice(backend):
    stats, _ = plain_row([0.0, 1, 2], target=1, keep=Kept.ids(torch.tensor([[1, 1, 2]])))
    want = torch.tensor([1.0, 1, 2], dtype=torch.float64).log_softmax(0)[0]
    torch.testing.assert_close(stats.logp[0], want)


IDS = torch.zeros(N, 2, dtype=torch.int32)
OFFSETS = torch.arange(N + 1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Kept.ids(IDS.float()), TypeError, "ids must be an integer tensor"),
        (lambda: Kept.ids(IDS.short()), TypeError, "ids must be int32 or int64"),
        (lambda: Kept.ids(IDS[0, 0]), ValueError, r"ids must be \[..., K\]"),
        (lambda: Kept.ids(IDS, empty="all"), ValueError, "unknown empty 'all', expected one of 'everything', 'nothing'"),
        (lambda: Kept.csr(IDS, OFFSETS), ValueError, r"ids must be \[M\]"),
        (lambda: Kept.csr(IDS[:, 0], OFFSETS[:0]), ValueError, r"offsets must be \[R \+ 1\]"),
        (lambda: Kept.csr(IDS[:, 0], OFFSETS.flip(0)), ValueError, "offsets must lead from 0 to at most the 9 ids and never decrease"),
        (lambda: Kept.csr(IDS[:, 0], OFFSETS + 1), ValueError, "offsets must lead"),
        (lambda: Kept.csr(IDS[:, 0], OFFSETS, rows=OFFSETS), IndexError, "rows must name one of 9 lists or be -1, got 9"),
        (lambda: Kept.counts(IDS[:, 0], OFFSETS[:-1] - 1), ValueError, "counts must lead"),
        (lambda: Kept.samples(IDS, [OFFSETS], OFFSETS), TypeError, "ids must be a list of tensors"),
        (lambda: Kept.samples([IDS[:, 0]], [OFFSETS] * 2, OFFSETS), ValueError, "got 1 and 2"),
    ],
)  # fmt: skip
def test_errors_of_lists(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keep": IDS}, TypeError, r"keep must be made by Kept.ids, Kept.csr, Kept.counts or Kept.samples, got a tensor of torch.int32"),
        ({"keep": Kept.ids(IDS[1:])}, ValueError, r"keep: its ids must be \[\*\(9,\), K\]"),
        ({"keep": Kept.csr(IDS[:, 0], OFFSETS[:-1])}, ValueError, "keep must have a list for each of the 9 rows of hidden, got 8"),
        ({"keep": Kept.csr(IDS[:, 0], OFFSETS, rows=OFFSETS[:5])}, ValueError, r"keep: its rows must be \(9,\)"),
        ({"keep": Kept.csr(IDS[:, 0], OFFSETS, rows=OFFSETS[1:] // 3)}, ValueError, "a list serves one row, and row 1 has"),
        ({"keep": Kept.ids(IDS + V)}, IndexError, "keep holds the id 37 for row 0, out of range for 37"),
        ({"keep": Kept.ids(IDS.to("meta"))}, ValueError, "keep must be on the device of hidden cpu, got meta"),
        ({"targets": torch.full((N,), V)}, IndexError, "target 37 of row 0 is out of range"),
        ({"targets": torch.zeros(N, 2, dtype=torch.long)}, ValueError, "outside must be 'minus_inf' for several targets"),
        ({"outside": "drop"}, ValueError, "unknown outside 'drop'"),
        ({"max_dense_rows": -1}, ValueError, "max_dense_rows must be at least 0"),
        ({"min_p": 0.1}, ValueError, "keep takes no min_p"),
        ({"weight_grad_out": torch.zeros(V, H, dtype=torch.float64)}, ValueError, "keep takes no lora or weight_grad_out"),
        ({"round_logits": "no"}, TypeError, "round_logits must be True or False"),
    ],
    ids=str,
)
def test_errors(change, error, message):
    (hidden, weight, _), targets, ids = draw()
    with pytest.raises(error, match=message):
        linear_token_stats(**{"hidden": hidden, "weight": weight, "targets": targets, "keep": Kept.ids(ids), **change})


def test_offered():
    assert rlkern.Kept is Kept
