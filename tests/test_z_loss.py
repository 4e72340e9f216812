"""The spherical Z-loss and the normaliser penalty, against their formulas in float64."""

import math

import pytest
import torch

import rlkern
from rlkern import layout
from rlkern.losses.z_loss import lse_penalty, spherical_z_loss
from rlkern.primitives.moments import row_moments


def draw(*shape, seed=0, dtype=torch.float64, mean=0.0, std=1.5):
    g = torch.Generator().manual_seed(seed)
    logits = (mean + std * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)
    return logits, torch.randint(0, shape[-1], shape[:-1], generator=g)


def naive(logits, targets, scale=1.0, offset=0.0):
    """From sum and sum of squares, as the paper has it."""
    d = logits.shape[-1]
    mu = logits.sum(-1) / d
    sigma = ((logits**2).sum(-1) / d - mu**2).sqrt()
    z = (logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - mu) / sigma
    return (1 + (scale * (offset - z)).exp()).log() / scale


@pytest.mark.parametrize("options", [{}, {"scale": 0.3, "offset": 1.5}, {"scale": 4.0, "offset": -0.5}], ids=str)
def test_equals_formula(options, monkeypatch):
    monkeypatch.setattr(layout, "chunk_elements", lambda rows: 25)
    logits, targets = draw(2, 3, 11)
    leaf = logits.clone().requires_grad_()
    per_row = spherical_z_loss(leaf, targets, reduction="none", **options)
    weights = torch.arange(1.0, 7.0, dtype=torch.float64).view(2, 3)
    (gradient,) = torch.autograd.grad((per_row * weights).sum(), leaf)
    expected = naive(leaf, targets, **options)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), leaf)
    torch.testing.assert_close(per_row, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(spherical_z_loss(logits, targets, **options), expected.sum())
    torch.testing.assert_close(spherical_z_loss(logits, targets, reduction="mean", **options), expected.mean())
    assert torch.autograd.gradcheck(lambda x: spherical_z_loss(x, targets, **options), leaf)


def test_closed_form_of_the_gradient():
    """-(rho / sigma) (1{v = y} - 1/D - z_y z_v / D): orthogonal to shifts and scaling."""
    logits, targets = draw(5, 9)
    leaf = logits.clone().requires_grad_()
    spherical_z_loss(leaf, targets).backward()
    mu, sigma = logits.mean(-1, keepdim=True), logits.std(-1, keepdim=True, unbiased=False)
    z = (logits - mu) / sigma
    z_y = z.gather(-1, targets.unsqueeze(-1))
    one = torch.zeros_like(logits).scatter_(-1, targets.unsqueeze(-1), 1)
    torch.testing.assert_close(leaf.grad, -torch.sigmoid(-z_y) / sigma * (one - 1 / 9 - z_y * z / 9))
    torch.testing.assert_close(leaf.grad.sum(-1), torch.zeros(5).double(), rtol=0, atol=1e-14)
    torch.testing.assert_close((leaf.grad * logits).sum(-1), torch.zeros(5).double(), rtol=0, atol=1e-14)
    torch.testing.assert_close(spherical_z_loss(7 * logits + 3, targets), spherical_z_loss(logits, targets))


def test_equal_logits_are_a_constant():
    logits = torch.full((2, 5), 3.0, requires_grad=True)
    loss = spherical_z_loss(logits, torch.tensor([0, 4]), scale=2.0, offset=0.5)
    loss.backward()
    assert loss.item() == pytest.approx(2 * math.log1p(math.exp(1.0)) / 2)
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_far_from_zero_nothing_cancels(dtype):
    """Mean 25, std 1.5: E[x^2] - mean^2 in float32 is wrong by 1e-4 here."""
    logits, targets = draw(8, 60_000, dtype=dtype, mean=25)
    leaf = logits.clone().requires_grad_()
    per_row = spherical_z_loss(leaf, targets, reduction="none")
    per_row.sum().backward()
    exact = logits.double().requires_grad_()
    naive(exact, targets).sum().backward()
    assert per_row.dtype == torch.float32 and leaf.grad.dtype == dtype
    torch.testing.assert_close(per_row.double(), naive(exact, targets).detach(), rtol=1e-6, atol=1e-7)
    rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-9}[dtype]
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=rtol, atol=2e-7 if dtype == torch.float16 else 1e-9)


