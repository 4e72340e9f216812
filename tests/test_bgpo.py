"""Diffusion BGPO against float64 versions of arXiv 2510.11683 written as printed: the objective with all
graphs kept, the bound, the closed form of the gradient, the reference code's clip; and the presets."""

import math

import pytest
import torch
from bgpo_batch import F64, INF, B, Batch, N, V, agree, bound, naive_bound, naive_objective
from derivatives import differentiate

from rlkern.diffusion.bgpo import Options, surrogate


@pytest.mark.parametrize("seed", range(3))
def test_on_policy_is_the_naive_objective(seed):
    batch = Batch(seed)
    value, gradient = bound(batch.logits, batch, on_policy=True)
    agree((value, gradient), differentiate(lambda z: naive_objective(z, batch, on_policy=True), batch.logits))
    agree(value, -(batch.seq_weight * batch.advantages).sum())
    batch.old = batch.elbos()  # the same old policy, given
    agree(bound(batch.logits, batch), (value, gradient))


@pytest.mark.parametrize("options", [{}, {"clip": (0.2, 0.3)}, {"clip": (0.2, 0.2), "dual_clip": 1.5}, {"dual_clip": 1.2}], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_bound_and_its_closed_form_gradient(seed, options):
    batch = Batch(seed, spread=0.8)
    value, gradient = bound(batch.logits, batch, **options)
    agree((value, gradient), differentiate(lambda z: naive_bound(batch.elbos(z), batch, **options), batch.logits))
    # Section 3 of the derivation, in closed form: c omega phi s w / tau (softmax - onehot).
    low, high = options.get("clip", (1.0, INF))
    d = batch.scale[:, None] * (batch.elbos() - batch.old)
    a = batch.advantages[:, None]
    floor = math.log(1 - low) if low < 1 else -INF
    phi = torch.where(a > 0, torch.where(d > high, 0, a), torch.where((d < floor) | (d > math.log(options.get("dual_clip", INF))), 0, a * d.exp()))
    coefficient = batch.seq_weight[:, None] * batch.omega * torch.where(a == 0, 0, phi) * batch.scale[:, None] * batch.weight.T
    rows = batch.logits.softmax(-1) - torch.nn.functional.one_hot(batch.targets, V)
    closed = torch.where(batch.mask, coefficient.T[:, :, None], 0)[..., None] * rows
    agree(gradient, closed)
    if options:
        assert 0 < ((phi == 0) & (a != 0)).sum() < (a != 0).sum() * N  # some draws are clipped, not all


def draws_of(g, count, n):
    """d [count, n] from near to wild, omega on the simplex, advantages of both signs."""
    d = torch.randn(count, n, generator=g, dtype=F64) * 10 ** (2.5 * torch.rand(count, 1, generator=g, dtype=F64) - 2)
    omega = torch.rand(count, n, generator=g, dtype=F64) + 1e-3
    return d.clamp(-15, 15), omega / omega.sum(-1, keepdim=True), torch.randn(count, generator=g, dtype=F64)


def lower_bound(d, omega, a, clip=None, dual_clip=None):
    options = Options(1.0, 1.0, clip or (1.0, INF), dual_clip, 20.0, 0.0, "k2")
    values = surrogate(d.flatten(), a[:, None].expand(d.shape).flatten(), options, bound=True).value.view(d.shape)
    return (omega * values).sum(-1)


def clipped(ratio, a, clip):
    return a * ratio if clip is None else torch.where(a > 0, a * ratio.clamp(max=1 + clip[1]), a * ratio.clamp(min=1 - clip[0]))


@pytest.mark.parametrize("equal_weights", [True, False])
@pytest.mark.parametrize("clip", [None, (0.2, 0.2), (0.1, 0.5)])
def test_it_is_a_lower_bound(equal_weights, clip):
    d, omega, a = draws_of(torch.Generator().manual_seed(0), 100_000, 6)
    omega = torch.full_like(omega, 1 / 6) if equal_weights else omega
    dbar = (omega * d).sum(-1)
    exact, low = clipped(dbar.exp(), a, clip), lower_bound(d, omega, a, clip)
    slack = exact - low
    assert not (slack < -1e-12 * (1 + exact.abs() + low.abs())).any()
    assert (slack > 1e-6).float().mean() > 0.5  # and not by being equal
    if clip is None:  # the gaps have closed forms
        positive = a * (torch.expm1(dbar) - dbar)
        negative = -a * ((omega * d.exp()).sum(-1) - dbar.exp())
        torch.testing.assert_close(slack, torch.where(a > 0, positive, negative), rtol=1e-11, atol=1e-11)
    for f in (lambda x: x, lambda x: x * x / 2, lambda x: (-x).exp() + x - 1):  # a convex penalty of each draw keeps it a bound
        penalty, mean = f(d / 3 + 1), f((omega * (d / 3 + 1)).sum(-1))
        assert not ((omega * penalty).sum(-1) - mean < -1e-9 * (1 + mean.abs())).any()


def test_dual_clip_is_no_bound():
    d, omega, a = draws_of(torch.Generator().manual_seed(0), 100_000, 6)
    exact = clipped((omega * d).sum(-1).exp(), a, (0.2, 0.2))
    violations = lower_bound(d, omega, a, (0.2, 0.2), 3.0) > exact + 1e-9
    assert violations.sum() > 1000 and (a[violations] < 0).all()


def test_without_clip_the_old_policy_does_not_matter_where_the_advantage_is_positive():
    batch = Batch()
    batch.advantages = batch.advantages.abs()
    gradient = bound(batch.logits, batch)[1]
    for shift in (2.0, -50.0):
        batch.old = batch.old + shift
        assert torch.equal(bound(batch.logits, batch)[1], gradient)
    agree(gradient, bound(batch.logits, batch, on_policy=True)[1])


def reference_code(ells, old, advantages, lengths, width):
    """verl's PPO loss on a ratio broadcast over [B, T], dual clip 3, token-mean; mean over the draws."""
    total = 0
    tokens = (torch.arange(width) < lengths[:, None]).double()
    for j in range(ells.shape[1]):
        d = (ells[:, j] - old[:, j]) / width
        log_ratio = torch.where(advantages > 0, torch.log(1 + d), d)
        ratio = log_ratio.exp()[:, None].expand(-1, width)
        a = advantages[:, None]
        losses1, losses2 = -a * ratio, -a * ratio.clamp(0.8, 1.2)
        upper = torch.maximum(losses1, losses2)
        per_token = torch.where(a < 0, torch.minimum(-a * 3.0, upper), upper)
        total = total + (per_token * tokens).sum() / tokens.sum() / ells.shape[1]
    return total


@pytest.mark.parametrize("spread", [0.01, 0.2, 0.3])
def test_reference_preset_is_the_reference_code(spread):
    batch = Batch(spread=spread, seed=3)
    width = 12
    ells = batch.elbos()
    noise = torch.randn(B, N, generator=torch.Generator().manual_seed(9), dtype=F64)
    batch.old = ells - width * (spread * noise).clamp(min=-0.95)
    batch.old[1, 0] = ells[1, 0] - width * 1.5  # A < 0 and a ratio above 3
    batch.omega = torch.full((B, N), 1 / N, dtype=F64)

    got = bound(batch.logits, batch, preset="reference", seq_weight=None, ratio_scale=None, lengths=batch.lengths, response_width=width)
    rest = batch.old, batch.advantages, batch.lengths, width
    agree(got, differentiate(lambda z: reference_code(batch.elbos(z), *rest), batch.logits))


def test_where_the_reference_code_is_nan():
    batch = Batch()
    batch.old = batch.elbos() + 30.0  # d < -1
    assert reference_code(batch.elbos(), batch.old, batch.advantages, batch.lengths, 9).isnan()
    value, gradient = bound(batch.logits, batch)
    agree((value, gradient), differentiate(lambda z: naive_bound(batch.elbos(z), batch), batch.logits))
    assert (batch.scale * 30 > 1).all() and (gradient[0, 0] != 0).any()


def test_presets():
    batch = Batch(spread=0.8)
    share = batch.lengths.double() / batch.lengths.sum()
    explicit = {
        "paper": {"ratio_scale": 1.0, "seq_weight": 1 / B},
        "reference": {"ratio_scale": 1 / 16, "seq_weight": share, "clip": (0.2, 0.2), "dual_clip": 3.0},
        "recommended": {"ratio_scale": batch.scale, "seq_weight": 1 / B, "clip": (0.2, 0.2)},
    }
    seen = []
    for preset, options in explicit.items():
        by_name = {"preset": preset, "seq_weight": None, "ratio_scale": None, "lengths": batch.lengths, "response_width": 16}
        seen.append(bound(batch.logits, batch, **by_name)[0].item())
        changes = {"ratio_scale": 0.05, "seq_weight": batch.seq_weight, "clip": (1.0, INF), "dual_clip": 1.1}
        for change in ({}, *({name: value} for name, value in changes.items())):
            agree(bound(batch.logits, batch, **by_name | change), bound(batch.logits, batch, **options | change))
    assert len({round(value, 6) for value in seen}) == 3
