"""The DPO family against the papers' formulas in float64; what each loss is for; how options combine."""

import math

import pytest
import torch
from dpo_formulas import BETA, EPS, draw, grads, naive, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

import rlkern
from rlkern import dpo_loss
from rlkern.losses.preference.dpo_types import F_DIVERGENCES, PAIR_LOSSES


@pytest.mark.parametrize("f", F_DIVERGENCES)
@pytest.mark.parametrize("kind", PAIR_LOSSES)
def test_matches_the_formula(kind, f):
    if f != "reverse_kl" and "f_divergence" not in PAIR_LOSSES[kind].uses:
        with pytest.raises(ValueError, match="takes no f_divergence"):
            run(kind, *draw(), f_divergence=f)
        return
    inputs = draw()
    losses, expected = run(kind, *inputs, f_divergence=f), naive(kind, *inputs, f=f)
    assert losses.dtype == torch.float64
    assert_close(losses, expected, rtol=1e-11, atol=1e-12)
    assert_close(grads(losses, *inputs[:2]), grads(expected, *inputs[:2]), rtol=1e-11, atol=1e-12)


def test_rewards_are_beta_times_the_log_ratio_and_detached():
    pc, pr, rc, rr, *_ = draw()
    out = dpo_loss(pc, pr, rc, rr, 0.7, loss_type="sigmoid", f_divergence="forward_kl")
    assert_close(out.chosen_rewards, (0.7 * (pc - rc)).detach())
    assert_close(out.rejected_rewards, (0.7 * (pr - rr)).detach())
    assert not out.chosen_rewards.requires_grad and not out.rejected_rewards.requires_grad
    assert isinstance(out, rlkern.DPOOutput)


def test_called_like_the_original_code():
    pc, pr, rc, rr, *_ = draw()
    plain = dpo_loss(pc, pr, rc, rr, 0.2, 0.1, False, False)
    u = 0.2 * ((pc - pr) - (rc - rr))
    assert_close(plain.losses, -torch.nn.functional.logsigmoid(u) * 0.9 - torch.nn.functional.logsigmoid(-u) * 0.1)
    assert_close(dpo_loss(pc, pr, rc, rr, 0.2, ipo=True).losses, ((pc - pr) - (rc - rr) - 2.5) ** 2)
    free = dpo_loss(pc, pr, rc, rr, 0.2, reference_free=True)
    assert_close(free.losses, -torch.nn.functional.logsigmoid(0.2 * (pc - pr)))
    assert_close(free.chosen_rewards, (0.2 * (pc - rc)).detach())  # the original code's rewards keep the reference
    none = dpo_loss(pc, pr, None, None, 0.2, reference_free=True)
    assert_close(none.losses, free.losses)
    assert_close(none.chosen_rewards, (0.2 * pc).detach())


def test_reference_free_reaches_every_type():
    pc, pr, rc, rr, lc, lr = draw()
    zero = torch.zeros_like(rc)
    for kind in PAIR_LOSSES:
        assert_close(run(kind, pc, pr, rc, rr, lc, lr, reference_free=True), run(kind, pc, pr, zero, zero, lc, lr), msg=kind)


def test_several_types_are_a_weighted_sum():
    inputs = draw()
    pc, pr, rc, rr, lc, lr = inputs
    both = dpo_loss(pc, pr, rc, rr, BETA, loss_type=["bco_pair", "sft", "hinge"], loss_weights=[0.2, 1.0, -3], chosen_lengths=lc)
    assert_close(both.losses, 0.2 * run("bco_pair", *inputs) + run("sft", *inputs) - 3 * run("hinge", *inputs))
    assert_close(dpo_loss(pc, pr, rc, rr, BETA, loss_type=("bco_pair", "hinge")).losses, run("bco_pair", *inputs) + run("hinge", *inputs))


def test_weights_multiply_and_are_detached():
    pc, pr, rc, rr, *_ = draw()
    w = torch.rand(16, dtype=torch.float64, requires_grad=True)
    losses = dpo_loss(pc, pr, rc, rr, weights=w).losses
    assert_close(losses, dpo_loss(pc, pr, rc, rr).losses * w.detach())
    assert torch.autograd.grad(losses.sum(), w, allow_unused=True)[0] is None


