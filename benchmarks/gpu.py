"""`make gpu`: rlkern on this machine's GPU, in two stages of five to seven minutes each, without a network.

    python benchmarks/gpu.py [--stage first] [--steps tests,bench] [--variants "--computes jsd"] [--rehearse]
    PEERS=folder python benchmarks/gpu.py --stage second      (by default build/peers, filled by `make peers`)

first (330 seconds at most; what decides whether the kernels are right and fast):

    install    the project into a temporary folder, as users do; where that fails the Python files alone
    tests      full size, dtypes, layouts, CUDA graphs, no host sync; every primitive, every public function
    variants   launch shapes against each other, by --variants with options of benchmarks/variants.py
    bench      rlkern against eager PyTorch, one row and two rows, beside the card's own copy bandwidth

second (400 seconds at most; no CPU kernels, which it does not need):

    peers      unpacks the packages to compare with
    compile    compiles and checks every kernel variant, for the sanitizer
    bench      again, with torch.compile, as far as there is time for it, and the peers
    suite      the Triton half of the ordinary tests, on the card; beside it
    memcheck, racecheck   compute-sanitizer over every kernel variant, side by side
    keep       rows over kept ids, by format, against all ids and eager PyTorch
    ncu        Nsight Compute on one launch of each direction

Each step has its own time limit and runs whatever became of the others. Results are written as they come, to
benchmarks/results/<gpu>-<date>.json and .png, to which the second stage adds. $OUT (else out/) gets the same,
the logs, the figures of each benchmark and the profile. Exits 1 if a step failed, and names it in the last
line. --rehearse does all of it on a processor, on tiny inputs, and writes into a temporary folder (or $OUT).
"""

import argparse
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from session import FILES, ROOT, TOTALS, Group, Session, Step

STARTED = time.monotonic()
BENCHMARKS, RESULTS = ROOT / "benchmarks", ROOT / "benchmarks" / "results"
TESTS = tuple(f"tests/test_{name}.py" for name in ("gpu", "gpu_primitives", "gpu_smoke"))
KERNELS = ("triton_token_stats", "launch_shapes", "token_stats", "ratio", "selection", "covariance", "unread_rows", "sequence_sums")
SECOND_ROWS = ("triton_pair", "triton_moments", "did")
USERS = ("operator", "elbo", "bgpo_options", "kinks", "metrics", "default_dtype")
SUITE = tuple(f"tests/test_{name}.py" for name in (*KERNELS, *SECOND_ROWS, *USERS))
DRAWN = "drawn_inputs"  # dozens of kernels one after the other in one worker
REHEARSED = ("tests/test_triton_token_stats.py",), ("-k", "every_type or skipped")
CHOICE = ("tests", "variants", "compile", "bench", "suite", "memcheck", "racecheck", "keep", "ncu")
START_AND_END = 25  # seconds that a script needs before it begins its first case, and for the last one that it has begun

ASK = """
import sys, torch
if not torch.cuda.is_available():
    sys.exit(f"PyTorch {torch.__version__} (built for CUDA {torch.version.cuda}, HIP {torch.version.hip}) sees no GPU here")
print("GPU:", torch.cuda.get_device_name())
"""


