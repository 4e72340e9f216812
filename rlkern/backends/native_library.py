"""Loads rlkern._cpu, the compiled kernels, or says in one line why it cannot."""

from __future__ import annotations

import ctypes
import importlib
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401  # before _cpu, which takes its threads from the OpenMP that torch has loaded

FOLDER = Path(__file__).resolve().parents[1]


def load() -> ModuleType:
    """rlkern._cpu. Raises ImportError with one line that says what is wrong."""
    try:
        return importlib.import_module("rlkern._cpu")
    except ImportError as error:
        if "GOMP" not in str(error):
            raise ImportError(_reason(error)) from error
    try:  # this torch keeps its OpenMP to itself
        ctypes.CDLL("libgomp.so.1", ctypes.RTLD_GLOBAL)
        return importlib.import_module("rlkern._cpu")
    except (ImportError, OSError) as error:
        raise ImportError(f"no OpenMP library for the CPU kernels, neither torch's nor the system's ({error})") from error


def _reason(error: ImportError) -> str:
    files = sorted(path.name for path in FOLDER.glob("_cpu.*"))
    if not files:
        return "rlkern was installed without its CPU kernels"
    if f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}" in files:  # of another system, or damaged
        return f"{files[0]} does not load here ({error})"
    python = f"{sys.implementation.name} {sys.version_info[0]}.{sys.version_info[1]} on {sysconfig.get_platform()}"
    return f"the CPU kernels here are for another Python or platform ({', '.join(files)}), this is {python}"
