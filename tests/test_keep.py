"""token_stats over sets of kept ids: every format and backend against logits at -inf outside, in float64."""

import math

import pytest
import torch
from isas import every_isa
from kept_oracle import OUTSIDE, Case, check, draw_case, kept_as, run
from oracle import FIELDS
from torch._dynamo.testing import CompileCounter

import rlkern
from rlkern import Kept, sequence_logps, token_logprobs, token_stats

INF, NAN = math.inf, math.nan
CASES = {"reference": 120, "native": 250, "triton": 40}


@every_isa
def test_equals_logits_at_minus_infinity(backend):
    """Whatever stands outside of the sets."""
    small = dict(vocabs=(1, 31, 40), rows=(1, 4)) if backend == "triton" else {}
    for seed in range(CASES[backend]):
        case = draw_case(seed, **small)
        try:
            check(case, with_full=seed % 3 == 0, garbage=(None, NAN, INF, -INF)[seed % 4])
        except Exception as error:
            raise AssertionError(f"seed {seed}: {case.keep.kind}, {case.options}, {case.logits.dtype} {tuple(case.logits.shape)}") from error


def results(case: Case, keep: Kept, logits=None, **changes):
    stats, leaf = run(case._replace(keep=keep), case.logits if logits is None else logits, **changes)
    finite = [x.masked_fill(~x.isfinite(), 0) for x in stats if x is not None and x.dtype != torch.bool]
    sum(((x * torch.arange(1, 1 + x.numel()).view(x.shape)).sum() for x in finite), torch.zeros(())).backward()
    return [x for x in stats if x is not None] + [leaf.grad]


def some_sets(n=6, vocab=70, dtype=torch.bfloat16, least=1):
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(n, vocab, generator=g).to(dtype)
    sets = torch.zeros(n, vocab, dtype=torch.bool)
    sets.scatter_(-1, torch.rand(n, vocab, generator=g).argsort(-1), torch.arange(vocab) < torch.randint(least, 9, (n, 1), generator=g))
    targets = torch.where(torch.arange(n) % 3 == 0, torch.randint(0, vocab, (n,), generator=g), sets.int().argmax(-1))
    return Case(logits, targets, sets, sets, sets[:, 0], kept_as("ids", sets), {"with_sum_sq": True, "min_p": 0.05, "temperature": 0.8})


@pytest.mark.parametrize("with_full", [False, True])
def test_formats_agree(backend, with_full):
    """Lists bit for bit, with padding anywhere; so do bits and masks, and both kinds to rounding."""
    case = some_sets()
    groups = (("ids", "csr", "counts", "samples"), ("bits", "bytes", "mask"))
    if backend == "triton":  # the others come to the same arguments
        groups = (("ids", "csr"), ("bits", "mask"))
    of = {kind: results(case, kept_as(kind, case.sets), with_full=with_full) for kinds in groups for kind in kinds}
    for kinds in groups:
        for kind in kinds[1:]:
            assert all(torch.equal(a, b) for a, b in zip(of[kinds[0]], of[kind], strict=True)), kind
    for a, b in zip(of["ids"], of["bits"], strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=2**-7 if a.dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["ids", "bits", "mask", "at_least"])
def test_a_row_has_its_bits_in_any_batch_and_in_place(backend, kind):
    case = some_sets()
    keep = kept_as(kind, case.sets, logits=case.logits)
    whole, order = results(case, keep), torch.randperm(6, generator=torch.Generator().manual_seed(0))
    base = case.logits.clone().requires_grad_()
    stats = token_stats(base + 0, case.targets, keep=keep, inplace_backward=True, **case.options)
    torch.autograd.backward([stats.logp.sum() + stats.entropy.sum()])
    plain = case.logits.clone().requires_grad_()
    again = token_stats(plain, case.targets, keep=keep, **case.options)
    torch.autograd.backward([again.logp.sum() + again.entropy.sum()])
    assert torch.equal(base.grad, plain.grad)
    moved = case._replace(logits=case.logits[order], targets=case.targets[order])
    entries = keep.entries[order]
    moved_keep = Kept(entries, kind=keep.kind, empty=keep.empty)
    stats, _ = run(moved._replace(keep=moved_keep), moved.logits)
    for name in FIELDS[:5]:
        assert torch.equal(getattr(stats, name), getattr(run(case._replace(keep=keep), case.logits)[0], name)[order]), name
    alone, _ = run(moved._replace(targets=moved.targets[:1], keep=Kept(entries[:1], kind=keep.kind, empty=keep.empty)), moved.logits[:1])
    assert torch.equal(alone.logp, whole[0][order][:1])


