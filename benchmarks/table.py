"""Measured cases as text: `python benchmarks/table.py [--markdown] benchmarks/results/*.json`"""

import argparse
import json

EAGER = "eager log_softmax"  # what ratios are given against: float32 log_softmax, and gather, entropy, F.kl_div from its log-probabilities


def ratios(case: dict, phase: str = "total") -> dict[str, dict[str, float]]:
    """Each contender's speed-up over the eager baseline, the fastest eager and the fastest compiled one."""
    ms = {r["name"]: r[phase]["ms"] for r in case["results"] if phase in r}
    kinds = {r["name"]: r["kind"] for r in case["results"]}
    base = {
        "eager": ms.get(EAGER),
        "best eager": min((t for n, t in ms.items() if kinds[n] == "eager"), default=None),
        "compiled": min((t for n, t in ms.items() if kinds[n] == "compiled"), default=None),
    }
    return {name: {b: t / mine for b, t in base.items() if t is not None} for name, mine in ms.items()}


def columns(rows: list[list[str]], words: int = 1) -> str:
    """The first `words` columns left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) if i < words else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in rows)


def _ms(entry, *phases):
    return [f"{entry[phase]['ms']:.3f}" if phase in entry else "-" for phase in phases]


def _of_copy(entry):
    return [f"{100 * entry[phase]['of_copy']:.1f}%" if phase in entry else "-" for phase in ("forward", "backward")]


def _faster_than(ratio, *baselines):
    return [f"{ratio[name]:.2f}" if name in ratio else "-" for name in baselines]


def _total(entry):
    return entry.get("total", entry["forward"])


def _fastest_first(case):
    return sorted(case["results"], key=lambda entry: _total(entry)["ms"])


def megabytes(entry):
    return "-" if entry["peak_bytes"] is None else f"{entry['peak_bytes'] / 1e6:,.0f}"


def render(case: dict) -> str:
    head = f"{case['computes']}, {case['dtype']}, N = {case['rows']:,}, V = {case['vocab']:,}, {case['device']}: copy {case['copy_gb_s']:,.0f} GB/s"
    if case.get("replayed"):
        head += f" (of {case['copy_of']}); replayed"
    speedups = ratios(case)
    rows = [["", "fwd ms", "bwd ms", "both ms", "spread", "fwd/copy", "bwd/copy", "x eager", "x best eager", "x compiled", "extra MB", "error"]]
    for entry in _fastest_first(case):
        times = [*_ms(entry, "forward", "backward", "total"), f"{100 * _total(entry)['spread']:.1f}%", *_of_copy(entry)]
        gains = _faster_than(speedups.get(entry["name"], {}), "eager", "best eager", "compiled")
        error = "-" if entry["logp_error"] is None else f"{entry['logp_error']:.1e}"
        rows.append([entry["name"], *times, *gains, megabytes(entry), error])
    lines = [head, columns(rows)] + [f"  not measured: {name}: {why}" for name, why in case["skipped"].items()]
    return "\n".join(lines)


def _compact_rows(case: dict) -> list[list[str]]:
    speedups = ratios(case)
    head = f"{case['computes']} {case['dtype']} {case['rows']}x{case['vocab']}, copy {case['copy_gb_s']:,.0f} GB/s"
    rows = [[head, "fwd ms", "bwd ms", "fwd", "bwd", "x eager", "x comp.", "MB"]]
    for entry in _fastest_first(case):
        gains = _faster_than(speedups.get(entry["name"], {}), "eager", "compiled")
        rows.append([entry["name"], *_ms(entry, "forward", "backward"), *_of_copy(entry), *gains, megabytes(entry)])
    return rows


def compact(case: dict) -> str:
    return columns(_compact_rows(case))


def overview(cases: list[dict]) -> str:
    """One line per case: rlkern, and the fastest of everything that it is compared with."""
    rows = [["", "copy GB/s", "fwd ms", "bwd ms", "fwd", "bwd", "in place", "x eager", "x best eager", "x compiled", "best peer"]]
    for case in cases:
        mine = next((r for r in case["results"] if r["name"] == "rlkern"), None)
        if mine is None:
            continue
        in_place = next((r for r in case["results"] if r["kind"] == "rlkern" and r["in_place"]), {})
        peers = [r for r in case["results"] if r["kind"] == "peer" and "total" in r]
        peer = min(peers, key=lambda r: r["total"]["ms"], default=None)
        times = [*_ms(mine, "forward", "backward"), *_of_copy(mine), *_ms(in_place, "total")]
        gains = _faster_than(ratios(case)["rlkern"], "eager", "best eager", "compiled")
        best = f"{peer['name']} x {peer['total']['ms'] / mine['total']['ms']:.2f}" if peer else "-"
        name = f"{case['computes']} {case['dtype']} {case['rows']}x{case['vocab']}"
        rows.append([name, f"{case['copy_gb_s']:,.0f}", *times, *gains, best])
    return columns(rows)


def markdown(case: dict) -> str:
    head, *rows = _compact_rows(case)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] + ["---:"] * (len(head) - 1), *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", metavar="JSON")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    for path in args.files:
        with open(path) as file:
            document = json.load(file)
        print(f"{path}: {document['machine']}\n")
        for case in document["cases"]:
            print((markdown if args.markdown else render)(case) + "\n")


if __name__ == "__main__":
    main()
