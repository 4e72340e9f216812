"""miles: log-probabilities, also over the sets that its rollouts send, by miles' names and arguments.

    patch = rlkern.integrations.miles.patch()     # in every process that trains
    patch.undo()                                  # or: with rlkern.integrations.miles.patch(): ...

As of miles' main branch of August 2026 (commit 31f1ca96). The sets are as of its pull requests 2200 and 2596,
which still change: they are not patched. See docs/trainers/slime.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..primitives import Kept
from . import slime
from .patching import Patch
from .versions import check_arguments, module_of

__all__ = ["build_local_sampling_mask", "calculate_log_probs_and_entropy", "patch"]


def build_local_sampling_mask(
    logits: Tensor,
    sampling_mask_ids: Sequence[int] | Tensor,
    sampling_mask_offsets: Sequence[int] | Tensor,
    response_indices: Sequence[int] | Tensor,
    *,
    response_length: int,
    tp_rank: int,
) -> Kept:
    """miles.backends.training_utils.sampling_mask.build_local_sampling_mask: a `Kept`, no bool [R, V].

    Args:
        logits: [R, V], of which the number of rows and the device count.
        sampling_mask_ids, sampling_mask_offsets: of one sample: the ids of response token r are
            ids[offsets[r] : offsets[r + 1]].
        response_indices: R response tokens, which the rows of logits predict; none twice.
        response_length: tokens of the response.
        tp_rank: miles', not needed here: the lists are of ids of the whole vocabulary.

    Raises:
        ValueError: numbers that do not fit one another.
        TypeError, ValueError, IndexError: as `Kept.csr`.
    """
    ids = torch.as_tensor(sampling_mask_ids, dtype=torch.int32, device=logits.device)
    offsets, rows = (torch.as_tensor(x, device=logits.device) for x in (sampling_mask_offsets, response_indices))
    if len(offsets) != response_length + 1:
        raise ValueError(f"sampling_mask_offsets must have response_length + 1 = {response_length + 1} entries, got {len(offsets)}")
    if rows.shape != logits.shape[:-1]:
        raise ValueError(f"response_indices must name a token for each of the rows {tuple(logits.shape[:-1])} of logits, got {tuple(rows.shape)}")
    return Kept.csr(ids, offsets, rows=rows)


def calculate_log_probs_and_entropy(
    logits: Tensor,
    tokens: Tensor,
    tp_group: Any,
    with_entropy: bool = False,
    entropy_requires_grad: bool = True,
    chunk_size: int = -1,
    true_on_policy: bool = False,
    vocab_size: int | None = None,
    *,
    sampling_mask: Kept | Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """miles.backends.training_utils.loss_hub.math_utils.calculate_log_probs_and_entropy.

    logits [R, V], tokens [R] -> ([R, 1] log-probabilities over the sets, [R] entropy of the whole vocabulary
    or None). As `slime.calculate_log_probs_and_entropy`, with miles' order of arguments.

    Args:
        sampling_mask: bool [R, V], or a `Kept`.
        chunk_size: miles', not needed here.
        vocab_size: not used, as by miles where true_on_policy is False: columns of padding count.
        true_on_policy: must be False: that is about having an engine's very bits.

    Raises:
        TypeError, ValueError, IndexError: as slime's; for true_on_policy.
    """
    if true_on_policy:
        raise ValueError("true_on_policy: rlkern's log-probabilities are not an engine's bits, expected False, got True")
    return slime.calculate_log_probs_and_entropy(logits, tokens, tp_group, with_entropy, chunk_size, sampling_mask, entropy_requires_grad)


def patch() -> Patch:
    """Replaces calculate_log_probs_and_entropy, and so what get_log_probs_and_entropy computes.

    Wherever miles imports it, now or later, until the `Patch` is undone.

    Raises:
        ImportError: miles is not there, or its function takes other arguments than known here.
    """
    needed = "rlkern.integrations.miles.patch needs miles (github.com/radixark/miles)"
    math_utils = module_of("miles.backends.training_utils.loss_hub.math_utils", needed)
    name = calculate_log_probs_and_entropy.__name__
    check_arguments("miles", math_utils, {name: calculate_log_probs_and_entropy})
    return Patch.everywhere("miles", [(math_utils, name, calculate_log_probs_and_entropy)])
