"""epo_loss against its formula, its gradient by entropy in closed form, its schedules and its history."""

import math

import pytest
import torch

import rlkern
from rlkern.losses.policy.epo import EntropyHistory, epo_beta, epo_loss

B, T = 3, 4
MASK = torch.arange(T) < torch.tensor([4, 2, 3]).unsqueeze(-1)
OPTIONS = {"coef": 0.3, "alpha": 0.5, "beta": 1.7, "kappa_low": 0.7, "kappa_high": 1.4}


def draw():
    g = torch.Generator().manual_seed(0)
    logp = -2 * torch.rand(B, T, generator=g, dtype=torch.float64)
    old = logp + 0.4 * torch.randn(B, T, generator=g, dtype=torch.float64)
    entropy = 2 * torch.rand(B, T, generator=g, dtype=torch.float64)
    return logp, old, entropy, torch.randn(B, generator=g, dtype=torch.float64)


def naive(logp, old, entropy, advantages, center, smoothing="hinge", coef=0.3, alpha=0.5, beta=1.7, kappa_low=0.7, kappa_high=1.4):
    total, n = 0.0, 0
    for b in range(B):
        for t in range(T):
            if not MASK[b, t]:
                continue
            n += 1
            r, h, a = (logp[b, t] - old[b, t]).exp(), entropy[b, t], advantages[b]
            low, high = kappa_low * center[b], kappa_high * center[b]
            if smoothing == "hinge":
                p = max(low - h, 0 * h) + max(h - high, 0 * h)
            else:
                p = 0.0 if low < h < high else 1.0
            total = total - torch.minimum(a * r, a * r.clamp(0.8, 1.2)) - coef * (h - beta * alpha * p)
    return total / n


@pytest.mark.parametrize("center", [1.0, torch.tensor(1.0), torch.tensor([0.5, 1.5, 1.0]).double()], ids=["number", "0-d", "per sequence"])
@pytest.mark.parametrize("smoothing", ["hinge", "indicator"])
def test_equals_formula(center, smoothing):
    logp, old, entropy, advantages = draw()
    leaves = [logp.requires_grad_(), entropy.requires_grad_()]
    out = epo_loss(leaves[0], old, leaves[1], advantages, MASK, mean_entropy=center, smoothing=smoothing, **OPTIONS)
    centers = center if isinstance(center, torch.Tensor) and center.dim() else [1.0] * B
    expected = naive(leaves[0], old, leaves[1], advantages, centers, smoothing)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(expected, leaves))
    outside = out.metrics["entropy_low_fraction"] + out.metrics["entropy_high_fraction"]
    assert 0 < out.metrics["entropy_low_fraction"] and 0 < out.metrics["entropy_high_fraction"] and outside < 1


def test_gradient_by_entropy_in_closed_form():
    """coef W (-1 + beta alpha (1{H > kappa_high h} - 1{H < kappa_low h}))"""
    logp, old, entropy, advantages = draw()
    leaf = entropy.requires_grad_()
    epo_loss(logp, old, leaf, advantages, MASK, mean_entropy=1.0, **OPTIONS).loss.backward()
    side = (entropy > 1.4).double() - (entropy < 0.7).double()
    assert {side[MASK].min().item(), side[MASK].max().item()} == {-1, 1}
    torch.testing.assert_close(leaf.grad, 0.3 / MASK.sum().double() * (-1 + 1.7 * 0.5 * side) * MASK)


def test_released_indicator_changes_the_value_and_not_the_gradient():
    logp, old, entropy, advantages = draw()
    leaf = entropy.requires_grad_()
    without = epo_loss(logp, old, leaf, advantages, MASK, mean_entropy=None, **OPTIONS)
    indicator = epo_loss(logp, old, leaf, advantages, MASK, mean_entropy=1.0, smoothing="indicator", **OPTIONS)
    hinge = epo_loss(logp, old, leaf, advantages, MASK, mean_entropy=1.0, **OPTIONS)
    assert indicator.loss > without.loss and hinge.loss > without.loss
    gradients = [torch.autograd.grad(out.loss, leaf)[0] for out in (without, indicator, hinge)]
    assert torch.equal(gradients[0], gradients[1]) and not torch.equal(gradients[0], gradients[2])


