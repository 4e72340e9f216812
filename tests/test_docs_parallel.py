"""The example of docs/parallel.md runs."""

import subprocess
import sys
from pathlib import Path

import pytest
from ranks import on_ranks

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "tensor_parallel.py"


def example(group, rank):
    sys.path.insert(0, str(EXAMPLE.parent))
    import tensor_parallel

    args = tensor_parallel.parse_arguments(["--steps", "2", "--vocab", "37", "--width", "16", "--depth", "1", "--prompts", "4", "--tokens", "3"])
    return [tuple(step) for step in tensor_parallel.train(group, args)]


def test_the_example_is_that_of_one_process():
    (alone,), ranks = on_ranks(1, example), on_ranks(3, example)  # 37 ids: the last rank holds two rows of padding
    for steps in (alone, ranks[0]):
        assert all(0 <= off < 1e-12 for *_, loss, gradients in steps for off in (loss, gradients))
    for steps in ranks:
        for step, first, one in zip(steps, ranks[0], alone, strict=True):
            assert step[:3] == first[:3] == pytest.approx(one[:3], rel=1e-9, abs=1e-12)


@pytest.mark.slow
def test_the_example_runs_as_its_text_says():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE), "--steps", "2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "2 processes, gloo" in result.stdout and "1 of them padding" in result.stdout and "in 4 updates" in result.stdout
