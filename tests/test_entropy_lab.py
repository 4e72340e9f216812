"""The entropy lab runs, its task is right, and its fit finds the law where there is one."""

import csv
import math
import pathlib
import subprocess
import sys

import pytest
import torch

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


pytest.importorskip("matplotlib")
sys.path.insert(0, str(EXAMPLES))

from support import arithmetic, entropy_report, rollout  # noqa: E402


def test_task():
    task = arithmetic.Addition(2, held_out=100, seed=0)
    prompts, right = task.encode(torch.tensor([4875, 9999, 3]))
    plus, equals = arithmetic.PLUS, arithmetic.EQUALS
    assert prompts.tolist() == [[4, 8, plus, 7, 5, equals], [9, 9, plus, 9, 9, equals], [0, 0, plus, 0, 3, equals]]
    assert right.tolist() == [[3, 2, 1], [8, 9, 1], [3, 0, 0]]  # 123, 198, 003: lowest digit first
    answers = torch.tensor([[3, 2, 1], [8, 9, 0], [3, 0, 0]])
    assert arithmetic.rewards(answers, right).tolist() == [1, 0, 1]
    assert not set(task.held_out.tolist()) & set(task.pairs.tolist())
    assert len(task.held_out) + len(task.pairs) == 10_000


def test_fit():
    entropy = [1.0, 0.7, 0.5, 0.2, 0.1]
    run = rollout.Run(reward=[0.9 - 0.25 * math.exp(h) for h in entropy], entropy=entropy)
    fit = entropy_report.fit(run)
    assert (fit.a, fit.b, fit.r_squared) == pytest.approx((0.25, 0.9, 1.0))
    assert fit(0.0) == pytest.approx(0.65)
    constant = entropy_report.fit(rollout.Run(reward=[0.5, 0.5], entropy=[1.0, 1.0]))
    assert (constant.a, constant.b, constant.r_squared) == (0, 0.5, 0)


@pytest.mark.slow
def test_lab_runs(tmp_path):
    options = ["--steps", "2", "--prompts", "4", "--minibatches", "2", "--warm-up-to", "0.001", "--digits", "1", "--out", str(tmp_path)]
    result = subprocess.run([sys.executable, str(EXAMPLES / "entropy_lab.py"), *options], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "entropy_lab.png").stat().st_size > 10_000
    rows = list(csv.DictReader((tmp_path / "entropy_lab.csv").open()))
    assert len(rows) == 10 and {row["method"] for row in rows} == {"GRPO", "Clip-Cov", "KL-Cov", "Lp-Reg", "NFT"}
    assert rows[0]["entropy"] == rows[2]["entropy"]  # all begin with the same answers
    for name in ("GRPO", "NFT", "R^2"):
        assert name in result.stdout
