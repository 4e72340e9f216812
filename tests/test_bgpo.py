"""Diffusion BGPO against float64 versions of arXiv 2510.11683 written as printed: the naive objective with all graphs kept, the bound, the closed
form of the gradient, the reference code's clip; and edge cases, presets, groupings, errors."""

import math
from pathlib import Path

import pytest
import torch
from bgpo_batch import F64, INF, KL, B, Batch, N, S, V, agree, bound, differentiate, elbo, naive_bound, naive_objective
from torch._dynamo.testing import CompileCounterWithBackend

import rlkern
from rlkern.losses.bgpo import Options, surrogate

# --- the objective and its bound ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_on_policy_is_the_naive_objective(seed):
    batch = Batch(seed)
    value, gradient = bound(batch.logits, batch, on_policy=True)
    agree((value, gradient), differentiate(lambda z: naive_objective(z, batch, on_policy=True), batch.logits))
    agree(value, -(batch.seq_weight * batch.advantages).sum())
    batch.old = torch.stack([elbo(batch.logits[j], batch, j) for j in range(N)], -1)  # the same old policy, given
    agree(bound(batch.logits, batch), (value, gradient))


CONFIGURATIONS = {
    "plain": {},
    "clip": {"clip": (0.2, 0.3)},
    "dual clip": {"clip": (0.2, 0.2), "dual_clip": 1.5},
    "dual clip alone": {"dual_clip": 1.2},
}


@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
@pytest.mark.parametrize("seed", range(3))
def test_bound_and_its_closed_form_gradient(seed, options):
    batch = Batch(seed, spread=0.8)
    ells = torch.stack([elbo(batch.logits[j], batch, j) for j in range(N)], -1)
    value, gradient = bound(batch.logits, batch, **options)

    def from_logits(z):
        return naive_bound(torch.stack([elbo(z[j], batch, j) for j in range(N)], -1), batch, **options)

    agree((value, gradient), differentiate(from_logits, batch.logits))
    # Section 3 of the derivation, in closed form: c omega phi s w / tau (softmax - onehot).
    low, high = options.get("clip", (1.0, INF))
    d = batch.scale[:, None] * (ells - batch.old)
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
        torch.testing.assert_close(slack, torch.where(a > 0, positive, negative), rtol=1e-9, atol=1e-11)
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
    gradients = []
    for shift in (0.0, 2.0, -50.0):
        batch.old = batch.old + shift
        gradients.append(bound(batch.logits, batch)[1])
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])
    agree(gradients[0], bound(batch.logits, batch, on_policy=True)[1])


# --- the reference code ------------------------------------------------------------------------------------------------------------------------


def reference_code(ells, old, advantages, lengths, width):
    """verl's PPO loss over [B, T] tokens on a ratio broadcast over the response, dual clip 3, token-mean; mean over the draws."""
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
    ells = torch.stack([elbo(batch.logits[j], batch, j) for j in range(N)], -1)
    noise = torch.randn(B, N, generator=torch.Generator().manual_seed(9), dtype=F64)
    batch.old = ells - width * (spread * noise).clamp(min=-0.95)
    batch.old[1, 0] = ells[1, 0] - width * 1.5  # A < 0 and a ratio above 3
    batch.omega = torch.full((B, N), 1 / N, dtype=F64)

    def reference(z):
        return reference_code(torch.stack([elbo(z[j], batch, j) for j in range(N)], -1), batch.old, batch.advantages, batch.lengths, width)

    got = bound(batch.logits, batch, preset="reference", seq_weight=None, ratio_scale=None, lengths=batch.lengths, response_width=width)
    agree(got, differentiate(reference, batch.logits))


def test_where_the_reference_code_is_nan():
    batch = Batch()
    ells = torch.stack([elbo(batch.logits[j], batch, j) for j in range(N)], -1)
    batch.old = ells + 30.0  # d < -1
    assert reference_code(ells, batch.old, batch.advantages, batch.lengths, 9).isnan()
    value, gradient = bound(batch.logits, batch)
    agree((value, gradient), differentiate(lambda z: naive_bound(torch.stack([elbo(z[j], batch, j) for j in range(N)], -1), batch), batch.logits))
    assert (batch.scale * 30 > 1).all() and (gradient[0, 0] != 0).any()


