"""Rows from their parts, on every backend: against float64 of the same parts, and of the uncut rows."""

import math
from itertools import pairwise

import pytest
import torch
from isas import every_isa

from rlkern import backends
from rlkern.backends import reference
from rlkern.backends.contract import KeptKind, State
from rlkern.primitives.parts import with_kept
from rlkern.primitives.row_stats import IGNORED, Options, Results, targets_in_part

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted here; test_gpu_primitives.py has them on a card")
V, IGNORE, INF, NAN = 61, -100, math.inf, math.nan
CUTS = {1: (0, V), 2: (0, 17, V), 3: (0, 1, 2, V), 5: (0, 8, 16, 23, 60, V), 9: (0, 4, 5, 17, 18, 29, 40, 41, 50, V)}
NAMES = ("logp", "entropy", "logsumexp", "sum_sq_prob")


def outputs(n, k, dtype, kept=False):
    each = [torch.full((n,), 7.0, dtype=dtype) for _ in range(4)]
    return (torch.full((n, k), 7.0, dtype=dtype), *each[:3], each[3] if kept else None, torch.full((n, State.TARGETS + k), 7.0, dtype=dtype))


def of_parts(backend, rows, y, mask, temperature, cuts, softcap=0.0):
    """The state [P, N, W] that a backend leaves of each part."""
    states = []
    for start, stop in pairwise(cuts):
        out = outputs(len(y), y.shape[1], torch.float64 if rows.dtype == torch.float64 else torch.float32)
        here = targets_in_part(y, start, stop, V, IGNORE)
        backend.token_stats_forward(rows[..., start:stop], here, mask, temperature, IGNORED, KeptKind.NONE, 0.0, out, softcap)
        states.append(out[-1])
    return torch.stack(states)


def merged(backend, parts, y, mask, temperature, kept=(KeptKind.NONE, 0.0)):
    out = outputs(parts.shape[1], parts.shape[2] - State.TARGETS, parts.dtype)
    backend.token_stats_merge(parts, y, mask, temperature, IGNORE, *kept, out)
    return dict(zip((*NAMES, "kept", "state"), out, strict=True))


def made_by(backend, count):
    """The backend whose forward makes so many parts. Each may merge another's: the interpreter makes few."""
    return reference if backend == "triton" and count > 3 else backends.select(torch.device("cpu"))


def of_masses(backend, rows, y, mask, temperature, kind, state, cuts, softcap=0.0):
    masses = []
    for start, stop in pairwise(cuts):
        out = torch.full((len(y), 2), 7.0, dtype=state.dtype)
        here = targets_in_part(y, start, stop, V, IGNORE)
        backend.token_stats_kept_masses(rows[..., start:stop], here, mask, temperature, IGNORED, kind, state, out, softcap)
        masses.append(out)
    return torch.stack(masses)


def whole(rows, y, mask, temperature, kept=(KeptKind.NONE, 0.0), softcap=0.0):
    """In float64, of the uncut rows."""
    out = outputs(len(y), y.shape[1], torch.float64, kept[0] != KeptKind.NONE)
    temperature = temperature.double() if isinstance(temperature, torch.Tensor) else temperature
    reference.token_stats_forward(rows.double(), y, mask, temperature, IGNORE, *kept, out, softcap)
    return dict(zip((*NAMES, "kept", "state"), out, strict=True))


def rows_of_all_kinds(dtype):
    """[1, N, V] with a stride over rows that is odd, and what is hard about each row."""
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(18, V, generator=g) * 3).tolist()
    kinds = {
        "ties across parts": lambda r: [9.0 if i in (3, 17, 18, 45, 60) else r[i] for i in range(V)],
        "all equal": lambda r: [1.5] * V,
        "-inf at the front": lambda r: [-INF] * 30 + r[30:],
        "-inf at the end": lambda r: r[:40] + [-INF] * (V - 40),
        "one of them": lambda r: [-INF] * 43 + r[43:44] + [-INF] * (V - 44),
        "-inf alone": lambda r: [-INF] * V,
        "+inf": lambda r: r[:20] + [INF] + r[21:],
        "NaN": lambda r: r[:20] + [NAN] + r[21:],
        "NaN and -inf": lambda r: [-INF] * 20 + [NAN] + [-INF] * (V - 21),
        "offset 1e4": lambda r: [10000 + v for v in r],
        "offset -1e30": lambda r: [-1e30 + 1e25 * v for v in r],
        "masked by the lowest float": lambda r: [torch.finfo(torch.float32).min] * 25 + r[25:],
        "falling by parts": lambda r: [v - 2 * i for i, v in enumerate(r)],
        "rising by parts": lambda r: [v + 2 * i for i, v in enumerate(r)],
    }
    rows = [kinds[name](x[i]) for i, name in enumerate(kinds)] + x[len(kinds) :]
    padded = torch.zeros(len(rows), V + 2, dtype=dtype)
    padded[:, 1:-1] = torch.tensor(rows, dtype=torch.float64).to(dtype)
    return padded[:, 1:-1].unsqueeze(0)


