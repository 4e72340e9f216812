"""NeMo-RL: log-probabilities over the top-k and top-p sets of the trainer's own logits, by NeMo-RL's names.

As of NeMo-RL's main branch of August 2026: call these in place of its autograd functions; nothing is patched.
Later versions replay the engine's sets, which is better: those of the current logits move with every update.
See docs/kept_sets.md.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import primitives
from ..primitives import Kept
from .one_rank import check_one_rank

__all__ = ["ChunkedDistributedLogprobWithSampling", "DistributedLogprobWithSampling"]


class DistributedLogprobWithSampling:
    """nemo_rl.distributed.model_utils.DistributedLogprobWithSampling, for a group of one rank."""

    @staticmethod
    def apply(
        vocab_parallel_logits: Tensor, target: Tensor, tp_group: Any, top_k: int | None, top_p: float | None, inference_only: bool = False
    ) -> Tensor:
        """logits [B, S, V], divided by the temperature, target [B, S], already shifted -> [B, S] float32.

        A target outside its set has -inf, without gradient. Equal logits at the edge of top_p stay or go
        together, where NeMo-RL cuts them by their place in a sort.

        Args:
            top_k: None, or as NeMo-RL's config has it a number below 1, is off.
            top_p: None and 1 are off.
            inference_only: NeMo-RL's, not needed here.

        Raises:
            ValueError: tp_group has several ranks.
            TypeError, ValueError, IndexError: as `rlkern.sampler_threshold` and `rlkern.token_stats`.
        """
        check_one_rank(tp_group, "NeMo-RL")
        top_k = None if top_k is not None and top_k < 1 else top_k
        keep = Kept.at_least(primitives.sampler_threshold(vocab_parallel_logits, top_k=top_k, top_p=top_p))
        return primitives.token_logprobs(vocab_parallel_logits, target, keep=keep, outside="minus_inf")


class ChunkedDistributedLogprobWithSampling:
    """nemo_rl.distributed.model_utils.ChunkedDistributedLogprobWithSampling; it needs no chunks here."""

    @staticmethod
    def apply(
        vocab_parallel_logits: Tensor,
        target: Tensor,
        tp_group: Any,
        top_k: int | None,
        top_p: float | None,
        chunk_size: int,
        inference_only: bool = False,
    ) -> Tensor:
        """As `DistributedLogprobWithSampling.apply`."""
        return DistributedLogprobWithSampling.apply(vocab_parallel_logits, target, tp_group, top_k, top_p, inference_only)
