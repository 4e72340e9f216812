"""The fastest way to launch the kernels of one row and of two on this card: variants beside the one in use.

    python benchmarks/variants.py --out FILE [--budget 90] [--shapes 8192x151936 ...] [--dtypes bf16 fp32]
                                  [--computes logp+entropy reverse_kl jsd]

Rounds are interleaved. First each variant's results are compared with those of the shape in use. A variant
wins where it is faster by more than both spreads together, and nowhere slower by more than that at the same
vocabulary. The winners are printed as a table for triton_kernels/launch.py.
"""

import argparse
import contextlib
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

import torch
from measure import DTYPES, PAIRS, Case, Replay, argument_parser, clock, design_bytes, few_rows, inputs, logits_bytes, median, rotation, spread
from session import write

import rlkern
from rlkern.backends.contract import PairKind
from rlkern.primitives.pair_rows import PairOptions
from rlkern.triton_kernels import pair, token_stats
from rlkern.triton_kernels.launch import BackwardShape, ForwardShape, gpu

COMPUTES = ("logp+entropy", "reverse_kl", "jsd")
SHAPES = ((8192, 151_936), (16_384, 32_768), (64, 151_936), (4096, 262_144), (8192, 50_257))  # the last one's rows start anywhere
REHEARSED = ((2, 1501),)
DIRECTIONS = ("forward", "backward")


def forward_variants(now: ForwardShape) -> dict[str, ForwardShape]:
    """Name -> shape: other numbers of programs a row, other tiles with other pipelines."""
    found = {"now": now}
    found |= {f"{n} programs a row": now._replace(splits=n) for n in (1, 2, 4, 8, 16)}
    tiles = ((1, 1), (2, 1), (2, 2), (1, 2), (0.5, 1), (0.5, 0.5), (0.25, 0.25))
    found |= {_named(shape): shape for shape in (_tile(now, *t)._replace(stages=n) for t in tiles for n in (2, 3, 4, 5))}
    return distinct(found)


def backward_variants(now: BackwardShape) -> dict[str, BackwardShape]:
    found = {"now": now}
    found |= {f"{n} tiles": now._replace(tiles=n) for n in (1, 2, 4, 8)}
    tiles = ((1, 1), (2, 1), (2, 2), (1, 0.5), (0.5, 1), (0.5, 0.5), (0.5, 0.25))
    shapes = [_tile(now, *t)._replace(stages=n, tiles=k) for t in tiles for n in (1, 3) for k in (1, 2)]
    found |= {f"{_named(shape)}, {shape.tiles} tiles": shape for shape in shapes}
    return distinct(found)


def _tile(now, logits: float, warps: float):
    """The shape in use with tiles and programs of so many times their size."""
    return now._replace(block=int(now.block * logits), warps=max(1, int(now.warps * warps)))


def _named(shape) -> str:
    return f"tiles of {shape.block}, {shape.warps} warps, {shape.stages} stages"


def distinct(variants: dict) -> dict:
    """The first name of each shape."""
    names = {}
    for name, shape in variants.items():
        names.setdefault(shape, name)
    return {name: shape for shape, name in names.items()}


def launch_cases() -> list:
    """For the offline report: variants of the shapes that an H100 gets, on rows aligned and not."""
    from offline.cases import DTYPES, LAYOUTS, Case

    card, found = gpu(torch.device("cpu"))._replace(capability=(9, 0)), []
    for layout, dtype in (("V=151936", "bf16"), ("V=50257", "bf16"), ("V=151936", "fp32")):
        row = (card, LAYOUTS[layout][0], DTYPES[dtype].itemsize)
        shapes = {direction: in_use("logp+entropy", direction, *row) for direction in DIRECTIONS}
        tables = {"forward": forward_variants(shapes["forward"]), "backward logp+entropy": backward_variants(shapes["backward"])}
        found += [Case(name, dtype, layout, shape, label) for name, shapes in tables.items() for label, shape in shapes.items()]
    return found