def test_in_place_refuses_a_second_consumer(backend):
    base = torch.randn(3, 5, requires_grad=True)
    logits = base * 1
    saved = (logits * logits).sum()
    stats = token_stats(logits, torch.tensor([0, 1, 2]), keep=Kept.ids(torch.tensor([[0, 1], [1, 2], [2, 3]])), inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (stats.logp.sum() + saved).backward()


@pytest.mark.parametrize("kind", ["ids", "bits", "mask"])
def test_a_target_outside(backend, kind):
    """p of 1 and 2 among (0, 1, 2, 3), the target 3."""
    z, sets = torch.tensor([[0.0, 1, 2, 3]]), torch.tensor([[False, True, True, False]])
    for outside, logp in (("include", -0.40760596), ("everything", -0.44018970), ("minus_inf", -INF)):
        leaf = z.clone().requires_grad_()
        stats = token_stats(leaf, torch.tensor([3]), keep=kept_as(kind, sets), outside=outside)
        stats.logp.sum().backward()
        assert stats.logp.item() == pytest.approx(logp, abs=1e-6) and not stats.target_kept.item(), outside
        assert (leaf.grad == 0).all() == (outside == "minus_inf")
    leaf = z.clone().requires_grad_()
    stats = token_stats(leaf, torch.tensor([2]), keep=kept_as(kind, torch.tensor([[False, False, True, False]])), with_sum_sq=True)
    (stats.logp + stats.entropy + stats.sum_sq_prob + 3 * stats.logsumexp).sum().backward()
    assert (stats.logp.item(), stats.entropy.item(), stats.sum_sq_prob.item(), stats.logsumexp.item()) == (0, 0, 1, 2)
    assert leaf.grad.tolist() == [[0, 0, 3, 0]]


def test_every_kept_id_and_targets_beyond_eight(backend):
    """Score centering asks for the logp of each id of a padded list."""
    case = some_sets(dtype=torch.float32)
    ids = kept_as("ids", case.sets, width=12).entries.long()
    leaf = case.logits.clone().requires_grad_()
    stats = token_stats(leaf, ids, keep=Kept.ids(ids), outside="minus_inf", ignore_index=-1, with_full=True)
    q = case.logits.double().masked_fill(~case.sets, -INF).requires_grad_()
    want = q.log_softmax(-1).gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, 0)
    torch.testing.assert_close(stats.logp.double(), want, rtol=1e-6, atol=1e-6)
    weight = torch.linspace(-1, 2, want.numel(), dtype=torch.float64).view(want.shape)
    ((stats.logp * weight).sum() + stats.full_entropy.sum()).backward()
    plain = case.logits.double().requires_grad_()
    ((want * weight).sum() + rlkern.reference.token_stats(plain, None).entropy.sum()).backward()
    torch.testing.assert_close(leaf.grad.double(), q.grad + plain.grad, rtol=1e-5, atol=1e-6)
    assert stats.target_kept.all()


def test_lists_without_entries(backend):
    z, y = torch.randn(4, 9), torch.tensor([0, 1, 2, 3])
    plain = token_stats(z, y)
    nothing = torch.empty(0, dtype=torch.int32)
    for keep in (
        Kept.ids(torch.full((4, 3), -1)),
        Kept.ids(torch.empty(4, 0, dtype=torch.int64)),
        Kept.counts(nothing, torch.zeros(4, dtype=torch.int32)),
        Kept.csr(nothing, torch.zeros(1, dtype=torch.int64), rows=torch.full((4,), -1)),
        Kept.csr(torch.tensor([5, 6]), torch.tensor([0, 2]), rows=torch.full((4,), -1, dtype=torch.int32)),
        Kept.at_least(torch.full((4,), NAN)),
    ):
        stats = token_stats(z, y, keep=keep)
        assert torch.equal(stats.logp, plain.logp) and torch.equal(stats.entropy, plain.entropy) and stats.target_kept.all()
    for keep in (
        Kept.ids(torch.full((4, 3), -1), empty="nothing"),
        Kept.mask(torch.zeros(4, 9, dtype=torch.bool)),
        Kept.at_least(torch.full((4,), INF)),
    ):
        leaf = z.clone().requires_grad_()
        stats = token_stats(leaf, y, keep=keep)
        (stats.logp.sum() + stats.entropy.sum()).backward()
        assert (stats.logp == 0).all() and (stats.entropy == 0).all() and (leaf.grad == 0).all() and not stats.target_kept.any()
        stats = token_stats(z, y, keep=keep, outside="minus_inf")
        assert stats.logp.isnan().all() and (stats.logsumexp == -INF).all()
    assert token_stats(z[:0], y[:0], keep=Kept.ids(torch.empty(0, 2, dtype=torch.int64))).logp.shape == (0,)


