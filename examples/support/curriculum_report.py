"""What the curriculum lab shows: a table of all seeds, paired differences, a CSV file and a picture."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .curriculum_train import FAMILIES, Run, Settings
from .seeds import band, paired, smooth

Runs = dict[tuple[str, int], Run]  # by sampler and seed
_COLOURS = {"uniform": "#444444", "SEC": "#0a7d5a", "DUMP": "#3b6fb6", "PCL": "#c07a1e", "Knapsack": "#a34a4a", "CLPO": "#7a5aa6"}
_FAMILY_COLOURS = ("#d9e4ec", "#9fc1d4", "#4f8fb0", "#1f4e6b")
TARGET = 0.65  # accuracy on three digits


def final(run: Run) -> list[float]:
    """Held-out accuracy by family: the mean of the last three evaluations."""
    last = [accuracy for _, accuracy in run.held_out[-3:]]
    return [mean(values) for values in zip(*last, strict=True)]


def rollouts_until(run: Run, settings: Settings) -> float:
    """Rollouts spent when three-digit accuracy was first measured at TARGET, NaN if never."""
    return next((step * settings.rollouts for step, accuracy in run.held_out if accuracy[2] >= TARGET), math.nan)


def results(run: Run) -> dict[str, float]:
    accuracy = final(run)
    return {"A != 0": mean(run.useful), **dict(zip(FAMILIES, accuracy, strict=True)), "mean": mean(accuracy)}


def print_table(runs: Runs, settings: Settings) -> None:
    samplers, seeds = list(dict.fromkeys(s for s, _ in runs)), list(dict.fromkeys(seed for _, seed in runs))
    columns = list(results(next(iter(runs.values()))))
    print("\nA != 0: share of rollouts with an advantage. Accuracy: held-out prompts, sampled, mean of the last three evaluations.")
    print(f"{TARGET:.2f} at: rollouts until three-digit accuracy was measured at {TARGET:.2f}. s: seconds of the sampler itself.\n")
    print(f"{'sampler':<10}{'seed':>5}" + "".join(f"{c:>10}" for c in columns) + f"{f'{TARGET:.2f} at':>10}{'s':>7}")
    for sampler in samplers:
        for seed in seeds:
            run = runs[sampler, seed]
            at = rollouts_until(run, settings)
            numbers = "".join(f"{x:>10.3f}" for x in results(run).values())
            print(f"{sampler:<10}{seed:>5}{numbers}{'never' if math.isnan(at) else f'{at / 1e3:.0f} k':>10}{run.sampler_seconds:>7.2f}")
    if "uniform" not in samplers or len(samplers) == 1:
        return
    print(f"\nover uniform, paired by seed: mean +- standard error of {len(seeds)} seeds\n")
    print(f"{'':<10}" + "".join(f"{c:>18}" for c in columns))
    for sampler in (s for s in samplers if s != "uniform"):
        ours, theirs = ([results(runs[name, seed]) for seed in seeds] for name in (sampler, "uniform"))
        print(f"{sampler:<10}" + "".join(f"{paired([r[c] for r in ours], [r[c] for r in theirs])!s:>18}" for c in columns))


def write_csv(runs: Runs, settings: Settings, path: Path) -> Path:
    """A row for every step. Held-out accuracy stands where it was measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [f"{what}_{d}" for what in ("share", "reward", "held_out") for d in range(1, len(FAMILIES) + 1)]
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["sampler", "seed", "step", "rollouts", "useful_rollouts", "useful_groups", *names])
        for (sampler, seed), run in runs.items():
            held_out = dict(run.held_out)
            table.writerow([sampler, seed, 0, 0, *[""] * (2 + 2 * len(FAMILIES)), *(f"{x:.6f}" for x in held_out[0])])
            for i in range(len(run.useful)):
                numbers = (run.useful[i], run.useful_groups[i], *run.shares[i], *run.reward[i], *held_out.get(i + 1, ()))
                table.writerow([sampler, seed, i + 1, (i + 1) * settings.rollouts, *("" if math.isnan(x) else f"{x:.6f}" for x in numbers)])
    return path


def draw(runs: Runs, settings: Settings, path: Path) -> Path:
    """Over rollouts: shares of the families, useful rollouts, held-out accuracy and reward by family."""
    path.parent.mkdir(parents=True, exist_ok=True)
    by_sampler: dict[str, list[Run]] = {}
    for (sampler, _), run in runs.items():
        by_sampler.setdefault(sampler, []).append(run)
    columns = max(len(by_sampler), len(FAMILIES) + 1)
    figure, axes = plt.subplots(3, columns, figsize=(3 * columns, 8.4), layout="constrained", squeeze=False)
    steps = len(next(iter(runs.values())).useful)
    x, window = [settings.rollouts * (i + 1) / 1e3 for i in range(steps)], max(1, steps // 15)
    for axis, (sampler, seeds) in zip(axes[0], by_sampler.items(), strict=False):
        shares = [smooth([mean(run.shares[i][f] for run in seeds) for i in range(steps)], window) for f in range(len(FAMILIES))]
        axis.stackplot(x, shares, colors=_FAMILY_COLOURS, labels=FAMILIES)
        axis.set(title=f"{sampler}: share of rollouts", ylim=(0, 1), xlim=(x[0], x[-1]))
    axes[0][0].legend(fontsize=7, loc="upper left")
    for sampler, seeds in by_sampler.items():
        measured = [settings.rollouts * step / 1e3 for step, _ in seeds[0].held_out]
        for f, family in enumerate(FAMILIES):
            band(axes[1][f], measured, [[a[f] for _, a in run.held_out] for run in seeds], _COLOURS[sampler], sampler)
            band(axes[2][f], x, [smooth([r[f] for r in run.reward], window) for run in seeds], _COLOURS[sampler], sampler)
            axes[1][f].set(title=f"{family}: held-out accuracy")
            axes[2][f].set(title=f"{family}: reward of rollouts", xlabel="thousands of rollouts")
        for row, name in ((1, "useful"), (2, "useful_groups")):
            band(axes[row][len(FAMILIES)], x, [smooth(getattr(run, name), window) for run in seeds], _COLOURS[sampler], sampler)
    axes[1][len(FAMILIES)].set(title="rollouts with an advantage")
    axes[2][len(FAMILIES)].set(title="groups with an advantage", xlabel="thousands of rollouts")
    axes[1][0].legend(fontsize=8)
    for axis in axes[1:].flat:
        axis.set(ylim=(0, 1))
        axis.grid(alpha=0.2)
    for axis in (*axes[0][len(by_sampler) :], *axes[1][len(FAMILIES) + 1 :], *axes[2][len(FAMILIES) + 1 :]):
        axis.set_visible(False)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path
