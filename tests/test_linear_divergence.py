"""linear_token_divergence and linear_pair_stats against float64 formulas; kept logits and chunks; errors."""

import math

import pytest
import torch
from test_linear_plans import Allocated, Products
from torch.nn.functional import linear

from rlkern import linear_pair_stats, linear_token_divergence, pair_stats, reference, token_divergence

V, H, H2 = 37, 5, 3
KEEP_SOME, KEEP_NONE = 4 * 2 * V * 8, 1  # bytes of float64 logits of both; without workspace all rows' are kept
NAMES = ("hidden", "weight", "bias", "other_hidden", "other_weight", "other_bias")


def draw(*lead, dtype=torch.float64, other_dtype=None, bias=True, other_vocab=V, seed=0):
    """hidden, weight, bias, and the other's, whose hidden states are of another width."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    own = normal(*lead, H), normal(V, H), normal(V) if bias else None
    shapes = (*lead, H2), (other_vocab, H2), (other_vocab,)
    return *own, *(normal(*shape, dtype=other_dtype or dtype) if bias or len(shape) > 1 else None for shape in shapes)


def ours(hidden, weight, bias, other_hidden, other_weight, other_bias, function=linear_token_divergence, **options):
    return function(hidden, weight, other_hidden, other_weight, bias=bias, other_bias=other_bias, **options)


def naive(leaves, kind, beta, t, other_t, vocab=V):
    """As in the table of `token_divergence`, from log-softmaxes of the products."""
    l, m = ((linear(*x)[..., :vocab] / s).log_softmax(-1) for x, s in ((leaves[:3], t), (leaves[3:], other_t)))  # noqa: E741
    p, q = l.exp(), m.exp()
    mix = (beta * q + (1 - beta) * p).log()
    forward, reverse = (q * (m - l)).sum(-1), (p * (l - m)).sum(-1)
    return {
        "reverse_kl": reverse,
        "forward_kl": forward,
        "mixed_kl": beta * forward + (1 - beta) * reverse,
        "cross_entropy": -(q * l).sum(-1),
        "jsd": (beta * q * (m - mix) + (1 - beta) * p * (l - mix)).sum(-1),
        "skew_forward_kl": (q * (m - mix)).sum(-1),
        "skew_reverse_kl": (p * (l - (beta * p + (1 - beta) * q).log())).sum(-1),
        "total_variation": (p - q).abs().sum(-1) / 2,
        "alpha": (1 - (q**beta * p ** (1 - beta)).sum(-1)) / (beta * (1 - beta)),
    }[kind]


def slopes(value, leaves, **options):
    """Gradients of a weighted sum, 0 where there is none."""
    weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(value.dtype)
    leaves = [x for x in leaves if x is not None]
    return torch.autograd.grad((value * weights).sum(), leaves, allow_unused=True, materialize_grads=True, **options)


KINDS = ("reverse_kl", "forward_kl", "mixed_kl", "cross_entropy", "jsd", "skew_forward_kl", "skew_reverse_kl", "alpha", "total_variation")


PLANS = ({"chunk_rows": 4}, {"workspace": KEEP_NONE}, {"workspace": KEEP_SOME}, {})


# The last two kinds are plain PyTorch, slow: one plan will do.
@pytest.mark.parametrize(("kind", "plan"), [(kind, plan) for kind in KINDS for plan in (PLANS if kind in KINDS[:-2] else PLANS[2:3])], ids=str)
@pytest.mark.parametrize(("bias", "temperatures"), [(True, (0.7, 1.9)), (False, (1.3, 1.3))])
def test_equals_the_formula(kind, bias, plan, temperatures, monkeypatch):
    monkeypatch.setattr("rlkern.primitives.linear_divergence.default_chunk_rows", lambda *_: 3)
    leaves, t = draw(2, 5, bias=bias), {"temperature": temperatures[0], "other_temperature": temperatures[1]}
    expected = naive(leaves, kind, 0.3, *temperatures)
    for other_grad in (False, True)[: 1 if kind == "cross_entropy" else 2]:
        value = ours(*leaves, kind=kind, beta=0.3, other_grad=other_grad, **t, **plan)
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-12)
        compared = leaves if other_grad else leaves[:3]
        want = slopes(expected, compared, retain_graph=True)
        for retain_graph in (True, False):  # the second time the kept logits are gone
            torch.testing.assert_close(slopes(value, compared, retain_graph=retain_graph), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("other_grad", [True, False])
def test_gradcheck(other_grad):
    leaves = draw(3)
    if not other_grad:
        leaves = *leaves[:3], *(x.detach() for x in leaves[3:])
    kind = "jsd" if other_grad else "mixed_kl"
    assert torch.autograd.gradcheck(lambda *x: ours(*x, kind=kind, other_grad=other_grad, chunk_rows=2), leaves)


def test_the_other_is_used_detached_unless_it_takes_a_gradient():
    leaves = draw(4)
    assert all((g == 0).all() for g in slopes(ours(*leaves), leaves)[3:])
    for frozen in range(6):  # any of the six may be without
        some = [x.detach() if i == frozen else x for i, x in enumerate(leaves)]
        live = [x for x in some if x.requires_grad]
        value, expected = ours(*some, other_grad=True, chunk_rows=3), naive(some, "reverse_kl", 0.5, 1, 1)
        torch.testing.assert_close(slopes(value, live), slopes(expected, live), rtol=1e-10, atol=1e-12)
    only_other = [x.detach() for x in leaves[:3]] + list(leaves[3:])
    value, expected = ours(*only_other, other_grad=True), naive(only_other, "reverse_kl", 0.5, 1, 1)
    torch.testing.assert_close(slopes(value, only_other[3:]), slopes(expected, only_other[3:]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("other_vocab", [V + 4, V, V - 4])
@pytest.mark.parametrize("plan", [{"chunk_rows": 4}, {}], ids=str)
def test_matrices_of_different_widths(other_vocab, plan):
    leaves = draw(2, 3, other_vocab=other_vocab)
    value, expected = ours(*leaves, vocab=30, kind="jsd", other_grad=True, **plan), naive(leaves, "jsd", 0.5, 1, 1, 30)
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-12)
    got = slopes(value, leaves)
    torch.testing.assert_close(got, slopes(expected, leaves), rtol=1e-10, atol=1e-12)
    assert not got[1][30:].any() and not got[5][30:].any()
    with torch.no_grad():
        for x in (leaves[1], leaves[4]):
            x[30:] = math.nan  # rows that are not read
    assert torch.equal(ours(*leaves, vocab=30, kind="jsd", **plan), value)


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("with_targets", [True, False])
@pytest.mark.parametrize("plan", [{"chunk_rows": 2}, {"workspace": KEEP_SOME // 2}, {}], ids=str)
def test_masked_rows_may_hold_nan_and_get_zero(gather, with_targets, plan, monkeypatch):
    if not gather:  # as on a GPU
        monkeypatch.setattr("rlkern.primitives.projection._indices", lambda *_: None)
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    leaves = draw(2, 3)
    dirty = [x.detach().clone() for x in leaves]
    for i in (0, 3):
        dirty[i][mask == 0] = math.nan
    dirty = [x.requires_grad_() for x in dirty]
    temperature = torch.where(mask == 0, math.nan, torch.linspace(0.5, 2, 6, dtype=torch.float64).view(2, 3))
    by_row = {"mask": mask, "temperature": temperature, "other_temperature": 0.8}
    if with_targets:
        targets = torch.tensor([[1, 2, 99], [36, 99, 0]])
        by_row |= {"function": linear_pair_stats, "targets": targets}
        value = (stats := ours(*dirty, **by_row, other_grad=True, **plan)).divergence
        logp = linear(*leaves[:3]).div(temperature.unsqueeze(-1)).log_softmax(-1)
        picked = logp.gather(-1, targets.where(mask != 0, 0).unsqueeze(-1)).squeeze(-1)
        assert torch.equal(stats.logp == 0, mask == 0)
        torch.testing.assert_close(stats.logp[mask != 0], picked[mask != 0], rtol=1e-11, atol=1e-12)
    else:
        value = ours(*dirty, **by_row, other_grad=True, **plan)
    rows = [x[mask != 0] if i in (0, 3) else x for i, x in enumerate(leaves)]
    t = temperature[mask != 0].unsqueeze(-1)
    expected = naive(rows, "reverse_kl", 0.5, t, 0.8)
    torch.testing.assert_close(value[mask != 0], expected, rtol=1e-11, atol=1e-12)
    assert not value[mask == 0].any()
    got, want = torch.autograd.grad(value.cos()[mask != 0].sum(), dirty), torch.autograd.grad(expected.cos().sum(), leaves)
    torch.testing.assert_close([torch.where(g.isnan(), 1e9, g) for g in got], list(want), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("plan", [{"chunk_rows": 4}, {"workspace": KEEP_SOME}, {}], ids=str)
def test_all_numbers_of_a_pair_from_one_pass(plan):
    leaves, targets = draw(2, 3), torch.tensor([[0, 36, -100], [5, 5, 7]])
    options = {"kind": "mixed_kl", "beta": 0.3, "temperature": 0.7, "other_temperature": 1.3, "other_grad": True}
    stats = ours(*leaves, function=linear_pair_stats, targets=targets, **plan, **options)
    expected = pair_stats(linear(*leaves[:3]), linear(*leaves[3:]), targets, **options)
    for name in stats._fields:
        torch.testing.assert_close(getattr(stats, name), getattr(expected, name), rtol=1e-11, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    for fields in (("divergence", "logp", "entropy", "logsumexp"), ("logp",), ("entropy", "logsumexp"), ("divergence",)):
        got, want = (slopes(sum(getattr(s, name).cos() for name in fields), leaves, retain_graph=True) for s in (stats, expected))
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert not stats.other_entropy.requires_grad and not stats.other_logp.requires_grad
    assert ours(*leaves, function=linear_pair_stats).logp is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("other_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("kind", "plan"), [("reverse_kl", {"chunk_rows": 9}), ("jsd", {"workspace": 301 * 8 * 20})], ids=str)
def test_logits_are_not_rounded_to_16_bits(dtype, other_dtype, kind, plan):
    """Of two policies that are close: rounded logits would be off by more than the divergence."""
    g = torch.Generator().manual_seed(0)
    h = torch.randn(64, 32, generator=g)
    w = torch.randn(301, 32, generator=g)
    noise = 3e-2 * torch.randn(h.shape, generator=g)
    leaves = [h.to(dtype), w.to(dtype), None, (h + noise).to(other_dtype), w.to(other_dtype), None]
    leaves = [None if x is None else x.clone().requires_grad_() for x in leaves]
    exact = [None if x is None else x.detach().double().requires_grad_() for x in leaves]
    value, expected = ours(*leaves, kind=kind, **plan, other_grad=True), naive(exact, kind, 0.5, 1, 1, 301)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-7)  # of about 0.01
    rounded = token_divergence(linear(*leaves[:3]), linear(*leaves[3:]), kind=kind)
    if torch.bfloat16 in (dtype, other_dtype):
        assert (rounded - expected).abs().max() > 30 * (value - expected).abs().max()
    for got, want in zip(slopes(value, leaves), slopes(expected, exact), strict=True):
        rtol = 2e-5 if got.dtype == torch.float32 else 2**-8
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=rtol * want.abs().max().item())


def test_a_frozen_head_and_a_float64_teacher():
    hidden, weight, _, *other = draw(6, dtype=torch.float32, other_dtype=torch.float64, bias=False)
    value = ours(hidden, weight.detach(), None, *other, other_grad=True)
    expected = naive([hidden.double(), weight.detach().double(), None, *other], "reverse_kl", 0.5, 1, 1)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    got, want = (slopes(x, [hidden, *other]) for x in (value, expected))
    assert [x.dtype for x in got] == [torch.float32, torch.float64, torch.float64]
    torch.testing.assert_close([x.double() for x in got], [x.double() for x in want], rtol=1e-4, atol=1e-5)


def test_infinite_bias_hides_a_token():
    """As a masked vocabulary: on both sides nothing, on one side an infinite KL or a finite mixture."""
    leaves = draw(4)
    with torch.no_grad():
        leaves[2][3], leaves[5][3] = -math.inf, -math.inf
        leaves[5][7] = -math.inf
    assert (ours(*leaves, kind="reverse_kl") == math.inf).all()
    value = ours(*leaves, kind="jsd", other_grad=True)
    kept = [i for i in range(V) if i != 3]
    l, m = (linear(*x)[..., kept].log_softmax(-1) for x in (leaves[:3], leaves[3:]))  # noqa: E741
    mix = torch.logaddexp(l, m) - math.log(2)
    expected = ((torch.where(m == -math.inf, 0, m.exp() * (m - mix)) + l.exp() * (l - mix)) / 2).sum(-1)
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-12)
    assert all(g.isfinite().all() for g in slopes(value, leaves))


def test_autocast_and_one_head_for_both():
    """The policy before an update as its own teacher, with tied weights."""
    embedding = torch.nn.Embedding(V, H)
    ids = torch.arange(8).view(2, 4)

    def gradient(function, enabled):
        embedding.weight.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled):
            hidden = embedding(ids)
            function(hidden, embedding.weight, hidden.detach().flip(0), embedding.weight.detach()).sum().backward()
        return embedding.weight.grad.clone()

    def rounded(*inputs):
        h, w, h2, w2 = (x.bfloat16().float() for x in inputs)
        return token_divergence(linear(h, w), linear(h2, w2))

    got = gradient(lambda *inputs: linear_token_divergence(*inputs, chunk_rows=3), True)
    torch.testing.assert_close(got, gradient(rounded, False), rtol=2**-7, atol=2**-7)


def test_slices_empty_batches_and_writing_into_results():
    leaves = draw(2, 4)
    sliced = leaves[0][:, :-1], *leaves[1:3], leaves[3][:, 1:], *leaves[4:]
    value = ours(*sliced)
    torch.testing.assert_close(value, naive(sliced, "reverse_kl", 0.5, 1, 1), rtol=1e-11, atol=1e-12)
    value[0] = 0  # as trainers do
    value.sum().backward()
    assert (leaves[0].grad[0] == 0).all() and leaves[0].grad[1, :-1].any()
    empty = ours(leaves[0][:0], *leaves[1:3], leaves[3][:0], *leaves[4:], other_grad=True)
    assert empty.shape == (0, 4)
    empty.sum().backward()
    assert not leaves[4].grad.any()
    masked = ours(*leaves, mask=torch.zeros(2, 4))
    assert masked.sum() == 0 and not torch.autograd.grad(masked.sum(), leaves[1])[0].any()


@pytest.mark.parametrize(
    ("plan", "kept", "other_grad"),
    [({"chunk_rows": 8}, 0, True), ({"workspace": 32 * 2 * V * 8}, 32, True), ({}, 64, True), ({}, 64, False)],
    ids=str,
)
def test_memory_is_what_is_kept_and_a_chunk(plan, kept, other_grad, monkeypatch):
    """Saved for the backward are both logits of the kept rows; it makes no more than a chunk of others."""
    monkeypatch.setattr("rlkern.primitives.linear_divergence.default_chunk_rows", lambda *_: 8)
    leaves, saved = draw(64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        ours(*(x.detach() for x in leaves), **plan)
        with torch.no_grad():
            ours(*leaves, other_grad=other_grad, **plan)
        assert not saved
        value = ours(*leaves, other_grad=other_grad, **plan)
    assert max(saved) == max(2 * kept * V, 64 * 11)  # the state of a row is 11 numbers
    monkeypatch.setattr("rlkern.operator.watched", lambda x: False)  # the mode sees what runs inside the operators
    with Allocated() as new:
        value.sum().backward()
    assert max(elements for elements, _ in new.tensors) <= 64 * 11


@pytest.mark.parametrize("plan", [{"chunk_rows": 2}, {"workspace": KEEP_NONE}, {"workspace": KEEP_SOME}, {}], ids=str)
@pytest.mark.parametrize(("frozen", "other_grad", "products"), [((), False, 4), ((1,), False, 3), ((), True, 6), ((0, 1), True, 4)], ids=str)
def test_products(frozen, other_grad, products, plan, monkeypatch):
    """Two forward; one for each gradient; two again of what was not kept."""
    monkeypatch.setattr("rlkern.operator.watched", lambda x: False)
    inputs = [*draw(6, bias=False)[:2], *draw(6, bias=False)[:2]]
    inputs = [x.detach() if i in frozen else x for i, x in enumerate(inputs)]
    kept = 6 if not plan else 4 if plan.get("workspace") == KEEP_SOME else 0
    with Products(2 * 6 * H * V) as counted:
        linear_token_divergence(*inputs, other_grad=other_grad, kind="jsd", **plan).sum().backward()
    assert counted.products == pytest.approx(products + 2 * (6 - kept) / 6)


def test_opcheck():
    leaves = draw(9, dtype=torch.float32)
    args = (*(x.detach() for x in leaves), torch.arange(9), None, None, None, 5, 4, 0.7, 0.9, -100, 4, 0.3, V, True, True, 3.0, 0.0)
    torch.library.opcheck(torch.ops.rlkern.linear_pair_stats.default, args)
    with torch.no_grad():
        *_, state, logits = torch.ops.rlkern.linear_pair_stats(*args)
    args = (*args, state, logits, torch.ones(9), None, torch.ones(9), None, 6 * [True])
    torch.library.opcheck(torch.ops.rlkern.linear_pair_stats_backward_.default, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("workspace", [4 * 2 * V * 4, None])
def test_compile(workspace):
    leaves = draw(9, dtype=torch.float32)

    def loss(*inputs):
        stats = ours(*inputs, function=linear_pair_stats, kind="jsd", workspace=workspace, other_grad=True)
        return (stats.divergence * stats.entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (9, 5):
        inputs = [x[:rows] if i in (0, 3) else x for i, x in enumerate(leaves)]
        got, want = (torch.autograd.grad(f(*inputs), leaves) for f in (compiled, loss))
        torch.testing.assert_close(got, want)


def test_kept_logits_under_checkpoint_and_vectorized_jacobian():
    leaves = draw(5)

    def f(*leaves):
        return ours(*leaves, kind="jsd", other_grad=True)

    (want,) = torch.autograd.grad(f(*leaves).sum(), leaves[4])
    recomputed = torch.utils.checkpoint.checkpoint(f, *leaves, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(recomputed.sum(), leaves[4])[0], want)
    rows = torch.autograd.functional.jacobian(lambda w: f(*leaves[:4], w, leaves[5]), leaves[4].detach(), vectorize=True)
    torch.testing.assert_close(rows.sum(0), want)


def test_meta_tensors():
    leaves = [t.detach().to("meta").requires_grad_() for t in draw(9)]
    value = ours(*leaves)
    value.sum().backward()
    assert value.is_meta and value.shape == (9,) and leaves[0].grad.shape == leaves[0].shape


def test_second_derivative_raises():
    leaves = draw(3)
    (g,) = torch.autograd.grad(ours(*leaves).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"use rlkern\.reference\.token_divergence of torch\.nn\.functional\.linear"):
        g.sum().backward()
    value = reference.token_divergence(linear(*leaves[:3]), linear(*leaves[3:]))
    torch.testing.assert_close(ours(*leaves), value, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(V, H + 1, dtype=torch.float64)}, ValueError, r"^weight must be \[V, 5\]"),
        ({"other_weight": torch.zeros(V, H, dtype=torch.float64)}, ValueError, r"other_weight must be \[V, 3\]"),
        ({"other_weight": torch.zeros(V, H2)}, TypeError, "other_weight must have the dtype of other_hidden torch.float64"),
        ({"other_hidden": None}, TypeError, "other_hidden must be a tensor"),
        ({"other_hidden": torch.zeros(2, H2, dtype=torch.float64)}, ValueError, r"other_hidden must be \(3, 3\) for hidden \(3, 5\), got \(2, 3\)"),
        ({"bias": torch.zeros(V - 1, dtype=torch.float64)}, ValueError, r"^bias must be"),
        ({"other_bias": torch.zeros(V - 1, dtype=torch.float64)}, ValueError, "other_bias must be"),
        (
            {"other_weight": torch.zeros(V + 3, H2, dtype=torch.float64), "other_bias": None},
            ValueError,
            "weight with 37 rows and other_weight with 40: give vocab=, how many of them mean the same token, here at most 37",
        ),
        ({"vocab": 38}, ValueError, r"vocab must be at most the rows of weight \(37\) and of other_weight \(37\), got 38"),
        ({"vocab": 0}, ValueError, "vocab must be at least 1"),
        ({"kind": "kl"}, ValueError, "unknown kind 'kl', expected one of 'reverse_kl'"),
        ({"kind": "jsd", "beta": 1.0}, ValueError, "0 < beta < 1"),
        ({"kind": "cross_entropy", "other_grad": True}, ValueError, "other_grad: the cross entropy"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows must be at least 1"),
        ({"workspace": -1}, ValueError, "workspace must be at least 0"),
        ({"workspace": 1e9}, TypeError, "workspace must be an int"),
        ({"mask": torch.ones(4)}, ValueError, r"mask must be \(3,\) for hidden"),
        ({"temperature": 0}, ValueError, "temperature must be positive"),
        ({"other_temperature": "hot"}, TypeError, "other_temperature must be a float"),
        ({"group": "tp"}, ValueError, "group"),
    ],
    ids=str,
)
def test_errors(change, error, message):
    arguments = dict(zip(NAMES, draw(3), strict=True)) | change
    with pytest.raises(error, match=message):
        linear_token_divergence(**arguments)
    with pytest.raises(error, match=message):
        linear_pair_stats(**arguments)


def test_errors_of_targets():
    leaves = draw(3)
    with pytest.raises(IndexError, match="target 37 of row 2 is out of range for 37 logits"):
        ours(*leaves, function=linear_pair_stats, targets=torch.tensor([0, 1, V]), mask=torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match=r"targets must be .* for hidden \(3, 5\)"):
        ours(*leaves, function=linear_pair_stats, targets=torch.zeros(3, 2, dtype=torch.long))
