"""`make torch-versions`: the core tests with each release of torch that the package claims.

Prints the table of docs/versions.md, with the seconds that each took, and exits 1 on a failed test. Every
release gets an environment of its own, thrown away afterwards: about 5 GB where pip has CUDA builds only. The
CPU kernels know nothing of torch: those of this checkout serve all.
`make torch-versions ARGS="2.6.0 2.14.1"` takes some of the releases.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

# torch -> Triton: the one that its CUDA build asks for, and for the development release that of the Makefile.
RELEASES = {"2.6.0": "3.2.0", "2.9.1": "3.5.1", "2.11.0": "3.6.0", "2.13.0": "3.9.0", "2.14.1": "3.8.0"}
# Trainers, packaging, the site and the offline report have versions of their own. Examples and benchmarks
# draw pictures. The harness of `make gpu` and the project's files know nothing of torch.
NOT_CORE = (
    "integrations",
    *("test_packaging.py", "test_wheels.py", "test_site.py", "test_offline_report.py", "test_project_files.py"),
    *("test_benchmarks.py", "test_loss_benchmark.py", "test_gpu_harness.py"),
    *("test_diffusion_rl.py", "test_entropy_lab.py", "test_curriculum_lab.py", "test_few_class_distillation.py"),
)
NEEDS = ("pytest", "pytest-xdist", "hypothesis", "expecttest")
TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
VERSIONS = "import torch, triton, numpy; print(torch.__version__.split('+')[0], triton.__version__, numpy.__version__)"


def numpy_for(triton: str) -> str:
    """Triton up to 3.6 interprets kernels with numpy before 2.4 only."""
    return "numpy<2.4" if tuple(map(int, triton.split(".")[:2])) <= (3, 6) else "numpy"


def install(folder: str, release: str) -> str:
    """The environment's Python."""
    venv.create(folder, with_pip=True)
    python = os.path.join(folder, "bin", "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-compile"]
    triton = RELEASES[release]
    subprocess.run([*pip, f"torch=={release}", numpy_for(triton), *NEEDS], check=True)
    subprocess.run([*pip, "--no-deps", f"triton=={triton}"], check=True)
    return python


def tests_with(release: str, options: list[str]) -> tuple[int, str, str]:
    """How many failed, the versions as imported, and pytest's last line."""
    with tempfile.TemporaryDirectory() as folder:
        python = install(folder, release)
        versions = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, check=True).stdout.strip()
        if versions.split()[0] != release:
            raise RuntimeError(f"asked for torch {release}, Python imports {versions}")
        left_out = [f"--ignore={TESTS / name}" for name in NOT_CORE]
        pytest = [python, "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", "-W", "ignore", "-p", "no:cacheprovider", "-m", "not slow"]
        result = subprocess.run([*pytest, str(TESTS), *left_out, *options], capture_output=True, text=True, cwd=ROOT)
        if result.returncode:
            print(result.stdout[-6000:])
        line = result.stdout.strip().splitlines()[-1]
        broken = sum(int(n) for n in re.findall(r"(\d+) (?:failed|error)", line))
        return max(broken, int(result.returncode != 0)), versions, line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("releases", nargs="*", metavar="release", default=list(RELEASES), help=f"some of {', '.join(RELEASES)}")
    parser.add_argument("--pytest", default="", help='options for pytest, as one string: --pytest="-k stride"')
    arguments = parser.parse_args()
    unknown = set(arguments.releases) - set(RELEASES)
    if unknown:
        parser.error(f"unknown release {', '.join(sorted(unknown))}, expected some of {', '.join(RELEASES)}")
    found, rows, begin = 0, [], time.monotonic()
    for release in arguments.releases:
        start = time.monotonic()
        failed, versions, line = tests_with(release, arguments.pytest.split())
        found += failed
        counts = ", ".join(re.findall(r"\d+ (?:passed|failed|skipped|error\w*)", line))
        seconds = f"{time.monotonic() - start:.0f}"
        rows.append(f"| {' | '.join([*versions.split(), 'NO' if failed else 'yes', counts, seconds])} |")
        print(f"torch {release}: {line}", flush=True)
    print(f"\nPython {sys.version.split()[0]}, on a CPU:\n\n| torch | Triton | numpy | works | tests | seconds |\n|---|---|---|---|---|---|")
    print("\n".join([*rows, f"{found} findings, {time.monotonic() - begin:.0f} seconds"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
