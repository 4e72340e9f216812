"""Two rows of logits in C++, on every instruction set here, against float64 on the same inputs."""

import functools
import itertools
import math

import pair_oracle as oracle
import pytest
import torch
from isas import ISAS
from pair_oracle import assert_gradient, assert_value, both, check

import rlkern
from rlkern import reference as formulas
from rlkern.backends import reference
from rlkern.backends.contract import PairKind, PairState

native = pytest.importorskip("rlkern.backends.native", reason="built without the CPU kernels")
pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.parametrize("backend", ISAS, indirect=True)]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INF = math.inf
TILE = 2048
every_kind = pytest.mark.parametrize("kind", oracle.NATIVE)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ONE_SWEEP = ("reverse_kl", "forward_kl", "mixed_kl", "cross_entropy")


def betas(kind):
    return (0.5,) if kind in ("reverse_kl", "forward_kl", "cross_entropy") else (0.1, 0.5, 0.9)


@functools.cache
def example(vocab, dtype, kind, beta, temperatures):
    """Rows and what is expected of them; the same for every instruction set."""
    z, w = oracle.draw(2, vocab, dtype=dtype)
    return z, w, oracle.precise(z, w, kind, beta, *temperatures)


@every_kind
@every_dtype
def test_values_and_gradients(kind, dtype):
    """The skew kinds lose a factor of 1 / (1 - beta) near equality."""
    exact = dtype == torch.float64
    for vocab, beta, temperatures in itertools.product((2, 7, 2048, 2049, 9001), betas(kind), ((1.0, 1.0), (0.7, 1.9))):
        z, w, (value, *gradient) = example(vocab, dtype, kind, beta, temperatures)
        got = both(z, w, kind=kind, beta=beta, temperature=temperatures[0], other_temperature=temperatures[1])
        assert_value(got[0], value, 1e-12 if exact else 1e-5 if "skew" in kind else 5e-6)
        assert_gradient(got[1], *gradient, 1e-13 if exact else 2e-5 if "skew" in kind else 2e-6 if kind == "jsd" else 1e-6)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_large_vocabulary(kind, dtype):
    z, w, (value, *gradient) = example(32768, dtype, kind, 0.5, (1.0, 1.0))
    got = both(z, w, kind=kind)
    assert_value(got[0], value, 5e-6)
    assert_gradient(got[1], *gradient, 1e-6)


@functools.cache
def eager(kind, beta):
    """(largest error of float32 autograd's values, of its gradients, by the largest), and what is exact."""
    z, w = oracle.draw(16, 9001)
    leaf = z.clone().requires_grad_()
    value = formulas.token_divergence(leaf, w, kind, beta)
    exact = oracle.precise(z, w, kind, beta)[:2]
    got = value.detach(), torch.autograd.grad(value.sum(), leaf)[0]
    return z, w, exact, [largest_error(x, e) for x, e in zip(got, exact, strict=True)]


def largest_error(got, exact):
    return ((got.double() - exact).abs().max() / exact.abs().max()).item()


# The gradient of skew_forward_kl subtracts almost equal numbers where q has little mass. Eager PyTorch has
# another form, which loses all digits of close rows.
@pytest.mark.parametrize("kind", [kind for kind in oracle.NATIVE if kind != "skew_forward_kl"])
def test_errors_are_no_larger_than_those_of_eager_pytorch(kind):
    for beta in betas(kind):
        z, w, exact, of_eager = eager(kind, beta)
        errors = [largest_error(x, e) for x, e in zip(both(z, w, kind=kind, beta=beta), exact, strict=True)]
        assert all(error <= max(limit, 5e-7) for error, limit in zip(errors, of_eager, strict=True)), (beta, errors, of_eager)


@every_kind
@every_dtype
def test_one_column_is_certain(kind, dtype):
    z, w = oracle.draw(5, 1, dtype=dtype)
    value, gradient = both(z, w, kind=kind)
    assert (value == 0).all() and (gradient == 0).all()