# --- presets -----------------------------------------------------------------------------------------------------------------------------------


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
        got, want = bound(batch.logits, batch, **by_name), bound(batch.logits, batch, **options)
        agree(got, want)
        seen.append(got[0].item())
        for name, value in (("ratio_scale", 0.05), ("seq_weight", batch.seq_weight), ("clip", (1.0, INF)), ("dual_clip", 1.1)):
            got, want = bound(batch.logits, batch, **by_name | {name: value}), bound(batch.logits, batch, **options | {name: value})
            agree(got, want)
    assert len({round(value, 6) for value in seen}) == 3


# --- groupings ---------------------------------------------------------------------------------------------------------------------------------


def test_draws_are_sequences():
    """All draws of all sequences in one batch of B n; and in one packed row list, split anywhere."""
    batch = Batch(spread=0.8)
    options = {"clip": (0.2, 0.2), "dual_clip": 2.0}
    want = bound(batch.logits, batch, **options)
    flat = {
        "advantages": batch.advantages.repeat(N),
        "old_elbo": batch.old.T.reshape(-1),
        "mc_weight": batch.omega.T.reshape(-1),
        "seq_weight": batch.seq_weight.repeat(N),
        "ratio_scale": batch.scale.repeat(N),
    }
    targets, mask, weight = batch.targets.repeat(N, 1), batch.mask.view(-1, S), batch.weight.view(-1)

    def stacked(z):
        return rlkern.bgpo_loss(z.view(-1, S, V), targets, weight, mask=mask, **flat, **options).loss

    agree(differentiate(stacked, batch.logits), want)

    def packed(z):
        rows, sequence = z.view(-1, S, V)[mask], mask.nonzero()[:, 0]
        total = 0
        for part in (slice(0, 7), slice(7, 8), slice(8, B * N)):
            own = (sequence >= part.start) & (sequence < part.stop)
            total = total + rlkern.bgpo_loss(
                rows[own], targets[mask][own], weight[sequence][own], seq_idx=sequence[own] - part.start, num_seqs=part.stop - part.start,
                **{name: x[part] for name, x in flat.items()}, **options,
            ).loss  # fmt: skip
        return total

    agree(differentiate(packed, batch.logits), want)


