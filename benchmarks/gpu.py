"""`make gpu`: everything worth knowing about rlkern on this machine's GPU, in two stages of five minutes each, with no network.

    python benchmarks/gpu.py [--stage first] [--steps tests,bench] [--rehearse]
    PEERS=folder python benchmarks/gpu.py --stage second      (by default build/peers, where `make peers` puts them)

first (330 seconds at most; what decides whether the kernels are right and fast):

    install    the project into a temporary folder, as users install it; where that fails the Python files alone
    tests      full size, all dtypes and layouts, CUDA graphs, no host sync; every primitive, every public function
    variants   launch shapes against each other
    bench      rlkern against eager PyTorch, beside the card's own copy bandwidth

second (300 seconds at most; no CPU kernels, which it does not need):

    peers      unpacks the packages to compare with
    compile    compiles and checks every kernel variant, for the sanitizer
    bench      again, with torch.compile, as far as there is time for it, and the peers
    suite      the Triton half of the ordinary tests, on the card; beside it
    memcheck, racecheck   compute-sanitizer over every kernel variant
    ncu        Nsight Compute on one launch of each direction

Each step has its own time limit and runs whatever became of the others. Results are written as they come: benchmarks/results/<gpu>-<date>.json and
.png, to which the second stage adds, and in $OUT (else out/) the same with the logs, the figures of each benchmark and the profile. Exits 1 if a step
failed, and names it in the last line. --rehearse does all of it on a processor, on tiny inputs, and writes into a temporary folder (or $OUT).
"""

from __future__ import annotations

import time

STARTED = time.monotonic()

import argparse  # noqa: E402
import datetime  # noqa: E402
import importlib.util  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import threading  # noqa: E402
from collections import Counter, deque  # noqa: E402
from collections.abc import Callable  # noqa: E402
from contextlib import suppress  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import NamedTuple  # noqa: E402

from table import overview  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS, RESULTS = ROOT / "benchmarks", ROOT / "benchmarks" / "results"
TOTALS = {"first": 330, "second": 300}  # seconds
TESTS = ("tests/test_gpu.py", "tests/test_gpu_primitives.py", "tests/test_gpu_smoke.py")
SUITE = (
    "tests/test_triton_token_stats.py",
    "tests/test_launch_shapes.py",
    "tests/test_token_stats.py",
    "tests/test_ratio.py",
    "tests/test_selection.py",
    "tests/test_covariance.py",
    "tests/test_unread_rows.py",
    "tests/test_ops.py",
    "tests/test_elbo.py",
    "tests/test_bgpo_options.py",
    "tests/test_kinks.py",
    "tests/test_metrics.py",
    "tests/test_default_dtype.py",
)
DRAWN = "drawn_inputs"  # dozens of kernels one after the other in one worker
REHEARSED = ("tests/test_triton_token_stats.py",), ("-k", "every_type or skipped")
# What a stage leaves beside its results, which are two files more.
FILES = {
    "first": {"bench": "bench-first.json", "variants": "variants.json", "log": "log-first.txt"},
    "second": {"bench": "bench-second.json", "ncu": "ncu.txt", "log": "log-second.txt"},
}
CHOICE = ("tests", "variants", "compile", "bench", "suite", "memcheck", "racecheck", "ncu")
CAUSE = re.compile(r"error|exception|invalid|race reported", re.IGNORECASE)
CLOSING = 5  # seconds at the end of a stage, to write what it found
START_AND_END = 25  # seconds that a script needs before it begins its first case, and for the last one that it has begun


class Step(NamedTuple):
    name: str
    limit: float  # seconds; what is not over by then is stopped
    command: Callable[[float], list]  # of the seconds that the step is given
    env: dict = {}
    tests: bool = False  # pytest: its results are counted, and none passed is a failure
    elastic: bool = False  # may also use what earlier steps left of their time
    least: float = 5  # seconds; with less it is not begun
    required: bool = False  # without it everything else is pointless
    otherwise: Callable[[], None] | None = None  # what to do where it fails


Group = list[list[Step]]  # chains of steps that run beside each other


def group_limit(group: Group) -> float:
    return max(sum(step.limit for step in chain) for chain in group)


def run_process(command: list[str], env: dict, limit: float, on_line: Callable[[str], None], cancelled: threading.Event) -> int | None:
    """The exit code of a command, whose output goes to `on_line`; None if it was stopped, at its limit or because of `cancelled`."""
    # A process group, to stop what the command has started too; where possible no session, so that whoever ends this one's ends those as well.
    group = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    try:
        process = subprocess.Popen(command, cwd=ROOT, env=env, **streams, **group)
    except OSError as error:
        on_line(f"{command[0]}: {error}")
        return 127
    reader = threading.Thread(target=lambda: [on_line(line.rstrip("\n")) for line in process.stdout], daemon=True)
    reader.start()
    deadline = time.monotonic() + limit
    try:
        while process.poll() is None and time.monotonic() < deadline and not cancelled.is_set():
            cancelled.wait(0.05)
        return process.poll()
    finally:
        with suppress(ProcessLookupError):  # what it has started too, also where it has ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        if process.poll() is None:
            with suppress(subprocess.TimeoutExpired):  # a process that hangs in the driver outlives its end for a while
                process.wait(10)
        reader.join(5)


