"""TRL's distillation losses, under TRL's names and arguments, on rlkern's divergences.

Replaced are `generalized_jsd_loss` of GKDTrainer, GOLDTrainer and IWOPDTrainer, and the module function
`_chunked_divergence_loss` of DistillationTrainer. What rlkern has no form of goes to TRL's own function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from trl.trainer import distillation_trainer

from ...primitives.divergence import gkd_divergence, gkd_kind
from ...primitives.linear_divergence import linear_pair_stats
from ...primitives.token_stats import token_stats
from ...primitives.topk import topk_divergence
from .trainers import Replacement, own, replacement
from .versions import check_arguments

_LOSS, _CHUNKED = "generalized_jsd_loss", "_chunked_divergence_loss"
_COMMON = ("student_logits", "teacher_logits", "labels", "beta", "temperature", "reduction")
_JSD_ARGUMENTS = {
    "GKDTrainer": (*_COMMON, "num_items_in_batch"),
    "GOLDTrainer": (*_COMMON, "logits_are_probs", "num_items_in_batch"),
    "IWOPDTrainer": (*_COMMON, "top_k", "add_tail", "num_items_in_batch"),
}
_HEADS = ("student_hidden_states", "teacher_hidden_states", "student_lm_head_weight", "teacher_lm_head_weight", "completion_mask", "beta")
_OPTIONS = (
    *("num_items_in_batch", "student_lm_head_bias", "teacher_lm_head_bias", "student_logit_scale", "teacher_logit_scale"),
    *("student_final_logit_softcapping", "teacher_final_logit_softcapping", "temperature"),
)
_CHUNKED_ARGUMENTS = (*_HEADS, *_OPTIONS), (*_HEADS, "chunk_size", *_OPTIONS)  # the second of TRL 1.14


# --- from logits: GKD, GOLD, IW-OPD -------------------------------------------------------------------------


def _jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    beta: float,
    temperature: float,
    reduction: str,
    num_items_in_batch: Tensor | float | None,
    logits_are_probs: bool = False,
    top_k: int = 0,
    add_tail: bool = True,
) -> Tensor | None:
    if logits_are_probs or (num_items_in_batch is None and reduction not in ("batchmean", "sum", "mean")):
        return None  # "none" is a value for each token of the vocabulary
    width, mask = student_logits.shape[-1], None if labels is None else labels != -100
    if 0 < top_k < width:
        if teacher_logits.requires_grad:
            return None
        values, width = _topk(student_logits, teacher_logits, mask, beta, temperature, top_k, add_tail)
    else:
        with_teacher = teacher_logits.requires_grad
        values = gkd_divergence(student_logits, teacher_logits, beta, temperature=temperature, mask=mask, other_grad=with_teacher)
    total = values.sum()
    if num_items_in_batch is not None:
        return total / _on(total.device, num_items_in_batch)
    if reduction == "sum":
        return total
    if reduction == "mean":  # over the tokens of the vocabulary too
        return total / (width * (values.numel() if mask is None else mask.sum()))
    return total / (max(student_logits.size(0), 1) if mask is None else mask.sum().clamp_min(1))


def _topk(student: Tensor, teacher: Tensor, mask: Tensor | None, beta: float, temperature: float, k: int, add_tail: bool) -> tuple[Tensor, int]:
    """The divergence over the K likeliest tokens of the teacher, student or both; the number of classes."""
    chosen = [x.detach().topk(k, dim=-1).indices for x in ([teacher] if beta == 0 else [student] if beta == 1 else [teacher, student])]
    ids = torch.cat(chosen, -1).sort(-1).values
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[..., 1:] = ids[..., 1:] != ids[..., :-1]
    options: dict[str, Any] = {"temperature": temperature, "mask": mask, "with_entropy": False, "with_tail": add_tail}
    p, q = (token_stats(x, ids, **options) for x in (student, teacher.detach()))
    tails: dict[str, Any] = (
        {"tail": "bucket", "tail_logmass": p.tail_logmass, "other_tail_logmass": q.tail_logmass} if add_tail else {"tail": "renormalize"}
    )
    kind, weight = gkd_kind(beta)
    values = topk_divergence(p.logp, q.logp, kind=kind, beta=weight, valid=valid, **tails)
    return values if mask is None else torch.where(mask, values, 0), ids.shape[-1] + add_tail


def _on(device: torch.device, count: Tensor | float) -> Tensor | float:
    return count.to(device) if isinstance(count, Tensor) else count


# --- from hidden states: DistillationTrainer ----------------------------------------------------------------


def _chunked_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | float | None,
    student_lm_head_bias: Tensor | None,
    teacher_lm_head_bias: Tensor | None,
    student_logit_scale: float,
    teacher_logit_scale: float,
    student_final_logit_softcapping: float | None,
    teacher_final_logit_softcapping: float | None,
    temperature: float,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    weights = student_lm_head_weight, teacher_lm_head_weight
    if student_logit_scale <= 0 or teacher_logit_scale <= 0 or any(hasattr(w, "ds_id") for w in weights):
        return None  # ds_id: ZeRO-3 takes the weight away before the backward
    # The masked positions are left out as by TRL, which waits for their number too.
    valid = completion_mask.reshape(-1) != 0
    student = _head(student_hidden_states, valid, student_lm_head_weight, student_lm_head_bias)
    teacher = _head(teacher_hidden_states, valid, teacher_lm_head_weight, teacher_lm_head_bias)
    kind, weight = gkd_kind(beta)
    stats = linear_pair_stats(
        *student[:2],
        *teacher[:2],
        bias=student[2],
        other_bias=teacher[2],
        temperature=temperature,
        logit_scale=student_logit_scale,
        softcap=student_final_logit_softcapping,
        other_logit_scale=teacher_logit_scale,
        other_softcap=math.inf if teacher_final_logit_softcapping is None else teacher_final_logit_softcapping,  # None: the student's
        vocab=len(student[1]),
        kind=kind,
        beta=weight,
    )
    tokens = valid.sum()
    items = tokens.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return stats.divergence.sum() / _on(tokens.device, items), stats.entropy.detach().sum(), tokens


def _head(hidden: Tensor, valid: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The valid rows of hidden, and the matrix and bias in hidden's dtype; FSDP2's are gathered."""
    if isinstance(weight, torch.distributed.tensor.DTensor):
        weight = weight.full_tensor()
        bias = None if bias is None else bias.full_tensor()  # type: ignore[attr-defined]
    return hidden.reshape(-1, hidden.size(-1))[valid], weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)


# --- patching -----------------------------------------------------------------------------------------------


def chunked_replacements() -> list[tuple[Any, str, Callable]]:
    """The module function and what replaces it. Raises UnknownTRLError if it takes other arguments."""
    stock = getattr(distillation_trainer, _CHUNKED)
    check_arguments(_CHUNKED, stock, *_CHUNKED_ARGUMENTS)
    return [(distillation_trainer, _CHUNKED, replacement(stock, _chunked_loss))]


def jsd_replacements(cls: type) -> list[Replacement]:
    """The class's loss and what replaces it, if it is TRL's and has such a loss of its own."""
    known = _JSD_ARGUMENTS.get(cls.__name__)
    if known is None or not own(cls, _LOSS):
        return []
    stock = getattr(cls, _LOSS)
    check_arguments(f"{cls.__name__}.{_LOSS}", stock, known)
    return [(cls, _LOSS, staticmethod(replacement(stock, _jsd_loss)))]
