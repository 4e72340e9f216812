"""TRL's functions of logits, under TRL's names and arguments, on rlkern's kernels.

Results are float32 whatever the dtype of the logits (float64 for float64), as those of TRL's own GPU kernel
are; TRL's PyTorch path returns the logits' dtype, and a bfloat16 log-probability is off by up to 0.4 %.
"""

from __future__ import annotations

from torch import Tensor

from ... import primitives

_IGNORED = -100


def selective_log_softmax(logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None) -> Tensor:
    """log softmax(logits / temperature): logits [..., V], index [...] or [..., K] -> shaped like index.

    row_mask: shaped like index; entries where it is 0 are 0.
    """
    if row_mask is not None and index.dim() == logits.dim():
        index = index.masked_fill(row_mask == 0, _IGNORED)
        return primitives.token_logprobs(logits, index, temperature=temperature, ignore_index=_IGNORED)
    return primitives.token_logprobs(logits, index, temperature=temperature, mask=row_mask)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Entropy in nats: [..., V] -> float32 [...]. chunk_size is TRL's, and not needed here."""
    return primitives.entropy_from_logits(logits)


def selective_log_softmax_and_entropy(
    logits: Tensor, index: Tensor, entropy_requires_grad: bool = True, temperature: float = 1.0, row_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Both in one pass: logits [..., V], index [...] -> float32 [...] each, 0 where row_mask is 0."""
    stats = primitives.token_stats(logits, index, temperature=temperature, mask=row_mask)
    return stats.logp, stats.entropy if entropy_requires_grad else stats.entropy.detach()
