"""Clip-Cov (arXiv 2505.22617, section 4.2): drops a few tokens of high covariance of logp and advantage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...checks import check_count, check_flags, check_fraction, check_generator, check_number
from ...parallel import Meeting
from ...primitives.batch_ranks import Batch, Call, Totals, agreed_batch, batch_totals, drawn_seed, would_add_totals
from ...primitives.covariance import covariance_of
from ...primitives.group_selection import random_values, would_send_list
from ...primitives.packing import Packed
from ...primitives.ratio import PolicyInputs, clipped_ratio
from ...primitives.selection import first_row, fraction_capacity, select_fraction_of_batch, select_random_fraction, selected_means
from ..aggregate import LossOutput, aggregate_terms
from ..arguments import check_clip, policy_inputs, refuse_context_group, selected_tokens, with_preset
from ..rollout_weights import RolloutWeights

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"clip_low": None, "clip_high": None, "closed_band": True, "min_count": 0},
    "prime": {"clip_low": 1.0, "clip_high": 1.0, "closed_band": False, "min_count": 1},
    "verl": {"clip_low": 0.2, "clip_high": 0.2, "closed_band": False, "min_count": 1},
}


def clip_cov_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor | Packed,
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
    select_over: str = "rank",
    row_offset: int | None = None,
    capacity: int | None = None,
    log_ratio_clamp: float | None = None,
    weights: Tensor | RolloutWeights | None = None,
    aggregation: str | Tensor = "token-mean",
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
        group: data-parallel processes that hold the rows of a batch between them. The two means are over all
            of them, exact and rounded once, see `token_covariance`.
        select_over: with a group, "rank" draws for each process among its own tokens; "group" draws among
            those of all as many as one process would, and the same ones wherever the rows are. That takes two
            collectives: a sum of 21 integers (137 for float64) and a gather of 2 (capacity + 1) numbers.
        row_offset, capacity: for select_over="group", as in `select_random`.

    Returns, Raises: as `ppo_loss`; metrics also: selected_fraction, covariance_mean, covariance_selected.
    With select_over="group" these three are of the whole batch and the same on all ranks; the others are of
    this process. With a group on CPUs every rank raises if one does, or if they disagree on what to select.
    """
    given = {"clip_low": clip_low, "clip_high": clip_high, "closed_band": closed_band, "min_count": min_count}

    def checked() -> tuple[dict[str, Any], PolicyInputs, Tensor | None]:
        o = with_preset(PRESETS, preset, "prime", **given)
        check_selection(o, select_ratio, cov_low, cov_high)
        check_flags(keep_value=keep_value)
        x = policy_inputs(
            logp, old_logp, advantages, mask, weights=weights, log_ratio_clamp=log_ratio_clamp, aggregation=aggregation, normalizer=normalizer
        )
        refuse_context_group(x)
        check_generator(generator, logp.device)
        return o, x, None if selected is None else selected_tokens(selected, x)

    def would_exchange(meeting: Meeting, batch: Batch) -> None:
        would_add_totals(meeting, logp)
        if select_over == "group" and selected is None:
            keys = logp.new_empty((), dtype=torch.float32)
            would_send_list(meeting, keys, fraction_capacity(batch, select_ratio, 1 if min_count is None else min_count, capacity))

    def options(checked: Any) -> tuple:
        return select_ratio, cov_low, cov_high, *checked[0].values(), selected is None

    call, totals, metrics = Call("clip_cov_loss", group, capacity, row_offset, select_over), None, None
    batch, (o, x, chosen) = agreed_batch(call, logp, checked, options, would_exchange)
    if batch is not None:
        draws = select_over == "group" and chosen is None
        totals = batch_totals(logp, x.advantages, x.mask, batch, drawn_seed(batch, logp.device, generator) if draws else None)
    covariance = covariance_of(logp, x.advantages, x.mask, totals)
    ratio = clipped_ratio(x, o["clip_low"], o["clip_high"])
    if chosen is None:
        candidates = ratio.free & in_band(covariance, cov_low, cov_high, o["closed_band"])
        if totals is None or select_over == "rank":
            chosen = select_random_fraction(candidates, x.mask, select_ratio, minimum=o["min_count"], generator=generator)
        else:
            keys = random_values(candidates, totals.seed, first_row(logp, totals.batch, row_offset)).view(logp.shape)
            chosen, metrics = select_over_batch(keys, candidates, covariance, totals, select_ratio, o["min_count"], capacity)
    metrics = {**ratio.metrics, **(metrics or selection_metrics(covariance, chosen, x.mask))}
    terms = ratio.terms.held(chosen) if keep_value else ratio.terms.dropped(chosen)
    return LossOutput(aggregate_terms(x.weigh(terms), x.sequences, ratio.tokens, aggregation, normalizer), metrics)


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


_METRICS = ("selected_fraction", "covariance_mean", "covariance_selected")


def selection_metrics(covariance: Tensor, selected: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """selected_fraction; covariance_mean over all tokens; covariance_selected, 0 if none is selected."""
    return dict(zip(_METRICS, selected_means(covariance, selected, mask), strict=True))


def select_over_batch(
    values: Tensor, candidates: Tensor, covariance: Tensor, totals: Totals, fraction: float, minimum: int, capacity: int | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """(what is selected here of the smallest of all ranks' values, `selection_metrics` of the whole batch)"""
    options: dict[str, Any] = {"minimum": minimum, "capacity": capacity, "carried": covariance, "added": covariance.sum(dtype=torch.float64)}
    choice = select_fraction_of_batch(values, candidates, totals.tokens, fraction, totals.batch, **options)
    means, count = choice.means, totals.tokens.clamp(min=1)
    metrics = (means.chosen / count, means.added / count, means.mean)
    return choice.selected, {name: value.to(covariance.dtype) for name, value in zip(_METRICS, metrics, strict=True)}
