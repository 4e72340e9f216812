"""VESPO (arXiv 2602.10693): a smooth kernel of the sequence's weight, 1 on-policy, fading both ways."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...backends.contract import LARGEST_EXPONENT
from ...checks import check_number
from ...primitives.kinks import number
from ...primitives.packing import Packed, per_token
from ...primitives.ratio import PolicyTokens, ratio_metrics
from ...primitives.reductions import masked_mean
from ..aggregate import LossOutput, aggregate_values
from ..arguments import policy_tokens, rollout_tokens, whole_sums
from ..rollout_weights import RolloutWeights

_LARGEST = 20.0  # of any log ratio, as in TRL
_SMALLEST = math.log(1e-8)  # of a weight and of the sequence; that of a token is -20


def _log_weight(weights: Tensor, p: PolicyTokens) -> Tensor:
    """The log of the sequence's importance weight [B], given so or as its tokens' weights [B, T].

    A sequence's is never told from tokens' by how many tokens this rank has: the ranks exchange only sums of
    tokens' weights.
    """
    by_token = per_token("rollout_weights", weights, p.logp, p.sequences)
    n = p.sequences.lengths.shape[0]
    if weights.shape in ((n,), (n, 1)) and (p.sequences.group_name != "" or weights.shape != p.logp.shape):
        return _log(weights.detach().to(p.logp.dtype).reshape(-1))
    return _log_product(by_token, p)


def _log_product(weights: Tensor, p: PolicyTokens) -> Tensor:
    if not p.sequences.whole:
        raise ValueError("weights of tokens have no product over parts of sequences (full_lengths=): give rollout_weights [S], that of whole ones")
    return p.sequences.sum(_log(weights))


def _log(weights: Tensor) -> Tensor:
    return weights.log().clamp(_SMALLEST, _LARGEST)


def bounded_log_ratio(d: Tensor) -> Tensor:
    """What log W adds up."""
    return d.clamp(-_LARGEST, _LARGEST)


def vespo_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor | Packed,
    *,
    k_positive: float = 2.0,
    lambda_positive: float = 3.0,
    k_negative: float = 3.0,
    lambda_negative: float = 2.0,
    rollout_weights: Tensor | None = None,
    log_ratio_sums: Tensor | None = None,
    weights: Tensor | RolloutWeights | None = None,
    aggregation: str | Tensor = "token-mean",
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """-sg(phi(W)) A logp per token, phi(W) = exp(lambda) W^k exp(-lambda W): arXiv 2602.10693.

    W is the product of the sequence's token ratios r. An engine may sample from another policy than the one
    that scores. `rollout_weights` w = pi_old / pi_rollout corrects for it: W is then the ratio to the
    policy that sampled. The bounds are TRL's, except that log phi is bounded at 80, where float32 is finite:

        log W = clamp(sum_t clamp(log r_t, -20, 20) + sum_t clamp(log w_t, log 1e-8, 20), log 1e-8, 20)

    TRL's "vespo" divides by the tokens of the whole accumulated batch: pass `normalizer`. It also raises a
    lambda below 1e-4 to 1e-4.

    Args:
        logp, old_logp, advantages, mask, weights, aggregation, normalizer: as in `ppo_loss`.
        k_positive, lambda_positive: the kernel for A >= 0, both >= 0.
        k_negative, lambda_negative: the kernel for A < 0.
        rollout_weights: >= 0, without gradient: [B, T] float, or [B, 1] or [B], whose log enters the sum
            once. They go into W, and through phi; `weights` multiply a token's loss instead. A
            `RolloutWeights` of level "token" as `weights` goes here.
        log_ratio_sums: as in `gspo_loss`; rollout weights are then one a sequence.

    Returns, Raises: as `ppo_loss`, without clip fractions; metrics also: kernel_mean, over the tokens.
    """
    numbers = {"k_positive": k_positive, "lambda_positive": lambda_positive, "k_negative": k_negative, "lambda_negative": lambda_negative}
    for name, value in numbers.items():
        check_number(name, value, 0)
    correction = weights if isinstance(weights, RolloutWeights) else None
    if correction is not None and rollout_weights is not None:
        raise ValueError("weights are a correction of the rollout, which goes into W: rollout_weights must be None then")
    outside = None if isinstance(weights, RolloutWeights) else weights
    p = policy_tokens(logp, old_logp, advantages, mask, weights=outside, aggregation=aggregation, normalizer=normalizer)
    inside = None if correction is None else rollout_tokens(correction, old_logp, logp, p.sequences, ("token",))
    with torch.no_grad():
        log_w = whole_sums(bounded_log_ratio(p.log_ratio), p, log_ratio_sums)
        if rollout_weights is not None:
            log_w = log_w + _log_weight(rollout_weights, p)
        if inside is not None:
            log_w = log_w + _log_product(inside, p)
        log_w = p.sequences.spread(log_w.clamp(_SMALLEST, _LARGEST))
        negative = p.advantages < 0
        k = torch.where(negative, number(k_negative, log_w), number(k_positive, log_w))
        rate = torch.where(negative, number(lambda_negative, log_w), number(lambda_positive, log_w))
        kernel = (rate + k * log_w - rate * log_w.exp()).clamp(max=LARGEST_EXPONENT).exp()
    values = p.weigh(-kernel * p.advantages * p.score())
    metrics = {"kernel_mean": masked_mean(kernel, p.mask), **ratio_metrics(p)}
    return LossOutput(aggregate_values(values, p.sequences, aggregation, normalizer), metrics)
