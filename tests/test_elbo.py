"""masked_elbo against autograd of its formula in float64: dense, packed, in place; rows that do not count."""

import math

import pytest
import torch
from derivatives import differentiate

import rlkern

F64 = torch.float64
INF = math.inf


def draw(batch=4, length=12, vocab=37, seed=0, dtype=F64):
    """Ragged sequences, one without a masked position. Weights go up to 20, and are NaN outside the mask."""
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(batch, length, vocab, generator=g, dtype=F64)
    targets = torch.randint(0, vocab, (batch, length), generator=g)
    ends = torch.randint(3, length + 1, (batch, 1), generator=g)
    mask = (torch.rand(batch, length, generator=g) < 0.6) & (torch.arange(length) < ends)
    mask[1] = False
    weight = torch.where(mask, 1 / (0.05 + 0.95 * torch.rand(batch, length, generator=g, dtype=F64)), math.nan)
    return logits.to(dtype), targets, weight.to(dtype), mask


def naive(logits, targets, weight, mask, temperature=1.0):
    """sum over the mask of w log p, a loop over sequences and positions."""
    logp = (logits / temperature).log_softmax(-1)
    zero = logits.new_zeros(())
    rows = [[weight[b, k] * logp[b, k, targets[b, k]] for k in range(logits.shape[1]) if mask[b, k]] for b in range(logits.shape[0])]
    return torch.stack([sum(row, zero) for row in rows])


def pack(mask, *tensors):
    """The masked rows of each tensor, and the sequence that each belongs to."""
    return [t[mask] for t in tensors], mask.nonzero()[:, 0]


def ours(logits, targets, weight, **options):
    """(value, gradient) of masked_elbo."""
    return differentiate(lambda z: rlkern.masked_elbo(z, targets, weight, **options), logits, UPSTREAM)


def identical(got, want):
    return torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


UPSTREAM = torch.tensor([0.7, -1.3, 2.0, -0.4], dtype=F64)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("seed", range(3))
def test_value_and_gradient(seed, temperature):
    logits, targets, weight, mask = draw(seed=seed)
    got = ours(logits, targets, weight, mask=mask, temperature=temperature)
    want = differentiate(lambda z: naive(z, targets, weight, mask, temperature), logits, UPSTREAM)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    onehot = torch.nn.functional.one_hot(targets, logits.shape[-1])
    closed = UPSTREAM[:, None, None] * weight[..., None] / temperature * (onehot - (logits / temperature).softmax(-1))
    closed = torch.where(mask[..., None], closed, 0)
    torch.testing.assert_close(got[1], closed, rtol=1e-12, atol=1e-13)
    assert (got[1][~mask] == 0).all() and got[0][1] == 0


def test_one_weight_a_sequence():
    logits, targets, _, mask = draw()
    t = torch.tensor([0.1, 0.5, 0.9, 1.0], dtype=F64)
    want = rlkern.masked_elbo(logits, targets, (1 / t)[:, None].expand(mask.shape), mask=mask)
    for weight in (1 / t, (1 / t)[:, None]):
        assert torch.equal(rlkern.masked_elbo(logits, targets, weight, mask=mask), want)
    nothing_masked = torch.where(mask.any(-1), 1 / t, INF)  # t = 0 masks nothing, so its weight is not looked at
    assert torch.equal(rlkern.masked_elbo(logits, targets, nothing_masked, mask=mask), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_dense_packed_and_in_place_on_every_backend(backend, device, dtype):
    logits, targets, weight, mask = draw(length=4, vocab=301, dtype=dtype)
    weight = weight.to(torch.float64 if dtype == F64 else torch.float32)
    value, gradient = differentiate(lambda z: naive(z, targets, weight.double(), mask), logits.double(), UPSTREAM)
    counted = torch.where(mask, weight.double(), 0)
    weighted = (counted * naive_token_logp(logits.double(), targets)).abs().sum(-1)
    coefficient = (UPSTREAM[:, None] * counted).abs()[..., None]
    accuracy = 1e-12 if dtype == F64 else 1e-5
    interpreted = backend == "triton" and device == "cpu"  # the interpreter truncates where hardware rounds
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-7 if interpreted else 2**-8, torch.float64: 1e-12}[dtype]
    inputs = [t.to(device) for t in (logits, targets, weight, mask)]

    def check(got_value, got_gradient):
        assert got_value.dtype == (F64 if dtype == F64 else torch.float32) and got_gradient.dtype == dtype
        assert ((got_value.double().cpu() - value).abs() <= accuracy * weighted).all()
        error = (got_gradient.double().cpu() - gradient).abs()
        assert (error <= rounding * gradient.abs() + accuracy * coefficient).all()

    z, y, w, m = inputs
    (zp, yp, wp), seq_idx = pack(m, z, y, w)
    for inplace in (False, True):
        check(*differentiate(lambda z, o=inplace: rlkern.masked_elbo(z * 1, y, w, mask=m, inplace_backward=o), z, UPSTREAM))
        packed = {"seq_idx": seq_idx, "num_seqs": 4, "inplace_backward": inplace}
        got, d = differentiate(lambda z, o=packed: rlkern.masked_elbo(z * 1, yp, wp, **o), zp, UPSTREAM)
        scattered = torch.zeros_like(z)
        scattered[m] = d
        check(got, scattered)


