"""SkyRL: log-probabilities and entropy of vocabulary-parallel logits, by SkyRL's names and arguments.

    patch = rlkern.integrations.skyrl.patch()     # in every process that trains
    patch.undo()                                  # or: with rlkern.integrations.skyrl.patch(): ...

As of SkyRL's main branch of August 2026 (commit a9564572), see docs/trainers/megatron.md. The scores over the
sets that its sampler recorded are as of its stack of pull requests 2237 to 2241, which is in review: they are
not patched. See docs/kept_sets.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import primitives
from ..parallel import world
from ..primitives import Kept
from .distributed_logprob import ChunkedDistributedLogprob, DistributedLogprob
from .patching import Patch
from .versions import check_arguments, module_of
from .vocab_parallel import group_or_default, tensor_parallel_group

__all__ = [
    *("ChunkedDistributedLogprob", "DistributedLogprob", "SampleSupportScores", "patch", "sample_support_csr_scores"),
    "vocab_parallel_entropy",
]


def vocab_parallel_entropy(vocab_parallel_logits: Tensor, chunk_size: int | None = None, chunk_memory_mb: int = 512) -> Tensor:
    """skyrl's: [..., V / tp] -> [...] in nats, float32, over Megatron's tensor-parallel group.

    Chunks are not needed here. Raises ImportError without megatron-core; TypeError, ValueError as
    `rlkern.entropy_from_logits`.
    """
    return primitives.entropy_from_logits(vocab_parallel_logits, group=tensor_parallel_group())


def patch() -> Patch:
    """Replaces DistributedLogprob, ChunkedDistributedLogprob and vocab_parallel_entropy.

    Wherever SkyRL imports them, now or later, until the `Patch` is undone.

    Raises:
        ImportError: SkyRL or megatron-core is not there, or a function takes other arguments than known here.
    """
    needed = "rlkern.integrations.skyrl.patch needs SkyRL and Megatron (github.com/NovaSky-AI/SkyRL)"
    model_utils = module_of("skyrl.backends.skyrl_train.distributed.megatron.model_utils", needed)
    functions: dict[str, Any] = {new.__name__: new for new in (DistributedLogprob, ChunkedDistributedLogprob, vocab_parallel_entropy)}
    check_arguments("SkyRL", model_utils, functions)
    return Patch.everywhere("skyrl", [(model_utils, name, new) for name, new in functions.items()])


class SampleSupportScores(NamedTuple):
    """SkyRL's, all of the sampled tokens' shape; 0 where valid_mask is not set."""

    logprobs: Tensor
    entropy: Tensor | None
    valid_mask: Tensor


def sample_support_csr_scores(
    logits_or_hidden: Tensor,
    sampled_ids: Tensor,
    support: Any,
    row_ids: Tensor,
    *,
    vocab_start_index: int,
    vocab_end_index: int,
    tp_group: Any,
    compute_entropy: bool,
    entropy_requires_grad: bool,
    lm_head_weight: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> SampleSupportScores:
    """skyrl.backends.skyrl_train.utils.sample_support_replay.sample_support_csr_scores.

    Args:
        logits_or_hidden: [..., V / ranks], or with lm_head_weight [V / ranks, H] hidden [..., H], whose
            gradient is this rank's share: the sum over ranks is the caller's, as of SkyRL's fused head.
        sampled_ids, row_ids: [...], and the list of each token, -1 for none.
        support: SkyRL's PackedRaggedTensor, of which the values [M] and the row_lengths [R] count.
        vocab_start_index: of this rank's ids; all ranks hold the same number.
        vocab_end_index: not needed here.
        tp_group: None: the default group, if there is one.
        compute_entropy, entropy_requires_grad: the entropy is over the set.
        temperature: of the head's logits, as in SkyRL: logits come divided.
        chunk_size: SkyRL's, not needed here.

    Raises:
        TypeError, ValueError, IndexError: as `rlkern.token_stats` and `rlkern.linear_token_stats`.
    """
    group = group_or_default(tp_group)
    columns = logits_or_hidden.shape[-1] if lm_head_weight is None else lm_head_weight.shape[0]
    lengths = support.row_lengths
    lists = row_ids.clamp(min=0).long()
    listed = lengths[lists] > 0 if len(lengths) else torch.zeros_like(row_ids, dtype=torch.bool)
    valid = (row_ids >= 0) & listed
    options: dict[str, Any] = {"mask": valid, "keep": Kept.counts(support.values, lengths, rows=row_ids), "with_entropy": compute_entropy}
    options |= {"group": group, "vocab_start": vocab_start_index, "vocab_size": columns * world(group)}
    if lm_head_weight is None:
        stats = primitives.token_stats(logits_or_hidden, sampled_ids, **options)
    else:
        stats = primitives.linear_token_stats(
            logits_or_hidden, lm_head_weight, sampled_ids, temperature=temperature, hidden_grad="partial", **options
        )
    entropy = stats.entropy if entropy_requires_grad or not compute_entropy else stats.entropy.detach()
    return SampleSupportScores(stats.logp, entropy, valid)
