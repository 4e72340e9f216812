"""dpo_loss_from_logits against the same formulas over a softmax, with its weights of tokens and pairs."""

import math

import pytest
import torch
from dpo_formulas import BETA, EPS, GAMMA, TAU, WITHOUT_REFERENCE, draw_logits, grads, naive
from torch.testing import assert_close

from rlkern import dpo_loss_from_logits, next_tokens, sequence_logps, token_logprobs
from rlkern.losses.preference.dpo_types import PAIR_LOSSES


def naive_token_logps(logits, labels, temperature=1.0):
    """[2B, T - 1] log-probabilities and mask, sliced and softmaxed as the papers' code does."""
    log_p = (logits.double() / temperature)[:, :-1].log_softmax(-1)
    labels = labels[:, 1:]
    kept = labels != -100
    return log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) * kept, kept, log_p


@pytest.mark.parametrize("kind", PAIR_LOSSES)
def test_from_logits_matches_the_formula(kind):
    logits, other, labels = draw_logits()
    options = {"label_smoothing": EPS} if "label_smoothing" in PAIR_LOSSES[kind].uses else {}
    options |= {"gamma": GAMMA} if "gamma" in PAIR_LOSSES[kind].uses else {}
    reference = None if kind in WITHOUT_REFERENCE else sequence_logps(other, labels)
    out = dpo_loss_from_logits(logits, labels, reference, beta=BETA, loss_type=kind, discopop_tau=TAU, temperature=0.7, **options)
    logps, kept, _ = naive_token_logps(logits, labels, 0.7)
    ref = naive_token_logps(other, labels)[0].sum(-1)
    sums, lengths = logps.sum(-1), kept.sum(-1)
    lengths = lengths if kind == "sft" else lengths.clamp(min=1)
    expected = naive(kind, *sums.chunk(2), *ref.chunk(2), *lengths.chunk(2))
    assert_close(out.losses, expected)
    exact = grads(expected, logits)[0]
    if kind == "orpo":  # the naive form of the empty response, which pulls at nothing
        assert exact[1].isnan().any()
        exact = exact.nan_to_num(0)
    assert_close(grads(out.losses, logits)[0], exact)
    score = {"simpo": sums / lengths, "orpo": sums / lengths, "cpo": sums}.get(kind, sums - ref)
    assert_close((out.chosen_rewards, out.rejected_rewards), (BETA * score).detach().chunk(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_from_logits_precision(dtype):
    logits, other, labels = draw_logits(vocab=300, dtype=dtype)
    reference = sequence_logps(other, labels)
    out = dpo_loss_from_logits(logits, labels, reference)
    exact = logits.detach().double().requires_grad_()
    expected = dpo_loss_from_logits(exact, labels, reference.double())
    assert out.losses.dtype == torch.float32
    assert_close(out.losses.double(), expected.losses, rtol=1e-5, atol=1e-6)
    g, e = grads(out.losses, logits)[0], grads(expected.losses, exact)[0]
    assert g.dtype == dtype
    assert_close(g.double(), e, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-7)


def test_from_logits_with_aligned_labels_and_references_per_token():
    logits, other, labels = draw_logits()
    targets = next_tokens(labels)
    expected = dpo_loss_from_logits(logits, labels, sequence_logps(other, labels))
    garbage = torch.where(targets == -100, math.nan, token_logprobs(other, targets))
    for reference in (token_logprobs(other, targets), garbage):
        assert_close(dpo_loss_from_logits(logits, labels, reference).losses, expected.losses)
        assert_close(dpo_loss_from_logits(logits, targets, reference, shift=False).losses, expected.losses)
    free = dpo_loss_from_logits(logits, labels, None, reference_free=True)
    assert_close(free.losses, dpo_loss_from_logits(logits, labels, torch.zeros(6)).losses)


def test_weighted_preference_optimisation():
    """2406.11827, eq. 2: weights exp(mean(log pi(y) - log sum pi^2)), detached."""
    logits, other, labels = draw_logits()
    reference = sequence_logps(other, labels)
    logps, kept, log_p = naive_token_logps(logits, labels)
    per_token = (logps - log_p.exp().square().sum(-1).log()) * kept
    chosen, rejected = (per_token.sum(-1) / kept.sum(-1).clamp(min=1)).exp().chunk(2)
    weights = (chosen * rejected).detach()
    plain = dpo_loss_from_logits(logits, labels, reference).losses
    weighted = dpo_loss_from_logits(logits, labels, reference, use_weighting=True).losses
    assert_close(weighted, plain * weights)
    assert_close(grads(weighted, logits), grads(plain * weights, logits))
    bound = weights.median().item()
    assert (weights > bound).any() and (weights < bound).any()
    assert_close(dpo_loss_from_logits(logits, labels, reference, use_weighting=True, max_weight=bound).losses, plain * weights.clamp(max=bound))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_length_desensitised(alpha):
    """2409.06411: tokens behind the shorter response's length count alpha times, in policy and reference."""
    logits, other, labels = draw_logits()
    (logps, kept, _), ref = naive_token_logps(logits, labels), naive_token_logps(other, labels)[0]
    lengths = kept.sum(-1)
    weights = torch.zeros_like(logps)
    for row in range(6):
        shared = min(lengths[row], lengths[(row + 3) % 6])
        for rank, t in enumerate(kept[row].nonzero().flatten()):
            weights[row, t] = 1 if rank < shared else alpha
    assert alpha == 1 or (weights == alpha).sum() > (weights[~kept] == alpha).sum(), "no token is behind the shared length"
    reference = token_logprobs(other, next_tokens(labels))
    sums, ref_sums = (weights * logps).sum(-1), (weights * ref).sum(-1)
    for kind in ("sigmoid", "ipo_norm"):
        out = dpo_loss_from_logits(logits, labels, reference, beta=BETA, ld_alpha=alpha, loss_type=kind, label_smoothing=EPS * (kind == "sigmoid"))
        expected = naive(kind, *sums.chunk(2), *ref_sums.chunk(2), *lengths.clamp(min=1).chunk(2))
        assert_close(out.losses, expected)
        assert_close(grads(out.losses, logits), grads(expected, logits))
    sft = dpo_loss_from_logits(logits, labels, reference, ld_alpha=alpha, loss_type="sft").losses
    assert_close(sft, (-logps[:3].sum() / lengths[:3].sum()).repeat(3))


def test_forbidden_tokens_do_not_poison_length_desensitised_sums():
    logits, other, labels = draw_logits()
    logits = logits.detach()
    last = (labels[3] >= 0).nonzero()[-1].item()
    labels[0] = labels[3].clone()
    labels[0, last:] = -100  # the chosen response is one token shorter
    logits[3, last - 1, labels[3, last]] = -math.inf
    out = dpo_loss_from_logits(logits, labels, token_logprobs(other, next_tokens(labels)), ld_alpha=0.0)
    assert out.losses.isfinite().all()


def test_inplace_backward_gives_the_same_gradient():
    logits, other, labels = draw_logits(dtype=torch.float32)
    reference = sequence_logps(other, labels)
    expected = grads(dpo_loss_from_logits(logits, labels, reference).losses, logits)[0]
    scratch = logits.detach().clone().requires_grad_()
    copy = scratch * 1
    losses = dpo_loss_from_logits(copy, labels, reference, inplace_backward=True).losses
    assert_close(grads(losses, scratch)[0], expected)
    assert_close(copy.detach(), expected)  # the gradient stands where the logits stood


def test_prompt_and_padding_rows_are_not_read():
    logits, other, labels = draw_logits(dtype=torch.float32)
    reference = sequence_logps(other, labels)
    expected = dpo_loss_from_logits(logits, labels, reference).losses
    poisoned = logits.detach().clone()
    poisoned[next_tokens(labels) == -100] = math.nan
    poisoned.requires_grad_()
    losses = dpo_loss_from_logits(poisoned, labels, reference, loss_type="sigmoid").losses
    assert torch.equal(losses, expected)
    assert_close(grads(losses, poisoned), grads(expected, logits))


def test_rewards_of_length_desensitised_sums():
    logits, other, labels = draw_logits()
    logps, kept, _ = naive_token_logps(logits, labels)
    other_logps = naive_token_logps(other, labels)[0]
    out = dpo_loss_from_logits(logits, labels, token_logprobs(other, next_tokens(labels)), beta=BETA, ld_alpha=0.3)
    shared = torch.minimum(*kept.sum(-1).chunk(2)).repeat(2).unsqueeze(-1)
    weight = torch.where(kept.cumsum(-1) <= shared, 1, torch.tensor(0.3, dtype=torch.float64)) * kept
    expected = BETA * ((logps - other_logps) * weight).sum(-1).detach()
    assert_close((out.chosen_rewards, out.rejected_rewards), expected.chunk(2))
