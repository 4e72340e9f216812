"""The choice of the implementation that runs. The convention that all of them share is in contract.py."""

from __future__ import annotations

import os
import warnings
from types import ModuleType

import torch

from . import reference as reference

NAMES = ("auto", "triton", "native", "reference")


def _load_native() -> ModuleType:
    from . import native

    return native


def _load_triton() -> ModuleType:
    from .. import triton_kernels

    return triton_kernels


_loaded: dict[str, ModuleType | Exception] = {"reference": reference}


def load(name: str) -> ModuleType | Exception:
    """The module of "native", "triton" or "reference", or the exception that says why it is missing."""
    if name not in _loaded:
        try:
            _loaded[name] = {"native": _load_native, "triton": _load_triton}[name]()
        except Exception as error:  # an optional backend may fail in any way; backend_info() reports it
            _loaded[name] = error
    return _loaded[name]


def _check_name(name: str, origin: str) -> str:
    if not isinstance(name, str) or name not in NAMES:
        raise ValueError(f"{origin}: unknown backend, name must be one of {', '.join(map(repr, NAMES))}, got {name!r}")
    return name


_current = _check_name(os.environ.get("RLKERN_BACKEND", "auto"), "RLKERN_BACKEND")


class use_backend:
    """Chooses the implementation for the whole process, or inside `with use_backend("native"): ...`.

    "auto", the default unless RLKERN_BACKEND is set, takes triton for GPU tensors and native for CPU tensors.
    Where these are missing it warns once and takes the plain PyTorch reference. Raises ValueError for an
    unknown name and RuntimeError for a backend that is not installed.
    """

    def __init__(self, name: str):
        global _current
        if _check_name(name, "use_backend") != "auto" and isinstance(error := load(name), Exception):
            raise RuntimeError(f"backend {name!r} is not available: {error}") from error
        self._previous, _current = _current, name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc) -> None:
        global _current
        _current = self._previous


def _triton_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


_told: set[str] = set()


def _reference_instead(name: str, error: Exception) -> ModuleType:
    """What "auto" goes on with. It says so once: plain PyTorch takes many times as long."""
    if name not in _told:
        _told.add(name)
        warnings.warn(
            f"rlkern computes in plain PyTorch, slowly: backend {name!r} is missing ({error}). `python -m rlkern doctor` says how to "
            "mend it; RLKERN_BACKEND=reference asks for plain PyTorch",
            stacklevel=2,
        )
    return reference


def select(device: torch.device) -> ModuleType:
    """The backend for tensors on `device`. Raises RuntimeError where the chosen backend cannot run there."""
    on_cpu = device.type == "cpu"
    if _current == "auto":
        name = "native" if on_cpu else "triton"
        module = _loaded.get(name) or load(name)
        return _reference_instead(name, module) if isinstance(module, Exception) else module
    module = load(_current)
    if isinstance(module, Exception):
        raise RuntimeError(f"backend {_current!r} is not available: {module}") from module
    if _current == "native" and not on_cpu:
        raise RuntimeError(f"backend 'native' runs on CPU tensors, got tensors on {device}")
    if _current == "triton" and on_cpu and not _triton_interpreted():
        raise RuntimeError("backend 'triton' runs on GPU tensors, got CPU tensors (TRITON_INTERPRET=1 interprets the kernels on the CPU)")
    return module


def backend_info() -> dict[str, str]:
    """What can run here, and why something cannot: one line per backend, and the versions."""
    from .. import __version__

    info = {"rlkern": __version__, "torch": torch.__version__, "selected": _current, "reference": "available (plain PyTorch, any device)"}
    native = load("native")
    if isinstance(native, Exception):
        info["native"] = f"missing: {native}"
    else:
        info["native"] = f"available, {native.isa()} (built: {', '.join(native.isas())}; set RLKERN_CPU_ISA to choose)"
    kernels = load("triton")
    if isinstance(kernels, Exception):
        info["triton"] = f"missing: {kernels}"
    else:
        import triton

        gpu = torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())
        how = "GPU found" if gpu else "interpreted on the CPU" if _triton_interpreted() else "no GPU found, so nothing runs on it"
        info["triton"] = f"available, triton {triton.__version__}, {how}"
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
    return info
