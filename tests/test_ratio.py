"""The clipped ratio, the KL estimates and their metrics, in one pass or plain, against float64 by tokens."""

import importlib
import math

import pytest
import torch
from derivatives import tokens_of
from loss_battery import Operators

import rlkern
from rlkern.losses.aggregate import aggregate_terms
from rlkern.losses.arguments import policy_inputs
from rlkern.primitives.kl import kl_penalty
from rlkern.primitives.ratio import clipped_ratio
from rlkern.primitives.selection import fraction_count, select_bottom, select_fraction, selected_means

F64 = torch.float64
TOLERANCE = {torch.float32: {"rtol": 2e-5, "atol": 2e-6}, F64: {"rtol": 1e-11, "atol": 1e-12}}


def draw(n=50, dtype=F64, spread=0.5, device="cpu"):
    """[2, n]: ratios on both sides of every bound, some far beyond; advantages of both signs and 0; a token
    that the policy forbids."""
    g = torch.Generator().manual_seed(n)
    logp = -0.05 - 3 * torch.rand(2, n, generator=g, dtype=F64)
    old = logp + spread * torch.randn(2, n, generator=g, dtype=F64)
    advantages = torch.randn(2, n, generator=g, dtype=F64)
    mask = torch.rand(2, n, generator=g) < 0.8
    mask[0, 0] = True
    advantages[:, 1::7] = 0
    old[1, 2::11] -= 3
    return (*(t.to(device, dtype) for t in (logp, old, advantages)), mask.to(device))


def expected_terms(logp, old, advantages, mask, unclipped, low, high, dual, clamp):
    """Of every token: value, slope, free. The values are max and min as the papers print them."""
    values, slopes, free = torch.zeros_like(logp), torch.zeros_like(logp), torch.zeros_like(mask)
    for i in tokens_of(mask):
        x, a = logp[i].clone().requires_grad_(), advantages[i].item()
        r = torch.clamp(x - old[i], -(clamp or math.inf), clamp or 80).exp()
        clips = low is not None and ((a < 0 and r < 1 - low) or (a > 0 and r > 1 + high))
        value = -a * r
        if low is not None and not unclipped[i]:
            value = torch.maximum(value, -a * r.clamp(1 - low, 1 + high))
        if dual is not None and a < 0 and not unclipped[i]:
            value = torch.clamp(value, max=-a * dual)
        values[i], slopes[i] = value.detach(), torch.autograd.grad(value, x)[0]
        free[i] = not clips
    return values, slopes, free


def expected_metrics(logp, old, advantages, mask, low, high, dual, clamp):
    d, a = (logp - old)[mask], advantages[mask]
    r = torch.clamp(d, -(clamp or math.inf), clamp or 80).exp()
    full = d.exp()
    metrics = {
        "approx_kl_k1": -d.mean(), "approx_kl_k3": (torch.expm1(d) - d).mean(), "ratio_max": full.max(), "ratio_min": full.min(),
        "effective_sample_size": full.sum() ** 2 / (len(d) * (full**2).sum()), "abs_log_ratio": d.abs().mean(),
        "tokens": torch.tensor(float(len(d)), dtype=F64), "log_mean_ratio": full.mean().log(),
    }  # fmt: skip
    if low is not None:
        metrics["clip_fraction_low"] = ((a < 0) & (r < 1 - low)).double().mean()
        metrics["clip_fraction_high"] = ((a > 0) & (r > 1 + high)).double().mean()
    if dual is not None:
        metrics["clip_fraction_dual"] = ((a < 0) & (r > dual)).double().mean()
    return metrics


def terms_of(terms, leaf):
    """(values, slopes)"""
    values = terms.tensor()
    return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]


def small_blocks(backend, monkeypatch):
    if backend == "triton":
        for name in ("BLOCK", "MOST_PROGRAMS"):
            monkeypatch.setattr(importlib.import_module("rlkern.triton_kernels.ratio"), name, 4)


