"""The benchmarks run, and their arithmetic is right. No clock is looked at: see `make bench-check`."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from rlkern import reference

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import accuracy  # noqa: E402
import check  # noqa: E402
import contenders  # noqa: E402
import measure  # noqa: E402
import run  # noqa: E402
import sanitize  # noqa: E402
import shared_card  # noqa: E402
import table  # noqa: E402

# Of the peers TRL's function runs anywhere, its kernel interpreted; Liger's return something else.
HERE = [c for c in contenders.contenders("cpu")[0] if not c.slow and not c.name.startswith("Liger")]


@pytest.mark.parametrize("contender", HERE, ids=lambda c: f"{c.computes}: {c.name}")
def test_contenders_compute_what_they_say(contender):
    case = measure.Case("cpu", "fp32", 16, 50, contender.computes)
    x, y, grads = measure.inputs(case)
    other, targets = y if contender.computes in measure.PAIRS else (None, y)
    exact_x = x.double().requires_grad_()
    stats = reference.token_stats(exact_x, targets.unsqueeze(-1))
    known = {"logp": stats.logp.squeeze(-1), "entropy": stats.entropy}
    names = contender.computes.split("+")
    exact = [known[name] if name in known else reference.token_divergence(exact_x, other.double(), name) for name in names]
    leaf = x.clone().requires_grad_()
    outputs = contender.forward(leaf * 1.0, y)
    exact = [torch.copysign(wanted, got.detach().double()) for got, wanted in zip(outputs, exact, strict=True)]  # some return -logp
    for got, wanted in zip(outputs, exact, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    (d_x,) = torch.autograd.grad(outputs, leaf, grads[: len(outputs)])
    (wanted,) = torch.autograd.grad(exact, exact_x, [g.double() for g in grads[: len(outputs)]])
    torch.testing.assert_close(d_x.double(), wanted, rtol=1e-4, atol=1e-6)


def test_an_absent_peer_says_so_in_a_line(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    _, absent = contenders.contenders("cpu")
    assert {line.split(":")[0] for line in absent} - {"TRL GKD"} == {"TRL", "Liger", "flash-attn", "quack"}
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found, absent = contenders.contenders("cpu")
    assert {line.split(":")[0] for line in absent} | {c.name.split()[0] for c in found if c.kind == "peer"} >= {"TRL", "Liger", "flash-attn", "quack"}
    assert contenders.contenders("cpu", peers=False)[1] == [] and all(c.kind != "peer" for c in contenders.contenders("cpu", peers=False)[0])
    with pytest.raises(ImportError, match="no_such_package is not installed"):
        contenders.load_file("no_such_package", "kernels.py")
    with pytest.raises(ImportError, match="rlkern has no no_such_function in checks.py"):
        contenders._load_function("rlkern", "checks.py", "no_such_function")


def test_a_case_is_measured_and_printed():
    case = measure.Case("cpu", "bf16", 8, 100, contenders.BOTH)

    def refuses(x, y):
        raise RuntimeError("not on this machine")

    asked = [*HERE, contenders.Contender("broken", contenders.BOTH, refuses), contenders.Contender("slow", contenders.BOTH, refuses, slow=True)]
    measured = json.loads(json.dumps(measure.run_case(case, asked, rounds=2, log=lambda line: None, skip_slow=True)))
    assert {r["name"] for r in measured["results"]} == {c.name for c in HERE if c.computes == contenders.BOTH}
    assert "not on this machine" in measured["skipped"]["broken"] and "slow" in measured["skipped"]
    for entry in measured["results"]:
        assert entry["total"]["ms"] > 0 and entry["logp_error"] < 0.1
    text = table.render(measured)
    assert "rlkern, in place" in text and "not measured: broken" in text
    assert "rlkern" in table.compact(measured)


@pytest.mark.parametrize("computes", measure.PAIRS)
def test_pairs_are_measured_as_they_come_and_replayed(computes):
    case = measure.Case("cpu", "bf16", 8, 100, computes)
    mine = [c for c in HERE if c.computes == computes]
    assert {"rlkern", "rlkern, in place", contenders.EAGER} <= {c.name for c in mine}
    for replayed in (False, True):
        measured = json.loads(json.dumps(measure.run_case(case, HERE, rounds=2, log=lambda line: None, replayed=replayed)))
        assert {r["name"] for r in measured["results"]} == {c.name for c in mine if not (replayed and c.in_place)}
        assert all(r["logp_error"] < 0.1 for r in measured["results"])
        assert "eager" in table.ratios(measured)["rlkern"] and measured["passes"] == (7 if computes == "jsd" else 5)
        assert computes in table.render(measured)


def test_close_pairs_are_judged_by_sums_that_keep_their_digits():
    z, w = accuracy.close_pair(torch.float32, 1e-1, rows=4, vocab=50)
    for kind in accuracy.PAIR_KINDS:
        exact = accuracy.exact_pair(kind)(z.double(), w.double())
        torch.testing.assert_close(exact, reference.token_divergence(z.double(), w.double(), kind), rtol=1e-12, atol=0)
        for noise, eager_is_off in ((1e-1, 0), (1e-5, 1)):
            found = accuracy.pair_errors(kind, *accuracy.close_pair(torch.float32, noise, rows=4, vocab=300))
            assert max(found["reference"]) < 1e-5 and found["eager"][0] > eager_is_off


def test_in_place_contenders_find_the_same_logits_in_every_round():
    case = measure.Case("cpu", "fp32", 4, 40, contenders.LOGP)
    x, y, grads = measure.inputs(case)
    in_place = next(c for c in HERE if c.in_place and c.computes == contenders.LOGP)
    one = measure._Run(in_place, case, x, y, grads, x.clone())
    before = x.clone()
    one.warm_up(measure.clock("cpu"))
    one.once(measure.clock("cpu"))
    assert torch.equal(x, before)


def test_cpu_peak_memory_sees_a_tensor():
    peak = measure.peak_memory("cpu", [lambda _: torch.ones(16 << 20), lambda x: x.sum()])
    if peak is None:
        pytest.skip("this system keeps no resettable peak of a process's memory")
    assert 60 << 20 < peak < 160 << 20


def fake_case(**ms):
    entry = {"in_place": False, "peak_bytes": 0, "logp_error": 0.0}
    phases = {name: {"ms": t, "spread": 0.0, "min_ms": t, "of_copy": 0.5} for name, t in (("forward", 1.0), ("backward", 1.0))}
    kinds = {"rlkern": "rlkern", contenders.EAGER: "eager", "eager other": "eager", "compiled": "compiled"}
    results = [{"name": n, "kind": kinds[n], **entry, **phases, "total": {**phases["forward"], "ms": t}} for n, t in ms.items()]
    case = {"device": "cpu", "dtype": "bf16", "rows": 8, "vocab": 100, "computes": contenders.BOTH}
    return {**case, "rounds": 1, "copy_ms": 1.0, "copy_gb_s": 1.0, "results": results, "skipped": {}}


def test_ratios():
    case = fake_case(**{"rlkern": 2.0, contenders.EAGER: 60.0, "eager other": 40.0, "compiled": 10.0})
    assert table.ratios(case)["rlkern"] == {"eager": 30.0, "best eager": 20.0, "compiled": 5.0}
    assert table.ratios(case)["compiled"]["eager"] == 6.0


def test_the_bytes_that_must_move():
    case = measure.Case("cpu", "bf16", 8192, 151_936, contenders.BOTH)
    wanted = {contenders.BOTH: [2, 4, 6], **dict.fromkeys(measure.PAIRS, [4, 6, 10]), "jsd": [8, 6, 14]}
    for computes, by_logit in wanted.items():
        sizes = [measure.design_bytes(case._replace(computes=computes), p) for p in ("forward", "backward", "total")]
        assert [size / (8192 * 151_936) for size in sizes] == by_logit


def test_a_fall_of_more_than_the_tolerance_is_found():
    now = {"rlkern": 26.0, "rlkern, in place": 33.0}
    assert check.compare({"rlkern": 30.0, "rlkern, in place": 40.0}, now, 0.15) == {"rlkern, in place": 33 / 40}
    assert check.compare({"rlkern": 30.0}, {}, 0.15) == {"rlkern": 0.0}
    assert check.compare({"rlkern": 30.0}, {"rlkern": 60.0}, 0.15) == {}


def test_committed_results_are_matched_by_machine(tmp_path):
    cpu = {"cpu": "A", "threads": 2, "native": "available, avx2 (built: avx2)"}
    for name, machine in (("cpu-a-2026-01-02", cpu), ("cpu-b-2026-01-03", {**cpu, "cpu": "B"}), ("cpu-a-2026-01-01", cpu)):
        run.save({"machine": machine, "cases": [fake_case(rlkern=1.0, **{contenders.EAGER: 20.0})]}, str(tmp_path), name)
    assert check.find_committed(cpu, "cpu", str(tmp_path)).endswith("cpu-a-2026-01-02.json")
    assert check.find_committed({**cpu, "cpu": "C"}, "cpu", str(tmp_path)).endswith("cpu-b-2026-01-03.json")
    assert check.find_committed(cpu, "cuda", str(tmp_path)) is None
    assert not check.same_machine(cpu, {**cpu, "native": "available, avx512 (built: avx512)"})


def test_the_default_sets_hold_the_sizes_that_are_reported():
    cpu, cuda, full = run.default_cases("cpu"), run.default_cases("cuda"), run.default_cases("cuda", full=True)
    assert {(c.rows, c.vocab) for c in cpu} >= {(512, 32_768), (128, 151_936)} and {c.dtype for c in cpu} == {"bf16", "fp32"}
    assert cuda == full[: len(cuda)] and {c.vocab for c in full if c.rows == 8192} == set(run.VOCABULARIES)
    shapes = [(8192, 151_936), (16_384, 32_768), (64, 151_936), (4096, 262_144)]
    assert [(c.dtype, c.rows, c.vocab) for c in cuda if c.computes == contenders.BOTH] == [(t, *s) for t in ("bf16", "fp32") for s in shapes]
    assert [(c.rows, c.vocab) for c in cuda if c.computes == contenders.LOGP] == shapes[:1]
    assert [measure.few_rows(c) for c in cuda if c.computes == contenders.BOTH] == [False, False, True, False] * 2
    for device, sizes in (("cpu", [(512, 32_768)]), ("cuda", shapes[:2])):
        pairs = [c for c in run.default_cases(device) if c.computes in measure.PAIRS]
        assert [(c.dtype, c.rows, c.vocab, c.computes) for c in pairs] == [("bf16", *size, kind) for size in sizes for kind in measure.PAIRS]
    assert {c.computes for c in cuda} == {c.computes for c in run.rehearsal_cases()}
    assert run.slug({"cpu": "Some CPU @ 2.0GHz"}, "cpu") == "cpu-some"


def test_a_replay_runs_every_call_and_gives_the_time_of_one(monkeypatch):
    called = []
    replay = measure.Replay([lambda i=i: called.append(i) for i in range(4)], device="cpu")

    def timer(device):
        def milliseconds(phase):
            phase(None)
            return [20.0]

        return milliseconds

    monkeypatch.setattr(measure, "clock", timer)
    assert called == [0, 1, 2, 3]  # to compile
    assert replay.ms() == 5.0 and called == [0, 1, 2, 3] * 2


def test_few_rows_are_replayed_and_the_backward_is_the_difference(monkeypatch):
    case = measure.Case("cpu", "fp32", 4, 40, contenders.BOTH)
    replays = []

    class Replay(measure.Replay):
        def __init__(self, calls, device):
            super().__init__(calls, device)
            replays.append(self)

        def ms(self):
            self.results = self.run()
            return 3.0 if len(self.results[0]) == 2 else 10.0  # (logp, entropy), or a gradient

    def refuses(x, y):
        if x.data_ptr() != refuses.first:
            raise RuntimeError("operation not permitted when stream is capturing")
        return contenders.log_softmax_both(x, y)

    honest = measure.inputs
    monkeypatch.setattr(measure, "inputs", lambda case: (drawn := honest(case), setattr(refuses, "first", drawn[0].data_ptr()))[0])
    monkeypatch.setattr(measure, "Replay", Replay)
    some = [c for c in HERE if c.name in ("rlkern", "rlkern, in place", contenders.EAGER)]
    asked = [*some, contenders.Contender("refuses", contenders.BOTH, refuses)]
    measured = measure.run_case(case, asked, rounds=2, log=lambda line: None, replayed=True)
    assert "capturing" in measured["skipped"]["refuses"] and "gradients for logits" in measured["skipped"]["rlkern, in place"]
    assert "rlkern" in {r["name"] for r in measured["results"]} and measured["replayed"]
    for entry in measured["results"]:
        assert [entry[phase]["ms"] for phase in ("forward", "backward", "total")] == [3.0, 7.0, 10.0]
    gradients = [r.results for r in replays if len(r.results[0]) != 2]
    for first, second in gradients:  # of equal logits in memory of their own
        assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()


def test_replayed_cases_are_judged_by_the_copy_of_the_largest():
    def measured(rows, copy_gb_s, replayed):
        case = {**fake_case(rlkern=2.0), "rows": rows, "copy_gb_s": copy_gb_s, "replayed": replayed, "copy_of": f"{rows} x 100 bf16"}
        return json.loads(json.dumps(case))

    cases = [measured(8, 4000.0, True), measured(64, 1000.0, False), measured(16, 2000.0, False)]
    for _ in range(2):  # once more changes nothing
        measure.share_copy(cases)
        assert [c["copy_gb_s"] for c in cases] == [1000.0, 1000.0, 2000.0] and cases[0]["copy_of"] == "64 x 100 bf16"
        assert [c["results"][0]["forward"]["of_copy"] for c in cases] == [2.0, 0.5, 0.5]
        assert cases[0]["copy_ms"] == pytest.approx(2 * 8 * 100 * 2 / 1000e6)


def test_the_overview_has_a_line_for_every_case():
    one, other = fake_case(**{"rlkern": 2.0, contenders.EAGER: 60.0, "compiled": 10.0}), fake_case(rlkern=4.0)
    other["results"].append({**other["results"][0], "name": "some peer", "kind": "peer", "total": {"ms": 6.0}})
    lines = table.overview([one, other, {**one, "results": []}]).splitlines()
    assert len(lines) == 3 and "30.00" in lines[1] and "5.00" in lines[1] and "some peer x 1.50" in lines[2]


def test_sanitize_finds_the_kernels_right_and_a_wrong_one_wrong(monkeypatch):
    variants = list(sanitize.variants())
    assert {v[0] for v in variants} == set(sanitize._TOLERANCE)
    some = [(dtype, 7, layout, {}) for dtype in sanitize._TOLERANCE for layout in ("rows", "slice", "odd stride", "in place")]
    some += [(torch.float32, sanitize.few_columns(options), "rows", options) for *_, options in variants if options]
    assert [sanitize.check(*v, device="cpu") for v in some] == [None] * len(some)
    honest = reference.token_stats
    monkeypatch.setattr(sanitize.reference, "token_stats", lambda x, *args, **options: honest(x * 1.01, *args, **options))
    assert "off by" in sanitize.check(torch.float32, 33, "rows", {}, device="cpu")


def test_a_worker_that_lost_the_card_ends(monkeypatch, request):
    ended, emptied = [], []
    monkeypatch.setattr(shared_card.os, "_exit", ended.append)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    shared_card.pytest_runtest_teardown(request.node)
    assert emptied and not ended

    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    shared_card.pytest_runtest_teardown(request.node)
    assert ended == [1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no GPU")
@pytest.mark.parametrize("script, options", [("run", ["--device", "cuda"]), ("check", ["--device", "cuda"]), ("sanitize", []), ("one_launch", [])])
def test_without_a_gpu_the_gpu_scripts_say_so(script, options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, *options])
    try:
        code = importlib.import_module(script).main()
    except SystemExit as stopped:
        code = stopped.code
    assert not code
    assert "no GPU here" in capsys.readouterr().out
