"""kdrl_loss against its formula, and its estimators by sums over all tokens of a small vocabulary."""

import math

import pytest
import torch

import rlkern
from rlkern.losses.distillation.kdrl import kd_coefficient, kdrl_loss, reward_guided_mask
from rlkern.primitives.topk import topk_reverse_kl

B, T = 4, 5
MASK = torch.arange(T) < torch.tensor([5, 3, 4, 1]).unsqueeze(-1)
KD_MASK = torch.tensor([True, False, True, True])


def draw():
    g = torch.Generator().manual_seed(0)
    logp, noise, teacher = (-2 * torch.rand(B, T, generator=g, dtype=torch.float64) for _ in range(3))
    return logp, logp + 0.5 * (noise + 1), teacher, torch.randn(B, generator=g, dtype=torch.float64)


def naive(logp, old, teacher, advantages, kd, coef, kd_mask, kd_norm):
    policy, distil, n, kept = 0.0, 0.0, 0, 0
    for b in range(B):
        for t in range(T):
            if not MASK[b, t]:
                continue
            r, a, gap = (logp[b, t] - old[b, t]).exp(), advantages[b], teacher[b, t] - logp[b, t]
            policy = policy - torch.minimum(a * r, a * r.clamp(0.8, 1.2))
            n += 1
            if kd_mask[b]:
                distil = distil + {"k1": -gap, "k2": gap**2 / 2, "k3": gap.exp() - gap - 1}[kd]
                kept += 1
    return policy / n + coef * distil / (n if kd_norm == "all" else kept)


@pytest.mark.parametrize("kd", ["k1", "k2", "k3"])
@pytest.mark.parametrize("kd_norm", ["all", "kept"])
@pytest.mark.parametrize("kd_mask", [None, KD_MASK, KD_MASK.float().unsqueeze(-1)], ids=["all", "some", "column"])
def test_equals_formula(kd, kd_norm, kd_mask):
    logp, old, teacher, advantages = draw()
    leaf = logp.requires_grad_()
    out = kdrl_loss(leaf, old, teacher, advantages, MASK, kd=kd, kd_coef=0.3, kd_mask=kd_mask, kd_norm=kd_norm)
    flags = torch.ones(B) if kd_mask is None else kd_mask.flatten()
    expected = naive(leaf, old, teacher, advantages, kd, 0.3, flags, kd_norm)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(torch.autograd.grad(out.loss, leaf), torch.autograd.grad(expected, leaf))
    assert out.metrics["kd_fraction"].item() == pytest.approx(1 if kd_mask is None else 10 / 13)


def test_exact_divergence_through_token_divergence():
    g = torch.Generator().manual_seed(1)
    logits, teacher = (torch.randn(B, T, 9, generator=g, dtype=torch.float64) for _ in range(2))
    ids = torch.randint(0, 9, (B, T), generator=g)
    advantages = draw()[3]
    leaf = logits.requires_grad_()
    logp = rlkern.token_logprobs(leaf, ids)
    kl = rlkern.token_divergence(leaf, teacher)
    out = kdrl_loss(logp, None, None, advantages, MASK, kd="exact", teacher_kl=kl, kd_coef=0.7, kd_mask=KD_MASK)
    log_p, log_q = leaf.log_softmax(-1), teacher.log_softmax(-1)
    exact = (log_p.exp() * (log_p - log_q)).sum(-1)
    taken = log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    per_token = -advantages.unsqueeze(-1) * (taken - taken.detach()).exp() + 0.7 * exact * KD_MASK.unsqueeze(-1)
    expected = per_token[MASK].mean()
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(torch.autograd.grad(out.loss, leaf), torch.autograd.grad(expected, leaf))
    assert out.metrics["kd"].item() == pytest.approx(exact[MASK].mean().item())


def expected_gradient(kd, z, teacher):
    """sum over tokens v of p_v times the gradient at v: the mean over the student's samples."""
    leaf = z.clone().requires_grad_()
    total = torch.zeros_like(z)
    for v in range(len(z)):
        logp, teacher_logp = leaf.log_softmax(-1)[v].view(1, 1), teacher.log_softmax(-1)[v].view(1, 1)
        out = kdrl_loss(logp, None, teacher_logp, torch.zeros(1), torch.ones(1, 1), kd=kd, kd_coef=1.0)
        total += z.softmax(-1)[v] * torch.autograd.grad(out.loss, leaf)[0]
    return total


def test_what_the_estimators_optimise():
    g = torch.Generator().manual_seed(2)
    z, teacher = (torch.randn(6, generator=g, dtype=torch.float64) for _ in range(2))
    p, q = z.softmax(-1), teacher.softmax(-1)
    reverse = p * ((p / q).log() - (p * (p / q).log()).sum())
    torch.testing.assert_close(expected_gradient("k1", z, teacher), torch.zeros(6).double(), rtol=0, atol=1e-14)
    torch.testing.assert_close(expected_gradient("k2", z, teacher), reverse)
    torch.testing.assert_close(expected_gradient("k3", z, teacher), p - q)


