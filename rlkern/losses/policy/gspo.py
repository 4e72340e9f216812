"""Group sequence policy optimisation (arXiv 2507.18071): one ratio a sequence, the geometric mean of its tokens' ratios."""

from __future__ import annotations

from torch import Tensor

from ...backends.contract import LARGEST_EXPONENT
from ...checks import check_number
from ...primitives.kinks import bounded
from ...primitives.ratio import clip_fractions, clipped_surrogate, ratio_metrics
from ...primitives.reductions import sequence_mean
from ..aggregate import LossOutput, aggregate
from ..arguments import check_clip, policy_tokens


def gspo_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    log_ratio_clamp: float = 10.0,
    weights: Tensor | None = None,
    aggregation: str = "seq-mean-token-mean",
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """PPO's clip on s_t = sg(s) * pi_t / sg(pi_t), s = exp(mean over the sequence of logp - old_logp): arXiv 2507.18071 Eq. 5 and, per token, 13.

    The token form has the value and, with the default aggregation and one advantage a sequence, the gradient of the sequence form -A s; it also
    takes advantages per token. verl up to 0.9.0 always does this for "gspo", whatever its loss_agg_mode; TRL's sequence level is
    aggregation="grpo"; LUSPO weighs by length: "seq-mean-token-sum". verl takes the clip bounds of its PPO (0.2) unless told otherwise, which
    hardly ever clip a sequence ratio; the defaults here are the paper's.

    Args:
        logp, old_logp, advantages, mask, clip_low, clip_high, weights, aggregation, normalizer: as in `ppo_loss`, but the clip bounds are those of
            a sequence ratio, three orders of magnitude tighter.
        log_ratio_clamp: the mean log ratio is bounded to at most this (verl: 10); no gradient beyond. In [0, 80].

    Returns:
        LossOutput as that of `ppo_loss`; the clip fractions are of tokens in clipped sequences.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices, names and options other than the above.
    """
    check_clip(clip_low, clip_high)
    check_number("log_ratio_clamp", log_ratio_clamp, 0, LARGEST_EXPONENT)
    p = policy_tokens(
        logp, old_logp, advantages, mask, weights=weights, log_ratio_clamp=log_ratio_clamp, aggregation=aggregation, normalizer=normalizer
    )
    exponent = sequence_mean(p.log_ratio.detach(), p.mask) + (p.logp - p.logp.detach())
    ratio = bounded(exponent, high=log_ratio_clamp).exp()
    values = p.weigh(clipped_surrogate(ratio, p.advantages, clip_low, clip_high))
    metrics = {**clip_fractions(ratio, p.advantages, p.mask, 1 - clip_low, 1 + clip_high), **ratio_metrics(p)}
    return LossOutput(aggregate(values, p.mask, aggregation, normalizer), metrics)
