"""The options of diffusion BGPO: conventions by name, what all draws share, and numbers one a sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.contract import LARGEST_EXPONENT
from ..checks import FINITE, check_choice, check_number, expect, interval
from ..losses.arguments import check_clip, with_preset
from ..operator import values_readable

CONVEX_KL = ("k1", "k2", "k3")  # with these penalties BGPO's bound stays a bound

# scale: ratio_scale is 1, or 1 over the padded "width" of the responses, or 1 over the "length" of each.
# share: seq_weight is 1 over the number of "sequences", or the response's share of the batch's "tokens".
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"scale": "one", "share": "sequences"},
    "reference": {"scale": "width", "share": "tokens", "clip": (0.2, 0.2), "dual_clip": 3.0},
    "recommended": {"scale": "length", "share": "sequences", "clip": (0.2, 0.2)},
}


class Given(NamedTuple):
    """What a caller gives of the options of `bgpo_loss`."""

    seq_weight: float | Tensor | None
    ratio_scale: float | Tensor | None
    clip: Sequence[float] | None
    dual_clip: float | None
    max_log_ratio: float
    ref_elbo: Tensor | None
    kl_coef: float
    kl: str
    preset: str | None = None
    lengths: Tensor | None = None
    response_width: int | None = None

    def token_counts(self, like: Tensor) -> Tensor:
        """The lengths, for a preset that needs them."""
        if self.lengths is None:
            raise TypeError(f"preset={self.preset!r} needs lengths= [B], the number of response tokens of each sequence")
        if isinstance(self.lengths, Tensor) and self.lengths.dtype == torch.bool:
            raise TypeError("lengths must be numbers of tokens [B], not a mask, got torch.bool")
        expect("lengths", self.lengths, "real", "[B], one a sequence", shape=like.shape, like=("the elbo", like))
        if values_readable(self.lengths) and (self.lengths < 0).any():
            raise ValueError(f"lengths must not be negative, got {self.lengths.min().item()}")
        return self.lengths.detach().double()  # rounded to the dtype of the computation later, once


class Options(NamedTuple):
    """What the draws of a batch share, checked; see `bgpo_loss`."""

    seq_weight: float | Tensor
    ratio_scale: float | Tensor
    clip: Sequence[float]  # (1, inf) clips nothing
    dual_clip: float | None
    max_log_ratio: float
    kl_coef: float
    kl: str


def bgpo_options(given: Given, like: Tensor) -> Options:
    """The options, those not given from the preset, for sequences with ELBOs like [B].

    Raises TypeError, ValueError.
    """
    o = with_preset(PRESETS, given.preset, None, scale=None, share=None, clip=given.clip, dual_clip=given.dual_clip)
    seq_weight = _seq_weight(o["share"], given, like) if given.seq_weight is None else given.seq_weight
    ratio_scale = _ratio_scale(o["scale"], given, like) if given.ratio_scale is None else given.ratio_scale
    clip = (1.0, math.inf) if o["clip"] is None else o["clip"]
    if not isinstance(clip, (tuple, list)) or len(clip) != 2:
        raise TypeError(f"clip must be a pair (low, high) for the bounds 1 - low and 1 + high, or None, got {clip!r}")
    check_clip(clip[0], clip[1], o["dual_clip"])
    check_number("max_log_ratio", given.max_log_ratio, 0, LARGEST_EXPONENT)
    check_number("kl_coef", given.kl_coef, 0)
    check_choice("kl", given.kl, CONVEX_KL)
    if given.ref_elbo is None and given.kl_coef != 0:
        raise ValueError(f"kl_coef={given.kl_coef} needs ref_elbo=, the reference model's ELBO of the same draw")
    return Options(seq_weight, ratio_scale, clip, o["dual_clip"], given.max_log_ratio, given.kl_coef, given.kl)


def _seq_weight(share: str | None, given: Given, like: Tensor) -> float | Tensor:
    if share == "sequences":
        return 1 / max(len(like), 1)
    if share == "tokens":
        lengths = given.token_counts(like)
        return lengths / lengths.sum().clamp(min=1)
    raise _not_given("seq_weight")


def _ratio_scale(scale: str | None, given: Given, like: Tensor) -> float | Tensor:
    if scale == "one":
        return 1.0
    if scale == "length":
        return 1 / given.token_counts(like)
    if scale is None:
        raise _not_given("ratio_scale")
    if given.response_width is None:
        raise TypeError(f"preset={given.preset!r} needs response_width=, the padded number of response tokens")
    check_number("response_width", given.response_width, 1)
    return 1 / given.response_width


def _not_given(name: str) -> TypeError:
    presets = ", ".join(map(repr, PRESETS))
    return TypeError(f"{name}= must be given, paper and code differ in it; or preset=, one of {presets}")


def vector(name: str, value: Tensor, like: Tensor) -> Tensor:
    """A float tensor [B], [B, 1] or 0-d, without gradient, as [B] in the dtype of `like` [B]."""
    n = like.shape[0]
    shapes = ((n,), (n, 1), ())
    expect(name, value, "float", "[B], [B, 1] or 0-d", shape=shapes, like=("the elbo", like), detached=True)
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
    """A number, or what `vector` takes, in [0, high]."""
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
    """As `factor`. The 1/L of an empty response is infinite and becomes 0: its ELBO is 0 under any policy."""
    if isinstance(ratio_scale, Tensor):
        ratio_scale = torch.where(ratio_scale == math.inf, 0, ratio_scale)
    return factor("ratio_scale", ratio_scale, like)
