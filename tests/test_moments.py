"""row_moments on every backend, against its formula in float64 on the rounded inputs."""

import math

import pytest
import torch
from isas import every_isa

import rlkern
from rlkern import backends, reference
from rlkern.backends.contract import ELSEWHERE
from rlkern.primitives import moments
from rlkern.primitives.moments import row_moments

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
every_type = pytest.mark.parametrize("dtype", DTYPES, ids=str)
STATISTIC = {torch.float64: 1e-12}  # relative error of a statistic
GRADIENT = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def draw(*shape, dtype=torch.float32, mean=20.0, std=3.0, seed=0):
    """Logits, targets, and an upstream gradient of each statistic."""
    g = torch.Generator().manual_seed(seed)
    logits = (mean + std * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)
    grads = [torch.randn(shape[:-1], generator=g, dtype=torch.float64) for _ in range(2)]
    return logits, torch.randint(0, shape[-1], shape[:-1], generator=g), grads


def run(x, y, grads, device="cpu", **options):
    """[centred target, variance, gradient], by the function under test."""
    leaf = x.to(device).detach().requires_grad_()
    fields = row_moments(leaf, y.to(device), **{key: v.to(device) if isinstance(v, torch.Tensor) else v for key, v in options.items()})
    used = [(t, g.to(t)) for t, g in zip(fields, grads, strict=True) if g is not None]
    (gradient,) = torch.autograd.grad([t for t, _ in used], leaf, [g for _, g in used])
    return [t.detach().cpu() for t in (*fields, gradient)]


def exact(x, y, grads):
    leaf = x.detach().double().requires_grad_()
    fields = reference.row_moments(leaf, y)
    used = [(t, g) for t, g in zip(fields, grads, strict=True) if g is not None]
    (gradient,) = torch.autograd.grad([t for t, _ in used], leaf, [g for _, g in used])
    return [*(t.detach() for t in fields), gradient]


def check(x, y, grads, device="cpu", **options):
    got, want = run(x, y, grads, device, **options), exact(x, y, grads)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    assert [t.dtype for t in got] == [acc, acc, x.dtype] and got[2].shape == x.shape
    rtol = STATISTIC.get(x.dtype, 1e-6)
    spread = want[1].max().sqrt().item()
    torch.testing.assert_close(got[0].double(), want[0], rtol=rtol, atol=rtol * spread)
    torch.testing.assert_close(got[1].double(), want[1], rtol=rtol, atol=0)
    smallest = 2**-24 if x.dtype == torch.float16 else 0  # half precision's subnormal step
    atol = max(0.1 * rtol * want[2].abs().max().item(), smallest)
    torch.testing.assert_close(got[2].double(), want[2], rtol=GRADIENT[x.dtype], atol=atol)


@every_isa
@every_type
@pytest.mark.parametrize("vocab", [1, 7, 2047, 2048, 2049, 9001])
def test_values_and_gradients(backend, device, dtype, vocab):
    x, y, grads = draw(2, 2, vocab, dtype=dtype)
    check(x, y, grads, device)
    if vocab in (7, 2049):
        check(x, y, [grads[0], None], device)
        check(x, y, [None, grads[1]], device)


@every_isa
@every_type
def test_any_strides(backend, device, dtype):
    x, y, grads = draw(3, 4, 515, dtype=dtype)
    inner = y[:, :3].clamp_max(512), [g[:, :3] for g in grads]
    check(x[:, :-1, :513], *inner, device)
    check(x[:, 1:, 1:-1], *inner, device)  # rows that start one element off
    check(x.transpose(0, 1), y.T, [g.T for g in grads], device)
    check(x[:1, :1].expand(3, 4, 515), y, grads, device)


@every_isa
def test_far_from_zero_the_spread_survives(backend, device):
    """16 steps of float32 at 1000: a mean of one float32 is off by 3 per cent of the spread."""
    x, y, grads = draw(3, 20_011, mean=1000, std=1e-3)
    got, want = run(x, y, grads, device), exact(x, y, grads)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(got[2].double(), want[2], rtol=1e-5, atol=1e-6 * want[2].abs().median().item())


@every_isa
@pytest.mark.parametrize("vocab", [5000, 40_003])
def test_rows_that_no_tile_represents(backend, device, vocab):
    """A first logit, a first tile or an end that lies far from the rest; a row that drifts."""
    x, y, grads = draw(5, vocab, std=1.0)
    x[0, 0] -= 1e4
    x[1, :2048] += 300
    x[2, -3:] -= 1e4
    x[3] += torch.linspace(0, 1000, vocab)
    x[4] = x[4].sort().values
    got, want = run(x, y, grads, device), exact(x, y, grads)
    torch.testing.assert_close(got[1].double(), want[1], rtol=2e-6, atol=0)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(got[2].double(), want[2], rtol=1e-5, atol=1e-6 * want[2].abs().max().item())


@every_isa
@every_type
def test_equal_logits_have_no_variance(backend, device, dtype):
    for vocab in (1, 7, 2049, 6000):
        x = torch.full((2, vocab), 3.14159, dtype=dtype)
        target, variance, _ = run(x, torch.tensor([0, vocab - 1]), [torch.ones(2)] * 2, device)
        assert (variance == 0).all() and (target == 0).all()


