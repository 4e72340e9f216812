"""slime: log-probabilities over the nucleus that its rollouts send, by slime's names and arguments.

    patch = rlkern.integrations.slime.patch()     # in every process that trains
    patch.undo()                                  # or: with rlkern.integrations.slime.patch(): ...

slime has no releases to go by: `patch` checks the signatures that it replaces. See docs/trainers/slime.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import primitives
from ..parallel import Meeting, vocab_range, world
from ..primitives import Kept
from ..primitives.sharded_stats import part_payloads
from .patching import Patch
from .versions import check_arguments, module_of
from .vocab_parallel import group_or_default

__all__ = ["calculate_log_probs_and_entropy", "nucleus_sets", "patch"]


def calculate_log_probs_and_entropy(
    logits: Tensor,
    tokens: Tensor,
    tp_group: Any,
    with_entropy: bool = False,
    chunk_size: int = -1,
    log_prob_keep_mask: Kept | Tensor | None = None,
    with_entropy_grad: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """slime.utils.ppo_utils.calculate_log_probs_and_entropy: [R, V] and [R] -> ([R, 1], [R] or None).

    Args:
        log_prob_keep_mask: the sets that log-probabilities are over: slime's bool [R, V], or a `Kept`. A
            token outside of its set is added to it, as by slime. The entropy is of the whole vocabulary.
        with_entropy_grad: False: the entropy has no gradient.
        chunk_size: slime's, not needed here.
        tp_group: whose ranks hold the vocabulary in order; None: the default group if there is one, as in
            slime. With several ranks a mask is of this rank's columns, and a `Kept` has lists, of ids of the
            whole vocabulary.

    Raises:
        TypeError, ValueError, IndexError: as `rlkern.token_stats`.
    """
    group, keep = group_or_default(tp_group), log_prob_keep_mask
    full = bool(with_entropy) and keep is not None
    entropy: Tensor | None = None
    if isinstance(keep, Tensor) and world(group) > 1:
        with Meeting("calculate_log_probs_and_entropy", group, logits) as meeting:
            meeting.would_send(lambda: part_payloads(logits, tokens, False, None, meeting.ranks))
            kept = _only_kept(logits, tokens, keep, group)
            meeting.about(options={"with_entropy": bool(with_entropy)})
        logp = primitives.token_logprobs(kept, tokens, group=group)
        if with_entropy:
            entropy = primitives.entropy_from_logits(logits, group=group)
    else:
        options: dict[str, Any] = {"with_entropy": bool(with_entropy) and not full, "with_full": full}
        stats = primitives.token_stats(logits, tokens, keep=keep, group=group, **options)
        logp, entropy = stats.logp, stats.full_entropy if full else stats.entropy
    logp = logp.unsqueeze(-1) if len(logits) > 0 else logp  # slime's shape
    return logp, entropy if with_entropy_grad or entropy is None else entropy.detach()


def _only_kept(logits: Tensor, tokens: Tensor, mask: Tensor, group: Any) -> Tensor:
    """This rank's columns with -inf where neither the mask nor a token of theirs is."""
    if mask.shape != logits.shape:
        raise ValueError(f"log_prob_keep_mask must have the shape of this rank's logits, {tuple(logits.shape)}, got {tuple(mask.shape)}")
    own = tokens - vocab_range(logits.shape[-1], group)[0]
    is_token = own.unsqueeze(-1) == torch.arange(logits.shape[-1], device=logits.device)
    return logits.masked_fill(~(mask.bool() | is_token), -torch.inf)


def _loaded(x: Any) -> Any:
    return x.load() if hasattr(x, "load") else x  # a TensorRef


