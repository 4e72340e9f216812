"""What the diffusion example shows: a table, a CSV file of the summary and one of the rewards, a picture."""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .diffusion_memory import Memory
from .diffusion_train import Differences, Run
from .seeds import smooth

Key = tuple[str, int]  # objective, number of draws

_STYLES = {"naive": ("#a34a4a", "o", "-"), "exact": ("#3b6fb6", "s", "--"), "bound": ("#0a7d5a", "^", ":")}
_LABELS = {"naive": "naive: all graphs kept", "exact": "exact: two passes", "bound": "bound: BGPO"}


def _axes(results: dict[Key, object]) -> tuple[list[str], list[int]]:
    """The objectives and the numbers of draws, each in order."""
    return list(dict.fromkeys(o for o, _ in results)), sorted({n for _, n in results})


def growth(memory: dict[Key, Memory], objective: str) -> tuple[float, float | None]:
    """Retained bytes and peak with the most draws, as multiples of those with the fewest."""
    samples = _axes(memory)[1]
    least, most = memory[objective, samples[0]], memory[objective, samples[-1]]
    return most.retained / least.retained, None if least.peak is None else most.peak / least.peak


def _megabytes(value: int | None) -> str:
    return "not measured" if value is None else f"{value / 1e6:.1f}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def print_gradients(differences: dict[str, Differences], n: int) -> None:
    print(f"\ngradients in float64, {n} draws, largest difference from naive autograd relative to its largest entry:")
    print(f"{'':<9}{'on-policy':>12}{'after one update':>20}")
    for objective, d in differences.items():
        print(f"{objective:<9}{d.on_policy:>12.1e}{d.off_policy:>20.1e}")


def print_memory(memory: dict[Key, Memory]) -> None:
    objectives, samples = _axes(memory)
    print("\nmemory of an update in MB: the most that autograd retained / highest rise of the process's resident set (Linux)")
    print(f"{'':<9}" + "".join(f"{f'n = {n}':>20}" for n in samples) + f"{f'n = {samples[-1]} : n = {samples[0]}':>20}")
    for objective in objectives:
        cells = [f"{_megabytes(m.retained)} / {_megabytes(m.peak)}" for m in (memory[objective, n] for n in samples)]
        print(f"{objective:<9}" + "".join(f"{cell:>20}" for cell in (*cells, " / ".join(map(_times, growth(memory, objective))))))


def print_runs(runs: dict[Key, Run], before: float) -> None:
    objectives, samples = _axes(runs)
    print(f"\nshare of held-out puzzles solved at the end, from {before:.1%}; in brackets CPU seconds of the run")
    print(f"{'':<9}" + "".join(f"{f'n = {n}':>16}" for n in samples))
    for objective in objectives:
        cells = (f"{r.solved:.1%} ({r.seconds:.0f})" for r in (runs[objective, n] for n in samples))
        print(f"{objective:<9}" + "".join(f"{cell:>16}" for cell in cells))


def write_csv(memory: dict[Key, Memory], runs: dict[Key, Run], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    summary, rewards = folder / "diffusion_rl.csv", folder / "diffusion_rl_rewards.csv"
    with summary.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["objective", "n", "retained_bytes", "peak_bytes", "held_out_solved", "cpu_seconds"])
        for (objective, n), run in runs.items():
            m = memory[objective, n]
            table.writerow([objective, n, m.retained, m.peak, f"{run.solved:.6f}", f"{run.seconds:.3f}"])
    with rewards.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["objective", "n", "step", "reward"])
        for (objective, n), run in runs.items():
            table.writerows([objective, n, step, f"{reward:.6f}"] for step, reward in enumerate(run.reward, 1))
    return [summary, rewards]


def draw(memory: dict[Key, Memory], runs: dict[Key, Run], before: float, held_out: int, path: Path) -> Path:
    """Memory over n, reward over the steps, solved puzzles over n. Returns the path written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    objectives, samples = _axes(memory)
    for objective in objectives:
        colour, marker, dash = _STYLES[objective]
        line = {"color": colour, "marker": marker, "markerfacecolor": "none"}
        found = [memory[objective, n] for n in samples]
        left.plot(samples, [m.retained / 1e6 for m in found], linestyle=":", **line)
        if all(m.peak is not None for m in found):
            left.plot(samples, [m.peak / 1e6 for m in found], label=_LABELS[objective], **line)
        for n, width in ((samples[0], 0.9), (samples[-1], 2.2)):
            reward = runs[objective, n].reward
            window = max(1, len(reward) // 8)
            means = smooth(reward, window)
            middle.plot(range(1, len(reward) + 1), means, color=colour, linestyle=dash, linewidth=width, label=f"{objective}, n = {n}")
        shares = [runs[objective, n].solved for n in samples]
        errors = [(p * (1 - p) / held_out) ** 0.5 for p in shares]
        offset = 1.06 ** (objectives.index(objective) - 1)  # so that the three do not hide each other
        right.errorbar([n * offset for n in samples], shares, errors, capsize=3, label=_LABELS[objective], **line)
    left.set(title="memory of an update (dotted: retained by autograd)", xlabel="draws n", ylabel="MB", xscale="log", yscale="log")
    middle.set(title="reward of the sampled answers (moving mean)", xlabel="step")
    right.axhline(before, color="gray", linewidth=0.8, linestyle=":", label="before")
    right.set(title="held-out puzzles solved at the end (bars: sampling error)", xlabel="draws n", xscale="log")
    for axis in (left, right):
        axis.set_xticks(samples, [str(n) for n in samples], minor=False)
        axis.minorticks_off()
    for axis in (left, middle, right):
        axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