def naive_token_logp(logits, targets):
    return logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def test_in_place_writes_over_the_logits():
    logits, targets, weight, mask = draw(dtype=torch.float32)
    leaf = logits.clone().requires_grad_()
    produced = leaf * 2
    rlkern.masked_elbo(produced, targets, weight, mask=mask, inplace_backward=True).sum().backward()
    want = differentiate(lambda z: rlkern.masked_elbo(z * 2, targets, weight, mask=mask), logits, torch.ones(4))[1]
    torch.testing.assert_close(leaf.grad, want)
    assert torch.equal(produced.detach() * 2, leaf.grad)
    capped = (logits.clone().requires_grad_()).tanh()  # tanh saved its result, which the gradient now overwrites
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rlkern.masked_elbo(capped, targets, weight, mask=mask, inplace_backward=True).sum().backward()


def test_rows_that_do_not_count_are_not_read(backend, device):
    logits, targets, weight, mask = (t.to(device) for t in draw(length=5, dtype=torch.float32))
    weight, old = torch.where(mask, weight, 1), torch.where(mask, -1.0, 0)
    garbage = torch.tensor([math.nan, INF, -INF, math.nan], device=device)[:, None]
    dirty = torch.where(mask[..., None], logits, garbage[..., None])
    dirty_weight, dirty_old = (torch.where(mask, x, garbage) for x in (weight, old))
    want = ours(logits, targets, weight, mask=mask, old_token_logp=old)
    got = ours(dirty, torch.where(mask, targets, 10**9), dirty_weight, mask=mask, old_token_logp=dirty_old)
    assert identical(got, want) and (want[0] != 0).sum() == 3


def test_ignored_targets_do_not_count_even_where_masked():
    logits, targets, weight, mask = draw()
    mask[0, :4], weight[0, :4] = True, 2.0
    fewer = mask.clone()
    fewer[0, :3] = False
    targets[0, :3] = -100
    assert identical(ours(logits, targets, weight, mask=mask), ours(logits, targets.clamp(min=0), weight, mask=fewer))
    by_label = ours(logits, targets.masked_fill(~fewer, 5), weight, ignore_index=5)
    assert identical(by_label, ours(logits, targets.clamp(min=0), weight, mask=fewer & (targets != 5)))


def test_weight_zero_is_not_read():
    logits, targets, weight, mask = draw()
    mask[0, 0], weight[0, 0] = True, 0.0
    logits[0, 0] = -INF
    assert rlkern.masked_elbo(logits, targets, weight, mask=mask).isfinite().all()


def test_minus_inf_logits():
    logits, targets, weight, mask = draw(dtype=torch.float32)
    mask[2, 0], weight[2, 0] = True, 3.0
    forbidden = (targets[2, 0] + 1) % logits.shape[-1]
    logits[2, 0, forbidden] = -INF
    value, gradient = ours(logits, targets, weight, mask=mask)
    assert value.isfinite().all() and gradient.isfinite().all()
    assert gradient[2, 0, forbidden] == 0 and (gradient[2, 0] != 0).sum() == logits.shape[-1] - 1
    logits[2, 0, targets[2, 0]] = -INF
    value, _ = ours(logits, targets, weight, mask=mask)
    assert value[2] == -INF and value[[0, 1, 3]].isfinite().all()


