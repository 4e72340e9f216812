"""Loads rlkern._cpu, the compiled kernels, or says in one line why it cannot."""

from __future__ import annotations

import ctypes
import importlib
import struct
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401  # before _cpu, which takes its threads from the OpenMP that torch has loaded

FOLDER = Path(__file__).resolve().parents[1]


def load() -> ModuleType:
    """rlkern._cpu. Raises ImportError with one line that says what is wrong."""
    library = FOLDER / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    if library.exists() and _is_cut_off(library):  # loaded, it would end the process without a word
        raise ImportError(f"{library.name} is cut off")
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


def _is_cut_off(library: Path) -> bool:
    """Whether a 64-bit ELF file ends before its last part, the table of sections."""
    with library.open("rb") as file:
        header = file.read(64)
    if header[:5] != b"\x7fELF\x02":
        return False  # of another system
    if len(header) < 64:
        return True
    (begin,), (width, count) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
    return library.stat().st_size < begin + width * count


def _reason(error: ImportError) -> str:
    if "RLKERN_CPU_ISA" in str(error):
        return str(error)
    files = sorted(path.name for path in FOLDER.glob("_cpu.*"))
    if not files:
        return "rlkern was installed without its CPU kernels"
    if f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}" in files:  # of another system, or damaged
        return f"{files[0]} does not load here ({error})"
    python = f"{sys.implementation.name} {sys.version_info[0]}.{sys.version_info[1]} on {sysconfig.get_platform()}"
    return f"the CPU kernels here are for another Python or platform ({', '.join(files)}), this is {python}"
