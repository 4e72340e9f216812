"""The C++ kernels, on every instruction set here, against the reference in float64 on the same inputs."""

import math
import os
import subprocess
import sys

import pytest
import torch

from rlkern.backends import reference
from rlkern.backends.contract import State

native = pytest.importorskip("rlkern.backends.native", reason="built without the CPU kernels")
_cpu = pytest.importorskip("rlkern._cpu")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INF = math.inf
# Relative size of one rounding of the gradient, and the error of float32 (float64) accumulation.
ROUNDING = {torch.float32: 0.0, torch.float64: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5, torch.float64: 1e-12}


@pytest.fixture(params=native.isas())
def isa(request):
    before = native.isa()
    native.use_isa(request.param)
    yield request.param
    native.use_isa(before)


def empty(shape, dtype):
    return torch.full(shape, math.nan, dtype=dtype)


def run(backend, logits, targets=None, mask=None, temperature=1.0, ignore_index=-100, kept=(0, 0.0), sum_sq=False, grads=(), out=None):
    """Forward, and backward if `grads` names upstream gradients, into NaN-filled memory. logits [A, B, V]."""
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    n, k = logits.shape[0] * logits.shape[1], 0 if targets is None else targets.shape[1]
    result = {
        "logp": empty((n, k), acc) if k else None,
        "entropy": empty((n,), acc),
        "logsumexp": empty((n,), acc),
        "sum_sq_prob": empty((n,), acc) if sum_sq else None,
        "kept_logmass": empty((n,), acc) if kept[0] else None,
        "state": empty((n, State.TARGETS + k), acc),
    }
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.to(acc)
    args = (targets, mask, temperature, ignore_index)
    backend.token_stats_forward(logits, *args, *kept, tuple(result.values()))
    if grads:
        upstream = [grads[name].to(acc) if name in grads else None for name in result if name != "state"]
        result["gradient"] = torch.full(logits.shape, math.nan, dtype=logits.dtype) if out is None else out
        backend.token_stats_backward(logits, *args, kept[0], result["state"], upstream, result["gradient"])
    return result


def compare(logits, *, atol=None, **options):
    """Runs both; returns the native result."""
    expected = run(reference, logits.double(), **options)
    got = run(native, logits, **options)
    tolerance = TOLERANCE[logits.dtype] if atol is None else atol
    for name, value in got.items():
        if value is None or name == "state":
            continue
        rounding = ROUNDING[logits.dtype] if name == "gradient" else 0
        smallest = 2**-24 if logits.dtype == torch.float16 else 0  # half precision's subnormal step
        torch.testing.assert_close(
            value.double(), expected[name], rtol=max(tolerance, rounding), atol=max(tolerance * (0.1 if name == "gradient" else 1), smallest),
            equal_nan=True, msg=lambda m, name=name: f"{name}: {m}",
        )  # fmt: skip
    return got


