"""What the example of kept sets shows: a table of importance ratios and their histograms."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from torch import Tensor

_COLOURS = {"whole vocabulary": "#a34a4a", "replayed sets": "#0a7d5a"}


class Ratios(NamedTuple):
    """pi_train / pi_rollout of all tokens that were sampled with one top_p."""

    top_p: float
    by_softmax: dict[str, Tensor]  # what the trainer's softmax was over -> [tokens]
    target_kept: float  # share of tokens that are in their set
    misaligned: float  # the same share with every set one token off
    set_size: Tensor  # [tokens]


def outside(ratio: Tensor) -> float:
    return ((ratio < 0.9) | (ratio > 1.1)).double().mean().item()


def print_table(results: list[Ratios]) -> None:
    print(f"\n{'top_p':>5}  {'softmax over':<18}{'mean ratio':>11}{'smallest':>10}{'largest':>9}{'outside [0.9, 1.1]':>20}")
    for result in results:
        for name, ratio in result.by_softmax.items():
            print(f"{result.top_p:>5}  {name:<18}{ratio.mean():>11.4f}{ratio.min():>10.3f}{ratio.max():>9.3f}{outside(ratio):>20.1%}")
    print(f"\n{'top_p':>5}{'tokens':>9}{'ids in a set: median':>23}{'mean':>8}{'one alone':>11}{'target_kept':>13}{'one token off':>15}")
    for r in results:
        size = r.set_size.double()
        alone = (size == 1).double().mean().item()
        print(f"{r.top_p:>5}{len(size):>9}{size.median():>23.0f}{size.mean():>8.1f}{alone:>11.1%}{r.target_kept:>13.2%}{r.misaligned:>15.2%}")


def draw(results: list[Ratios], path: Path) -> Path:
    """A histogram of ratios for each top_p. Returns the path written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, len(results), figsize=(5.5 * len(results), 3.6), layout="constrained", squeeze=False)
    for axis, result in zip(axes[0], results, strict=True):
        for name, ratio in result.by_softmax.items():
            label = f"softmax over the {name}: mean {ratio.mean():.3f}, {outside(ratio):.0%} outside"
            axis.hist(ratio.clamp(0.7, 1.2).numpy(), bins=50, range=(0.7, 1.2), color=_COLOURS[name], alpha=0.65, label=label)
        for edge in (0.9, 1.1):
            axis.axvline(edge, color="gray", linewidth=0.8, linestyle=":")
        axis.set(title=f"sampled with top_p = {result.top_p}", xlabel="importance ratio of a token", ylabel="tokens", yscale="log")
        axis.legend(loc="upper left", fontsize=8)
        axis.set_ylim(0.8, axis.get_ylim()[1] * 10)  # room for the legend
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
