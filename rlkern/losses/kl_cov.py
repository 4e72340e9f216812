"""KL-Cov (arXiv 2505.22617, section 4.2): holds back the tokens whose log-probability varies most with the advantage."""

from __future__ import annotations

import torch.distributed
from torch import Tensor

from ..checks import check_count, check_group
from ..covariance import covariance_of
from ..selection import select_fraction
from .clip_cov import external_mask, selection_metrics
from .policy import LossOutput, check_choice, check_fraction, check_number, policy_inputs
from .terms import clipped_ratio, finish_terms, kl_penalty, weigh_terms

PRESETS = {  # select_ratio, kl_coef, min_count
    "paper": (2e-3, 1.0, 0),
    "prime": (2e-3, 1.0, 1),
    "verl": (2e-4, 0.1, 1),
}


def kl_cov_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    select_ratio: float | None = None,
    kl_coef: float | None = None,
    preset: str | None = None,
    min_count: int | None = None,
    selected: Tensor | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    log_ratio_clamp: float | None = None,
    weights: Tensor | None = None,
    aggregation: str = "token-mean",
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """-A r for every token, + kl_coef |logp - old_logp| for those of the largest covariance: arXiv 2505.22617, Eq. 13, 14 and Listing 1.

    cov_i = (A_i - mean A)(logp_i - mean logp) over the counted tokens of this call; max(floor(select_ratio * tokens), min_count) of them are
    selected, ties to the lowest flat index. The ratio is not clipped. Conventions, by `preset`:

        preset           select_ratio    kl_coef    min_count
        "prime", None    2e-3            1.0        1           PRIME-RL/Entropy-Mechanism-of-RL for 7B (32B: 2e-4); its k_percent is 100 times it
        "verl"           2e-4            0.1        1           verl's defaults ("kl_cov"), which are neither of the paper's settings
        "paper"          2e-3            1.0        0           Eq. 13

    An option given as well wins over the preset. The penalty is the code's: its gradient is +-kl_coef, whatever the distance, and 0 at
    logp = old_logp, so on-policy this is REINFORCE. Where all advantages are equal the covariances are all 0 and the first tokens are selected.

    Args:
        logp, old_logp, advantages, mask, log_ratio_clamp, weights, aggregation, normalizer: as in `ppo_loss`. `weights` multiply the penalty too,
            as in verl.
        select_ratio: a fraction of the tokens, in [0, 1], never a percentage. None takes the preset's, and so on for kl_coef (>= 0) and min_count.
        selected: [B, T] bool or number, the tokens to hold back; replaces the selection (made over an optimizer's whole batch, say).
        group: data-parallel processes to take the two means over; the selection stays among each one's own tokens.

    Returns:
        LossOutput as that of `ppo_loss`, without clip fractions; metrics also: selected_fraction, covariance_mean, covariance_selected, and
        abs_log_ratio, the mean of |logp - old_logp| that the official code reports as its KL.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices, names and options other than the above.
    """
    check_choice("preset", preset, (None, *PRESETS))
    default_ratio, default_coef, default_count = PRESETS[preset or "prime"]
    select_ratio = default_ratio if select_ratio is None else select_ratio
    kl_coef = default_coef if kl_coef is None else kl_coef
    min_count = default_count if min_count is None else min_count
    check_fraction("select_ratio", select_ratio)
    check_number("kl_coef", kl_coef, 0)
    check_count("min_count", min_count)
    check_group(group)

    x = policy_inputs(
        logp, old_logp, advantages, mask, weights=weights, log_ratio_clamp=log_ratio_clamp, aggregation=aggregation, normalizer=normalizer
    )
    covariance = covariance_of(logp, x.advantages, x.mask, group)
    ratio = clipped_ratio(x, None, None, with_distance=True)
    if selected is not None:
        selected = external_mask(selected, x)
    else:
        selected = select_fraction(-covariance, ratio.free, x.mask, select_ratio, minimum=min_count)  # the largest
    distance = kl_penalty(x, logp.detach() if old_logp is None else old_logp, selected, "abs", None)
    terms = weigh_terms(ratio.terms + kl_coef * distance, x)
    metrics = {**ratio.metrics, **selection_metrics(covariance, selected, x.mask)}
    return finish_terms(terms, x, ratio.count, aggregation, normalizer, metrics)
