"""What this machine and this installation are: the lines at the head of a report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from pathlib import Path

import torch

from .. import backends
from ..backends.native_library import FOLDER

TRAINERS = ("trl", "verl", "openrlhf", "prime-rl", "transformers")
VARIABLES = re.compile("RLKERN_|TRITON_|OMP_|KMP_|GOMP_|MKL_|CUDA_VISIBLE|PYTORCH_|LD_PRELOAD")


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def from_checkout() -> bool:
    """Whether rlkern is imported from its source tree."""
    return (FOLDER.parent / "pyproject.toml").exists() and (FOLDER.parent / "csrc").exists()


def elsewhere() -> Path | None:
    """Another installation of rlkern in this environment, which this one hides."""
    folders = {Path(folder) / "rlkern" for folder in sys.path if folder}
    others = sorted(path for path in folders if (path / "__init__.py").exists() and path.resolve() != FOLDER)
    return others[0] if others else None


def processor() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def openmp_libraries() -> list[str]:
    """Files of the OpenMP libraries that are loaded; more than one means as many sets of threads."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    return sorted({line.split()[-1] for line in maps.splitlines() if re.search(r"/lib(gomp|iomp5|omp)[^/]*\.so", line)})


def gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    found = []
    for i in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(i)
        found.append(f"{of.name}, {of.total_memory / 2**30:.0f} GiB, compute capability {of.major}.{of.minor}")
    return found


def has_nvidia_device() -> bool:
    return Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


def facts() -> list[tuple[str, str]]:
    """(what, value), in the order of the report."""
    runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else "CPU build"
    variables = [f"{name}={value}" for name, value in sorted(os.environ.items()) if VARIABLES.match(name)]
    libc = " ".join(part for part in platform.libc_ver() if part)
    info = backends.backend_info()
    lines = [
        ("rlkern", f"{info['rlkern']}, {'checkout' if from_checkout() else 'installed'} at {FOLDER}"),
        ("python", f"{platform.python_implementation()} {platform.python_version()}, {platform.system()} {platform.machine()}, {libc}"),
        ("torch", f"{torch.__version__}, {runtime}"),
        ("triton", version_of("triton") or version_of("pytorch-triton-rocm") or "none"),
        ("numpy", version_of("numpy") or "none"),
        ("trainers", ", ".join(f"{name} {v}" for name in TRAINERS if (v := version_of(name))) or "none"),
        ("processor", f"{processor()}, cores: {usable_cores()}, threads of torch: {torch.get_num_threads()}"),
        ("openmp", ", ".join(openmp_libraries()) or "none found"),
    ]
    lines += [("gpu", gpu) for gpu in gpus()] or [("gpu", "none that this torch sees")]
    lines += [(name, info[name]) for name in ("native", "triton")] + [("selected", info["selected"])]
    return lines + [("variables", ", ".join(variables) or "none of RLKERN_, TRITON_, OMP_, ...")]
