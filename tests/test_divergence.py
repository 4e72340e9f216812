"""token_divergence against the formulas written with autograd in float64."""

import math

import pytest
import torch
from derivatives import differentiate
from loss_battery import Operators

from rlkern import layout
from rlkern.primitives.divergence import KINDS, token_divergence

ROW_TEMPERATURE = torch.tensor([[0.5, 1.0, 2.0], [3.0, 0.9, 1.1]])
every_kind = pytest.mark.parametrize("kind", KINDS)


def naive(logits, other, kind, beta=0.5, temperature=1.0):
    t = temperature.unsqueeze(-1) if isinstance(temperature, torch.Tensor) else temperature
    p, q = (logits / t).softmax(-1), (other.detach() / t).softmax(-1)

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    if kind == "jsd":
        mix = beta * q + (1 - beta) * p
        return beta * kl(q, mix) + (1 - beta) * kl(p, mix)
    return kl(p, q) if kind == "reverse_kl" else kl(q, p)


def draw(*shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [(2 * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype) for _ in range(2)]


def ours_and_naive(logits, other, weights, kind="reverse_kl", **options):
    """(value, gradient) of either, by float64 of the same numbers where they are not float64."""
    ours = differentiate(lambda x: token_divergence(x, other, kind=kind, **options), logits, weights)
    return ours, differentiate(lambda x: naive(x, other.double(), kind, **options), logits.double(), weights)


@every_kind
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"temperature": ROW_TEMPERATURE}, {"beta": 0.1}], ids=str)
def test_equals_formula(kind, options, monkeypatch):
    monkeypatch.setattr(layout, "chunk_elements", lambda rows: 40)  # two chunks per [3, 17] block
    ours, expected = ours_and_naive(*draw(2, 3, 17), draw(2, 3)[0], kind, **options)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)


@every_kind
def test_gradcheck(kind):
    logits, other = draw(3, 6)
    assert torch.autograd.gradcheck(lambda x: token_divergence(x, other, kind=kind, beta=0.3, temperature=1.3), logits.requires_grad_())


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_inputs_are_accumulated_in_float32(kind, dtype):
    (value, gradient), (expected, expected_gradient) = ours_and_naive(*draw(4, 3000, dtype=dtype), torch.ones(4), kind)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=rtol, atol=1e-7)


@every_kind
def test_dtypes_may_differ(kind):
    logits, other = draw(4, 11, dtype=torch.float32)
    other = other.bfloat16()
    torch.testing.assert_close(token_divergence(logits, other, kind=kind), naive(logits, other.float(), kind))


@every_kind
def test_minus_infinity_on_both_sides_contributes_nothing(kind):
    logits, other = draw(4, 12)
    dropped = torch.zeros(12, dtype=torch.bool)
    dropped[[0, 5, 11]] = True
    rest = other.masked_fill(dropped, -math.inf)
    value, gradient = differentiate(lambda x: token_divergence(x, rest, kind=kind), logits.masked_fill(dropped, -math.inf), torch.ones(4))
    kept_value, kept_gradient = differentiate(lambda x: naive(x, other[:, ~dropped], kind), logits[:, ~dropped], torch.ones(4))
    torch.testing.assert_close(value, kept_value)
    torch.testing.assert_close(gradient[:, ~dropped], kept_gradient)
    assert (gradient[:, dropped] == 0).all()


def test_missing_support_is_infinite_where_the_formula_says_so():
    logits, other = draw(2, 5)
    less = logits.clone()
    less[0, 1] = -math.inf  # p = 0 < q in row 0
    value, gradient = differentiate(lambda x: token_divergence(x, other, kind="forward_kl"), less, torch.ones(2))
    assert value[0] == math.inf and value[1].isfinite()
    p, q = less.softmax(-1), other.softmax(-1)
    assert gradient[0, 1] == 0
    keep = [0, 2, 3, 4]
    torch.testing.assert_close(gradient[0, keep], (p - q)[0, keep])
    assert token_divergence(less, other, kind="reverse_kl").isfinite().all()
    reverse = token_divergence(other, less, kind="reverse_kl")
    assert reverse[0] == math.inf and reverse[1].isfinite()
    assert token_divergence(less, other, kind="jsd").isfinite().all()
    # Mass that underflows in float32 is mass all the same.
    tiny = torch.tensor([[0.0, -300.0]])
    assert token_divergence(tiny, torch.tensor([[0.0, -math.inf]])) == math.inf
    assert token_divergence(torch.tensor([[0.0, -math.inf]]), tiny) == 0


def test_infinite_rows_can_be_deselected():
    logits, other = draw(2, 5)
    other[0, 1] = -math.inf
    leaf = logits.requires_grad_()
    value = token_divergence(leaf, other)
    torch.where(value.isfinite(), value, 0).sum().backward()
    assert (leaf.grad[0] == 0).all() and leaf.grad.isfinite().all() and (leaf.grad[1] != 0).all()