def targets_and_mask(n):
    y = torch.randint(0, V, (n, 3), generator=torch.Generator().manual_seed(1))
    y[:, 1] = torch.where(torch.arange(n) % 3 == 0, IGNORE, y[:, 1])
    y[-1] = IGNORE
    y[2, 2], y[4, 0], y[5, 0] = 3, 43, 2  # at -inf; the only one; of a row of -inf alone
    mask = torch.arange(n) != n - 3
    return y, mask


def assert_equal_rows(got, want, tolerance, columns=(*NAMES, "state")):
    for name in columns:
        if got.get(name) is None:
            continue
        a, b = got[name].double(), want[name]
        if name == "state":
            a, b = a.clone(), b.clone()
            undefined = b[:, State.REST].isnan()  # how is not said, but for the maximum of -inf alone
            assert torch.equal(a[:, State.REST].isnan(), undefined)
            alone = b[:, State.MAX] == -INF
            assert torch.equal(a[:, State.MAX] == -INF, alone)
            a[undefined], b[undefined] = 0, 0
            a[:, State.KEPT], b[:, State.KEPT] = 0, 0
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_isa
def test_merge_is_that_of_the_uncut_row(backend, dtype):
    module = backends.select(torch.device("cpu"))
    rows = rows_of_all_kinds(dtype)
    n = rows.shape[1]
    y, mask = targets_and_mask(n)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-11
    by_row = torch.linspace(0.5, 1.5, n).to(dtype)
    counts = {3: 0.7, 9: by_row} if backend == "triton" else {1: 1.0, 2: by_row, 3: 0.7, 5: 1.0, 9: by_row}
    for count, temperature in counts.items():
        parts = of_parts(made_by(backend, count), rows, y, mask, temperature, CUTS[count])
        got = merged(module, parts, y, mask, temperature)
        assert_equal_rows(got, whole(rows, y, mask, temperature), tolerance)
        of_same = merged(reference, parts.double(), y, mask, temperature.double() if isinstance(temperature, torch.Tensor) else temperature)
        assert_equal_rows(got, of_same, 2e-6 if dtype == torch.float32 else 1e-13)
        if count < 9:
            continue
        # Any strides over parts and rows, and the same bits beside other rows.
        between = torch.full((n, count + 1, parts.shape[2] + 1), NAN, dtype=dtype)
        strided = between[:, :count, 1:].transpose(0, 1).copy_(parts)
        some = torch.arange(n) % 2 == 1
        few = [t[some] if isinstance(t, torch.Tensor) else t for t in (y, mask, temperature)]
        for name, value in merged(module, strided[:, some.nonzero().view(-1)], *few).items():
            assert value is None or torch.equal(value.nan_to_num(5e5), got[name][some].nan_to_num(5e5)), name
        for name, value in merged(module, strided, y, mask, temperature).items():
            assert value is None or torch.equal(value.nan_to_num(5e5), got[name].nan_to_num(5e5)), name


KEPT = {"min_p": (KeptKind.MIN_P, math.log(0.05)), "min_prob": (KeptKind.MIN_PROB, math.log(0.02)), "tail": (KeptKind.UNLISTED, 0.0)}


