"""The arguments that losses share, checked and made safe to use. All raise TypeError or ValueError."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..backends.contract import LARGEST_EXPONENT
from ..checks import as_bool, check_choice, check_number, check_tokens, computing_dtype
from ..primitives.packing import Packed, Rows, per_sequence, per_token, sequences_of
from ..primitives.ratio import PolicyInputs, PolicyTokens, clean, own_gradient
from .aggregate import check_aggregation, check_parts
from .rollout_weights import LEVELS, RolloutWeights


def check_clip(clip_low: float, clip_high: float, dual_clip: float | None = None) -> None:
    """The bounds 1 - clip_low and 1 + clip_high must enclose 1; clip_low > 1 makes a negative ratio."""
    check_number("clip_low", clip_low, 0, 1)
    check_number("clip_high", clip_high, 0)
    if dual_clip is not None:
        check_number("dual_clip", dual_clip, 1)


def policy_inputs(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor | Packed,
    *,
    weights: Tensor | RolloutWeights | None = None,
    levels: tuple[str, ...] = LEVELS,
    log_ratio_clamp: float | None = None,
    aggregation: str | Tensor = "token-mean",
    normalizer: float | Tensor | None = None,
) -> PolicyInputs:
    """Checks the arguments that every policy loss takes.

    Args:
        logp, old_logp, advantages, mask, weights: as in `ppo_loss`. Advantages that require grad are refused.
        levels: of `RolloutWeights` that the loss takes as weights.
        log_ratio_clamp: c bounds the exponent of `ratio` to [-c, c], without gradient beyond (verl's vanilla
            loss: 20). None bounds it to (-inf, 80], where exp is finite in float32. Otherwise an overflowing
            ratio would make NaN of a clipped token's gradient.
        aggregation, normalizer: only checked here, see `aggregate`.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices and options other than these.
    """
    check_aggregation(aggregation, normalizer)
    if log_ratio_clamp is not None:
        check_number("log_ratio_clamp", log_ratio_clamp, 0, LARGEST_EXPONENT)
    sequences = sequences_of(mask, logp)
    check_parts(sequences, aggregation, normalizer)
    if old_logp is not None:
        check_tokens("old_logp", old_logp, logp)
    advantages = per_token("advantages", advantages, logp, sequences)
    of_rollout = isinstance(weights, RolloutWeights)
    if isinstance(weights, RolloutWeights):
        weights = rollout_tokens(weights, old_logp, logp, sequences, levels)
    elif weights is not None:
        weights = per_token("weights", weights, logp, sequences)
    return PolicyInputs(logp, old_logp, advantages, sequences.mask, sequences, weights, log_ratio_clamp, not of_rollout)


def rollout_tokens(r: RolloutWeights, old_logp: Tensor | None, logp: Tensor, sequences: Rows | Packed, levels: tuple[str, ...]) -> Tensor:
    """The weights of a correction, one a token; ValueError where the loss cannot take it. Their level says of
    what they are, so nothing is ambiguous where there are as many tokens as sequences."""
    if r.level not in levels:
        takes = f"those of level {' or '.join(map(repr, levels))}" if levels else "none: old_logp is the rollout's, so its ratio corrects already"
        raise ValueError(f"weights are of level {r.level!r}, and this loss takes {takes}")
    if r.source is old_logp:
        raise ValueError("weights correct for the same rollout log-probabilities that old_logp is, so both correct: pass the trainer's as old_logp")
    if r.level != "token":
        return sequences.spread(per_sequence("weights", r.weights, logp, sequences)).expand(logp.shape)
    same_tokens = isinstance(sequences, Packed) and r.weights.numel() == logp.numel()  # in another shape
    weights = r.weights.reshape(logp.shape) if same_tokens else r.weights
    check_tokens("weights", weights, logp)
    return weights.to(computing_dtype(logp))


def policy_tokens(logp: Tensor, old_logp: Tensor | None, advantages: Tensor, mask: Tensor | Packed, **options) -> PolicyTokens:
    """`policy_inputs`, made safe to compute with."""
    return clean(policy_inputs(logp, old_logp, advantages, mask, **options))


def selected_tokens(selected: Tensor, x: PolicyInputs) -> Tensor:
    """A caller's choice of tokens as bool [B, T], without the masked ones."""
    check_tokens("selected", selected, x.logp, "real")
    return x.mask & as_bool(selected)


def with_preset(presets: Mapping[str, Mapping[str, Any]], preset: str | None, default: str | None, **options: Any) -> dict[str, Any]:
    """The options. Those that are None come from `preset`, or from `default` if that is None."""
    check_choice("preset", preset, (None, *presets))
    name = default if preset is None else preset
    table = {} if name is None else presets[name]
    return {option: table.get(option) if value is None else value for option, value in options.items()}


def refuse_context_group(x: PolicyInputs) -> None:
    """For losses that compare tokens of a batch, and would need those of the other ranks."""
    if x.sequences.group_name:
        raise ValueError(
            "this loss compares the tokens of a batch, so it takes no pack with group=: choose tokens on each rank, as selected=, or use group="
        )


def whole_sums(values: Tensor, p: PolicyTokens | PolicyInputs, log_ratio_sums: Tensor | None) -> Tensor:
    """[B] or [S]: the sum of each whole sequence, with the gradient of the tokens here.

    log_ratio_sums: the caller's sums over all parts of the sequences, if there are several micro-batches.
    """
    own = p.sequences.sum(values)
    if log_ratio_sums is None:
        if not p.sequences.whole:
            raise ValueError("parts of sequences (full_lengths=) need log_ratio_sums= [S], added up over the parts: see rlkern.log_ratio_sums")
        return own
    return per_sequence("log_ratio_sums", log_ratio_sums, p.logp, p.sequences) + own_gradient(own)


# --- losses without advantages ------------------------------------------------------------------------------


def ratio_tokens(
    logp: Tensor,
    old_logp: Tensor | None,
    mask: Tensor | Packed,
    *,
    aggregation: str | Tensor = "token-mean",
    normalizer: float | Tensor | None = None,
) -> PolicyTokens:
    """`policy_tokens` without advantages: they are 1."""
    check_aggregation(aggregation, normalizer)
    sequences = sequences_of(mask, logp)
    check_parts(sequences, aggregation, normalizer)
    if old_logp is not None:
        check_tokens("old_logp", old_logp, logp)
    ones = torch.ones_like(logp, dtype=computing_dtype(logp)).detach()
    return clean(PolicyInputs(logp, old_logp, ones, sequences.mask, sequences, None, None))


def log_ratio_to(name: str, other_logp: Tensor, tokens: PolicyTokens) -> Tensor:
    """logp - other_logp [B, T], with the gradient of logp; 0 where masked."""
    check_tokens(name, other_logp, tokens.logp)
    return tokens.logp - torch.where(tokens.mask, other_logp.detach().to(tokens.logp.dtype), 0)