@every_isa
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("at", [0, 5, 2999])
def test_a_row_with_an_infinite_logit_is_nan(backend, device, bad, at):
    x, y, grads = draw(3, 3000)
    x[1, at] = bad
    y[1] = 17
    target, variance, gradient = run(x, y, grads, device)
    assert target.isnan().tolist() == variance.isnan().tolist() == [False, True, False]
    assert gradient.isnan().all(-1).tolist() == [False, True, False] and gradient[[0, 2]].isfinite().all()
    # The target's gradient is a constant.
    gradient = run(x, y, [grads[0], torch.zeros(3)], device)[2]
    expected = torch.full((3000,), -grads[0][1].item() / 3000)
    expected[17] += grads[0][1].item()
    torch.testing.assert_close(gradient[1], expected)


@every_isa
def test_rows_that_are_not_read(backend, device):
    x, y, grads = draw(2, 3, 700)
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]])
    y[1, 0] = -7
    grads[0][1, 1] = grads[1][1, 1] = 0  # nothing flows back
    x[0, 1] = x[1, 0] = x[1, 1] = math.nan
    y[0, 1] = 10**6
    target, variance, gradient = run(x, y, grads, device, mask=mask, ignore_index=-7)
    unread = (mask == 0) | (y == -7)
    assert (target[unread] == 0).all() and (variance[unread] == 0).all() and (gradient[unread] == 0).all()
    assert variance[1, 1].isnan() and (gradient[1, 1] == 0).all()
    unread[1, 1] = True
    read = ~unread
    want = exact(x[read], y[read], [g[read] for g in grads])
    torch.testing.assert_close([t[read].double() for t in (target, variance, gradient)], want, rtol=1e-5, atol=1e-6)


@every_isa
@pytest.mark.parametrize("bad", [700, -1, 2**40, ELSEWHERE])
def test_targets_out_of_range(backend, device, bad, monkeypatch):
    x, y, grads = draw(3, 700)
    y[1] = bad
    if device == "cpu":
        with pytest.raises(IndexError, match=f"target {bad} of row 1 is out of range for 700 logits"):
            run(x, y, grads)
    if backend != "native":  # where nobody looks at the targets
        monkeypatch.setattr(moments, "values_readable", lambda x: False)
        target, variance, gradient = run(x, y, grads, device)
        assert target.isnan().tolist() == [False, True, False] and variance.isfinite().all()
        assert gradient[1].isnan().all() and gradient[[0, 2]].isfinite().all()
        gradient = run(x, y, [None, grads[1]], device)[2]
        torch.testing.assert_close(gradient.double(), exact(x, y.clamp(0, 699), [None, grads[1]])[2], rtol=1e-5, atol=1e-8)


@every_isa
@every_type
def test_a_row_has_the_same_bits_anywhere(backend, device, dtype):
    vocab = 2053
    x, y, grads = draw(1, vocab, dtype=dtype)
    alone = run(x, y, grads, device)
    for lead in (1, 2, 5):
        several = torch.zeros(4, vocab + 9, dtype=dtype, device=device)[:, lead : lead + vocab].copy_(x)
        for got, want in zip(run(several, y.expand(4), [g.expand(4) for g in grads], device), alone, strict=True):
            assert torch.equal(got, want.expand_as(got)), lead


@every_type
def test_streamed_gradients_have_the_same_bits(dtype):
    """Beyond the size of caches the C++ kernels write past them. No thread count shows."""
    vocab = 40_009
    x, y, grads = draw(2**25 // (vocab * dtype.itemsize) + 1, vocab, dtype=dtype)
    together = run(x, y, grads)
    for row in (0, 3, len(x) - 1):
        for got, want in zip(together, run(x[row : row + 1], y[row : row + 1], [g[row : row + 1] for g in grads]), strict=True):
            assert torch.equal(got[row], want[0])


@pytest.mark.parametrize("first", ["reference", "native", "triton"])
def test_a_backward_continues_another_backends_forward(first):
    x, y, grads = draw(2, 3, 3001, mean=1000, std=0.01)
    y, grads, want = y.view(-1, 1), [g.float().flatten() for g in grads], exact(x, y, grads)[2]
    with rlkern.use_backend(first):
        out = [torch.full(shape, math.nan) for shape in ((6,), (6,), (6, 2))]
        backends.select(x.device).row_moments_forward(x, y, None, -100, out)
    for then in ("reference", "native", "triton"):
        with rlkern.use_backend(then):
            gradient = torch.full_like(x, math.nan)
            backends.select(x.device).row_moments_backward(x, y, None, -100, out[2], grads, gradient)
        torch.testing.assert_close(gradient.double(), want, rtol=1e-4, atol=1e-8)


def test_empty_rows(backend, device):
    for shape in ((0, 5), (2, 0, 5)):
        x = torch.zeros(shape, device=device, requires_grad=True)
        fields = row_moments(x, torch.zeros(shape[:-1], dtype=torch.long, device=device))
        (fields.variance.sum() + fields.centred_target.sum()).backward()
        assert fields.variance.shape == shape[:-1] and x.grad.shape == shape


def test_compiles(backend, device):
    x, y, grads = draw(2, 3, 50)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=False, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y, grads, device), run(x, y, grads, device))
    call = torch.compile(row_moments, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(tuple(call(x.to(device), y.to(device))), tuple(row_moments(x.to(device), y.to(device))))
