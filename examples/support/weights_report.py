"""What the study of reward weights shows: a table, a CSV file and a picture."""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .weights_train import Run, Settings

Runs = dict[tuple[str, int], Run]  # by method and seed


def print_table(runs: Runs, settings: Settings) -> None:
    print(f"\nheld-out accuracy, tokens of an answer, weight of right answers, scale: means of the last {_last(settings)} steps\n")
    print(f"{'rule':<28}{'seed':>5}{'accuracy':>10}{'length':>8}{'weight':>8}{'scale':>7}")
    for (method, seed), run in runs.items():
        numbers = [mean(x[-_last(settings) :]) for x in ([p.accuracy for p in run.points], [p.length for p in run.points], run.weight, run.scale)]
        print(f"{method:<28}{seed:>5}{numbers[0]:>10.3f}{numbers[1]:>8.2f}{numbers[2]:>8.2f}{numbers[3]:>7.2f}")


def _last(settings: Settings) -> int:
    return max(1, settings.steps // 10)


def write_csv(runs: Runs, settings: Settings, path: Path) -> Path:
    """A row before training, step 0, and one for every step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["rule", "seed", "step", "accuracy", "length", "weight", "scale"])
        for (method, seed), run in runs.items():
            for step, (point, weight, scale) in enumerate(zip(run.points, run.weight, run.scale, strict=True)):
                table.writerow([method, seed, step, *(f"{x:.6f}" for x in (*point, weight, scale))])
    return path


def draw(runs: Runs, settings: Settings, path: Path) -> Path:
    """Accuracy over length, the weight of right answers, the scale. A line for every run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    colours = {method: f"C{i}" for i, method in enumerate(dict.fromkeys(m for m, _ in runs))}
    labelled = set()
    for (method, _), run in runs.items():
        line = {"color": colours[method], "linewidth": 1, "label": None if method in labelled else method}
        labelled.add(method)
        axes[0].plot([p.length for p in run.points], [p.accuracy for p in run.points], alpha=0.6, **line)
        axes[0].plot(run.points[-1].length, run.points[-1].accuracy, "o", color=colours[method])
        axes[1].plot(run.weight, **line)
        axes[2].plot(run.scale, **line)
    axes[0].set(title="accuracy over length; a dot at the end", xlabel="tokens of an answer", ylabel="held-out accuracy", ylim=(0, 1))
    axes[1].set(title="weight of right answers", xlabel="step", ylim=(0, 1.05))
    axes[2].set(title="scale", xlabel="step", ylim=(0, 2.1))
    axes[0].legend(fontsize=7)
    for axis in axes:
        axis.grid(alpha=0.2)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path
