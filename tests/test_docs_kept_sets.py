"""The code of docs/kept_sets.md runs, its names exist, and the example runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import rlkern
from rlkern import integrations
from rlkern.integrations import rollouts

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "kept_sets.md"


def test_the_page_runs(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)
    exec(block, {"__name__": "page"})
    metrics = eval(capsys.readouterr().out)
    assert metrics["target_kept"] == 1 and 0 < metrics["kept_mass"] < 0.5 and metrics["tokens"] == 7


def test_it_names_what_exists():
    text = PAGE.read_text()
    assert not [name for name in re.findall(r"\brlkern\.(\w+)", text) if not hasattr(rlkern, name)]
    assert not [name for name in re.findall(r"\bkept_from_\w+", text) if name != "kept_from_" and not hasattr(rollouts, name)]
    for module, name in re.findall(r"`rlkern\.integrations\.(\w+)\.(\w+)", text):
        __import__(f"{integrations.__name__}.{module}")
        assert hasattr(getattr(integrations, module), name), f"{module}.{name}"


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    pytest.importorskip("matplotlib")
    options = ["--windows", "4", "--tokens", "8", "--warmup-steps", "3", "--vocab", "512", "--out", str(tmp_path)]
    result = subprocess.run([sys.executable, str(ROOT / "examples" / "kept_sets.py"), *options], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "kept_sets.png").stat().st_size > 10_000
    rows = re.findall(r"(0\.\d) +(whole vocabulary|replayed sets) +(\d\.\d+)", result.stdout)
    means = {(top_p, name): float(mean) for top_p, name, mean in rows}
    assert len(means) == 4
    for top_p in ("0.9", "0.8"):  # the model is flat: every set has the mass top_p
        assert abs(means[top_p, "whole vocabulary"] - float(top_p)) < 0.02 and abs(means[top_p, "replayed sets"] - 1) < 0.02