def chooser(computes: str, direction: str) -> tuple:
    """(module, name of its function) that chooses the launch shape"""
    return (pair, f"pair_{direction}_shape") if computes in PAIRS else (token_stats, f"{direction}_shape")


def in_use(computes: str, direction: str, card, vocab: int, element_size: int):
    """What the table says for contiguous rows."""
    module, name = chooser(computes, direction)
    mixture = [computes == "jsd"] if name == "pair_backward_shape" else []
    return getattr(module, name)(card, vocab, element_size, vocab * element_size % 16 == 0, *mixture)


def variants_of(direction: str, case: Case, x: torch.Tensor) -> dict:
    now = in_use(case.computes, direction, gpu(x.device), case.vocab, x.element_size())
    return (forward_variants if direction == "forward" else backward_variants)(now)


@contextlib.contextmanager
def launch_shape(computes: str, direction: str, shape):
    module, name = chooser(computes, direction)
    with mock.patch.object(module, name, lambda *_: shape):
        yield


class Operators:
    """The two operators on one case, without autograd; several copies of the logits for replays."""

    def __init__(self, case: Case):
        self.case, ops = case, torch.ops.rlkern
        x, y, grads = inputs(case)
        self.logits = [x] + [x.clone() for _ in range(rotation(case) - 1 if few_rows(case) else 0)]
        if case.computes in PAIRS:
            self.op, self.backward_op, (other, _), wanted = ops.pair_stats, ops.pair_stats_backward, y, [[True, False]]
            options = PairOptions(1.0, 1.0, -100, getattr(PairKind, case.computes.upper()), 0.5, case.vocab, False, False)
            self.args, self.grads = (other, None, None, None, None, *options), (grads[0], None, None, None, *wanted)
        else:  # no mask, no kept set, the entropy, no softcap, whole rows
            self.op, self.backward_op = ops.token_stats, ops.token_stats_backward
            self.args, self.grads = (y, None, None, 1.0, -100, 0, 0.0, False, True, 0.0, 0, 0), (*grads, None, None, None)
        self.state = self.forward()[-1]

    def forward(self, i: int = 0):
        return self.op(self.logits[i], *self.args)

    def backward(self, i: int = 0):
        gradient = self.backward_op(self.logits[i], *self.args, self.state, *self.grads)
        return gradient[0] if isinstance(gradient, tuple) else gradient

    def copy(self, i: int = 0):
        return self.logits[i].clone()

    def results(self, direction: str) -> torch.Tensor:
        if direction == "backward":
            return self.backward()
        rows = len(self.logits[0])
        return torch.stack([t for t in self.forward() if t.shape == (rows,)])


class Timer:
    """Milliseconds of one launch of a variant: by events, or for few rows by the replay of a graph."""

    def __init__(self, operators: Operators, direction: str, shape):
        self.call, self.shape, self.direction, self.replay = getattr(operators, direction), shape, direction, None
        self.computes = operators.case.computes
        with self.launch():
            self.call()  # compiles
            if few_rows(operators.case):
                calls = [lambda i=i: self.call(i) for i in range(len(operators.logits))]
                self.replay = Replay(calls, operators.case.device)
        self.clock = clock(operators.case.device)

    def launch(self):
        return launch_shape(self.computes, self.direction, self.shape) if self.shape else contextlib.nullcontext()

    def ms(self) -> float:
        if self.replay:
            return self.replay.ms()
        with self.launch():
            return self.clock(lambda _: self.call())[0]


def agrees(operators: Operators, direction: str, shape, expected: torch.Tensor) -> bool:
    """Equal but for the order of sums. Rows are compared few at a time, so that their copies fit."""
    with launch_shape(operators.case.computes, direction, shape):
        found = operators.results(direction)
    tolerance = 1e-5 if direction == "forward" or found.dtype == torch.float32 else 2**-7
    absolute = 1e-5 if direction == "forward" else 1e-7
    pairs = zip(found.split(256), expected.split(256), strict=True)
    return all(((a - b).abs() <= tolerance * b.abs() + absolute).all() for a, b in pairs)