@every_kind
def test_facts(kind):
    logits, other = draw(50, 9)
    value, gradient = differentiate(lambda x: token_divergence(x, other, kind=kind), logits, torch.ones(50))
    assert (value > 0).all()
    assert token_divergence(logits, logits + 3, kind=kind).abs().max() < 1e-12
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(50).double(), rtol=0, atol=1e-13)
    if kind == "jsd":
        assert (value <= math.log(2)).all()
        torch.testing.assert_close(token_divergence(logits, other, kind="jsd", beta=0.3), token_divergence(other, logits, kind="jsd", beta=0.7))
    else:
        opposite = {"reverse_kl": "forward_kl", "forward_kl": "reverse_kl"}[kind]
        torch.testing.assert_close(value, token_divergence(other, logits, kind=opposite))


@every_kind
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_masked_rows_hold_anything(kind, garbage):
    logits, other = draw(2, 3, 7)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    expected = differentiate(lambda x: token_divergence(x, other, kind=kind, mask=mask), logits, torch.ones(2, 3))
    assert (expected[0][mask == 0] == 0).all() and (expected[1][mask == 0] == 0).all() and (expected[1][mask == 1] != 0).any()
    dirty, dirty_other = (torch.where(mask.unsqueeze(-1) == 0, garbage, x) for x in (logits, other))
    weights = torch.where(mask == 0, math.nan, 1.0)  # so may their upstream gradients
    value, gradient = differentiate(lambda x: token_divergence(x, dirty_other, kind=kind, mask=mask), dirty, weights)
    assert torch.equal(value, expected[0]) and torch.equal(gradient, expected[1])


def test_strided_rows_and_shapes():
    logits, other = draw(2, 5, 3, 8)
    for view in (lambda x: x[:, :-1], lambda x: x.transpose(1, 2), lambda x: x[..., ::2], lambda x: x[0, 0], lambda x: x[0, 0, 0], lambda x: x[:0]):
        a, b = view(logits), view(other)
        value, gradient = differentiate(lambda x, b=b: token_divergence(x, b), a, torch.ones(a.shape[:-1]))
        torch.testing.assert_close(value, naive(a, b, "reverse_kl"))
        assert gradient.shape == a.shape


@every_kind
def test_no_float32_copy_of_the_logits_exists(kind, monkeypatch):
    monkeypatch.setattr(layout, "chunk_elements", lambda rows: 1000)
    logits, other = draw(64, 500, dtype=torch.bfloat16)
    logits.requires_grad_()
    with Operators() as ran:
        token_divergence(logits, other, kind=kind).sum().backward()
    assert 0 < max(x.numel() for _, _, results in ran.calls for x in results if x.dtype == torch.float32) <= 1000


@every_kind
def test_compiles_and_passes_opcheck(kind):
    logits, other = draw(3, 9, dtype=torch.float32)

    def function(x):
        return token_divergence(x, other, kind=kind)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(differentiate(compiled, logits, torch.ones(3)), differentiate(function, logits, torch.ones(3)))
    args = (logits, other, None, None, 1.0, kind, 0.5)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.rlkern.token_divergence.default, args, test_utils=checks)
    torch.library.opcheck(torch.ops.rlkern.token_divergence_backward.default, (*args, torch.ones(3)), test_utils=checks)


def test_only_logits_take_a_gradient_and_only_once():
    logits, other = (x.requires_grad_() for x in draw(3, 9))
    value = token_divergence(logits, other)
    (gradient,) = torch.autograd.grad(value.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        gradient.sum().backward()
    assert torch.autograd.grad(token_divergence(logits, other).sum(), (logits, other), allow_unused=True)[1] is None
    with pytest.raises(RuntimeError, match="torch.func"):
        torch.ops.rlkern.token_divergence(logits, other, None, None, 1.0, "jsd", 0.5).sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"other": torch.zeros(3, 8)}, ValueError, r"\(3, 9\), got \(3, 8\)"),
        ({"other": torch.zeros(3, 9, dtype=torch.int64)}, TypeError, "other must be float32"),
        ({"logits": [1.0]}, TypeError, "logits must be a tensor"),
        ({"kind": "kl"}, ValueError, "unknown kind 'kl', expected one of 'reverse_kl'"),
        ({"kind": "jsd", "beta": 1.0}, ValueError, "0 < beta < 1, got 1.0"),
        ({"beta": None}, TypeError, "beta must be a number, got NoneType"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"mask": torch.ones(4)}, ValueError, r"mask must be \(3,\)"),
    ],
)
def test_refuses(change, error, message):
    arguments = {"logits": torch.zeros(3, 9), "other": torch.zeros(3, 9)} | change
    with pytest.raises(error, match=message):
        token_divergence(**arguments)
