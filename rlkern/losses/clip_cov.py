"""Clip-Cov (arXiv 2505.22617, section 4.2): takes a few tokens with a high covariance of log-probability and advantage out of the update."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import as_bool, check_count, check_flag, check_generator, check_group
from ..covariance import covariance_of
from ..selection import select_random_fraction, selected_means
from .policy import LossOutput, PolicyInputs, check_choice, check_clip, check_fraction, check_number, check_tokens, policy_inputs
from .terms import clipped_ratio, finish_terms, weigh_terms, without_gradient


class _Convention(NamedTuple):
    clip_low: float | None  # None: no clip
    clip_high: float | None
    closed_band: bool
    min_count: int


PRESETS = {
    "paper": _Convention(None, None, closed_band=True, min_count=0),
    "prime": _Convention(1.0, 1.0, closed_band=False, min_count=1),
    "verl": _Convention(0.2, 0.2, closed_band=False, min_count=1),
}


def external_mask(selected: Tensor, x: PolicyInputs) -> Tensor:
    """A caller's choice of tokens as bool [B, T], without the masked ones."""
    check_tokens("selected", selected, x.logp, floating=False)
    return x.mask & as_bool(selected)


def selection_metrics(covariance: Tensor, selected: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """selected_fraction; covariance_mean, over all tokens; covariance_selected, over the selected ones, 0 if there are none."""
    names = ("selected_fraction", "covariance_mean", "covariance_selected")
    return dict(zip(names, selected_means(covariance, selected, mask), strict=True))


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
    """PPO's clipped loss, with the loss of a few random tokens of a covariance band set to zero: arXiv 2505.22617, Eq. 10-12.

    cov_i = (A_i - mean A)(logp_i - mean logp) over the counted tokens of this call; candidates have cov_low < cov_i < cov_high and are not clipped by
    PPO; of these max(floor(select_ratio * tokens), min_count) leave, uniformly drawn. They still count in the mean. Conventions, by `preset`:

        preset           clip_low, clip_high    band      min_count
        "prime", None    1, 1: ratio in [0, 2]  open      1           PRIME-RL/Entropy-Mechanism-of-RL as its recipes run it
        "verl"           0.2, 0.2               open      1           verl's defaults ("clip_cov")
        "paper"          no clip                closed    0           Eq. 11 and 12

    An option given as well wins over the preset. Where all advantages are equal (one sequence!) every covariance is 0 and this is plain PPO.
    Official codes draw with torch.randperm on the host, so equal seeds do not choose equal tokens: pass their choice as `selected` to compare.

    Args:
        logp, old_logp, advantages, mask, log_ratio_clamp, weights, aggregation, normalizer: as in `ppo_loss`.
        select_ratio: a fraction of the tokens, in [0, 1].
        cov_low, cov_high: the band; cov_high may be inf.
        clip_low, clip_high: as in `ppo_loss`; None takes the preset's. Give both or neither with preset="paper".
        closed_band: whether cov_low and cov_high belong to the band.
        min_count: the least number of tokens to draw, if there are that many candidates.
        selected: [B, T] bool or number, the tokens to leave out; replaces the whole selection (drawn over an optimizer's batch, say).
        keep_value: leave the tokens' loss in the value and take only their gradient, as the paper's Listing 1 does.
        generator: for the draw, on logp's device.
        group: data-parallel processes to take the two means over; the draw stays on each one's own tokens.

    Returns:
        LossOutput as that of `ppo_loss`; metrics also: selected_fraction, covariance_mean, covariance_selected.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices, names and options other than the above.
    """
    check_choice("preset", preset, (None, *PRESETS))
    default = PRESETS[preset or "prime"]
    clip_low = default.clip_low if clip_low is None else clip_low
    clip_high = default.clip_high if clip_high is None else clip_high
    closed_band = default.closed_band if closed_band is None else closed_band
    min_count = default.min_count if min_count is None else min_count
    if (clip_low is None) != (clip_high is None):
        raise ValueError(f"clip_low and clip_high belong together, got {clip_low} and {clip_high}")
    if clip_low is not None:
        check_clip(clip_low, clip_high)
    check_fraction("select_ratio", select_ratio)
    check_number("cov_low", cov_low)
    check_number("cov_high", cov_high)
    if cov_low > cov_high:
        raise ValueError(f"cov_low must not be above cov_high, got {cov_low} and {cov_high}")
    check_count("min_count", min_count)
    check_flag("closed_band", closed_band)
    check_flag("keep_value", keep_value)
    check_group(group)

    x = policy_inputs(
        logp, old_logp, advantages, mask, weights=weights, log_ratio_clamp=log_ratio_clamp, aggregation=aggregation, normalizer=normalizer
    )
    check_generator(generator, logp.device)
    covariance = covariance_of(logp, x.advantages, x.mask, group)
    ratio = clipped_ratio(x, clip_low, clip_high)
    if selected is not None:
        selected = external_mask(selected, x)
    else:
        in_band = (covariance >= cov_low) & (covariance <= cov_high) if closed_band else (covariance > cov_low) & (covariance < cov_high)
        selected = select_random_fraction(ratio.free & in_band, x.mask, select_ratio, minimum=min_count, generator=generator)
    terms = without_gradient(ratio.terms, selected) if keep_value else ratio.terms.masked_fill(selected, 0)
    metrics = {**ratio.metrics, **selection_metrics(covariance, selected, x.mask)}
    return finish_terms(weigh_terms(terms, x), x, ratio.count, aggregation, normalizer, metrics)
