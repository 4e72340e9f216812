"""NLPO: the kept set by sorting row by row, the masked policy by its definition, the loss as PPO on it."""

import math

import pytest
import torch

import rlkern
from rlkern.losses.policy.nlpo import nlpo_loss
from rlkern.primitives.kept import nlpo_keep_set, nlpo_stats


def draw(*shape, seed=0):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_top_p(row, top_p, least):
    p = row.softmax(-1).tolist()
    kept, mass = set(), 0.0
    for v in sorted(range(len(p)), key=lambda v: -p[v]):
        if mass > top_p and len(kept) >= least:
            break
        kept.add(v)
        mass += p[v]
    return torch.tensor([v in kept for v in range(len(p))])


@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("least", [1, 4])
def test_top_p(top_p, least):
    logits = draw(2, 5, 12)
    keep = nlpo_keep_set(logits, top_p=top_p, min_tokens_to_keep=least)
    for row, kept in zip(logits.view(-1, 12), keep.view(-1, 12), strict=True):
        assert torch.equal(kept, naive_top_p(row, top_p, least))


def test_the_token_that_crosses_is_kept():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert nlpo_keep_set(logits, top_p=0.6).tolist() == [[True, True, False, False]]
    assert nlpo_keep_set(logits, top_p=0.81).tolist() == [[True, True, True, False]]
    exact = torch.tensor([[0.5, 0.25, 0.25]]).log()
    assert nlpo_keep_set(exact, top_p=0.5).tolist() == [[True, True, True]]  # a mass of 0.5 does not exceed 0.5; a tie
    assert nlpo_keep_set(logits, top_p=0.6, temperature=10.0).tolist() == [[True, True, True, False]]


