"""KL-Cov (arXiv 2505.22617, section 4.2): holds back tokens whose logp varies most with the advantage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...checks import check_count, check_fraction, check_number
from ...parallel import Meeting
from ...primitives.batch_ranks import Batch, Call, agreed_batch, batch_totals, would_add_totals
from ...primitives.covariance import covariance_of
from ...primitives.group_selection import would_send_list
from ...primitives.kl import kl_penalty
from ...primitives.packing import Packed
from ...primitives.ratio import PolicyInputs, clipped_ratio
from ...primitives.selection import fraction_capacity, select_fraction
from ..aggregate import LossOutput, aggregate_terms
from ..arguments import policy_inputs, refuse_context_group, selected_tokens, with_preset
from ..rollout_weights import RolloutWeights
from .clip_cov import select_over_batch, selection_metrics

PRESETS = {
    "paper": {"select_ratio": 2e-3, "kl_coef": 1.0, "min_count": 0},
    "prime": {"select_ratio": 2e-3, "kl_coef": 1.0, "min_count": 1},
    "verl": {"select_ratio": 2e-4, "kl_coef": 0.1, "min_count": 1},
}


def kl_cov_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor | Packed,
    *,
    select_ratio: float | None = None,
    kl_coef: float | None = None,
    preset: str | None = None,
    min_count: int | None = None,
    selected: Tensor | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    select_over: str = "rank",
    capacity: int | None = None,
    log_ratio_clamp: float | None = None,
    weights: Tensor | RolloutWeights | None = None,
    aggregation: str | Tensor = "token-mean",
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """-A r, + kl_coef |logp - old_logp| at the largest covariances: arXiv 2505.22617, Eq. 13, 14, Listing 1.

    cov_i = (A_i - mean A)(logp_i - mean logp) over the counted tokens of this call. max(floor(select_ratio *
    tokens), min_count) are selected, ties to the lowest flat index. The ratio is not clipped. By `preset`:

        preset         select_ratio  kl_coef  min_count  source
        "prime", None  2e-3          1.0      1          PRIME-RL/Entropy-Mechanism-of-RL, 7B (2e-4 for 32B)
        "verl"         2e-4          0.1      1          verl's defaults ("kl_cov"), not the paper's
        "paper"        2e-3          1.0      0          Eq. 13

    PRIME's k_percent is 100 times select_ratio. An option given as well wins over the preset. The penalty is
    the code's. Its gradient is +-kl_coef at any distance and 0 at logp = old_logp, so on-policy this is
    REINFORCE. If all advantages are equal, all covariances are 0 and the first tokens are selected.

    Args:
        logp, old_logp, advantages, mask, log_ratio_clamp, weights, aggregation, normalizer: as in `ppo_loss`.
            `weights` multiply the penalty too, as in verl.
        select_ratio: a fraction of the tokens, in [0, 1], not a percentage. None takes the preset's.
        kl_coef: >= 0. None takes the preset's, as for min_count.
        selected: [B, T] bool or number, tokens to penalise instead, chosen over an optimizer's batch, say.
        group, select_over, capacity: as in `clip_cov_loss`. "rank" selects for each process among its own
            tokens, "group" what one process would; equals go to lower ranks first.

    Returns, Raises: as `clip_cov_loss`, without clip fractions. Metrics also: abs_log_ratio, the mean of
    |logp - old_logp| (the official code's KL).
    """

    def checked() -> tuple[dict[str, Any], PolicyInputs, Tensor | None]:
        o = with_preset(PRESETS, preset, "prime", select_ratio=select_ratio, kl_coef=kl_coef, min_count=min_count)
        check_fraction("select_ratio", o["select_ratio"])
        check_number("kl_coef", o["kl_coef"], 0)
        check_count("min_count", o["min_count"])
        x = policy_inputs(
            logp, old_logp, advantages, mask, weights=weights, log_ratio_clamp=log_ratio_clamp, aggregation=aggregation, normalizer=normalizer
        )
        refuse_context_group(x)
        return o, x, None if selected is None else selected_tokens(selected, x)

    def would_exchange(meeting: Meeting, batch: Batch) -> None:
        would_add_totals(meeting, logp)
        if select_over == "group" and selected is None:
            o = with_preset(PRESETS, preset, "prime", select_ratio=select_ratio, min_count=min_count)
            would_send_list(meeting, logp, fraction_capacity(batch, o["select_ratio"], o["min_count"], capacity))

    def options(checked: Any) -> tuple:
        return checked[0]["select_ratio"], checked[0]["min_count"], selected is None

    call = Call("kl_cov_loss", group, capacity, None, select_over)
    batch, (o, x, chosen) = agreed_batch(call, logp, checked, options, would_exchange)
    totals = None if batch is None else batch_totals(logp, x.advantages, x.mask, batch)
    covariance = covariance_of(logp, x.advantages, x.mask, totals)
    ratio = clipped_ratio(x, with_distance=True)
    fraction, least, metrics = o["select_ratio"], o["min_count"], None
    if chosen is None:  # the largest
        if totals is None or select_over == "rank":
            chosen = select_fraction(-covariance, ratio.free, x.mask, fraction, minimum=least)
        else:
            chosen, metrics = select_over_batch(-covariance, ratio.free, covariance, totals, fraction, least, capacity)
    metrics = {**ratio.metrics, **(metrics or selection_metrics(covariance, chosen, x.mask))}
    distance = kl_penalty(logp, logp.detach() if old_logp is None else old_logp, chosen, "abs", None)
    terms = x.weigh(ratio.terms).plus(x.weigh_penalty(distance.scaled(o["kl_coef"])))
    return LossOutput(aggregate_terms(terms, x.sequences, ratio.tokens, aggregation, normalizer), metrics)
