"""The DPO family far out, at impossible responses, at empty ones, and in every dtype."""

import math

import pytest
import torch
from dpo_formulas import EPS, draw, run
from torch.testing import assert_close

from rlkern import dpo_loss
from rlkern.losses.preference.dpo_types import F_DIVERGENCES, PAIR_LOSSES

LIMITS = {  # loss at u = +1e4 and u = -1e4 (beta 1, chosen moves, the rest 0), eps = 0.1
    "sigmoid": (1e3, 1e4 - 1e3),
    "robust": (-0.125e4, 1e4 + 0.125e4),
    "hinge": (0.0, 10001.0),
    "exo_pair": (-math.log(0.9), -math.log(0.1)),
    "nca_pair": (0.5e4 + 0.5 * math.log(2), 1e4 + 0.5 * math.log(2)),
    "bco_pair": (math.log(2), 1e4 + math.log(2)),
    "apo_zero": (0.5, 1.5),
    "apo_down": (1.0, 1.0),
    "discopop": (0.0, 1e4),
    "ipo": (9999.5**2, 10000.5**2),
    "sppo_hard": (9999.5**2 + 0.25, 10000.5**2 + 0.25),
}


@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_far_out_values_and_gradients_are_finite(kind, dtype):
    pc = torch.tensor([1e4, -1e4], dtype=dtype, requires_grad=True)
    zero = torch.zeros_like(pc)
    options = {"label_smoothing": EPS} if "label_smoothing" in PAIR_LOSSES[kind].uses else {}
    losses = dpo_loss(pc, zero, zero, zero, 1.0, loss_type=kind, **options).losses
    assert_close(losses, torch.tensor(LIMITS[kind], dtype=dtype))
    assert torch.autograd.grad(losses.sum(), pc)[0].isfinite().all()


def test_hinge_lets_go_at_its_kink():
    """As relu and TRL: no gradient at a margin of exactly 1, which bfloat16 log-probabilities reach."""
    pc, zero = torch.tensor([2.0, 1.5, 2.5], requires_grad=True), torch.zeros(3)
    losses = dpo_loss(pc, zero, zero, zero, 0.5, loss_type="hinge").losses
    assert torch.equal(losses, torch.tensor([0.0, 0.25, 0.0]))
    assert torch.equal(torch.autograd.grad(losses.sum(), pc)[0], torch.tensor([0.0, -0.5, 0.0]))


@pytest.mark.parametrize("f", F_DIVERGENCES)
def test_f_divergences_far_out(f):
    pc = torch.tensor([1e4, -1e4], requires_grad=True)
    pr = torch.tensor([-1e4, 1e4], requires_grad=True)
    losses = dpo_loss(pc, pr, torch.zeros(2), torch.zeros(2), f_divergence=f).losses
    assert losses.isfinite().all() and losses[0] < 1e-6 and losses[1] > 1
    assert all(g.isfinite().all() for g in torch.autograd.grad(losses.sum(), (pc, pr)))


def test_impossible_rejected_response():
    """log pi(rejected) = -inf: the loss takes its limit at u = inf, and gradients stay finite."""
    inf = torch.tensor([-math.inf], requires_grad=True)
    pc = torch.zeros(1, requires_grad=True)
    zero = torch.zeros(1)
    expected = {"sigmoid": 0.0, "hinge": 0.0, "exo_pair": -math.log(0.9), "bco_pair": math.log(2), "apo_zero": 0.5, "discopop": 0.0}
    for kind, value in expected.items():
        options = {"label_smoothing": 0.1} if kind == "exo_pair" else {}
        losses = dpo_loss(pc, inf, zero, zero, 1.0, loss_type=kind, **options).losses
        assert losses.item() == pytest.approx(value), kind
        assert all(g.isfinite().all() for g in torch.autograd.grad(losses.sum(), (pc, inf))), kind


def test_impossible_chosen_response():
    """log pi(chosen) = -inf: infinite losses are infinite and not NaN, bounded ones take their limit."""
    inf = torch.tensor([-math.inf], requires_grad=True)
    zero = torch.zeros(1)
    expected = {"sigmoid": (math.inf, -1), "hinge": (math.inf, -1), "discopop": (math.inf, -1), "apo_zero": (1.5, 0), "exo_pair": (-math.log(0.1), 0)}
    smoothed = {"sigmoid": (math.inf, pytest.approx(-0.9)), "robust": (math.inf, pytest.approx(-1.125)), "aot": (math.inf, pytest.approx(-0.9))}
    for kind, (value, slope) in [*expected.items(), *smoothed.items()]:
        options = {"label_smoothing": 0.1} if kind == "exo_pair" or isinstance(slope, type(pytest.approx(0))) else {}
        losses = dpo_loss(inf, zero, zero, zero, 1.0, loss_type=kind, **options).losses
        assert losses.item() == pytest.approx(value), kind
        assert torch.autograd.grad(losses.sum(), inf)[0].item() == slope, kind


def test_impossible_responses_of_weight_0():
    """Both of them, under both models: there is no ratio. Rewards are as they are without weights."""
    inf = torch.tensor([-math.inf, -1.0])
    for kind in ("sigmoid", "hinge", "ipo", "cpo"):
        policy = [inf.clone().requires_grad_() for _ in range(2)]
        reference = (None, None) if kind == "cpo" else (inf, inf)
        out = dpo_loss(*policy, *reference, 1.0, loss_type=kind, weights=torch.tensor([0.0, 2.0]))
        plain = dpo_loss(*policy, *reference, 1.0, loss_type=kind)
        assert out.losses.tolist() == [0, 2 * plain.losses[1]]
        torch.testing.assert_close(out.chosen_rewards, plain.chosen_rewards, rtol=0, atol=0, equal_nan=True)
        for gradient in torch.autograd.grad(out.losses.sum(), policy):
            assert gradient[0] == 0 and gradient[1] != 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_half_precision_inputs_are_computed_in_float32(dtype):
    pc, pr, rc, rr, lc, lr = (x.detach().to(dtype) if x.dtype.is_floating_point else x for x in draw())
    for kind in PAIR_LOSSES:
        losses = run(kind, pc, pr, rc, rr, lc, lr)
        assert losses.dtype == torch.float32
        assert_close(losses.double(), run(kind, *(x.double() for x in (pc, pr, rc, rr)), lc, lr), rtol=1e-5, atol=1e-5, msg=kind)


def test_mixed_dtypes_take_the_widest():
    pc, pr, rc, rr, *_ = draw()
    assert dpo_loss(pc.float(), pr.bfloat16(), rc.half(), rr.float()).losses.dtype == torch.float32
    assert dpo_loss(pc.float(), pr.float(), rc, rr).losses.dtype == torch.float64


def test_empty_responses_have_length_one():
    one, zero = torch.ones(1), torch.zeros(1)
    empty = torch.zeros(1, dtype=torch.long)
    lengths = {"chosen_lengths": empty, "rejected_lengths": empty}
    assert dpo_loss(one, zero, zero, zero, 1.0, loss_type="ipo_norm", **lengths).losses.item() == 0.25
    assert dpo_loss(zero, zero, zero, zero, loss_type="sft", **lengths).losses.item() == 0


def test_sft_divides_by_the_tokens_there_are():
    lengths = torch.tensor([0, 3])
    losses = dpo_loss(torch.tensor([0.0, -6.0]), *[torch.zeros(2)] * 3, loss_type="sft", chosen_lengths=lengths).losses
    assert losses.tolist() == [2.0, 2.0]
