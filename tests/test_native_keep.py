"""The C++ kernels over sets of kept ids, on every instruction set here, against the reference in float64.

The reference sees finite logits where the kernels see anything. Rows are longer than two tiles of 2048.
"""

import math

import pytest
import torch

from rlkern.backends import reference
from rlkern.backends.contract import Keep, KeptKind, Outside, SetKind, State

native = pytest.importorskip("rlkern.backends.native", reason="built without the CPU kernels")

INF, NAN = math.inf, math.nan
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-11}
KINDS = (SetKind.LISTS, SetKind.BITS, SetKind.MASK, SetKind.AT_LEAST)
ROWS, VOCAB = 8, 4200
_names = native.isas()
ISAS = [name for name in _names if name != "avx512" or "avx512_bf16" not in _names]  # they differ in rounding alone
_expected: dict = {}  # the reference's results, the same for every instruction set


@pytest.fixture(params=ISAS)
def isa(request):
    before = native.isa()
    native.use_isa(request.param)
    yield request.param
    native.use_isa(before)


def draw(vocab=VOCAB, dtype=torch.float32, seed=0, k=1):
    """(logits [2, 4, V] with few large ones, sets [8, V], targets [8, k])"""
    g = torch.Generator().manual_seed(seed)
    sets = torch.rand(ROWS, vocab, generator=g) < min(0.5, 30 / vocab)
    sets[1] = False
    sets[2, :] = True
    sets[3] = torch.arange(vocab) < 3  # all but the first tile is dropped
    sets[4] = torch.arange(vocab) == vocab - 2
    logits = torch.where(sets, torch.randn(ROWS, vocab, generator=g) + 4, torch.randn(ROWS, vocab, generator=g) - 4).to(dtype)
    targets = torch.randint(0, vocab, (ROWS, k), generator=g)
    targets[::2, 0] = sets[::2].int().argmax(-1)
    targets[5] = -100
    return logits.view(2, 4, vocab), sets, targets


