"""Rows that are documented as not read may hold anything, temperature and targets included. No check reads
them, and nothing of them reaches a value or a gradient."""

import math

import pytest
import torch

import rlkern

READ = torch.tensor([[True, False, True, False, False], [True, True, False, False, True]])
GARBAGE = (0.0, -1.0, math.nan, math.inf)


def draw(garbage, device="cpu"):
    """Logits, targets, mask, temperature [2, 5]. One unread row is masked, the others' target is ignored."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=g).masked_fill(~READ.unsqueeze(-1), math.nan)
    targets = torch.randint(0, 7, (2, 5), generator=g).masked_fill(~READ, -100)
    targets[0, 1] = 10**6
    mask = READ | (targets == -100)
    temperature = (0.5 + torch.rand(2, 5, generator=g)).masked_fill(~READ, garbage)
    return [t.to(device) for t in (logits, targets, mask, temperature)]


def read(x):
    """READ, beside x."""
    return READ.to(x.device)


def at(log_p, targets):
    return log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def entropy(log_p, targets):
    return -(log_p.exp() * log_p).sum(-1)


def reverse_kl(log_p, targets):
    """To what has the logits in reverse."""
    return (log_p.exp() * (log_p - log_p.detach().flip(-1))).sum(-1)


# name -> (rlkern's, the same in float64 by log-probabilities and targets of the rows that are read)
ROWS = {
    "token_stats": (
        lambda x, y, m, t: (lambda s: s.logp + s.entropy)(rlkern.token_stats(x, y, mask=m, temperature=t, with_sum_sq=True, min_p=0.1)),
        lambda log_p, y: at(log_p, y) + entropy(log_p, y),
    ),
    "token_logprobs": (lambda x, y, m, t: rlkern.token_logprobs(x, y, mask=m, temperature=t), at),
    "several targets": (
        lambda x, y, m, t: rlkern.token_logprobs(x, torch.stack([y, y], -1), mask=m, temperature=t).sum(-1),
        lambda log_p, y: 2 * at(log_p, y),
    ),
    "entropy_from_logits": (lambda x, y, m, t: rlkern.entropy_from_logits(x, mask=read(x), temperature=t), entropy),
    "token_divergence": (lambda x, y, m, t: rlkern.token_divergence(x, x.detach().flip(-1), mask=read(x), temperature=t), reverse_kl),
    "pair_stats": (
        lambda x, y, m, t: (lambda s: s.divergence + s.logp)(rlkern.pair_stats(x, x.detach().flip(-1), y, mask=m, temperature=t)),
        lambda log_p, y: reverse_kl(log_p, y) + at(log_p, y),
    ),
    "other_temperature": (
        lambda x, y, m, t: rlkern.token_divergence(x, x.detach().flip(-1), mask=read(x), temperature=1.0 * t, other_temperature=t),
        reverse_kl,
    ),
    "token_did_entropy": (
        lambda x, y, m, t: rlkern.token_did_entropy(x, x.detach().flip(-1), mask=read(x), temperature=t),
        lambda log_p, y: entropy((log_p - log_p.detach().flip(-1)).log_softmax(-1), y),
    ),
    "linear_token_stats": (
        lambda x, y, m, t: rlkern.linear_token_stats(x, torch.eye(7, device=x.device), y, mask=m, temperature=t, chunk_rows=2).logp,
        at,
    ),
    "linear_token_divergence": (
        lambda x, y, m, t: rlkern.linear_token_divergence(
            *(x, torch.eye(7, device=x.device)), *(x.detach(), torch.eye(7, device=x.device).flip(0)), mask=read(x), temperature=t, chunk_rows=2
        ),
        reverse_kl,
    ),
    "nlpo_stats": (lambda x, y, m, t: rlkern.nlpo_stats(x, y, read(x).unsqueeze(-1).expand(2, 5, 7), mask=m, temperature=t).logp, at),
    "masked_elbo": (
        lambda x, y, m, t: rlkern.masked_elbo(x, y, torch.where(read(x), 2.0, math.nan).masked_fill(y == -100, -1), mask=m, temperature=t) / 2,
        at,
    ),
    "sequence_logps": (lambda x, y, m, t: rlkern.sequence_logps(x, y.masked_fill(~m, -100), shift=False, temperature=t), at),
}


def check(function, naive, garbage, device="cpu"):
    logits, targets, mask, temperature = draw(garbage, device)
    rows = read(logits)
    leaf, exact = logits.clone().requires_grad_(), logits[rows].double().requires_grad_()
    log_p = (exact / temperature[rows].double().unsqueeze(-1)).log_softmax(-1)
    values, expected = function(leaf, targets, mask, temperature), naive(log_p, targets[rows])
    if values.shape == rows.shape:
        assert (values[~rows] == 0).all()
        torch.testing.assert_close(values[rows].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values.double().sum(), expected.sum(), rtol=1e-5, atol=1e-5)
    values.sum().backward()
    expected.sum().backward()
    assert (leaf.grad[~rows] == 0).all()
    torch.testing.assert_close(leaf.grad[rows].double(), exact.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_that_is_not_read_may_have_any_temperature(name, backend, device):
    for garbage in GARBAGE:
        check(*ROWS[name], garbage, device)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_that_is_read_may_not(name):
    function, _ = ROWS[name]
    logits, targets, mask, temperature = draw(1.0)
    temperature[1, 4] = 0
    with pytest.raises(ValueError, match="temperature must be positive and finite in every row that is read, got 0.0"):
        function(logits, targets, mask, temperature)


@pytest.mark.parametrize("name", ["token_stats", "token_divergence", "linear_token_stats", "linear_token_divergence"])
def test_compiled(name):
    function, naive = ROWS[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for garbage in (0.0, math.nan):
        check(compiled, naive, garbage)


def test_fake_tensors():
    """Checks of numbers wait for real ones."""
    with torch._subclasses.FakeTensorMode():
        stats = rlkern.token_stats(torch.ones(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64), temperature=torch.ones(2, 3))
    assert stats.logp.shape == (2, 3)


def test_an_error_names_the_row_of_the_caller():
    targets = torch.tensor([-100, 99, 1, 2, 3, 7, 0])
    mask = torch.tensor([1, 0, 1, 1, 1, 1, 1])
    for function in (
        lambda x: rlkern.token_stats(x, targets, mask=mask),
        lambda x: rlkern.linear_token_stats(x, torch.eye(7), targets, mask=mask, chunk_rows=2),
    ):
        with pytest.raises(IndexError, match="target 7 of row 5 is out of range for 7 logits"):
            function(torch.zeros(7, 7))
