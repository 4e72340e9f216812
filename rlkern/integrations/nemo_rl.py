"""NeMo-RL: log-probabilities and entropy of vocabulary-parallel logits, by NeMo-RL's names and arguments.

    patch = rlkern.integrations.nemo_rl.patch()     # in every process that trains
    patch.undo()                                    # or: with rlkern.integrations.nemo_rl.patch(): ...

As of NeMo-RL's main branch of August 2026 (commit 7ea279ab). Those WithSampling are over the top-k and top-p
sets of the trainer's own logits. They are not patched: later versions replay the engine's sets, which is
better, for those of the current logits move with every update. See docs/trainers/megatron.md, and
docs/kept_sets.md for the sets.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import primitives
from ..primitives import Kept
from .distributed_logprob import ChunkedDistributedEntropy, ChunkedDistributedGatherLogprob, ChunkedDistributedLogprob, DistributedLogprob
from .patching import Patch
from .versions import check_arguments, module_of
from .vocab_parallel import check_one_rank

__all__ = [
    *("ChunkedDistributedEntropy", "ChunkedDistributedGatherLogprob", "ChunkedDistributedLogprob", "ChunkedDistributedLogprobWithSampling"),
    *("DistributedLogprob", "DistributedLogprobWithSampling", "patch"),
]


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


def patch() -> Patch:
    """Replaces the four functions without sampling wherever NeMo-RL imports them, until `undo`.

    Raises:
        ImportError: NeMo-RL is not there, or its functions take other arguments than known here.
    """
    model_utils = module_of("nemo_rl.distributed.model_utils", "rlkern.integrations.nemo_rl.patch needs NeMo-RL (github.com/NVIDIA-NeMo/RL)")
    functions: dict[str, Any] = {
        new.__name__: new for new in (DistributedLogprob, ChunkedDistributedLogprob, ChunkedDistributedGatherLogprob, ChunkedDistributedEntropy)
    }
    check_arguments("NeMo-RL", model_utils, functions)
    return Patch.everywhere("nemo_rl", [(model_utils, name, new) for name, new in functions.items()])
