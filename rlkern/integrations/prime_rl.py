"""prime-rl: selective_log_softmax and compute_entropy by its names and signatures, and a custom loss.

    [trainer.loss]
    type = "custom"
    import_path = "rlkern.integrations.prime_rl.policy_loss"

    [trainer.loss.kwargs]
    loss = "cispo"
    clip_high = 0.28

prime-rl has no releases to go by: `patch` checks the signatures that it replaces. See
docs/trainers/prime_rl.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import primitives
from ..checks import check_choice, check_number, expect
from ..losses import LossOutput
from ..losses.aggregate import own_aggregation
from ..primitives.packing import packed
from .patching import Patch
from .registry import REGISTRY, check_offered, dry_run
from .versions import check_arguments

__all__ = [
    *("LOSSES", "PACKED_LOSSES", "check_loss", "compute_entropy", "packed_policy_loss", "patch", "policy_loss"),
    *("selective_log_softmax", "selective_log_softmax_with_kept"),
    *("selective_log_softmax_with_sampling_mask", "selective_topk_log_softmax"),
]

# All that need no more than a sequence; "grpo" is "ppo" and a KL term, which needs a reference.
LOSSES = tuple(name for name, loss in REGISTRY.items() if not (loss.needs or loss.compares_sequences or name == "grpo"))
# Whole micro-batches also offer a choice among the tokens of many sequences.
PACKED_LOSSES = tuple(name for name, loss in REGISTRY.items() if not loss.needs and name != "grpo")
_AGGREGATIONS = ("token-mean", "seq-mean-token-mean")
_FIELDS = ("trainer_logprobs", "inference_logprobs", "advantages", "loss_mask")  # prime-rl's, in a loss's order


def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
    """prime_rl.trainer.rl.loss.selective_log_softmax: logits [B, T, V], index [B, T] -> [B, T].

    The result is float32, whatever the dtype of the logits.
    """
    return primitives.token_logprobs(logits, index)


def selective_topk_log_softmax(logits: Tensor, topk_ids: Tensor) -> Tensor:
    """prime_rl.trainer.rl.loss.selective_topk_log_softmax: logits [B, T, V], topk_ids [B, T, K] -> [B, T, K].

    The result is float32, and 0 at ids of -1.
    """
    return primitives.token_logprobs(logits, topk_ids, ignore_index=-1)


def selective_log_softmax_with_sampling_mask(logits: Tensor, index: Tensor, sampling_mask: Tensor) -> Tensor:
    """prime_rl.trainer.rl.loss.selective_log_softmax_with_sampling_mask.

    logits [B, T, V], index [B, T], sampling_mask [B, T, K] -> [B, T] float32. A row's softmax is over the ids
    of its sampling_mask, int32 or int64, of which negative ones are padding. It is over the whole vocabulary
    if there are none, or if the token is not among them.
    """
    return primitives.token_logprobs(logits, index, keep=primitives.Kept.ids(sampling_mask), outside="everything")


def selective_log_softmax_with_kept(logits: Tensor, index: Tensor, kept_tokens: Tensor) -> Tensor:
    """`selective_log_softmax_with_sampling_mask` by its name before prime-rl's pull request 3431."""
    return selective_log_softmax_with_sampling_mask(logits, index, kept_tokens)


@torch.no_grad()
def compute_entropy(shifted_logits: Tensor) -> Tensor:
    """prime_rl.trainer.rl.loss.compute_entropy: [B, T, V] -> [B, T], in nats, float32, without gradient."""
    return primitives.entropy_from_logits(shifted_logits)


def policy_loss(inputs: Any, *, loss: str, aggregation: str | None = None, mean_length: float | None = None, **options: Any) -> LossOutput:
    """A policy loss of rlkern's as prime-rl's custom loss.

    prime-rl calls it with one sequence at a time, adds the losses up and divides by the batch's tokens.

    Args:
        inputs: prime-rl's LossInputs, all [seq]: trainer_logprobs, inference_logprobs (the old policy),
            advantages, loss_mask and, where its version has them, loss_weights. The weights multiply the loss
            of each token, whatever the loss: the ratio is to the rollout already.
        loss: one of `LOSSES`.
        aggregation: "token-mean" is the sum over the sequence's tokens, so every token of the batch weighs
            alike. "seq-mean-token-mean" is their mean times mean_length, so every sequence does. None takes
            the loss's own: "gspo", "gmpo" and "sapo" are means over sequences.
        mean_length: for "seq-mean-token-mean", the tokens of a sequence on average, > 0. prime-rl divides by
            the tokens of the batch, which a loss is not told. With the true number the loss is the mean over
            sequences; None is 1, and leaves it smaller by that factor.
        options: of rlkern's function, from [trainer.loss.kwargs], but normalizer and weights.

    Returns:
        LossOutput(loss, metrics), as prime-rl's LossOutputs: 0-d, metrics detached 0-d tensors.

    Raises:
        TypeError, ValueError: names and options that do not exist or do not fit; `check_loss` tells earlier.
    """
    check_offered("policy loss", loss, LOSSES, "prime-rl", one_by_one=True)
    weights = getattr(inputs, "loss_weights", None)
    tokens = tuple(getattr(inputs, field).unsqueeze(0) for field in _FIELDS)
    return _summed(loss, tokens, None if weights is None else weights.unsqueeze(0), aggregation, mean_length, options)


