"""The Triton kernels of pairs of rows: every divergence against float64, rows that are all but equal against
long doubles, rows that are split or start anywhere. Small launch shapes give short rows many tiles."""

import math
from functools import partial

import numpy as np
import oracle
import pytest
import torch
from test_parallel_pairs import gradient_by_columns
from test_triton_token_stats import nan_filled

import rlkern
from rlkern import reference
from rlkern.backends.contract import PairState
from rlkern.primitives.divergence import pair_stats, token_divergence

pytest.importorskip("triton", reason="needs Triton")

from rlkern.triton_kernels import launch, pair  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN, LOWEST = math.inf, math.nan, torch.finfo(torch.float32).min
draw, ids = partial(oracle.draw, device=DEVICE), partial(oracle.ids, device=DEVICE)
BLOCK = 256
VOCAB = 5 * BLOCK - 7
WHOLE = launch.ForwardShape(BLOCK, 1, 2)
SPLIT = launch.ForwardShape(BLOCK, 1, 2, splits=4)
GROUPS = launch.BackwardShape(BLOCK, 1, 2, tiles=3)

KL_KINDS = ("reverse_kl", "forward_kl", "mixed_kl")
MIXTURES = ("jsd", "skew_forward_kl", "skew_reverse_kl")
KINDS = (*KL_KINDS, "cross_entropy", *MIXTURES)
every_kind = pytest.mark.parametrize("kind", KINDS)
whole_and_split = pytest.mark.parametrize("forward", [WHOLE, SPLIT], ids=["whole", "split"])
# What D is where one row alone has an entry at -inf: of which mass, times what.
STUDENT_ALONE = {"reverse_kl": INF, "mixed_kl": INF}  # p > 0 = q
TEACHER_ALONE = {"forward_kl": INF, "mixed_kl": INF, "cross_entropy": INF}


@pytest.fixture(autouse=True)
def shape(monkeypatch):
    """Small tiles on Triton; shape(forward, backward) replaces them."""

    def replace(forward=WHOLE, backward=GROUPS):
        monkeypatch.setattr(pair, "pair_forward_shape", lambda *_: forward)
        monkeypatch.setattr(pair, "pair_backward_shape", lambda *_: backward)

    replace()
    with rlkern.use_backend("triton"):
        yield replace


def pair_of_rows(n=2, vocab=VOCAB, dtype=torch.float32, **options):
    return draw(n, vocab, dtype=dtype, seed=1, **options), draw(n, vocab, dtype=dtype, seed=2, **options)


def run(z, w, **options):
    """(divergence, its gradient for random upstream gradients)"""
    leaf = z.detach().requires_grad_()
    value = token_divergence(leaf, w, **options)
    (gradient,) = torch.autograd.grad(value, leaf, oracle.upstream([value])[0].to(value))
    return value.detach(), gradient


def expected(z, w, **options):
    leaf = z.detach().double().cpu().requires_grad_()
    value = reference.token_divergence(leaf, w.double().cpu(), **options)
    (gradient,) = torch.autograd.grad(value, leaf, oracle.upstream([value])[0])
    return value.detach(), gradient