def packed(sets, width=None):
    """[8, bytes], the bits beyond V set."""
    n, vocab = sets.shape
    bits = torch.ones(n, -(-vocab // 8) * 8, dtype=torch.uint8)
    bits[:, :vocab] = sets
    return (bits.view(n, -1, 8) << torch.arange(8, dtype=torch.uint8)).sum(-1).to(torch.uint8)


def keep_of(kind, sets, outside=Outside.INCLUDE, dtype=torch.float32, open_empty=False):
    if kind == SetKind.LISTS:
        ids = [row.nonzero()[:, 0] for row in sets]
        end = torch.tensor([len(i) for i in ids]).cumsum(0)
        return Keep(kind, torch.cat([*ids, torch.tensor([3, -7])]), outside, end - torch.tensor([len(i) for i in ids]), end, None, open_empty)
    if kind == SetKind.AT_LEAST:
        least = torch.zeros(ROWS, dtype=dtype)
        least[6] = NAN
        return Keep(kind, least, outside)
    sets = packed(sets) if kind == SetKind.BITS else sets
    wider = torch.cat([sets, sets[:, :1]], -1).view(2, 4, -1)  # rows that start anywhere
    return Keep(kind, wider[..., :-1], outside)


def run(backend, logits, targets, keep, *, kept=(0, 0.0), temperature=1.0, softcap=0.0, full=False, sum_sq=False, in_place=False, g_scale=None):
    """Everything that a backend writes, by name, into memory full of NaN."""
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    new = lambda *shape: torch.full(shape, NAN, dtype=acc)  # noqa: E731
    k = targets.shape[1]
    r = {"logp": new(ROWS, k), "entropy": new(ROWS), "logsumexp": new(ROWS), "sum_sq": new(ROWS) if sum_sq else None}
    r |= {"kept_logmass": new(ROWS) if kept[0] else None, "state": new(ROWS, State.TARGETS + k)}
    of_sets = [torch.zeros(ROWS, k, dtype=torch.bool), *((new(ROWS), new(ROWS), new(ROWS, 3)) if full else (None, None, None))]
    temperature = temperature.to(acc) if isinstance(temperature, torch.Tensor) else temperature
    backend.token_stats_forward(logits, targets, None, temperature, -100, *kept, tuple(r.values()), softcap, keep, of_sets)
    g = torch.Generator().manual_seed(1)
    grads = [None if r[name] is None else torch.randn(r[name].shape, generator=g, dtype=torch.float64).to(acc) for name in list(r)[:5]]
    grads[0] = grads[0].masked_fill(~of_sets[0], 0) if keep.outside == Outside.MINUS_INF else grads[0]
    if g_scale is not None:
        grads = [None if x is None else x * g_scale.to(acc).view(-1, *[1] * (x.dim() - 1)) for x in grads]
    of_full = (of_sets[3], torch.randn(ROWS, generator=g, dtype=torch.float64).to(acc), torch.ones(ROWS, dtype=acc)) if full else None
    out = logits if in_place else torch.full_like(logits, NAN)
    backend.token_stats_backward(logits, targets, None, temperature, -100, kept[0], r["state"], grads, out, softcap, keep, of_full)
    del r["state"]
    return r | dict(zip(("target_kept", "full_entropy", "full_logsumexp", "full_state"), of_sets, strict=True)) | {"gradient": out}


def compare(logits, sets, targets, kind, outside=Outside.INCLUDE, garbage=None, open_empty=False, **options):
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    keep = keep_of(kind, sets, outside, acc, open_empty)
    exact = keep._replace(sets=keep.sets.double()) if kind == SetKind.AT_LEAST else keep
    case = (kind, logits.dtype, logits.shape, targets.shape, outside, open_empty, repr(options))
    if case not in _expected:
        _expected[case] = run(reference, logits.double(), targets, exact, **options)
    want = dict(_expected[case])
    given = logits.clone()
    if garbage is not None:
        kept = sets if kind != SetKind.AT_LEAST else logits.view(ROWS, -1) >= 0
        whole = torch.zeros(ROWS, dtype=torch.bool)
        whole[6] = kind == SetKind.AT_LEAST  # its threshold is NaN
        whole |= ~sets.any(-1) if open_empty else False
        if outside == Outside.EVERYTHING:
            whole |= ~want["target_kept"].all(-1)
        inside = kept | whole.unsqueeze(-1)
        if outside == Outside.INCLUDE:
            inside = inside.scatter(-1, targets.clamp_min(0), True)
        given = torch.where(inside, logits.view(ROWS, -1), garbage).view(logits.shape)
    got = run(native, given, targets, keep, **options)
    assert torch.equal(got.pop("target_kept"), want.pop("target_kept"))
    for name, value in got.items():
        if value is not None:
            tolerance = ROUNDING[logits.dtype] if name == "gradient" else ROUNDING[acc]
            smallest = 2**-24 if logits.dtype == torch.float16 else 0
            torch.testing.assert_close(
                value.double(), want[name], rtol=tolerance, atol=max(ROUNDING[acc], smallest), equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
            )
    assert (got["gradient"] == 0).sum() >= (want["gradient"] == 0).sum()
    return got


@pytest.mark.parametrize("kind", KINDS)
def test_every_option(isa, kind):
    for seed, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16, torch.float64)):
        logits, sets, targets = draw(VOCAB if seed != 2 else 33, dtype, seed)
        t = torch.arange(1, ROWS + 1) / ROWS + 0.5
        garbage = -INF if kind == SetKind.AT_LEAST and seed == 1 else (NAN, INF, -INF, NAN)[seed]
        for outside in (Outside.INCLUDE, Outside.EVERYTHING, Outside.MINUS_INF)[seed % 2 :]:
            compare(logits, sets, targets, kind, outside, temperature=0.7, open_empty=True, garbage=garbage)
        compare(logits, sets, targets, kind, kept=(KeptKind.MIN_P, math.log(0.1)), sum_sq=True, softcap=5.0, temperature=t, garbage=garbage)
        compare(logits, sets, targets, kind, full=True, sum_sq=True, softcap=5.0 * (seed % 2), temperature=t)


