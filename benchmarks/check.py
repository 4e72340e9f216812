"""`make bench-check`: compares speed-ups over eager PyTorch with the committed ones; exits 1 beyond 15 %.

    python benchmarks/check.py [--device cpu] [--against benchmarks/results/cpu-....json] [--tolerance 0.15]

Reruns a small set. Ratios only, never absolute times: both sides run in the same rounds, so a slower clock or
a busy machine slows both. Ratios still depend on the processor: results of another one are compared but not
judged (--strict judges them too). A case that fails is measured once more, and the better of the two counts.
"""

import glob
import json
import os
import sys

from contenders import BOTH, EAGER, contenders
from measure import RESULTS, Case, argument_parser, arguments, machine, run_case
from table import columns, ratios

_CHECKED = ("rlkern", "rlkern, in place")


def same_machine(a: dict, b: dict) -> bool:
    """The same GPU; without one the same processor, instruction set and number of threads."""
    if "gpu" in a or "gpu" in b:
        return a.get("gpu") == b.get("gpu")
    return all(a.get(key) == b.get(key) for key in ("cpu", "threads")) and _isa(a) == _isa(b)


def _isa(info: dict) -> str:
    return info.get("native", "").split("(")[0]


def find_committed(here: dict, device: str, folder: str) -> str | None:
    """The newest committed results of this kind of machine, else the newest of another."""
    newest_first = sorted(glob.glob(os.path.join(folder, "*.json")), key=lambda p: p[-len("2026-01-01.json") :], reverse=True)
    paths = [p for p in newest_first if any(c["device"] == device for c in json.load(open(p)).get("cases", []))]
    return next((p for p in paths if same_machine(json.load(open(p))["machine"], here)), paths[0] if paths else None)


def small_set(document: dict, device: str, limit: int) -> list[dict]:
    """The committed cases worth rerunning: logp and entropy, the ones that take least time first."""
    cases = [c for c in document["cases"] if c["device"] == device and c["computes"] == BOTH]
    return sorted(cases, key=lambda c: next((r["total"]["ms"] for r in c["results"] if r["name"] == EAGER), 1e9))[:limit]


def speedups(case: dict) -> dict[str, float]:
    """Over the eager baseline, forward + backward, of the contenders under guard."""
    return {name: r["eager"] for name, r in ratios(case).items() if name in _CHECKED and "eager" in r}


def compare(committed: dict[str, float], measured: dict[str, float], tolerance: float) -> dict[str, float]:
    """measured / committed of the names that fell by more than `tolerance`; a missing one counts as 0."""
    return {name: now / was for name, was in committed.items() if (now := measured.get(name, 0.0)) < (1 - tolerance) * was}


def check(case: dict, rounds: int, tolerance: float) -> tuple[dict[str, float], dict[str, float]]:
    """(measured speed-ups, those that fell back) of one committed case."""
    wanted = [c for c in contenders(case["device"])[0] if c.name in (*_CHECKED, EAGER)]
    best: dict[str, float] = {}
    for _ in range(2):
        again = run_case(Case(*(case[field] for field in Case._fields)), wanted, rounds)
        best = {name: max(value, best.get(name, 0.0)) for name, value in speedups(again).items()}
        if not compare(speedups(case), best, tolerance):
            break
    return best, compare(speedups(case), best, tolerance)


def main() -> int:
    parser = argument_parser(__doc__, "device", "rounds", rounds=9)
    parser.add_argument("--against", metavar="JSON", help="committed results (default: the newest of this machine's kind)")
    parser.add_argument("--tolerance", type=float, default=0.15)
    parser.add_argument("--cases", type=int, default=3)
    parser.add_argument("--strict", action="store_true", help="judge also against results of another machine")
    args = arguments(parser)
    here = machine()
    if args.device == "cpu":
        here.pop("gpu", None)
    path = args.against or find_committed(here, args.device, RESULTS)
    if path is None:
        print(f"no committed results for {args.device} under {RESULTS}: `make bench` writes them")
        return 1
    with open(path) as file:
        document = json.load(file)
    judged = args.strict or same_machine(document["machine"], here)
    rows, failed = [["speed-up over " + EAGER, "committed", "now", "now / committed", ""]], False
    for case in small_set(document, args.device, args.cases):
        measured, fallen = check(case, args.rounds, args.tolerance)
        failed |= bool(fallen)
        for name, was in speedups(case).items():
            now = measured.get(name, 0.0)
            verdict = "FELL BACK" if name in fallen else "ok"
            rows.append([f"{name}, {case['dtype']}, {case['rows']} x {case['vocab']}", f"{was:.2f}", f"{now:.2f}", f"{now / was:.2f}", verdict])
    print(f"against {os.path.relpath(path)}, tolerance {100 * args.tolerance:.0f} %\n{columns(rows)}")
    if len(rows) == 1:
        print("these results hold no case to compare")
        return 1
    if not judged:
        print(f"not judged: recorded on another machine ({describe(document['machine'])}; this is {describe(here)}); --strict judges all the same")
        return 0
    return 1 if failed else 0


def describe(info: dict) -> str:
    return info.get("gpu") or f"{info.get('cpu')}, {info.get('threads')} threads, {_isa(info).strip()}"


if __name__ == "__main__":
    sys.exit(main())
