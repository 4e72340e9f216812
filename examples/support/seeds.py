"""Runs over several seeds: differences paired by seed, curves as means with their range."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple


class Difference(NamedTuple):
    mean: float
    error: float  # standard error of the mean, NaN with one seed

    def __str__(self) -> str:
        return f"{self.mean:+.3f}" + ("" if math.isnan(self.error) else f" +- {self.error:.3f}")


def paired(values: Sequence[float], others: Sequence[float]) -> Difference:
    """values less others, one of each for every seed."""
    differences = [a - b for a, b in zip(values, others, strict=True)]
    error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return Difference(mean(differences), error)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values. NaN is left out."""
    parts = ([v for v in values[max(0, i + 1 - window) : i + 1] if not math.isnan(v)] for i in range(len(values)))
    return [mean(part) if part else math.nan for part in parts]


def band(axis, x: Sequence[float], curves: Sequence[Sequence[float]], colour: str, label: str) -> None:
    """The mean over curves, one a seed, and from the lowest to the highest. NaN is left out."""
    columns = [[v for v in column if not math.isnan(v)] or [math.nan] for column in zip(*curves, strict=True)]
    axis.fill_between(x, [*map(min, columns)], [*map(max, columns)], color=colour, alpha=0.12, linewidth=0)
    axis.plot(x, [*map(mean, columns)], color=colour, label=label)