def measure(operators: Operators, direction: str, rounds: int, deadline: float) -> dict:
    """One direction of one case: an entry a variant, fastest first; the one in use is named "now"."""
    case = operators.case
    expected = operators.results(direction)
    timers, entries = {}, {}
    for name, shape in variants_of(direction, case, operators.logits[0]).items():
        entries[name] = {"name": name, "shape": shape._asdict()}
        if "now" in timers and time.perf_counter() > deadline:
            entries[name]["error"] = "left out: no time"
            continue
        try:
            if not agrees(operators, direction, shape, expected):
                entries[name]["error"] = "another result than the shape in use"
                continue
            timers[name] = Timer(operators, direction, shape)
            timers[name].ms()
        except Exception as error:  # too many resources for this shape on this card
            timers.pop(name, None)
            entries[name]["error"] = f"{type(error).__name__}: {str(error)[:160]}"
    del expected
    times, copies = {name: [] for name in timers}, []
    copy = Timer(operators, "copy", None)
    for done in range(rounds):
        if done >= 3 and time.perf_counter() > deadline:
            break
        copies.append(copy.ms())
        for name, timer in timers.items():
            times[name].append(timer.ms())
    for name, found in times.items():
        ms = median(found)
        entries[name] |= {"ms": ms, "min_ms": min(found), "spread": spread(found), "gb_s": design_bytes(case, direction) / ms / 1e6}
    ordered = sorted(entries.values(), key=lambda e: e.get("ms", math.inf))
    copy_gb_s = 2 * logits_bytes(case) / median(copies) / 1e6
    return {**case._asdict(), "direction": direction, "rounds": len(copies), "copy_gb_s": copy_gb_s, "variants": ordered}


def gain(now: dict, other: dict) -> tuple[float, bool]:
    """(the present time over the other's, whether they differ by more than both spreads)"""
    margin = now["ms"] * now["spread"] + other["ms"] * other["spread"]
    return now["ms"] / other["ms"], abs(now["ms"] - other["ms"]) > margin


def winners(found: list[dict]) -> dict[tuple, dict]:
    """(computes, direction, dtype, vocab) -> the winner with its geometric mean gain; absent if none wins."""
    groups: dict[tuple, list[dict]] = {}
    for case in found:
        groups.setdefault((case["computes"], case["direction"], case["dtype"], case["vocab"]), []).append(case)
    best = {}
    for key, cases in groups.items():
        timed = [{e["name"]: e for e in case["variants"] if "ms" in e} for case in cases]
        for name in set.intersection(*(set(t) for t in timed)) - {"now"}:
            gains = [gain(t["now"], t[name]) for t in timed if "now" in t]
            if not gains or any(g < 1 and sure for g, sure in gains) or not any(g > 1 and sure for g, sure in gains):
                continue
            mean = math.prod(g for g, _ in gains) ** (1 / len(gains))
            if key not in best or mean > best[key]["gain"]:
                best[key] = {"name": name, "shape": timed[0][name]["shape"], "gain": mean}
    return best


def summary(found: list[dict]) -> str:
    """The present shape and the fastest ones of each case, and the winners as a table to paste."""
    copy = {}
    for case in found:  # a small copy stays in the cache: the largest of a type counts
        size = case["rows"] * case["vocab"]
        copy[case["dtype"]] = max(copy.get(case["dtype"], (0, 0.0)), (size, case["copy_gb_s"]))
    lines = []
    for case in found:
        timed = [e for e in case["variants"] if "ms" in e]
        now = next((e for e in timed if e["name"] == "now"), None)
        bandwidth = copy[case["dtype"]][1]
        shown = ([now] if now else []) + [e for e in timed if e["name"] != "now"][:4]
        cells = [f"{e['name']} {1e3 * e['ms']:.1f} us ({100 * e['gb_s'] / bandwidth:.1f}%, +-{100 * e['spread']:.1f})" for e in shown]
        lines.append(f"{case['computes']} {case['direction']} {case['dtype']} {case['rows']}x{case['vocab']}: " + "; ".join(cells))
        lines += [f"  FAILED {e['name']}: {e['error']}" for e in case["variants"] if "error" in e]
    lines.append("copy GB/s: " + ", ".join(f"{dtype} {speed:,.0f}" for dtype, (_, speed) in copy.items()))
    lines.append("wins by more than the spread:")
    for (computes, direction, dtype, vocab), best in winners(found).items():
        shape = ", ".join(f"{k}={v}" for k, v in best["shape"].items())
        lines.append(f"  {computes} {direction} {dtype} V={vocab}: {best['name']}, {best['gain']:.3f}x: {direction.capitalize()}Shape({shape})")
    return "\n".join(lines)


