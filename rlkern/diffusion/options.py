"""What diffusion BGPO must be told: conventions by name, the options that the draws of a batch share, and numbers one a sequence."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.contract import LARGEST_EXPONENT
from ..checks import FINITE, check_choice, check_number, interval
from ..losses.arguments import check_clip
from ..operator import values_readable

CONVEX_KL = ("k1", "k2", "k3")  # with these penalties BGPO's bound stays a bound


class _Convention(NamedTuple):
    ratio_scale: str  # "none": 1, "width": one over the padded response width, "length": one over the response's own length
    seq_weight: str  # "sequences": 1/B, "tokens": the response's share of the batch's tokens
    clip: tuple[float, float] | None
    dual_clip: float | None


PRESETS = {
    "paper": _Convention("none", "sequences", None, None),
    "reference": _Convention("width", "tokens", (0.2, 0.2), 3.0),
    "recommended": _Convention("length", "sequences", (0.2, 0.2), None),
}


class Options(NamedTuple):
    """What the draws of a batch share, checked; see `bgpo_loss`."""

    seq_weight: float | Tensor
    ratio_scale: float | Tensor
    clip: tuple[float, float]  # (1, inf) clips nothing
    dual_clip: float | None
    max_log_ratio: float
    kl_coef: float
    kl: str


def _lengths(lengths: Tensor | None, n: int, device: torch.device, preset: str) -> Tensor:
    if lengths is None:
        raise TypeError(f"preset={preset!r} needs lengths= [B], the number of response tokens of each sequence")
    if not isinstance(lengths, Tensor) or lengths.dtype.is_complex or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must be a tensor [B] of numbers, got {lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__}")
    if tuple(lengths.shape) != (n,):
        raise ValueError(f"lengths must be [B] with B = {n}, got {tuple(lengths.shape)}")
    if lengths.device != device:
        raise ValueError(f"lengths must be on the logits' device {device}, got {lengths.device}")
    if values_readable(lengths) and (lengths < 0).any():
        raise ValueError(f"lengths must not be negative, got {lengths.min().item()}")
    return lengths.detach().double()  # rounded to the dtype of the computation later, once


def bgpo_options(
    n: int,
    device: torch.device,
    *,
    seq_weight: float | Tensor | None,
    ratio_scale: float | Tensor | None,
    clip: tuple[float, float] | None,
    dual_clip: float | None,
    max_log_ratio: float,
    ref_elbo: Tensor | None,
    kl_coef: float,
    kl: str,
    preset: str | None = None,
    lengths: Tensor | None = None,
    response_width: int | None = None,
) -> Options:
    """Fills in from the preset, for n sequences, what is not given. Raises TypeError, ValueError."""
    check_choice("preset", preset, (None, *PRESETS))
    if preset is None:
        for name, value in (("seq_weight", seq_weight), ("ratio_scale", ratio_scale)):
            if value is None:
                raise TypeError(f"{name}= must be given, paper and code differ in it; or preset=, one of {', '.join(map(repr, PRESETS))}")
    else:
        convention = PRESETS[preset]
        if seq_weight is None and convention.seq_weight == "sequences":
            seq_weight = 1 / max(n, 1)
        elif seq_weight is None:
            lengths = _lengths(lengths, n, device, preset)
            seq_weight = lengths / lengths.sum().clamp(min=1)
        if ratio_scale is None and convention.ratio_scale == "none":
            ratio_scale = 1.0
        elif ratio_scale is None and convention.ratio_scale == "width":
            if response_width is None:
                raise TypeError(f"preset={preset!r} needs response_width=, the padded number of response tokens")
            check_number("response_width", response_width, 1)
            ratio_scale = 1 / response_width
        elif ratio_scale is None:
            ratio_scale = 1 / _lengths(lengths, n, device, preset)
        clip = convention.clip if clip is None else clip
        dual_clip = convention.dual_clip if dual_clip is None else dual_clip
    if clip is None:
        clip = (1.0, math.inf)
    elif not isinstance(clip, (tuple, list)) or len(clip) != 2:
        raise TypeError(f"clip must be a pair (low, high) for the bounds 1 - low and 1 + high, or None, got {clip!r}")
    check_clip(*clip, dual_clip)
    check_number("max_log_ratio", max_log_ratio, 0, LARGEST_EXPONENT)
    check_number("kl_coef", kl_coef, 0)
    check_choice("kl", kl, CONVEX_KL)
    if ref_elbo is None and kl_coef != 0:
        raise ValueError(f"kl_coef={kl_coef} needs ref_elbo=, the reference model's ELBO of the same draw")
    return Options(seq_weight, ratio_scale, clip, dual_clip, max_log_ratio, kl_coef, kl)


def vector(name: str, value: Tensor, like: Tensor) -> Tensor:
    """A float tensor [B], [B, 1] or 0-d, without gradient, as [B] in the dtype of `like` [B]. Raises TypeError, ValueError."""
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
        raise TypeError(f"{name} must be a float tensor [B], got {value.dtype if isinstance(value, Tensor) else type(value).__name__}")
    n = like.shape[0]
    if tuple(value.shape) not in ((n,), (n, 1), ()):
        raise ValueError(f"{name} must be [B] with B = {n}, one number a sequence, got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name} must be on the logits' device {like.device}, got {value.device}")
    if value.requires_grad:
        raise ValueError(f"{name} must not require grad, got requires_grad=True: detach them")
    value = value.to(like.dtype)
    return value.expand(n) if value.dim() == 0 else value.reshape(n)


def other_elbo(name: str, value: Tensor | None, like: Tensor) -> Tensor | None:
    """As `vector`, for the ELBO of a policy that is not trained: detached. None stays None."""
    return None if value is None else vector(name, value.detach() if isinstance(value, Tensor) else value, like)


def advantage_vector(advantages: Tensor, like: Tensor) -> Tensor:
    """As `vector`; finite where that can be seen."""
    advantages = vector("advantages", advantages, like)
    if values_readable(advantages) and not advantages.isfinite().all():
        raise ValueError(f"advantages must be finite, got {advantages[~advantages.isfinite()][0].item()}")
    return advantages


def factor(name: str, value: float | Tensor, like: Tensor, high: float = FINITE) -> float | Tensor:
    """A number, or what `vector` takes, in [0, high]. Raises TypeError, ValueError."""
    if not isinstance(value, Tensor):
        check_number(name, value, 0, high)
        return value
    value = vector(name, value, like)
    if values_readable(value):
        bad = ~((value >= 0) & (value <= high))
        if bad.any():
            raise ValueError(f"{name} must be {interval(0, high)}, got {value[bad][0].item()}")
    return value


def scale_factor(ratio_scale: float | Tensor, like: Tensor) -> float | Tensor:
    """As `factor`; the 1/L of an empty response, infinite, becomes 0: its ELBO is 0 under any policy."""
    if isinstance(ratio_scale, Tensor):
        ratio_scale = torch.where(ratio_scale == math.inf, 0, ratio_scale)
    return factor("ratio_scale", ratio_scale, like)