def test_gradient_reaches_the_logits():
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(B, T, 6, generator=g, dtype=torch.float64).requires_grad_()
    ids = torch.randint(0, 6, (B, T), generator=g)
    advantages = draw()[3]
    stats = rlkern.token_stats(logits, ids, mask=MASK)
    out = epo_loss(stats.logp, None, stats.entropy, advantages, MASK, mean_entropy=1.2, **OPTIONS)
    log_p = logits.log_softmax(-1)
    taken = log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    expected = naive(taken, taken.detach(), -(log_p.exp() * log_p).sum(-1), advantages, [1.2] * B)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(torch.autograd.grad(out.loss, logits), torch.autograd.grad(expected, logits))


def test_without_entropy_terms_it_is_ppo():
    logp, old, entropy, advantages = draw()
    ppo = rlkern.ppo_loss(logp, old, advantages, MASK)
    out = epo_loss(logp, old, entropy, advantages, MASK, mean_entropy=1.0, coef=0.0)
    torch.testing.assert_close(out.loss, ppo.loss)
    assert ppo.metrics.keys() < out.metrics.keys()


def test_history():
    history = EntropyHistory()
    assert history.mean is None
    logp, old, entropy, advantages = draw()
    for scale in (1.0, 3.0, 0.5):
        out = epo_loss(logp, old, scale * entropy, advantages, MASK, mean_entropy=history.mean)
        history.update(out.metrics["entropy"])
    assert history.steps == 3
    torch.testing.assert_close(history.mean, entropy[MASK].mean() * 1.5)
    restored = EntropyHistory(history.total, history.steps)
    restored.update(torch.tensor(0.0))
    torch.testing.assert_close(restored.mean, entropy[MASK].mean() * 4.5 / 4)
    turns = EntropyHistory()
    turns.update(torch.tensor([1.0, 2.0]))
    turns.update(torch.tensor([2.0, 4.0]))
    assert turns.mean.tolist() == [1.5, 3.0]
    with pytest.raises(TypeError, match="entropy must be a bool or number tensor"):
        history.update(1.0)


def test_schedules():
    assert epo_beta(0, 100) == 2
    assert epo_beta(50, 100, gamma=3.0) == pytest.approx(1 + math.exp(-3))
    assert epo_beta(100, 100) == pytest.approx(1 + math.exp(-2))
    assert epo_beta(33, 101, gamma=0.5) == pytest.approx(1 + math.exp(-0.5 * 33 / 50))  # floor(101 / 2)
    assert epo_beta(0, 100, schedule="released") == 1
    assert epo_beta(49, 100, schedule="released") == pytest.approx(1 - 0.2 * (1 - math.exp(-2 * 0.98)))
    assert epo_beta(50, 100, schedule="released") == pytest.approx(0.8)
    assert epo_beta(100, 100, schedule="released") == pytest.approx(0.8 * math.exp(-3))
    for arguments, message in (((0, 1), "total_steps must be at least 2"), ((101, 100), "step must be in")):
        with pytest.raises(ValueError, match=message):
            epo_beta(*arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"entropy": torch.zeros(B, T + 1)}, ValueError, "entropy must have the shape of logp"),
        ({"mean_entropy": torch.zeros(B + 1)}, ValueError, "mean_entropy must be"),
        ({"mean_entropy": "1"}, TypeError, "mean_entropy must be a number"),
        ({"smoothing": "l2"}, ValueError, "unknown smoothing 'l2'"),
        ({"alpha": -0.1}, ValueError, "alpha must be in"),
        ({"kappa_low": 1.3}, ValueError, "kappa_high must not be below kappa_low, got .* and 1.3"),
    ],
)
def test_refuses(change, error, message):
    logp, old, entropy, advantages = draw()
    arguments = {"logp": logp, "old_logp": old, "entropy": entropy, "advantages": advantages, "mask": MASK, "mean_entropy": 1.0} | change
    with pytest.raises(error, match=message):
        epo_loss(**arguments)
