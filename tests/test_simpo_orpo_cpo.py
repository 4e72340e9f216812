"""SimPO, CPO and ORPO: the page's numbers, extremes, refusals, and what they are in terms of dpo_loss."""

import math

import pytest
import torch
from dpo_formulas import BETA, draw, grads, naive
from torch.testing import assert_close

import rlkern
from rlkern import cpo_loss, dpo_loss, dpo_loss_from_logits, orpo_loss, simpo_loss

F64 = torch.float64
C, R = torch.tensor([-6.0, -9], dtype=F64), torch.tensor([-8.0, -4], dtype=F64)
LENGTHS = {"chosen_lengths": torch.tensor([3, 6]), "rejected_lengths": torch.tensor([4, 2])}


def test_numbers():
    def losses(function, **options):
        return pytest.approx(function(C, R, **options).losses.tolist(), abs=1e-6)

    assert [0.974077, 0.474077] == losses(simpo_loss, **LENGTHS)
    assert [0.598139, 0.974077] == losses(cpo_loss, nll_coef=0)
    assert [0.598139 + 15 / 9, 0.974077 + 15 / 9] == losses(cpo_loss, chosen_lengths=LENGTHS["chosen_lengths"])
    assert [0.598139 + 1, 0.974077 + 0.75] == losses(cpo_loss, chosen_lengths=LENGTHS["chosen_lengths"], nll_coef=0.5, nll="sequence")
    assert [2.069315, 1.543499] == losses(orpo_loss, **LENGTHS)
    assert [0.069315 + 5 / 3, 0.043499 + 5 / 3] == losses(orpo_loss, nll="token", **LENGTHS)


def test_rewards_are_means_or_sums():
    for function, expected in ((simpo_loss, [-0.4, -0.3, -0.4, -0.4]), (orpo_loss, [-0.4, -0.3, -0.4, -0.4])):
        out = function(C, R, 0.2, **LENGTHS)
        assert isinstance(out, rlkern.DPOOutput) and torch.cat(out[1:]).tolist() == pytest.approx(expected)
    assert torch.cat(cpo_loss(C, R, 0.2, nll_coef=0)[1:]).tolist() == pytest.approx([-1.2, -1.8, -1.6, -0.8])
    mixed = dpo_loss(C, R, None, None, 0.2, loss_type=("sft_norm", "simpo", "cpo"), **LENGTHS)
    assert_close(mixed.chosen_rewards, simpo_loss(C, R, 0.2, **LENGTHS).chosen_rewards)  # of the first that has such


def test_wrappers_are_loss_types():
    pc, pr, _, _, lc, lr = draw()
    lengths, w = {"chosen_lengths": lc, "rejected_lengths": lr}, torch.rand(16, dtype=F64)

    def of(kind, beta, **options):
        return dpo_loss(pc, pr, None, None, beta, loss_type=kind, **lengths, **options).losses

    sft, sft_norm = of("sft", BETA), of("sft_norm", BETA)
    assert_close(simpo_loss(pc, pr, BETA, 0.3, 0.2, nll_coef=2, **lengths).losses, of("simpo", BETA, gamma=0.3, label_smoothing=0.2) + 2 * sft)
    assert_close(orpo_loss(pc, pr, BETA, weights=w, **lengths).losses, w * (of("orpo", BETA) + sft_norm))
    assert_close(cpo_loss(pc, pr, BETA, 0.2, chosen_lengths=lc).losses, of("cpo", BETA, label_smoothing=0.2) + sft)
    free = dpo_loss(pc, pr, None, None, BETA, 0.2, reference_free=True)
    assert_close(cpo_loss(pc, pr, BETA, 0.2, nll_coef=0).losses, free.losses)


def test_gamma_is_a_margin_of_rewards():
    """Not times beta: with beta 2 and gamma 0.5 the loss is log 2 where x_c - x_r = gamma / beta = 0.25."""
    one = torch.ones(1)
    lengths = {"chosen_lengths": one, "rejected_lengths": one}
    for gamma in (0.0, 0.5, 1.6):
        loss = simpo_loss(torch.tensor([gamma / 2 - 3]), torch.tensor([-3.0]), 2.0, gamma, **lengths).losses
        assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    at_default = dpo_loss(C, R, None, None, 2.0, loss_type="simpo", **LENGTHS).losses
    assert_close(at_default, simpo_loss(C, R, **LENGTHS).losses)


# --- ORPO's odds --------------------------------------------------------------------------------------------


