"""Advantages and weights with a gradient, which a loss would drop without a word, are refused."""

import pytest
import torch

import rlkern
from rlkern.checks import per_token

LOGP = torch.tensor([[-1.0, -2.0, -0.5], [-0.1, -3.0, -1.5]])
LEAF, MASK, PLAIN = LOGP.clone().requires_grad_(), torch.ones(2, 3), torch.ones(2)


@pytest.mark.parametrize("shape", [(2, 3), (2, 1), (2,)])
def test_a_gradient_that_would_be_lost_is_refused(shape):
    values = torch.ones(shape, requires_grad=True)
    with pytest.raises(ValueError, match="^critic_scores must not require grad, got requires_grad=True: detach it$"):
        per_token("critic_scores", values, LOGP)
    with torch.no_grad(), pytest.raises(ValueError, match="critic_scores must not require grad"):
        per_token("critic_scores", values, LOGP)
    assert per_token("critic_scores", values.detach(), LOGP).shape == (2, 3)


@pytest.mark.parametrize(
    "loss", [rlkern.ppo_loss, rlkern.grpo_loss, rlkern.gspo_loss, rlkern.clip_cov_loss, rlkern.kl_cov_loss, rlkern.reinforce_loss]
)
def test_policy_losses_refuse_it(loss):
    with pytest.raises(ValueError, match="advantages must not require grad"):
        loss(LEAF, LOGP, (2 * LEAF).sum(-1), MASK)
    with pytest.raises(ValueError, match="weights must not require grad"):
        loss(LEAF, LOGP, PLAIN, MASK, weights=LEAF.exp())
    # The log-probabilities of the step themselves are how on-policy is written: detached.
    on_policy, detached = (torch.autograd.grad(loss(LEAF, old, PLAIN, MASK).loss, LEAF) for old in (LEAF, LOGP))
    assert torch.equal(*on_policy, *detached)


@pytest.mark.parametrize(
    "name, call",
    [
        ("advantages", lambda: rlkern.lp_reg_loss(LEAF, LOGP, LOGP, LEAF, MASK)),
        ("advantages", lambda: rlkern.token_covariance(LEAF, LEAF, MASK)),
        ("kl_scale", lambda: rlkern.grpo_loss(LEAF, LOGP, PLAIN, MASK, reference_logp=LOGP, kl_coef=0.1, kl_scale=LEAF)),
    ],
)
def test_others_refuse_it(name, call):
    with pytest.raises(ValueError, match=f"{name} must not require grad"):
        call()
