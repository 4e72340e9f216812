"""KTO and APO-zero of single responses: the page's numbers, both tails, the baseline over ranks, logits."""

import math

import pytest
import torch
from thread_ranks import thread_ranks
from torch.testing import assert_close

import rlkern
from rlkern import kto_baseline, kto_loss, kto_loss_from_logits, sequence_logps

F64 = torch.float64
POLICY = torch.tensor([-6.0, -9, -8, -4], dtype=F64)
REFERENCE = torch.tensor([-7.0, -8.5, -7.5, -4.5], dtype=F64)
DESIRABLE = torch.tensor([True, True, False, False])


def test_numbers():
    out = kto_loss(POLICY, REFERENCE, DESIRABLE, kl=0.35)
    assert isinstance(out, rlkern.KTOOutput)
    assert out.losses.tolist() == pytest.approx([0.483756, 0.521237, 0.478763, 0.503750], abs=1e-6)
    assert out.rewards.tolist() == pytest.approx([0.1, -0.05, -0.05, 0.05])
    apo = kto_loss(POLICY, REFERENCE, DESIRABLE, loss_type="apo_zero_unpaired")
    assert_close(apo, kto_loss(POLICY, REFERENCE, DESIRABLE.int(), kl=0.0))
    pairs = rlkern.dpo_loss(POLICY[:2], POLICY[2:], REFERENCE[:2], REFERENCE[2:], loss_type="apo_zero").losses
    assert_close(apo.losses[:2] + apo.losses[2:], pairs)


def naive(policy, reference, desirable, z, beta, up, down):
    a = policy - reference
    return torch.where(desirable, up / (1 + torch.exp(beta * (a - z))), down / (1 + torch.exp(-beta * (a - z))))


def test_matches_the_formula():
    g = torch.Generator().manual_seed(0)
    policy = (-10 + 3 * torch.randn(32, generator=g, dtype=F64)).requires_grad_()
    reference, desirable = -10 + 3 * torch.randn(32, generator=g, dtype=F64), torch.rand(32, generator=g) < 0.4
    w, z = torch.rand(32, generator=g, dtype=F64).requires_grad_(), torch.tensor([0.7], dtype=F64, requires_grad=True)
    out = kto_loss(policy, reference, desirable, 0.3, kl=z, desirable_weight=1.3, undesirable_weight=0.6, weights=w)
    expected = w.detach() * naive(policy, reference, desirable, 0.7, 0.3, 1.3, 0.6)
    assert_close(out.losses, expected)
    assert_close(*(torch.autograd.grad(x.sum(), policy)[0] for x in (out.losses, expected)), rtol=1e-11, atol=1e-14)
    again = kto_loss(policy, reference, desirable, kl=z, weights=w).losses.sum()
    assert torch.autograd.grad(again, (w, z), allow_unused=True) == (None, None)
    assert torch.autograd.gradgradcheck(lambda p: kto_loss(p, reference, desirable, kl=0.1).losses, policy)


@pytest.mark.parametrize("desirable", [True, False])
@pytest.mark.parametrize("a", [20.0, -20.0, 1000.0, -1000.0, 1e-3, 0.0])
def test_both_tails_in_float32(desirable, a):
    """1 - sigmoid(20) is 0 in float32, with gradient 0. Here values and slopes are right on both sides."""
    policy = torch.tensor([a], requires_grad=True)
    losses = kto_loss(policy, torch.zeros(1), torch.tensor([desirable]), 1.0, kl=0.0).losses
    x = a if desirable else -a
    small = math.exp(-abs(x)) / (1 + math.exp(-abs(x)))
    assert losses.item() == pytest.approx(small if x > 0 else 1 - small, rel=1e-6)
    slope = (-1 if desirable else 1) * small * (1 - small)
    assert torch.autograd.grad(losses.sum(), policy)[0].item() == pytest.approx(slope, rel=1e-5, abs=1e-30)
    if x == 20:
        assert losses.item() == pytest.approx(2.061e-9, rel=1e-3)


def test_impossible_responses():
    policy = torch.tensor([-math.inf, -math.inf], requires_grad=True)
    losses = kto_loss(policy, torch.zeros(2), torch.tensor([True, False]), kl=0.3).losses
    assert losses.tolist() == [1, 0]
    assert torch.autograd.grad(losses.sum(), policy)[0].tolist() == [0, 0]


def test_impossible_responses_of_weight_0():
    """Under both models: they have no ratio, and do not count."""
    policy = torch.tensor([-math.inf, -math.inf, -3.0], requires_grad=True)
    reference, desirable = torch.tensor([-math.inf, -math.inf, -2.0]), torch.tensor([True, True, False])
    weights = torch.tensor([0.0, 0.0, 1.0])
    for options in ({"weights": weights}, {"desirable_weight": 0.0}, {"desirable_weight": 0.0, "weights": torch.ones(3)}):
        losses = kto_loss(policy, reference, desirable, kl=0.3, **options).losses
        assert losses[:2].tolist() == [0, 0] and losses[2] == kto_loss(policy, reference, desirable, kl=0.3).losses[2]
        gradient = torch.autograd.grad(losses.sum(), policy)[0]
        assert gradient[:2].tolist() == [0, 0] and gradient[2] > 0