def test_topk_reverse_kl():
    g = torch.Generator().manual_seed(3)
    z, teacher = (torch.randn(4, 8, generator=g, dtype=torch.float64) for _ in range(2))
    ids = teacher.topk(3).indices
    leaf = z.requires_grad_()
    log_p, log_q = leaf.log_softmax(-1), teacher.log_softmax(-1)
    for renormalize in (False, True):
        value = topk_reverse_kl(rlkern.token_logprobs(leaf, ids), rlkern.token_logprobs(teacher, ids), renormalize=renormalize)
        inside = torch.zeros(4, 8, dtype=torch.bool).scatter_(-1, ids, True)
        l, m = log_p, log_q  # noqa: E741
        if renormalize:
            l, m = (x - x.masked_fill(~inside, -math.inf).logsumexp(-1, keepdim=True) for x in (log_p, log_q))  # noqa: E741
        expected = torch.where(inside, l.exp() * (l - m), 0).sum(-1)
        torch.testing.assert_close(value, expected)
        (gradient,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), leaf, retain_graph=True)[0])
        if not renormalize:
            p = log_p.exp()
            slope = torch.where(inside, log_p - log_q + 1, 0)
            torch.testing.assert_close(gradient, p * (slope - (p * slope).sum(-1, keepdim=True)))
    everything = torch.arange(8).expand(4, 8)
    full = topk_reverse_kl(rlkern.token_logprobs(leaf, everything), rlkern.token_logprobs(teacher, everything))
    torch.testing.assert_close(full, rlkern.token_divergence(leaf, teacher))


def test_topk_at_minus_infinity():
    logp = torch.tensor([[-0.5, -math.inf]], requires_grad=True)
    value = topk_reverse_kl(logp, torch.tensor([[-0.7, -math.inf]]))
    value.backward()
    assert value.item() == pytest.approx(math.exp(-0.5) * 0.2)
    assert logp.grad.isfinite().all() and logp.grad[0, 1] == 0


def test_schedule_and_masks():
    assert [kd_coefficient(t) for t in (0, 40, 80, 1000)] == pytest.approx([5e-3, 3e-3, 1e-3, 1e-3])
    assert kd_coefficient(3, start=1.0, decrement=0.25, floor=0.5) == 0.5
    correct = torch.tensor([1, 0, 0, 0, 0, 1])
    assert reward_guided_mask(correct).tolist() == [False, True, True, True, True, False]
    assert reward_guided_mask(correct, 2, level="group").tolist() == [False, False, True, True, False, False]
    assert reward_guided_mask(correct.bool(), torch.tensor([9, 4, 4, 4, 4, 9]), level="group").tolist() == [False, True, True, True, True, False]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kd": "k4"}, ValueError, "unknown kd 'k4'"),
        ({"kd_norm": "mean"}, ValueError, "unknown kd_norm 'mean'"),
        ({"kd_coef": -1}, ValueError, "kd_coef must be in"),
        ({"kd": "exact"}, ValueError, "teacher_kl= .* belongs to kd='exact'"),
        ({"teacher_kl": torch.zeros(B, T)}, ValueError, "got kd='k2' and teacher_kl given"),
        ({"teacher_logp": None}, TypeError, "teacher_logp must be a float tensor"),
        ({"teacher_logp": torch.zeros(B, T + 1)}, ValueError, "teacher_logp must have the shape of logp"),
        ({"kd_mask": torch.ones(B + 1)}, ValueError, "kd_mask must be"),
        ({"kd_mask": [1, 0]}, TypeError, "kd_mask must be a bool or number tensor"),
        ({"clip_low": 20}, ValueError, "clip_low must be in"),
    ],
)
def test_refuses(change, error, message):
    logp, old, teacher, advantages = draw()
    with pytest.raises(error, match=message):
        kdrl_loss(**{"logp": logp, "old_logp": old, "teacher_logp": teacher, "advantages": advantages, "mask": MASK} | change)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: reward_guided_mask(torch.ones(4), level="token"), ValueError, "unknown level"),
        (lambda: reward_guided_mask(torch.ones(4), level="group"), ValueError, "needs groups="),
        (lambda: reward_guided_mask(torch.ones(2, 2)), ValueError, r"correct must be \[B\]"),
        (lambda: reward_guided_mask([1]), TypeError, "correct must be a bool or number tensor"),
        (lambda: kd_coefficient(-1), ValueError, "step must be in"),
        (lambda: topk_reverse_kl(torch.ones(2, 3), torch.ones(2, 4)), ValueError, r"teacher_logp must have the shape of logp \(2, 3\), got \(2, 4\)"),
        (lambda: topk_reverse_kl(torch.ones(2, 3), torch.ones(2, 3, device="meta")), ValueError, "on the device of logp cpu, got meta"),
        (lambda: topk_reverse_kl(torch.ones(2, 3).long(), torch.ones(2, 3)), TypeError, "logp must be a float tensor"),
    ],
)
def test_helpers_refuse(call, error, message):
    with pytest.raises(error, match=message):
        call()
