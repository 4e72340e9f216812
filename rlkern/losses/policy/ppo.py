"""PPO (arXiv 1707.06347) with the dual clip of arXiv 1912.09729: most policy losses start from it."""

from __future__ import annotations

from torch import Tensor

from ...primitives.packing import Packed
from ...primitives.ratio import clipped_ratio
from ..aggregate import LossOutput, aggregate_terms
from ..arguments import check_clip, policy_inputs
from ..rollout_weights import RolloutWeights


def ppo_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor | Packed,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    log_ratio_clamp: float | None = 20.0,
    weights: Tensor | RolloutWeights | None = None,
    aggregation: str | Tensor = "token-mean",
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """With r = exp(logp - old_logp), per token and for A < 0 at most -A dual_clip:

        max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))            arXiv 1707.06347 Eq. 7, 1912.09729 Eq. 5

    verl's "vanilla" is dual_clip=3.0. TRL's `delta` is dual_clip=delta with log_ratio_clamp=None. Clip-higher
    (DAPO, arXiv 2503.14476) is clip_high=0.28. ROLL's dual clip is dual_clip=1 + 2 * clip. Pass as `weights`:
    an entropy mask (train on the uncertain tokens only, arXiv 2506.01939), an off-policy mask, or truncated
    importance sampling of the rollout engine.

    Args:
        logp: [B, T] float log-probabilities of the tokens taken; gradients flow into it.
        old_logp: [B, T] float, those of the policy that the step started from. None is on-policy: the ratio
            is 1, the gradient -A.
        advantages: [B, T], [B, 1] or [B] float; they must not require grad.
        mask: [B, T] bool or number; nonzero counts. Anything may stand where it is 0, NaN included. Or a
            `Packed` (`rlkern.packed`) of N tokens: what is [B, T] here then has N elements in any shape, the
            same for all, and what is [B] or [B, 1] is [S] or [S, 1].
        clip_low, clip_high: no gradient for A < 0 below r = 1 - clip_low, nor for A > 0 above 1 + clip_high.
            clip_low in [0, 1].
        dual_clip: c >= 1 bounds the ratio of tokens with A < 0; None does not.
        log_ratio_clamp: bounds the log ratio to [-c, c] before exp; no gradient beyond. None bounds it at 80,
            where float32 is still finite.
        weights: [B, T], [B, 1] or [B] float, multiplied with the per-token loss; they must not require grad.
            Or a `RolloutWeights` of `rlkern.rollout_weights`.
        aggregation, normalizer: from tokens to one number, see `aggregate`; aggregation may be weights.

    Returns:
        LossOutput(loss, metrics): 0-d, float32 (float64 for float64 logp). Metrics: clip_fraction_low,
        clip_fraction_high, clip_fraction_dual, approx_kl_k1, approx_kl_k3, ratio_max, ratio_min,
        effective_sample_size, tokens, log_mean_ratio. Without any token the loss is 0, with zero gradient.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices, names and options other than the above.
        RuntimeError: for a second derivative; `use_backend("reference")` and torch.func have it.
    """
    check_clip(clip_low, clip_high, dual_clip)
    x = policy_inputs(
        logp, old_logp, advantages, mask, weights=weights, log_ratio_clamp=log_ratio_clamp, aggregation=aggregation, normalizer=normalizer
    )
    ratio = clipped_ratio(x, clip_low, clip_high, dual_clip)
    loss = aggregate_terms(x.weigh(ratio.terms), x.sequences, ratio.tokens, aggregation, normalizer)
    return LossOutput(loss, ratio.metrics)
