"""The blocks of docs/rollout_corrections.md run, in order, and its table of presets is the code's."""

import math
import re
from pathlib import Path

import torch

import rlkern
from rlkern.losses.rollout_weights import PRESETS

PAGE = (Path(__file__).parents[1] / "docs" / "rollout_corrections.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


def test_blocks():
    g = torch.Generator().manual_seed(0)
    old = -torch.rand(16, 6, generator=g) - 0.1
    rollout = old + 0.05 * torch.randn(16, 6, generator=g)
    rollout[3] -= 1  # far more probable to the trainer
    names = {"rlkern": rlkern, "math": math, "old_logp": old, "rollout_logp": rollout, "mask": torch.rand(16, 6, generator=g) < 0.9}
    names |= {"logp": old + 0.1, "rewards": torch.rand(16, generator=g)}
    correct, drop = BLOCKS
    exec(correct, names)
    r, advantages = names["r"], names["advantages"]
    assert r.sequences_kept.tolist() == [False] * 8 + [True] * 8
    assert (advantages[:8] == 0).all() and (advantages[8:] != 0).all() and abs(advantages[8:].mean().item()) < 1e-6
    weights = torch.where(r.sequences_kept, r.weights, 0)
    torch.testing.assert_close(names["loss"], rlkern.grpo_loss(names["logp"], old, advantages, names["mask"], weights=weights).loss)
    assert names["metrics"]["rollout/sequences_masked_fraction"].item() == 0.5
    exec(drop, names)
    assert names["loss"].isfinite()


def test_presets():
    rows = dict(re.findall(r'^\| `"([a-z-]+)"`[^|]*\| ([^|]+) \|', PAGE, re.M))
    assert rows.keys() == PRESETS.keys()
    for name, row in rows.items():
        what, _, gate = row.partition("; ")
        parts = what.split(", ", 2)
        mode = "none" if parts[0] == "none" else parts[1]
        o = {"level": "token", "mode": "truncate", "low": None, "high": 2.0, "gates": {}} | PRESETS[name]
        assert o["mode"] == mode and (mode == "none" or o["level"] == parts[0]), name
        if mode != "none":
            bounds = {"no bound": (None, None), "[0.5, 5]": (0.5, 5.0)}.get(parts[2]) or (None, float(parts[2]))
            assert (o["low"], o["high"]) == bounds, name
        found = re.fullmatch(r"`(\w+)` \((\S+), (\S+)\)", gate)
        assert o["gates"] == ({found[1]: (float(found[2]), float(found[3]))} if found else {}), name
