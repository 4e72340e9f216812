"""`make bench`: time, memory and share of the copy bandwidth, against eager, torch.compile and peers.

    python benchmarks/run.py                  the default set of the GPU, else the CPU; about three minutes
    python benchmarks/run.py --device cpu --dtypes bf16 --shapes 512x32768 --computes logp+entropy
    python benchmarks/run.py --computes reverse_kl jsd    of the default set only these
    python benchmarks/run.py --full                all vocabularies, both dtypes, logp alone too

Writes benchmarks/results/<machine>-<date>.json, case by case, and .png.
"""

import gc
import os
import re
import sys
import time
from pathlib import Path

from contenders import BOTH, LOGP, contenders
from measure import DTYPES, PAIRS, RESULTS, Case, argument_parser, arguments, machine, run_case, share_copy
from session import write
from table import render

VOCABULARIES = (32_000, 128_256, 151_936, 262_144, 50_257)
_CPU_SHAPES = ((512, 32_768), (128, 151_936))
_GPU_SHAPES = ((8192, 151_936), (16_384, 32_768), (64, 151_936), (4096, 262_144))


def default_cases(device: str, full: bool = False) -> list[Case]:
    """Most telling cases first: a time budget cuts the list from its end."""
    if device == "cuda":
        first, second, *others = _GPU_SHAPES
        cases = [Case(device, "bf16", *first, kind) for kind in (BOTH, LOGP, *PAIRS)]
        cases += [Case(device, "bf16", *second, kind) for kind in (BOTH, *PAIRS)]
        cases += [Case(device, "bf16", *shape, BOTH) for shape in others]
        cases += [Case(device, "fp32", *shape, BOTH) for shape in _GPU_SHAPES]
        if full:
            rest = [(first[0], v) for v in VOCABULARIES if v != first[1]]
            cases += [Case(device, dtype, *shape, kind) for dtype in ("bf16", "fp32") for shape in rest for kind in (BOTH, LOGP)]
        return cases
    cases = [Case(device, dtype, *shape, BOTH) for dtype in ("bf16", "fp32") for shape in _CPU_SHAPES]
    cases += [Case(device, "bf16", *_CPU_SHAPES[0], kind) for kind in (LOGP, *PAIRS)]
    if full:
        cases += [Case(device, dtype, max(32, (1 << 24) // v), v, BOTH) for dtype in ("bf16", "fp32") for v in VOCABULARIES if v != 151_936]
        cases += [Case(device, "fp16", *_CPU_SHAPES[0], BOTH), Case(device, "bf16", *_CPU_SHAPES[1], LOGP)]
    return cases


def rehearsal_cases() -> list[Case]:
    """One of each kind that a GPU is given, tiny, for a processor: the last one is replayed."""
    return [*(Case("cpu", "bf16", 2, 300, kind) for kind in (BOTH, LOGP, *PAIRS)), Case("cpu", "fp32", 1, 300, BOTH)]


def slug(info: dict, device: str) -> str:
    name = info.get("gpu", "gpu") if device == "cuda" else "cpu " + re.sub(r"\(.*?\)|CPU|Processor|@.*", "", info["cpu"])
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def save(document: dict, folder: str, name: str) -> str:
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, name + ".json")
    write(Path(path), document)
    return path


def measure_all(cases, rounds, budget, log=print, on_case=lambda document: None, compiled=True, peers=True, replayed=()) -> dict:
    """Runs `cases` for `budget` seconds; names those that did not fit. `replayed`: to replay on a CPU too."""
    document = {"machine": machine(), "cases": [], "absent": [], "left_out": []}
    found, document["absent"] = contenders(cases[0].device, peers)
    for line in document["absent"]:
        log(f"absent: {line}")
    gc.collect()
    gc.freeze()  # garbage is collected after each contender: that passes over what is imported
    started = time.perf_counter()
    for i, case in enumerate(cases):
        spent = time.perf_counter() - started
        if spent > budget:
            document["left_out"] = [str(c) for c in cases[i:]]
            log(f"time budget of {budget:.0f} s spent; left out: {'; '.join(document['left_out'])}")
            break
        # The compiler takes most of the time: once two thirds of it are gone, the remaining cases do without.
        skip_slow = not compiled or spent > 2 / 3 * budget
        measured = run_case(case, found, rounds, log, skip_slow, replayed=True if case in replayed else None)
        document["cases"].append(measured)
        share_copy(document["cases"])
        log(f"\n{render(measured)}\n  ({time.perf_counter() - started - spent:.0f} s)")
        sys.stdout.flush()
        on_case(document)
    return document


def main() -> int:
    parser = argument_parser(__doc__, "device", "rounds", "threads")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), help="only these of the default set; with --shapes: bf16 by default")
    parser.add_argument("--shapes", nargs="+", metavar="NxV", help="replaces the default set: such as 512x32768")
    parser.add_argument("--computes", nargs="+", choices=(BOTH, LOGP, *PAIRS), help=f"only these of the default set; with --shapes: {BOTH}")
    parser.add_argument("--full", action="store_true", help="all vocabularies and dtypes")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-peers", action="store_true", help="leave other packages' kernels out")
    parser.add_argument("--no-plot", action="store_true", help="write the JSON alone")
    parser.add_argument("--rehearse", action="store_true", help="a few tiny cases on the processor, to see that everything runs")
    parser.add_argument("--budget", type=float, default=1e9, metavar="SECONDS", help="start no further case after this time")
    parser.add_argument("--out", default=RESULTS, help="folder for the JSON and the PNG")
    parser.add_argument("--name", help="file name without its ending (default: <machine>-<date>)")
    args = arguments(parser)
    if args.rehearse:
        args.device = "cpu"
    cases = default_cases(args.device, args.full)
    if args.shapes:
        shapes = [tuple(int(n) for n in shape.replace(",", "").split("x")) for shape in args.shapes]
        cases = [Case(args.device, dtype, *shape, kind) for kind in args.computes or [BOTH] for dtype in args.dtypes or ["bf16"] for shape in shapes]
    else:
        cases = [case for case in cases if case.dtype in (args.dtypes or DTYPES) and case.computes in (args.computes or (BOTH, LOGP, *PAIRS))]
    if not cases:
        parser.error("the default set holds no such case: --shapes makes one")
    replayed = []
    if args.rehearse:
        cases, replayed, args.rounds = rehearsal_cases(), rehearsal_cases()[-1:], 2

    info = machine()
    print("\n".join(f"{key}: {value}" for key, value in info.items()))
    name = args.name or f"{slug(info, args.device)}-{info['date'][:10]}"
    options = {"compiled": not args.no_compile, "peers": not args.no_peers, "replayed": replayed}
    document = measure_all(cases, args.rounds, args.budget, on_case=lambda d: save(d, args.out, name), **options)
    path = save(document, args.out, name)
    print(f"\nwrote {path}")
    if args.no_plot:
        return 0
    try:
        from plot import plot

        print(f"wrote {plot(document, path.removesuffix('.json') + '.png')}")
    except ImportError as error:
        print(f"no plot: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
