"""Random calls, numerical properties and steered bytes, for some minutes. Exit status 1 if anything is wrong.

    make fuzz                                       # ten minutes
    make fuzz ARGS="--minutes 30 --seed 1"
    make fuzz ARGS="--parts random --calls 20000"   # RLKERN_BACKEND=reference tries another backend
    make fuzz ARGS="--only 1234"                    # what was found, again, with its traceback

The package's docstring says what the parts are.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.util
import os
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

from fuzz.parts import Outcome, python, watch  # noqa: E402

FOLDER = ROOT / "build" / "fuzz"
SHARES = {"random": 0.25, "properties": 0.3, "arguments": 0.15, "kernels": 0.3}  # of the time
STEERED = ("arguments", "kernels")


def child(part: str, seed: int, calls: int, first: int, end: float) -> None:
    """What a child process does: its calls from the first on, until `end` of time.monotonic()."""
    warnings.filterwarnings("ignore")
    if part in STEERED:
        from fuzz import steered

        return steered.run(part, FOLDER, seed + first, end)
    if part == "properties":
        from fuzz import properties

        return properties.search(FOLDER, seed, first, end)
    from fuzz import random_calls

    random_calls.search(seed, first, calls, end)


def again(where: str, seed: int) -> str | None:
    """One finding again, loudly: what is wrong with it, or None."""
    faulthandler.enable()
    warnings.filterwarnings("ignore")
    from fuzz import byte_calls, properties, random_calls

    if where.isdecimal():
        drawn = random_calls.draw(seed, int(where))
        print(random_calls.describe(drawn))
        return random_calls.run(drawn, loud=True)
    if ":" in where:
        return properties.again(where, seed)
    part, data = Path(where).name.partition("-")[0], Path(where).read_bytes()
    print(random_calls.describe(byte_calls.draw(part, data)[0]), flush=True)
    return byte_calls.run(part, data, loud=True)


def commands(part: str, options: argparse.Namespace):
    """(calls so far, when to end) -> the command of a child."""
    return lambda first, end: python("--child", part, first, end, "--seed", options.seed, "--calls", options.calls)


def crashes(part: str):
    """What `call` said last -> where a crash is: for bytes, the file that libFuzzer left."""
    log, start = FOLDER / f"{part}.log", time.time()
    if part not in STEERED:
        return lambda last: last or os.path.relpath(log)

    def newest(last: str) -> str:
        left = [(path.stat().st_mtime, path) for kind in ("crash", "timeout", "oom") for path in FOLDER.glob(f"{part}-{kind}-*")]
        return os.path.relpath(max((file for file in left if file[0] >= start), default=(0, log))[1])

    return newest


def summary(outcomes: list[Outcome], everything: dict[str, tuple[int, str]]) -> str:
    rows = [("part", "calls", "covered", "findings", "seconds")]
    for o in outcomes:
        number, what = everything[o.name]
        rows.append((o.name, f"{o.calls:,}", f"{len(o.covered)} of {number} {what}", str(len(o.findings)), f"{o.seconds:.0f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows)


def everything() -> dict[str, tuple[int, str]]:
    """How much each part could cover."""
    from calls import CALLS

    from fuzz import byte_calls, properties

    return {
        "random": (len({call.name for call in CALLS}), "public calls"),
        "properties": (len(properties.PROPERTIES), f"properties, each on {', '.join(properties.native.isas())}"),
        "arguments": (byte_calls.everything("arguments"), "public calls, those of parts of rows too"),
        "kernels": (byte_calls.everything("kernels"), f"C++ functions on {', '.join(properties.native.isas())}"),
    }


def search(options: argparse.Namespace) -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    parts = [part for part in SHARES if part in options.parts]
    if importlib.util.find_spec("atheris") is None and set(STEERED) & set(parts):
        parts = [part for part in parts if part not in STEERED]
        print(f"{' and '.join(STEERED)}: left out, atheris is not installed (it has wheels for CPython 3.10 to 3.13 on x86-64 Linux)")
    outcomes, repeats = [], []

    def told(where: str, what: str) -> None:
        print(f"{where}: {what}".replace(" | ", "\n    "), flush=True)
        repeats.append(f"cat {where}" if where.endswith(".log") else f'make fuzz ARGS="--seed {options.seed} --only {where}"')

    for part in parts:
        seconds = 60 * options.minutes * SHARES[part] / sum(SHARES[part] for part in parts)
        outcomes.append(watch(part, commands(part, options), seconds, told, crashes(part), FOLDER / f"{part}.log"))
        print(f"{part}: {outcomes[-1].calls:,} calls, {len(outcomes[-1].findings)} findings", flush=True)
    print(f"\n{summary(outcomes, everything())}")
    if repeats:
        print("\n".join(["", "Again, one by one:", *repeats]))
    return 1 if repeats else 0


def positive(text: str) -> float:
    if not 0 < (value := float(text)) < float("inf"):
        raise ValueError
    return value


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=positive, default=10.0, help="for all parts together (10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calls", type=int, default=10**9, help="at most so many of the random part")
    parser.add_argument("--parts", nargs="+", choices=list(SHARES), default=list(SHARES), metavar="part", help=f"some of {', '.join(SHARES)}")
    parser.add_argument("--only", metavar="WHERE", help="what a line of findings begins with: the index of a random call, a property, a file")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        part, first, end = options.child
        child(part, options.seed, options.calls, int(first), float(end))
        return 0
    if options.only is not None:
        of_bytes = Path(options.only).is_file() and Path(options.only).name.startswith(tuple(f"{part}-" for part in STEERED))
        if not options.only.isdecimal() and ":" not in options.only and not of_bytes:
            parser.error(f"--only takes the index of a random call, property:round or a file that make fuzz wrote, got {options.only}")
        wrong = again(options.only, options.seed)
        print(wrong or "nothing wrong")
        return 1 if wrong else 0
    return search(options)


if __name__ == "__main__":
    sys.exit(main())
