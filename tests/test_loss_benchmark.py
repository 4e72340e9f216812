"""benchmarks/losses.py and packed.py compare like with like: eager losses and gradients are rlkern's."""

import gc
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import losses  # noqa: E402
import packed  # noqa: E402

import rlkern  # noqa: E402


@pytest.mark.parametrize("name, options", [("Clip-Cov", {"select_ratio": 1.0}), ("KL-Cov", {"select_ratio": 0.1}), ("Lp-Reg", {"rho": 0.5})])
def test_both_sides_compute_the_same(name, options):
    eager, fused, needs = losses.LOSSES[name]
    logits, ids, old_logp, advantages, mask = losses.draw(128, 60, torch.float32, "cpu")
    logits.scatter_(-1, ids[:, ::4].unsqueeze(-1), -3.0)  # rare tokens: large covariances, and some that min-p drops
    x = logits.clone().requires_grad_()
    expected, _ = eager(x, ids, old_logp, advantages, mask, **options)
    (d_expected,) = torch.autograd.grad(expected, x)
    ours = fused(rlkern.token_stats(x, ids, mask=mask, **needs), old_logp, advantages, mask, **options)
    torch.testing.assert_close(ours.loss, expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(ours.loss, x)[0], d_expected, rtol=1e-5, atol=1e-8)
    assert 0 < ours.metrics["selected_fraction"] < 0.5


def test_figures_and_table():
    gc.collect()
    gc.freeze()  # each measurement collects garbage: of what the tests before left that takes most of a second
    entries = losses.run(16, 40, "bf16", "cpu", rounds=2)
    assert [(e["loss"], e["contender"]) for e in entries] == [(loss, c) for loss in losses.LOSSES for c in ("eager", "rlkern", "rlkern, in place")]
    for e in entries:
        assert e["ms"] > 0 and e["ratio"] > 0
        assert (e["tokens_share"] is None) if e["contender"] == "eager" else 0 < e["tokens_share"] < 1
    assert "KL-Cov: rlkern, in place" in losses.render(entries)


@pytest.mark.parametrize("name", packed.LOSSES)
def test_packed_padded_and_eager_compute_the_same(name):
    ours, eager = packed.LOSSES[name]
    x = packed.draw(600, 8, "cpu")
    results = {}
    for form, (logp, *rest) in packed.forms(x).items():
        leaf = logp.clone().requires_grad_()
        loss = (eager if form == packed.EAGER else ours)(leaf, *rest, x["advantages"])
        (gradient,) = torch.autograd.grad(loss, leaf)
        results[form] = (loss.detach(), gradient if form == packed.PADDED else packed.padded(gradient, x["cu_seqlens"]))
    for form in (packed.PACKED, packed.EAGER):
        if name != "Clip-Cov":  # which leaves out other tokens in each form
            torch.testing.assert_close(results[form][1], results[packed.PADDED][1], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(results[form][0], results[packed.PADDED][0], rtol=1e-5, atol=1e-3 if name == "Clip-Cov" else 1e-7)


def test_figures_of_packs():
    entries = packed.run(64, 4, "cpu", rounds=1)
    assert len(entries) == 10 and all(e["ms"] > 0 for e in entries)
    assert all(e["of_padded"] == 1 for e in entries if e["contender"].endswith(packed.PADDED))
    assert "DPO: eager, packed" in packed.render(entries)