class PytestLines:
    """Reads `pytest -v`, with or without xdist, line by line: so a run that is stopped has told what passed until then."""

    _RESULT = re.compile(
        r"^\[gw\d+\] \[ *\d+%\] (?P<after>[A-Z]+) (?P<name>.+?) *$"
        r"|^(?P<alone>\S+::.*?) (?P<before>PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)(?: \(.*)?(?: +\[ *\d+%\])?$"
    )
    _SUMMARY = re.compile(r"^(FAILED|ERROR) (.+?)(?: - (.*))?$")

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.failures: dict[str, str] = {}

    def read(self, line: str) -> bool:
        """Takes a line in; says whether it is worth showing."""
        if result := self._RESULT.match(line):
            outcome, name = result["after"] or result["before"], result["name"] or result["alone"]
            self.counts[outcome.lower()] += 1
            if bad := outcome in ("FAILED", "ERROR"):
                self.failures.setdefault(name, "")
            return bad
        if summary := self._SUMMARY.match(line):
            # The second time where a worker ended after the failure.
            self.failures[summary[2]] = "; ".join(filter(None, [self.failures.get(summary[2]), summary[3]]))
            return True
        return line.startswith("=") and " in " in line

    def tally(self) -> str:
        shown = ["passed", *(name for name in ("failed", "error") if self.counts[name])]
        return ", ".join(f"{self.counts[name]} {name}" for name in shown)


