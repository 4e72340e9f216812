"""What the entropy lab shows: the fit of reward against entropy, a table, a CSV file and a picture."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .rollout import Run

_COLOURS = ("#444444", "#0a7d5a", "#3b6fb6", "#c07a1e", "#a34a4a")


class Fit(NamedTuple):
    """R = -a exp(H) + b by least squares."""

    a: float
    b: float
    r_squared: float

    def __call__(self, entropy: float) -> float:
        return self.b - self.a * math.exp(entropy)


def fit(run: Run) -> Fit:
    """The law of the entropy paper (arXiv 2505.22617, Eq. 1) fitted to every step of a run."""
    x, y = [math.exp(h) for h in run.entropy], run.reward
    mx, my = mean(x), mean(y)
    variance = sum((v - mx) ** 2 for v in x)
    slope = sum((v - mx) * (w - my) for v, w in zip(x, y, strict=True)) / variance if variance else 0.0
    b = my - slope * mx
    residual = sum((w - b - slope * v) ** 2 for v, w in zip(x, y, strict=True))
    total = sum((w - my) ** 2 for w in y)
    return Fit(-slope, b, 1 - residual / total if total else 0.0)


def print_table(runs: dict[str, Run]) -> None:
    last = max(1, len(next(iter(runs.values())).reward) // 10)
    header = ("", "reward", "entropy", "accuracy", "greedy", "a", "b", "R^2", "b - a")
    rows = [header]
    for name, run in runs.items():
        f = fit(run)
        _, sampled, greedy = run.held_out[-1]
        numbers = (mean(run.reward[-last:]), mean(run.entropy[-last:]), sampled, greedy, f.a, f.b, f.r_squared, f.b - f.a)
        rows.append((name, *(f"{x:.3f}" for x in numbers)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    print(f"\nreward, entropy: mean of the last {last} steps. accuracy, greedy: of held-out prompts at the end, sampled and greedy answers.")
    print("a, b, R^2: of the fit R = -a exp(H) + b over all steps of the run; b - a is the reward it predicts at entropy 0.\n")
    for i, row in enumerate(rows):
        print("  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]))
        if i == 0:
            print("-" * (sum(widths) + 2 * (len(widths) - 1)))


def write_csv(runs: dict[str, Run], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["method", "step", "reward", "entropy", "held_out_accuracy", "held_out_greedy_accuracy"])
        for name, run in runs.items():
            held_out = {step: (sampled, greedy) for step, sampled, greedy in run.held_out}
            for step, (reward, entropy) in enumerate(zip(run.reward, run.entropy, strict=True), 1):
                table.writerow([name, step, f"{reward:.6f}", f"{entropy:.6f}", *(f"{x:.6f}" for x in held_out.get(step, ()))])
    return path


def _smooth(values: list[float], window: int) -> list[float]:
    """Mean of the last `window` values."""
    return [mean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def draw(runs: dict[str, Run], path: Path) -> Path:
    """Entropy and reward over steps, reward over entropy with fits, held-out accuracy. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, ((entropy, reward), (law, held_out)) = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    for (name, run), colour in zip(runs.items(), _COLOURS, strict=True):
        window = max(1, len(run.reward) // 20)
        steps = range(1, len(run.reward) + 1)
        for axis, values in ((entropy, run.entropy), (reward, run.reward)):
            axis.plot(steps, values, color=colour, linewidth=0.5, alpha=0.3)
            axis.plot(steps, _smooth(values, window), color=colour, label=name)
        f = fit(run)
        law.plot(run.entropy, run.reward, ".", color=colour, markersize=3, alpha=0.4)
        span = [min(run.entropy) + (max(run.entropy) - min(run.entropy)) * i / 50 for i in range(51)]
        law.plot(span, [f(h) for h in span], color=colour, label=f"{name}: {f.b:.2f} - {f.a:.2f} exp(H)")
        held_out.plot([s for s, _, _ in run.held_out], [a for _, a, _ in run.held_out], color=colour, marker="o", markersize=3, label=name)
        held_out.plot([s for s, _, _ in run.held_out], [g for _, _, g in run.held_out], color=colour, linestyle=":")
    entropy.set(title="policy entropy, nats a token", xlabel="step")
    reward.set(title="reward of the sampled answers", xlabel="step", ylim=(0, 1))
    law.set(title="reward against entropy, and R = b - a exp(H)", xlabel="entropy", ylabel="reward")
    held_out.set(title="held-out accuracy (dotted: greedy)", xlabel="step", ylim=(0, 1))
    for axis in (entropy, reward, law, held_out):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.2)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