def test_backends_packed_and_in_place(backend, device):
    batch = Batch(n=1, spread=0.8)
    few = slice(0, 3)  # the interpreter is slow
    batch.targets, batch.mask = batch.targets[:, few], batch.mask[:, :, few]
    logits = batch.logits[0, :, few].bfloat16()
    batch.logits = logits.double()[None]
    batch.omega = torch.ones(B, 1, dtype=F64)
    options = {"clip": (0.2, 0.3), "dual_clip": 2.0}
    value, gradient = bound(batch.logits, batch, **options)
    mask, targets = batch.mask[0].to(device), batch.targets.to(device)
    vectors = (batch.weight[0], batch.advantages, batch.old[:, 0], batch.seq_weight, batch.scale)
    weight, advantages, old, seq_weight, scale = (x.float().to(device) for x in vectors)
    options |= {"mc_weight": 1.0, "seq_weight": seq_weight, "ratio_scale": scale}
    interpreted = backend == "triton" and device == "cpu"  # the interpreter truncates where hardware rounds
    rounding = 2**-7 if interpreted else 2**-8

    def check(loss, d):
        torch.testing.assert_close(loss.double().cpu(), value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(d.double().cpu(), gradient[0], rtol=rounding, atol=3e-6)

    def dense(z):
        return rlkern.bgpo_loss(z * 1, targets, weight, advantages, old, mask=mask, inplace_backward=True, **options).loss

    def packed(z):
        sequence = mask.nonzero()[:, 0]
        rows = (z[mask], targets[mask], weight[sequence], advantages, old)
        return rlkern.bgpo_loss(*rows, seq_idx=sequence, num_seqs=B, **options).loss

    check(*differentiate(dense, logits.to(device)))
    check(*differentiate(packed, logits.to(device)))


def test_elbo_coeff_on_policy_and_at_the_bounds():
    a = torch.tensor([2.0, -3.0, 0.0], dtype=F64)
    assert torch.equal(rlkern.elbo_coeff(torch.randn(3, dtype=F64), None, a, ratio_scale=1.0), a)
    far = torch.tensor([100.0, 100.0, INF], dtype=F64)
    zero = torch.zeros(3, dtype=F64)
    assert torch.equal(rlkern.elbo_coeff(far, zero, a, ratio_scale=1.0), zero)  # beyond max_log_ratio of either sign, and A = 0 at infinity
    agree(rlkern.elbo_coeff(-far, zero, a, ratio_scale=1.0, max_log_ratio=1.0), a * torch.tensor([-100.0, -100, 0], dtype=F64).exp() * (a != 0))
    assert rlkern.elbo_coeff(far.float(), zero, a, ratio_scale=1.0).dtype == torch.float32


# --- edge cases --------------------------------------------------------------------------------------------------------------------------------

EDGE = {"mc_weight": 0.5, "seq_weight": 0.25, "ratio_scale": 1.0}


def one_row(advantage, d, **options):
    """One sequence with one masked token: (loss, gradient, stats) at a log ratio of d."""
    logits = torch.tensor([[[0.3, -0.2, 1.0]]], dtype=F64, requires_grad=True)
    ell = logits.detach().log_softmax(-1)[0, 0, 1] * 2
    a, old = torch.tensor([advantage], dtype=F64), (ell - d).view(1)
    loss, stats = rlkern.bgpo_loss(logits, torch.tensor([[1]]), torch.tensor([2.0], dtype=F64), a, old, **EDGE | options)
    return loss.item(), torch.autograd.grad(loss, logits)[0], stats


@pytest.mark.parametrize("d", [0.0, 3.0, -3.0, 1e4, INF, -INF, math.nan])
def test_advantage_zero_is_exactly_zero(d):
    for options in ({}, {"clip": (0.2, 0.2), "dual_clip": 3.0}):
        loss, gradient, stats = one_row(0.0, d, **options)
        assert loss == 0 and (gradient == 0).all() and stats.clipped == 0


def test_far_off_policy():
    unit = one_row(1.0, 0.0)[1]
    loss, gradient, stats = one_row(1.0, 1e4)
    assert loss == pytest.approx(-0.125 * 10001) and torch.equal(gradient, unit) and stats.clipped == 0
    loss, gradient, stats = one_row(1.0, -7.5)  # 1 + d < 0
    assert loss == pytest.approx(0.125 * 6.5) and torch.equal(gradient, unit) and stats.ratio.item() == pytest.approx(-6.5)
    for d, options, value in (
        (1e4, {}, math.exp(20)),
        (INF, {}, math.exp(20)),
        (5.0, {"max_log_ratio": 3.0}, math.exp(3)),
        (5.0, {"dual_clip": 3.0}, 3.0),
        (1e4, {"dual_clip": 3.0}, 3.0),
        (-1.0, {"clip": (0.2, 0.2)}, 0.8),
        (-INF, {"clip": (0.2, 0.2)}, 0.8),
    ):
        loss, gradient, stats = one_row(-1.0, d, **options)
        assert loss == pytest.approx(0.125 * value) and (gradient == 0).all() and stats.clipped == 1
    loss, gradient, stats = one_row(1.0, 0.3, clip=(0.2, 0.2))
    assert loss == pytest.approx(-0.125 * 1.2) and (gradient == 0).all() and stats.clipped == 1
    for advantage, d in ((1.0, -0.5), (1.0, 0.19), (-1.0, 0.5), (-1.0, -0.2)):
        loss, gradient, stats = one_row(advantage, d, clip=(0.2, 0.2))
        assert (gradient != 0).any() and stats.clipped == 0
    agree(one_row(-1.0, 0.5)[1], -unit * math.exp(0.5))
    assert one_row(-1.0, -INF)[0] == 0 and (one_row(-1.0, -INF)[1] == 0).all()


def test_nothing_masked():
    """The value stays in the mean, the gradient is 0 and the loss is connected, so that every process can run its backward."""
    logits = torch.randn(2, 3, 5, requires_grad=True)
    targets, a = torch.zeros(2, 3, dtype=torch.long), torch.tensor([1.0, -2.0])
    nothing = {"mask": torch.zeros(2, 3, dtype=torch.bool)}
    for old in (None, torch.zeros(2)):
        loss, stats = rlkern.bgpo_loss(logits, targets, torch.ones(2), a, old, **EDGE, **nothing)
        assert loss.item() == pytest.approx(0.125) and (stats.ell == 0).all()
        assert (torch.autograd.grad(loss, logits)[0] == 0).all()
    no_tokens = torch.tensor([0.0, 3.0])
    loss = rlkern.bgpo_loss(logits, targets, torch.ones(2), a, torch.zeros(2), **EDGE | {"ratio_scale": 1 / no_tokens}, **nothing).loss
    assert loss.item() == pytest.approx(0.125)
    loss = rlkern.bgpo_loss(logits, targets, torch.ones(2), a, mc_weight=0.5, preset="recommended", lengths=torch.tensor([0, 3]), **nothing).loss
    assert loss.item() == pytest.approx(0.25)
    assert rlkern.bgpo_loss(logits, targets - 100, torch.ones(2), a, **EDGE).loss.item() == pytest.approx(0.125)


def test_unmasked_rows_may_hold_anything():
    batch = Batch(spread=0.8)
    want = bound(batch.logits, batch, clip=(0.2, 0.2))
    for garbage in (math.nan, INF, -INF):
        got = bound(torch.where(batch.mask[..., None], batch.logits, garbage), batch, clip=(0.2, 0.2))
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_minus_inf_logits():
    batch = Batch(n=1)
    batch.mask[0, 0, 0] = True
    forbidden = (batch.targets[0, 0] + 1) % V
    batch.logits[0, 0, 0, forbidden] = -INF
    _, gradient = bound(batch.logits, batch)
    assert gradient.isfinite().all() and gradient[0, 0, 0, forbidden] == 0 and (gradient[0, 0, 0] != 0).sum() == V - 1
    batch.logits[0, 0, 0, batch.targets[0, 0]] = -INF
    with pytest.raises(ValueError, match=r"a counted target has logit -inf, probability 0, in sequences \[0\]"):
        bound(batch.logits, batch)
    batch.mask[0, 0, 0] = False
    bound(batch.logits, batch)


# --- options and statistics --------------------------------------------------------------------------------------------------------------------


def test_temperature_and_kl_and_token_logp():
    batch = Batch(spread=0.8)
    scale, c = batch.scale, batch.seq_weight
    for j in range(N):
        for name, f in KL.items():

            def naive(z, j=j, f=f):
                ell = elbo(z, batch, j, 0.7)
                d, a = scale * (ell - batch.old[:, j]), batch.advantages
                g = torch.where(a > 0, a * (1 + d), a * d.exp())
                return -(c * 0.25 * (g - 0.3 * f(scale * (ell - batch.ref[:, j])))).sum()

            def ours(z, j=j, name=name):
                return rlkern.bgpo_loss(
                    z, *batch.rows(j), batch.advantages, batch.old[:, j], mask=batch.mask[j], mc_weight=0.25, seq_weight=c, ratio_scale=scale,
                    ref_elbo=batch.ref[:, j], kl_coef=0.3, kl=name, temperature=0.7,
                ).loss  # fmt: skip

            agree(differentiate(ours, batch.logits[j]), differentiate(naive, batch.logits[j]))


def test_stats_and_old_token_logp():
    batch = Batch(n=1)
    common = {"mask": batch.mask[0], "mc_weight": 1.0, "seq_weight": 1.0, "ratio_scale": batch.scale, "clip": (0.2, 0.2)}
    arguments = (*batch.rows(0), batch.advantages)
    first = rlkern.bgpo_loss(batch.logits[0], *arguments, **common).stats
    agree(first.ell, elbo(batch.logits[0], batch, 0))
    assert (first.d == 0).all() and (first.ratio == 1).all() and (first.clipped == 0).all()

    moved = batch.logits[0] + 1.5 * torch.randn(B, S, V, generator=torch.Generator().manual_seed(2), dtype=F64)
    by_elbo = differentiate(lambda z: rlkern.bgpo_loss(z, *arguments, first.ell, **common).loss, moved)
    by_token = differentiate(lambda z: rlkern.bgpo_loss(z, *arguments, old_token_logp=first.token_logp, **common).loss, moved)
    agree(by_token, by_elbo)
    by_live_elbo = differentiate(lambda z: rlkern.bgpo_loss(z, *arguments, first.ell.clone().requires_grad_(), **common).loss, moved)
    agree(by_live_elbo, by_elbo)  # an old ELBO is detached, not refused
    stats = rlkern.bgpo_loss(moved, *arguments, first.ell, **common).stats
    d = batch.scale * (elbo(moved, batch, 0) - first.ell)
    agree((stats.d, stats.ratio), (d, torch.where(batch.advantages > 0, 1 + d, torch.where(batch.advantages == 0, 1, d.exp()))))
    outside = torch.where(batch.advantages > 0, d > 0.2, (batch.advantages < 0) & (d < math.log(0.8)))
    assert torch.equal(stats.clipped, outside.double()) and 0 < outside.sum() < B


def test_coefficients_do_not_compile_again():
    batch = Batch(spread=0.8)
    inputs = [x.float() for x in (batch.logits[0], batch.weight[0], batch.advantages, batch.old[:, 0], batch.ref[:, 0])]
    names = {
        "clip_low": 0.2,
        "clip_high": 0.3,
        "dual_clip": 3.0,
        "max_log_ratio": 10.0,
        "kl_coef": 0.1,
        "mc_weight": 0.2,
        "seq_weight": 0.5,
        "s": 0.2,
    }

    def loss(logits, weight, advantages, old, ref, o):
        return rlkern.bgpo_loss(
            logits, batch.targets, weight, advantages, old, mask=batch.mask[0], clip=(o["clip_low"], o["clip_high"]), dual_clip=o["dual_clip"],
            max_log_ratio=o["max_log_ratio"], ref_elbo=ref, kl_coef=o["kl_coef"], mc_weight=o["mc_weight"], seq_weight=o["seq_weight"],
            ratio_scale=o["s"],
        ).loss  # fmt: skip

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for factor in (1.0, 1.01):  # the second value is where torch.compile may still learn that a float varies
        compiled(*inputs, {name: value * factor for name, value in names.items()})
    frames = counter.frame_count
    for factor in (1.02, 1.05, 1.1):
        options = {name: value * factor for name, value in names.items()}
        torch.testing.assert_close(compiled(*inputs, options), loss(*inputs, options))
    assert counter.frame_count == frames


GOOD = {"mc_weight": 0.5, "seq_weight": 0.5, "ratio_scale": 1.0}


@pytest.mark.parametrize(
    "changes, error, words",
    [({"seq_weight": None}, TypeError, "seq_weight= must be given.*'paper', 'reference', 'recommended'"),
     ({"ratio_scale": None}, TypeError, "ratio_scale= must be given"),
     ({"preset": "verl"}, ValueError, "unknown preset 'verl'"),
     ({"preset": "recommended", "ratio_scale": None}, TypeError, "needs lengths="),
     ({"preset": "reference", "ratio_scale": None}, TypeError, "needs response_width="),
     ({"preset": "reference", "ratio_scale": None, "response_width": 0}, ValueError, "response_width must be in"),
     ({"preset": "recommended", "ratio_scale": None, "lengths": torch.ones(3)}, ValueError, r"lengths must be \[B\] with B = 2, got \(3,\)"),
     ({"preset": "recommended", "ratio_scale": None, "lengths": [1, 2]}, TypeError, "lengths must be a tensor"),
     ({"mc_weight": 1.5}, ValueError, r"mc_weight must be in \[0, 1\], got 1.5"),
     ({"mc_weight": torch.tensor([0.5, -0.1])}, ValueError, r"mc_weight must be in \[0, 1\], got -0.1"),
     ({"seq_weight": -1.0}, ValueError, "seq_weight must be in"), ({"seq_weight": INF}, ValueError, "seq_weight must be in"),
     ({"seq_weight": torch.ones(3)}, ValueError, r"seq_weight must be \[B\] with B = 2"),
     ({"seq_weight": torch.ones(2, dtype=torch.long)}, TypeError, "seq_weight must be a float tensor"),
     ({"ratio_scale": torch.tensor([0.1, -1.0])}, ValueError, "ratio_scale must be in"),
     ({"advantages": torch.ones(2, 3)}, ValueError, r"advantages must be \[B\] with B = 2, one number a sequence, got \(2, 3\)"),
     ({"advantages": torch.tensor([1.0, math.nan])}, ValueError, "advantages must be finite, got nan"),
     *(({name: torch.full((2,), 0.5, requires_grad=True)}, ValueError, f"{name} must not require grad")
       for name in ("advantages", "seq_weight", "mc_weight", "ratio_scale")),
     ({"old_elbo": torch.ones(3)}, ValueError, r"old_elbo must be \[B\]"), ({"old_elbo": 0.0}, TypeError, "old_elbo must be a float tensor"),
     ({"old_elbo": torch.ones(2), "old_token_logp": torch.ones(2, 3)}, ValueError, "old_elbo or old_token_logp, not both"),
     ({"clip": 0.2}, TypeError, "clip must be a pair"), ({"clip": (20, 0.2)}, ValueError, "clip_low must be in"),
     ({"dual_clip": 0.5}, ValueError, "dual_clip must be in"), ({"max_log_ratio": 100}, ValueError, "max_log_ratio must be in"),
     ({"kl": "k5"}, ValueError, "unknown kl 'k5'"), ({"kl_coef": -1.0}, ValueError, "kl_coef must be in"),
     ({"kl_coef": 0.1}, ValueError, "kl_coef=0.1 needs ref_elbo="), ({"ref_elbo": torch.ones(2, 2)}, ValueError, r"ref_elbo must be \[B\]"),
     ({"weight": torch.tensor([1.0, -2.0])}, ValueError, "weight must be finite and not negative"),
     ({"weight": 1 / torch.tensor([1.0, 0.0])}, ValueError, "1/t needs t > 0")],
)  # fmt: skip
def test_errors(changes, error, words):
    arguments = {"weight": torch.ones(2), "advantages": torch.ones(2)} | GOOD | changes
    with pytest.raises(error, match=words):
        rlkern.bgpo_loss(torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.long), **arguments)


