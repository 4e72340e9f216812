"""Losses for masked diffusion models against formulas in float64, and the two ways to their gradient."""

import math

import pytest
import torch
from derivatives import tokens_of, value_and_gradient
from loss_battery import Draw

import rlkern
from rlkern import masked_elbo, token_logprobs
from rlkern.diffusion import (
    bernoulli_masks,
    count_masks,
    coupled_logp,
    diffu_grpo_loss,
    espo_loss,
    quadrature_levels,
    spg_loss,
    unigrpo_loss,
    vrpo_loss,
    wd1_loss,
)


def same(actual, expected):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-14)


def agree(loss, naive, x):
    """Value and gradient."""
    for ours, expected in zip(*(value_and_gradient(value, x, retain_graph=True) for value in (loss, naive)), strict=True):
        same(ours, expected)


def test_vrpo():
    g = Draw(0)
    policy = g.normal(2, 5, 4, mean=-9, std=3).requires_grad_()
    reference, omega = g.normal(2, 5, 4, mean=-9, std=3), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    for weights in (None, omega):
        naive, won = 0.0, 0
        for b in range(5):
            terms = policy[:, b] - reference[:, b]
            chosen, rejected = (sum(terms[side, j] * (0.25 if weights is None else weights[j]) for j in range(4)) for side in (0, 1))
            naive = naive - torch.log(1 / (1 + torch.exp(-0.3 * (chosen - rejected)))) / 5
            won += (chosen > rejected).item()
        loss, metrics = vrpo_loss(*policy, *reference, beta=0.3, mc_weight=weights)
        agree(loss, naive, policy)
        assert metrics["accuracy"].item() == pytest.approx(won / 5)
    averaged = vrpo_loss(*policy.mean(-1), *reference.mean(-1), beta=0.3).loss
    same(averaged.detach(), vrpo_loss(*policy, *reference, beta=0.3).loss.detach())


def token_inputs(seed=1):
    g = Draw(seed)
    logp, mask, advantages = g.logp(4, 7), g.mask(4, 7), g.normal(4)
    old, ref = logp + g.normal(4, 7, std=0.5), logp + g.normal(4, 7, std=0.5)
    return logp.requires_grad_(), old, ref, advantages, mask


def naive_token(logp, old, ref, advantage, eps, beta):
    r, d = torch.exp(logp - old), ref - logp
    return -torch.minimum(r * advantage, r.clamp(1 - eps, 1 + eps) * advantage) + beta * (torch.exp(d) - d - 1)


def test_diffu_grpo():
    logp, old, ref, advantages, mask = token_inputs()
    values = [naive_token(logp[i], old[i], ref[i], advantages[i[0]], 0.5, 0.04) for i in tokens_of(mask)]
    loss, metrics = diffu_grpo_loss(logp, old, advantages, mask, reference_logp=ref, kl_coef=0.04)
    agree(loss, sum(values) / len(values), logp)
    assert metrics["kl"] > 0 and metrics["clip_fraction_high"] + metrics["clip_fraction_low"] > 0


def test_unigrpo_averages_over_masked_tokens_then_over_all_responses():
    logp, old, ref, advantages, mask = token_inputs()
    draws = bernoulli_masks(mask, 1, seed=3, draw=0)
    masked = draws.mask.clone()
    masked[1] = False  # a draw that masked nothing still counts as a response
    naive = 0.0
    for b in range(4):
        values = [naive_token(logp[b, t], old[b, t], ref[b, t], advantages[b], 0.2, 0.1) for t in range(7) if masked[b, t]]
        naive = naive + sum(values) / max(len(values), 1) / 4
    assert masked.any(-1).sum() >= 2
    agree(unigrpo_loss(logp, old, advantages, masked, reference_logp=ref, kl_coef=0.1).loss, naive, logp)


def test_coupled_logp():
    g, response = Draw(2), torch.tensor([[0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0]])
    logp = g.logp(2, 3, 6).requires_grad_()  # the response fully masked, the mask, its complement
    pair = bernoulli_masks(response, 2, seed=6, complementary=True, low=0.2, high=0.8)
    weight = pair.weight.double()
    got = coupled_logp(logp[:, 0], logp[:, 1:], pair.mask, weight)
    naive = torch.zeros(2, 6, dtype=torch.float64)
    for b in range(2):
        t = 1 / weight[b, 0] if weight[b, 0] else 1 - 1 / weight[b, 1]
        for k in range(6):
            if response[b, k]:
                guess = logp[b, 1, k] / t if pair.mask[b, 0, k] else logp[b, 2, k] * weight[b, 1]
                naive[b, k] = 0.5 * (logp[b, 0, k] + guess)
    kept = response.bool()
    agree(got[kept].sum(), naive[kept].sum(), logp)
    same(got[kept].detach(), naive[kept].detach())
    loss = diffu_grpo_loss(got, got.detach() - 0.1, torch.ones(2, dtype=torch.float64), kept).loss
    same(loss.detach(), -math.exp(0.1))