def test_undefined_rows_are_nan_inside_and_zero_outside(backend):
    sets = torch.tensor([[True, True, False, False]] * 3)
    for kind in ("ids", "bits", "mask"):
        leaf = torch.tensor([[1.0, NAN, 2, 3], [1, 2, NAN, INF], [INF, 2, 3, 4]]).requires_grad_()
        stats = token_stats(leaf, torch.tensor([0, 0, 1]), keep=kept_as(kind, sets))
        stats.logp.sum().backward()
        assert stats.logp.isnan().tolist() == [True, False, True], kind
        assert leaf.grad[0, :2].isnan().all() and (leaf.grad[:, 2:] == 0).all() and leaf.grad[1].isfinite().all()


def test_gradcheck_and_row_sums():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, generator=g, dtype=torch.float64).requires_grad_()
    keep, targets = Kept.ids(torch.tensor([[0, 1, -1], [2, -1, 4], [-1, -1, -1]])), torch.tensor([1, 3, 5])
    with rlkern.use_backend("reference"):
        for outside in OUTSIDE:

            def stats(x, outside=outside):
                s = token_stats(x, targets, keep=keep, outside=outside, with_full=True, with_sum_sq=True, temperature=0.7)
                logp = s.logp.masked_fill(~s.target_kept, 0) if outside == "minus_inf" else s.logp
                return logp, s.entropy, s.logsumexp, s.sum_sq_prob, s.full_entropy, s.full_logsumexp

            torch.autograd.gradcheck(stats, (logits,))
            results = stats(logits)
            grads = [torch.randn(3, generator=g, dtype=torch.float64) for _ in results]
            (d,) = torch.autograd.grad(results, logits, grads)
            torch.testing.assert_close(d.sum(-1), (grads[2] + grads[5]) / 0.7, rtol=1e-12, atol=1e-12)


def test_sequences_and_logprobs(backend):
    """Sets beside the labels move with them."""
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 5, 11, generator=g), torch.randint(0, 11, (2, 5), generator=g)
    labels[:, :2] = -100
    sets = torch.rand(2, 5, 11, generator=g) < 0.4
    sets[0, 3] = False
    sets.scatter_(-1, labels.clamp(min=0).unsqueeze(-1), True)
    want = torch.stack(
        [logits[:, t - 1].masked_fill(~sets[:, t], -INF).log_softmax(-1).gather(-1, labels[:, t : t + 1])[:, 0] for t in (2, 3, 4)]
    ).sum(0)
    flat = kept_as("csr", sets.view(10, 11), width=11)
    beside = [
        Kept.mask(sets),
        Kept.bits(kept_as("bits", sets).entries),
        Kept(flat.entries, flat.begin, flat.end, torch.arange(10).view(2, 5), "everything"),
    ]
    beside.append(Kept.ids(kept_as("ids", sets.view(10, 11), width=11).entries.view(2, 5, 11)))
    for keep in beside:
        torch.testing.assert_close(sequence_logps(logits, labels, keep=keep.next_tokens()), want)
    aligned = torch.cat([sets[:, 1:], sets[:, :1]], 1)
    assert torch.equal(
        token_logprobs(logits, labels.clamp(min=0), keep=aligned), token_stats(logits, labels.clamp(min=0), keep=Kept.mask(aligned)).logp
    )
    moved = flat.to("meta")
    assert moved.entries.is_meta and moved.end.is_meta and moved.rows is None and moved.kind == "ids"
    threshold = Kept.at_least(torch.arange(6.0).view(2, 3)).next_tokens().entries
    assert threshold.tolist() == [[1, 2, -INF], [4, 5, -INF]]
    with pytest.raises(ValueError, match="give rows="):
        flat.next_tokens()


