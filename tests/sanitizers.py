"""`make sanitize`: the C++ kernels under the address, undefined-behaviour and thread sanitizers.

    python tests/sanitizers.py                # both parts; exits 1 on a finding, or where a part cannot run
    python tests/sanitizers.py --only address --calls 2000 --seed 1
    build/sanitize/address/stress --only 17   # one of the random calls again

address  AddressSanitizer and UndefinedBehaviorSanitizer: random calls of tests/native/stress.cpp, then tests
         that run the kernels, on each instruction set of this processor.
thread   ThreadSanitizer: the random calls, from several threads at once, with OpenMP threads inside. Not the
         tests: the sanitizer would have to know every lock of Python and torch. LLVM's OpenMP runs in place
         of GCC's, and its Archer tells the sanitizer what OpenMP orders.

Both begin with errors that are planted. One that is not noticed is a finding: then nothing else would be.
Builds in build/sanitize, beside a package of links: the kernels of the checkout stay as they are.
"""

import argparse
import glob
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
BUILD = ROOT / "build" / "sanitize"
PARTS = {"address": "address,undefined", "thread": "thread"}
CODE = "66"  # the exit status of a process that a sanitizer ended

# The tests that call the kernels most directly. Those whose names say "native" run, and all of WHOLE.
FILES = (
    *("native", "native_pair", "native_keep", "token_stats", "keep", "parts", "divergence", "did", "moments"),
    *("sampler_threshold", "linear_kept", "covariance", "selection", "ratio", "sequence_sums", "unread_rows", "gradient_memory"),
)
WHOLE = "gradient_memory"

# Through Python: torch's memory has guards too, one number behind its end is seen.
PLANTED_IN_PYTHON = """
import torch, rlkern
from rlkern.backends.native import _cpu
x, sums, mask = torch.zeros(100), torch.zeros(1, 3, dtype=torch.float64), torch.ones(101, dtype=torch.bool)
_cpu.token_covariance(0, {"n": 101, "logp": torch.zeros(101), "advantages": x, "mask": mask, "sums": sums, "out": torch.zeros(101)})
print("planted, and nobody noticed")
"""
WHERE = "import isas, rlkern._cpu; print(rlkern._cpu.__file__, *(name.partition(' ')[2] for name in isas.ISAS))"


class Row(NamedTuple):
    """What ran, and what came of it."""

    part: str
    ran: str
    count: str
    findings: int
    seconds: float


class CannotRun(Exception):
    """One line: what is missing."""


def tool(name: str, package: str) -> str:
    """The path of a program: that of this Python's environment, else that of PATH."""
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if path is None:
        raise CannotRun(f"{name} is missing (on Debian and Ubuntu: apt install {package})")
    return path


