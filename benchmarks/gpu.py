"""`make gpu`: everything worth knowing about rlkern on this machine's GPU in one command of under ten minutes, with no network.

    python benchmarks/gpu.py [--steps tests,bench,sweep,sanitize,suite] [--quick]
    PEERS=build/peers python benchmarks/gpu.py      also measures the packages whose wheels lie there (`make peers` fetches them)

Installs the project into a temporary folder, then runs, each with its own time limit, and each whatever became of the others:

    tests      tests/test_gpu.py: full size, all dtypes and layouts, CUDA graphs, no host sync, batch invariance
    bench      rlkern against eager PyTorch, torch.compile and the peers, beside the card's own copy bandwidth
    sweep      launch shapes: proposes the table of triton_kernels/launch.py
    sanitize   compute-sanitizer memcheck and racecheck over every kernel variant
    suite      the Triton half of the ordinary tests, on the card

Writes benchmarks/results/<gpu>-<date>.json and .png (also into $OUT where that is set); exits 1 if a step failed. Without a GPU it runs what can
run: the kernels in Triton's interpreter, and the offline report.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS, RESULTS = ROOT / "benchmarks", ROOT / "benchmarks" / "results"
STEPS = ("tests", "bench", "sweep", "sanitize", "suite")
LIMITS = {"install": 120, "tests": 150, "bench": 200, "sweep": 110, "sanitize": 100, "suite": 100}  # seconds; what is not over by then is stopped
TOTAL, TOTAL_WITHOUT_GPU = 560, 1800  # seconds for everything; interpreting kernels is slow


class Session:
    """Runs commands with a time limit, keeps what they printed, and remembers how each step ended."""

    def __init__(self, work: Path):
        self.work = work
        self.log = open(work / "log.txt", "w")
        self.started = time.monotonic()
        self.total = TOTAL
        self.steps: list[dict] = []
        self.env = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1", "TOKENIZERS_PARALLELISM": "false"}

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.log.write(line + "\n")
        self.log.flush()

    def run(self, name: str, command: list, limit: float, **env: str) -> bool:
        limit = min(limit, self.total - self.elapsed())
        if limit < 10:
            return self.record(name, "left out: the time for everything is spent")
        command = [str(c) for c in command]
        self.say(f"\n=== {name} (limit {limit:.0f} s): {' '.join(command)}")
        started = time.monotonic()
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        process = subprocess.Popen(command, cwd=ROOT, env=self.env | env, start_new_session=True, **streams)
        reader = threading.Thread(target=lambda: [self.say(line.rstrip("\n")) for line in process.stdout], daemon=True)
        reader.start()
        try:
            code = process.wait(limit)
            outcome = "ok" if code == 0 else f"failed, exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            outcome = f"stopped after {limit:.0f} s"
        reader.join(5)
        return self.record(name, outcome, time.monotonic() - started)

    def record(self, name: str, outcome: str, seconds: float = 0.0) -> bool:
        self.steps.append({"step": name, "outcome": outcome, "seconds": round(seconds, 1)})
        self.say(f"=== {name}: {outcome}, {seconds:.0f} s")
        return outcome == "ok"

    def summary(self) -> str:
        return "\n".join(f"  {s['step']:28} {s['seconds']:6.1f} s  {s['outcome']}" for s in self.steps)

    def failed(self) -> bool:
        return any(s["outcome"].startswith(("failed", "stopped", "left out")) for s in self.steps)


def install(session: Session) -> None:
    """Puts rlkern on the path of all later steps: installed as users install it, or else the Python files alone, without the CPU kernels."""
    site = session.work / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--target", site, ROOT]
    if not session.run("install", pip, LIMITS["install"]):
        shutil.rmtree(site, ignore_errors=True)
        shutil.copytree(ROOT / "rlkern", site / "rlkern", ignore=shutil.ignore_patterns("triton_kernels", "__pycache__", "*.so"))
        shutil.copytree(ROOT / "triton_kernels", site / "rlkern" / "triton_kernels", ignore=shutil.ignore_patterns("__pycache__"))
        session.env["RLKERN_TEST_WITHOUT"] = "native"
        print("using the Python files as they are; the CPU kernels are missing")
    session.env["PYTHONPATH"] = os.pathsep.join([str(site), str(session.work / "peers"), str(BENCHMARKS)])
    session.run("python -m rlkern", [sys.executable, "-m", "rlkern"], 60)


def install_peers(session: Session) -> None:
    """Wheels from the folder PEERS, installed without their dependencies; of a source archive only the Python files, for their Triton kernels."""
    folder = os.environ.get("PEERS")
    if not folder:
        print("PEERS is not set: only the peers that this Python already has are measured")
        return
    folder, target = Path(folder).resolve(), session.work / "peers"
    wheels, archives = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    if not wheels and not archives:
        print(f"PEERS={folder} holds no wheel and no source archive")
        return
    for wheel in wheels:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target", target, wheel]
        session.run(f"peer {wheel.name.split('-')[0]}", pip, 60)
    for archive in archives:
        started = time.monotonic()
        with tarfile.open(archive) as tar:
            for member in tar:
                path = Path(*Path(member.name).parts[1:])
                if member.isfile() and path.suffix == ".py" and path.parts[0] == archive.name.split("-")[0] and ".." not in path.parts:
                    (target / path).parent.mkdir(parents=True, exist_ok=True)
                    (target / path).write_bytes(tar.extractfile(member).read())
        session.record(f"peer {archive.name.split('-')[0]}", "ok", time.monotonic() - started)


def pytest(session: Session, name: str, limit: float, *args, **env: str) -> bool:
    # Most of the time goes into compiling kernels, on the CPU.
    workers = ["-n", str(min(4, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "-W", "ignore", *workers, *args]
    return session.run(name, command, limit, **env)


def gpu_tests(session: Session, quick: bool) -> None:
    pytest(session, "tests", LIMITS["tests"], "tests/test_gpu.py", *(["-k", "not full_size and not 2_to_the"] if quick else []))


def suite(session: Session, quick: bool) -> None:
    tests = sorted((ROOT / "tests").glob("test_token_stats*.py"))
    if tests and not quick:
        pytest(session, "suite", LIMITS["suite"], *tests, "-k", "triton")


def bench(session: Session, quick: bool) -> None:
    limit = 90 if quick else LIMITS["bench"]
    command = [sys.executable, BENCHMARKS / "run.py", "--device", "cuda", "--out", session.work, "--name", "bench"]
    command += ["--budget", limit - 60] + (["--no-compile", "--rounds", 5] if quick else [])
    session.run("bench", command, limit)


def sweep(session: Session, quick: bool) -> None:
    limit = 60 if quick else LIMITS["sweep"]
    command = [sys.executable, BENCHMARKS / "sweep.py", "--out", session.work / "sweep.json", "--budget", limit - 30]
    session.run("sweep", command + (["--vocabs", 151_936, "--dtypes", "bf16"] if quick else []), limit)


def sanitize(session: Session, quick: bool) -> None:
    script = [sys.executable, BENCHMARKS / "sanitize.py"]
    # Several processes compile the kernels, and check them without the tool; under it they come from Triton's cache.
    if not session.run("kernel variants", [*script, "--jobs", min(8, os.cpu_count() or 1)], LIMITS["sanitize"]):
        return
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        session.record("compute-sanitizer", "skipped: not installed")
        return
    # Without PyTorch's caching allocator every tensor is an allocation of its own, so that a read past its end is seen.
    for name, options in (("memcheck", ["--report-api-errors", "no"]), ("racecheck", [])):
        if name == "memcheck" or not quick:
            command = [tool, "--tool", name, "--error-exitcode", "9", "--print-limit", "20", *options, *script]
            session.run(name, command, LIMITS["sanitize"], PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def without_gpu(session: Session) -> None:
    print("No GPU found: running the kernels in Triton's interpreter, and the offline report. Nothing is timed.")
    session.total = TOTAL_WITHOUT_GPU
    tests = sorted((ROOT / "tests").glob("test_token_stats*.py"))
    if tests:
        pytest(session, "kernels, interpreted", 900, *tests, "-k", "triton", TRITON_INTERPRET="1")
    if (BENCHMARKS / "report.py").exists():
        session.run("offline report", [sys.executable, BENCHMARKS / "report.py"], 900)


def gpu_name() -> str | None:
    """The GPU that PyTorch sees, asked in another process: this one never opens the card, so its steps have all of its memory."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if answer.returncode:
        print(f"PyTorch does not start here:\n{answer.stderr.strip()}")
    return answer.stdout.strip().splitlines()[-1] if answer.stdout.strip() else None


