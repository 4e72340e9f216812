"""What trainers' functions of vocabulary-parallel logits have in common: their groups, and ids of no rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from .. import primitives
from ..parallel import world
from ..primitives.sharded_stats import Columns, refuse_rows
from .versions import module_of


def group_or_default(group: Any) -> Any:
    """The group; for None the default one if there is one, as torch.distributed has it."""
    if group is None and distributed.is_available() and distributed.is_initialized():
        return distributed.group.WORLD
    return group


def tensor_parallel_group(group: Any = None) -> Any:
    """The group; for None Megatron's tensor-parallel one. Raises ImportError without megatron-core."""
    if group is not None:
        return group
    needed = "the tensor-parallel group is Megatron's where none is given (pip install megatron-core)"
    return module_of("megatron.core.parallel_state", needed).get_tensor_model_parallel_group()


def check_one_rank(group: Any, trainer: str) -> None:
    """ValueError if the group, or the default one for None, has several ranks."""
    if world(group_or_default(group)) > 1:
        raise ValueError(
            f"tp_group: vocabulary-parallel logits are not supported, expected a group of one rank; {trainer} must run with tensor parallel size 1"
        )


def silent_logprobs(logits: Tensor, targets: Tensor, group: Any, vocab_start: int) -> Tensor:
    """Log-probabilities over ranks with as many columns each, where an id outside of all is no error.

    Its value is 0 and its gradient that of -logsumexp: what comes out where each rank adds what it has of the
    target. logits [..., V / ranks]; targets [...] or [..., K]; None is the default group.
    """
    group = group_or_default(group)
    try:
        vocab = world(group) * logits.shape[-1]
        known = (targets >= 0) & (targets < vocab)
    except Exception as error:
        refuse_rows(error, logits, Columns(group))
    at = {"group": group, "vocab_start": vocab_start, "vocab_size": vocab}
    stats = primitives.token_stats(logits, torch.where(known, targets, 0), with_entropy=False, **at)
    lse = stats.logsumexp if targets.dim() < logits.dim() else stats.logsumexp.unsqueeze(-1)
    return torch.where(known, stats.logp, lse.detach() - lse)
