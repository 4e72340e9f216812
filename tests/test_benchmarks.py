"""The benchmarks run, and their arithmetic is right. Nothing here looks at a clock: speed is `make bench` and `make bench-check`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlkern import reference

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import check  # noqa: E402
import contenders  # noqa: E402
import gpu  # noqa: E402
import measure  # noqa: E402
import run  # noqa: E402
import sanitize  # noqa: E402
import sweep  # noqa: E402
import table  # noqa: E402

HERE = [c for c in contenders.contenders("cpu")[0] if not c.slow]


@pytest.mark.parametrize("contender", HERE, ids=lambda c: f"{c.computes}: {c.name}")
def test_contenders_compute_what_they_say(contender):
    case = measure.Case("cpu", "fp32", 16, 50, contender.computes)
    x, y, grads = measure.inputs(case)
    exact = reference.token_stats(x.double(), y.unsqueeze(-1))
    leaf = x.clone().requires_grad_()
    outputs = contender.forward(leaf * 1.0, y)
    assert len(outputs) == (2 if contender.computes == contenders.BOTH else 1)
    torch.testing.assert_close(outputs[0].abs().double(), exact.logp.squeeze(-1).abs(), rtol=1e-5, atol=1e-5)
    if contender.computes == contenders.BOTH:
        torch.testing.assert_close(outputs[1].double(), exact.entropy, rtol=1e-5, atol=1e-5)
    (d_x,) = torch.autograd.grad(outputs, leaf, grads[: len(outputs)])
    assert d_x.abs().sum() > 0


def test_an_absent_peer_says_so_in_a_line():
    _, absent = contenders.contenders("cpu")
    assert {line.split(":")[0] for line in absent} == {"TRL", "Liger", "flash-attn", "quack"}
    with pytest.raises(ImportError, match="no_such_package is not installed"):
        contenders._load_file("no_such_package", "kernels.py")


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
    assert [measure.design_bytes(case, p) / (8192 * 151_936) for p in ("forward", "backward", "total")] == [2, 4, 6]


def test_a_fall_of_more_than_the_tolerance_is_found():
    assert check.compare({"rlkern": 30.0, "rlkern, in place": 40.0}, {"rlkern": 26.0, "rlkern, in place": 33.0}, 0.15) == {
        "rlkern, in place": 33 / 40
    }
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
    cpu, cuda = run.default_cases("cpu"), run.default_cases("cuda", full=True)
    assert {(c.rows, c.vocab) for c in cpu} >= {(512, 32_768), (128, 151_936)} and {c.dtype for c in cpu} == {"bf16", "fp32"}
    assert {c.vocab for c in cuda} == set(run.VOCABULARIES) and {c.rows for c in cuda} == {8192}
    assert run.slug({"cpu": "Some CPU @ 2.0GHz"}, "cpu") == "cpu-some"


def test_the_sweep_changes_the_launch_shape_and_puts_it_back():
    from rlkern.triton_kernels import token_stats as kernels

    before = kernels.forward_shape
    with sweep.launch_shape("forward", (2048, 8)):
        assert tuple(kernels.forward_shape(1000, 2))[:2] == (2048, 8)
    assert kernels.forward_shape is before
    pairs = {shape[:2] for shape in sweep.shapes("forward")}
    assert (4096, 4) in pairs and (1024, 32) not in pairs
    assert all(len(shape) == len(kernels.backward_shape(1000, 2)) for shape in sweep.shapes("backward"))


def test_sanitize_finds_the_kernels_right_and_a_wrong_one_wrong(monkeypatch):
    variants = list(sanitize.variants())
    assert {v[0] for v in variants} == set(sanitize._TOLERANCE)
    some = [(dtype, 7, layout, {}) for dtype in sanitize._TOLERANCE for layout in ("rows", "slice", "odd stride", "in place")]
    some += [(torch.float32, 33, "rows", options) for *_, options in variants if options]
    assert [sanitize.check(*v, device="cpu") for v in some] == [None] * len(some)
    honest = reference.token_stats
    monkeypatch.setattr(sanitize.reference, "token_stats", lambda x, *args: honest(x * 1.01, *args))
    assert "off by" in sanitize.check(torch.float32, 33, "rows", {}, device="cpu")


def test_a_step_that_fails_or_hangs_does_not_stop_the_others(tmp_path):
    session = gpu.Session(tmp_path)
    assert session.run("good", [sys.executable, "-c", "print('hello')"], 30)
    assert not session.run("bad", [sys.executable, "-c", "raise SystemExit(3)"], 30)
    assert not session.run("hangs", [sys.executable, "-c", "import time; time.sleep(60)"], 10)
    session.record("elsewhere", "skipped: not installed")
    assert [s["outcome"].split(",")[0].split(":")[0] for s in session.steps] == ["ok", "failed", "stopped after 10 s", "skipped"]
    assert session.failed() and "hello" in (tmp_path / "log.txt").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no GPU")
@pytest.mark.parametrize("script", ["run.py", "check.py", "sweep.py", "sanitize.py"])
def test_without_a_gpu_the_gpu_scripts_say_so(script):
    command = [sys.executable, str(ROOT / "benchmarks" / script)] + (["--device", "cuda"] if script in ("run.py", "check.py") else [])
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "no GPU here" in done.stdout