def test_old_token_logp_keeps_the_digits():
    """Two policies that differ by 1e-4 in the logits, 512 tokens. The difference of two float32 sums is
    noise, the sum of the differences is not."""
    g = torch.Generator().manual_seed(0)
    old_logits = torch.randn(8, 512, 50, generator=g)
    logits = old_logits + 1e-4 * torch.randn(old_logits.shape, generator=g)
    targets, weight = torch.randint(0, 50, (8, 512), generator=g), torch.full((8,), 2.0)
    old_elbo, old = rlkern.masked_elbo(old_logits, targets, weight, return_token_logp=True)
    stored = 2 * (naive_token_logp(logits.double(), targets) - old.double()).sum(-1)
    by_token = (rlkern.masked_elbo(logits, targets, weight, old_token_logp=old).double() - stored).abs().max()
    exact = 2 * (naive_token_logp(logits.double(), targets) - naive_token_logp(old_logits.double(), targets)).sum(-1)
    by_sums = ((rlkern.masked_elbo(logits, targets, weight) - old_elbo).double() - exact).abs().max()
    assert by_token < 3e-5 and by_sums > 5 * by_token


def test_old_token_logp_is_the_difference():
    logits, targets, weight, mask = draw()
    old_logits = logits + 0.3 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(5), dtype=F64)
    old_elbo, old = rlkern.masked_elbo(old_logits, targets, weight, mask=mask, return_token_logp=True)
    torch.testing.assert_close(old, torch.where(mask, naive_token_logp(old_logits, targets), 0), rtol=1e-12, atol=1e-12)
    want = differentiate(lambda z: naive(z, targets, weight, mask) - old_elbo, logits, UPSTREAM)
    torch.testing.assert_close(ours(logits, targets, weight, mask=mask, old_token_logp=old), want, rtol=1e-11, atol=1e-11)


def test_a_sequence_has_the_same_bits_in_any_batch():
    logits, targets, weight, mask = draw(batch=6, length=40, dtype=torch.float32)
    dense = rlkern.masked_elbo(logits, targets, weight, mask=mask)
    (zp, yp, wp), seq_idx = pack(mask, logits, targets, weight)
    packed = rlkern.masked_elbo(zp, yp, wp, seq_idx=seq_idx, num_seqs=6)
    for b in range(6):
        assert rlkern.masked_elbo(logits[b : b + 1], targets[b : b + 1], weight[b : b + 1], mask=mask[b : b + 1])[0] == dense[b]
        own = seq_idx == b
        assert rlkern.masked_elbo(zp[own], yp[own], wp[own], seq_idx=torch.zeros(int(own.sum()), dtype=torch.long), num_seqs=1)[0] == packed[b]


def test_models_that_predict_the_next_token():
    """Dream: row k - 1 predicts token k."""
    logits, targets, weight, mask = draw()
    weight, mask = torch.where(mask, weight, 0), mask & (torch.arange(mask.shape[1]) > 0)
    shifted = torch.cat([logits[:, :1], logits[:, :-1]], 1)
    want = rlkern.masked_elbo(shifted, targets, weight, mask=mask)
    leaf = logits.clone().requires_grad_()
    got = rlkern.masked_elbo(leaf[:, :-1], targets[:, 1:], weight[:, 1:], mask=mask[:, 1:])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    got.sum().backward()
    assert (leaf.grad[:, -1] == 0).all() and (leaf.grad[:, :-1][mask[:, 1:]] != 0).all()
    moved = rlkern.masked_elbo(logits, rlkern.next_tokens(targets), rlkern.next_tokens(weight, 0), mask=rlkern.next_tokens(mask, False))
    assert torch.equal(moved, got)


def test_nothing_to_sum():
    def run(logits, *args, **options):
        leaf = logits.requires_grad_()
        ell = rlkern.masked_elbo(leaf, *args, **options)
        ell.sum().backward()
        assert leaf.grad.shape == leaf.shape and (leaf.grad == 0).all()
        return ell.tolist()

    ids = torch.zeros(0, dtype=torch.long)
    assert run(torch.randn(2, 0, 5), ids.view(2, 0), torch.zeros(2, 0)) == [0, 0]
    assert run(torch.randn(0, 5), ids, torch.zeros(0), seq_idx=ids, num_seqs=3) == [0, 0, 0]
    assert run(torch.randn(0, 5), ids, torch.zeros(0), seq_idx=ids, num_seqs=0) == []
    assert run(torch.randn(1, 3, 5), torch.full((1, 3), -100), torch.ones(1)) == [0]


