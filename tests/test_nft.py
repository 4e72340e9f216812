"""nft_loss against its formula, token by token in float64, and what the paper says about it."""

import math

import pytest
import torch

import rlkern
from rlkern.losses.policy.nft import nft_loss

B, T = 6, 5
# success rates beyond both bounds and inside; right, wrong and fractional answers
RATE = torch.tensor([0.25, 0.25, 0.6, 0.6, 0.001, 1.0], dtype=torch.float64)
CORRECT = torch.tensor([1.0, 0.0, 0.0, 0.3, 1.0, 0.0], dtype=torch.float64)
MASK = torch.arange(T) < torch.tensor([5, 4, 3, 5, 2, 5]).unsqueeze(-1)


def draw(seed=0):
    g = torch.Generator().manual_seed(seed)
    old = -0.1 - 3 * torch.rand(B, T, generator=g, dtype=torch.float64)
    logp = old + torch.randn(B, T, generator=g, dtype=torch.float64)
    logp[0, 0] = old[0, 0] + 11  # beyond the clamp of the ratio
    logp[1, 0] = old[1, 0] + 12
    return logp, old


def naive_token(log_ratio, c, k, normalize, neg_weight, clamp_neg, clamp_pos=0.0):
    """(loss, its derivative by logp) of one token or, with a summed log ratio, of one response."""
    c = min(max(c, 0.02), 0.98)
    inside = log_ratio <= 10
    ratio = math.exp(min(log_ratio, 10))
    prox = (1 - c * ratio) / (1 - c)
    w = {0: 1, 1: 1 - c, 2: math.sqrt((1 - c) / c)}[normalize]
    loss = w * (-k * math.log(max(ratio, clamp_pos)) - (1 - k) * neg_weight * math.log(max(prox, clamp_neg)))
    d_pos = -ratio / max(ratio, clamp_pos)
    slope = w * (k * d_pos + (1 - k) * neg_weight * (c / (1 - c)) * ratio / max(prox, clamp_neg)) if inside else 0
    return loss, slope


OPTIONS = [
    {},
    {"normalize": 0},
    {"normalize": 2},
    {"neg_weight": 0.0},
    {"neg_weight": 0.5, "normalize": 2},
    {"clamp_neg": 0.1},
    {"clamp_pos": 0.7},
]


