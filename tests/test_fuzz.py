"""A fixed slice of what `make fuzz` runs, on each backend; and the fuzz finds what it is for."""

import fuzz
import pytest
import torch
from calls import CALLS, Call

import rlkern

ON_THE_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels take no tensors of the CPU")


@pytest.mark.parametrize(
    ("backend", "start", "stop"), [("auto", 0, 400), ("reference", 400, 600), pytest.param("triton", 600, 640, marks=ON_THE_CPU)]
)
@pytest.mark.filterwarnings("ignore")
def test_random_calls(backend, start, stop):
    with rlkern.use_backend(backend):
        for index, wrong in fuzz.findings(0, start, stop):
            raise AssertionError(f"{wrong} in {fuzz.describe(0, index)}: python tests/fuzz.py --seed 0 --only {index}")


def found(monkeypatch, function):
    x = torch.ones(2, 3)
    monkeypatch.setattr(fuzz, "draw", lambda seed, index: (Call("broken", function, {"x": x}, ("x",)), {"x": x}, True))
    return fuzz.run(0, 0)


def test_it_finds(monkeypatch):
    assert found(monkeypatch, lambda x: x.square()) is None
    assert found(monkeypatch, lambda x: (x - 1).log().relu() - (x - 1).log().relu() * torch.inf) == "NaN among the results"
    assert found(monkeypatch, lambda x: (x - 1).sqrt() * 0) == "NaN in a gradient"
    assert found(monkeypatch, lambda x: x @ x).startswith("RuntimeError: mat1 and mat2")
    assert found(monkeypatch, lambda x: x / "3").startswith("TypeError: unsupported operand")
    assert found(monkeypatch, lambda x: {}[x]).startswith("KeyError")


def test_changes_reach_every_function():
    drawn = {fuzz.draw(0, index)[0].function for index in range(2500)}
    assert {call.function for call in CALLS} <= drawn


def test_what_it_found():
    half = torch.tensor([-6e4, -1.0], dtype=torch.float16, requires_grad=True)
    estimate = rlkern.kl_estimate(half, torch.zeros(2, dtype=torch.float16), "k1+")  # its square is beyond float16
    estimate.sum().backward()
    assert estimate.tolist() == half.grad.tolist() == half.tolist()

    acc = rlkern.BGPOAccumulator(torch.zeros(0), None, 1.0, 1, ratio_scale=1.0)
    acc.loss(0, torch.zeros(0, 3, 5), torch.zeros(0, 3, dtype=torch.int64), weight=torch.ones(0))
    assert all(metric == 0 for metric in acc.metrics().values())

    impossible, zero = torch.tensor([-torch.inf], requires_grad=True), torch.zeros(1)
    losses = rlkern.dpo_loss(impossible, zero, zero, zero, weights=zero).losses
    assert losses.tolist() == [0] and torch.autograd.grad(losses.sum(), impossible)[0].tolist() == [0]

    logp = torch.zeros(1, 1, requires_grad=True)  # ratio and estimate e^80 each
    tokens = {"old_logp": torch.tensor([[-90.0]]), "advantages": zero, "mask": torch.ones(1, 1), "reference_logp": torch.tensor([[90.0]])}
    loss = rlkern.grpo_loss(logp, **tokens, kl_coef=0.1, kl_scale=zero, kl_times_ratio=True).loss
    assert loss == 0 and torch.autograd.grad(loss, logp)[0] == 0

    tokens = {"logp": torch.zeros(1, 1), "old_logp": None, "success_rate": torch.ones(1), "correct": torch.ones(1), "mask": torch.ones(1, 1)}
    assert rlkern.nft_loss(**tokens, normalize=1.0).loss == 0
