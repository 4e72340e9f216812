"""The functions of vocabulary-parallel logits that NeMo-RL and SkyRL have from NeMo-Aligner.

Each is a class with `apply`, as called there: by position. Nothing is chunked, for nothing of the logits'
size is made but their gradient, and that in their own dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import primitives
from .vocab_parallel import group_or_default, silent_logprobs

__all__ = ["ChunkedDistributedEntropy", "ChunkedDistributedGatherLogprob", "ChunkedDistributedLogprob", "DistributedLogprob"]


def _differentiating(inference_only: bool) -> Any:
    return torch.set_grad_enabled(torch.is_grad_enabled() and not inference_only)


class DistributedLogprob:
    """Log-probabilities of the targets."""

    @staticmethod
    def apply(
        vocab_parallel_logits: Tensor, target: Tensor, vocab_start_index: int, vocab_end_index: int, group: Any, inference_only: bool = False
    ) -> Tensor:
        """[B, S, V / tp], global ids [B, S] -> [B, S], float32.

        A target of no rank has the value 0, and the gradient of -logsumexp, as there.

        Args:
            vocab_start_index: of this rank's columns; all ranks hold the same number.
            vocab_end_index: not needed here.
            group: None: the default group.
            inference_only: no gradient.

        Raises:
            TypeError, ValueError: as `rlkern.token_stats`.
        """
        with _differentiating(inference_only):
            return silent_logprobs(vocab_parallel_logits, target, group, vocab_start_index)


class ChunkedDistributedLogprob:
    """As `DistributedLogprob`."""

    @staticmethod
    def apply(
        vocab_parallel_logits: Tensor,
        target: Tensor,
        vocab_start_index: int,
        vocab_end_index: int,
        chunk_size: int,
        tp_group: Any,
        inference_only: bool = False,
    ) -> Tensor:
        """As `DistributedLogprob.apply`; chunk_size is not needed here."""
        return DistributedLogprob.apply(vocab_parallel_logits, target, vocab_start_index, vocab_end_index, tp_group, inference_only)


class ChunkedDistributedGatherLogprob:
    """Log-probabilities of K ids a token."""

    @staticmethod
    def apply(
        vocab_parallel_logits: Tensor,
        global_indices: Tensor,
        vocab_start_index: int,
        vocab_end_index: int,
        chunk_size: int,
        tp_group: Any,
        inference_only: bool = False,
    ) -> Tensor:
        """[B, S, V / tp], [B, S, K] -> [B, S, K]; else as `ChunkedDistributedLogprob.apply`."""
        return DistributedLogprob.apply(vocab_parallel_logits, global_indices, vocab_start_index, vocab_end_index, tp_group, inference_only)


class ChunkedDistributedEntropy:
    """sum p log p: the entropy with the sign turned."""

    @staticmethod
    def apply(vocab_parallel_logits: Tensor, chunk_size: int, tp_group: Any, inference_only: bool = False) -> Tensor:
        """[B, S, V / tp] -> [B, S], float32, at most 0.

        chunk_size is not needed here. inference_only: no gradient.

        Raises TypeError, ValueError: as `rlkern.entropy_from_logits`.
        """
        with _differentiating(inference_only):
            return -primitives.entropy_from_logits(vocab_parallel_logits, group=group_or_default(tp_group))
