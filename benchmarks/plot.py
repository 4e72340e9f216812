"""The measured cases as one figure: a bar of time per contender, the fastest on top."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_COLOURS = {"rlkern": "#0a7d5a", "peer": "#5b6abf", "compiled": "#c98a1b", "eager": "#a34a4a"}


def plot(document: dict, path: str) -> str:
    cases = [case for case in document["cases"] if case["results"]]
    if not cases:
        raise ValueError("nothing measured, so nothing to draw")
    heights = [1.2 + 0.3 * len(case["results"]) for case in cases]
    figure, axes = plt.subplots(len(cases), 1, figsize=(9, sum(heights)), squeeze=False, gridspec_kw={"height_ratios": heights}, layout="constrained")
    for axis, case in zip(axes[:, 0], cases, strict=True):
        _draw(axis, case)
    info = document["machine"]
    figure.suptitle(f"{info.get('gpu') if cases[0]['device'] == 'cuda' else info['cpu']}, torch {info['torch']}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _draw(axis, case):
    entries = sorted(case["results"], key=lambda r: r.get("total", r["forward"])["ms"], reverse=True)
    for i, entry in enumerate(entries):
        colour, forward, total = _COLOURS[entry["kind"]], entry["forward"]["ms"], entry.get("total", entry["forward"])["ms"]
        axis.barh(i, forward, color=colour)
        axis.barh(i, total - forward, left=forward, color=colour, alpha=0.55)
        axis.text(total, i, f" {total:,.0f}" if total >= 100 else f" {total:.3g}", va="center", fontsize=8)
    axis.set_yticks(range(len(entries)), [e["name"] for e in entries], fontsize=8)
    floor = case.get("passes", 3) / 2 * case["copy_ms"]
    axis.axvline(floor, color="black", lw=0.8, ls=":")
    axis.set_title(
        f"{case['computes']}, {case['dtype']}, {case['rows']:,} x {case['vocab']:,}: ms forward (dark) + backward (light); "
        f"dotted: the bytes that must move, at copy speed",
        fontsize=8,
        loc="left",
    )
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