def _summed(loss: str, tokens: tuple, weights: Tensor | None, aggregation: str | None, mean_length: float | None, options: dict) -> LossOutput:
    """The loss as a sum, which prime-rl divides by the batch's tokens."""
    function = REGISTRY[loss].function
    aggregation = own_aggregation(function) if aggregation is None else aggregation
    check_choice("aggregation", aggregation, _AGGREGATIONS)
    if mean_length is not None:
        check_number("mean_length", mean_length)
        if not 0 < mean_length < math.inf or aggregation == "token-mean":
            raise ValueError(f"mean_length is a number above 0 for aggregation 'seq-mean-token-mean', got {mean_length} with {aggregation!r}")
    normalizer = 1.0 if mean_length is None else 1 / mean_length
    return function(*tokens, weights=weights, aggregation=aggregation, normalizer=normalizer, **options)


def packed_policy_loss(
    trainer_logprobs: Sequence[Tensor],
    inference_logprobs: Sequence[Tensor],
    advantages: Sequence[Tensor],
    loss_mask: Sequence[Tensor],
    loss_weights: Sequence[Tensor] | None = None,
    *,
    loss: str,
    aggregation: str | None = None,
    mean_length: float | None = None,
    **options: Any,
) -> LossOutput:
    """The sum of `policy_loss` over the sequences of a micro-batch, in one call of rlkern's function.

        out = packed_policy_loss(trainer_logprobs, inference_logprobs, advantages, loss_mask, loss="gspo")
        loss = out.loss / rl_scale

    prime-rl's `compute_loss` cuts a packed micro-batch into lists and calls a custom loss once for each
    sequence. This takes these lists, for a trainer that calls it in place of `compute_loss`, which has the
    "ce" and "ref_kl" components beside it.

    Args:
        trainer_logprobs, inference_logprobs, advantages, loss_mask, loss_weights: lists of [seq], the
            sequences in the same order. A sequence may be padding alone. prime-rl's own mask of the component
            is loss_mask & (rl_weights != 0), its loss_weights are rl_weights.
        loss: one of `PACKED_LOSSES`. "clip_cov" and "kl_cov" choose among all tokens of the micro-batch.
        aggregation, mean_length, options: as in `policy_loss`.

    Returns:
        LossOutput(loss, metrics): the sum, and the metrics of all tokens, as one call over them has it.

    Raises:
        TypeError, ValueError: as `policy_loss`, and for lists that do not match.
    """
    check_offered("policy loss", loss, PACKED_LOSSES, "prime-rl")
    given = dict(zip(_FIELDS, (trainer_logprobs, inference_logprobs, advantages, loss_mask), strict=True))
    if loss_weights is not None:
        given["loss_weights"] = loss_weights
    lengths = _lengths("trainer_logprobs", trainer_logprobs)
    if not lengths:
        raise ValueError("packed_policy_loss needs at least one sequence, got an empty list")
    for name, x in given.items():
        if (others := _lengths(name, x)) != lengths:
            raise ValueError(f"{name} must have sequences of the lengths of trainer_logprobs, {lengths}, got {others}")
    # [1, N]: what is one a token is then never taken for one a sequence.
    rows = {name: torch.cat(list(x)).unsqueeze(0) for name, x in given.items()}
    pack = packed(lengths=lengths, mask=rows["loss_mask"])
    tokens = (*(rows[name] for name in _FIELDS[:3]), pack)
    return _summed(loss, tokens, rows.get("loss_weights"), aggregation, mean_length, options)


def _lengths(name: str, sequences: Sequence[Tensor]) -> list[int]:
    if not isinstance(sequences, Sequence):
        raise TypeError(f"{name} must be a list of tensors [seq], got {type(sequences).__name__}")
    for i, x in enumerate(sequences):
        expect(f"{name}[{i}]", x, "real", "[seq]")
    return [x.shape[0] for x in sequences]


def check_loss(*, loss: str, **options: Any) -> None:
    """Raises, before training starts, what `policy_loss` would raise for these kwargs at its first step."""

    def one_sequence(*tokens: Tensor) -> LossOutput:
        inputs = SimpleNamespace(**{field: x[0] for field, x in zip(_FIELDS, tokens, strict=True)})
        return policy_loss(inputs, loss=loss, **options)

    dry_run(one_sequence)


def patch() -> Patch:
    """Replaces prime-rl's selective_log_softmax and compute_entropy.

    Where there, selective_topk_log_softmax and selective_log_softmax_with_sampling_mask too. They are
    replaced wherever prime-rl imports them, now or later, until the `Patch` is undone.

    Raises:
        ImportError: prime-rl is not there, or a function is missing or takes other arguments than known here.
    """
    try:
        from prime_rl.trainer.rl import loss as module
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("prime_rl"):
            raise
        raise ImportError(
            "rlkern.integrations.prime_rl.patch needs prime-rl with prime_rl.trainer.rl.loss (github.com/PrimeIntellect-ai/prime-rl)"
        ) from None
    replacements = {"selective_log_softmax": selective_log_softmax, "compute_entropy": compute_entropy}
    for function in (selective_topk_log_softmax, selective_log_softmax_with_sampling_mask, selective_log_softmax_with_kept):
        if hasattr(module, function.__name__):
            replacements[function.__name__] = function
    check_arguments("prime-rl", module, replacements)
    return Patch.everywhere("prime_rl", [(module, name, new) for name, new in replacements.items()])