def test_one_kind_alone_and_nobody():
    for desirable in (torch.ones(4), torch.zeros(4)):
        assert kto_loss(POLICY, REFERENCE, desirable, kl=0.1).losses.shape == (4,)
    assert kto_loss(POLICY[:1], REFERENCE[:1], DESIRABLE[:1], kl=0.0).losses.tolist() == pytest.approx([1 / (1 + math.exp(0.1))])
    nobody = kto_loss(POLICY[:0], REFERENCE[:0], DESIRABLE[:0], kl=0.0)
    assert nobody.losses.shape == nobody.rewards.shape == (0,)


# --- the baseline -------------------------------------------------------------------------------------------


def test_baseline_is_cut_at_0_after_the_mean():
    policy, reference = torch.tensor([1.0, -2.0, 2.5]).requires_grad_(), torch.zeros(3)
    assert kto_baseline(policy, reference).item() == 0.5  # cut first: 3.5 / 3
    assert kto_baseline(-policy, reference).item() == 0
    assert kto_baseline(policy[:0], reference[:0]).item() == 0
    z = kto_baseline(policy, reference)
    assert z.shape == () and z.dtype == torch.float32 and not z.requires_grad
    assert kto_baseline(policy.bfloat16(), reference.double()).dtype == F64
    kto_loss(POLICY, REFERENCE, DESIRABLE, kl=z)


def test_baseline_over_ranks():
    """Of all completions, as many as a rank has; not the mean of means, nor of what each has cut at 0."""
    parts = [torch.tensor([-3.0]), torch.tensor([1.0, 2.0, 3.0]), torch.zeros(0)]
    with thread_ranks(3) as run:
        results = run(lambda group: (kto_baseline(parts[group.place], torch.zeros_like(parts[group.place]), group=group), group.calls))
    assert [z.item() for z, _ in results] == [0.75] * 3
    assert results[0][1][-1] == ("all_reduce", F64, 2)
    with thread_ranks(2) as run:

        def wrong(group):
            try:
                kto_baseline(parts[0], parts[group.place], group=group)
            except ValueError as error:
                return str(error)

        errors = run(wrong)
    assert "refused" in errors[0] and "reference_kl_logps must have the shape" in errors[1]


# --- from logits --------------------------------------------------------------------------------------------


def draw(dtype=F64):
    g = torch.Generator().manual_seed(0)
    logits, other = (2 * torch.randn(4, 6, 9, generator=g, dtype=F64).to(dtype) for _ in range(2))
    labels = torch.randint(0, 9, (4, 6), generator=g)
    labels[:, :2] = -100
    labels[1, 4:] = labels[3] = -100
    return logits.requires_grad_(), other, labels


def test_from_logits():
    logits, other, labels = draw()
    reference = sequence_logps(other, labels)
    options = {"kl": 0.4, "beta": 0.3, "desirable_weight": 1.2, "weights": torch.tensor([1.0, 0.5, 2, 1])}
    expected = kto_loss(sequence_logps(logits, labels), reference, DESIRABLE, **options)
    targets = rlkern.next_tokens(labels)
    tokens = torch.where(targets == -100, math.nan, rlkern.token_logprobs(other, targets))
    for given in (reference, tokens):
        out = kto_loss_from_logits(logits, labels, given, DESIRABLE, **options)
        assert_close(out, expected)
        assert_close(*(torch.autograd.grad(x.losses.sum(), logits, retain_graph=True)[0] for x in (out, expected)))
    aligned = kto_loss_from_logits(logits, targets, reference, DESIRABLE, shift=False, loss_type="apo_zero_unpaired", temperature=0.7)
    assert_close(aligned.losses, kto_loss(sequence_logps(logits, labels, temperature=0.7), reference, DESIRABLE, kl=0.0).losses)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "'kto' needs kl=", {}),
        (ValueError, "kl must be None, got float", {"kl": 0.0, "loss_type": "apo_zero_unpaired"}),
        (ValueError, r"kl must be \[\] or \[1\], one number.*got \(2,\)", {"kl": torch.zeros(2)}),
        (TypeError, "kl must be a number, got str", {"kl": "0"}),
        (ValueError, "unknown loss_type 'dpo', expected one of 'kto', 'apo_zero_unpaired'", {"kl": 0.0, "loss_type": "dpo"}),
        (ValueError, "beta must be positive and finite, got 0", {"kl": 0.0, "beta": 0.0}),
        (ValueError, r"desirable_weight must be in \[0, inf\), got -1", {"kl": 0.0, "desirable_weight": -1.0}),
        (ValueError, r"weights must be \[B\] or \[B, 1\], one a response, here \(4,\).*got \(3,\)", {"kl": 0.0, "weights": torch.zeros(3)}),
        (ValueError, r"desirable must be \[B\] or \[B, 1\], one a response, here \(4,\).*got \(2,\)", {"kl": 0.0, "desirable": DESIRABLE[:2]}),
    ],
)
def test_errors(error, message, options):
    logits, _, labels = draw()
    given = {"desirable": DESIRABLE} | options
    with pytest.raises(error, match=message):
        kto_loss(POLICY, REFERENCE, **given)
    with pytest.raises(error, match=message):
        kto_loss_from_logits(logits, labels, REFERENCE, **given)
