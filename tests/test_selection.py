"""The selections against Python's own sort, on every backend; their edges; how PyTorch sees them."""

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_battery import NoSyncingMethods, NoSyncingOperators
from torch._dynamo.testing import CompileCounterWithBackend

import rlkern
from rlkern.primitives.selection import fraction_count, select_bottom, select_fraction, select_random, select_top

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def chosen(mask):
    return [i for i, flag in enumerate(mask.flatten().tolist()) if flag]


def smallest(values, valid, count):
    """Flat indices of the `count` smallest by Python's sort: NaN last, -0.0 == 0.0, equals in order."""
    values = values.flatten().tolist()
    entries = chosen(valid)
    entries.sort(key=lambda i: (math.isnan(values[i]), 0.0 if math.isnan(values[i]) else values[i]))
    return sorted(entries[: max(count, 0)])


SPECIAL = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, -math.nan, 1e-40, -1e-40, 3e38, -3e38]
entries = st.lists(st.tuples(st.one_of(st.sampled_from(SPECIAL), st.integers(-3, 3).map(float), st.floats(width=32)), st.booleans()), max_size=70)


def check_against_sort(drawn, count, dtype, device="cpu"):
    values = torch.tensor([value for value, _ in drawn], dtype=torch.float64).to(dtype)
    valid = torch.tensor([ok for _, ok in drawn], dtype=torch.bool)
    expected = smallest(values.double(), valid, count)
    assert chosen(select_bottom(values.to(device), valid.to(device), count)) == expected
    assert chosen(select_top((-values).to(device), valid.to(device), torch.tensor(count, device=device))) == expected


@settings(max_examples=150, deadline=None)
@given(entries, st.integers(-2, 75), st.sampled_from(DTYPES))
@pytest.mark.parametrize("name", ["reference", "native"])
def test_any_input(name, drawn, count, dtype):
    with rlkern.use_backend(name):
        check_against_sort(drawn, count, dtype)


@settings(max_examples=8, deadline=None)
@given(entries, st.integers(-2, 75), st.sampled_from(DTYPES[:2]))
def test_any_input_on_triton(drawn, count, dtype):
    with rlkern.use_backend("triton"):
        check_against_sort(drawn, count, dtype, "cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_special_values(backend, device, dtype):
    """All of them twice, valid and not. NaN of any bits is the largest, the zeros tie, subnormals do not."""
    drawn = [(value, ok) for value in SPECIAL for ok in (True, False, True)]
    bits = {torch.float32: torch.int32, torch.float64: torch.int64}[dtype]
    values = torch.tensor([value for value, _ in drawn], dtype=dtype)
    values = torch.cat([values, torch.tensor([-1, -2, torch.iinfo(bits).max], dtype=bits).view(dtype)])  # NaNs of all ones, and the largest integer
    assert values[-3:].isnan().all()
    valid = torch.tensor([ok for _, ok in drawn] + [True, False, True])
    for count in (0, 5, 10, 20, 25):  # 10: two of the four zeros
        got = select_bottom(values.to(device), valid.to(device), count)
        assert chosen(got) == smallest(values, valid, count), count


@pytest.mark.parametrize("distinct", [1, 3, 1000])
def test_ties_across_blocks(backend, device, monkeypatch, distinct):
    """Blocks of 4, more than 4. What one takes of the equals depends on all before it, read 4 at a time."""
    if backend == "triton":
        monkeypatch.setattr(importlib.import_module("rlkern.triton_kernels.selection"), "BLOCK", 4)
    g = torch.Generator().manual_seed(distinct)
    values = torch.randint(distinct, (23,), generator=g).float() - 1
    valid = torch.rand(23, generator=g) < 0.8
    for count in (3, int(valid.sum()) - 1):
        assert chosen(select_bottom(values.to(device), valid.to(device), count)) == smallest(values, valid, count)


@pytest.mark.parametrize("n", [4099, 300_001])
def test_many_values(n):
    """Equal to the reference's sort where Python's would take long."""
    g = torch.Generator().manual_seed(n)
    for values in (torch.randn(n, generator=g), torch.randint(50, (n,), generator=g).double()):
        valid = torch.rand(n, generator=g) < 0.9
        for count in (1, n // 100, n // 2, n):
            with rlkern.use_backend("reference"):
                expected = select_bottom(values, valid, count)
            assert torch.equal(select_bottom(values, valid, count), expected)
            assert expected.sum() == min(count, int(valid.sum()))


def test_shapes_and_strides(backend, device):
    g = torch.Generator().manual_seed(0)
    values, valid = torch.randn(6, 8, generator=g).to(device), torch.rand(6, 8, generator=g).to(device) < 0.7
    for v, ok in ((values.t(), valid.t()), (values[::2, 1:], valid[::2, 1:]), (values[:, :1].expand(6, 8), valid), (values[2, 3], valid[2, 3])):
        got = select_bottom(v, ok, 3)
        assert got.shape == v.shape and chosen(got) == smallest(v, ok, 3)
    assert select_bottom(values[:0], valid[:0], 3).shape == (0, 8)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [0, 1, 5, 19, 100])
def test_top_and_bottom_with_ties(seed, count):
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 4, (5, 8), generator=g).float()
    valid = torch.rand(5, 8, generator=g) < 0.6
    for k in (count, torch.tensor(count)):
        assert chosen(select_top(values, valid, k)) == smallest(-values, valid, count)
        assert chosen(select_bottom(values, valid.int(), k)) == smallest(values, valid, count)


