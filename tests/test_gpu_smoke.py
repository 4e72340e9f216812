"""Every public function on a GPU, with small inputs: the CPU's results, on the inputs' device; the same bits
in deterministic mode; no wait for the device. test_errors_everywhere.py demands a call of each function."""

import os
from types import FunctionType

import pytest
import torch
from calls import CALLS, moved
from loss_battery import assert_same, tensors_of
from test_gpu import no_wait
from torch.utils._pytree import tree_leaves

DEVICE = "cuda"
SETTINGS = (str, int, float, torch.dtype, FunctionType, type(None))  # what arguments hold beside tensors

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products need it, from before the first one

NOTHING_OF_A_DEVICE = {
    "use_backend",
    "linear_plan",
    "losses.epo_beta",
    "losses.kd_coefficient",
    "PolicyLoss",
    "check_loss",
}  # give no tensor: a setting, a number, a module
OPTIONS = {"diffusion.quadrature_levels": {"device": DEVICE}}  # takes no tensor that would say where
WAITS = {"diffusion.quadrature_levels": "NumPy makes its numbers, on the host"}


def test_the_exceptions_are_public_functions():
    assert {*NOTHING_OF_A_DEVICE, *OPTIONS, *WAITS} <= {call.name for call in CALLS}


def needs_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


def upstream(t, i):
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64).to(t)


def prepare(call, device):
    """A function that makes the call on a device, with inputs there, and returns (tensors, gradients)."""
    arguments = moved(call.arguments, device) | (OPTIONS.get(call.name, {}) if device == DEVICE else {})
    wrt = [arguments[name].requires_grad_() for name in call.wrt]
    differentiable = [t for t in tensors_of(call(**arguments)) if t.requires_grad]
    weights = [upstream(t, i) for i, t in enumerate(differentiable)]

    def run():
        outputs = tensors_of(call(**arguments))
        differentiable = [t for t in outputs if t.requires_grad]
        return [t.detach() for t in outputs], list(torch.autograd.grad(differentiable, wrt, weights, materialize_grads=True)) if wrt else []

    return run


@needs_gpu
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_as_on_the_cpu(call):
    results, expected = prepare(call, DEVICE)(), prepare(call, "cpu")()
    assert (call.name in NOTHING_OF_A_DEVICE) == (not expected[0])
    for what, got, want in zip(("results", "gradients"), results, expected, strict=True):
        assert [t.device.type for t in got] == [DEVICE] * len(want)
        assert [(t.dtype, t.shape) for t in got] == [(t.dtype, t.shape) for t in want]
        got = [t.cpu() for t in got]
        exact = [i for i, t in enumerate(want) if not t.is_floating_point()]
        assert all(torch.equal(got[i], want[i]) for i in exact), f"{what}: {[(got[i], want[i]) for i in exact]}"
        assert_same(got, want, 1e-5, 5e-6, what, smallest=0.1)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@needs_gpu
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_the_same_bits_in_deterministic_mode(call, deterministic):
    """In which PyTorch refuses operators that add in any order, and fills new memory with NaN."""
    run = prepare(call, DEVICE)
    first, second = (tree_leaves(run()) for _ in range(2))
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m, i=i: f"tensor {i}: {m}")


@needs_gpu
@pytest.mark.parametrize("call", [call for call in CALLS if call.name not in WAITS], ids=str)
def test_does_not_wait_for_the_device(call):
    run = prepare(call, DEVICE)
    run()  # compiles and loads the kernels
    with no_wait():
        run()


def test_all_tensors_are_moved():
    nested = {"a": torch.ones(2), "b": [{"c": torch.ones(1)}, (torch.ones(3), "d")], "e": None}
    assert [x.is_meta for x in tree_leaves(moved(nested, "meta")) if isinstance(x, torch.Tensor)] == 3 * [True]
    for call in CALLS:
        others = [x for x in tree_leaves(moved(call.arguments, "meta")) if not isinstance(x, torch.Tensor) or not x.is_meta]
        assert all(isinstance(x, SETTINGS) for x in others), f"{call}: {others}"
