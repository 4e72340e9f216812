"""What is missing or in the way on this machine, and the command that mends it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .. import backends
from . import machine

REINSTALL = "pip install --force-reinstall --no-deps"


class Finding(NamedTuple):
    wrong: bool  # else it is only worth knowing
    what: str
    mend: str


def _native(gpu: bool) -> Iterator[Finding]:
    error = backends.load("native")
    if not isinstance(error, Exception):
        if error.isa() == "baseline" and torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX"):
            mend = "unset RLKERN_CPU_ISA, or build rlkern on x86-64 without RLKERN_BASELINE_ONLY"
            yield Finding(False, "the CPU kernels run without this processor's vector instructions", mend)
        return
    other = machine.elsewhere()
    if other and any(other.glob("_cpu.*")):
        mend = f"leave the folder {machine.PACKAGE.parent}, or `pip install -e .` in it"
        yield Finding(True, f"{error}: this is the source tree, and {other} has them", mend)
        return
    checkout = "pip install -e . (a C++17 compiler is needed: on Debian and Ubuntu apt install g++)"
    mend = checkout if machine.from_checkout() else f"{REINSTALL} the wheel for this Python, or a checkout of rlkern where there is a C++17 compiler"
    yield Finding(not gpu, f"no CPU kernels: {error}", mend)


def _triton(gpu: bool) -> Iterator[Finding]:
    error = backends.load("triton")
    version = machine.version_of("triton")
    if isinstance(error, Exception):
        mend = "pip install 'triton>=3.2'" if sys.platform == "linux" else "Triton is for Linux: without it GPUs compute in plain PyTorch"
        yield Finding(gpu, f"no GPU kernels: {str(error).splitlines()[0] if str(error) else type(error).__name__}", mend)
    elif version and tuple(int(x) for x in version.split(".")[:2]) < (3, 2):
        yield Finding(gpu, f"Triton {version} is older than 3.2", "pip install 'triton>=3.2', or a newer torch, which brings one")
    elif gpu and not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        yield Finding(True, "Triton needs a C compiler where kernels run, and found none", "on Debian and Ubuntu: apt install gcc python3-dev")


def findings() -> Iterator[Finding]:
    """All but what the self-test and the comparison find."""
    gpu = torch.cuda.is_available()
    if machine.has_nvidia_device() and not gpu:
        why = "is a CPU build" if torch.version.cuda is None else "does not see it"
        mend = "the command that pytorch.org/get-started gives for this driver; nvidia-smi shows the driver, CUDA_VISIBLE_DEVICES hides cards"
        yield Finding(False, f"there is an NVIDIA card, and this torch {why}", mend)
    yield from _native(gpu)
    yield from _triton(gpu)
    installed, imported = machine.version_of("rlkern"), backends.backend_info()["rlkern"]
    if installed and installed != imported:
        yield Finding(True, f"pip has installed rlkern {installed}, Python imports {imported} from {machine.PACKAGE}", "pip install -e . again")
    libraries = machine.openmp_libraries()
    if len(libraries) > 1:
        what = f"{len(libraries)} OpenMP libraries are loaded, each with threads of its own: {', '.join(libraries)}"
        yield Finding(False, what, "the first to load: `import torch` before other packages; build rlkern with GCC, which takes torch's")
    threads, cores = torch.get_num_threads(), machine.usable_cores()
    if threads > cores:
        yield Finding(False, f"torch computes with {threads} threads on {cores} cores", f"OMP_NUM_THREADS={cores}")