def test_selection_of_extreme_values():
    values = torch.tensor([math.inf, -math.inf, math.inf, -math.inf, math.nan, 0.0])
    valid = torch.tensor([False, False, True, True, True, True])
    assert chosen(select_top(values, valid, 1)) == [2]
    assert chosen(select_top(values, valid, 3)) == [2, 3, 5]  # the infinity that is valid, not the one before it
    assert chosen(select_bottom(values, valid, 3)) == [2, 3, 5]
    assert chosen(select_bottom(values, valid, 9)) == [2, 3, 4, 5]
    assert select_top(values[:0], valid[:0], 3).shape == (0,)


def test_random_selection():
    valid = torch.tensor([[True, False, True], [True, True, False]])
    counts = torch.zeros(2, 3)
    g = torch.Generator().manual_seed(0)
    for _ in range(3000):
        picked = select_random(valid, 2, g)
        assert picked.sum() == 2 and not (picked & ~valid).any()
        counts += picked
    assert ((counts[valid] / 3000 - 0.5).abs() < 0.05).all()  # five standard deviations
    assert torch.equal(select_random(valid, 9), valid)
    assert torch.equal(*(select_random(torch.ones(1000), 10, torch.Generator().manual_seed(7)) for _ in range(2)))
    torch.manual_seed(3)
    first = select_random(torch.ones(1000), 10)
    torch.manual_seed(3)
    assert torch.equal(select_random(torch.ones(1000), 10), first)


@pytest.mark.parametrize("fraction", [0, 1e-4, 2e-4, 0.002, 0.005, 0.01, 0.29, 0.3, 0.57, 1])
def test_fraction_count(fraction):
    for total in (0, 1, 3, 99, 100, 200, 1000, 5000, 65536, 100000):
        for minimum in (0, 1):
            assert fraction_count(torch.tensor(total), fraction, minimum).item() == max(int(total * fraction), minimum)


ONES = torch.ones(3)


@pytest.mark.parametrize(
    "error, message, function, arguments",
    [
        (ValueError, r"fraction in \[0, 1\], not a percentage, got 2", fraction_count, (torch.tensor(5), 2)),
        (TypeError, "values must be a float tensor", select_top, (ONES.long(), ONES, 1)),
        (TypeError, "valid must be", select_bottom, (ONES, None, 1)),
        (TypeError, "valid must be", select_random, ([True], 1)),
        (ValueError, "valid must have the shape", select_top, (ONES, torch.ones(4), 1)),
        (ValueError, "count must be one number", select_top, (ONES, ONES, torch.ones(2))),
        (TypeError, "count must be an integer tensor, got torch.float32", select_top, (ONES, ONES, torch.ones(1))),
        (TypeError, "count must be an integer, got 1.5", select_top, (ONES, ONES, 1.5)),
        (ValueError, "valid must be on the device of values cpu, got meta", select_bottom, (ONES, ONES.to("meta"), 1)),
        (ValueError, "count must be on the device of values cpu, got meta", select_bottom, (ONES, ONES, torch.tensor(1).to("meta"))),
    ],
)
def test_selection_errors(error, message, function, arguments):
    with pytest.raises(error, match=message):
        function(*arguments)


def test_operator():
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    torch.library.opcheck(torch.ops.rlkern.select_bottom.default, (values, values > -1, torch.tensor(4)))


def test_compiled():
    """One graph for every count, int or tensor, and every length."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda values, valid, count: select_bottom(values, valid, count), fullgraph=True, dynamic=True, backend=counter)
    g = torch.Generator().manual_seed(0)
    for kind, frames in ((int, 1), (torch.tensor, 2)):
        for n, count in ((40, 5), (41, 6), (50, 11)):
            values, valid = torch.randn(n, generator=g), torch.rand(n, generator=g) < 0.7
            assert torch.equal(compiled(values, valid, kind(count)), select_bottom(values, valid, count))
        assert counter.frame_count == frames


def test_no_host_sync(backend, device):
    values = torch.randn(4, 9, device=device).requires_grad_()
    valid, count = values.detach() > -1, torch.ones((), dtype=torch.int64, device=device)
    generator = torch.Generator(device)
    with NoSyncingMethods(), NoSyncingOperators():
        select_top(values, valid, fraction_count(valid.sum(), 0.3, 1))
        select_bottom(values, valid, 3)
        select_random(valid, count, generator)


def test_a_bool_that_is_neither_0_nor_1_counts_as_true():
    """Memory that was never written holds such bytes. They must not push anything past an array's end."""
    values, odd = torch.arange(200.0).flip(0), torch.full((200,), 200, dtype=torch.uint8).view(torch.bool)
    odd[150:] = False
    for count in (3, 150, 10**6):
        assert torch.equal(select_bottom(values, odd, count), select_bottom(values, torch.arange(200) < 150, count))
    assert torch.equal(select_fraction(values, odd, odd, 0.1), select_fraction(values, *[torch.arange(200) < 150] * 2, 0.1))
