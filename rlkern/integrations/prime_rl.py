"""prime-rl: selective_log_softmax and compute_entropy under its names and signatures, and a custom loss. See docs/trainers/prime_rl.md.

    [trainer.loss]
    type = "custom"
    import_path = "rlkern.integrations.prime_rl.policy_loss"

    [trainer.loss.kwargs]
    loss = "cispo"
    clip_high = 0.28

prime-rl has no releases to go by: what `patch` checks is the signatures that it replaces.
"""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import losses, primitives
from ..checks import check_choice, check_number
from ..losses.aggregate import own_aggregation
from .patching import Patch

__all__ = ["LOSSES", "check_loss", "compute_entropy", "patch", "policy_loss", "selective_log_softmax", "selective_topk_log_softmax"]

_TABLE = {
    "ppo": losses.ppo_loss,
    "gspo": losses.gspo_loss,
    "cispo": losses.cispo_loss,
    "sapo": losses.sapo_loss,
    "gmpo": losses.gmpo_loss,
    "reinforce": losses.reinforce_loss,
    "tis": losses.tis_loss,
    "topr": losses.topr_loss,
    "vespo": losses.vespo_loss,
}
LOSSES = tuple(_TABLE)
_OVER_THE_BATCH = ("clip_cov", "kl_cov", "lp_reg")
_AGGREGATIONS = ("token-mean", "seq-mean-token-mean")


def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
    """prime_rl.trainer.rl.loss.selective_log_softmax: logits [B, T, V], index [B, T] -> [B, T], float32 whatever the dtype of the logits."""
    return primitives.token_logprobs(logits, index)


def selective_topk_log_softmax(logits: Tensor, topk_ids: Tensor) -> Tensor:
    """prime_rl.trainer.rl.loss.selective_topk_log_softmax: logits [B, T, V], topk_ids [B, T, K] -> [B, T, K], float32; 0 at ids of -1."""
    return primitives.token_logprobs(logits, topk_ids, ignore_index=-1)


@torch.no_grad()
def compute_entropy(shifted_logits: Tensor) -> Tensor:
    """prime_rl.trainer.rl.loss.compute_entropy: [B, T, V] -> [B, T], in nats, float32, without gradient, as prime-rl's."""
    return primitives.entropy_from_logits(shifted_logits)


def policy_loss(inputs: Any, *, loss: str, aggregation: str | None = None, mean_length: float | None = None, **options: Any) -> losses.LossOutput:
    """A policy loss of rlkern's as prime-rl's custom loss: one sequence at a time; prime-rl adds them up and divides by the batch's tokens.

    Args:
        inputs: prime-rl's LossInputs: trainer_logprobs, inference_logprobs (the old policy), advantages, loss_mask, and, where its version has
            them, loss_weights, which multiply the loss of each token whatever the loss (the ratio is to the rollout already); all [seq].
        loss: one of `LOSSES`.
        aggregation: "token-mean", the sum over the sequence's tokens, so that every token of the batch weighs alike; "seq-mean-token-mean", their
            mean times mean_length, so that every sequence does. None takes the loss's own: "gspo", "gmpo" and "sapo" are means over sequences.
        mean_length: for "seq-mean-token-mean", the tokens of a sequence on average, > 0. prime-rl divides by the tokens of the batch, which a loss
            is not told: with the true number the loss is the mean over sequences, and None, 1, leaves it smaller by that factor.
        options: of rlkern's function, from [trainer.loss.kwargs]; not normalizer and weights, which are given.

    Returns:
        LossOutput(loss, metrics), as prime-rl's LossOutputs: 0-d, metrics detached 0-d tensors.

    Raises:
        TypeError, ValueError: names and options that do not exist or do not fit. `check_loss` tells before training starts.
    """
    if isinstance(loss, str) and loss in _OVER_THE_BATCH:
        raise ValueError(
            f"policy loss {loss!r} compares tokens of many sequences, and prime-rl calls a custom loss with one sequence at a time; expected one of "
            f"{', '.join(map(repr, LOSSES))}"
        )
    check_choice("policy loss", loss, LOSSES)

    function = _TABLE[loss]
    aggregation = own_aggregation(function) if aggregation is None else aggregation
    check_choice("aggregation", aggregation, _AGGREGATIONS)
    if mean_length is not None:
        check_number("mean_length", mean_length)
        if not 0 < mean_length < math.inf or aggregation == "token-mean":
            raise ValueError(f"mean_length is a number above 0 for aggregation 'seq-mean-token-mean', got {mean_length} with {aggregation!r}")

    def row(x: Tensor) -> Tensor:
        return x.unsqueeze(0)

    weights = getattr(inputs, "loss_weights", None)
    return function(
        row(inputs.trainer_logprobs),
        row(inputs.inference_logprobs),
        row(inputs.advantages),
        row(inputs.loss_mask),
        weights=None if weights is None else row(weights),
        aggregation=aggregation,
        normalizer=1.0 if mean_length is None else 1 / mean_length,
        **options,
    )


def check_loss(*, loss: str, **options: Any) -> None:
    """Raises, before training starts, what `policy_loss` would raise for these kwargs at its first step."""
    tokens = torch.zeros(2)
    inputs = SimpleNamespace(trainer_logprobs=tokens, inference_logprobs=tokens, advantages=tokens, loss_mask=tokens == 0, loss_weights=None)
    policy_loss(inputs, loss=loss, **options)


def patch() -> Patch:
    """Replaces prime-rl's selective_log_softmax, compute_entropy and, where it has one, selective_topk_log_softmax wherever they are imported.

    From here on in all threads of this process, until `undo()` on the result or the end of its `with` block; patches nest.

    Raises:
        ImportError: prime-rl is not there, or one of its functions is missing or takes other arguments than this rlkern knows.
    """
    try:
        from prime_rl.trainer.rl import loss as module
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("prime_rl"):
            raise
        raise ImportError(
            "rlkern.integrations.prime_rl.patch needs prime-rl with prime_rl.trainer.rl.loss (github.com/PrimeIntellect-ai/prime-rl)"
        ) from None
    replacements = [selective_log_softmax, compute_entropy]
    if hasattr(module, selective_topk_log_softmax.__name__):
        replacements.append(selective_topk_log_softmax)
    for replacement in replacements:
        name = replacement.__name__
        found = getattr(module, name, None)
        expected = list(inspect.signature(replacement).parameters)
        arguments = None if found is None else list(inspect.signature(found).parameters)
        if arguments != expected:
            raise ImportError(
                f"this prime-rl's {name} takes {arguments}, expected {expected}: rlkern does not know this version of prime-rl; "
                "use a newer rlkern, or leave out patch()"
            )
    return Patch.everywhere("prime_rl", [(module, replacement.__name__, replacement) for replacement in replacements])