def orpo(chosen, rejected, beta=0.1, dtype=torch.float32):
    """(losses, slopes) of means of one token."""
    x = [torch.tensor(v, dtype=dtype, requires_grad=True) for v in (chosen, rejected)]
    one = torch.ones(len(chosen))
    losses = orpo_loss(*x, beta, nll_coef=0, chosen_lengths=one, rejected_lengths=one).losses
    return losses.detach(), torch.autograd.grad(losses.sum(), x)


def exact_orpo(c, r, beta=0.1):
    """The page's closed form, in Python's floats."""
    e_c, e_r = -math.expm1(c), max(-math.expm1(r), 1e-30)
    q = math.exp(min(r - c, 700)) * e_c / e_r
    below = beta * q / (1 + q) / e_r
    return beta * math.log1p(q), -beta / (e_c + math.exp(c - r) * e_r), below


def test_orpo_where_the_chosen_response_is_certain():
    losses, (d_chosen, d_rejected) = orpo([0.0], [-1.0])
    assert losses.item() == 0 and d_rejected.item() == 0
    assert d_chosen.item() == pytest.approx(-0.058198, abs=1e-6)


def test_orpo_of_probabilities_that_round_to_more_than_1():
    """As at certainty: a sum of log-probabilities may be off by its last bits."""
    for c, r in ([0.0], [1e-7]), ([-1.0], [1e-7]), ([1e-7], [-1.0]), ([1e-7], [1e-7]):
        losses, slopes = orpo(c, r)
        expected, _ = orpo([min(c[0], 0.0)], [min(r[0], 0.0)])
        assert_close(losses, expected, rtol=1e-5, atol=1e-7)
        assert all(x.isfinite() for x in slopes)


NEAR = (0.0, -1e-30, -1e-8, -1e-6, -1e-3, -0.3, -0.69, -0.7, -2.0, -20.0, -80.0)


def test_orpo_is_accurate_up_to_certainty():
    """Values and slopes in float32 against float64, at all pairs of likely and unlikely responses."""
    c, r = ([float(torch.tensor(x)) for x in side] for side in zip(*((c, r) for c in NEAR for r in NEAR), strict=True))
    losses, (d_chosen, d_rejected) = orpo(c, r)
    exact = torch.tensor([exact_orpo(*pair) for pair in zip(c, r, strict=True)], dtype=F64)
    tolerance = {"rtol": 3e-5, "atol": 1e-30}  # exponents up to 80 have an ulp of 8e-6
    assert_close(losses.double(), exact[:, 0], **tolerance)
    assert_close(d_chosen.double(), exact[:, 1], **tolerance)
    assert_close(d_rejected.double(), exact[:, 2], **tolerance)


def test_orpo_slopes_of_certain_tokens_cancel_in_the_logits():
    """The slope 1 / (1 - p) times the row's 1 - p: in float32 as in float64, without a floor."""
    logits = torch.zeros(2, 1, 5)
    logits[0, 0, 1], logits[1, 0, 2] = 3.0, 14.0  # the rejected response has 1 - p = 3e-6
    labels, gradients = torch.tensor([[1], [2]]), []
    for dtype in (torch.float32, F64):
        x = logits.to(dtype).requires_grad_()
        loss = dpo_loss_from_logits(x, labels, None, loss_type="orpo", shift=False).losses.sum()
        gradients.append(torch.autograd.grad(loss, x)[0].double())
    assert gradients[1][1, 0, 2] > 0.09
    assert_close(*gradients, rtol=2e-5, atol=1e-7)


def test_orpo_has_derivatives_of_any_order_at_certainty():
    c = torch.tensor([0.0, -1e-3, -0.5, -2.0], dtype=F64, requires_grad=True)
    r = torch.tensor([-1.0, -0.2, -1e-2, -3.0], dtype=F64, requires_grad=True)
    one = torch.ones(4)

    def f(c, r):
        return orpo_loss(c, r, 0.3, chosen_lengths=one, rejected_lengths=one).losses

    inner = (c - torch.tensor([0.5, 0, 0, 0])).detach().requires_grad_()  # numeric slopes need both sides
    assert torch.autograd.gradcheck(f, (inner, r)) and torch.autograd.gradgradcheck(f, (inner, r))
    first, *_ = torch.autograd.grad(f(c, r).sum(), c, create_graph=True)
    second, *_ = torch.autograd.grad(first.sum(), c)
    step = 1e-6
    before, *_ = torch.autograd.grad(f(moved := (c - step).detach().requires_grad_(), r).sum(), moved)
    assert_close(second, ((first - before) / step).detach(), rtol=1e-4, atol=1e-6)


