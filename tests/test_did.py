"""token_did_entropy on every backend, against its formula in float64 on the rounded inputs."""

import math

import pytest
import torch
from isas import every_isa
from loss_battery import Operators

import rlkern
from rlkern import backends, layout, reference
from rlkern.backends.contract import State
from rlkern.primitives.did import token_did_entropy

INF = math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
every_type = pytest.mark.parametrize("dtype", DTYPES, ids=str)
GRADIENT = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
ROW_TEMPERATURE = torch.tensor([[0.5, 1.0], [2.0, 4.0]])  # as exact in float32 as in float64


def draw(*shape, dtype=torch.float32, of_reference=None, std=3.0, seed=0):
    """Logits, reference, upstream gradient."""
    g = torch.Generator().manual_seed(seed)
    x, r = (20 + std * torch.randn(*shape, generator=g, dtype=torch.float64) for _ in range(2))
    return x.to(dtype), r.to(of_reference or dtype), torch.randn(shape[:-1], generator=g, dtype=torch.float64)


def run(x, r, g, device="cpu", wanted=(True, True), **options):
    """[entropy, gradient of the logits, gradient of the reference], by the function under test."""
    leaves = [t.to(device).detach().requires_grad_(want) for t, want in zip((x, r), wanted, strict=True)]
    entropy = token_did_entropy(*leaves, **{key: v.to(device) if isinstance(v, torch.Tensor) else v for key, v in options.items()})
    gradients = iter(torch.autograd.grad(entropy, [t for t in leaves if t.requires_grad], g.to(entropy)))
    return [entropy.detach().cpu(), *(next(gradients).cpu() if want else None for want in wanted)]


def exact(x, r, g, temperature=1.0):
    leaves = [t.detach().double().clone().requires_grad_() for t in (x, r)]
    temperature = temperature.double() if isinstance(temperature, torch.Tensor) else temperature
    entropy = reference.token_did_entropy(*leaves, temperature)
    return [entropy.detach(), *torch.autograd.grad(entropy, leaves, g)]


def agree(got, want, dtypes, atol=None):
    acc = torch.float64 if dtypes[0] == torch.float64 else torch.float32
    assert [t.dtype for t in got] == [acc, *dtypes]
    tol = 1e-11 if acc == torch.float64 and dtypes[1] == torch.float64 else 1e-5
    torch.testing.assert_close(got[0].double(), want[0], rtol=tol, atol=tol)
    for gradient, expected, dtype in zip(got[1:], want[1:], dtypes, strict=True):
        smallest = 2**-24 if dtype == torch.float16 else 0  # half precision's subnormal step
        rounding = 0.05 * tol * expected.abs().max().item()
        torch.testing.assert_close(gradient.double(), expected, rtol=max(GRADIENT[dtype], tol), atol=max(rounding, smallest))


def check(x, r, g, device="cpu", **options):
    agree(run(x, r, g, device, **options), exact(x, r, g, **options), (x.dtype, r.dtype))


@every_isa
@every_type
@pytest.mark.parametrize("vocab", [1, 7, 2047, 2048, 2049, 9001])
def test_values_and_gradients(backend, device, dtype, vocab):
    check(*draw(2, 2, vocab, dtype=dtype), device)
    if vocab in (7, 2049):
        check(*draw(2, 2, vocab, dtype=dtype), device, temperature=0.7)
        check(*draw(2, 2, vocab, dtype=dtype), device, temperature=ROW_TEMPERATURE)


@every_isa
@pytest.mark.parametrize("of_reference", DTYPES, ids=str)
@every_type
def test_mixed_types(backend, device, dtype, of_reference):
    for vocab in (13, 2051):
        check(*draw(2, 2, vocab, dtype=dtype, of_reference=of_reference), device, temperature=2.0)