class Plan:
    """The steps of both stages: on a GPU, or with `rehearse` the same scripts, tiny, on a processor."""

    def __init__(self, session: Session, work: Path, rehearse: bool = False, variants: str = ""):
        self.options_of_variants = variants.split()
        self.session, self.rehearse, self.site, self.peers = session, rehearse, work / "site", work / "peers"
        session.env["PYTHONPATH"] = os.pathsep.join([str(self.site), str(self.peers), str(BENCHMARKS)])
        if rehearse:
            session.env |= {"TRITON_INTERPRET": "1", "RLKERN_BACKEND": "triton", "PATH": f"{stand_ins(work)}{os.pathsep}{os.environ['PATH']}"}

    def groups(self) -> list[Group]:
        return self.first() if self.session.stage == "first" else self.second()

    def first(self) -> list[Group]:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--target", self.site, ROOT]
        install = [] if self.rehearse else [[Step("install", 60, lambda limit: pip, otherwise=self.python_files)]]
        if self.rehearse:
            self.python_files()
        out = self.session.out / FILES["first"]["variants"]
        variants = [sys.executable, BENCHMARKS / "variants.py", "--out", out, *self.options_of_variants, *(["--rehearse"] if self.rehearse else [])]
        steps = [
            self.pytest("tests", 150, TESTS),
            Step("variants", 45, lambda limit: [*variants, "--budget", round(limit) - START_AND_END], elastic=True, least=START_AND_END + 10),
            self.bench(60, "--no-compile", "--no-peers"),
        ]
        return [[[self.card(60)], *install], *([[step]] for step in steps)]

    def second(self) -> list[Group]:
        self.python_files()
        folder = Path(os.environ.get("PEERS") or ROOT / "build" / "peers").resolve()
        peers = Step("peers", 15, lambda limit: [sys.executable, BENCHMARKS / "peers.py", folder, self.peers])
        script = [sys.executable, BENCHMARKS / "sanitize.py", *(["--rehearse"] if self.rehearse else [])]
        # Several processes compile and check the kernels; the tool then finds them in Triton's cache.
        compiled = Step("compile", 80, lambda limit: [*script, "--jobs", min(14, os.cpu_count() or 1)])
        # Without PyTorch's caching allocator each tensor is its own allocation: a read past its end is seen.
        sanitizer = [self.tool("compute-sanitizer"), "--error-exitcode", "9", "--print-limit", "20"]
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        memcheck = Step("memcheck", 150, lambda limit: [*sanitizer, "--tool", "memcheck", "--report-api-errors", "no", *script], env)
        racecheck = Step("racecheck", 150, lambda limit: [*sanitizer, "--tool", "racecheck", *script], env)
        keep = [
            sys.executable,
            BENCHMARKS / "kept_sets.py",
            *(["--shape", "2x64"] if self.rehearse else ["--device", "cuda", "--shape", "4096x151936"]),
        ]
        ncu = [self.tool("ncu"), "--set", "full", "--clock-control", "none", "--profile-from-start", "off", "--page", "details"]
        ncu += ["--log-file", self.session.out / FILES["second"]["ncu"], sys.executable, BENCHMARKS / "one_launch.py"]
        ncu += ["--device", "cpu", "--shape", "2x300"] if self.rehearse else []
        # The key figures must be there: a profiler that may not read the counters need not fail.
        shown = '"$@" && grep -E "token_stats|pair_|Duration|Throughput  " "$0" && grep -q Duration "$0" || { tail -n 5 "$0"; exit 1; }'
        ncu = ["sh", "-c", shown, self.session.out / FILES["second"]["ncu"], *ncu]
        return [
            [[self.card(70)], [peers, compiled]],
            [[self.bench(95, *(["--no-compile"] if self.rehearse else []))._replace(elastic=False)]],
            [[self.pytest("suite", 160, SUITE, "-k", f"(triton or launch_shapes) and not {DRAWN}")], [memcheck], [racecheck]],
            [[Step("keep", 15, lambda limit: [*keep, "--rounds", 5, "--out", self.session.out / FILES["second"]["keep"]], elastic=True)]],
            [[Step("ncu", 30, lambda limit: ncu)]],
        ]

    def card(self, limit: float) -> Step:
        """In another process: this one opens no card, whose memory is the steps', nor imports torch, slow."""
        ask = "print('GPU: rehearsal')" if self.rehearse else ASK
        return Step("gpu", limit, lambda _: [sys.executable, "-c", ask], required=True)

    def bench(self, limit: float, *options: str) -> Step:
        out = ["--out", self.session.out, "--name", FILES[self.session.stage]["bench"].removesuffix(".json"), "--no-plot"]
        command = [sys.executable, BENCHMARKS / "run.py", *(["--rehearse"] if self.rehearse else ["--device", "cuda"]), *out, *options]
        return Step("bench", limit, lambda limit: [*command, "--budget", round(limit) - START_AND_END], elastic=True, least=START_AND_END + 10)

    def pytest(self, name: str, limit: float, files: tuple[str, ...], *options: str) -> Step:
        if self.rehearse:
            files, options = REHEARSED
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "shared_card", "--no-header", "-W", "ignore", *options]
        if importlib.util.find_spec("xdist"):  # most of the time goes into compiling kernels, on the CPU
            command += ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal"]
        if importlib.util.find_spec("pytest_timeout"):
            command += ["--timeout", "60"]
        # With one file that does not exist pytest runs none.
        return Step(name, limit, lambda _: [*command, *(file for file in files if (ROOT / file).exists())], tests=True)

    def python_files(self) -> None:
        """The Python files as they are, without the CPU kernels."""
        shutil.rmtree(self.site, ignore_errors=True)
        shutil.copytree(ROOT / "rlkern", self.site / "rlkern", ignore=shutil.ignore_patterns("triton_kernels", "__pycache__", "*.so"))
        shutil.copytree(ROOT / "triton_kernels", self.site / "rlkern" / "triton_kernels", ignore=shutil.ignore_patterns("__pycache__"))
        self.session.env["RLKERN_TEST_WITHOUT"] = "native"

    def tool(self, name: str) -> str:
        return shutil.which(name, path=self.session.env["PATH"]) or f"/usr/local/cuda/bin/{name}"


