"""What the entropy lab shows: every run, differences from GRPO, changes of entropy foretold, a picture."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .entropy_train import Run, Scores
from .seeds import Difference, band, paired, smooth

Runs = dict[tuple[str, int], Run]  # by method and seed

SMALL = 0.5  # a change of a logit that the first order may be expected to describe

_COLOURS = ("#444444", "#0a7d5a", "#7cc4a8", "#3b6fb6", "#93b7e6", "#c07a1e")


class Line(NamedTuple):
    """y = slope x + intercept by least squares, and the correlation. Without variance slope and r are 0."""

    slope: float
    intercept: float
    r: float

    def __call__(self, x: float) -> float:
        return self.slope * x + self.intercept


def line(x: Sequence[float], y: Sequence[float]) -> Line:
    mx, my = (mean(v) if v else 0.0 for v in (x, y))
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


def difference(runs: Runs, method: str, of: Callable[[Run], float]) -> Difference:
    """Of a method from GRPO."""
    seeds = [seed for name, seed in runs if name == method]
    return paired(*([of(runs[name, seed]) for seed in seeds] for name in (method, "GRPO")))


def print_differences(runs: Runs) -> None:
    methods, _ = _axes(runs)
    measures = {"entropy": late_entropy}
    for name in ("held_out", "held_out_of_8", "trained", "trained_of_8"):
        measures[name] = lambda run, name=name: getattr(run.scores[-1][1], name)
    print("\ndifference from GRPO, paired by seed, mean +- standard error:\n")
    print(f"{'':<14}" + "".join(f"{name.replace('_', ' '):>20}" for name in measures))
    for method in (m for m in methods if m != "GRPO"):
        found = (difference(runs, method, of) for of in measures.values())
        print(f"{method:<14}" + "".join(f"{d!s:>20}" for d in found))


class Relation(NamedTuple):
    """Measured changes of the entropy against what foretells them."""

    x: list[float]
    measured: list[float]

    @property
    def line(self) -> Line:
        return line(self.x, self.measured)


def relations(runs: Runs, method: str) -> dict[str, Relation]:
    """Of all seeds and steps; `print_relations` says of what."""
    changes = [c for (name, _), run in runs.items() if name == method for c in run.changes]
    measured, predicted, moved, covariance = ([v for part in parts for v in part] for parts in zip(*changes, strict=True))
    by_seed = [[(mean(c.covariance), mean(c.measured)) for c in run.changes] for (name, _), run in runs.items() if name == method]
    steps = [step for seed in by_seed for step in seed]
    successive = [(b[0] - a[0], b[1] - a[1]) for seed in by_seed for a, b in itertools.pairwise(seed)]
    small = [i for i, distance in enumerate(moved) if distance < SMALL]
    return {
        "logits": Relation(predicted, measured),
        "small": Relation([predicted[i] for i in small], [measured[i] for i in small]),
        "sampled": Relation(covariance, measured),
        "mean": Relation(*map(list, zip(*steps, strict=True))),
        "next": Relation(*map(list, zip(*successive, strict=True))),
    }


def print_relations(runs: Runs) -> None:
    methods, _ = _axes(runs)
    print("\nmeasured change of the entropy of the first digit in a step's first update, fitted (slope, correlation; number of values) to")
    print("  logits: the first-order prediction -Cov(log pi, change of the logits), over all tokens, a value a prompt")
    print(f"  small: the same where no logit moved by {SMALL} or more")
    print("  sampled: Cov(log pi, advantage) of the group's sampled tokens, by which Clip-Cov and KL-Cov select")
    print("  mean: the same, means over the prompts of a step")
    print("  next: differences of these means from one step to the next, which leave out what both do over the whole training\n")
    for i, method in enumerate(methods):
        found = relations(runs, method)
        if i == 0:
            print(f"{'':<14}" + "".join(f"{name:>24}" for name in found))
        cells = (f"{x.line.slope:+.3f}, {x.line.r:+.2f}; {len(x.x)}" for x in found.values())
        print(f"{method:<14}" + "".join(f"{cell:>24}" for cell in cells))


def write_csv(runs: Runs, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["method", "seed", "step", "reward", "entropy", "selected", *Scores._fields])
        for (method, seed), run in runs.items():
            scores = dict(run.scores)
            table.writerow([method, seed, 0, "", "", "", *(f"{x:.6f}" for x in scores[0])])
            for step, values in enumerate(zip(run.reward, run.entropy, run.selected, strict=True), 1):
                table.writerow([method, seed, step, *(f"{x:.6f}" for x in (*values, *scores.get(step, ())))])
    return path


def draw(runs: Runs, path: Path) -> Path:
    """Entropy, accuracies, their relation, and GRPO's changes of entropy against what foretells them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    methods, seeds = _axes(runs)
    figure, ((entropy, trained, held_out), (of_8, by_logits, by_sample)) = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    for method, colour in zip(methods, _COLOURS, strict=False):
        found = [runs[method, seed] for seed in seeds]
        count = len(found[0].entropy)
        band(entropy, range(1, count + 1), [smooth(run.entropy, max(1, count // 20)) for run in found], colour, method)
        steps = [step for step, _ in found[0].scores]
        for axis, name in ((trained, "trained"), (held_out, "held_out"), (of_8, "held_out_of_8")):
            band(axis, steps, [[getattr(s, name) for _, s in run.scores] for run in found], colour, method)
    entropy.set(title="policy entropy, nats a token", xlabel="step")
    trained.set(title="a sampled answer is right, training numbers", xlabel="step")
    held_out.set(title="a sampled answer is right, held-out numbers", xlabel="step")
    of_8.set(title="one of 8 sampled answers is right, held-out numbers", xlabel="step")
    grpo = relations(runs, "GRPO")
    for axis, name, size, colour in ((by_logits, "small", 1, "#444444"), (by_sample, "sampled", 1, "#999999"), (by_sample, "mean", 5, "#3b6fb6")):
        x, measured = grpo[name]
        thin = slice(None, None, max(1, len(x) // 4000))
        axis.plot(x[thin], measured[thin], ".", color=colour, markersize=size)
        ends, fitted = [min(x, default=0.0), max(x, default=0.0)], grpo[name].line
        what = {"small": "states", "sampled": "states", "mean": "means of a step's states"}[name]
        axis.plot(ends, [fitted(v) for v in ends], color=colour, label=f"{what}: slope {fitted.slope:.3f}, correlation {fitted.r:.2f}")
    by_logits.set(
        title="GRPO: change of a state's entropy in an update", xlabel="predicted from the logits, -Cov(log π, Δz)", ylabel="measured, nats"
    )
    by_sample.set(
        title="the same against the sampled covariance", xlabel="Cov(log π, A) of the group's answers", ylabel="measured, nats", ylim=(-0.2, 0.2)
    )
    for axis in (entropy, held_out, by_logits, by_sample):
        axis.legend(fontsize=8)
    for axis in figure.axes:
        axis.grid(alpha=0.2)
    figure.savefig(path, dpi=85)
    plt.close(figure)
    return path
