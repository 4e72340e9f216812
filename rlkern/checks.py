"""Checks of arguments that are tensors of tokens [B, T] or plain numbers; their errors name what was given and what was expected."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

FINITE = torch.finfo(torch.float32).max  # as an upper bound: anything but infinity


def check_number(name: str, value: float, low: float = -math.inf, high: float = math.inf) -> None:
    """Raises TypeError unless value is a number and ValueError unless low <= value <= high; NaN, and what float32 cannot hold, never is."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be {interval(low, high)}, got {value}")
    # Not for a compiler, to whom each comparison is one more reason to compile again.
    if not torch.compiler.is_compiling() and value not in (-math.inf, math.inf) and not -FINITE <= value <= FINITE:
        raise ValueError(f"{name} must be a number that float32 can hold, up to {FINITE:.4g}, got {value}")


def interval(low: float, high: float) -> str:
    """For an error: "in [0, inf)" where high is FINITE."""
    return f"in [{low}, inf)" if high == FINITE else f"in [{low}, {high}]"


def check_positive(name: str, value: float, high: float = math.inf) -> None:
    """As `check_number`, for (0, high]."""
    check_number(name, value, high=high)
    if value <= 0:
        raise ValueError(f"{name} must be positive, got {value}")


def check_fraction(name: str, value: float) -> None:
    """As `check_number`, for [0, 1]. A percentage given for a fraction is the usual mistake."""
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is a fraction in [0, 1], not a percentage, got {value}")


def check_count(name: str, value: int, low: int = 0) -> None:
    """Raises TypeError unless value is an integer and ValueError below low, or where int32 cannot hold it."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    if not torch.compiler.is_compiling() and value >= 1 << 31:
        raise ValueError(f"{name} must be below 2^31, got {value}")


def check_flag(name: str, value: bool) -> None:
    """Raises TypeError for what is neither True nor False nor an integer."""
    if not isinstance(value, (bool, int)):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")


def check_choice(name: str, value: str | int | None, choices: Iterable[str | int | None]) -> None:
    """Raises ValueError for a name that is not one of `choices`."""
    if not isinstance(value, (str, int, float, type(None))) or value not in tuple(choices):
        raise ValueError(f"unknown {name} {shown(value)}, expected one of {', '.join(map(repr, choices))}")


def check_group(group: torch.distributed.ProcessGroup | None) -> None:
    """Raises TypeError for what is neither a process group nor the backend of one."""
    if group is not None and not hasattr(group, "allreduce"):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {shown(group)}")


def check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    """Raises TypeError or ValueError for what cannot draw numbers on a device."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {shown(generator)}")
    if generator.device.type != device.type:
        raise ValueError(f"generator must be on the device {device}, got one on {generator.device}")


def shown(value: object) -> str:
    """What an error says was given: a name or a number as it is, of anything else its type."""
    return repr(value) if isinstance(value, (str, int, float, type(None))) else type(value).__name__


def check_logp(logp: Tensor, name: str = "logp") -> None:
    """Raises TypeError or ValueError unless logp is a float tensor [B, T]."""
    if not isinstance(logp, Tensor) or not logp.dtype.is_floating_point:
        raise TypeError(f"{name} must be a float tensor [B, T], got {logp.dtype if isinstance(logp, Tensor) else type(logp).__name__}")
    if logp.dim() != 2:
        raise ValueError(f"{name} must be [B, T], one log-probability a token, got shape {tuple(logp.shape)}")


def check_tokens(name: str, x: Tensor, logp: Tensor, *, floating: bool = True, of: str = "logp") -> None:
    """x must be a tensor with the shape and on the device of logp [B, T]; float unless floating is False (a mask: bool or any real number)."""
    kind = "float tensor" if floating else "bool or number tensor"
    if not isinstance(x, Tensor) or x.dtype.is_complex or (floating and not x.dtype.is_floating_point):
        raise TypeError(f"{name} must be a {kind} [B, T], got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    if x.shape != logp.shape:
        raise ValueError(f"{name} must have the shape of {of} {tuple(logp.shape)}, got {tuple(x.shape)}")
    if x.device != logp.device:
        raise ValueError(f"{name} must be on the device of {of} {logp.device}, got {x.device}")


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
