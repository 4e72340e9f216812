"""The Triton kernels of token_stats: rows that are split or start anywhere, gradients in groups of tiles.

test_token_stats.py compares every backend with float64. Here small launch shapes give short rows many tiles.
"""

import math
from functools import partial

import oracle
import pytest
import torch
from oracle import INF, check, check_confident, check_skipped, check_undefined

import rlkern

pytest.importorskip("triton", reason="needs Triton")

from rlkern.triton_kernels import launch, token_stats  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
draw, ids = partial(oracle.draw, device=DEVICE), partial(oracle.ids, device=DEVICE)
BLOCK = 256
SPLIT = launch.ForwardShape(BLOCK, 1, 2, splits=4)  # a shape for long rows
WHOLE = launch.ForwardShape(BLOCK, 1, 2)
GROUPS = launch.BackwardShape(BLOCK, 1, 2, tiles=3)


@pytest.fixture(autouse=True)
def on_triton():
    with rlkern.use_backend("triton"):
        yield


@pytest.fixture
def shape(monkeypatch):
    """shape(forward=..., backward=...) replaces the launch table."""

    def replace(forward=None, backward=None):
        for name, value in (("forward_shape", forward), ("backward_shape", backward)):
            if value:
                monkeypatch.setattr(token_stats, name, lambda *_, value=value: value)

    return replace


def nan_filled(t, *size, **kwargs):
    """Tensor.new_empty, but what nobody writes shows."""
    size = size[0] if isinstance(size[0], (tuple, torch.Size)) else size
    return t.new_full(size, math.nan if kwargs.get("dtype", t.dtype).is_floating_point else 7, **kwargs)


def forward(x, y, **options):
    """All outputs of a forward, as one tensor of bits."""
    s = rlkern.token_stats(x, y, with_sum_sq=True, min_p=0.1, **options)
    return torch.stack(s[:5])


# Fewer tiles than parts, empty parts at the end, a last part of one column, one of a whole tile.
LENGTHS = (1, BLOCK, 3 * BLOCK, 5 * BLOCK - 7, 9 * BLOCK + 1)


