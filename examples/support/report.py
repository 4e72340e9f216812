"""Two runs side by side: on the terminal and as a picture."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .train import Run

_COLOURS = ("#a34a4a", "#0a7d5a")


def _differences(runs: dict[str, Run]) -> list[float]:
    first, second = (run.losses for run in runs.values())
    return [abs(a - b) for a, b in zip(first, second, strict=True)]


def print_comparison(runs: dict[str, Run], lines: int = 10) -> None:
    """The loss of about `lines` steps in each run, and the difference; then what the held-out pairs say."""
    (name_a, a), (name_b, b) = runs.items()
    differences = _differences(runs)
    every = max(1, len(differences) // lines)
    print(f"\n{'step':>5}{'loss, ' + name_a:>21}{'loss, ' + name_b:>14}{'difference':>13}")
    for step, row in enumerate(zip(a.losses, b.losses, differences, strict=True), start=1):
        if step == 1 or step % every == 0:
            print("{:>5}{:>21.6f}{:>14.6f}{:>13.1e}".format(step, *row))
    print(f"\non held-out pairs: reward accuracy, and the margin chosen less rejected in nats\n{'step':>5}{name_a:>21}{name_b:>21}")
    for x, y in zip(a.evaluations, b.evaluations, strict=True):
        print(f"{x.step:>5}{x.accuracy:>13.1%}{x.margin:>8.3f}{y.accuracy:>13.1%}{y.margin:>8.3f}")


def _ratio(a: float | None, b: float | None, unit: str, word: str) -> list[str]:
    if a is None or b is None:
        return ["not measured"] * 2 + ["(needs Linux)"]
    return [f"{a:.1f} {unit}", f"{b:.1f} {unit}", f"{a / b:.1f} times {word}" if b else ""]


def print_table(runs: dict[str, Run], logits_mb: float) -> None:
    """The final table."""
    (name_a, a), (name_b, b) = runs.items()
    last_a, last_b = mean(a.losses[-10:]), mean(b.losses[-10:])
    rows = [
        ["", name_a, name_b, ""],
        ["time of the loss, a step", *_ratio(1e3 * a.meter.median_seconds, 1e3 * b.meter.median_seconds, "ms", "faster")],
        ["peak memory of the loss", *_ratio(a.meter.median_peak_mb, b.meter.median_peak_mb, "MB", "less")],
        ["loss, last ten steps", f"{last_a:.5f}", f"{last_b:.5f}", f"largest difference in a step {max(_differences(runs)):.1e}"],
        ["held-out reward accuracy", *(f"{run.evaluations[-1].accuracy:.1%}" for run in (a, b)), "from 50% at the start"],
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    print()
    for i, row in enumerate(rows):
        print("  ".join([row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].rjust(widths[2]), row[3]]).rstrip())
        if i == 0:
            print("-" * (sum(widths) + 6))
    print(f"\nThe loss is forward and backward, from the logits ({logits_mb:.0f} MB) to their gradient ({logits_mb:.0f} MB); medians over the steps.")
    print("Memory is the highest rise of the process's resident set meanwhile, the gradient included.")


def draw(runs: dict[str, Run], logits_mb: float, path: Path) -> Path:
    """Losses, their difference, the held-out pairs, time and memory. Returns the path written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, ((losses, accuracy), (difference, cost)) = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for (name, run), colour, style, width in zip(runs.items(), _COLOURS, ("-", "--"), (4, 1.5), strict=True):
        line = {"linestyle": style, "color": colour, "linewidth": width, "label": name}
        losses.plot(range(1, len(run.losses) + 1), run.losses, **line)
        accuracy.plot([e.step for e in run.evaluations], [100 * e.accuracy for e in run.evaluations], marker="o", **line)
    losses.set(title="DPO loss", xlabel="step")
    losses.legend()
    accuracy.axhline(50, color="gray", linewidth=0.8, linestyle=":")
    accuracy.set(title="reward accuracy on held-out pairs", xlabel="step", ylabel="%", ylim=(40, 102))
    accuracy.legend(loc="lower right")
    differences = _differences(runs)
    difference.semilogy(range(1, len(differences) + 1), [max(d, 1e-9) for d in differences], ".-", color="#444444")
    difference.set(title="difference of the two losses (1e-9: none)", xlabel="step")
    _draw_cost(cost, runs, logits_mb)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _draw_cost(axis, runs: dict[str, Run], logits_mb: float) -> None:
    meters = [run.meter for run in runs.values()]
    groups = [("milliseconds", [1e3 * m.median_seconds for m in meters])]
    if all(m.median_peak_mb is not None for m in meters):
        groups.append(("peak MB", [m.median_peak_mb for m in meters]))
    for i, (name, colour) in enumerate(zip(runs, _COLOURS, strict=True)):
        bars = axis.bar([g + 0.38 * (i - 0.5) for g in range(len(groups))], [values[i] for _, values in groups], 0.36, color=colour, label=name)
        axis.bar_label(bars, fmt="%.0f")
    axis.set_xticks(range(len(groups)), [name for name, _ in groups])
    axis.margins(y=0.25)  # room for the legend
    axis.set(title=f"cost of the loss, forward and backward ({logits_mb:.0f} MB of logits)")
    axis.legend(loc="upper center", ncols=2)