class Session:
    """One stage: runs steps with a time limit, keeps what they printed, remembers how each ended, and writes all of it as it comes."""

    def __init__(self, stage: str, out: Path, results: Path, runner=run_process, clock=time.monotonic, started: float | None = None):
        self.stage, self.out, self.results, self.runner, self.clock = stage, out, results, runner, clock
        self.started = clock() if started is None else started
        self.total = TOTALS[stage]
        self.steps: list[dict] = []
        self.gpu: str | None = None
        self.cancelled = threading.Event()
        self.env = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200"}
        self.lock = threading.RLock()
        for folder in (out, results):
            folder.mkdir(parents=True, exist_ok=True)
        self.begun: set[str] = set()
        self.log = open(out / FILES[stage]["log"], "w", buffering=1)

    def elapsed(self) -> float:
        return self.clock() - self.started

    def say(self, text: str, show: bool = True) -> None:
        with self.lock:
            self.log.write(text + "\n")
            if show:
                print(text, flush=True)

    def run(self, groups: list[Group]) -> None:
        for i, group in enumerate(groups):
            later = sum(group_limit(g) for g in groups[i + 1 :])
            if len(group) == 1:
                self._run_chain(group[0], later)
            else:
                threads = [threading.Thread(target=self._run_chain, args=(chain, later, True)) for chain in group]
                for thread in threads:
                    thread.start()
                try:
                    for thread in threads:
                        thread.join()
                except BaseException:  # whoever stops this process means all that it has started
                    self.cancelled.set()
                    for thread in threads:
                        thread.join()
                    raise

    def _run_chain(self, chain: list[Step], later: float, beside: bool = False) -> None:
        for i, step in enumerate(chain):
            ok = self._run_step(step, later + sum(s.limit for s in chain[i + 1 :]), f"[{step.name}] " if beside else "")
            if not ok and step.otherwise:
                step.otherwise()
            if not ok and step.required:
                self.cancelled.set()

    def _run_step(self, step: Step, later: float, prefix: str) -> bool:
        if self.cancelled.is_set():
            return False
        left = self.total - CLOSING - self.elapsed()
        limit = min(left, max(step.limit, left - later) if step.elastic else step.limit)
        if limit < step.least:
            return self.record(step.name, "left out: the time for everything is spent")
        self.begun.add(step.name)
        if (name := FILES[self.stage].get(step.name)) is not None:  # what an earlier run left of it
            (self.out / name).unlink(missing_ok=True)
        command = [str(part) for part in step.command(limit)]
        self.say(f"\n=== {step.name} (limit {limit:.0f} s): {' '.join(command)}")
        results, causes, tail = PytestLines() if step.tests else None, [], deque(maxlen=6)

        def on_line(line: str) -> None:
            with self.lock:
                tail.append(line)
                if len(causes) < 6 and CAUSE.search(line):
                    causes.append(line)
                if line.startswith("GPU: "):
                    self.gpu = self.gpu or line.removeprefix("GPU: ")
                self.say(prefix + line, show=results.read(line) if results else True)

        begun = self.clock()
        code = self.runner(command, self.env | step.env, limit, on_line, self.cancelled)
        seconds = self.clock() - begun
        with self.lock:  # a reader that is late may still add lines
            if self.cancelled.is_set() and code is None:
                outcome = "skipped: a step that it needs failed"
            elif code is None:
                outcome = f"stopped after {limit:.0f} s"
            elif code == 0 and (results is None or results.counts["passed"]):
                outcome = "ok"
            else:
                outcome = f"failed, exit code {code}"
            failures = []
            if results:
                outcome += f", {results.tally()}"
                failures = [f"{name}: {why}" if why else name for name, why in results.failures.items()]
                failures = failures or ([f"last: {tail[-1]}"] if results.counts else [])
            return self.record(step.name, outcome, seconds, failures or list(dict.fromkeys([*causes, *tail])))

    def record(self, name: str, outcome: str, seconds: float = 0.0, evidence: list[str] | None = None) -> bool:
        ok = outcome.startswith(("ok", "skipped"))
        with self.lock:
            entry = {"step": name, "outcome": outcome, "seconds": round(seconds, 1)}
            self.steps.append(entry if ok else entry | {"evidence": evidence or []})
            self.say(f"=== {name}: {outcome}, {seconds:.0f} s")
            self.save()
        return ok

    def failed(self) -> list[dict]:
        return [step for step in self.steps if not step["outcome"].startswith(("ok", "skipped"))]

    def path(self) -> Path:
        slug = "-".join("".join(c if c.isalnum() else " " for c in self.gpu.lower()).split())
        return self.results / f"{slug}-{datetime.date.today()}.json"

    def written(self, step: str):
        """What a step of this run has written so far."""
        return read(self.out / FILES[self.stage][step]) if step in self.begun & FILES[self.stage].keys() else None

    def save(self) -> dict:
        """Adds what this stage has to the results of this card and day: its steps, cases and variants in place of its earlier ones."""
        if self.gpu is None:
            return {}
        with self.lock:
            bench, variants = self.written("bench") or {}, self.written("variants")
            document = read(self.path()) or {}
            machine = bench.get("machine") or document.get("machine") or {"gpu": self.gpu}
            stages, cases = document.get("stages", {}), document.get("cases", [])
            earlier = stages.get(self.stage, {}).get("steps", [])
            steps = list(({step["step"]: step for step in earlier} | {step["step"]: step for step in self.steps}).values())
            stages |= {self.stage: {"steps": steps, "seconds": round(self.elapsed(), 1)}}
            if bench.get("cases"):
                cases = [case for case in cases if case.get("stage") != self.stage] + [case | {"stage": self.stage} for case in bench["cases"]]
            document |= {"machine": machine, "stages": stages, "cases": cases}
            if variants:
                document["variants"] = variants
            for folder in {self.results, self.out}:
                write(folder / self.path().name, json.dumps(document, indent=1) + "\n")
            return document

    def close(self) -> int:
        """What was measured, what failed, how each step ended, in few lines, since a long output may lose its beginning; 1 if a step failed."""
        document = self.save()
        cases = [case for case in document.get("cases", []) if case["stage"] == self.stage]
        if cases:
            self.say(f"\n{overview(cases)}")
        variants = document.get("variants") if "variants" in FILES[self.stage] else None
        if isinstance(variants, dict) and isinstance(variants.get("summary"), str):
            self.say("\n" + variants["summary"][-5000:])
        for step in self.failed():
            self.say(f"\n{step['step']}: {step['outcome']}")
            lines = step["evidence"]
            self.say("\n".join(f"  {line[:180]}" for line in [*lines[:10], *([f"and {len(lines) - 10} more"] if len(lines) > 10 else [])]))
        self.say(f"\n{self.stage}: {self.gpu or 'no GPU'}, {self.elapsed():.0f} s of {self.total}")
        self.say("\n".join(f"  {s['step']:10} {s['seconds']:6.1f} s  {s['outcome']}" for s in self.steps))
        if document:
            self.draw(document)
            self.say(f"wrote {self.path()} and what is in {self.out}")
        failed = [f"{step['step']} ({', '.join([step['outcome'], *step['evidence'][-1:]])[:200]})" for step in self.failed()]
        names = ", ".join(step["step"] for step in self.steps)
        self.say(f"{self.stage} FAILED: {'; '.join(failed)}" if failed else f"{self.stage}: {names}: none failed")
        self.log.close()
        return 1 if failed else 0

    def draw(self, document: dict) -> None:
        """An extra: what goes wrong here costs no result."""
        try:
            from plot import plot

            plot(document, str(self.path().with_suffix(".png")))
            if self.out != self.results:
                shutil.copy(self.path().with_suffix(".png"), self.out)
        except Exception as error:
            self.say(f"no figure: {type(error).__name__}: {error}")


