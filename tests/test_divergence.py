"""token_divergence, pair_stats and gkd_divergence: what they compute, and what they take."""

import itertools
import math

import loss_battery as battery
import pair_oracle as oracle
import pytest
import torch
from derivatives import differentiate

import rlkern
from rlkern import gkd_divergence, layout, pair_stats, token_divergence
from rlkern.backends import reference
from rlkern.backends.contract import PairKind, PairState
from rlkern.primitives.divergence import KINDS

INF = math.inf
ROW_TEMPERATURE = torch.tensor([[0.5, 1.0, 2.0], [3.0, 0.9, 1.1]])
TEMPERATURES = (
    {},
    {"temperature": 0.7, "other_temperature": 1.9},
    {"temperature": ROW_TEMPERATURE},
    {"temperature": ROW_TEMPERATURE, "other_temperature": ROW_TEMPERATURE.flip(-1)},
    {"temperature": 1.3, "other_temperature": ROW_TEMPERATURE},
    {"temperature": ROW_TEMPERATURE, "other_temperature": 1.0},
)
every_kind = pytest.mark.parametrize("kind", KINDS)
FIELDS = ("divergence", "logp", "entropy", "logsumexp")


@pytest.fixture(params=["reference", "native"])
def cpu(request):
    """The backends that are fast on a CPU."""
    with rlkern.use_backend(request.param):
        yield request.param


def draw(*shape, dtype=torch.float64, device="cpu", seed=0, **options):
    return [x.to(device) for x in oracle.draw(*shape, dtype=dtype, seed=seed, **{"scale": 2.0, **options})]


