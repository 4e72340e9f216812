"""benchmarks/variants.py times variants that are right, and tabulates differences beyond the noise."""

import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import variants  # noqa: E402
from measure import Case  # noqa: E402

import rlkern  # noqa: E402
from rlkern.triton_kernels import launch, token_stats  # noqa: E402

NOW, OTHER = launch.ForwardShape(4096, 4, 3)._asdict(), launch.ForwardShape(2048, 2, 3)._asdict()


def timed(rows=8192, vocab=32_768, direction="forward", spread=0.01, **ms):
    names = {"now": NOW, "other": OTHER, "third": OTHER}
    entries = [{"name": n, "shape": names[n], "ms": t, "min_ms": t, "spread": spread, "gb_s": 1000 / t} for n, t in ms.items()]
    case = {"device": "cuda", "dtype": "bf16", "rows": rows, "vocab": vocab, "computes": "logp+entropy"}
    return {**case, "direction": direction, "rounds": 9, "copy_gb_s": 1000.0, "variants": sorted(entries, key=lambda e: e["ms"])}


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches on CPU tensors, in Triton's interpreter")
@pytest.mark.parametrize("direction", variants.DIRECTIONS)
@pytest.mark.parametrize("computes", variants.COMPUTES[:2])  # the mixture takes the same way as the KL
def test_every_variant_is_compared_and_timed(computes, direction):
    with rlkern.use_backend("triton"):
        operators = variants.Operators(Case("cpu", "fp32", 1, 700 if computes == "logp+entropy" else 300, computes))
        measured = variants.measure(operators, direction, rounds=1, deadline=math.inf)
        names = [e["name"] for e in measured["variants"]]
        assert "now" in names and len(names) == len(set(names)) > 6
        assert all(e["ms"] > 0 and "error" not in e for e in measured["variants"])
        shapes = [tuple(e["shape"].values()) for e in measured["variants"]]
        assert len(shapes) == len(set(shapes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches on CPU tensors, in Triton's interpreter")
def test_a_variant_with_another_result_is_not_timed(monkeypatch):
    with rlkern.use_backend("triton"):
        operators = variants.Operators(Case("cpu", "fp32", 1, 300, "logp+entropy"))
        results = iter((0.0, *[0.0] * 5, *[1e-3] * 100))
        monkeypatch.setattr(operators, "results", lambda _: torch.full((3,), next(results)))
        entries = variants.measure(operators, "forward", rounds=1, deadline=math.inf)["variants"]
    assert sum("another result" in e.get("error", "") for e in entries) == len(entries) - 5
    assert all(("ms" in e) != ("error" in e) for e in entries)


def test_a_launch_shape_is_put_back():
    before = token_stats.forward_shape
    with pytest.raises(RuntimeError), variants.launch_shape("logp+entropy", "forward", launch.ForwardShape(2048, 8, 1)):
        assert token_stats.forward_shape(launch.Gpu(), 1000, 2).block == 2048
        raise RuntimeError
    assert token_stats.forward_shape is before


def test_only_what_is_faster_by_more_than_the_noise_wins():
    assert variants.winners([timed(now=1.00, other=0.99)]) == {}
    assert variants.winners([timed(now=1.00, other=0.90)]) == {
        ("logp+entropy", "forward", "bf16", 32_768): {"name": "other", "shape": OTHER, "gain": 1 / 0.9}
    }
    assert variants.winners([timed(now=1.00, other=0.90, spread=0.1)]) == {}
    best = variants.winners([timed(now=1.0, other=0.9, third=0.8)])
    assert [b["name"] for b in best.values()] == ["third"]


def test_a_winner_loses_nowhere_at_its_vocabulary():
    won, lost, level = timed(now=1.0, other=0.9), timed(rows=64, now=1.0, other=1.2), timed(rows=64, now=1.0, other=1.001)
    assert variants.winners([won, lost]) == {}
    assert list(variants.winners([won, level])) == [("logp+entropy", "forward", "bf16", 32_768)]
    assert len(variants.winners([won, timed(rows=64, vocab=1000, now=1.0, other=1.2)])) == 1


def test_the_summary_names_the_winners_and_what_failed():
    case = timed(now=1.0, other=0.9)
    case["variants"].append({"name": "third", "shape": OTHER, "error": "OutOfResources: shared memory"})
    text = variants.summary([case, timed(rows=64, now=1.0, other=0.9)])
    assert "ForwardShape(block=2048, warps=2, stages=3, splits=1)" in text
    assert "FAILED third: OutOfResources" in text and "now 1000.0 us (100.0%" in text


def test_the_offline_report_compiles_the_same_variants():
    cases = variants.launch_cases()
    assert {c.dtype for c in cases} == {"bf16", "fp32"} and {c.backward for c in cases} == {True, False}
    now = [c for c in cases if c.label == "now" and not c.backward and c.layout == "V=151936"]
    assert [c.shape.block for c in now] == [8192, 4096]