def test_wd1():
    logp, _, _, advantages, mask = token_inputs()
    for group_size in (None, 2):
        size, naive = group_size or 4, 0.0
        for start in range(0, 4, size):
            group = range(start, start + size)
            up = sum(torch.exp(0.7 * advantages[i]) for i in group)
            down = sum(torch.exp(-0.7 * advantages[i]) for i in group)
            for i in group:
                w = torch.exp(0.7 * advantages[i]) / up - torch.exp(-0.7 * advantages[i]) / down
                naive = naive - w * sum(logp[i, t] for t in range(7) if mask[i, t]) / (4 / size)
        agree(wd1_loss(logp, advantages, mask, psi=0.7, group_size=group_size).loss, naive, logp)
    halved = wd1_loss(logp, advantages, mask, psi=0.7, group_size=2, normalizer=4).loss
    same(halved.detach(), naive.detach() / 2)
    forbidden = logp.detach().clone()
    forbidden[0, 0] = -math.inf
    same(wd1_loss(forbidden, torch.ones(4, dtype=torch.float64), mask).loss, 0.0)  # equal advantages: no weight, even of what is impossible
    ess = wd1_loss(logp, torch.tensor([99.0, 0, 0, 0]), mask).metrics["effective_sample_size"]
    assert ess.item() == pytest.approx(0.25)


def naive_spg(logp, advantages, draw_mask, mask, beta, u):
    """The official code: means over masked tokens, their share in a draw as its level, weights by length."""
    total = 0.0
    for b in range(len(logp)):
        length = mask[b].sum().item()
        if length == 0:
            continue
        elbo, probabilities = 0.0, {}
        for j in range(logp.shape[1]):
            hidden = [k for k in range(mask.shape[1]) if draw_mask[b, j, k]]
            elbo = elbo + sum(logp[b, j, k] for k in hidden) / len(hidden) / logp.shape[1]
            for k in hidden:
                share = torch.exp(logp[b, j, k]) ** beta / (len(hidden) / length) / logp.shape[1]
                probabilities[k] = probabilities.get(k, 0) + share
        eubo = sum(torch.log(p) for p in probabilities.values()) / len(probabilities) / beta
        estimate = elbo if advantages[b] >= 0 else u * eubo + (1 - u) * elbo
        total = total - advantages[b] * estimate * length
    return total / mask.sum()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("num_mc", [2, 8])  # with 2 draws some tokens are never masked
def test_spg_is_the_official_code(num_mc):
    g, mask = Draw(4), torch.tensor([[0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0]])
    logp, advantages = g.logp(5, num_mc, 6).requires_grad_(), torch.tensor([1.3, -0.7, -0.2, 1.0, 0.0], dtype=torch.float64)
    draws = count_masks(mask, num_mc, seed=1)
    never = (mask.bool() & ~draws.mask.any(1))[1:3].any()
    assert never == (num_mc == 2)
    weight = mask.sum(-1, keepdim=True).double() / draws.mask.sum(-1).clamp(min=1)
    torch.testing.assert_close(weight.float() * draws.mask.any(-1), draws.weight)
    for u in (0.0, 0.5, 1.0):
        with torch.autograd.detect_anomaly(check_nan=True):  # no NaN on the way either, where a token was never masked
            loss, metrics = spg_loss(logp, advantages, draws.mask, weight, mask, beta=1.5, upper_weight=u)
            agree(loss, naive_spg(logp, advantages, draws.mask, mask, 1.5, u), logp)
    if num_mc == 8:
        # beta = 1 and every token masked by some draw: the paper's sum_k log mean_j w_j 1[k in M_j] p_k
        p = torch.where(draws.mask, logp.detach().exp() * weight.unsqueeze(-1), 0).mean(1)
        eubo = spg_loss(logp, advantages, draws.mask, weight, mask, beta=1.0).metrics["eubo"]
        same(eubo, (p[mask.bool()].log().sum() / mask.sum()).item())


def test_spg_reads_masked_tokens_only():
    g, mask = Draw(5), torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1]])
    draws = count_masks(mask, 3, seed=1)
    logp = g.logp(2, 3, 4)
    poisoned = torch.where(draws.mask, logp, math.nan).requires_grad_()
    logp.requires_grad_()
    outputs = [spg_loss(x, torch.tensor([1.0, -1.0]), draws.mask, draws.weight, mask).loss for x in (logp, poisoned)]
    same(outputs[1].detach(), outputs[0].detach())
    same(*(torch.autograd.grad(loss, x)[0] for loss, x in ((outputs[1], poisoned), (outputs[0], logp))))
    prompt_too = draws.mask | (mask == 0).unsqueeze(1)  # the recipe masks some of the prompt, which is not scored
    same(spg_loss(logp, torch.tensor([1.0, -1.0]), prompt_too, draws.weight, mask).loss.detach(), outputs[0].detach())


