"""mypy finds nothing wrong with the package. In test_packaging.py it follows a user's script into it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import torch
import rlkern
from rlkern.diffusion import count_masks
from rlkern.selection import select_top

logits, ids = torch.randn(2, 3, 5, requires_grad=True), torch.zeros(2, 3, dtype=torch.long)
stats = rlkern.token_stats(logits, ids)
loss: torch.Tensor = rlkern.ppo_loss(stats.logp, None, torch.ones(2), ids == 0).loss
merged: dict[str, torch.Tensor] = rlkern.reduce_metrics([])
wrong: int = rlkern.advantages.grpo(torch.ones(2), 2)
nothing = rlkern.no_such_name
"""


def mypy(*arguments, cwd, python=sys.executable) -> list[str]:
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--python-executable", python, "--no-error-summary", *arguments]
    return subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True).stdout.splitlines()


def script_errors(folder: Path, python) -> list[str]:
    """The lines of `SCRIPT` that mypy objects to, for the installation that `python` sees."""
    (folder / "script.py").write_text(SCRIPT)
    return [line.split(":", 2)[1] for line in mypy("script.py", cwd=folder, python=python) if "error" in line]


MISTAKES = [str(i) for i, line in enumerate(SCRIPT.split("\n"), 1) if line.startswith(("wrong", "nothing"))]


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="no source tree")
def test_the_package():
    assert mypy(cwd=ROOT) == []