def stand_ins(work: Path) -> Path:
    """Programs named like NVIDIA's tools, for a rehearsal: they run the command behind their options."""
    folder = work / "tools"
    folder.mkdir(parents=True, exist_ok=True)
    script = """#!/bin/sh
until [ "${1#/}" != "$1" ] && [ -x "$1" ]; do
  [ "$1" = --log-file ] && echo Duration of a rehearsal >"$2"
  shift
done
exec "$@"
"""
    for name in ("compute-sanitizer", "ncu"):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    return folder


def choose(groups: list[Group], names: set[str]) -> list[Group]:
    """Only the steps that are named, and those that all others need."""
    kept = [[[s for s in chain if s.name in names | {"gpu", "install", "peers"}] for chain in group] for group in groups]
    return [chains for group in kept if (chains := [chain for chain in group if chain])]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=tuple(TOTALS), help="one of the two (default: both, one after the other)")
    parser.add_argument("--steps", help="only these, by their names, with commas")
    parser.add_argument("--variants", default="", metavar="OPTIONS", help="options of benchmarks/variants.py")
    parser.add_argument("--rehearse", action="store_true", help="on a processor, with tiny inputs")
    args = parser.parse_args(argv)
    chosen = set(args.steps.split(",")) if args.steps else set(CHOICE)
    if unknown := chosen - set(CHOICE):
        parser.error(f"unknown step {', '.join(sorted(unknown))}; the steps are {', '.join(CHOICE)}")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the steps' processes end as well
    started, failed = STARTED, 0
    with tempfile.TemporaryDirectory(prefix="rlkern-gpu-") as folder:
        work = Path(folder)
        results = work / "results" if args.rehearse else RESULTS
        out = Path(os.environ.get("OUT") or (work / "out" if args.rehearse else ROOT / "out")).resolve()
        for stage in [args.stage] if args.stage else TOTALS:
            session = Session(stage, out, results, started=started)
            groups = Plan(session, work, args.rehearse, args.variants).groups()
            session.run(choose(groups, chosen))
            failed |= session.close()
            started = None
            if session.cancelled.is_set():
                break
    return failed


if __name__ == "__main__":
    sys.exit(main())
