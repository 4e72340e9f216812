"""Megatron-LM: the cross-entropy of vocabulary-parallel logits, by Megatron's names and arguments.

    patch = rlkern.integrations.megatron.patch()    # in every process, before training; or vocab_size=...
    patch.undo()                                    # or: with rlkern.integrations.megatron.patch(): ...

As of Megatron-LM's main branch of August 2026 (commit d98e8a64). See docs/trainers/megatron.md.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import primitives
from ..checks import check_number
from ..parallel import Meeting, add_up, world
from ..primitives.sharded_stats import part_payloads
from .patching import Patch
from .versions import check_arguments, module_of
from .vocab_parallel import tensor_parallel_group

__all__ = ["fused_vocab_parallel_cross_entropy", "patch", "vocab_parallel_cross_entropy"]


def vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    tp_group: Any = None,
    *,
    vocab_size: int | None = None,
) -> Tensor:
    """megatron.core.tensor_parallel.vocab_parallel_cross_entropy: [s, b, V / tp] and [s, b] -> [s, b].

    -log p in float32 (float64 for float64 logits). The logits are not written to, and their gradient has
    their dtype. A target of -100 has a loss of 0 and no gradient.

    Args:
        label_smoothing: in [0, 1): 1 - label_smoothing is the share of the target, the rest is spread evenly
            over all other ids of the vocabulary. Megatron spreads it over those of the same rank.
        tp_group: whose ranks hold the vocabulary in order; None: Megatron's tensor-parallel group.
        vocab_size: not Megatron's: ids from there on are padding, with no probability and no gradient.

    Raises:
        ImportError: no tp_group, and megatron-core is not installed.
        TypeError, ValueError, IndexError: as `rlkern.token_stats`; for another label_smoothing.
    """
    group = tensor_parallel_group(tp_group)
    with Meeting("vocab_parallel_cross_entropy", group, vocab_parallel_logits) as meeting:
        meeting.would_send(lambda: part_payloads(vocab_parallel_logits, target, False, None, meeting.ranks))
        check_number("label_smoothing", label_smoothing, 0, 1)
        if label_smoothing == 1:
            raise ValueError("label_smoothing must be in [0, 1), got 1")
        meeting.about(options={"label_smoothing": label_smoothing, "vocab_size": vocab_size})
    stats = primitives.token_stats(vocab_parallel_logits, target, with_entropy=False, group=group, vocab_size=vocab_size)
    if label_smoothing == 0:
        return -stats.logp
    vocab = vocab_size or vocab_parallel_logits.shape[-1] * world(group)
    if vocab < 2:
        raise ValueError("label_smoothing needs a vocabulary of at least two ids, got one")
    mean_logp = _sum_of_logits(vocab_parallel_logits, group, vocab) / vocab - stats.logsumexp
    share = label_smoothing * vocab / (vocab - 1)
    loss = -(1 - share) * stats.logp - share * mean_logp
    return torch.where(target == -100, 0, loss).to(stats.logp.dtype)


def _sum_of_logits(logits: Tensor, group: Any, vocab: int) -> Tensor:
    """Over all ids of the vocabulary, in float64. Each rank gets the gradient of its own columns."""
    start = 0 if group is None else torch.distributed.get_rank(group) * logits.shape[-1]
    own = logits[..., : max(vocab - start, 0)].sum(-1, dtype=torch.float64)
    if world(group) == 1:
        return own
    total = add_up(own.detach().clone(), group.group_name)
    return own + (total - own.detach())


def fused_vocab_parallel_cross_entropy(vocab_parallel_logits: Tensor, target: Tensor, tp_group: Any, *, vocab_size: int | None = None) -> Tensor:
    """megatron.core.fusions.fused_cross_entropy's: as `vocab_parallel_cross_entropy`.

    The gradient has the dtype of the logits, where Megatron's is bfloat16.
    """
    return vocab_parallel_cross_entropy(vocab_parallel_logits, target, tp_group=tp_group, vocab_size=vocab_size)


def patch(*, vocab_size: int | None = None) -> Patch:
    """Replaces both functions wherever Megatron imports them, now or later, until the `Patch` is undone.

    Args:
        vocab_size: that of the model without padding. None: padded ids count in the softmax, as by Megatron.

    Raises:
        ImportError: megatron-core is not there, or its functions take other arguments than known here.
    """
    needed = "rlkern.integrations.megatron.patch needs Megatron (pip install megatron-core)"
    unfused, fused = "megatron.core.tensor_parallel.cross_entropy", "megatron.core.fusions.fused_cross_entropy"
    functions = (
        (module_of(unfused, needed), vocab_parallel_cross_entropy),
        (module_of(fused, needed), fused_vocab_parallel_cross_entropy),
    )
    for module, function in functions:
        check_arguments("Megatron", module, {function.__name__: function})
    return Patch.everywhere("megatron", [(module, f.__name__, partial(f, vocab_size=vocab_size)) for module, f in functions])