def test_spg_without_advantage_is_zero_even_for_the_impossible():
    logp = torch.full((2, 3, 4), -math.inf, dtype=torch.float64, requires_grad=True)
    loss = spg_loss(logp, torch.zeros(2), torch.ones(2, 3, 4), torch.ones(2, 3), torch.ones(2, 4)).loss
    assert loss == 0 and (torch.autograd.grad(loss, logp)[0] == 0).all()


def elbo_inputs():
    g = Draw(6)
    elbo = g.normal(6, 4, mean=-9, std=2).requires_grad_()
    old, ref = elbo.detach() + g.normal(6, 4, std=2), elbo.detach() + g.normal(6, 4, std=2)
    return elbo, old, ref, g.normal(6), torch.tensor([5, 3, 0, 8, 1, 2])


def naive_espo(elbo, old, ref, advantages, lengths, omega, beta):
    total = 0.0
    for b in range(len(elbo)):
        length = lengths[b].item()
        if length == 0:
            continue
        current, before, anchor = (sum(x[b, j] * omega[j] for j in range(4)) for x in (elbo, old, ref))
        r = torch.exp((current - before) / length)
        surrogate = torch.minimum(r * advantages[b], r.clamp(0.8, 1.2) * advantages[b])
        total = total - surrogate + beta * (current - anchor) ** 2 / 2 / length
    return total / len(elbo)


@pytest.mark.parametrize("weighted", [False, True])
def test_espo(weighted):
    elbo, old, ref, advantages, lengths = elbo_inputs()
    omega = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64) if weighted else None
    weights = [0.25] * 4 if omega is None else omega
    naive = naive_espo(elbo, old, ref, advantages, lengths, weights, 0.3)
    loss, metrics = espo_loss(elbo, old, advantages, lengths, mc_weight=omega, ref_elbo=ref, kl_coef=0.3)
    agree(loss, naive, elbo)
    assert metrics["clip_fraction_low"] + metrics["clip_fraction_high"] > 0
    on_policy = espo_loss(elbo, None, advantages, lengths, mc_weight=omega).loss
    agree(on_policy, naive_espo(elbo, elbo.detach(), ref, advantages, lengths, weights, 0), elbo)


def test_gdpo_is_a_setting_of_espo():
    """No length in the ratio, one outside of the minimum."""
    elbo, old, _, advantages, _ = elbo_inputs()
    lengths, (_, omega) = torch.tensor([5, 3, 4, 8, 1, 2]), quadrature_levels(4)
    naive = 0.0
    for b in range(6):
        r = torch.exp(((elbo[b] - old[b]) * omega).sum())
        naive = naive - torch.minimum(r * advantages[b], r.clamp(0.8, 1.2) * advantages[b]) / lengths[b] / 6
    agree(espo_loss(elbo, old, advantages / lengths, torch.ones_like(lengths), mc_weight=omega).loss, naive, elbo)


class Model(torch.nn.Module):
    """Guesses that depend on everything that is visible."""

    def __init__(self, vocab=7):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = torch.nn.Embedding(vocab, 5, dtype=torch.float64), torch.nn.Linear(5, vocab, dtype=torch.float64)

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(torch.tanh(x.cumsum(1) + x.mean(1, keepdim=True)))


@pytest.mark.parametrize("name", ["espo", "vrpo", "spg"])
def test_two_passes_give_the_gradient_of_one_graph(name):
    g, model = torch.Generator().manual_seed(1), Model()
    ids = torch.randint(6, (4, 8), generator=g)
    response = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1, 0], [0, 0, 1, 0, 0, 0, 0, 0]])
    advantages = torch.tensor([1.0, -0.5, 0.3, -1.0], dtype=torch.float64)
    draws = count_masks(response, 4, seed=1, complementary=name == "espo")

    def guesses(j):
        logits = model(torch.where(draws.mask[:, j], 6, ids))
        if name == "spg":
            return token_logprobs(logits, ids, mask=draws.mask[:, j])
        return masked_elbo(logits, ids, draws.weight[:, j], mask=draws.mask[:, j])

    def loss_of(x):
        if name == "espo":
            return espo_loss(x, x.detach() - 0.3, advantages, response.sum(-1)).loss
        if name == "vrpo":
            return vrpo_loss(x[0::2], x[1::2], x[0::2].detach() - 0.3, x[1::2].detach() + 0.1).loss
        return spg_loss(x, advantages, draws.mask, draws.weight.double(), response).loss

    parameters = list(model.parameters())
    together = torch.stack([guesses(j) for j in range(4)], 1)
    expected = torch.autograd.grad(loss_of(together), parameters)

    x = together.detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss_of(x), x)
    for j in range(4):
        (slope[:, j] * guesses(j)).sum().backward()
    for p, e in zip(parameters, expected, strict=True):
        assert e.abs().max() > 1e-6
        torch.testing.assert_close(p.grad, e, rtol=1e-11, atol=1e-15)