CLIPS = {"ppo": (0.2, 0.2, None, None), "dual": (0.1, 0.3, 1.5, 2.0), "free": (None, None, None, None), "clamp": (1.0, 9.0, None, 0.4)}


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("name", CLIPS)
def test_ratio_terms(backend, device, monkeypatch, name, dtype):
    small_blocks(backend, monkeypatch)
    low, high, dual, clamp = CLIPS[name]
    logp, old, advantages, mask = draw(17, dtype, device=device)
    unclipped = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)).to(device) < 0.3
    leaf = logp.clone().requires_grad_()
    x = policy_inputs(leaf, old, advantages, mask, log_ratio_clamp=clamp)
    wide = [t.double().cpu() for t in (logp, old, advantages)]
    for given in (None, unclipped):
        out = clipped_ratio(x, low, high, dual, unclipped=given, with_distance=True)
        spared = (torch.zeros_like(mask) if given is None else given).cpu()
        values, slopes, free = expected_terms(*wide, mask.cpu(), spared, low, high, dual, clamp)
        got = terms_of(out.terms, leaf)
        torch.testing.assert_close([t.double().cpu() for t in got], [values, slopes], **TOLERANCE[dtype])
        assert torch.equal(out.free.cpu(), free) and out.tokens.item() == mask.sum().item()
        metrics = expected_metrics(*wide, mask.cpu(), low, high, dual, clamp)
        assert out.metrics.keys() == metrics.keys()
        for key, value in metrics.items():
            assert out.metrics[key].dtype == dtype
            torch.testing.assert_close(out.metrics[key].double().cpu(), value, **TOLERANCE[dtype], msg=lambda m, key=key: f"{key}: {m}")
    clipped = expected_terms(*wide, mask.cpu(), spared & False, low, high, dual, clamp)
    assert name in ("free", "clamp") or not torch.equal(values, clipped[0])  # `unclipped` matters


def test_a_log_ratio_that_is_given(backend, device):
    """Its own value, one token's slope, and no bound from below."""
    logp, _, advantages, mask = draw(17, device=device)
    given = torch.linspace(-3, 1, 17, dtype=F64, device=device).expand(2, -1)
    leaf = logp.clone().requires_grad_()
    out = clipped_ratio(policy_inputs(leaf, None, advantages, mask, log_ratio_clamp=0.7), 0.9, 0.5, log_ratio=given)
    r, a = given.clamp(max=0.7).exp(), advantages
    clipped = torch.where(a < 0, r < 0.1, (a > 0) & (r > 1.5)) & mask
    values = torch.where(mask, torch.maximum(-a * r, -a * r.clamp(0.1, 1.5)), 0)
    torch.testing.assert_close(terms_of(out.terms, leaf), (values, torch.where(clipped | (given > 0.7), 0, values)))
    assert clipped.any() and out.metrics["clip_fraction_high"].item() == pytest.approx(((a > 0) & clipped).sum().item() / mask.sum().item())


def test_bounds_let_the_gradient_through(backend, device):
    """At a bound, not beyond it: with clip_low = clip_high = 0 on-policy tokens learn."""
    logp = torch.full((1, 3), -1.0, device=device, requires_grad=True)
    x = policy_inputs(logp, None, torch.tensor([[1.0, -2.0, 0.5]], device=device), torch.ones(1, 3, device=device))
    values, slopes = terms_of(clipped_ratio(x, 0.0, 0.0).terms, logp)
    assert values.tolist() == slopes.tolist() == [[-1.0, 2.0, -0.5]]


def test_far_ratios(backend, device):
    """exp overflows or vanishes, in float32 and then in float64. No slope is NaN, and there is an effective
    sample size all the same."""
    for center in (90.0, -120.0, 500.0, -600.0):
        d = torch.tensor([[center, center + 1, center - 2]], dtype=F64, device=device)
        logp = (d - 700).requires_grad_()
        x = policy_inputs(logp, torch.full_like(d, -700.0), torch.tensor([[1.0, -1.0, 0.0]], device=device), torch.ones_like(d))
        out = clipped_ratio(x, 0.2, 0.2)
        values, slopes = terms_of(out.terms, logp)
        assert values.isfinite().all() and slopes.isfinite().all() and slopes[0, 2] == 0
        assert center < 0 or (values[0, 1] == math.exp(80) and slopes[0, 1] == 0)  # the exponent stops there
        w = (d - center).exp()
        torch.testing.assert_close(out.metrics["effective_sample_size"], w.sum() ** 2 / (3 * (w**2).sum()), rtol=1e-11, atol=0)
        torch.testing.assert_close(out.metrics["log_mean_ratio"], center + w.mean().log(), rtol=1e-12, atol=0)