@every_kind
def test_every_pair_of_dtypes(kind):
    for of_z, of_w in itertools.product(DTYPES, DTYPES):
        temperature = 0.7 if of_w == torch.bfloat16 else 1.9
        z, w = oracle.draw(2, 2100, dtype=torch.float64)
        z, w = z.to(of_z), w.to(of_w)
        exact = of_z == torch.float64
        seen = w.float() if of_w == torch.float64 and not exact else w
        expected = oracle.precise(z, seen, kind, temperature=0.7, other_temperature=temperature)
        got = both(z, w, kind=kind, temperature=0.7, other_temperature=temperature)
        assert got[0].dtype == (torch.float64 if exact else torch.float32) and got[1].dtype == of_z
        assert_value(got[0], expected[0], 1e-12 if exact else 5e-6)
        assert_gradient(got[1], *expected[1:], 1e-13 if exact else 1e-6)


# --- how close ----------------------------------------------------------------------------------------------


@functools.cache
def close_rows(noise, shift, kind, beta):
    z, w = oracle.draw(3, 5000, noise=noise)
    return z, w + shift, oracle.precise(z, w + shift, kind, beta)


@every_kind
def test_small_divergences_keep_their_digits(kind):
    rtol, least = (1e-5, 1e-12) if kind in ONE_SWEEP else (1e-4, 1e-10)
    for exponent, beta in itertools.product(range(1, 7), betas(kind)):
        z, w, (value, *_) = close_rows(10.0**-exponent, 0.0, kind, beta)
        got, _ = both(z, w, kind=kind, beta=beta)
        assert (got >= 0).all()
        assert_value(got[value >= least], value[value >= least], rtol)
        z, w, (value, *_) = close_rows(10.0**-exponent, 3.7, kind, beta)
        got, _ = both(z, w, kind=kind, beta=beta)
        assert (got >= 0).all()
        assert_value(got[value >= 1e-10], value[value >= 1e-10], 1e-2)


@every_kind
def test_gradients_of_close_rows_keep_their_digits(kind):
    for beta in betas(kind):
        z, w, (_, gradient, _) = close_rows(1e-5, 0.0, kind, beta)
        assert_gradient(both(z, w, kind=kind, beta=beta)[1], gradient, gradient.abs().amax(-1), 1e-3)


