"""linear_token_stats against token_stats of the product, by autograd in float64; memory; errors."""

import math

import pytest
import torch
from loss_battery import Operators
from oracle import FIELDS, upstream
from torch.nn.functional import linear

from rlkern import Kept, linear_token_stats, reference, token_stats, use_backend

V, H = 37, 5


def draw(*lead, dtype=torch.float64, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    return normal(*lead, H), normal(V, H), normal(V) if bias else None, torch.randint(V, lead, generator=g)


def gradients(stats, leaves, seed=0):
    fields = [getattr(stats, name) for name in FIELDS if getattr(stats, name) is not None]
    loss = sum((f * g.to(f).masked_fill(f == -math.inf, 0)).sum() for f, g in zip(fields, upstream(fields, seed), strict=True))
    return torch.autograd.grad(loss, [x for x in leaves if x is not None])


def ours(hidden, weight, bias, targets, **options):
    return linear_token_stats(hidden, weight, targets, bias=bias, **options)


def same_gradients(stats, expected, leaves):
    torch.testing.assert_close(gradients(stats, leaves), gradients(expected, leaves), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk_rows", [1, 4, None])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"temperature": torch.linspace(0.5, 2, 6).view(2, 3)},
        {"mask": torch.tensor([[1, 0, 1], [0, 1, 1]])},
        {"min_p": 0.1, "with_sum_sq": True},
        {"with_entropy": False},
        {"with_tail": True, "mask": torch.tensor([[1, 0, 1], [0, 1, 1]])},
        {"min_prob": 0.02, "mask": torch.tensor([[True, False, False], [False, True, True]])},
    ],
    ids=str,
)
def test_equals_the_product_written_out(options, chunk_rows, bias):
    *leaves, targets = draw(2, 3, bias=bias)
    stats = ours(*leaves, targets, chunk_rows=chunk_rows, **options)
    expected = token_stats(linear(*leaves), targets, **options)
    for name in (*FIELDS, "target_kept"):
        got, want = getattr(stats, name), getattr(expected, name)
        assert (got is None) == (want is None), name
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    same_gradients(stats, expected, leaves)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_every_backend(backend):
    *leaves, targets = draw(7, dtype=torch.float32)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = reference.token_stats(linear(*exact), targets.unsqueeze(-1))
    with use_backend(backend):
        stats = ours(*leaves, targets, chunk_rows=3)
        got = torch.autograd.grad((stats.logp.cos() + stats.entropy.sin()).sum(), leaves)
    want = torch.autograd.grad((expected.logp.squeeze(-1).cos() + expected.entropy.sin()).sum(), exact)
    torch.testing.assert_close(stats.entropy.double(), expected.entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close([x.double() for x in got], list(want), rtol=1e-5, atol=3e-6)


def test_several_targets_and_ignored_rows():
    *leaves, _ = draw(2, 3)
    targets = torch.tensor([[[1, 2], [-100, 3], [-100, -100]], [[-100, -100], [36, 36], [0, -100]]])
    stats = ours(*leaves, targets, chunk_rows=2)
    expected = token_stats(linear(*leaves), targets)
    torch.testing.assert_close(stats.logp, expected.logp, rtol=1e-12, atol=1e-12)
    assert (stats.entropy[0, 2], stats.logp[1, 0].abs().sum()) == (0, 0)
    same_gradients(stats, expected, leaves)


@pytest.mark.parametrize("gather", [True, False])
def test_masked_rows_may_hold_nan_and_get_zero(gather, monkeypatch):
    if not gather:  # as on a GPU
        monkeypatch.setattr("rlkern.primitives.projection._indices", lambda *_: None)
    hidden, weight, bias, targets = draw(2, 3)
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    dirty = torch.where(mask.unsqueeze(-1) == 0, math.nan, hidden.detach()).requires_grad_()
    stats, clean = (ours(x, weight, bias, targets, mask=mask) for x in (dirty, hidden))
    assert torch.equal(stats.logp, clean.logp) and (stats.entropy[mask == 0] == 0).all()
    got, want = gradients(stats, (dirty, weight, bias)), gradients(clean, (hidden, weight, bias))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)) and (got[0][mask == 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype):
    hidden, weight, bias, targets = draw(300, dtype=dtype)
    stats = linear_token_stats(hidden, weight, targets, bias=bias, chunk_rows=7)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    rounded = linear(hidden, weight, bias).detach().double()
    logits = linear(*exact)
    logits = logits + (rounded - logits).detach()  # the values of the rounded logits, the gradients of the product
    expected = token_stats(logits, targets)
    torch.testing.assert_close(stats.logp.double(), expected.logp, rtol=1e-5, atol=1e-5)
    rtol = {torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
    for got, want in zip(gradients(stats, (hidden, weight, bias)), gradients(expected, exact), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=rtol * want.abs().max().item())


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_frozen_inputs_get_no_gradient(frozen):
    hidden, weight, bias, targets = draw(6)
    leaves = [x.detach() if i in frozen else x for i, x in enumerate((hidden, weight, bias))]
    same_gradients(ours(*leaves, targets, chunk_rows=4), token_stats(linear(*leaves), targets), [x for x in leaves if x.requires_grad])


def test_autocast_and_tied_embeddings():
    embedding = torch.nn.Embedding(V, H)
    ids = torch.arange(8).view(2, 4)

    def loss(function):
        embedding.weight.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            function(embedding(ids)).sum().backward()
        return embedding.weight.grad.clone()

    got = loss(lambda h: linear_token_stats(h, embedding.weight, ids, chunk_rows=3).logp)
    want = loss(lambda h: token_stats(linear(h, embedding.weight), ids).logp)
    torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("workspace", [0, 1 << 20], ids=["tiles", "kept"])
@pytest.mark.parametrize("options", [{}, {"logits_dtype": torch.float32}, {"lora": True}, {"keep": True}], ids=str)
def test_autocast_keeps_no_copy_of_float32_parameters(workspace, options):
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((7, 4), (9001, 4), (9001,)))
    targets, saved = torch.arange(7) * 1400, []
    a, b = torch.randn(2, 4), torch.randn(9001, 2)
    given, matrix = dict(options), weight
    if "lora" in options:
        given, matrix = {"lora": (a, b, 0.5)}, weight + 0.5 * b @ a
    if "keep" in options:
        given["keep"] = Kept.ids(torch.arange(9001, dtype=torch.int32).expand(7, -1).contiguous())
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        stats = linear_token_stats(hidden, weight, targets, bias=bias, workspace=workspace, **given)
    if "keep" not in options:
        assert [x.data_ptr() for x in saved if x.shape == weight.shape] == [weight.data_ptr()]
    got = torch.autograd.grad(stats.logp.sum() + stats.entropy.sum(), (hidden, weight, bias))
    exact = token_stats(hidden.double() @ matrix.double().T + bias, targets)
    expected = torch.autograd.grad(exact.logp.sum() + exact.entropy.sum(), (hidden, weight, bias))
    torch.testing.assert_close(stats.logp.double(), exact.logp, rtol=0, atol=0.15)
    for x, want in zip(got, expected, strict=True):  # logits around 16 are 0.125 apart: probabilities 6 % off
        assert x.dtype == torch.float32 and (x - want).norm() < 0.05 * want.norm()


def test_slices_empty_batches_and_writing_into_results():
    hidden, weight, bias, targets = draw(2, 4)
    stats = linear_token_stats(hidden[:, :-1], weight, targets[:, 1:], bias=bias)
    torch.testing.assert_close(stats.logp, token_stats(linear(hidden[:, :-1], weight, bias), targets[:, 1:]).logp, rtol=1e-12, atol=1e-12)
    stats.logp[targets[:, 1:] > 3] = 0  # as trainers do
    stats.logp.sum().backward()
    empty = linear_token_stats(hidden[:0], weight, targets[:0], bias=bias)
    assert empty.logp.shape == (0, 4)
    empty.entropy.sum().backward()


def test_memory_is_a_chunk():
    """Nothing saved for the backward has a row of logits, and no operator makes more than a chunk of them."""
    hidden, weight, bias, targets = draw(64)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        stats = linear_token_stats(hidden, weight, targets, bias=bias, chunk_rows=8)
    with Operators() as ran:
        stats.logp.sum().backward()
    assert max(saved) < 64 * V and max(x.numel() for _, _, results in ran.calls for x in results) < 64 * V


def test_compile_and_opcheck():
    hidden, weight, bias, targets = draw(9, dtype=torch.float32)
    operator = torch.ops.rlkern.linear_token_stats.default
    tensors = (hidden.detach(), weight.detach(), bias.detach(), None, None, targets, None, None)
    torch.library.opcheck(operator, (*tensors, 5, 0, 4, False, False, None, None, 0, "", 1, True, 1.0, -100, 1, -2.0, True, False, 20.0, 0, 0))

    def loss(*inputs):
        stats = ours(*inputs, chunk_rows=4)
        return (stats.logp * stats.entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    got, want = (torch.autograd.grad(f(hidden, weight, bias, targets), (hidden, weight, bias)) for f in (compiled, loss))
    torch.testing.assert_close(got, want)


def test_meta_tensors():
    hidden, weight, bias, targets = (t.detach().to("meta") for t in draw(9))
    stats = linear_token_stats(hidden.requires_grad_(), weight, targets, bias=bias)
    stats.logp.sum().backward()
    assert stats.entropy.is_meta and stats.logp.shape == (9,) and hidden.grad.shape == hidden.shape


def test_second_derivative_raises():
    hidden, weight, bias, targets = draw(3)
    (g,) = torch.autograd.grad(linear_token_stats(hidden, weight, targets).logp.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        g.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(V, H + 1, dtype=torch.float64)}, ValueError, r"weight must be \[V, 5\]"),
        ({"weight": torch.zeros(V, H)}, TypeError, "dtype of hidden torch.float64"),
        ({"weight": None}, TypeError, "weight must be a float tensor, got None"),
        ({"weight": torch.zeros(0, H, dtype=torch.float64)}, ValueError, "V >= 1"),
        ({"bias": torch.zeros(V - 1, dtype=torch.float64)}, ValueError, "bias must be"),
        ({"targets": torch.zeros(4, dtype=torch.long)}, ValueError, "targets must be"),
        ({"targets": None}, TypeError, "targets"),
        ({"targets": torch.full((3,), V)}, IndexError, "out of range for 37"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows must be at least 1"),
        ({"chunk_rows": 2.0}, TypeError, "chunk_rows must be an int"),
        ({"mask": torch.ones(4)}, ValueError, "mask must be"),
        ({"temperature": 0}, ValueError, "temperature must be positive"),
        ({"min_p": 2.0}, ValueError, "min_p is a fraction"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an int, got None"),
        ({"group": "tp"}, TypeError, "group"),
    ],
    ids=str,
)
def test_errors(change, error, message):
    arguments = dict(zip(("hidden", "weight", "bias", "targets"), draw(3), strict=True)) | change
    with pytest.raises(error, match=message):
        linear_token_stats(**arguments)
