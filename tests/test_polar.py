"""Bradley-Terry losses against the formulas, term by term."""

import pytest
import torch

from rlkern.losses.reward.polar import bradley_terry_loss, polar_finetune_loss, polar_pretrain_loss

CHOSEN = torch.tensor([1.0, -2.0, 6.0, 0.5, 4.9995], dtype=torch.float64)
REJECTED = torch.tensor([0.2, 1.0, -7.0, 0.4, 0.0], dtype=torch.float64)
MARGIN = torch.tensor([0.1, 0.0, 2.0, 0.5, 1.0], dtype=torch.float64)


def naive(chosen, rejected, margin=None, gamma=0, penalty="none", weight=0.01, bound=5, centering=0):
    d = chosen - rejected - (0 if margin is None else margin)
    loss = -d.sigmoid().log()
    if gamma:
        loss = loss * (1 - 2 * (d.sigmoid() - 0.5).relu()) ** gamma
    loss = loss + centering * (chosen + rejected) ** 2
    for r in (chosen, rejected):
        if penalty == "l2":
            loss = loss + weight * r**2
        elif penalty == "log_barrier":
            inside = r.clamp(-bound + 1e-3, bound - 1e-3)
            loss = loss - weight * ((bound - inside).log() + (inside + bound).log())
    return loss.mean()


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({}, {}),
        ({"margin": MARGIN}, {"margin": MARGIN}),
        ({"focal_gamma": 2.0}, {"gamma": 2.0}),
        ({"focal_gamma": 1.5, "margin": MARGIN}, {"gamma": 1.5, "margin": MARGIN}),
        ({"penalty": "log_barrier"}, {"penalty": "log_barrier"}),
        ({"penalty": "log_barrier", "penalty_weight": 0.3, "reward_bound": 6.5}, {"penalty": "log_barrier", "weight": 0.3, "bound": 6.5}),
        ({"penalty": "l2", "penalty_weight": 0.1}, {"penalty": "l2", "weight": 0.1}),
        ({"centering": 0.01}, {"centering": 0.01}),
    ],
    ids=str,
)
@pytest.mark.parametrize("loss", [bradley_terry_loss, polar_pretrain_loss, polar_finetune_loss])
def test_equals_formula(loss, options, plain):
    leaves = [x.clone().requires_grad_() for x in (CHOSEN, REJECTED)]
    out = loss(*leaves, **options)
    expected = naive(*leaves, **plain)
    torch.testing.assert_close(out.loss, expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(expected, leaves), rtol=1e-11, atol=1e-12)


def test_metrics_and_normalizer():
    out = bradley_terry_loss(CHOSEN, REJECTED, normalizer=10)
    torch.testing.assert_close(out.loss, naive(CHOSEN, REJECTED) / 2)
    assert out.metrics["accuracy"].item() == pytest.approx(0.8)
    assert out.metrics["reward_margin"].item() == pytest.approx((CHOSEN - REJECTED).mean().item())
    assert out.metrics["chosen_reward"].item() == pytest.approx(CHOSEN.mean().item())
    assert out.metrics["rejected_reward"].item() == pytest.approx(REJECTED.mean().item())


def test_shift_invariance_and_its_end():
    torch.testing.assert_close(bradley_terry_loss(CHOSEN + 3, REJECTED + 3).loss, bradley_terry_loss(CHOSEN, REJECTED).loss)
    assert bradley_terry_loss(CHOSEN + 3, REJECTED + 3, centering=0.1).loss > bradley_terry_loss(CHOSEN, REJECTED, centering=0.1).loss


def test_large_differences_are_finite():
    leaves = [torch.tensor([200.0, -200.0]).requires_grad_(), torch.tensor([-200.0, 200.0]).requires_grad_()]
    out = bradley_terry_loss(*leaves, focal_gamma=2.0)
    assert out.loss == 200
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.loss, leaves))


def test_untrained_head_gets_the_ranking_gradient():
    """A zero-initialised head gives equal rewards: the focal weight is 1 and has no gradient."""
    leaf = torch.zeros(4, requires_grad=True)
    bradley_terry_loss(leaf, torch.zeros(4), focal_gamma=2.0).loss.backward()
    assert (leaf.grad == -0.5 / 4).all()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((CHOSEN, REJECTED[:4]), {}, ValueError, r"rejected_rewards must have the shape of chosen_rewards \(5,\), got \(4,\)"),
        ((CHOSEN.view(5, 1), REJECTED.view(5, 1)), {}, ValueError, r"chosen_rewards must be \[B\] \(one reward a response\), got shape \(5, 1\)"),
        ((CHOSEN.long(), REJECTED), {}, TypeError, "chosen_rewards must be a float tensor"),
        ((CHOSEN, None), {}, TypeError, "rejected_rewards must be a float tensor .*None"),
        ((CHOSEN, REJECTED), {"margin": 0.5}, TypeError, "margin must be a float tensor"),
        ((CHOSEN, REJECTED), {"penalty": "l1"}, ValueError, "unknown penalty 'l1'"),
        ((CHOSEN, REJECTED), {"focal_gamma": -1}, ValueError, "focal_gamma must be in"),
        ((CHOSEN, REJECTED), {"reward_bound": 0.0}, ValueError, "reward_bound must be above"),
        ((CHOSEN, REJECTED), {"normalizer": "B"}, TypeError, "normalizer must be a number"),
    ],
)
def test_refuses(arguments, options, error, message):
    with pytest.raises(error, match=message):
        bradley_terry_loss(*arguments, **options)
