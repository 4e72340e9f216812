"""Nash-MD and Nash-MP against their formulas, and as gradients of the objectives they come from."""

import math

import pytest
import torch

from rlkern.losses.preference.nash import nash_md_loss, nash_mp_loss

MASK = torch.arange(5) < torch.tensor([5, 2, 4]).unsqueeze(-1)


def draw():
    g = torch.Generator().manual_seed(0)
    logps = [-0.1 - 2 * torch.rand(3, 5, generator=g, dtype=torch.float64) for _ in range(3)]
    return *logps, torch.tensor([0.9, 0.2, 0.55], dtype=torch.float64)


def naive(logp, ref, target, win, beta, eta):
    """Value and gradient, by loops."""
    value, gradient = 0.0, torch.zeros_like(logp)
    for b in range(3):
        for t in range(5):
            if MASK[b, t]:
                g = beta * (logp[b, t] - ref[b, t]) - (win[b] - 0.5)
                if target is not None:
                    g = g + beta / eta * (logp[b, t] - target[b, t])
                value, gradient[b, t] = value + g * logp[b, t] / 3, g / 3
    return value, gradient


def test_nash_md_equals_formula():
    logp, ref, _, win = draw()
    expected, gradient = naive(logp, ref, None, win, 0.3, 1)
    leaf = logp.clone().requires_grad_()
    out = nash_md_loss(leaf, ref, win, MASK, beta=0.3)
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected, check_dtype=False)
    torch.testing.assert_close(leaf.grad, gradient)
    assert out.metrics["win_prob"].item() == pytest.approx(win.mean().item())
    assert out.metrics["kl_reference"].item() == pytest.approx((logp - ref)[MASK].mean().item())


def test_nash_mp_equals_formula():
    logp, ref, target, win = draw()
    expected, gradient = naive(logp, ref, target, win, 0.3, 0.5)
    leaf = logp.clone().requires_grad_()
    out = nash_mp_loss(leaf, ref, target, win, MASK, beta=0.3, eta=0.5)
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected, check_dtype=False)
    torch.testing.assert_close(leaf.grad, gradient)
    assert out.metrics["kl_target"].item() == pytest.approx((logp - target)[MASK].mean().item())


def test_anchors_combine():
    logp, ref, _, win = draw()
    both = nash_mp_loss(logp, ref, ref, win, MASK, beta=0.2, eta=0.5).loss
    torch.testing.assert_close(both, nash_md_loss(logp, ref, win, MASK, beta=0.2 * 3).loss)
    alone = nash_mp_loss(logp, ref, logp + 1, win, MASK, beta=0.2, eta=math.inf).loss
    torch.testing.assert_close(alone, nash_md_loss(logp, ref, win, MASK, beta=0.2).loss)


def test_expected_gradient_is_that_of_the_proximal_objective():
    """Over all actions of one token: E[loss gradient] = d/dz (-E[P] + beta KL(pi||ref) + beta/eta KL(pi||t)),
    t the target, P the win probability."""
    g = torch.Generator().manual_seed(3)
    z, z_ref, z_target = (torch.randn(7, generator=g, dtype=torch.float64) for _ in range(3))
    win = torch.rand(7, generator=g, dtype=torch.float64)
    beta, eta = 0.4, 0.7
    leaf = z.clone().requires_grad_()
    log_p, log_ref, log_target = leaf.log_softmax(-1), z_ref.log_softmax(-1), z_target.log_softmax(-1)
    objective = -(log_p.exp() * win).sum() + beta * (log_p.exp() * (log_p - log_ref)).sum()
    objective = objective + beta / eta * (log_p.exp() * (log_p - log_target)).sum()
    (expected,) = torch.autograd.grad(objective, leaf)
    gradient = torch.zeros(7, dtype=torch.float64)
    for a in range(7):
        logp = leaf.log_softmax(-1)[a].view(1, 1)
        out = nash_mp_loss(logp, log_ref[a].view(1, 1), log_target[a].view(1, 1), win[a : a + 1], torch.ones(1, 1), beta=beta, eta=eta)
        gradient += z.softmax(-1)[a] * torch.autograd.grad(out.loss, leaf)[0]
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"reference_logp": torch.zeros(3, 4)}, ValueError, r"reference_logp must have the shape of logp \(3, 5\)"),
        ({"target_logp": None}, TypeError, "target_logp must be a float tensor"),
        ({"win_prob": torch.zeros(4)}, ValueError, "win_prob must be"),
        ({"eta": 0}, ValueError, "eta must be positive, got 0"),
        ({"beta": -0.1}, ValueError, "beta must be in"),
        ({"aggregation": "sum"}, ValueError, "unknown aggregation mode"),
    ],
)
def test_refuses(change, error, message):
    logp, ref, target, win = draw()
    with pytest.raises(error, match=message):
        nash_mp_loss(**{"logp": logp, "reference_logp": ref, "target_logp": target, "win_prob": win, "mask": MASK} | change)