def test_elbo_coeff_errors():
    for elbo_, words in ((torch.ones(2, 2), r"elbo must be \[B\]"), (torch.ones(3), r"advantages must be \[B\] with B = 3")):
        with pytest.raises(ValueError, match=words):
            rlkern.elbo_coeff(elbo_, None, torch.ones(2), ratio_scale=1.0)
    with pytest.raises(TypeError, match="elbo must be a float tensor"):
        rlkern.elbo_coeff(0.0, None, torch.ones(2), ratio_scale=1.0)


def test_benchmark_contenders_compute_the_same(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    import bgpo as benchmark

    draw = benchmark.make_draw((2, 6, 50), 0.5, torch.float32, "cpu")
    assert (draw.mask.sum(-1) == 3).all()
    results = {contender.name: benchmark.gradient(contender, draw._replace(logits=draw.logits.clone())) for contender in benchmark.CONTENDERS}
    loss, gradient = results[benchmark.EAGER]
    for name, (value, d) in results.items():
        torch.testing.assert_close((value, d), (loss, gradient[draw.mask] if "packed" in name else gradient), rtol=1e-5, atol=1e-6)
    figures = benchmark.measure(draw, rounds=2)
    assert figures.keys() == results.keys() and all(entry["ms"] > 0 for entry in figures.values())
