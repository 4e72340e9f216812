"""Group sequence policy optimisation (arXiv 2507.18071): one ratio a sequence, its tokens' geometric mean."""

from __future__ import annotations

from torch import Tensor

from ...backends.contract import LARGEST_EXPONENT
from ...checks import check_number
from ...primitives.packing import Packed
from ...primitives.ratio import clipped_ratio, log_ratios
from ..aggregate import LossOutput, aggregate_terms
from ..arguments import check_clip, policy_inputs, whole_sums
from ..rollout_weights import BY_SEQUENCE, RolloutWeights


def gspo_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor | Packed,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    log_ratio_clamp: float = 10.0,
    log_ratio_sums: Tensor | None = None,
    weights: Tensor | RolloutWeights | None = None,
    aggregation: str | Tensor = "seq-mean-token-mean",
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """PPO's clip on s_t = sg(s) pi_t / sg(pi_t), s = exp(mean over the sequence of logp - old_logp).

    arXiv 2507.18071 Eq. 5 and, per token, 13. The token form has the value of the sequence form -A s, and
    also its gradient with the default aggregation and one advantage a sequence. It takes advantages per token
    too. verl up to 0.9.0 always takes the default aggregation for "gspo", whatever its loss_agg_mode. TRL's
    sequence level is aggregation="grpo". LUSPO weighs by length: "seq-mean-token-sum". The default clip
    bounds are the paper's. verl's default is its PPO's 0.2, which hardly ever clips a sequence ratio.

    Args:
        logp, old_logp, advantages, mask, clip_low, clip_high, weights, aggregation, normalizer: as in
            `ppo_loss`. The clip bounds are those of a sequence ratio, three orders of magnitude tighter.
        log_ratio_clamp: upper bound of the mean log ratio (verl: 10), in [0, 80]; no gradient beyond.
        log_ratio_sums: [S], for sequences in several micro-batches: `rlkern.log_ratio_sums` of their parts,
            added up.

    Returns, Raises: as `ppo_loss`; the clip fractions are of tokens in clipped sequences.
    """
    check_clip(clip_low, clip_high)
    check_number("log_ratio_clamp", log_ratio_clamp, 0, LARGEST_EXPONENT)
    x = policy_inputs(
        logp,
        old_logp,
        advantages,
        mask,
        weights=weights,
        levels=BY_SEQUENCE,
        log_ratio_clamp=log_ratio_clamp,
        aggregation=aggregation,
        normalizer=normalizer,
    )
    mean = whole_sums(log_ratios(x), x, log_ratio_sums) / x.sequences.lengths.clamp(min=1)
    of_sequences = clipped_ratio(x, clip_low, clip_high, log_ratio=x.sequences.spread(mean).expand(logp.shape))
    loss = aggregate_terms(x.weigh(of_sequences.terms), x.sequences, of_sequences.tokens, aggregation, normalizer)
    clips = {name: of_sequences.metrics[name] for name in ("clip_fraction_low", "clip_fraction_high")}
    return LossOutput(loss, {**clips, **clipped_ratio(x).metrics})
