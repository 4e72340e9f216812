"""Learning against an opponent with a pairwise judge.

Nash-MD (arXiv 2312.00886), and Nash-MP (arXiv 2505.19731), the proximal-point method.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import check_number, check_positive
from ...primitives.packing import Packed, per_sequence
from ...primitives.ratio import PolicyTokens
from ...primitives.reductions import masked_mean, total
from ..aggregate import LossOutput, aggregate_values
from ..arguments import log_ratio_to, ratio_tokens


def nash_md_loss(
    logp: Tensor,
    reference_logp: Tensor,
    win_prob: Tensor,
    mask: Tensor | Packed,
    *,
    beta: float = 0.1,
    aggregation: str | Tensor = "seq-mean-token-sum",
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """Nash-MD, as TRL has it. The mean over responses of

        beta sum_t sg(logp - reference_logp) logp - (win_prob - 1/2) sum_t logp

    The opponent's responses are sampled from softmax((1 - c) logits + c reference_logits), c = 0.5 in TRL.

    Args:
        logp: [B, T] of the policy's own responses; gradients flow here.
        reference_logp: [B, T] of the reference, used detached.
        win_prob: [B], the judge's probability that this response beats the opponent's.
        mask: [B, T], nonzero counts.
        beta: strength of the pull towards the reference.
        aggregation, normalizer: as in `aggregate`; the default is the mean over responses that have tokens.

    Returns:
        LossOutput(loss, metrics): win_prob, kl_reference (per token), sequences (with tokens), tokens.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices and options other than the above.
    """
    check_number("beta", beta, 0)
    tokens = ratio_tokens(logp, None, mask, aggregation=aggregation, normalizer=normalizer)
    anchors = {"reference": (beta, log_ratio_to("reference_logp", reference_logp, tokens))}
    return _preference_loss(tokens, win_prob, anchors, aggregation, normalizer)


def nash_mp_loss(
    logp: Tensor,
    reference_logp: Tensor,
    target_logp: Tensor,
    win_prob: Tensor,
    mask: Tensor | Packed,
    *,
    beta: float = 0.1,
    eta: float = 1.0,
    aggregation: str | Tensor = "seq-mean-token-sum",
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """Nash-MP ("Nash Prox" in the paper's second version), Nash-MD with a second anchor: mean over responses

        sum_t sg(beta (logp - reference_logp) + beta / eta (logp - target_logp)) logp - (win_prob - 1/2) sum_t
        logp

    Args:
        target_logp: [B, T] of the target policy of the proximal step, used detached. It is a slow or frozen
            copy of the policy, from which the opponent's responses come.
        eta: step size of the proximal step; infinity removes the second anchor.
        The rest: as in `nash_md_loss`. With target = reference it is `nash_md_loss` at beta (1 + 1 / eta).

    Returns:
        LossOutput(loss, metrics): as for `nash_md_loss`, and kl_target (per token).

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices and options other than the above.
    """
    check_number("beta", beta, 0)
    check_positive("eta", eta)
    tokens = ratio_tokens(logp, None, mask, aggregation=aggregation, normalizer=normalizer)
    anchors = {
        "reference": (beta, log_ratio_to("reference_logp", reference_logp, tokens)),
        "target": (beta / eta, log_ratio_to("target_logp", target_logp, tokens)),
    }
    return _preference_loss(tokens, win_prob, anchors, aggregation, normalizer)


def _preference_loss(
    tokens: PolicyTokens, win_prob: Tensor, anchors: dict[str, tuple[float, Tensor]], aggregation: str | Tensor, normalizer
) -> LossOutput:
    """REINFORCE on win_prob - 1/2, with a detached pull of each token towards the anchors.

    anchors: name -> (coefficient, log ratio to it).
    """
    sequences = tokens.sequences
    win_prob = per_sequence("win_prob", win_prob, tokens.logp, sequences)
    pull = torch.zeros_like(tokens.logp)
    for coefficient, log_ratio in anchors.values():
        pull = pull + coefficient * log_ratio.detach()
    values = (pull - torch.where(tokens.mask, sequences.spread(win_prob - 0.5), 0)) * tokens.logp
    responses, dtype = sequences.lengths > 0, tokens.logp.dtype
    metrics = {
        "win_prob": masked_mean(win_prob, responses),
        "sequences": total(responses, dtype),
        "tokens": total(tokens.mask, dtype),
        **{f"kl_{name}": masked_mean(log_ratio, tokens.mask) for name, (_, log_ratio) in anchors.items()},
    }
    return LossOutput(aggregate_values(values, tokens.sequences, aggregation, normalizer), metrics)