def read(path: Path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def write_results(session: Session, gpu: str, quick: bool) -> list[Path]:
    """One JSON (the format of run.py, with the sweep and the steps' outcomes added) and its plot."""
    document = read(session.work / "bench.json") or {"machine": {"gpu": gpu}, "cases": []}
    document |= {"sweep": read(session.work / "sweep.json"), "steps": session.steps, "quick": quick}
    slug = "-".join("".join(c if c.isalnum() else " " for c in gpu.lower()).split())
    path = RESULTS / f"{slug}-{datetime.date.today()}{'-quick' if quick else ''}.json"
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    written = [path]
    if (plot := session.work / "bench.png").exists():
        written.append(Path(shutil.copy(plot, path.with_suffix(".png"))))
    if out := os.environ.get("OUT"):
        Path(out).mkdir(parents=True, exist_ok=True)
        for file in [*written, session.work / "log.txt"]:
            shutil.copy(file, out)
    return written


def closing_tables(session: Session) -> None:
    """What was measured, once more, short, after all that the steps printed."""
    sys.path.insert(0, str(BENCHMARKS))
    from table import compact, sweep_table

    for case in (read(session.work / "bench.json") or {"cases": []})["cases"]:
        session.say("\n" + compact(case))
    if swept := read(session.work / "sweep.json"):
        session.say("\n" + sweep_table(swept))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default=",".join(STEPS), help=f"some of {','.join(STEPS)}")
    parser.add_argument("--quick", action="store_true", help="small sizes, no torch.compile, no racecheck: about two minutes")
    args = parser.parse_args()
    chosen = args.steps.split(",")
    if unknown := set(chosen) - set(STEPS):
        parser.error(f"unknown step {', '.join(sorted(unknown))}; the steps are {', '.join(STEPS)}")
    gpu = gpu_name()
    with tempfile.TemporaryDirectory(prefix="rlkern-gpu-") as work:
        session = Session(Path(work))
        install(session)
        if gpu is None:
            without_gpu(session)
            print(f"\nNo GPU here. What could run ({session.elapsed():.0f} s):\n{session.summary()}")
            return 1 if session.failed() else 0
        print(f"GPU: {gpu}")
        install_peers(session)
        run = {"tests": gpu_tests, "bench": bench, "sweep": sweep, "sanitize": sanitize, "suite": suite}
        for name in STEPS:
            if name in chosen:
                run[name](session, args.quick)
                write_results(session, gpu, args.quick)
        closing_tables(session)
        session.say(f"\n{gpu}, {session.elapsed():.0f} s:\n{session.summary()}")
        written = write_results(session, gpu, args.quick)
        print("wrote " + ", ".join(str(p.relative_to(ROOT)) for p in written))
        return 1 if session.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