def test_options_may_change_without_recompiling():
    """A new beta in every step must not cost a compilation each."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda pc, pr, rc, rr, beta: dpo_loss(pc, pr, rc, rr, beta).losses, fullgraph=True, backend=counter, dynamic=True)
    inputs = [x.detach() for x in draw()[:4]]
    counts = []
    for beta in (0.1, 0.2, 0.35, 0.5):
        assert_close(step(*inputs, beta), dpo_loss(*inputs, beta).losses)
        counts.append(counter.frame_count)
    assert counts[1] == counts[-1]


# --- what the losses are for --------------------------------------------------------------------------------


def test_robust_is_unbiased_under_flipped_labels():
    """2403.00409: the average over labels flipped at rate eps is plain DPO; conservative DPO's is not."""
    pc, pr, rc, rr, *_ = draw()
    plain = dpo_loss(pc, pr, rc, rr, BETA).losses
    for eps in (0.05, 0.3, 0.49):
        kept = dpo_loss(pc, pr, rc, rr, BETA, eps, loss_type="robust").losses
        flipped = dpo_loss(pr, pc, rr, rc, BETA, eps, loss_type="robust").losses
        assert_close((1 - eps) * kept + eps * flipped, plain, rtol=1e-11, atol=1e-12)
        conservative = (1 - eps) * dpo_loss(pc, pr, rc, rr, BETA, eps).losses + eps * dpo_loss(pr, pc, rr, rc, BETA, eps).losses
        assert (conservative - plain).abs().max() > 1e-2


def test_slopes_of_conservative_and_robust():
    """cDPO has its minimum at u = log((1-eps)/eps); rDPO pushes with at least eps/(1-2 eps) for ever."""
    u = torch.linspace(-50, 50, 10001, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros_like(u)
    slope = torch.autograd.grad(dpo_loss(u, zero, zero, zero, 1.0, EPS).losses.sum(), u)[0]
    best = math.log((1 - EPS) / EPS)
    assert (slope[u < best - 0.01] < 0).all() and (slope[u > best + 0.01] > 0).all()
    slope = torch.autograd.grad(dpo_loss(u, zero, zero, zero, 1.0, EPS, loss_type="robust").losses.sum(), u)[0]
    assert (slope <= -EPS / (1 - 2 * EPS)).all() and slope[-1] == pytest.approx(-EPS / (1 - 2 * EPS))


def test_minima():
    """Where each loss wants to go: IPO to 1/(2 beta), EXO to log((1-eps)/eps)/beta, SPPO to +-1/(2 beta)."""
    zero = torch.zeros(1, dtype=torch.float64)

    def slope(kind, a, b=0.0):
        pc, pr = (torch.full((1,), v, dtype=torch.float64, requires_grad=True) for v in (a, b))
        g = torch.autograd.grad(run(kind, pc, pr, zero, zero).sum(), (pc, pr))
        return torch.stack(g).abs().max().item()

    assert slope("ipo", 1 / (2 * BETA)) < 1e-12 < slope("ipo", 1.0)
    assert slope("exo_pair", math.log((1 - EPS) / EPS) / BETA) < 1e-12 < slope("exo_pair", 1.0)
    assert slope("sppo_hard", 1 / (2 * BETA), -1 / (2 * BETA)) < 1e-12 < slope("sppo_hard", 1.0, -1.0)


def test_pairs_stay_pairs_except_where_sorted():
    pc, pr, rc, rr, lc, lr = draw()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    for kind in PAIR_LOSSES:
        losses, permuted = run(kind, pc, pr, rc, rr, lc, lr), run(kind, *(x[order] for x in (pc, pr, rc, rr, lc, lr)))
        assert_close(permuted, losses if PAIR_LOSSES[kind].sorts_batch else losses[order], msg=kind)


def test_alpha_divergence_reaches_its_neighbours():
    inputs = draw()
    near = dpo_loss(*inputs[:4], BETA, f_divergence="alpha_divergence", f_alpha=1 - 1e-5).losses
    assert_close(near, dpo_loss(*inputs[:4], BETA).losses, rtol=5e-5, atol=5e-5)  # alpha is off by 1e-5
    assert_close(dpo_loss(*inputs[:4], BETA, f_divergence="alpha_divergence", f_alpha=1.0).losses, dpo_loss(*inputs[:4], BETA).losses)
    zero = dpo_loss(*inputs[:4], BETA, f_divergence="alpha_divergence", f_alpha=0.0).losses
    assert_close(zero, dpo_loss(*inputs[:4], BETA, f_divergence="forward_kl").losses)


@settings(max_examples=40, deadline=None)
@given(st.floats(-30, 30), st.floats(0.01, 5.0), st.floats(0.0, 0.49))
def test_one_liner_equals_the_two_term_forms(x, beta, eps):
    pc, zero = torch.tensor([x], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    ls, u = torch.nn.functional.logsigmoid, beta * pc
    assert_close(dpo_loss(pc, zero, zero, zero, beta, eps).losses, -(1 - eps) * ls(u) - eps * ls(-u), rtol=1e-11, atol=0)
    expected = (-(1 - eps) * ls(u) + eps * ls(-u)) / (1 - 2 * eps)
    assert_close(
        dpo_loss(pc, zero, zero, zero, beta, eps, loss_type="robust").losses, expected, rtol=1e-11, atol=1e-14 / (1 - 2 * eps)
    )  # a difference


def test_sft_of_a_single_token():
    pc, pr, rc, rr = draw()[:4]
    one, none = torch.tensor([1, 0]), torch.tensor([0, 0])
    assert_close(run("sft", pc[:2], pr[:2], rc[:2], rr[:2], one, none), -pc[:2].sum().expand(2))
