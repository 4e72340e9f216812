"""twinkle and ms-swift: log-probabilities over the sets of a rollout, by twinkle's name and arguments.

As of twinkle's tests of September 2026: call this in place of its function; nothing is patched. See
docs/kept_sets.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import primitives
from .rollouts import kept_from_lists

__all__ = ["replayed_selective_log_softmax"]


def replayed_selective_log_softmax(logits: Tensor, labels: Tensor, loss_mask: Tensor, sampling_masks: Sequence[Any], temperature: float) -> Tensor:
    """twinkle.utils.torch_utils.replayed_selective_log_softmax: [B, T, V] and [B, T] -> [B, T] float32.

    Args:
        loss_mask: [B, T], not 0 at the tokens that have a set, in order. The others are 0.
        sampling_masks: of each sample an object with token_ids and offsets.
        temperature: > 0, that of the rollout.

    A label outside its set is added to it, where twinkle raises. An entropy bonus or a KL term, which twinkle
    refuses beside it, need `rlkern.token_stats(keep=kept_from_lists(sampling_masks, loss_mask))`.

    Raises:
        TypeError, ValueError, IndexError: as `kept_from_lists` and `rlkern.token_stats`.
    """
    keep = kept_from_lists(sampling_masks, loss_mask)
    return primitives.token_logprobs(logits, labels, mask=loss_mask, temperature=temperature, keep=keep)