def check(z, w, rtol=5e-6, **options):
    """Against the printed formula, relative to each value and to each row's largest gradient."""
    (value, gradient), (want, want_gradient) = run(z, w, **options), expected(z, w, **options)
    assert gradient.dtype == z.dtype and value.dtype == (torch.float64 if z.dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(value.double().cpu(), want, rtol=rtol, atol=0)
    error = (gradient.double().cpu() - want_gradient).abs()
    rounding = oracle.TOLERANCE[z.dtype] * want_gradient.abs() if z.dtype.itemsize == 2 else 0.0
    rounding = rounding + 2**-24 * (z.dtype == torch.float16)  # its smallest number
    assert (error <= rounding + rtol * want_gradient.abs().amax(-1, keepdim=True)).all()


@every_kind
@whole_and_split
@pytest.mark.parametrize("options", [{}, {"beta": 0.1, "temperature": 0.7, "other_temperature": 1.9}], ids=["plain", "options"])
def test_equals_the_printed_formula(kind, forward, options, shape):
    shape(forward)
    check(*pair_of_rows(), kind=kind, **options)


@every_kind
def test_float64(kind, shape):
    shape(SPLIT)
    check(*pair_of_rows(dtype=torch.float64), rtol=1e-12, kind=kind, beta=0.9, temperature=1.9, other_temperature=0.7)


@every_kind
@pytest.mark.parametrize("vocab", [1, 7, BLOCK, 2 * BLOCK + 1])
def test_lengths(kind, vocab):
    z, w = pair_of_rows(1, vocab)
    if vocab > 1:
        check(z, w, kind=kind)
    else:
        value, gradient = run(z, w, kind=kind)
        assert value == 0 and gradient == 0


@every_kind
def test_the_shapes_of_the_table(kind, monkeypatch):
    monkeypatch.undo()
    with rlkern.use_backend("triton"):
        check(*pair_of_rows(1, 9001), kind=kind)


def test_a_temperature_for_each_row():
    z, w = pair_of_rows()
    t, other = torch.tensor([0.5, 2.0], device=DEVICE), torch.tensor([0.5, 0.9], device=DEVICE)
    for options in ({"temperature": t}, {"temperature": t, "other_temperature": other}, {"temperature": 1.3, "other_temperature": other}):
        value, gradient = run(z, w, kind="mixed_kl", **options)
        want, want_gradient = expected(
            z, w, kind="mixed_kl", **{k: v.double().cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        )
        torch.testing.assert_close(value.double().cpu(), want, rtol=5e-6, atol=0)
        torch.testing.assert_close(gradient.double().cpu(), want_gradient, rtol=0, atol=5e-6 * want_gradient.abs().max().item())


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float16"), ("bfloat16", "bfloat16")], ids="-".join)
@pytest.mark.parametrize("lead", [0, 3])
def test_types_and_odd_strides(kind, dtypes, lead):
    """Rows off the boundaries, each in its own way, between NaN that must not be read."""
    rows = []
    for i, (name, x) in enumerate(zip(dtypes, pair_of_rows(), strict=True)):
        storage = torch.full((2, 6 * BLOCK + (lead + i if lead else 0)), NAN, dtype=getattr(torch, name), device=DEVICE)
        storage[:, lead : lead + VOCAB] = x
        rows.append(storage[:, lead : lead + VOCAB])
    check(*rows, kind=kind)


# --- all but equal ------------------------------------------------------------------------------------------


def precise(z, w, kind, beta, temperature=1.0):
    """The divergence in long doubles, the KLs term by term positive."""
    u, v = (x.double().cpu().numpy().astype(np.longdouble) / temperature for x in (z, w))
    log_p, log_q = (x - x.max(-1, keepdims=True) for x in (u, v))
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (log_p, log_q))
    p, x = np.exp(log_p), log_q - log_p
    t = np.expm1(x)
    reverse, forward = (p * (t - x)).sum(-1), (p * (x * (1 + t) - t)).sum(-1)

    def log_m(share):
        return np.log1p(share * t)

    values = {
        "reverse_kl": reverse,
        "forward_kl": forward,
        "mixed_kl": beta * forward + (1 - beta) * reverse,
        "jsd": (beta * p * (1 + t) * (x - log_m(beta)) - (1 - beta) * p * log_m(beta)).sum(-1),
        "skew_forward_kl": (p * (1 + t) * (x - log_m(beta))).sum(-1),
        "skew_reverse_kl": -(p * log_m(1 - beta)).sum(-1),
    }
    return torch.tensor(values[kind].astype(np.float64))


@pytest.mark.parametrize("kind", [*KL_KINDS, *MIXTURES])
@whole_and_split
@pytest.mark.parametrize("rise", [0.0, 6.0])  # from the first tile to the last: where it is 6 every tile raises the maximum
def test_rows_that_are_all_but_equal(kind, forward, rise, shape):
    shape(forward)
    z = draw(6, VOCAB) + torch.linspace(0, rise, VOCAB, device=DEVICE)
    scale = 10.0 ** -torch.arange(1, 7, device=DEVICE).unsqueeze(-1)
    w = z + scale * draw(6, VOCAB, scale=1.0, seed=5)
    want = precise(z, w, kind, 0.3, 0.7)
    got = token_divergence(z, w, kind=kind, beta=0.3, temperature=0.7).double().cpu()
    least, rtol = (1e-12, 1e-5) if kind in KL_KINDS else (1e-10, 1e-4)
    counted = want >= least
    assert counted.sum() >= 4
    torch.testing.assert_close(got[counted], want[counted], rtol=rtol, atol=0)


@pytest.mark.parametrize("kind", [*KL_KINDS, *MIXTURES])
def test_gradients_of_rows_that_are_all_but_equal(kind):
    z = draw(1, VOCAB)
    w = z + 1e-5 * draw(1, VOCAB, scale=1.0, seed=5)
    _, gradient = run(z, w, kind=kind)
    _, want = expected(z, w, kind=kind)
    assert (gradient.double().cpu() - want).abs().max() <= 1e-3 * want.abs().max()


@every_kind
@whole_and_split
def test_equal_rows(kind, forward, shape):
    shape(forward)
    z = draw(2, VOCAB)
    z[1, 77] = 30.0
    value, gradient = run(z, z.clone(), kind=kind, temperature=0.7)
    assert (gradient == 0).all()
    if kind != "cross_entropy":
        assert (value == 0).all()


@pytest.mark.parametrize("kind", [*KL_KINDS, *MIXTURES])
def test_a_common_offset_changes_little(kind):
    z = draw(1, VOCAB)
    w = z + 3.7 + 1e-4 * draw(1, VOCAB, scale=1.0, seed=5)
    torch.testing.assert_close(token_divergence(z, w, kind=kind, beta=0.3).double().cpu(), precise(z, w, kind, 0.3), rtol=1e-4, atol=0)


# --- far apart ----------------------------------------------------------------------------------------------


@every_kind
@whole_and_split
def test_mass_in_few_entries_or_tiles(kind, forward, shape):
    shape(forward)
    z, w = pair_of_rows(4)
    z[0, 5] = 30.0
    w[1, VOCAB - 2] = 40.0
    z[2, : 2 * BLOCK] -= 60
    w[2, 2 * BLOCK :] -= 60
    z[3, : 4 * BLOCK] -= 60
    for a, b in ((z, w), (w, z)):
        got, want = token_divergence(a, b, kind=kind), reference.token_divergence(a.double(), b.double(), kind)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


def test_the_cross_entropy_of_a_confident_row():
    z = torch.full((1, VOCAB), -28.0, device=DEVICE)
    z[0, 3] = 0.0
    rest = (VOCAB - 1) * math.exp(-28.0)
    want = math.log1p(rest) + 28 * rest / (1 + rest)
    assert token_divergence(z, z.clone(), kind="cross_entropy").item() == pytest.approx(want, rel=1e-5, abs=0)


# --- minus infinity -----------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize(("forward", "where"), [(WHOLE, slice(0, BLOCK)), (SPLIT, slice(4 * BLOCK, VOCAB)), (SPLIT, slice(700, 701))], ids=str)
def test_minus_infinity(kind, forward, where, shape):
    """In both rows it is nothing. In one row an infinite or a finite divergence, the other rows unharmed."""
    shape(forward)
    z, w = pair_of_rows(4)
    plain = run(z[3:], w[3:], kind=kind, beta=0.3)[0][0]
    z[0, where], w[0, where] = -INF, -INF
    z[1, where] = -INF
    w[2, where] = -INF
    value, gradient = run(z, w, kind=kind, beta=0.3)
    kept = torch.ones(VOCAB, dtype=torch.bool, device=DEVICE)
    kept[where] = False
    want, want_gradient = expected(z[:1, kept], w[:1, kept], kind=kind, beta=0.3)
    torch.testing.assert_close(value[:1].double().cpu(), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient[:1, kept].double().cpu(), want_gradient, rtol=0, atol=5e-6 * want_gradient.abs().max().item())
    assert (gradient[0, where] == 0).all()
    # -200 stands for a probability of 0 that the formula can be evaluated with.
    finite = reference.token_divergence(z.double().clamp(min=-200), w.double().clamp(min=-200), kind, 0.3)
    for row, infinite in ((1, TEACHER_ALONE.get(kind)), (2, STUDENT_ALONE.get(kind))):
        if infinite:
            assert value[row] == INF and gradient[row].isnan().all()
        else:
            torch.testing.assert_close(value[row].double(), finite[row], rtol=1e-5, atol=0)
            assert gradient[row].isfinite().all() and (row == 2 or (gradient[row, where] == 0).all())
    assert torch.equal(value[3], plain)


@pytest.mark.parametrize("kind", [*TEACHER_ALONE, *STUDENT_ALONE])
def test_mass_that_underflows_is_mass(kind):
    z, w = draw(2, 3, VOCAB)
    at = VOCAB - 300
    z[0, at], w[0, at] = -1000.0, -INF
    z[1, at], w[1, at] = -INF, -1000.0
    value = token_divergence(z, w, kind=kind)
    assert value.isinf().tolist() == [kind in STUDENT_ALONE, kind in TEACHER_ALONE, False]


def test_infinite_rows_can_be_deselected():
    z, w = pair_of_rows()
    w[0, 7] = -INF
    leaf = z.requires_grad_()
    value = token_divergence(leaf, w)
    torch.where(value.isfinite(), value, 0).sum().backward()
    assert (leaf.grad[0] == 0).all() and leaf.grad[1].isfinite().all() and (leaf.grad[1] != 0).all()


@pytest.mark.parametrize("kind", ["mixed_kl", "cross_entropy", "jsd"])
@whole_and_split
def test_undefined_rows_are_nan_and_no_others(kind, forward, shape):
    shape(forward)
    z, w = pair_of_rows(7)
    z[0], w[1] = -INF, -INF
    z[2, 700], w[3, VOCAB - 1] = NAN, NAN
    z[4, 3], w[5, 600] = INF, INF
    stats = pair_stats(z, w, ids(VOCAB, 7), kind=kind)
    assert stats.divergence.isnan().tolist() == [True] * 6 + [False]
    assert stats.entropy.isnan().tolist() == [True, False, True, False, True, False, False]
    assert stats.other_entropy.isnan().tolist() == [False, True, False, True, False, True, False]
    assert stats.logsumexp[0] == -INF and stats.other_logsumexp[1] == -INF


@pytest.mark.parametrize("kind", ["mixed_kl", "cross_entropy", "jsd"])
def test_the_lowest_number_as_a_mask(kind):
    z, w = pair_of_rows()
    z[0, : 2 * BLOCK], w[0, : 2 * BLOCK] = LOWEST, LOWEST
    z[1, 3 * BLOCK :], w[1, 3 * BLOCK :] = LOWEST, LOWEST
    check(z, w, kind=kind)


# --- skipped rows, statistics, both gradients ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["reverse_kl", "cross_entropy", "jsd"])
@whole_and_split
def test_skipped_rows_are_not_read(kind, forward, shape, monkeypatch):
    shape(forward)
    z, w = pair_of_rows(4)
    y = ids(VOCAB, 4)
    want = pair_stats(z, w, y, kind=kind)
    z[1], w[1], z[2], w[2], y[2] = NAN, NAN, INF, NAN, -100
    leaf = z.requires_grad_()
    got = pair_stats(leaf, w, y, kind=kind, mask=torch.tensor([1, 0, 1, 1], device=DEVICE))
    for name, a, b in zip(got._fields, got, want, strict=True):
        assert (a[1:3] == 0).all(), name
        assert torch.equal(a[[0, 3]], b[[0, 3]]), name
    monkeypatch.setattr(torch.Tensor, "new_empty", nan_filled)
    upstream = torch.tensor([1.0, 1.0, 1.0, 0.0], device=DEVICE)
    (gradient,) = torch.autograd.grad(got.divergence, leaf, upstream)
    assert (gradient[1:] == 0).all() and (gradient[0] != 0).any()


@every_kind
def test_statistics_and_all_gradients_in_one_write(kind):
    z, w = pair_of_rows(3)
    z[2, 5] = 25.0  # a confident row, whose target it is
    y = torch.tensor([0, VOCAB - 1, 5], device=DEVICE)
    leaf = z.clone().requires_grad_()
    stats = pair_stats(leaf, w, y, kind=kind, temperature=0.7, other_temperature=1.3)
    own, others = rlkern.token_stats(z, y, temperature=0.7), rlkern.token_stats(w, y, temperature=1.3)
    for name in ("logp", "entropy", "logsumexp"):
        torch.testing.assert_close(getattr(stats, name).detach(), getattr(own, name), rtol=2e-6, atol=1e-12)
        torch.testing.assert_close(getattr(stats, "other_" + name), getattr(others, name), rtol=2e-6, atol=1e-12)
    fields = [stats.divergence, stats.logp, stats.entropy, stats.logsumexp]
    weights = [g.to(t) for g, t in zip(oracle.upstream(fields), fields, strict=True)]
    (together,) = torch.autograd.grad(fields, leaf, weights, retain_graph=True)
    separate = sum(torch.autograd.grad(f, leaf, g, retain_graph=True)[0].double() for f, g in zip(fields, weights, strict=True))
    torch.testing.assert_close(together.double(), separate, rtol=0, atol=1e-6)
    (of_logp,) = torch.autograd.grad(stats.logp, leaf, weights[1])
    (want,) = torch.autograd.grad(rlkern.token_stats(leaf, y, temperature=0.7).logp, leaf, weights[1])
    torch.testing.assert_close(of_logp, want, rtol=2e-6, atol=0)


@pytest.mark.parametrize("kind", [*KL_KINDS, *MIXTURES])
@whole_and_split
def test_gradient_by_the_other(kind, forward, shape):
    shape(forward)
    z, w = pair_of_rows()
    options = {"kind": kind, "beta": 0.3, "temperature": 0.7, "other_temperature": 1.9}
    found = []
    for function, x, y in (
        (partial(token_divergence, other_grad=True), z.clone(), w.clone()),
        (reference.token_divergence, z.double().cpu(), w.double().cpu()),
    ):
        leaves = x.requires_grad_(), y.requires_grad_()
        value = function(*leaves, **options)
        found.append(torch.autograd.grad(value, leaves, oracle.upstream([value])[0].to(value)))
    for got, want in zip(*found, strict=True):
        assert (got.double().cpu() - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("kind", ["mixed_kl", "cross_entropy", "skew_forward_kl"])
def test_segments_are_the_whole_rows(kind):
    z, w = pair_of_rows(6, 1280, dtype=torch.float64)
    z[1, :320] = w[2, 320:640] = -INF  # a part without mass of one row, and of the other
    z[3, 640:960] = w[3, 640:960] = -INF
    y = torch.tensor([0, 319, 500, 1279, -100, 700], device=DEVICE)
    found = []
    for options in ({"vocab": 1200}, {"vocab_size": 1200, "segments": 4}):
        leaf = z.clone().requires_grad_()
        stats = pair_stats(leaf, w, y.clamp(max=1199), kind=kind, beta=0.3, temperature=0.7, softcap=30.0, **options)
        fields = [torch.where(t.isfinite(), t, 0) for t in (stats.divergence, stats.logp, stats.entropy, stats.logsumexp)]
        weights = [g.to(t) for g, t in zip(oracle.upstream(fields), fields, strict=True)]
        found.append((*stats, *torch.autograd.grad(fields, leaf, weights)))
    for x, whole in zip(*found, strict=True):
        torch.testing.assert_close(x, whole, rtol=1e-11, atol=1e-13)


def test_the_gradient_of_some_columns_has_the_bits_of_all():
    whole, parts = gradient_by_columns(DEVICE)
    assert torch.equal(whole, parts)


def test_a_target_outside_the_vocabulary_makes_nan():
    z, w = pair_of_rows(2)
    if DEVICE == "cpu":
        with pytest.raises(IndexError):
            pair_stats(z, w, torch.tensor([3, VOCAB], device=DEVICE))
    out = [torch.empty(2, device=DEVICE) for _ in range(7)] + [torch.empty(2, PairState.WIDTH, device=DEVICE)]
    pair.pair_forward(z.unsqueeze(0), w.unsqueeze(0), torch.tensor([[3], [VOCAB]], device=DEVICE), None, 1.0, 1.0, -100, 0, 0.5, out)
    assert out[1].isnan().tolist() == [False, True] and out[0].isfinite().all()


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
def test_vocab_leaves_the_other_columns_alone(kind):
    z, w = draw(2, 700, seed=1), draw(2, 652, seed=2)
    z[:, 601:], w[:, 601:] = NAN, INF
    value, gradient = run(z, w, kind=kind, vocab=601)
    want, want_gradient = expected(z[:, :601], w[:, :601], kind=kind)
    torch.testing.assert_close(value.double().cpu(), want, rtol=5e-6, atol=0)
    assert (gradient[:, 601:] == 0).all()
    assert (gradient[:, :601].double().cpu() - want_gradient).abs().max() <= 5e-6 * want_gradient.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [VOCAB, VOCAB + 5])
def test_in_place(dtype, columns):
    z, w = pair_of_rows(2, columns, dtype=dtype)
    _, want = run(z[:, :VOCAB], w[:, :VOCAB], kind="mixed_kl")
    leaf = z.clone().requires_grad_()
    value = token_divergence(leaf * 1.0, w, kind="mixed_kl", vocab=VOCAB, inplace_backward=True)
    (gradient,) = torch.autograd.grad(value, leaf, oracle.upstream([value])[0].to(value))
    assert torch.equal(gradient[:, :VOCAB], want) and (gradient[:, VOCAB:] == 0).all()


# --- the same bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixed_kl", "jsd"])
@whole_and_split
def test_a_row_has_the_same_bits_in_any_batch(kind, forward, shape):
    shape(forward)
    z, w = pair_of_rows(3)
    value, gradient = run(z, w, kind=kind)
    for tiles in (1, 4):
        shape(forward, GROUPS._replace(tiles=tiles))
        leaf = z[1:2].clone().requires_grad_()
        alone = token_divergence(leaf, w[1:2], kind=kind)
        (d,) = torch.autograd.grad(alone, leaf, oracle.upstream([value])[0][1:2].to(alone))
        assert torch.equal(alone.detach(), value[1:2]) and torch.equal(d, gradient[1:2])


def test_a_pair_has_as_many_parts_as_a_row_of_twice_the_length():
    for vocab in (1000, 32_000, 128_256, 151_936, 262_144):
        for card in (launch.Gpu(), launch.Gpu((9, 0)), launch.Gpu((10, 0))):
            assert launch.pair_forward_shape(card, vocab, 2).splits == launch.forward_shape(card, 2 * vocab, 2).splits
