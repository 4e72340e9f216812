"""TRL's ORPO, CPO and KTO losses, its own against those that patch() puts there; where TRL's are wrong."""

import math
import types
from collections import defaultdict

import pytest
import torch

trl = pytest.importorskip("trl")
pytest.importorskip("peft")

from torch.testing import assert_close  # noqa: E402
from trl import KTOTrainer  # noqa: E402
from trl.experimental.cpo import CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOTrainer  # noqa: E402
from trl.trainer import kto_trainer  # noqa: E402

import rlkern  # noqa: E402
import rlkern.integrations.trl as integration  # noqa: E402
from rlkern.integrations.patching import Patch  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*trl.experimental")


def alone(x):
    return x


ACCELERATOR = types.SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=alone)


def pairs(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [-3 * torch.rand(8, generator=g, dtype=torch.float64).to(dtype) for _ in range(2)]


def both(method, *inputs, **trainer):
    """(what it returns, gradients of the losses) of TRL's own method and of ours."""
    results = []
    for patched in (False, True):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with integration.patch() if patched else Patch([]):
            out = getattr(*method)(types.SimpleNamespace(accelerator=ACCELERATOR, **trainer), *leaves)
        weights = torch.linspace(0.5, 1.5, len(out[0]))
        results.append((out, torch.autograd.grad((out[0] * weights).sum(), leaves)))
    return results


def test_odds_ratio_loss_is_trls():
    stock, ours = both((ORPOTrainer, "odds_ratio_loss"), *pairs(), beta=0.3)
    assert_close(ours, stock, rtol=1e-5, atol=1e-6)


def test_odds_ratio_loss_of_certain_responses():
    """A completion of probability 1, or so near that float32 has no other number: TRL's gradient is NaN."""
    x = torch.tensor([0.0, -1e-8, -1.0]), torch.tensor([-1.0, -1.0, 0.0])
    stock, ours = both((ORPOTrainer, "odds_ratio_loss"), *x, beta=0.1)
    assert stock[1][0][:2].isnan().all() and stock[1][1][2].isnan()
    assert all(t.isfinite().all() for t in (ours[0][0], *ours[1]))
    assert ours[1][0][:2].tolist() == pytest.approx([0.5 * 0.058198, 0.058198], rel=1e-5)  # negated losses


@pytest.mark.parametrize("kind", ["simpo", "sigmoid", "hinge", "ipo", "alpha"])
def test_cpo_loss_is_trls(kind):
    options = {"beta": 0.7, "label_smoothing": 0.1, "simpo_gamma": 0.4, "alpha": 0.0, "loss_type": kind}
    if kind == "alpha":
        options |= {"alpha": 0.3, "loss_type": "sigmoid"}
    stock, ours = both((CPOTrainer, "cpo_loss"), *pairs(), **options)
    assert_close(ours, stock, rtol=1e-5, atol=1e-6)


def test_unknown_loss_type_of_cpo_is_refused_by_trl():
    with integration.patch(), pytest.raises(ValueError, match="Unknown loss type: nope"):
        CPOTrainer.cpo_loss(types.SimpleNamespace(accelerator=ACCELERATOR, alpha=0.0, beta=0.1, loss_type="nope"), *pairs())


class Responses:
    """What KTOTrainer's loss needs of a trainer and a model: two tokens a response, of given sums."""

    def __init__(self, policy, reference, kl, kind, **weights):
        self.batch = {"input_ids": torch.zeros(len(policy), 3, dtype=torch.long)}
        self.batch |= {"completion_mask": torch.tensor([[0, 1, 1]]).expand(len(policy), 3), "ref_logps": reference}
        self.batch |= {"attention_mask": torch.ones(len(policy), 3), "ref_KL_logps": torch.zeros(len(policy))}
        self.policy = policy
        self.trainer = types.SimpleNamespace(
            model=torch.nn.Identity(), accelerator=ACCELERATOR, aux_loss_enabled=False, precompute_ref_logps=True, beta=0.1, loss_type=kind,
            calculate_KL=kind == "kto", _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1,
            _compute_kl_logps=lambda model, batch: torch.full((len(policy),), kl), **{"desirable_weight": 1.0, "undesirable_weight": 1.0} | weights,
        )  # fmt: skip

    def __call__(self, **inputs):
        tokens = torch.stack([self.policy / 2, self.policy / 2], 1)
        zero = torch.zeros_like(tokens)
        return types.SimpleNamespace(log_probs=tokens, entropy=zero, mean_logits=zero)

    def loss(self, label):
        return KTOTrainer._compute_loss(self.trainer, self, self.batch | {"label": label}, False)


def kto(policy, reference, label, kl, kind, patched, **weights):
    policy = policy.clone().requires_grad_()
    with integration.patch() if patched else Patch([]):
        loss = Responses(policy, reference, kl, kind, **weights).loss(label)
    return loss, *torch.autograd.grad(loss, policy)


of_outputs = pytest.mark.skipif(not hasattr(trl.trainer.utils, "add_fused_lm_head"), reason="TRL 1.14's KTOTrainer takes logits")


@of_outputs
@pytest.mark.parametrize("kind, kl", [("kto", 0.35), ("kto", -1.0), ("apo_zero_unpaired", 0.0)])
@pytest.mark.parametrize("label", [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], ids=str)
def test_kto_loss_is_trls_and_rlkerns(kind, kl, label):
    policy, reference = torch.tensor([-6.0, -9, -8, -4]), torch.tensor([-7.0, -8.5, -7.5, -4.5])
    label, weights = torch.tensor(label, dtype=torch.bool), {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    stock, ours = (kto(policy, reference, label, kl, kind, patched, **weights) for patched in (False, True))
    assert_close(ours, stock, rtol=1e-5, atol=1e-7)
    z = {"kl": max(kl, 0.0)} if kind == "kto" else {}
    assert_close(ours[0], rlkern.kto_loss(policy, reference, label, loss_type=kind, **z, **weights).losses.mean())


@of_outputs
def test_kto_learns_where_it_is_nearly_right():
    """From a reward of 17 on TRL's loss is 0 in float32, with gradient 0."""
    policy, reference, label = torch.tensor([-100.0, -500.0]), torch.tensor([-300.0, -300.0]), torch.tensor([True, False])
    stock, ours = (kto(policy, reference, label, 0.0, "kto", patched) for patched in (False, True))
    assert stock[0] == 0 and not stock[1].any()
    exact = math.exp(-20) / (1 + math.exp(-20))
    assert ours[0].item() == pytest.approx(exact, rel=1e-6)
    assert ours[1].tolist() == pytest.approx([-0.05 * exact, 0.05 * exact], rel=1e-6)


def test_what_is_put_back():
    before = ORPOTrainer.odds_ratio_loss, CPOTrainer.cpo_loss, kto_trainer.F
    patch = integration.patch()
    with integration.patch():
        assert ORPOTrainer.odds_ratio_loss is not before[0] and kto_trainer.F is not torch.nn.functional
        assert kto_trainer.F.softmax is torch.nn.functional.softmax
    assert CPOTrainer.cpo_loss is not before[1]
    patch.undo()
    assert (ORPOTrainer.odds_ratio_loss, CPOTrainer.cpo_loss, kto_trainer.F) == before and before[2] is torch.nn.functional