@every_kind
@every_dtype
def test_equal_rows_have_none(kind, dtype):
    for vocab, scale in ((5, 1.0), (5003, 3.0), (5003, 30.0)):
        z, _ = oracle.draw(3, vocab, dtype=dtype, scale=scale)
        z[1, : vocab // 2] = -INF
        for temperature in (1.0, 0.7):
            value, gradient = both(z, z.clone(), kind=kind, temperature=temperature)
            assert (gradient == 0).all()
            if kind != "cross_entropy":
                assert (value == 0).all()


@every_kind
def test_equal_distributions_at_different_temperatures(kind):
    z, _ = oracle.draw(3, 5003)
    value, gradient = both(z, 2 * z, kind=kind, temperature=0.75, other_temperature=1.5)
    assert (gradient.abs() < 1e-6 * z.softmax(-1).max()).all()
    if kind != "cross_entropy":
        assert (value >= 0).all() and (value < 1e-11).all()


# --- extremes -----------------------------------------------------------------------------------------------


def peak(x, at, height):
    x = x.clone()
    x[:, at] = height
    return x


def extremes():
    """name -> (z, w) of three tiles."""
    vocab = 2 * TILE + 777
    z, w = oracle.draw(2, vocab)
    first, last = slice(None, TILE), slice(2 * TILE, None)
    cases = {}
    for at in (0, TILE + 5, vocab - 1):
        cases[f"one of +30 at {at}"] = peak(z, at, 30.0), w
        cases[f"the other has one of +30 at {at}"] = z, peak(w, at, 30.0)
        cases[f"both at {at}"] = peak(z, at, 30.0), peak(w, at, 31.0)
    cases["at opposite ends"] = peak(z, 0, 30.0), peak(w, vocab - 1, 30.0)
    cases["a flat row and a peak of +40"] = torch.zeros_like(z), peak(0 * w, TILE, 40.0)
    cases["a peak of +40 and a flat row"] = peak(0 * z, TILE, 40.0), torch.zeros_like(w)
    cases["both far up"] = z + 1000, w + 1000
    cases["both far down"] = z - 1000, w - 1000
    low_z, low_w = z - 60, w - 60
    low_z[:, last], low_w[:, last] = z[:, last], w[:, last]
    cases["mass in the last tile"] = low_z, low_w
    high_z = z - 60
    high_z[:, first] = z[:, first]
    cases["mass from the first tile to the last"] = high_z, low_w
    cases["mass from the last tile to the first"] = low_z, high_z
    rising = torch.linspace(-40, 40, vocab)
    cases["rising"] = z + rising, w + rising
    cases["crossing"] = z + rising, w - rising
    lowest = torch.finfo(torch.float32).min
    for value, word in ((-INF, "-inf"), (lowest, "the lowest number")):
        for place, what in (
            (first, "first tile"),
            (slice(None, 2 * TILE), "first tiles"),
            (last, "last tile"),
            (slice(None, vocab - 1), "all but one"),
        ):
            masked_z, masked_w = z.clone(), w.clone()
            masked_z[:, place] = masked_w[:, place] = value
            cases[f"{what} at {word} on both sides"] = masked_z, masked_w
    return cases


EXTREMES = extremes()
NAMES = [name for name in EXTREMES for _ in range(2)]  # one a row


@functools.cache
def all_extremes(kind, beta):
    z, w = (torch.cat(rows) for rows in zip(*EXTREMES.values(), strict=True))
    return z, w, oracle.precise(z, w, kind, beta)


@every_kind
def test_extreme_rows(kind):
    for beta in (0.5,) if kind in ONE_SWEEP else (0.1, 0.9):
        z, w, expected = all_extremes(kind, beta)
        compare_rows(NAMES, both(z, w, kind=kind, beta=beta), expected, 1e-5, 1e-5)


def compare_rows(names, got, expected, value_rtol, gradient_rtol):
    for row, name in enumerate(names):
        try:
            assert_value(got[0][row], expected[0][row], value_rtol)
            assert_gradient(got[1][row], *(x[row] for x in expected[1:]), gradient_rtol)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@every_kind
def test_rows_far_apart(kind):
    """A difference of 2000 in the offsets. That of two logits is rounded to 1e-4 there."""
    z, w = oracle.draw(2, 5003)
    check(z + 1000, w - 1000, kind=kind, value_rtol=1e-4, gradient_rtol=2e-4)
    check((z + 1000).double(), (w - 1000).double(), kind=kind, value_rtol=1e-12, gradient_rtol=1e-12)


# --- -inf ---------------------------------------------------------------------------------------------------


def missing(vocab):
    """name -> (columns without the first distribution's mass, columns without the other's)."""
    one, none = slice(1, 2), slice(0, 0)
    first, last, even, odd = slice(None, min(TILE, vocab // 3)), slice(vocab - vocab // 3, None), slice(None, None, 2), slice(1, None, 2)
    return {
        "nothing": (none, none),
        "one of both": (one, one),
        "one of the first": (one, none),
        "one of the other": (none, one),
        "first tile of the first": (first, none),
        "first tile of the other": (none, first),
        "last tile of the first": (last, none),
        "last tile of the other": (none, last),
        "first tile of both": (first, first),
        "last tile of both": (last, last),
        "first of the one, last of the other": (first, last),
        "nothing in common": (even, odd),
        "every other of both": (odd, odd),
        "all but one": (slice(1, None), none),
        "all but one of the other": (none, slice(1, None)),
        "all of the first": (slice(None), none),
        "all of the other": (none, slice(None)),
    }


@functools.cache
def without_mass(vocab, dtype, kind, beta):
    cases = missing(vocab)
    z, w = oracle.draw(len(cases), vocab, dtype=dtype)
    for row, (of_z, of_w) in enumerate(cases.values()):
        z[row, of_z], w[row, of_w] = -INF, -INF
    return z, w, oracle.precise(z, w, kind, beta)


@every_kind
@every_dtype
def test_minus_infinity(kind, dtype):
    exact = dtype == torch.float64
    for vocab in (9, 2 * TILE + 900):
        z, w, expected = without_mass(vocab, dtype, kind, 0.3)
        got = both(z, w, kind=kind, beta=0.3)
        compare_rows(missing(vocab), got, expected, *((1e-12, 1e-12) if exact else (1e-5, 1e-6)))
        finite = expected[0].isfinite()
        assert (got[1][finite][z[finite] == -INF] == 0).all()


def test_mass_that_underflows_is_mass():
    z, w = torch.zeros(1, 3000), torch.zeros(1, 3000)
    z[0, 2500] = -300.0
    w[0, 2500] = -INF
    for kind, infinite in (("reverse_kl", True), ("mixed_kl", True), ("forward_kl", False), ("jsd", False)):
        assert both(z, w, kind=kind)[0].isinf().item() is infinite, kind
    assert both(w, z, kind="forward_kl")[0] == INF and both(w, z, kind="reverse_kl")[0] == 0


@every_kind
@every_dtype
@pytest.mark.parametrize("value", [math.nan, INF])
def test_nan_and_infinity_are_never_hidden(kind, dtype, value):
    for position, side in itertools.product((0, TILE + 3, 2 * TILE + 1), (0, 1)):
        rows = oracle.draw(2, 2 * TILE + 2, dtype=dtype)
        rows[side][1, position] = value
        got, gradient = both(*rows, kind=kind)
        assert got.isnan().tolist() == [False, True] and not gradient[0].isnan().any() and gradient[1].isnan().all()


def test_an_infinite_row_leaves_the_others_alone():
    """Not a bit of them. Its own gradient is NaN, or zero where nothing flows back."""
    z, w = oracle.draw(5, 3000)
    expected = both(z, w)
    w[2, 7] = -INF
    leaf = z.clone().requires_grad_()
    value = rlkern.token_divergence(leaf, w)
    rest = torch.arange(5) != 2
    assert value[2] == INF and torch.equal(value[rest], expected[0][rest])
    (gradient,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True)
    assert gradient[2].isnan().all() and torch.equal(gradient[rest], expected[1][rest])
    (gradient,) = torch.autograd.grad(value[rest].sum(), leaf)
    assert (gradient[2] == 0).all() and torch.equal(gradient[rest], expected[1][rest])


# --- which rows and columns ---------------------------------------------------------------------------------


@every_kind
@every_dtype
def test_strides_and_misaligned_rows(kind, dtype):
    wide_z, wide_w = oracle.draw(2, 3, 2103, dtype=dtype)
    exact = {"value_rtol": 1e-12, "gradient_rtol": 1e-13} if dtype == torch.float64 else {}
    for cut in (
        lambda x: x[:, :-1],
        lambda x: x[..., 1:-1],
        lambda x: x.transpose(0, 1),
        lambda x: x[:1, :1].expand(2, 3, 2103),
        lambda x: x[..., ::3],
    ):
        check(cut(wide_z), cut(wide_w), kind=kind, **exact)
    check(wide_z[..., 1:], wide_w[..., :-1], kind=kind, **exact)  # aligned otherwise
    check(wide_z, wide_w[:, :1].expand(2, 3, 2103), kind=kind, **exact)  # one row for all
    check(wide_z, wide_w[0, 0].expand(2, 3, 2103), kind=kind, **exact)


@every_dtype
def test_columns_that_do_not_count(dtype):
    wide_z, wide_w = oracle.draw(4, 44, dtype=dtype)
    wide_z, wide_w = wide_z[:, :40].clone(), wide_w
    wide_z[:, 37:] = wide_w[:, 37:] = math.nan
    for kind in oracle.NATIVE:
        value, gradient = both(wide_z, wide_w, kind=kind, vocab=37)
        expected = both(wide_z[:, :37].clone(), wide_w[:, :37].clone(), kind=kind)
        assert torch.equal(value, expected[0]) and torch.equal(gradient[:, :37], expected[1])
        assert (gradient[:, 37:] == 0).all()


@every_dtype
@pytest.mark.parametrize("other_dtype", [None, torch.float32])
def test_bits_depend_on_the_row_alone(dtype, other_dtype):
    """The same row anywhere in any batch or slice on any number of threads: the same bits."""
    z, w = oracle.draw(4, 9, 5003, dtype=dtype)
    w = w if other_dtype is None else w.to(other_dtype)
    temperature = torch.linspace(0.5, 2.0, 36)
    threads = torch.get_num_threads()

    def run(z, w, temperature, kind):
        leaf = z.detach().requires_grad_()
        stats = rlkern.pair_stats(leaf, w, torch.full(z.shape[:-1], 2500), kind=kind, temperature=temperature, other_temperature=1.3)
        total = stats.divergence.sum() + 0.1 * stats.logp.sum() + 0.2 * stats.entropy.sum()
        return [*(x.detach() for x in stats), torch.autograd.grad(total, leaf)[0]]

    try:
        for kind in ("reverse_kl", "mixed_kl", "jsd"):
            torch.set_num_threads(1)
            alone = [run(z[r // 9, r % 9].clone()[None], w[r // 9, r % 9].clone()[None], temperature[r : r + 1], kind) for r in range(36)]
            expected = [torch.cat(parts) for parts in zip(*alone, strict=True)]
            for count in (1, 2, 3, 5):
                torch.set_num_threads(count)
                got = run(z, w, temperature.view(4, 9), kind)
                assert all(torch.equal(x.reshape(e.shape), e) for x, e in zip(got, expected, strict=True)), (kind, count)
            got = run(z[:, 1:-1], w[:, 1:-1], temperature.view(4, 9)[:, 1:-1], kind)
            assert all(torch.equal(x, e.view(4, 9, *e.shape[1:])[:, 1:-1]) for x, e in zip(got, expected, strict=True)), kind
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_too_large_for_the_caches_has_the_same_bits(dtype):
    vocab = 40_009  # odd: rows start anywhere between the addresses that vectors are streamed to
    z, w = oracle.draw(2**25 // (vocab * dtype.itemsize) + 1, vocab)
    z, w = z.to(dtype), w.to(dtype)
    got, in_place = both(z, w)[1], z.clone()
    assert torch.equal(got, both(in_place, w, inplace_backward=True)[1]) and torch.equal(in_place, got)
    assert torch.equal(got[-1:], both(z[-1:], w[-1:])[1])


# --- the convention -----------------------------------------------------------------------------------------


def call(backend, z, w, kind, *, targets=None, mask=None, temperature=1.0, other_temperature=1.0, state=None, grads=None):
    """(forward's results, gradient) of a backend, into memory full of NaN."""
    acc, n = torch.float64 if z.dtype == torch.float64 else torch.float32, z.shape[0] * z.shape[1]
    out = [None if targets is None and i in (1, 4) else torch.full((n,), math.nan, dtype=acc) for i in range(7)]
    out.append(torch.full((n, PairState.WIDTH), math.nan, dtype=acc))
    args = (targets, mask, temperature, other_temperature, -100, kind, 0.3)
    backend.pair_forward(z, w, *args, tuple(out))
    gradient = torch.full_like(z, math.nan)
    backend.pair_backward(z, w, *args, out[-1] if state is None else state, grads, gradient)
    return out, gradient


@every_kind
@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.7, 1.9)], ids=str)
def test_state_is_interchangeable_with_the_reference(kind, temperatures):
    z, w = (x[None] for x in oracle.draw(6, 3001))
    g = torch.Generator().manual_seed(1)
    targets, mask = torch.randint(0, 3001, (6, 1), generator=g), torch.arange(6) != 1
    targets[2] = -100
    upstream = [torch.randn(6, generator=g) for _ in range(4)]
    z[0, 1:3] = math.nan  # a masked row and an ignored one
    options = {"targets": targets, "mask": mask, "temperature": temperatures[0], "other_temperature": temperatures[1], "grads": upstream}
    code = getattr(PairKind, kind.upper())
    mine, gradient = call(native, z, w, code, **options)
    theirs, their_gradient = call(reference, z, w, code, **options)
    for x, y in zip(mine, theirs, strict=True):
        assert (x[1:3] == 0).all() and not x.isnan().any()
        if x.dim() == 1:
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-4, atol=1e-6)
    assert (gradient[0, 1:3] == 0).all()
    for backend, state in ((native, theirs[-1]), (reference, mine[-1])):
        torch.testing.assert_close(call(backend, z, w, code, state=state, **options)[1], gradient, rtol=1e-4, atol=1e-6)


def test_temperatures_that_are_not_positive():
    z, w = (x[None] for x in oracle.draw(6, 300))
    bad, good = torch.tensor([1.0, 0.0, -1.0, math.nan, 2.0, 1.0]), torch.ones(6)
    for temperatures in ((bad, good), (good, bad), (bad, bad)):
        out, gradient = call(native, z, w, 0, temperature=temperatures[0], other_temperature=temperatures[1], grads=[torch.ones(6), None, None, None])
        for x in (out[0], gradient[0].sum(-1)):
            assert x.isnan().tolist() == [False, True, True, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)  # float16 is converted
def test_statistics_have_the_bits_of_token_stats(dtype):
    z, w = oracle.draw(3, 4, 5003, dtype=dtype)
    z[0, 0, :TILE] = w[0, 1, 3000:] = -INF
    targets = torch.arange(0, 4800, 400).view(3, 4)
    targets[1, 1] = -100
    for temperature, other_temperature in ((1.0, 1.0), (0.7, 1.9), (torch.linspace(0.5, 2.0, 12).view(3, 4), 1.5)):
        for kind in ("forward_kl", "jsd"):
            options = {"mask": torch.arange(12).view(3, 4) != 7}
            got = rlkern.pair_stats(z, w, targets, kind=kind, temperature=temperature, other_temperature=other_temperature, **options)
            own = rlkern.token_stats(z, targets, temperature=temperature, **options)
            others = rlkern.token_stats(w, targets, temperature=other_temperature, **options)
            for name in ("logp", "entropy", "logsumexp"):
                assert torch.equal(getattr(got, name), getattr(own, name)), name
                assert torch.equal(getattr(got, f"other_{name}"), getattr(others, name)), f"other_{name}"


def test_target_out_of_range():
    z, w = oracle.draw(6, 50)
    for wrong in (50, -1, 2**40, -(2**62)):
        targets = torch.arange(6)
        targets[4] = wrong
        with pytest.raises(IndexError, match=rf"target {wrong} of row 4 is out of range for 50 logits"):
            rlkern.pair_stats(z, w, targets)
        assert rlkern.pair_stats(z, w, targets, mask=torch.arange(6) != 4).logp[4] == 0
    with pytest.raises(IndexError, match="target 45 of row 5 is out of range for 45 logits"):
        rlkern.pair_stats(z, w, torch.tensor([0, 1, 2, 3, 4, 45]), vocab=45)
