"""Hard cases of the Triton kernels of token_stats: one program a row or several, one tile a program or more.
Tiles are small, so that short rows have many."""

import math

import pytest
import torch
from oracle import INF, check, check_confident, check_skipped, check_undefined
from test_triton_token_stats import BLOCK, DEVICE, GROUPS, SPLIT, WHOLE, draw, ids

import rlkern
from rlkern.triton_kernels import token_stats

VOCAB = 7 * BLOCK + 3  # odd
SHAPES = {"whole rows": (WHOLE, GROUPS), "split rows": (SPLIT, GROUPS), "one tile a program": (WHOLE, GROUPS._replace(tiles=1))}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys(), autouse=True)
def shapes(request, monkeypatch):
    for name, shape in zip(("forward_shape", "backward_shape"), request.param, strict=True):
        monkeypatch.setattr(token_stats, name, lambda *_, shape=shape: shape)
    with rlkern.use_backend("triton"):
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("stride", [VOCAB, VOCAB + 5, 8 * BLOCK])
def test_values_and_gradients(dtype, stride):
    x, y = draw(2, stride, dtype=dtype)[:, :VOCAB], ids(VOCAB, 2, 2)
    check(x, y, temperature=0.7, with_sum_sq=True)


@pytest.mark.parametrize("options", [{"min_p": 0.05, "with_sum_sq": True}, {"min_prob": 1e-3}], ids=["min_p", "min_prob"])
def test_kept_sets(options):
    check(draw(2, VOCAB), ids(VOCAB, 2), temperature=1.3, **options)


@pytest.mark.parametrize("fill", [-INF, torch.finfo(torch.float32).min, -1e30])
@pytest.mark.parametrize("live", [slice(0, BLOCK), slice(3 * BLOCK, 4 * BLOCK), slice(VOCAB - 5, VOCAB), slice(700, 701)], ids=str)
def test_masked_vocabularies(live, fill):
    x = torch.full((1, VOCAB), fill, device=DEVICE)
    x[:, live] = draw(1, live.stop - live.start)
    check(x, torch.tensor([live.stop - 1], device=DEVICE), with_sum_sq=True)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_large_common_offset(offset):
    check(draw(2, VOCAB) + offset, ids(VOCAB, 2), temperature=0.3, with_sum_sq=True)


@pytest.mark.parametrize("high", [3e38, -2.5e38])
@pytest.mark.parametrize("low", [-3.3e38, 2e38, -INF, 0.0])
@pytest.mark.parametrize("first", [0, 3 * BLOCK])
def test_maxima_that_overflow_when_scaled(low, high, first):
    """In closed form: float64 too loses the others beside them."""
    x = torch.full((1, VOCAB), low, device=DEVICE)
    x[:, first:] = high
    k = (x == x.max()).sum().item()
    y = x.argmax(-1)
    x.requires_grad_()
    stats = rlkern.token_stats(x, y, temperature=0.9)
    (d_x,) = torch.autograd.grad(stats.logp, x, torch.ones_like(stats.logp))
    assert stats.logp.item() == pytest.approx(-math.log(k)) and stats.entropy.item() == pytest.approx(math.log(k))
    expected = torch.where(x == x.max(), -1 / k / 0.9, 0.0)
    expected[0, y] += 1 / 0.9
    torch.testing.assert_close(d_x, expected)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("where", [[0], [5, 2 * BLOCK + 5, 6 * BLOCK]], ids=str)
def test_confident_rows_keep_their_relative_accuracy(where, offset):
    check_confident(VOCAB, where, 28.0, offset, DEVICE)


def test_undefined_rows_are_nan():
    check_undefined(VOCAB, DEVICE)


def test_skipped_rows_are_zeros():
    check_skipped(VOCAB, DEVICE, with_sum_sq=True)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_row_has_the_same_bits_in_any_batch(inplace):
    x, y = draw(3, VOCAB, dtype=torch.bfloat16), ids(VOCAB, 3)

    def both(x, y):
        leaf = x.clone().requires_grad_()
        stats = rlkern.token_stats(leaf * 1 if inplace else leaf, y, inplace_backward=inplace)
        (d_x,) = torch.autograd.grad((stats.logp + stats.entropy).sum(), leaf)
        return torch.stack([stats.logp, stats.entropy, stats.logsumexp], -1), d_x

    values, d_x = both(x, y)
    for i in range(3):
        alone, d_alone = both(x[i : i + 1], y[i : i + 1])
        assert torch.equal(alone[0], values[i]) and torch.equal(d_alone[0], d_x[i])