def test_impossible_responses():
    """-inf is a limit on one side: the loss is 0 or infinite, and the slopes are finite."""
    inf = -math.inf
    for kind, slope in (("simpo", -0.1), ("cpo", -0.1), ("orpo", -0.1)):
        x = torch.tensor([-1.0, inf], requires_grad=True), torch.tensor([inf, -1.0], requires_grad=True)
        one = torch.ones(2)
        losses = dpo_loss(*x, None, None, 0.1, loss_type=kind, chosen_lengths=one, rejected_lengths=one).losses
        assert losses.tolist() == [0, math.inf]
        d_chosen, d_rejected = torch.autograd.grad(losses.sum(), x)
        assert d_chosen.tolist() == pytest.approx([0, slope]) and d_rejected.isfinite().all() and d_rejected[0] == 0


@pytest.mark.parametrize("scale", [20, 1000])
def test_far_out(scale):
    x = torch.tensor([-scale, -1.0, -scale], dtype=F64), torch.tensor([-1.0, -scale, -scale], dtype=F64)
    one = torch.ones(3)
    lengths = {"chosen_lengths": one, "rejected_lengths": one}
    for kind in ("simpo", "cpo", "orpo"):
        results = []
        for dtype in (torch.float32, F64):
            y = [v.to(dtype).requires_grad_() for v in x]
            losses = dpo_loss(*y, None, None, 1.0, loss_type=kind, **lengths).losses
            results.append([losses.double(), *(g.double() for g in torch.autograd.grad(losses.sum(), y))])
        assert all(t.isfinite().all() for t in results[0])
        assert_close(*results, rtol=1e-5, atol=1e-12)


def test_of_bfloat16_and_of_nothing():
    x, one = torch.tensor([-0.5, -2.0]).bfloat16(), torch.tensor([1, 1])
    losses = orpo_loss(x, x - 1, chosen_lengths=one, rejected_lengths=one).losses
    assert losses.dtype == torch.float32
    none = torch.zeros(0)
    for function in (simpo_loss, orpo_loss):
        assert function(none, none, chosen_lengths=none, rejected_lengths=none, nll_coef=1.0).losses.shape == (0,)


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "'simpo' has no reference: reference_chosen_logps must be None", lambda: dpo_loss(C, R, C, R, loss_type="simpo", **LENGTHS)),
        (ValueError, "'orpo' has no reference: reference_rejected_logps", lambda: dpo_loss(C, R, None, R, loss_type=("sft", "orpo"), **LENGTHS)),
        (ValueError, "'cpo' has no reference", lambda: dpo_loss(C, R, C, R, reference_free=True, loss_type="cpo")),
        (TypeError, "reference_chosen_logps.*None", lambda: dpo_loss(C, R, None, None, loss_type=("cpo", "sigmoid"))),
        (ValueError, "takes no gamma, got 0.5", lambda: dpo_loss(C, R, C, R, gamma=0.5)),
        (ValueError, r"gamma must be in \[0, inf\), got -1", lambda: simpo_loss(C, R, gamma=-1, **LENGTHS)),
        (ValueError, "takes no label_smoothing", lambda: dpo_loss(C, R, None, None, 0.1, 0.1, loss_type="orpo", **LENGTHS)),
        (ValueError, "'simpo' needs rejected_lengths=", lambda: dpo_loss(C, R, None, None, loss_type="simpo", chosen_lengths=C)),
        (ValueError, "needs chosen_lengths=", lambda: cpo_loss(C, R)),
        (ValueError, "unknown nll 'tokens', expected one of 'token', 'sequence'", lambda: orpo_loss(C, R, nll="tokens", **LENGTHS)),
        (ValueError, r"nll_coef must be in \[0, inf\)", lambda: orpo_loss(C, R, nll_coef=-1.0, **LENGTHS)),
    ],
)
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_references_are_optional_for_the_nll_alone():
    losses = dpo_loss(C, R, None, None, loss_type=("sft", "sft_norm"), chosen_lengths=LENGTHS["chosen_lengths"])
    assert losses.losses.tolist() == pytest.approx([15 / 9 + 2, 15 / 9 + 1.5])
    with_reference = dpo_loss(C, R, C - 1, R, loss_type="sft", chosen_lengths=LENGTHS["chosen_lengths"])
    assert with_reference.chosen_rewards.tolist() == pytest.approx([0.1, 0.1])


def test_naive_forms_agree_on_slopes():
    """The mutants of the page: gamma times beta, a sum for a mean. Each is another number."""
    pc, pr, rc, rr, lc, lr = draw()
    losses = simpo_loss(pc, pr, BETA, 0.7, 0.1, chosen_lengths=lc, rejected_lengths=lr).losses
    expected = naive("simpo", pc, pr, rc, rr, lc, lr)
    assert_close(grads(losses, pc, pr), grads(expected, pc, pr), rtol=1e-11, atol=1e-13)