def nucleus_sets(
    token_ids: Sequence[Any],
    offsets: Sequence[Any],
    total_lengths: Sequence[int],
    response_lengths: Sequence[int],
    *,
    length: int,
    device: torch.device | str = "cpu",
    cp_rank: int = 0,
    cp_size: int = 1,
    allgather_cp: bool = False,
) -> Kept:
    """slime's top-p token ids and offsets of a micro-batch -> the sets of its rows of logits.

    It stands for slime's _build_topp_keep_mask, whose mask has a number for every logit. Rows that predict no
    response token are over everything. So are those whose set is empty, which slime has only for tokens that
    its loss mask leaves out.

    Args:
        token_ids, offsets: of each sample lists, tensors or slime's TensorRefs: the ids of response token r
            are ids[offsets[r] : offsets[r + 1]]. Without offsets a sample has no sets.
        total_lengths, response_lengths: tokens of each sample; a prompt has at least one.
        length: rows of logits on this rank.
        cp_rank, cp_size, allgather_cp: slime's context parallelism: zigzag, or contiguous with allgather_cp.

    Raises:
        TypeError, ValueError: as `Kept.samples`; for samples that do not fit into `length`.
    """
    if len(total_lengths) == 0:
        raise ValueError("total_lengths must have a sample, got none")
    if any(response >= total for total, response in zip(total_lengths, response_lengths, strict=True)):
        raise ValueError(f"response_lengths must be below total_lengths, got {list(response_lengths)} and {list(total_lengths)}")
    given = [(_loaded(ids), _loaded(edges)) for ids, edges in zip(token_ids, offsets, strict=True)]
    samples = [(torch.as_tensor(ids, dtype=torch.int32), torch.as_tensor(edges if len(edges) else [0])) for ids, edges in given]
    rows, lists = [], 0
    for (_, edges), total, response in zip(samples, total_lengths, response_lengths, strict=True):
        count = min(len(edges) - 1, response)
        row = torch.full((total,), -1, dtype=torch.int32)
        first = total - response - 1  # the row before the response predicts its first token
        row[first : first + count] = torch.arange(lists, lists + count, dtype=torch.int32)
        lists += len(edges) - 1
        if cp_size > 1 and not allgather_cp:
            chunk = -(-total // (2 * cp_size))
            chunks = F.pad(row, (0, 2 * cp_size * chunk - total), value=-1).view(2 * cp_size, chunk)
            row = torch.cat([chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]])
        rows.append(row)
    all_rows = torch.cat(rows)
    if allgather_cp:
        all_rows = all_rows[cp_rank * length : (cp_rank + 1) * length]
    if len(all_rows) > length:
        raise ValueError(f"length must hold the {len(all_rows)} rows of the samples, got {length}")
    all_rows = F.pad(all_rows, (0, length - len(all_rows)), value=-1)
    return Kept.samples([ids.to(device) for ids, _ in samples], [edges.to(device) for _, edges in samples], all_rows.to(device))


def patch() -> Patch:
    """Has slime's loss take the sets of its rollouts as they are, and log-probabilities from rlkern.

    It replaces calculate_log_probs_and_entropy wherever slime imports it, and _build_topp_keep_mask of
    slime.backends.megatron_utils.loss, until the `Patch` is undone.

    Raises:
        ImportError: slime is not there, or a function is missing or takes other arguments than known here.
    """
    needed = "rlkern.integrations.slime.patch needs slime and Megatron (github.com/THUDM/slime)"
    loss, ppo_utils = module_of("slime.backends.megatron_utils.loss", needed), module_of("slime.utils.ppo_utils", needed)
    mpu = module_of("megatron.core.mpu", needed)

    def _build_topp_keep_mask(
        T: int,  # noqa: N803
        vocab_local: int,
        device: torch.device,
        top_p_token_ids: list,
        top_p_token_offsets: list,
        total_lengths: list[int],
        response_lengths: list[int],
        allgather_cp: bool,
    ) -> Kept:
        cp = {"cp_rank": mpu.get_context_parallel_rank(), "cp_size": mpu.get_context_parallel_world_size(), "allgather_cp": allgather_cp}
        return nucleus_sets(top_p_token_ids, top_p_token_offsets, total_lengths, response_lengths, length=T, device=device, **cp)

    replacements = [(ppo_utils, calculate_log_probs_and_entropy), (loss, _build_topp_keep_mask)]
    for module, new in replacements:
        check_arguments("slime", module, {new.__name__: new})
    return Patch.everywhere("slime", [(module, new.__name__, new) for module, new in replacements])