def example(shape=(2, 3), vocab=1000, dtype=torch.float32, k=1, scale=3.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    n = shape[0] * shape[1]
    logits = (torch.randn(*shape, vocab, generator=g, dtype=torch.float64) * scale).to(dtype)
    targets = torch.randint(0, vocab, (n, k), generator=g)
    grads = {name: torch.randn(n, generator=g, dtype=torch.float64) for name in ("entropy", "logsumexp")}
    grads["logp"] = torch.randn(n, k, generator=g, dtype=torch.float64)
    return logits, targets, grads


@pytest.mark.parametrize("vocab", [7, 33, 2049, 5001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tails(isa, dtype, vocab):
    for k in (1, 5, 16, 40):
        logits, targets, grads = example((4, 2), vocab=vocab, dtype=dtype, k=k)
        targets[1, 1:] = -100
        targets[2] = targets[2, 0]
        targets[3] = (targets[3, 0] // 7 * 7 + torch.arange(k) // 2) % vocab  # side by side, twice each
        targets[4] = -100
        grads |= {"tail_logmass": grads["entropy"].flip(0)}
        for some in (grads, {"tail_logmass": grads["tail_logmass"]}):
            kept = {name.replace("tail", "kept"): g for name, g in some.items()}
            compare(logits, targets=targets, grads=kept, kept=(3, 0.0), sum_sq=k == 5, temperature=0.7)


@pytest.mark.parametrize("vocab", [1, 2, 7, 16, 33, 1000, 2047, 2048, 2049, 5001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_statistic_and_gradient(isa, dtype, vocab):
    logits, targets, grads = example(vocab=vocab, dtype=dtype)
    compare(logits, targets=targets, grads=grads)
    compare(logits, targets=targets, grads={"logp": grads["logp"]})
    compare(logits, grads={"entropy": grads["entropy"]})
    compare(logits, targets=targets, grads={**grads, "sum_sq_prob": grads["entropy"].flip(0)}, sum_sq=True)
    for kept in ((1, math.log(0.05)), (2, math.log(0.002)), (2, math.log(0.999))):
        compare(logits, targets=targets, grads={**grads, "kept_logmass": grads["entropy"].flip(0)}, kept=kept)
    everything = {**grads, "sum_sq_prob": grads["entropy"].flip(0), "kept_logmass": grads["logsumexp"].flip(0)}
    compare(logits, targets=targets, grads=everything, kept=(1, math.log(0.3)), sum_sq=True, temperature=0.7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_misaligned_rows(isa, dtype):
    logits, targets, grads = example((3, 5), 515, dtype)
    inner = {"targets": targets[:12], "grads": {name: g[:12] for name, g in grads.items()}}
    compare(logits[:, :-1], **inner)  # a slice: two row strides
    compare(logits[..., 1:-1], targets=targets.clamp_max(512), grads=grads)  # rows that start one element off
    compare(logits.transpose(0, 1), targets=targets, grads=grads)
    compare(logits[:1, :1].expand(3, 5, 515), targets=targets, grads=grads)  # stride 0
    out = torch.full((3, 7, 600), math.nan, dtype=dtype)
    result = run(native, logits, targets=targets, grads=grads, out=out[:, 1:-1, 3:518])
    assert torch.equal(result["gradient"], run(native, logits, targets=targets, grads=grads)["gradient"])
    untouched = torch.ones_like(out, dtype=torch.bool)
    untouched[:, 1:-1, 3:518] = False
    assert out[untouched].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_temperature(isa, dtype):
    logits, targets, grads = example(dtype=dtype)
    compare(logits, targets=targets, grads=grads, temperature=0.3)
    # Powers of two: the same number in float32 as in the float64 oracle.
    compare(logits, targets=targets, grads=grads, temperature=torch.tensor([0.25, 0.5, 1, 2, 4, 64]))
    got = run(native, logits, targets=targets, grads=grads, temperature=torch.tensor([1.0, 0.0, -1.0, math.nan, 2.0, 1.0]))
    for name in ("logp", "entropy", "logsumexp", "gradient"):
        bad = got[name].reshape(6, -1).isnan()
        assert bad[1:4].all() and not bad[[0, 4, 5]].any(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_skipped_rows_are_zero_and_not_read(isa, dtype):
    logits, targets, grads = example(dtype=dtype, k=2)
    options = {"kept": (1, -1.0), "sum_sq": True}
    grads = {**grads, "sum_sq_prob": grads["entropy"], "kept_logmass": grads["entropy"]}
    mask = torch.tensor([True, False, True, True, True, True])
    targets[2] = -7
    targets[3, 0] = -7  # one of two entries: the row counts
    grads = {name: g.clone() for name, g in grads.items()}
    for g in grads.values():
        g[4] = 0  # nothing flows back: a zero gradient
    logits.view(6, -1)[[1, 2]] = math.nan
    logits[1, 1, 3] = math.nan
    got = run(native, logits, targets=targets, mask=mask, ignore_index=-7, grads=grads, **options)
    for name, value in got.items():
        assert (value.reshape(6, -1)[[1, 2]] == 0).all(), name
    assert (got["gradient"].view(6, -1)[4] == 0).all() and got["entropy"][4].isnan()
    logits = logits.nan_to_num(0.0)
    compare(logits, targets=targets, mask=mask, ignore_index=-7, grads=grads, **options)


def test_ignore_index_may_be_a_token_id(isa):
    logits, targets, grads = example(vocab=50)
    targets[:3] = 0
    compare(logits, targets=targets, ignore_index=0, grads=grads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_targets_with_duplicates(isa, dtype):
    logits, targets, grads = example(vocab=300, dtype=dtype, k=5)
    targets[:, 1] = targets[:, 0]
    targets[0, 2:] = targets[0, 0]
    targets[1, 3] = -100
    compare(logits, targets=targets, grads=grads, kept=(1, -2.0))
    compare(logits, targets=targets, grads={"logp": grads["logp"]})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [5, 64, 4100])
def test_minus_infinity_anywhere(isa, dtype, vocab):
    logits, targets, grads = example((3, 3), vocab, dtype)
    grads["kept_logmass"] = grads["sum_sq_prob"] = grads["entropy"].flip(0)
    rows = logits.view(9, vocab)
    half = min(2048, vocab // 2)
    rows[0, :half] = -INF  # the first tile
    rows[1, half:] = -INF  # the last
    rows[2, 2] = -INF
    rows[3, :-1] = -INF  # all but one
    rows[4, 1:] = -INF
    rows[5, ::2] = -INF
    rows[6] = -INF  # not a distribution
    targets[:6, 0] = torch.tensor([vocab - 1, 0, 1, vocab - 1, 0, 1])
    targets[7, 0] = 2
    rows[7, 2] = -INF  # the target itself
    got = compare(logits, targets=targets, grads=grads, sum_sq=True, kept=(1, -1.0))
    assert got["logsumexp"][6] == -INF and got["entropy"][6].isnan() and got["logp"][6].isnan().all()
    at_infinity = (rows == -INF).scatter(1, targets, False)
    at_infinity[6] = False
    assert (got["gradient"].view(9, vocab)[at_infinity] == 0).all()
    compare(logits, targets=targets, grads={"logp": grads["logp"]})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [0, 17, 2050, 4099])
@pytest.mark.parametrize("value", [math.nan, -math.nan, INF])
def test_nan_and_infinity_are_never_hidden(isa, dtype, position, value):
    logits, targets, grads = example((1, 2), 4100, dtype)
    logits[0, 1, position] = value
    targets[1] = position
    got = compare(logits, targets=targets, grads=grads)
    assert got["entropy"][1].isnan() and got["logp"][1].isnan() and not got["entropy"][0].isnan()
    if math.isnan(value):
        assert got["gradient"][0, 1].isnan().all() and got["logsumexp"][1].isnan()
    logits[0, 1, :position] = -INF
    got = run(native, logits, targets=targets, grads=grads)
    assert got["entropy"][1].isnan() and got["logp"][1].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("offset", [1e4, -1e4, 1e30, -1e30])
def test_a_common_offset_changes_nothing(isa, dtype, offset):
    logits = torch.zeros(1, 2, 3000, dtype=dtype)
    step = torch.tensor(offset, dtype=dtype).abs().double()
    logits[0, 0, ::3] = -float(2 ** math.floor(math.log2(step)) / 128)  # far below after the offset, too: a spacing that every dtype holds
    logits = (logits.double() + float(torch.tensor(offset, dtype=dtype))).to(dtype)
    targets, grads = torch.tensor([[1], [2]]), example((1, 2), 3000)[2]
    got = compare(logits, targets=targets, grads=grads)
    assert got["entropy"][1].sub(math.log(3000)).abs() < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [0, 2100, 4999])
def test_confident_rows_keep_relative_accuracy(isa, dtype, position):
    """p_max = 1 - 9e-8: log-probability, entropy and gradient to 1e-4 of themselves, not of 1."""
    logits = torch.zeros(1, 1, 5000, dtype=dtype)
    logits[0, 0, position] = 24.75  # 5000 e^-24.75 = 9e-8
    options = {"targets": torch.tensor([[position]]), "grads": {"logp": torch.ones(1, 1), "entropy": torch.full((1,), 0.1)}}
    got, expected = run(native, logits, **options), run(reference, logits.double(), **options)
    for name in ("logp", "entropy"):
        torch.testing.assert_close(got[name].double(), expected[name], rtol=1e-5 if dtype != torch.float64 else 1e-12, atol=0)
    if dtype != torch.float16:  # its smallest number is 6e-8
        torch.testing.assert_close(got["gradient"].double(), expected["gradient"], rtol=max(1e-5, ROUNDING[dtype]), atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.1, 3.0, 12.0])
def test_statistics_are_as_exact_as_float32(isa, dtype, scale):
    """Largest error over the largest value. Eager PyTorch's logp of float32 logits is off by 6e-8 to 7e-8,
    its entropy by 1e-7 to 5e-7."""
    logits = torch.randn(1, 16, 9001, generator=torch.Generator().manual_seed(0)).mul_(scale).to(dtype)
    options = dict(targets=torch.arange(16).unsqueeze(-1) * 500, sum_sq=True, grads={"logp": torch.ones(16, 1), "entropy": torch.ones(16)})
    got, exact = run(native, logits, **options), run(reference, logits.double(), **options)
    limits = {"logp": 7e-8, "logsumexp": 7e-8, "entropy": 1.3e-7, "sum_sq_prob": 4e-7, **({"gradient": 1e-7} if dtype == torch.float32 else {})}
    errors = {name: ((got[name].double() - exact[name]).abs().max() / exact[name].abs().max()).item() for name in limits}
    assert all(errors[name] < limit for name, limit in limits.items()), errors


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_at_the_maximum(isa, dtype):
    logits = torch.full((1, 4, 6000), -20.0, dtype=dtype)
    logits[0, 0, [3, 7]] = 5.0  # in one tile
    logits[0, 1, [3, 2100, 5999]] = 5.0  # in three
    logits[0, 2, 4] = 4.0
    logits[0, 2, [2049, 2050]] = 5.0  # after a smaller maximum
    logits[0, 3] = 0.0
    targets, grads = torch.tensor([[3], [5999], [4], [1]]), example((1, 4))[2]
    got = compare(logits, targets=targets, grads=grads, sum_sq=True, kept=(1, 0.0))
    entropies = []
    for levels in (((5, 2), (-20, 5998)), ((5, 3), (-20, 5997)), ((5, 2), (4, 1), (-20, 5997)), ((0, 6000),)):  # (logit, how many)
        total = math.fsum(n * math.exp(x) for x, n in levels)
        entropies.append(math.log(total) - math.fsum(n * math.exp(x) * x for x, n in levels) / total)
    torch.testing.assert_close(got["entropy"].double(), torch.tensor(entropies, dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_gradient_has_the_same_bits(isa, dtype):
    logits, targets, grads = example((2, 4), 777, dtype, k=2)
    expected = run(native, logits, targets=targets, grads=grads)["gradient"]
    whole = torch.cat([logits, logits], 1)
    mine = whole[:, :4]
    run(native, mine, targets=targets, grads=grads, out=mine)
    assert torch.equal(mine, expected) and torch.equal(whole[:, 4:], logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_too_large_for_the_caches_has_the_same_bits(isa, dtype):
    vocab = 40_009  # odd: rows start anywhere between the addresses that vectors are streamed to
    rows = 2**25 // (vocab * dtype.itemsize) + 1
    logits = torch.randn(1, rows, vocab, generator=torch.Generator().manual_seed(0)).to(dtype)
    options = dict(targets=torch.arange(rows).unsqueeze(-1), grads={"logp": torch.ones(rows, 1), "entropy": torch.linspace(-1, 1, rows)})
    in_place = logits.clone()
    run(native, in_place, out=in_place, **options)
    assert torch.equal(run(native, logits, **options)["gradient"], in_place)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_is_rounded_to_nearest_even(isa, dtype):
    """Upstream gradients over the dtype's whole range, subnormals included, against torch's own
    conversion."""
    logits = torch.zeros(1, 512, 2, dtype=dtype)
    g = torch.randn(512, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).exp().mul(2.0 ** torch.linspace(-30, 17, 512)).float()
    got = run(native, logits, grads={"logsumexp": g})["gradient"]
    assert torch.equal(got[0, :, 0], (g * 0.5).to(dtype))
    assert torch.equal(run(native, logits, grads={"logsumexp": torch.full((512,), math.nan)})["gradient"].isnan(), torch.ones(1, 512, 2) > 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_on_the_row_alone(isa, dtype):
    """The same row anywhere in any batch on any number of threads: the same bits."""
    logits, targets, grads = example((4, 9), 5003, dtype)
    options = {"kept": (1, -3.0), "sum_sq": True}
    grads["sum_sq_prob"] = grads["entropy"]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = []
        for r in range(36):
            mine = {"targets": targets[r : r + 1], "grads": {name: g[r : r + 1] for name, g in grads.items()}}
            alone.append(run(native, logits[r // 9, r % 9].clone()[None, None], **mine, **options))
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            got = run(native, logits, targets=targets, grads=grads, **options)
            for name, value in got.items():
                assert torch.equal(value.reshape(36, -1), torch.cat([one[name].reshape(1, -1) for one in alone])), (name, count)
    finally:
        torch.set_num_threads(threads)


def test_target_out_of_range(isa):
    logits, targets, _ = example(vocab=50)
    for wrong in (50, -1, 2**40, -(2**62)):
        bad = targets.clone()
        bad[4] = wrong
        with pytest.raises(IndexError, match=rf"target {wrong} of row 4 is out of range for 50 logits"):
            run(native, logits, targets=bad)
        mask = torch.arange(6) != 4
        assert run(native, logits, targets=bad, mask=mask)["logp"][4] == 0
    row, state = [empty((6,), torch.float32) for _ in range(2)], empty((6, State.TARGETS + 1), torch.float32)
    untouched = (empty((6, 1), torch.float32), *row, None, None, state)
    bad = targets.clone()
    bad[5] = 50
    with pytest.raises(IndexError, match="target 50 of row 5 is out of range for 50 logits"):
        native.token_stats_forward(logits, bad, None, 1.0, -100, 0, 0.0, untouched)
    assert all(t.isnan().all() for t in untouched if t is not None)


def test_state_is_interchangeable_with_the_reference(isa):
    logits, targets, grads = example((2, 3), 3000, torch.float32, k=2)
    grads = {**grads, "kept_logmass": grads["entropy"], "sum_sq_prob": grads["entropy"]}
    options = {"targets": targets, "kept": (2, -7.0), "sum_sq": True, "temperature": 1.5, "grads": grads}
    mine, theirs = run(native, logits, **options), run(reference, logits, **options)
    torch.testing.assert_close(mine["state"], theirs["state"], rtol=1e-5, atol=1e-5)
    upstream = [grads[name].float() for name in ("logp", "entropy", "logsumexp", "sum_sq_prob", "kept_logmass")]
    for backend, state in ((native, theirs["state"]), (reference, mine["state"])):
        out = torch.full_like(logits, math.nan)
        backend.token_stats_backward(logits, targets, None, 1.5, -100, 2, state, upstream, out)
        torch.testing.assert_close(out, mine["gradient"], rtol=1e-5, atol=1e-7)


def test_the_environment_chooses_the_instruction_set():
    def ask(name):
        env = {**os.environ, "RLKERN_CPU_ISA": name}
        command = [sys.executable, "-c", "from rlkern.backends import native; print(native.isa())"]
        return subprocess.run(command, env=env, capture_output=True, text=True)

    assert ask("baseline").stdout.strip() == "baseline"
    wrong = ask("mmx")
    assert wrong.returncode != 0 and "'mmx' is unknown or not supported" in wrong.stderr and "baseline" in wrong.stderr
    with pytest.raises(ValueError, match="'mmx' is unknown"):
        native.use_isa("mmx")


def test_arguments_have_names():
    values, valid, out = torch.zeros(3), torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)
    call = {"n": 3, "values": values, "valid": valid, "count": torch.tensor(1), "out": out}
    dtype = _cpu.constants["DType"].index("float32")
    _cpu.select_bottom(dtype, dict(reversed(call.items())))
    assert out.tolist() == [True, False, False]
    for name in call:
        with pytest.raises(TypeError, match=f"missing argument: {name}"):
            _cpu.select_bottom(dtype, {key: value for key, value in call.items() if key != name})
    with pytest.raises(TypeError, match="expected 5 arguments, got .*'mask'"):
        _cpu.select_bottom(dtype, {**call, "mask": valid})
    for wrong in ({"n": "3"}, {"n": 2.5}, {"values": 17}):
        with pytest.raises((TypeError, RuntimeError, AttributeError)):
            _cpu.select_bottom(dtype, {**call, **wrong})
