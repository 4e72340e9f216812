"""Diffusion BGPO where it is easily wrong: A = 0, ratios far off, nothing masked, infinite logits; errors."""

import math

import pytest
import torch
from bgpo_batch import F64, INF, Batch, V, agree, bound

import rlkern

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
    """The value stays in the mean. The gradient is 0, and connected: every process can run its backward."""
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


GOOD = {"mc_weight": 0.5, "seq_weight": 0.5, "ratio_scale": 1.0}


@pytest.mark.parametrize(
    "changes, error, words",
    [({"seq_weight": None}, TypeError, "seq_weight= must be given.*'paper', 'reference', 'recommended'"),
     ({"ratio_scale": None}, TypeError, "ratio_scale= must be given"),
     ({"preset": "verl"}, ValueError, "unknown preset 'verl'"),
     ({"preset": "recommended", "ratio_scale": None}, TypeError, "needs lengths="),
     ({"preset": "reference", "ratio_scale": None}, TypeError, "needs response_width="),
     ({"preset": "reference", "ratio_scale": None, "response_width": 0}, ValueError, "response_width must be in"),
     ({"preset": "recommended", "ratio_scale": None, "lengths": torch.ones(3)}, ValueError,
      r"lengths must be \(2,\), one a sequence for the elbo \(2,\), got \(3,\)"),
     ({"preset": "recommended", "ratio_scale": None, "lengths": [1, 2]}, TypeError, "lengths must be a bool or number tensor"),
     ({"mc_weight": 1.5}, ValueError, r"mc_weight must be in \[0, 1\], got 1.5"),
     ({"mc_weight": torch.tensor([0.5, -0.1])}, ValueError, r"mc_weight must be in \[0, 1\], got -0.1"),
     ({"seq_weight": -1.0}, ValueError, "seq_weight must be in"), ({"seq_weight": INF}, ValueError, "seq_weight must be in"),
     ({"seq_weight": torch.ones(3)}, ValueError, r"seq_weight must be \[B\], \[B, 1\] or 0-d, here \(2,\) or"),
     ({"seq_weight": torch.ones(2, dtype=torch.long)}, TypeError, "seq_weight must be a float tensor"),
     ({"ratio_scale": torch.tensor([0.1, -1.0])}, ValueError, "ratio_scale must be in"),
     ({"advantages": torch.ones(2, 3)}, ValueError, r"advantages must be \[B\], \[B, 1\] or 0-d, here .* for the elbo \(2,\), got \(2, 3\)"),
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
    for elbo_, words in (
        (torch.ones(2, 2), r"elbo must be \[B\]"),
        (torch.ones(3), r"advantages must be \[B\], \[B, 1\] or 0-d, here .* for the elbo \(3,\), got \(2,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            rlkern.elbo_coeff(elbo_, None, torch.ones(2), ratio_scale=1.0)
    with pytest.raises(TypeError, match="elbo must be a float tensor"):
        rlkern.elbo_coeff(0.0, None, torch.ones(2), ratio_scale=1.0)
