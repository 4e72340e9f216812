"""The blocks of docs/rollout_corrections.md run, and its presets are those of the package."""

import re
from pathlib import Path

import torch

import rlkern
from rlkern.losses.rollout_weights import PRESETS

PAGE = (Path(__file__).parents[1] / "docs" / "rollout_corrections.md").read_text()


def test_blocks():
    g = torch.Generator().manual_seed(0)
    old = -torch.rand(4, 6, generator=g) * 2
    names = {"rlkern": rlkern, "old_logp": old, "logp": old + 0.01, "rollout_logp": old + torch.randn(4, 6, generator=g), "groups": 2}
    names |= {"mask": torch.ones(4, 6), "advantages": torch.randn(4, generator=g), "rewards": torch.tensor([1.0, 0, 1, 0])}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.S):
        exec(block, names)
    assert 0 < names["metrics"]["rollout/masked_fraction"] < 1 and names["loss"].isfinite()
    assert names["advantages"].shape == (4,) and names["advantages"].isfinite().all()


def test_presets():
    assert re.findall(r"^\| `([\w-]+)` \|", PAGE, re.M) == list(PRESETS)