B2 = torch.zeros(2)
BT = torch.zeros(2, 3)
BNT = torch.zeros(2, 4, 3)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, "chosen_elbo", lambda: vrpo_loss([1.0], B2, B2, B2)),
        (ValueError, "chosen_elbo", lambda: vrpo_loss(BNT, B2, B2, B2)),
        (ValueError, "ref_rejected_elbo must have B = 2 responses, as chosen_elbo has", lambda: vrpo_loss(B2, B2, B2, torch.zeros(3))),
        (ValueError, "averaged already", lambda: vrpo_loss(B2, B2, B2, B2, mc_weight=B2)),
        (ValueError, "mc_weight", lambda: vrpo_loss(BT, BT, BT, BT, mc_weight=B2)),
        (ValueError, "beta", lambda: vrpo_loss(B2, B2, B2, B2, beta=0)),
        (ValueError, "reference_logp", lambda: diffu_grpo_loss(BT, BT, B2, BT, kl_coef=0.1)),
        (ValueError, "clip_low", lambda: unigrpo_loss(BT, BT, B2, BT, clip_low=2)),
        (TypeError, "pair_logp must be a float tensor", lambda: coupled_logp(BT, [1], BT, B2)),
        (ValueError, r"pair_logp must be \(2, 2, 3\) for full_logp", lambda: coupled_logp(BT, BNT, BNT, torch.zeros(2, 4))),
        (ValueError, "pair_logp", lambda: coupled_logp(BT, torch.zeros(2, 2, 5), torch.zeros(2, 2, 5), torch.zeros(2, 2))),
        (ValueError, "psi", lambda: wd1_loss(BT, B2, BT, psi=-1)),
        (ValueError, "advantages", lambda: wd1_loss(BT, BT, BT)),
        (ValueError, "divides the 2", lambda: wd1_loss(BT, B2, BT, group_size=3)),
        (ValueError, "draw_mask must have the shape of logp", lambda: spg_loss(BNT, B2, BT, torch.zeros(2, 4), BT)),
        (ValueError, "weight", lambda: spg_loss(BNT, B2, BNT, B2, BT)),
        (ValueError, "mask must have", lambda: spg_loss(BNT, B2, BNT, torch.zeros(2, 4), torch.zeros(2, 4))),
        (ValueError, "beta", lambda: spg_loss(BNT, B2, BNT, torch.zeros(2, 4), BT, beta=0)),
        (ValueError, "upper_weight", lambda: spg_loss(BNT, B2, BNT, torch.zeros(2, 4), BT, upper_weight=50)),
        (ValueError, "lengths", lambda: espo_loss(B2, B2, B2, torch.ones(3))),
        (TypeError, "lengths", lambda: espo_loss(B2, B2, B2, 5)),
        (ValueError, "advantages", lambda: espo_loss(B2, B2, torch.zeros(3), torch.ones(2))),
        (ValueError, "kl_coef", lambda: espo_loss(B2, B2, B2, torch.ones(2), kl_coef=0.1)),
    ],
)
def test_errors(error, match, call):
    with pytest.raises(error, match=match):
        call()


def test_exports():
    names = ("coupled_logp", "diffu_grpo_loss", "espo_loss", "next_tokens", "spg_loss", "unigrpo_loss", "vrpo_loss", "wd1_loss")
    assert set(names) <= {*rlkern.__all__, *rlkern.diffusion.__all__}


def test_no_draws():
    """A mean over no draws would be NaN."""
    none = torch.zeros(2, 0)
    with pytest.raises(ValueError, match=r"elbo must be \[B\] or \[B, n\], .* got shape \(2, 0\)"):
        espo_loss(none, None, torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match=r"chosen_elbo must be \[B\] or \[B, n\]"):
        vrpo_loss(none, none, none, none)
    with pytest.raises(ValueError, match=r"logp must be \[B, n, T\] with at least one draw, got shape \(2, 0, 3\)"):
        spg_loss(torch.zeros(2, 0, 3), torch.ones(2), torch.ones(2, 0, 3), none, torch.ones(2, 3))
