"""Sequences in several micro-batches: what losses on whole sequences need of their other parts."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_choice, check_number
from ..primitives.packing import Packed
from ..primitives.ratio import PolicyTokens
from .arguments import policy_tokens, ratio_tokens
from .policy.gmpo import clipped_log_ratio
from .policy.vespo import bounded_log_ratio

LOSSES = ("gspo", "gmpo", "vespo", "nft")


@torch.no_grad()
def log_ratio_sums(
    logp: Tensor,
    old_logp: Tensor | None,
    mask: Tensor | Packed,
    *,
    of: str,
    advantages: Tensor | None = None,
    clip_low: float = 0.4,
    clip_high: float = 0.4,
) -> Tensor:
    """What a loss on whole sequences adds up over these tokens: the first phase for sequences in parts.

    A sequence may be cut over micro-batches. Add these sums up over its parts, in a pass without gradient.
    Then each part's loss takes the total, and the losses of the parts, and their gradients, add up:

        sums = [rlkern.log_ratio_sums(logp, old, pack, of="gspo") for logp, old, pack in parts]
        loss = rlkern.gspo_loss(logp, old, advantages, pack, aggregation=w, log_ratio_sums=sum(sums)).loss

    The packs are made with full_lengths=, and sequence i is the same one in all of them.

        of         sum over the tokens of a sequence, d = logp - old_logp
        "gspo"     d
        "nft"      d, for ratio_type "sequence"
        "gmpo"     min(d, clip_high) for A > 0, max(d, -clip_low) for A < 0
        "vespo"    d within [-20, 20]

    Args:
        logp, old_logp, mask: as in the loss. A pack with a group adds up over its ranks here.
        of: one of the above.
        advantages: for "gmpo": [S] or [S, 1].
        clip_low, clip_high: for "gmpo", as in `gmpo_loss`.

    Returns:
        [S] ([B] for padded tokens), float32 (float64 for float64 logp), without gradient.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices and names other than these.
    """
    check_choice("of", of, LOSSES)
    if (advantages is None) == (of == "gmpo"):
        raise ValueError(f"advantages is for of='gmpo', which needs it, got of={of!r} and advantages {'None' if advantages is None else 'given'}")
    check_number("clip_low", clip_low, 0)
    check_number("clip_high", clip_high, 0)
    if advantages is None:
        p = ratio_tokens(logp, old_logp, mask, normalizer=1)
    else:
        p = policy_tokens(logp, old_logp, advantages, mask, normalizer=1)
    return p.sequences.sum(_summand(p, of, clip_low, clip_high))


def _summand(p: PolicyTokens, of: str, clip_low: float, clip_high: float) -> Tensor:
    if of == "vespo":
        return bounded_log_ratio(p.log_ratio)
    if of == "gmpo":
        return clipped_log_ratio(torch.where(p.advantages == 0, 0, p.log_ratio), p.advantages, clip_low, clip_high)
    return p.log_ratio