def precompile(cases: list[Case], part: int, parts: int) -> None:
    """Launches this part of all variants on a few rows: the kernels are then in Triton's cache on disk."""
    jobs = 0
    for case in cases:
        operators = Operators(case._replace(rows=8))
        for direction in DIRECTIONS:
            for shape in variants_of(direction, case, operators.logits[0]).values():
                jobs += 1
                if jobs % parts == part:
                    with (
                        launch_shape(case.computes, direction, shape),
                        contextlib.suppress(Exception),
                    ):  # the measurement itself reports what does not run
                        getattr(operators, direction)()


def main() -> int:
    parser = argument_parser(__doc__, "rounds")
    parser.add_argument("--out", type=Path, default=Path("variants.json"))
    parser.add_argument("--budget", type=float, default=90.0, metavar="SECONDS")
    parser.add_argument("--shapes", nargs="+", metavar="NxV", help="such as 8192x151936")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=["bf16", "fp32"])
    parser.add_argument("--computes", nargs="+", choices=COMPUTES, default=COMPUTES[:1])
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes in Triton's interpreter: everything but the figures is real")
    parser.add_argument("--jobs", type=int, default=min(14, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--precompile", type=int, nargs=2, metavar=("PART", "PARTS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rehearse:
        args.jobs, args.rounds = 1, 2
    elif not torch.cuda.is_available():
        print("no GPU here: nothing to measure (--rehearse goes through everything in Triton's interpreter)")
        return 1
    rlkern.use_backend("triton")
    device = "cpu" if args.rehearse else "cuda"
    started = time.perf_counter()
    shapes = [tuple(int(n) for n in shape.split("x")) for shape in args.shapes] if args.shapes else REHEARSED if args.rehearse else SHAPES
    cases = [Case(device, dtype, *shape, computes) for dtype in args.dtypes for shape in shapes for computes in args.computes]
    if args.precompile:
        precompile(cases, *args.precompile)
        return 0
    vocabs = dict.fromkeys(vocab for _, vocab in shapes)
    command = [
        sys.executable,
        __file__,
        "--shapes",
        *(f"8x{vocab}" for vocab in vocabs),
        "--dtypes",
        *args.dtypes,
        "--computes",
        *args.computes,
        *(["--rehearse"] * args.rehearse),
    ]
    workers = [subprocess.Popen([*command, "--precompile", str(i), str(args.jobs)]) for i in range(args.jobs)]
    for worker in workers:
        try:
            worker.wait(max(1.0, started + args.budget / 2 - time.perf_counter()))
        except subprocess.TimeoutExpired:
            worker.kill()
    print(f"compiled in {time.perf_counter() - started:.0f} s", flush=True)
    found, document = [], {"summary": "nothing measured"}
    for case in cases:
        if time.perf_counter() > started + args.budget:
            print(f"budget of {args.budget:.0f} s spent; left out: {case} and what follows")
            break
        operators = Operators(case)
        for direction in DIRECTIONS:
            found.append(measure(operators, direction, args.rounds, started + args.budget))
            document = {"rehearsed": args.rehearse, "cases": found, "summary": summary(found)}
            write(args.out, document)
        print(f"{case}: {time.perf_counter() - started:.0f} s", flush=True)
        del operators
        if device == "cuda":
            torch.cuda.empty_cache()
    print(document["summary"])
    wrong = any("another result" in e.get("error", "") for case in found for e in case["variants"])
    return 1 if wrong or not found else 0


if __name__ == "__main__":
    sys.exit(main())