@pytest.mark.parametrize("vocab", LENGTHS)
@pytest.mark.parametrize("options", [{"min_p": 0.05, "with_sum_sq": True}, {"min_prob": 0.01, "temperature": 0.7}], ids=["min_p", "min_prob"])
def test_split_rows(shape, vocab, options):
    shape(SPLIT)
    check(draw(2, vocab), ids(vocab, 2), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_split_rows_of_every_type(shape, dtype):
    shape(SPLIT)
    check(draw(1, 2, 1501, dtype=dtype), ids(1501, 1, 2, 3), temperature=1.3, min_p=0.05, with_sum_sq=True)


@pytest.mark.parametrize("vocab", LENGTHS)
@pytest.mark.parametrize("k", [3, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tails_of_split_rows(shape, vocab, k, dtype):
    """Ids at the borders of tiles and parts, in rows that start anywhere."""
    for variant in (SPLIT, WHOLE):
        shape(variant, GROUPS)
        x, y = draw(3, vocab + 7, dtype=dtype)[:, 3 : vocab + 3], ids(vocab, 3, k)
        borders = torch.tensor([0, BLOCK - 1, BLOCK, 3 * BLOCK - 1, 3 * BLOCK, 8 * BLOCK, vocab - 1], device=DEVICE)
        y[0, : len(borders)] = borders[:k] % vocab
        y[1, 1:] = -100
        if vocab > 1:
            check(x, y, with_tail=True, only=["logp", "tail_logmass"])


@pytest.mark.parametrize("options", [{"min_prob": 0.002}, {"with_tail": True}], ids=["min_prob", "tail"])
def test_segments_of_split_rows(shape, options):
    """What is kept of a segment is itself swept in parts."""
    shape(SPLIT)
    x, y = draw(3, 2 * 1504), ids(2 * 1504, 3, 2)
    y[1] = -100
    got = rlkern.token_stats(x, y, segments=2, with_sum_sq=True, **options)
    with rlkern.use_backend("reference"):
        want = rlkern.token_stats(x.double(), y, with_sum_sq=True, **options)
    for name, value in want._asdict().items():
        if value is not None:
            torch.testing.assert_close(getattr(got, name).to(value), value, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    alone = rlkern.token_stats(x[2:], y[2:], segments=2, with_sum_sq=True, **options)
    assert all(value is None or torch.equal(value[2:], one) for value, one in zip(got, alone, strict=True))


def test_split_rows_that_are_skipped(shape):
    shape(SPLIT)
    check_skipped(1501, DEVICE, with_sum_sq=True, min_p=0.1)


def test_scratch_is_written_before_it_is_read(shape, monkeypatch):
    shape(SPLIT)
    x, y = draw(2, 1501), ids(1501, 2)
    want = forward(x, y)
    monkeypatch.setattr(torch.Tensor, "new_empty", nan_filled)
    assert torch.equal(forward(x, y), want)


@pytest.mark.parametrize("fill", [-INF, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("first", [0, 2 * BLOCK, 7 * BLOCK])
def test_parts_without_a_probability(shape, first, fill):
    """Parts that are -inf, or the lowest number that frameworks mask with: before, between, after others."""
    shape(SPLIT)
    x = draw(1, 8 * BLOCK)
    x[:, :first] = fill
    x[:, first + BLOCK :] = fill
    check(x, torch.tensor([first + 5], device=DEVICE), with_sum_sq=True, min_p=0.1)


@pytest.mark.parametrize("where", [[0], [3 * BLOCK, 3 * BLOCK + 1], [5, 2 * BLOCK + 5, 7 * BLOCK], [8 * BLOCK - 1]], ids=str)
def test_the_maximum_of_a_split_row_keeps_its_own_1_apart(shape, where):
    """One maximum, or several in one part, or in several parts; what remains is 1e-9 of it."""
    shape(SPLIT)
    got = check_confident(8 * BLOCK, where, 28.0, device=DEVICE, with_sum_sq=True)
    assert got["sum_sq_prob"].item() == pytest.approx(1 / len(where), rel=1e-6)


def test_undefined_split_rows_are_nan(shape):
    shape(SPLIT)
    check_undefined(1501, DEVICE, min_p=0.1)


def test_the_number_of_parts_follows_from_the_vocabulary_alone():
    for size in (2, 4, 8):
        parts = [launch.forward_shape(launch.Gpu(), vocab, size).splits for vocab in (1, 1000, 32_000, 151_936, 262_144, 2**21)]
        assert parts == sorted(parts) and parts[0] == 1 and parts[-1] > 1 and all(n & (n - 1) == 0 for n in parts)
    assert launch.forward_shape(launch.Gpu(), 50_257, 2).splits == 1 and launch.forward_shape(launch.Gpu(), 262_144, 2).splits > 1


@pytest.mark.parametrize("variant", [WHOLE, SPLIT], ids=["whole rows", "split rows"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_row_has_the_same_bits_wherever_it_starts(shape, dtype, variant):
    shape(variant)
    per_boundary, vocab = 16 // dtype.itemsize, 5 * BLOCK + 3
    row = draw(vocab, dtype=dtype, scale=0.5)
    y = ids(vocab, 1)
    want = None
    for lead in range(per_boundary):
        stride = (vocab // per_boundary + 2) * per_boundary + 1  # rows that start on a boundary all of them may end in another last bit
        rows = torch.full((3, stride), math.nan, dtype=dtype, device=DEVICE)
        rows[:, lead : lead + vocab] = row
        x = rows[:, lead : lead + vocab]
        got = torch.cat([forward(x, y.expand(3)), forward(x[1:2], y)], dim=1)
        want = got[:, :1] if want is None else want
        assert torch.equal(got, want.expand_as(got)), lead


def test_the_columns_before_and_after_a_row_do_not_leak(shape):
    """Whole tiles alone, so that the last one ends where the next row begins."""
    shape(WHOLE)
    n = 2 * BLOCK
    for dtype in (torch.bfloat16, torch.float32):
        rows = torch.full((3, n + 3), INF, dtype=dtype, device=DEVICE)
        rows[1, 1 : n + 1] = draw(n, dtype=dtype)
        check(rows[1:2, 1 : n + 1].unsqueeze(0).expand(1, 1, n).squeeze(0), ids(n, 1), with_sum_sq=True, min_p=0.1)


def reads_behind(last_row, monkeypatch) -> list[int]:
    """Addresses soon behind it that kernels load from now on."""
    from triton.runtime.interpreter import InterpreterBuilder

    size = last_row.element_size()
    end, behind, load = last_row[-1].data_ptr() + size, [], InterpreterBuilder.create_masked_load

    def watched(self, ptrs, mask, *args, **kwargs):
        at = ptrs.data[mask.data]
        behind.extend(at[(at >= end) & (at < end + 64 * size)].tolist())
        return load(self, ptrs, mask, *args, **kwargs)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", watched)
    return behind


@pytest.mark.skipif(DEVICE != "cpu", reason="looks into Triton's interpreter")
@pytest.mark.parametrize("vocab", [3 * BLOCK - 1, 3 * BLOCK, 3 * BLOCK + 1, 3 * BLOCK + 6, 3 * BLOCK + 7, 5, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_nothing_behind_the_last_row_is_read(shape, dtype, vocab, monkeypatch):
    """Not even within its last 16 bytes: the memory may be nobody's."""
    shape(WHOLE, GROUPS)
    rows, per_boundary = 3, 16 // dtype.itemsize
    stride = (vocab // per_boundary + 2) * per_boundary + 1
    storage = torch.full((rows * stride + 64,), math.nan, dtype=dtype)
    x = storage.as_strided((rows, vocab), (stride, 1))
    x.copy_(draw(rows, vocab, dtype=dtype))
    behind = reads_behind(x[-1], monkeypatch)
    stats = rlkern.token_stats(x.requires_grad_(), ids(vocab, rows), min_p=0.1, with_sum_sq=True)
    torch.autograd.grad((stats.logp + stats.kept_logmass).sum(), x)
    assert not behind and stats.entropy.isfinite().all()


@pytest.mark.parametrize("vocab", [BLOCK, 4 * BLOCK, 4 * BLOCK + 1, 7 * BLOCK - 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_do_not_depend_on_the_grid(shape, dtype, vocab):
    x, y = draw(2, vocab + 5, dtype=dtype)[:, :vocab], ids(vocab, 2, 3)
    y[0] = torch.tensor([0, vocab - 1, min(BLOCK, vocab - 1)], device=DEVICE)  # in the edges, and at the border of a tile
    found = []
    for tiles in (1, 3, 4):
        shape(WHOLE, GROUPS._replace(tiles=tiles))
        found.append(check(x, y, with_sum_sq=True, min_p=0.1)[1])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("stride", [0, 3])
def test_every_column_of_a_skipped_row_is_zeroed(shape, stride, monkeypatch):
    shape(WHOLE, GROUPS)
    vocab = 8 * BLOCK + 5
    x, y = draw(3, vocab + stride)[:, :vocab].requires_grad_(), ids(vocab, 3)
    mask = torch.tensor([1, 0, 1], device=DEVICE)
    stats = rlkern.token_stats(x, y, mask=mask)
    monkeypatch.setattr(torch.Tensor, "new_empty", nan_filled)
    (d,) = torch.autograd.grad((stats.logp * torch.tensor([1.0, 1.0, 0.0], device=DEVICE)).sum(), x)
    assert (d[1:] == 0).all() and (d[0] != 0).all()


@pytest.mark.parametrize("k", [1, 8, 9, 12, 17])
def test_a_confident_label_that_is_named_more_than_once(k):
    """Its gradient is what the others leave of it, however often it is a target."""
    gap, vocab = 28.0, 300
    x = torch.full((1, vocab), -gap, device=DEVICE)
    x[0, 7] = 0.0
    x.requires_grad_()
    g = torch.randn(1, k, generator=torch.Generator().manual_seed(k)).to(DEVICE)
    (d,) = torch.autograd.grad(rlkern.token_stats(x, torch.full((1, k), 7, device=DEVICE)).logp, x, g)
    rest = (vocab - 1) * math.exp(-gap)
    assert d[0, 7].item() == pytest.approx(g.double().sum().item() * rest / (1 + rest), rel=1e-5, abs=0)
