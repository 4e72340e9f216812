"""Sums over sequences on every backend, against exact ones; their bits; their gradients."""

import math

import pytest
import torch
from isas import every_isa

import rlkern
from rlkern import backends
from rlkern.primitives.packing import Rows

SIZES = [5, 1, 0, 0, 40, 9, 1]


def draw(dtype, seed=0, rows=2):
    g = torch.Generator().manual_seed(seed)
    cu = torch.tensor([0, *SIZES]).cumsum(0)
    n = int(cu[-1]) + 3
    x = torch.randn(rows, n, generator=g, dtype=torch.float64).to(dtype) * 100
    mask = torch.rand(n, generator=g) < 0.7
    x[:, ~mask] = torch.tensor([math.nan, math.inf, -math.inf])[torch.randint(0, 3, (int((~mask).sum()),), generator=g)].to(dtype)
    return x, mask, cu


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_exact_sums(backend, device, dtype):
    x, mask, cu = draw(dtype)
    pack = rlkern.packed(cu.to(device), mask.to(device))
    results = pack.sums(*x.to(device))
    for row, sums in zip(x, results, strict=True):
        expected = [math.fsum(row[a:b][mask[a:b]].tolist()) for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)]
        torch.testing.assert_close(
            sums.cpu(), torch.tensor(expected, dtype=torch.float64).to(dtype), rtol=0 if dtype == torch.float32 else 1e-15, atol=0
        )


@every_isa
def test_bounds_that_nobody_checked(backend, device):
    """On a GPU a wild offset reads nothing outside."""
    x, cu = torch.ones(1, 6, device=device), torch.tensor([-3, 4, 2, 1 << 40], device=device)
    out = torch.empty(1, 3, dtype=torch.float64, device=device)
    backends.select(x.device).sequence_sums(x, torch.ones(6, dtype=torch.bool, device=device), cu, out)
    assert out[0, 0] == 4 and 0 <= out.min() and out.max() <= 6


@every_isa
def test_bits_depend_on_the_sequence_alone(backend, device):
    """Whatever stands before and behind it, and wherever it begins."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3000, generator=g, dtype=torch.float64)
    wanted = None
    for before in (0, 1, 3, 17):
        tokens = torch.cat([torch.full((before,), math.nan, dtype=torch.float64), x, torch.ones(5)]).to(device)
        pack = rlkern.packed(torch.tensor([0, before, before + 3000, before + 3005], device=device), num_tokens=len(tokens))
        got = pack.sum(tokens)[1].item()
        wanted = got if wanted is None else wanted
        assert got == wanted
    assert wanted == pytest.approx(math.fsum(x.tolist()), rel=1e-12)


def test_packed_and_padded_round_alike():
    """100,000 sums in float32, of tokens that lie in a padding twice as wide or one behind the other."""
    g = torch.Generator().manual_seed(2)
    differ = 0
    for _ in range(20):
        x = -3 * torch.rand(5000, 50, generator=g)
        padded = Rows(torch.arange(100) < torch.full((5000, 1), 50)).sum(torch.nn.functional.pad(x, (0, 50), value=math.nan))
        pack = rlkern.packed(torch.arange(5001) * 50, num_tokens=250_000)
        differ += (pack.sum(x.flatten()) != padded).sum().item()
    assert differ == 0


@every_isa
def test_gradients_gather(backend, device):
    x, mask, cu = draw(torch.float32, rows=1)
    pack, g = rlkern.packed(cu.to(device), mask.to(device)), torch.arange(1.0, 8, device=device)
    leaf = x[0].to(device).requires_grad_()
    (gradient,) = torch.autograd.grad(pack.sum(leaf), leaf, g)
    assert torch.equal(gradient, torch.where(pack.mask, pack.spread(g), 0))
    weights = g.clone().requires_grad_()
    (back,) = torch.autograd.grad(pack.spread(weights), weights, torch.where(pack.mask, x[0].to(device), 0))
    assert torch.equal(back, pack.sum(x[0].to(device)))


def test_derivatives_of_any_order():
    x, mask, cu = draw(torch.float64, rows=1)
    pack = rlkern.packed(cu, mask)
    x = torch.where(mask, x[0] / 100, 0)

    def function(x):
        means = pack.mean(x * x)
        return (pack.spread(means) * x).sum() + means.square().sum()

    leaf = x.requires_grad_()
    assert torch.autograd.gradcheck(function, [leaf]) and torch.autograd.gradgradcheck(function, [leaf])
    torch.testing.assert_close(torch.func.grad(function)(x.detach()), torch.autograd.grad(function(leaf), leaf)[0], rtol=1e-12, atol=1e-14)
