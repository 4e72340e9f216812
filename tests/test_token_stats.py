"""token_stats on every backend against float64: dtypes, shapes, strides, options, hard inputs."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import FIELDS, INF, check, check_confident, check_undefined, draw, eager, expected, ids, run, upstream
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rlkern
from rlkern import backends
from rlkern.backends import reference

TILED = 9001  # more than two tiles of every backend, odd
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "sum_sq": {"with_sum_sq": True, "temperature": 1.7},
    "min_p": {"min_p": 0.05},
    "min_prob": {"min_prob": 0.02, "temperature": 1.3},
    "all": {"with_sum_sq": True, "min_p": 0.3, "temperature": 0.8},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 17, 1000, TILED])
def test_values_and_gradients(backend, device, vocab, dtype, options):
    check(draw(2, 3, vocab, dtype=dtype, device=device), ids(vocab, 2, 3, device=device), **options)


@pytest.mark.parametrize("only", ["logp", "entropy", "logsumexp", "sum_sq_prob", "kept_logmass"])
def test_each_gradient_alone(backend, device, only):
    check(draw(5, 300, device=device), ids(300, 5, device=device), only=[only], with_sum_sq=True, min_p=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_rows_sum_to_zero(backend, device, dtype):
    for only in ("logp", "entropy", "sum_sq_prob", "kept_logmass"):
        _, d = run(draw(4, 501, device=device), ids(501, 4, device=device), only=[only], with_sum_sq=True, min_p=0.1)
        assert d.double().sum(-1).abs().max() < 1e-6 * d.double().abs().sum(-1).max(), only


def test_per_row_temperature(backend, device):
    t = torch.tensor([[0.5, 1.0, 2.0], [0.9, 1.1, 30.0]], device=device)
    check(draw(2, 3, 700, device=device), ids(700, 2, 3, device=device), temperature=t, min_p=0.1)
    check(draw(2, 3, 700, device=device, dtype=torch.float64), ids(700, 2, 3, device=device), temperature=t.double(), with_sum_sq=True)
    check(draw(2, 3, 700, device=device), ids(700, 2, 3, device=device), temperature=t.to(torch.bfloat16))
    scalar, _ = run(draw(2, 700, device=device), ids(700, 2, device=device), temperature=torch.tensor(0.5))
    number, _ = run(draw(2, 700, device=device), ids(700, 2, device=device), temperature=0.5)
    assert torch.equal(scalar["logp"], number["logp"])


@pytest.mark.parametrize("n_targets", [1, 3, 20])
def test_several_targets_a_row(backend, device, n_targets):
    x, y = draw(2, 3, 1000, device=device), ids(1000, 2, 3, n_targets, device=device)
    y[0, 0] = y[0, 0, 0].clone()  # the same target many times
    y[0, 1, -1] = -100  # one entry ignored
    y[1, 2] = -100  # a whole row ignored
    check(x, y, temperature=0.7, with_sum_sq=True, min_p=0.2)


MANY = (1, 2, 8, 9, 16, 17, 33, 300)  # across the numbers from which backends go about it in other ways


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_many_targets_a_row(backend, device, dtype):
    """Repeated targets add up, ignored ones add nothing, rows start anywhere, even K works in place."""
    for k in MANY:
        logits, y = draw(2, 3, 402, dtype=dtype, device=device)[:, 1:, :-1], ids(401, 2, 2, k, device=device, seed=k)
        y[..., 3::3] = y[..., :1]
        y[0, 1, 1::2] = -100
        y[1, 0] = -100
        check(logits, y, only=["logp", "entropy"], seed=k, inplace_backward=k % 2 == 0)


def test_many_targets_of_a_confident_row_keep_relative_accuracy(backend, device):
    """1 - p at the maximum is 9e-7; it multiplies what all entries of this target come to."""
    gap, vocab = 20.0, 430
    x = torch.full((1, vocab), -gap, device=device)
    x[0, 77] = 0.0
    rest = (vocab - 1) * math.exp(-gap)
    for k in (8, 20, 300):
        y = torch.full((1, k), 77, device=device)
        y[0, 1::4] = 3
        elsewhere = (y == 3).sum().item()
        for targets, others, rel in ((y, elsewhere, 1e-5), (torch.full_like(y, 77), 0, 2e-5)):
            leaf = x.clone().requires_grad_()
            rlkern.token_stats(leaf, targets).logp.sum().backward()
            assert leaf.grad[0, 77].item() == pytest.approx((k - others) * rest / (1 + rest) - others / (1 + rest), rel=rel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("vocab", [17, 1000, TILED])
def test_the_tail_of_the_targets(backend, device, vocab, dtype):
    """Repeated targets count once, ignored ones not at all, rows start anywhere."""
    whole = draw(2, 3, vocab + 2, dtype=dtype, device=device)
    for k in (1, 3, 9, 17):
        x, y = whole[..., 1:-1], ids(vocab, 2, 3, k, device=device, seed=k)
        y[0, 0] = torch.arange(k) % vocab  # a run: in one tile
        y[..., 2::3] = y[..., :1]
        y[0, 1, 1::2] = -100
        y[1, 2] = -100
        check(x, y, with_tail=True, seed=k, inplace_backward=k == 9)
        if k in (3, 17):
            check(x, y, with_tail=True, with_sum_sq=True, temperature=0.7)


@pytest.mark.parametrize("k", [1, 8, 20])
def test_the_gradient_of_a_tail_alone(backend, device, k):
    x, y = draw(3, 4, 300, device=device), ids(300, 3, 4, k, device=device)
    x[..., 7] = 9.0  # in the tail or a target: of most of the mass
    y[0, :, 0], y[1:][y[1:] == 7] = 7, 8
    mask = torch.ones(3, 4, device=device)
    mask[2, 1] = 0
    for only in (["tail_logmass"], ["logp", "tail_logmass"], ["entropy", "tail_logmass"]):
        check(x, y, with_tail=True, only=only, mask=mask)
    _, d = run(x, y, with_tail=True, only=["tail_logmass"])
    assert d.double().sum(-1).abs().max() < 1e-6 * d.double().abs().sum(-1).max()
    one, _ = run(x, y[..., 0], with_tail=True)
    several, _ = run(x, y[..., :1], with_tail=True)
    assert torch.equal(one["tail_logmass"], several["tail_logmass"]) and torch.equal(one["logp"], several["logp"].squeeze(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_small_tail_keeps_its_relative_accuracy(backend, device, dtype):
    """A mass of 1e-9 and less, and listed masses as small: 1 - sum has none of it."""
    vocab, listed = 5000, [3, 2500, 4999]
    for gap in (29.25, 45.5, -29.25, -14.75):
        x = torch.full((1, vocab), -max(gap, 0.0), dtype=dtype, device=device)
        x[0, listed] = min(gap, 0.0)
        leaf = x.requires_grad_()
        mass = rlkern.token_stats(leaf, torch.tensor([listed + [3]], device=device), with_tail=True).tail_logmass
        ours, rest = 3.0, (vocab - 3) * math.exp(-gap)
        want = math.log(rest / (ours + rest)) if gap > 0 else -math.log1p(ours / rest)
        assert math.exp(mass.item()) == pytest.approx(math.exp(want), rel=1e-4, abs=0) and mass.item() == pytest.approx(want, rel=1e-5, abs=0)
        mass.backward()
        p, inside = 1 / (ours + rest), ours / (ours + rest)
        d = leaf.grad[0].double().cpu()
        rel = 1e-4 if dtype == torch.float32 else 2**-7
        assert d[listed].tolist() == pytest.approx([-p] * 3, rel=rel, abs=0)
        assert d[77].item() == pytest.approx(inside / (vocab - 3), rel=rel, abs=0)


def test_the_slopes_of_a_vanishing_tail_are_finite(backend, device):
    """Below e^-88.7 there is no tail in float32: 1 / e^-89 is infinite there."""
    for gap in (86.0, 90.0, 103.0):  # subnormal exponentials, from 88 on, may be taken for 0
        leaf = torch.tensor([[0.0, -gap, -gap - 1]], device=device, requires_grad=True)
        mass = rlkern.token_stats(leaf, torch.tensor([[0]], device=device), with_tail=True).tail_logmass
        mass.sum().backward()
        want = [-1.0, 0.731, 0.269] if gap == 86 else [0.0] * 3
        assert leaf.grad[0].tolist() == pytest.approx(want, rel=1e-3) and mass.isfinite().item() == (gap == 86)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nothing_left_for_the_tail(backend, device, dtype):
    """Every id listed, or all others at -inf: a constant. The lowest number that frameworks mask with too."""
    x = draw(3, 12, dtype=dtype, device=device)
    x[1, 5:] = -INF
    x[2, 5:] = torch.finfo(dtype).min
    y = torch.arange(12, device=device).expand(3, 12).clone()
    y[1:, 5:] = -100
    leaf = x.requires_grad_()
    stats = rlkern.token_stats(leaf, y, with_tail=True)
    assert (stats.tail_logmass == -INF).all() and stats.kept_logmass is None and stats.target_kept is None
    stats.tail_logmass.backward(torch.ones(3, dtype=dtype, device=device))
    assert (leaf.grad == 0).all()


def test_a_tail_of_rows_without_a_probability(backend, device):
    x, y = draw(5, 300, device=device), ids(300, 5, 3, device=device)
    x[1] = -INF
    x[2, 150], x[3, 299] = math.nan, INF
    assert rlkern.token_stats(x, y, with_tail=True).tail_logmass.isnan().tolist() == [False, True, True, True, False]
    x[:, 40:] = -INF  # tiles without any
    y %= 40
    x[1:4] = x[0]
    check(x, y, with_tail=True)


def test_ignore_index_may_be_an_id_of_the_tail(backend, device):
    x, y = draw(4, 50, device=device), ids(50, 4, 5, device=device)
    y[:, 2] = 7
    y[3] = 7  # a skipped row
    check(x, y, ignore_index=7, with_tail=True, only=["tail_logmass"])


def test_a_tail_and_a_kept_set_do_not_go_together():
    x, y = draw(2, 5), ids(5, 2)
    for kept in ({"min_p": 0.1}, {"min_prob": 0.2}):
        with pytest.raises(ValueError, match=r"with_tail=True takes no kept set: expected min_p and min_prob None, got"):
            rlkern.token_stats(x, y, with_tail=True, **kept)
    with pytest.raises(TypeError, match="with_tail must be True or False, got 'yes'"):
        rlkern.token_stats(x, y, with_tail="yes")


def test_the_reference_holds_nothing_larger_than_the_row():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
            return out

    x, y, state = draw(1, 3, 1000), ids(1000, 3, 600), torch.zeros(3, 606)
    with Largest() as largest:
        reference.token_stats_backward(x, y, None, 1.0, -100, 0, state, (torch.ones(3, 600), None, None, None, None), torch.empty_like(x))
    assert 3 * 1000 <= largest.numel <= 3 * (1000 + 1)


def test_one_of_many_targets_out_of_range_makes_its_row_nan(backend, device):
    """Below the operators, which raise on a CPU."""
    module = backends.select(torch.device(device))
    for k in (8, 20):
        x, y = draw(1, 3, 50, device=device), ids(50, 3, k, device=device)
        logp, entropy, lse, state = (torch.empty(shape, device=device) for shape in ((3, k), 3, 3, (3, 6 + k)))
        module.token_stats_forward(x, y, None, 1.0, -100, 0, 0.0, (logp, entropy, lse, None, None, state))
        for wrong in (50, -1, 2**40):
            bad, out = y.clone(), torch.full_like(x, INF)
            bad[1, 5] = wrong
            module.token_stats_backward(x, bad, None, 1.0, -100, 0, state, (torch.ones_like(logp), None, None, None, None), out)
            assert out.isnan().all(-1).tolist() == [[False, True, False]] and out[:, ::2].isfinite().all(), (k, wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_entropy_everything_else_has_the_same_bits(backend, device, dtype):
    x, y = draw(6, TILED, device=device, dtype=dtype), ids(TILED, 6, 2, device=device)
    mask = torch.tensor([1, 0, 1, 1, 1, 1], device=device)
    options = {"mask": mask, "temperature": 0.7, "min_p": 0.2, "with_sum_sq": True}
    every = [name for name in FIELDS if name not in ("entropy", "tail_logmass")]
    got, d_got = run(x, y, only=every, with_entropy=False, **options)
    want, d_want = run(x, y, only=every, **options)
    assert list(got) == every
    assert all(torch.equal(got[name], want[name]) for name in every) and torch.equal(d_got, d_want)
    assert torch.equal(rlkern.token_logprobs(x, y, mask=mask), rlkern.token_stats(x, y, mask=mask).logp)


def test_mask_and_ignore_index(backend, device):
    x, y = draw(3, 4, 300, device=device), ids(300, 3, 4, device=device)
    y[0, 0], y[2, 1] = 7, 7
    mask = torch.ones(3, 4, device=device)
    mask[1], mask[2, 3] = 0, 0
    for m in (mask, mask.bool(), mask.long()):
        check(x, y, mask=m, ignore_index=7, min_p=0.1, with_sum_sq=True)


def test_skipped_rows_are_not_read(backend, device):
    x, y = draw(4, 300, device=device), ids(300, 4, device=device)
    want, d_want = run(x, y)
    x[1], x[2] = math.nan, -INF
    y[1] = -100
    mask = torch.tensor([1, 1, 0, 1], device=device)
    got, d = run(x, y, mask=mask, with_sum_sq=True, min_p=0.5)
    for t in got.values():
        assert (t[1:3] == 0).all()
    assert (d[1:3] == 0).all() and not d.isnan().any()
    assert torch.equal(got["logp"][[0, 3]], want["logp"][[0, 3]])
    with rlkern.use_backend("reference" if device == "cpu" else backend):
        garbage = y.clone()
        garbage[2] = 10**9  # the target of a masked row is not looked at either
        rlkern.token_stats(x, garbage, mask=mask)


def test_rows_without_upstream_gradient_are_zero(backend, device):
    x, y = draw(4, 300, device=device).requires_grad_(), ids(300, 4, device=device)
    stats = rlkern.token_stats(x, y)
    (stats.logp * torch.tensor([1.0, 0, 0, 1], device=device)).sum().backward()
    assert (x.grad[1:3] == 0).all() and (x.grad[0] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [64, 301, TILED])
def test_slices_are_not_copied(backend, device, dtype, vocab, monkeypatch):
    whole = draw(2, 4, vocab, dtype=dtype, device=device)
    views = [whole[:, :-1], whole[:, 1:], whole[::2, 1:3], whole[:, :, : vocab - 3], whole[:, :, 5:], whole.transpose(0, 1)]
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t, real=torch.Tensor.contiguous: real(t) if t.numel() < 100 else pytest.fail("copied"))
    for x in views:
        check(x, ids(x.shape[-1], *x.shape[:-1], device=device))


def test_gradients_through_slices(backend, device):
    for view in (lambda t: t[:, :-1], lambda t: t[1:, ::2], lambda t: t[..., 3:], lambda t: t.transpose(0, 1), lambda t: t.transpose(1, 2)):
        leaf = draw(3, 5, 37, device=device).requires_grad_()  # odd, and few: the transposed view has a row for each
        x = view(leaf)
        y = ids(x.shape[-1], *x.shape[:-1], device=device)
        stats = rlkern.token_stats(x, y, temperature=0.9)
        (stats.logp.sum() + 0.3 * stats.entropy.sum()).backward()
        double = leaf.detach().double().cpu().requires_grad_()
        logp, entropy = eager(view(double), y.cpu(), 0.9)
        (logp.sum() + 0.3 * entropy.sum()).backward()
        torch.testing.assert_close(leaf.grad.double().cpu(), double.grad, rtol=1e-5, atol=1e-6)


def test_any_number_of_leading_dimensions(backend, device):
    x = draw(2, 3, 2, 2, 50, device=device)
    check(x, ids(50, 2, 3, 2, 2, device=device))
    check(x[:, 1:, :, 0], ids(50, 2, 2, 2, device=device))
    check(x.permute(2, 0, 3, 1, 4), ids(50, 2, 2, 2, 3, device=device))
    check(x[0, 0, 0, 0], ids(50, device=device))


def test_expanded_logits(backend, device):
    x = draw(1, 40, device=device)
    stats = rlkern.token_stats(x.expand(3, 40), ids(40, 1, device=device).expand(3))
    assert torch.equal(stats.logp, stats.logp[:1].expand(3))


MINUS_INF = {
    "first tile": (slice(0, 4200), 4500),  # where, and a target elsewhere
    "last tile": (slice(TILED - 4200, TILED), 4500),
    "one entry": (slice(17, 18), 4500),
    "all but the target": (slice(1, TILED), 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("where", "target"), MINUS_INF.values(), ids=MINUS_INF.keys())
def test_minus_inf_logits(backend, device, where, target, dtype):
    x, y = draw(4, TILED, dtype=dtype, device=device), ids(TILED, 4, device=device)
    x[:, where] = -INF
    y = torch.where(x.gather(-1, y[:, None]).squeeze(-1) == -INF, target, y)
    check(x, y, with_sum_sq=True, min_p=0.1)
    _, d = run(x, y, with_sum_sq=True)
    assert (d[x == -INF] == 0).all()


@pytest.mark.parametrize("offset", [1e4, -1e4, 3e38, -1e30, -3e38])
def test_large_common_offset(backend, device, offset):
    x = torch.full((3, 5000), offset, device=device)
    x[:, :10] += draw(3, 10, device=device)
    y = ids(5000, 3, device=device)
    got, d = run(x, y, only=["logp", "entropy"])
    base = x[:, -1:].double()  # the difference is exact, a log-sum-exp around 3e38 is not, not even in float64
    want, d_want = expected(x.double() - base, y, only=["logp", "entropy"])
    for name in ("logp", "entropy"):
        torch.testing.assert_close(got[name].double().cpu(), want[name], rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(got["logsumexp"].double().cpu(), want["logsumexp"] + base.squeeze(-1).cpu(), rtol=1e-7, atol=1e-5)
    torch.testing.assert_close(d.double().cpu(), d_want, rtol=1e-5, atol=1e-8)


def test_huge_spread(backend, device):
    x = draw(3, 5000, device=device, scale=1e4)
    check(x, x.argmax(-1))
    check(draw(3, 5000, device=device, scale=30.0, dtype=torch.bfloat16), ids(5000, 3, device=device))


@pytest.mark.parametrize("at", [0, 4095, 4096, TILED - 1])
@pytest.mark.parametrize("gap", [15.0, 16.2, 21.0, 24.0, 30.0, 60.0])
def test_confident_tokens_keep_relative_accuracy(backend, device, gap, at):
    check_confident(TILED, [at], gap, device=device)


def test_confident_kept_mass(backend, device):
    x = torch.full((1, 1000), -25.0, device=device)
    x[0, 3] = 0.0
    got, _ = run(x, torch.tensor([3], device=device), min_p=0.5)
    want, _ = expected(x, torch.tensor([3]), min_p=0.5)
    torch.testing.assert_close(got["kept_logmass"].double().cpu(), want["kept_logmass"], rtol=1e-5, atol=0.0)


def test_ties_at_the_maximum(backend, device):
    x = torch.full((3, TILED), -50.0, device=device)
    x[0, [1, 5000]] = 3.0
    x[1, [4, 5, 6, 8999]] = 3.0
    x[2] = 0.0
    check(x, torch.tensor([5000, 4, 77], device=device), with_sum_sq=True, min_p=1.0)


def test_rising_and_falling_maxima(backend, device):
    ramp = torch.linspace(-40, 40, TILED, device=device)
    check(torch.stack([ramp, ramp.flip(0), ramp.abs()]), ids(TILED, 3, device=device), with_sum_sq=True)


def test_undefined_rows_are_nan_not_something_else(backend, device):
    check_undefined(300, device)


def test_target_at_minus_inf(backend, device):
    x = draw(2, 50, device=device)
    x[0, 9] = -INF
    y = torch.tensor([9, 9], device=device)
    got, d = run(x, y, only=["logp"])
    _, d_want = expected(x, y, only=["logp"])
    assert got["logp"][0] == -INF and torch.isfinite(got["entropy"]).all()
    torch.testing.assert_close(d.double().cpu(), d_want, rtol=1e-5, atol=1e-6)


def test_proxy_logp(backend, device):
    x, y = draw(40, 50, device=device, scale=2), ids(50, 40, device=device)
    stats = rlkern.token_stats(x, y, min_p=0.2)
    log_p = torch.log_softmax(x.double().cpu(), -1)
    p = log_p.exp()
    q = torch.where(p >= 0.2 * p.amax(-1, keepdim=True), p, 0)
    want = (q / q.sum(-1, keepdim=True)).log().gather(-1, y.cpu()[:, None]).squeeze(-1)
    assert want.isinf().any() and want.isfinite().any()
    torch.testing.assert_close(stats.proxy_logp.double().cpu(), want, rtol=1e-5, atol=1e-5)
    kl = (torch.where(q > 0, q / q.sum(-1, keepdim=True), 0) * (torch.log(q / q.sum(-1, keepdim=True)) - log_p).nan_to_num(neginf=0)).sum(-1)
    torch.testing.assert_close(-stats.kept_logmass.double().cpu(), kl, rtol=1e-5, atol=1e-6)


def test_proxy_logp_gradient_and_shape(backend, device):
    x = draw(30, 50, device=device, scale=2).requires_grad_()
    y = ids(50, 30, 4, device=device)
    proxy = rlkern.token_stats(x, y, min_p=0.3).proxy_logp
    assert proxy.shape == (30, 4)
    proxy[proxy.isfinite()].sum().backward()
    assert x.grad.isfinite().all() and (x.grad != 0).any()
    with pytest.raises(ValueError, match="min_p"):
        _ = rlkern.token_stats(x, y).proxy_logp


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_empty_kept_set(backend, device, dtype):
    x, y = torch.zeros(2, 100, dtype=dtype, device=device, requires_grad=True), ids(100, 2, device=device)
    stats = rlkern.token_stats(x, y, min_prob=0.5)
    assert (stats.kept_logmass == -INF).all() and (stats.proxy_logp == -INF).all()
    stats.kept_logmass.backward(torch.ones(2, dtype=dtype, device=device))
    assert (x.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [0.1, 3.0, 12.0])
def test_never_worse_than_eager(backend, device, dtype, scale):
    x, y = draw(16, 3000, dtype=dtype, scale=scale), ids(3000, 16)
    truth = expected(x, y)[0]
    logp, entropy = eager(x, y)
    got, d = run(x.to(device), y.to(device), only=["logp"])
    for name, rival in (("logp", logp), ("entropy", entropy)):
        ours = (got[name].double().cpu() - truth[name]).abs().max()
        theirs = (rival.double() - truth[name]).abs().max()
        assert ours <= theirs + 1e-7 * truth[name].abs().max(), name
    leaf = x.clone().requires_grad_()
    d_truth = expected(x, y, only=["logp"])[1]
    eager(leaf, y)[0].backward(upstream([truth["logp"]])[0].to(dtype))
    # Triton's interpreter truncates where hardware rounds to the nearest bfloat16: up to 4 times the error.
    truncates = 4 if backend == "triton" and device == "cpu" and dtype == torch.bfloat16 else 1.01
    assert (d.double().cpu() - d_truth).norm() <= (leaf.grad.double() - d_truth).norm() * truncates


def test_backends_continue_each_other():
    """The row state is one format: a backward of any backend takes the forward of any other."""
    x, y = draw(3, 500), ids(500, 3, 2)
    _, want = expected(x, y, min_p=0.1, with_sum_sq=True)
    names = ["reference"] + [n for n in ("native",) if not isinstance(backends.load(n), Exception)]
    names += ["triton"] if not torch.cuda.is_available() else []
    for forward, backward in itertools.product(names, names):
        leaf = x.clone().requires_grad_()
        with rlkern.use_backend(forward):
            fields = rlkern.token_stats(leaf, y, min_p=0.1, with_sum_sq=True)[:5]
        with rlkern.use_backend(backward):
            torch.autograd.backward(fields, [g.float() for g in upstream(fields)])
        torch.testing.assert_close(leaf.grad.double(), want, rtol=1e-5, atol=1e-6)
        leaf = x.clone().requires_grad_()
        with rlkern.use_backend(forward):
            tail = rlkern.token_stats(leaf, y, with_tail=True).tail_logmass
        with rlkern.use_backend(backward):
            tail.sum().backward()
        p, ours = x.double().softmax(-1), torch.zeros_like(x).scatter_(-1, y, 1.0).double()
        inside = (p * ours).sum(-1, keepdim=True)
        torch.testing.assert_close(leaf.grad.double(), p * ((1 - ours) / (1 - inside) - 1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_in_any_batch(backend, device, dtype):
    x, y = draw(7, 5001, dtype=dtype, device=device), ids(5001, 7, device=device)
    together = rlkern.token_stats(x, y)
    for i in (0, 3, 6):
        alone = rlkern.token_stats(x[i : i + 1], y[i : i + 1])
        assert torch.equal(alone.logp, together.logp[i : i + 1]) and torch.equal(alone.entropy, together.entropy[i : i + 1])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_drawn_inputs(backend, device, data):
    vocab = data.draw(st.integers(1, 400), "vocab")
    rows = data.draw(st.integers(1, 4), "rows")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]), "dtype")
    x = draw(rows, vocab, dtype=dtype, scale=data.draw(st.sampled_from([0.0, 1.0, 10.0])), seed=data.draw(st.integers(0, 99)), device=device)
    for _ in range(data.draw(st.integers(0, 3))):
        x[data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, vocab - 1))] = -INF
    x[:, 0] = 1.0  # no row of -inf alone
    y = ids(vocab, rows, device=device, seed=data.draw(st.integers(0, 99)))
    y = torch.where(x.gather(-1, y[:, None]).squeeze(-1) == -INF, 0, y)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)), device=device)
    temperature = data.draw(st.sampled_from([0.3, 1.0, 2.5]))
    kept = data.draw(st.sampled_from([{}, {"min_p": 0.11}]))
    check(x, y, mask=mask, temperature=temperature, **kept, with_sum_sq=data.draw(st.booleans()))
    stats = rlkern.token_stats(x, y, mask=mask, temperature=temperature)
    assert (stats.logp <= 0).all() and (stats.entropy >= 0).all() and (stats.entropy <= math.log(vocab) * (1 + 1e-6) + 1e-6).all()


def test_token_logprobs_and_entropy_from_logits(backend, device):
    x, y = draw(2, 3, 100, device=device).requires_grad_(), ids(100, 2, 3, device=device)
    double = x.detach().double().cpu().requires_grad_()
    logp, entropy = eager(double, y.cpu(), 0.7)
    torch.testing.assert_close(rlkern.token_logprobs(x, y, temperature=0.7).double().cpu(), logp, rtol=1e-5, atol=1e-5)
    got = rlkern.entropy_from_logits(x, temperature=0.7)
    torch.testing.assert_close(got.double().cpu(), entropy, rtol=1e-5, atol=1e-5)
    got.sum().backward()
    entropy.sum().backward()
    torch.testing.assert_close(x.grad.double().cpu(), double.grad, rtol=1e-5, atol=1e-6)


def test_float64_gradcheck(backend, device):
    x = draw(2, 7, dtype=torch.float64, device=device).requires_grad_()
    y = ids(7, 2, 2, device=device)

    assert torch.autograd.gradcheck(lambda x: rlkern.token_stats(x, y, temperature=0.8, min_p=0.2, with_sum_sq=True)[:5], (x,))