@pytest.mark.parametrize("ratio_type", ["token", "sequence"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_formula(options, ratio_type):
    logp, old = draw()
    full = {"normalize": 1, "neg_weight": 1.0, "clamp_neg": 1.0} | options
    expected, gradient = 0.0, torch.zeros(B, T, dtype=torch.float64)
    for b in range(B):
        log_ratios = [(logp[b, t] - old[b, t]).item() for t in range(T) if MASK[b, t]]
        if ratio_type == "sequence":
            loss, slope = naive_token(sum(log_ratios), RATE[b].item(), CORRECT[b].item(), **full)
            expected += loss
            gradient[b, : len(log_ratios)] = slope
            continue
        for t, d in enumerate(log_ratios):
            loss, slope = naive_token(d, RATE[b].item(), CORRECT[b].item(), **full)
            expected += loss / 1000
            gradient[b, t] = slope / 1000
    leaf = logp.requires_grad_()
    out = nft_loss(leaf, old, RATE, CORRECT, MASK, ratio_type=ratio_type, **options)
    out.loss.backward()
    torch.testing.assert_close(out.loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=0)
    torch.testing.assert_close(leaf.grad, gradient, rtol=1e-11, atol=1e-15)
    assert (gradient != 0).any()


def test_sum_over_the_batch_or_any_other_aggregation():
    logp, old = draw()
    once = nft_loss(logp, old, RATE, CORRECT, MASK).loss
    twice = nft_loss(*(torch.cat([x, x]) for x in (logp, old, RATE, CORRECT, MASK))).loss
    torch.testing.assert_close(twice, 2 * once)
    torch.testing.assert_close(nft_loss(logp, old, RATE, CORRECT, MASK, normalizer=torch.tensor(24.0)).loss, once * 1000 / 24)
    torch.testing.assert_close(nft_loss(logp, old, RATE, CORRECT, MASK, aggregation="token-mean").loss, once * 1000 / MASK.sum())
    per_sequence = nft_loss(logp, old, RATE, CORRECT, MASK, ratio_type="sequence")
    torch.testing.assert_close(nft_loss(logp, old, RATE, CORRECT, MASK, ratio_type="sequence", normalizer=6).loss, per_sequence.loss / 6)


@pytest.mark.parametrize("old", ["given", None])
@pytest.mark.parametrize(("normalize", "scale"), [(1, lambda c: 1.0), (2, lambda c: math.sqrt(c * (1 - c)))])
def test_on_policy_it_is_grpo(normalize, scale, old):
    """On-policy gradient by logp: -(k - c), Dr.GRPO, or that over the (biased) std of the rewards, GRPO."""
    correct = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    c = 0.4
    logp = draw()[0][:5].requires_grad_()
    old = None if old is None else logp.detach()
    nft_loss(logp, old, torch.full((5,), c), correct, torch.ones(5, T), normalize=normalize, normalizer=1).loss.backward()
    expected = -(correct - c) / scale(c)
    torch.testing.assert_close(logp.grad, expected.unsqueeze(-1).expand(5, T), rtol=1e-6, atol=0)


def test_a_clamped_wrong_token_has_no_loss_and_a_gradient():
    logp = torch.tensor([[0.5]], dtype=torch.float64, requires_grad=True)
    out = nft_loss(logp, torch.zeros(1, 1, dtype=torch.float64), torch.tensor([0.25]), torch.tensor([False]), torch.ones(1, 1), normalizer=1)
    out.loss.backward()
    assert out.loss == 0
    torch.testing.assert_close(logp.grad, torch.tensor([[0.25 * math.exp(0.5)]], dtype=torch.float64))


def test_vanished_ratio_of_a_right_answer_keeps_its_gradient():
    """exp(-200) is 0 in float32; the official code's log of it is infinite and its gradient NaN."""
    logp = torch.tensor([[-200.0]], requires_grad=True)
    out = nft_loss(logp, torch.zeros(1, 1), torch.tensor([0.5]), torch.tensor([1.0]), torch.ones(1, 1), normalize=0, normalizer=1)
    out.loss.backward()
    assert out.loss == 200 and logp.grad == -1


def test_metrics():
    logp, old = draw()
    metrics = nft_loss(logp, old, RATE, CORRECT, MASK).metrics
    c = RATE.clamp(0.02, 0.98).unsqueeze(-1).expand(B, T)
    k = CORRECT.unsqueeze(-1).expand(B, T)
    prox = (1 - c * (logp - old).clamp(max=10).exp()) / (1 - c)
    assert metrics["success_rate"].item() == pytest.approx(c[MASK].mean().item())
    assert metrics["positive_fraction"].item() == pytest.approx(k[MASK].mean().item())
    assert metrics["clamped_fraction"].item() == pytest.approx(((prox < 1) & (k < 1))[MASK].double().mean().item())
    assert metrics["ratio_max"].item() == pytest.approx(math.exp(12))


@pytest.mark.parametrize("ratio_type", ["token", "sequence"])
def test_weights(ratio_type):
    """Each answer's loss times its weight; what is masked may hold anything."""
    logp, old = draw()
    weights = torch.linspace(0, 2, B, dtype=torch.float64)

    def of(weights, where):
        leaf = logp.detach().requires_grad_()
        loss = nft_loss(leaf, old, RATE, CORRECT, MASK & where, ratio_type=ratio_type, weights=weights).loss
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    rows = torch.arange(B).unsqueeze(-1)
    alone = [of(None, rows == i) for i in range(B)]
    want = [sum(w * x for w, x in zip(weights, parts, strict=True)) for parts in zip(*alone, strict=True)]
    for form in (weights, weights.unsqueeze(-1)):
        torch.testing.assert_close(of(form, rows >= 0), tuple(want))
    if ratio_type == "token":
        torch.testing.assert_close(of(torch.where(MASK, weights.unsqueeze(-1), torch.nan), rows >= 0), tuple(want))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"success_rate": torch.ones(5)},
            ValueError,
            r"success_rate must be \[B\] or \[B, 1\], here \(6,\) or \(6, 1\) for logp \(6, 5\), got \(5,\)",
        ),
        ({"correct": [1.0]}, TypeError, "correct must be a bool or number tensor"),
        ({"mask": torch.ones(6, 4)}, ValueError, r"mask must have the shape of logp \(6, 5\)"),
        ({"logp": [0.0]}, TypeError, "logp must be a float tensor"),
        ({"normalize": 3}, ValueError, "unknown normalize 3"),
        ({"ratio_type": "group"}, ValueError, "unknown ratio_type 'group'"),
        ({"neg_weight": -1.0}, ValueError, "neg_weight must be in"),
        ({"clamp_neg": 0.0}, ValueError, "clamp_neg must be positive"),
        ({"rate_bounds": (2, 98)}, ValueError, "rate_bounds is a fraction"),
        ({"rate_bounds": (0.0, 0.98)}, ValueError, "0 < low <= high < 1"),
        ({"aggregation": "mean"}, ValueError, "unknown aggregation mode 'mean'"),
        ({"ratio_type": "sequence", "aggregation": "token-mean"}, ValueError, "aggregation must be None"),
        ({"ratio_type": "sequence", "weights": torch.ones(6, 5)}, ValueError, r"weights must be \[B\] or \[B, 1\]"),
        ({"weights": rlkern.rollout_weights(*draw(), MASK)}, ValueError, "this loss takes none: old_logp is the rollout's"),
    ],
)
def test_refuses(change, error, message):
    logp, old = draw()
    arguments = {"logp": logp, "old_logp": old, "success_rate": RATE, "correct": CORRECT, "mask": MASK} | change
    with pytest.raises(error, match=message):
        nft_loss(**arguments)