def both(function, *leaves):
    """(value, gradients by the leaves) with upstream gradients 1, 2, ... by row."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    value = function(*leaves)
    upstream = torch.arange(1.0, value.numel() + 1).view(value.shape).to(value)
    return value.detach(), *torch.autograd.grad(value, leaves, upstream, allow_unused=True)


# --- what they compute --------------------------------------------------------------------------------------


def test_every_kind_is_here():
    assert KINDS == oracle.KINDS


@every_kind
def test_equals_the_textbook(cpu, kind, monkeypatch):
    monkeypatch.setattr(layout, "chunk_elements", lambda rows: 40)  # two chunks per [3, 17] block
    z, w = draw(2, 3, 17)
    for beta, options in itertools.product((0.1, 0.5, 0.9), TEMPERATURES):
        options = {**options, "kind": kind, "beta": beta}
        other_grad = kind != "cross_entropy"
        leaves = (z, w) if other_grad else (z,)
        ours = both(lambda a, b=w, o=options, g=other_grad: token_divergence(a, b, **o, other_grad=g), *leaves)
        expected = both(lambda a, b=w, o=options: oracle.textbook(a, b, **o), *leaves)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12, msg=lambda m, o=options: f"{o}: {m}")


@every_kind
def test_gradcheck(cpu, kind):
    z, w = (x.requires_grad_() for x in draw(3, 7))
    both_sides = kind != "cross_entropy"
    options = {"kind": kind, "beta": 0.3, "temperature": 1.3, "other_temperature": 0.8, "other_grad": both_sides}
    assert torch.autograd.gradcheck(lambda a, b: token_divergence(a, b, **options), (z, w if both_sides else w.detach()))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_inputs_are_accumulated_in_float32(backend, device, kind, dtype):
    z, w = draw(4, 1500, dtype=dtype, device=device)
    value, gradient = differentiate(lambda x: token_divergence(x, w, kind=kind), z, torch.ones(4))
    expected, d_expected, largest = oracle.precise(z, w, kind)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(value.double(), expected, rtol=5e-6, atol=0)
    bfloat16 = 2**-7 if backend == "triton" and device == "cpu" else 2**-8  # the interpreter truncates
    rounding = {torch.float32: 0, torch.bfloat16: bfloat16, torch.float16: 2**-11}[dtype]
    atol = 3e-6 * largest.max().item() + (2**-24 if dtype == torch.float16 else 0)
    torch.testing.assert_close(gradient.double(), d_expected, rtol=rounding, atol=atol)


@pytest.mark.parametrize("kind", oracle.DIVERGENCES)
def test_small_divergences_keep_their_digits(cpu, kind):
    for exponent, beta in itertools.product(range(1, 7), (0.1, 0.9)):
        z, w = oracle.draw(3, 900, noise=10.0**-exponent)
        expected, gradient, _ = oracle.precise(z, w, kind, beta)
        value, d_z = differentiate(lambda x, w=w, b=beta: token_divergence(x, w, kind=kind, beta=b), z, torch.ones(3))
        assert (value >= 0).all()
        keep = expected >= 1e-12 if kind in oracle.KINDS[:3] else expected >= 1e-10
        torch.testing.assert_close(value[keep].double(), expected[keep], rtol=1e-4, atol=0)
        if kind != "total_variation" and exponent <= 5:  # a sign has no small derivative
            torch.testing.assert_close(d_z.double(), gradient, rtol=0, atol=1e-3 * gradient.abs().max().item())


@pytest.mark.parametrize("kind", oracle.DIVERGENCES)
def test_facts(backend, device, kind):
    n = 4 if backend == "triton" else 20  # the interpreter takes milliseconds a row
    z, w = draw(n, 9, dtype=torch.float32, device=device)
    for beta in (0.2, 0.5):
        value, d_z, d_w = both(lambda a, b, o=beta: token_divergence(a, b, kind=kind, beta=o, other_grad=True), z, w)
        assert (value > 0).all()
        for gradient in (d_z, d_w):  # 1, 2, ... flows back into the rows
            rows = gradient.double()
            assert (rows.sum(-1).abs() <= 1e-6 * (rows.abs().sum(-1) + torch.arange(1, n + 1, device=device))).all()
        exchanged = both(lambda a, b, o=beta: token_divergence(b, a, **oracle.swapped(kind, o), other_grad=True), z, w)
        torch.testing.assert_close(exchanged, (value, d_z, d_w), rtol=5e-6, atol=1e-5)
        assert kind != "jsd" or (value <= -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)).all()
        assert kind != "total_variation" or (value <= 1).all()
        same, gradient = differentiate(lambda a, o=beta: token_divergence(a, z.clone(), kind=kind, beta=o), z, torch.ones(n))
        assert (same == 0).all() and (gradient == 0).all()
        shifted = token_divergence(z, z + 8, kind=kind, beta=beta)
        assert (shifted < (2e-6 if kind == "total_variation" else 1e-11)).all()


@pytest.mark.parametrize("kind", ["forward_kl", "cross_entropy", "jsd", "skew_forward_kl", "skew_reverse_kl"])
def test_close_rows_of_which_the_teacher_lacks_a_token(backend, device, kind):
    """Its log ratio is infinite and counts for next to nothing: the other tokens keep their digits."""
    z, w = (x.to(device) for x in oracle.draw(2, 900, noise=1e-4))
    z[:, 5], w[:, 5] = -14, -INF
    expected, gradient, largest = oracle.precise(z, w, kind, 0.5)
    value, d_z = differentiate(lambda x: token_divergence(x, w, kind=kind, beta=0.5), z, torch.ones(2))
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    assert ((d_z - gradient).abs().amax(-1) <= 1e-5 * largest.squeeze()).all()


@every_kind
def test_minus_infinity(backend, device, kind):
    """On one side or on both, in the middle and at the ends, against the limits."""
    z, w = draw(7, 12, device=device)
    gone = ([5], []), ([], [5]), ([0, 11], [0, 11]), ([0, 1, 2], [3, 4]), (range(1, 12), []), (range(0, 12, 2), range(1, 12, 2)), ([], [])
    for row, (of_z, of_w) in enumerate(gone):
        z[row, list(of_z)], w[row, list(of_w)] = -INF, -INF
    expected, gradient, _ = oracle.precise(z, w, kind, 0.3)
    value, d_z = differentiate(lambda a: token_divergence(a, w, kind=kind, beta=0.3), z, torch.ones(7))
    torch.testing.assert_close((value, d_z), (expected, gradient), rtol=1e-11, atol=1e-12, equal_nan=True)
    finite = value.isfinite()
    assert (d_z[finite][z[finite] == -INF] == 0).all() and finite[2] and finite[6]
    if kind != "cross_entropy":
        back = differentiate(lambda b: token_divergence(z, b, kind=kind, beta=0.3, other_grad=True), w, torch.ones(7))[1]
        expected = oracle.precise(w, z, **oracle.swapped(kind, 0.3))[1]
        torch.testing.assert_close(back, expected, rtol=1e-11, atol=1e-12, equal_nan=True)


def test_missing_support_is_infinite_where_the_formula_says_so(backend, device):
    less = torch.tensor([[0.0, -INF, 0.5]], device=device)
    full = torch.tensor([[0.3, -300.0, 0.0]], device=device)  # mass that underflows is mass all the same
    infinite = {("reverse_kl", 1), ("forward_kl", 0), ("mixed_kl", 0), ("mixed_kl", 1), ("cross_entropy", 0)}
    for kind, order in itertools.product(KINDS, (0, 1)):
        rows = (less, full) if order == 0 else (full, less)
        assert (token_divergence(*rows, kind=kind) == INF).item() is ((kind, order) in infinite), (kind, order)


def test_a_weight_of_nothing_does_not_make_infinity():
    less, full = torch.tensor([[0.0, -INF]]), torch.tensor([[0.3, 0.0]])
    for a, b in ((less, full), (full, less)):
        for beta, kind in ((0, "reverse_kl"), (1, "forward_kl"), (0.0, "reverse_kl"), (1.0, "forward_kl")):
            assert torch.equal(token_divergence(a, b, kind="mixed_kl", beta=beta), token_divergence(a, b, kind=kind))


@every_kind
def test_undefined_rows_are_nan(backend, device, kind):
    for side, bad in itertools.product((0, 1), (math.nan, INF, -INF)):
        rows = draw(3, 6, dtype=torch.float32, device=device)
        rows[side][1, slice(None) if bad == -INF else 2] = bad
        value, gradient = differentiate(lambda x, w=rows[1]: token_divergence(x, w, kind=kind), rows[0], torch.ones(3))
        assert value.isnan().tolist() == [False, True, False] and gradient[1].isnan().all() and not gradient[[0, 2]].isnan().any()


def test_infinite_rows_can_be_deselected(backend, device):
    z, w = draw(2, 5, device=device)
    w[0, 1] = -INF
    leaf = z.requires_grad_()
    value = token_divergence(leaf, w)
    torch.where(value.isfinite(), value, 0).sum().backward()
    assert value[0] == INF and (leaf.grad[0] == 0).all() and leaf.grad.isfinite().all() and (leaf.grad[1] != 0).all()


def test_one_column_is_certain(backend, device):
    z, w = draw(5, 1, device=device)
    for kind in KINDS:
        value, gradient = differentiate(lambda x, k=kind: token_divergence(x, w, kind=k), z, torch.ones(5))
        assert (value == 0).all() and (gradient == 0).all()


def test_empty_batches(backend, device):
    for shape in ((0, 10), (2, 0, 10), (0, 3, 10)):
        z, w = (x.requires_grad_() for x in draw(*shape, device=device))
        value, d_z, d_w = both(lambda a, b: token_divergence(a, b, kind="jsd", other_grad=True), z, w)
        assert value.shape == shape[:-1] and d_z.shape == d_w.shape == shape
        stats = pair_stats(z, w, torch.zeros(shape[:-1], dtype=torch.long, device=device))
        assert all(x.shape == shape[:-1] for x in stats)
    assert token_divergence(*draw(4, device=device)).shape == ()


# --- arguments ----------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("garbage", [math.nan, INF])
def test_masked_rows_hold_anything(backend, device, kind, garbage):
    z, w = draw(2, 3, 7, device=device)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]], device=device)
    off = mask == 0
    expected = differentiate(lambda x: token_divergence(x, w, kind=kind, mask=mask), z, torch.ones(2, 3))
    assert (expected[0][off] == 0).all() and (expected[1][off] == 0).all() and (expected[1][~off] != 0).any()
    dirty, dirty_other = (torch.where(off.unsqueeze(-1), garbage, x) for x in (z, w))
    weights = torch.where(off, math.nan, 1.0)  # so may their upstream gradients
    got = differentiate(lambda x: token_divergence(x, dirty_other, kind=kind, mask=mask), dirty, weights)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    if kind != "cross_entropy":
        by_other = differentiate(lambda x: token_divergence(dirty, x, kind=kind, mask=mask, other_grad=True), dirty_other, weights)[1]
        assert (by_other[off] == 0).all() and by_other.isfinite().all() and (by_other[~off] != 0).any()


def test_rows_of_ignored_targets_hold_anything(backend, device):
    z, w = draw(2, 3, 7, device=device)
    z[0, 1] = w[0, 1] = z[1, 0] = math.nan
    targets = torch.tensor([[1, -1, 2], [10**6, 0, 3]], device=device)
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]], device=device)
    leaves = [x.clone().requires_grad_() for x in (z, w)]
    stats = pair_stats(*leaves, targets, ignore_index=-1, mask=mask, other_grad=True)
    skipped = torch.tensor([[False, True, False], [True, False, False]], device=device)
    for x in stats:
        assert (x[skipped] == 0).all() and (x[~skipped] != 0).all()
    for gradient in torch.autograd.grad(stats.divergence.sum() + stats.logp.sum(), leaves):
        assert (gradient[skipped] == 0).all() and gradient.isfinite().all() and (gradient[~skipped] != 0).any()


@pytest.mark.parametrize("kind", ["reverse_kl", "skew_reverse_kl", "alpha"])
def test_columns_that_do_not_count(backend, device, kind):
    z, w = draw(2, 3, 44, device=device)
    z = z[..., :40].clone()
    z[..., 37:] = w[..., 37:] = math.nan
    short = [x[..., :37].clone() for x in (z, w)]
    expected = both(lambda a, b: token_divergence(a, b, kind=kind, other_grad=True), *short)
    for in_place in (False, True):
        got = both(lambda a, b, i=in_place: token_divergence(a * 1, b, kind=kind, vocab=37, other_grad=True, inplace_backward=i), z, w)
        # The Triton kernels sum rows on 16-byte boundaries in another order.
        same = torch.equal if backend != "triton" else lambda a, b: torch.allclose(a, b, rtol=1e-12, atol=1e-15)
        assert same(got[0], expected[0])
        for gradient, of_short in zip(got[1:], expected[1:], strict=True):
            assert same(gradient[..., :37], of_short) and (gradient[..., 37:] == 0).all()
    targets = torch.tensor([[0, 36, 5], [1, 2, 3]], device=device)
    stats = pair_stats(z, w, targets, vocab=37)
    torch.testing.assert_close(stats.other_logp, rlkern.token_logprobs(short[1], targets))
    if device == "cpu":
        with pytest.raises(IndexError, match="target 38 of row 4 is out of range for 37 logits"):
            pair_stats(z, w, torch.tensor([[0, 36, 5], [1, 38, 3]]), vocab=37)


def test_strided_rows_and_shapes(backend, device):
    z, w = draw(5, 3, 8, device=device)
    cuts = (lambda x: x[:, :-1], lambda x: x.transpose(0, 1), lambda x: x[..., ::2], lambda x: x[..., 1:-2], lambda x: x[0], lambda x: x[0, 0])
    for cut in cuts:
        a, b = (cut(x) for x in (z, w))
        leaf = a.detach().requires_grad_()
        value = token_divergence(leaf, b)
        torch.testing.assert_close(value, oracle.textbook(a, b))
        dense = a.contiguous().requires_grad_()
        (expected,) = torch.autograd.grad(oracle.textbook(dense, b).sum(), dense)
        torch.testing.assert_close(torch.autograd.grad(value.sum(), leaf)[0], expected)


def test_one_row_for_all(backend, device):
    """Expanded: its gradient is the sum over the rows."""
    z, w = draw(2, 3, 8, device=device)
    for narrow in (w[:1, :1], w[:, :1]):
        got = both(lambda a, b: token_divergence(a, b.expand(2, 3, 8), kind="jsd", other_grad=True), z, narrow)
        expected = both(lambda a, b: oracle.textbook(a, b.expand(2, 3, 8), "jsd"), z, narrow)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("mask", [-INF, torch.finfo(torch.float32).min, -1e6])
def test_the_student_alone_has_nothing_in_its_first_tiles(backend, device, kind, mask):
    z, w = draw(1, 3000, dtype=torch.float32, device=device, scale=1.0)
    w = z + 0.5 * w
    z[:, :2500] = mask
    value, gradient = differentiate(lambda a: token_divergence(a, w, kind=kind), z, torch.ones(1))
    expected, d_expected, _ = oracle.precise(z.masked_fill(z < -1e5, -INF), w, kind)
    torch.testing.assert_close(value.double(), expected, rtol=5e-6, atol=0)
    torch.testing.assert_close(gradient.double(), d_expected, rtol=0, atol=1e-5 * d_expected.abs().max().item())


@every_kind
def test_skewed_rows_that_are_neither_close_nor_far(backend, device, kind):
    """Where the first tile differs much and the divergence is small all the same."""
    n = 4 if backend == "triton" else 40  # the interpreter takes milliseconds a row
    z, w = draw(n, 300, dtype=torch.float32, device=device, scale=1.0)
    for beta in (0.1, 0.9):
        for noise in (0.5, 0.7, 1.0):
            value, gradient = differentiate(lambda a, w=z + noise * w, o=beta: token_divergence(a, w, kind=kind, beta=o), z, torch.ones(n))
            expected, d_expected, largest = oracle.precise(z, z + noise * w, kind, beta)
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
            assert ((gradient - d_expected).abs().amax(-1) <= 1e-5 * largest.squeeze()).all()


@pytest.mark.parametrize("shift", [3.7, 100.0, 1e4, -1e4])
def test_a_constant_between_the_rows_costs_no_digits(backend, device, shift):
    z, w = draw(2, 1500, dtype=torch.float32, device=device)
    w = z + shift + 0.01 * w
    for kind in ("reverse_kl", "forward_kl", "jsd"):
        expected = oracle.precise(z, w, kind)[0]
        torch.testing.assert_close(token_divergence(z, w, kind=kind).double(), expected, rtol=1e-4, atol=0)


@every_kind
def test_rows_of_the_lowest_number_alone_are_uniform(backend, device, kind):
    z = torch.full((1, 40), torch.finfo(torch.float32).min, device=device)
    value, gradient = differentiate(lambda a: token_divergence(a, z.clone(), kind=kind), z, torch.ones(1))
    assert (gradient == 0).all() and (value == 0 if kind != "cross_entropy" else (value - math.log(40)).abs() < 1e-6)


def test_gradient_at_the_target_of_rows_that_lie_far_apart(backend, device):
    z = torch.tensor([[0.0, 3000.0]], device=device, requires_grad=True)
    s = pair_stats(z, torch.tensor([[2000.0, 0.0]], device=device), torch.tensor([1], device=device))
    (s.divergence + s.logp).sum().backward()
    assert s.divergence == 2000 and (z.grad == 0).all()


def test_dtypes_may_differ(backend, device):
    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    z, w = draw(4, 11, device=device)
    for of_z, of_w in itertools.product(floats, floats):
        a, b = z.to(of_z), w.to(of_w)
        value, d_a, d_b = both(lambda a, b: token_divergence(a, b, other_grad=True), a, b)
        assert value.dtype == (torch.float64 if of_z == torch.float64 else torch.float32) and d_a.dtype == of_z and d_b.dtype == of_w
        expected = both(oracle.textbook, a.double(), b.double())
        tolerance = max({torch.bfloat16: 2**-7 if backend == "triton" else 2**-8, torch.float16: 2**-10}.get(d, 1e-5) for d in (of_z, of_w))
        torch.testing.assert_close([x.double() for x in (value, d_a, d_b)], list(expected), rtol=tolerance, atol=1e-5)


def test_rows_have_the_same_bits_in_any_batch(backend, device):
    z, w = draw(2, 5, 40, dtype=torch.float32, device=device)
    for kind in ("reverse_kl", "jsd"):
        whole = differentiate(lambda x, k=kind: token_divergence(x, w, kind=k), z, torch.ones(2, 5))
        for part in ((slice(None), slice(1, 4)), (1, slice(2, 3))):
            piece = differentiate(lambda x, k=kind, p=part: token_divergence(x, w[p], kind=k), z[part], torch.ones(z[part].shape[:-1]))
            assert all(torch.equal(x, y[part]) for x, y in zip(piece, whole, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"other": torch.zeros(3, 8)}, ValueError, "logits with 9 columns and other with 8: give vocab=, .* at most 8"),
        ({"other": torch.zeros(4, 9)}, ValueError, r"other must be \(3, 9\) for logits \(3, 9\), got \(4, 9\)"),
        ({"other": torch.zeros(3, 9, dtype=torch.int64)}, TypeError, "other must be float32"),
        ({"other": torch.zeros(3, 9, device="meta")}, ValueError, "other must be on the device of logits cpu, got meta"),
        ({"logits": [1.0]}, TypeError, "logits must be a tensor"),
        ({"kind": "kl"}, ValueError, "unknown kind 'kl', expected one of 'reverse_kl'"),
        ({"kind": "jsd", "beta": 1.0}, ValueError, "0 < beta < 1, got 1.0"),
        ({"kind": "skew_forward_kl", "beta": 0}, ValueError, "0 < beta < 1, got 0"),
        ({"kind": "mixed_kl", "beta": 1.5}, ValueError, "0 <= beta <= 1, got 1.5"),
        ({"kind": "alpha", "beta": 1e-4}, ValueError, r"\[0.001, 0.999\], got 0.0001: its limits are 'forward_kl' \(1\) and 'reverse_kl' \(0\)"),
        ({"beta": None}, TypeError, "beta must be a number, got NoneType"),
        ({"temperature": 0.0}, ValueError, "^temperature must be positive"),
        ({"temperature": 1e-39}, ValueError, "^temperature must be positive and finite, at least 1.175e-38, got 1e-39"),
        ({"beta": float("nan")}, ValueError, "beta must be a number, got nan"),
        ({"other_temperature": 0.0}, ValueError, "other_temperature must be positive"),
        ({"other_temperature": torch.ones(4)}, ValueError, r"other_temperature must be .*\(3,\).*got \(4,\)"),
        (
            {"other_temperature": torch.tensor([1.0, -1.0, 2.0])},
            ValueError,
            "other_temperature must be positive and finite in every row that is read",
        ),
        ({"other_temperature": torch.ones(3, requires_grad=True)}, ValueError, "other_temperature carries no gradient here"),
        ({"mask": torch.ones(4)}, ValueError, r"mask must be \(3,\)"),
        ({"vocab": 10}, ValueError, r"vocab must be at most the columns of logits \(9\) and of other \(9\), got 10"),
        ({"vocab": 0}, ValueError, "vocab must be at least 1, got 0"),
        ({"vocab": 3.0}, TypeError, "vocab must be an integer, got 3.0"),
        ({"other_grad": "yes"}, TypeError, "other_grad must be True or False, got 'yes'"),
        ({"kind": "cross_entropy", "other_grad": True}, ValueError, "other_grad: the cross entropy has no gradient by other here"),
        ({"logits": torch.zeros(3, 1).expand(3, 9), "inplace_backward": True}, ValueError, "inplace_backward"),
        ({"group": object()}, TypeError, "group"),
    ],
)
def test_refuses(change, error, message):
    arguments = {"logits": torch.zeros(3, 9), "other": torch.zeros(3, 9)} | change
    for function in (token_divergence, pair_stats):
        with pytest.raises(error, match=message):
            function(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"targets": torch.zeros(3)}, TypeError, "targets must be an integer tensor"),
        ({"targets": torch.zeros(3, 2, dtype=torch.long)}, ValueError, r"targets must be \(3,\), one a row .*got \(3, 2\)"),
        ({"targets": torch.tensor([0, 9, 1])}, IndexError, "target 9 of row 1 is out of range for 9 logits"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index must be an int, got 0.5"),
    ],
)
def test_pair_stats_refuses(cpu, change, error, message):
    with pytest.raises(error, match=message):
        pair_stats(torch.zeros(3, 9), torch.zeros(3, 9), **change)


# --- gradients ----------------------------------------------------------------------------------------------


def test_only_logits_take_a_gradient_unless_asked():
    z, w = (x.requires_grad_() for x in draw(3, 9))
    assert torch.autograd.grad(token_divergence(z, w).sum(), (z, w), allow_unused=True)[1] is None
    assert not token_divergence(z.detach(), w).requires_grad
    one = torch.autograd.grad(token_divergence(z.detach(), w, other_grad=True).sum(), w)[0]
    two = torch.autograd.grad(token_divergence(z, w, other_grad=True).sum(), (z, w))
    assert torch.equal(one, two[1]) and torch.equal(two[0], torch.autograd.grad(token_divergence(z, w).sum(), z)[0])
    with torch.no_grad():
        assert not token_divergence(z, w, other_grad=True).requires_grad


def test_the_graph_is_used_once_unless_retained(backend, device):
    z, w = (x.requires_grad_() for x in draw(3, 9, device=device))
    value = token_divergence(z, w, other_grad=True).sum()
    first = torch.autograd.grad(value, (z, w), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(value, (z, w)), first, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


def test_double_backward_is_refused(backend, device):
    z, w = (x.requires_grad_() for x in draw(3, 9, device=device))
    message = r"rlkern's gradients cannot be differentiated a second time; where you need that, use rlkern\.reference\.token_divergence"
    for leaf in (z, w):
        (gradient,) = torch.autograd.grad(token_divergence(z, w, other_grad=True).sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=message):
            gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("other_grad", [False, True])
@pytest.mark.parametrize("cut", [lambda x: x, lambda x: x[:, :-1]], ids=["whole", "slice"])
def test_inplace_backward(backend, device, dtype, other_grad, cut):
    z, w = draw(3, 5, 301, dtype=dtype, device=device)
    mask = torch.arange(15, device=device).view(3, 5) % 4 > 0

    def run(in_place):
        logits = []

        def function(a, b):
            logits.append(cut(a * 1.0))
            return token_divergence(logits[0], cut(b), kind="jsd", mask=cut(mask), other_grad=other_grad, inplace_backward=in_place)

        return *both(function, z, w), logits[0].detach()

    (value, d_z, d_w, untouched), (*got, overwritten) = run(False), run(True)
    assert torch.equal(got[0], value) and torch.equal(got[1], d_z)
    assert (torch.equal(got[2], d_w) and (d_w != 0).any()) if other_grad else got[2] is d_w is None
    assert torch.equal(untouched, cut(z)) and torch.equal(overwritten, cut(d_z))


def test_two_uses_of_overwritten_logits_raise(backend, device):
    z, w = draw(4, 33, device=device)
    logits = z.requires_grad_() * 1.0
    first, second = (token_divergence(logits, w, inplace_backward=True) for _ in range(2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (first.sum() + second.sum()).backward()


# --- pair_stats and gkd_divergence --------------------------------------------------------------------------


@pytest.mark.parametrize("temperatures", TEMPERATURES, ids=str)
def test_pair_stats_are_those_of_both_rows(backend, device, temperatures):
    z, w = draw(2, 3, 17, device=device)
    z[0, 0, 3] = w[0, 0, 3] = w[1, 2, 4] = -INF
    targets = torch.tensor([[1, 3, -100], [0, 16, 5]], device=device)
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in temperatures.items()}
    stats = pair_stats(z, w, targets, kind="forward_kl", **moved)
    own = rlkern.token_stats(z, targets, temperature=moved.get("temperature", 1.0))
    others = rlkern.token_stats(w, targets, temperature=moved.get("other_temperature", moved.get("temperature", 1.0)))
    divergence = token_divergence(z, w, kind="forward_kl", mask=targets != -100, **moved)
    torch.testing.assert_close(stats.divergence, divergence)
    for name in ("logp", "entropy", "logsumexp"):
        torch.testing.assert_close(getattr(stats, name), getattr(own, name))
        torch.testing.assert_close(getattr(stats, f"other_{name}"), getattr(others, name))
    without = pair_stats(z, w, **moved)
    assert without.logp is None and without.other_logp is None and without.entropy.shape == (2, 3)


@pytest.mark.parametrize("kind", ["reverse_kl", "cross_entropy", "skew_forward_kl", "total_variation"])
def test_gradients_together_are_the_sum_of_the_separate_ones(backend, device, kind):
    z, w = draw(2, 3, 50, dtype=torch.float32, device=device)
    z[0, 0, 3] = -INF if kind != "cross_entropy" else z[0, 0, 3]
    targets = torch.tensor([[1, 3, -100], [0, 49, 5]], device=device)
    upstream = [torch.randn(2, 3, generator=torch.Generator().manual_seed(i)).to(device) for i in range(4)]

    def gradient(which):
        leaf = z.clone().requires_grad_()
        stats = pair_stats(leaf, w, targets, kind=kind, temperature=0.7, other_temperature=1.3)
        for name in ("other_logp", "other_entropy", "other_logsumexp"):
            assert not getattr(stats, name).requires_grad
        total = sum((g * getattr(stats, name)).sum() for name, g in zip(FIELDS, upstream, strict=True) if name in which)
        return torch.autograd.grad(total, leaf)[0]

    together, parts = gradient(FIELDS), {name: gradient([name]) for name in FIELDS}
    torch.testing.assert_close(together, sum(parts.values()), rtol=1e-6, atol=1e-6)

    def formula(x):
        log_p = (x.double() / 0.7).log_softmax(-1)
        p = log_p.exp()
        return {
            "logp": log_p.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1),
            "entropy": -(p * log_p.clamp_min(-1e30)).sum(-1),
            "logsumexp": (x.double() / 0.7).logsumexp(-1),
        }

    for name, g in zip(FIELDS[1:], upstream[1:], strict=True):
        leaf = z.clone().requires_grad_()
        expected = torch.autograd.grad((g * formula(leaf)[name]).masked_fill(targets < 0, 0).sum(), leaf)[0]
        torch.testing.assert_close(parts[name], expected, rtol=1e-5, atol=1e-6)
    leaf = z.clone().requires_grad_()
    options = {"kind": kind, "temperature": 0.7, "other_temperature": 1.3, "mask": targets != -100}
    expected = torch.autograd.grad((upstream[0] * token_divergence(leaf, w, **options)).sum(), leaf)[0]
    torch.testing.assert_close(parts["divergence"], expected, rtol=1e-6, atol=1e-7)


def test_the_others_statistics_are_detached_and_the_divergence_is_not(backend, device):
    z, w = (x.requires_grad_() for x in draw(3, 9, device=device))
    targets = torch.tensor([1, 0, 8], device=device)
    stats = pair_stats(z, w, targets, other_grad=True)
    assert [x.requires_grad for x in stats] == [True, True, False, True, False, True, False]
    d_z, d_w = torch.autograd.grad(stats.divergence.sum() + stats.logp.sum(), (z, w))
    expected = torch.autograd.grad(oracle.textbook(z, w).sum() + z.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).sum(), (z, w))
    torch.testing.assert_close((d_z, d_w), expected)
    stats = pair_stats(z, w, targets, other_grad=True)
    assert (torch.autograd.grad(stats.entropy.sum(), w, allow_unused=True)[0] == 0).all()


def test_results_may_be_written_into(backend, device):
    z, w = draw(4, 50, device=device)
    targets = torch.arange(4, device=device)

    def gradient(write):
        leaf = z.clone().requires_grad_()
        stats = pair_stats(leaf, w, targets, kind="jsd")
        if write:
            assert len({x.data_ptr() for x in stats}) == 7
            for x in stats:
                assert x._base is None and x.is_contiguous()
                x[0] = 0.0
        return torch.autograd.grad(sum(x[1:].sum() for x in stats if x.requires_grad), leaf)[0]

    assert torch.equal(gradient(True), gradient(False))


def test_gkd_divergence_takes_its_ends_for_the_kl_divergences():
    z, w = draw(3, 9)
    for beta, options in (
        (0, {"kind": "forward_kl"}),
        (0.0, {"kind": "forward_kl"}),
        (1, {"kind": "reverse_kl"}),
        (0.3, {"kind": "jsd", "beta": 0.3}),
    ):
        more = {"temperature": 0.7, "mask": torch.tensor([1, 0, 1]), "vocab": 8}
        assert torch.equal(gkd_divergence(z, w, beta, **more), token_divergence(z, w, **options, **more))
    # The scaled limits are the same.
    for beta, kind in ((1e-6, "forward_kl"), (1 - 1e-6, "reverse_kl")):
        scaled = gkd_divergence(z, w, beta) / (beta * (1 - beta))
        torch.testing.assert_close(scaled, token_divergence(z, w, kind=kind), rtol=1e-3, atol=0)
    for beta, error, message in ((1.5, ValueError, r"beta must be in \[0, 1\], got 1.5"), ("1", TypeError, "beta must be a number, got str")):
        with pytest.raises(error, match=message):
            gkd_divergence(z, w, beta)
    with pytest.raises(TypeError, match="gkd_divergence takes no kind, beta chooses it; got 'jsd'"):
        gkd_divergence(z, w, 0.5, kind="jsd")


# --- as PyTorch sees them -----------------------------------------------------------------------------------


def everything(z, w, targets, other_grad=False):
    stats = pair_stats(z, w, targets, kind="mixed_kl", beta=0.3, temperature=0.7, other_temperature=1.3, other_grad=other_grad)
    divergence, logp, other_logp, entropy, other_entropy, logsumexp, other_logsumexp = stats
    return (divergence + logp * other_logp + 0.1 * entropy * other_entropy + 0.2 * logsumexp - other_logsumexp).sum()


@pytest.mark.parametrize("other_grad", [False, True])
def test_compiles_as_one_graph_for_every_size(other_grad):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(everything, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for i, shape in enumerate([(2, 5, 33), (3, 7, 40), (4, 6, 51)]):
        leaves = [x.requires_grad_() for x in draw(*shape, dtype=torch.float32, seed=i)]
        targets, by = torch.zeros(shape[:-1], dtype=torch.long), leaves if other_grad else leaves[:1]
        expected = torch.autograd.grad(everything(*leaves, targets, other_grad), by)
        torch.testing.assert_close(torch.autograd.grad(compiled(*leaves, targets, other_grad), by), expected)
        counts.append(counter.frame_count)
    assert counts[0] > 0 and len(set(counts)) == 1


@every_kind
def test_compiles(kind):
    torch._dynamo.reset()
    z, w = draw(3, 9, dtype=torch.float32)

    def function(x):
        return token_divergence(x, w, kind=kind, temperature=torch.full((3,), 0.7))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(differentiate(compiled, z, torch.ones(3)), differentiate(function, z, torch.ones(3)))


@pytest.mark.parametrize("asked", ["everything", "the divergence", "by the other"])
def test_opcheck(asked):
    z, w = draw(2, 5, 33, dtype=torch.float32)
    targets = torch.zeros(2, 5, dtype=torch.long) if asked == "everything" else None
    mask, t, other_t = torch.rand(2, 5) > 0.3, torch.rand(2, 5) + 0.5, torch.rand(2, 5) + 0.5
    options = (1.0, 1.0, -100, PairKind.JSD, 0.3, 31, asked == "everything", asked == "by the other", 3.0, 0.0)
    forward = (z, w, targets, mask, t, other_t, *options)
    torch.library.opcheck(torch.ops.rlkern.pair_stats.default, forward)
    state, g = torch.ops.rlkern.pair_stats(*forward)[-1], torch.randn(2, 5)
    grads = (g, g, g, g) if asked == "everything" else (g, None, None, None)
    for wanted in ([True, False], [asked == "everything", asked == "by the other"]):
        torch.library.opcheck(torch.ops.rlkern.pair_stats_backward.default, (*forward, state, *grads, wanted))
    torch.library.opcheck(torch.ops.rlkern.pair_stats_backward_.default, (z.clone(), *forward[1:], state, *grads))


def test_meta_tensors():
    z, w = (x.to("meta").requires_grad_() for x in draw(2, 3, 50, dtype=torch.bfloat16))
    everything(z, w, torch.zeros(2, 3, dtype=torch.long, device="meta"), True).backward()
    assert z.grad.is_meta and w.grad.shape == (2, 3, 50) and w.grad.dtype == torch.bfloat16


def test_nothing_is_read_on_the_host(cpu):
    z, w = (x.requires_grad_() for x in draw(2, 3, 11, dtype=torch.float32))
    targets, mask = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.bool)
    with battery.NoSyncingOperators(), battery.NoSyncingMethods():
        for kind, temperature in itertools.product(KINDS, (0.7, torch.ones(2, 3))):
            other_grad = kind != "cross_entropy"
            stats = pair_stats(z, w, targets, kind=kind, mask=mask, temperature=temperature, other_grad=other_grad)
            torch.autograd.grad(stats.divergence.sum() + stats.logp.sum(), (z, w) if other_grad else z)


def in_plain_pytorch(z, w, kind, temperature=1.0):
    """Forward and backward of the reference, which operators hide from dispatch modes."""
    n = z.shape[0] * z.shape[1]
    acc = torch.float64 if z.dtype == torch.float64 else torch.float32
    out = [z.new_empty(n, dtype=acc) for _ in range(7)] + [z.new_empty((n, PairState.WIDTH), dtype=acc)]
    args = (torch.ones(n, 1, dtype=torch.long), torch.ones(n, dtype=torch.bool), temperature, temperature, -100, kind, 0.3)
    return out, lambda: reference.pair_forward(z, w, *args, out), lambda g, to: reference.pair_backward(z, w, *args, out[-1], [g, g, g, g], to)


@every_kind
def test_the_reference_reads_nothing_on_the_host(kind):
    z, w = draw(2, 3, 11, dtype=torch.float32)
    for temperature in (0.7, torch.ones(6)):
        _, forward, backward = in_plain_pytorch(z, w, KINDS.index(kind), temperature)
        with battery.NoSyncingOperators():
            forward()
            backward(torch.ones(6), torch.empty_like(z))


@every_kind
def test_the_reference_makes_no_float32_copy_of_the_logits(kind, monkeypatch):
    monkeypatch.setattr(layout, "chunk_elements", lambda rows: 1000)
    z, w = draw(1, 64, 500, dtype=torch.bfloat16)
    _, forward, backward = in_plain_pytorch(z, w, KINDS.index(kind))
    with battery.Operators() as ran:
        forward()
        backward(torch.ones(64), torch.empty_like(z))
    assert 1000 == max(x.numel() for _, _, results in ran.calls for x in results if x.dtype == torch.float32)


def test_autocast_changes_nothing(backend, device):
    z, w = draw(4, 33, dtype=torch.float32, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = token_divergence(z, w)
    assert torch.equal(inside, token_divergence(z, w)) and inside.dtype == torch.float32


def test_torch_func_is_refused():
    z, w = draw(3, 9)
    with pytest.raises(RuntimeError, match="autograd.Function with functorch"):
        torch.func.grad(lambda x: token_divergence(x, w).sum())(z)