@pytest.mark.parametrize("kept", KEPT)
@every_isa
def test_masses_give_what_the_uncut_row_keeps(backend, kept):
    module = backends.select(torch.device("cpu"))
    kind, log_kept = KEPT[kept]
    cases = [(torch.float32, 3, 0.0), (torch.float64, 2, 0.0), (torch.bfloat16, 2, 5.0)]
    if backend == "triton":  # interpreted: a type for each
        cases = [cases[list(KEPT).index(kept)]]
    for dtype, count, softcap in cases:
        rows = rows_of_all_kinds(dtype)
        n = rows.shape[1]
        y, mask = targets_and_mask(n)
        acc, temperature = (torch.float64 if dtype == torch.float64 else torch.float32), torch.linspace(0.5, 1.5, n)
        temperature, cuts = temperature.to(acc), CUTS[count]
        got = merged(module, of_parts(reference, rows, y, mask, temperature, cuts, softcap), y, mask, temperature, (kind, log_kept))
        state = got["state"]
        masses = of_masses(module, rows, y, mask, temperature, kind, state, cuts, softcap)
        want = whole(rows, y, mask, temperature, (kind, log_kept), softcap)
        tolerance = 1e-11 if dtype == torch.float64 else 2e-5
        assert_equal_rows(got, want, tolerance)
        of_same = of_masses(reference, rows.double(), y, mask, temperature.double(), kind, state.double(), cuts, softcap)
        undefined = state[:, State.REST].isnan()
        torch.testing.assert_close(masses[:, ~undefined].double(), of_same[:, ~undefined], rtol=tolerance, atol=tolerance)
        options = Options(1.0, IGNORE, kind, log_kept, True, True, softcap)
        results = with_kept(Results(*(got[name] for name in NAMES), None, None, state), masses, y, mask, options)
        torch.testing.assert_close(results.kept_logmass.double(), want["kept"], rtol=tolerance, atol=tolerance, equal_nan=True)


@every_isa
def test_confident_rows_keep_their_digits(backend):
    """The 1 of the row's maximum is nowhere in the sums, whichever part has it."""
    module = backends.select(torch.device("cpu"))
    for dtype, gap, tolerance in ((torch.float64, 31.7, 1e-12), (torch.float32, 21.1, 2e-6)):  # p = 1 - 1e-12, 1 - 4e-8
        rows = (torch.rand(4, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 2 - gap).to(dtype).unsqueeze(0)
        y = torch.tensor([[0], [20], [60], [30]])
        rows[0].scatter_(1, y, 0)
        want = whole(rows, y, None, 1.0)
        assert (want["logp"][:, 0] > -1e-7).all()
        for count in (3, 9):
            got = merged(module, of_parts(made_by(backend, count), rows, y, None, 1.0, CUTS[count]), y, None, 1.0)
            for name in ("logp", "entropy"):
                torch.testing.assert_close(got[name].double(), want[name], rtol=tolerance, atol=0)
            torch.testing.assert_close(got["state"][:, State.REST].double(), want["state"][:, State.REST], rtol=tolerance, atol=0)


@every_isa
def test_many_parts_and_many_targets(backend):
    """As many as ranks of a large group."""
    module = backends.select(torch.device("cpu"))
    g = torch.Generator().manual_seed(0)
    parts = torch.randn(130, 3, State.TARGETS + 40, generator=g, dtype=torch.float64)
    parts[..., State.REST : State.TARGETS].exp_()
    parts[..., State.TARGETS :][torch.rand(130, 3, 40, generator=g) < 0.97] = NAN
    parts[::7, :, State.MAX] = -INF
    parts[::7, :, State.REST] = NAN
    parts[::7, :, State.TARGETS :] = torch.where(parts[::7, :, State.TARGETS :].isnan(), NAN, -INF)
    y = torch.zeros(3, 40, dtype=torch.int64)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        got = merged(module, parts.to(dtype), y, None, 0.9)
        assert_equal_rows(got, merged(reference, parts.to(dtype).double(), y, None, 0.9), tolerance)
        assert torch.isnan(got["logp"]).any() and not torch.isnan(got["logp"]).all()


@every_isa
def test_part_of_minus_infinities(backend):
    """MAX is -inf, and a target is -inf if it is in the part and NaN elsewhere. Nothing else of it counts."""
    module = backends.select(torch.device("cpu"))
    x, y = torch.full((1, 2, 10), -INF), torch.tensor([[3, 17, 5], [17, 9, IGNORE]])
    x[0, 1, 4] = NAN  # this one is not of -inf alone
    (state,) = of_parts(module, x, y, None, 1.0, (0, 10))
    assert state[0, State.MAX] == -INF and not state[1, State.MAX] == -INF
    assert state[0, State.TARGETS] == -INF and state[0, State.TARGETS + 1].isnan() and state[0, State.TARGETS + 2] == -INF
