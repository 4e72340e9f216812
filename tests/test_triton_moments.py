"""The Triton kernels of row_moments and token_did_entropy with small launch shapes: short rows have many
tiles, one program a row or several."""

import math

import pytest
import test_did
import test_moments
import torch
from test_triton_token_stats import BLOCK, DEVICE, GROUPS, LENGTHS, SPLIT, WHOLE, nan_filled, reads_behind

import rlkern
from rlkern.triton_kernels import did, moments


@pytest.fixture(params=[WHOLE, SPLIT], ids=["whole rows", "split rows"], autouse=True)
def small_tiles(request, monkeypatch):
    for module in (did, moments):
        monkeypatch.setattr(module, "forward_shape", lambda *_: request.param)
        monkeypatch.setattr(module, "backward_shape", lambda *_: GROUPS)
    with rlkern.use_backend("triton"):
        yield


@pytest.mark.parametrize("vocab", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_parts_of_any_length(dtype, vocab):
    """Aligned or not; more parts than tiles, empty parts."""
    for start, temperature in ((0, 1.0), (1, 0.5)):
        x, y, grads = test_moments.draw(2, vocab + 8, dtype=dtype)
        test_moments.check(x[:, start : start + vocab], y.clamp_max(vocab - 1), grads, DEVICE)
        x, r, g = test_did.draw(2, vocab + 8, dtype=dtype)
        test_did.check(x[:, start : start + vocab], r[:, :vocab], g, DEVICE, temperature=temperature)


@pytest.mark.parametrize("of_reference", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("stride", [5 * BLOCK, 5 * BLOCK + 1])
def test_parts_of_mixed_types(of_reference, stride):
    x, r, g = test_did.draw(3, stride, dtype=torch.bfloat16, of_reference=of_reference)
    test_did.check(x[:, : 5 * BLOCK - 7], r[:, : 5 * BLOCK - 7], g, DEVICE)


def test_parts_that_lie_apart():
    """A row that drifts, one whose first part lies far from the others, one whose parts have no variance."""
    vocab = 9 * BLOCK + 1
    x, y, grads = test_moments.draw(3, vocab, std=1.0)
    x[0] += torch.linspace(0, 1000, vocab)
    x[1, : 3 * BLOCK] += 500
    x[2] = torch.arange(vocab).div(3 * BLOCK, rounding_mode="floor").float()
    got, want = test_moments.run(x, y, grads, DEVICE), test_moments.exact(x, y, grads)
    torch.testing.assert_close([t.double() for t in got], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", [0, 2 * BLOCK, 7 * BLOCK])
def test_parts_without_mass(first):
    x, r, g = test_did.draw(1, 8 * BLOCK)
    x[:, :first] = x[:, first + BLOCK :] = -math.inf
    got, want = test_did.run(x, r, g, DEVICE), test_did.exact(*(t[:, first : first + BLOCK] for t in (x, r)), g)
    test_did.agree([got[0], *(t[:, first : first + BLOCK] for t in got[1:])], want, (x.dtype, r.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_row_has_the_same_bits_wherever_it_starts(dtype):
    vocab = 5 * BLOCK + 3
    x, y, grads = test_moments.draw(1, vocab, dtype=dtype)
    _, r, g = test_did.draw(1, vocab, dtype=dtype)
    want = None
    for lead in range(16 // dtype.itemsize):
        a, b = (torch.full((3, vocab + 16), math.nan, dtype=dtype)[:, lead : lead + vocab].copy_(t) for t in (x, r))
        got = [*test_moments.run(a, y.expand(3), [g.expand(3) for g in grads], DEVICE), *test_did.run(a, b, g.expand(3), DEVICE)]
        want = [t[:1] for t in got] if want is None else want
        assert all(torch.equal(t, one.expand_as(t)) for t, one in zip(got, want, strict=True)), lead


def test_scratch_is_written_before_it_is_read(monkeypatch):
    x, y, grads = test_moments.draw(3, 5 * BLOCK - 7)
    r, mask = test_did.draw(3, 5 * BLOCK - 7)[1], torch.tensor([1, 0, 1])

    def everything():
        return [*test_moments.run(x, y, grads, DEVICE, mask=mask), *test_did.run(x, r, grads[0], DEVICE, mask=mask)]

    want = everything()
    monkeypatch.setattr(torch.Tensor, "new_empty", nan_filled)
    assert all(torch.equal(a, b) for a, b in zip(everything(), want, strict=True))


@pytest.mark.skipif(DEVICE != "cpu", reason="looks into Triton's interpreter")
@pytest.mark.parametrize("vocab", [1, 5, 3 * BLOCK - 1, 3 * BLOCK, 3 * BLOCK + 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_nothing_behind_the_last_row_is_read(dtype, vocab, monkeypatch):
    stride = (vocab // 8 + 2) * 8 + 1
    x, r = (torch.full((3 * stride + 64,), math.nan, dtype=dtype).as_strided((3, vocab), (stride, 1)) for _ in range(2))
    a, y, grads = test_moments.draw(3, vocab, dtype=dtype)
    x.copy_(a)
    r.copy_(a.flip(0))
    for last in (x[-1], r[-1]):
        behind = reads_behind(last, monkeypatch)
        values = [*test_moments.run(x, y, grads), *test_did.run(x, r, grads[0])]
        assert not behind and all(t.isfinite().all() for t in values)
