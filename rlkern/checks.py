"""Checks of arguments that are tensors of tokens [B, T] or plain numbers; their errors name what was given and what was expected."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def check_number(name: str, value: float, low: float = -math.inf, high: float = math.inf) -> None:
    """Raises TypeError unless value is a number and ValueError unless low <= value <= high."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")


def check_fraction(name: str, value: float) -> None:
    """As `check_number`, for [0, 1]. A percentage given for a fraction is the usual mistake."""
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is a fraction in [0, 1], not a percentage, got {value}")


def check_count(name: str, value: int) -> None:
    """Raises TypeError unless value is an integer and ValueError below 0."""
    if not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    check_number(name, value, 0)


def check_choice(name: str, value: str | None, choices: Iterable[str | None]) -> None:
    """Raises ValueError for a name that is not one of `choices`."""
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}, expected one of {', '.join(map(repr, choices))}")


def check_logp(logp: Tensor) -> None:
    """Raises TypeError or ValueError unless logp is a float tensor [B, T]."""
    if not isinstance(logp, Tensor) or not logp.dtype.is_floating_point:
        raise TypeError(f"logp must be a float tensor [B, T], got {logp.dtype if isinstance(logp, Tensor) else type(logp).__name__}")
    if logp.dim() != 2:
        raise ValueError(f"logp must be [B, T], one log-probability a token, got shape {tuple(logp.shape)}")


def check_tokens(name: str, x: Tensor, logp: Tensor, *, floating: bool = True) -> None:
    """x must be a tensor with the shape and on the device of logp [B, T]; float unless floating is False (a mask: bool or any real number)."""
    kind = "float tensor" if floating else "bool or number tensor"
    if not isinstance(x, Tensor) or x.dtype.is_complex or (floating and not x.dtype.is_floating_point):
        raise TypeError(f"{name} must be a {kind} [B, T], got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    if x.shape != logp.shape:
        raise ValueError(f"{name} must have the shape of logp {tuple(logp.shape)}, got {tuple(x.shape)}")
    if x.device != logp.device:
        raise ValueError(f"{name} must be on the device of logp {logp.device}, got {x.device}")


def per_token(name: str, x: Tensor, logp: Tensor) -> Tensor:
    """x [B, T], [B, 1] or [B], float without gradient, as [B, T] in the dtype that logp is computed in (expanded, not copied). Raises
    TypeError, ValueError."""
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        raise TypeError(f"{name} must be a float tensor [B, T], [B, 1] or [B], got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    n_sequences, length = logp.shape
    if tuple(x.shape) not in ((n_sequences, length), (n_sequences, 1), (n_sequences,)):
        raise ValueError(f"{name} must be [B, T], [B, 1] or [B] for logp [B, T] = {tuple(logp.shape)}, got {tuple(x.shape)}")
    if x.device != logp.device:
        raise ValueError(f"{name} must be on the device of logp {logp.device}, got {x.device}")
    if x.requires_grad:
        raise ValueError(f"{name} must not require grad, got requires_grad=True: detach them")
    x = x.to(computing_dtype(logp))
    if x.shape == logp.shape:
        return x
    return (x.unsqueeze(-1) if x.dim() == 1 else x).expand(n_sequences, length)


def numbers(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in dtype, for who reads its numbers: without gradient where that takes a copy, and itself where it does not."""
    return x if x.dtype == dtype else x.detach().to(dtype)


def as_bool(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask != 0


def computing_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
