"""What is missing or in the way on this machine, and the command that mends it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .. import backends
from ..backends.native_library import FOLDER
from . import machine

WHEEL = "pip install --force-reinstall --no-deps rlkern-*.whl    # the wheel for this Python; or a checkout, with a C++17 compiler"
CHECKOUT = "pip install -e .    # needs a C++17 compiler: on Debian and Ubuntu apt install g++"


class Finding(NamedTuple):
    wrong: bool  # else it is only worth knowing
    what: str
    mend: str


def _native(gpu: bool) -> Iterator[Finding]:
    error = backends.load("native")
    if not isinstance(error, Exception):
        if error.isa() == "baseline" and torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX"):
            mend = "unset RLKERN_CPU_ISA    # or build rlkern without RLKERN_BASELINE_ONLY"
            yield Finding(False, "the CPU kernels run without this processor's vector instructions", mend)
        return
    other = machine.elsewhere()
    if "RLKERN_CPU_ISA" in str(error):
        yield Finding(not gpu, f"no CPU kernels: {error}", "unset RLKERN_CPU_ISA")
    elif other and any(other.glob("_cpu.*")):
        what = f"{FOLDER} has no working CPU kernels ({error}) and hides the installation in {other}"
        yield Finding(True, what, f"leave the folder {FOLDER.parent}, or there: {CHECKOUT}")
    else:
        yield Finding(not gpu, f"no CPU kernels: {error}", CHECKOUT if machine.from_checkout() else WHEEL)


def _triton(gpu: bool) -> Iterator[Finding]:
    error = backends.load("triton")
    version = machine.version_of("triton")
    if isinstance(error, Exception):
        mend = f"pip install {'--force-reinstall --no-deps ' if version else ''}'triton>=3.2'"
        mend = mend if sys.platform == "linux" else "Triton is for Linux: without it GPUs compute in plain PyTorch"
        yield Finding(gpu, f"no GPU kernels: {str(error).splitlines()[0] if str(error) else type(error).__name__}", mend)
    elif version and tuple(int(x) for x in version.split(".")[:2]) < (3, 2):
        yield Finding(gpu, f"Triton {version} is older than 3.2", "pip install 'triton>=3.2'    # or a newer torch, which brings one")
    elif gpu and not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        yield Finding(True, "Triton needs a C compiler where kernels run, and found none", "apt install gcc python3-dev    # on Debian and Ubuntu")


def _selected(gpu: bool) -> Iterator[Finding]:
    """RLKERN_BACKEND, where it is set."""
    selected, mend = backends.backend_info()["selected"], "unset RLKERN_BACKEND"
    if selected == "reference":
        yield Finding(False, "RLKERN_BACKEND=reference: all is computed in plain PyTorch, slowly", mend)
    try:
        backends.select(torch.device("cuda" if gpu and selected != "native" else "cpu"))
    except RuntimeError as error:
        yield Finding(True, f"RLKERN_BACKEND={selected}: {error}", mend)


def findings() -> Iterator[Finding]:
    """All but what the self-test and the comparison find."""
    gpu = torch.cuda.is_available()
    if machine.has_nvidia_device() and not gpu:
        why = "is a CPU build" if torch.version.cuda is None else "does not see it"
        mend = "nvidia-smi    # shows the driver; pytorch.org/get-started has the torch for it. CUDA_VISIBLE_DEVICES hides cards"
        yield Finding(False, f"there is an NVIDIA card, and this torch {why}", mend)
    yield from _native(gpu)
    yield from _triton(gpu)
    yield from _selected(gpu)
    installed, imported = machine.version_of("rlkern"), backends.backend_info()["rlkern"]
    if installed and installed != imported:
        mend = CHECKOUT if machine.from_checkout() else f"leave or remove {FOLDER}: pip does not know it"
        yield Finding(True, f"pip has installed rlkern {installed}, Python imports {imported} from {FOLDER}", mend)
    libraries = machine.openmp_libraries()
    if len(libraries) > 1:
        what = f"{len(libraries)} OpenMP libraries are loaded, each with threads of its own: {', '.join(libraries)}"
        yield Finding(False, what, "import torch before other packages; rlkern takes the one that torch has loaded")
    threads, cores = torch.get_num_threads(), machine.usable_cores()
    if threads > cores:
        yield Finding(False, f"torch computes with more threads ({threads}) than there are cores ({cores})", f"export OMP_NUM_THREADS={cores}")
