"""torch.set_default_dtype is the caller's: primitives, masks and advantages have the same bits under any."""

import loss_battery as battery
import pytest
import torch
from calls import CALLS, moved

import rlkern
from rlkern.primitives.selection import selected_means

OTHERS = [call for call in CALLS if not call.function.__module__.startswith("rlkern.losses")]  # the battery has the losses
INTERPRETED = ("entropy_from_logits", "token_covariance")  # the interpreter is slow


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def default(request):
    yield request.param
    torch.set_default_dtype(torch.float32)


def results(call, default, device):
    torch.set_default_dtype(default)
    arguments = moved(call.arguments, device)
    leaves = [arguments[name].requires_grad_() for name in call.wrt]
    output = call(**arguments)
    gradients = torch.autograd.grad(battery.total(output), leaves) if leaves else ()
    return [*battery.tensors_of(output), *gradients]


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
def test_results_do_not_follow_the_default_dtype(default, backend):
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    with rlkern.use_backend(backend):
        for call in OTHERS:
            if backend == "triton" and call.name not in INTERPRETED:
                continue
            for i, (a, b) in enumerate(zip(results(call, torch.float32, device), results(call, default, device), strict=True)):
                assert a.dtype == b.dtype, f"{call}, result {i}: {a.dtype} becomes {b.dtype}"
                assert torch.equal(a.nan_to_num(), b.nan_to_num()), f"{call}, result {i}: {a} becomes {b}"


def test_selections(default):
    """What losses take of them, in plain PyTorch."""
    values, selected, mask = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[True, False, False]]), torch.ones(1, 3, dtype=torch.bool)
    torch.set_default_dtype(default)
    with rlkern.use_backend("reference"):
        means = selected_means(values, selected, mask)
    assert [m.dtype for m in means] == 3 * [torch.float32]
    assert torch.stack(means).tolist() == torch.tensor([1 / 3, 2.0, 1.0], dtype=torch.float32).tolist()


def test_weights_of_masks(default):
    """10 / m, to the last bit of float32."""
    torch.set_default_dtype(default)
    mask, weight = rlkern.diffusion.count_masks(torch.ones(1, 10, dtype=torch.float32), 7, seed=0)
    counts = mask.sum(-1).flatten().tolist()
    assert weight.dtype == torch.float32
    assert weight.flatten().tolist() == [torch.tensor(10 / m, dtype=torch.float32).item() for m in counts]