@every_isa
@pytest.mark.parametrize("of_reference", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(backend, device, of_reference):
    x, r, g = draw(3, 4, 515, dtype=torch.bfloat16, of_reference=of_reference)
    check(x[:, :-1, :513], r[:, 1:, 2:], g[:, 1:], device)
    check(x[:, 1:, 1:-1], r[:, 1:, 1:-1], g[:, 1:], device)
    check(x.transpose(0, 1), r.transpose(0, 1), g.T, device)
    check(x[:1, :1].expand(3, 4, 515), r, g, device)
    check(x[..., ::2], r[..., ::2], g, device)


@every_isa
@every_type
def test_minus_infinity(backend, device, dtype):
    vocab = 4100
    x, r, g = draw(8, vocab, dtype=dtype)
    allowed = torch.ones(8, vocab, dtype=torch.bool)
    allowed[0, :2048] = allowed[1, 2052:] = allowed[2, ::2] = allowed[3, 1:] = allowed[4, :-1] = False
    x[~allowed] = -INF
    for row, other in enumerate((-INF, INF, math.nan, 0.0)):  # whatever the reference holds there
        r[row][~allowed[row]] = other
    r[5, 7] = -INF  # in the reference alone: infinite mass
    x[6] = -INF
    r[7, 7] = INF  # mass 0
    got = run(x, r, g, device)
    assert got[0].isnan().tolist() == [False] * 5 + [True, True, False]
    for gradient in got[1:]:
        assert gradient[[5, 6]].isnan().all() and gradient[[0, 1, 2, 3, 4, 7]].isfinite().all()
        assert (gradient[:5][~allowed[:5]] == 0).all() and gradient[7, 7] == 0
    for row in (0, 1, 2, 3, 4):
        keep = allowed[row]
        want = exact(x[row : row + 1, keep], r[row : row + 1, keep], g[row : row + 1])
        agree([got[0][row : row + 1], *(t[row : row + 1, keep] for t in got[1:])], want, (dtype, dtype))


@every_isa
def test_rows_that_are_not_read(backend, device):
    x, r, g = draw(2, 3, 700)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]])
    x[0, 1], r[0, 1], r[1, 2], x[1, 1] = math.nan, -INF, math.nan, math.nan
    g[1, 1] = 0  # nothing flows back
    got = run(x, r, g, device, mask=mask)
    assert (got[0][mask == 0] == 0).all() and got[0][1, 1].isnan()
    zero = mask == 0
    zero[1, 1] = True
    assert all((t[zero] == 0).all() for t in got[1:])
    agree([t[~zero] for t in got], exact(x[~zero], r[~zero], g[~zero]), (x.dtype, r.dtype))


