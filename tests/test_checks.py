"""What a caller may not pass: advantages and weights with a gradient that the loss would drop without a word."""

import pytest
import torch

import rlkern
from rlkern.checks import per_token

LOGP = torch.tensor([[-1.0, -2.0, -0.5], [-0.1, -3.0, -1.5]])


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
    logp, mask, plain = LOGP.clone().requires_grad_(), torch.ones(2, 3), torch.ones(2)
    with pytest.raises(ValueError, match="advantages must not require grad"):
        loss(logp, LOGP, (2 * logp).sum(-1), mask)
    with pytest.raises(ValueError, match="weights must not require grad"):
        loss(logp, LOGP, plain, mask, weights=logp.exp())
    # The log-probabilities of the step themselves are how on-policy is written: detached.
    on_policy = torch.autograd.grad(loss(logp, logp, plain, mask).loss, logp)[0]
    assert torch.equal(on_policy, torch.autograd.grad(loss(logp, logp.detach(), plain, mask).loss, logp)[0])


def test_others_refuse_it():
    logp, mask, plain = LOGP.clone().requires_grad_(), torch.ones(2, 3), torch.ones(2)
    with pytest.raises(ValueError, match="advantages must not require grad"):
        rlkern.lp_reg_loss(logp, LOGP, LOGP, logp, mask)
    with pytest.raises(ValueError, match="advantages must not require grad"):
        rlkern.token_covariance(logp, logp, mask)
    with pytest.raises(ValueError, match="kl_scale must not require grad"):
        rlkern.grpo_loss(logp, LOGP, plain, mask, reference_logp=LOGP, kl_coef=0.1, kl_scale=logp)