def test_top_k_special_ids_and_minus_infinity():
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, -math.inf]])
    assert nlpo_keep_set(logits, top_k=1).tolist() == [[True, False, False, False, False]]
    assert nlpo_keep_set(logits, top_k=2).tolist() == [[True, False, True, True, False]]  # a tie
    assert nlpo_keep_set(logits, top_k=1, min_tokens_to_keep=2).tolist() == [[True, False, True, True, False]]
    assert nlpo_keep_set(logits, top_k=9).tolist() == [[True, True, True, True, False]]
    assert nlpo_keep_set(logits, top_k=1, always_keep=torch.tensor([1, 4])).tolist() == [[True, True, False, False, False]]
    assert nlpo_keep_set(logits, top_p=1.0, min_tokens_to_keep=5).tolist() == [[True, True, True, True, False]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("renorm", [True, False])
def test_stats_equal_definition(renorm, temperature):
    logits = draw(3, 4, 9).requires_grad_()
    keep = nlpo_keep_set(draw(3, 4, 9, seed=1), top_p=0.7)
    targets = keep.double().argmax(-1)  # the first kept token of every row
    stats = nlpo_stats(logits, targets, keep, renorm=renorm, temperature=temperature)
    p = (logits / temperature).softmax(-1)
    mass = (p * keep).sum(-1, keepdim=True)
    r = p * keep / mass
    taken = torch.where(keep, r if renorm else p, 1).log()
    logp = taken.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    expected = (logp, -(r * taken).sum(-1), mass.log().squeeze(-1))
    weights = draw(3, 3, 4, seed=2)
    for actual, want in zip(stats, expected, strict=True):
        torch.testing.assert_close(actual, want)
    (gradient,) = torch.autograd.grad(sum((s * w).sum() for s, w in zip(stats, weights, strict=True)), logits)
    (want,) = torch.autograd.grad(sum((s * w).sum() for s, w in zip(expected, weights, strict=True)), logits)
    torch.testing.assert_close(gradient, want)


def test_unnormalised_is_the_plain_policy():
    logits = draw(2, 3, 9)
    keep = nlpo_keep_set(draw(2, 3, 9, seed=1), top_k=4)
    targets = keep.double().argmax(-1)
    plain = rlkern.token_logprobs(logits, targets)
    torch.testing.assert_close(nlpo_stats(logits, targets, keep, renorm=False).logp, plain)
    assert (nlpo_stats(logits, targets, keep).logp > plain).all()


def tokens():
    g = torch.Generator().manual_seed(3)
    logp = -2 * torch.rand(3, 4, generator=g, dtype=torch.float64)
    old = logp + 0.3 * torch.randn(3, 4, generator=g, dtype=torch.float64)
    return logp, old, torch.randn(3, 4, generator=g, dtype=torch.float64), torch.arange(4) < torch.tensor([4, 2, 3]).unsqueeze(-1)


@pytest.mark.parametrize("normalize", [True, False])
def test_loss_is_ppo_with_standardised_advantages_and_entropy(normalize):
    logp, old, advantages, mask = tokens()
    entropy = (logp.detach() ** 2).requires_grad_()
    leaf = logp.requires_grad_()
    out = nlpo_loss(leaf, old, advantages, mask, entropy=entropy, entropy_coef=0.2, normalize_advantages=normalize)
    a = advantages
    if normalize:
        a = (a - a[mask].mean()) / (a[mask].var() + 1e-8).sqrt()
    r = (leaf - old).exp()
    expected = torch.maximum(-a * r, -a * r.clamp(0.8, 1.2))[mask].mean() - 0.2 * entropy[mask].mean()
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(torch.autograd.grad(out.loss, (leaf, entropy)), torch.autograd.grad(expected, (leaf, entropy)))
    assert out.metrics["outside_fraction"] == 0
    assert out.metrics["entropy"].item() == pytest.approx(entropy[mask].mean().item())


def test_masks_of_any_strides():
    """Advantages are whitened over all tokens at once, in one row of numbers."""
    logp, old, advantages, mask = tokens()
    expected = nlpo_loss(logp, old, advantages, mask).loss
    moved = [x.T.contiguous().T if x.dim() == 2 else x for x in (logp, old, advantages, mask)]
    assert not moved[3].is_contiguous() and torch.equal(nlpo_loss(*moved).loss, expected)


def test_tokens_outside_of_the_set_do_not_count():
    logits = draw(3, 4, 9).requires_grad_()
    _, _, advantages, mask = tokens()
    keep = nlpo_keep_set(logits.detach(), top_k=3)
    targets = keep.double().argmax(-1)
    targets[0, 1] = (~keep[0, 1]).double().argmax()
    stats = nlpo_stats(logits, targets, keep)
    assert stats.logp[0, 1] == -math.inf
    old = torch.where(stats.logp.isfinite(), stats.logp.detach() - 0.1, -math.inf)
    out = nlpo_loss(stats.logp, old, advantages, mask)
    inside = mask.clone()
    inside[0, 1] = False
    torch.testing.assert_close(out.loss, nlpo_loss(stats.logp, old, advantages, inside).loss)
    assert out.metrics["outside_fraction"].item() == pytest.approx(1 / 9)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    assert gradient.isfinite().all() and (gradient[0, 1] == 0).all() and (gradient[0, 0] != 0).any()
    assert (gradient[~keep] == 0).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, k: nlpo_keep_set(x), ValueError, "give one of top_p and top_k"),
        (lambda x, k: nlpo_keep_set(x, top_p=0.9, top_k=3), ValueError, "give one of top_p and top_k"),
        (lambda x, k: nlpo_keep_set(x, top_p=90), ValueError, r"top_p must be in \[0, 1\], got 90"),
        (lambda x, k: nlpo_keep_set(x, top_k=0), ValueError, "top_k must be at least 1, got 0"),
        (lambda x, k: nlpo_keep_set(x, top_k=2, min_tokens_to_keep=1.5), TypeError, "min_tokens_to_keep must be an integer"),
        (lambda x, k: nlpo_keep_set(x, top_k=2, always_keep=[1]), TypeError, "always_keep must be an integer tensor"),
        (lambda x, k: nlpo_keep_set(x, top_k=2, temperature=0.0), ValueError, "temperature must be positive"),
        (lambda x, k: nlpo_keep_set(x.long(), top_k=2), TypeError, "mask_logits must be float32"),
        (lambda x, k: nlpo_stats(x, torch.zeros(2).long(), k.float()), TypeError, "keep must be a bool tensor"),
        (lambda x, k: nlpo_stats(x, torch.zeros(2).long(), k[:1]), ValueError, r"keep must have the shape of logits \(2, 5\), got \(1, 5\)"),
        (lambda x, k: nlpo_loss(x, None, x, k, entropy_coef=0.1), ValueError, "entropy_coef=0.1 needs entropy="),
        (lambda x, k: nlpo_loss(x, None, x, k, normalize_advantages="batch"), TypeError, "normalize_advantages must be True or False, got 'batch'"),
        (lambda x, k: nlpo_loss(x, None, x[0], k), ValueError, "advantages must be"),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 5), torch.ones(2, 5, dtype=torch.bool))
