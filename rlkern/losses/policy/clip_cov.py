"""Clip-Cov (arXiv 2505.22617, section 4.2): drops a few tokens of high covariance of logp and advantage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...checks import check_count, check_flags, check_fraction, check_generator, check_group, check_number
from ...primitives.covariance import covariance_of
from ...primitives.ratio import clipped_ratio
from ...primitives.selection import select_random_fraction, selected_means
from ..aggregate import LossOutput, aggregate_terms
from ..arguments import check_clip, policy_inputs, selected_tokens, with_preset

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"clip_low": None, "clip_high": None, "closed_band": True, "min_count": 0},
    "prime": {"clip_low": 1.0, "clip_high": 1.0, "closed_band": False, "min_count": 1},
    "verl": {"clip_low": 0.2, "clip_high": 0.2, "closed_band": False, "min_count": 1},
}


def clip_cov_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    select_ratio: float = 2e-4,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
    preset: str | None = None,
    clip_low: float | None = None,
    clip_high: float | None = None,
    closed_band: bool | None = None,
    min_count: int | None = None,
    selected: Tensor | None = None,
    keep_value: bool = False,
    generator: torch.Generator | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    log_ratio_clamp: float | None = None,
    weights: Tensor | None = None,
    aggregation: str = "token-mean",
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """PPO's clipped loss, but zero for a few random tokens of a covariance band: arXiv 2505.22617, Eq. 10-12.

    cov_i = (A_i - mean A)(logp_i - mean logp) over the counted tokens of this call. Candidates have cov_low <
    cov_i < cov_high and are not clipped by PPO. Of these, max(floor(select_ratio * tokens), min_count) are
    drawn uniformly and lose their loss. They still count in the mean. Conventions, by `preset`:

        preset         clip_low, clip_high    band    min_count  source
        "prime", None  1, 1: ratio in [0, 2]  open    1          recipes of PRIME-RL/Entropy-Mechanism-of-RL
        "verl"         0.2, 0.2               open    1          verl's defaults ("clip_cov")
        "paper"        no clip                closed  0          Eq. 11 and 12

    An option given as well wins over the preset. If all advantages are equal (one sequence!), every
    covariance is 0 and this is plain PPO. Official codes draw with torch.randperm on the host, so equal seeds
    do not choose equal tokens. To compare, pass their choice as `selected`.

    Args:
        logp, old_logp, advantages, mask, log_ratio_clamp, weights, aggregation, normalizer: as in `ppo_loss`.
        select_ratio: a fraction of the tokens, in [0, 1].
        cov_low, cov_high: the band; cov_high may be inf.
        clip_low, clip_high: as in `ppo_loss`; None takes the preset's. "paper" needs both or neither.
        closed_band: whether cov_low and cov_high belong to the band.
        min_count: the least number of tokens to draw, if there are that many candidates.
        selected: [B, T] bool or number, tokens to leave out instead, drawn over an optimizer's batch, say.
        keep_value: keep the tokens' loss and drop only their gradient, as the paper's Listing 1 does.
        generator: for the draw, on logp's device.
        group: data-parallel processes to take the two means over. Each still draws among its own tokens.

    Returns, Raises: as `ppo_loss`; metrics also: selected_fraction, covariance_mean, covariance_selected.
    """
    given = {"clip_low": clip_low, "clip_high": clip_high, "closed_band": closed_band, "min_count": min_count}
    o = with_preset(PRESETS, preset, "prime", **given)
    check_selection(o, select_ratio, cov_low, cov_high)
    check_flags(keep_value=keep_value)
    check_group(group)
    x = policy_inputs(
        logp, old_logp, advantages, mask, weights=weights, log_ratio_clamp=log_ratio_clamp, aggregation=aggregation, normalizer=normalizer
    )
    check_generator(generator, logp.device)
    covariance = covariance_of(logp, x.advantages, x.mask, group)
    ratio = clipped_ratio(x, o["clip_low"], o["clip_high"])
    if selected is not None:
        selected = selected_tokens(selected, x)
    else:
        inside = in_band(covariance, cov_low, cov_high, o["closed_band"])
        selected = select_random_fraction(ratio.free & inside, x.mask, select_ratio, minimum=o["min_count"], generator=generator)
    terms = ratio.terms.held(selected) if keep_value else ratio.terms.dropped(selected)
    metrics = {**ratio.metrics, **selection_metrics(covariance, selected, x.mask)}
    return LossOutput(aggregate_terms(x.weigh(terms), x.mask, ratio.tokens, aggregation, normalizer), metrics)


def check_selection(o: dict[str, Any], select_ratio: float, cov_low: float, cov_high: float) -> None:
    """Raises TypeError or ValueError for wrong options of `clip_cov_loss`."""
    clip_low, clip_high = o["clip_low"], o["clip_high"]
    if (clip_low is None) != (clip_high is None):
        raise ValueError(f"clip_low and clip_high belong together, got {clip_low} and {clip_high}")
    if clip_low is not None and clip_high is not None:
        check_clip(clip_low, clip_high)
    check_fraction("select_ratio", select_ratio)
    check_number("cov_low", cov_low)
    check_number("cov_high", cov_high)
    if cov_low > cov_high:
        raise ValueError(f"cov_low must not be above cov_high, got {cov_low} and {cov_high}")
    check_count("min_count", o["min_count"])
    check_flags(closed_band=o["closed_band"])


def in_band(covariance: Tensor, low: float, high: float, closed: bool) -> Tensor:
    """Whether low < covariance < high, bool like covariance; a closed band includes its ends."""
    if closed:
        return (covariance >= low) & (covariance <= high)
    return (covariance > low) & (covariance < high)


def selection_metrics(covariance: Tensor, selected: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """selected_fraction; covariance_mean over all tokens; covariance_selected, 0 if none is selected."""
    names = ("selected_fraction", "covariance_mean", "covariance_selected")
    return dict(zip(names, selected_means(covariance, selected, mask), strict=True))