def compilers_library(name: str) -> str:
    """The path of one of GCC's libraries."""
    path = subprocess.run([tool("g++", "g++"), f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(path):
        raise CannotRun(f"GCC's {name} is missing (on Debian and Ubuntu: apt install g++)")
    return os.path.realpath(path)


def llvm_library(name: str) -> str:
    """The path of one of LLVM's libraries, the newest one's."""
    found = sorted(glob.glob(f"/usr/lib/llvm-*/lib/{name}"), key=lambda path: int(re.findall(r"llvm-(\d+)", path)[0]))
    if not found:
        raise CannotRun(f"LLVM's {name} is missing (on Debian and Ubuntu: apt install libomp-dev)")
    return found[-1]


def environment(part: str) -> dict[str, str]:
    """For programs of a part. Reports go to files, but for UBSan's, which GCC always writes to stderr."""
    options = f"exitcode={CODE}:halt_on_error=1:log_path={BUILD / part / 'reports' / 'of'}"
    if part == "address":
        own = {"ASAN_OPTIONS": f"{options}:detect_leaks=0", "UBSAN_OPTIONS": f"{options}:print_stacktrace=1"}
    else:
        own = {"TSAN_OPTIONS": f"{options}:suppressions={TESTS / 'native' / 'openmp.supp'}", "OMP_TOOL_LIBRARIES": llvm_library("libarcher.so")}
        own["LD_PRELOAD"] = llvm_library("libomp.so.5")
    return {**os.environ, **own, "OMP_WAIT_POLICY": "passive", "OMP_DYNAMIC": "false"}


class Part:
    """One build, and the runs of it. Each adds a row."""

    name: str

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.folder = BUILD / self.name
        self.environment = environment(self.name)
        self.rows: list[Row] = []

    def build(self) -> None:
        import pybind11

        cmake, start = tool("cmake", "cmake"), time.monotonic()
        configure = [cmake, "-S", ROOT, "-B", self.folder, f"-DRLKERN_SANITIZE={PARTS[self.name]}", f"-DCMAKE_CXX_COMPILER={tool('g++', 'g++')}"]
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja', 'ninja-build')}"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        targets = ["stress", "_cpu"] if self.name == "address" else ["stress"]
        log = BUILD / f"{self.name}.log"
        BUILD.mkdir(parents=True, exist_ok=True)
        with log.open("w") as out:
            for command in (configure, [cmake, "--build", self.folder, "--parallel", str(self.arguments.jobs), "--target", *targets]):
                if subprocess.run(command, stdout=out, stderr=subprocess.STDOUT).returncode:
                    raise CannotRun(f"the build failed: {log}\n{log.read_text()[-2000:]}")
        self.add("build", ", ".join(targets), 0, start)

    def add(self, ran: str, count: str, findings: int, start: float) -> None:
        self.rows.append(Row(PARTS[self.name], ran, count, findings, time.monotonic() - start))
        print(f"{PARTS[self.name]}: {ran}: {count}, {findings} findings, {self.rows[-1].seconds:.0f} s", flush=True)

    def run(self, command: list, **variables: str) -> tuple[int, str, list[str]]:
        """The exit status, what was written, and the sanitizers' reports."""
        reports, log = self.folder / "reports", self.folder / "output.txt"  # a file: to be watched while it runs
        shutil.rmtree(reports, ignore_errors=True)
        reports.mkdir(parents=True)
        with log.open("w") as out:
            status = subprocess.run(command, cwd=BUILD, env=self.environment | variables, stdout=out, stderr=subprocess.STDOUT).returncode
        output = log.read_text(errors="replace")
        found = [path.read_text(errors="replace") for path in sorted(reports.iterdir())]
        return status, output, found + re.findall(r"^.*: runtime error: .*$", output, re.MULTILINE)

    def findings(self, status: int, output: str, reports: list[str], broken: int = 0) -> int:
        """Reports, or what was found without one; at least one where the process failed."""
        found = max(len(reports), broken, int(status != 0))
        if found:
            print(output[-4000:])
            for report in reports:
                print(report[:4000])
        return found

    def plant(self, *commands: list) -> None:
        """Errors that must end their process with a report."""
        start, caught = time.monotonic(), 0
        for command in commands:
            status, output, reports = self.run(command)
            if status == int(CODE) and reports:
                caught += 1
            else:
                print(f"not noticed: {' '.join(map(str, command))}\n{output[-2000:]}")
        self.add("planted errors", f"caught {caught} of {len(commands)}", len(commands) - caught, start)

    def random_calls(self) -> None:
        """The random calls."""
        start = time.monotonic()
        options = ["--calls", str(self.arguments.calls), "--seed", str(self.arguments.seed)]
        status, output, reports = self.run([self.folder / "stress", *options])
        calls = re.findall(r"^(\w+): (\d+) calls$", output, re.MULTILINE)
        broken = len(re.findall("^found: ", output, re.MULTILINE))
        count = ", ".join(f"{n} calls on {isa}" for isa, n in calls) or "ended early"
        self.add("random calls", count, self.findings(status, output, reports, broken), start)


class Address(Part):
    name = "address"

    def __init__(self, arguments: argparse.Namespace):
        super().__init__(arguments)
        # libstdc++ too: the sanitizer looks for its functions before Python has loaded it.
        preload = f"{compilers_library('libasan.so')} {compilers_library('libstdc++.so.6')}"
        self.python = {"LD_PRELOAD": preload, "PYTHONPATH": f"{BUILD / 'package'}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "2"}

    def check(self) -> None:
        self.build()
        self.link_package()
        self.plant([self.folder / "stress", "--plant", "overrun"], [self.folder / "stress", "--plant", "overflow"])
        self.random_calls()
        self.environment |= self.python
        self.plant([sys.executable, "-c", PLANTED_IN_PYTHON])
        self.tests()

    def link_package(self) -> None:
        """The checkout's package but for the kernels, which are the sanitized ones."""
        package = BUILD / "package" / "rlkern"
        shutil.rmtree(package.parent, ignore_errors=True)
        package.mkdir(parents=True)
        for path in (ROOT / "rlkern").iterdir():
            if path.suffix != ".so" and path.name != "__pycache__":
                (package / path.name).symlink_to(path.resolve())
        (kernels,) = self.folder.glob("_cpu*.so")
        (package / kernels.name).symlink_to(kernels)

    def tests(self) -> None:
        """Those of FILES, on each instruction set."""
        status, output, reports = self.run([sys.executable, "-c", WHERE], RLKERN_BACKEND="native")
        where, *names = output.split()
        if status or reports or not Path(where).is_relative_to(BUILD):
            raise CannotRun(f"the sanitized kernels could not be imported:\n{output}")
        files = [TESTS / f"test_{name}.py" for name in FILES]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT]
        command += ["-W", "ignore", "-m", "not slow", "--capture", "sys", "-n", str(self.arguments.jobs), "--dist", "worksteal"]
        for name in names:
            start = time.monotonic()
            of_name = f"(native or {WHOLE})" + "".join(f" and not {other}" for other in names if other != name)
            status, output, reports = self.run([*command, *files, "-k", of_name], RLKERN_CPU_ISA=name)
            last = output.strip().splitlines()[-1]
            counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
            count = ", ".join(f"{n} {what}" for what, n in counts.items()) or last
            self.add(f"tests on {name}", count, self.findings(status, output, reports, counts.get("failed", 0) + counts.get("error", 0)), start)


class Thread(Part):
    name = "thread"

    def check(self) -> None:
        self.build()
        self.plant([self.folder / "stress", "--plant", "race"], [self.folder / "stress", "--plant", "race-openmp"])
        self.random_calls()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, help="one part; the other is then no failure")
    parser.add_argument("--calls", type=int, default=200, help="random calls on each instruction set, by default 200")
    parser.add_argument("--seed", type=int, default=0, help="of the random calls")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers and workers of pytest at once, by default all cores")
    arguments = parser.parse_args()
    for name in ("calls", "jobs"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    rows, missing = [], []
    for kind in (Address, Thread):
        if arguments.only in (None, kind.name):
            try:
                part = kind(arguments)
                try:
                    part.check()
                finally:
                    rows += part.rows
            except CannotRun as error:
                missing.append(f"{PARTS[kind.name]}: did not run: {error}")
    found = sum(row.findings for row in rows)
    print("\n| sanitizers | what ran | how much | findings | seconds |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {row.part} | {row.ran} | {row.count} | {row.findings} | {row.seconds:.0f} |")
    print("\n".join([*missing, f"{found} findings, {sum(row.seconds for row in rows):.0f} seconds"]))
    return 1 if found or missing else 0


if __name__ == "__main__":
    sys.exit(main())
