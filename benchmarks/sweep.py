"""Launch sweep: times the kernels over (BLOCK, num_warps, stages, programs a row or tiles a program), and proposes the table for
triton_kernels/launch.py.

python benchmarks/sweep.py --out sweep.json [--budget 90] [--dtypes bf16 fp32] [--vocabs 151936 ...] [--rows 8192]

What splitting rows over programs is worth shows with few rows: --rows 16, 128, 1024.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time

import torch
from measure import DTYPES, Case, clock, design_bytes, inputs, median, spread
from table import sweep_table

from rlkern.triton_kernels import token_stats as kernels

VOCABS = (151_936, 32_000, 128_256, 262_144, 50_257)
BLOCKS = (1024, 2048, 4096, 8192, 16384, 32768)
WARPS = (1, 2, 4, 8, 16, 32)
STAGES = {"forward": (1, 2, 3, 4), "backward": (1, 2, 3)}
COUNTS = {"forward": (1, 2, 4, 8), "backward": (1, 2, 4, 8, 16)}  # programs a row; tiles a program
_PER_THREAD = (8, 64)  # elements of a tile that a thread holds; outside of this nothing is fast, and registers spill


def shapes(direction: str, current: tuple[int, ...] = (4096, 4, 3, 4)) -> list[tuple[int, ...]]:
    """(BLOCK, num_warps, stages, count): first `current` with every other count, then everything else with the count that `current` has."""
    pairs = [(b, w) for b in BLOCKS for w in WARPS if _PER_THREAD[0] <= b // (32 * w) <= _PER_THREAD[1]]
    counts = [(*current[:3], n) for n in COUNTS[direction] if n != current[3]]
    return counts + [(*pair, s, current[3]) for s in STAGES[direction] for pair in pairs]


def shape_in_use(direction: str, vocab: int, element_size: int) -> tuple[int, ...]:
    """What the table says for contiguous rows."""
    aligned = {"aligned": vocab * element_size % 16 == 0} if direction == "forward" else {}
    return tuple(_table(direction)(vocab, element_size, **aligned))


def _table(direction: str):
    return getattr(kernels, f"{direction}_shape")


@contextlib.contextmanager
def launch_shape(direction: str, shape: tuple[int, ...]):
    """Makes the launcher take `shape` in one direction; what the table holds beyond it stays as it is."""
    table = _table(direction)
    setattr(kernels, f"{direction}_shape", lambda *args, **kwargs: (*shape, *table(*args, **kwargs)[len(shape) :]))
    try:
        yield
    finally:
        setattr(kernels, f"{direction}_shape", table)


class Operators:
    """The two operators on one case, without autograd around them."""

    def __init__(self, case: Case):
        self.case = case
        self.x, self.y, self.grads = inputs(case)
        self.state = self.forward(None)[-1]

    def forward(self, _):
        return torch.ops.rlkern.token_stats(self.x, self.y, None, None, 1.0, -100, 0, 0.0, False)

    def backward(self, _):
        return torch.ops.rlkern.token_stats_backward(self.x, self.y, None, None, 1.0, -100, self.state, *self.grads, None, None, None)

    def copy(self, _):
        return self.x.clone()


def sweep_one(operators: Operators, direction: str, timer, rounds: int, deadline: float) -> list[dict]:
    """Every shape twice, then the promising ones in rounds; fastest first. The shape in use now is the entry marked `current`."""
    case, run = operators.case, getattr(operators, direction)
    current = shape_in_use(direction, case.vocab, operators.x.element_size())
    times: dict[tuple[int, ...], list[float]] = {}
    failed = []
    for shape in [current] + [s for s in shapes(direction, current) if s != current]:
        if times and time.perf_counter() > deadline:
            break
        with launch_shape(direction, shape):
            try:
                timer(run)
                times[shape] = timer(run)
            except Exception as error:  # too many resources for this shape on this card
                failed.append({"shape": shape, "error": f"{type(error).__name__}: {error}"[:120]})
    best = min(t[0] for t in times.values())
    promising = [s for s in times if times[s][0] < 1.05 * best or s == current]
    copies = []
    for _ in range(rounds):
        copies += timer(operators.copy)
        for shape in promising:
            with launch_shape(direction, shape):
                times[shape] += timer(run)
    copy_gb_s = 2 * design_bytes(case, "forward") / median(copies) / 1e6
    entries = [
        {
            "shape": shape,
            "ms": median(t),
            "spread": spread(t) if len(t) > 1 else None,
            "of_copy": design_bytes(case, direction) / median(t) / 1e6 / copy_gb_s,
            "current": shape == current,
        }
        for shape, t in times.items()
    ]
    return sorted(entries, key=lambda e: e["ms"]) + failed


def precompile(cases: list[Case], part: int, parts: int) -> None:
    """Launches this part of all shapes on a few rows, which puts the kernels into Triton's cache on disk."""
    for case in cases:
        operators = Operators(case._replace(rows=16))
        for direction in ("forward", "backward"):
            current = shape_in_use(direction, case.vocab, operators.x.element_size())
            for shape in [current, *shapes(direction, current)][part::parts]:
                with launch_shape(direction, shape), contextlib.suppress(Exception):  # the sweep itself reports what does not run
                    getattr(operators, direction)(None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="sweep.json")
    parser.add_argument("--budget", type=float, default=90.0, metavar="SECONDS")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--vocabs", type=int, nargs="+", default=VOCABS)
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=["bf16", "fp32"])
    parser.add_argument("--jobs", type=int, default=min(14, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--precompile", type=int, nargs=2, metavar=("PART", "PARTS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: nothing to sweep")
        return 0
    hooked = all(hasattr(kernels, f"{d}_shape") for d in ("forward", "backward"))
    if not hooked:
        print("this sweep replaces forward_shape and backward_shape in rlkern.triton_kernels.token_stats, which are no longer there")
        return 1
    started = time.perf_counter()
    deadline = started + args.budget
    cases = [Case("cuda", dtype, args.rows, vocab, "logp+entropy") for dtype in args.dtypes for vocab in args.vocabs]
    cases = [c for c in cases if c.dtype != "fp32" or c.vocab == args.vocabs[0]]
    if args.precompile:
        precompile(cases, *args.precompile)
        return 0
    workers = [subprocess.Popen([sys.executable, *sys.argv, "--precompile", str(i), str(args.jobs)]) for i in range(args.jobs)]
    for worker in workers:
        try:
            worker.wait(max(1.0, deadline - args.budget / 3 - time.perf_counter()))
        except subprocess.TimeoutExpired:
            worker.kill()
    print(f"compiled in {time.perf_counter() - started:.0f} s")
    timer, found = clock("cuda"), []
    for case in cases:
        if time.perf_counter() > deadline:
            print(f"time budget of {args.budget:.0f} s spent; left out: {case} and what follows")
            break
        operators = Operators(case)
        for direction in ("forward", "backward"):
            found.append({**case._asdict(), "direction": direction, "shapes": sweep_one(operators, direction, timer, args.rounds, deadline)})
            with open(args.out, "w") as file:
                json.dump(found, file, indent=1)
        del operators
        torch.cuda.empty_cache()
    print(f"launch sweep, {torch.cuda.get_device_name()}, {time.perf_counter() - started:.0f} s")
    print(sweep_table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
