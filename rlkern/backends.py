"""Which implementation runs, and the calling convention that all of them share.

A backend is a module with these functions. They write into tensors that the operators allocated, and may assume validated input.

Rows of logits:

    token_stats_forward(logits, targets, mask, temperature, ignore_index, kept_kind, log_kept, out)
    token_stats_backward(logits, targets, mask, temperature, ignore_index, state, grads, out)

    logits       [A, B, V], any strides over A and B, last stride 1; row r is (r // B, r % B), N = A * B
    targets      [N, K] int64 contiguous, or None (K = 0)
    mask         [N] bool contiguous, or None; a row is skipped where mask is False or all its K targets are ignore_index
    temperature  float, or [N] contiguous tensor of the accumulation dtype (float64 for float64 logits, float32 otherwise)
    kept_kind    0: no kept set; 1: p >= k * max p; 2: p >= k.  log_kept = log k
    out          forward: (logp [.., K], entropy | None, logsumexp, sum_sq_prob | None, kept_logmass | None, state [.., 6 + K]), contiguous, N rows
                 backward: [A, B, V] of the logits' dtype, last stride 1; may be `logits` itself
    grads        upstream gradients (logp, entropy, logsumexp, sum_sq_prob, kept_logmass), contiguous, accumulation dtype, each may be None

`state` holds what the backward needs of a row, in the accumulation dtype; any backend can continue from any other's:

    0  m = max x     1  sum exp(u) - 1, the maximum's own 1 left out, u = (x - m) / T     2  sum p u     3  sum_sq_prob     4  kept_logmass
    5  kept threshold: x is kept where x - m >= state[5]          6 + k  x[y_k] - m, nan for a target outside [0, V)

Skipped rows: zeros in every output and in `state`, zeros in the gradient; neither reads them. An ignored entry of a row that is not
skipped has logp 0 and no gradient. A row whose upstream gradients are all zero gets a zero gradient without being read.

One number a token, over all tokens of a batch:

    covariance_sums(logp, advantages, mask) -> sums
    token_covariance(logp, advantages, mask, sums, out)
    select_bottom(values, valid, count, out)

    logp, advantages, values    [N] contiguous, float32 or float64, the first two alike; N >= 1
    mask, valid                 [N] bool contiguous; a token with a logp that is not finite counts as masked
    sums                        [P, 3] float64: (number of counted tokens, sum of their logp, sum of their advantages), in as many parts as the
                                backend likes; token_covariance takes their total, P = 1, which data-parallel processes added up, or None for its own
    count                       0-d int64 on the device; below 0 as 0, above the number of valid entries as that number
    out                         [N]: the covariances, 0 where masked; or bool, True for the `count` smallest of the valid values, NaN being the
                                largest, both zeros alike, equals in order of their index

In one pass what losses otherwise say in plain PyTorch (`one_pass`), so not in `reference`; N may be 0:

    select_fraction(values, valid, group, fraction, minimum, least, out)
    selected_means(values, selected, mask, out)
    ratio_terms(logp, old_logp, advantages, mask, unclipped, bounds, out)
    kl_terms(logp, reference, mask, kind, straight_through, clamp, out)

    select_fraction             as select_bottom with count = max(floor(fraction * size of the group), minimum), the product in float64, or 0 where
                                that is less than `least`; group [N] bool
    selected_means              out [3]: the selected fraction of the mask, the mean of the values over the mask, that over the selected; 0 of nothing
    ratio_terms                 see `ratio.ratio_terms`; old_logp and unclipped may be None; bounds (low, high, dual, least, most);
                                out (terms [2, N], free [N] bool, summary [12])
    kl_terms                    see `ratio.kl_terms`; out [2, N]
"""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

from . import reference

NAMES = ("auto", "triton", "native", "reference")


def _load_native() -> ModuleType:
    from . import native

    return native


def _load_triton() -> ModuleType:
    from . import triton_kernels

    return triton_kernels


_loaded: dict[str, ModuleType | Exception] = {"reference": reference}


def _load(name: str) -> ModuleType | Exception:
    """The backend's module, or the exception that says why it is missing."""
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
    """Chooses the implementation for the whole process: `use_backend("reference")`, or `with use_backend("native"): ...` to restore on exit.

    "auto" (the default, or the environment's RLKERN_BACKEND) takes triton for GPU tensors, native for CPU tensors, and the plain PyTorch
    reference where these are missing. Raises ValueError for an unknown name and RuntimeError for a backend that is not installed.
    """

    def __init__(self, name: str):
        global _current
        if _check_name(name, "use_backend") != "auto" and isinstance(error := _load(name), Exception):
            raise RuntimeError(f"backend {name!r} is not available: {error}") from error
        self._previous, _current = _current, name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc) -> None:
        global _current
        _current = self._previous


def _triton_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def select(device: torch.device) -> ModuleType:
    """The backend for tensors on `device`. Raises RuntimeError where the chosen backend cannot run there."""
    on_cpu = device.type == "cpu"
    if _current == "auto":
        module = _load("native" if on_cpu else "triton")
        return reference if isinstance(module, Exception) else module
    module = _load(_current)
    if isinstance(module, Exception):
        raise RuntimeError(f"backend {_current!r} is not available: {module}") from module
    if _current == "native" and not on_cpu:
        raise RuntimeError(f"backend 'native' runs on CPU tensors, got tensors on {device}")
    if _current == "triton" and on_cpu and not _triton_interpreted():
        raise RuntimeError("backend 'triton' runs on GPU tensors, got CPU tensors (TRITON_INTERPRET=1 interprets the kernels on the CPU)")
    return module


def one_pass(x: Tensor) -> bool:
    """Whether the backend for x does in one pass what losses otherwise write in plain PyTorch, and nobody wants to see through it: torch.compile
    fuses and torch.func transforms the plain form."""
    if torch.compiler.is_compiling() or x.is_meta or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return select(x.device) is not reference


def backend_info() -> dict[str, str]:
    """What can run here, and why something cannot: one line per backend, and the versions in play."""
    from . import __version__

    info = {"rlkern": __version__, "torch": torch.__version__, "selected": _current, "reference": "available (plain PyTorch, any device)"}
    native = _load("native")
    if isinstance(native, Exception):
        info["native"] = f"missing: {native}"
    else:
        info["native"] = f"available, {native.isa()} (built: {', '.join(native.isas())}; set RLKERN_CPU_ISA to choose)"
    kernels = _load("triton")
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
