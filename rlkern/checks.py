"""The one checker of arguments. Errors name what was given and what was expected, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .backends.contract import ELSEWHERE
from .layout import counted_rows
from .operator import values_readable

FINITE = torch.finfo(torch.float32).max  # as an upper bound: anything but infinity
SMALLEST = torch.finfo(torch.float32).tiny  # of what is divided by: its reciprocal is finite

Like = tuple[str, Tensor]  # a tensor that another one must go with, and its name


def shown(value: object) -> str:
    """How an error shows a value: names and numbers as they are, of anything else the type."""
    return repr(value) if isinstance(value, (str, int, float, type(None))) else type(value).__name__


# --- tensors ------------------------------------------------------------------------------------------------

_FLOATS = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
_KINDS: dict[str, tuple[str, frozenset[torch.dtype]]] = {  # the words of an error, and the dtypes
    "float": ("a float tensor", frozenset(_FLOATS)),
    "real": ("a bool or number tensor", frozenset((*_FLOATS, *_INTEGERS, torch.bool))),
    "integer": ("an integer tensor", frozenset(_INTEGERS)),
    "bool": ("a bool tensor", frozenset((torch.bool,))),
}


def expect(
    name: str,
    x: Any,
    kind: str,
    layout: str,
    *,
    like: Like | None = None,
    shape: Any = None,
    detached: bool = False,
) -> None:
    """Raises TypeError or ValueError unless x is a tensor of that kind, shape and device.

    Args:
        kind: "float", "real" (bool or any number), "integer" or "bool".
        layout: the shape in words: "[B, T]", "[B] or [B, 1]".
        like: a tensor whose device x must be on, and by default whose shape x must have.
        shape: the shape, or several of which one will do. By default like's, else the dimensions of `layout`.
        detached: x must not require grad.
    """
    words, dtypes = _KINDS[kind]
    if not isinstance(x, Tensor) or x.dtype not in dtypes:
        raise TypeError(f"{name} must be {words}{'' if layout == '[...]' else ' ' + layout}, got {x.dtype if isinstance(x, Tensor) else shown(x)}")
    if shape is None and like is not None:
        if x.shape != like[1].shape:
            raise ValueError(f"{name} must have the shape of {like[0]} {tuple(like[1].shape)}, got {tuple(x.shape)}")
    elif shape is None:
        dims = layout.count(",") + 1
        if x.dim() < dims - 1 if "..." in layout else x.dim() != dims:
            raise ValueError(f"{name} must be {layout}, got shape {tuple(x.shape)}")
    elif x.shape != shape and tuple(x.shape) not in shape:
        of = "" if like is None else f" for {like[0]} {tuple(like[1].shape)}"
        several = len(shape) > 0 and not isinstance(shape[0], int)
        wanted = f"{layout}, here {' or '.join(str(tuple(s)) for s in shape)}" if several else f"{tuple(shape)}{layout.partition(']')[2]}"
        raise ValueError(f"{name} must be {wanted}{of}, got {tuple(x.shape)}")
    if like is not None and x.device != like[1].device:
        raise ValueError(f"{name} must be on the device of {like[0]} {like[1].device}, got {x.device}")
    if detached and x.requires_grad:
        raise ValueError(f"{name} must not require grad, got requires_grad=True: detach it")


def expect_alike(kind: str, layout: str, **tensors: Any) -> None:
    """All are tensors of that kind. The first has that layout, the others have its shape and device."""
    (first, like), *others = tensors.items()
    expect(first, like, kind, layout)
    for name, x in others:
        expect(name, x, kind, layout, like=(first, like))


def check_logp(logp: Tensor, name: str = "logp") -> None:
    """[B, T] float."""
    expect(name, logp, "float", "[B, T]")


def check_tokens(name: str, x: Any, logp: Tensor, kind: str = "float", of: str = "logp") -> None:
    """x must have the shape and the device of logp [B, T]."""
    expect(name, x, kind, "[B, T]", like=(of, logp))


def per_token(name: str, x: Tensor, logp: Tensor, kind: str = "float") -> Tensor:
    """x [B, T], [B, 1] or [B], detached, expanded (not copied) to [B, T] in logp's computing dtype."""
    n, length = logp.shape
    expect(name, x, kind, "[B, T], [B, 1] or [B]", shape=((n, length), (n, 1), (n,)), like=("logp", logp), detached=True)
    x = x.to(computing_dtype(logp))
    if x.shape == logp.shape:
        return x
    return (x.unsqueeze(-1) if x.dim() == 1 else x).expand(n, length)


def computing_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def numbers(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x cast to dtype; detached if the cast copies."""
    return x if x.dtype == dtype else x.detach().to(dtype)


def as_bool(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask != 0


# --- rows of logits -----------------------------------------------------------------------------------------


def check_logits(logits: Tensor, name: str = "logits", least: int = 1) -> None:
    """[..., V] of a dtype that kernels take, with V >= least."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a tensor [..., V], got {type(logits).__name__}")
    if logits.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {logits.layout}")
    if logits.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {logits.dtype}")
    if logits.dim() == 0 or logits.shape[-1] < least:
        raise ValueError(f"{name} must be [..., V] with V >= {least}, got shape {tuple(logits.shape)}")