@every_isa
@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
@pytest.mark.parametrize("of_reference", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_that_nobody_wants(backend, device, wanted, of_reference):
    x, r, g = draw(2, 3, 2050, of_reference=of_reference)
    both, one = run(x, r, g, device), run(x, r, g, device, wanted)
    for got, want, there in zip(one, both, (True, *wanted), strict=True):
        assert torch.equal(got, want) if there else got is None


@every_isa
@every_type
def test_the_references_gradient_is_the_negative(backend, device, dtype):
    _, d_x, d_r = run(*draw(3, 2050, dtype=dtype), device)
    assert torch.equal(d_x, -d_r) and (d_x != 0).any()


@every_isa
@pytest.mark.parametrize("where", [[0], [2100], [3, 7], [3, 2100, 4999]], ids=str)
def test_certain_and_tied_rows_keep_relative_accuracy(backend, device, where):
    """In closed form: what is left beside the maxima is 1e-7 of them."""
    gap, vocab, k = 24.75, 5000, len(where)
    r = draw(1, vocab)[0].bfloat16().float()
    x = r.clone()
    x[0, where] += gap
    assert torch.equal((x - r)[0, where], torch.full((k,), gap))
    rest = (vocab - k) * math.exp(-gap)
    entropy, d_x, _ = run(x, r, torch.ones(1), device)
    assert entropy.item() == pytest.approx(math.log(k) + math.log1p(rest / k) + rest * gap / (k + rest), rel=1e-5, abs=0)
    p = math.exp(-gap) / (k + rest)
    assert d_x[0, 1].item() == pytest.approx(-p * (math.log(p) + entropy.double().item()), rel=1e-5, abs=0)


@every_isa
def test_nan_of_any_payload_shows(backend, device):
    x, r, g = draw(2, 300, dtype=torch.bfloat16, of_reference=torch.float32)
    r[1, 5] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    got = run(x, r, g, device)
    assert got[0].isnan().tolist() == [False, True] and all(t[1].isnan().all() and t[0].isfinite().all() for t in got[1:])


@every_isa
@pytest.mark.parametrize("of_reference", [torch.bfloat16, torch.float32], ids=str)
def test_a_row_has_the_same_bits_anywhere(backend, device, of_reference):
    vocab = 2053
    x, r, g = draw(1, vocab, dtype=torch.bfloat16, of_reference=of_reference)
    alone = run(x, r, g, device)
    for leads in ((1, 1), (0, 3), (5, 2)):  # alike, or not
        several = [
            torch.zeros(3, vocab + 9, dtype=t.dtype, device=device)[:, lead : lead + vocab].copy_(t) for t, lead in zip((x, r), leads, strict=True)
        ]
        for got, want in zip(run(*several, g.expand(3), device), alone, strict=True):
            assert torch.equal(got, want.expand_as(got)), leads


@pytest.mark.parametrize("of_reference", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_streamed_gradients_have_the_same_bits(of_reference):
    """Beyond the size of caches the C++ kernels write past them; here one of two, or both."""
    vocab = 40_009
    x, r, g = draw(2**25 // (vocab * 4) + 1, vocab, dtype=torch.float32, of_reference=of_reference)
    together = run(x, r, g)
    for row in (0, 3, len(x) - 1):
        for got, want in zip(together, run(x[row : row + 1], r[row : row + 1], g[row : row + 1]), strict=True):
            assert torch.equal(got[row], want[0])


@pytest.mark.parametrize("first", ["reference", "native", "triton"])
def test_a_backward_continues_another_backends_forward(first):
    x, r, g = draw(2, 3, 3001)
    want, grad = exact(x, r, g)[1:], g.float().flatten()
    with rlkern.use_backend(first):
        state = torch.full((6, State.TARGETS), math.nan)
        backends.select(x.device).did_entropy_forward(x, r, None, 1.0, (torch.full((6,), math.nan), state))
    for then in ("reference", "native", "triton"):
        with rlkern.use_backend(then):
            out = [torch.full_like(x, math.nan) for _ in range(2)]
            backends.select(x.device).did_entropy_backward(x, r, None, 1.0, state, grad, out)
        torch.testing.assert_close([t.double() for t in out], want, rtol=1e-4, atol=1e-7)


def test_nothing_of_the_logits_size_is_allocated_but_the_gradients(backend, device, monkeypatch):
    monkeypatch.setattr(layout, "chunk_elements", lambda rows: 1000)
    x, r, _ = (t.to(device) for t in draw(64, 500, dtype=torch.bfloat16))
    x.requires_grad_(), r.requires_grad_()
    with Operators() as ran:
        entropy = token_did_entropy(x, r, mask=torch.ones(64, device=device), temperature=0.5)
        torch.autograd.grad(entropy.sum(), (x, r))
    memory = {t.untyped_storage().data_ptr(): t.dtype for _, _, results in ran.calls for t in results if t.numel() >= x.numel()}
    for leaf in (x, r):
        memory.pop(leaf.untyped_storage().data_ptr(), None)
    assert list(memory.values()) == [torch.bfloat16] * 2


def test_empty_rows(backend, device):
    for shape in ((0, 5), (2, 0, 5)):
        x, r = (torch.zeros(shape, device=device, requires_grad=True) for _ in range(2))
        entropy = token_did_entropy(x, r)
        entropy.sum().backward()
        assert entropy.shape == shape[:-1] and x.grad.shape == r.grad.shape == shape


def test_compiles_and_passes_opcheck():
    x, r, g = draw(3, 9)
    torch._dynamo.reset()
    call = torch.compile(token_did_entropy, fullgraph=True, dynamic=True, backend="aot_eager")
    for wanted in ((True, True), (True, False)):
        leaves = [t.clone().requires_grad_(want) for t, want in zip((x, r), wanted, strict=True)]
        entropy = call(*leaves, temperature=0.7)
        gradients = torch.autograd.grad(entropy, [t for t in leaves if t.requires_grad], g.float())
        want = [t for t in run(x, r, g, wanted=wanted, temperature=0.7) if t is not None]
        torch.testing.assert_close([entropy.detach(), *gradients], want)
    args = (x, r, torch.ones(3, dtype=torch.bool), torch.ones(3), 1.0)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.rlkern.token_did_entropy.default, args, test_utils=checks)
    state = torch.ops.rlkern.token_did_entropy(*args)[1]
    for wanted in ([True, True], [False, True]):
        torch.library.opcheck(torch.ops.rlkern.token_did_entropy_backward.default, (*args, state, torch.ones(3), wanted), test_utils=checks)