def test_rows_that_do_not_count():
    logits, targets = draw(2, 3, 7)
    targets[0, 1] = -100
    mask = torch.tensor([[1, 1, 1], [1, 0, 1]])
    kept = (mask != 0) & (targets != -100)
    dirty = logits.clone()
    dirty[~kept] = math.nan
    leaf = dirty.requires_grad_()
    loss = spherical_z_loss(leaf, targets, mask=mask, reduction="mean")
    loss.backward()
    torch.testing.assert_close(loss, naive(logits[kept], targets[kept]).mean())
    assert (leaf.grad[~kept] == 0).all() and leaf.grad.isfinite().all()
    assert spherical_z_loss(leaf, targets, mask=mask * 0, reduction="mean") == 0


def test_row_moments():
    logits, targets = draw(4, 9)
    target, variance = row_moments(logits, targets)
    torch.testing.assert_close(variance, logits.var(-1, unbiased=False))
    torch.testing.assert_close(target, logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.mean(-1))
    args = (logits, targets, torch.ones(4, dtype=torch.bool), -100)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.rlkern.row_moments.default, args, test_utils=checks)
    torch.library.opcheck(
        torch.ops.rlkern.row_moments_backward.default, (*args, torch.zeros(4, 2).double(), *torch.ones(2, 4).double()), test_utils=checks
    )
    leaf = logits.requires_grad_()
    (gradient,) = torch.autograd.grad(row_moments(leaf, targets).variance.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        gradient.sum().backward()


def test_penalty_equals_formula():
    logits, targets = draw(2, 3, 11)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    leaf = logits.clone().requires_grad_()
    loss = lse_penalty(rlkern.token_stats(leaf, targets, mask=mask).logsumexp, mask, coef=0.01)
    loss.backward()
    expected = logits.clone().requires_grad_()
    value = 0.01 * (expected.logsumexp(-1) ** 2)[mask != 0].mean()
    value.backward()
    torch.testing.assert_close(loss, value)
    torch.testing.assert_close(leaf.grad, expected.grad)
    lse = logits.logsumexp(-1, keepdim=True)
    torch.testing.assert_close(leaf.grad, (2 * 0.01 * lse * logits.softmax(-1) / 4) * mask.unsqueeze(-1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, y: spherical_z_loss(x, y, reduction="avg"), ValueError, "unknown reduction 'avg'"),
        (lambda x, y: spherical_z_loss(x, y, scale=0.0), ValueError, "scale must be positive and finite, got 0.0"),
        (lambda x, y: spherical_z_loss(x, y, offset=None), TypeError, "offset must be a number"),
        (lambda x, y: spherical_z_loss(x, y + 5), IndexError, "out of range for 5 logits"),
        (lambda x, y: spherical_z_loss(x, y - 100, ignore_index=-1), IndexError, "target -100 of row 0 is out of range"),
        (lambda x, y: spherical_z_loss(x, y.unsqueeze(-1)), ValueError, "one a row"),
        (lambda x, y: spherical_z_loss(x, y.float()), TypeError, "targets must be an integer tensor"),
        (lambda x, y: spherical_z_loss(x, y, ignore_index=[]), TypeError, "ignore_index must be an int"),
        (lambda x, y: lse_penalty(x[..., 0], y.to("meta")), ValueError, "meta"),
        (lambda x, y: lse_penalty(x[..., 0], y, coef=-1), ValueError, "coef must be in"),
        (lambda x, y: lse_penalty(y, y), TypeError, "logsumexp must be a float tensor"),
        (lambda x, y: lse_penalty(x[..., 0], y[:1]), ValueError, "mask must have the shape of logsumexp"),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64))
