"""Sums over sequences and back on every backend, against exact ones; their bits; their gradients."""

import itertools
import math

import pytest
import torch
from isas import every_isa
from torch._dynamo.testing import CompileCounterWithBackend

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
    x, mask, cu = draw(dtype, rows=3 if dtype == torch.float32 else 1)
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_each_token_gets_its_sequence_s_number(backend, device, dtype):
    """0 for indices that nobody checked, and NaN of a sequence in its own counted tokens alone."""
    x = torch.tensor([1.5, math.nan, -2, math.inf], dtype=dtype)
    seq_idx = torch.tensor([0, 0, 1, 1, 2, 4, 3, 3, -1, 1 << 40, -(1 << 40), 4])
    everything = torch.ones(12, dtype=torch.bool)
    few = torch.tensor([1, 0, 1, 0, 1, 1, 0, 1, 1, 1, 1, 0], dtype=torch.bool)
    for mask in (None, few):
        out = torch.full((12,), 7, dtype=dtype, device=device)
        given = None if mask is None else mask.to(device)
        backends.select(out.device).sequence_spread(x.to(device), given, seq_idx.to(device), out)
        counts = everything if mask is None else mask
        expected = [x[i].item() if 0 <= i < 4 and c else 0 for i, c in zip(seq_idx.tolist(), counts.tolist(), strict=True)]
        torch.testing.assert_close(out.cpu(), torch.tensor(expected, dtype=dtype), rtol=0, atol=0, equal_nan=True)


@every_isa
def test_bits_depend_on_the_sequence_alone(backend, device):
    """Whatever stands before and behind it, and wherever it begins; in C++ whatever the processor."""
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
    if backend.startswith("native"):
        lanes = [list(itertools.accumulate(x[lane::8].tolist()))[-1] for lane in range(8)]
        assert wanted == _folded(lanes)
    tokens = torch.cat([x, x]).to(device)
    first, second = rlkern.packed(torch.tensor([0, 3000, 6000], device=device), num_tokens=6000).sum(tokens).tolist()
    assert first == second == wanted  # two runs, and two places


def _folded(lanes):
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]))


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


@every_isa
def test_holes_of_slots_reach_nothing(backend, device):
    """Places of no sequence between sequences: no gradient comes from them or goes there."""
    pack = rlkern.packed(torch.tensor([0, 4, 4, 9], device=device), num_tokens=11, seq_lens=torch.tensor([3, 0, 5], device=device))
    x = torch.tensor([1.0, 2, 3], device=device, requires_grad=True)
    tokens = pack.spread(x)
    assert tokens.tolist() == [1, 1, 1, 0, 3, 3, 3, 3, 3, 0, 0]
    assert torch.autograd.grad(tokens.sum(), x)[0].tolist() == [3, 0, 5]
    leaf = torch.ones(11, device=device, requires_grad=True)
    assert torch.autograd.grad(pack.sum(leaf), leaf, x.detach())[0].tolist() == [1, 1, 1, 0, 3, 3, 3, 3, 3, 0, 0]


def test_numbers_of_other_dtypes():
    pack = rlkern.packed(torch.tensor([0, 2, 5]), num_tokens=6)
    assert pack.spread(torch.tensor([7, 8])).tolist() == [7, 7, 8, 8, 8, 0]
    assert pack.spread(torch.tensor([False, True])).tolist() == [False, False, True, True, True, False]
    x = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    (gradient,) = torch.autograd.grad(pack.spread(x).sum(), x)
    assert gradient.dtype == torch.bfloat16 and gradient.tolist() == [2, 3]
    a, b = pack.sums(torch.ones(6, requires_grad=True), torch.ones(6, dtype=torch.float64))
    assert a.dtype == torch.float32 and b.dtype == torch.float64
    a.add_(1), b.add_(1)  # callers may write into what they get
    assert a.tolist() == b.tolist() == [3, 4] and a._base is None and b._base is None


def test_batches_of_gradients():
    """jacobian(vectorize=True) hands over tensors without memory of their own."""
    pack = rlkern.packed(torch.tensor([0, 2, 5]), num_tokens=6)
    for function, n in ((pack.sum, 6), (pack.spread, 2), (lambda x: pack.spread(pack.mean(x * x)), 6)):
        x = torch.arange(1.0, n + 1)
        one_by_one = torch.autograd.functional.jacobian(function, x)
        assert torch.equal(torch.autograd.functional.jacobian(function, x, vectorize=True), one_by_one) and one_by_one.any()


def test_as_pytorch_sees_them():
    x, mask, cu = draw(torch.float32, rows=2)
    seq_idx = rlkern.packed(cu, mask).seq_idx
    torch.library.opcheck(torch.ops.rlkern.sequence_sums.default, (x, mask, cu))
    for given in (mask, None):
        torch.library.opcheck(torch.ops.rlkern.sequence_spread.default, (torch.arange(7.0), given, seq_idx))


def test_one_graph_for_any_number_of_sequences():
    counter = CompileCounterWithBackend("aot_eager")

    def step(x, cu, mask):
        pack = rlkern.packed(cu, mask)
        first, second = pack.sums(x, x * x)
        return (pack.spread(first) * x).sum() + (pack.mean(x) * second).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for sizes in ([5, 0, 7], [1, 2, 3, 4, 5]):
        cu = torch.tensor([0, *sizes]).cumsum(0)
        mask = torch.arange(sum(sizes) + 2) % 3 > 0
        x = torch.linspace(-1, 1, len(mask))
        results = []
        for function in (compiled, step):
            leaf = x.clone().requires_grad_()
            loss = function(leaf, cu, mask)
            results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        torch.testing.assert_close(*results)
    assert counter.frame_count == 1


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
