"""The same bits every time and on every device, as far as that shows without a GPU. No operator adds floats
in an order that a GPU chooses. Masks come of arithmetic that no device does otherwise. What nobody checks on
a GPU does no harm there."""

import ast
import math
import pathlib
from fractions import Fraction

import loss_battery as battery
import pytest
import torch
from calls import CALLS
from derivatives import differentiate
from torch.utils._python_dispatch import TorchDispatchMode

import rlkern
from rlkern.primitives import elbo, kept

PACKAGE = pathlib.Path(rlkern.__file__).parent
UNORDERED = {"index_add", "scatter_add", "scatter_reduce", "index_reduce", "index_put", "put", "bincount", "histc", "_segment_reduce_backward"}

ADDS = ("exact_sums.py", "sequence_weights.py", "sequence_sums.py")


def test_no_source_adds_in_any_order():
    """The insides of operators too, which a dispatch mode does not see. Two files add integers, and
    sequence_sums.py only for torch.func and batches of gradients."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                assert node.attr.rstrip("_") not in UNORDERED or path.name in ADDS, f"{path}:{node.lineno}: {node.attr}"


class Ordered(TorchDispatchMode):
    """Raises for operators that add floats in any order on a GPU. Integers may be added as they come."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if name in UNORDERED or name in ("cumsum", "logcumsumexp", "cumprod"):
            reduces = str((kwargs or {}).get("reduce", args[4] if len(args) > 4 else "sum"))
            adds = not name.startswith("index_put") or (len(args) > 3 and args[3])
            if args[0].dtype.is_floating_point and adds and not (name == "scatter_reduce" and reduces in ("amax", "amin")):
                raise AssertionError(f"{func} of {args[0].dtype}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_no_operator_adds_in_any_order(name):
    with rlkern.use_backend(name):
        for call in CALLS:
            leaves = {key: call.arguments[key].clone().requires_grad_() for key in call.wrt}
            with Ordered():
                output = call(**leaves)
                if leaves:
                    torch.autograd.grad(battery.total(output), list(leaves.values()), allow_unused=True)


def test_the_mode_sees_one():
    x, first = torch.ones(3, requires_grad=True), torch.zeros(2, dtype=torch.long)
    for add in (lambda: torch.zeros(3).index_add_(0, first, torch.ones(2)), lambda: x.index_select(0, first).sum().backward()):
        with Ordered(), pytest.raises(AssertionError, match="index_add"):
            add()


def divisions(sample, *args, **options):
    """The results of a mask sampler's divisions. None is by a number, which CUDA does by its reciprocal."""
    with battery.Operators() as ran:
        sample(*args, **options)
    found = []
    for func, arguments, results in ran.calls:
        if func._schema.name.startswith(("aten::div", "aten::true_divide")) and "rounding_mode" not in str(func):
            assert isinstance(arguments[1], torch.Tensor), f"{func} by the number {arguments[1]}"
            found += results
    return found


def test_masks_divide_by_tensors_in_float64():
    response = torch.ones(2, 3, dtype=torch.bool)
    for n in range(2, 257):
        shares, weights = divisions(rlkern.diffusion.count_masks, response, n, seed=n)
        assert shares.dtype == weights.dtype == torch.float64
        assert shares.tolist() == [float(Fraction(j, n)) for j in range(n)]
    divisions(rlkern.diffusion.count_masks, response, 4, seed=0, complementary=True, draw=1)
    divisions(rlkern.diffusion.bernoulli_masks, response, 4, seed=0, low=0.1, high=0.9, complementary=True)
    divisions(rlkern.diffusion.bernoulli_masks, response, 4, seed=0, p=0.3)


def test_weights_of_masks_are_rounded_once():
    """L / m of all lengths up to 256, with all m."""
    for length in (1, 2, 3, 7, 100, 255, 256):
        mask, weight = rlkern.diffusion.count_masks(torch.ones(1, length), 2 * length, seed=1)
        exact = torch.tensor([float(Fraction(length, int(m))) for m in mask.sum(-1).flatten()], dtype=torch.float64)
        assert torch.equal(weight.flatten(), exact.float())


def test_sequences_of_packed_rows_without_a_check(monkeypatch):
    """Nobody looks at seq_idx on a GPU. A row of no sequence is left out, with gradient 0."""
    monkeypatch.setattr(elbo, "values_readable", lambda x: False)
    g = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(6, 7, generator=g, dtype=torch.float64), torch.randint(0, 7, (6,), generator=g)
    seq_idx = torch.tensor([-3, 0, 0, 2, 3, 10**6])
    upstream = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)

    def ours(z):
        return rlkern.masked_elbo(z, targets, torch.ones(6), seq_idx=seq_idx, num_seqs=3)

    def naive(z):
        logp = z.log_softmax(-1)[torch.arange(6), targets]
        return torch.stack([logp[1] + logp[2], 0 * logp[0], logp[3]])

    torch.testing.assert_close(*(differentiate(f, logits, upstream) for f in (ours, naive)), rtol=1e-12, atol=1e-12)


def test_ids_to_keep(monkeypatch):
    logits = torch.tensor([[0.0, 1.0, 2.0, -math.inf], [3.0, 1.0, 2.0, 0.0]])
    for bad in (-1, 4, 10**6):
        with pytest.raises(IndexError, match=f"always_keep holds the id {bad}, out of range for the 4 logits of a row of mask_logits"):
            rlkern.nlpo_keep_set(logits, top_k=1, always_keep=torch.tensor([0, bad]))
    monkeypatch.setattr(kept, "values_readable", lambda x: False)
    keep = rlkern.nlpo_keep_set(logits, top_k=1, always_keep=torch.tensor([1, -1, 4, 10**6, 3]))
    assert keep.tolist() == [[False, True, True, False], [True, True, False, True]]
