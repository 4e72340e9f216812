"""What the entropy lab shows: every run, differences from GRPO, changes of entropy foretold, a picture."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .rollout import Run, Scores

Runs = dict[tuple[str, int], Run]  # by method and seed

_COLOURS = ("#444444", "#0a7d5a", "#7cc4a8", "#3b6fb6", "#93b7e6", "#c07a1e")


class Line(NamedTuple):
    """y = slope x + intercept by least squares, and the correlation. Without variance slope and r are 0."""

    slope: float
    intercept: float
    r: float

    def __call__(self, x: float) -> float:
        return self.slope * x + self.intercept


def line(x: Sequence[float], y: Sequence[float]) -> Line:
    mx, my = mean(x), mean(y)
    xx, yy = sum((v - mx) ** 2 for v in x), sum((w - my) ** 2 for w in y)
    xy = sum((v - mx) * (w - my) for v, w in zip(x, y, strict=True))
    slope = xy / xx if xx else 0.0
    return Line(slope, my - slope * mx, xy / math.sqrt(xx * yy) if xx and yy else 0.0)


class Fit(NamedTuple):
    """R = -a exp(H) + b by least squares."""

    a: float
    b: float
    r_squared: float


def fit(run: Run) -> Fit:
    """The law of the entropy paper (arXiv 2505.22617, Eq. 1) fitted to every step of a run."""
    found = line([math.exp(h) for h in run.entropy], run.reward)
    return Fit(-found.slope, found.intercept, found.r**2)


def late_entropy(run: Run) -> float:
    """Mean of the last tenth of the steps."""
    return mean(run.entropy[-max(1, len(run.entropy) // 10) :])


def _end(run: Run) -> tuple[float, ...]:
    late = max(1, len(run.reward) // 10)
    return (late_entropy(run), mean(run.reward[-late:]), *run.scores[-1][1], mean(run.selected), *fit(run))


def _axes(runs: Runs) -> tuple[list[str], list[int]]:
    """The methods and the seeds, each in order."""
    return list(dict.fromkeys(method for method, _ in runs)), sorted({seed for _, seed in runs})


def print_table(runs: Runs) -> None:
    methods, seeds = _axes(runs)
    names = ("entropy", "reward", "trained", "of 8", "held out", "of 8", "greedy", "selected", "a", "b", "R^2")
    print("\nentropy, reward: means of the last tenth of the steps. trained, held out: how often a sampled answer is right at the end, exactly;")
    print("of 8: at least one of eight. greedy: of held-out numbers. selected: share of the tokens, over the run. a, b, R^2: of R = -a exp(H) + b.")
    print("mean: over the seeds, and below it the sample standard deviation.\n")
    print(f"{'':<20}" + "".join(f"{name:>10}" for name in names))
    for method in methods:
        ends = [_end(runs[method, seed]) for seed in seeds]
        columns = list(zip(*ends, strict=True))
        rows = [*((f"seed {seed}", end) for seed, end in zip(seeds, ends, strict=True)), ("mean", map(mean, columns)), ("+-", map(stdev, columns))]
        for label, row in rows:
            cells = [f"{x:.4f}" if name == "selected" else f"{x:.3f}" for name, x in zip(names, row, strict=True)]
            print(f"{method if label == 'seed ' + str(seeds[0]) else '':<13}{label:<7}" + "".join(f"{cell:>10}" for cell in cells))


class Difference(NamedTuple):
    """Of a method from GRPO, paired by seed."""

    mean: float
    error: float  # standard error of the mean


def difference(runs: Runs, method: str, of: Callable[[Run], float]) -> Difference:
    values = [of(run) - of(runs["GRPO", seed]) for (name, seed), run in runs.items() if name == method]
    return Difference(mean(values), stdev(values) / math.sqrt(len(values)))


def verdict(entropy: Difference, held_out: Difference) -> str:
    """The paper's claim: more entropy, more right answers. A difference counts beyond two standard errors."""
    if held_out.mean < -2 * held_out.error:
        return "refuted: fewer right"
    if entropy.mean <= 2 * entropy.error:
        return "no more entropy"
    return "supported" if held_out.mean > 2 * held_out.error else "more entropy, not more right"


def print_differences(runs: Runs) -> None:
    methods, _ = _axes(runs)
    measures = {"entropy": late_entropy}
    for name in ("held_out", "held_out_of_8", "trained", "trained_of_8"):
        measures[name] = lambda run, name=name: getattr(run.scores[-1][1], name)
    print("\ndifference from GRPO, paired by seed, mean +- standard error:\n")
    print(f"{'':<14}" + "".join(f"{name.replace('_', ' '):>20}" for name in measures))
    for method in methods[1:]:
        found = {name: difference(runs, method, of) for name, of in measures.items()}
        cells = "".join(f"{f'{d.mean:+.3f} +- {d.error:.3f}':>20}" for d in found.values())
        print(f"{method:<14}{cells}   {verdict(found['entropy'], found['held_out'])}")