def test_min_p_and_the_alarm_are_told_apart():
    """target_kept is of keep=, the proxy of min_p."""
    z = torch.tensor([[0.0, 5, 1, 4]])
    stats = token_stats(z, torch.tensor([3]), keep=Kept.ids(torch.tensor([[0, 1]])), min_p=0.2)
    assert not stats.target_kept.item() and stats.proxy_logp.item() == pytest.approx(math.log(1 / (1 + math.e)), abs=1e-6)
    stats = token_stats(z, torch.tensor([0]), keep=Kept.ids(torch.tensor([[0, 1]])), min_p=0.2)
    assert stats.target_kept.item() and stats.proxy_logp.item() == -INF
    plain = token_stats(z, torch.tensor([0]), with_full=True, with_entropy=False)
    assert plain.entropy is None and plain.target_kept is None
    assert torch.equal(plain.full_logsumexp, plain.logsumexp) and torch.equal(plain.full_entropy, token_stats(z, torch.tensor([0])).entropy)


def test_lists_allocate_nothing_of_the_size_of_the_logits():
    """A few bytes a kept id beside the results: not even the reference copies rows for a kernel."""
    n, vocab, k = 64, 50_000, 8
    logits, ids = torch.randn(n, vocab), torch.randint(0, vocab, (n, k))
    targets, keep = ids[:, 0].contiguous(), Kept.ids(ids)
    with rlkern.use_backend("native"), torch.profiler.profile(profile_memory=True) as profile:
        token_stats(logits, targets, keep=keep)
    allocated = [e.self_cpu_memory_usage for e in profile.events() if e.self_cpu_memory_usage > 0]
    assert allocated and sum(allocated) < 64 * n * k


def test_compile_export_opcheck():
    """Lists of any length are one graph."""
    g = torch.Generator().manual_seed(0)
    vocab, n = 33, 6
    logits, targets = torch.randn(n, vocab, generator=g).requires_grad_(), torch.randint(0, vocab, (n,), generator=g)

    def loss(logits, targets, ids, edges):
        s = token_stats(logits, targets, keep=Kept.csr(ids, edges), with_full=True)
        return (s.logp + s.entropy + s.full_entropy).sum(), s.target_kept

    counter = CompileCounter()
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for size in (10, 20, 30, 31):
        ids, edges = torch.randperm(vocab, generator=g)[:size].int(), torch.linspace(0, size, n + 1).long()
        (a, kept), (b, _) = compiled(logits, targets, ids, edges), loss(logits, targets, ids, edges)
        assert torch.equal(torch.autograd.grad(a, logits)[0], torch.autograd.grad(b, logits)[0]) and kept.dtype == torch.bool
    assert counter.frame_count <= 2
    arguments = (logits.detach(), targets, None, None, ids, edges[:-1], edges[1:], None, 1.0, -100, 0, 0.0, True, True, 0.0, 0, 0, 0, 2, True, True)
    torch.library.opcheck(torch.ops.rlkern.kept_token_stats.default, arguments)

    class Module(torch.nn.Module):
        def forward(self, logits, targets, keep):
            return token_logprobs(logits, targets, keep=keep)

    given = (logits.detach(), targets, Kept.bits(torch.randint(1, 1 << 30, (n, 2), generator=g, dtype=torch.int32)))
    assert torch.equal(torch.export.export(Module(), given).module()(*given), Module()(*given))