@pytest.mark.parametrize("kind", KINDS)
def test_many_targets_and_tails(isa, kind):
    logits, sets, targets = draw(k=40)
    targets[0, :30] = sets[0].nonzero()[:, 0].repeat(30)[:30]  # in the list's order, then again
    for kept in ((KeptKind.NONE, 0.0), (KeptKind.UNLISTED, 0.0), (KeptKind.MIN_PROB, math.log(0.01))):
        compare(logits, sets, targets, kind, Outside.MINUS_INF, kept=kept, full=kept[0] == 0, softcap=20.0 * (kept[0] == 0))
        compare(logits, sets, targets[:, :5].contiguous(), kind, Outside.MINUS_INF, kept=kept)


@pytest.mark.parametrize("kind", KINDS)
def test_undefined_rows_are_zero_outside(isa, kind):
    """Without an entry above -inf, with a NaN, with infinite upstream gradients."""
    logits, sets, targets = draw()
    rows = logits.view(ROWS, -1)
    rows[0, targets[0]] = NAN if kind != SetKind.AT_LEAST else INF
    rows[4, sets[4]] = -INF if kind != SetKind.AT_LEAST else -1.0  # a threshold then keeps nothing
    rows[4, targets[4]] = -INF
    upstream = torch.ones(ROWS)
    upstream[3] = INF
    for full in (False, True):
        got = run(native, logits, targets, keep_of(kind, sets), full=full, g_scale=upstream)
        want = run(reference, logits.double(), targets, keep_of(kind, sets, dtype=torch.float64), full=full, g_scale=upstream)
        grad, expected = got["gradient"].view(ROWS, -1), want["gradient"].view(ROWS, -1)
        assert grad[4, targets[4]].isnan().all() and torch.equal(got["logp"].isnan(), want["logp"].isnan())
        for row in (0, 4):
            assert torch.equal(grad[row].isnan(), expected[row].isnan()), row
        if not full:
            dropped = ~sets[3] if kind != SetKind.AT_LEAST else rows[3] < 0
            assert (grad[3, dropped.scatter(0, targets[3], False)] == 0).all()


def test_threads_memory_and_forms_of_lists_do_not_change_a_bit(isa):
    """Rows long enough for several threads."""
    logits, sets, targets = draw(20_000, torch.bfloat16)
    before = torch.get_num_threads()
    try:
        for kind in KINDS:
            for full in (False, True):
                keep = keep_of(kind, sets)
                torch.set_num_threads(1)
                want = run(native, logits, targets, keep, full=full)
                torch.set_num_threads(3)
                got = run(native, logits, targets, keep, full=full)
                over = run(native, logits.clone(), targets, keep, full=full, in_place=True)
                for name in want:
                    if want[name] is not None:
                        assert torch.equal(want[name], got[name]) and torch.equal(want[name], over[name]), (kind, name)
    finally:
        torch.set_num_threads(before)
    lists = [row.nonzero()[:, 0] for row in sets]
    wide = max(map(len, lists)) + 3
    padded = torch.full((ROWS, wide), -1, dtype=torch.int32)
    for row, ids in enumerate(lists):
        padded[row, torch.randperm(wide, generator=torch.Generator().manual_seed(row))[: len(ids)].sort().values] = ids.int()
    other = run(native, logits, targets, Keep(SetKind.LISTS, padded.view(-1), Outside.INCLUDE))
    want = run(native, logits, targets, keep_of(SetKind.LISTS, sets))
    assert all(torch.equal(other[name], want[name]) for name in want if want[name] is not None)