def check_targets(targets: Tensor, logits: Tensor, of: str = "logits", *, several: bool = True) -> Tensor:
    """Token ids [...] or, with `several`, [..., K] for rows [..., V], as int64."""
    rows = logits.shape[:-1]
    if isinstance(targets, Tensor) and targets.dtype == torch.int64 and targets.shape == rows and targets.device == logits.device:
        return targets  # the usual case, without the price of a full check
    if several and isinstance(targets, Tensor) and targets.shape != rows:
        k = targets.shape[-1] if targets.dim() == logits.dim() else 0
        shapes = (rows, (*rows, k or "K"))
        expect("targets", targets, "integer", "[...] or [..., K] with K >= 1", shape=shapes, like=(of, logits))
    else:
        expect("targets", targets, "integer", "[...], one a row", shape=rows, like=(of, logits))
    return targets.long()


def check_ignore_index(ignore_index: int) -> int:
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index must be an int, got {shown(ignore_index)}")
    if not torch.compiler.is_compiling() and not -(1 << 63) <= ignore_index < 1 << 63:
        raise ValueError(f"ignore_index must be an int64, got {ignore_index}")
    return ignore_index


def check_mask(mask: Any, logits: Tensor, of: str = "logits") -> Tensor | None:
    """A mask of rows as bool; None stays None. A pack's is taken in the shape of the rows."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) and hasattr(mask, "seq_idx"):  # a Packed, which is defined above this file
        mask = mask.mask
        mask = mask.reshape(logits.shape[:-1]) if mask.numel() == logits.shape[:-1].numel() else mask
    expect("mask", mask, "real", "[...]", shape=logits.shape[:-1], like=(of, logits))
    return as_bool(mask)


def check_temperature(
    temperature: float | Tensor,
    logits: Tensor,
    targets: Tensor | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    name: str = "temperature",
) -> tuple[Tensor | None, float]:
    """(temperatures [...] or None, number): the number is 1 beside temperatures. Unread rows may have any."""
    if not isinstance(temperature, Tensor):
        if not isinstance(temperature, (int, float)) or isinstance(temperature, bool):
            raise TypeError(f"{name} must be a float or a float tensor with one entry a row, got {shown(temperature)}")
        if not SMALLEST <= temperature <= FINITE:
            raise ValueError(f"{name} must be positive and finite, at least {SMALLEST:.4g}, got {temperature}")
        if torch.compiler.is_compiling() and temperature != 1:
            # A number, even in new_full, would be part of the graph, compiled again for every value.
            return temperature * logits.new_ones(logits.shape[:-1], dtype=computing_dtype(logits)), 1.0
        return None, float(temperature)
    rows = logits.shape[:-1]
    if temperature.dim() == 0 and temperature.device != logits.device:
        temperature = temperature.to(logits.device, non_blocking=True)
    expect(name, temperature, "float", "0-d or one entry a row", shape=((), tuple(rows)), like=("logits", logits))
    if temperature.requires_grad:
        raise ValueError(f"{name} carries no gradient here: pass {name}.detach()")
    temperature = temperature.expand(rows)
    if values_readable(temperature):
        bad = ~((temperature >= SMALLEST) & (temperature < math.inf))
        if bad.any():
            counted = counted_rows(targets, mask, ignore_index, len(rows))
            bad = bad if counted is None else bad & counted
            if bad.any():
                raise ValueError(f"{name} must be positive and finite in every row that is read, got {temperature[bad][0].item()}")
    return temperature, 1.0


def check_transforms(
    logit_scale: float,
    softcap: float | None,
    row_temperature: Tensor | None,
    temperature: float,
    logits: Tensor,
    prefix: str = "",
    most: float = FINITE,
) -> tuple[Tensor | None, float, float]:
    """(temperatures or None, number, softcap) as the backends take them, from those of `check_temperature`.

    softcap tanh(scale x / softcap) / T is tanh(x / (softcap / scale)) / (T / softcap), and without a softcap
    scale x / T is x / (T / scale): the backends know no scale. For them a softcap of 0 is none.

    Args:
        prefix: of the names in errors.
        most: the largest softcap; if infinite, that is none.
    """
    check_positive(f"{prefix}logit_scale", logit_scale, FINITE)
    if softcap is not None:
        check_positive(f"{prefix}softcap", softcap, most)
    capped = softcap is not None and softcap < math.inf
    divisor: Any = softcap if capped else logit_scale
    cap = divisor / logit_scale if capped else 0.0
    if divisor != 1 and row_temperature is not None:
        row_temperature = row_temperature.to(computing_dtype(logits)) / divisor
    elif divisor != 1:
        temperature = temperature / divisor
    if not torch.compiler.is_compiling() and not (SMALLEST <= temperature <= FINITE and (not capped or SMALLEST <= cap <= FINITE)):
        given = f"{prefix}logit_scale={logit_scale}, {prefix}softcap={softcap} and a temperature of {temperature * divisor}"
        raise ValueError(f"{given} do not go together: their ratios must be at least {SMALLEST:.4g} and at most {FINITE:.4g}")
    return row_temperature, temperature, cap


def check_target_range(targets: Tensor, mask: Tensor | None, ignore_index: int | None, vocab: int, may_be_elsewhere: bool = True) -> None:
    """IndexError if a counted row of targets [N, K] is out of range. Reads values: callers ask first."""
    bad = (targets < 0) | (targets >= vocab)
    if may_be_elsewhere:
        bad &= targets != ELSEWHERE
    if ignore_index is not None:
        bad &= targets != ignore_index
    if mask is not None:
        bad &= mask.unsqueeze(-1)
    if bad.any():
        row, k = bad.nonzero()[0].tolist()
        ignored = "" if ignore_index is None else f" (and is not ignore_index={ignore_index})"
        raise IndexError(f"target {targets[row, k].item()} of row {row} is out of range for {vocab} logits{ignored}")


def check_inplace(logits: Tensor) -> None:
    """Logits whose memory their gradient may overwrite."""
    if logits.numel() == 0:
        return
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(f"inplace_backward writes the gradient over the logits: their last stride must be 1, got {logits.stride(-1)}")
    if any(size > 1 and stride == 0 for size, stride in zip(logits.shape, logits.stride(), strict=True)):
        raise ValueError(f"inplace_backward cannot write into expanded logits (strides {logits.stride()} share memory)")
    if logits.dim() > 3:
        try:
            logits.detach().view(-1, *logits.shape[-2:])
        except RuntimeError:
            raise ValueError(f"inplace_backward needs leading dimensions that merge into one, got strides {logits.stride()}") from None


# --- numbers and names --------------------------------------------------------------------------------------


def check_number(name: str, value: float, low: float = -math.inf, high: float = math.inf) -> None:
    """A number in [low, high], not NaN; a finite one must fit float32."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be {interval(low, high)}, got {value}")
    # Not under a compiler: each comparison would be one more reason to compile again.
    if not torch.compiler.is_compiling() and value not in (-math.inf, math.inf) and not -FINITE <= value <= FINITE:
        raise ValueError(f"{name} must be a number that float32 can hold, up to {FINITE:.4g}, got {value}")