LOGITS, TARGETS, IDS = torch.zeros(3, 40), torch.zeros(3, dtype=torch.long), torch.zeros(3, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        (IDS, TypeError, r"a tensor of torch.int32 may be ids or bits, say which by Kept.ids\(keep\) or Kept.bits\(keep\)"),
        (IDS.float(), TypeError, "keep must be made by a constructor of Kept, or be a bool tensor, got a tensor of torch.float32"),
        ([[1, 2]], TypeError, "got list"),
        (torch.ones(3, 41, dtype=torch.bool), ValueError, r"Kept.mask must be \(3, 40\) for logits \(3, 40\), got \(3, 41\)"),
        (Kept.bits(torch.zeros(3, 1, dtype=torch.int32)), ValueError, r"Kept.bits must be \(3, 2\)"),
        (Kept.bits(torch.zeros(3, 8, dtype=torch.uint8)), ValueError, r"Kept.bits must be \(3, 5\)"),
        (Kept.at_least(torch.zeros(2)), ValueError, r"Kept.at_least must be \(3,\)"),
        (Kept.ids(IDS[1:]), ValueError, r"keep: its ids must be \[\*\(3,\), K\]"),
        (Kept.csr(IDS[0], torch.tensor([0, 1, 2])), ValueError, "keep must have a list for each of the 3 rows of logits, got 2"),
        (Kept.ids(IDS + 40), IndexError, "keep holds the id 40 for row 0, out of range for 40 logits"),
        (Kept.ids(IDS.to("meta")), ValueError, "keep must be on the device of logits cpu, got meta"),
    ],
    ids=lambda x: "" if not isinstance(x, str) else x[:40],
)  # fmt: skip
def test_errors(backend, keep, error, message):
    with pytest.raises(error, match=message):
        token_stats(LOGITS, TARGETS, keep=keep)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Kept.bits(IDS.long()), TypeError, r"words must be int32 \[..., ceil\(V / 32\)\] or uint8"),
        (lambda: Kept.mask(IDS), TypeError, "mask must be a bool tensor"),
        (lambda: Kept.at_least(IDS), TypeError, "threshold must be a float tensor"),
        (lambda: Kept.at_least(torch.zeros(3).requires_grad_()), ValueError, "threshold must not require grad"),
        (lambda: token_stats(LOGITS, TARGETS, keep=LOGITS == 0, outside="drop"), ValueError, "unknown outside 'drop'"),
        (lambda: token_stats(LOGITS, TARGETS, keep=LOGITS == 0, with_tail=True), ValueError, "keep takes no with_tail"),
        (lambda: token_stats(LOGITS, IDS, keep=LOGITS == 0), ValueError, "outside must be 'minus_inf' for several targets a row"),
        (lambda: token_stats(LOGITS, TARGETS + 40, keep=LOGITS == 0), IndexError, "target 40 of row 0 is out of range"),
        (lambda: rlkern.linear_token_stats(LOGITS, torch.zeros(40, 40), TARGETS, keep=Kept.mask(LOGITS == 0)), TypeError, "got Kept.mask"),
        (lambda: token_stats(LOGITS, TARGETS, keep=Kept.counts(IDS[0], TARGETS.view(1, -1))), ValueError, "its rows must be"),
        (lambda: Kept.at_least(torch.tensor(0.5)).next_tokens(), ValueError, "a single row have no dimension to move along"),
        (lambda: Kept.ids(IDS).to(torch.float32), TypeError, "device"),
    ],
    ids=range(12),
)
def test_errors_of_sets_and_options(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_debug_finds_ids_listed_twice(backend, monkeypatch):
    monkeypatch.setattr("rlkern.primitives.kept_stats.DEBUG", True)
    ids = torch.tensor([[7, 7, -1], [-1, 3, -1], [4, 5, 4]])
    targets = torch.tensor([-100, 1, 2])  # of the first row nothing counts
    with pytest.raises(ValueError, match="keep holds the id 4 twice for row 2"):
        token_stats(LOGITS, targets, keep=Kept.ids(ids))
    assert token_stats(LOGITS[:2], targets[:2], keep=Kept.ids(ids[:2])).logp.isfinite().all()


def test_skipped_rows_may_have_any_list(backend):
    keep = Kept.csr(torch.tensor([1, 10**6]), torch.tensor([0, 1, 2]), rows=torch.tensor([0, 1, -1]))
    stats = token_stats(LOGITS, torch.tensor([1, -100, 2]), keep=keep)
    torch.testing.assert_close(stats.logp, torch.tensor([0.0, 0.0, -math.log(40)]))


def test_with_full_is_one_graph():
    x, y = torch.randn(3, 7), torch.tensor([0, 6, 2])
    compiled = torch.compile(lambda x: token_stats(x, y, with_full=True), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), token_stats(x, y, with_full=True))
