"""AReaL: log-probabilities and entropy of logits that ranks may share, by AReaL's names and arguments.

    patch = rlkern.integrations.areal.patch()     # in every process that trains
    patch.undo()                                  # or: with rlkern.integrations.areal.patch(): ...

As of AReaL's main branch of May 2026 (commit 4aef98d8). See docs/trainers/megatron.md.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import primitives
from .patching import Patch
from .versions import check_arguments, module_of

__all__ = ["gather_logprobs", "gather_logprobs_entropy", "patch"]


def gather_logprobs(logits: Tensor, labels: Tensor, temperature: float = 1.0, tp_group: Any = None, chunk_size: int = 1024) -> Tensor:
    """areal.utils.functional.gather_logprobs: [..., V / tp] and [...] -> [...], float32.

    Args:
        tp_group: whose ranks hold the vocabulary in order; None: these logits are all of it.
        chunk_size: AReaL's, not needed here.

    Raises:
        TypeError, ValueError, IndexError: as `rlkern.token_stats`.
    """
    return primitives.token_logprobs(logits, labels, temperature=temperature, group=tp_group)


def gather_logprobs_entropy(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, tp_group: Any = None, chunk_size: int = 1024
) -> tuple[Tensor, Tensor]:
    """areal.utils.functional.gather_logprobs_entropy: `gather_logprobs`, and the entropy with gradient."""
    stats = primitives.token_stats(logits, labels, temperature=temperature, group=tp_group)
    return stats.logp, stats.entropy


def patch() -> Patch:
    """Replaces both functions wherever AReaL imports them, now or later, until the `Patch` is undone.

    Raises:
        ImportError: AReaL is not there, or its functions take other arguments than known here.
    """
    needed = "rlkern.integrations.areal.patch needs AReaL (github.com/inclusionAI/AReaL)"
    vocab_parallel = module_of("areal.utils.functional.vocab_parallel", needed)
    functions = {function.__name__: function for function in (gather_logprobs, gather_logprobs_entropy)}
    check_arguments("AReaL", vocab_parallel, functions)
    return Patch.everywhere("areal", [(vocab_parallel, name, new) for name, new in functions.items()])