def test_small_ratios_keep_their_kl(backend, device):
    """r - 1 - log r in float32 is lost in the rounding of r where r is near 1."""
    d = torch.full((1, 40), 1e-3, device=device)
    x = policy_inputs(torch.zeros_like(d), -d, torch.ones(1, device=device), torch.ones_like(d))
    torch.testing.assert_close(clipped_ratio(x, 0.2, 0.2).metrics["approx_kl_k3"].item(), math.expm1(1e-3) - 1e-3, rtol=1e-3, atol=0)
    terms = kl_penalty(x.logp, d, torch.ones_like(d, dtype=torch.bool), "k3", None)
    torch.testing.assert_close(terms.values, torch.full_like(d, math.expm1(1e-3) - 1e-3), rtol=1e-3, atol=0)


def test_forbidden_masked_and_no_tokens(backend, device):
    logp = torch.tensor([[-math.inf, -1.0, math.nan, -2.0]], device=device, requires_grad=True)
    old = torch.tensor([[-3.0, -1.5, -math.inf, -2.0]], device=device)
    advantages, mask = torch.tensor([[1.0, 1.0, math.nan, -1.0]], device=device), torch.tensor([[1, 1, 0, 1]], device=device)
    x = policy_inputs(logp, old, advantages, mask)
    out = clipped_ratio(x, 0.2, 0.2)
    values, slopes = terms_of(out.terms, logp)
    assert out.free.tolist() == [[False, False, False, True]] and out.metrics["ratio_min"] == 0
    torch.testing.assert_close(values.cpu(), torch.tensor([[0, -1.2, 0, 1]]))
    torch.testing.assert_close(slopes.cpu(), torch.tensor([[0.0, 0, 0, 1]]))
    for nothing in (policy_inputs(logp, old, advantages, mask * 0), policy_inputs(logp[:0], old[:0], advantages[:0], mask[:0])):
        out = clipped_ratio(nothing, 0.2, 0.2, 3.0, with_distance=True)
        assert [v.item() for v in out.metrics.values()] == [0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0]
        loss = aggregate_terms(out.terms, nothing.sequences, out.tokens)
        assert loss == 0 and (torch.autograd.grad(loss, nothing.logp)[0] == 0).all()