@pytest.mark.parametrize("kind", [SetKind.LISTS, SetKind.BITS])
def test_gradients_past_the_caches(isa, kind):
    """Of 32 MB and more: written by other stores, to the same bits."""
    vocab = (1 << 20) + 24
    row = torch.randn(vocab, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([5, 4090, 70_000, vocab - 1])
    sets = torch.zeros(vocab, dtype=torch.bool).index_fill(0, ids, True)
    sets[4096:9000] = True

    def gradient(n):
        keep = Keep(kind, ids.repeat(n) if kind == SetKind.LISTS else packed(sets[None]).expand(1, n, -1), Outside.INCLUDE)
        logits, targets, state = row.expand(1, n, vocab), torch.full((n, 1), 70_001), torch.empty(n, State.TARGETS + 1)
        out = (torch.empty(n, 1), torch.empty(n), torch.empty(n), None, None, state)
        native.token_stats_forward(logits, targets, None, 1.0, -100, 0, 0.0, out, 0.0, keep, (torch.empty(n, 1, dtype=torch.bool), None, None, None))
        result = torch.full((1, n, vocab), NAN)
        native.token_stats_backward(
            logits, targets, None, 1.0, -100, 0, state, (torch.ones(n, 1), torch.ones(n), None, None, None), result, 0.0, keep
        )
        return result[0]

    alone, many = gradient(1), gradient(8)
    assert (alone[0, ids] != 0).all() and all(torch.equal(row, alone[0]) for row in many)


def test_lists_by_number():
    logits, sets, targets = draw()
    keep = keep_of(SetKind.LISTS, sets)
    number = torch.tensor([4, -1, 0, 0, 5, 900, 7, -9])  # row 5 is not read
    ends = keep.end.clone()
    ends[7] += 1000  # beyond the last id
    got = run(native, logits, targets, keep._replace(rows=number, end=ends, open_empty=True))
    sets = sets[number.clamp(0, 7)]
    sets[number < 0] = True
    sets[6, 3] = True  # what stands behind the lists
    want = run(native, logits, targets, keep_of(SetKind.MASK, sets))
    torch.testing.assert_close(got["logsumexp"], want["logsumexp"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got["gradient"], want["gradient"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lists_out_of_range(dtype):
    logits, sets, targets = draw()
    keep = keep_of(SetKind.LISTS, sets)
    ids = keep.sets.to(dtype)
    ids[keep.begin[5]] = VOCAB  # its row is not read
    run(native, logits, targets, keep._replace(sets=ids))
    ids[keep.begin[6] + 1] = VOCAB
    with pytest.raises(IndexError, match=f"keep holds the id {VOCAB} for row 6, out of range for {VOCAB} logits"):
        run(native, logits, targets, keep._replace(sets=ids))
    with pytest.raises(IndexError, match="keep names the list 8 for row 2, out of range for 8 lists"):
        run(native, logits, targets, keep._replace(rows=torch.tensor([0, 1, 8, 3, 4, 8, 6, 7])))


@pytest.mark.parametrize("kind", KINDS)
def test_idle_halves_are_not_computed(isa, kind):
    """Without an upstream gradient of the set, or of the full row, the other half alone counts."""
    logits, sets, targets = draw()
    keep = keep_of(kind, sets)
    zeros = torch.zeros(ROWS)
    of_full = run(native, logits, targets, keep, full=True, g_scale=zeros)["gradient"]
    want = run(reference, logits.double(), targets, keep_of(kind, sets, dtype=torch.float64), full=True, g_scale=zeros)["gradient"]
    torch.testing.assert_close(of_full.double(), want, rtol=1e-5, atol=1e-6)
    state = torch.full((ROWS, 3), NAN)  # not read
    of_set = run(native, logits, targets, keep)["gradient"]

    class Idle:
        token_stats_forward = staticmethod(native.token_stats_forward)

        @staticmethod
        def token_stats_backward(*args):
            native.token_stats_backward(*args[:-1], (state, zeros, None))

    assert torch.equal(run(Idle, logits, targets, keep)["gradient"], of_set)