def interval(low: float, high: float) -> str:
    """For an error: "in [0, inf)" where high is FINITE, "finite" where low is -FINITE as well."""
    if (low, high) == (-math.inf, math.inf):
        return "a number"
    if (low, high) == (-FINITE, FINITE):
        return "finite"
    return f"in [{low}, inf)" if high == FINITE else f"in [{low}, {high}]"


def check_positive(name: str, value: float, high: float = math.inf) -> None:
    """A number in (0, high]."""
    if isinstance(value, (int, float)) and not 0 < value <= high:
        bound = "" if high == math.inf else " and finite" if high == FINITE else f" and at most {high}"
        raise ValueError(f"{name} must be positive{bound}, got {value}")
    check_number(name, value)


def check_fraction(name: str, value: float) -> None:
    """A number in [0, 1]. The usual mistake is a percentage."""
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is a fraction in [0, 1], not a percentage, got {value}")


def check_count(name: str, value: int, low: int = 0) -> None:
    """An integer of at least low that int32 can hold."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    if not torch.compiler.is_compiling() and value >= 1 << 31:
        raise ValueError(f"{name} must be below 2^31, got {value}")


def check_index(name: str, value: int, count: int) -> None:
    """An integer in [0, count); IndexError beyond."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    if not 0 <= value < count:
        raise IndexError(f"{name} must be in [0, {count}), got {value}")


def check_flags(**flags: bool) -> None:
    """Each must be True or False, or an integer in their place."""
    for name, value in flags.items():
        if not isinstance(value, (bool, int)):
            raise TypeError(f"{name} must be True or False, got {shown(value)}")


def check_choice(name: str, value: str | int | None, choices: Iterable[str | int | None]) -> None:
    """One of the choices."""
    if not isinstance(value, (str, int, float, type(None))) or value not in tuple(choices):
        raise ValueError(f"unknown {name} {shown(value)}, expected one of {', '.join(map(repr, choices))}")


def check_group(group: torch.distributed.ProcessGroup | None, name: str = "group") -> None:
    """None, a process group, or the backend of a process group."""
    if group is not None and not hasattr(group, "allreduce"):
        raise TypeError(f"{name} must be a torch.distributed.ProcessGroup or None, got {shown(group)}")


def check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    """None, or a generator that draws on the device."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {shown(generator)}")
    if generator.device.type != device.type:
        raise ValueError(f"generator must be on the device {device}, got one on {generator.device}")