KL = {
    "k1": lambda d: d, "abs": torch.abs, "k2": lambda d: d * d / 2, "mse": lambda d: d * d / 2, "k3": lambda d: (-d).exp() - 1 + d,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("kind", [*KL, *(f"{kind}+" for kind in KL)])
def test_kl_terms(backend, device, monkeypatch, kind, dtype):
    small_blocks(backend, monkeypatch)
    logp, old, advantages, mask = draw(9, dtype, spread=2.0, device=device)
    old[0, 3] = logp[0, 3]
    where = mask & (advantages < 0.5)
    leaf = torch.where(where, logp, math.nan).requires_grad_()
    x = policy_inputs(leaf, old, advantages, mask)
    for clamp in (None, 1.5):
        wide = logp.double().cpu().requires_grad_()
        d = wide - old.double().cpu()
        value = KL[kind.removesuffix("+")](d)
        expected = value if clamp is None else value.clamp(-clamp, clamp)
        slope = torch.autograd.grad(expected.sum(), wide, retain_graph=True)[0] if not kind.endswith("+") else d
        got = terms_of(kl_penalty(x.logp, old, where, kind, clamp), leaf)
        zero = torch.zeros_like(d)
        wanted = [torch.where(where.cpu(), t.detach(), zero) for t in (expected, slope)]
        torch.testing.assert_close([t.double().cpu() for t in got], wanted, **TOLERANCE[dtype])
        assert clamp is None or (value.abs() > clamp)[where.cpu()].any()


def test_kl_far_away(backend, device):
    """k3's exponent stops at 80: a finite value, and no slope beyond."""
    logp = torch.tensor([[-200.0, -90.0, -1.0]], device=device, requires_grad=True)
    x = policy_inputs(logp, logp.detach(), torch.ones(1, device=device), torch.ones(1, 3, device=device))
    values, slopes = terms_of(kl_penalty(x.logp, torch.zeros(1, 3, device=device), x.mask, "k3", None), logp)
    assert values.isfinite().all() and slopes[0, :2].tolist() == [0, 0]
    torch.testing.assert_close(slopes[0, 2].item(), 1 - math.e, rtol=1e-5, atol=0)


@pytest.mark.parametrize("fraction, minimum, least", [(0.0, 0, 0), (0.0, 3, 0), (0.29, 1, 0), (0.29, 1, 30), (1.0, 0, 0), (0.02, 1, 2)])
def test_select_fraction(backend, device, fraction, minimum, least):
    g = torch.Generator().manual_seed(0)
    values, valid, group = torch.randn(4, 25, generator=g), torch.rand(4, 25, generator=g) < 0.7, torch.ones(4, 25, dtype=torch.bool)
    on_device = [t.to(device) for t in (values, valid, group)]
    options = {"minimum": minimum, "least": least}
    count = max(int(100 * fraction), minimum)  # 0.29 of 100 is 28.999... in float64, 29 in float32
    count = 0 if count < least else count
    got = select_fraction(*on_device, fraction, **options)
    with rlkern.use_backend("reference"):
        assert torch.equal(got.cpu(), select_bottom(values, valid, count))
    assert got.sum() == min(count, int(valid.sum()))
    smaller = select_fraction(*on_device[:2], on_device[1], fraction, **options)
    assert fraction != 1.0 or torch.equal(smaller.cpu(), valid)
    assert select_fraction(*(t[:0] for t in on_device), fraction).shape == (0, 25)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_selected_means(backend, device, dtype):
    values, _, advantages, mask = draw(600, dtype, device=device)
    selected = mask & (advantages > 1)
    want = selected.sum() / mask.sum(), values[mask].mean(), values[selected].mean()
    fraction, *means = selected_means(values, selected, mask)
    torch.testing.assert_close(fraction.double(), want[0].double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(means, list(want[1:]), **TOLERANCE[dtype])
    assert [t.item() for t in selected_means(values, selected & False, mask & False)] == [0, 0, 0]
    assert [t.item() for t in selected_means(values[:0], selected[:0], mask[:0])] == [0, 0, 0]


LOSSES = {  # of logp, old_logp, advantages and mask
    "ppo": lambda *x: rlkern.ppo_loss(*x, dual_clip=1.5, log_ratio_clamp=0.6),
    "grpo": lambda x, o, a, m: rlkern.grpo_loss(x, o, a, m, reference_logp=o - 0.3, kl_coef=0.1, kl_kind="k3+", weights=a * a, normalizer=31.0),
    "grpo_ratio": lambda x, o, a, m: rlkern.grpo_loss(x, o, a, m, reference_logp=o, kl_coef=0.1, kl_times_ratio=True, kl_scale=a * a),
    "grpo_constant_ratio": lambda x, o, a, m: rlkern.grpo_loss(
        x, o, a, m, reference_logp=o - 0.3, kl_coef=0.1, kl_kind="k2", kl_times_ratio=True, kl_clamp=0.2, log_ratio_clamp=0.4
    ),
    "sequence": lambda *x: rlkern.grpo_loss(*x, aggregation="seq-mean-token-mean"),
    "clip_cov": lambda *x: rlkern.clip_cov_loss(*x, select_ratio=1.0, cov_low=0.1, keep_value=True),
    "clip_cov_drop": lambda x, o, a, m: rlkern.clip_cov_loss(x, o, a, m, select_ratio=1.0, cov_low=0.1, preset="verl", weights=a * a),
    "kl_cov": lambda x, o, a, m: rlkern.kl_cov_loss(x, o, a, m, select_ratio=0.3, weights=a * a),
    "lp_reg": lambda x, o, a, m: rlkern.lp_reg_loss(x, o, o + 0.5, a, m, rho=0.5, clip_high=0.1, weights=a * a),
    "epo": lambda x, o, a, m: rlkern.epo_loss(x, o, x.detach() ** 2, a, m, mean_entropy=torch.ones(()), coef=0.1),
    "kdrl": lambda x, o, a, m: rlkern.kdrl_loss(x, o, o, a, m, kd_coef=0.3, kd_norm="kept"),
    "gspo": lambda x, o, a, m: rlkern.gspo_loss(x, o, a, m, clip_low=0.1, clip_high=0.2, log_ratio_clamp=0.3),
}


def loss_and_gradient(name, logp, *others):
    leaf = logp.detach().clone().requires_grad_()
    output = LOSSES[name](leaf, *others)
    return output, torch.autograd.grad(output.loss, leaf)[0]


@pytest.mark.parametrize("name", LOSSES)
def test_the_same_loss_on_every_backend(backend, device, name):
    tokens = draw(12, device=device)
    ours, gradient = loss_and_gradient(name, *tokens)
    with rlkern.use_backend("reference"):
        plain, plain_gradient = loss_and_gradient(name, *tokens)
    torch.testing.assert_close([ours.loss, gradient], [plain.loss, plain_gradient], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(ours.metrics, plain.metrics, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["ppo", "grpo", "kl_cov", "lp_reg", "gspo"])
def test_functional_transforms_see_the_plain_form(name):
    logp, *others = draw(12)

    def loss(x):
        return LOSSES[name](x, *others).loss

    torch.testing.assert_close(torch.func.grad(loss)(logp), loss_and_gradient(name, logp, *others)[1])
    assert torch.func.hessian(loss)(logp).any()


def test_gradients_of_other_dtypes_and_of_a_changed_input():
    logp, *others = draw(12)
    leaf = logp.bfloat16().requires_grad_()
    rows = leaf * 1
    loss = rlkern.ppo_loss(rows, *others).loss
    with torch.no_grad():
        rows.zero_()  # as trainers do with padding
    gradient = torch.autograd.grad(loss, leaf)[0]
    wide = leaf.detach().double().requires_grad_()
    expected = torch.autograd.grad(rlkern.ppo_loss(wide, *others).loss, wide)[0]
    assert loss.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.double(), expected, rtol=2**-7, atol=1e-6)


def test_a_second_derivative_raises():
    logp, *others = draw(12)
    leaf = logp.clone().requires_grad_()
    gradient = torch.autograd.grad(rlkern.ppo_loss(leaf, *others).loss, leaf, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="cannot be differentiated a second time"):
        (gradient.square().sum() + leaf.sum()).backward()
    with rlkern.use_backend("reference"):
        gradient = torch.autograd.grad(rlkern.ppo_loss(leaf, *others).loss, leaf, create_graph=True)[0]
        assert torch.autograd.grad(gradient.sum(), leaf)[0].any()


@pytest.mark.parametrize(
    "name, most", [("ppo", 12), ("grpo_ratio", 32), ("grpo_constant_ratio", 26), ("clip_cov_drop", 26), ("kl_cov", 26), ("lp_reg", 29), ("gspo", 37)]
)
def test_few_operations(name, most):
    """Each costs a launch on a GPU. On a CPU whose caches the logits have just swept, it costs about as much
    as the arithmetic of all of them."""
    logp, *others = draw(12)
    leaf = logp.requires_grad_()
    with Operators() as ran:
        torch.autograd.grad(LOSSES[name](leaf, *others).loss, leaf)
    assert len(ran.calls) <= most, [str(function) for function, _, _ in ran.calls]


def test_operators():
    logp, old, advantages, mask = draw(12, torch.float32)
    op = torch.ops.rlkern
    bounds = (0.8, 1.2, 3.0, -20.0, 20.0)
    torch.library.opcheck(op.ratio_terms.default, (logp, old, advantages, mask, None, None, *bounds))
    torch.library.opcheck(op.ratio_terms.default, (logp, None, advantages, mask, advantages > 0, old, *bounds))
    torch.library.opcheck(op.kl_terms.default, (logp, old, mask, 3, False, 10.0))
    torch.library.opcheck(op.select_fraction.default, (logp, mask, mask, 0.3, 1, 0))
    torch.library.opcheck(op.selected_means.default, (logp, mask & (logp < -1), mask))


def test_fraction_count_agrees():
    for n in (0, 7, 100):
        mask = torch.arange(200).view(1, -1) < n
        assert select_fraction(torch.zeros(1, 200), mask, mask, 0.29).sum() == fraction_count(mask.sum(), 0.29)
