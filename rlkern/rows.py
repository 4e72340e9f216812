"""Rows of logits: the checks, layout and gradient guard that every primitive over [..., V] shares."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from .checks import FINITE, shown

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEBUG = os.environ.get("RLKERN_DEBUG", "0") == "1"  # also check targets on a GPU, at the price of a sync


def accumulation_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def as_rows(x: Tensor) -> Tensor:
    """[..., V] as [A, B, V] with last stride 1: a view wherever strides allow it (any slice of up to three dimensions), a copy elsewhere."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    if x.dim() == 3:
        return x
    if x.dim() < 3:
        return x.unsqueeze(0) if x.dim() == 2 else x.view(1, 1, -1)
    try:
        return x.view(-1, x.shape[-2], x.shape[-1])
    except RuntimeError:  # leading strides that do not merge
        return x.contiguous().view(-1, x.shape[-2], x.shape[-1])


def rows_per_chunk(rows: Tensor) -> int:
    """Rows [..., V] to upcast at a time in plain PyTorch: on a CPU what stays in its cache, on a GPU more, where launches cost more than memory."""
    return max(1, (1 << 18 if rows.device.type == "cpu" else 1 << 24) // rows.shape[-1])


def watched(x: Tensor) -> bool:
    """Whether somebody looks at operators: a compiler, a tensor subclass (FakeTensor, DTensor), a dispatch mode, or only the shapes of meta tensors.
    Else dispatch is pure overhead."""
    return torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta or torch._C._len_torch_dispatch_stack() > 0


def call(op, function, *args):
    """op(*args), which has no gradient; by calling `function`, which stands behind it, where nobody looks at the first argument."""
    if not watched(args[0]) and torch._C._functorch.peek_interpreter_stack() is None:
        return function(*args)
    with torch.no_grad():
        return op(*args)


class OnlyOnce(torch.autograd.Function):
    """Identity on a gradient that must not be differentiated again; `remedy` says what has second derivatives."""

    @staticmethod
    def forward(ctx, gradient, logits, remedy):
        ctx.remedy = remedy
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(f"rlkern's gradients cannot be differentiated a second time; where you need that, {ctx.remedy}")


def check_logits(logits: Tensor, name: str = "logits") -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a tensor [..., V], got {type(logits).__name__}")
    if logits.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {logits.dtype}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{name} must be [..., V] with V >= 1, got shape {tuple(logits.shape)}")


def check_targets(targets: Tensor, logits: Tensor, of: str = "logits") -> Tensor:
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets must be an integer tensor, got {type(targets).__name__}")
    if targets.dtype.is_floating_point or targets.dtype.is_complex or targets.dtype == torch.bool:
        raise TypeError(f"targets must be int64 token ids, got {targets.dtype}")
    rows = logits.shape[:-1]
    single, several = targets.shape == rows, targets.dim() == logits.dim() and targets.shape[:-1] == rows and targets.shape[-1] > 0
    if not (single or several):
        raise ValueError(f"targets must be {tuple(rows)} or {(*rows, 'K')} with K >= 1 for {of} {tuple(logits.shape)}, got {tuple(targets.shape)}")
    check_device("targets", targets, logits, of)
    return targets.long()


def check_ignore_index(ignore_index: int) -> int:
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index must be an int, got {shown(ignore_index)}")
    if not torch.compiler.is_compiling() and not -(1 << 63) <= ignore_index < 1 << 63:
        raise ValueError(f"ignore_index must be an int64, got {ignore_index}")
    return ignore_index


def check_device(name: str, tensor: Tensor, logits: Tensor, of: str = "logits") -> None:
    if tensor.device != logits.device:
        raise ValueError(f"{name} must be on the device of {of} {logits.device}, got {tensor.device}")


def check_mask(mask: Tensor | None, logits: Tensor, of: str = "logits") -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    if mask.dtype.is_complex:
        raise TypeError(f"mask must be a bool or number tensor, got {mask.dtype}")
    if mask.shape != logits.shape[:-1]:
        raise ValueError(f"mask must be {tuple(logits.shape[:-1])} for {of} {tuple(logits.shape)}, got {tuple(mask.shape)}")
    check_device("mask", mask, logits, of)
    return mask if mask.dtype == torch.bool else mask != 0


def counted_rows(targets: Tensor | None, mask: Tensor | None, ignore_index: int, dims: int) -> Tensor | None:
    """Which rows are read, bool with `dims` dimensions; None for all. Targets may have one more."""
    if targets is None:
        return mask
    counted = targets != ignore_index
    counted = counted.any(-1) if counted.dim() > dims else counted
    return counted if mask is None else counted & mask


def values_at_hand(x: Tensor) -> bool:
    """Whether a check may read numbers of x on the host: they are there (or RLKERN_DEBUG=1 asks to wait for them) and nothing is being traced."""
    return not watched(x) and (DEBUG or x.device.type == "cpu")


def check_temperature(
    temperature: float | Tensor, logits: Tensor, targets: Tensor | None = None, mask: Tensor | None = None, ignore_index: int = -100
) -> tuple[Tensor | None, float]:
    """(a checked temperature [...] for rows, or None; one number, 1 beside a tensor). Rows that are not read may have any temperature."""
    if not isinstance(temperature, Tensor):
        if not isinstance(temperature, (int, float)) or isinstance(temperature, bool):
            raise TypeError(f"temperature must be a float or a float tensor with one entry a row, got {type(temperature).__name__}")
        if not 0 < temperature <= FINITE:
            raise ValueError(f"temperature must be positive and finite, got {temperature}")
        if torch.compiler.is_compiling() and temperature != 1:
            # As a number, and in new_full, it would be part of the graph: compiled anew for every value.
            return temperature * logits.new_ones(logits.shape[:-1], dtype=accumulation_dtype(logits)), 1.0
        return None, float(temperature)
    rows = logits.shape[:-1]
    if not temperature.dtype.is_floating_point:
        raise TypeError(f"temperature must be a floating-point tensor, got {temperature.dtype}")
    if temperature.requires_grad:
        raise ValueError("temperature carries no gradient here: pass temperature.detach()")
    if temperature.dim() > 0 and temperature.shape != rows:
        raise ValueError(f"temperature must be a float or a tensor {tuple(rows)}, one entry a row, got {tuple(temperature.shape)}")
    if temperature.dim() > 0:
        check_device("temperature", temperature, logits)
    elif temperature.device != logits.device:
        temperature = temperature.to(logits.device, non_blocking=True)
    temperature = temperature.expand(rows)
    if values_at_hand(temperature):
        bad = ~((temperature > 0) & (temperature < math.inf))
        if bad.any():
            counted = counted_rows(targets, mask, ignore_index, len(rows))
            bad = bad if counted is None else bad & counted
            if bad.any():
                raise ValueError(f"temperature must be positive and finite in every row that is read, got {temperature[bad][0].item()}")
    return temperature, 1.0


def check_target_range(targets: Tensor, mask: Tensor | None, ignore_index: int, vocab: int) -> None:
    bad = ((targets < 0) | (targets >= vocab)) & (targets != ignore_index)
    if mask is not None:
        bad &= mask.unsqueeze(-1)
    if bad.any():
        row, k = bad.nonzero()[0].tolist()
        raise IndexError(f"target {targets[row, k].item()} of row {row} is out of range for {vocab} logits (and is not ignore_index={ignore_index})")