def packing(**changes):
    return {"seq_idx": torch.tensor([0, 0, 1, 2]), "num_seqs": 3} | changes


@pytest.mark.parametrize(
    "shape, changes, error, words",
    [((2, 3, 5), {"weight": torch.ones(3)}, ValueError, r"weight must be \[B, S\], \[B\] or \[B, 1\], here \(2, 3\) or \(2,\) or \(2, 1\)"),
     ((2, 3, 5), {"weight": torch.ones(2, 3).long()}, TypeError, r"weight must be a float tensor \[B, S\], \[B\] or \[B, 1\], got torch.int64"),
     ((2, 3, 5), {"weight": torch.tensor([1.0, -1.0])}, ValueError, "finite and not negative wherever mask counts, got -1"),
     ((2, 3, 5), {"weight": 1 / torch.tensor([1.0, 0.0])}, ValueError, "got inf .1/t needs t > 0"),
     ((2, 3, 5), {"weight": torch.tensor([1.0, math.nan])}, ValueError, "got nan"),
     ((2, 3, 5), {"weight": torch.ones(2, requires_grad=True)}, ValueError, "weight must not require grad"),
     ((2, 3, 5), {"targets": torch.zeros(2, 3, 2, dtype=torch.long)}, ValueError, r"targets must be \(2, 3\)"),
     ((2, 3, 5), {"targets": torch.full((2, 3), 5)}, IndexError, "out of range for 5 logits"),
     ((2, 3, 5), {"mask": torch.ones(2, 2)}, ValueError, r"mask must be \(2, 3\)"),
     ((2, 3, 5), {"num_seqs": 2}, ValueError, "num_seqs belongs to packed rows"),
     ((2, 3, 5), {"old_token_logp": torch.zeros(2)}, ValueError, r"old_token_logp must have the shape of targets \(2, 3\)"),
     ((2, 3, 5), {"old_token_logp": 0.0}, TypeError, "old_token_logp must be a float tensor"),
     ((2, 3, 5), {"temperature": 0.0}, ValueError, "temperature must be positive"),
     ((2, 3, 5), {"ignore_index": "-100"}, TypeError, "ignore_index must be an int, got '-100'"),
     ((4, 5), {}, ValueError, r"logits must be \[B, S, V\], or \[N, V\] with seq_idx="),
     ((4, 5), {"seq_idx": torch.zeros(4, dtype=torch.long)}, TypeError, "packed rows need num_seqs="),
     ((4, 5), packing(num_seqs=3.0), TypeError, "num_seqs must be an int, got 3.0"),
     ((4, 5), packing(num_seqs=2), ValueError, r"seq_idx must be in \[0, 2\), got 0 to 2"),
     ((4, 5), packing(num_seqs=0), ValueError, "num_seqs must count the sequences of 4 packed rows, got 0"),
     ((4, 5), packing(seq_idx=torch.tensor([0, 1, 0, 2])), ValueError, "seq_idx must be sorted"),
     ((4, 5), packing(seq_idx=torch.tensor([-1, 0, 1, 2])), ValueError, r"seq_idx must be in \[0, 3\), got -1"),
     ((4, 5), packing(seq_idx=torch.zeros(4)), TypeError, "seq_idx must be an integer tensor"),
     ((4, 5), packing(seq_idx=torch.zeros(3, dtype=torch.long)), ValueError, r"seq_idx must be \(4,\) for logits \(4, 5\), got \(3,\)"),
     ((4, 5), packing(weight=torch.ones(3)), ValueError, r"weight must be \[N\], here \(4,\) for logits \(4, 5\)")],
)  # fmt: skip
def test_errors(shape, changes, error, words):
    arguments = {"targets": torch.zeros(shape[:-1], dtype=torch.long), "weight": torch.ones(shape[:-1])} | changes
    with pytest.raises(error, match=words):
        rlkern.masked_elbo(torch.randn(shape), **arguments)
