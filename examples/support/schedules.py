"""Learning rates over a run, as factors of the first, for torch.optim.lr_scheduler.LambdaLR."""

from __future__ import annotations


def rex(step: int, steps: int) -> float:
    """REX (arXiv 2107.04197): (1 - z) / (1/2 + (1 - z) / 2), z = step / steps. Half-way it is at 2/3."""
    rest = 1 - step / steps
    return rest / (0.5 + rest / 2)
