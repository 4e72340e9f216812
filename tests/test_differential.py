"""The differential-information metrics, against exact sums over small spaces."""

import math

import pytest
import torch

from rlkern.metrics.differential import did_entropy, displacement_metrics, log_ratio_rewards
from rlkern.primitives.did import token_did_entropy


def two_policies(n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=g, dtype=torch.float64).log_softmax(-1) for _ in range(2)]


def exact_entropy(log_new, log_old):
    q = (log_new - log_old).softmax(-1)
    return -(q * q.log()).sum()


def test_did_entropy_is_exact_when_every_response_is_drawn_once_from_a_uniform_proposal():
    log_new, log_old = two_policies()
    proposal = torch.full((6,), -math.log(6), dtype=torch.float64)
    result = did_entropy(log_new, log_old, proposal)
    torch.testing.assert_close(result.entropy, exact_entropy(log_new, log_old), rtol=1e-12, atol=0)
    w = (log_new - log_old).softmax(-1)
    torch.testing.assert_close(result.effective_sample_size, 1 / (w * w).sum())


def test_did_entropy_converges_for_another_proposal():
    log_new, log_old = two_policies()
    g = torch.Generator().manual_seed(1)
    samples = torch.multinomial(log_new.exp(), 400_000, replacement=True, generator=g)
    entropy = did_entropy(log_new[samples], log_old[samples], log_new[samples]).entropy
    assert abs(entropy - exact_entropy(log_new, log_old)) < 0.01
    forgot_proposal = did_entropy(log_new[samples], log_old[samples], torch.zeros(400_000).double()).entropy
    assert abs(forgot_proposal - exact_entropy(log_new, log_old)) > 0.1


def test_did_entropy_of_whole_responses_does_not_overflow():
    logps = torch.tensor([[-900.0, -850.0, -1000.0]])
    result = did_entropy(logps, logps - torch.tensor([1.0, 2.0, 3.0]), logps)
    assert result.entropy.shape == (1,) and result.entropy.isfinite().all() and result.effective_sample_size == 1


def test_identical_policies_have_the_entropy_of_the_whole_space():
    log_new, _ = two_policies()
    assert did_entropy(log_new, log_new, torch.full((6,), -math.log(6))).entropy.item() == pytest.approx(math.log(6))


def test_token_did_entropy():
    g = torch.Generator().manual_seed(2)
    logits, reference = (torch.randn(3, 4, 9, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    q = (logits - reference).softmax(-1)
    expected = -(q * q.log()).sum(-1)
    result = token_did_entropy(logits, reference)
    weights = torch.randn(3, 4, generator=g, dtype=torch.float64)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(
        torch.autograd.grad((result * weights).sum(), (logits, reference)), torch.autograd.grad((expected * weights).sum(), (logits, reference))
    )
    low = token_did_entropy(logits.bfloat16(), reference.bfloat16())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, token_did_entropy(logits.bfloat16().double(), reference.bfloat16().double()).float(), rtol=1e-5, atol=1e-5)


def test_token_did_entropy_with_a_masked_vocabulary():
    g = torch.Generator().manual_seed(2)
    logits, reference = (torch.randn(2, 9, generator=g) for _ in range(2))
    expected = token_did_entropy(logits[:, 2:], reference[:, 2:])
    logits[:, :2] = -math.inf
    reference[:, :1] = -math.inf
    leaves = [logits.requires_grad_(), reference.requires_grad_()]
    result = token_did_entropy(*leaves)
    torch.testing.assert_close(result, expected)
    result.sum().backward()
    for leaf in leaves:
        assert leaf.grad.isfinite().all() and (leaf.grad[:, :2] == 0).all() and (leaf.grad[:, 2:] != 0).any()


def test_rewards_and_displacement():
    chosen, rejected = torch.tensor([-10.0, -20.0, -5.0, -8.0]), torch.tensor([-12.0, -30.0, -5.0, -9.0])
    ref_chosen, ref_rejected = torch.tensor([-11.0, -19.0, -5.0, -7.0]), torch.tensor([-10.0, -25.0, -6.0, -8.5])
    torch.testing.assert_close(log_ratio_rewards(chosen, ref_chosen, beta=0.5), torch.tensor([0.5, -0.5, 0.0, -0.5]))
    metrics = displacement_metrics(chosen, rejected, ref_chosen, ref_rejected)
    expected = {"chosen_shift": -0.25, "rejected_shift": -1.625, "margin_shift": 1.375, "both_decreased": 0.5, "chosen_decreased": 0.5, "pairs": 4}
    assert {k: v.item() for k, v in metrics.items()} == expected
    assert all(v == 0 for v in displacement_metrics(*(torch.zeros(0),) * 4).values())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: did_entropy(torch.ones(3), torch.ones(3), torch.ones(2)),
            ValueError,
            r"proposal_logps must have the shape of logps \(3,\), got \(2,\)",
        ),
        (lambda: did_entropy(torch.ones(2, 0), torch.ones(2, 0), torch.ones(2, 0)), ValueError, "K >= 1"),
        (lambda: did_entropy(torch.ones(2).long(), torch.ones(2), torch.ones(2)), TypeError, "logps must be a float tensor"),
        (lambda: token_did_entropy(torch.ones(2, 3), torch.ones(2, 4)), ValueError, "reference_logits must have the shape"),
        (lambda: log_ratio_rewards(torch.ones(2), torch.ones(2), beta="x"), TypeError, "beta must be a number"),
        (lambda: log_ratio_rewards(torch.ones(2), torch.ones(2), beta=-0.1), ValueError, "beta must be in"),
        (
            lambda: displacement_metrics(*(torch.ones(2),) * 3, torch.ones(3)),
            ValueError,
            r"reference_rejected_logps must have the shape of policy_chosen_logps \(2,\), got \(3,\)",
        ),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()