def relations(runs: Runs, method: str) -> tuple[tuple[list[float], list[float], Line], ...]:
    """(x, measured change of the entropy, fit) of all states: x the predicted change, then the covariance."""
    changes = [c for (name, _), run in runs.items() if name == method for c in run.changes]
    measured = [v for c in changes for v in c.measured]
    predictors = [v for c in changes for v in c.predicted], [v for c in changes for v in c.covariance]
    return tuple((x, measured, line(x, measured)) for x in predictors)


def print_relations(runs: Runs) -> None:
    methods, _ = _axes(runs)
    print("\nmeasured change of the entropy of the first digit in one step, a value a prompt, fitted (slope, correlation) to")
    print("  logits: the first-order prediction -Cov(log pi, change of the logits) over all tokens, exactly")
    print("  sampled: Cov(log pi, advantage) of the group's sampled tokens, by which Clip-Cov and KL-Cov select\n")
    print(f"{'':<14}{'states':>8}{'logits':>18}{'sampled':>18}")
    for method in methods:
        both = relations(runs, method)
        print(f"{method:<14}{len(both[0][0]):>8}" + "".join(f"{f'{f.slope:+.3f}, {f.r:+.2f}':>18}" for _, _, f in both))


def write_csv(runs: Runs, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["method", "seed", "step", "reward", "entropy", "selected", *Scores._fields])
        for (method, seed), run in runs.items():
            scores = dict(run.scores)
            for step, values in enumerate(zip(run.reward, run.entropy, run.selected, strict=True), 1):
                table.writerow([method, seed, step, *(f"{x:.6f}" for x in (*values, *scores.get(step, ())))])
    return path


def _smooth(values: list[float], window: int) -> list[float]:
    """Mean of the last `window` values."""
    return [mean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def _band(axis, steps: Sequence[int], curves: list[list[float]], colour: str, label: str) -> None:
    """Mean of the seeds, and from the least to the largest."""
    columns = list(zip(*curves, strict=True))
    axis.fill_between(steps, [*map(min, columns)], [*map(max, columns)], color=colour, alpha=0.12, linewidth=0)
    axis.plot(steps, [*map(mean, columns)], color=colour, label=label)


def draw(runs: Runs, path: Path) -> Path:
    """Entropy, accuracies, their relation, and GRPO's changes of entropy against what foretells them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    methods, seeds = _axes(runs)
    figure, ((entropy, trained, held_out), (of_8, by_logits, by_sample)) = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    for method, colour in zip(methods, _COLOURS, strict=False):
        found = [runs[method, seed] for seed in seeds]
        count = len(found[0].entropy)
        _band(entropy, range(1, count + 1), [_smooth(run.entropy, max(1, count // 20)) for run in found], colour, method)
        steps = [step for step, _ in found[0].scores]
        for axis, name in ((trained, "trained"), (held_out, "held_out"), (of_8, "held_out_of_8")):
            _band(axis, steps, [[getattr(s, name) for _, s in run.scores] for run in found], colour, method)
    entropy.set(title="policy entropy, nats a token", xlabel="step")
    trained.set(title="a sampled answer is right, training numbers", xlabel="step", ylim=(0, None))
    held_out.set(title="a sampled answer is right, held-out numbers", xlabel="step", ylim=(0, None))
    of_8.set(title="one of 8 sampled answers is right, held-out numbers", xlabel="step", ylim=(0, None))
    labels = "predicted from the logits: -Cov(log π, Δz)", "sampled Cov(log π, A)"
    for axis, label, (x, measured, fitted) in zip((by_logits, by_sample), labels, relations(runs, "GRPO"), strict=True):
        axis.plot(x, measured, ".", color=_COLOURS[0], markersize=2, alpha=0.4, rasterized=True)
        ends = [min(x), max(x)]
        axis.plot(ends, [fitted(v) for v in ends], color="#a34a4a", label=f"slope {fitted.slope:.2f}, correlation {fitted.r:.2f}")
        axis.set(title="GRPO: entropy change of a state in a step", xlabel=label, ylabel="measured, nats")
    for axis in (entropy, held_out, by_logits, by_sample):
        axis.legend(fontsize=8)
    for axis in figure.axes:
        axis.grid(alpha=0.2)
    figure.savefig(path, dpi=85)
    plt.close(figure)
    return path