def read(path: Path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def write(path: Path, text: str) -> None:
    """A reader, or whoever comes after a kill, finds the old file or the new one, whole."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


# --- the steps -------------------------------------------------------------------------------------------------------------------------------

ASK = """
import sys, torch
if not torch.cuda.is_available():
    sys.exit(f"PyTorch {torch.__version__} (built for CUDA {torch.version.cuda}, HIP {torch.version.hip}) sees no GPU here")
print("GPU:", torch.cuda.get_device_name())
"""


class Plan:
    """The steps of both stages: on a GPU, or with `rehearse` the same scripts, tiny, on a processor."""

    def __init__(self, session: Session, work: Path, rehearse: bool = False):
        self.session, self.rehearse, self.site, self.peers = session, rehearse, work / "site", work / "peers"
        session.env["PYTHONPATH"] = os.pathsep.join([str(self.site), str(self.peers), str(BENCHMARKS)])
        if rehearse:
            session.env |= {"TRITON_INTERPRET": "1", "RLKERN_BACKEND": "triton", "PATH": f"{stand_ins(work)}{os.pathsep}{os.environ['PATH']}"}

    def groups(self) -> list[Group]:
        return self.first() if self.session.stage == "first" else self.second()

    def first(self) -> list[Group]:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--target", self.site, ROOT]
        install = [] if self.rehearse else [[Step("install", 90, lambda limit: pip, otherwise=self.python_files)]]
        if self.rehearse:
            self.python_files()
        out = self.session.out / FILES["first"]["variants"]
        variants = [sys.executable, BENCHMARKS / "variants.py", "--out", out, *(["--rehearse"] if self.rehearse else [])]
        steps = [
            self.pytest("tests", 130, TESTS),
            Step("variants", 45, lambda limit: [*variants, "--budget", round(limit) - START_AND_END], elastic=True, least=START_AND_END + 10),
            self.bench(60, "--no-compile", "--no-peers"),
        ]
        return [[[self.card(90)], *install], *([[step]] for step in steps)]

    def second(self) -> list[Group]:
        self.python_files()
        folder = Path(os.environ.get("PEERS") or ROOT / "build" / "peers").resolve()
        peers = Step("peers", 15, lambda limit: [sys.executable, BENCHMARKS / "peers.py", folder, self.peers])
        script = [sys.executable, BENCHMARKS / "sanitize.py", *(["--rehearse"] if self.rehearse else [])]
        # Several processes compile the kernels, and check them without the tool; under it they come from Triton's cache.
        compiled = Step("compile", 55, lambda limit: [*script, "--jobs", min(8, os.cpu_count() or 1)])
        # Without PyTorch's caching allocator every tensor is an allocation of its own, so that a read past its end is seen.
        sanitizer = [self.tool("compute-sanitizer"), "--error-exitcode", "9", "--print-limit", "20"]
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        memcheck = Step("memcheck", 50, lambda limit: [*sanitizer, "--tool", "memcheck", "--report-api-errors", "no", *script], env)
        racecheck = Step("racecheck", 40, lambda limit: [*sanitizer, "--tool", "racecheck", *script], env)
        ncu = [self.tool("ncu"), "--set", "full", "--clock-control", "none", "--profile-from-start", "off", "--page", "details"]
        ncu += ["--log-file", self.session.out / FILES["second"]["ncu"], sys.executable, BENCHMARKS / "one_launch.py"]
        ncu += ["--device", "cpu", "--shape", "4x300"] if self.rehearse else []
        # The key figures, which must be there: a profiler that may not read the counters says so in its log, and need not fail.
        shown = '"$@" && grep -E "token_stats|Duration|Throughput  " "$0" && grep -q Duration "$0" || { tail -n 5 "$0"; exit 1; }'
        ncu = ["sh", "-c", shown, self.session.out / FILES["second"]["ncu"], *ncu]
        return [
            [[self.card(70)], [peers, compiled]],
            [[self.bench(105, *(["--no-compile"] if self.rehearse else []))._replace(elastic=False)]],
            [[self.pytest("suite", 90, SUITE, "-k", f"(triton or launch_shapes) and not {DRAWN}")], [memcheck, racecheck]],
            [[Step("ncu", 30, lambda limit: ncu)]],
        ]

    def card(self, limit: float) -> Step:
        """Asks another process: this one never opens the card, so the steps have all of its memory; and the first import of torch is slow."""
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
            groups = Plan(session, work, args.rehearse).groups()
            session.run(choose(groups, chosen))
            failed |= session.close()
            started = None
            if session.cancelled.is_set():
                break
    return failed


if __name__ == "__main__":
    sys.exit(main())
